//! Flags in memory: what releases and acquisitions order, by operations or fences.
//!
//! `fence.sc` among themselves have an order as well (PTX ISA, "Fence-SC Order"), in which the earlier synchronises with the
//! later one. Which is the earlier is known when a strong read takes its value, directly or through atomics, from a strong
//! write, and the one fence comes before the write and the other after the read in causality order: by program order,
//! barriers or whatever synchronises. Were the fences in the other order, the read would come before the write, and could not
//! take its value. So a strong write leaves with the flag what came before the `fence.sc` that come before it; a strong read
//! hears of that; both pass from thread to thread with all else that is known; and a `fence.sc` turns what was heard into
//! what is known. An order that comes about by chance is not followed: it would hide races.

use std::collections::btree_map;
use std::rc::Rc;

use super::cluster::OFFSET;
use super::views::Views;
use super::warp::Warp;
use super::{Access, Clock, Context, Cta};
use crate::isa::{Order, Scope, Semantics, Space};
use crate::memory::Allocation;

/// What a release pattern published.
#[derive(Clone, Debug)]
pub(super) struct Released {
    clock: Clock,
    /// Of the release or the fence.
    scope: Scope,
    /// By whom; `None`: by threads of several CTAs.
    cta: Option<u32>,
}

/// What lanes have read and not acquired yet.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    lanes: u32,
    /// `None`: at any of several places.
    place: Option<Place>,
    released: Rc<Released>,
}

/// What lanes knew and had done at a fence.
#[derive(Clone, Debug)]
pub(super) struct Fenced {
    lanes: u32,
    scope: Scope,
    /// A `fence.sc` whose order among others is followed.
    sc: bool,
    /// The clocks of its lanes know of it, see [`Clock::fenced`].
    told: bool,
    views: Box<Views>,
}

impl Fenced {
    /// Some of these lanes have executed this `fence.sc`, and their clocks do not know of it.
    pub fn is_news(&self, lanes: u32) -> bool {
        self.sc && !self.told && self.lanes & lanes != 0
    }

    pub fn told(&mut self) {
        self.told = self.sc;
    }

    /// What came before it, for these lanes.
    pub fn before(&self, lanes: u32) -> Rc<Clock> {
        Rc::new(self.views.published(self.lanes & lanes, u32::MAX).plain())
    }

    /// What a strong write by these lanes publishes.
    fn published(&self, lanes: u32) -> Clock {
        let clock = self.views.published(self.lanes & lanes, u32::MAX);
        if self.sc { clock.at_fence_sc() } else { clock }
    }
}

/// Bytes of a state space that one element of an access covers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Word {
    pub space: Space,
    pub address: u64,
    pub bytes: usize,
}

/// CTA (`u32::MAX`: global memory) and address.
pub(super) type Place = (u32, u64);

/// A word that was last written by a strong write, with what its last releases published.
#[derive(Debug)]
pub(super) struct Flag {
    bytes: usize,
    /// The last write and its scope.
    last: (Scope, Access),
    releases: Vec<Rc<Released>>,
    /// What the last release operations on it have published: a strong write that follows one in its thread is part of
    /// a release pattern, too. The agent and lane.
    operations: Vec<(u16, u32, Released)>,
    /// What came before each `fence.sc` that came before one of the writes.
    fenced: Option<Rc<Clock>>,
}

/// Releases by different CTAs that a flag tells apart, and threads whose release operations it remembers.
const RELEASES: usize = 8;
/// What lanes have seen in different flags is told apart up to here.
const MOST_SEEN: usize = 64;

impl Flag {
    fn add(&mut self, released: Released) {
        let wide = |released: &Released| released.scope == Scope::Gpu;
        let several = self.releases.len() >= RELEASES && wide(&released);
        let cta = if several { None } else { released.cta };
        let same = |other: &Rc<Released>| other.scope == released.scope && (other.cta == released.cta || several);
        match self.releases.iter_mut().find(|other| same(other)) {
            Some(other) => {
                let other = Rc::make_mut(other);
                other.clock.join(&released.clock);
                other.cta = if other.cta == released.cta { other.cta } else { cta };
            }
            None => self.releases.push(Rc::new(Released { cta, ..released })),
        }
    }
}

/// In `written`: the byte belongs to a flag.
const FLAGGED: u8 = 2;

pub(super) fn flagged(written: &[u8]) -> bool {
    written.iter().fold(0, |any, byte| any | byte) & FLAGGED != 0
}

impl Context<'_> {
    /// Writes to other bytes than exactly those of a flag end it, as does a weak write: what reads the flag later does not
    /// read what was released.
    pub(super) fn end_flags(&mut self, (cta, address): Place, bytes: usize, keep: bool) {
        let range = (cta, address.saturating_sub(15))..(cta, address + bytes as u64);
        let overlaps = |place: &Place, flag: &Flag| {
            place.1 + flag.bytes as u64 > address && !(keep && place.1 == address && flag.bytes == bytes)
        };
        let ended: Vec<Place> =
            self.flags.range(range).filter(|(place, flag)| overlaps(place, flag)).map(|(place, _)| *place).collect();
        ended.iter().for_each(|place| drop(self.flags.remove(place)));
    }

    /// The shared memory of a CTA is gone.
    pub(super) fn forget_flags(&mut self, cta: u32) {
        let mut later = self.flags.split_off(&(cta, 0));
        self.flags.append(&mut later.split_off(&(cta + 1, 0)));
    }
}

impl Views {
    /// What the fences of these lanes have made ready to be published, and in which scope.
    pub fn fenced_by(&self, lanes: u32) -> impl Iterator<Item = (Clock, Scope)> {
        let fenced = self.fenced.iter().filter(move |fenced| fenced.lanes & lanes != 0);
        fenced.map(move |fenced| (fenced.published(lanes), fenced.scope))
    }

    /// A fence by these lanes. It acquires what they have read of what was `within` the scopes, and makes what went before
    /// ready for their next strong writes.
    pub fn fence(
        &mut self,
        (lanes, live): (u32, u32),
        (scope, order, sc): (Scope, Order, bool),
        within: impl Fn(&Released) -> bool,
    ) {
        // A narrower one has no order with all others.
        let sc = sc && scope == Scope::Gpu;
        if sc {
            self.learn_heard(lanes, live);
        }
        if order != Order::Release {
            self.learn_seen((lanes, live), None, within);
        }
        if order == Order::Acquire {
            return;
        }
        if sc {
            // What the releases that were read had heard.
            self.learn_heard(lanes, live);
        }
        let replaced = |fenced: &Fenced| fenced.scope <= scope && (sc || !fenced.sc || fenced.told);
        self.fenced.iter_mut().filter(|fenced| replaced(fenced)).for_each(|fenced| fenced.lanes &= !lanes);
        self.fenced.retain(|fenced| fenced.lanes != 0);
        let (seen, fenced) = (std::mem::take(&mut self.seen), std::mem::take(&mut self.fenced));
        let views = Box::new(self.clone());
        (self.seen, self.fenced) = (seen, fenced);
        self.fenced.push(Fenced { lanes, scope, sc, told: false, views });
        self.next_epoch();
    }

    /// These lanes acquire what they have read, at this place or anywhere.
    fn learn_seen(&mut self, (lanes, live): (u32, u32), place: Option<Place>, within: impl Fn(&Released) -> bool) {
        for Seen { lanes: by, place: at, released } in std::mem::take(&mut self.seen) {
            let within = (place.is_none() || at == place) && within(&released);
            if within && by & lanes != 0 {
                self.learn(by & lanes, live, &released.clock);
            }
            let left = if within { by & !lanes } else { by };
            if left != 0 {
                self.seen.push(Seen { lanes: left, place: at, released });
            }
        }
    }

    /// A relaxed read by these lanes sees what was published: their next fence acquires it.
    pub fn see(&mut self, lanes: u32, clock: Clock) {
        self.see_at(lanes, None, &Rc::new(Released { clock, scope: Scope::Gpu, cta: None }));
    }

    /// The lane reads a place again: an acquire operation there acquires what the last read saw. That earlier ones came in
    /// between other writes is chance, though a fence acquires them, too.
    fn forget_place(&mut self, lane: u32, place: Place) {
        let lane = 1 << lane;
        let mut again = Vec::new();
        for seen in self.seen.iter_mut().filter(|seen| seen.lanes & lane != 0 && seen.place == Some(place)) {
            seen.lanes &= !lane;
            again.push(Rc::clone(&seen.released));
        }
        self.seen.retain(|seen| seen.lanes != 0);
        again.iter().for_each(|released| self.see_at(lane, None, released));
    }

    /// Remembers what lanes have read, once per place, scope and origin.
    fn see_at(&mut self, lanes: u32, place: Option<Place>, released: &Rc<Released>) {
        let place = place.filter(|_| self.seen.len() < MOST_SEEN);
        let same = |seen: &Seen| {
            let origin = (seen.released.scope, seen.released.cta) == (released.scope, released.cta);
            seen.lanes == lanes && seen.place == place && origin
        };
        match self.seen.iter_mut().find(|seen| same(seen)) {
            Some(seen) if Rc::ptr_eq(&seen.released, released) => {}
            Some(seen) => Rc::make_mut(&mut seen.released).clock.join(&released.clock),
            None => self.seen.push(Seen { lanes, place, released: Rc::clone(released) }),
        }
    }
}

impl Cta {
    /// Before a strong write: flags on other bytes that it overlaps end. Its bytes are a flag's from now on.
    fn mark_flag(&mut self, context: &mut Context<'_>, word: Word) {
        let mark = |written: &mut [u8]| {
            let was_flagged = flagged(written);
            written.iter_mut().for_each(|written| *written |= FLAGGED);
            was_flagged
        };
        let was_flagged = if word.space == Space::Shared {
            self.on(context, word.address, |cta, _, at| {
                let offset = cta.shared_offset(at, word.bytes)?;
                Ok(mark(&mut cta.shared.written[offset..offset + word.bytes]))
            })
        } else {
            let Ok((index, offset)) = context.memory.find(word.address, word.bytes) else { return };
            Ok(mark(&mut context.memory.allocations[index].written[offset..offset + word.bytes]))
        };
        // The write itself has found that the bytes exist.
        if was_flagged.unwrap_or(false) {
            context.end_flags(self.place(context, word.space, word.address), word.bytes, true);
        }
    }

    /// A strong read has observed a write, see [`Shadow::observe`](crate::shadow::Shadow::observe).
    fn observe(&mut self, context: &mut Context<'_>, word: Word, (write, read): (Access, Access), blindly: bool) {
        if word.space == Space::Shared {
            // Its bytes have been read: they exist.
            let _ = self.on(context, word.address, |cta, _, at| {
                let offset = cta.shared_offset(at, word.bytes)?;
                cta.shared.shadow.observe((offset, word.bytes), write, read, blindly);
                Ok(())
            });
        } else if let Ok((index, offset)) = context.memory.find(word.address, word.bytes) {
            let Allocation { shadow, base, .. } = &mut context.memory.allocations[index];
            shadow.observe(((*base % 16) as usize + offset, word.bytes), write, read, blindly);
        }
    }

    fn place(&self, context: &Context<'_>, space: Space, address: u64) -> Place {
        if space != Space::Shared {
            return (u32::MAX, address);
        }
        let serial = match self.other_rank(address) {
            Some(rank) => context.serial(context.cluster_of(self.index), rank),
            None => self.serial,
        };
        (serial, address & OFFSET)
    }

    /// What a lane's load, or the read of its atomic, learns from the word; `acquires`: it can begin or end an acquire
    /// pattern; `blindly`: nobody looks at the value.
    ///
    /// PTX ISA, "Release and Acquire Patterns", "Observation Order", "Synchronizes-with": the read must be morally strong
    /// with the write whose value it takes; what began the release and what ends the acquisition, operation or fence, too.
    pub(super) fn acquire(
        &mut self,
        context: &mut Context<'_>,
        (warp, lane): (usize, u32),
        word: Word,
        read: Access,
        (sem, acquires, blindly): (Semantics, bool, bool),
    ) {
        if word.space == Space::Local {
            return;
        }
        let (serial, clusters) = (self.serial, context.clusters);
        let near = |scope, cta, other_scope| {
            clusters.includes(scope, cta, serial) && clusters.includes(other_scope, serial, cta)
        };
        let within = |released: &Released| released.cta.is_none_or(|cta| near(released.scope, cta, sem.scope));
        let place = self.place(context, word.space, word.address);
        let is_acquire = acquires && matches!(sem.order, Order::Acquire | Order::AcqRel);
        if is_acquire {
            // A strong read followed by an acquire operation on the same location.
            let Warp { views, live, .. } = &mut self.warps[warp];
            views.learn_seen((1 << lane, *live), Some(place), within);
        }
        self.warps[warp].views.forget_place(lane, place);
        let Some(flag) = context.flags.get(&place) else { return };
        let (scope, write) = flag.last;
        if flag.bytes != word.bytes || !near(scope, write.cta, sem.scope) {
            return;
        }
        let Warp { views, live, .. } = &mut self.warps[warp];
        if let Some(fenced) = &flag.fenced {
            views.hear(lane, *live, fenced);
        }
        for released in flag.releases.iter().filter(|_| acquires) {
            if is_acquire && within(released) {
                views.learn(1 << lane, *live, &released.clock);
            } else {
                views.see_at(1 << lane, Some(place), released);
            }
        }
        if context.options.checks.races && !(blindly && write.same_thread(&read)) {
            self.observe(context, word, (write, read), blindly);
        }
    }

    /// What a lane's store, or the write of its atomic, publishes through the word. An atomic continues what it reads,
    /// if it is morally strong with the write it reads from; a store begins anew.
    pub(super) fn release(
        &mut self,
        context: &mut Context<'_>,
        (warp, lane): (usize, u32),
        word: Word,
        write: Access,
        sem: Semantics,
    ) {
        if word.space == Space::Local {
            return;
        }
        let views = &self.warps[warp].views;
        let cta = Some(self.serial);
        let operation = matches!(sem.order, Order::Release | Order::AcqRel);
        let operation =
            operation.then(|| Released { clock: views.published(1 << lane, u32::MAX), scope: sem.scope, cta });
        let mut published: Vec<Released> =
            views.fenced_by(1 << lane).map(|(clock, scope)| Released { clock, scope, cta }).collect();
        let fenced = views.before_fences_sc(lane);
        let place = self.place(context, word.space, word.address);
        self.mark_flag(context, word);
        let clusters = context.clusters;
        let flag = match context.flags.entry(place) {
            btree_map::Entry::Vacant(entry) => entry.insert(Flag {
                bytes: word.bytes,
                last: (sem.scope, write),
                releases: Vec::new(),
                operations: Vec::new(),
                fenced: None,
            }),
            btree_map::Entry::Occupied(entry) => entry.into_mut(),
        };
        let (scope, last) = flag.last;
        let continues =
            clusters.includes(scope, last.cta, self.serial) && clusters.includes(sem.scope, self.serial, last.cta);
        if !(write.updates() && continues) {
            flag.releases.clear();
            flag.fenced = None;
        }
        flag.last = (sem.scope, write);
        // Release operations by this thread, which this write follows.
        let mine =
            |(agent, by, released): &(u16, u32, Released)| (*agent, *by, released.cta) == (write.agent, lane, cta);
        published.extend(flag.operations.iter().filter(|entry| mine(entry)).map(|(.., released)| released.clone()));
        if let Some(released) = operation {
            flag.operations.retain(|entry| !mine(entry) || entry.2.scope > sem.scope);
            if flag.operations.len() >= RELEASES {
                flag.operations.remove(0);
            }
            flag.operations.push((write.agent, lane, released.clone()));
            published.push(released);
        }
        published.into_iter().for_each(|released| flag.add(released));
        match (&mut flag.fenced, fenced) {
            (Some(all), Some(fenced)) if !Rc::ptr_eq(all, &fenced) => Rc::make_mut(all).join(&fenced),
            (none @ None, fenced) => *none = fenced,
            _ => {}
        }
    }

    /// Orders what relaxed reads have seen before what follows, and what went before relaxed writes to come; `sc`: what came
    /// before other `fence.sc` as well.
    pub(super) fn fence(&mut self, context: &Context<'_>, warp: usize, lanes: u32, kind: (Scope, Order, bool)) {
        let (serial, clusters) = (self.serial, context.clusters);
        let Warp { views, live, .. } = &mut self.warps[warp];
        let scope = kind.0;
        views.fence((lanes, *live), kind, |released| {
            released.cta.is_none_or(|cta| {
                clusters.includes(released.scope, cta, serial) && clusters.includes(scope, serial, cta)
            })
        });
    }
}
