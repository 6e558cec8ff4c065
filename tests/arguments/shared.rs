//! The rules for arguments of projections that share x: each broken one gets the error that names the argument and the projection.

use fused_lora::plan::{Device, Plan};
use fused_lora::raw::{
    BackwardShared, Dropout, ForwardShared, Gradient, MAX_PROJECTIONS, MagnitudeGradient, Matrix, Projections, Seed,
};
use fused_lora::{Dtype, Error, LoraShape, Result, bf16, cpu};

use super::common::raw as ops;
use super::common::shared::SharedSpec;

const M: usize = 4;
const K: usize = 5;
/// N and R.
const PARTS: [(usize, usize); 2] = [(6, 3), (7, 2)];

fn forward() -> ForwardShared {
    ForwardShared { h: Some(Matrix::new(1 << 40, M, 5)), ..ops::forward_shared(Dtype::F16, M, K, &PARTS) }
}

fn backward() -> BackwardShared {
    ops::backward_shared(Dtype::F16, M, K, &PARTS)
}

/// The plan's error is that of the check.
fn refused_forward(spoil: impl FnOnce(&mut ForwardShared)) -> Error {
    let mut op = forward();
    spoil(&mut op);
    let error = op.check().expect_err("a refusal");
    let planned = Plan::forward_shared(&op, &Device::of_arch("a device", 80, 4)).map(drop);
    assert_eq!(format!("{planned:?}"), format!("{:?}", Err::<(), _>(&error)));
    error
}

fn refused_backward(spoil: impl FnOnce(&mut BackwardShared)) -> Error {
    let mut op = backward();
    spoil(&mut op);
    let error = op.check().expect_err("a refusal");
    let planned = Plan::backward_shared(&op, &Device::of_arch("a device", 80, 4)).map(drop);
    assert_eq!(format!("{planned:?}"), format!("{:?}", Err::<(), _>(&error)));
    error
}

/// Every matrix of forward by the name that errors give it.
fn forward_arguments(op: &mut ForwardShared) -> Vec<(&'static str, &mut Matrix)> {
    let ForwardShared { x, a, h, projections, .. } = op;
    let [first, second] = &mut projections[..] else { unreachable!("two projections") };
    vec![
        ("x", x),
        ("w of projection 0", &mut first.w),
        ("w of projection 1", &mut second.w),
        ("a", a),
        ("b of projection 0", &mut first.b),
        ("b of projection 1", &mut second.b),
        ("bias of projection 0", first.bias.as_mut().expect("there")),
        ("bias of projection 1", second.bias.as_mut().expect("there")),
        ("y of projection 0", &mut first.y),
        ("y of projection 1", &mut second.y),
        ("h", h.as_mut().expect("there")),
    ]
}

fn backward_arguments(op: &mut BackwardShared) -> Vec<(&'static str, &mut Matrix)> {
    let BackwardShared { a, x, h, dx, da, projections, .. } = op;
    let [first, second] = &mut projections[..] else { unreachable!("two projections") };
    fn of(gradient: &mut Option<Gradient>) -> &mut Matrix {
        &mut gradient.as_mut().expect("there").matrix
    }
    vec![
        ("dy of projection 0", &mut first.dy),
        ("w of projection 0", &mut first.w),
        ("dy of projection 1", &mut second.dy),
        ("w of projection 1", &mut second.w),
        ("a", a),
        ("b of projection 0", &mut first.b),
        ("b of projection 1", &mut second.b),
        ("x", x.as_mut().expect("there")),
        ("h", h.as_mut().expect("there")),
        ("dx", dx.as_mut().expect("there")),
        ("da", of(da)),
        ("db of projection 0", of(&mut first.db)),
        ("db of projection 1", of(&mut second.db)),
        ("dbias of projection 0", of(&mut first.dbias)),
        ("dbias of projection 1", of(&mut second.dbias)),
    ]
}

#[test]
fn legal_calls_pass() {
    let shape = LoraShape { m: M, n: 13, k: K, r: 5 };
    assert_eq!((forward().check(), backward().check()), (Ok(shape), Ok(shape)));
    // Without ranks, in one or in all.
    let parts = [(6, 0), (7, 2), (8, 0)];
    assert!(ops::forward_shared(Dtype::F16, M, K, &parts).check().is_ok());
    assert!(ops::backward_shared(Dtype::F16, M, K, &[(6, 0); 4]).check().is_ok());
}

#[test]
fn none_and_too_many_are_refused() {
    let projection = forward().projections[0];
    for got in [0, 5, 100] {
        let error = Error::Projections { got, limit: MAX_PROJECTIONS };
        assert_eq!(Projections::new(&vec![projection; got]).map(drop), Err(error.clone()));
        let mut op = SharedSpec::new(3, 4, &[(5, 2), (6, 1)]).forward::<bf16>();
        let mut views = op.views();
        views.projections = (0..got).map_while(|_| views.projections.pop()).collect();
        if got == 0 {
            assert_eq!(cpu::forward_shared(views), Err(error));
        }
    }
    assert_eq!(Projections::new(&[projection; 4]).map(|all| all.len()), Ok(4));
}

/// An argument of other dimensions, by one; whose disagreement it becomes.
#[test]
fn dimensions_that_disagree_are_named() {
    let blamed = |arg: &'static str, axis: &'static str| match (arg, axis) {
        // Taken at their word: the first to disagree is named.
        ("x", "rows") => ("y of projection 0", "rows"),
        ("dy of projection 0", "rows") => ("dy of projection 1", "rows"),
        ("w of projection 0", "rows") => ("b of projection 0", "rows"),
        ("w of projection 1", "rows") => ("b of projection 1", "rows"),
        ("w of projection 0", "columns") => ("x", "columns"),
        ("a", "rows") => ("b of projection 1", "columns"),
        // Its ranks are taken from those of the next.
        ("b of projection 0", "columns") => ("b of projection 1", "columns"),
        other => other,
    };
    for at in 0..forward_arguments(&mut forward()).len() {
        for axis in ["rows", "columns"] {
            let arg = forward_arguments(&mut forward())[at].0;
            let error = refused_forward(|op| enlarge(forward_arguments(op).swap_remove(at).1, axis));
            let (named, of) = blamed(arg, axis);
            assert!(
                matches!(error, Error::Dimension { arg, axis, .. } if (arg, axis) == (named, of)),
                "{arg} {axis}: {error}"
            );
        }
    }
    let blamed = |arg, axis| match (arg, axis) {
        ("w of projection 0", "rows") => ("dy of projection 0", "columns"),
        ("w of projection 1", "rows") => ("dy of projection 1", "columns"),
        ("w of projection 0", "columns") => ("w of projection 1", "columns"),
        other => blamed(other.0, other.1),
    };
    for at in 0..backward_arguments(&mut backward()).len() {
        for axis in ["rows", "columns"] {
            let arg = backward_arguments(&mut backward())[at].0;
            let error = refused_backward(|op| enlarge(backward_arguments(op).swap_remove(at).1, axis));
            let (named, of) = blamed(arg, axis);
            assert!(
                matches!(error, Error::Dimension { arg, axis, .. } if (arg, axis) == (named, of)),
                "{arg} {axis}: {error}"
            );
        }
    }
    // More ranks than are left.
    let error = refused_forward(|op| op.projections[0].b = Matrix::new(1 << 41, 6, 6));
    assert_eq!(error, Error::Dimension { arg: "b of projection 0", axis: "columns", got: 6, expected: 5 });
    for (at, arg) in [(0, "w of projection 0"), (1, "w of projection 1")] {
        let error = refused_forward(|op| op.projections[at].w.rows = 0);
        assert_eq!(error, Error::ZeroDimension { arg, axis: "rows" });
    }
}

fn enlarge(matrix: &mut Matrix, axis: &str) {
    if axis == "rows" {
        matrix.rows += 1;
    } else {
        (matrix.cols, matrix.row_stride) = (matrix.cols + 1, matrix.row_stride + 1);
    }
}

#[test]
fn strides_and_addresses_are_named() {
    for at in 0..forward_arguments(&mut forward()).len() {
        let (named, cols) = (forward_arguments(&mut forward())[at].0, forward_arguments(&mut forward())[at].1.cols);
        let error = refused_forward(|op| forward_arguments(op).swap_remove(at).1.row_stride -= 1);
        assert_eq!(error, Error::Stride { arg: named, got: cols - 1, min: cols });
        let error = refused_forward(|op| forward_arguments(op).swap_remove(at).1.ptr = 0);
        assert_eq!(error, Error::NullPointer { arg: named });
        let error = refused_forward(|op| forward_arguments(op).swap_remove(at).1.ptr += 1);
        assert!(matches!(error, Error::Misaligned { arg, align: 2, .. } if arg == named), "{error}");
    }
    for at in 0..backward_arguments(&mut backward()).len() {
        let named = backward_arguments(&mut backward())[at].0;
        let error = refused_backward(|op| backward_arguments(op).swap_remove(at).1.ptr = 0);
        assert_eq!(error, Error::NullPointer { arg: named });
    }
}

/// Every output on the last element of every other argument.
#[test]
fn overlaps_are_named() {
    let names: Vec<_> = forward_arguments(&mut forward()).into_iter().map(|(name, _)| name).collect();
    for output in 8..names.len() {
        for other in (0..names.len()).filter(|&other| other != output) {
            let error = refused_forward(|op| {
                let mut arguments = forward_arguments(op);
                let last = arguments[other].1.ptr + 2 * (arguments[other].1.rows * arguments[other].1.cols - 1) as u64;
                arguments[output].1.ptr = last;
            });
            let (output, other) = (names[output.max(other)], names[output.min(other)]);
            assert_eq!(error, Error::Overlap { output, other });
        }
    }
    let names: Vec<_> = backward_arguments(&mut backward()).into_iter().map(|(name, _)| name).collect();
    for output in 9..names.len() {
        for other in 0..output {
            let error = refused_backward(|op| {
                let mut arguments = backward_arguments(op);
                arguments[output].1.ptr = arguments[other].1.ptr;
            });
            assert_eq!(error, Error::Overlap { output: names[output], other: names[other] });
        }
    }
}

/// A fused weight: rows of one w, columns of one y and of one dy, which interleave.
#[test]
fn parts_of_one_matrix_are_legal() {
    let rows = |ptr: u64, first: usize, rows| Matrix::new(ptr + 2 * (first * K) as u64, rows, K);
    let columns = |ptr: u64, first: usize, cols| Matrix { ptr: ptr + 2 * first as u64, rows: M, cols, row_stride: 13 };
    let mut op = forward();
    let mut gradients = backward();
    for (at, (first, n)) in [(0, 6), (6, 7)].into_iter().enumerate() {
        (op.projections[at].w, op.projections[at].y) = (rows(1 << 41, first, n), columns(1 << 42, first, n));
        (gradients.projections[at].w, gradients.projections[at].dy) =
            (rows(1 << 41, first, n), columns(1 << 42, first, n));
    }
    assert!(op.check().is_ok() && gradients.check().is_ok());
    op.projections[1].y.ptr -= 2;
    assert_eq!(op.check(), Err(Error::Overlap { output: "y of projection 1", other: "y of projection 0" }));
}

#[test]
fn what_is_missing_or_cannot_be_is_named() {
    for got in [f32::NAN, f32::INFINITY] {
        let error = refused_forward(|op| op.projections[1].scale = got);
        assert!(matches!(error, Error::Scale { arg: "scale of projection 1", .. }), "{error}");
    }
    let error = refused_backward(|op| {
        op.dropout = Some(Dropout { p: 0.9, seed: Seed::Value { seed: 1, offset: 2 } });
        op.projections[0].scale = f32::MAX;
    });
    assert_eq!(error, Error::Scale { arg: "scale of projection 0", got: f32::INFINITY });
    let routes = Some(Matrix::new(1 << 43, 1, 5));
    assert_eq!(refused_forward(|op| op.routes = routes), Error::RoutedProjections { got: 2 });
    assert_eq!(refused_backward(|op| op.routes = routes), Error::RoutedProjections { got: 2 });
    assert_eq!(refused_backward(|op| op.x = None), Error::Missing { arg: "x", output: "da" });
    let error = refused_backward(|op| (op.h, op.projections[0].db) = (None, None));
    assert_eq!(error, Error::Missing { arg: "h", output: "db of projection 1" });
    let error = refused_backward(|op| {
        (op.dx, op.da) = (None, None);
        op.projections.iter_mut().for_each(|of| (of.db, of.dbias) = (None, None));
    });
    assert!(matches!(error, Error::NoOutput { .. }), "{error}");
    let vector = Matrix::new(1 << 44, 1, 7);
    let error = refused_backward(|op| {
        let y = op.projections[1].dy;
        let dm = Matrix { ptr: 1 << 45, ..vector };
        op.projections[1].dm = Some(MagnitudeGradient { y, bias: None, magnitude: vector, dm });
    });
    assert_eq!(error, Error::Missing { arg: "gain of projection 1", output: "dm of projection 1" });
    let error = refused_forward(|op| {
        op.projections[1].gain = Some(vector);
        op.dropout = Some(Dropout { p: 0.5, seed: Seed::Value { seed: 1, offset: 2 } });
    });
    assert_eq!(error, Error::Exclusive { arg: "gain of projection 1", other: "dropout" });
}

/// A buffer that ends too early, and nothing is written.
#[test]
fn short_buffers_are_named() {
    let spec = SharedSpec::new(3, 4, &[(5, 2), (6, 1)]);
    let mut op = spec.forward::<bf16>();
    op.own[1].b.data.pop();
    let before = format!("{op:?}");
    let got = op.own[1].b.data.len();
    let error = Error::BufferTooShort { arg: "b of projection 1", got, needed: got + 1 };
    assert_eq!(cpu::forward_shared(op.views()), Err(error));
    assert_eq!(format!("{op:?}"), before);
    let mut op = spec.backward::<bf16>();
    op.own[1].dy.data.pop();
    let before = format!("{op:?}");
    let got = op.own[1].dy.data.len();
    let error = Error::BufferTooShort { arg: "dy of projection 1", got, needed: got + 1 };
    let result: Result<()> = cpu::backward_shared(op.views());
    assert_eq!(result, Err(error));
    assert_eq!(format!("{op:?}"), before);
}
