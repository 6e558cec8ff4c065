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
use super::{Clock, Context, Cta};
use crate::isa::{Order, Scope, Semantics, Space};

/// What a release pattern published.
#[derive(Clone, Debug)]
pub(super) struct Released {
    clock: Clock,
    /// Of the release or the fence.
    scope: Scope,
    /// By whom; `None`: by threads of several CTAs.
    cta: Option<u32>,
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

/// A word through which threads synchronise, with what its last releases published.
#[derive(Debug)]
pub(super) struct Flag {
    bytes: usize,
    /// Scope and CTA of the last write.
    last: (Scope, u32),
    releases: Vec<Rc<Released>>,
    /// What came before each `fence.sc` that came before one of the writes.
    fenced: Option<Rc<Clock>>,
}

/// Releases by different CTAs that a flag tells apart.
const RELEASES: usize = 8;

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
}

impl Views {
    /// What the fences of these lanes have made ready to be published, and in which scope.
    pub fn fenced_by(&self, lanes: u32) -> impl Iterator<Item = (Clock, Scope)> {
        let fenced = self.fenced.iter().filter(move |fenced| fenced.lanes & lanes != 0);
        fenced.map(move |fenced| (fenced.published(lanes), fenced.scope))
    }

    /// A fence by these lanes. It acquires what they have read of what was `within` the scopes, and makes what went before
    /// ready for their next strong writes.
    pub fn fence(&mut self, (lanes, live): (u32, u32), (scope, sc): (Scope, bool), within: impl Fn(&Released) -> bool) {
        // A narrower one has no order with all others.
        let sc = sc && scope == Scope::Gpu;
        if sc {
            self.learn_heard(lanes, live);
        }
        for (by, released) in std::mem::take(&mut self.seen) {
            let within = within(&released);
            if within && by & lanes != 0 {
                self.learn(by & lanes, live, &released.clock);
            }
            let left = if within { by & !lanes } else { by };
            if left != 0 {
                self.seen.push((left, released));
            }
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

    /// A relaxed read by these lanes sees what was published: their next fence acquires it.
    pub fn see(&mut self, lanes: u32, clock: Clock) {
        see(&mut self.seen, lanes, &Rc::new(Released { clock, scope: Scope::Gpu, cta: None }));
    }
}

impl Cta {
    /// Before a strong write: flags on other bytes that it overlaps end. If it publishes, its bytes are a flag's from now on.
    pub(super) fn mark_flag(&mut self, context: &mut Context<'_>, word: Word, publishes: bool) {
        let mark = |written: &mut [u8]| {
            let was_flagged = flagged(written);
            if publishes {
                written.iter_mut().for_each(|written| *written |= FLAGGED);
            }
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

    /// What a lane's load, or the read of its atomic, learns from the word.
    ///
    /// PTX ISA, "Release and Acquire Patterns", "Observation Order", "Synchronizes-with": the read must be morally strong
    /// with the write whose value it takes; what began the release and what ends the acquisition, operation or fence, too.
    pub(super) fn acquire(&mut self, context: &Context<'_>, (warp, lane): (usize, u32), word: Word, sem: Semantics) {
        if word.space == Space::Local {
            return;
        }
        let Some(flag) = context.flags.get(&self.place(context, word.space, word.address)) else { return };
        let near = |scope, cta, other_scope| {
            context.clusters.includes(scope, cta, self.serial)
                && context.clusters.includes(other_scope, self.serial, cta)
        };
        if flag.bytes != word.bytes || !near(flag.last.0, flag.last.1, sem.scope) {
            return;
        }
        let Warp { views, live, .. } = &mut self.warps[warp];
        if let Some(fenced) = &flag.fenced {
            views.hear(lane, *live, fenced);
        }
        for released in &flag.releases {
            let within = released.cta.is_none_or(|cta| near(released.scope, cta, sem.scope));
            if within && matches!(sem.order, Order::Acquire | Order::AcqRel) {
                views.learn(1 << lane, *live, &released.clock);
            } else {
                see(&mut views.seen, 1 << lane, released);
            }
        }
    }

    /// What a lane's store, or the write of its atomic, publishes through the word. An atomic continues what it reads,
    /// if it is morally strong with the write it reads from; a store begins anew.
    pub(super) fn release(
        &mut self,
        context: &mut Context<'_>,
        (warp, lane): (usize, u32),
        word: Word,
        sem: Semantics,
        atomic: bool,
    ) {
        if word.space == Space::Local {
            return;
        }
        let views = &self.warps[warp].views;
        let mut published: Vec<Released> = Vec::new();
        let cta = Some(self.serial);
        if matches!(sem.order, Order::Release | Order::AcqRel) {
            published.push(Released { clock: views.published(1 << lane, u32::MAX), scope: sem.scope, cta });
        }
        published.extend(views.fenced_by(1 << lane).map(|(clock, scope)| Released { clock, scope, cta }));
        let fenced = views.before_fences_sc(lane);
        let place = self.place(context, word.space, word.address);
        let publishes = fenced.is_some() || !published.is_empty();
        self.mark_flag(context, word, publishes);
        let clusters = context.clusters;
        let flag = match context.flags.entry(place) {
            btree_map::Entry::Vacant(_) if !publishes => return,
            btree_map::Entry::Vacant(entry) => entry.insert(Flag {
                bytes: word.bytes,
                last: (sem.scope, self.serial),
                releases: Vec::new(),
                fenced: None,
            }),
            btree_map::Entry::Occupied(entry) => entry.into_mut(),
        };
        let (scope, writer) = flag.last;
        let continues =
            clusters.includes(scope, writer, self.serial) && clusters.includes(sem.scope, self.serial, writer);
        if !(atomic && continues) {
            flag.releases.clear();
            flag.fenced = None;
        }
        flag.last = (sem.scope, self.serial);
        published.into_iter().for_each(|released| flag.add(released));
        match (&mut flag.fenced, fenced) {
            (Some(all), Some(fenced)) if !Rc::ptr_eq(all, &fenced) => Rc::make_mut(all).join(&fenced),
            (none @ None, fenced) => *none = fenced,
            _ => {}
        }
        if flag.releases.is_empty() && flag.fenced.is_none() {
            context.flags.remove(&place);
        }
    }

    /// Orders what relaxed reads have seen before what follows, and what went before relaxed writes to come; `sc`: what came
    /// before other `fence.sc` as well.
    pub(super) fn fence(&mut self, context: &Context<'_>, warp: usize, lanes: u32, (scope, sc): (Scope, bool)) {
        let (serial, clusters) = (self.serial, context.clusters);
        let Warp { views, live, .. } = &mut self.warps[warp];
        views.fence((lanes, *live), (scope, sc), |released| {
            released.cta.is_none_or(|cta| {
                clusters.includes(released.scope, cta, serial) && clusters.includes(scope, serial, cta)
            })
        });
    }
}

/// Remembers what lanes have read, once per scope and origin.
fn see(seen: &mut Vec<(u32, Rc<Released>)>, lanes: u32, released: &Rc<Released>) {
    let same = |other: &Released| other.scope == released.scope && other.cta == released.cta;
    match seen.iter_mut().find(|(by, other)| *by == lanes && same(other)) {
        Some((_, other)) if Rc::ptr_eq(other, released) => {}
        Some((_, other)) => Rc::make_mut(other).clock.join(&released.clock),
        None => seen.push((lanes, Rc::clone(released))),
    }
}
