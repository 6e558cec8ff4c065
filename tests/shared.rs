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
fn f32_factors() {
    for kind in [Kind::Ragged, Kind::Hopper] {
        let backends = backends(kind, "f32_factors");
        let table = if kind == Kind::Ragged { shared::table() } else { hopper_table() };
        for (turn, spec) in table.iter().enumerate() {
            backends.par_iter().for_each(|backend| {
                if turn % 2 == 0 {
                    shared::with_f32_factors::<bf16>(backend, spec);
                } else {
                    shared::with_f32_factors::<f16>(backend, spec);
                }
            });
        }
    }
    // Of such factors the Hopper kernels take any rank.
    let mut odd = SharedSpec::new(150, 72, &[(136, 13), (64, 1), (72, 0), (200, 70)]);
    odd.base = Spec { placement: Placement::Aligned, ..odd.base };
    for backend in backends(Kind::Hopper, "f32_factors") {
        shared::with_f32_factors::<bf16>(&backend, &odd);
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
                let same = shared::same_bits_as_alone::<bf16, bf16>(backend, spec);
                same.unwrap_or_else(|complaint| panic!("{}, {spec:?}: {complaint}", backend.name()));
                let same = shared::same_bits_as_alone::<bf16, f32>(backend, spec);
                same.unwrap_or_else(|complaint| panic!("{}, f32 factors, {spec:?}: {complaint}", backend.name()));
            }
        });
    }
}

/// On the emulator alone: what it counts, orders and keeps in its memory.
#[cfg(all(feature = "emulator", feature = "cuda"))]
mod emulated {
    use fused_lora::emulator::{Checks, Counters, Emulator, Timing};
    use fused_lora::plan::{Device, Options, Params, Plan, SYNC_BYTES, TileSize};
    use fused_lora::{Accumulate, Dtype, Element, raw};
    use ptx_emulator::Memory;

    use super::common::hopper;
    use super::*;

    fn emulator(arch: u32, sms: u32, options: Options) -> Emulator {
        Emulator::new(Device::of_arch("emulated", arch, sms)).with_plan_options(options)
    }

    /// Every bit of the outputs.
    fn bits<T: Element>(emulator: &Emulator, spec: &SharedSpec) -> String {
        let (mut forward, mut backward) = (spec.forward::<T>(), spec.backward::<T>());
        emulator.forward_shared(forward.views()).expect("forward runs");
        emulator.backward_shared(backward.views()).expect("backward runs");
        let y: Vec<_> = forward.own.iter().map(|op| &op.y.data).collect();
        let own: Vec<_> = backward.own.iter().map(|op| (&op.db, &op.dbias)).collect();
        let (h, dx) = (forward.h.map(|h| h.data), backward.dx.map(|dx| dx.data));
        format!("{y:?} {h:?} {dx:?} {:?} {own:?}", backward.da)
    }

    /// Whatever the order of events, and on a workspace that was used before.
    #[test]
    fn the_same_bits_for_every_seed_and_in_replays() {
        let check = |arch: u32, options: Options, spec: &SharedSpec| {
            let spec = SharedSpec { base: Spec { accumulate: false, ..spec.base }, ..spec.clone() };
            let first = bits::<bf16>(&emulator(arch, 5, options), &spec);
            for seed in 2..8 {
                let timing = [Timing::Eager, Timing::Lazy, Timing::Mixed][seed as usize % 3];
                let emulator = emulator(arch, 5, options).with_seed(seed).with_copies(timing);
                let emulator = emulator.with_replays(u32::from(seed == 7));
                assert!(bits::<bf16>(&emulator, &spec) == first, "seed {seed}, {options:?}, {spec:?}");
            }
        };
        let tiles = [TileSize::Small, TileSize::Large].map(|tile| Options::default().with_tile(tile));
        let portable = shared::table().into_iter().enumerate().map(|(at, spec)| (80, tiles[at % 2], spec));
        let many = SharedSpec::new(1300, 24, &[(40, 9), (24, 0), (33, 4)]);
        let variants = hopper::variants();
        let hopper = hopper_table().into_iter().enumerate();
        let hopper = hopper.map(|(at, spec)| (90, variants[at % 6].with_chunks(2).with_bundle(1 + at as u32), spec));
        let work: Vec<_> = portable.chain([(80, Options::default(), many)]).chain(hopper).collect();
        work.into_par_iter().for_each(|(arch, options, spec)| check(arch, options, &spec));
    }

    /// Tokens that are cut into chunks, whose sums meet in the order of the chunks.
    #[test]
    fn reductions_in_chunks() {
        let spec = SharedSpec::new(1537, 24, &[(40, 9), (24, 0), (33, 4)]);
        let small = emulator(80, 6, Options::default().with_tile(TileSize::Small));
        let run = small.backward_shared(spec.backward::<bf16>().views()).expect("backward runs");
        let Params::Backward(p) = run.plan.launch(256, run.plan.workspace_bytes()).expect("a launch").params else {
            unreachable!("the portable family")
        };
        assert!(p.chunks > 1, "{}", run.plan.explain());
        shared::backward::<bf16>(&common::emulated::Emulated(small), &spec);
        let mut spec = SharedSpec::new(700, 72, &[(136, 24), (64, 0), (200, 136)]);
        spec.base.placement = Placement::Aligned;
        for (turn, options) in hopper::variants().into_iter().enumerate() {
            let backend = common::emulated::Emulated(emulator(90, 4, options.with_chunks(2 + turn as u32 % 3)));
            shared::backward::<bf16>(&backend, &spec);
        }
    }

    /// Bytes that are read, but for looks at flags.
    fn read(counters: &Counters) -> u64 {
        let is_look =
            |instruction: &str| ["ld.acquire.gpu", "ld.relaxed.gpu"].iter().any(|op| instruction.contains(op));
        let looks: u64 =
            counters.lines().iter().filter(|line| is_look(&line.instruction)).map(|line| line.executed).sum();
        counters.global_loaded - 4 * looks
    }

    /// The units of h read x once for the ranks of all projections: that much less is read than by single layers.
    #[test]
    fn x_is_read_once_for_all_ranks() {
        let (m, k, parts) = (256, 128, [(256, 16), (512, 16), (256, 32)]);
        let mut spec = SharedSpec::new(m, k, &parts);
        spec.base = Spec { placement: Placement::Aligned, bias: false, ..spec.base };
        let checks = Checks { counters: true, ..Checks::default() };
        for (arch, tile) in
            [(80, TileSize::Large), (80, TileSize::Small), (90, TileSize::Sm90N256), (90, TileSize::Sm90N128)]
        {
            let mut options = Options::default().with_tile(tile);
            options.cluster = (arch == 90).then_some(1);
            let emulator = emulator(arch, 4, options).with_checks(checks);
            let mut op = spec.forward::<bf16>();
            let alone: u64 = op
                .own
                .iter_mut()
                .map(|op| emulator.forward(op.views()).expect("it runs"))
                .map(|run| read(&run.counters))
                .sum();
            let together = read(&emulator.forward_shared(op.views()).expect("it runs").counters);
            assert_eq!(alone - together, ((parts.len() - 1) * m * k * 2) as u64, "{tile:?}");
        }
    }

    fn upload(memory: &mut Memory, data: &[bf16], rows: usize) -> raw::Matrix {
        let bytes: Vec<u8> = data.iter().flat_map(|value| value.to_le_bytes()).collect();
        let ptr = memory.alloc("matrix", bytes.len());
        memory.write(ptr, &bytes).expect("an upload");
        raw::Matrix::new(ptr, rows, data.len() / rows)
    }

    fn download(memory: &Memory, from: raw::Matrix) -> Vec<bf16> {
        let row = |row: usize| {
            let bytes = memory.read(from.ptr + (row * from.row_stride * 2) as u64, from.cols * 2).expect("a download");
            bytes.as_chunks().0.iter().map(|bytes| bf16::from_le_bytes(*bytes)).collect::<Vec<_>>()
        };
        (0..from.rows).flat_map(row).collect()
    }

    fn run(emulator: &Emulator, memory: &mut Memory, plan: &Plan) {
        let workspace = memory.alloc("workspace", plan.workspace_bytes());
        memory.write(workspace, &[0; SYNC_BYTES]).expect("the synchronisation words");
        let launch = plan.launch(workspace, plan.workspace_bytes()).expect("a launch");
        emulator.run(memory, &launch).expect("the kernel runs");
    }

    /// A fused weight: rows of one w, columns of one y and of one dy. The bits are those of matrices of their own.
    #[test]
    fn parts_of_one_matrix() {
        let (m, k, parts) = (150, 72, [(64, 16), (72, 8), (136, 24)]);
        let mut spec = SharedSpec::new(m, k, &parts);
        spec.base = Spec { bias: false, outputs: [true, false, false, false], ..spec.base };
        let n: usize = parts.iter().map(|part| part.0).sum();
        for (arch, options) in [(80, Options::default()), (90, hopper::variants()[1]), (90, hopper::variants()[4])] {
            let emulator = emulator(arch, 3, options);
            let (mut forward, mut backward) = (spec.forward::<bf16>(), spec.backward::<bf16>());
            emulator.forward_shared(forward.views()).expect("forward runs");
            emulator.backward_shared(backward.views()).expect("backward runs");

            let mut memory = Memory::new();
            let side_by_side = |matrices: Vec<&common::Host<bf16>>| -> Vec<bf16> {
                (0..m)
                    .flat_map(|row| {
                        matrices
                            .iter()
                            .flat_map(move |host| &host.data[row * host.cols..][..host.cols])
                            .copied()
                            .collect::<Vec<_>>()
                    })
                    .collect()
            };
            let fused: Vec<bf16> = forward.own.iter().flat_map(|op| op.w.data.clone()).collect();
            let w = upload(&mut memory, &fused, n);
            let (x, a) =
                (upload(&mut memory, &forward.own[0].x.data, m), upload(&mut memory, &forward.a.data, forward.a.rows));
            let y = upload(&mut memory, &vec![bf16::ONE; m * n], m);
            let fused: Vec<bf16> = backward.own.iter().flat_map(|op| op.w.data.clone()).collect();
            let dw = upload(&mut memory, &fused, n);
            let dy = upload(&mut memory, &side_by_side(backward.own.iter().map(|op| &op.dy).collect()), m);
            let da = upload(&mut memory, &backward.a.data, backward.a.rows);
            let dx = upload(&mut memory, &vec![bf16::ONE; m * k], m);
            let firsts = [0, 64, 136];
            let rows = |w: raw::Matrix, at: usize| raw::Matrix {
                ptr: w.ptr + (2 * firsts[at] * k) as u64,
                rows: parts[at].0,
                ..w
            };
            let columns =
                |y: raw::Matrix, at: usize| raw::Matrix { ptr: y.ptr + 2 * firsts[at] as u64, cols: parts[at].0, ..y };
            let projections: Vec<_> = (0..3)
                .map(|at| raw::ForwardProjection {
                    w: rows(w, at),
                    b: upload(&mut memory, &forward.own[at].b.data, parts[at].0),
                    scale: forward.own[at].scale,
                    bias: None,
                    gain: None,
                    y: columns(y, at),
                })
                .collect();
            let projections = raw::Projections::new(&projections).expect("three");
            let (dtype, dropout, routes) = (Dtype::Bf16, None, None);
            let op = raw::ForwardShared { dtype, x, f32_factors: false, a, h: None, projections, dropout, routes };
            let plan = Plan::forward_shared_with(&op, emulator.device(), options).expect("a plan");
            run(&emulator, &mut memory, &plan);
            for (at, of) in forward.own.iter().enumerate() {
                assert!(download(&memory, columns(y, at)) == of.y.data, "y of projection {at}, {options:?}");
            }

            let projections: Vec<_> = (0..3)
                .map(|at| raw::BackwardProjection {
                    dy: columns(dy, at),
                    w: rows(dw, at),
                    b: upload(&mut memory, &backward.own[at].b.data, parts[at].0),
                    scale: backward.own[at].scale,
                    db: None,
                    dbias: None,
                    dm: None,
                    gain: None,
                })
                .collect();
            let projections = raw::Projections::new(&projections).expect("three");
            let accumulate = Accumulate::default();
            let (x, h, dx) = (None, None, Some(dx));
            let op = raw::BackwardShared {
                dtype,
                f32_factors: false,
                a: da,
                x,
                h,
                dx,
                da: None,
                projections,
                accumulate,
                dropout,
                routes,
            };
            let plan = Plan::backward_shared_with(&op, emulator.device(), options).expect("a plan");
            run(&emulator, &mut memory, &plan);
            let expected = backward.dx.as_ref().map(|dx| dx.data.clone());
            assert!(dx.map(|dx| download(&memory, dx)) == expected, "dx, {options:?}");
        }
    }
}
