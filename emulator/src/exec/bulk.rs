//! Bulk copies: issued by a thread, landing at some time before they are waited for.
//!
//! PTX ISA, "Asynchronous operations: completion mechanisms". A copy that completes at an mbarrier belongs to an agent of
//! that mbarrier; one in a bulk group to two of the issuing warp, one for what it reads and one for what it writes.

use super::access::lanes_of;
use super::warp::Warp;
use super::{Clock, Context, Cta, Fault, Outcome};
use crate::alu;
use crate::clock::{Proxy, View};
use crate::isa::{Atomic, Binary, Ty};
use crate::launch::Timing;
use crate::report::Rule;
use crate::shadow::{ASYNC, ATOMIC, Access, UPDATE, WRITE};

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
    /// What the lane was ordered after when it issued the copy, for accesses to shared and to global memory.
    issued: [View; 2],
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
    generic: bool,
    /// Its bytes are read once for all destinations of a multicast.
    pub counts: bool,
}

/// The bulk groups of a warp.
#[derive(Debug, Default)]
pub(super) struct Groups {
    /// Groups each lane has committed.
    pub committed: [u32; 32],
    /// Number of the last copies, those of one instruction having the same, and that instruction.
    pub number: u32,
    pub issue: u64,
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
        let manner = (self.is_eager(), self.options.fence_reads);
        let mut copy = InFlight::new(cta, warp, (pc, lane), manner);
        copy.done = Done::Copies { mbarrier: mbarrier as u32, epoch };
        self.in_flight.push(copy);
    }

    /// Whether an mbarrier will say when the `cp.async` of a lane up to this epoch have landed.
    pub fn arrives_for(&self, owner: (u32, u32), lane: u32, epoch: u32) -> bool {
        let theirs = self.in_flight.iter().filter(|copy| copy.owner == owner && copy.lane == lane);
        theirs.into_iter().any(|copy| matches!(copy.done, Done::Copies { epoch: upto, .. } if upto >= epoch))
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
    pub fn new(cta: &Cta, warp: usize, (pc, lane): (u32, u32), (eager, fence_reads): (bool, bool)) -> InFlight {
        let views = &cta.warps[warp].views;
        InFlight {
            pc,
            lane,
            owner: (cta.serial, warp as u32),
            slot: cta.slot,
            issued: [Proxy::Shared, Proxy::Global].map(|proxy| views.in_proxy(lane, proxy, fence_reads)),
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

    /// An access of an asynchronous operation. Generic ones must be ordered before it by a proxy fence, operations of other
    /// agents by waits that have let the issuer learn of them ([`learn_async`](crate::clock::Clock::learn_async)). The issuer
    /// begins a new epoch when it issues, and whoever waits for the operation learns agent and number.
    fn access(&self, (cta, agent): (u32, u16), kind: u8) -> Access {
        let kind = kind | if self.generic { 0 } else { ASYNC };
        Access { cta, agent, kind, clock: self.number, pc: self.pc, ..Access::default() }.of_lane(self.lane)
    }

    /// Its accesses are of the generic proxy.
    pub fn make_generic(&mut self) {
        self.generic = true;
        for view in &mut self.issued {
            view.proxied = None;
        }
    }

    /// Reads the source; `source` is its CTA when it lies in shared memory.
    fn read(&mut self, context: &mut Context<'_>, mut source: Option<&mut Cta>) -> Outcome<()> {
        if self.stage != Stage::Issued {
            return Ok(());
        }
        self.stage = Stage::Read;
        let access = self.access(self.reads, 0);
        let [shared, global] = &self.issued;
        self.data.reserve(self.plan.chunks.len());
        for chunk in &self.plan.chunks {
            let bytes = usize::from(chunk.bytes);
            let data = match (chunk.from, &mut source) {
                (None, _) => self.plan.fill,
                (Some(from), Some(cta)) => {
                    context.counters.shared_loaded += bytes as u64;
                    cta.read_shared(context, from, bytes, access, shared)?
                }
                (Some(from), None) => {
                    context.counters.global_loaded += if self.counts { bytes as u64 } else { 0 };
                    context.read_global(from, bytes, access, global)?
                }
            };
            self.data.push(data);
        }
        Ok(())
    }

    fn put(
        &self,
        context: &mut Context<'_>,
        target: &mut Option<&mut Cta>,
        (to, data): (u64, &[u8]),
        access: Access,
    ) -> Outcome<()> {
        let [shared, global] = &self.issued;
        match target {
            Some(cta) => {
                context.counters.shared_stored += data.len() as u64;
                cta.write_shared(context, to, data, access, shared)
            }
            None => {
                context.counters.global_stored += data.len() as u64;
                context.write_global(to, data, access, global)
            }
        }
    }

    /// Writes, or combines with, the destination.
    fn write(&mut self, context: &mut Context<'_>, mut target: Option<&mut Cta>) -> Outcome<()> {
        self.stage = Stage::Landed;
        let access = self.access(self.writes, WRITE);
        let update = Access { kind: access.kind | UPDATE | ATOMIC, ..access };
        for (chunk, data) in self.plan.chunks.iter().zip(&self.data) {
            let bytes = usize::from(chunk.bytes);
            let Some((op, ty)) = self.plan.reduce else {
                self.put(context, &mut target, (chunk.to, &data[..bytes]), access)?;
                continue;
            };
            // PTX ISA, "cp.reduce.async.bulk": each reduction is a relaxed atomic of its own.
            let each = ty.bits() as usize / 8;
            for (i, element) in data[..bytes].chunks(each).enumerate() {
                let at = chunk.to + (i * each) as u64;
                // As if by neighbouring lanes, so that memory remembers them together.
                let update = update.of_lane((at as usize / each) as u32 % 32);
                let read = Access { kind: update.kind & !WRITE, ..update };
                let old = match &mut target {
                    Some(cta) => cta.read_shared(context, at, each, read, &self.issued[0])?,
                    None => context.read_global(at, each, read, &self.issued[1])?,
                };
                let new = combine(op, ty, &old, element).to_le_bytes();
                self.put(context, &mut target, (at, &new[..each]), update)?;
            }
        }
        self.data = Vec::new();
        Ok(())
    }
}

/// `old op new`, of one element.
fn combine(op: Atomic, ty: Ty, old: &[u8], new: &[u8]) -> u64 {
    let element = |data: &[u8]| data.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
    let (a, b) = (element(&old[..new.len()]), element(new));
    match (ty, op) {
        (Ty::F16 | Ty::Bf16, Atomic::Min) => alu::binary(Binary::Min, ty, &[a; 32], &[b; 32])[0],
        (Ty::F16 | Ty::Bf16, Atomic::Max) => alu::binary(Binary::Max, ty, &[a; 32], &[b; 32])[0],
        (Ty::F16 | Ty::Bf16, _) => alu::binary(Binary::Add, ty, &[a; 32], &[b; 32])[0],
        _ => alu::atomic(op, ty, a, b, 0),
    }
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
        let mut done = Clock::new(serial, 0);
        done.learn_async(serial, reads, read);
        if !read_only {
            done.learn_async(serial, writes, written);
        }
        let Warp { views, live, .. } = &mut self.warps[warp];
        views.learn(mask, *live, &done);
        Ok(())
    }
}
