//! What the lanes of a warp are ordered after.
//!
//! Lanes are threads: what one does is ordered before what another does by `bar.warp.sync`, a barrier or a flag only (PTX
//! ISA, "Memory Consistency Model": program order is that of a thread; "bar.warp.sync" orders memory, `shfl.sync`,
//! `vote.sync`, `ldmatrix` and `mma` do not). Mostly they know the same, so there is one clock for the warp, and others only
//! for lanes that know more: one that has acquired a flag, or halves that synchronised apart.

use std::rc::Rc;

use super::flags::{Fenced, Seen};
use crate::clock::{Clock, Proxied, Proxy, View};
use crate::shadow::Access;

#[derive(Clone, Debug)]
pub(super) struct Views {
    agent: u16,
    /// Of the warp: every step that others may learn of ends an epoch.
    epoch: u32,
    /// What every lane knows.
    clock: Rc<Clock>,
    /// Disjoint sets of lanes that know more, with all they know.
    apart: Vec<(u32, Rc<Clock>)>,
    /// Up to which epoch each lane has waited for its own copies.
    waited: [u32; 32],
    /// By proxy that was fenced: up to which epochs each lane's own steps and copies are ordered there.
    fenced_in: Vec<(Proxy, [(u32, u32); 32])>,
    /// What lanes have read through a flag, and acquire with their next fence.
    pub seen: Vec<Seen>,
    /// What lanes' fences have made ready for their next strong writes.
    pub fenced: Vec<Fenced>,
}

/// Takes lanes of which `of` says the same together.
fn alike<T: PartialEq>(lanes: u32, of: impl Fn(usize) -> T, mut take: impl FnMut(u32, T)) {
    let mut left = lanes;
    while left != 0 {
        let value = of(left.trailing_zeros() as usize);
        let same = (0..32).map(|lane| left & 1 << lane);
        let same: u32 = same.filter(|lane| *lane != 0 && of(lane.trailing_zeros() as usize) == value).sum();
        take(same, value);
        left &= !same;
    }
}

impl Views {
    pub fn new(cta: u32, warp: u32, agents: usize) -> Views {
        Views {
            agent: 2 * warp as u16,
            epoch: 1,
            clock: Rc::new(Clock::new(cta, agents)),
            apart: Vec::new(),
            waited: [0; 32],
            fenced_in: Vec::new(),
            seen: Vec::new(),
            fenced: Vec::new(),
        }
    }

    /// Ends an epoch: what follows is not covered by what was published before.
    pub fn next_epoch(&mut self) {
        self.epoch += 1;
    }

    fn clock_of(&self, lane: u32) -> &Rc<Clock> {
        self.apart.iter().find(|(lanes, _)| lanes >> lane & 1 != 0).map_or(&self.clock, |(_, clock)| clock)
    }

    /// What a lane's next access is held against.
    pub fn view(&self, lane: u32) -> View {
        let clock = Rc::clone(self.clock_of(lane));
        View {
            clock,
            agent: self.agent,
            lane: Some(lane),
            own: self.epoch,
            waited: self.waited[lane as usize],
            proxied: None,
        }
    }

    /// What the lanes know alike; `None` when some know more.
    pub fn common(&self) -> Option<View> {
        let view =
            || View { clock: Rc::clone(&self.clock), agent: self.agent, lane: None, own: 0, waited: 0, proxied: None };
        self.apart.is_empty().then(view)
    }

    /// An access by the warp, yet without lanes.
    pub fn access(&self, cta: u32, pc: u32, kind: u8) -> Access {
        Access { cta, agent: self.agent, clock: self.epoch, pc, kind, ..Access::default() }
    }

    /// Adds the own steps of `lanes` to a clock. `all`: those are all that the warp still has.
    fn add_own(&self, clock: &mut Clock, lanes: u32, all: bool) {
        let spoken_for = |same: u32| if all && same == lanes { u32::MAX } else { same };
        clock.add(self.agent, spoken_for(lanes), self.epoch);
        alike(lanes, |lane| self.waited[lane], |same, waited| clock.add(self.agent + 1, spoken_for(same), waited));
        for (proxy, fenced) in &self.fenced_in {
            alike(
                lanes,
                |lane| fenced[lane],
                |same, (own, waited)| {
                    clock.add_in(*proxy, self.agent, spoken_for(same), own);
                    clock.add_in(*proxy, self.agent + 1, spoken_for(same), waited);
                },
            );
        }
    }

    /// What a release by all of `lanes` says: what they know and what they did. When these are all lanes that are `live`, it
    /// speaks for those that have exited, too, as barriers do not wait for them; `u32::MAX` lets it speak for `lanes` alone.
    pub fn published(&self, lanes: u32, live: u32) -> Clock {
        let mut clock = self.published_plainly(lanes, live);
        let lanes = if lanes & live == live { u32::MAX } else { lanes };
        let fenced = self.fenced.iter().filter(|fenced| fenced.is_news(lanes));
        fenced.for_each(|fenced| clock.add_fenced(&fenced.before(lanes)));
        clock
    }

    fn published_plainly(&self, lanes: u32, live: u32) -> Clock {
        let mut left = lanes;
        let mut joined: Option<Clock> = None;
        let base = std::iter::once((u32::MAX, &self.clock));
        for (group, clock) in self.apart.iter().map(|(group, clock)| (*group, clock)).chain(base) {
            if group & left == 0 {
                continue;
            }
            left &= !group;
            match &mut joined {
                Some(joined) => joined.join(clock),
                None => joined = Some((**clock).clone()),
            }
        }
        let mut clock = joined.unwrap_or_else(|| (*self.clock).clone());
        self.add_own(&mut clock, lanes, lanes & live == live);
        clock
    }

    /// Every lane learns a clock that holds all they know already, and that they have published.
    pub fn replace(&mut self, clock: &Rc<Clock>) {
        self.clock = Rc::clone(clock);
        self.apart.clear();
        self.fenced.iter_mut().for_each(Fenced::told);
    }

    /// What came before each `fence.sc` that comes before the lane's next step.
    pub fn before_fences_sc(&self, lane: u32) -> Option<Rc<Clock>> {
        let mut news = self.fenced.iter().filter(|fenced| fenced.is_news(1 << lane)).peekable();
        let known = self.clock_of(lane);
        if news.peek().is_none() {
            return known.fenced().map(Rc::clone);
        }
        let mut known = (**known).clone();
        news.for_each(|fenced| known.add_fenced(&fenced.before(1 << lane)));
        known.fenced().map(Rc::clone)
    }

    /// The lane's next `fence.sc` comes after others, which had `clock` before them.
    pub fn hear(&mut self, lane: u32, live: u32, clock: &Rc<Clock>) {
        self.update(1 << lane, live, |known| Rc::make_mut(known).hear(clock));
    }

    /// These lanes execute a `fence.sc`: they learn what came before those that are known to come before it.
    pub fn learn_heard(&mut self, lanes: u32, live: u32) {
        let mut clocks = std::iter::once(&self.clock).chain(self.apart.iter().map(|(_, clock)| clock));
        if clocks.any(|clock| clock.has_heard()) {
            self.update(lanes, live, |known| Rc::make_mut(known).learn_heard());
        }
    }

    /// These lanes learn what a release said.
    pub fn learn(&mut self, lanes: u32, live: u32, clock: &Clock) {
        self.update(lanes, live, |known| Rc::make_mut(known).join(clock));
    }

    /// Changes what these lanes know.
    fn update(&mut self, lanes: u32, live: u32, change: impl Fn(&mut Rc<Clock>)) {
        if lanes & live == live {
            change(&mut self.clock);
            self.apart.iter_mut().for_each(|(_, apart)| change(apart));
            return;
        }
        let mut left = lanes;
        let mut split = Vec::new();
        for (group, known) in &mut self.apart {
            let both = *group & lanes;
            left &= !both;
            if both == *group {
                change(known);
            } else if both != 0 {
                *group &= !both;
                split.push((both, Rc::clone(known)));
            }
        }
        if left != 0 {
            split.push((left, Rc::clone(&self.clock)));
        }
        for (group, mut known) in split {
            change(&mut known);
            self.apart.push((group, known));
        }
    }

    /// `bar.warp.sync`: what each of the lanes did and knew comes before what all of them do next.
    pub fn sync(&mut self, lanes: u32, live: u32) {
        let clock = Rc::new(self.published(lanes, live));
        if lanes & live == live {
            self.replace(&clock);
        } else {
            self.apart.iter_mut().for_each(|(group, _)| *group &= !lanes);
            self.apart.retain(|(group, _)| *group != 0);
            self.apart.push((lanes, clock));
        }
        self.next_epoch();
    }

    /// A proxy fence by these lanes: what each of them did and knew in the generic proxy comes before what it does next in
    /// another. It orders nothing among the lanes.
    pub fn fence_proxy(&mut self, lanes: u32, live: u32, proxies: &[Proxy]) {
        let fence = |clock: &mut Rc<Clock>| {
            let clock = Rc::make_mut(clock);
            proxies.iter().for_each(|proxy| clock.fence(*proxy));
        };
        self.update(lanes, live, fence);
        for proxy in proxies {
            if !self.fenced_in.iter().any(|(known, _)| known == proxy) {
                self.fenced_in.push((*proxy, [(0, 0); 32]));
            }
        }
        for (_, fenced) in self.fenced_in.iter_mut().filter(|(known, _)| proxies.contains(known)) {
            let lanes = (0..32).filter(|lane| lanes >> lane & 1 != 0);
            lanes.for_each(|lane| fenced[lane] = (self.epoch, self.waited[lane]));
        }
        self.next_epoch();
    }

    /// What an operation of another proxy that the lane issues now is held against.
    pub fn in_proxy(&self, lane: u32, proxy: Proxy, fence_reads: bool) -> View {
        let fenced = self.fenced_in.iter().find(|(known, _)| *known == proxy);
        let own = fenced.map_or((0, 0), |(_, fenced)| fenced[lane as usize]);
        let clock = self.clock_of(lane).in_proxy(proxy);
        View { proxied: Some(Rc::new(Proxied { clock, own, fence_reads, by_part: false })), ..self.view(lane) }
    }

    /// What every lane that is `live` knows, in the generic proxy and in another.
    pub fn known(&self, live: u32, proxy: Proxy) -> (Rc<Clock>, Rc<Clock>) {
        let apart = self.apart.iter().fold(0, |all, (group, _)| all | group);
        let base = Some(&self.clock).filter(|_| live & !apart != 0);
        let mut groups =
            base.into_iter().chain(self.apart.iter().filter(|(group, _)| group & live != 0).map(|(_, clock)| clock));
        let first = groups.next().unwrap_or(&self.clock);
        let (mut generic, mut other) = (Rc::clone(first), first.in_proxy(proxy));
        for clock in groups {
            Rc::make_mut(&mut generic).meet(clock);
            Rc::make_mut(&mut other).meet(&clock.in_proxy(proxy));
        }
        (generic, other)
    }

    /// Every lane has waited for asynchronous operations of an agent of this CTA, up to an epoch of theirs.
    pub fn learn_async(&mut self, cta: u32, agent: u16, epoch: u32) {
        Rc::make_mut(&mut self.clock).learn_async(cta, agent, epoch);
        self.apart.iter_mut().for_each(|(_, clock)| Rc::make_mut(clock).learn_async(cta, agent, epoch));
    }

    /// The lane has waited for its copies up to an epoch of theirs.
    pub fn waited(&mut self, lane: u32, epoch: u32) {
        self.waited[lane as usize] = epoch;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::{Order, Scope};
    use crate::shadow::{ASYNC, ATOMIC, Clusters, Shadow, WRITE};

    /// Thread `t` is lane `t % 3` of warp `t / 3 % 2` of CTA `t / 6`.
    const THREADS: usize = 12;
    const LANES: u32 = 0b111;
    const CLUSTERS: Clusters = Clusters { grid: [2, 1, 1], cluster: [1, 1, 1] };

    /// The same twice: as the emulator does it, and with every access and a dense vector clock for every thread.
    struct Both {
        shadow: Shadow,
        /// By warp.
        views: Vec<Views>,
        past: Vec<(usize, u32, u64, u8)>,
        known: [Known; THREADS],
        /// What came before each `fence.sc` before the thread's next step, and before its next `fence.sc`.
        fenced: [Known; THREADS],
        heard: [Known; THREADS],
        /// Operations of that proxy, none of which is ever waited for.
        operations: u32,
    }

    /// What comes before, by thread: in the generic proxy, and in another one.
    #[derive(Clone, Copy, Default)]
    struct Known {
        clock: [u32; THREADS],
        proxied: [u32; THREADS],
    }

    impl Known {
        fn join(&mut self, other: &Known) {
            raise(&mut self.clock, &other.clock);
            raise(&mut self.proxied, &other.proxied);
        }
    }

    impl Both {
        fn new() -> Both {
            let views = (0..4).map(|warp| Views::new(warp / 2, warp % 2, 4)).collect();
            let mut known = [Known::default(); THREADS];
            (0..THREADS).for_each(|thread| known[thread].clock[thread] = 1);
            let (fenced, heard) = Default::default();
            Both { shadow: Shadow::default(), views, past: Vec::new(), known, fenced, heard, operations: 0 }
        }

        fn tick(&mut self, thread: usize) {
            self.known[thread].clock[thread] += 1;
        }

        /// Whether each of the two sees a race.
        fn access(&mut self, thread: usize, at: usize, bytes: usize, kind: u8) -> (bool, bool) {
            let (cta, lane) = ((thread / 6) as u32, (thread % 3) as u32);
            let views = &self.views[thread / 3];
            let (access, view) = (views.access(cta, kind.into(), kind).of_lane(lane), views.view(lane));
            let seen = self.shadow.access((at, bytes), access, &view, false, CLUSTERS).is_err();
            let mask = ((1u64 << bytes) - 1) << at;
            let races = |past: &(usize, u32, u64, u8)| {
                past.2 & mask != 0
                    && (past.3 | kind) & WRITE != 0
                    && (past.0 == THREADS || past.1 > self.known[thread].clock[past.0])
                    && past.0 != thread
                    && (past.3 & kind & ATOMIC == 0 || past.2 != mask)
            };
            let truly = self.past.iter().any(races);
            self.past.push((thread, self.known[thread].clock[thread], mask, kind));
            (seen, truly)
        }

        /// The same for an operation that a thread issues to another proxy.
        fn operate(&mut self, thread: usize, at: usize, bytes: usize, kind: u8) -> (bool, bool) {
            let lane = (thread % 3) as u32;
            self.operations += 1;
            let access = Access { agent: 4, clock: self.operations, kind: kind | ASYNC, ..Access::default() };
            let view = self.views[thread / 3].in_proxy(lane, Proxy::Shared, false);
            let seen = self.shadow.access((at, bytes), access.of_lane(lane), &view, false, CLUSTERS).is_err();
            self.views[thread / 3].next_epoch();
            let mask = ((1u64 << bytes) - 1) << at;
            let ordered = |past: &(usize, u32, u64, u8)| match past.3 {
                _ if past.0 == THREADS => false,
                kind if kind & WRITE != 0 => past.1 <= self.known[thread].proxied[past.0],
                _ => past.0 == thread || past.1 <= self.known[thread].clock[past.0],
            };
            let races =
                |past: &(usize, u32, u64, u8)| past.2 & mask != 0 && (past.3 | kind) & WRITE != 0 && !ordered(past);
            let truly = self.past.iter().any(races);
            self.past.push((THREADS, self.operations, mask, kind));
            self.tick(thread);
            (seen, truly)
        }

        /// Lanes of a warp fence that proxy, each for itself.
        fn fence(&mut self, warp: usize, lanes: u32) {
            self.views[warp].fence_proxy(lanes, LANES, &[Proxy::Shared]);
            for thread in (0..3).filter(|lane| lanes >> lane & 1 != 0).map(|lane| 3 * warp + lane) {
                let known = self.known[thread].clock;
                raise(&mut self.known[thread].proxied, &known);
                self.tick(thread);
            }
        }

        /// Lanes of a warp execute `fence.sc`, each for itself.
        fn fence_sc(&mut self, warp: usize, lanes: u32) {
            self.views[warp].fence((lanes, LANES), (Scope::Gpu, Order::AcqRel, true), |_| true);
            for thread in (0..3).filter(|lane| lanes >> lane & 1 != 0).map(|lane| 3 * warp + lane) {
                let heard = std::mem::take(&mut self.heard[thread]);
                self.known[thread].join(&heard);
                self.fenced[thread] = self.known[thread];
                self.tick(thread);
            }
        }

        /// A relaxed write by one thread is read by another.
        fn observe(&mut self, from: usize, to: usize) {
            if let Some(fenced) = self.views[from / 3].before_fences_sc(from as u32 % 3) {
                self.views[to / 3].hear(to as u32 % 3, LANES, &fenced);
            }
            self.views[from / 3].next_epoch();
            let fenced = self.fenced[from];
            self.heard[to].join(&fenced);
            self.tick(from);
        }

        /// One thread's release is acquired by another.
        fn pass_on(&mut self, from: usize, to: usize) {
            let published = self.views[from / 3].published(1 << (from % 3), u32::MAX);
            self.views[to / 3].learn(1 << (to % 3), LANES, &published);
            self.views[from / 3].next_epoch();
            let theirs = self.all(from);
            self.learn(to, &theirs);
            self.tick(from);
        }

        /// Lanes of a warp synchronise.
        fn sync(&mut self, warp: usize, lanes: u32) {
            self.views[warp].sync(lanes, LANES);
            let threads: Vec<usize> =
                (0..3).filter(|lane| lanes >> lane & 1 != 0).map(|lane| 3 * warp + lane).collect();
            self.meet(&threads);
        }

        /// The warps of a CTA meet at a barrier.
        fn barrier(&mut self, cta: usize) {
            let [first, second] = [2 * cta, 2 * cta + 1].map(|warp| self.views[warp].published(LANES, LANES));
            let mut joined = first;
            joined.join(&second);
            let joined = Rc::new(joined);
            for views in &mut self.views[2 * cta..2 * cta + 2] {
                views.next_epoch();
                views.replace(&joined);
            }
            let threads: Vec<usize> = (6 * cta..6 * cta + 6).collect();
            self.meet(&threads);
        }

        fn meet(&mut self, threads: &[usize]) {
            let before: Vec<[Known; 3]> = threads.iter().map(|&thread| self.all(thread)).collect();
            for &to in threads {
                before.iter().for_each(|theirs| self.learn(to, theirs));
            }
            threads.iter().for_each(|&thread| self.tick(thread));
        }

        fn all(&self, thread: usize) -> [Known; 3] {
            [self.known[thread], self.fenced[thread], self.heard[thread]]
        }

        fn learn(&mut self, to: usize, [known, fenced, heard]: &[Known; 3]) {
            self.known[to].join(known);
            self.fenced[to].join(fenced);
            self.heard[to].join(heard);
        }
    }

    fn raise(clock: &mut [u32; THREADS], theirs: &[u32; THREADS]) {
        clock.iter_mut().zip(theirs).for_each(|(mine, theirs)| *mine = (*mine).max(*theirs));
    }

    #[test]
    fn the_same_races_as_with_everything_remembered() {
        let (mut state, mut races, mut steps) = (1u64, 0, 0u32);
        let mut random = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below
        };
        for round in 0..20_000 {
            let mut both = Both::new();
            for _ in 0..40 {
                // Mostly in order, or the first race comes at once.
                match random(16) {
                    0..5 => both.pass_on(random(THREADS), random(THREADS)),
                    5..9 => both.sync(random(4), 1 + random(7) as u32),
                    9 => both.barrier(random(2)),
                    10..12 => both.fence(random(4), 1 + random(7) as u32),
                    _ => {}
                }
                // Between accesses enough for the order of `fence.sc` to matter.
                for _ in 0..if round % 5 == 4 { random(24) } else { 0 } {
                    match random(8) {
                        0..3 => both.fence_sc(random(4), 1 + random(7) as u32),
                        3..6 => both.observe(random(THREADS), random(THREADS)),
                        6 => both.barrier(random(2)),
                        _ => both.fence(random(4), 1 + random(7) as u32),
                    }
                }
                let bytes = 1 << random(5);
                let at = random(32 / bytes) * bytes;
                let kind = [0, 0, 0, WRITE, ATOMIC, ATOMIC | WRITE][random(if round % 3 == 0 { 6 } else { 4 })];
                let thread = random(THREADS);
                let (seen, truly) = match random(4) {
                    0 if round % 2 == 0 => both.operate(thread, at, bytes, kind & WRITE),
                    _ => both.access(thread, at, bytes, kind),
                };
                assert_eq!(seen, truly, "round {round}");
                steps += 1;
                if truly {
                    races += 1;
                    break;
                }
            }
        }
        assert!(races > 1000 && steps > 50_000, "{races} races in {steps} accesses");
    }
}
