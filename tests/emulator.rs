//! The CUDA kernels executed on a CPU model of the PTX ISA: shapes, placements, exactness, repeatability.
#![cfg(all(feature = "emulator", feature = "cuda"))]

mod common;

use common::data::{EDGES, Placement, RANKS, Routes, Spec, dropout_table, integer_table, shape_table, subset_table};
use common::emulated::Emulated;
use common::{Backend, Cpu, HostBackward, HostDropout, HostForward, HostGradient, check};
use fused_lora::emulator::{Checks, Class, Counters, Emulator, Timing};
use fused_lora::plan::{Device, TileSize};
use fused_lora::{Element, bf16, f16};

const TILES: [TileSize; 2] = [TileSize::Large, TileSize::Small];

/// The table with both tiles in turn, on a GPU with one SM and on one with many.
fn table<T: Element>(arch: u32) {
    for (i, spec) in shape_table().into_iter().enumerate() {
        let backend = Emulated::new(arch, if i % 2 == 0 { 1 } else { 8 }).with_tile(TILES[i / 2 % 2]);
        check::forward::<T>(&backend, &spec);
        check::backward::<T>(&backend, &spec);
    }
}

#[test]
fn shapes_in_f16_on_sm_80() {
    table::<f16>(80);
}

#[test]
fn shapes_in_bf16_on_sm_80() {
    table::<bf16>(80);
}

#[test]
fn shapes_in_f16_on_sm_75() {
    table::<f16>(75);
}

#[test]
fn shapes_in_bf16_on_sm_75() {
    table::<bf16>(75);
}

/// Every placement with every rank, at and beside the edges of both tiles.
#[test]
fn every_placement_with_every_rank() {
    for (p, placement) in Placement::ALL.into_iter().enumerate() {
        for (i, &r) in RANKS.iter().enumerate() {
            for edge in [63, 64, 65, 127, 129] {
                let turn = p + i + edge;
                let (n, k) = (EDGES[turn % 9], EDGES[(turn * 5 + 2) % 9]);
                let spec = Spec { placement, accumulate: turn % 3 == 0, ..Spec::new(edge, n, k, r) };
                let backend = Emulated::new(80, 1 + turn as u32 % 5).with_tile(TILES[turn / 2 % 2]);
                if turn % 2 == 0 {
                    check::forward::<bf16>(&backend, &spec);
                    check::backward::<f16>(&backend, &spec);
                } else {
                    check::forward::<f16>(&backend, &spec);
                    check::backward::<bf16>(&backend, &spec);
                }
            }
        }
    }
}

#[test]
fn any_subset_of_outputs() {
    for (i, spec) in subset_table(71, 34, 19, 5).iter().enumerate() {
        check::backward::<bf16>(&Emulated::new(80, 2).with_tile(TILES[i / 16 % 2]), spec);
    }
}

#[test]
fn small_integers_are_exact() {
    for (i, spec) in integer_table().iter().enumerate() {
        for arch in [75, 80] {
            let backend = Emulated::new(arch, 3).with_tile(TILES[i % 2]);
            check::forward::<f16>(&backend, spec);
            check::forward::<bf16>(&backend, spec);
            check::backward::<f16>(&backend, spec);
            check::backward::<bf16>(&backend, spec);
        }
    }
}

/// Enough tokens that da and db are reduced in several chunks, whose partial sums are added by whoever comes last.
#[test]
fn reductions_in_chunks() {
    for (m, f32_gradients, accumulate) in [(1024, true, false), (1537, false, true), (2300, true, true)] {
        let spec =
            Spec { f32_gradients, accumulate, outputs: [m != 1537, true, true, true], ..Spec::new(m, 33, 40, 9) };
        let backend = Emulated::new(80, 6);
        let chunks = {
            let mut op = spec.backward::<bf16>();
            backend.0.backward(op.views()).expect("backward runs").plan.explain()
        };
        assert!(!chunks.contains("over 1 chunk(s)"), "{chunks}");
        check::backward::<bf16>(&backend, &spec);
        check::backward::<f16>(&backend, &spec);
    }
}

/// More blocks of rows than flags: several blocks share one.
#[test]
fn shared_flags() {
    let spec = Spec { placement: Placement::Aligned, ..Spec::new(8192 * 64 + 130, 2, 3, 1) };
    let backend = Emulated::new(80, 8);
    check::forward::<bf16>(&backend, &spec);
    check::backward::<bf16>(&backend, &Spec { outputs: [true, true, false, false], ..spec });
}

/// Every bit a run leaves in its outputs.
fn bits<T: Element>(emulator: &Emulator, spec: &Spec) -> (HostForward<T>, HostBackward<T>) {
    let (mut forward, mut backward) = (spec.forward::<T>(), spec.backward::<T>());
    emulator.forward(forward.views()).expect("forward runs");
    emulator.backward(backward.views()).expect("backward runs");
    (forward, backward)
}

fn same_bits<T: Element>(a: &(HostForward<T>, HostBackward<T>), b: &(HostForward<T>, HostBackward<T>)) -> bool {
    // Inputs hold NaN around their matrices, so only what was written is compared.
    a.0.y.data == b.0.y.data
        && a.0.h.as_ref().map(|h| &h.data) == b.0.h.as_ref().map(|h| &h.data)
        && a.1.dx.as_ref().map(|dx| &dx.data) == b.1.dx.as_ref().map(|dx| &dx.data)
        && (&a.1.da, &a.1.db, &a.1.dbias) == (&b.1.da, &b.1.db, &b.1.dbias)
}

/// Specs with many units, several chunks, and every kind of tile.
fn busy_specs() -> [Spec; 3] {
    [
        Spec { placement: Placement::Strided, ..Spec::new(200, 130, 72, 13) },
        Spec { placement: Placement::Unaligned, ..Spec::new(70, 65, 129, 70) },
        Spec { placement: Placement::Contiguous, ..Spec::new(1100, 40, 24, 4) },
    ]
}

#[test]
fn the_same_bits_for_every_seed() {
    fn run<T: Element>() {
        for spec in busy_specs() {
            let device = Device::of_arch("emulated", 80, 5);
            let first = bits::<T>(&Emulator::new(device.clone()), &spec);
            for seed in 2..13 {
                let timing = [Timing::Eager, Timing::Lazy, Timing::Mixed][seed as usize % 3];
                let other = bits::<T>(&Emulator::new(device.clone()).with_seed(seed).with_copies(timing), &spec);
                assert!(same_bits(&first, &other), "{:?}, seed {seed}, {spec:?}", T::DTYPE);
            }
        }
    }
    run::<f16>();
    run::<bf16>();
}

/// Where the number of SMs does not change the plan's tiles and chunks, it does not change a bit.
#[test]
fn the_same_bits_for_any_number_of_sms() {
    let spec = Spec { placement: Placement::Aligned, ..Spec::new(300, 72, 136, 16) };
    let run = |sms| bits::<bf16>(&Emulator::new(Device::of_arch("emulated", 80, sms)).with_seed(u64::from(sms)), &spec);
    let first = run(12);
    for sms in [13, 20, 64] {
        assert!(same_bits(&first, &run(sms)), "{sms} SMs");
    }
}

/// A second and third launch on the same workspace find it as the first did.
#[test]
fn replays_find_the_workspace_clean() {
    for spec in busy_specs() {
        for arch in [75, 80] {
            let device = Device::of_arch("emulated", arch, 4);
            let once = bits::<f16>(&Emulator::new(device.clone()), &spec);
            let thrice = bits::<f16>(&Emulator::new(device).with_replays(2), &spec);
            assert!(same_bits(&once, &thrice), "{spec:?}");
        }
    }
}

/// Dropout in values, and with small integers, where every result must be the exact one.
#[test]
fn dropout_as_the_seed_says() {
    for (i, spec) in dropout_table().into_iter().enumerate() {
        let exact = Spec { dropout: spec.dropout.map(|dropout| HostDropout { p: 0.5, ..dropout }), ..spec.integers() };
        for (turn, arch) in [80, 75].into_iter().enumerate() {
            let backend = Emulated::new(arch, 3).with_tile(TILES[(i + turn) % 2]);
            for spec in [&spec, &exact] {
                check::forward::<f16>(&backend, spec);
                check::forward::<bf16>(&backend, spec);
                check::backward::<f16>(&backend, spec);
                check::backward::<bf16>(&backend, spec);
            }
        }
    }
}

/// Specs of [`busy_specs`] with dropout.
fn busy_dropout(p: f32, in_memory: bool) -> [Spec; 3] {
    busy_specs().map(|spec| Spec { dropout: Some(HostDropout { p, seed: [0x1234_5678_9abc, 77], in_memory }), ..spec })
}

#[test]
fn dropout_of_nothing_gives_the_bits_of_none() {
    let emulator = Emulator::new(Device::of_arch("emulated", 80, 5));
    for (none, nothing) in busy_specs().into_iter().zip(busy_dropout(1e-6, false)) {
        assert!(same_bits(&bits::<bf16>(&emulator, &none), &bits::<bf16>(&emulator, &nothing)), "{none:?}");
    }
    let [spec, ..] = busy_dropout(0.25, false);
    let none = Spec { dropout: None, ..spec };
    assert!(!same_bits(&bits::<bf16>(&emulator, &none), &bits::<bf16>(&emulator, &spec)), "dropout does nothing");
}

#[test]
fn the_same_bits_with_dropout_for_every_seed_of_the_emulator() {
    for (passed, in_memory) in busy_dropout(0.3, false).into_iter().zip(busy_dropout(0.3, true)) {
        let emulator = || Emulator::new(Device::of_arch("emulated", 80, 5));
        let first = bits::<bf16>(&emulator(), &passed);
        for seed in 2..8 {
            let timing = [Timing::Eager, Timing::Lazy, Timing::Mixed][seed as usize % 3];
            // A seed in memory is the same seed.
            let spec = if seed % 2 == 0 { &in_memory } else { &passed };
            let other = bits::<bf16>(&emulator().with_seed(seed).with_copies(timing), spec);
            assert!(same_bits(&first, &other), "seed {seed}, {spec:?}");
        }
    }
}

/// The CPU drops the same elements: where every sum is exact, it gives the same bits.
#[test]
fn the_cpu_drops_the_same() {
    for spec in busy_dropout(0.5, false) {
        let spec = spec.integers();
        let emulated = bits::<f16>(&Emulator::new(Device::of_arch("emulated", 80, 5)), &spec);
        let mut cpu = (spec.forward::<f16>(), spec.backward::<f16>());
        Cpu.forward(&mut cpu.0).expect("forward runs");
        Cpu.backward(&mut cpu.1).expect("backward runs");
        assert!(same_bits(&emulated, &cpu), "{spec:?}");
    }
}

/// What is dropped is gone, whatever it was; the base product still sees it.
#[test]
fn a_dropped_element_is_a_zero() {
    let seed = [9, 1];
    let dropout = Some(HostDropout { p: 0.5, seed, in_memory: false });
    let spec =
        Spec { dropout, placement: Placement::Aligned, outputs: [true, true, false, false], ..Spec::new(16, 8, 16, 4) };
    let keep = fused_lora::reference::keep(0.5, seed, 16, 16);
    let is_dropped = |row, col| keep.at(row, col) == 0.0;
    let emulator = Emulator::new(Device::of_arch("emulated", 80, 2));

    let (mut forward, mut backward) = (spec.forward::<bf16>(), spec.backward::<bf16>());
    let col = (0..16).find(|&col| is_dropped(3, col)).expect("one of sixteen");
    let at = forward.x.index(3, col);
    forward.x.data[at] = bf16::INFINITY;
    emulator.forward(forward.views()).expect("forward runs");
    assert!(forward.h.expect("kept").to_mat().data.iter().all(|value| value.is_finite()));
    assert!((0..8).all(|col| !forward.y.to_mat().at(3, col).is_finite()));

    // dh A is infinite in a column, and x in a place, which da must not see.
    let x = backward.x.as_mut().expect("da is wanted");
    let at = x.index(3, col);
    x.data[at] = bf16::INFINITY;
    let other = (0..16).find(|&other| other != col).expect("a column");
    let at = backward.a.index(0, other);
    backward.a.data[at] = bf16::INFINITY;
    emulator.backward(backward.views()).expect("backward runs");
    let dx = backward.dx.expect("wanted").to_mat();
    assert!((0..16).all(|row| dx.at(row, other).is_finite() == is_dropped(row, other)));
    let Some(HostGradient::F32(da)) = backward.da else { unreachable!("da is f32 in a spec") };
    assert!(da.to_mat().data.iter().all(|value| value.is_finite()));
}

/// Sectors of global memory, but for the flags, which are read as often as it takes; and those of the seed.
fn sectors(counters: &Counters) -> (u64, u64) {
    let mut sum = (0, 0);
    for line in counters.lines().iter().filter(|line| !line.instruction.contains("acquire")) {
        let of_seed = line.source.as_ref().is_some_and(|source| source.contains("dropout.cuh"));
        *(if of_seed { &mut sum.1 } else { &mut sum.0 }) += line.sectors;
    }
    sum
}

/// Dropout reads and writes what no dropout does; seed and offset, where they are in memory, once per warp and unit.
#[test]
fn dropout_adds_no_traffic() {
    let checks = Checks { counters: true, ..Checks::default() };
    let none = Spec { placement: Placement::Aligned, ..Spec::new(256, 192, 128, 16) };
    let dropout = |in_memory| Spec { dropout: Some(HostDropout { p: 0.1, seed: [1, 2], in_memory }), ..none };
    for tile in TILES {
        let run = |spec: Spec| {
            let emulator = Emulated::new(80, 4).with_tile(tile).0.with_checks(checks);
            let (mut forward, mut backward) = (spec.forward::<bf16>(), spec.backward::<bf16>());
            [emulator.forward(forward.views()), emulator.backward(backward.views())]
                .map(|run| run.expect("the kernel runs").counters)
        };
        let (none, passed, in_memory) = (run(none), run(dropout(false)), run(dropout(true)));
        for ((none, passed), in_memory) in none.iter().zip(&passed).zip(&in_memory) {
            assert_eq!((none.copied, none.global_stored), (passed.copied, passed.global_stored));
            assert_eq!(sectors(none), (sectors(passed).0, 0));
            assert_eq!(sectors(passed), (sectors(in_memory).0, 0));
            let of_seed = sectors(in_memory).1;
            assert!(of_seed > 0 && of_seed * 50 < sectors(none).0, "{of_seed} of {}", sectors(none).0);
        }
    }
}

/// Sums whose order nobody knows would not repeat: integers alone are added atomically.
#[test]
fn no_kernel_adds_floats_atomically() {
    for image in fused_lora::kernels::IMAGES {
        for (arch, ptx) in image.ptx {
            let is_atomic = |line: &&str| {
                let mut words = line.split_whitespace().skip_while(|word| word.starts_with('@'));
                let name = words.next().unwrap_or_default();
                ["atom.", "red.", "multimem.", "cp.reduce."].iter().any(|start| name.starts_with(start))
            };
            let atomics: Vec<_> = ptx.lines().filter(is_atomic).collect();
            // Those of tickets and flags: the search finds something.
            assert!(!atomics.is_empty() || image.name.ends_with("adapter"), "{} for compute_{arch}", image.name);
            let float = atomics.iter().find(|line| [".f16", ".bf16", ".f32", ".f64"].iter().any(|t| line.contains(t)));
            assert_eq!(float, None, "{} for compute_{arch}", image.name);
        }
    }
}

#[test]
fn explain_says_what_dropout_does_to_the_order() {
    let emulator = Emulator::new(Device::of_arch("emulated", 80, 5));
    let [spec, ..] = busy_dropout(0.25, true);
    let explain = |spec: Spec| {
        let (mut forward, mut backward) = (spec.forward::<bf16>(), spec.backward::<bf16>());
        let runs = [emulator.forward(forward.views()), emulator.backward(backward.views())];
        runs.map(|run| run.expect("the kernel runs").plan.explain())
    };
    let (dropout, order) = ("p = 0.25 on x", "dx begins with dh A");
    let [forward, backward] = explain(spec);
    assert!(
        forward.contains(dropout) && forward.contains("read by the launch") && !forward.contains(order),
        "{forward}"
    );
    assert!(backward.contains(dropout) && backward.contains(order), "{backward}");
    let no_dx = Spec { outputs: [false, true, true, true], ..spec };
    for text in explain(no_dx).iter().chain(&explain(Spec { dropout: None, ..spec })) {
        assert!(!text.contains(order), "{text}");
    }
}

/// Aligned operands reach shared memory and the tensor cores without bank conflicts, in both directions and with both tiles.
#[test]
fn no_bank_conflicts() {
    let checks = Checks { counters: true, ..Checks::default() };
    let spec = Spec { placement: Placement::Aligned, bias: false, ..Spec::new(256, 256, 128, 16) };
    for tile in TILES {
        let emulator = Emulated::new(80, 4).with_tile(tile).0.with_checks(checks);
        let (mut forward, mut backward) = (spec.forward::<bf16>(), spec.backward::<bf16>());
        let runs = [emulator.forward(forward.views()), emulator.backward(backward.views())];
        for run in runs {
            let counters = run.expect("the kernel runs").counters;
            assert!(counters.mix[&Class::Matrix] > 0 && counters.mix[&Class::Copy] > 0);
            for line in counters.lines().iter().filter(|line| matches!(line.class, Class::Matrix | Class::Copy)) {
                assert_eq!(line.conflicts, 0, "{tile:?}: {line:?}");
            }
        }
    }
}

/// No block of rows takes part in db or da, so that their units have no step.
#[test]
fn units_without_steps_are_ordered() {
    for (outputs, tile) in
        TILES.into_iter().flat_map(|tile| [([false, false, true, false], tile), ([false, true, false, false], tile)])
    {
        let spec = Spec { outputs, routes: Some(Routes::Nobody), ..Spec::new(47, 16, 24, 16) };
        check::backward::<f16>(&Emulated::new(80, 40).with_tile(tile), &spec);
        check::backward::<bf16>(&Emulated::new(80, 2).with_tile(tile), &Spec { m: 700, ..spec });
    }
}

/// How fast the emulator is: `cargo test --test emulator -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement, not a test"]
fn speed_of_a_product_of_1024_cubed() {
    let mut op =
        Spec { placement: Placement::Aligned, bias: false, ..Spec::new(1024, 1024, 1024, 0) }.forward::<bf16>();
    let none = Checks { races: false, uninitialised: false, counters: false };
    for checks in [none, Checks { races: true, ..none }, Checks::default(), Checks { counters: true, ..none }] {
        let start = std::time::Instant::now();
        let emulator = Emulator::new(Device::of_arch("emulated", 80, 4)).with_checks(checks);
        let run = emulator.forward(op.views()).expect("forward runs");
        println!("{:.2} s with {checks:?}: {:?}", start.elapsed().as_secs_f64(), run.counters);
    }
}
