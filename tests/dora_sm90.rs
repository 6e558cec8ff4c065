//! DoRA in the Hopper kernels, executed on the emulator: a gain of the columns of y, and the gradient of the magnitude.
#![cfg(all(feature = "emulator", feature = "cuda"))]

mod common;

use common::data::{Placement, Spec};
use common::emulated::Emulated;
use common::hopper::{COLUMNS, Case, PLACEMENTS, RANKS, ROWS, TILES, table, variants};
use common::{Host, HostBackward, HostForward, HostMagnitude, check};
use fused_lora::emulator::{Checks, Counters, Emulator, Timing};
use fused_lora::plan::{Device, Family, Options, Plan};
use fused_lora::{Dtype, Element, bf16, f16, raw};
use rayon::prelude::*;

const TIMINGS: [Timing; 3] = [Timing::Eager, Timing::Lazy, Timing::Mixed];

/// A Hopper GPU of `sms` SMs.
fn hopper(sms: u32, options: Options) -> Emulator {
    Emulator::new(Device::of_arch("emulated", 90, sms)).with_plan_options(options)
}

/// A case on a GPU with too few SMs for its units, or with more than enough, and with its own order of events.
fn backend(case: &Case) -> Emulated {
    let Case { options, turn, .. } = *case;
    let sms = [2, 3, 5, 33][(turn / 2) % 4];
    Emulated(hopper(sms, options).with_seed(turn as u64).with_copies(TIMINGS[turn % 3]))
}

/// Every variant with every rank, as without a gain; which outputs are computed beside dm takes turns.
fn gained() -> Vec<Case> {
    let outputs = |turn: usize| std::array::from_fn(|at| turn.is_multiple_of(3) || !(turn + at).is_multiple_of(4));
    let gained = |case: Case| Case { spec: Spec { dora: true, outputs: outputs(case.turn), ..case.spec }, ..case };
    table().into_iter().map(gained).collect()
}

#[test]
fn forward_in_both_types() {
    gained().par_iter().for_each(|case| {
        check::forward::<f16>(&backend(case), &case.spec);
        check::forward::<bf16>(&backend(case), &case.spec);
    });
}

#[test]
fn backward_in_both_types() {
    gained().par_iter().for_each(|case| match case.turn % 2 {
        0 => check::backward::<f16>(&backend(case), &case.spec),
        _ => check::backward::<bf16>(&backend(case), &case.spec),
    });
}

/// dm with every choice of the other outputs, with ranks and without, in one chunk and in several.
#[test]
fn any_subset_of_outputs() {
    let cases =
        (0..16u32).flat_map(|bits| (0..4).map(move |way| (bits, way))).enumerate().map(|(turn, (bits, way))| {
            let options = variants()[turn % 6].with_chunks(1 + way % 2 * 2);
            let spec = Spec {
                placement: PLACEMENTS[turn % 3],
                outputs: std::array::from_fn(|at| bits >> at & 1 == 1),
                accumulate: way % 2 == 0,
                bias: turn % 3 != 0,
                dora: true,
                ..Spec::new(ROWS[6 + turn % 6], 72, 136, [24, 0, 64, 136][(turn / 3) % 4])
            };
            Case { spec, options, turn }
        });
    cases.collect::<Vec<_>>().par_iter().for_each(|case| check::backward::<bf16>(&backend(case), &case.spec));
}

/// Powers of two for gain and magnitude.
#[test]
fn small_integers_are_exact() {
    let cases = variants().into_iter().enumerate().flat_map(|(v, options)| {
        (0..3).map(move |i| {
            let turn = 3 * v + i;
            let spec =
                Spec::new(ROWS[(11 - v + 4 * i) % 12], COLUMNS[(8 + v + 5 * i) % 12], COLUMNS[(5 * v + i) % 12], 0);
            let spec = Spec {
                r: RANKS[(2 * v + 3 * i + 1) % 10],
                placement: PLACEMENTS[v % 3],
                accumulate: turn % 2 == 0,
                dora: true,
                ..spec
            };
            Case { spec: spec.integers(), options: options.with_chunks(1 + i as u32), turn }
        })
    });
    cases.collect::<Vec<_>>().par_iter().for_each(|case| {
        check::forward::<f16>(&backend(case), &case.spec);
        check::backward::<f16>(&backend(case), &case.spec);
        check::backward::<bf16>(&backend(case), &case.spec);
    });
}

/// Many units, chunks whose sums are added by whoever comes last, a last block of rows without its neighbour, steps of dy past
/// the last column.
fn busy() -> Spec {
    Spec { placement: Placement::Aligned, dora: true, ..Spec::new(300, 200, 136, 24) }
}

/// Both operations run on the Hopper family.
fn run<T: Element>(emulator: &Emulator, (mut forward, mut backward): Ops<T>) -> Ops<T> {
    assert_eq!(emulator.forward(forward.views()).expect("forward runs").plan.family(), Family::Sm90);
    assert_eq!(emulator.backward(backward.views()).expect("backward runs").plan.family(), Family::Sm90);
    (forward, backward)
}

type Ops<T> = (HostForward<T>, HostBackward<T>);

fn ops<T: Element>(spec: &Spec) -> Ops<T> {
    (spec.forward(), spec.backward())
}

/// Inputs hold NaN around their matrices, so only what was written is compared.
fn same_bits<T: Element>(a: &Ops<T>, b: &Ops<T>) -> bool {
    let dm = |op: &Ops<T>| op.1.magnitude.as_ref().map(|magnitude| magnitude.dm.data.clone());
    a.0.y.data == b.0.y.data
        && a.0.h.as_ref().map(|h| &h.data) == b.0.h.as_ref().map(|h| &h.data)
        && a.1.dx.as_ref().map(|dx| &dx.data) == b.1.dx.as_ref().map(|dx| &dx.data)
        && (&a.1.da, &a.1.db, &a.1.dbias, dm(a)) == (&b.1.da, &b.1.db, &b.1.dbias, dm(b))
}

/// A gain of ones changes no bit, with the gradient of the magnitude and without.
#[test]
fn ones_are_no_gain() {
    variants().into_par_iter().enumerate().for_each(|(turn, options)| {
        for r in [0, 24, 72] {
            let emulator = hopper(5, options.with_chunks(1 + turn as u32 % 3)).with_seed(turn as u64);
            let spec = Spec { r, dora: false, ..busy() };
            let plain = run(&emulator, ops::<bf16>(&spec));
            let (mut forward, mut backward) = ops::<bf16>(&spec);
            let ones = Some(Host { rows: 1, cols: 200, offset: 0, row_stride: 200, data: vec![1f32; 200] });
            (forward.gain, backward.gain) = (ones.clone(), ones);
            assert!(same_bits(&plain, &run(&emulator, (forward.clone(), backward.clone()))), "{options:?}");
            backward.magnitude = busy().backward::<bf16>().magnitude;
            let mut with_dm = run(&emulator, (forward, backward));
            with_dm.1.magnitude = None;
            assert!(same_bits(&plain, &with_dm), "with dm, {options:?}");
        }
    });
}

/// Neither the order of events nor the number of SMs nor a replay changes a bit.
#[test]
fn the_same_bits_every_time() {
    variants().into_par_iter().for_each(|options| {
        for chunks in [1, 3] {
            let emulator = |seed: u64| {
                let sms = [6, 2, 33][seed as usize % 3];
                let emulator = hopper(sms, options.with_chunks(chunks)).with_seed(seed);
                emulator.with_copies(TIMINGS[seed as usize % 3])
            };
            let first = run(&emulator(0), ops::<bf16>(&busy()));
            for seed in 1..6 {
                assert!(same_bits(&first, &run(&emulator(seed), ops(&busy()))), "seed {seed}, {options:?}");
            }
            let replayed = run(&emulator(7).with_replays(2), ops(&busy()));
            assert!(same_bits(&first, &replayed), "replays, {options:?}");
        }
    });
}

/// What is not finite in one column of the gain, the magnitude or a bias stays where that column goes, in edges too.
#[test]
fn what_is_not_finite_stays_in_its_column() {
    let cases = [f32::NAN, f32::INFINITY]
        .into_iter()
        .flat_map(|value| variants().into_iter().enumerate().map(move |(turn, options)| (value, turn, options)));
    cases.collect::<Vec<_>>().into_par_iter().for_each(|(value, turn, options)| {
        let spec = Spec { n: 72, m: ROWS[turn + 5], outputs: [false, false, true, true], ..busy() };
        let emulator = hopper(3, options.with_chunks(1 + turn as u32 % 2));
        let of = |at: usize| {
            let (mut forward, mut backward) = ops::<bf16>(&spec);
            // Sums over tokens of one sign: infinite, and no NaN whichever factor comes first.
            backward.dy.fill(|_, _| 1.0);
            backward.h.as_mut().expect("h").fill(|_, _| 1.0);
            let HostMagnitude { bias, magnitude, .. } = backward.magnitude.as_mut().expect("dm is wanted");
            let vectors = [forward.gain.as_mut(), backward.gain.as_mut(), Some(magnitude)];
            match vectors.into_iter().nth(at).flatten() {
                Some(vector) => {
                    let last = vector.index(0, 71);
                    vector.data[last] = value;
                }
                None => {
                    let bias = bias.as_mut().expect("a bias");
                    let last = bias.index(0, 71);
                    bias.data[last] = bf16::from_f32(value);
                }
            }
            (forward, backward)
        };
        for at in 0..4 {
            let before = of(at);
            let after = run(&emulator, before.clone());
            check::judge_forward(&before.0, &after.0, spec.values).expect("forward is right");
            check::judge_backward(&before.1, &after.1, spec.values).expect("backward is right");
        }
    });
}

/// Past the last column dy is multiplied by nothing: zeros stay zeros whatever lies behind the gain. Here the whole matrix is
/// narrower than a step.
#[test]
fn nothing_behind_the_gain_counts() {
    variants().into_par_iter().for_each(|options| {
        for n in [8, 72, 136] {
            let spec = Spec { n, placement: Placement::Strided, ..busy() };
            let before = ops::<f16>(&spec);
            let gain = before.1.gain.as_ref().expect("a gain");
            assert!(gain.data[gain.index(0, n - 1) + 1].is_nan());
            let after = run(&hopper(4, options), before.clone());
            check::judge_backward(&before.1, &after.1, spec.values).expect("backward is right");
        }
    });
}

/// The vectors go through no tensor map: bias, magnitude and dm may lie anywhere, the gain at multiples of 16 bytes.
#[test]
fn vectors_may_lie_anywhere() {
    fn moved<T: Element>(host: &Host<T>) -> Host<T> {
        let mut data = vec![host.data[0]; 3 + host.cols + 5];
        data[3..][..host.cols].copy_from_slice(&host.data[host.index(0, 0)..][..host.cols]);
        Host { rows: 1, cols: host.cols, offset: 3, row_stride: host.cols + 5, data }
    }
    for options in variants() {
        let spec = Spec { accumulate: true, ..busy() };
        let mut op = spec.backward::<bf16>();
        let HostMagnitude { bias, magnitude, dm, .. } = op.magnitude.as_mut().expect("dm is wanted");
        (*magnitude, *dm) = (moved(magnitude), moved(dm));
        *bias = bias.as_ref().map(moved);
        let before = op.clone();
        hopper(4, options).backward(op.views()).expect("backward runs");
        check::judge_backward(&before, &op, spec.values).expect("the gradients are right");
    }
}

#[test]
fn what_does_not_lie_as_it_must_is_named() {
    let device = Device::of_arch("emulated", 90, 132);
    let at = |index: u64, rows, cols| raw::Matrix::new(index << 40, rows, cols);
    let (m, n, k, r) = (300, 200, 136, 24);
    let forward = |gain| raw::Forward {
        dtype: Dtype::Bf16,
        x: at(1, m, k),
        w: at(2, n, k),
        f32_factors: false,
        a: at(3, r, k),
        b: at(4, n, r),
        scale: 1.0,
        bias: None,
        h: None,
        y: at(5, m, n),
        variant: raw::Variant { gain: Some(gain), ..raw::Variant::default() },
    };
    let options = Options::default().with_family(Family::Sm90);
    assert!(Plan::forward_with(&forward(at(6, 1, n)), &device, options).is_ok());
    let odd = raw::Matrix { ptr: (6 << 40) + 8, ..at(6, 1, n) };
    let error = Plan::forward_with(&forward(odd), &device, options).expect_err("the gain is not aligned").to_string();
    assert!(error.contains("the address of gain") && error.contains("16 bytes"), "{error}");
    let plan = Plan::forward(&forward(odd), &device).expect("the portable family takes it");
    assert!(plan.family() == Family::Portable && plan.explain().contains("the address of gain"), "{}", plan.explain());

    let backward = |y| raw::Backward {
        dtype: Dtype::Bf16,
        dy: at(1, m, n),
        w: at(2, n, k),
        f32_factors: false,
        a: at(3, r, k),
        b: at(4, n, r),
        scale: 1.0,
        x: None,
        h: None,
        dx: Some(at(5, m, k)),
        da: None,
        db: None,
        dbias: None,
        dm: Some(raw::MagnitudeGradient { y, bias: None, magnitude: at(7, 1, n), dm: at(8, 1, n) }),
        accumulate: fused_lora::Accumulate::default(),
        variant: forward(at(6, 1, n)).variant,
    };
    assert!(Plan::backward_with(&backward(at(9, m, n)), &device, options).is_ok());
    let odd = raw::Matrix { row_stride: n + 4, ..at(9, m, n) };
    let error = Plan::backward_with(&backward(odd), &device, options).expect_err("y is not aligned").to_string();
    assert!(error.contains("the row stride of y is 204 elements"), "{error}");
}

fn counted(options: Options, (mut forward, mut backward): Ops<bf16>) -> [Counters; 2] {
    let emulator = hopper(4, options).with_checks(Checks { counters: true, ..Checks::default() });
    let runs = [emulator.forward(forward.views()), emulator.backward(backward.views())];
    runs.map(|run| run.expect("the kernel runs").counters)
}

/// Bytes from and to global memory, but for looks at flags: how often depends on when.
fn moved(counters: &Counters) -> [u64; 2] {
    let looks = |line: &&ptx_emulator::Line| {
        ["ld.acquire.gpu", "ld.relaxed.gpu"].iter().any(|opcode| line.instruction.contains(opcode))
    };
    let looked: u64 = counters.lines().iter().filter(looks).map(|line| line.executed).sum();
    [counters.global_loaded - 4 * looked, counters.global_stored]
}

/// dy and y are read and written in shared memory without bank conflicts. A gain moves nothing but itself, which the threads of a
/// slab share in L1; the gradient of the magnitude y, once, and its own sums.
#[test]
fn shared_memory_and_traffic() {
    for (tile, cluster) in TILES.into_iter().flat_map(|tile| [(tile, 1), (tile, 2)]) {
        let options = Options::default().with_tile(tile).with_cluster(cluster).with_chunks(2).with_bundle(1);
        let spec = Spec { bias: false, placement: Placement::Aligned, dora: true, ..Spec::new(256, 256, 128, 16) };
        let (forward, backward) = ops::<bf16>(&spec);
        let plain = counted(options, ops(&Spec { dora: false, ..spec }));
        let gained = counted(options, (forward.clone(), HostBackward { magnitude: None, ..backward.clone() }));
        let with_dm = counted(options, (forward, backward));
        for counters in gained.iter().chain(&with_dm) {
            for line in counters.lines().iter().filter(|line| line.wavefronts > 0) {
                assert_eq!(line.conflicts, 0, "{tile:?}: {line:?}");
            }
            assert_eq!(counters.local_loaded + counters.local_stored, 0, "{options:?}");
        }
        let more = |of: &Counters, than: &Counters| {
            let (of, than) = (moved(of), moved(than));
            [of[0] - than[0], of[1] - than[1]]
        };
        // Of four slabs of rows: each thread a pair of factors for each 8 columns.
        assert_eq!(more(&gained[0], &plain[0]), [4 * 128 * (256 / 8) * 8, 0], "{options:?}");
        // Four steps each of dh and of dx, 8 factors a thread; and those of its two rows of db.
        assert_eq!(more(&gained[1], &plain[1]), [4 * 128 * (2 * 4 * 32 + 8), 0], "{options:?}");
        // For two chunks four warps have a sum of each column.
        let (y, sums, vector) = (256 * 256 * 2, 2 * 4 * 256 * 4, 256 * 4);
        assert_eq!(more(&with_dm[1], &gained[1]), [y + sums + vector, sums + vector], "{options:?}");
    }
}
