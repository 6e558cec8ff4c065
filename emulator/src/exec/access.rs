//! Loads, stores and atomics: state spaces, bounds, alignment, what was never written, races.

use super::cluster::OFFSET;
use super::flags::{Word, flagged};
use super::{Context, Cta, Fault, Outcome, Shared};
use crate::alu;
use crate::clock::View;
use crate::decode::{LOCAL_BASE, SHARED_BASE};
use crate::isa::{Address, Atomic, Cache, Dst, Order, Semantics, Space, Src, Ty};
use crate::memory::{Allocation, MemoryError};
use crate::report::Rule;
use crate::shadow::{ASYNC, ATOMIC, Access, UPDATE, WGMMA, WRITE, strong};

pub(super) fn lanes_of(mask: u32) -> impl Iterator<Item = u32> {
    (0..32).filter(move |lane| mask >> lane & 1 != 0)
}

pub(super) fn memory_fault(error: MemoryError) -> Fault {
    let rule = match error {
        MemoryError::OutOfBounds { .. } => Rule::OutOfBounds,
        MemoryError::Uninitialised { .. } => Rule::Uninitialised,
        MemoryError::OutOfMemory { .. } => Rule::BadLaunch,
    };
    Fault::new(rule, error.to_string())
}

/// A race of `access`, which `view` shows, with what memory remembers.
pub(super) fn race(what: &str, access: &Access, other: Access, view: &View) -> Fault {
    let verb = |access: &Access| match (access.kind & UPDATE != 0, access.kind & WRITE != 0, access.kind & ATOMIC != 0)
    {
        (true, ..) => "atomic",
        (_, true, false) => "write",
        (_, true, true) => "strong write",
        (_, _, false) => "read",
        (_, _, true) => "strong read",
    };
    let by = |access: &Access| match (access.kind & ASYNC != 0, access.agent & 1 == 1) {
        _ if access.kind & WGMMA != 0 => " by wgmma",
        (true, _) => " of an asynchronous bulk operation",
        (_, true) => " of an asynchronous copy",
        _ => "",
    };
    let generic_only = view.proxied.is_some() && other.kind & ASYNC == 0 && view.covers_generically(&other);
    let order = if generic_only { "is ordered in the generic proxy only" } else { "is not ordered" };
    let hint = if generic_only {
        ""
    } else if access.kind & other.kind & ATOMIC != 0 {
        " (both are strong, but their scopes do not include one another or their sizes differ)"
    } else if access.cta == other.cta && access.agent == other.agent && access.agent & 1 == 0 {
        " by another lane of the warp"
    } else {
        ""
    };
    let message =
        format!("{}{} of {what} {order} after {}{}{hint}", verb(access), by(access), verb(&other), by(&other));
    Fault { other: Some(other), ..Fault::new(Rule::Race, message) }
}

fn first_unwritten(written: &[u8]) -> Option<usize> {
    // Whole words first: this runs for every byte that is read.
    if let Ok(word) = <[u8; 16]>::try_from(written)
        && u128::from_le_bytes(word) == u128::from_le_bytes([1; 16])
    {
        return None;
    }
    written.iter().position(|&written| written & 1 == 0)
}

/// Whether a weak write leaves the bytes as they are.
fn lands_equal(there: &[u8], written: &[u8], data: &[u8], access: Access) -> bool {
    access.kind & ATOMIC == 0 && there == data && written.iter().all(|written| written & 1 != 0)
}

/// Stores bytes; strong writes leave the marks of flags.
fn put(place: &mut [u8], written: &mut [u8], data: &[u8], kind: u8) {
    place.copy_from_slice(data);
    if kind & ATOMIC == 0 {
        written.fill(1);
    } else {
        written.iter_mut().for_each(|written| *written |= 1);
    }
}

impl Context<'_> {
    fn check_global(
        &mut self,
        index: usize,
        at: (usize, usize),
        access: Access,
        view: &View,
        equal: bool,
    ) -> Outcome<()> {
        if !self.options.checks.races {
            return Ok(());
        }
        let Allocation { shadow, base, name, .. } = &mut self.memory.allocations[index];
        let (offset, bytes) = at;
        shadow.access(((*base % 16) as usize + offset, bytes), access, view, equal, self.clusters).map_err(|other| {
            let address = *base + offset as u64;
            race(&format!("{bytes} bytes of `{name}` at offset {offset} (address {address:#x})"), &access, other, view)
        })
    }

    /// Reads up to 16 bytes of global memory.
    pub(super) fn read_global(&mut self, address: u64, bytes: usize, access: Access, view: &View) -> Outcome<[u8; 16]> {
        let (index, offset) = self.memory.find(address, bytes).map_err(memory_fault)?;
        let allocation = &self.memory.allocations[index];
        if self.options.checks.uninitialised
            && let Some(at) = first_unwritten(&allocation.written[offset..offset + bytes])
        {
            let (name, address) = (allocation.name.clone(), address + at as u64);
            return Err(memory_fault(MemoryError::Uninitialised { name, offset: offset + at, address }));
        }
        self.check_global(index, (offset, bytes), access, view, false)?;
        Ok(padded(&self.memory.allocations[index].data[offset..offset + bytes]))
    }

    pub(super) fn write_global(&mut self, address: u64, data: &[u8], access: Access, view: &View) -> Outcome<()> {
        let (index, offset) = self.memory.find(address, data.len()).map_err(memory_fault)?;
        let range = offset..offset + data.len();
        let allocation = &self.memory.allocations[index];
        if allocation.constant {
            let message = format!("`{}` at offset {offset} is constant and cannot be written", allocation.name);
            return Err(Fault::new(Rule::OutOfBounds, message));
        }
        let equal = lands_equal(&allocation.data[range.clone()], &allocation.written[range.clone()], data, access);
        let flagged = access.kind & ATOMIC == 0 && flagged(&allocation.written[range.clone()]);
        self.check_global(index, (offset, data.len()), access, view, equal)?;
        if flagged {
            self.end_flags((u32::MAX, address), data.len(), false);
        }
        let Allocation { data: bytes, written, .. } = &mut self.memory.allocations[index];
        put(&mut bytes[range.clone()], &mut written[range], data, access.kind);
        Ok(())
    }
}

/// Bytes with zeros after them.
#[inline]
fn padded(bytes: &[u8]) -> [u8; 16] {
    // The lengths that occur, each a move of its own rather than a call.
    if let Ok(all) = <[u8; 16]>::try_from(bytes) {
        return all;
    }
    let mut data = [0; 16];
    if let Ok(word) = <[u8; 4]>::try_from(bytes) {
        data[..4].copy_from_slice(&word);
    } else {
        data[..bytes.len()].copy_from_slice(bytes);
    }
    data
}

impl Cta {
    /// Offset in shared memory of an access that lies inside it.
    pub(super) fn shared_offset(&self, address: u64, bytes: usize) -> Outcome<usize> {
        let offset = address.checked_sub(u64::from(SHARED_BASE)).map(|offset| offset as usize);
        match offset.filter(|offset| offset.saturating_add(bytes) <= self.shared.data.len()) {
            Some(offset) => Ok(offset),
            None => {
                let message = format!(
                    "{bytes} bytes at shared address {address:#x} are not inside the {} bytes from {SHARED_BASE:#x}",
                    self.shared.data.len()
                );
                Err(Fault::new(Rule::OutOfBounds, message))
            }
        }
    }

    pub(super) fn check_shared(
        &mut self,
        context: &Context<'_>,
        (offset, bytes): (usize, usize),
        access: Access,
        view: &View,
        equal: bool,
    ) -> Outcome<()> {
        if !context.options.checks.races {
            return Ok(());
        }
        self.shared
            .shadow
            .access((offset, bytes), access, view, equal, context.clusters)
            .map_err(|other| race(&format!("{bytes} bytes of shared memory at offset {offset}"), &access, other, view))
    }

    pub(super) fn read_shared(
        &mut self,
        context: &mut Context<'_>,
        address: u64,
        bytes: usize,
        access: Access,
        view: &View,
    ) -> Outcome<[u8; 16]> {
        if self.other_rank(address).is_some() {
            return self.on(context, address, |cta, context, at| cta.read_shared(context, at, bytes, access, view));
        }
        let offset = self.shared_offset(address & OFFSET, bytes)?;
        if let Some(at) = first_unwritten(&self.shared.written[offset..offset + bytes])
            && self.refuse_mbarrier(address & OFFSET, bytes).map(|()| context.options.checks.uninitialised)?
        {
            let message = format!("byte {} of shared memory was never written", offset + at);
            return Err(Fault::new(Rule::Uninitialised, message));
        }
        self.check_shared(context, (offset, bytes), access, view, false)?;
        Ok(padded(&self.shared.data[offset..offset + bytes]))
    }

    pub(super) fn write_shared(
        &mut self,
        context: &mut Context<'_>,
        address: u64,
        data: &[u8],
        access: Access,
        view: &View,
    ) -> Outcome<()> {
        if self.other_rank(address).is_some() {
            return self.on(context, address, |cta, context, at| cta.write_shared(context, at, data, access, view));
        }
        let address = address & OFFSET;
        let offset = self.shared_offset(address, data.len())?;
        self.refuse_mbarrier(address, data.len())?;
        let range = offset..offset + data.len();
        let equal = lands_equal(&self.shared.data[range.clone()], &self.shared.written[range.clone()], data, access);
        self.check_shared(context, (offset, data.len()), access, view, equal)?;
        if access.kind & ATOMIC == 0 && flagged(&self.shared.written[range.clone()]) {
            context.end_flags((self.serial, address), data.len(), false);
        }
        let Shared { data: bytes, written, .. } = &mut self.shared;
        put(&mut bytes[range.clone()], &mut written[range], data, access.kind);
        Ok(())
    }

    /// The bytes of one lane's local memory. It comes into being where it is touched.
    pub(super) fn local(
        &mut self,
        context: &Context<'_>,
        warp: usize,
        lane: u32,
        address: u64,
        bytes: usize,
    ) -> Outcome<&mut [u8]> {
        let size = context.kernel.local_bytes();
        let offset = address.checked_sub(u64::from(LOCAL_BASE)).map(|offset| offset as usize);
        let Some(offset) = offset.filter(|offset| offset.saturating_add(bytes) <= size) else {
            let message = format!("{bytes} bytes at local address {address:#x} are not inside the thread's {size}");
            return Err(Fault::new(Rule::OutOfBounds, message));
        };
        let local = &mut self.warps[warp].local[lane as usize];
        if local.len() < offset + bytes {
            local.resize(offset + bytes, 0);
        }
        Ok(&mut local[offset..offset + bytes])
    }

    pub(super) fn cache(
        &mut self,
        context: &mut Context<'_>,
        warp: usize,
        (pc, mask): (u32, u32),
        op: Cache,
    ) -> Outcome<()> {
        let (Cache::Priority { addr } | Cache::Discard { addr }) = op else { return Ok(()) };
        let addresses = self.warps[warp].addresses(context, self, addr);
        let access = self.warps[warp].views.access(self.serial, pc, WRITE);
        let discards = matches!(op, Cache::Discard { .. });
        for lane in lanes_of(mask) {
            let view = self.warps[warp].views.view(lane);
            let line = addresses[lane as usize];
            cache_line(context, line, discards.then_some((access.of_lane(lane), &view)))
                .map_err(|fault| fault.lane(lane))?;
        }
        Ok(())
    }

    pub(super) fn load(
        &mut self,
        context: &mut Context<'_>,
        warp: usize,
        (pc, mask): (u32, u32),
        (space, ty, to): (Space, Ty, u8),
        (d, address): (&[Dst], Address),
        sem: Semantics,
    ) -> Outcome<()> {
        let each = ty.bits() as usize / 8;
        let bytes = each * d.len();
        let addresses = self.warps[warp].addresses(context, self, address);
        let at = addresses[mask.trailing_zeros() as usize & 31];
        if space == Space::Param && addresses.iter().all(|other| *other == at) {
            aligned(at, bytes, 0)?;
            let data = read_param(context, at, bytes)?;
            context.counters.param_loaded += u64::from(mask.count_ones()) * bytes as u64;
            for (i, d) in d.iter().enumerate() {
                let value = element(&data[i * each..(i + 1) * each], ty, to);
                self.warps[warp].put(*d, mask, &[value; 32]);
            }
            return Ok(());
        }
        context.count_access(pc, space, (&addresses, mask), bytes);
        let weak = sem.order == Order::Weak;
        let access = self.warps[warp].views.access(self.serial, pc, if weak { 0 } else { strong(sem.scope) });
        for lane in lanes_of(mask) {
            let (space, at) = self.resolve(space, addresses[lane as usize]).map_err(|fault| fault.lane(lane))?;
            aligned(at, bytes, lane)?;
            // Strong accesses of vectors are one for each element (PTX ISA, "Vector Data-types").
            let parts = if weak { 1 } else { d.len() };
            let mut data = [0; 16];
            for part in 0..parts {
                let bytes = bytes / parts;
                let at = at + (part * bytes) as u64;
                let found = self.load_lane(context, (warp, lane), (space, at, bytes), access)?;
                data[part * bytes..(part + 1) * bytes].copy_from_slice(&found[..bytes]);
                if !weak {
                    self.acquire(
                        context,
                        (warp, lane),
                        Word { space, address: at, bytes },
                        access.of_lane(lane),
                        (sem, true),
                    );
                }
            }
            for (i, d) in d.iter().enumerate() {
                if let Some(d) = d {
                    let value = element(&data[i * each..(i + 1) * each], ty, to);
                    self.warps[warp].registers[*d as usize][lane as usize] = value;
                }
            }
        }
        Ok(())
    }

    #[inline]
    fn load_lane(
        &mut self,
        context: &mut Context<'_>,
        (warp, lane): (usize, u32),
        (space, at, bytes): (Space, u64, usize),
        access: Access,
    ) -> Outcome<[u8; 16]> {
        let view = self.warps[warp].views.view(lane);
        let access = access.of_lane(lane);
        match space {
            Space::Shared => {
                context.counters.shared_loaded += bytes as u64;
                self.read_shared(context, at, bytes, access, &view)
            }
            Space::Param => {
                context.counters.param_loaded += bytes as u64;
                read_param(context, at, bytes)
            }
            Space::Local => {
                context.counters.local_loaded += bytes as u64;
                self.local(context, warp, lane, at, bytes).map(|found| padded(found))
            }
            Space::Global | Space::Generic | Space::SharedCluster | Space::Const => {
                context.counters.global_loaded += bytes as u64;
                context.read_global(at, bytes, access, &view)
            }
        }
        .map_err(|fault| fault.lane(lane))
    }

    pub(super) fn store(
        &mut self,
        context: &mut Context<'_>,
        warp: usize,
        (pc, mask): (u32, u32),
        (space, ty): (Space, Ty),
        (a, address): (&[Src], Address),
        sem: Semantics,
    ) -> Outcome<()> {
        let addresses = self.warps[warp].addresses(context, self, address);
        let each = ty.bits() as usize / 8;
        let bytes = each * a.len();
        // What each lane stores, first element lowest.
        let mut values = [0u128; 32];
        let keep = u64::MAX >> (64 - ty.bits());
        for (i, a) in a.iter().enumerate() {
            let element = self.warps[warp].operand(context, self, *a);
            let shift = i as u32 * ty.bits();
            values.iter_mut().zip(element.iter()).for_each(|(value, x)| *value |= u128::from(x & keep) << shift);
        }
        context.count_access(pc, space, (&addresses, mask), bytes);
        let weak = sem.order == Order::Weak;
        let access = self.warps[warp].views.access(self.serial, pc, WRITE | if weak { 0 } else { strong(sem.scope) });
        for lane in lanes_of(mask) {
            let (space, at) = self.resolve(space, addresses[lane as usize]).map_err(|fault| fault.lane(lane))?;
            aligned(at, bytes, lane)?;
            let data = values[lane as usize].to_le_bytes();
            let parts = if weak { 1 } else { a.len() };
            for part in 0..parts {
                let bytes = bytes / parts;
                let at = at + (part * bytes) as u64;
                let data = &data[part * bytes..(part + 1) * bytes];
                self.store_lane(context, (warp, lane), (space, at, data), access)?;
                if !weak {
                    let write = access.of_lane(lane);
                    self.release(context, (warp, lane), Word { space, address: at, bytes }, write, sem);
                }
            }
        }
        if !weak {
            self.warps[warp].views.next_epoch();
        }
        context.idle = 0;
        Ok(())
    }

    #[inline]
    fn store_lane(
        &mut self,
        context: &mut Context<'_>,
        (warp, lane): (usize, u32),
        (space, at, data): (Space, u64, &[u8]),
        access: Access,
    ) -> Outcome<()> {
        let view = self.warps[warp].views.view(lane);
        let access = access.of_lane(lane);
        match space {
            Space::Shared => {
                context.counters.shared_stored += data.len() as u64;
                self.write_shared(context, at, data, access, &view)
            }
            Space::Local => {
                context.counters.local_stored += data.len() as u64;
                self.local(context, warp, lane, at, data.len()).map(|place| place.copy_from_slice(data))
            }
            _ => {
                context.counters.global_stored += data.len() as u64;
                context.write_global(at, data, access, &view)
            }
        }
        .map_err(|fault| fault.lane(lane))
    }

    /// `atom` and `red`, lane by lane.
    pub(super) fn atomic(
        &mut self,
        context: &mut Context<'_>,
        warp: usize,
        (pc, mask): (u32, u32),
        (space, op, ty): (Space, Atomic, Ty),
        (d, address, b, c): (Dst, Address, Src, Src),
        (sem, reduces): (Semantics, bool),
    ) -> Outcome<()> {
        let addresses = self.warps[warp].addresses(context, self, address);
        let (b, c) = (self.warps[warp].read(context, self, b), self.warps[warp].read(context, self, c));
        let bytes = ty.bits() as usize / 8;
        context.count_access(pc, space, (&addresses, mask), bytes);
        let access = self.warps[warp].views.access(self.serial, pc, UPDATE | strong(sem.scope));
        for lane in lanes_of(mask) {
            let (space, at) = self.resolve(space, addresses[lane as usize]).map_err(|fault| fault.lane(lane))?;
            aligned(at, bytes, lane)?;
            let view = self.warps[warp].views.view(lane);
            let read = access.of_lane(lane);
            let data = match space {
                Space::Shared => self.read_shared(context, at, bytes, read, &view),
                Space::Global => context.read_global(at, bytes, read, &view),
                _ => Err(Fault::new(Rule::Trap, format!("an atomic on {space:?} memory"))),
            }
            .map_err(|fault| fault.lane(lane))?;
            let old = element(&data[..bytes], ty, ty.bits() as u8);
            let word = Word { space, address: at, bytes };
            let write = Access { kind: read.kind | WRITE, ..read };
            self.acquire(context, (warp, lane), word, write, (sem, !reduces));
            let new = alu::atomic(op, ty, old, b[lane as usize], c[lane as usize]);
            self.store_lane(context, (warp, lane), (space, at, &new.to_le_bytes()[..bytes]), write)?;
            self.release(context, (warp, lane), word, write, sem);
            if new != old {
                context.idle = 0;
            }
            if let Some(d) = d {
                self.warps[warp].registers[d as usize][lane as usize] = old;
            }
        }
        context.counters.atomics += u64::from(mask.count_ones());
        self.warps[warp].views.next_epoch();
        Ok(())
    }
}

/// `discard`: the line is as if nothing had written it; `applypriority`: nothing changes.
fn cache_line(context: &mut Context<'_>, address: u64, discard: Option<(Access, &View)>) -> Outcome<()> {
    const LINE: usize = 128;
    if !address.is_multiple_of(LINE as u64) {
        return Err(Fault::new(Rule::Misaligned, format!("{LINE} bytes at {address:#x}")));
    }
    let (index, offset) = context.memory.find(address, LINE).map_err(memory_fault)?;
    if let Some((access, view)) = discard {
        context.write_global(address, &[0; LINE], access, view)?;
        context.memory.allocations[index].written[offset..offset + LINE].fill(0);
    }
    Ok(())
}

fn aligned(address: u64, bytes: usize, lane: u32) -> Outcome<()> {
    if address.is_multiple_of(bytes as u64) {
        return Ok(());
    }
    Err(Fault::new(Rule::Misaligned, format!("{bytes} bytes at {address:#x}")).lane(lane))
}

fn read_param(context: &Context<'_>, at: u64, bytes: usize) -> Outcome<[u8; 16]> {
    let params = context.launch.params;
    let found = usize::try_from(at).ok().and_then(|at| params.get(at..at.checked_add(bytes)?));
    let Some(found) = found else {
        let message = format!("{bytes} bytes at offset {at} of {} bytes of parameters", params.len());
        return Err(Fault::new(Rule::OutOfBounds, message));
    };
    Ok(padded(found))
}

/// A loaded element, extended to a register of `to` bits by its sign when its type has one.
fn element(data: &[u8], ty: Ty, to: u8) -> u64 {
    let mut bytes = [0; 8];
    bytes[..data.len()].copy_from_slice(data);
    let value = u64::from_le_bytes(bytes);
    match ty {
        Ty::S(bits) if bits < to => {
            let shift = 64 - u32::from(bits);
            ((value << shift) as i64 >> shift) as u64 & (u64::MAX >> (64 - u32::from(to)))
        }
        _ => value,
    }
}
