//! Clusters: shared memory of other CTAs, `barrier.cluster`.
//!
//! All CTAs of a cluster are alive at once, in slots next to each other. An address of `.shared::cluster` holds the rank of
//! the CTA, plus one, from bit 24 on; without it lies in the executing CTA.

use super::warp::{Flow, Wait};
use super::{Clock, Context, Cta, Fault, Outcome};
use crate::isa::Scope;
use crate::report::Rule;
use crate::shadow::Access;

pub(super) const RANK_SHIFT: u32 = 24;
/// The part of a shared address that lies within its CTA.
pub(super) const OFFSET: u64 = (1 << RANK_SHIFT) - 1;

/// The barrier of a cluster.
#[derive(Debug, Default)]
pub(super) struct ClusterBarrier {
    phase: u32,
    /// What arrivals of this phase have released.
    arriving: Option<Clock>,
    /// What those of the last phase had.
    done: Option<Clock>,
}

impl Context<'_> {
    pub fn cluster_size(&self) -> usize {
        self.clusters.cluster.iter().product::<u32>() as usize
    }

    /// `%cluster_ctaid`.
    pub fn in_cluster(&self, rank: u32) -> [u32; 3] {
        let [x, y, _] = self.clusters.cluster;
        [rank % x, rank / x % y, rank / x / y]
    }

    /// Number of the cluster that a CTA belongs to.
    pub fn cluster_of(&self, index: [u32; 3]) -> u32 {
        let at = |axis: usize| index[axis] / self.clusters.cluster[axis];
        let of = |axis: usize| self.launch.grid[axis] / self.clusters.cluster[axis];
        (at(2) * of(1) + at(1)) * of(0) + at(0)
    }

    /// Number of a cluster's CTA in the grid.
    pub fn serial(&self, cluster: u32, rank: u32) -> u32 {
        let [x, y, _] = self.launch.grid;
        let (across, down) = (x / self.clusters.cluster[0], y / self.clusters.cluster[1]);
        let place = [cluster % across, cluster / across % down, cluster / across / down];
        let within = self.in_cluster(rank);
        let at = |axis: usize| place[axis] * self.clusters.cluster[axis] + within[axis];
        (at(2) * y + at(1)) * x + at(0)
    }
}

impl Cta {
    /// The rank of the CTA that a shared address names, when it is not this one.
    pub fn other_rank(&self, address: u64) -> Option<u32> {
        let rank = (address >> RANK_SHIFT).checked_sub(1)? as u32;
        (rank != self.rank).then_some(rank)
    }

    /// The offset of an address that must lie in this CTA's shared memory.
    pub fn own_shared(&self, address: u64) -> Outcome<u64> {
        match self.other_rank(address) {
            None => Ok(address & OFFSET),
            Some(rank) => {
                let message = format!(
                    "address {address:#x} lies in the shared memory of the CTA of rank {rank}, expected an address of \
                     .shared::cta"
                );
                Err(Fault::new(Rule::OutOfBounds, message))
            }
        }
    }

    /// Slot of the first CTA of the cluster.
    pub fn first_slot(&self) -> usize {
        self.slot - self.rank as usize
    }

    /// Does something to the CTA whose shared memory holds an address, which is handed on without the rank.
    pub fn on<T>(
        &mut self,
        context: &mut Context<'_>,
        address: u64,
        action: impl FnOnce(&mut Cta, &mut Context<'_>, u64) -> Outcome<T>,
    ) -> Outcome<T> {
        let Some(rank) = self.other_rank(address) else { return action(self, context, address & OFFSET) };
        let size = context.cluster_size();
        if rank as usize >= size {
            let message = format!("shared address {address:#x} of rank {rank} in a cluster of {size} CTAs");
            return Err(Fault::new(Rule::OutOfBounds, message));
        }
        let slot = self.first_slot() + rank as usize;
        let Some(mut other) = context.ctas[slot].take() else {
            let message = format!("shared address {address:#x} of the CTA of rank {rank}, which has exited");
            return Err(Fault::new(Rule::OutOfBounds, message));
        };
        let outcome = action(&mut other, context, address & OFFSET);
        context.ctas[slot] = Some(other);
        outcome
    }

    /// PTX ISA, "barrier.cluster": each thread arrives once before it waits. Relaxed arrivals release no more than what a
    /// fence has.
    pub fn arrive_at_cluster(
        &mut self,
        context: &mut Context<'_>,
        warp: usize,
        mask: u32,
        release: bool,
    ) -> Outcome<()> {
        let slot = self.first_slot();
        let phase = context.cluster_barriers.entry(slot).or_default().phase;
        let state = &mut self.warps[warp];
        if state.at_cluster.1 != phase {
            state.owe_cluster |= state.at_cluster.0;
            state.at_cluster = (0, phase);
        }
        let twice = (state.at_cluster.0 | state.owe_cluster) & mask;
        if twice != 0 {
            let message = "barrier.cluster.arrive again without a barrier.cluster.wait in between";
            return Err(Fault::new(Rule::BarrierMisuse, message).lane(twice.trailing_zeros()));
        }
        state.at_cluster.0 |= mask;
        let mut released = state.views.published(mask, state.live);
        if !release {
            released = released.inits();
            let fenced = state.views.fenced_by(mask).filter(|(_, scope)| *scope != Scope::Cta);
            fenced.for_each(|(clock, _)| released.join(&clock));
        }
        if let Some(barrier) = context.cluster_barriers.get_mut(&slot) {
            match &mut barrier.arriving {
                Some(arriving) => arriving.join(&released),
                None => barrier.arriving = Some(released),
            }
        }
        state.views.next_epoch();
        context.idle = 0;
        self.release_cluster(context);
        Ok(())
    }

    /// Waits for the phase that these lanes have arrived in.
    pub fn wait_for_cluster(&mut self, context: &mut Context<'_>, warp: usize, mask: u32) -> Outcome<Flow> {
        let barrier = context.cluster_barriers.entry(self.first_slot()).or_default();
        let state = &mut self.warps[warp];
        let (arrived, since) = state.at_cluster;
        let missing = mask & !(arrived | state.owe_cluster);
        if missing != 0 {
            let message = "barrier.cluster.wait without a barrier.cluster.arrive before";
            return Err(Fault::new(Rule::BarrierMisuse, message).lane(missing.trailing_zeros()));
        }
        if barrier.phase == since && mask & arrived != 0 {
            return Ok(Flow::Wait(Wait::Cluster));
        }
        state.at_cluster.0 &= !mask;
        state.owe_cluster &= !mask;
        if let Some(done) = &barrier.done {
            state.views.learn(mask, state.live, done);
        }
        Ok(Flow::Next)
    }

    /// Ends the phase of the cluster's barrier when all threads that have not exited are there.
    pub fn release_cluster(&mut self, context: &mut Context<'_>) {
        let (first, size) = (self.first_slot(), context.cluster_size());
        let Some(barrier) = context.cluster_barriers.get(&first) else { return };
        if barrier.arriving.is_none() {
            return;
        }
        let phase = barrier.phase;
        let complete = |cta: &Cta| {
            let mut warps = cta.warps.iter();
            warps.all(|warp| warp.live == 0 || (warp.live & !warp.at_cluster.0 == 0 && warp.at_cluster.1 == phase))
        };
        let others = context.ctas[first..first + size].iter().flatten();
        if !complete(self) || !others.map(|cta| &**cta).all(complete) {
            return;
        }
        if let Some(barrier) = context.cluster_barriers.get_mut(&first) {
            barrier.phase += 1;
            barrier.done = barrier.arriving.take();
        }
        context.idle = 0;
        let wake = |cta: &mut Cta, context: &mut Context<'_>| {
            for warp in 0..cta.warps.len() {
                if cta.warps[warp].stop_waiting(Wait::Cluster) {
                    cta.wake(context, warp);
                }
            }
        };
        wake(self, context);
        for slot in first..first + size {
            if let Some(mut other) = context.ctas[slot].take() {
                wake(&mut other, context);
                context.ctas[slot] = Some(other);
            }
        }
    }

    /// What lanes that are stopped wait for, in words.
    pub fn describe_wait(&self, context: &Context<'_>, wait: Option<Wait>) -> String {
        match wait {
            Some(Wait::Mbarrier(address)) => match self.mbarriers.get(&address) {
                Some(mbarrier) => format!("waits for the mbarrier at {address:#x} ({}) at", mbarrier.describe()),
                None => format!("waits for what was the mbarrier at {address:#x} at"),
            },
            Some(Wait::Cluster) => {
                let first = self.first_slot();
                let others = context.ctas[first..first + context.cluster_size()].iter().flatten();
                let missing: u32 =
                    others.flat_map(|cta| &cta.warps).map(|warp| (warp.live & !warp.at_cluster.0).count_ones()).sum();
                format!("waits for barrier.cluster, which {missing} threads have not reached, at")
            }
            None => "is at".to_owned(),
        }
    }

    /// The last warp has exited: nobody else may be at its shared memory any more.
    pub fn check_end(&mut self, context: &Context<'_>) -> Outcome<()> {
        self.check_mbarriers(context)?;
        if context.cluster_size() == 1 || !context.options.checks.races {
            return Ok(());
        }
        for (offset, access) in self.shared.shadow.remembered() {
            let known = |access: &Access| self.exited.covers(access);
            let observed = || self.shared.shadow.is_observed(offset, access, known);
            if access.cta != self.serial && !known(access) && !observed() {
                let message = format!(
                    "the CTA exits before an access by another CTA to its shared memory at offset {offset} is ordered"
                );
                return Err(Fault { other: Some(*access), ..Fault::new(Rule::Race, message) });
            }
        }
        Ok(())
    }
}
