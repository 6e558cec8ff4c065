//! Projections that share x, on every backend: held to the oracle of single layers, and to their bits.
#![allow(clippy::panic)] // tests fail so

mod common;

use common::data::{Placement, Spec, Values};
use common::every::{Kind, backends};
use common::shared::{self, SharedSpec};
use common::{Backend, Cpu, HostDropout};
use fused_lora::{bf16, f16};
use rayon::prelude::*;

#[test]
fn every_projection_is_a_single_layer() {
    let backends = backends(Kind::Ragged, "every_projection_is_a_single_layer");
    for (turn, spec) in shared::table().iter().enumerate() {
        backends.par_iter().for_each(|backend| {
            if turn % 2 == 0 {
                shared::forward::<bf16>(backend, spec);
                shared::backward::<f16>(backend, spec);
            } else {
                shared::forward::<f16>(backend, spec);
                shared::backward::<bf16>(backend, spec);
            }
        });
    }
    for spec in shared::table() {
        shared::forward::<f32>(&Cpu, &spec);
        shared::backward::<f32>(&Cpu, &spec);
    }
}

/// As the Hopper kernels take them: dimensions and ranks in steps of 8, also ranks that end inside a step of 16.
fn hopper_table() -> Vec<SharedSpec> {
    let parts: [&[(usize, usize)]; 6] = [
        &[(64, 16), (72, 16), (264, 16)],
        &[(256, 8), (8, 24), (120, 40), (136, 8)],
        &[(200, 0), (64, 136)],
        &[(128, 64), (128, 64)],
        &[(40, 0), (24, 0), (400, 0)],
        &[(16, 256), (72, 8), (64, 104)],
    ];
    let of = |(i, parts): (usize, &&[(usize, usize)])| {
        let (m, k) = ([129, 64, 200, 257, 100, 385][i], [136, 64, 72, 200, 264, 56][i]);
        let mut spec = SharedSpec::new(m, k, parts);
        let dropout = (i % 3 == 1).then_some(HostDropout { p: 0.3, seed: [5, 11], in_memory: i == 4 });
        spec.base = Spec {
            placement: [Placement::Aligned, Placement::Strided][i % 2],
            accumulate: i % 2 == 1,
            f32_gradients: i % 3 != 1,
            keep_h: i % 4 != 2,
            outputs: [i != 3, true, true, i != 2],
            dropout,
            ..spec.base
        };
        spec
    };
    parts.iter().enumerate().map(of).collect()
}

#[test]
fn every_projection_is_a_single_layer_on_hopper() {
    let backends = backends(Kind::Hopper, "every_projection_is_a_single_layer_on_hopper");
    for (turn, spec) in hopper_table().iter().enumerate() {
        backends.par_iter().for_each(|backend| {
            if turn % 2 == 0 {
                shared::forward::<bf16>(backend, spec);
                shared::backward::<f16>(backend, spec);
            } else {
                shared::forward::<f16>(backend, spec);
                shared::backward::<bf16>(backend, spec);
            }
        });
    }
}

#[test]
fn small_integers_are_exact() {
    for kind in [Kind::Ragged, Kind::Hopper] {
        for backend in backends(kind, "small_integers_are_exact") {
            let step = if kind == Kind::Hopper { 8 } else { 1 };
            for parts in [&[(16, 8), (8, 16)][..], &[(16, 0), (8, 8), (16, 24), (8, 8)]] {
                let parts: Vec<_> = parts.iter().map(|&(n, r)| (n - 8 + step, r)).collect();
                let mut spec = SharedSpec::new(70, 16, &parts);
                spec.base = Spec { placement: Placement::Aligned, accumulate: true, ..spec.base.integers() };
                assert_eq!(spec.base.values, Values::Integers);
                shared::forward::<bf16>(&backend, &spec);
                shared::backward::<bf16>(&backend, &spec);
            }
        }
    }
}

/// With one tile shape, and tokens that are not cut, y, h, db and dbias have the bits of single layers; so they have on the CPU.
#[test]
fn the_bits_of_single_layers() {
    for kind in [Kind::Ragged, Kind::Hopper] {
        let table = if kind == Kind::Ragged { shared::table() } else { hopper_table() };
        backends(kind, "the_bits_of_single_layers").par_iter().for_each(|backend| {
            for spec in &table {
                let same = shared::same_bits_as_alone::<bf16>(backend, spec);
                same.unwrap_or_else(|complaint| panic!("{}, {spec:?}: {complaint}", backend.name()));
            }
        });
    }
}
