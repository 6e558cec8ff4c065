//! Barriers of a CTA and of a warp.

use std::rc::Rc;

use super::warp::Warp;
use super::{Clock, Context, Cta, Fault, Outcome};
use crate::clock::Proxy;
use crate::report::Rule;

/// A barrier of a CTA: who has arrived in this phase.
#[derive(Debug, Default)]
pub(super) struct Barrier {
    pub arrived: u32,
    /// Threads expected; `None` while the phase has not begun, `Some(None)` for all of the CTA.
    pub expected: Option<Option<u32>>,
    waiting: Vec<usize>,
    clock: Option<Clock>,
}

impl Cta {
    /// Threads that take part in a barrier without a count: those of warps that have not exited.
    pub(super) fn live_threads(&self) -> u32 {
        32 * self.warps.iter().filter(|warp| warp.live != 0).count() as u32
    }

    /// Arrives with a whole warp; `true` when the warp must wait.
    pub(super) fn arrive(
        &mut self,
        context: &mut Context<'_>,
        warp: usize,
        id: u64,
        count: Option<u64>,
        waits: bool,
    ) -> Outcome<bool> {
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
        barrier.arrived += 32;
        context.counters.barriers += 1;
        let Warp { views, live, .. } = &mut self.warps[warp];
        let published = views.published(*live, *live);
        match &mut barrier.clock {
            Some(joined) => joined.join(&published),
            None => barrier.clock = Some(published),
        }
        views.next_epoch();
        if waits {
            barrier.waiting.push(warp);
            self.warps[warp].blocked = Some(id as u32);
        }
        self.release_barrier(context, id as usize)?;
        Ok(self.warps[warp].blocked.is_some())
    }

    /// Ends the phase of a barrier that all have reached.
    pub(super) fn release_barrier(&mut self, context: &mut Context<'_>, id: usize) -> Outcome<()> {
        let all = self.live_threads();
        let barrier = &mut self.barriers[id];
        let Some(expected) = barrier.expected else { return Ok(()) };
        let expected = expected.unwrap_or(all);
        if barrier.arrived < expected {
            return Ok(());
        }
        if barrier.arrived > expected {
            let message = format!("{} threads arrived at barrier {id}, expected {expected}", barrier.arrived);
            return Err(Fault::new(Rule::BarrierMisuse, message));
        }
        let Barrier { waiting, clock, .. } = std::mem::take(barrier);
        let clock = clock.map(Rc::new);
        for warp in waiting {
            let state = &mut self.warps[warp];
            if let Some(clock) = &clock {
                state.views.replace(clock);
            }
            state.blocked = None;
            state.resume();
            self.wake(context, warp);
        }
        context.idle = 0;
        Ok(())
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
