//! Instructions that access memory: loads, stores, atomics, hints to caches.

use super::bytes::{memory_fault, padded};
use super::flags::Word;
use super::{Context, Cta, Fault, Outcome};
use crate::alu;
use crate::clock::View;
use crate::isa::{Address, Atomic, Cache, Dst, Order, Semantics, Space, Src, Ty};
use crate::report::Rule;
use crate::shadow::{Access, UPDATE, WRITE, strong};

pub(super) fn lanes_of(mask: u32) -> impl Iterator<Item = u32> {
    (0..32).filter(move |lane| mask >> lane & 1 != 0)
}

impl Cta {
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
                        (sem, true, false),
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
            self.acquire(context, (warp, lane), word, write, (sem, !reduces, d.is_none()));
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
