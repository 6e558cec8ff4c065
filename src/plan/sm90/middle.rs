//! The first kinds of tickets, h and y in forward or dh and dx in backward, after those that split factors, and how long they take.

use super::model::{Alters, Machine, MainTile};
use super::schedule::Timeline;

/// Units of h (or dh), and the main tiles that read it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Middle {
    /// Tickets of units that split factors, which h waits for.
    pub splits: u64,
    /// Groups of blocks of rows.
    pub groups: u64,
    /// Main tiles per group; 0 when none is wanted.
    pub columns: u64,
    /// Units of h: groups × narrow tiles along R; 0 when none is wanted.
    pub units: u64,
    /// The dimension that h reduces over.
    pub depth: usize,
    pub rank: usize,
    /// What happens to the rows that it reads.
    pub alters: Alters,
    pub main: MainTile,
    /// Groups of rows that pass over w together.
    pub group_m: u32,
}

/// What remains to be told after them.
pub(super) struct Ran {
    pub timeline: Timeline,
    /// When the last unit of h is done.
    pub ready: f64,
    /// Clocks that main tiles wait for h, at most.
    pub stall: f64,
}

impl Middle {
    pub(super) fn tickets(&self, bundle: u64) -> u64 {
        self.units.div_ceil(bundle)
    }

    fn tiles(&self) -> u64 {
        self.groups * self.columns
    }

    /// Clocks of one unit of h when they are handed out in such bundles.
    fn unit(&self, machine: &Machine, bundle: u64) -> f64 {
        machine.narrow(self.depth, self.rank, self.tickets(bundle), self.alters)
    }

    /// Bundle sizes worth a look: single units; as many as leave all of h to the clusters that have a free slot in the last
    /// wave of main tiles; as many as are done before a main tile of the first wave wants them.
    pub(super) fn bundles(&self, machine: &Machine, decided: Option<u32>) -> Vec<u64> {
        let most = self.units.max(1);
        if let Some(bundle) = decided {
            return vec![u64::from(bundle).clamp(1, most)];
        }
        let clusters = u64::from(machine.clusters);
        let free = (clusters - self.tiles() % clusters) % clusters;
        let in_time = self.main.until_tail / self.unit(machine, 1);
        let mut bundles = vec![1, self.units.div_ceil(clusters), self.units.div_ceil(free.max(1)), in_time as u64];
        bundles.iter_mut().for_each(|bundle| *bundle = (*bundle).clamp(1, most));
        bundles.sort_unstable();
        bundles.dedup();
        bundles
    }

    /// Lists the tickets of all these kinds.
    pub(super) fn run(&self, machine: &Machine, bundle: u64) -> Ran {
        let mut timeline = Timeline::new(machine.clusters);
        let (tickets, unit) = (self.tickets(bundle), self.unit(machine, bundle));
        timeline.draw(self.splits, machine.split());
        let all_split = timeline.end();
        // With few tickets of h main tiles begin meanwhile.
        let late = if tickets < u64::from(machine.clusters) { all_split - timeline.next() } else { 0.0 };
        if late == 0.0 {
            timeline.wait(all_split);
        }
        if let Some(each) = self.units.checked_div(tickets) {
            // The first tickets have a unit more where they do not come out even.
            let more = self.units - each * tickets;
            timeline.draw(more, late + unit * (each + 1) as f64);
            timeline.draw(tickets - more, late + unit * each as f64);
        }
        let ready = timeline.end();
        let stall = if self.tiles() == 0 { 0.0 } else { self.stall(machine, tickets, (all_split, unit), &timeline) };
        timeline.draw(self.tiles(), self.main.clocks);
        Ran { timeline, ready, stall }
    }

    /// The longest that a main tile waits. Tiles come in passes of `group_m` groups of rows over all columns, so each
    /// pass wants the next few units of h; looked at are passes 0, 1, 3, 7 and so on.
    fn stall(&self, machine: &Machine, tickets: u64, (start, unit): (f64, f64), after_h: &Timeline) -> f64 {
        if self.units == 0 {
            return 0.0;
        }
        let group_m = u64::from(self.group_m);
        let rounds = tickets.div_ceil(u64::from(machine.clusters));
        let last_of_pass = |pass: u64| {
            let group = ((pass + 1) * group_m).min(self.groups) - 1;
            // The last narrow tile of that group.
            self.units - self.groups + group
        };
        // A ticket t hands out units t, t + tickets, t + 2 tickets, ...; whole tickets of other rounds come before.
        let bundle = self.units.div_ceil(tickets);
        let ready = |index: u64| {
            let round = index % tickets / u64::from(machine.clusters);
            start + (round * bundle + index / tickets + 1) as f64 * unit
        };
        let all_ready = start + (rounds * bundle) as f64 * unit;
        let passes = self.groups.div_ceil(group_m);
        let (mut timeline, mut stall, mut pass) = (after_h.clone(), 0.0_f64, 0);
        let mut drawn = 0;
        while pass < passes {
            let first = pass * group_m * self.columns;
            timeline.draw(first - drawn, self.main.clocks);
            drawn = first;
            let wanted = timeline.next() + self.main.until_tail;
            if wanted >= all_ready {
                break;
            }
            stall = stall.max(ready(last_of_pass(pass)) - wanted);
            pass = 2 * pass + 1;
        }
        stall
    }
}
