//! The Hopper kernels executed on a CPU model of the PTX ISA.
#![cfg(all(feature = "emulator", feature = "cuda"))]

mod common;

use common::check;
use common::data::{Placement, Spec};
use common::emulated::Emulated;
use fused_lora::bf16;
use fused_lora::plan::{Options, TileSize};

const TILES: [TileSize; 3] = [TileSize::Sm90N128, TileSize::Sm90N192, TileSize::Sm90N256];

#[test]
fn first_forward() {
    let spec = Spec { placement: Placement::Aligned, ..Spec::new(256, 256, 128, 16) };
    for tile in TILES {
        for cluster in [1, 2] {
            eprintln!("{tile:?} {cluster}");
            let backend = Emulated::new(90, 4).with_options(Options::default().with_tile(tile).with_cluster(cluster));
            check::forward::<bf16>(&backend, &spec);
        }
    }
}

#[test]
fn first_backward() {
    let spec = Spec { placement: Placement::Aligned, ..Spec::new(256, 256, 128, 16) };
    for tile in TILES {
        for cluster in [1, 2] {
            eprintln!("{tile:?} {cluster}");
            let backend = Emulated::new(90, 4).with_options(Options::default().with_tile(tile).with_cluster(cluster));
            check::backward::<bf16>(&backend, &spec);
        }
    }
}
