//! Vector clocks: what happens before what.
//!
//! An *agent* is a warp or its queue of asynchronous copies, numbered within its CTA. Each agent counts its own epochs; a
//! clock says up to which epoch of every other agent its owner is ordered. CTAs hear of one another only through flags in
//! global memory, so clocks hold their own CTA densely and others only once they are known.

use std::rc::Rc;

use crate::shadow::Access;

type Foreign = Vec<(u32, Vec<u32>)>;

/// What a clock knows besides the generic proxy's order. PTX ISA, "Proxies": an access through another proxy is ordered
/// after a generic one only by a proxy fence, so what such a fence has covered is kept apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum View {
    /// Accesses of the asynchronous proxy to shared memory (`fence.proxy.async`).
    Shared,
    /// Accesses of the asynchronous proxy to global memory (`fence.proxy.async`).
    Global,
    /// Reads of tensor maps (`fence.proxy.tensormap`).
    TensorMap,
    /// Uses of an mbarrier after its initialisation (`fence.mbarrier_init`).
    Inits,
}

const VIEWS: usize = 4;

#[derive(Clone, Debug)]
pub(crate) struct Clock {
    cta: u32,
    /// By agent; what lies past the end is 0.
    own: Vec<u32>,
    /// By CTA, ascending; shared because a CTA's warps learn the same at their barriers.
    foreign: Rc<Foreign>,
    /// By [`View`]; `None` knows nothing. Barriers, flags and waits pass them on together with the rest.
    views: [Option<Rc<Clock>>; VIEWS],
}

fn raise(clock: &mut Vec<u32>, other: &[u32]) {
    if clock.len() < other.len() {
        clock.resize(other.len(), 0);
    }
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
        Clock { cta, own: vec![0; agents], foreign: Rc::default(), views: Default::default() }
    }

    /// The CTA whose agent owns this clock, or published it first.
    pub fn cta(&self) -> u32 {
        self.cta
    }

    pub fn epoch(&self, agent: u16) -> u32 {
        self.own.get(agent as usize).copied().unwrap_or(0)
    }

    pub fn set_epoch(&mut self, agent: u16, epoch: u32) {
        if self.own.len() <= agent as usize {
            self.own.resize(agent as usize + 1, 0);
        }
        self.own[agent as usize] = epoch;
    }

    /// Learns in every proxy that an asynchronous operation is complete: waits need no proxy fence.
    pub fn learn(&mut self, cta: u32, agent: u16, epoch: u32) {
        let mut news = Clock::new(cta, 0);
        news.set_epoch(agent, epoch);
        self.join(&news);
        for view in [View::Shared, View::Global] {
            self.join_view(view, &Rc::new(news.clone()));
        }
    }

    /// Makes what is ordered in the generic proxy ordered in another one as well.
    pub fn fence(&mut self, view: View) {
        let generic = Rc::new(Clock { views: Default::default(), ..self.clone() });
        self.join_view(view, &generic);
    }

    fn join_view(&mut self, view: View, other: &Rc<Clock>) {
        match &mut self.views[view as usize] {
            Some(mine) if Rc::ptr_eq(mine, other) => {}
            Some(mine) => Rc::make_mut(mine).join(other),
            empty if other.cta == self.cta => *empty = Some(Rc::clone(other)),
            empty => {
                let mut fresh = Clock::new(self.cta, self.own.len());
                fresh.join(other);
                *empty = Some(Rc::new(fresh));
            }
        }
    }

    /// What a relaxed arrival passes on: no more than the initialisations of mbarriers that were fenced.
    pub fn inits(&self) -> Clock {
        let mut inits = Clock::new(self.cta, 0);
        inits.views[View::Inits as usize].clone_from(&self.views[View::Inits as usize]);
        inits
    }

    /// The clock against which a read of a tensor map in global memory is held.
    pub fn of_tensor_maps(&self) -> Clock {
        let mut clock = self.clone();
        clock.views[View::Global as usize].clone_from(&self.views[View::TensorMap as usize]);
        clock
    }

    /// As [`covers`](Self::covers), for the next access through another proxy.
    pub fn covers_in(&self, view: View, access: &Access) -> bool {
        self.views[view as usize].as_ref().is_some_and(|clock| clock.covers(access))
    }

    /// Whether the remembered access happens before the owner's next step.
    pub fn covers(&self, access: &Access) -> bool {
        if access.cta == self.cta {
            return self.epoch(access.agent) >= access.clock;
        }
        let known = self.foreign.binary_search_by_key(&access.cta, |entry| entry.0);
        known.is_ok_and(|at| self.foreign[at].1.get(access.agent as usize).is_some_and(|epoch| *epoch >= access.clock))
    }

    /// Learns all that `other` knows, in every view.
    pub fn join(&mut self, other: &Clock) {
        for view in [View::Shared, View::Global, View::TensorMap, View::Inits] {
            if let Some(theirs) = &other.views[view as usize] {
                self.join_view(view, theirs);
            }
        }
        self.join_generic(other);
    }

    fn join_generic(&mut self, other: &Clock) {
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
    fn proxies_are_ordered_apart() {
        let (mut a, mut b) = (Clock::new(0, 2), Clock::new(1, 2));
        a.set_epoch(0, 3);
        b.join(&a);
        assert!(b.covers(&access(0, 0, 3)) && !b.covers_in(View::Shared, &access(0, 0, 3)));
        a.fence(View::Shared);
        a.set_epoch(0, 4);
        b.join(&a);
        assert!(b.covers_in(View::Shared, &access(0, 0, 3)) && !b.covers_in(View::Shared, &access(0, 0, 4)));
        assert!(!b.covers_in(View::Global, &access(0, 0, 3)));
        // A completed operation is known in every proxy, whatever the number of agents so far.
        b.learn(0, 9, 7);
        assert!(b.covers(&access(0, 9, 7)) && b.covers_in(View::Global, &access(0, 9, 7)));
        assert!(!b.covers(&access(0, 9, 8)));
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
