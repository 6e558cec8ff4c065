//! f32 factors: the halves that a launch makes of them, wherever the kernels read them.

use fused_lora::plan::{LoraMatrix, LoraSplit};
use fused_lora::{Dtype, raw};

use super::{Planned, Region, address};

/// LORA_SPLIT_RANKS, LORA_SPLIT_LENGTH.
const RANKS: usize = 8;
const LENGTH: usize = 256;

/// Ranks as the products of a call count them, those of all projections.
#[derive(Clone, Copy)]
pub struct Ranks {
    pub is_split: bool,
    /// Where h and dh are computed, and multiplied over tokens.
    pub pairs: usize,
    /// Where they are multiplied by a and b.
    pub triples: usize,
}

impl Ranks {
    /// Of projections with these ranks.
    pub fn of(f32_factors: bool, dtype: Dtype, all: &[usize]) -> Self {
        let is_split = f32_factors && dtype != Dtype::F32 && all.iter().any(|&r| r != 0);
        let mut ranks = Self { is_split, pairs: 0, triples: 0 };
        (ranks.pairs, ranks.triples) =
            all.iter().fold((0, 0), |(pairs, triples), &r| (pairs + ranks.pairs_of(r), triples + ranks.triples_of(r)));
        ranks
    }

    fn times(self, halves: usize, r: usize) -> usize {
        if self.is_split { halves * r.div_ceil(RANKS) * RANKS } else { r }
    }

    /// The same of one projection.
    pub fn pairs_of(self, r: usize) -> usize {
        self.times(2, r)
    }

    pub fn triples_of(self, r: usize) -> usize {
        self.times(3, r)
    }
}

/// A matrix of 16-bit elements in the workspace.
pub fn matrix(ptr: u64, row_stride: usize, rows: usize, cols: usize) -> raw::Matrix {
    assert!(
        row_stride >= cols && row_stride.is_multiple_of(8),
        "rows of {cols} elements start on 16 bytes: {row_stride}"
    );
    raw::Matrix { ptr, rows, cols, row_stride }
}

pub fn region(halves: LoraMatrix, rows: usize, cols: usize) -> Region {
    Region::of(matrix(halves.ptr, halves.row_stride as usize, rows, cols))
}

/// The halves of A.
pub fn halves_of_a(split: &LoraSplit, rows: usize, k: usize) -> raw::Matrix {
    matrix(split.split_a, split.split_a_stride as usize, rows, k)
}

/// Those of B of all projections, whose rows lie below each other, and of each; `cols` has columns of them.
pub fn halves_of_b(
    split: &LoraSplit,
    b: &[raw::Matrix],
    cols: impl Fn(usize) -> usize,
) -> (raw::Matrix, Vec<raw::Matrix>) {
    let row_stride = split.split_b_stride as usize;
    let (mut rows, mut own) = (0, Vec::new());
    for of in b {
        own.push(matrix(split.split_b + (2 * rows * row_stride) as u64, row_stride, of.rows, cols(of.cols)));
        rows += of.rows;
    }
    (matrix(split.split_b, row_stride, rows, b.iter().map(|of| cols(of.cols)).max().unwrap_or(0)), own)
}

fn units(r: usize, length: usize) -> u128 {
    r.div_ceil(RANKS) as u128 * length.div_ceil(LENGTH) as u128
}

/// What there is to split: A, the B of all projections, and whether each is needed.
pub struct Factors<'a> {
    pub a: &'a raw::Matrix,
    pub b: &'a [raw::Matrix],
    pub wanted: [bool; 2],
}

impl Factors<'_> {
    /// The units that split them; none, and nothing else, where they are not split.
    pub fn check(&self, split: &LoraSplit, ranks: Ranks) -> u128 {
        let Self { a, b, wanted } = *self;
        if !ranks.is_split {
            assert_eq!(*split, LoraSplit::default());
            return 0;
        }
        assert_eq!((split.a.ptr, split.a.row_stride), (a.ptr, a.row_stride as i64));
        for (at, got) in split.b.iter().enumerate() {
            let expected = b.get(at).map_or((0, 0), |of| (of.ptr, of.row_stride as i64));
            assert_eq!((got.ptr, got.row_stride), expected);
            assert_eq!(split.ranks[at] as usize, b.get(at).map_or(0, |of| of.cols));
        }
        let sum = |units: &dyn Fn(&raw::Matrix) -> u128| b.iter().map(units).sum::<u128>();
        let of_a = if wanted[0] { sum(&|of| units(of.cols, a.cols)) } else { 0 };
        let all = of_a + if wanted[1] { sum(&|of| units(of.cols, of.rows)) } else { 0 };
        let got = (split.r as usize, u128::from(split.a_units), u128::from(split.units));
        assert_eq!(got, (a.rows, of_a, all));
        all
    }
}

/// h in halves, as forward has it.
pub fn check_kept(split: &LoraSplit, h: Option<raw::Matrix>) {
    assert_eq!(split.pairs.ptr, address(h));
}

/// Regions of a launch that splits: those that are there.
pub fn check_regions(planned: &Planned<'_>, regions: &[Option<Region>]) {
    planned.check_regions(regions.iter().flatten().copied());
}
