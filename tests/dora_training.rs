//! A run of DoRA that PEFT recorded, step by step through `LoraLinear`: y = down(silu(up(x))), loss = mean (y − t)², SGD with momentum.
#![cfg(feature = "peft")]

mod common;

use std::fs;
use std::path::PathBuf;

use common::layers::download;
use fused_lora::cpu::Cpu;
use fused_lora::linear::{self, Backend, BuffersMut, Gradients, LoraLinear, Magnitude, Scaling};
use fused_lora::peft::Adapter;
use fused_lora::{Element, Matrix, MatrixMut, Result, bf16, f16};
use safetensors::SafeTensors;
use serde_json::Value;

const LAYERS: [&str; 2] = ["up", "down"];

fn folder() -> PathBuf {
    common::project().join("tests/golden/peft/training/toy_dora")
}

/// What was recorded.
struct Run {
    case: Value,
    bytes: Vec<u8>,
    start: Adapter,
}

impl Run {
    fn load() -> Self {
        let bytes = fs::read(folder().join("tensors.safetensors")).expect("tensors");
        let case = fs::read(folder().join("case.json")).expect("a case");
        let start = Adapter::load(folder().join("adapter_initial")).expect("an adapter");
        Self { case: serde_json::from_slice(&case).expect("JSON"), bytes, start }
    }

    /// Of bf16 or f64.
    fn tensor(&self, name: &str) -> Vec<f64> {
        let tensors = SafeTensors::deserialize(&self.bytes).expect("safetensors");
        let view = tensors.tensor(name).expect("a tensor");
        match view.dtype() {
            safetensors::Dtype::F64 => {
                view.data().as_chunks().0.iter().map(|&bytes| f64::from_le_bytes(bytes)).collect()
            }
            _ => view.data().as_chunks().0.iter().map(|&bytes| bf16::from_le_bytes(bytes).to_f64()).collect(),
        }
    }

    fn size(&self, name: &str) -> usize {
        self.case["dims"][name].as_u64().expect("a size") as usize
    }

    fn numbers(&self, mode: &str, what: &str) -> Vec<f64> {
        let list = self.case["runs"][format!("sgd/{mode}")][what].as_array().expect("a list");
        list.iter().map(|number| number.as_f64().expect("a number")).collect()
    }
}

/// A layer with its adapter, and the momentum of A, B and the magnitude.
struct Trained<B: Backend, T: Element> {
    layer: LoraLinear<B, T>,
    sizes: [usize; 3],
    /// Values and momentum of A, B and the magnitude.
    parts: [(Vec<f32>, Vec<f32>); 3],
}

fn rounded<T: Element>(values: &[f64]) -> Vec<T> {
    values.iter().map(|&value| T::from_f64(value)).collect()
}

impl<B: Backend, T: Element> Trained<B, T> {
    fn new(backend: &B, run: &Run, name: &str, n: usize, k: usize) -> Self {
        let (w, bias) = (run.tensor(&format!("base.{name}.weight")), run.tensor(&format!("base.{name}.bias")));
        let layer = LoraLinear::upload(backend.clone(), &rounded::<T>(&w), Some(&rounded::<T>(&bias)), n, k);
        let (module, factors) = run.start.get(name).expect("factors");
        let magnitude = factors.magnitude.as_ref().expect("a magnitude");
        let parts = [&factors.a, &factors.b, magnitude].map(|part| part.to_f32());
        let scaling = Scaling::Lora { alpha: module.alpha };
        let adapter = linear::Adapter::upload_f32(backend, module.r, scaling, &parts[0], &parts[1]);
        let adapter = adapter.and_then(|adapter| adapter.with_magnitude(backend, &parts[2])).expect("an adapter");
        let mut layer = layer.expect("a layer");
        layer.add("default", adapter).expect("added");
        layer.activate("default").expect("an adapter");
        Self { layer, sizes: [n, k, module.r], parts: parts.map(|part| (part.clone(), vec![0.0; part.len()])) }
    }

    fn step(&mut self, gradients: &[Vec<f32>; 3], lr: f32, momentum: f32) {
        for ((value, velocity), gradient) in self.parts.iter_mut().zip(gradients) {
            for ((value, velocity), gradient) in value.iter_mut().zip(velocity).zip(gradient) {
                *velocity = momentum * *velocity + gradient;
                *value -= lr * *velocity;
            }
        }
        let (backend, [(a, _), (b, _), (magnitude, _)]) = (self.layer.backend().clone(), &self.parts);
        let update = self.layer.update("default", |parts| -> Result<()> {
            let BuffersMut::F32 { a: to_a, b: to_b, magnitude: Some(to), .. } = parts else {
                unreachable!("f32 with a magnitude")
            };
            backend.overwrite(a, to_a)?;
            backend.overwrite(b, to_b)?;
            backend.overwrite(magnitude, to)
        });
        update.expect("an update");
    }
}

/// dx, and the gradients of A, B and the magnitude.
fn backward<B: Backend, T: Element>(
    of: &Trained<B, T>,
    pass: &linear::Pass<'_, B, T>,
    y: &B::Buffer<T>,
    dy: &[T],
) -> (Vec<T>, [Vec<f32>; 3]) {
    let (backend, [n, k, r]) = (of.layer.backend(), of.sizes);
    let m = dy.len() / n;
    let dy = backend.upload(dy).expect("an upload");
    let mut dx = backend.alloc::<T>(m * k).expect("memory");
    let [mut da, mut db, mut dm] = [r * k, n * r, n].map(|len| backend.alloc::<f32>(len).expect("memory"));
    let gradients = Gradients {
        dx: Some(MatrixMut::new(B::write(&mut dx), m, k)),
        da: Some(MatrixMut::new(B::write(&mut da), r, k)),
        db: Some(MatrixMut::new(B::write(&mut db), n, r)),
        dm: Some(Magnitude { y: Matrix::new(B::read(y), m, n), dm: MatrixMut::new(B::write(&mut dm), 1, n) }),
        ..Gradients::default()
    };
    of.layer.backward(pass, Matrix::new(B::read(&dy), m, n), gradients).expect("backward");
    let dx = download(backend, &dx, m * k);
    (dx, [download(backend, &da, r * k), download(backend, &db, n * r), download(backend, &dm, n)])
}

/// Loss and norm of the gradients of each step, and the parameters at the end.
fn train<B: Backend, T: Element>(backend: &B, run: &Run) -> (Vec<[f64; 2]>, Vec<Vec<f32>>) {
    let [k, m, n, hidden] = ["K", "M", "N", "hidden"].map(|name| run.size(name));
    let mut up = Trained::<B, T>::new(backend, run, LAYERS[0], hidden, k);
    let mut down = Trained::<B, T>::new(backend, run, LAYERS[1], n, hidden);
    let rule = &run.case["optimizers"]["sgd"];
    let [lr, momentum] = ["lr", "momentum"].map(|name| rule[name].as_f64().expect("a number") as f32);
    let (inputs, targets) = (run.tensor("X"), run.tensor("T"));
    let mut records = Vec::new();
    for (x, t) in inputs.chunks(m * k).zip(targets.chunks(m * n)) {
        let x = backend.upload(&rounded::<T>(x)).expect("an upload");
        let (z, of_up) = up.layer.forward_train(Matrix::new(B::read(&x), m, k)).expect("forward");
        let zs = download(backend, &z, m * hidden);
        let sigmoid = |value: &T| 1.0 / (1.0 + (-value.to_f64()).exp());
        let s: Vec<T> = zs.iter().map(|z| T::from_f64(z.to_f64() * sigmoid(z))).collect();
        let s = backend.upload(&s).expect("an upload");
        let (y, of_down) = down.layer.forward_train(Matrix::new(B::read(&s), m, hidden)).expect("forward");
        let errors: Vec<f64> = download(backend, &y, m * n).iter().zip(t).map(|(y, t)| y.to_f64() - t).collect();
        let count = errors.len() as f64;
        let loss = errors.iter().map(|error| error * error).sum::<f64>() / count;
        let dy: Vec<T> = errors.iter().map(|error| T::from_f64(2.0 * error / count)).collect();
        let (ds, of_down) = backward(&down, &of_down, &y, &dy);
        let slope = |z: &T| sigmoid(z) * (1.0 + z.to_f64() * (1.0 - sigmoid(z)));
        let dz: Vec<T> = zs.iter().zip(&ds).map(|(z, ds)| T::from_f64(slope(z) * ds.to_f64())).collect();
        let (_, of_up) = backward(&up, &of_up, &z, &dz);
        let squares = of_up.iter().chain(&of_down).flatten().map(|value| f64::from(*value).powi(2)).sum::<f64>();
        records.push([loss, squares.sqrt()]);
        up.step(&of_up, lr, momentum);
        down.step(&of_down, lr, momentum);
    }
    let parts = [up.parts, down.parts].into_iter().flatten().map(|(value, _)| value);
    (records, parts.collect())
}

/// |got − expected| / |expected| over all factors and magnitudes.
fn distance(got: &[Vec<f64>], expected: &[Vec<f64>]) -> f64 {
    let pairs = || got.iter().flatten().zip(expected.iter().flatten());
    assert_eq!(got.iter().map(Vec::len).collect::<Vec<_>>(), expected.iter().map(Vec::len).collect::<Vec<_>>());
    let error: f64 = pairs().map(|(got, expected)| (got - expected).powi(2)).sum();
    (error / pairs().map(|(_, expected)| expected * expected).sum::<f64>()).sqrt()
}

fn wide(parts: &[Vec<f32>]) -> Vec<Vec<f64>> {
    parts.iter().map(|part| part.iter().map(|&value| f64::from(value)).collect()).collect()
}

fn recorded_end(run: &Run) -> [Vec<Vec<f64>>; 2] {
    let f32 = Adapter::load(folder().join("adapter_final_sgd")).expect("an adapter");
    let parts = ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"];
    let names = LAYERS.into_iter().flat_map(|layer| parts.map(|part| format!("{layer}.{part}")));
    let of_f64 = names.map(|name| run.tensor(&format!("final_sgd/f64/base_model.model.{name}"))).collect();
    let of_f32 = LAYERS.into_iter().flat_map(|name| {
        let (_, factors) = f32.get(name).expect("factors");
        [Some(&factors.a), Some(&factors.b), factors.magnitude.as_ref()]
            .map(|part| wide(&[part.expect("a part").to_f32()]).swap_remove(0))
    });
    [of_f32.collect(), of_f64]
}

#[test]
fn the_recorded_run_is_repeated() {
    let run = Run::load();
    let (records, end) = train::<_, f32>(&Cpu, &run);
    let (losses, norms) = (run.numbers("f32", "losses"), run.numbers("f32", "grad_norms"));
    assert_eq!((records.len(), losses.len()), (20, 20));
    for (step, (got, expected)) in records.iter().zip(losses.iter().zip(&norms)).enumerate() {
        for (got, expected) in got.iter().zip([expected.0, expected.1]) {
            // As for the recorded runs of the Llama: sums of f32 in another order, some 2⁻²³ a step.
            assert!((got - expected).abs() <= 2e-6 * expected, "step {step}: {got}, recorded {expected}");
        }
    }
    let [of_f32, of_f64] = recorded_end(&run);
    let (error, of_torch) = (distance(&wide(&end), &of_f32), distance(&of_f32, &of_f64));
    assert!(error <= 4.0 * of_torch, "the final adapter is off by {error:e}, torch's f32 by {of_torch:e}");
}

/// Losses of a run in 16 bits stay as near to the f64 run as those of the recorded Llama do.
fn follows<B: Backend, T: Element>(backend: &B, allowed: f64) {
    let run = Run::load();
    let (records, _) = train::<B, T>(backend, &run);
    for (step, ([got, _], expected)) in records.iter().zip(run.numbers("f64", "losses")).enumerate() {
        assert!((got - expected).abs() <= allowed * expected, "step {step}: {got}, recorded {expected}");
    }
}

#[test]
fn sixteen_bits_follow_it() {
    follows::<_, bf16>(&Cpu, 4e-3);
    follows::<_, f16>(&Cpu, 5e-4);
}

#[test]
#[cfg(all(feature = "emulator", feature = "cuda"))]
fn the_kernels_follow_it() {
    use fused_lora::emulator::Emulator;
    use fused_lora::plan::Device;
    for arch in [80, 90] {
        let emulator = Emulator::new(Device::of_arch("emulated", arch, 3));
        follows::<_, bf16>(&emulator, 4e-3);
        follows::<_, f16>(&emulator, 5e-4);
    }
}
