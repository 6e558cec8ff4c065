//! Data races by happens-before.
//!
//! Each 16 bytes of memory that have been touched remember who accessed which of them. PTX ISA, "Memory Consistency Model":
//! an access races with a remembered one that it overlaps when one of the two writes, they are not ordered (see `clock`),
//! and they are not *morally strong*: both strong, of scopes that include one another's thread, on exactly the same bytes.
//!
//! An access is forgotten once a later one that is ordered after it stands for it: whatever races with the first races with
//! the second. Beyond that, of weak writes nothing is ever forgotten, of other accesses only when 16 bytes have seen more than
//! [`MOST`] that are unordered among themselves (reads by that many warps, say): then one of them, chosen at random, so
//! that over several seeds no side of a race stays hidden.

use std::collections::HashMap;

use crate::clock::View;
use crate::isa::Scope;

/// An access as memory remembers it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Access {
    pub cta: u32,
    /// The agent's epoch.
    pub clock: u32,
    /// Index of the instruction.
    pub pc: u32,
    /// The lanes that each accessed all of `bytes`; in a strip, the lane at byte 0 of the cell, which may be "negative".
    pub lanes: u32,
    /// Agent within the CTA.
    pub agent: u16,
    /// Bytes of the cell; 0 in an empty slot.
    pub bytes: u16,
    /// `WRITE`, `ATOMIC`, `UPDATE`, `ASYNC`, `WGMMA`, `TOGETHER` and the scope.
    pub kind: u8,
    /// Not 0: neighbouring lanes each accessed `1 << (strip - 1)` bytes, one after the other.
    pub strip: u8,
}

pub(crate) const WRITE: u8 = 1;
/// A strong access.
pub(crate) const ATOMIC: u8 = 2;
/// Reads and writes at once.
pub(crate) const UPDATE: u8 = 4;
const NARROW_CTA: u8 = 8;
const NARROW_CLUSTER: u8 = 16;
/// Through another proxy, as an operation that was issued: each (agent and epoch) for itself.
pub(crate) const ASYNC: u8 = 32;
/// By a warpgroup's `wgmma`.
pub(crate) const WGMMA: u8 = 64;

/// A read that all lanes of a warp have executed before any of them goes on.
pub(crate) const TOGETHER: u8 = 128;

/// The `kind` of a strong access.
pub(crate) fn strong(scope: Scope) -> u8 {
    match scope {
        Scope::Cta => ATOMIC | NARROW_CTA,
        Scope::Cluster => ATOMIC | NARROW_CLUSTER,
        Scope::Gpu => ATOMIC,
    }
}

/// Which CTAs form a cluster.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clusters {
    pub grid: [u32; 3],
    pub cluster: [u32; 3],
}

impl Clusters {
    fn of(self, cta: u32) -> [u32; 3] {
        let ([x, y, _], [cx, cy, cz]) = (self.grid, self.cluster);
        [cta % x / cx, cta / x % y / cy, cta / x / y / cz]
    }

    /// Whether the scope of a thread of the one CTA takes in the threads of the other.
    pub fn includes(self, scope: Scope, a: u32, b: u32) -> bool {
        match scope {
            Scope::Cta => a == b,
            Scope::Cluster => a == b || self.of(a) == self.of(b),
            Scope::Gpu => true,
        }
    }

    fn strong(self, a: &Access, b: &Access) -> bool {
        let kinds = a.kind | b.kind;
        let near = if kinds & NARROW_CTA != 0 {
            self.includes(Scope::Cta, a.cta, b.cta)
        } else {
            kinds & NARROW_CLUSTER == 0 || self.includes(Scope::Cluster, a.cta, b.cta)
        };
        a.kind & b.kind & ATOMIC != 0 && near && a.element() == b.element()
    }
}

const CELL: usize = 16;
/// One write and the reads of four warps: as many as a tile of a product has in its main loop.
const SLOTS: usize = 5;
const PAGE: usize = 64;
/// Reads and atomics that 16 bytes remember.
const MOST: usize = 12;

impl Access {
    pub fn of_lane(self, lane: u32) -> Access {
        Access { lanes: 1 << lane, ..self }
    }

    /// Lanes that accessed any byte.
    pub fn all_lanes(&self) -> u32 {
        self.lanes_at(u16::MAX)
    }

    /// Of one asynchronous operation, which reads before it writes. What the lanes of an instruction issue has one number.
    fn same_operation(&self, other: &Access) -> bool {
        let both = self.kind & other.kind & ASYNC != 0 && self.lanes_at(other.bytes) == other.all_lanes();
        both && self.clock == other.clock && self.agent == other.agent && self.cta == other.cta
    }

    /// Lanes that accessed some of `bytes`.
    fn lanes_at(&self, bytes: u16) -> u32 {
        if self.strip == 0 {
            return self.lanes;
        }
        let width = 1u32 << (self.strip - 1);
        let touched = self.bytes & bytes;
        let touches = |group: &u32| u32::from(touched) >> (group * width) & ((1 << width) - 1) != 0;
        (0..CELL as u32 / width).filter(touches).map(|group| 1 << (self.lanes.wrapping_add(group) & 31)).sum()
    }

    /// Bytes that each lane accessed.
    fn element(&self) -> u32 {
        if self.strip == 0 { self.bytes.count_ones() } else { 1 << (self.strip - 1) }
    }

    /// The strip this access of one lane would be a part of.
    fn as_strip(&self) -> Option<(u8, u32)> {
        let width = self.bytes.count_ones();
        let first = self.bytes.trailing_zeros();
        let fits = width < 16 && width.is_power_of_two() && first.is_multiple_of(width) && self.lanes.is_power_of_two();
        fits.then(|| (width.trailing_zeros() as u8 + 1, self.lanes.trailing_zeros().wrapping_sub(first / width)))
    }

    /// An atomic.
    pub fn updates(&self) -> bool {
        self.kind & UPDATE != 0
    }

    pub fn same_thread(&self, other: &Access) -> bool {
        self.lanes == other.lanes && self.agent == other.agent && self.cta == other.cta
    }

    /// Whether this remembers the strong write of one lane.
    fn is_of(&self, write: &Access) -> bool {
        let same = self.clock == write.clock && self.agent == write.agent && self.cta == write.cta;
        same && self.kind & WRITE != 0 && self.lanes_at(write.bytes) & write.lanes != 0 && self.bytes & write.bytes != 0
    }

    fn same_time(&self, other: &Access) -> bool {
        self.clock == other.clock && self.agent == other.agent && self.cta == other.cta && self.kind == other.kind
    }

    /// Strong alike: what is morally strong with the one is with the other.
    fn as_strong_as(&self, other: &Access) -> bool {
        (self.kind ^ other.kind) & !(WRITE | UPDATE | TOGETHER) == 0 && self.element() == other.element()
    }

    /// Whether `other`, of the same time, is remembered by this already.
    fn holds(&self, other: &Access) -> bool {
        if self.bytes & other.bytes != other.bytes {
            return false;
        }
        match self.strip {
            0 if self.kind & ATOMIC != 0 && self.bytes != other.bytes => false,
            // Of a write the value counts, see `Shadow::access`.
            0 if self.kind & WRITE != 0 => self.lanes == other.lanes,
            0 => self.lanes & other.lanes == other.lanes,
            strip => other.as_strip() == Some((strip, self.lanes)),
        }
    }

    /// Takes in an access of the same time and instruction, if one entry can stand for both exactly.
    fn merge(&mut self, other: &Access) -> bool {
        if self.strip == 0 && self.bytes == other.bytes {
            self.lanes |= other.lanes;
            return true;
        }
        if self.strip == 0 && self.lanes == other.lanes && self.kind & ATOMIC == 0 {
            self.bytes |= other.bytes;
            return true;
        }
        let Some((strip, first)) = other.as_strip() else { return false };
        let mine = if self.strip == 0 { self.as_strip() } else { Some((self.strip, self.lanes)) };
        if mine != Some((strip, first)) {
            return false;
        }
        (self.strip, self.lanes) = (strip, first);
        self.bytes |= other.bytes;
        true
    }
}

#[derive(Debug, Default)]
struct Cell {
    slots: [Access; SLOTS],
    /// Which of the spills holds more, from 1.
    spill: u32,
}

/// The memory of one allocation (or of the shared memory of one CTA), a page at a time where it is touched.
#[derive(Debug, Default)]
pub(crate) struct Shadow {
    pages: Vec<Option<Box<[Cell; PAGE]>>>,
    /// What cells have no slots for.
    spills: Vec<Vec<Access>>,
    /// By cell: strong writes with who has observed them.
    observed: HashMap<usize, Vec<Pair>>,
    random: u32,
}

/// A strong write of one lane, and a strong read of one that it precedes in observation order.
#[derive(Clone, Copy, Debug)]
struct Pair {
    write: Access,
    read: Access,
    /// See [`Shadow::observe`].
    blindly: bool,
}

impl Shadow {
    pub fn clear(&mut self) {
        self.pages.clear();
        self.spills.clear();
        self.observed.clear();
    }

    /// What is remembered, with the offset of its first byte.
    pub fn remembered(&self) -> impl Iterator<Item = (usize, &Access)> {
        let pages = self.pages.iter().enumerate().filter_map(|(page, cells)| Some((page, cells.as_ref()?)));
        let cells =
            pages.flat_map(|(page, cells)| cells.iter().enumerate().map(move |(at, cell)| (page * PAGE + at, cell)));
        cells.flat_map(|(at, cell)| {
            let spill = (cell.spill as usize).checked_sub(1).and_then(|spill| self.spills.get(spill));
            let accesses = cell.slots.iter().chain(spill.into_iter().flatten()).filter(|access| access.bytes != 0);
            accesses.map(move |access| (at * CELL + access.bytes.trailing_zeros() as usize, access))
        })
    }

    /// Checks and records an access to `[at, at + bytes)`. `equal`: the bytes written are those that are there. Weak writes
    /// of several lanes by one instruction do not race then: whichever comes last, the outcome is the same (PTX ISA: the
    /// model's axioms hold for races of one size, so one of the values lands; the CUDA guide says the same).
    ///
    /// The error is the access that this one races with, with the lanes that it is not ordered after.
    pub fn access(
        &mut self,
        (at, bytes): (usize, usize),
        access: Access,
        view: &View,
        equal: bool,
        clusters: Clusters,
    ) -> Result<(), Access> {
        let (mut at, end) = (at, at + bytes);
        while at < end {
            let upto = end.min((at / CELL + 1) * CELL);
            let mask = (u16::MAX >> (CELL - (upto - at))) << (at % CELL);
            let page = at / CELL / PAGE;
            if page >= self.pages.len() {
                self.pages.resize_with(page + 1, || None);
            }
            let cells = self.pages[page].get_or_insert_with(|| Box::new(std::array::from_fn(|_| Cell::default())));
            let cell = &mut cells[at / CELL % PAGE];
            let access = Access { bytes: mask, ..access };
            let spill = (cell.spill as usize).checked_sub(1).and_then(|at| self.spills.get_mut(at));
            let observed = |write: &Access, lanes| match self.observed.get(&(at / CELL)) {
                Some(observed) => unobserved(observed, (write, lanes), |read| view.covers(read)),
                None => lanes,
            };
            let terms = Terms { view, equal, clusters, unobserved: &observed };
            if let Some(left) = cell.touch(spill, access, &terms)? {
                cell.remember(&mut self.spills, left, &mut self.random);
            }
            at = upto;
        }
        Ok(())
    }

    /// A strong read by a lane has taken its value from a strong write of another, with which it is morally strong.
    ///
    /// PTX ISA, "Causality Order": what precedes an operation in observation order precedes what comes after that operation
    /// in base causality order. This holds for the write alone, not for what came before it, so that clocks cannot say it.
    /// An atomic stands for the write from then on; for other reads it is remembered who has observed what. `blindly`: an
    /// atomic whose result nobody looks at. It passes the order on, but that it came later is chance: following that would
    /// hide races.
    pub fn observe(&mut self, (at, bytes): (usize, usize), write: Access, read: Access, blindly: bool) {
        let index = at / CELL;
        let mask = (u16::MAX >> (CELL - bytes.min(CELL))) << (at % CELL);
        let (write, read) = (Access { bytes: mask, ..write }, Access { bytes: mask, ..read });
        let Some(cells) = self.pages.get_mut(index / PAGE).and_then(Option::as_mut) else { return };
        let cell = &mut cells[index % PAGE];
        let spill = (cell.spill as usize).checked_sub(1).and_then(|at| self.spills.get_mut(at));
        let mut entries: Vec<&mut Access> = cell.slots.iter_mut().chain(spill.into_iter().flatten()).collect();
        let stands_for = !blindly && read.kind & UPDATE != 0 && read.as_strong_as(&write);
        if let Some(entry) = entries.iter_mut().find(|entry| stands_for && entry.is_of(&write)) {
            if entry.strip == 0 {
                entry.lanes &= !write.lanes;
            }
            if entry.strip != 0 || entry.lanes == 0 {
                entry.bytes &= !mask;
            }
        }
        if stands_for && !self.observed.contains_key(&index) {
            return;
        }
        let observed = self.observed.entry(index).or_default();
        if observed.len() > MOST_OBSERVED {
            observed.retain(|pair| entries.iter().any(|entry| entry.is_of(&pair.write)));
        }
        // What the write has observed itself, in the order in which that was.
        let mut writes = vec![write];
        for pair in observed.iter().rev().filter(|_| !blindly) {
            if writes.iter().any(|write| pair.read.is_of(write)) && !writes.iter().any(|write| pair.write.is_of(write))
            {
                writes.push(pair.write);
            }
        }
        for write in writes.into_iter().skip(usize::from(stands_for || write.same_thread(&read))) {
            // Who is ordered after a later read of the thread is ordered after its first.
            let known =
                |pair: &Pair| pair.blindly == blindly && pair.write.is_of(&write) && pair.read.same_thread(&read);
            if !observed.iter().any(known) {
                observed.push(Pair { write, read, blindly });
            }
        }
    }

    /// Whether what a remembered write did precedes what comes after the reads that `covers` holds for.
    pub fn is_observed(&self, offset: usize, write: &Access, covers: impl Fn(&Access) -> bool) -> bool {
        let observed = self.observed.get(&(offset / CELL));
        observed.is_some_and(|observed| unobserved(observed, (write, write.all_lanes()), covers) == 0)
    }
}

/// Pairs that a cell holds before those are dropped whose writes it has forgotten.
const MOST_OBSERVED: usize = 64;

/// Of the lanes of a write, those that no read for which `covers` holds has observed.
fn unobserved(observed: &[Pair], (write, lanes): (&Access, u32), covers: impl Fn(&Access) -> bool) -> u32 {
    let pairs = observed.iter().filter(|pair| !pair.blindly && write.is_of(&pair.write));
    pairs.fold(lanes, |left, pair| {
        let news = left & pair.write.lanes != 0 && covers(&pair.read);
        if news { left & !pair.write.lanes } else { left }
    })
}

/// What an access is held against memory with.
struct Terms<'a> {
    view: &'a View,
    equal: bool,
    clusters: Clusters,
    /// See [`unobserved`].
    unobserved: &'a dyn Fn(&Access, u32) -> u32,
}

/// What an entry is to an access.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Entry {
    /// Remembers it already.
    Holds,
    /// Has taken it in.
    Merged,
    Free,
    Other,
}

impl Access {
    /// Holds a new access against this remembered one.
    #[inline]
    fn meet(&mut self, access: &Access, terms: &Terms<'_>) -> Result<Entry, Access> {
        let Terms { view, equal, clusters, .. } = *terms;
        if self.bytes == 0 {
            return Ok(Entry::Free);
        }
        let together = self.same_time(access);
        // Of what a thread issued, no two writes are ordered, be they of one time.
        let issued = access.agent != view.agent;
        if together && self.holds(access) && !(issued && access.kind & WRITE != 0) {
            return Ok(Entry::Holds);
        }
        let overlap = self.bytes & access.bytes;
        let writes = (self.kind | access.kind) & WRITE != 0;
        // Reads by other CTAs are not worth the look at their clocks.
        if overlap != 0 && (writes || self.cta == access.cta) {
            let unordered = if self.same_operation(access) {
                0
            } else if writes || self.agent == access.agent {
                view.unordered(self, || self.lanes_at(overlap))
            } else {
                // That a read stands for another warp's is worth the quick look alone.
                u32::from(!view.clock.covers_agent(self))
            };
            // The new one stands for this one if it is at least as much in the way of others.
            let stands_for = (access.kind & WRITE != 0 || self.kind & WRITE == 0)
                && (access.kind & ATOMIC == 0 || self.as_strong_as(access))
                // Who is ordered after a read in the one proxy need not be after one in the other.
                && (access.kind & WRITE != 0 || (self.kind ^ access.kind) & ASYNC == 0);
            if unordered == 0 {
                // What is left of a strong access would seem to be a smaller one.
                let whole = overlap == self.bytes || self.kind & ATOMIC == 0 || self.strip != 0;
                if stands_for && whole && view.speaks_for_all() {
                    self.bytes &= !overlap;
                }
            } else if writes {
                let one_instruction = together && self.pc == access.pc && equal;
                if !one_instruction && !clusters.strong(self, access) {
                    let strong_write = self.kind & ATOMIC != 0 && self.kind & WRITE != 0;
                    let unordered = if strong_write { (terms.unobserved)(self, unordered) } else { unordered };
                    if unordered != 0 {
                        return Err(Access { lanes: unordered, strip: 0, ..*self });
                    }
                }
            } else if stands_for && self.strip == 0 && overlap == self.bytes && self.agent == access.agent && !together
            {
                self.lanes &= unordered;
            }
            if self.bytes == 0 {
                return Ok(Entry::Free);
            }
        }
        Ok(if together && self.pc == access.pc && self.merge(access) { Entry::Merged } else { Entry::Other })
    }
}

impl Cell {
    /// Holds an access against all that are remembered; gives it back when there is no place for it.
    #[inline]
    fn touch(
        &mut self,
        spill: Option<&mut Vec<Access>>,
        access: Access,
        terms: &Terms<'_>,
    ) -> Result<Option<Access>, Access> {
        let (mut place, mut merged) = (None, false);
        for slot in &mut self.slots {
            match slot.meet(&access, terms)? {
                // What else is remembered was checked then, or has been checked against this since.
                Entry::Holds => return Ok(None),
                Entry::Merged => merged = true,
                Entry::Free => place = Some(slot),
                Entry::Other => {}
            }
        }
        if let Some(more) = spill {
            let mut at = 0;
            while at < more.len() {
                match more[at].meet(&access, terms)? {
                    Entry::Holds => return Ok(None),
                    Entry::Merged => merged = true,
                    Entry::Free => {
                        more.swap_remove(at);
                        continue;
                    }
                    Entry::Other => {}
                }
                at += 1;
            }
        }
        match place {
            _ if merged => {}
            Some(place) => *place = access,
            None => return Ok(Some(access)),
        }
        Ok(None)
    }

    /// Finds a place beyond the slots, or takes that of another read or atomic.
    #[cold]
    fn remember(&mut self, spills: &mut Vec<Vec<Access>>, access: Access, random: &mut u32) {
        if self.spill == 0 {
            spills.push(Vec::new());
            self.spill = spills.len() as u32;
        }
        let more = &mut spills[self.spill as usize - 1];
        let expendable = |access: &&mut Access| access.kind & (WRITE | ATOMIC) != WRITE;
        let count = self.slots.iter_mut().chain(more.iter_mut()).filter(expendable).count();
        if count < MOST {
            more.push(access);
            return;
        }
        *random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let chosen = (*random >> 16) as usize % count;
        if let Some(place) = self.slots.iter_mut().chain(more.iter_mut()).filter(expendable).nth(chosen) {
            *place = access;
        }
    }
}
