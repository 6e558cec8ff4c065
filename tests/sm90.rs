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

#[test]
fn sweep() {
    use fused_lora::emulator::{Emulator, Timing};
    use fused_lora::plan::Device;
    let mut count = 0;
    for (i, &(m, n, k, r)) in [
        (1, 8, 8, 1usize.next_multiple_of(8)),
        (130, 264, 72, 24),
        (257, 520, 200, 64),
        (384, 136, 328, 128),
        (300, 328, 128, 200),
        (129, 72, 640, 256),
        (700, 264, 264, 40),
        (513, 1032, 64, 0),
        (64, 64, 64, 8),
    ]
    .iter()
    .enumerate()
    {
        for tile in TILES {
            for cluster in [1, 2] {
                for seed in 0..2u64 {
                    let spec = Spec {
                        placement: Placement::Aligned,
                        accumulate: seed == 1,
                        f32_gradients: seed == 0,
                        ..Spec::new(m, n, k, r)
                    };
                    let timing = [Timing::Eager, Timing::Lazy, Timing::Mixed][(seed as usize + i) % 3];
                    let mut options =
                        Options::default().with_tile(tile).with_cluster(cluster).with_bundle(1 + seed as u32 * 2);
                    if seed == 1 {
                        options = options.with_chunks(3);
                    }
                    let sms = [2, 4, 6, 33][(seed as usize + i) % 4];
                    let backend = Emulated(
                        Emulator::new(Device::of_arch("emulated", 90, sms))
                            .with_seed(seed)
                            .with_copies(timing)
                            .with_plan_options(options)
                            .with_replays(1 - seed as u32),
                    );
                    eprintln!("{m} {n} {k} {r} {tile:?} {cluster} {seed}");
                    check::forward::<bf16>(&backend, &spec);
                    check::backward::<fused_lora::f16>(&backend, &spec);
                    count += 1;
                }
            }
        }
    }
    eprintln!("{count} cases");
}
