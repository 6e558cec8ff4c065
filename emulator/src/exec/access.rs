//! Loads, stores and atomics: state spaces, bounds, alignment, what was never written, races.

use std::rc::Rc;

use super::{Clock, Context, Cta, Fault, Outcome};
use crate::alu::{self, Lanes};
use crate::decode::{LOCAL_BASE, SHARED_BASE};
use crate::isa::{Address, Atomic, Cache, Dst, Order, Semantics, Space, Src, Ty};
use crate::memory::MemoryError;
use crate::report::Rule;
use crate::shadow::{ATOMIC, Access, WGMMA, WRITE};

/// Generic addresses of shared and local memory: far below every global allocation.
const SHARED_WINDOW: u64 = 0x7000_0000_0000;
const LOCAL_WINDOW: u64 = 0x6000_0000_0000;
const WINDOW: u64 = 1 << 32;

/// The state space and the address in it that a generic address stands for.
pub(super) fn resolve(space: Space, address: u64) -> (Space, u64) {
    let within = |window: u64| address.checked_sub(window).filter(|offset| *offset < WINDOW);
    match space {
        Space::Generic => match (within(SHARED_WINDOW), within(LOCAL_WINDOW)) {
            (Some(offset), _) => (Space::Shared, offset),
            (_, Some(offset)) => (Space::Local, offset),
            _ => (Space::Global, address),
        },
        // Addresses of these windows are 32 bits wide.
        Space::Shared | Space::Local => (space, address & (WINDOW - 1)),
        Space::Global | Space::Param => (space, address),
    }
}

/// `cvta` in either direction.
pub(super) fn convert_address(space: Space, to_space: bool, address: u64) -> u64 {
    let window = match space {
        Space::Shared => SHARED_WINDOW,
        Space::Local => LOCAL_WINDOW,
        _ => 0,
    };
    if to_space { address.wrapping_sub(window) } else { address.wrapping_add(window) }
}

fn lanes_of(mask: u32) -> impl Iterator<Item = u32> {
    (0..32).filter(move |lane| mask >> lane & 1 != 0)
}

fn memory_fault(error: MemoryError) -> Fault {
    let rule = match error {
        MemoryError::OutOfBounds { .. } => Rule::OutOfBounds,
        MemoryError::Uninitialised { .. } => Rule::Uninitialised,
    };
    Fault::new(rule, error.to_string())
}

fn race(what: &str, access: &Access, other: Access) -> Fault {
    let verb = |access: &Access| match (access.kind & ATOMIC != 0, access.kind & WRITE != 0) {
        (true, _) => "atomic",
        (_, true) => "write",
        _ => "read",
    };
    let by = |access: &Access| match (access.kind & WGMMA != 0, access.agent & 1) {
        (true, _) => " by wgmma",
        (_, 1) => " of an asynchronous copy",
        _ => "",
    };
    let message =
        format!("{}{} of {what} is not ordered after {}{}", verb(access), by(access), verb(&other), by(&other));
    Fault { other: Some(other), ..Fault::new(Rule::Race, message) }
}

fn first_unwritten(written: &[u8]) -> Option<usize> {
    // Whole words first: this runs for every byte that is read.
    if let Ok(word) = <[u8; 16]>::try_from(written)
        && u128::from_le_bytes(word) == u128::from_le_bytes([1; 16])
    {
        return None;
    }
    written.iter().position(|&written| written == 0)
}

impl Context<'_> {
    /// Reads up to 16 bytes of global memory.
    pub(super) fn read_global(
        &mut self,
        address: u64,
        bytes: usize,
        access: Access,
        clock: &Clock,
    ) -> Outcome<[u8; 16]> {
        let (index, offset) = self.memory.find(address, bytes).map_err(memory_fault)?;
        let allocation = &mut self.memory.allocations[index];
        if let Some(at) = first_unwritten(&allocation.written[offset..offset + bytes]) {
            let (name, address) = (allocation.name.clone(), address + at as u64);
            return Err(memory_fault(MemoryError::Uninitialised { name, offset: offset + at, address }));
        }
        if self.options.races {
            let size = allocation.data.len();
            allocation
                .shadow
                .access((offset, bytes, size), access, clock, &mut self.random)
                .map_err(|other| race(&format!("`{}` at offset {offset}", allocation.name), &access, other))?;
        }
        let mut data = [0; 16];
        data[..bytes].copy_from_slice(&allocation.data[offset..offset + bytes]);
        Ok(data)
    }

    /// `discard`: the line is as if nothing had written it; `applypriority`: nothing changes.
    pub(super) fn cache_line(&mut self, address: u64, discard: Option<(Access, &Clock)>) -> Outcome<()> {
        const LINE: usize = 128;
        if !address.is_multiple_of(LINE as u64) {
            return Err(Fault::new(Rule::Misaligned, format!("{LINE} bytes at {address:#x}")));
        }
        let (index, offset) = self.memory.find(address, LINE).map_err(memory_fault)?;
        if let Some((access, clock)) = discard {
            self.write_global(address, &[0; LINE], access, clock)?;
            self.memory.allocations[index].written[offset..offset + LINE].fill(0);
        }
        Ok(())
    }

    fn write_global(&mut self, address: u64, data: &[u8], access: Access, clock: &Clock) -> Outcome<()> {
        let (index, offset) = self.memory.find(address, data.len()).map_err(memory_fault)?;
        let allocation = &mut self.memory.allocations[index];
        if self.options.races {
            let size = allocation.data.len();
            allocation
                .shadow
                .access((offset, data.len(), size), access, clock, &mut self.random)
                .map_err(|other| race(&format!("`{}` at offset {offset}", allocation.name), &access, other))?;
        }
        allocation.data[offset..offset + data.len()].copy_from_slice(data);
        allocation.written[offset..offset + data.len()].fill(1);
        Ok(())
    }
}

impl Cta {
    pub(super) fn access_of(&self, agent: u16, clock: u32, pc: u32, kind: u8) -> Access {
        Access { cta: self.serial, agent, kind, clock, pc }
    }

    /// An access of a warp itself, with the clock to hold it against.
    pub(super) fn warp_access(&self, warp: usize, pc: u32, kind: u8) -> (Access, Rc<Clock>) {
        let clock = Rc::clone(&self.warps[warp].clock);
        let agent = 2 * warp as u16;
        (self.access_of(agent, clock.epoch(agent), pc, kind), clock)
    }

    /// Offset in shared memory of an access that lies inside it.
    fn shared_offset(&self, address: u64, bytes: usize) -> Outcome<usize> {
        let offset = address.checked_sub(u64::from(SHARED_BASE)).map(|offset| offset as usize);
        match offset.filter(|offset| offset + bytes <= self.shared.data.len()) {
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

    fn check_shared(
        &mut self,
        context: &mut Context<'_>,
        at: (usize, usize),
        access: Access,
        clock: &Clock,
    ) -> Outcome<()> {
        if !context.options.races {
            return Ok(());
        }
        let (offset, bytes) = at;
        let size = self.shared.data.len();
        self.shared
            .shadow
            .access((offset, bytes, size), access, clock, &mut context.random)
            .map_err(|other| race(&format!("shared memory at offset {offset}"), &access, other))
    }

    pub(super) fn read_shared(
        &mut self,
        context: &mut Context<'_>,
        address: u64,
        bytes: usize,
        access: Access,
        clock: &Clock,
    ) -> Outcome<[u8; 16]> {
        let offset = self.shared_offset(address, bytes)?;
        if let Some(at) = first_unwritten(&self.shared.written[offset..offset + bytes]) {
            let message = format!("byte {} of shared memory was never written", offset + at);
            return Err(Fault::new(Rule::Uninitialised, message));
        }
        self.check_shared(context, (offset, bytes), access, clock)?;
        let mut data = [0; 16];
        data[..bytes].copy_from_slice(&self.shared.data[offset..offset + bytes]);
        Ok(data)
    }

    pub(super) fn write_shared(
        &mut self,
        context: &mut Context<'_>,
        address: u64,
        data: &[u8],
        access: Access,
        clock: &Clock,
    ) -> Outcome<()> {
        let offset = self.shared_offset(address, data.len())?;
        self.check_shared(context, (offset, data.len()), access, clock)?;
        self.shared.data[offset..offset + data.len()].copy_from_slice(data);
        self.shared.written[offset..offset + data.len()].fill(1);
        Ok(())
    }

    /// The bytes of one lane's local memory.
    fn local(
        &mut self,
        context: &Context<'_>,
        warp: usize,
        lane: u32,
        address: u64,
        bytes: usize,
    ) -> Outcome<&mut [u8]> {
        let size = (context.kernel.local_end - LOCAL_BASE) as usize;
        let offset = address.checked_sub(u64::from(LOCAL_BASE)).map(|offset| offset as usize);
        let Some(offset) = offset.filter(|offset| offset + bytes <= size) else {
            let message = format!("{bytes} bytes at local address {address:#x} are not inside the thread's {size}");
            return Err(Fault::new(Rule::OutOfBounds, message));
        };
        let start = lane as usize * size + offset;
        Ok(&mut self.warps[warp].local[start..start + bytes])
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
        let (access, clock) = self.warp_access(warp, pc, WRITE);
        for lane in lanes_of(mask) {
            let discard = matches!(op, Cache::Discard { .. }).then_some((access, &*clock));
            context.cache_line(addresses[lane as usize], discard).map_err(|fault| fault.lane(lane))?;
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
        let addresses = self.warps[warp].addresses(context, self, address);
        let each = ty.bits() as usize / 8;
        let bytes = each * d.len();
        let kind = if sem.order == Order::Weak { 0 } else { ATOMIC };
        let (access, clock) = self.warp_access(warp, pc, kind);
        for lane in lanes_of(mask) {
            let (space, at) = resolve(space, addresses[lane as usize]);
            aligned(at, bytes, lane)?;
            let data = match space {
                Space::Shared => {
                    context.counters.shared_loaded += bytes as u64;
                    self.read_shared(context, at, bytes, access, &clock)
                }
                Space::Param => read_param(context, at, bytes),
                Space::Local => self.local(context, warp, lane, at, bytes).map(|found| {
                    let mut data = [0; 16];
                    data[..bytes].copy_from_slice(found);
                    data
                }),
                Space::Global | Space::Generic => {
                    context.counters.global_loaded += bytes as u64;
                    context.read_global(at, bytes, access, &clock)
                }
            }
            .map_err(|fault| fault.lane(lane))?;
            for (i, d) in d.iter().enumerate() {
                if let Some(d) = d {
                    let value = element(&data[i * each..(i + 1) * each], ty, to);
                    self.warps[warp].registers[*d as usize][lane as usize] = value;
                }
            }
            if sem.order != Order::Weak {
                self.acquire(context, warp, at, sem);
            }
        }
        Ok(())
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
        let values: Vec<Lanes> = a.iter().map(|a| self.warps[warp].read(context, self, *a)).collect();
        let each = ty.bits() as usize / 8;
        let bytes = each * a.len();
        let kind = WRITE | if sem.order == Order::Weak { 0 } else { ATOMIC };
        let (access, clock) = self.warp_access(warp, pc, kind);
        for lane in lanes_of(mask) {
            let (space, at) = resolve(space, addresses[lane as usize]);
            aligned(at, bytes, lane)?;
            let mut data = [0u8; 16];
            for (i, value) in values.iter().enumerate() {
                data[i * each..(i + 1) * each].copy_from_slice(&value[lane as usize].to_le_bytes()[..each]);
            }
            match space {
                Space::Shared => {
                    context.counters.shared_stored += bytes as u64;
                    self.write_shared(context, at, &data[..bytes], access, &clock)
                }
                Space::Local => {
                    self.local(context, warp, lane, at, bytes).map(|place| place.copy_from_slice(&data[..bytes]))
                }
                _ => {
                    context.counters.global_stored += bytes as u64;
                    context.write_global(at, &data[..bytes], access, &clock)
                }
            }
            .map_err(|fault| fault.lane(lane))?;
            if sem.order != Order::Weak {
                self.release(context, warp, at, sem, false);
            }
        }
        if sem.order != Order::Weak {
            self.warps[warp].next_epoch();
        }
        context.idle = 0;
        Ok(())
    }

    /// `atom` and `red`, lane by lane.
    pub(super) fn atomic(
        &mut self,
        context: &mut Context<'_>,
        warp: usize,
        (pc, mask): (u32, u32),
        (space, op, ty): (Space, Atomic, Ty),
        (d, address, b, c): (Dst, Address, Src, Src),
        sem: Semantics,
    ) -> Outcome<()> {
        let addresses = self.warps[warp].addresses(context, self, address);
        let (b, c) = (self.warps[warp].read(context, self, b), self.warps[warp].read(context, self, c));
        let bytes = ty.bits() as usize / 8;
        for lane in lanes_of(mask) {
            let (space, at) = resolve(space, addresses[lane as usize]);
            aligned(at, bytes, lane)?;
            let (read, clock) = self.warp_access(warp, pc, ATOMIC);
            let data = match space {
                Space::Shared => self.read_shared(context, at, bytes, read, &clock),
                Space::Global => context.read_global(at, bytes, read, &clock),
                _ => Err(Fault::new(Rule::Trap, format!("an atomic on {space:?} memory"))),
            }
            .map_err(|fault| fault.lane(lane))?;
            let old = element(&data[..bytes], ty, ty.bits() as u8);
            self.acquire(context, warp, at, sem);
            let new = alu::atomic(op, ty, old, b[lane as usize], c[lane as usize]);
            let (write, clock) = self.warp_access(warp, pc, ATOMIC | WRITE);
            let data = &new.to_le_bytes()[..bytes];
            if space == Space::Shared {
                context.counters.shared_stored += bytes as u64;
                self.write_shared(context, at, data, write, &clock)
            } else {
                context.counters.global_stored += bytes as u64;
                context.write_global(at, data, write, &clock)
            }
            .map_err(|fault| fault.lane(lane))?;
            self.release(context, warp, at, sem, true);
            if new != old {
                context.idle = 0;
            }
            if let Some(d) = d {
                self.warps[warp].registers[d as usize][lane as usize] = old;
            }
        }
        self.warps[warp].next_epoch();
        Ok(())
    }
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
    let mut data = [0; 16];
    data[..bytes].copy_from_slice(found);
    Ok(data)
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
