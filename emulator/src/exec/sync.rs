//! What orders memory: barriers of a CTA, flags in memory, fences.

use std::collections::btree_map;
use std::rc::Rc;

use super::views::Views;
use super::warp::Warp;
use super::{Clock, Context, Cta, Fault, Outcome};
use crate::isa::{Order, Scope, Semantics, Space};
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
    views: Box<Views>,
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
        let blocked = self.warps[warp].blocked.is_some();
        if !blocked {
            // It never stopped: only the others are woken.
            context.woken.retain(|&other| other != warp);
        }
        Ok(blocked)
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
            context.woken.push(warp);
        }
        context.idle = 0;
        Ok(())
    }

    /// `bar.warp.sync`.
    pub(super) fn warp_sync(&mut self, warp: usize, lanes: u32) {
        let live = self.warps[warp].live;
        self.warps[warp].views.sync(lanes, live);
    }

    fn place(&self, space: Space, address: u64) -> Place {
        (if space == Space::Shared { self.serial } else { u32::MAX }, address)
    }

    /// What a lane's load, or the read of its atomic, learns from the word.
    ///
    /// PTX ISA, "Release and Acquire Patterns", "Observation Order", "Synchronizes-with": the read must be morally strong
    /// with the write whose value it takes; what began the release and what ends the acquisition, operation or fence, too.
    pub(super) fn acquire(&mut self, context: &Context<'_>, (warp, lane): (usize, u32), word: Word, sem: Semantics) {
        if word.space == Space::Local {
            return;
        }
        let Some(flag) = context.flags.get(&self.place(word.space, word.address)) else { return };
        let near = |scope, cta, other_scope| {
            context.clusters.includes(scope, cta, self.serial)
                && context.clusters.includes(other_scope, self.serial, cta)
        };
        if flag.bytes != word.bytes || !near(flag.last.0, flag.last.1, sem.scope) {
            return;
        }
        let Warp { views, live, .. } = &mut self.warps[warp];
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
        for fenced in views.fenced.iter().filter(|fenced| fenced.lanes >> lane & 1 != 0) {
            published.push(Released { clock: fenced.views.published(1 << lane, u32::MAX), scope: fenced.scope, cta });
        }
        let place = self.place(word.space, word.address);
        self.mark_flag(context, word, !published.is_empty());
        let clusters = context.clusters;
        let flag = match context.flags.entry(place) {
            btree_map::Entry::Vacant(_) if published.is_empty() => return,
            btree_map::Entry::Vacant(entry) => {
                entry.insert(Flag { bytes: word.bytes, last: (sem.scope, self.serial), releases: Vec::new() })
            }
            btree_map::Entry::Occupied(entry) => entry.into_mut(),
        };
        let (scope, writer) = flag.last;
        let continues =
            clusters.includes(scope, writer, self.serial) && clusters.includes(sem.scope, self.serial, writer);
        if !(atomic && continues) {
            flag.releases.clear();
        }
        flag.last = (sem.scope, self.serial);
        published.into_iter().for_each(|released| flag.add(released));
        if flag.releases.is_empty() {
            context.flags.remove(&place);
        }
    }

    /// Writes to other bytes than exactly those of a flag end it, as does a weak write: what reads the flag later does not
    /// read what was released.
    pub(super) fn end_flags(&self, context: &mut Context<'_>, word: Word, keep: bool) {
        let Word { space, address, bytes } = word;
        let range = self.place(space, address.saturating_sub(15))..self.place(space, address + bytes as u64);
        let overlaps = |place: &Place, flag: &Flag| {
            place.1 + flag.bytes as u64 > address && !(keep && place.1 == address && flag.bytes == bytes)
        };
        let ended: Vec<Place> =
            context.flags.range(range).filter(|(place, flag)| overlaps(place, flag)).map(|(place, _)| *place).collect();
        ended.iter().for_each(|place| drop(context.flags.remove(place)));
    }

    /// Orders what relaxed reads have seen before what follows, and what went before relaxed writes to come. The order among
    /// `fence.sc` themselves gives no causality order, hence is not followed.
    pub(super) fn fence(&mut self, context: &Context<'_>, warp: usize, lanes: u32, scope: Scope) {
        let (serial, clusters) = (self.serial, context.clusters);
        let Warp { views, live, .. } = &mut self.warps[warp];
        for (by, released) in std::mem::take(&mut views.seen) {
            let within = released.cta.is_none_or(|cta| {
                clusters.includes(released.scope, cta, serial) && clusters.includes(scope, serial, cta)
            });
            if within && by & lanes != 0 {
                views.learn(by & lanes, *live, &released.clock);
            }
            let left = if within { by & !lanes } else { by };
            if left != 0 {
                views.seen.push((left, released));
            }
        }
        for fenced in views.fenced.iter_mut().filter(|fenced| fenced.scope <= scope) {
            fenced.lanes &= !lanes;
        }
        views.fenced.retain(|fenced| fenced.lanes != 0);
        let (seen, fenced) = (std::mem::take(&mut views.seen), std::mem::take(&mut views.fenced));
        let snapshot = Box::new(views.clone());
        (views.seen, views.fenced) = (seen, fenced);
        views.fenced.push(Fenced { lanes, scope, views: snapshot });
        views.next_epoch();
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
