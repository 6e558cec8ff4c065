//! Bulk copies: issued by a thread, landing at some time before they are waited for.
//!
//! PTX ISA, "Asynchronous operations: completion mechanisms". A copy that completes at an mbarrier belongs to an agent of
//! that mbarrier; one in a bulk group to two of the issuing warp, one for what it reads and one for what it writes.

use std::rc::Rc;

use super::access::lanes_of;
use super::{Clock, Context, Cta, Fault, Outcome};
use crate::alu;
use crate::isa::{Atomic, Binary, Ty};
use crate::launch::Timing;
use crate::report::Rule;
use crate::shadow::{ATOMIC, WRITE};

/// Up to 16 bytes that lie next to each other on both sides; `from` is `None` for what lies outside a tensor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chunk {
    pub from: Option<u64>,
    pub to: u64,
    pub bytes: u8,
}

/// A copy before it is known where and how it completes.
#[derive(Clone, Debug, Default)]
pub(super) struct Plan {
    pub chunks: Vec<Chunk>,
    /// What chunks without a source are filled with.
    pub fill: [u8; 16],
    /// Bytes that a transaction count is reduced by.
    pub bytes: u32,
    pub reduce: Option<(Atomic, Ty)>,
}

/// One side of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Global,
    /// Of the CTA of this serial, in this slot.
    Shared(u32, usize),
    /// No bytes: an arrival for `cp.async`.
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Done {
    /// At the mbarrier at this offset of the destination.
    Mbarrier(u32),
    /// In the group of this number of its lane; what the lane has waited for.
    Group { group: u32, read: bool, seen: bool },
    /// Arrives at the mbarrier for the `cp.async` of its lane up to this epoch.
    Copies { mbarrier: u32, epoch: u32 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Issued,
    Read,
    Landed,
}

/// A bulk copy that was issued.
#[derive(Debug)]
pub(super) struct InFlight {
    pc: u32,
    lane: u32,
    /// CTA and warp that issued it.
    pub owner: (u32, u32),
    slot: usize,
    issued: Rc<Clock>,
    pub plan: Plan,
    /// What was read.
    data: Vec<[u8; 16]>,
    pub from: Side,
    pub to: Side,
    pub reads: (u32, u16),
    pub writes: (u32, u16),
    pub number: u32,
    pub done: Done,
    stage: Stage,
    eager: bool,
    /// Its accesses are of the generic proxy.
    pub generic: bool,
    /// Its bytes are read once for all destinations of a multicast.
    pub counts: bool,
}

/// The bulk groups of a warp.
#[derive(Debug, Default)]
pub(super) struct Groups {
    /// Groups each lane has committed.
    pub committed: [u32; 32],
    /// Number of the last copy.
    pub number: u32,
    /// The agents of reads and writes, once there is a copy.
    pub agents: Option<(u16, u16)>,
}

impl Groups {
    pub fn commit(&mut self, mask: u32) {
        lanes_of(mask).for_each(|lane| self.committed[lane as usize] += 1);
    }
}

type Failed = ((u32, u32), u32, Fault);

impl Context<'_> {
    pub fn is_eager(&mut self) -> bool {
        match self.options.copies {
            Timing::Eager => true,
            Timing::Lazy => false,
            Timing::Mixed => self.random(2) == 0,
        }
    }

    /// A copy that is to land at once.
    pub fn due(&self) -> Option<usize> {
        self.in_flight.iter().position(|copy| copy.eager && copy.stage != Stage::Landed)
    }

    pub fn is_under_way(&self) -> bool {
        self.in_flight.iter().any(|copy| copy.stage != Stage::Landed)
    }

    /// Instruction and owner of a copy under way that is to complete at an mbarrier.
    pub fn copy_to(&self, cta: &Cta, mbarrier: u32) -> Option<(u32, (u32, u32))> {
        let to = Side::Shared(cta.serial, cta.slot);
        let mut copies = self.in_flight.iter().filter(|copy| copy.stage != Stage::Landed);
        let found = copies.find(|copy| match copy.done {
            Done::Mbarrier(at) => copy.to == to && at == mbarrier,
            Done::Copies { mbarrier: at, .. } => copy.owner.0 == cta.serial && at == mbarrier,
            Done::Group { .. } => false,
        })?;
        Some((found.pc, found.owner))
    }

    /// Lets the first copy under way from `at` around land.
    pub fn land(&mut self, at: usize) -> Result<(), Failed> {
        let count = self.in_flight.len();
        let next = (0..count).map(|i| (at % count + i) % count).find(|i| self.in_flight[*i].stage != Stage::Landed);
        let Some(next) = next else { return Ok(()) };
        let mut copy = self.in_flight.swap_remove(next);
        let place = |copy: &InFlight, fault: Fault| {
            let lane = fault.lane.unwrap_or(copy.lane);
            (copy.owner, copy.pc, fault.lane(lane))
        };
        self.land_copy(&mut copy).map_err(|fault| place(&copy, fault))?;
        if matches!(copy.done, Done::Group { seen: false, .. }) {
            self.in_flight.push(copy);
        }
        Ok(())
    }

    /// Does something with the CTA in a slot, which must still be the one of that serial.
    fn with_cta(
        &mut self,
        (serial, slot): (u32, usize),
        action: impl FnOnce(&mut Cta, &mut Self) -> Outcome<()>,
    ) -> Outcome<()> {
        match self.ctas[slot].take() {
            Some(mut cta) if cta.serial == serial => {
                let outcome = action(&mut cta, self);
                self.ctas[slot] = Some(cta);
                outcome
            }
            other => {
                self.ctas[slot] = other;
                let message = "a bulk copy uses the shared memory of a CTA that has exited";
                Err(Fault::new(Rule::OutOfBounds, message))
            }
        }
    }

    fn land_copy(&mut self, copy: &mut InFlight) -> Outcome<()> {
        self.idle = 0;
        if let Done::Copies { mbarrier, epoch } = copy.done {
            copy.stage = Stage::Landed;
            return self.with_cta((copy.owner.0, copy.slot), |cta, context| {
                let landed = cta.land_upto(context, copy.owner.1 as usize, copy.lane, epoch)?;
                cta.arrive_for_copies(context, u64::from(mbarrier), &landed)
            });
        }
        match copy.from {
            Side::Shared(serial, slot) if copy.stage == Stage::Issued => {
                self.with_cta((serial, slot), |cta, context| copy.read(context, Some(cta)))?;
            }
            _ => copy.read(self, None)?,
        }
        match copy.to {
            Side::Shared(serial, slot) => self.with_cta((serial, slot), |cta, context| {
                copy.write(context, Some(cta))?;
                let Done::Mbarrier(at) = copy.done else { return Ok(()) };
                cta.complete_copy(context, u64::from(at), copy.number, copy.plan.bytes, (copy.pc, copy.owner))
            }),
            _ => copy.write(self, None),
        }
    }

    /// `cp.async.mbarrier.arrive`: an arrival once the copies of a lane have landed.
    pub fn arrive_with_copies(&mut self, cta: &mut Cta, warp: usize, (pc, lane): (u32, u32), mbarrier: u64) {
        let epoch = cta.warps[warp].copies.mark();
        let eager = self.is_eager();
        let mut copy = InFlight::new(cta, warp, (pc, lane), eager);
        copy.done = Done::Copies { mbarrier: mbarrier as u32, epoch };
        self.in_flight.push(copy);
    }

    /// At the exit of lanes: nothing in shared memory may still have to be read for them.
    pub fn check_groups(&mut self, cta: &Cta, warp: usize, lanes: u32) -> Outcome<()> {
        let owner = (cta.serial, warp as u32);
        let committed = &cta.warps[warp].groups.committed;
        for copy in &mut self.in_flight {
            let Done::Group { group, read, seen } = &mut copy.done else { continue };
            if copy.owner != owner || lanes >> copy.lane & 1 == 0 {
                continue;
            }
            if !*read {
                let open = *group == committed[copy.lane as usize];
                let why = if open { "was never committed to a group" } else { "was never waited for" };
                let message = format!("a bulk copy from shared memory {why}");
                return Err(Fault { pc: Some(copy.pc), ..Fault::new(Rule::AsyncLeft, message) }.lane(copy.lane));
            }
            *seen = true;
        }
        self.in_flight
            .retain(|copy| !matches!(copy.done, Done::Group { seen: true, .. }) || copy.stage != Stage::Landed);
        Ok(())
    }
}

impl InFlight {
    pub fn new(cta: &Cta, warp: usize, (pc, lane): (u32, u32), eager: bool) -> InFlight {
        InFlight {
            pc,
            lane,
            owner: (cta.serial, warp as u32),
            slot: cta.slot,
            issued: Rc::clone(&cta.warps[warp].clock),
            plan: Plan::default(),
            data: Vec::new(),
            from: Side::None,
            to: Side::None,
            reads: (0, 0),
            writes: (0, 0),
            number: 0,
            done: Done::Group { group: 0, read: false, seen: false },
            stage: Stage::Issued,
            eager,
            generic: false,
            counts: true,
        }
    }

    /// Reads the source; `source` is its CTA when it lies in shared memory.
    fn read(&mut self, context: &mut Context<'_>, mut source: Option<&mut Cta>) -> Outcome<()> {
        if self.stage != Stage::Issued {
            return Ok(());
        }
        self.stage = Stage::Read;
        let access = Cta::async_access(context, self.reads, self.number, self.pc, 0);
        self.data.reserve(self.plan.chunks.len());
        for chunk in &self.plan.chunks {
            let bytes = usize::from(chunk.bytes);
            let data = match (chunk.from, &mut source) {
                (None, _) => self.plan.fill,
                (Some(from), Some(cta)) => {
                    context.counters.shared_loaded += bytes as u64;
                    cta.read_shared(context, from, bytes, access, &self.issued)?
                }
                (Some(from), None) => {
                    context.counters.global_loaded += if self.counts { bytes as u64 } else { 0 };
                    context.read_global(from, bytes, access, &self.issued)?
                }
            };
            self.data.push(data);
        }
        Ok(())
    }

    /// Writes, or combines with, the destination.
    fn write(&mut self, context: &mut Context<'_>, mut target: Option<&mut Cta>) -> Outcome<()> {
        self.stage = Stage::Landed;
        let atomic = if self.plan.reduce.is_some() { ATOMIC } else { 0 };
        let mut access = Cta::async_access(context, self.writes, self.number, self.pc, WRITE | atomic);
        if self.generic {
            access.kind = WRITE | atomic;
        }
        for (chunk, data) in self.plan.chunks.iter().zip(&mut self.data) {
            let bytes = usize::from(chunk.bytes);
            if let Some((op, ty)) = self.plan.reduce {
                let read = crate::shadow::Access { kind: access.kind & !WRITE, ..access };
                let old = match &mut target {
                    Some(cta) => cta.read_shared(context, chunk.to, bytes, read, &self.issued)?,
                    None => context.read_global(chunk.to, bytes, read, &self.issued)?,
                };
                *data = combine(op, ty, &old, data, bytes);
            }
            match &mut target {
                Some(cta) => {
                    context.counters.shared_stored += bytes as u64;
                    cta.write_shared(context, chunk.to, &data[..bytes], access, &self.issued)?;
                }
                None => {
                    context.counters.global_stored += bytes as u64;
                    context.write_global(chunk.to, &data[..bytes], access, &self.issued)?;
                }
            }
        }
        self.data = Vec::new();
        Ok(())
    }
}

/// `old op new`, element by element.
fn combine(op: Atomic, ty: Ty, old: &[u8; 16], new: &[u8; 16], bytes: usize) -> [u8; 16] {
    let each = ty.bits() as usize / 8;
    let mut out = [0; 16];
    for at in (0..bytes).step_by(each) {
        let element = |data: &[u8; 16]| data[at..at + each].iter().rev().fold(0, |value, &b| value << 8 | u64::from(b));
        let (a, b) = (element(old), element(new));
        let value = match (ty, op) {
            (Ty::F16 | Ty::Bf16, Atomic::Min) => alu::binary(Binary::Min, ty, &[a; 32], &[b; 32])[0],
            (Ty::F16 | Ty::Bf16, Atomic::Max) => alu::binary(Binary::Max, ty, &[a; 32], &[b; 32])[0],
            (Ty::F16 | Ty::Bf16, _) => alu::binary(Binary::Add, ty, &[a; 32], &[b; 32])[0],
            _ => alu::atomic(op, ty, a, b, 0),
        };
        out[at..at + each].copy_from_slice(&value.to_le_bytes()[..each]);
    }
    out
}

impl Cta {
    /// PTX ISA, "cp.async.bulk.wait_group": with `.read`, only the sources have been read.
    pub(super) fn wait_for_groups(
        &mut self,
        context: &mut Context<'_>,
        warp: usize,
        mask: u32,
        pending: u32,
        read_only: bool,
    ) -> Outcome<()> {
        let owner = (self.serial, warp as u32);
        let committed = self.warps[warp].groups.committed;
        let mut copies = std::mem::take(&mut context.in_flight);
        let mut outcome = Ok(());
        for copy in &mut copies {
            let Done::Group { group, read, seen } = &mut copy.done else { continue };
            let last = committed[copy.lane as usize].saturating_sub(pending);
            if copy.owner != owner || mask >> copy.lane & 1 == 0 || *group >= last {
                continue;
            }
            *read = true;
            *seen |= !read_only;
            let (pc, lane) = (copy.pc, copy.lane);
            let mut landed = copy.read(context, Some(self));
            if landed.is_ok() && !read_only && copy.stage != Stage::Landed {
                landed = copy.write(context, None);
            }
            outcome = landed.map_err(|fault| Fault { pc: Some(pc), ..fault }.lane(lane));
            if outcome.is_err() {
                break;
            }
        }
        context.in_flight = copies;
        outcome?;
        context
            .in_flight
            .retain(|copy| !matches!(copy.done, Done::Group { seen: true, .. }) || copy.stage != Stage::Landed);
        let groups = &self.warps[warp].groups;
        let Some((reads, writes)) = groups.agents else { return Ok(()) };
        let (mut read, mut written) = (groups.number, groups.number);
        for copy in context.in_flight.iter().filter(|copy| copy.owner == owner) {
            if let Done::Group { read: was_read, .. } = copy.done {
                written = written.min(copy.number - 1);
                read = if was_read { read } else { read.min(copy.number - 1) };
            }
        }
        let serial = self.serial;
        let clock = Rc::make_mut(&mut self.warps[warp].clock);
        clock.learn(serial, reads, read);
        if !read_only {
            clock.learn(serial, writes, written);
        }
        Ok(())
    }
}
