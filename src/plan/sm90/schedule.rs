//! When clusters that draw tickets are done: list scheduling, in time that does not grow with the number of tickets.

/// Workers by the time they are free, in clocks. Few times are distinct, because tickets of a kind last equally long.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Timeline {
    /// (time, workers), by ascending time, each time once.
    free: Vec<(f64, u64)>,
}

impl Timeline {
    /// So many workers (at least one), all free.
    pub(super) fn new(workers: u32) -> Timeline {
        Timeline { free: vec![(0.0, u64::from(workers.max(1)))] }
    }

    /// When the next ticket is drawn.
    pub(super) fn next(&self) -> f64 {
        self.free.first().map_or(0.0, |first| first.0)
    }

    /// When the last worker is done.
    pub(super) fn end(&self) -> f64 {
        self.free.last().map_or(0.0, |last| last.0)
    }

    /// Nobody draws before `time`.
    pub(super) fn wait(&mut self, time: f64) {
        let early = self.free.partition_point(|entry| entry.0 <= time);
        let count: u64 = self.free.drain(..early).map(|entry| entry.1).sum();
        if count > 0 {
            self.free.insert(0, (time, count));
        }
    }

    /// Hands out tickets that last `clocks` each, every one to the worker that is free first.
    pub(super) fn draw(&mut self, mut tickets: u64, clocks: f64) {
        if clocks <= 0.0 {
            return;
        }
        while tickets > 0 {
            tickets -= match self.rounds(tickets, clocks) {
                0 => self.step(tickets, clocks),
                drawn => drawn,
            };
        }
    }

    /// Whole rounds at once: the workers that are free within one ticket of the first draw in turn until the next worker
    /// is free. Returns the tickets drawn.
    fn rounds(&mut self, tickets: u64, clocks: f64) -> u64 {
        let first = self.next();
        if first + clocks <= first {
            // Nothing beside what was drawn before.
            return tickets;
        }
        let near = self.free.partition_point(|entry| entry.0 < first + clocks);
        let (in_turn, later) = self.free.split_at_mut(near);
        let (Some(last), workers) = (in_turn.last(), in_turn.iter().map(|entry| entry.1).sum::<u64>()) else {
            return 0;
        };
        let until = later.first().map_or(u64::MAX, |next| ((next.0 - last.0) / clocks) as u64);
        let rounds = until.min(tickets / workers.max(1));
        in_turn.iter_mut().for_each(|entry| entry.0 += rounds as f64 * clocks);
        // The last of them may be free at the same time as the next now.
        if let (Some(last), Some(next)) = (in_turn.last(), later.first_mut())
            && last.0 == next.0
        {
            next.1 += last.1;
            self.free.remove(near - 1);
        }
        rounds * workers
    }

    /// One ticket for each worker that is free first, or for fewer. Returns the tickets drawn.
    fn step(&mut self, tickets: u64, clocks: f64) -> u64 {
        let (time, count) = self.free.remove(0);
        let drawn = count.min(tickets);
        if drawn < count {
            self.free.insert(0, (time, count - drawn));
        }
        self.insert(time + clocks, drawn);
        drawn
    }

    fn insert(&mut self, time: f64, count: u64) {
        let at = self.free.partition_point(|entry| entry.0 < time);
        match self.free.get_mut(at) {
            Some(entry) if entry.0 == time => entry.1 += count,
            _ => self.free.insert(at, (time, count)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Timeline;

    /// Ticket by ticket.
    fn naive(workers: u32, phases: &[(u64, f64)]) -> Vec<f64> {
        let mut free = vec![0.0_f64; workers as usize];
        for &(tickets, clocks) in phases {
            for _ in 0..tickets {
                let at = (0..free.len()).min_by(|&a, &b| free[a].total_cmp(&free[b])).unwrap();
                free[at] += clocks;
            }
        }
        free.sort_by(f64::total_cmp);
        free
    }

    #[test]
    fn the_same_as_ticket_by_ticket() {
        let mut seed = 1_u64;
        let mut random = |limit: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (seed >> 33) % limit
        };
        for _ in 0..500 {
            let workers = 1 + random(140) as u32;
            let phases: Vec<(u64, f64)> =
                (0..1 + random(4)).map(|_| (random(2000), (1 + random(5000)) as f64)).collect();
            let mut timeline = Timeline::new(workers);
            phases.iter().for_each(|&(tickets, clocks)| timeline.draw(tickets, clocks));
            let expected = naive(workers, &phases);
            let got: Vec<f64> = timeline.free.iter().flat_map(|&(time, count)| vec![time; count as usize]).collect();
            assert_eq!(got, expected, "{workers} workers, {phases:?}");
        }
    }

    #[test]
    fn nobody_draws_before_the_wait_is_over() {
        let mut timeline = Timeline::new(3);
        timeline.draw(1, 5.0);
        timeline.wait(2.0);
        assert_eq!(timeline, Timeline { free: vec![(2.0, 2), (5.0, 1)] });
        timeline.wait(7.0);
        timeline.wait(1.0);
        assert_eq!(timeline, Timeline { free: vec![(7.0, 3)] });
    }

    #[test]
    fn any_number_of_tickets_is_quick() {
        let mut timeline = Timeline::new(66);
        timeline.draw(3, 1e9);
        timeline.draw(u64::from(u32::MAX), 3.0);
        timeline.draw(u64::from(u32::MAX), 1e12);
        // A ticket that outlasts billions of others.
        timeline.draw(1, 1e15);
        timeline.draw(u64::from(u32::MAX), 7.0);
        // Tickets that vanish beside the time so far.
        timeline.draw(u64::from(u32::MAX), 1e20);
        timeline.draw(u64::from(u32::MAX), 1.0);
        assert!(timeline.end().is_finite() && timeline.next() > 0.0);
    }
}
