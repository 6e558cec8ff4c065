//! The rules for arguments: each broken one gets the error that names the argument, and what is legal passes.

mod common;

use common::raw as ops;
use fused_lora::raw::{Backward, Forward, Matrix};
use fused_lora::{Dtype, Error, LoraShape, MAX_DIMENSION};
use proptest::prelude::*;

const SHAPE: LoraShape = LoraShape { m: 5, n: 7, k: 11, r: 3 };
const FORWARD: [&str; 7] = ["x", "w", "a", "b", "bias", "y", "h"];
const BACKWARD: [&str; 10] = ["dy", "w", "a", "b", "x", "h", "dx", "da", "db", "dbias"];

fn forward() -> Forward {
    let LoraShape { m, r, .. } = SHAPE;
    Forward { h: Some(Matrix::new(1 << 40, m, r)), ..ops::forward(Dtype::F16, SHAPE) }
}

fn backward() -> Backward {
    ops::backward(Dtype::F16, SHAPE)
}

/// Breaks one argument of a legal call at a time and hands name, matrix before and error to `check`.
fn break_each(change: impl Fn(&mut Matrix), check: impl Fn(&'static str, Matrix, Error)) {
    for name in FORWARD {
        let mut op = forward();
        let before = *ops::forward_argument(&mut op, name);
        change(ops::forward_argument(&mut op, name));
        check(name, before, op.check().expect_err(name));
    }
    for name in BACKWARD {
        let mut op = backward();
        let before = *ops::backward_argument(&mut op, name);
        change(ops::backward_argument(&mut op, name));
        check(name, before, op.check().expect_err(name));
    }
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

#[test]
fn addresses_and_strides() {
    break_each(|matrix| matrix.ptr = 0, |arg, _, error| assert_eq!(error, Error::NullPointer { arg }));
    break_each(
        |matrix| matrix.ptr += 1,
        |arg, before, error| match error {
            Error::Misaligned { arg: got, address, align } => {
                let expected = if matches!(arg, "da" | "db" | "dbias") { 4 } else { 2 };
                assert_eq!((got, address, align), (arg, before.ptr + 1, expected));
            }
            other => panic!("{arg}: {other}"),
        },
    );
    break_each(
        |matrix| matrix.row_stride -= 1,
        |arg, before, error| assert_eq!(error, Error::Stride { arg, got: before.cols - 1, min: before.cols }),
    );
    break_each(
        |matrix| matrix.ptr = u64::MAX - 3,
        |arg, _, error| match error {
            // A row of one element may end there.
            Error::TooLarge { what, .. } => assert_eq!(what, "the end address of a matrix", "{arg}"),
            other => panic!("{arg}: {other}"),
        },
    );
    // Storage type and f32 gradients differ in their alignment.
    let mut op = backward();
    ops::backward_argument(&mut op, "da").ptr += 2;
    assert!(matches!(op.check(), Err(Error::Misaligned { arg: "da", align: 4, .. })));
    if let Some(da) = &mut op.da {
        da.f32 = false;
    }
    assert_eq!(op.check(), Ok(SHAPE));
}

#[test]
fn dimensions() {
    // The shape is read from x (dy), w and a; whoever disagrees with them is named.
    for (change, axis) in [(0, "rows"), (1, "columns")] {
        let grow = move |matrix: &mut Matrix| {
            matrix.rows += 1 - change;
            matrix.cols += change;
            matrix.row_stride += change;
        };
        break_each(grow, |arg, before, error| {
            let before = if change == 0 { before.rows } else { before.cols };
            // A source of the shape is taken at its word, and the first to disagree with it is named.
            let is_source = matches!((arg, axis), ("x" | "dy" | "w" | "a", "rows") | ("w", "columns"));
            match error {
                Error::Dimension { arg: got, .. } if got != arg => assert!(is_source, "{arg}: {error}"),
                Error::Dimension { axis: on, got, expected, .. } => {
                    assert_eq!((on, got, expected), (axis, before + 1, before), "{arg}");
                }
                other => panic!("{arg}: {other}"),
            }
        });
    }
    for (m, n, k, arg, axis) in [(0, 7, 11, "x", "rows"), (5, 0, 11, "w", "rows"), (5, 7, 0, "x", "columns")] {
        let op = ops::forward(Dtype::F16, LoraShape { m, n, k, r: 3 });
        assert_eq!(op.check(), Err(Error::ZeroDimension { arg, axis }));
    }
    for (m, n, k, arg, axis) in [(0, 7, 11, "dy", "rows"), (5, 0, 11, "dy", "columns"), (5, 7, 0, "w", "columns")] {
        let op = ops::backward(Dtype::F16, LoraShape { m, n, k, r: 3 });
        assert_eq!(op.check(), Err(Error::ZeroDimension { arg, axis }));
    }
    let (got, limit) = (MAX_DIMENSION as u64 + 1, MAX_DIMENSION as u64);
    let over = MAX_DIMENSION + 1;
    for (shape, what) in [
        (LoraShape { m: over, ..SHAPE }, "M (rows of x)"),
        (LoraShape { n: over, ..SHAPE }, "N (rows of w)"),
        (LoraShape { k: over, ..SHAPE }, "K (columns of w)"),
        (LoraShape { r: over, ..SHAPE }, "R (rows of a)"),
    ] {
        assert_eq!(ops::forward(Dtype::F16, shape).check(), Err(Error::TooLarge { what, got, limit }));
        assert_eq!(ops::backward(Dtype::F16, shape).check(), Err(Error::TooLarge { what, got, limit }));
    }
    let mut op = forward();
    op.x.row_stride = usize::MAX / 2;
    assert!(matches!(op.check(), Err(Error::TooLarge { what: "a matrix extent in elements", .. })));
}

#[test]
fn scale_and_presence() {
    for scale in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        assert!(matches!(Forward { scale, ..forward() }.check(), Err(Error::Scale { .. })));
        assert!(matches!(Backward { scale, ..backward() }.check(), Err(Error::Scale { .. })));
    }
    for scale in [0.0, -1.0, f32::MAX, f32::MIN_POSITIVE / 2.0] {
        assert_eq!(Forward { scale, ..forward() }.check(), Ok(SHAPE));
    }
    let none = Backward { dx: None, da: None, db: None, dbias: None, ..backward() };
    assert_eq!(none.check(), Err(Error::NoOutput));
    assert_eq!(Backward { x: None, ..backward() }.check(), Err(Error::Missing { arg: "x", output: "da" }));
    assert_eq!(Backward { h: None, ..backward() }.check(), Err(Error::Missing { arg: "h", output: "db" }));
    assert_eq!(Backward { x: None, da: None, ..backward() }.check(), Ok(SHAPE));
    assert_eq!(Backward { h: None, db: None, ..backward() }.check(), Ok(SHAPE));
}

/// Each output laid onto each other argument, first at its first element, then at its last.
#[test]
fn outputs_overlap_nothing() {
    let last = |matrix: Matrix, bytes: u64| matrix.ptr + (matrix.rows * matrix.cols - 1) as u64 * bytes;
    for output in ["y", "h"] {
        for other in FORWARD.into_iter().filter(|&name| name != output) {
            let mut op = forward();
            let victim = *ops::forward_argument(&mut op, other);
            for ptr in [victim.ptr, last(victim, 2)] {
                ops::forward_argument(&mut op, output).ptr = ptr;
                let Err(Error::Overlap { output: a, other: b }) = op.check() else { panic!("{output} on {other}") };
                assert!((a, b) == (output, other) || (b, a) == (output, other), "{a}, {b}");
            }
        }
    }
    for output in ["dx", "da", "db", "dbias"] {
        for other in BACKWARD.into_iter().filter(|&name| name != output) {
            let mut op = backward();
            let victim = *ops::backward_argument(&mut op, other);
            let bytes = if matches!(other, "da" | "db" | "dbias") { 4 } else { 2 };
            for ptr in [victim.ptr, last(victim, bytes) & !3] {
                ops::backward_argument(&mut op, output).ptr = ptr;
                let Err(Error::Overlap { output: a, other: b }) = op.check() else { panic!("{output} on {other}") };
                assert!((a, b) == (output, other) || (b, a) == (output, other), "{a}, {b}");
            }
        }
    }
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
