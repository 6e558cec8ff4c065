//! What a `wgmma` reads of its operands in shared memory, and the rules that hold for it.

use super::bytes::race;
use super::warpgroup::Issued;
use super::{Context, Cta, Fault, Outcome, Shared};
use crate::alu;
use crate::clock::View;
use crate::decode::SHARED_BASE;
use crate::layout::{Descriptor, Major};
use crate::shadow::{ASYNC, Access, WGMMA};

impl Cta {
    /// Sixteen bytes of an operand, when no rule forbids it. The error is what they race with, or nothing where there is
    /// more to look at.
    fn try_unit(
        &mut self,
        context: &mut Context<'_>,
        address: u32,
        access: Access,
        known: &View,
    ) -> Result<[u8; 16], Option<Access>> {
        let at = address.checked_sub(SHARED_BASE).ok_or(None)? as usize;
        let Shared { data, written, shadow } = &mut self.shared;
        if written.get(at..at + 16).is_none_or(|written| written != [1; 16]) {
            return Err(None);
        }
        if context.options.checks.races {
            shadow.access((at, 16), access, known, false, context.clusters).map_err(Some)?;
        }
        data[at..at + 16].try_into().map_err(|_| None)
    }

    /// Sixteen bytes that cannot be read just so. What a warp reads for itself is held against what this warp knows.
    #[cold]
    fn unit(
        &mut self,
        context: &mut Context<'_>,
        issued: &Issued,
        (what, warp): (&str, Option<usize>),
        (address, access): (u32, Access),
        other: Option<Access>,
    ) -> Outcome<[u8; 16]> {
        let own = warp.and_then(|warp| issued.known_by(warp));
        let known = own.as_ref().unwrap_or(&issued.known);
        let unit = match other {
            Some(other) if own.is_none() => {
                let offset = address - SHARED_BASE;
                Err(race(&format!("16 bytes of shared memory at offset {offset}"), &access, other, known))
            }
            _ => self.read_shared(context, u64::from(address), 16, access, known),
        };
        unit.map_err(|fault| {
            let only_generic = fault.other.as_ref().is_some_and(|other| known.covers_generically(other));
            let hint = if only_generic { ": fence.proxy.async is missing" } else { "" };
            Fault { message: format!("operand {what} of wgmma: {}{hint}", fault.message), ..fault }
        })
    }

    /// Rows `8 part..8 part + 8` of an operand, in the order of memory: for K-major ones two units of each row, for MN-major
    /// ones a unit for each k.
    fn read_part(
        &mut self,
        context: &mut Context<'_>,
        issued: &Issued,
        (what, descriptor, trans): (&str, &Descriptor, bool),
        part: u32,
    ) -> Outcome<[[u8; 16]; 16]> {
        // A warp holds the sums of sixteen rows of A.
        let warp = (what == "A").then_some(part as usize / 2);
        let access = Access {
            cta: self.serial,
            agent: issued.known.agent,
            kind: ASYNC | WGMMA,
            clock: issued.serial,
            pc: issued.pc,
            // Where both operands are one, that the one was checked must not speak for the other.
            lanes: if warp.is_some() { 2 } else { 1 },
            ..Access::default()
        };
        let mut units = [[0; 16]; 16];
        for (i, unit) in units.iter_mut().enumerate() {
            let i = i as u32;
            let address = match major(trans) {
                Major::K => descriptor.unit(Major::K, 8 * part + i / 2, i % 2),
                Major::Mn => descriptor.unit(Major::Mn, part, i),
            };
            *unit = match self.try_unit(context, address, access, &issued.known) {
                Ok(unit) => unit,
                Err(other) => self.unit(context, issued, (what, warp), (address, access), other)?,
            };
        }
        Ok(units)
    }

    pub(super) fn read_a(
        &mut self,
        context: &mut Context<'_>,
        issued: &Issued,
        descriptor: &Descriptor,
    ) -> Outcome<alu::Rows> {
        let op = &issued.op;
        let mut rows = [[0.0; 16]; 64];
        for (part, rows) in rows.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let units = self.read_part(context, issued, ("A", descriptor, op.trans_a), part as u32)?;
            for (i, unit) in units.into_iter().enumerate() {
                let values = alu::widen8(op.ab, unit, op.negate_a);
                if op.trans_a {
                    rows.iter_mut().zip(values).for_each(|(row, value)| row[i] = value);
                } else {
                    rows[i / 2][i % 2 * 8..][..8].copy_from_slice(&values);
                }
            }
        }
        Ok(rows)
    }

    /// Eight columns of B.
    pub(super) fn read_b(&mut self, context: &mut Context<'_>, issued: &Issued, panel: u32) -> Outcome<alu::Panel> {
        let op = &issued.op;
        let units = self.read_part(context, issued, ("B", &issued.b, op.trans_b), panel)?;
        let mut rows = [[0.0; 8]; 16];
        for (i, unit) in units.into_iter().enumerate() {
            let values = alu::widen8(op.ab, unit, op.negate_b);
            if op.trans_b {
                rows[i] = values;
            } else {
                rows[i % 2 * 8..].iter_mut().zip(values).for_each(|(row, value)| row[i / 2] = value);
            }
        }
        Ok(rows)
    }
}

pub(super) fn major(trans: bool) -> Major {
    if trans { Major::Mn } else { Major::K }
}
