//! DoRA in layers: the gain, the gradient of the magnitude, several adapters in order, folding, and what is refused.

#![allow(clippy::panic, clippy::unwrap_used)] // how a test fails

mod common;

use common::data::{Placement, Rng, Spec};
use common::golden::{self, Golden};
use common::layers::{self, Device, assert_same, bits, compact, download};
use common::row_factors::rows_times_and_over;
use common::{Host, HostBackward, HostForward, HostMagnitude, check};
use fused_lora::cpu::Cpu;
use fused_lora::linear::{Adapter, Backend, BuffersMut, Gradients, LoraLinear, Magnitude, Scaling, Training};
use fused_lora::reference::{self, Mat, unit_roundoff};
use fused_lora::{Dropout, Dtype, Element, Error, Matrix, MatrixMut, Result, Seed, bf16, f16};

fn table() -> [Spec; 4] {
    let strided = Spec { placement: Placement::Strided, scale: -0.5, ..Spec::new(70, 40, 72, 5) };
    let ragged = Spec { bias: false, accumulate: true, ..Spec::new(33, 65, 24, 16) };
    let without_ranks = Spec { scale: 3.0, ..Spec::new(3, 9, 17, 0) };
    [Spec::new(16, 24, 40, 8), strided, ragged, without_ranks].map(|spec| Spec { dora: true, ..spec })
}

fn matrix<T>(rows: usize, cols: usize, data: Vec<T>) -> Host<T> {
    Host { rows, cols, offset: 0, row_stride: cols, data }
}

/// A layer with the active adapter "one", and what forward reads of it; the gain is what f64 makes of the magnitude.
struct Made<B: Backend, T: Element> {
    layer: LoraLinear<B, T>,
    forward: HostForward<T>,
    magnitude: Host<f32>,
    a32: Vec<f32>,
    b32: Vec<f32>,
}

fn make<B: Backend, T: Element>(backend: &B, spec: &Spec, f32_factors: bool) -> Made<B, T> {
    let Spec { n, k, r, .. } = *spec;
    let layers::Made { mut layer, mut forward, a32, b32 } = layers::make::<B, T>(backend, spec, f32_factors);
    let wide = |values: &[T]| values.iter().map(|value| value.to_f32()).collect::<Vec<f32>>();
    let (a32, b32) = if f32_factors { (a32, b32) } else { (wide(&forward.a.data), wide(&forward.b.data)) };
    let (a, b) = (matrix(r, k, a32.clone()).to_mat(), matrix(n, r, b32.clone()).to_mat());
    let norm = reference::norm(&forward.w.to_mat(), &a, &b, f64::from(spec.scale));
    let wanted = compact(forward.gain.as_ref().expect("a gain"));
    let magnitude: Vec<f32> = (0..n).map(|at| (f64::from(wanted.data[at]) * norm.at(0, at)) as f32).collect();
    let gain = (0..n).map(|at| (f64::from(magnitude[at]) / norm.at(0, at)) as f32).collect();
    forward.gain = Some(matrix(1, n, gain));
    let adapter = layer.remove("one").expect("an adapter").with_magnitude(backend, &magnitude).expect("a magnitude");
    layer.add("one", adapter).expect("an added adapter");
    layer.activate("one").expect("an adapter");
    Made { layer, forward, magnitude: matrix(1, n, magnitude), a32, b32 }
}

/// Forward, and forward with backward, that keeps h or computes it again; all gradients held to the oracle.
fn computes<B: Backend<Words = [u64]>, T: Element>(backend: &B) {
    for (at, spec) in table().into_iter().enumerate() {
        let Spec { m, n, r, .. } = spec;
        let Made { layer, forward, magnitude, .. } = make::<B, T>(backend, &spec, at % 2 == 0);
        let x = Device::new(backend, &forward.x);
        let y = download(backend, &layer.forward(x.view()).expect("forward"), m * n);
        let after = HostForward { y: matrix(m, n, y.clone()), h: None, ..forward.clone() };
        let poisoned = HostForward { y: matrix(m, n, vec![T::from_f32(f32::NAN); m * n]), ..after.clone() };
        check::judge_forward(&poisoned, &after, spec.values).unwrap_or_else(|wrong| panic!("{spec:?}: {wrong}"));
        for recompute in [false, true] {
            // A probability of 0 is no dropout.
            let dropout = recompute.then_some(Dropout { p: 0.0, seed: Seed::Value { seed: 1, offset: 2 } });
            let (trained, pass) =
                layer.forward_train_with(x.view(), Training { dropout, recompute }).expect("forward_train");
            assert_same(&bits(&download(backend, &trained, m * n)), &bits(&y), "forward_train and forward");
            let h = layer.forward_train(x.view()).expect("forward_train").1;
            let h = h.h().map(|h| download(backend, h, m * r)).unwrap_or_default();
            let given = spec.backward::<T>();
            let dm = given.magnitude.as_ref().expect("dm").dm.clone();
            let start = HostBackward {
                w: forward.w.clone(),
                a: forward.a.clone(),
                b: forward.b.clone(),
                x: Some(forward.x.clone()),
                h: Some(matrix(m, r, h)),
                gain: forward.gain.clone(),
                magnitude: Some(HostMagnitude {
                    y: matrix(m, n, y.clone()),
                    bias: forward.bias.clone(),
                    magnitude: magnitude.clone(),
                    dm,
                }),
                ..given
            };
            let end = layers::backward(backend, &layer, &pass, &start);
            check::judge_backward(&start, &end, spec.values).unwrap_or_else(|wrong| panic!("{spec:?}: {wrong}"));
        }
    }
}

/// W' = gain ∘ (W + s · B A) from the bits of the gain that f32 makes of the magnitude, and back; for good, the gain of another
/// adapter follows the new W.
fn merges<B: Backend, T: Element>(backend: &B) {
    for (at, spec) in table().into_iter().enumerate() {
        let Spec { m, n, k, r, .. } = spec;
        let Made { mut layer, forward, magnitude, a32, b32 } = make::<B, T>(backend, &spec, at % 2 == 1);
        let x = Device::new(backend, &forward.x);
        let y = |layer: &LoraLinear<B, T>| download(backend, &layer.forward(x.view()).expect("forward"), m * n);
        let weight = |layer: &LoraLinear<B, T>| download(backend, layer.weight(), n * k);
        let beside = y(&layer);
        layer.merge().expect("a merge");
        let merged = weight(&layer);
        let norm = reference::norm(
            &forward.w.to_mat(),
            &matrix(r, k, a32.clone()).to_mat(),
            &matrix(n, r, b32.clone()).to_mat(),
            f64::from(spec.scale),
        );
        for row in 0..n {
            let gain = f64::from(magnitude.data[row]) / norm.at(0, row);
            for col in 0..k {
                let dot = |size: fn(f64) -> f64| -> f64 {
                    let term = |rank: usize| f64::from(b32[row * r + rank]) * f64::from(a32[rank * k + col]);
                    (0..r).map(|rank| size(term(rank))).sum()
                };
                let w = forward.w.data[row * k + col].to_f64();
                let truth = gain * (w + f64::from(spec.scale) * dot(|v| v));
                let limit = gain.abs() * (w.abs() + f64::from(spec.scale.abs()) * dot(f64::abs));
                let got = merged[row * k + col].to_f64();
                let u32 = unit_roundoff(Dtype::F32);
                let bound = unit_roundoff(T::DTYPE) * truth.abs() + (r + k + 8) as f64 * u32 * limit + 1e-8;
                assert!((got - truth).abs() <= bound, "{spec:?}: merged {row}, {col} is {got}, expected {truth}");
            }
        }
        let bias = forward.bias.as_ref().map(|bias| &bias.data[..]);
        let plain = LoraLinear::upload(backend.clone(), &merged, bias, n, k).expect("a layer");
        assert_same(&bits(&y(&layer)), &bits(&y(&plain)), "forward while merged");
        layer.unmerge().expect("an unmerge");
        assert_same(&bits(&weight(&layer)), &bits(&forward.w.data), "unmerged");
        assert_same(&bits(&y(&layer)), &bits(&beside), "forward after unmerge");

        // Another one of DoRA stays, and has the gain over the new W.
        let magnitudes: Vec<f32> = (0..n).map(|at| 1.0 + at as f32 / 8.0).collect();
        let dora = || {
            let (a, b) = (vec![T::from_f32(0.25); k], vec![T::from_f32(-0.5); n]);
            let adapter = Adapter::upload(backend, 1, Scaling::Fixed(2.0), &a, &b).expect("an adapter");
            adapter.with_magnitude(backend, &magnitudes).expect("a magnitude")
        };
        layer.add("stays", dora()).expect("added");
        let folded = layer.merge_for_good().expect("a merge");
        assert_eq!(
            folded.iter().map(|(name, adapter)| (&**name, adapter.has_magnitude())).collect::<Vec<_>>(),
            [("one", true)]
        );
        assert_same(&bits(&weight(&layer)), &bits(&merged), "merged for good");
        layer.activate("stays").expect("an adapter");
        let mut fresh = LoraLinear::upload(backend.clone(), &merged, bias, n, k).expect("a layer");
        fresh.add("stays", dora()).expect("added");
        fresh.activate("stays").expect("an adapter");
        assert_same(&bits(&y(&layer)), &bits(&y(&fresh)), "with the gain over the new W");
    }
}

/// The sizes and names of the adapters of `several`; capitals are of DoRA.
const SEVERAL: [(&str, usize, f64); 4] = [("p", 4, 2.0), ("q", 3, -0.5), ("D", 5, 1.5), ("E", 2, 0.25)];

struct Several {
    w: Mat,
    bias: Vec<f64>,
    x: Mat,
    /// A, B, magnitude.
    adapters: Vec<(Mat, Mat, Option<Vec<f32>>)>,
}

/// PEFT's own words: the result so far, and what each adapter adds to it, in order. Also with every term positive.
fn in_order(of: &Several, order: &[&str]) -> [Mat; 2] {
    [false, true].map(|positive| {
        let size = |value: f64| if positive { value.abs() } else { value };
        let abs = |mat: &Mat| mat.map(size);
        let base = abs(&of.x).times(&abs(&of.w).transposed());
        let biased = |result: &Mat| Mat::from_fn(result.rows, result.cols, |i, j| result.at(i, j) + size(of.bias[j]));
        let mut result = biased(&base);
        for name in order {
            let at = SEVERAL.iter().position(|(known, ..)| known == name).expect("a name");
            let ((a, b, magnitude), (_, _, scale)) = (&of.adapters[at], SEVERAL[at]);
            let lora = abs(&of.x).times(&abs(a).transposed()).times(&abs(b).transposed()).map(|v| size(scale) * v);
            let norm = reference::norm(&of.w, a, b, scale);
            result = Mat::from_fn(result.rows, result.cols, |i, j| match magnitude {
                None => result.at(i, j) + lora.at(i, j),
                Some(magnitude) => {
                    let gain = size(f64::from(magnitude[j]) / norm.at(0, j));
                    let bias = size(of.bias[j]);
                    // result + (gain - 1) (result - bias) + gain lora
                    gain * (result.at(i, j) - bias) + bias + gain * lora.at(i, j)
                }
            });
        }
        result
    })
}

/// Every order of plain adapters and those of DoRA, together and folded, against PEFT's loop in f64.
fn several<B: Backend, T: Element>(backend: &B, orders: &[&[&str]]) {
    let (m, n, k) = (12, 20, 28);
    let mut rng = Rng(11);
    let mut numbers = |count: usize| (0..count).map(|_| T::from_f64(rng.unit())).collect::<Vec<T>>();
    let (w, bias, x) = (numbers(n * k), numbers(n), numbers(m * k));
    let mut layer = LoraLinear::upload(backend.clone(), &w, Some(&bias), n, k).expect("a layer");
    let wide = |rows, cols, values: &[T]| matrix(rows, cols, values.to_vec()).to_mat();
    let mut of = Several {
        w: wide(n, k, &w),
        bias: bias.iter().map(|value| value.to_f64()).collect(),
        x: wide(m, k, &x),
        adapters: Vec::new(),
    };
    for (name, r, scale) in SEVERAL {
        let (a, b) = (numbers(r * k), numbers(n * r));
        let mut adapter = Adapter::upload(backend, r, Scaling::Fixed(scale), &a, &b).expect("an adapter");
        let magnitude = name.chars().all(char::is_uppercase).then(|| {
            (0..n).map(|at| (1.5 + at as f32 / 8.0) * if at % 3 == 0 { -1.0 } else { 1.0 }).collect::<Vec<f32>>()
        });
        if let Some(magnitude) = &magnitude {
            adapter = adapter.with_magnitude(backend, magnitude).expect("a magnitude");
        }
        layer.add(name, adapter).expect("added");
        of.adapters.push((wide(r, k, &a), wide(n, r, &b), magnitude));
    }
    let x = backend.upload(&x).expect("an upload");
    let x = Matrix::new(B::read(&x), m, k);
    for order in orders {
        let [truth, size] = in_order(&of, order);
        layer.activate_all(order).expect("the adapters");
        let beside = download(backend, &layer.forward(x).expect("forward"), m * n);
        layer.merge().expect("a merge");
        let merged = download(backend, &layer.forward(x).expect("forward"), m * n);
        layer.unmerge().expect("an unmerge");
        for (what, y) in [("beside", beside), ("merged", merged)] {
            for (at, value) in y.iter().enumerate() {
                // Roundings of y, h and B, or of W' once for each adapter; B has two for another scale and a gain.
                let u = (2.0 + order.len() as f64) * unit_roundoff(T::DTYPE) + 80.0 * unit_roundoff(Dtype::F32);
                let (got, truth) = (value.to_f64(), truth.data[at]);
                let bound = u * size.data[at];
                assert!((got - truth).abs() <= bound, "{order:?} {what} {at}: {got}, expected {truth} ± {bound}");
            }
        }
    }
}

const ORDERS: &[&[&str]] = &[
    &["p", "D"],
    &["D", "p"],
    &["D", "E"],
    &["E", "D"],
    &["p", "D", "q"],
    &["D", "p", "E"],
    &["D", "p", "q"],
    &["p", "q", "D"],
    &["p", "D", "q", "E"],
    &["E", "q", "D", "p"],
];

/// What is made of the magnitude, of A and of B is made anew when they change; a pass from before is refused then.
fn follows_changes<B: Backend, T: Element>(backend: &B) {
    let spec = Spec { dora: true, ..Spec::new(10, 24, 40, 8) };
    let Made { mut layer, forward, a32, b32, magnitude } = make::<B, T>(backend, &spec, true);
    let Spec { m, n, k, r, .. } = spec;
    let x = Device::new(backend, &forward.x);
    let y = |layer: &LoraLinear<B, T>| bits(&download(backend, &layer.forward(x.view()).expect("forward"), m * n));
    let (_, pass) = layer.forward_train(x.view()).expect("forward_train");
    let other: Vec<f32> = magnitude.data.iter().map(|value| -2.0 * value).collect();
    let (a, b) = (a32.iter().map(|a| a * 1.5).collect::<Vec<_>>(), b32.iter().map(|b| 0.5 - b).collect::<Vec<_>>());
    let changes: [(&[f32], &[f32], &[f32]); 3] = [(&a32, &b32, &other), (&a, &b32, &other), (&a, &b, &other)];
    for (a, b, magnitude) in changes {
        let before = y(&layer);
        layer.activate_all(&["one", "other"]).expect("adapters");
        layer
            .update("one", |parts| {
                let BuffersMut::F32 { a: to_a, b: to_b, magnitude: Some(to), .. } = parts else {
                    unreachable!("f32 with a magnitude")
                };
                backend.overwrite(a, to_a)?;
                backend.overwrite(b, to_b)?;
                backend.overwrite(magnitude, to)
            })
            .expect("an update");
        let together = y(&layer);
        layer.activate_all(&["one", "other"]).expect("adapters");
        assert_same(&y(&layer), &together, "together, made anew");
        layer.activate("one").expect("an adapter");
        assert_ne!(y(&layer), before);
        let adapter = Adapter::upload_f32(backend, r, Scaling::Fixed(f64::from(spec.scale)), a, b).expect("an adapter");
        let bias = forward.bias.as_ref().map(|bias| &bias.data[..]);
        let mut fresh = LoraLinear::upload(backend.clone(), &forward.w.data, bias, n, k).expect("a layer");
        fresh.add("one", adapter.with_magnitude(backend, magnitude).expect("a magnitude")).expect("added");
        fresh.activate("one").expect("an adapter");
        assert_same(&y(&layer), &y(&fresh), "as a layer made with what it was changed to");
    }
    let dy = Device::new(backend, &compact(&spec.backward::<T>().dy));
    let of_old = layer.backward(&pass, dy.view(), Gradients::default());
    assert!(matches!(of_old, Err(Error::State { operation: "backward", .. })), "{of_old:?}");
}

/// A new adapter of DoRA has the norms for a magnitude.
fn starts_with_the_norms<B: Backend, T: Element>(backend: &B) {
    for (at, spec) in table().into_iter().enumerate() {
        let Made { mut layer, forward, a32, b32, .. } = make::<B, T>(backend, &spec, at % 2 == 0);
        let Spec { n, k, r, .. } = spec;
        let adapter = Adapter::upload_f32(backend, r, Scaling::Fixed(f64::from(spec.scale)), &a32, &b32);
        layer.add_dora("new", adapter.expect("an adapter")).expect("added");
        let got = layer.adapter("new").and_then(Adapter::magnitude).expect("a magnitude");
        let got = download(backend, got, n);
        let (a, b) = (matrix(r, k, a32).to_mat(), matrix(n, r, b32).to_mat());
        let norm = reference::norm(&forward.w.to_mat(), &a, &b, f64::from(spec.scale));
        for (got, norm) in got.iter().zip(&norm.data) {
            let bound = (k + r) as f64 * unit_roundoff(Dtype::F32) * norm;
            assert!((f64::from(*got) - norm).abs() <= bound, "{got}, expected {norm}");
        }
        // What is refused comes back without one.
        let again = Adapter::upload(backend, 1, Scaling::Fixed(1.0), &vec![T::default(); k], &vec![T::default(); n]);
        let rejected = layer.add_dora("new", again.expect("an adapter")).unwrap_err();
        assert!(matches!(rejected.error, Error::AdapterName { .. }) && !rejected.value.has_magnitude());
    }
}

fn state<V: std::fmt::Debug>(got: Result<V>, named: &[&str]) {
    match got {
        Err(error @ Error::State { .. }) => {
            let text = error.to_string();
            assert!(named.iter().all(|name| text.contains(name)), "{text}: {named:?}");
        }
        other => panic!("{other:?}, expected an error that names {named:?}"),
    }
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    let (n, k) = (4, 3);
    let w: Vec<f32> = (0..n * k).map(|at| at as f32 - 5.0).collect();
    let mut layer = LoraLinear::upload(Cpu, &w, Some(&[0.5; 4]), n, k).expect("a layer");
    let adapter = || Adapter::upload(&Cpu, 1, Scaling::Fixed(1.0), &[1.0; 3], &[0.5; 4]).expect("an adapter");
    let dora = || adapter().with_magnitude(&Cpu, &[1.0, 2.0, 3.0, 4.0]).expect("a magnitude");
    layer.add("plain", adapter()).expect("added");
    layer.add("dora", dora()).expect("added");
    layer.add("biased", adapter().with_b_bias(&Cpu, &[1.0; 4]).expect("a bias")).expect("added");
    let short = layer.add("short", adapter().with_magnitude(&Cpu, &[1.0; 3]).expect("a magnitude")).unwrap_err();
    assert_eq!(short.error, Error::Dimension { arg: "magnitude", axis: "elements", got: 3, expected: 4 });
    assert_eq!(short.value.magnitude().map(Vec::len), Some(3));
    let both = layer.add("both", dora().with_b_bias(&Cpu, &[1.0; 4]).expect("a bias")).unwrap_err();
    assert_eq!(both.error, Error::Exclusive { arg: "magnitude", other: "b_bias" });
    assert_eq!(layer.names(), ["plain", "dora", "biased"]);

    state(layer.bank(&["plain", "dora"]).map(drop), &["bank", "`dora`", "DoRA"]);
    state(layer.activate_all(&["biased", "plain", "dora"]), &["activate_all", "`biased`", "`dora`"]);
    layer.activate_all(&["dora", "biased"]).expect("the other order");

    layer.activate("dora").expect("an adapter");
    let x = vec![1.0f32; 2 * k];
    let x = Matrix::new(&x[..], 2, k);
    let train = |p| {
        let dropout = Some(Dropout { p, seed: Seed::Value { seed: 1, offset: 2 } });
        layer.forward_train_with(x, Training { dropout, recompute: false }).map(drop)
    };
    state(train(0.1), &["forward_train", "`dora`", "dropout is 0.1"]);
    assert_eq!(train(1.5), Err(Error::Probability { got: 1.5 }));
    assert_eq!(train(0.0), Ok(()));
    layer.forward(x).expect("inference drops nothing");

    // dm: of an adapter with a magnitude alone, with the bias as it was, and y of the right size.
    let (y, pass) = layer.forward_train(x).expect("forward_train");
    let dy = vec![1.0f32; 2 * n];
    let mut dm = vec![7.0f32; n];
    let backward = |layer: &LoraLinear<Cpu, f32>, pass: &_, dm: &mut [f32]| {
        let magnitude = Magnitude { y: Matrix::new(&y[..], 2, n), dm: MatrixMut::new(dm, 1, n) };
        layer.backward(pass, Matrix::new(&dy[..], 2, n), Gradients { dm: Some(magnitude), ..Gradients::default() })
    };
    let short = |arg, got, needed| Error::BufferTooShort { arg, got, needed };
    let dimension = |arg, axis, got, expected| Error::Dimension { arg, axis, got, expected };
    let whole = (Matrix::new(&y[..], 2, n), (0, n, n, n));
    let views = [
        ((Matrix::new(&y[..], 1, n), whole.1), dimension("y", "rows", 1, 2)),
        ((Matrix::new(&y[..], 2, 3), whole.1), dimension("y", "columns", 3, 4)),
        ((whole.0.with_row_stride(3), whole.1), Error::Stride { arg: "y", got: 3, min: 4 }),
        ((whole.0.with_row_stride(5), whole.1), short("y", 8, 9)),
        ((whole.0.with_offset(1), whole.1), short("y", 8, 9)),
        ((whole.0, (0, 3, 3, n)), dimension("dm", "columns", 3, 4)),
        ((whole.0, (1, n, n, n)), short("dm", 4, 5)),
        ((whole.0, (0, n, 3, n)), Error::Stride { arg: "dm", got: 3, min: 4 }),
        ((whole.0, (0, n, n, 3)), short("dm", 3, 4)),
    ];
    for ((y, (offset, cols, stride, len)), error) in views {
        let dm = MatrixMut::new(&mut dm[..len], 1, cols).with_offset(offset).with_row_stride(stride);
        let gradients = Gradients { dm: Some(Magnitude { y, dm }), ..Gradients::default() };
        assert_eq!(layer.backward(&pass, Matrix::new(&dy[..], 2, n), gradients), Err(error));
    }
    layer.activate("plain").expect("an adapter");
    let (_, other) = layer.forward_train(x).expect("forward_train");
    state(backward(&layer, &other, &mut dm), &["backward", "DoRA"]);
    assert_eq!(dm, [7.0; 4], "nothing was written");
    backward(&layer, &pass, &mut dm).expect("backward");
    let expected: Vec<f32> = (0..n).map(|at| 2.0 * (y[at] - 0.5) / (at + 1) as f32).collect();
    assert_eq!(dm, expected);
    layer
        .update_bias(|bias| -> Result<()> {
            bias[0] = 9.0;
            Ok(())
        })
        .expect("an update");
    state(backward(&layer, &pass, &mut dm), &["backward", "bias"]);
    assert_eq!(dm, expected, "nothing was written");
    let dx_alone = layer.backward(
        &pass,
        Matrix::new(&dy[..], 2, n),
        Gradients { dbias: Some(MatrixMut::new(&mut dm[..], 1, n)), ..Gradients::default() },
    );
    assert_eq!(dx_alone, Ok(()), "nothing else reads the bias");
}

/// The bits that every backend gives.
fn row_factors<B: Backend, T: Element>(backend: &B) {
    for placement in Placement::ALL {
        rows_times_and_over::<B, T>(backend, &Spec { placement, ..Spec::new(2, 70, 129, 13) });
        rows_times_and_over::<B, T>(backend, &Spec { placement, ..Spec::new(2, 3, 65, 40) });
    }
}

#[test]
fn the_cpu_computes_it() {
    row_factors::<_, f32>(&Cpu);
    row_factors::<_, bf16>(&Cpu);
    row_factors::<_, f16>(&Cpu);
    computes::<_, f32>(&Cpu);
    computes::<_, bf16>(&Cpu);
    computes::<_, f16>(&Cpu);
    merges::<_, f32>(&Cpu);
    merges::<_, bf16>(&Cpu);
    follows_changes::<_, f32>(&Cpu);
    follows_changes::<_, bf16>(&Cpu);
    starts_with_the_norms::<_, f32>(&Cpu);
    starts_with_the_norms::<_, f16>(&Cpu);
}

#[test]
fn several_in_every_order_as_peft_on_the_cpu() {
    several::<_, f32>(&Cpu, ORDERS);
    several::<_, bf16>(&Cpu, ORDERS);
    several::<_, f16>(&Cpu, ORDERS);
}

#[test]
fn as_peft_recorded_on_the_cpu() {
    let case = Golden::load("dora");
    case.check::<_, f32>(&Cpu, golden::F32);
    case.check::<_, bf16>(&Cpu, golden::BF16);
    case.check::<_, f16>(&Cpu, golden::F16);
    case.check::<_, bf16>(&Cpu, golden::BF16_AMP);
}

#[cfg(all(feature = "emulator", feature = "cuda"))]
mod emulated {
    use super::*;
    use fused_lora::emulator::Emulator;
    use fused_lora::plan::Device;

    fn emulator(arch: u32) -> Emulator {
        Emulator::new(Device::of_arch("emulated", arch, 3))
    }

    #[test]
    fn the_kernels_compute_it() {
        row_factors::<_, bf16>(&emulator(80));
        row_factors::<_, f16>(&emulator(75));
        computes::<_, bf16>(&emulator(80));
        computes::<_, f16>(&emulator(90));
        merges::<_, bf16>(&emulator(80));
        follows_changes::<_, bf16>(&emulator(80));
        starts_with_the_norms::<_, f16>(&emulator(80));
    }

    #[test]
    fn several_in_order_as_peft() {
        several::<_, bf16>(&emulator(80), &ORDERS[..5]);
        several::<_, f16>(&emulator(90), &ORDERS[5..]);
    }

    #[test]
    fn as_peft_recorded() {
        for arch in [80, 90] {
            let case = Golden::load("dora");
            case.check::<_, bf16>(&emulator(arch), golden::BF16);
            case.check::<_, bf16>(&emulator(arch), golden::BF16_AMP);
            case.check::<_, f16>(&emulator(arch), golden::F16);
        }
    }
}
