//! `cp.async`: copies that land some time between being issued and being waited for.
//!
//! PTX ISA, "Data Movement and Conversion Instructions: cp.async": copies are ordered among each other and before anything
//! else by nothing but a wait, and that for the executing thread alone. A warp's copies are an agent of their own, each of the
//! lane that issued it; their epochs count commits and waits, so that a wait orders exactly the copies it waited for.

use super::warp::Warp;
use super::{Clock, Context, Cta, Fault, Outcome};
use crate::clock::View;
use crate::isa::{Address, Src};
use crate::launch::Timing;
use crate::report::Rule;
use crate::shadow::{Access, WRITE};

#[derive(Debug)]
struct Copy {
    lane: u8,
    /// Number of the lane's group it belongs to.
    group: u32,
    epoch: u32,
    pc: u32,
    /// Address in shared memory.
    to: u32,
    from: u64,
    bytes: u8,
    /// Bytes that are copied; zeros follow.
    valid: u8,
    /// What the thread was ordered after when it issued the copy.
    issued: View,
    landed: bool,
}

/// The asynchronous copies of a warp.
#[derive(Debug, Default)]
pub(super) struct Copies {
    queue: Vec<Copy>,
    /// Groups each lane has committed.
    groups: [u32; 32],
    epoch: u32,
}

impl Copies {
    /// Instruction, lane and number of the copies of these lanes that nobody has waited for, and their epochs.
    pub fn of_lanes(&self, mask: u32) -> impl Iterator<Item = (u32, u32, u32)> {
        let theirs = self.queue.iter().filter(move |copy| mask >> copy.lane & 1 != 0);
        theirs.map(|copy| (copy.pc, u32::from(copy.lane), copy.epoch))
    }

    /// Sets what has been issued apart from what follows; returns the last epoch of the former.
    pub fn mark(&mut self) -> u32 {
        self.epoch += 1;
        self.epoch
    }

    pub fn commit(&mut self, mask: u32) {
        (0..32).filter(|lane| mask >> lane & 1 != 0).for_each(|lane| self.groups[lane] += 1);
        self.epoch += 1;
    }
}

impl Cta {
    pub(super) fn issue_copies(
        &mut self,
        context: &mut Context<'_>,
        warp: usize,
        (pc, mask): (u32, u32),
        bytes: u8,
        (to, from, valid): (Address, Address, Option<Src>),
    ) -> Outcome<()> {
        let state = &self.warps[warp];
        let to = state.addresses(context, self, to);
        let from = state.addresses(context, self, from);
        let valid = valid.map(|valid| state.read(context, self, valid));
        context.count_copy(pc, (&to, &from, valid.as_ref(), mask), bytes);
        for lane in (0..32u32).filter(|lane| mask >> lane & 1 != 0) {
            let at = lane as usize;
            let valid = valid.as_ref().map_or(u64::from(bytes), |valid| valid[at] & 0xffff_ffff);
            if valid > u64::from(bytes) {
                let message = format!("cp.async copies {valid} of {bytes} bytes");
                return Err(Fault::new(Rule::Trap, message).lane(lane));
            }
            for (what, address) in [("to", to[at]), ("from", from[at])] {
                if !address.is_multiple_of(u64::from(bytes)) {
                    let message = format!("cp.async of {bytes} bytes {what} {address:#x}");
                    return Err(Fault::new(Rule::Misaligned, message).lane(lane));
                }
            }
            self.own_shared(to[at] & 0xffff_ffff).map_err(|fault| fault.lane(lane))?;
            let eager = match context.options.copies {
                Timing::Eager => true,
                Timing::Lazy => false,
                Timing::Mixed => context.random(2) == 0,
            };
            let warp_state = &mut self.warps[warp];
            let copies = &mut warp_state.copies;
            let copy = Copy {
                lane: lane as u8,
                group: copies.groups[at],
                epoch: copies.epoch + 1,
                pc,
                to: to[at] as u32,
                from: from[at],
                bytes,
                valid: valid as u8,
                issued: warp_state.views.view(lane),
                landed: false,
            };
            copies.queue.push(copy);
            let last = copies.queue.len() - 1;
            if eager {
                self.land(context, warp, last)?;
            }
        }
        // What the warp does after this must not count as ordered before the copies.
        self.warps[warp].views.next_epoch();
        Ok(())
    }

    /// Waits until at most `pending` of each lane's groups are in flight; `None`: for everything, committed or not.
    pub(super) fn wait_copies(
        &mut self,
        context: &mut Context<'_>,
        warp: usize,
        mask: u32,
        pending: Option<u32>,
    ) -> Outcome<()> {
        let groups = self.warps[warp].copies.groups;
        let is_waited_for = |copy: &Copy| {
            let committed = groups[copy.lane as usize];
            let complete = pending.is_none_or(|pending| copy.group < committed.saturating_sub(pending));
            mask >> copy.lane & 1 != 0 && complete
        };
        for at in 0..self.warps[warp].copies.queue.len() {
            let copy = &self.warps[warp].copies.queue[at];
            if !copy.landed && is_waited_for(copy) {
                self.land(context, warp, at)?;
            }
        }
        self.warps[warp].copies.queue.retain(|copy| !is_waited_for(copy));
        let Warp { copies, views, .. } = &mut self.warps[warp];
        copies.epoch += 1;
        let mut known = [copies.epoch; 32];
        for copy in &copies.queue {
            let known = &mut known[copy.lane as usize];
            *known = (*known).min(copy.epoch - 1);
        }
        (0..32u32).filter(|lane| mask >> lane & 1 != 0).for_each(|lane| views.waited(lane, known[lane as usize]));
        Ok(())
    }

    /// Lets a lane's copies up to an epoch land, which need not be waited for otherwise then. Returns what is known of them.
    pub(super) fn land_upto(
        &mut self,
        context: &mut Context<'_>,
        warp: usize,
        lane: u32,
        epoch: u32,
    ) -> Outcome<Clock> {
        let is_meant = |copy: &Copy| u32::from(copy.lane) == lane && copy.epoch <= epoch;
        for at in 0..self.warps[warp].copies.queue.len() {
            let copy = &self.warps[warp].copies.queue[at];
            if !copy.landed && is_meant(copy) {
                self.land(context, warp, at)?;
            }
        }
        let queue = &mut self.warps[warp].copies.queue;
        queue.retain(|copy| !is_meant(copy));
        let left = queue.iter().filter(|copy| u32::from(copy.lane) == lane);
        let known = left.map(|copy| copy.epoch - 1).min().unwrap_or(epoch).min(epoch);
        let mut clock = Clock::new(self.serial, 0);
        clock.add(2 * warp as u16 + 1, 1 << lane, known);
        Ok(clock)
    }

    /// Lets one of the warp's copies land, if there is one under way.
    pub(super) fn land_one(&mut self, context: &mut Context<'_>, warp: usize) -> Outcome<()> {
        let count = self.warps[warp].copies.queue.len();
        if count == 0 {
            return Ok(());
        }
        let start = context.random(count);
        let next = (0..count).map(|i| (start + i) % count).find(|&at| !self.warps[warp].copies.queue[at].landed);
        next.map_or(Ok(()), |at| self.land(context, warp, at))
    }

    fn land(&mut self, context: &mut Context<'_>, warp: usize, at: usize) -> Outcome<()> {
        let copy = &mut self.warps[warp].copies.queue[at];
        copy.landed = true;
        let Copy { lane, epoch, pc, to, from, bytes, valid, ref issued, .. } = *copy;
        let issued = issued.clone();
        let lane = u32::from(lane);
        let place = |fault: Fault| Fault { pc: Some(pc), ..fault }.lane(lane);
        let access = Access { cta: self.serial, agent: issued.agent + 1, clock: epoch, pc, ..Access::default() };
        let access = access.of_lane(lane);
        let mut data = [0u8; 16];
        if valid != 0 {
            let valid = usize::from(valid);
            data = context.read_global(from, valid, access, &issued).map_err(place)?;
            context.counters.global_loaded += valid as u64;
        }
        context.counters.shared_stored += u64::from(bytes);
        context.counters.copied += u64::from(valid);
        context.idle = 0;
        let access = Access { kind: WRITE, ..access };
        self.write_shared(context, u64::from(to), &data[..usize::from(bytes)], access, &issued).map_err(place)
    }
}
