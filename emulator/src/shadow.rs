//! Data races by happens-before.
//!
//! Each four bytes of memory remember up to three accesses: an access races with a remembered one of another agent that it
//! overlaps, that is not ordered before it (see `clock`), when one of the two writes.

use crate::clock::Clock;

/// An access as memory remembers it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Access {
    pub cta: u32,
    /// Agent within the CTA.
    pub agent: u16,
    /// Bits 0-3: bytes of the cell; `WRITE`; `ATOMIC`; 0 in an empty slot.
    pub kind: u8,
    pub clock: u32,
    /// Index of the instruction.
    pub pc: u32,
}

pub(crate) const WRITE: u8 = 16;
pub(crate) const ATOMIC: u8 = 32;
/// By a warpgroup's `wgmma`.
pub(crate) const WGMMA: u8 = 64;
const BYTES: u8 = 15;
const SLOTS: usize = 3;

/// The memory of one allocation (or of the shared memory of one CTA), grown when first touched.
#[derive(Debug, Default)]
pub(crate) struct Shadow {
    cells: Vec<[Access; SLOTS]>,
}

impl Shadow {
    pub fn clear(&mut self) {
        self.cells.clear();
    }

    /// Checks and records an access to `[offset, offset + bytes)` of memory that is `size` bytes long.
    /// `before` is the accessor's clock. The error is the access that this one races with.
    pub fn access(
        &mut self,
        (offset, bytes, size): (usize, usize, usize),
        access: Access,
        before: &Clock,
        random: &mut u64,
    ) -> Result<(), Access> {
        if self.cells.is_empty() {
            self.cells.resize(size.div_ceil(4), [Access::default(); SLOTS]);
        }
        let (mut at, end) = (offset, offset + bytes);
        while at < end {
            let cell_end = (at / 4 + 1) * 4;
            let upto = end.min(cell_end);
            let mask = (BYTES >> (4 - (upto - at))) << (at % 4);
            touch(&mut self.cells[at / 4], Access { kind: access.kind | mask, ..access }, before, random)?;
            at = upto;
        }
        Ok(())
    }
}

fn touch(slots: &mut [Access; SLOTS], access: Access, before: &Clock, random: &mut u64) -> Result<(), Access> {
    let mut place = None;
    for (index, slot) in slots.iter().enumerate() {
        if slot.kind == 0 {
            place.get_or_insert(index);
            continue;
        }
        let same_agent = slot.agent == access.agent && slot.cta == access.cta;
        if same_agent && slot.kind == access.kind {
            place = Some(index);
            if slot.clock == access.clock {
                // Remembered already; what else is remembered was checked then.
                return Ok(());
            }
            continue;
        }
        if slot.kind & access.kind & BYTES == 0 {
            continue;
        }
        let ordered = same_agent || before.covers(slot);
        let harmless = (slot.kind | access.kind) & WRITE == 0 || slot.kind & access.kind & ATOMIC != 0;
        if !ordered && !harmless {
            return Err(*slot);
        }
        // What happens before a write that covers it need not be remembered.
        let covered = slot.kind & BYTES & !access.kind == 0;
        if ordered && covered && (access.kind & WRITE != 0 || slot.kind & WRITE == 0) {
            place.get_or_insert(index);
        }
    }
    let index = place.unwrap_or_else(|| {
        *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*random >> 33) as usize % SLOTS
    });
    slots[index] = access;
    Ok(())
}
