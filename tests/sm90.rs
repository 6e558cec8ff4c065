//! The Hopper kernels executed on a CPU model of the PTX ISA: every tile and cluster, shapes, exactness, repeatability.
#![cfg(all(feature = "emulator", feature = "cuda"))]

mod common;

use common::data::{Placement, Spec, subset_table};
use common::emulated::Emulated;
use common::hopper::{COLUMNS, Case, PLACEMENTS, RANKS, ROWS, TILES, table, variants};
use common::{Backend, Cpu, Host, HostBackward, HostDropout, HostForward, HostGradient, check};
use fused_lora::emulator::{Checks, Class, Counters, Emulator, Timing};
use fused_lora::plan::{Device, Family, Options, Params, Plan, SYNC_BYTES};
use fused_lora::{Accumulate, Dtype, Element, bf16, f16, raw};
use ptx_emulator::Memory;
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

fn in_parallel(cases: Vec<Case>, check: impl Fn(&Case) + Sync + Send) {
    cases.par_iter().for_each(check);
}

#[test]
fn forward_in_f16() {
    in_parallel(table(), |case| check::forward::<f16>(&backend(case), &case.spec));
}

#[test]
fn forward_in_bf16() {
    in_parallel(table(), |case| check::forward::<bf16>(&backend(case), &case.spec));
}

#[test]
fn backward_in_f16() {
    in_parallel(table(), |case| check::backward::<f16>(&backend(case), &case.spec));
}

#[test]
fn backward_in_bf16() {
    in_parallel(table(), |case| check::backward::<bf16>(&backend(case), &case.spec));
}

#[test]
fn any_subset_of_outputs() {
    let subsets = subset_table(150, 72, 136, 24).into_iter().enumerate().map(|(turn, spec)| {
        let placement = PLACEMENTS[turn % 3];
        let r = if turn % 8 == 7 { 0 } else { spec.r };
        let options = variants()[(turn + turn / 12) % 6].with_chunks(1 + turn as u32 / 4 % 2);
        Case { spec: Spec { placement, r, ..spec }, options, turn }
    });
    in_parallel(subsets.collect(), |case| check::backward::<bf16>(&backend(case), &case.spec));
}

#[test]
fn small_integers_are_exact() {
    let cases = variants().into_iter().enumerate().map(|(v, options)| {
        let spec = Spec::new(ROWS[11 - v], COLUMNS[8 + v % 3], COLUMNS[(5 * v + 1) % 12], RANKS[(2 * v + 1) % 10]);
        let spec = Spec { placement: PLACEMENTS[v % 3], accumulate: v % 2 == 0, f32_gradients: v % 4 < 2, ..spec };
        Case { spec: spec.integers(), options: options.with_chunks(1 + v as u32), turn: v }
    });
    in_parallel(cases.collect(), |case| {
        check::forward::<f16>(&backend(case), &case.spec);
        check::forward::<bf16>(&backend(case), &case.spec);
        check::backward::<f16>(&backend(case), &case.spec);
        check::backward::<bf16>(&backend(case), &case.spec);
    });
}

/// Dropout with probabilities from hardly any to all, passed and in memory.
fn dropping(case: &Case) -> Case {
    let turn = case.turn;
    let p = [0.5, 0.1, 0.9, 1.0 / 65536.0, 1.0][turn % 5];
    let seed = [turn as u64 * 0x1234_5678_9abc, turn as u64];
    Case {
        spec: Spec { dropout: Some(HostDropout { p, seed, in_memory: turn.is_multiple_of(2) }), ..case.spec },
        ..*case
    }
}

#[test]
fn dropout_in_forward() {
    in_parallel(table(), |case| match case.turn % 2 {
        0 => check::forward::<f16>(&backend(case), &dropping(case).spec),
        _ => check::forward::<bf16>(&backend(case), &dropping(case).spec),
    });
}

#[test]
fn dropout_in_backward() {
    in_parallel(table(), |case| match case.turn % 2 {
        0 => check::backward::<bf16>(&backend(case), &dropping(case).spec),
        _ => check::backward::<f16>(&backend(case), &dropping(case).spec),
    });
}

/// More steps than there are columns to draw for, and fewer, in every tile; each length of the tail. With p a half the factor
/// is 2 and every result an integer.
#[test]
fn small_integers_are_exact_under_dropout() {
    let cases = variants().into_iter().enumerate().flat_map(|(v, options)| {
        [(1160, 16), (200, 40), (1032, 72), (64, 136)].into_iter().enumerate().map(move |(i, (n, r))| {
            let dropout = Some(HostDropout { p: 0.5, seed: [v as u64, i as u64], in_memory: i % 2 == 0 });
            let spec = Spec { dropout, ..Spec::new(ROWS[(v + 2 * i) % 12], n, COLUMNS[(5 * v + 3 * i) % 12], r) };
            let spec = Spec { placement: PLACEMENTS[v % 3], accumulate: i % 2 == 0, ..spec };
            Case { spec: spec.integers(), options: options.with_chunks(1 + v as u32 % 3), turn: 4 * v + i }
        })
    });
    in_parallel(cases.collect(), |case| {
        check::forward::<f16>(&backend(case), &case.spec);
        check::backward::<f16>(&backend(case), &case.spec);
    });
}

/// Sets every element of a matrix.
fn fill<T: Element>(host: &mut Host<T>, value: impl Fn(usize, usize) -> f32) {
    for (i, j) in (0..host.rows).flat_map(|i| (0..host.cols).map(move |j| (i, j))) {
        let at = host.index(i, j);
        host.data[at] = T::from_f32(value(i, j));
    }
}

/// With unit matrices for a, or for dy and b, outputs are x where it is kept: what is kept is what the definition says, on
/// this backend and on the CPU, in all three places where it matters.
#[test]
fn the_mask_is_that_of_the_definition() {
    let unit = |i: usize, j: usize| if i == j { 1.0 } else { 0.0 };
    for (turn, options) in variants().into_iter().enumerate() {
        let dropout = HostDropout { p: 0.5, seed: [u64::MAX / 3, turn as u64 + (7 << 33)], in_memory: turn % 2 == 0 };
        let case = Case { spec: Spec { scale: 1.0, ..Spec::new(200, 64, 136, 136) }, options, turn };
        let emulated = backend(&case);
        let keep = |m, k| -> Vec<f32> { dropout.keep(m, k).data.iter().map(|&keep| keep as f32).collect() };
        let elements = |host: &Host<bf16>| -> Vec<f32> {
            (0..host.rows * host.cols)
                .map(|at| host.data[host.index(at / host.cols, at % host.cols)].to_f32())
                .collect()
        };

        let spec = Spec { dropout: Some(dropout), ..case.spec };
        let mut op = spec.forward::<bf16>();
        fill(&mut op.x, |_, _| 1.0);
        fill(&mut op.a, unit);
        let mut on_cpu = op.clone();
        emulated.forward(&mut op).expect("forward runs");
        Cpu.forward(&mut on_cpu).expect("forward runs");
        let h = op.h.as_ref().map(elements);
        assert_eq!(h, Some(keep(200, 136)), "h, {options:?}");
        assert_eq!(h, on_cpu.h.as_ref().map(elements), "h, {options:?}");

        // dy, b and therefore dh are unit matrices, but for the factor; without w dx is dh A.
        let spec = Spec { m: 136, n: 136, k: 264, f32_gradients: false, ..spec };
        let mut op = spec.backward::<bf16>();
        [&mut op.dy, &mut op.b].into_iter().for_each(|host| fill(host, unit));
        fill(&mut op.w, |_, _| 0.0);
        fill(&mut op.a, |_, _| 1.0);
        fill(op.x.as_mut().expect("x"), |_, _| 1.0);
        emulated.backward(&mut op).expect("backward runs");
        assert_eq!(op.dx.as_ref().map(elements), Some(keep(136, 264)), "dx, {options:?}");
        let Some(HostGradient::Storage(da)) = &op.da else { unreachable!("da is of the storage type") };
        assert_eq!(elements(da), keep(136, 264), "da, {options:?}");
    }
}

/// What goes through no tensor map may lie anywhere: the bias, and the gradients of the adapter and the bias.
#[test]
fn bias_and_gradients_may_lie_anywhere() {
    fn moved<T: Element>(host: &Host<T>) -> Host<T> {
        let (offset, row_stride) = (3, host.cols + 5);
        let mut data = vec![host.data[0]; offset + host.rows * row_stride];
        for row in 0..host.rows {
            let from = host.index(row, 0);
            data[offset + row * row_stride..][..host.cols].copy_from_slice(&host.data[from..][..host.cols]);
        }
        Host { rows: host.rows, cols: host.cols, offset, row_stride, data }
    }
    fn gradient<T: Element>(gradient: &HostGradient<T>) -> HostGradient<T> {
        match gradient {
            HostGradient::Storage(host) => HostGradient::Storage(moved(host)),
            HostGradient::F32(host) => HostGradient::F32(moved(host)),
        }
    }
    for (turn, options) in variants().into_iter().enumerate() {
        let spec = Spec { accumulate: true, f32_gradients: turn % 2 == 0, ..Spec::new(150, 72, 136, 24) };
        let emulator = hopper(4, options);
        let mut op = spec.forward::<bf16>();
        op.bias = op.bias.as_ref().map(moved);
        let before = op.clone();
        emulator.forward(op.views()).expect("forward runs");
        check::judge_forward(&before, &op, spec.values).expect("y is right");
        let mut op = spec.backward::<bf16>();
        for output in [&mut op.da, &mut op.db, &mut op.dbias] {
            *output = output.as_ref().map(gradient);
        }
        let before = op.clone();
        emulator.backward(op.views()).expect("backward runs");
        check::judge_backward(&before, &op, spec.values).expect("the gradients are right");
    }
}

/// Without a choice the family is the Hopper one where a call allows it, and else the portable one, which takes everything.
#[test]
fn what_the_family_cannot_do_the_portable_one_does() {
    let aligned = Spec { placement: Placement::Aligned, ..Spec::new(150, 72, 136, 24) };
    let cases = [
        (aligned, Family::Sm90),
        (Spec { placement: Placement::Strided, m: 1, ..aligned }, Family::Sm90),
        (Spec { r: 256, ..aligned }, Family::Sm90),
        (Spec { r: 264, ..aligned }, Family::Portable),
        (Spec { placement: Placement::Unaligned, ..aligned }, Family::Portable),
        (Spec { n: 73, ..aligned }, Family::Portable),
        (Spec { k: 132, ..aligned }, Family::Portable),
        (Spec { r: 4, ..aligned }, Family::Portable),
    ];
    for (spec, family) in cases {
        // What is possible can be asked for; of what is not, asking is an error and the planner's own choice another.
        let asked = Options::default().with_family(Family::Sm90);
        let emulator = hopper(4, if family == Family::Sm90 { asked } else { Options::default() });
        let (mut forward, mut backward) = (spec.forward::<bf16>(), spec.backward::<bf16>());
        if family != Family::Sm90 {
            assert!(hopper(4, asked).forward(forward.views()).is_err(), "{spec:?}");
        }
        let runs = [emulator.forward(forward.views()), emulator.backward(backward.views())];
        for run in runs {
            assert_eq!(run.expect("the kernel runs").plan.family(), family, "{spec:?}");
        }
        check::forward::<bf16>(&Emulated(emulator.clone()), &spec);
        check::backward::<bf16>(&Emulated(emulator), &spec);
    }
}

/// Every bit a run leaves in its outputs.
fn bits<T: Element>(emulator: &Emulator, spec: &Spec) -> (HostForward<T>, HostBackward<T>) {
    let (mut forward, mut backward) = (spec.forward::<T>(), spec.backward::<T>());
    emulator.forward(forward.views()).expect("forward runs");
    let run = emulator.backward(backward.views()).expect("backward runs");
    assert_eq!(run.plan.family(), Family::Sm90);
    (forward, backward)
}

fn same_bits<T: Element>(a: &(HostForward<T>, HostBackward<T>), b: &(HostForward<T>, HostBackward<T>)) -> bool {
    // Inputs hold NaN around their matrices, so only what was written is compared.
    a.0.y.data == b.0.y.data
        && a.0.h.as_ref().map(|h| &h.data) == b.0.h.as_ref().map(|h| &h.data)
        && a.1.dx.as_ref().map(|dx| &dx.data) == b.1.dx.as_ref().map(|dx| &dx.data)
        && (&a.1.da, &a.1.db, &a.1.dbias) == (&b.1.da, &b.1.db, &b.1.dbias)
}

/// Many units, three chunks whose sums are added by whoever comes last, a last block of rows without its neighbour.
fn busy() -> Spec {
    Spec { placement: Placement::Aligned, ..Spec::new(300, 200, 136, 24) }
}

fn chunks(plan: &Plan) -> u32 {
    match plan.launch(256, plan.workspace_bytes()).expect("a launch").params {
        Params::Sm90Backward(params) => params.chunks,
        _ => 0,
    }
}

/// Twenty orders of events; tiles, clusters and types take turns.
#[test]
fn the_same_bits_for_every_seed() {
    fn run<T: Element>(turn: usize, options: Options) {
        let emulator = hopper(6, options.with_chunks(3));
        let first = bits::<T>(&emulator, &busy());
        let mut op = busy().backward::<T>();
        assert_eq!(chunks(&emulator.backward(op.views()).expect("backward runs").plan), 3);
        for seed in (2..22).filter(|seed| seed % 2 == turn as u64 % 2) {
            let emulator = emulator.clone().with_seed(seed).with_copies(TIMINGS[seed as usize % 3]);
            assert!(same_bits(&first, &bits::<T>(&emulator, &busy())), "{:?}, seed {seed}, {options:?}", T::DTYPE);
        }
    }
    let all: Vec<_> = (0..2).flat_map(|turn| variants().into_iter().map(move |options| (turn, options))).collect();
    all.into_par_iter().for_each(|(turn, options)| {
        run::<f16>(turn, options);
        run::<bf16>(1 - turn, options);
    });
}

/// Where the plan's choices are made, the number of SMs does not change a bit.
#[test]
fn the_same_bits_for_any_number_of_sms() {
    for options in variants() {
        let run = |sms| bits::<bf16>(&hopper(sms, options.with_chunks(3)).with_seed(u64::from(sms)), &busy());
        let first = run(2);
        for sms in [3, 7, 64] {
            assert!(same_bits(&first, &run(sms)), "{sms} SMs, {options:?}");
        }
    }
}

/// A second and third launch on the same workspace find it as the first did.
#[test]
fn replays_find_the_workspace_clean() {
    for options in variants() {
        let emulator = hopper(4, options.with_chunks(2));
        let once = bits::<f16>(&emulator, &busy());
        assert!(same_bits(&once, &bits::<f16>(&emulator.with_replays(2), &busy())), "{options:?}");
    }
}

fn with_dropout(p: f32, in_memory: bool) -> Spec {
    Spec { dropout: Some(HostDropout { p, seed: [11, 1 << 40], in_memory }), ..busy() }
}

/// p = 0 gives the bits of no dropout; seed and offset have the same effect wherever they are; neither the order of events
/// nor the number of SMs has any.
#[test]
fn the_bits_of_dropout_depend_on_seed_and_offset_alone() {
    variants().into_par_iter().enumerate().for_each(|(turn, options)| {
        let emulator = |seed: u64| {
            let sms = [6, 2, 33][seed as usize % 3];
            hopper(sms, options.with_chunks(3)).with_seed(seed).with_copies(TIMINGS[seed as usize % 3])
        };
        let run = |seed, spec: &Spec| bits::<bf16>(&emulator(seed), spec);
        assert!(same_bits(&run(0, &busy()), &run(0, &with_dropout(0.0, turn % 2 == 0))), "p = 0, {options:?}");
        let first = run(0, &with_dropout(0.3, true));
        for seed in 1..6 {
            assert!(same_bits(&first, &run(seed, &with_dropout(0.3, seed % 2 == 0))), "seed {seed}, {options:?}");
        }
        for seed in [[12, 1 << 40], [11, 1 << 41], [11 + (1 << 32), 1 << 40], [11, (1 << 40) + 1]] {
            let dropout = Some(HostDropout { p: 0.3, seed, in_memory: false });
            let other = run(0, &Spec { dropout, ..busy() });
            assert!(first.0.h != other.0.h && first.1.dx != other.1.dx && first.1.da != other.1.da, "{seed:?}");
        }
    });
}

/// Launches a plan in which 2^`shift` blocks of rows share a flag, as the planner has it from a million rows on.
fn with_shared_flags(emulator: &Emulator, memory: &mut Memory, plan: &Plan, shift: u32) {
    let workspace = memory.alloc("workspace", plan.workspace_bytes());
    memory.write(workspace, &[0; SYNC_BYTES]).expect("a workspace");
    let mut launch = plan.launch(workspace, plan.workspace_bytes()).expect("a launch");
    match &mut launch.params {
        Params::Sm90Forward(params) => params.flag_shift = shift,
        Params::Sm90Backward(params) => params.flag_shift = shift,
        _ => unreachable!("a launch of the Hopper family"),
    }
    emulator.run(memory, &launch).expect("the kernel runs");
}

fn upload(memory: &mut Memory, host: &Host<bf16>, initialised: bool) -> raw::Matrix {
    let bytes: Vec<u8> = host.data.iter().flat_map(|value| value.to_le_bytes()).collect();
    let ptr = memory.alloc("matrix", bytes.len());
    if initialised {
        memory.write(ptr, &bytes).expect("an upload");
    }
    raw::Matrix::new(ptr, host.rows, host.cols)
}

fn download(memory: &Memory, from: raw::Matrix) -> Vec<bf16> {
    let bytes = memory.read(from.ptr, from.rows * from.cols * 2).expect("a download");
    bytes.as_chunks().0.iter().map(|bytes| bf16::from_le_bytes(*bytes)).collect()
}

#[test]
fn shared_flags() {
    for (turn, options) in variants().into_iter().enumerate() {
        let spec = Spec { f32_gradients: false, outputs: [true, true, false, false], ..Spec::new(700, 72, 136, 24) };
        let shift = 1 + turn as u32 % 3;
        let emulator = hopper(4, options.with_chunks(2)).with_seed(turn as u64);
        let expected = bits::<bf16>(&emulator, &spec);
        let mut memory = Memory::new();
        let HostForward { x, w, a, b, bias, .. } = &expected.0;
        let [x, w, a, b] = [x, w, a, b].map(|host| upload(&mut memory, host, true));
        let y = upload(&mut memory, &expected.0.y, false);
        let bias = bias.as_ref().map(|bias| upload(&mut memory, bias, true));
        let variant = raw::Variant::default();
        let op = raw::Forward { dtype: Dtype::Bf16, x, w, f32_factors: false, a, b, scale: spec.scale, bias, h: None, y, variant };
        let plan = Plan::forward_with(&op, emulator.device(), options).expect("a plan");
        with_shared_flags(&emulator, &mut memory, &plan, shift);
        assert!(download(&memory, y) == expected.0.y.data, "y, {options:?}");

        let HostBackward { dy, w, a, b, x, dx, da, .. } = &expected.1;
        let [dy, w, a, b] = [dy, w, a, b].map(|host| upload(&mut memory, host, true));
        let x = x.as_ref().map(|x| upload(&mut memory, x, true));
        let dx = dx.as_ref().map(|dx| (upload(&mut memory, dx, false), &dx.data));
        let Some(HostGradient::Storage(da)) = da else { unreachable!("da is of the storage type") };
        let da = (upload(&mut memory, da, false), &da.data);
        let op = raw::Backward {
            dtype: Dtype::Bf16,
            dy,
            w,
            f32_factors: false,
            a,
            b,
            scale: spec.scale,
            x,
            h: None,
            dx: dx.map(|(dx, _)| dx),
            da: Some(raw::Gradient { matrix: da.0, f32: false }),
            db: None,
            dbias: None,
            dm: None,
            accumulate: Accumulate::default(),
            variant: raw::Variant::default(),
        };
        let plan = Plan::backward_with(&op, emulator.device(), options.with_chunks(2)).expect("a plan");
        with_shared_flags(&emulator, &mut memory, &plan, shift);
        for (matrix, expected) in dx.into_iter().chain([da]) {
            assert!(&download(&memory, matrix) == expected, "dx or da, {options:?}");
        }
    }
}

/// A chunk that waits for more flags of dh than are looked at together, and one more than that; one that waits for fewer.
#[test]
fn a_chunk_waits_for_all_its_flags() {
    for (turn, m) in [7 * 128 + 1, 8 * 128, 8 * 128 + 1, 17 * 128].into_iter().enumerate() {
        let spec =
            Spec { placement: Placement::Aligned, outputs: [false, true, false, false], ..Spec::new(m, 64, 64, 16) };
        for (sms, options) in [(2, variants()[turn % 6]), (33, variants()[(turn + 1) % 6])] {
            let emulator = hopper(sms, options.with_chunks(1)).with_seed(turn as u64).with_copies(TIMINGS[turn % 3]);
            check::backward::<bf16>(&Emulated(emulator), &spec);
        }
    }
}

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
            // Beside y only words: tickets and arrivals, and the clearing of all at the end.
            let words = forward.atomics + (m / 128 + 2) as u64;
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
