//! f32 factors in the Hopper kernels, executed on the emulator: every tile and cluster.

use fused_lora::Result;
use fused_lora::emulator::{Emulator, Run, Timing};
use rayon::prelude::*;

use super::common::emulated::Emulated;
use super::common::hopper::{COLUMNS, Case, PLACEMENTS, ROWS, TILES, variants};
use super::*;

const TIMINGS: [Timing; 3] = [Timing::Eager, Timing::Lazy, Timing::Mixed];
/// Those of factors at and around the widths of narrow tiles, of which a rank takes two columns, and no multiples of 8.
const RANKS: [usize; 12] = [1, 8, 9, 13, 16, 24, 32, 40, 64, 72, 100, 136];

/// A Hopper GPU of `sms` SMs, and no kernels but its own.
fn emulator(sms: u32, options: Options) -> Emulator {
    Emulator::new(Device::of_arch("emulated", 90, sms)).with_plan_options(options.with_family(Family::Sm90))
}

/// A case on a GPU with too few SMs for its units, or with more than enough, and with its own order of events.
fn backend(case: &Case) -> Emulated {
    let Case { options, turn, .. } = *case;
    let sms = [2, 3, 5, 33][(turn / 2) % 4];
    Emulated(emulator(sms, options).with_seed(turn as u64).with_copies(TIMINGS[turn % 3]))
}

/// Every variant with every rank. In each variant every number of rows and every number of columns has its turn; so have the
/// placements, bundles, chunks and everything that can be present or not.
fn table() -> Vec<Case> {
    let case = |(turn, (options, r)): (usize, (Options, usize))| {
        let (v, i) = (turn / RANKS.len(), turn % RANKS.len());
        let (m, n, k) = (ROWS[(5 * i + v) % 12], COLUMNS[(7 * i + 2 * v + 3) % 12], COLUMNS[(11 * i + 5 * v) % 12]);
        let dropout = HostDropout { p: [0.1, 0.5, 1.0][i % 3], seed: [i as u64, 7], in_memory: i % 2 == 1 };
        let spec = Spec {
            placement: PLACEMENTS[turn % 3],
            bias: !(turn / 2).is_multiple_of(3),
            keep_h: !turn.is_multiple_of(5),
            accumulate: (turn / 3).is_multiple_of(2),
            f32_gradients: !turn.is_multiple_of(4),
            dropout: Some(dropout).filter(|_| turn % 4 == 1),
            dora: turn % 4 == 3,
            ..Spec::new(m, n, k, r)
        };
        let options = [options, options.with_bundle(2), options.with_bundle(100)][(turn / 2) % 3];
        let options = [options, options.with_chunks(1), options.with_chunks(2), options.with_chunks(9)][(turn + v) % 4];
        Case { spec, options, turn }
    };
    let all = variants().into_iter().flat_map(|options| RANKS.map(|r| (options, r)));
    all.enumerate().map(case).collect()
}

#[test]
fn in_f16() {
    table().par_iter().for_each(|case| full::check::<f16>(&backend(case), &case.spec));
}

#[test]
fn in_bf16() {
    table().par_iter().for_each(|case| full::check::<bf16>(&backend(case), &case.spec));
}

#[test]
fn any_subset_of_outputs() {
    let cases: Vec<Case> = (1..16usize)
        .map(|bits| {
            let outputs = std::array::from_fn(|at| bits >> at & 1 == 1);
            let spec = Spec {
                placement: PLACEMENTS[bits % 3],
                outputs,
                accumulate: bits % 2 == 0,
                dora: bits % 5 == 4,
                ..Spec::new(ROWS[6 + bits % 6], 72, 136, [5, 40, 72][bits % 3])
            };
            Case { spec, options: variants()[bits % 6].with_chunks(1 + bits as u32 / 4 % 2), turn: bits }
        })
        .collect();
    cases.par_iter().for_each(|case| full::check::<bf16>(&backend(case), &case.spec));
}

#[test]
fn recorded_layers() {
    // Not those with sizes that tensor maps cannot describe: these are left to the portable kernels.
    recorded(&Emulated(Emulator::new(Device::of_arch("emulated", 90, 4))));
}

#[test]
fn exactness() {
    for tile in TILES {
        let backend = Emulated(emulator(4, Options::default().with_tile(tile)));
        one_rounding::<f16>(&backend);
        one_rounding::<bf16>(&backend);
        gradients_are_nearly_f32(&backend);
    }
}

#[test]
fn values() {
    let backend = Emulated(emulator(3, Options::default()));
    special_values::<f16>(&backend, Placement::Aligned);
    special_values::<bf16>(&backend, Placement::Aligned);
    tiny_values(&backend);
}

#[test]
fn h_goes_from_family_to_family() {
    let (own, portable) = (Emulated(emulator(3, Options::default())), Emulated::new(80, 3));
    forward_then_backward::<f16>(&own, &own);
    forward_then_backward::<bf16>(&own, &portable);
    forward_then_backward::<f16>(&portable, &own);
}

/// Several units split each factor, an odd number of them in clusters of two, and more clusters than units.
#[test]
fn many_units() {
    for (turn, options) in variants().into_iter().enumerate() {
        let spec = Spec { placement: Placement::Aligned, ..Spec::new(20, 776, 528, [9, 20][turn % 2]) };
        full::check::<bf16>(&Emulated(emulator([2, 5, 40][turn % 3], options).with_seed(turn as u64)), &spec);
    }
}

/// The same bits in any order of events, on any number of SMs, and again on the same workspace.
#[test]
fn bits_repeat() {
    type Bits = (Vec<bf16>, Option<Vec<bf16>>, Option<Vec<bf16>>, String);
    fn bits(emulator: &Emulator) -> Bits {
        let spec = Spec { placement: Placement::Aligned, ..Spec::new(300, 200, 264, 40) };
        let (mut forward, mut backward) = (spec.forward_of::<bf16, f32>(), spec.backward_of::<bf16, f32>());
        let runs: [Result<Run>; 2] = [emulator.forward(forward.views()), emulator.backward(backward.views())];
        for run in runs {
            let explained = run.expect("it runs").plan.explain();
            assert!(explained.contains("family sm90") && explained.contains("factors    f32"), "{explained}");
        }
        let gradients = format!("{:?}{:?}", backward.da, backward.db);
        (forward.y.data, forward.h.map(|h| h.data), backward.dx.map(|dx| dx.data), gradients)
    }
    variants().par_iter().for_each(|options| {
        let of = |sms| emulator(sms, options.with_chunks(3));
        let first = bits(&of(4));
        for seed in 1..4 {
            let other = of(2 + seed as u32).with_seed(seed).with_copies(TIMINGS[seed as usize % 3]);
            assert!(bits(&other) == first, "seed {seed}, {options:?}");
        }
        assert!(bits(&of(4).with_replays(2)) == first, "replayed, {options:?}");
    });
}
