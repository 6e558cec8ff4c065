//! NaN, infinities, subnormals, overflow and −0, on every backend: they arrive where the formulas carry them, and nowhere else.

mod common;

use common::data::{Placement, Spec};
use common::every::{Any, Kind, backends};
use common::layers::{self, Device};
use common::{Backend, Host, HostBackward, HostDropout, HostForward, HostGradient, check};
use fused_lora::reference::{self, Inputs, Mat};
use fused_lora::{Element, Factors, Merge, bf16, f16, linear};
use rayon::prelude::*;

const SPECIALS: [f64; 3] = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];

/// A ragged shape for each kind, and a rank that is no multiple of a tile.
fn spec(kind: Kind, turn: usize) -> Spec {
    let spec = match kind {
        Kind::Ragged => Spec { placement: Placement::ALL[turn % 4], ..Spec::new(70, 67, 37, 13) },
        Kind::Hopper => {
            let (m, k) = if turn.is_multiple_of(4) { (131, 136) } else { (3, 72) };
            Spec { placement: common::hopper::PLACEMENTS[turn % 3], ..Spec::new(m, 72, k, 24) }
        }
    };
    let scale = if turn % 7 == 3 { 0.0 } else { -1.75 };
    Spec { scale, accumulate: turn % 2 == 1, f32_gradients: turn % 3 != 1, keep_h: turn % 5 != 2, ..spec }
}

/// First and last, both ways, and the middle.
fn place<T: Element>(host: &Host<T>, turn: usize) -> (usize, usize) {
    let (row, col) = (host.rows - 1, host.cols - 1);
    [(0, 0), (row, col), (0, col), (row, 0), (row / 2, col / 2)][turn % 5]
}

fn spoil<T: Element>(host: &mut Host<T>, value: f64, turn: usize) -> (usize, usize) {
    let (row, col) = place(host, turn);
    host.set(row, col, value);
    (row, col)
}

fn spoil_gradient<T: Element>(gradient: &mut HostGradient<T>, value: f64, turn: usize) -> (usize, usize) {
    match gradient {
        HostGradient::Storage(host) => spoil(host, value, turn),
        HostGradient::F32(host) => spoil(host, value, turn),
    }
}

const FORWARD: [&str; 6] = ["none", "x", "w", "a", "b", "bias"];
const BACKWARD: [&str; 11] = ["none", "dy", "w", "a", "b", "x", "h", "old dx", "old da", "old db", "old dbias"];

/// One argument of forward with one special element; all outputs hold NaN before.
fn forward<T: Element>(backend: &Any, kind: Kind, arg: &str, value: f64, turn: usize) {
    let spec = spec(kind, turn);
    let mut op = spec.forward::<T>();
    let outputs = [Some(&mut op.y), op.h.as_mut()];
    outputs.into_iter().flatten().for_each(|output| output.fill(|_, _| f64::NAN));
    let HostForward { x, w, a, b, bias, .. } = &mut op;
    let at = match (arg, bias) {
        ("none", _) => (0, 0),
        ("x", _) => spoil(x, value, turn),
        ("w", _) => spoil(w, value, turn),
        ("a", _) => spoil(a, value, turn),
        ("b", _) => spoil(b, value, turn),
        (_, Some(bias)) => spoil(bias, value, turn),
        _ => unreachable!("no argument {arg}"),
    };
    let before = op.clone();
    backend.forward(&mut op).expect("forward runs");
    if let Err(complaint) = check::judge_forward(&before, &op, spec.values) {
        unreachable!("{value} in {arg} at {at:?} on {}, {:?}, {spec:?}: {complaint}", backend.name(), T::DTYPE);
    }
}

/// One argument of backward with one special element, what is accumulated into among them; other outputs hold NaN before.
fn backward<T: Element>(backend: &Any, kind: Kind, arg: &str, value: f64, turn: usize) {
    let mut spec = spec(kind, turn);
    spec.accumulate |= arg.starts_with("old");
    let mut op = spec.backward::<T>();
    if !spec.accumulate {
        op.dx.iter_mut().for_each(|dx| dx.fill(|_, _| f64::NAN));
        for gradient in [&mut op.da, &mut op.db, &mut op.dbias].into_iter().flatten() {
            match gradient {
                HostGradient::Storage(host) => host.fill(|_, _| f64::NAN),
                HostGradient::F32(host) => host.fill(|_, _| f64::NAN),
            }
        }
    }
    let HostBackward { dy, w, a, b, x, h, dx, da, db, dbias, .. } = &mut op;
    let at = match (arg, x, h, dx, da, db, dbias) {
        ("none", ..) => (0, 0),
        ("dy", ..) => spoil(dy, value, turn),
        ("w", ..) => spoil(w, value, turn),
        ("a", ..) => spoil(a, value, turn),
        ("b", ..) => spoil(b, value, turn),
        ("x", Some(x), ..) => spoil(x, value, turn),
        ("h", _, Some(h), ..) => spoil(h, value, turn),
        ("old dx", _, _, Some(dx), ..) => spoil(dx, value, turn),
        ("old da", _, _, _, Some(da), ..) => spoil_gradient(da, value, turn),
        ("old db", _, _, _, _, Some(db), _) => spoil_gradient(db, value, turn),
        ("old dbias", _, _, _, _, _, Some(dbias)) => spoil_gradient(dbias, value, turn),
        _ => unreachable!("no argument {arg}"),
    };
    let before = op.clone();
    backend.backward(&mut op).expect("backward runs");
    if let Err(complaint) = check::judge_backward(&before, &op, spec.values) {
        unreachable!("{value} in {arg} at {at:?} on {}, {:?}, {spec:?}: {complaint}", backend.name(), T::DTYPE);
    }
}

/// Every argument with every special value on every backend; places, types, placements and options take turns.
fn spread(kind: Kind, args: &[&'static str], test: &str, case: impl Fn(&Any, &'static str, f64, usize) + Sync) {
    let cases: Vec<_> = args.iter().flat_map(|&arg| SPECIALS.map(|value| (arg, value))).collect();
    for (number, backend) in backends(kind, test).iter().enumerate() {
        let run =
            |(at, &(arg, value)): (usize, &(&'static str, f64))| case(backend, arg, value, at + at / 15 + 7 * number);
        // A GPU has one workspace here; the emulator computes in each thread.
        match backend {
            #[cfg(feature = "cuda")]
            Any::Gpu(_) => cases.iter().enumerate().for_each(run),
            _ => cases.par_iter().enumerate().for_each(run),
        }
    }
}

#[test]
fn in_forward_what_is_not_finite_goes_where_the_formula_says() {
    let test = "in_forward_what_is_not_finite_goes_where_the_formula_says";
    for kind in [Kind::Ragged, Kind::Hopper] {
        spread(kind, &FORWARD, test, |backend, arg, value, turn| match turn % 2 {
            0 => forward::<f16>(backend, kind, arg, value, turn),
            _ => forward::<bf16>(backend, kind, arg, value, turn),
        });
    }
}

#[test]
fn in_backward_what_is_not_finite_goes_where_the_formula_says() {
    let test = "in_backward_what_is_not_finite_goes_where_the_formula_says";
    for kind in [Kind::Ragged, Kind::Hopper] {
        spread(kind, &BACKWARD, test, |backend, arg, value, turn| match turn % 2 {
            0 => backward::<f16>(backend, kind, arg, value, turn),
            _ => backward::<bf16>(backend, kind, arg, value, turn),
        });
    }
}

#[test]
fn in_f32_what_is_not_finite_goes_where_the_formula_says() {
    for turn in 0..30 {
        for (at, arg) in FORWARD.iter().enumerate() {
            forward::<f32>(&Any::Cpu, Kind::Ragged, arg, SPECIALS[(turn + at) % 3], turn);
        }
        for (at, arg) in BACKWARD.iter().enumerate() {
            backward::<f32>(&Any::Cpu, Kind::Ragged, arg, SPECIALS[(turn + at) % 3], turn);
        }
    }
}

/// What dropout takes from x is gone, whatever it was: the adapter does not see it, the base product does.
fn is_gone<T: Element>(backend: &Any, value: f64) {
    let (m, k, seed) = (16, 37, [9, 1]);
    let keep = reference::keep(0.5, seed, m, k);
    let at = (0..k).find(|&k| keep.at(3, k) == 0.0).expect("one of many");
    let dropout = Some(HostDropout { p: 0.5, seed, in_memory: false });
    let spec = Spec { dropout, bias: false, ..Spec::new(m, 8, k, 4) };
    let what = format!("a dropped {value} on {}, {:?}", backend.name(), T::DTYPE);
    let mut op = spec.forward::<T>();
    op.x.set(3, at, value);
    backend.forward(&mut op).expect("forward runs");
    assert!(op.h.expect("h").to_mat().data.iter().all(|value| value.is_finite()), "h of {what}");
    let y = op.y.to_mat();
    (0..m).for_each(|i| (0..8).for_each(|n| assert_eq!(y.at(i, n).is_finite(), i != 3, "y ({i}, {n}) of {what}")));
    let mut op = spec.backward::<T>();
    op.x.as_mut().expect("x").set(3, at, value);
    backend.backward(&mut op).expect("backward runs");
    let Some(HostGradient::F32(da)) = &op.da else { unreachable!("the gradients are f32") };
    assert!(da.to_mat().data.iter().all(|value| value.is_finite()), "da of {what}");
}

#[test]
fn a_dropped_element_is_a_zero_whatever_it_was() {
    for backend in backends(Kind::Ragged, "a_dropped_element_is_a_zero_whatever_it_was") {
        SPECIALS.iter().for_each(|&value| is_gone::<f16>(&backend, value));
        SPECIALS.iter().for_each(|&value| is_gone::<bf16>(&backend, value));
    }
    SPECIALS.iter().for_each(|&value| is_gone::<f32>(&Any::Cpu, value));
}

/// Small, with a tail everywhere.
fn small(kind: Kind) -> Spec {
    let spec = if kind == Kind::Ragged { Spec::new(5, 7, 11, 3) } else { Spec::new(66, 72, 24, 8) };
    Spec { bias: false, scale: 1.0, ..spec }
}

fn all<T: Element>(host: &Host<T>, expected: impl Fn(usize, usize) -> f64, what: &str) {
    for row in 0..host.rows {
        for col in 0..host.cols {
            let (got, expected) = (host.data[host.index(row, col)], T::from_f64(expected(row, col)));
            let same = got.to_f32().to_bits() == expected.to_f32().to_bits();
            assert!(same, "{what} ({row}, {col}) is {got:?}, expected {expected:?}");
        }
    }
}

fn each_backend(test: &str, check: impl Fn(&Any, Kind)) {
    for kind in [Kind::Ragged, Kind::Hopper] {
        backends(kind, test).iter().for_each(|backend| check(backend, kind));
    }
}

/// The smallest subnormal, as an operand and as a product of `factor` and 1 / `factor` of it: sums of it are exact.
fn keeps_subnormals<T: Element>(backend: &Any, kind: Kind, smallest: f64, factor: f64) {
    let spec = small(kind);
    let (r, tiny) = (spec.r as f64, smallest / factor);
    let one = |row: usize, col: usize, cols: usize, value: f64| if row % cols == col { value } else { 0.0 };
    let mut op = spec.forward::<T>();
    op.x.fill(|i, j| one(i, j, spec.k, tiny));
    op.w.fill(|_, _| factor);
    op.a.fill(|_, _| factor);
    op.b.fill(|_, _| 1.0);
    backend.forward(&mut op).expect("forward runs");
    let what =
        |name: &str| format!("{name} of {smallest:e} = {tiny:e} · {factor:e} on {}, {:?}", backend.name(), T::DTYPE);
    all(op.h.as_ref().expect("h"), |_, _| smallest, &what("h"));
    all(&op.y, |_, _| smallest * (1.0 + r), &what("y"));

    let mut op = spec.backward::<T>();
    op.dy.fill(|i, j| one(i, j, spec.n, tiny));
    op.w.fill(|_, _| factor);
    op.a.fill(|_, _| 1.0);
    op.b.fill(|_, _| factor);
    op.x.as_mut().expect("x").fill(|_, _| 1.0);
    op.h.as_mut().expect("h").fill(|_, _| factor);
    backend.backward(&mut op).expect("backward runs");
    all(op.dx.as_ref().expect("dx"), |_, _| smallest * (1.0 + r), &what("dx"));
    let tokens = |n: usize| (0..spec.m).filter(|i| i % spec.n == n).count() as f64;
    let (Some(HostGradient::F32(da)), Some(HostGradient::F32(db)), Some(HostGradient::F32(dbias))) =
        (&op.da, &op.db, &op.dbias)
    else {
        unreachable!("gradients are f32")
    };
    all(da, |_, _| smallest * spec.m as f64, &what("da"));
    all(db, |n, _| smallest * tokens(n), &what("db"));
    all(dbias, |_, n| tiny * tokens(n), &what("dbias"));
}

#[test]
fn subnormals_are_kept() {
    let power = |exponent: i32| 2f64.powi(exponent);
    each_backend("subnormals_are_kept", |backend, kind| {
        for exponent in [0, -10] {
            keeps_subnormals::<f16>(backend, kind, power(-24), power(exponent));
            keeps_subnormals::<bf16>(backend, kind, power(-133), power(6 * exponent));
        }
    });
    for exponent in [0, -60] {
        keeps_subnormals::<f32>(&Any::Cpu, Kind::Ragged, power(-149), power(exponent));
    }
}

/// Sums at and around the largest f16: those from 65520 on are infinite. What passes it on the way is not.
#[test]
fn f16_overflows_to_infinity_where_the_sum_does() {
    each_backend("f16_overflows_to_infinity_where_the_sum_does", |backend, kind| {
        for (sum, expected) in [
            (65504.0, 65504.0),
            (65519.0, 65504.0),
            (65520.0, f64::INFINITY),
            (-65519.0, -65504.0),
            (-65520.0, f64::NEG_INFINITY),
            (1e9, f64::INFINITY),
        ] {
            let mut op = Spec { r: if kind == Kind::Ragged { 1 } else { 8 }, ..small(kind) }.forward::<f16>();
            // 60000 + 60000 − 60000 + the rest, of which at most 11 bits are in one term.
            let rest: f64 = sum - 60000.0;
            let large = (rest / 1024.0).trunc();
            let terms = [60000.0, 60000.0, -60000.0, 1024.0, rest - 1024.0 * large];
            op.x.fill(|_, k| terms.get(k).copied().unwrap_or(0.0));
            op.w.fill(|_, k| if k == 3 { large } else { 1.0 });
            op.a.fill(|_, k| if k == 5 { 1.0 } else { 0.0 });
            backend.forward(&mut op).expect("forward runs");
            all(&op.y, |_, _| expected, &format!("y of {sum} on {}", backend.name()));
        }
    });
}

fn inputs<T: Element>(op: &HostForward<T>) -> Inputs {
    let HostForward { x, w, a, b, bias, scale, .. } = op;
    let dy = Mat::from_fn(x.rows, w.rows, |_, _| 0.0);
    let bias = bias.as_ref().map(Host::to_mat);
    Inputs {
        x: x.to_mat(),
        w: w.to_mat(),
        a: a.to_mat(),
        b: b.to_mat(),
        bias,
        dy,
        scale: f64::from(*scale),
        keep: None,
        gate: None,
        gain: None,
    }
}

/// An h past the largest f16 is infinite, and y is what separate products make of that: infinite, or NaN where two meet.
#[test]
fn an_infinite_middle_goes_on_as_in_separate_products() {
    each_backend("an_infinite_middle_goes_on_as_in_separate_products", |backend, kind| {
        let mut op = small(kind).forward::<f16>();
        let k = op.x.cols;
        // Row 0: infinite; row 1: −infinite; others small. B of one sign in its even rows, of both in its odd ones.
        op.x.fill(|i, _| [256.0, -256.0, 0.5].get(i).copied().unwrap_or(0.25));
        op.a.fill(|_, _| 512.0 / k as f64);
        op.a.fill(|_, col| if col == 0 { 512.0 } else { 0.0 });
        op.b.fill(|n, r| if n % 2 == 1 && r == 0 { -1.0 } else { 0.5 });
        let (h, y) = reference::naive_forward::<f16>(&inputs(&op));
        assert!(
            h.data[0] == f64::INFINITY && y.data[0] == f64::INFINITY && y.data[1].is_nan(),
            "the data is too small"
        );
        backend.forward(&mut op).expect("forward runs");
        let class = |value: f64| if value.is_finite() { 0.0 } else { value };
        for (got, expected) in [(op.h.as_ref().expect("h"), h), (&op.y, y)] {
            for (at, (got, expected)) in got.to_mat().data.iter().zip(&expected.data).enumerate() {
                let (got, expected) = (class(*got), class(*expected));
                let same = got == expected || (got.is_nan() && expected.is_nan());
                assert!(same, "element {at} is {got} on {}, expected {expected}", backend.name());
            }
        }
    });
}

/// x, scale, bias, and the zeros that h and y are.
type Zeros = (f64, f32, Option<f64>, f64, f64);

fn zeros_are<T: Element>(backend: &Any, kind: Kind, tiny: f64, (x, scale, bias, h, y): Zeros) {
    let mut op = Spec { bias: bias.is_some(), scale, ..small(kind) }.forward::<T>();
    op.x.fill(|_, k| if k == 0 { x * tiny } else { -0.0 });
    op.w.fill(|_, _| tiny);
    op.a.fill(|_, _| tiny);
    op.b.fill(|_, _| 0.0);
    op.bias.iter_mut().for_each(|to| to.fill(|_, _| bias.unwrap_or(0.0)));
    backend.forward(&mut op).expect("forward runs");
    let what = |name| format!("{name} of {x:?}, scale {scale}, bias {bias:?} on {}, {:?}", backend.name(), T::DTYPE);
    all(op.h.as_ref().expect("h"), |_, _| h, &what("h"));
    all(&op.y, |_, _| y, &what("y"));
}

fn zeros_are_on_every_backend(test: &str, zeros: &[Zeros]) {
    each_backend(test, |backend, kind| {
        for &zeros in zeros {
            zeros_are::<f16>(backend, kind, 2f64.powi(-14), zeros);
            zeros_are::<bf16>(backend, kind, 2f64.powi(-68), zeros);
        }
    });
    zeros.iter().for_each(|&zeros| zeros_are::<f32>(&Any::Cpu, Kind::Ragged, 2f64.powi(-80), zeros));
}

/// Sums begin at +0, so that one of nothing but −0 is +0; what is rounded to 0 keeps its sign.
#[test]
fn zeros_are_signed_as_sums_that_begin_at_zero() {
    let zeros = [
        (-0.0, 1.0, None, 0.0, 0.0),
        (-0.0, 1.0, Some(-0.0), 0.0, 0.0),
        (-1.0, 1.0, None, -0.0, -0.0),
        (1.0, -1.0, None, -0.0, 0.0),
    ];
    zeros_are_on_every_backend("zeros_are_signed_as_sums_that_begin_at_zero", &zeros);
}

/// As round(s · round(x Aᵀ)) has it.
#[test]
fn a_negative_scale_makes_minus_zero_of_zero() {
    let zeros = [(-0.0, -2.0, None, -0.0, 0.0)];
    zeros_are_on_every_backend("a_negative_scale_makes_minus_zero_of_zero", &zeros);
}

/// Merge has the bits of its formula with special values in W, A and B, too.
fn merges<B: linear::Backend, T: Element>(backend: &B) {
    for (turn, value) in SPECIALS.into_iter().chain([-0.0, 2f64.powi(-24), 60000.0]).enumerate() {
        for arg in 0..3 {
            let HostForward { mut w, mut a, mut b, .. } = Spec::new(1, 67, 70, 5).forward::<T>();
            let target = [&mut w, &mut a, &mut b].into_iter().nth(arg).expect("an argument");
            spoil(target, value, turn + arg);
            let scale = if turn == 2 { 0.0 } else { -1.5 };
            let wide = |host: &Host<T>| layers::widest(&host.data);
            let expected = layers::merged(&w.data, &wide(&a), &wide(&b), scale, (w.rows, w.cols, a.rows));
            let out = Host { data: vec![T::from_f32(f32::NAN); w.data.len()], ..w.clone() };
            let mut merged = Device::<B, T>::new(backend, &out);
            let [w, a, b] = [&w, &a, &b].map(|host| Device::<B, T>::new(backend, host));
            let factors = Factors::Storage { a: a.view(), b: b.view() };
            backend
                .merge(Merge { w: Some(w.view()), factors, scale, gain: None, merged: merged.view_mut() })
                .expect("a merge");
            for (at, (got, expected)) in merged.download(backend).data.iter().zip(&expected).enumerate() {
                let (got, expected) = (got.to_f32(), expected.to_f32());
                let same = got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan());
                assert!(same, "{value} in argument {arg}: element {at} is {got}, expected {expected}");
            }
        }
    }
}

#[test]
fn merge_carries_special_values_where_its_formula_does() {
    merges::<_, f16>(&fused_lora::cpu::Cpu);
    merges::<_, bf16>(&fused_lora::cpu::Cpu);
    merges::<_, f32>(&fused_lora::cpu::Cpu);
    #[cfg(all(feature = "emulator", feature = "cuda"))]
    {
        let emulator = common::emulated::Emulated::new(80, 2).0;
        merges::<_, f16>(&emulator);
        merges::<_, bf16>(&emulator);
    }
}
