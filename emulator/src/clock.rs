//! Vector clocks: what happens before what, to the thread.
//!
//! An *agent* is a warp or its queue of asynchronous copies, numbered within its CTA: `2 w` and `2 w + 1` for warp `w`. Bulk
//! copies that complete at one mbarrier, or in the groups of one warp, are agents with numbers beyond these. Each agent counts its own epochs. A clock says up to which epoch of every other agent its owner is ordered: for all lanes of
//! that agent, and, where some lanes are known further (one elected lane released a flag), for those. Warps mostly act as
//! one, so the second part is nearly always empty. CTAs hear of one another only through flags, so clocks hold their own CTA
//! densely and others only once they are known.

use std::rc::Rc;

use crate::shadow::{ASYNC, ATOMIC, Access, TOGETHER, WRITE};

/// Lanes of an agent that are known further than all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    agent: u16,
    lanes: u32,
    epoch: u32,
}

/// What is known of one CTA.
#[derive(Clone, Debug, Default)]
struct Known {
    /// By agent; what lies past the end is 0.
    all: Vec<u32>,
    parts: Vec<Part>,
}

impl Known {
    fn new(agents: usize) -> Known {
        Known { all: vec![0; agents], parts: Vec::new() }
    }

    fn covers(&self, agent: u16, lanes: u32, epoch: u32) -> bool {
        if self.all.get(agent as usize).is_some_and(|known| *known >= epoch) {
            return true;
        }
        let further = self.parts.iter().filter(|part| part.agent == agent && part.epoch >= epoch);
        further.fold(lanes, |left, part| left & !part.lanes) == 0
    }

    fn add(&mut self, agent: u16, mut lanes: u32, epoch: u32) {
        if self.all.len() <= agent as usize {
            self.all.resize(agent as usize + 1, 0);
        }
        if self.all[agent as usize] >= epoch {
            return;
        }
        if lanes == u32::MAX {
            self.all[agent as usize] = epoch;
            self.parts.retain(|part| part.agent != agent || part.epoch > epoch);
            return;
        }
        for part in self.parts.iter_mut().filter(|part| part.agent == agent) {
            if part.epoch > epoch {
                lanes &= !part.lanes;
            } else if part.epoch < epoch {
                part.lanes &= !lanes;
            }
        }
        match self.parts.iter_mut().find(|part| part.agent == agent && part.epoch == epoch) {
            Some(part) => part.lanes |= lanes,
            None => self.parts.push(Part { agent, lanes, epoch }),
        }
        self.parts.retain(|part| part.lanes != 0);
    }

    /// Up to which epoch a lane of an agent is known.
    fn of(&self, agent: u16, lane: u32) -> u32 {
        let parts = self.parts.iter().filter(|part| part.agent == agent && part.lanes >> lane & 1 != 0);
        parts.map(|part| part.epoch).fold(self.all.get(agent as usize).copied().unwrap_or(0), u32::max)
    }

    /// Forgets what `other` does not know.
    fn meet(&mut self, other: &Known) {
        let further = std::mem::take(&mut self.parts);
        let mine = Known { all: self.all.clone(), parts: further };
        let theirs = other.all.iter().copied().chain(std::iter::repeat(0));
        self.all.iter_mut().zip(theirs).for_each(|(mine, theirs)| *mine = (*mine).min(theirs));
        // Lanes that both know further than the whole agent are few, if there are any.
        let mut agents: Vec<u16> = mine.parts.iter().chain(&other.parts).map(|part| part.agent).collect();
        agents.sort_unstable();
        agents.dedup();
        for agent in agents {
            for lane in 0..32 {
                self.add(agent, 1 << lane, mine.of(agent, lane).min(other.of(agent, lane)));
            }
        }
    }

    fn raise(&mut self, other: &Known) {
        if self.all.len() < other.all.len() {
            self.all.resize(other.all.len(), 0);
        }
        self.all.iter_mut().zip(&other.all).for_each(|(mine, theirs)| *mine = (*mine).max(*theirs));
        let all = &self.all;
        self.parts.retain(|part| part.epoch > all[part.agent as usize]);
        other.parts.iter().for_each(|part| self.add(part.agent, part.lanes, part.epoch));
    }
}

type Foreign = Vec<(u32, Known)>;

/// What a clock knows besides the generic proxy's order. PTX ISA, "Proxies": an access through another proxy is ordered
/// after a generic one only by a proxy fence, so what such a fence has covered is kept apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Proxy {
    /// Accesses of the asynchronous proxy to shared memory (`fence.proxy.async`).
    Shared,
    /// Accesses of the asynchronous proxy to global memory (`fence.proxy.async`).
    Global,
    /// Reads of tensor maps (`fence.proxy.tensormap`).
    TensorMap,
    /// Uses of an mbarrier after its initialisation (`fence.mbarrier_init`).
    Inits,
}

impl Proxy {
    pub const ALL: [Proxy; 4] = [Proxy::Shared, Proxy::Global, Proxy::TensorMap, Proxy::Inits];
}

#[derive(Clone, Debug)]
pub(crate) struct Clock {
    cta: u32,
    own: Known,
    /// By CTA, ascending; shared because a CTA's warps learn the same at their barriers.
    foreign: Rc<Foreign>,
    /// By [`Proxy`]; `None` knows nothing. Barriers, flags and waits pass them on together with the rest.
    proxies: [Option<Rc<Clock>>; 4],
    /// What came before each `fence.sc` that comes before the owner's next step.
    fenced: Option<Rc<Clock>>,
    /// What came before each `fence.sc` that the owner's next one is known to come after, see `exec::flags`. Like the former
    /// it is passed on with the rest, and knows nothing of other such fences itself.
    heard: Option<Rc<Clock>>,
}

fn entry(foreign: &mut Foreign, cta: u32, agents: usize) -> &mut Known {
    let at = match foreign.binary_search_by_key(&cta, |entry| entry.0) {
        Ok(at) => at,
        Err(at) => {
            foreign.insert(at, (cta, Known::new(agents)));
            at
        }
    };
    &mut foreign[at].1
}

/// Adds to a part of the clock of some CTA, which may be unknown yet.
fn learn(part: &mut Option<Rc<Clock>>, (cta, agents): (u32, usize), other: &Rc<Clock>, join: fn(&mut Clock, &Clock)) {
    match part {
        Some(mine) if Rc::ptr_eq(mine, other) => {}
        Some(mine) => join(Rc::make_mut(mine), other),
        empty if other.cta == cta => *empty = Some(Rc::clone(other)),
        empty => {
            let mut fresh = Clock::new(cta, agents);
            join(&mut fresh, other);
            *empty = Some(Rc::new(fresh));
        }
    }
}

impl Clock {
    pub fn new(cta: u32, agents: usize) -> Clock {
        let own = Known::new(agents);
        Clock { cta, own, foreign: Rc::default(), proxies: Default::default(), fenced: None, heard: None }
    }

    /// The same, without what is known of `fence.sc`.
    pub fn plain(&self) -> Clock {
        Clock { fenced: None, heard: None, ..self.clone() }
    }

    /// This is what came before a `fence.sc`: all of it is known to have.
    pub fn at_fence_sc(&self) -> Clock {
        let plain = self.plain();
        Clock { fenced: Some(Rc::new(plain.clone())), ..plain }
    }

    /// What came before each `fence.sc` that comes before the owner's next step.
    pub fn fenced(&self) -> Option<&Rc<Clock>> {
        self.fenced.as_ref()
    }

    /// A `fence.sc` that had `other` before it comes before the owner's next step.
    pub fn add_fenced(&mut self, other: &Rc<Clock>) {
        let (cta, agents) = (self.cta, self.own.all.len());
        learn(&mut self.fenced, (cta, agents), other, Clock::join_plain);
    }

    pub fn has_heard(&self) -> bool {
        self.heard.is_some()
    }

    /// A `fence.sc` that had `other` before it comes before the owner's next `fence.sc`.
    pub fn hear(&mut self, other: &Rc<Clock>) {
        let (cta, agents) = (self.cta, self.own.all.len());
        learn(&mut self.heard, (cta, agents), other, Clock::join_plain);
    }

    /// The owner executes a `fence.sc`.
    pub fn learn_heard(&mut self) {
        if let Some(heard) = self.heard.take() {
            self.join_plain(&heard);
        }
    }

    /// The owner is ordered after these lanes of an agent of its own CTA, up to an epoch. All lanes: `u32::MAX`.
    pub fn add(&mut self, agent: u16, lanes: u32, epoch: u32) {
        self.own.add(agent, lanes, epoch);
    }

    /// Whether all lanes of the agent are known up to the access: the quick test that mostly suffices.
    #[inline]
    pub fn covers_agent(&self, access: &Access) -> bool {
        access.cta == self.cta && self.own.all.get(access.agent as usize).is_some_and(|known| *known >= access.clock)
    }

    /// Whether what `lanes` did in the remembered access happens before the owner's next step.
    fn covers_lanes(&self, access: &Access, lanes: u32) -> bool {
        if access.cta == self.cta {
            return self.own.covers(access.agent, lanes, access.clock);
        }
        let known = self.foreign.binary_search_by_key(&access.cta, |entry| entry.0);
        known.is_ok_and(|at| self.foreign[at].1.covers(access.agent, lanes, access.clock))
    }

    /// Forgets what `other`, of the same CTA, does not know in the generic proxy.
    pub fn meet(&mut self, other: &Clock) {
        self.own.meet(&other.own);
        if Rc::ptr_eq(&self.foreign, &other.foreign) || self.foreign.is_empty() {
            return;
        }
        Rc::make_mut(&mut self.foreign).retain_mut(|(cta, known)| {
            let theirs = other.foreign.binary_search_by_key(cta, |entry| entry.0);
            if let Ok(at) = theirs {
                known.meet(&other.foreign[at].1);
            }
            theirs.is_ok()
        });
    }

    /// Makes what is ordered in the generic proxy ordered in another one as well.
    pub fn fence(&mut self, proxy: Proxy) {
        let generic = Rc::new(Clock { proxies: Default::default(), ..self.plain() });
        self.join_proxy(proxy, &generic);
    }

    /// As [`add`](Self::add), for the accesses through a proxy that follow.
    pub fn add_in(&mut self, proxy: Proxy, agent: u16, lanes: u32, epoch: u32) {
        let (cta, agents) = (self.cta, self.own.all.len());
        let clock = self.proxies[proxy as usize].get_or_insert_with(|| Rc::new(Clock::new(cta, agents)));
        Rc::make_mut(clock).add(agent, lanes, epoch);
    }

    /// An asynchronous operation of an agent of `cta` is complete: waiting for it needs no proxy fence.
    pub fn learn_async(&mut self, cta: u32, agent: u16, epoch: u32) {
        let mut news = Clock::new(cta, 0);
        news.add(agent, u32::MAX, epoch);
        self.join_generic(&news);
        let news = Rc::new(news);
        self.join_proxy(Proxy::Shared, &news);
        self.join_proxy(Proxy::Global, &news);
    }

    /// What a relaxed arrival passes on: no more than the initialisations of mbarriers that were fenced.
    pub fn inits(&self) -> Clock {
        let mut inits = Clock::new(self.cta, 0);
        inits.proxies[Proxy::Inits as usize].clone_from(&self.proxies[Proxy::Inits as usize]);
        inits
    }

    /// Whether all of the remembered access happens before the owner's next step.
    pub fn covers(&self, access: &Access) -> bool {
        self.covers_agent(access) || self.covers_lanes(access, access.all_lanes())
    }

    /// The clock that accesses through a proxy are held against.
    pub fn in_proxy(&self, proxy: Proxy) -> Rc<Clock> {
        let known = self.proxies[proxy as usize].as_ref();
        known.map_or_else(|| Rc::new(Clock::new(self.cta, self.own.all.len())), Rc::clone)
    }

    fn join_proxy(&mut self, proxy: Proxy, other: &Rc<Clock>) {
        let (cta, agents) = (self.cta, self.own.all.len());
        learn(&mut self.proxies[proxy as usize], (cta, agents), other, Clock::join_generic);
    }

    /// Learns all that `other` knows, in every proxy, and of `fence.sc`.
    pub fn join(&mut self, other: &Clock) {
        if let Some(fenced) = &other.fenced {
            self.add_fenced(fenced);
        }
        if let Some(heard) = &other.heard {
            self.hear(heard);
        }
        self.join_plain(other);
    }

    /// Learns all that `other` knows, in every proxy.
    fn join_plain(&mut self, other: &Clock) {
        for proxy in Proxy::ALL {
            if let Some(theirs) = &other.proxies[proxy as usize] {
                self.join_proxy(proxy, theirs);
            }
        }
        self.join_generic(other);
    }

    fn join_generic(&mut self, other: &Clock) {
        let agents = self.own.all.len();
        if other.cta == self.cta {
            self.own.raise(&other.own);
        } else {
            entry(Rc::make_mut(&mut self.foreign), other.cta, agents).raise(&other.own);
        }
        if Rc::ptr_eq(&self.foreign, &other.foreign) || other.foreign.is_empty() {
            return;
        }
        if self.foreign.is_empty() && other.cta == self.cta {
            self.foreign = Rc::clone(&other.foreign);
            return;
        }
        for (cta, known) in other.foreign.iter() {
            if *cta == self.cta {
                self.own.raise(known);
            } else {
                entry(Rc::make_mut(&mut self.foreign), *cta, agents).raise(known);
            }
        }
    }
}

/// What an operation that a thread issues to another proxy is ordered after there.
#[derive(Clone, Debug)]
pub(crate) struct Proxied {
    pub clock: Rc<Clock>,
    /// The thread's own steps and copies that it has fenced.
    pub own: (u32, u32),
    /// Generic reads, too, must be fenced.
    pub fence_reads: bool,
    /// Who learns that the operation is complete need not know what this clock does.
    pub by_part: bool,
}

/// What one thread, or an operation it issued, is ordered after.
#[derive(Clone, Debug)]
pub(crate) struct View {
    pub clock: Rc<Clock>,
    /// Of the thread's warp.
    pub agent: u16,
    /// The thread; `None` for what several lanes do together.
    pub lane: Option<u32>,
    /// The thread's own steps that come before, by epoch.
    pub own: u32,
    /// The thread's own copies that come before.
    pub waited: u32,
    /// For operations of another proxy: they must be ordered after all but generic reads in that one.
    pub proxied: Option<Rc<Proxied>>,
}

impl View {
    /// Of what the remembered access did with `lanes`, the lanes that are not ordered before the viewer's next step.
    #[inline]
    pub fn unordered(&self, access: &Access, lanes: impl FnOnce() -> u32) -> u32 {
        if self.proxied.is_none() && self.clock.covers_agent(access) {
            0
        } else {
            self.unordered_lanes(access, lanes())
        }
    }

    #[cold]
    fn unordered_lanes(&self, access: &Access, mut lanes: u32) -> u32 {
        let (clock, (own, waited)) = match &self.proxied {
            Some(proxied) if proxied.fence_reads || access.kind & (WRITE | ASYNC) != 0 => (&proxied.clock, proxied.own),
            _ => (&self.clock, (self.own, self.waited)),
        };
        if clock.covers_agent(access) {
            return 0;
        }
        if let Some(lane) = self.lane
            && access.cta == self.clock.cta
        {
            let known = match access.agent.wrapping_sub(self.agent) {
                0 => own,
                1 => waited,
                _ => 0,
            };
            if access.clock <= known && access.kind & TOGETHER != 0 {
                return 0;
            } else if access.clock <= known {
                lanes &= !(1 << lane);
            }
        }
        if lanes == 0 || clock.covers_lanes(access, lanes) {
            return 0;
        }
        // A test of an mbarrier: one lane speaks for its warp, as `cuda::pipeline` has it after a `match.any`.
        let test = TOGETHER | ATOMIC;
        if access.kind & test == test && (0..32).any(|lane| clock.covers_lanes(access, 1 << lane)) {
            return 0;
        }
        (0..32).map(|lane| lanes & 1 << lane).filter(|lane| *lane != 0 && !clock.covers_lanes(access, *lane)).sum()
    }

    /// Whether all that comes after the viewer's next step comes after what it is ordered after.
    pub fn speaks_for_all(&self) -> bool {
        self.proxied.as_ref().is_none_or(|proxied| !proxied.by_part)
    }

    /// Whether an access is ordered before the viewer's next step.
    pub fn covers(&self, access: &Access) -> bool {
        self.unordered(access, || access.all_lanes()) == 0
    }

    /// Whether it is, were that step one of the generic proxy.
    pub fn covers_generically(&self, access: &Access) -> bool {
        View { proxied: None, ..self.clone() }.covers(access)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(cta: u32, agent: u16, clock: u32) -> Access {
        Access { cta, agent, clock, lanes: 0xf, ..Access::default() }
    }

    fn covers(clock: &Clock, access: &Access) -> bool {
        clock.covers_agent(access) || clock.covers_lanes(access, access.lanes)
    }

    #[test]
    fn knowledge_passes_on_across_ctas() {
        let (mut a, mut b, mut c) = (Clock::new(0, 2), Clock::new(1, 2), Clock::new(2, 2));
        a.add(0, u32::MAX, 3);
        b.join(&a);
        assert!(covers(&b, &access(0, 0, 3)) && !covers(&b, &access(0, 0, 4)) && !covers(&b, &access(0, 1, 1)));
        b.add(1, u32::MAX, 5);
        c.join(&b);
        assert!(covers(&c, &access(0, 0, 3)) && covers(&c, &access(1, 1, 5)) && !covers(&c, &access(1, 1, 6)));
        // What comes back about the own CTA counts as its own.
        let mut other_warp = Clock::new(0, 2);
        other_warp.join(&c);
        assert!(covers(&other_warp, &access(0, 0, 3)) && covers(&other_warp, &access(1, 1, 5)));
    }

    #[test]
    fn proxies_are_ordered_apart() {
        let (mut a, mut b) = (Clock::new(0, 2), Clock::new(1, 2));
        a.add(0, u32::MAX, 3);
        b.join(&a);
        assert!(b.covers(&access(0, 0, 3)) && !b.in_proxy(Proxy::Shared).covers(&access(0, 0, 3)));
        a.fence(Proxy::Shared);
        a.add(0, u32::MAX, 4);
        b.join(&a);
        let shared = b.in_proxy(Proxy::Shared);
        assert!(shared.covers(&access(0, 0, 3)) && !shared.covers(&access(0, 0, 4)));
        assert!(!b.in_proxy(Proxy::Global).covers(&access(0, 0, 3)));
        // A completed operation is known in every proxy, whatever the number of agents so far.
        b.learn_async(0, 9, 7);
        assert!(b.covers(&access(0, 9, 7)) && b.in_proxy(Proxy::Global).covers(&access(0, 9, 7)));
        assert!(!b.covers(&access(0, 9, 8)));
    }

    #[test]
    fn some_lanes_are_known_further() {
        let mut a = Clock::new(0, 2);
        a.add(0, u32::MAX, 3);
        a.add(0, 0b0011, 5);
        a.add(0, 0b0110, 4);
        assert!(a.covers_lanes(&access(0, 0, 4), 0b0111) && !a.covers_lanes(&access(0, 0, 5), 0b0111));
        assert!(a.covers_lanes(&access(0, 0, 5), 0b0011) && !a.covers_lanes(&access(0, 0, 4), 0b1000));
        let mut b = Clock::new(1, 2);
        b.join(&a);
        assert!(b.covers_lanes(&access(0, 0, 5), 0b0001) && !b.covers_lanes(&access(0, 0, 5), 0b0100));
        b.add(0, u32::MAX, 1);
        // A thread's own steps need no clock.
        let view = View { clock: Rc::new(a.clone()), agent: 0, lane: Some(3), own: 7, waited: 0, proxied: None };
        assert_eq!(view.unordered(&access(0, 0, 7), || 0b1000), 0);
        assert_eq!(view.unordered(&access(0, 0, 7), || 0b1010), 0b0010);
        a.add(0, u32::MAX, 6);
        assert!(a.own.parts.is_empty());
    }
}
