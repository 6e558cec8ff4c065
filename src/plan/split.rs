//! f32 factors over a 16-bit layer: what a launch splits, where the halves lie, and how many columns they make.

use super::operands::{Wanted, matrix, optional};
use super::{Part, Scratch, blocks, check_units};
use crate::error::Result;
use crate::params::*;
use crate::split::{split_columns, split_ranks};
use crate::{LoraShape, raw};

/// The ranks that the products of a call go through: those of its factors, or their halves.
#[derive(Clone, Copy)]
pub(super) struct Ranks {
    is_split: bool,
}

impl Ranks {
    pub(super) fn of(is_split: bool) -> Ranks {
        Ranks { is_split }
    }

    /// Columns of h and dh where they are computed, and where they are multiplied over tokens.
    pub(super) fn pairs(self, r: usize) -> usize {
        if self.is_split { split_columns(r) } else { r }
    }

    /// Terms of h Bᵀ and dh A.
    pub(super) fn triples(self, r: usize) -> usize {
        if self.is_split { split_ranks(r) } else { r }
    }

    /// Parts with other ranks in place of their own. Of several none is split.
    pub(super) fn parts(parts: &[Part], ranks: impl Fn(usize) -> usize) -> Vec<Part> {
        parts.iter().map(|part| Part { r: ranks(part.r), ..*part }).collect()
    }
}

/// Byte offsets of halves into the workspace.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Places {
    a: Option<u64>,
    b: Option<u64>,
    pairs: Option<u64>,
}

impl Places {
    /// Puts the halves where they lie, given the address of the workspace; `a` and `b` are what the products read in place of the
    /// factors.
    pub(super) fn fill(self, workspace: u64, split: &mut LoraSplit, a: &mut LoraMatrix, b: &mut LoraMatrix) {
        let place = |matrix: &mut LoraMatrix, offset: Option<u64>| {
            if let Some(offset) = offset {
                matrix.ptr = workspace + offset;
            }
        };
        place(&mut split.split_a, self.a);
        place(&mut split.split_b, self.b);
        place(&mut split.pairs, self.pairs);
        (*a, *b) = (split.split_a, split.split_b);
    }
}

/// Units of one factor that is `length` long.
fn units(r: usize, length: usize) -> u64 {
    blocks(r, LORA_SPLIT_RANKS) * blocks(length, LORA_SPLIT_LENGTH)
}

/// A matrix in the workspace, whose address only a launch knows.
fn reserve(scratch: &mut Scratch, rows: usize, cols: usize) -> (Option<u64>, LoraMatrix) {
    let row_stride = cols.next_multiple_of(8);
    let offset = scratch.reserve(2 * rows as u64 * row_stride as u64);
    (Some(offset), LoraMatrix { ptr: 0, row_stride: row_stride as i64 })
}

/// What forward splits, with places for it.
pub(super) fn forward(op: &raw::ForwardShared, shape: LoraShape, scratch: &mut Scratch) -> Result<LoraSplit> {
    let LoraShape { n, k, r, .. } = shape;
    if !op.is_split() {
        return Ok(LoraSplit::default());
    }
    let (a, split_a) = reserve(scratch, split_columns(r), k);
    let (b, split_b) = reserve(scratch, n, split_ranks(r));
    scratch.split = Some(Places { a, b, pairs: None });
    let all = check_units(units(r, k) + units(r, n))?;
    Ok(LoraSplit {
        a: matrix(op.a),
        b: matrix(op.projections[0].b),
        split_a,
        split_b,
        pairs: optional(op.h),
        r: r as u32,
        a_units: units(r, k) as u32,
        units: all,
        padding: 0,
    })
}

/// What backward splits for the outputs that are wanted: b for dh, and a for dx.
pub(super) fn backward(
    op: &raw::BackwardShared,
    wanted: &Wanted,
    shape: LoraShape,
    scratch: &mut Scratch,
) -> Result<LoraSplit> {
    let LoraShape { m, n, k, r } = shape;
    if !op.is_split() {
        return Ok(LoraSplit::default());
    }
    let mut places = Places::default();
    let mut when = |is_wanted: bool, place: &mut Option<u64>, rows, cols| {
        if !is_wanted {
            return LoraMatrix::default();
        }
        let (offset, matrix) = reserve(scratch, rows, cols);
        *place = offset;
        matrix
    };
    let split_a = when(wanted.dh && wanted.dx, &mut places.a, split_ranks(r), k);
    let split_b = when(wanted.dh, &mut places.b, n, split_columns(r));
    let pairs = when(wanted.da, &mut places.pairs, m, split_columns(r));
    scratch.split = Some(places);
    let of = |place: Option<u64>, length| if place.is_some() { units(r, length) } else { 0 };
    let a_units = of(places.a, k);
    let all = check_units(a_units + of(places.b, n))?;
    Ok(LoraSplit {
        a: matrix(op.a),
        b: matrix(op.projections[0].b),
        split_a,
        split_b,
        pairs,
        r: r as u32,
        a_units: a_units as u32,
        units: all,
        padding: 0,
    })
}

/// The most that halves take beside h or dh, of any call of up to these extents.
#[cfg(feature = "cuda")]
pub(super) fn reserve_most(scratch: &mut Scratch, shape: LoraShape) {
    let LoraShape { m, n, k, r } = shape;
    for (rows, cols) in [(split_ranks(r), k), (n, split_ranks(r)), (m, split_columns(r))] {
        reserve(scratch, rows, cols);
    }
}
