//! f32 factors: the halves that a launch makes of them, wherever the kernels read them.

use fused_lora::plan::{LoraMatrix, LoraSplit};
use fused_lora::{Dtype, raw};

use super::{Planned, Region, address};

/// LORA_SPLIT_RANKS, LORA_SPLIT_LENGTH.
const RANKS: usize = 8;
const LENGTH: usize = 256;

/// Ranks as the products of a call count them.
#[derive(Clone, Copy)]
pub struct Ranks {
    pub is_split: bool,
    /// Where h and dh are computed, and multiplied over tokens.
    pub pairs: usize,
    /// Where they are multiplied by a and b.
    pub triples: usize,
}

impl Ranks {
    pub fn of(f32_factors: bool, dtype: Dtype, r: usize) -> Self {
        let is_split = f32_factors && dtype != Dtype::F32 && r != 0;
        let of = |halves: usize| if is_split { halves * r.div_ceil(RANKS) * RANKS } else { r };
        Self { is_split, pairs: of(2), triples: of(3) }
    }
}

/// A matrix of 16-bit elements in the workspace.
pub fn matrix(matrix: LoraMatrix, rows: usize, cols: usize) -> raw::Matrix {
    let row_stride = matrix.row_stride as usize;
    assert!(
        row_stride >= cols && row_stride.is_multiple_of(8),
        "rows of {cols} elements start on 16 bytes: {row_stride}"
    );
    raw::Matrix { ptr: matrix.ptr, rows, cols, row_stride }
}

pub fn region(halves: LoraMatrix, rows: usize, cols: usize) -> Region {
    Region::of(matrix(halves, rows, cols))
}

fn units(r: usize, length: usize) -> u128 {
    r.div_ceil(RANKS) as u128 * length.div_ceil(LENGTH) as u128
}

/// What there is to split: the factors, whether each is needed, and how long each is; and what the products read in their place.
pub struct Factors<'a> {
    pub a: (&'a raw::Matrix, bool, usize),
    pub b: (&'a raw::Matrix, bool, usize),
    pub read: [u64; 2],
}

impl Factors<'_> {
    /// The units that split them; none, and nothing else, where they are not split.
    pub fn check(&self, split: &LoraSplit, ranks: Ranks, r: usize) -> u128 {
        let Self { a: (a, wants_a, k), b: (b, wants_b, n), read } = *self;
        if !ranks.is_split {
            assert_eq!(*split, LoraSplit::default());
            assert_eq!(read, [a.ptr, b.ptr]);
            return 0;
        }
        assert_eq!(
            [(split.a.ptr, split.a.row_stride), (split.b.ptr, split.b.row_stride)],
            [a, b].map(|of| (of.ptr, of.row_stride as i64))
        );
        assert_eq!(read, [split.split_a.ptr, split.split_b.ptr]);
        let of_a = if wants_a { units(r, k) } else { 0 };
        let all = of_a + if wants_b { units(r, n) } else { 0 };
        assert_eq!((split.r as usize, u128::from(split.a_units), u128::from(split.units)), (r, of_a, all));
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
