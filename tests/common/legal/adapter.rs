//! Launches for an adapter's factors: merge and round.

use fused_lora::plan::{Launch, Params};
use fused_lora::raw;

use super::{MAX_GRID, check_dimensions};
use fused_lora::LoraShape;

/// Rows and columns of a tile of merge.
const MERGE: usize = 64;
/// Rows and columns of a tile of round.
const ROUND: (usize, usize) = (8, 256);

fn check_launch(launch: &Launch, kernel: &str, dtype: fused_lora::Dtype, tiles: u128) {
    assert_eq!((launch.image, launch.kernel), ("portable_adapter", &*format!("lora_{kernel}_{}", dtype.name())));
    assert_eq!((u128::from(launch.grid[0]), launch.grid[1..].to_vec()), (tiles, vec![1, 1]));
    assert!((1..=MAX_GRID).contains(&launch.grid[0]), "{launch:?}");
    assert_eq!((launch.cluster, launch.block, launch.shared_bytes), ([1; 3], [256, 1, 1], 0), "{launch:?}");
    assert!(launch.maps.is_empty(), "{launch:?}");
}

/// A tile per CTA over all of `merged`.
pub fn merge(launch: &Launch, op: &raw::Merge) {
    let shape = LoraShape { m: 0, n: op.merged.rows, k: op.merged.cols, r: op.a.rows };
    let tiles = shape.n.div_ceil(MERGE) as u128 * shape.k.div_ceil(MERGE) as u128;
    check_launch(launch, "merge", op.dtype, tiles);
    let Params::Merge(p) = &launch.params else { panic!("{launch:?}") };
    check_dimensions([0, p.n, p.k, p.r], shape);
    assert_eq!(p.k_blocks as usize, shape.k.div_ceil(MERGE));
    let w = op.w.unwrap_or(op.merged);
    assert_eq!([p.w.ptr, p.a.ptr, p.b.ptr, p.merged.ptr], [w.ptr, op.a.ptr, op.b.ptr, op.merged.ptr]);
}

/// A tile per CTA over A, then over B; no launch where both are empty.
pub fn round(launch: Option<&Launch>, op: &raw::Round) {
    let shape = LoraShape { m: 0, n: op.b.rows, k: op.a.cols, r: op.a.rows };
    let LoraShape { n, k, r, .. } = shape;
    let tiles = |rows: usize, cols: usize| rows.div_ceil(ROUND.0) as u128 * cols.div_ceil(ROUND.1) as u128;
    let (of_a, of_b) = (tiles(r, k), tiles(n, r));
    let Some(launch) = launch else {
        assert_eq!(of_a + of_b, 0, "no launch for {op:?}");
        return;
    };
    check_launch(launch, "round", op.dtype, of_a + of_b);
    let Params::Round(p) = &launch.params else { panic!("{launch:?}") };
    check_dimensions([0, p.n, p.k, p.r], shape);
    assert_eq!(u128::from(p.a_units), of_a);
    assert_eq!((p.k_blocks as usize, p.r_blocks as usize), (k.div_ceil(ROUND.1), r.div_ceil(ROUND.1)));
    let rounded = [op.rounded_a.ptr, op.rounded_b.ptr];
    assert_eq!([p.a.ptr, p.b.ptr, p.rounded_a.ptr, p.rounded_b.ptr], [op.a.ptr, op.b.ptr, rounded[0], rounded[1]]);
}
