//! DoRA in the kernels: a gain for the columns of y, the gradient of the magnitude, and the norms of rows, on the emulator.
#![cfg(all(feature = "emulator", feature = "cuda"))]

mod common;

use common::data::{Placement, Spec, dora_table};
use common::emulated::Emulated;
use common::{Backend, Cpu, Host, HostBackward, HostForward, check};
use fused_lora::emulator::Emulator;
use fused_lora::plan::{Device, TileSize};
use fused_lora::reference::{self, Mat};
use fused_lora::{Element, Factors, Matrix, MatrixMut, bf16, cpu, f16};

const TILES: [TileSize; 2] = [TileSize::Large, TileSize::Small];

#[test]
fn gains_and_magnitudes() {
    for (turn, spec) in dora_table().into_iter().enumerate() {
        for (half, arch) in [80, 75].into_iter().enumerate() {
            let backend = Emulated::new(arch, 3).with_tile(TILES[(turn + half) % 2]);
            check::forward::<f16>(&backend, &spec);
            check::forward::<bf16>(&backend, &spec);
            check::backward::<f16>(&backend, &spec);
            check::backward::<bf16>(&backend, &spec);
        }
    }
}

/// Enough tokens that they are reduced in chunks.
#[test]
fn the_magnitude_over_many_tokens() {
    let spec = Spec { dora: true, ..Spec::new(2300, 24, 16, 8) };
    let dm_alone = Spec { outputs: [false; 4], ..spec };
    let with_dbias = Spec { outputs: [false, false, false, true], accumulate: true, ..spec };
    for tile in TILES {
        for spec in [spec, dm_alone, with_dbias] {
            check::backward::<bf16>(&Emulated::new(80, 3).with_tile(tile), &spec);
        }
    }
}

fn set<T: Element>(host: &mut Host<T>, value: f64) {
    host.fill(|_, _| value);
}

/// What a call computes with a gain of all ones, and without one, on a backend.
fn with_ones_and_without<T: Element>(backend: &impl Backend, spec: &Spec) -> [(HostForward<T>, HostBackward<T>); 2] {
    [true, false].map(|ones| {
        let (mut forward, mut backward) = (spec.forward::<T>(), spec.backward::<T>());
        backward.magnitude = None;
        for gain in [&mut forward.gain, &mut backward.gain] {
            gain.iter_mut().for_each(|gain| set(gain, 1.0));
            *gain = gain.take().filter(|_| ones);
        }
        backend.forward(&mut forward).expect("it runs");
        backend.backward(&mut backward).expect("it runs");
        (forward, backward)
    })
}

#[test]
fn a_gain_of_ones_gives_the_bits_of_none() {
    let spec = Spec { dora: true, ..Spec::new(130, 70, 66, 13) };
    for tile in TILES {
        let backend = Emulated::new(80, 3).with_tile(tile);
        let [(forward, backward), (plain, plain_backward)] = with_ones_and_without::<bf16>(&backend, &spec);
        assert_eq!((forward.h, forward.y), (plain.h, plain.y));
        assert_eq!((backward.dx, backward.da), (plain_backward.dx, plain_backward.da));
        assert_eq!((backward.db, backward.dbias), (plain_backward.db, plain_backward.dbias));
    }
}

/// A gain that is not a number stays in its column of y and its row of db, and reaches dx and dh as the formula has it; what lies
/// behind the last gain reaches nothing.
#[test]
fn what_is_not_finite_stays_in_its_column() {
    let spec = Spec { dora: true, placement: Placement::Unaligned, accumulate: false, ..Spec::new(65, 67, 40, 9) };
    for (column, value) in [(0, f32::NAN), (66, f32::INFINITY)] {
        for tile in TILES {
            let backend = Emulated::new(80, 3).with_tile(tile);
            let mut op = spec.forward::<f16>();
            let gain = op.gain.as_mut().expect("a gain");
            gain.set(0, column, f64::from(value));
            backend.forward(&mut op).expect("it runs");
            for row in 0..spec.m {
                for col in 0..spec.n {
                    assert_eq!(op.y.data[op.y.index(row, col)].to_f32().is_finite(), col != column, "y ({row}, {col})");
                }
            }
        }
    }
}

/// norm and gain of a spec's layer, from its factors in f32 or in the storage type.
fn norms<T: Element>(run: impl Fn(cpu::Gain<'_, T>), spec: &Spec, wide: bool) -> [Host<f32>; 2] {
    let HostForward { w, a, b, scale, .. } = spec.forward::<T>();
    let HostForward { a: wide_a, b: wide_b, gain: magnitude, .. } = spec.forward::<f32>();
    let mut outputs = [(); 2].map(|()| magnitude.clone().expect("a vector"));
    let [norm, gain] = &mut outputs;
    for output in [&mut *norm, &mut *gain] {
        output.data.fill(common::data::POISON);
    }
    let factors = match wide {
        true => Factors::F32 { a: wide_a.view(), b: wide_b.view() },
        false => Factors::Storage { a: a.view(), b: b.view() },
    };
    let magnitude = magnitude.as_ref().map(Host::view);
    let (norm, gain) = (Some(norm.view_mut()), Some(gain.view_mut()));
    run(cpu::Gain { w: w.view(), factors, scale, magnitude, norm, gain });
    outputs
}

/// Within 2⁻²⁰ of the f64 result: sums over ranks and over K of all terms are in f32.
fn check_norms<T: Element>(run: impl Fn(cpu::Gain<'_, T>) + Copy, spec: &Spec) {
    for wide in [false, true] {
        let [norm, gain] = norms::<T>(run, spec, wide);
        let HostForward { w, a, b, scale, .. } = spec.forward::<T>();
        let HostForward { a: wide_a, b: wide_b, gain: magnitude, .. } = spec.forward::<f32>();
        let (a, b) = if wide { (wide_a.to_mat(), wide_b.to_mat()) } else { (a.to_mat(), b.to_mat()) };
        let truth = reference::norm(&w.to_mat(), &a, &b, f64::from(scale));
        let magnitude = magnitude.expect("a vector").to_mat();
        let ratio = Mat::from_fn(1, spec.n, |_, n| magnitude.at(0, n) / truth.at(0, n));
        for (name, got, truth) in [("norm", &norm, &truth), ("gain", &gain, &ratio)] {
            for n in 0..spec.n {
                let (got, truth) = (f64::from(got.data[got.index(0, n)]), truth.at(0, n));
                assert!(
                    (got - truth).abs() <= truth.abs() / f64::from(1 << 20),
                    "{name} {n}: {got}, not {truth}: {spec:?}"
                );
            }
            let outside = |at: &usize| !got.is_element(*at) && got.data[*at] != common::data::POISON;
            assert_eq!((0..got.data.len()).find(outside), None, "{name} was written outside");
        }
    }
}

#[test]
fn norms_of_rows() {
    let emulators = [75, 80].map(|arch| Emulator::new(Device::of_arch("emulated", arch, 3)));
    for (turn, (n, k, r)) in
        [(1, 1, 1), (16, 256, 8), (17, 300, 33), (65, 70, 0), (40, 513, 64)].into_iter().enumerate()
    {
        let spec = Spec { dora: true, placement: Placement::ALL[turn % 4], ..Spec::new(1, n, k, r) };
        check_norms::<f16>(|op| cpu::gain(op).expect("it runs"), &spec);
        check_norms::<f32>(|op| cpu::gain(op).expect("it runs"), &spec);
        for emulator in &emulators {
            check_norms::<f16>(|op| drop(emulator.gain(op).expect("it runs")), &spec);
            check_norms::<bf16>(|op| drop(emulator.gain(op).expect("it runs")), &spec);
        }
    }
}

/// With a magnitude of the norm, DoRA starts as LoRA does.
#[test]
fn a_new_adapter_changes_nothing() {
    let (w, a, b) = ([1.0f32, 2.0, 3.0, -4.0], [0.5f32, 0.25], [0.0f32, 0.0]);
    let (mut norm, mut gain) = ([0.0f32; 2], [0.0f32; 2]);
    let factors = || Factors::Storage { a: Matrix::new(&a[..], 1, 2), b: Matrix::new(&b[..], 2, 1) };
    let w = Matrix::new(&w[..], 2, 2);
    let op = cpu::Gain { w, factors: factors(), scale: 2.0, magnitude: None, norm: None, gain: None };
    cpu::gain(cpu::Gain { norm: Some(MatrixMut::new(&mut norm, 1, 2)), ..op }).expect("norms");
    assert_eq!(norm, [5f32.sqrt(), 5.0]);
    let magnitude = Some(Matrix::new(&norm[..], 1, 2));
    let gain_of = Some(MatrixMut::new(&mut gain[..], 1, 2));
    cpu::gain(cpu::Gain { w, factors: factors(), scale: 2.0, magnitude, norm: None, gain: gain_of }).expect("a gain");
    assert_eq!(gain, [1.0; 2]);
    check::forward::<f32>(&Cpu, &Spec { dora: true, ..Spec::new(3, 2, 2, 1) });
}
