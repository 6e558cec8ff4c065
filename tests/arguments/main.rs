//! The rules for arguments: each broken one gets the error that names the argument, and what is legal passes.

mod call;
#[path = "../common/mod.rs"]
mod common;
mod hostile;
mod matrix;
mod shared;
mod table;

use common::raw as ops;
use fused_lora::raw::{Backward, Forward, Matrix};
use fused_lora::{Dtype, Error, LoraShape};
use proptest::prelude::*;

const SHAPE: LoraShape = LoraShape { m: 5, n: 7, k: 11, r: 3 };

fn forward() -> Forward {
    let LoraShape { m, r, .. } = SHAPE;
    Forward { h: Some(Matrix::new(1 << 40, m, r)), ..ops::forward(Dtype::F16, SHAPE) }
}

fn backward() -> Backward {
    ops::backward(Dtype::F16, SHAPE)
}

#[test]
fn legal_calls_pass() {
    assert_eq!(forward().check(), Ok(SHAPE));
    assert_eq!(backward().check(), Ok(SHAPE));
    // A null, unaligned or oddly strided matrix without elements is not touched.
    let none = LoraShape { r: 0, ..SHAPE };
    let mut op = ops::forward(Dtype::F16, none);
    (op.a.ptr, op.b.ptr, op.b.row_stride) = (0, 1, 0);
    assert_eq!(op.check(), Ok(none));
    let mut op = ops::backward(Dtype::F16, none);
    (op.a.ptr, op.b.ptr) = (1, 0);
    assert_eq!(op.check(), Ok(none));
    // The stride of a single row is never used.
    let one = LoraShape { m: 1, ..SHAPE };
    let mut op = ops::forward(Dtype::F16, one);
    (op.x.row_stride, op.y.row_stride) = (usize::MAX, usize::MAX);
    assert_eq!(op.check(), Ok(one));
}

/// What would be wrong in another call.
#[test]
fn what_is_needed_depends_on_what_is_asked_for() {
    for scale in [0.0, -1.0, f32::MAX, f32::MIN_POSITIVE / 2.0] {
        assert_eq!(Forward { scale, ..forward() }.check(), Ok(SHAPE));
    }
    assert_eq!(Backward { x: None, da: None, ..backward() }.check(), Ok(SHAPE));
    assert_eq!(Backward { h: None, db: None, ..backward() }.check(), Ok(SHAPE));
    // Storage type and f32 gradients differ in their alignment.
    let mut op = backward();
    ops::backward_argument(&mut op, "da").ptr += 2;
    assert!(matches!(op.check(), Err(Error::Misaligned { arg: "da", align: 4, .. })));
    if let Some(da) = &mut op.da {
        da.f32 = false;
    }
    assert_eq!(op.check(), Ok(SHAPE));
    // Inputs may be the same memory: tied weights are.
    let mut op = forward();
    op.x = Matrix { ptr: op.w.ptr, ..op.x };
    assert_eq!(op.check(), Ok(SHAPE));
}

/// x, y and h as column windows of one buffer: legal while the windows are disjoint.
#[test]
fn column_windows_may_interleave() {
    let LoraShape { m, n, k, r } = SHAPE;
    let row_stride = k + n + r;
    let window = |first: usize, cols| Matrix { ptr: (1 << 41) + 2 * first as u64, rows: m, cols, row_stride };
    let mut op = forward();
    (op.x, op.y, op.h) = (window(0, k), window(k, n), Some(window(k + n, r)));
    assert_eq!(op.check(), Ok(SHAPE));
    op.y = window(k - 1, n);
    assert_eq!(op.check(), Err(Error::Overlap { output: "y", other: "x" }));
    op.y = window(k + 1, n);
    assert_eq!(op.check(), Err(Error::Overlap { output: "h", other: "y" }));
    // Past the end of a row a window continues in the next one.
    (op.y, op.h) = (window(k + r, n), Some(window(k, r)));
    assert_eq!(op.check(), Ok(SHAPE));
    op.y = window(k + r + 1, n);
    assert_eq!(op.check(), Err(Error::Overlap { output: "y", other: "x" }));
    // A bias between the columns of y.
    (op.x, op.y, op.h) = (forward().x, Matrix { row_stride: 2 * n, ..window(0, n) }, None);
    op.bias = Some(Matrix::new((1 << 41) + 2 * n as u64, 1, n));
    assert_eq!(op.check(), Ok(SHAPE));
    op.bias = Some(Matrix::new((1 << 41) + 2 * n as u64 + 2, 1, n));
    assert_eq!(op.check(), Err(Error::Overlap { output: "y", other: "bias" }));
}

/// With different pitches rows can only meet at multiples of the greatest common divisor.
#[test]
fn windows_of_different_pitch_may_interleave() {
    let mut op = ops::forward(Dtype::F16, LoraShape { m: 50, n: 2, k: 2, r: 0 });
    let window = |first: u64, row_stride| Matrix { ptr: (1 << 41) + 2 * first, rows: 50, cols: 2, row_stride };
    (op.x, op.y) = (window(0, 12), window(2, 8));
    assert!(op.check().is_ok());
    op.y = window(3, 8);
    assert_eq!(op.check(), Err(Error::Overlap { output: "y", other: "x" }));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    /// Against a list of all elements: never missed, and never invented for equal pitches or a single row.
    #[test]
    fn overlap_is_what_shared_elements_are(
        rows in 1..5_usize, cols in [1..6_usize, 1..6_usize], gaps in [0..8_usize, 0..8_usize], equal: bool, start in 0..60_u64,
    ) {
        let base = 1 << 41;
        let stride = cols[0] + gaps[0];
        let other_stride = if equal { stride.max(cols[1]) } else { cols[1] + gaps[1] };
        let x = Matrix { ptr: base + 60, rows, cols: cols[0], row_stride: stride };
        let y = Matrix { ptr: base + 2 * start, rows, cols: cols[1], row_stride: other_stride };
        let elements = |matrix: Matrix| -> Vec<u64> {
            let row = move |row: usize| (0..matrix.cols).map(move |col| matrix.ptr + 2 * (row * matrix.row_stride + col) as u64);
            (0..matrix.rows).flat_map(row).collect()
        };
        let shares = elements(x).iter().any(|address| elements(y).contains(address));
        let mut op = ops::forward(Dtype::F16, LoraShape { m: rows, n: cols[1], k: cols[0], r: 0 });
        (op.x, op.y) = (x, y);
        match op.check() {
            Ok(_) => prop_assert!(!shares, "{x:?} {y:?}"),
            Err(Error::Overlap { output: "y", other: "x" }) => {
                prop_assert!(shares || (rows > 1 && stride != other_stride), "{x:?} {y:?}");
            }
            Err(error) => prop_assert!(false, "{error}"),
        }
    }
}
