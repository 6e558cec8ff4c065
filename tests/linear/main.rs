//! Layers: every operation against the oracle on the CPU and on the emulator, merge and rounding bit by bit, adapters that come
//! and go, PEFT's recorded layers, and misuse.
#![allow(clippy::useless_vec, reason = "buffers are vectors, as a layer's are")]

mod adapters;
#[path = "../common/mod.rs"]
mod common;
mod computes;
mod exchanged;
mod failing;
mod matrix;
mod projections;
mod refused;
mod states;

use common::data::Spec;
use common::layers;
use fused_lora::cpu::Cpu;
use fused_lora::linear::{Adapter, Buffers, LoraLinear, Scaling};
use fused_lora::{Error, Matrix, bf16};

type Layer = LoraLinear<Cpu, bf16>;

/// N = 3, K = 4, adapters "one" (f32, R = 2) and "other" (R = 3).
fn small() -> Layer {
    layers::make::<Cpu, bf16>(&Cpu, &Spec { bias: false, ..Spec::new(5, 3, 4, 2) }, true).layer
}

fn adapter(a: usize, b: usize) -> Adapter<Cpu, bf16> {
    Adapter::upload(&Cpu, 2, Scaling::Lora { alpha: 4.0 }, &vec![bf16::ONE; a], &vec![bf16::ONE; b])
        .expect("an adapter")
}

fn state(error: &Error, operation: &str) -> bool {
    matches!(error, Error::State { operation: got, .. } if *got == operation)
}

/// All that a layer has, and what it makes of an x.
fn snapshot(layer: &Layer) -> String {
    let x = [bf16::ONE; 4];
    let y = layer.forward(Matrix::new(&x[..], 1, 4)).map_err(|error| error.to_string());
    let adapters: Vec<_> = layer
        .names()
        .into_iter()
        .map(|name| {
            let buffers = match layer.adapter(name).map(Adapter::buffers) {
                Some(Buffers::Storage { a, b, b_bias, magnitude }) => format!("{a:?} {b:?} {b_bias:?} {magnitude:?}"),
                Some(Buffers::F32 { a, b, b_bias, magnitude }) => format!("{a:?} {b:?} {b_bias:?} {magnitude:?}"),
                None => String::new(),
            };
            (name, buffers)
        })
        .collect();
    format!("{layer:?} {:?} {:?} {adapters:?} {y:?}", layer.weight(), layer.bias())
}
