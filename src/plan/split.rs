//! f32 factors over a 16-bit layer: what a launch splits, where the halves lie, and how many columns they make.

use super::operands::{Wanted, matrix, optional};
use super::{Part, Scratch, blocks, check_units, each};
use crate::error::Result;
use crate::params::*;
use crate::raw;
use crate::split::{split_columns, split_ranks};

/// The ranks that the products of a call go through: those of its factors, or their halves.
#[derive(Clone, Copy)]
pub(super) struct Ranks {
    is_split: bool,
}

impl Ranks {
    pub(super) fn of(is_split: bool) -> Ranks {
        Ranks { is_split }
    }

    /// Parts with the columns of h and dh where they are computed, and where they are multiplied over tokens.
    pub(super) fn pairs(self, parts: &[Part]) -> Vec<Part> {
        self.counted(parts, split_columns)
    }

    /// Parts with the terms of h Bᵀ and dh A.
    pub(super) fn triples(self, parts: &[Part]) -> Vec<Part> {
        self.counted(parts, split_ranks)
    }

    fn counted(self, parts: &[Part], columns: impl Fn(usize) -> usize) -> Vec<Part> {
        if !self.is_split {
            return parts.to_vec();
        }
        let mut first_rank = 0;
        let mut counted = |part: &Part| {
            let part = Part { r: columns(part.r), first_rank, ..*part };
            first_rank += part.r;
            part
        };
        parts.iter().map(&mut counted).collect()
    }

    /// Those of all parts.
    pub(super) fn sum(parts: &[Part]) -> usize {
        parts.iter().map(|part| part.r).sum()
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
        let place = |ptr: &mut u64, offset: Option<u64>| {
            if let Some(offset) = offset {
                *ptr = workspace + offset;
            }
        };
        place(&mut split.split_a, self.a);
        place(&mut split.split_b, self.b);
        place(&mut split.pairs.ptr, self.pairs);
    }
}

/// Units of one factor that is `length` long.
fn units(r: usize, length: usize) -> u64 {
    blocks(r, LORA_SPLIT_RANKS) * blocks(length, LORA_SPLIT_LENGTH)
}

/// Units of A, and of B, of all projections.
fn units_of(parts: &[Part], k: usize) -> [u64; 2] {
    let sum = |length: fn(&Part, usize) -> usize| parts.iter().map(|part| units(part.r, length(part, k))).sum();
    [sum(|_, k| k), sum(|part, _| part.n)]
}

/// Units that forward splits factors in.
pub(super) fn forward_units(op: &raw::ForwardShared, parts: &[Part]) -> u64 {
    if op.is_split() { units_of(parts, op.a.cols).iter().sum() } else { 0 }
}

/// The same of backward, for the outputs that are wanted: b for dh, and a for dx.
pub(super) fn backward_units(op: &raw::BackwardShared, wanted: &Wanted, parts: &[Part]) -> u64 {
    let [of_a, of_b] = units_of(parts, op.a.cols);
    let when = |is_read: bool, units| if op.is_split() && is_read { units } else { 0 };
    when(wanted.dh && wanted.dx, of_a) + when(wanted.dh, of_b)
}

/// Room for a matrix in the workspace, whose address only a launch knows, and its row stride.
fn reserve(scratch: &mut Scratch, rows: usize, cols: usize) -> (Option<u64>, u32) {
    let row_stride = cols.next_multiple_of(8);
    (Some(scratch.reserve(2 * rows as u64 * row_stride as u64)), row_stride as u32)
}

/// Rows of the halves of all B, and the most columns of one.
fn extents_of_b(counted: &[Part]) -> (usize, usize) {
    (counted.iter().map(|part| part.n).sum(), counted.iter().map(|part| part.r).max().unwrap_or(0))
}

/// The halves of each B, as the products of the Hopper family read them: addresses are those in the matrix of all.
fn halves_of_b<'a>(split: &'a LoraSplit, counted: &'a [Part]) -> impl Iterator<Item = raw::Matrix> + 'a {
    let row_stride = split.split_b_stride as usize;
    let mut rows = 0;
    counted.iter().map(move |part| {
        let ptr = 2 * (rows * row_stride) as u64;
        rows += part.n;
        raw::Matrix { ptr, rows: part.n, cols: part.r, row_stride }
    })
}

/// A call of forward whose A and B are the halves that its products read, by their places in the workspace, if it splits any; parts
/// with pairs, and with triples.
pub(super) fn halved_forward(
    op: &raw::ForwardShared,
    split: &LoraSplit,
    [pairs, deep]: [&[Part]; 2],
) -> raw::ForwardShared {
    let mut op = *op;
    if op.is_split() {
        op.projections.iter_mut().zip(halves_of_b(split, deep)).for_each(|(of, halves)| of.b = halves);
        let row_stride = split.split_a_stride as usize;
        op.a = raw::Matrix { ptr: 0, rows: Ranks::sum(pairs), cols: op.a.cols, row_stride };
    }
    op
}

/// The same of backward.
pub(super) fn halved_backward(
    op: &raw::BackwardShared,
    split: &LoraSplit,
    [pairs, deep]: [&[Part]; 2],
) -> raw::BackwardShared {
    let mut op = *op;
    if op.is_split() {
        op.projections.iter_mut().zip(halves_of_b(split, pairs)).for_each(|(of, halves)| of.b = halves);
        let row_stride = split.split_a_stride as usize;
        op.a = raw::Matrix { ptr: 0, rows: Ranks::sum(deep), cols: op.a.cols, row_stride };
    }
    op
}

/// dh as the products over tokens read it: `dh`, or in pairs.
pub(super) fn dh_of_tokens(
    dh: Option<raw::Matrix>,
    split: &LoraSplit,
    m: usize,
    pairs: &[Part],
) -> Option<raw::Matrix> {
    if split.r == 0 {
        return dh;
    }
    let row_stride = split.pairs.row_stride as usize;
    Some(raw::Matrix { ptr: 0, rows: m, cols: Ranks::sum(pairs), row_stride })
}

/// Factors that are split in `units`, without places for their halves.
fn of_all(
    a: raw::Matrix,
    b: [LoraMatrix; raw::MAX_PROJECTIONS],
    parts: &[Part],
    units: u32,
    cluster: u32,
) -> LoraSplit {
    LoraSplit {
        a: matrix(a),
        b,
        ranks: each(parts, |_, part| part.r as u32),
        r: a.rows as u32,
        units,
        tickets: units.div_ceil(cluster),
        ..LoraSplit::default()
    }
}

/// What forward splits, with places for it; a ticket hands out a unit to each CTA of a cluster.
pub(super) fn forward(
    op: &raw::ForwardShared,
    parts: &[Part],
    cluster: u32,
    scratch: &mut Scratch,
) -> Result<LoraSplit> {
    if !op.is_split() {
        return Ok(LoraSplit::default());
    }
    let counted = Ranks::of(true);
    let (a, split_a_stride) = reserve(scratch, Ranks::sum(&counted.pairs(parts)), op.a.cols);
    let (rows, cols) = extents_of_b(&counted.triples(parts));
    let (b, split_b_stride) = reserve(scratch, rows, cols);
    scratch.split = Some(Places { a, b, pairs: None });
    let all = check_units(forward_units(op, parts))?;
    Ok(LoraSplit {
        pairs: optional(op.h),
        split_a_stride,
        split_b_stride,
        a_units: units_of(parts, op.a.cols)[0] as u32,
        ..of_all(op.a, each(&op.projections, |_, of| matrix(of.b)), parts, all, cluster)
    })
}

/// The same of backward, for the outputs that are wanted.
pub(super) fn backward(
    op: &raw::BackwardShared,
    wanted: &Wanted,
    parts: &[Part],
    cluster: u32,
    scratch: &mut Scratch,
) -> Result<LoraSplit> {
    if !op.is_split() {
        return Ok(LoraSplit::default());
    }
    let mut when = |is_wanted: bool, rows, cols| if is_wanted { reserve(scratch, rows, cols) } else { (None, 0) };
    let (pairs, deep) = (Ranks::of(true).pairs(parts), Ranks::of(true).triples(parts));
    let (a, split_a_stride) = when(wanted.dh && wanted.dx, Ranks::sum(&deep), op.a.cols);
    let (rows, cols) = extents_of_b(&pairs);
    let (b, split_b_stride) = when(wanted.dh, rows, cols);
    let (of_tokens, row_stride) = when(wanted.da, op.projections[0].dy.rows, Ranks::sum(&pairs));
    scratch.split = Some(Places { a, b, pairs: of_tokens });
    let all = check_units(backward_units(op, wanted, parts))?;
    Ok(LoraSplit {
        pairs: LoraMatrix { ptr: 0, row_stride: row_stride.into() },
        split_a_stride,
        split_b_stride,
        a_units: if a.is_some() { units_of(parts, op.a.cols)[0] as u32 } else { 0 },
        ..of_all(op.a, each(&op.projections, |_, of| matrix(of.b)), parts, all, cluster)
    })
}

/// The most that halves take beside h or dh, of any call of up to these extents.
#[cfg(feature = "cuda")]
pub(super) fn reserve_most(scratch: &mut Scratch, shape: crate::LoraShape) {
    let crate::LoraShape { m, n, k, r } = shape;
    for (rows, cols) in [(split_ranks(r), k), (n, split_ranks(r)), (m, split_columns(r))] {
        reserve(scratch, rows, cols);
    }
}
