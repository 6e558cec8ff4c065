//! Matrices of any dimensions, strides and offsets, to every operation of the CPU backend and to the planner: what is wrong is an
//! error that writes nothing, and nothing panics.

use std::cell::Cell;

use fused_lora::plan::{Device, Family, Launch, Options, Plan};
use fused_lora::{Accumulate, Dtype, Factors, Gradient, Matrix, MatrixMut, bf16, cpu, raw};
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::TestRunner;

/// Elements of every buffer.
const LEN: usize = 40;
const UNTOUCHED: f32 = 7.5;

/// rows, columns, distance between rows, offset.
type View = (usize, usize, usize, usize);

/// Mostly what a matrix of `rows` × `cols` could be, with gaps of `step` elements, sometimes anything.
fn view(rows: usize, cols: usize, step: usize) -> impl Strategy<Value = View> {
    let any = || select(vec![0, 1, 2, 3, 4, 7, 40, 41, 1 << 31, 1 << 61, usize::MAX / 2, usize::MAX]);
    let odd = move |usual: usize| prop_oneof![40 => Just(usual), 1 => any()];
    let row_stride = prop_oneof![20 => (0..3usize).prop_map(move |gap| cols + gap * step), 1 => any()];
    (odd(rows), odd(cols), row_stride, prop_oneof![20 => (0..4usize).prop_map(move |at| at * step), 1 => any()])
}

fn views(dims: [(usize, usize); 6], step: usize) -> impl Strategy<Value = [View; 6]> {
    dims.map(|(rows, cols)| view(rows, cols, step).boxed())
}

fn matrix<T>(data: &[T], (rows, cols, row_stride, offset): View) -> Matrix<'_, [T]> {
    Matrix::new(data, rows, cols).with_row_stride(row_stride).with_offset(offset)
}

fn matrix_mut<T>(data: &mut [T], (rows, cols, row_stride, offset): View) -> MatrixMut<'_, [T]> {
    MatrixMut::new(data, rows, cols).with_row_stride(row_stride).with_offset(offset)
}

/// Far from every other, as a raw matrix.
fn address(index: u64, (rows, cols, row_stride, offset): View) -> raw::Matrix {
    raw::Matrix { ptr: (index << 40).wrapping_add((offset as u64).wrapping_mul(2)), rows, cols, row_stride }
}

/// Where an operation may have written, after it succeeded or failed.
fn judge(result: fused_lora::Result<()>, outputs: &[(&[bf16], View)]) -> Result<(), TestCaseError> {
    for (data, (rows, cols, row_stride, offset)) in outputs {
        for (at, value) in data.iter().enumerate() {
            let is_element = result.is_ok()
                && at
                    .checked_sub(*offset)
                    .is_some_and(|at| *row_stride != 0 && at / row_stride < *rows && at % row_stride < *cols);
            prop_assert!(is_element || value.to_f32() == UNTOUCHED, "{result:?} wrote element {at}");
        }
    }
    Ok(())
}

/// The six matrices of forward, and dy, dx, da, db, dbias and merged; all but the number of tokens in steps of `step`.
fn cases(step: usize) -> impl Strategy<Value = ([View; 6], [View; 6])> {
    (1..4usize, 1..4usize, 1..4usize, 0..4usize).prop_flat_map(move |(m, n, k, r)| {
        let (n, k, r) = (n * step, k * step, r * step);
        let forward = [(m, k), (n, k), (r, k), (n, r), (m, r), (m, n)];
        let gradients = [(m, n), (m, k), (r, k), (n, r), (1, n), (n, k)];
        (views(forward, step), views(gradients, step))
    })
}

type Matrices = ([View; 6], [View; 6]);

fn run(cases: impl Strategy<Value = Matrices>, test: impl Fn(Matrices) -> Result<(), TestCaseError>) {
    let config = ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() };
    TestRunner::new(config).run(&cases, test).expect("no case fails");
}

#[test]
fn no_operation_panics() {
    let accepted = Cell::new(0);
    run(cases(1), |([x, w, a, b, h, y], [dy, dx, da, db, dbias, merged])| {
        let input = [bf16::ONE; LEN];
        let wide = [1.0f32; LEN];
        let fresh = || [bf16::from_f32(UNTOUCHED); LEN];

        let (mut out_h, mut out_y) = (fresh(), fresh());
        let result = cpu::forward(cpu::Forward {
            x: matrix(&input, x),
            w: matrix(&input, w),
            a: matrix(&input, a),
            b: matrix(&input, b),
            scale: 0.5,
            bias: Some(matrix(&input, dbias)),
            h: Some(matrix_mut(&mut out_h, h)),
            y: matrix_mut(&mut out_y, y),
            variant: Default::default(),
        });
        accepted.set(accepted.get() + u32::from(result.is_ok()));
        judge(result, &[(&out_h, h), (&out_y, y)])?;

        let mut out = [fresh(), fresh(), fresh(), fresh()];
        let [out_dx, out_da, out_db, out_dbias] = &mut out;
        let result = cpu::backward(cpu::Backward {
            dy: matrix(&input, dy),
            w: matrix(&input, w),
            a: matrix(&input, a),
            b: matrix(&input, b),
            scale: 0.5,
            x: Some(matrix(&input, x)),
            h: Some(matrix(&input, h)),
            dx: Some(matrix_mut(out_dx, dx)),
            da: Some(Gradient::Storage(matrix_mut(out_da, da))),
            db: Some(Gradient::Storage(matrix_mut(out_db, db))),
            dbias: Some(Gradient::Storage(matrix_mut(out_dbias, dbias))),
            dm: None,
            accumulate: Accumulate { dx: true, ..Accumulate::default() },
            variant: Default::default(),
        });
        judge(result, &[(&out[0], dx), (&out[1], da), (&out[2], db), (&out[3], dbias)])?;

        let mut out_merged = fresh();
        let factors = Factors::F32 { a: matrix(&wide, a), b: matrix(&wide, b) };
        let merge = cpu::Merge {
            w: Some(matrix(&input, w)),
            factors,
            scale: 0.5,
            gain: None,
            merged: matrix_mut(&mut out_merged, merged),
        };
        judge(cpu::merge(merge), &[(&out_merged, merged)])?;

        let (mut out_a, mut out_b) = (fresh(), fresh());
        let factors = Factors::F32 { a: matrix(&wide, a), b: matrix(&wide, b) };
        let (rounded_a, rounded_b) = (matrix_mut(&mut out_a, da), matrix_mut(&mut out_b, db));
        judge(
            cpu::round::<bf16, _>(cpu::Round { factors, scale: 0.5, divisor: None, rounded_a, rounded_b }),
            &[(&out_a, da), (&out_b, db)],
        )?;
        Ok(())
    });
    assert!(accepted.get() > 1000, "only {} cases compute anything", accepted.get());
}

/// In steps of 8 the Hopper kernels are planned, too.
#[test]
fn no_plan_panics() {
    let (portable, hopper) = (Cell::new(0), Cell::new(0));
    run(prop_oneof![cases(1), cases(8)].boxed(), |([x, w, a, b, h, y], [dy, dx, da, db, dbias, merged])| {
        let gradient = |index, view| Some(raw::Gradient { matrix: address(index, view), f32: true });
        let [rx, rw, ra, rb] = [(1, x), (2, w), (3, a), (4, b)].map(|(index, view)| address(index, view));
        let dtype = Dtype::F16;
        let forward = raw::Forward {
            dtype,
            x: rx,
            w: rw,
            f32_factors: false,
            a: ra,
            b: rb,
            scale: 0.5,
            bias: None,
            h: Some(address(5, h)),
            y: address(6, y),
            variant: raw::Variant::default(),
        };
        let backward = raw::Backward {
            dtype,
            dy: address(7, dy),
            w: rw,
            f32_factors: false,
            a: ra,
            b: rb,
            scale: 0.5,
            x: Some(rx),
            h: Some(address(5, h)),
            dx: Some(address(8, dx)),
            da: gradient(9, da),
            db: gradient(10, db),
            dbias: gradient(11, dbias),
            dm: None,
            accumulate: Accumulate::default(),
            variant: raw::Variant::default(),
        };
        for device in [Device::of_arch("test", 80, 108), Device::of_arch("test", 90, 132)] {
            let plans = [Plan::forward(&forward, &device), Plan::backward(&backward, &device)];
            prop_assert_eq!((plans[0].is_ok(), plans[1].is_ok()), (forward.check().is_ok(), backward.check().is_ok()));
            let only = Options::default().with_family(Family::Sm90);
            let others = [Plan::forward_with(&forward, &device, only), Plan::backward_with(&backward, &device, only)];
            for plan in plans.into_iter().chain(others).flatten() {
                let launch = plan.launch(1 << 50, plan.workspace_bytes());
                let planned = if plan.family() == Family::Sm90 { &hopper } else { &portable };
                planned.set(planned.get() + 1);
                prop_assert!(launch.is_ok() && !plan.explain().to_string().is_empty());
            }
        }
        let merge = raw::Merge {
            dtype,
            w: Some(rw),
            f32_factors: true,
            a: ra,
            b: rb,
            scale: 0.5,
            gain: None,
            merged: address(12, merged),
        };
        prop_assert_eq!(Launch::merge(&merge).is_ok(), merge.check().is_ok());
        let (rounded_a, rounded_b) = (address(13, da), address(14, db));
        let round = raw::Round {
            dtype,
            f32_factors: true,
            f32_rounded: false,
            a: ra,
            b: rb,
            scale: 0.5,
            divisor: None,
            rounded_a,
            rounded_b,
        };
        prop_assert_eq!(Launch::round(&round).is_ok(), round.check().is_ok());
        Ok(())
    });
    let counts = (portable.get(), hopper.get());
    assert!(counts.0 > 1000 && counts.1 > 500, "only {counts:?} plans");
}
