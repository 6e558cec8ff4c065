//! Barriers of a CTA and of a warp.

use std::rc::Rc;

use super::{Clock, Context, Cta, Fault, Outcome};
use crate::clock::Proxy;
use crate::isa::{Bar, Reduce};
use crate::report::Rule;

/// A barrier of a CTA: who has arrived in this phase.
#[derive(Debug, Default)]
pub(super) struct Barrier {
    pub arrived: u32,
    /// Threads expected; `None` while the phase has not begun, `Some(None)` for all of the CTA.
    pub expected: Option<Option<u32>>,
    /// By warp, the lanes that have arrived.
    lanes: Vec<u32>,
    waiting: Vec<Waiting>,
    /// Whether the arrivals are those of `bar.red`, and what their predicates say.
    reduces: Option<bool>,
    votes: Votes,
    clock: Option<Clock>,
}

impl Barrier {
    /// Counts lanes of a warp. Those that the warp lacks, or that have exited, arrive with the last of the others.
    fn count(&mut self, warp: usize, mask: u32, live: u32) {
        if self.lanes.len() <= warp {
            self.lanes.resize(warp + 1, 0);
        }
        let before = self.lanes[warp];
        // Lanes may arrive again before the phase ends.
        let before = if before & mask != 0 { 0 } else { before };
        let here = before | mask;
        let here = if live & !here == 0 { u32::MAX } else { here };
        self.lanes[warp] = here;
        self.arrived += here.count_ones() - before.count_ones();
    }
}

/// Threads that wait at a barrier.
#[derive(Debug)]
struct Waiting {
    warp: usize,
    mask: u32,
    reduce: Option<Reduce>,
}

/// Predicates of the threads that have arrived.
#[derive(Debug, Default)]
struct Votes {
    held: u32,
    failed: bool,
}

/// What those who arrive at a barrier do next.
pub(super) enum Arrival {
    GoesOn,
    Waits,
    LanesWait(u32),
}

impl Cta {
    /// Threads that take part in a barrier without a count: those of warps that have not exited.
    pub(super) fn live_threads(&self) -> u32 {
        32 * self.warps.iter().filter(|warp| warp.live != 0).count() as u32
    }

    /// A warp, or some of its lanes, arrive; `true` when they must wait.
    pub(super) fn arrive(&mut self, context: &mut Context<'_>, warp: usize, mask: u32, bar: &Bar) -> Outcome<Arrival> {
        let lane = mask.trailing_zeros() as usize;
        let state = &self.warps[warp];
        let id = state.read(context, self, bar.id)[lane];
        let count = bar.count.map(|count| state.read(context, self, count)[lane]);
        let live = state.live;
        let whole = mask == live;
        let held = bar.reduce.map(|(_, c)| state.predicate(c) & mask);
        let misuse = |message: String| Err(Fault::new(Rule::BarrierMisuse, message));
        let Some(barrier) = self.barriers.get_mut(id as usize) else {
            return misuse(format!("barrier {id}, expected 0 to 15"));
        };
        if let Some(count) = count
            && (count == 0 || !count.is_multiple_of(32) || count > 1024)
        {
            return misuse(format!("barrier {id} for {count} threads, expected a multiple of 32 up to 1024"));
        }
        let count = count.map(|count| count as u32);
        match barrier.expected {
            Some(expected) if expected != count => {
                let words = |count: Option<u32>| count.map_or("all threads".to_owned(), |n| format!("{n} threads"));
                return misuse(format!("barrier {id} for {}, while others wait for {}", words(count), words(expected)));
            }
            _ => barrier.expected = Some(count),
        }
        if barrier.reduces.is_some_and(|reduces| reduces != bar.reduce.is_some()) {
            return misuse(format!("barrier {id} of bar.red is used by bar.sync or bar.arrive at the same time"));
        }
        barrier.reduces = Some(bar.reduce.is_some());
        if let Some(held) = held {
            barrier.votes.held += held.count_ones();
            barrier.votes.failed |= held != mask;
        }
        barrier.count(warp, mask, live);
        context.counters.barriers += 1;
        let views = &mut self.warps[warp].views;
        let published = views.published(mask, live);
        match &mut barrier.clock {
            Some(joined) => joined.join(&published),
            None => barrier.clock = Some(published),
        }
        views.next_epoch();
        if !bar.arrive {
            barrier.waiting.push(Waiting { warp, mask, reduce: bar.reduce.map(|(reduce, _)| reduce) });
            if whole {
                self.warps[warp].blocked = Some(id as u32);
            }
        }
        if self.release_barrier(context, id as usize)? || bar.arrive {
            return Ok(Arrival::GoesOn);
        }
        Ok(if whole { Arrival::Waits } else { Arrival::LanesWait(id as u32) })
    }

    /// Ends the phase of a barrier that all have reached.
    pub(super) fn release_barrier(&mut self, context: &mut Context<'_>, id: usize) -> Outcome<bool> {
        let all = self.live_threads();
        let barrier = &mut self.barriers[id];
        let Some(expected) = barrier.expected else { return Ok(false) };
        let expected = expected.unwrap_or(all);
        if barrier.arrived < expected {
            return Ok(false);
        }
        if barrier.arrived > expected {
            let message = format!("{} threads arrived at barrier {id}, expected {expected}", barrier.arrived);
            return Err(Fault::new(Rule::BarrierMisuse, message));
        }
        let Barrier { waiting, clock, votes, .. } = std::mem::take(barrier);
        let clock = clock.map(Rc::new);
        for Waiting { warp, mask, reduce } in waiting {
            let state = &mut self.warps[warp];
            if let Some(clock) = &clock {
                if state.live & !mask == 0 {
                    state.views.replace(clock);
                } else {
                    let live = state.live;
                    state.views.learn(mask, live, clock);
                }
            }
            let all_if = |holds: bool| if holds { u32::MAX } else { 0 };
            match reduce {
                Some(Reduce::Popc(d)) => state.put(d, mask, &[u64::from(votes.held); 32]),
                Some(Reduce::And(p)) => state.put_predicate(p, mask, all_if(!votes.failed)),
                Some(Reduce::Or(p)) => state.put_predicate(p, mask, all_if(votes.held != 0)),
                None => {}
            }
            state.blocked = None;
            state.release(id as u32);
            state.resume();
            self.wake(context, warp);
        }
        context.idle = 0;
        Ok(true)
    }

    /// A proxy fence by lanes of a warp.
    pub(super) fn fence_proxy(&mut self, warp: usize, lanes: u32, proxies: &[Proxy]) {
        let live = self.warps[warp].live;
        self.warps[warp].views.fence_proxy(lanes, live, proxies);
    }

    /// `bar.warp.sync`.
    pub(super) fn warp_sync(&mut self, warp: usize, lanes: u32) {
        let live = self.warps[warp].live;
        self.warps[warp].views.sync(lanes, live);
    }
}
