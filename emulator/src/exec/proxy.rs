//! The async proxy: what a warp knows to be ordered before its asynchronous operations.
//!
//! PTX ISA, "Async Proxy": accesses in the generic proxy are ordered before those in the async proxy by `fence.proxy.async`
//! only.

use std::rc::Rc;

use super::Clock;
use super::warp::Warp;

impl Warp {
    pub fn async_view(&self) -> &Rc<Clock> {
        &self.async_view
    }

    /// `fence.proxy.async`: what came before in the generic proxy comes before what follows in the async proxy.
    pub fn proxy_fence(&mut self) {
        Rc::make_mut(&mut self.async_view).join(&self.clock);
        self.next_epoch();
    }

    /// Asynchronous operations of an agent have been waited for.
    pub fn see_async(&mut self, agent: u16, epoch: u32) {
        Rc::make_mut(&mut self.async_view).raise_epoch(agent, epoch);
    }
}
