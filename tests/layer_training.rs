//! Layers in training: dropout, passes that keep no h, biases, micro-batches.
#![allow(clippy::useless_vec, reason = "buffers are vectors, as a layer's are")]

mod common;

use common::HostDropout;
use common::data::{Rng, Spec};
use common::layers::{self, Device, Made, bits, compact};
use common::{Host, HostBackward, HostForward, HostGradient, check};
use fused_lora::cpu::Cpu;
use fused_lora::linear::{Adapter, Backend, BuffersMut, Gradients, LoraLinear, Pass, Scaling, Training};
use fused_lora::{Accumulate, Dropout, Element, Error, Matrix, MatrixMut, Result, Seed, bf16, f16};

fn value(p: f32, [seed, offset]: [u64; 2]) -> Dropout<'static, [u64]> {
    Dropout { p, seed: Seed::Value { seed, offset } }
}

/// A training pass of `layer` against the oracle of `spec`, and the bits of all that it gave.
fn pass_as_the_oracle<B: Backend<Words = [u64]>, T: Element>(
    backend: &B,
    layer: &LoraLinear<B, T>,
    before: &HostForward<T>,
    spec: &Spec,
    training: Training<'_, B>,
) -> Vec<Vec<u32>> {
    let x = Device::new(backend, &before.x);
    let (y, pass) = layer.forward_train_with(x.view(), training).expect("forward_train");
    assert_eq!(pass.h().is_none(), training.recompute || spec.r == 0);
    let plain = |rows, cols, data| Host { rows, cols, offset: 0, row_stride: cols, data };
    let y = plain(spec.m, spec.n, layers::download(backend, &y, spec.m * spec.n));
    let after = HostForward { y: y.clone(), h: None, dropout: spec.dropout, ..before.clone() };
    let poisoned = HostForward { y: plain(spec.m, spec.n, vec![T::from_f32(f32::NAN); y.data.len()]), ..after.clone() };
    check::judge_forward(&poisoned, &after, spec.values).expect("forward");

    // The oracle's db wants the h that forward rounded: that of a pass which keeps it.
    let kept = layer.forward_train_with(x.view(), Training { recompute: false, ..training }).expect("forward_train").1;
    let h = kept.h().map(|h| layers::download(backend, h, spec.m * spec.r)).unwrap_or_default();
    let start = HostBackward {
        w: before.w.clone(),
        a: before.a.clone(),
        b: before.b.clone(),
        scale: spec.scale,
        x: Some(before.x.clone()),
        h: Some(plain(spec.m, spec.r, h)),
        dropout: spec.dropout,
        ..spec.backward::<T>()
    };
    let gradient = |gradient: &Option<HostGradient<T>>| match gradient {
        Some(HostGradient::F32(host)) => bits(&compact(host).data),
        _ => Vec::new(),
    };
    let mut results = vec![bits(&y.data)];
    for _ in 0..2 {
        let end = layers::backward(backend, layer, &pass, &start);
        check::judge_backward(&start, &end, spec.values).expect("backward");
        results.push(end.dx.as_ref().map_or_else(Vec::new, |dx| bits(&compact(dx).data)));
        results.extend([&end.da, &end.db, &end.dbias].map(gradient));
    }
    assert_eq!(results[1..5], results[5..], "a pass used twice");
    results
}

/// `same_bits`: whether h computed again has the bits of h kept.
fn dropout_as_the_oracle<B: Backend<Words = [u64]>, T: Element>(backend: &B, same_bits: bool) {
    for (at, spec) in layers::layer_table().into_iter().enumerate() {
        let seed = [at as u64, 1 << (8 * at)];
        for p in [0.25, 1.0] {
            let dropped = Spec { dropout: Some(HostDropout { p, seed, in_memory: false }), ..spec };
            let Made { mut layer, forward, .. } = layers::make::<B, T>(backend, &dropped, at % 2 == 0);
            layer.activate("one").expect("an adapter");
            let x = Device::new(backend, &forward.x);
            let inference = || {
                let y = layer.forward(x.view()).expect("forward");
                bits(&layers::download(backend, &y, spec.m * spec.n))
            };
            let undropped = inference();
            let run = |training| pass_as_the_oracle(backend, &layer, &forward, &dropped, training);
            let words = [99, seed[0], seed[1]];
            let memory = Matrix::new(&words[..], 1, 2).with_offset(1);
            let (passed, lies) = (value(p, seed), Dropout { p, seed: Seed::Memory(memory) });
            let first = run(Training { dropout: Some(passed), recompute: false });
            for (dropout, recompute) in [(passed, true), (lies, false), (lies, true)] {
                let results = run(Training { dropout: Some(dropout), recompute });
                assert!(results == first || recompute && !same_bits, "{dropout:?} {recompute} {spec:?}");
            }
            assert_eq!(inference(), undropped, "inference drops nothing");
            if spec.r != 0 {
                assert_ne!(undropped, first[0], "something was dropped");
            }
        }
    }
}

#[test]
fn dropout_is_that_of_the_oracle() {
    dropout_as_the_oracle::<_, f32>(&Cpu, true);
    dropout_as_the_oracle::<_, bf16>(&Cpu, true);
    dropout_as_the_oracle::<_, f16>(&Cpu, true);
}

/// Without dropout, a pass that kept no h.
fn recomputes<B: Backend<Words = [u64]>, T: Element>(backend: &B, same_bits: bool) {
    for (at, spec) in layers::layer_table().into_iter().enumerate() {
        let Made { mut layer, forward, .. } = layers::make::<B, T>(backend, &spec, at % 2 == 0);
        layer.activate("one").expect("an adapter");
        layer.reserve(spec.m).expect("a workspace");
        let run =
            |recompute| pass_as_the_oracle(backend, &layer, &forward, &spec, Training { dropout: None, recompute });
        let (kept, again) = (run(false), run(true));
        assert!(!same_bits || kept == again, "{spec:?}");
    }
}

#[test]
fn h_can_be_computed_again() {
    recomputes::<_, f32>(&Cpu, true);
    recomputes::<_, bf16>(&Cpu, true);
}

#[cfg(all(feature = "emulator", feature = "cuda"))]
mod emulated {
    use super::*;
    use fused_lora::emulator::Emulator;
    use fused_lora::plan::Device;

    fn emulator() -> Emulator {
        Emulator::new(Device::of_arch("emulated", 80, 3))
    }

    #[test]
    fn dropout_is_that_of_the_oracle() {
        dropout_as_the_oracle::<_, bf16>(&emulator(), false);
    }

    #[test]
    fn h_can_be_computed_again() {
        recomputes::<_, bf16>(&emulator(), false);
    }
}

const M: usize = 6;
const N: usize = 5;
const K: usize = 7;
const R: usize = 3;

/// A layer in f32 with a bias and a bias on B, x and dy.
fn tiny() -> (LoraLinear<Cpu, f32>, Vec<f32>, Vec<f32>) {
    let mut rng = Rng(11);
    let mut values = |len| (0..len).map(|_| rng.unit() as f32).collect::<Vec<_>>();
    let (w, bias) = (values(N * K), values(N));
    let mut layer = LoraLinear::upload(Cpu, &w, Some(&bias), N, K).expect("a layer");
    let adapter = Adapter::upload_f32(&Cpu, R, Scaling::RsLora { alpha: 2.0 }, &values(R * K), &values(N * R));
    let adapter = adapter.and_then(|adapter| adapter.with_b_bias(&Cpu, &values(N))).expect("an adapter");
    layer.add("one", adapter).expect("an added adapter");
    layer.activate("one").expect("an adapter");
    (layer, values(M * K), values(M * N))
}

const DROPOUT: Dropout<'static, [u64]> = Dropout { p: 0.375, seed: Seed::Value { seed: 5, offset: 6 } };

/// The loss Σ dy ∘ y is linear in each element by itself, so that differences over ±1 are derivatives.
#[test]
fn gradients_are_differences_of_the_loss() {
    let (mut layer, mut x, dy) = tiny();
    let training = Training { dropout: Some(DROPOUT), recompute: true };
    let (mut dx, mut da, mut db, mut dbias) = (vec![0.0; M * K], vec![0.0; R * K], vec![0.0; N * R], vec![0.0; N]);
    {
        let (_, pass) = layer.forward_train_with(Matrix::new(&x[..], M, K), training).expect("forward");
        let gradients = Gradients {
            dx: Some(MatrixMut::new(&mut dx[..], M, K)),
            da: Some(MatrixMut::new(&mut da[..], R, K)),
            db: Some(MatrixMut::new(&mut db[..], N, R)),
            dbias: Some(MatrixMut::new(&mut dbias[..], 1, N)),
            ..Gradients::default()
        };
        layer.backward(&pass, Matrix::new(&dy[..], M, N), gradients).expect("backward");
    }
    let scale = layer.adapter("one").expect("an adapter").scale();
    let loss = |layer: &LoraLinear<Cpu, f32>, x: &[f32]| -> f64 {
        let (y, _) = layer.forward_train_with(Matrix::new(x, M, K), training).expect("forward");
        y.iter().zip(&dy).map(|(y, dy)| f64::from(*y) * f64::from(*dy)).sum()
    };
    let close = |what: &str, at: usize, difference: f64, gradient: f32| {
        let gradient = f64::from(gradient);
        assert!((difference / 2.0 - gradient).abs() <= 1e-5 * (1.0 + gradient.abs()), "{what} {at}: {gradient}");
    };
    for (what, gradient) in [("a", &da), ("b", &db), ("b_bias", &dbias), ("bias", &dbias)] {
        for at in 0..gradient.len() {
            let shifted = |layer: &mut LoraLinear<Cpu, f32>, by: f32| {
                let change = |factors: BuffersMut<'_, Cpu, f32>| -> Result<()> {
                    let BuffersMut::F32 { a, b, b_bias, .. } = factors else { unreachable!("f32 factors") };
                    match what {
                        "a" => a[at] += by,
                        "b" => b[at] += by,
                        _ => b_bias.expect("a bias on B")[at] += by,
                    }
                    Ok(())
                };
                if what == "bias" {
                    layer.update_bias(|bias| -> Result<()> {
                        bias[at] += by;
                        Ok(())
                    })
                } else {
                    layer.update("one", change)
                }
                .expect("an update");
                loss(layer, &x)
            };
            let difference = shifted(&mut layer, 1.0) - shifted(&mut layer, -2.0);
            shifted(&mut layer, 1.0);
            close(what, at, difference, if what == "b_bias" { scale * gradient[at] } else { gradient[at] });
        }
    }
    for at in 0..x.len() {
        let mut shifted = |by: f32| {
            x[at] += by;
            loss(&layer, &x)
        };
        let difference = shifted(1.0) - shifted(-2.0);
        shifted(1.0);
        close("x", at, difference, dx[at]);
    }
}

/// Rows of one batch in two passes, whose gradients add up in f32.
#[test]
fn micro_batches_add_up() {
    let spec = Spec { bias: false, ..Spec::new(12, 20, 33, 4) };
    let Made { mut layer, forward, .. } = layers::make::<Cpu, bf16>(&Cpu, &spec, true);
    layer.activate("one").expect("an adapter");
    let dy = spec.backward::<bf16>().dy.data;
    let gradients = |parts: &[(usize, usize)]| {
        let (mut da, mut db, mut dbias) = (vec![7.0; 4 * 33], vec![7.0; 20 * 4], vec![7.0; 20]);
        for (at, &(start, end)) in parts.iter().enumerate() {
            let matrix = |data, cols| Matrix::new(data, end - start, cols).with_offset(start * cols);
            let (_, pass) = layer.forward_train(matrix(&forward.x.data[..], 33)).expect("forward");
            let add = at > 0;
            let gradients = Gradients {
                dx: None,
                da: Some(MatrixMut::new(&mut da[..], 4, 33)),
                db: Some(MatrixMut::new(&mut db[..], 20, 4)),
                dbias: Some(MatrixMut::new(&mut dbias[..], 1, 20)),
                dm: None,
                accumulate: Accumulate { dx: false, da: add, db: add, dbias: add, dm: false },
            };
            layer.backward(&pass, matrix(&dy[..], 20), gradients).expect("backward");
        }
        [da, db, dbias].concat()
    };
    let (whole, parts) = (gradients(&[(0, 12)]), gradients(&[(0, 5), (5, 6), (6, 12)]));
    for (at, (whole, parts)) in whole.iter().zip(&parts).enumerate() {
        // Sums of 12 products of a size near 1, in another order.
        assert!((whole - parts).abs() <= 12.0 * 4.0 * f32::EPSILON, "{at}: {parts} in parts, {whole} at once");
    }
}

fn rounded_bias(bias: Option<&[bf16]>, own: &[(f32, &[f32])]) -> Vec<bf16> {
    let start = bias.map_or_else(|| vec![bf16::ZERO; N], <[bf16]>::to_vec);
    let add = |bias: Vec<bf16>, (scale, own): &(f32, &[f32])| -> Vec<bf16> {
        bias.iter().zip(*own).map(|(bias, own)| bf16::from_f32(bias.to_f32() + scale * own)).collect()
    };
    own.iter().fold(start, add)
}

/// A bf16 layer with adapters "f32" and "storage" that have biases, and "plain", which has none; and their biases.
fn biased(bias: Option<&[bf16]>) -> (LoraLinear<Cpu, bf16>, [Vec<f32>; 2]) {
    let mut rng = Rng(21);
    let mut values = |len| (0..len).map(|_| rng.unit() as f32).collect::<Vec<_>>();
    let narrow = |values: Vec<f32>| values.into_iter().map(bf16::from_f32).collect::<Vec<_>>();
    let mut layer = LoraLinear::upload(Cpu, &narrow(values(N * K)), bias, N, K).expect("a layer");
    let own = [values(N), narrow(values(N)).into_iter().map(bf16::to_f32).collect()];
    let scaling = |scale| Scaling::Fixed(scale);
    let f32 = Adapter::upload_f32(&Cpu, R, scaling(1.5), &values(R * K), &values(N * R));
    let storage = Adapter::upload(&Cpu, 2, scaling(-0.75), &narrow(values(2 * K)), &narrow(values(N * 2)));
    let plain = Adapter::upload_f32(&Cpu, R, scaling(1.0), &values(R * K), &values(N * R));
    let with = |adapter: Result<Adapter<Cpu, bf16>>, own: &[f32]| adapter.and_then(|it| it.with_b_bias(&Cpu, own));
    for (name, adapter) in [("f32", with(f32, &own[0])), ("storage", with(storage, &own[1])), ("plain", plain)] {
        layer.add(name, adapter.expect("an adapter")).expect("an added adapter");
    }
    (layer, own)
}

/// Everything that chooses, merges or changes an adapter, with biases on B: forward is that of a layer with the rounded sum.
#[test]
fn biases_on_b_are_part_of_the_bias() {
    let base: Vec<bf16> = (0..N).map(|at| bf16::from_f32(at as f32 * 0.3 - 0.5)).collect();
    for bias in [Some(&base[..]), None] {
        let (mut layer, [one, two]) = biased(bias);
        let x: Vec<bf16> = (0..M * K).map(|at| bf16::from_f32((at as f32).sin())).collect();
        let x = Matrix::new(&x[..], M, K);
        let y = |layer: &LoraLinear<Cpu, bf16>| layer.forward(x).expect("forward");
        let sums = |own: &[(f32, &[f32])]| rounded_bias(bias, own);
        // The same layer, the biases of whose adapters stand in the layer's own.
        let reference = |names: &[&str], sum: &[bf16]| {
            let (mut from, _) = biased(Some(sum));
            for name in names {
                from.update(name, |factors| -> Result<()> {
                    match factors {
                        BuffersMut::F32 { b_bias, .. } => b_bias.map_or((), |own| own.fill(0.0)),
                        BuffersMut::Storage { b_bias, .. } => b_bias.map_or((), |own| own.fill(bf16::ZERO)),
                    }
                    Ok(())
                })
                .expect("an update");
            }
            from.activate_all(names).expect("adapters");
            y(&from)
        };
        type Own<'a> = Vec<(f32, &'a [f32])>;
        let cases: [(&[&str], Own<'_>); 5] = [
            (&["f32"], vec![(1.5, &one[..])]),
            (&["storage"], vec![(-0.75, &two[..])]),
            (&["plain"], vec![]),
            (&["storage", "f32"], vec![(-0.75, &two[..]), (1.5, &one[..])]),
            (&["plain", "f32"], vec![(1.5, &one[..])]),
        ];
        for (names, own) in cases {
            layer.activate_all(names).expect("adapters");
            let sum = sums(&own);
            assert_eq!(y(&layer), reference(names, &sum), "{names:?}");
            assert_eq!(layer.bias().map(Vec::as_slice), bias);
            layer.merge().expect("a merge");
            let expected = if own.is_empty() { bias } else { Some(&sum[..]) };
            assert_eq!(layer.bias().map(Vec::as_slice), expected, "{names:?} merged");
            let merged = LoraLinear::upload(Cpu, layer.weight(), expected, N, K).expect("a layer");
            assert_eq!(y(&layer), y(&merged));
            layer.unmerge().expect("an unmerge");
        }

        // Without the adapter its bias is gone; a changed one is followed.
        layer.activate("f32").expect("an adapter");
        layer.disable().expect("no adapter");
        let plain = LoraLinear::upload(Cpu, layer.weight(), bias, N, K).expect("a layer");
        assert_eq!(y(&layer), y(&plain));
        let doubled: Vec<f32> = one.iter().map(|own| 2.0 * own).collect();
        layer.activate_all(&["storage", "f32"]).expect("adapters");
        layer
            .update("f32", |factors| -> Result<()> {
                if let BuffersMut::F32 { b_bias: Some(own), .. } = factors {
                    own.copy_from_slice(&doubled);
                }
                Ok(())
            })
            .expect("an update");
        assert_eq!(y(&layer), reference(&["storage", "f32"], &sums(&[(-0.75, &two), (1.5, &doubled)])));
        layer.activate("f32").expect("an adapter");
        assert_eq!(y(&layer), reference(&["f32"], &sums(&[(1.5, &doubled)])));

        // For good: what stays builds on the new bias.
        let folded = layer.merge_for_good().expect("a merge");
        assert!(folded[0].1.has_b_bias());
        let sum = sums(&[(1.5, &doubled)]);
        assert_eq!(layer.bias(), Some(&sum));
        layer.activate("storage").expect("an adapter");
        layer.merge().expect("a merge");
        assert_eq!(layer.bias(), Some(&rounded_bias(Some(&sum), &[(-0.75, &two)])));
    }
}

#[test]
fn the_bias_of_the_layer_is_changed_with_what_was_made_of_it() {
    let base = vec![bf16::ONE; N];
    let (mut layer, [one, two]) = biased(Some(&base));
    let zero = |layer: &LoraLinear<Cpu, bf16>| {
        layer.forward(Matrix::new(&[bf16::ZERO; K][..], 1, K)).expect("forward") // leaves the bias
    };
    let change = |bias: &mut [bf16]| -> Result<()> {
        bias.fill(bf16::from_f32(-3.0));
        Ok(())
    };
    layer.activate_all(&["storage", "f32"]).expect("adapters");
    layer.update_bias(change).expect("a bias");
    let after = vec![bf16::from_f32(-3.0); N];
    assert_eq!(zero(&layer), rounded_bias(Some(&after), &[(-0.75, &two), (1.5, &one)]));
    layer.activate("f32").expect("an adapter");
    assert_eq!(zero(&layer), rounded_bias(Some(&after), &[(1.5, &one)]));
    layer.activate("plain").expect("an adapter");
    assert_eq!(zero(&layer), after);
    // A change that fails half-way is followed as far as it went.
    let failed = layer.update_bias(|bias| {
        bias[0] = bf16::ZERO;
        Err(Error::NoOutput { expected: "dx, da, db, dbias, dm" })
    });
    layer.activate("f32").expect("an adapter");
    let mut half = after;
    half[0] = bf16::ZERO;
    assert_eq!(
        (failed, zero(&layer)),
        (Err(Error::NoOutput { expected: "dx, da, db, dbias, dm" }), rounded_bias(Some(&half), &[(1.5, &one)]))
    );

    let state = |error: Error| matches!(error, Error::State { operation: "update_bias", .. });
    layer.merge().expect("a merge");
    assert!(state(layer.update_bias(change).expect_err("merged")));
    let mut none = LoraLinear::upload(Cpu, &[bf16::ONE; 6], None, 2, 3).expect("a layer");
    assert!(state(none.update_bias(change).expect_err("no bias")));
    // Nothing has become older than anything: the layer is as before.
    let (mut without, _) = biased(None);
    without.activate("f32").expect("an adapter");
    let before = zero(&without);
    assert!(state(without.update_bias(change).expect_err("no bias")));
    assert_eq!(zero(&without), before);
}

#[test]
fn biases_of_another_length_are_refused() {
    let mut layer = LoraLinear::upload(Cpu, &[bf16::ONE; 6], None, 2, 3).expect("a layer");
    for len in [0, 1, 3] {
        let adapter = Adapter::upload_f32(&Cpu, 1, Scaling::Fixed(1.0), &[1.0; 3], &[1.0; 2]).expect("an adapter");
        let adapter = adapter.with_b_bias(&Cpu, &vec![1.0; len]).expect("a bias");
        let error = Error::from(layer.add("one", adapter).expect_err("a refusal"));
        assert_eq!(error, Error::Dimension { arg: "b_bias", axis: "elements", got: len, expected: 2 });
    }
}

#[test]
fn a_bank_has_no_bias_on_b() {
    let (layer, _) = biased(None);
    assert!(layer.bank(&["plain"]).is_ok());
    let refused = layer.bank(&["plain", "f32"]).map(drop).expect_err("a refusal");
    assert!(
        matches!(refused, Error::State { operation: "bank", .. }) && refused.to_string().contains("`f32`"),
        "{refused}"
    );
}

#[test]
fn wrong_probabilities_are_named() {
    let (layer, x, _) = tiny();
    for p in [-0.1, 1.1, f32::NAN] {
        let training = Training { dropout: Some(value(p, [1, 2])), recompute: false };
        let refused = layer.forward_train_with(Matrix::new(&x[..], M, K), training).map(drop);
        assert!(matches!(refused, Err(Error::Probability { got }) if got.to_bits() == p.to_bits()), "{refused:?}");
    }
}

/// A pass without x and without the memory of its seed, put together again.
#[test]
fn a_pass_is_put_together_with_its_seed() {
    let (layer, x, dy) = tiny();
    let x = Matrix::new(&x[..], M, K);
    let words = [5, 6];
    let memory = Matrix::new(&words[..], 1, 2);
    let lies = Dropout { p: 0.375, seed: Seed::Memory(memory) };
    let pass = |dropout| {
        layer.forward_train_with(x, Training { dropout: Some(dropout), recompute: false }).expect("forward").1
    };
    let da = |pass: &Pass<'_, Cpu, f32>| {
        let mut da = vec![0.0; R * K];
        let gradients = Gradients { da: Some(MatrixMut::new(&mut da[..], R, K)), ..Gradients::default() };
        layer.backward(pass, Matrix::new(&dy[..], M, N), gradients).expect("backward");
        da
    };
    let expected = da(&pass(DROPOUT));
    assert_eq!(da(&pass(DROPOUT).into_kept().with(x).expect("the pass")), expected);
    let missing = pass(lies).into_kept().with(x).expect_err("a refusal");
    assert_eq!(missing.error, Error::Missing { arg: "seed", output: "dropout" });
    assert_eq!(da(&missing.value.with_seed(x, memory).expect("the pass")), expected);
    let needless = pass(DROPOUT).into_kept().with_seed(x, memory).expect_err("a refusal");
    assert!(matches!(needless.error, Error::State { operation: "with_seed", .. }), "{}", needless.error);
}
