//! What the kernels move, counted instruction by instruction.

use fused_lora::bf16;
use fused_lora::emulator::{Checks, Class, Counters};
use fused_lora::plan::Options;
use rayon::prelude::*;

use crate::common::data::{Placement, Spec};
use crate::common::hopper::{TILES, variants};
use crate::{busy, hopper, with_dropout};

fn counted(sms: u32, options: Options, spec: &Spec) -> [Counters; 2] {
    let emulator = hopper(sms, options).with_checks(Checks { counters: true, ..Checks::default() });
    let (mut forward, mut backward) = (spec.forward::<bf16>(), spec.backward::<bf16>());
    let runs = [emulator.forward(forward.views()), emulator.backward(backward.views())];
    runs.map(|run| run.expect("the kernel runs").counters)
}

/// Results leave for shared memory without bank conflicts, and partial sums of gradients go to and fro in whole sectors.
#[test]
fn no_bank_conflicts() {
    let spec = Spec { placement: Placement::Aligned, bias: false, ..Spec::new(256, 256, 128, 16) };
    let dropping = Spec { dropout: with_dropout(0.1, true).dropout, ..spec };
    for (tile, spec) in TILES.into_iter().flat_map(|tile| [(tile, spec), (tile, dropping)]) {
        let options = Options::default().with_tile(tile).with_cluster(2).with_chunks(2);
        let [forward, backward] = counted(4, options, &spec);
        for counters in [&forward, &backward] {
            assert!(counters.mix[&Class::Matrix] > 0, "stmatrix is counted");
            for line in counters.lines().iter().filter(|line| line.wavefronts > 0) {
                assert_eq!(line.conflicts, 0, "{tile:?}: {line:?}");
            }
        }
        let partials = |line: &&ptx_emulator::Line| {
            ["ld.global", "st.global"].iter().any(|opcode| line.instruction.contains(opcode)) && line.least_sectors > 0
        };
        let whole = backward.lines().iter().filter(partials).filter(|line| line.sectors == line.least_sectors);
        // A word per thread and register, written and read by the reductions of da and db: at least those are coalesced.
        assert!(whole.count() >= 2 * 8, "{tile:?}");
    }
}

/// Beside seed and offset, once for each CTA that finds them in memory, dropout moves no byte.
#[test]
fn dropout_moves_nothing() {
    // How often a flag is looked at depends on when.
    let moved = |counters: &Counters| {
        let looks = |line: &&ptx_emulator::Line| {
            ["ld.acquire.gpu", "ld.relaxed.gpu"].iter().any(|opcode| line.instruction.contains(opcode))
        };
        let looked: u64 = counters.lines().iter().filter(looks).map(|line| line.executed).sum();
        (counters.global_loaded - 4 * looked, counters.global_stored, counters.copied)
    };
    variants().into_par_iter().for_each(|options| {
        let options = options.with_chunks(3).with_bundle(1);
        let plain = counted(6, options, &busy());
        for (in_memory, each) in [(false, 0), (true, 16)] {
            let dropping = counted(6, options, &with_dropout(0.1, in_memory));
            for (plain, dropping) in plain.iter().zip(&dropping) {
                let (loaded, stored, copied) = moved(plain);
                let seeds = each * u64::from(dropping.resident_ctas);
                assert_eq!(moved(dropping), (loaded + seeds, stored, copied), "{options:?}, {in_memory}");
                assert_eq!(dropping.local_loaded + dropping.local_stored, 0, "{options:?}");
            }
        }
    });
}

/// Of the operand that a cluster shares each byte is fetched once for both of its CTAs.
#[test]
fn a_cluster_fetches_weights_once() {
    let (m, n, k) = (512, 768, 128);
    let spec = Spec { placement: Placement::Aligned, bias: false, ..Spec::new(m, n, k, 0) };
    for (tile, columns) in TILES.into_iter().zip([256, 192, 128]) {
        for cluster in [1, 2] {
            let options = Options::default().with_tile(tile).with_cluster(cluster);
            let [forward, _] = counted(4, options, &spec);
            let (rows, weights) = (n / columns * m * k * 2, m / 128 / cluster as usize * n * k * 2);
            assert_eq!(forward.global_loaded, (rows + weights) as u64, "{options:?}");
            // Beside y only words: tickets and arrivals, and the clearing of all at the end: three (LORA_SYNC_FLAGS) and the flags.
            let words = forward.atomics + (m / 128 + 3) as u64;
            assert_eq!(forward.global_stored, (m * n * 2) as u64 + 4 * words, "{options:?}");
            assert_eq!(forward.local_loaded + forward.local_stored, 0, "{options:?}");
        }
    }
}

/// How fast the emulator is: `cargo test --test sm90 -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement, not a test"]
fn speed_of_a_product_of_1024_cubed() {
    let mut op =
        Spec { placement: Placement::Aligned, bias: false, ..Spec::new(1024, 1024, 1024, 0) }.forward::<bf16>();
    let none = Checks { races: false, uninitialised: false, counters: false };
    for options in [variants()[0], variants()[1]] {
        for checks in [none, Checks { races: true, ..none }, Checks::default(), Checks { counters: true, ..none }] {
            let start = std::time::Instant::now();
            let run = hopper(4, options).with_checks(checks).forward(op.views()).expect("forward runs");
            let seconds = start.elapsed().as_secs_f64();
            println!("{seconds:.2} s with {checks:?}, {options:?}: {:?}", run.counters);
        }
    }
}
