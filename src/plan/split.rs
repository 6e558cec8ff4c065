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
    pub a: Option<u64>,
    pub b: Option<u64>,
    pub pairs: Option<u64>,
}

impl Places {
    /// Puts the halves where they lie, given the address of the workspace.
    pub(super) fn fill(self, workspace: u64, split: &mut LoraSplit) {
        let place = |matrix: &mut LoraMatrix, offset: Option<u64>| {
            if let Some(offset) = offset {
                matrix.ptr = workspace + offset;
            }
        };
        place(&mut split.split_a, self.a);
        place(&mut split.split_b, self.b);
        place(&mut split.pairs, self.pairs);
    }
}

/// Units of one factor that is `length` long.
fn units(r: usize, length: usize) -> u64 {
    blocks(r, LORA_SPLIT_RANKS) * blocks(length, LORA_SPLIT_LENGTH)
}

/// Units that forward splits factors in.
pub(super) fn forward_units(op: &raw::ForwardShared, LoraShape { n, k, r, .. }: LoraShape) -> u64 {
    if op.is_split() { units(r, k) + units(r, n) } else { 0 }
}

/// The same of backward, for the outputs that are wanted: b for dh, and a for dx.
pub(super) fn backward_units(op: &raw::BackwardShared, wanted: &Wanted, shape: LoraShape) -> u64 {
    let LoraShape { n, k, r, .. } = shape;
    let of = |is_read: bool, length| if op.is_split() && is_read { units(r, length) } else { 0 };
    of(wanted.dh && wanted.dx, k) + of(wanted.dh, n)
}

/// A matrix in the workspace, whose address only a launch knows.
fn reserve(scratch: &mut Scratch, rows: usize, cols: usize) -> (Option<u64>, LoraMatrix) {
    let row_stride = cols.next_multiple_of(8);
    let offset = scratch.reserve(2 * rows as u64 * row_stride as u64);
    (Some(offset), LoraMatrix { ptr: 0, row_stride: row_stride as i64 })
}

/// A matrix of halves as the products of the Hopper family read it, by its place in the workspace.
fn halves(of: LoraMatrix, rows: usize, cols: usize) -> raw::Matrix {
    raw::Matrix { ptr: 0, rows, cols, row_stride: of.row_stride as usize }
}

/// A call of forward whose A and B are the halves that its products read, by their places in the workspace, if it splits any.
pub(super) fn halved_forward(op: &raw::ForwardShared, split: &LoraSplit) -> raw::ForwardShared {
    let mut op = *op;
    if op.is_split() {
        let (r, b) = (op.a.rows, &mut op.projections[0].b);
        *b = halves(split.split_b, b.rows, split_ranks(r));
        op.a = halves(split.split_a, split_columns(r), op.a.cols);
    }
    op
}

/// The same of backward.
pub(super) fn halved_backward(op: &raw::BackwardShared, split: &LoraSplit) -> raw::BackwardShared {
    let mut op = *op;
    if op.is_split() {
        let (r, b) = (op.a.rows, &mut op.projections[0].b);
        *b = halves(split.split_b, b.rows, split_columns(r));
        op.a = halves(split.split_a, split_ranks(r), op.a.cols);
    }
    op
}

/// dh as the products over tokens read it: `dh`, or in pairs.
pub(super) fn dh_of_tokens(dh: Option<raw::Matrix>, split: &LoraSplit, m: usize) -> Option<raw::Matrix> {
    if split.r == 0 { dh } else { Some(halves(split.pairs, m, split_columns(split.r as usize))) }
}

/// What forward splits, with places for it; a ticket hands out a unit to each CTA of a cluster.
pub(super) fn forward(
    op: &raw::ForwardShared,
    shape: LoraShape,
    cluster: u32,
    scratch: &mut Scratch,
) -> Result<LoraSplit> {
    let LoraShape { n, k, r, .. } = shape;
    if !op.is_split() {
        return Ok(LoraSplit::default());
    }
    let (a, split_a) = reserve(scratch, split_columns(r), k);
    let (b, split_b) = reserve(scratch, n, split_ranks(r));
    scratch.split = Some(Places { a, b, pairs: None });
    let all = check_units(forward_units(op, shape))?;
    Ok(LoraSplit {
        a: matrix(op.a),
        b: matrix(op.projections[0].b),
        split_a,
        split_b,
        pairs: optional(op.h),
        r: r as u32,
        a_units: units(r, k) as u32,
        units: all,
        tickets: all.div_ceil(cluster),
    })
}

/// The same of backward, for the outputs that are wanted.
pub(super) fn backward(
    op: &raw::BackwardShared,
    wanted: &Wanted,
    shape: LoraShape,
    cluster: u32,
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
    let all = check_units(backward_units(op, wanted, shape))?;
    Ok(LoraSplit {
        a: matrix(op.a),
        b: matrix(op.projections[0].b),
        split_a,
        split_b,
        pairs,
        r: r as u32,
        a_units: if places.a.is_some() { units(r, k) as u32 } else { 0 },
        units: all,
        tickets: all.div_ceil(cluster),
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
