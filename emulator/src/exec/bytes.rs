//! Bytes of state spaces: bounds, what was never written, races.

use super::cluster::OFFSET;
use super::flags::flagged;
use super::{Context, Cta, Fault, Outcome, Shared};
use crate::clock::View;
use crate::decode::{LOCAL_BASE, SHARED_BASE};
use crate::memory::{Allocation, MemoryError};
use crate::report::Rule;
use crate::shadow::{ASYNC, ATOMIC, Access, UPDATE, WGMMA, WRITE};

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
pub(super) fn padded(bytes: &[u8]) -> [u8; 16] {
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
}
