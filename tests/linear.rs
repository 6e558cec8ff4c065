//! Layers: every operation against the oracle on the CPU and on the emulator, merge and rounding bit by bit, adapters that come
//! and go, PEFT's recorded layers, and misuse.
#![allow(clippy::useless_vec, reason = "buffers are vectors, as a layer's are")]

mod common;

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use common::data::Spec;
use common::golden::{self, Golden};
use common::layers::{self, Made};
use fused_lora::cpu::{self, Cpu};
use fused_lora::linear::{Adapter, Backend, Buffers, BuffersMut, Gradients, LoraLinear, Rejected, Scaling};
use fused_lora::{Dtype, Element, Error, LoraShape, Matrix, MatrixMut, Result, bf16, f16};

/// Layers that the CPU and the emulated kernels compute alike.
fn computes<T: Element>(backend: &impl Backend) {
    for spec in layers::layer_table() {
        for f32_factors in [false, true] {
            layers::computes::<_, T>(backend, &spec, f32_factors);
        }
    }
}

/// Merge, bit by bit.
fn merges<T: Element>(backend: &impl Backend) {
    for spec in layers::merge_table() {
        layers::merges_views::<_, T>(backend, &spec);
        if spec.r != 0 {
            layers::merges::<_, T>(backend, &spec, false);
            layers::merges::<_, T>(backend, &spec, true);
        }
    }
}

mod cpu_backend {
    use super::*;

    #[test]
    fn computes_what_the_oracle_does() {
        computes::<f16>(&Cpu);
        computes::<bf16>(&Cpu);
        computes::<f32>(&Cpu);
    }

    #[test]
    fn merges_bit_by_bit() {
        merges::<f16>(&Cpu);
        merges::<bf16>(&Cpu);
        merges::<f32>(&Cpu);
        layers::merges_near_ties::<_, f16>(&Cpu, f16::from_bits, 0x7c00, 1);
        layers::merges_near_ties::<_, bf16>(&Cpu, bf16::from_bits, 0x7f80, 1);
    }

    #[test]
    fn rounds_every_neighbour() {
        layers::rounds_every_neighbour::<_, f16>(&Cpu, f16::from_bits);
        layers::rounds_every_neighbour::<_, bf16>(&Cpu, bf16::from_bits);
    }

    #[test]
    fn sums_several_adapters() {
        for f32_factors in [false, true] {
            layers::sums_several::<_, f16>(&Cpu, f32_factors);
            layers::sums_several::<_, bf16>(&Cpu, f32_factors);
            layers::sums_several::<_, f32>(&Cpu, f32_factors);
        }
    }

    #[test]
    fn follows_updates_of_f32_factors() {
        layers::follows_updates::<_, f16>(&Cpu);
        layers::follows_updates::<_, bf16>(&Cpu);
        layers::follows_updates::<_, f32>(&Cpu);
    }

    #[test]
    fn as_exact_as_peft() {
        for name in GOLDEN {
            let case = Golden::load(name);
            case.check::<_, f32>(&Cpu, golden::F32);
            case.check::<_, bf16>(&Cpu, golden::BF16);
            case.check::<_, f16>(&Cpu, golden::F16);
            case.check::<_, bf16>(&Cpu, golden::BF16_AMP);
        }
        // Recorded in fewer modes.
        for name in ["lora_bias", "high_rank", "zero_b"] {
            Golden::load(name).check::<_, f32>(&Cpu, golden::F32);
            Golden::load(name).check::<_, bf16>(&Cpu, golden::BF16);
        }
        Golden::load("bias_lora_only").check::<_, f32>(&Cpu, golden::F32);
    }

    #[test]
    fn dropout_means_what_peft_means() {
        Golden::load("dropout").check_oracle();
    }
}

const GOLDEN: [&str; 6] = ["plain", "plain_3d_nobias", "rslora", "odd_sizes", "decode_r1", "multi_active"];

#[cfg(all(feature = "emulator", feature = "cuda"))]
mod emulated {
    use super::*;
    use fused_lora::emulator::Emulator;
    use fused_lora::plan::Device;

    /// With bf16 tensor instructions (80) and without (75).
    fn emulator(arch: u32) -> Emulator {
        Emulator::new(Device::of_arch("emulated", arch, 3))
    }

    #[test]
    fn computes_what_the_oracle_does() {
        computes::<f16>(&emulator(80));
        computes::<bf16>(&emulator(80));
    }

    #[test]
    fn merges_bit_by_bit() {
        merges::<f16>(&emulator(75));
        merges::<bf16>(&emulator(80));
        merges::<bf16>(&emulator(75));
        layers::merges_near_ties::<_, f16>(&emulator(80), f16::from_bits, 0x7c00, 5);
        layers::merges_near_ties::<_, bf16>(&emulator(75), bf16::from_bits, 0x7f80, 5);
        layers::merges_near_ties::<_, bf16>(&emulator(80), bf16::from_bits, 0x7f80, 5);
    }

    #[test]
    fn rounds_every_neighbour() {
        layers::rounds_every_neighbour::<_, f16>(&emulator(80), f16::from_bits);
        layers::rounds_every_neighbour::<_, bf16>(&emulator(75), bf16::from_bits);
        layers::rounds_every_neighbour::<_, bf16>(&emulator(80), bf16::from_bits);
    }

    #[test]
    fn sums_several_adapters() {
        layers::sums_several::<_, f16>(&emulator(80), false);
        layers::sums_several::<_, bf16>(&emulator(80), true);
    }

    #[test]
    fn follows_updates_of_f32_factors() {
        layers::follows_updates::<_, bf16>(&emulator(80));
    }

    #[test]
    fn as_exact_as_peft() {
        Golden::load("lora_bias").check::<_, bf16>(&emulator(80), golden::BF16);
        for name in ["plain", "rslora", "multi_active"] {
            let case = Golden::load(name);
            case.check::<_, bf16>(&emulator(80), golden::BF16);
            case.check::<_, f16>(&emulator(80), golden::F16);
            case.check::<_, bf16>(&emulator(80), golden::BF16_AMP);
        }
    }

    #[test]
    fn f32_layers_are_refused() {
        let refused = LoraLinear::upload(emulator(80), &[0.0f32; 4], None, 2, 2).map(drop);
        assert!(matches!(refused, Err(Error::Dtype { got: Dtype::F32, .. })), "{refused:?}");
    }
}

/// N = 3, K = 4, adapters "one" (f32, R = 2) and "other" (R = 3).
fn small() -> LoraLinear<Cpu, bf16> {
    layers::make::<Cpu, bf16>(&Cpu, &Spec { bias: false, ..Spec::new(5, 3, 4, 2) }, true).layer
}

fn adapter(a: usize, b: usize) -> Adapter<Cpu, bf16> {
    Adapter::upload(&Cpu, 2, Scaling::Lora { alpha: 4.0 }, &vec![bf16::ONE; a], &vec![bf16::ONE; b])
        .expect("an adapter")
}

fn state(error: &Error, operation: &str) -> bool {
    matches!(error, Error::State { operation: got, .. } if *got == operation)
}

#[test]
fn scales_follow_from_alpha_and_rank() {
    assert_eq!(Scaling::Lora { alpha: 3.0 }.scale(7), 3.0 / 7.0);
    assert_eq!(Scaling::RsLora { alpha: 4.0 }.scale(2), (4.0 / 2f64.sqrt()) as f32);
    assert_eq!((Scaling::Fixed(0.1).scale(9), Scaling::Lora { alpha: 3.0 }.scale(0)), (0.1, 1.0));
    let refused = Adapter::<Cpu, bf16>::upload(&Cpu, 2, Scaling::Fixed(f64::MAX), &[], &[]).map(drop);
    assert_eq!(refused, Err(Error::Scale { arg: "scale", got: f32::INFINITY }));
}

#[test]
fn layers_of_wrong_buffers_are_refused_with_the_buffers() {
    let new = |w: usize, bias: Option<usize>, n, k| {
        let (w, bias) = (vec![bf16::ONE; w], bias.map(|bias| vec![bf16::ONE; bias]));
        LoraLinear::new(Cpu, w, bias, n, k)
            .map(drop)
            .map_err(|Rejected { error, value: (w, bias) }| (error, w.len(), bias.map(|bias| bias.len())))
    };
    let elements = |arg, got, expected| Error::Dimension { arg, axis: "elements", got, expected };
    assert_eq!(new(12, Some(3), 3, 4), Ok(()));
    assert_eq!(new(11, Some(3), 3, 4), Err((elements("w", 11, 12), 11, Some(3))));
    assert_eq!(new(12, Some(4), 3, 4), Err((elements("bias", 4, 3), 12, Some(4))));
    assert_eq!(new(0, None, 0, 4), Err((Error::ZeroDimension { arg: "w", axis: "rows" }, 0, None)));
    assert_eq!(new(0, None, 3, 0), Err((Error::ZeroDimension { arg: "w", axis: "columns" }, 0, None)));
    let limit = isize::MAX as u64 / 8;
    for (n, got) in [(1 << 60, 1 << 61), (usize::MAX, u64::MAX)] {
        let too_large = Error::TooLarge { what: "the number of elements of w", got, limit };
        assert_eq!(new(1, None, n, 2), Err((too_large, 1, None)));
    }
}

#[test]
fn adapters_that_do_not_fit_are_refused_and_come_back() {
    let mut layer = small();
    let elements = |arg, got, expected| Error::Dimension { arg, axis: "elements", got, expected };
    let rejected = layer.add("new", adapter(7, 6)).expect_err("a refusal");
    assert_eq!((rejected.error.clone(), rejected.value.rank()), (elements("a", 7, 8), 2));
    assert_eq!(Error::from(layer.add("new", adapter(8, 5)).expect_err("a refusal")), elements("b", 5, 6));
    let taken = layer.add("one", adapter(8, 6)).expect_err("a refusal");
    assert_eq!(taken.to_string(), "the adapter name is \"one\", expected one that the layer does not have");
    assert_eq!(layer.names(), ["one", "other"]);
    layer.add("one more", taken.value).expect("the same adapter under another name");
    assert_eq!(layer.names(), ["one", "other", "one more"]);
}

#[test]
fn unknown_names_are_named_with_those_that_are_there() {
    let mut layer = small();
    let expected = Error::AdapterName { got: "two".into(), expected: "\"one\" or \"other\"".into() };
    assert_eq!(layer.activate("two"), Err(expected.clone()));
    assert_eq!(layer.activate_all(&["one", "two"]), Err(expected.clone()));
    assert_eq!(layer.remove("two").map(drop), Err(expected.clone()));
    assert_eq!(layer.update("two", |_| Ok::<_, Error>(())), Err(expected));
    let twice = Error::AdapterName { got: "one".into(), expected: "each name once".into() };
    assert_eq!(layer.activate_all(&["one", "other", "one"]), Err(twice));
    assert_eq!(layer.active(), [""; 0]);
}

/// A swap, and what stays of an adapter that is taken out and put back.
#[test]
fn adapters_come_and_go() {
    let mut layer = small();
    let x = vec![bf16::ONE; 8];
    let y = |layer: &LoraLinear<Cpu, bf16>| layer.forward(Matrix::new(&x[..], 2, 4)).expect("forward");
    let plain = y(&layer);
    layer.activate("one").expect("an adapter");
    let one = y(&layer);
    layer.activate("other").expect("an adapter");
    let other = y(&layer);
    assert!(one != plain && other != plain && one != other);
    let taken = layer.remove("one").expect("an inactive adapter");
    assert_eq!((layer.names(), y(&layer)), (vec!["other"], other));
    layer.disable().expect("no adapter");
    assert_eq!((layer.active(), y(&layer)), (vec![], plain.clone()));
    layer.add("back", taken).expect("an added adapter");
    layer.activate("back").expect("an adapter");
    assert_eq!(y(&layer), one);
}

/// What `enable` brings back: what was active, with the factors that it has by then, unless something else was chosen or an
/// adapter has left.
#[test]
fn disabled_adapters_are_enabled_again() {
    let mut layer = small();
    let x = vec![bf16::ONE; 8];
    let y = |layer: &LoraLinear<Cpu, bf16>| layer.forward(Matrix::new(&x[..], 2, 4)).expect("forward");
    let plain = y(&layer);
    layer.enable().expect("nothing to do");
    assert_eq!((layer.active(), y(&layer)), (vec![], plain.clone()));
    for names in [&["one"][..], &["other", "one"]] {
        layer.activate_all(names).expect("adapters");
        let with = y(&layer);
        assert_ne!(with, plain);
        layer.disable().expect("no adapter");
        layer.disable().expect("still none");
        assert_eq!(y(&layer), plain);
        layer.enable().expect("adapters");
        layer.enable().expect("the same adapters");
        assert_eq!((layer.active(), y(&layer)), (names.to_vec(), with));
    }

    // Factors that change meanwhile: as if they had changed while active.
    let double = |factors: BuffersMut<'_, Cpu, bf16>| -> Result<()> {
        match factors {
            BuffersMut::Storage { b, .. } => b.iter_mut().for_each(|b| *b = bf16::from_f32(2.0 * b.to_f32())),
            BuffersMut::F32 { b, .. } => b.iter_mut().for_each(|b| *b *= 2.0),
        }
        Ok(())
    };
    layer.disable().expect("no adapter");
    layer.update("one", double).expect("factors");
    layer.enable().expect("adapters");
    let changed = y(&layer);
    layer.activate_all(&["other", "one"]).expect("adapters");
    assert_eq!(y(&layer), changed);

    layer.disable().expect("no adapter");
    layer.activate("one").expect("another choice");
    layer.disable().expect("no adapter");
    layer.remove("other").expect("an adapter");
    layer.enable().expect("the later choice");
    assert_eq!(layer.active(), ["one"]);
    layer.merge().expect("a merge");
    assert!(state(&layer.enable().expect_err("merged"), "enable"));
    layer.unmerge().expect("an unmerge");
    layer.disable().expect("no adapter");
    layer.remove("one").expect("an adapter");
    layer.enable().expect("nothing to do");
    assert_eq!((layer.active(), y(&layer)), (vec![], plain));
}

#[test]
fn what_the_state_rules_out_is_refused() {
    let mut layer = small();
    let x = vec![bf16::ONE; 8];
    let x = Matrix::new(&x[..], 2, 4);
    let error = |result: Result<()>| result.expect_err("a refusal");
    assert_eq!(
        error(layer.merge()).to_string(),
        "`merge` was called while no adapter is active, expected `activate` first"
    );
    assert!(state(&error(layer.merge_for_good().map(drop)), "merge_for_good"));
    assert!(state(&error(layer.unmerge()), "unmerge"));
    layer.activate("one").expect("an adapter");
    assert!(state(&error(layer.remove("one").map(drop)), "remove"));
    layer.merge().expect("a merge");
    let refused = [
        ("merge", layer.merge()),
        ("activate", layer.activate("other")),
        ("activate_all", layer.activate_all(&["one", "other"])),
        ("disable", layer.disable()),
        ("update", layer.refresh("one")),
        ("remove", layer.remove("one").map(drop)),
        ("forward_train", layer.forward_train(x).map(drop)),
    ];
    for (operation, result) in refused {
        assert!(state(&error(result), operation), "{operation}");
    }
    layer.refresh("other").expect("an adapter that is not merged");
    layer.remove("other").expect("an adapter that is not merged");
    assert!(layer.is_merged());
    layer.merge_for_good().expect("what was merged");
    assert!(!layer.is_merged() && layer.names().is_empty());
}

#[test]
fn a_pass_is_of_one_state_of_one_layer() {
    let Made { mut layer, forward, .. } = layers::make::<Cpu, bf16>(&Cpu, &Spec::new(2, 3, 4, 2), true);
    let x = Matrix::new(&forward.x.data[..], 2, 4);
    layer.activate("one").expect("an adapter");
    let (_, pass) = layer.forward_train(x).expect("forward_train");
    let dy = vec![bf16::ONE; 6];
    let backward = |layer: &LoraLinear<Cpu, bf16>| {
        let mut dx = vec![bf16::from_f32(9.0); 8];
        let gradients = Gradients { dx: Some(MatrixMut::new(&mut dx[..], 2, 4)), ..Gradients::default() };
        let result = layer.backward(&pass, Matrix::new(&dy[..], 2, 3), gradients);
        assert!(result.is_ok() || dx.iter().all(|&v| v == bf16::from_f32(9.0)), "written in spite of {result:?}");
        result
    };
    assert_eq!(backward(&layer), Ok(()));
    layer.disable().expect("no adapter");
    assert_eq!(backward(&layer), Ok(()), "the pass knows its adapter");
    let refused = |result: Result<()>| state(&result.expect_err("a refusal"), "backward");
    assert!(refused(backward(&small())), "another layer");
    layer.activate("one").expect("an adapter");
    layer.merge().expect("a merge");
    assert!(refused(backward(&layer)), "merged");
    layer.unmerge().expect("an unmerge");
    assert_eq!(backward(&layer), Ok(()));
    layer.refresh("other").expect("an adapter");
    assert_eq!(backward(&layer), Ok(()), "another adapter changed");
    layer.refresh("one").expect("an adapter");
    assert!(refused(backward(&layer)), "changed factors");
    layer.disable().expect("no adapter");
    layer.remove("one").expect("an adapter");
    assert!(refused(backward(&layer)), "no adapter any more");

    let (_, plain) = layer.forward_train(x).expect("forward_train without an adapter");
    assert!(plain.h().is_none());
    layer.activate("other").expect("an adapter");
    layer.merge_for_good().expect("a merge");
    let gradients = Gradients { dbias: None, ..Gradients::default() };
    let other_w = layer.backward(&plain, Matrix::new(&dy[..], 2, 3), gradients);
    assert!(refused(other_w), "another W");
}

#[test]
fn wrong_arguments_are_named_and_nothing_is_lost() {
    let mut layer = small();
    layer.activate("one").expect("an adapter");
    let x = vec![bf16::ONE; 8];
    let forward = |x: Matrix<'_, [bf16]>| layer.forward(x).map(drop);
    let dimension = |arg, axis, got, expected| Err(Error::Dimension { arg, axis, got, expected });
    assert_eq!(forward(Matrix::new(&x[..], 2, 3)), dimension("x", "columns", 3, 4));
    assert_eq!(forward(Matrix::new(&x[..], 0, 4)), Err(Error::ZeroDimension { arg: "x", axis: "rows" }));
    assert_eq!(forward(Matrix::new(&x[..], 3, 4)), Err(Error::BufferTooShort { arg: "x", got: 8, needed: 12 }));
    let stride = Matrix::new(&x[..], 1 << 40, 4).with_row_stride(0);
    assert_eq!(forward(stride), Err(Error::Stride { arg: "x", got: 0, min: 4 }));
    assert!(forward(Matrix::new(&x[..], usize::MAX, 4)).is_err());

    let x = Matrix::new(&x[..], 2, 4);
    let mut y = vec![bf16::from_f32(9.0); 6];
    let into = layer.forward_into(x, MatrixMut::new(&mut y[..], 3, 2));
    assert_eq!((into, &y), (dimension("y", "rows", 3, 2), &vec![bf16::from_f32(9.0); 6]));
    let (_, pass) = layer.forward_train(x).expect("forward_train");
    let dy = vec![bf16::ONE; 9];
    let (dy, taller) = (Matrix::new(&dy[..6], 2, 3), Matrix::new(&dy[..], 3, 3));
    let mut da = vec![9.0; 8];
    let mut backward = |dy, rows| {
        let gradients = Gradients { da: Some(MatrixMut::new(&mut da[..], rows, 4)), ..Gradients::default() };
        layer.backward(&pass, dy, gradients)
    };
    assert_eq!(backward(taller, 2), dimension("dy", "rows", 3, 2));
    assert_eq!(backward(dy, 1), dimension("da", "rows", 1, 2));
    assert_eq!(backward(dy, 2), Ok(()));
    assert!(da.iter().all(|&v| v != 9.0));
    assert_eq!(
        layer.backward(&pass, dy, Gradients::default()),
        Err(Error::NoOutput { expected: "dx, da, db, dbias, dm" })
    );
    let kept = pass.into_kept().with(Matrix::new(&[bf16::ONE; 4][..], 1, 4)).expect_err("another number of rows");
    assert_eq!(kept.error, Error::Dimension { arg: "x", axis: "rows", got: 1, expected: 2 });
    assert!(kept.value.with(x).is_ok());
}

/// The CPU, with operations that fail from some point on.
#[derive(Clone)]
struct Failing {
    /// Roundings until one fails.
    rounds: Rc<Cell<u32>>,
}

impl Backend for Failing {
    type Buffer<T: Element> = Vec<T>;
    type Read<T: Element> = [T];
    type Write<T: Element> = [T];
    type Words = [u64];
    type WordBuffer = Vec<u64>;

    fn upload_words(&self, from: &[u64]) -> Result<Vec<u64>> {
        Cpu.upload_words(from)
    }
    fn words(buffer: &Vec<u64>) -> &[u64] {
        buffer
    }
    fn read<T: Element>(buffer: &Vec<T>) -> &[T] {
        buffer
    }
    fn write<T: Element>(buffer: &mut Vec<T>) -> &mut [T] {
        buffer
    }
    fn read_len<T: Element>(operand: &[T]) -> usize {
        operand.len()
    }
    fn alloc<T: Element>(&self, len: usize) -> Result<Vec<T>> {
        Cpu.alloc(len)
    }
    fn upload<T: Element>(&self, from: &[T]) -> Result<Vec<T>> {
        Cpu.upload(from)
    }
    fn overwrite<T: Element>(&self, from: &[T], to: &mut [T]) -> Result<()> {
        Cpu.overwrite(from, to)
    }
    fn download<T: Element>(&self, from: &[T]) -> Result<Vec<T>> {
        Cpu.download(from)
    }
    fn check_dtype(&self, dtype: Dtype) -> Result<()> {
        Cpu.check_dtype(dtype)
    }
    fn reserve(&self, dtype: Dtype, shape: LoraShape) -> Result<()> {
        Cpu.reserve(dtype, shape)
    }
    fn forward<T: Element, A: Element>(&self, op: cpu::Forward<'_, T, A>) -> Result<()> {
        Cpu.forward(op)
    }
    fn backward<T: Element, A: Element>(&self, op: cpu::Backward<'_, T, A>) -> Result<()> {
        Cpu.backward(op)
    }
    fn merge<T: Element>(&self, op: cpu::Merge<'_, T>) -> Result<()> {
        Cpu.merge(op)
    }
    fn round<T: Element>(&self, op: cpu::Round<'_, T>) -> Result<()> {
        let left = self.rounds.get().checked_sub(1).ok_or(Error::OutOfMemory { bytes: 1 })?;
        self.rounds.set(left);
        Cpu.round(op)
    }
    fn gain<T: Element>(&self, op: cpu::Gain<'_, T>) -> Result<()> {
        Cpu.gain(op)
    }
}

fn failing() -> (Failing, LoraLinear<Failing, bf16>) {
    let backend = Failing { rounds: Rc::new(Cell::new(u32::MAX)) };
    let spec = Spec { bias: false, ..Spec::new(5, 3, 4, 2) };
    let layer = layers::make::<_, bf16>(&backend, &spec, true).layer;
    (backend, layer)
}

fn halve<B: Backend<Write<f32> = [f32]>>(factors: BuffersMut<'_, B, bf16>) -> Result<()> {
    if let BuffersMut::F32 { a, .. } = factors {
        a.iter_mut().for_each(|a| *a *= 0.5);
    }
    Ok(())
}

/// Copies older than the factors are never read.
#[test]
fn stale_copies_are_refused_until_they_are_made_anew() {
    let (backend, mut layer) = failing();
    let x = vec![bf16::ONE; 4];
    let x = Matrix::new(&x[..], 1, 4);
    for several in [false, true] {
        let names: &[&str] = if several { &["one", "other"] } else { &["one"] };
        layer.activate_all(names).expect("adapters");
        let before = layer.forward(x).expect("forward");
        // The first failure is that of the adapter's own copies, the second that of the copies side by side.
        for rounds in 0..=u32::from(several) {
            backend.rounds.set(rounds);
            assert_eq!(layer.update("one", halve), Err(Error::OutOfMemory { bytes: 1 }));
            backend.rounds.set(u32::MAX);
            let refused = layer.forward(x).expect_err("a refusal");
            assert!(state(&refused, "forward") && refused.to_string().contains("`one"), "{refused}");
            if !several {
                assert!(state(&layer.forward_train(x).map(drop).expect_err("a refusal"), "forward_train"));
            }
            layer.refresh("one").expect("copies");
            assert_ne!(layer.forward(x).expect("forward"), before);
        }
    }
    // An adapter whose copies fail does not get in.
    let Buffers::F32 { a, b, .. } = layer.adapter("one").expect("an adapter").buffers() else {
        unreachable!("its factors are f32")
    };
    let another = Adapter::upload_f32(&backend, 2, Scaling::Fixed(1.0), a, b).expect("an adapter");
    backend.rounds.set(0);
    let rejected = layer.add("new", another).expect_err("a refusal");
    assert_eq!((rejected.error, layer.names()), (Error::OutOfMemory { bytes: 1 }, vec!["one", "other"]));
    // Nor do several whose joint copies fail; those active before stay.
    layer.activate("other").expect("an adapter");
    assert!(layer.activate_all(&["one", "other"]).is_err());
    assert_eq!(layer.active(), ["other"]);
}

#[test]
fn an_update_that_fails_or_panics_leaves_no_stale_copies() {
    let (_, mut layer) = failing();
    let x = vec![bf16::ONE; 4];
    let x = Matrix::new(&x[..], 1, 4);
    layer.activate("one").expect("an adapter");
    let before = layer.forward(x).expect("forward");
    let failed =
        layer.update("one", |factors| halve(factors).and(Err(Error::NoOutput { expected: "dx, da, db, dbias, dm" })));
    assert_eq!(failed, Err(Error::NoOutput { expected: "dx, da, db, dbias, dm" }));
    let after = layer.forward(x).expect("forward with what the update wrote");
    assert_ne!(after, before);
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        layer.update("one", |factors| -> Result<()> {
            halve(factors)?;
            std::panic::resume_unwind(Box::new("in the middle of an update"));
        })
    }));
    assert!(panicked.is_err());
    assert!(state(&layer.forward(x).expect_err("a refusal"), "forward"));
    layer.refresh("one").expect("copies");
    assert_ne!(layer.forward(x).expect("forward"), after);
}
