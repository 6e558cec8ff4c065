//! Vector clocks: what happens before what.
//!
//! An *agent* is a warp or its queue of asynchronous copies, numbered within its CTA. Each agent counts its own epochs; a
//! clock says up to which epoch of every other agent its owner is ordered. CTAs hear of one another only through flags in
//! global memory, so clocks hold their own CTA densely and others only once they are known.

use std::rc::Rc;

use crate::shadow::Access;

type Foreign = Vec<(u32, Vec<u32>)>;

#[derive(Clone, Debug)]
pub(crate) struct Clock {
    cta: u32,
    own: Vec<u32>,
    /// By CTA, ascending; shared because a CTA's warps learn the same at their barriers.
    foreign: Rc<Foreign>,
}

fn raise(clock: &mut [u32], other: &[u32]) {
    clock.iter_mut().zip(other).for_each(|(mine, theirs)| *mine = (*mine).max(*theirs));
}

fn entry(foreign: &mut Foreign, cta: u32, agents: usize) -> &mut Vec<u32> {
    let at = match foreign.binary_search_by_key(&cta, |entry| entry.0) {
        Ok(at) => at,
        Err(at) => {
            foreign.insert(at, (cta, vec![0; agents]));
            at
        }
    };
    &mut foreign[at].1
}

impl Clock {
    pub fn new(cta: u32, agents: usize) -> Clock {
        Clock { cta, own: vec![0; agents], foreign: Rc::default() }
    }

    /// The CTA whose agent owns this clock, or published it first.
    pub fn cta(&self) -> u32 {
        self.cta
    }

    pub fn epoch(&self, agent: u16) -> u32 {
        self.own[agent as usize]
    }

    pub fn set_epoch(&mut self, agent: u16, epoch: u32) {
        self.own[agent as usize] = epoch;
    }

    /// As [`set_epoch`](Self::set_epoch), but never back.
    pub fn raise_epoch(&mut self, agent: u16, epoch: u32) {
        let known = &mut self.own[agent as usize];
        *known = epoch.max(*known);
    }

    /// Forgets what `other`, of the same CTA, does not know.
    pub fn meet(&mut self, other: &Clock) {
        self.own.iter_mut().zip(&other.own).for_each(|(mine, theirs)| *mine = (*mine).min(*theirs));
        if Rc::ptr_eq(&self.foreign, &other.foreign) || self.foreign.is_empty() {
            return;
        }
        Rc::make_mut(&mut self.foreign).retain_mut(|(cta, epochs)| {
            let theirs = other.foreign.binary_search_by_key(cta, |entry| entry.0);
            if let Ok(at) = theirs {
                epochs.iter_mut().zip(&other.foreign[at].1).for_each(|(mine, theirs)| *mine = (*mine).min(*theirs));
            }
            theirs.is_ok()
        });
    }

    /// Whether the remembered access happens before the owner's next step.
    pub fn covers(&self, access: &Access) -> bool {
        if access.cta == self.cta {
            return self.own[access.agent as usize] >= access.clock;
        }
        let known = self.foreign.binary_search_by_key(&access.cta, |entry| entry.0);
        known.is_ok_and(|at| self.foreign[at].1[access.agent as usize] >= access.clock)
    }

    /// Learns all that `other` knows.
    pub fn join(&mut self, other: &Clock) {
        let agents = self.own.len();
        if other.cta == self.cta {
            raise(&mut self.own, &other.own);
        } else {
            raise(entry(Rc::make_mut(&mut self.foreign), other.cta, agents), &other.own);
        }
        if Rc::ptr_eq(&self.foreign, &other.foreign) || other.foreign.is_empty() {
            return;
        }
        if self.foreign.is_empty() && other.cta == self.cta {
            self.foreign = Rc::clone(&other.foreign);
            return;
        }
        for (cta, epochs) in other.foreign.iter() {
            if *cta == self.cta {
                raise(&mut self.own, epochs);
            } else {
                raise(entry(Rc::make_mut(&mut self.foreign), *cta, agents), epochs);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(cta: u32, agent: u16, clock: u32) -> Access {
        Access { cta, agent, clock, ..Access::default() }
    }

    #[test]
    fn knowledge_passes_on_across_ctas() {
        let (mut a, mut b, mut c) = (Clock::new(0, 2), Clock::new(1, 2), Clock::new(2, 2));
        a.set_epoch(0, 3);
        b.join(&a);
        assert!(b.covers(&access(0, 0, 3)) && !b.covers(&access(0, 0, 4)) && !b.covers(&access(0, 1, 1)));
        b.set_epoch(1, 5);
        c.join(&b);
        assert!(c.covers(&access(0, 0, 3)) && c.covers(&access(1, 1, 5)) && !c.covers(&access(1, 1, 6)));
        // What comes back about the own CTA counts as its own.
        let mut other_warp = Clock::new(0, 2);
        other_warp.join(&c);
        assert!(other_warp.covers(&access(0, 0, 3)) && other_warp.covers(&access(1, 1, 5)));
    }
}
