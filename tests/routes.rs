//! Routes in the kernels: many adapters in one batch, executed on the emulator.
#![cfg(all(feature = "emulator", feature = "cuda"))]

mod common;

use common::data::{Placement, Rng, Routes, Spec, routes_table};
use common::emulated::Emulated;
use common::hopper::{COLUMNS, PLACEMENTS, ROWS, variants};
use common::{Backend, HostBackward, HostDropout, HostForward, HostGradient, check, full};
use fused_lora::emulator::{Checks, Counters, Emulator, Timing};
use fused_lora::plan::{Device, Options, TileSize};
use fused_lora::{Element, Routing, Slot, bf16, f16};
use rayon::prelude::*;

const TILES: [TileSize; 2] = [TileSize::Large, TileSize::Small];

#[test]
fn each_row_through_its_own_adapter() {
    for (turn, spec) in routes_table().into_iter().enumerate() {
        for (half, arch) in [80, 75].into_iter().enumerate() {
            let backend = Emulated::new(arch, 3).with_tile(TILES[(turn + half) % 2]);
            for spec in [spec, spec.integers()] {
                check::forward::<f16>(&backend, &spec);
                check::forward::<bf16>(&backend, &spec);
                check::backward::<f16>(&backend, &spec);
                check::backward::<bf16>(&backend, &spec);
            }
            full::check::<f16>(&backend, &spec);
            full::check::<bf16>(&backend, &spec);
        }
    }
}

/// Enough tokens that blocks of rows are counted several at a time, and enough adapters that most blocks of ranks are left out.
#[test]
fn many_tokens_and_many_adapters() {
    let wide = Spec { bias: false, placement: Placement::Aligned, ..Spec::new(1200, 8, 16, 640) };
    let long = Spec { f32_gradients: true, ..Spec::new(4300, 16, 8, 24) };
    for tile in TILES {
        let backend = Emulated::new(80, 3).with_tile(tile);
        for spec in [Spec { routes: Some(Routes::Sorted(9)), ..wide }, Spec { routes: Some(Routes::Sorted(3)), ..long }]
        {
            check::forward::<bf16>(&backend, &spec);
            check::backward::<bf16>(&backend, &spec);
            full::check::<bf16>(&backend, &spec);
        }
        // Ranks that only rows far down go through.
        full::check::<bf16>(&backend, &Spec { r: 200, routes: Some(Routes::Sorted(3)), ..long });
    }
}

fn rows<T: Element>(host: &common::Host<T>, from: usize, count: usize) -> Vec<u32> {
    let bits = |at: usize| host.data[host.index(from + at / host.cols, at % host.cols)].to_f32().to_bits();
    (0..count * host.cols).map(bits).collect()
}

/// Of several adapters in whole tiles: y, h and dx have the bits of each adapter alone, and so have da and db where its rows are
/// the only ones.
fn each_has_the_bits_of_itself_alone<A: Element>(backend: &impl Backend, tile: usize) {
    let m = 3 * tile;
    let all = Spec { placement: Placement::Aligned, routes: Some(Routes::Tiles(tile)), ..Spec::new(m, 48, 64, 96) };
    let (mut forward, mut backward) = (all.forward_of::<bf16, A>(), all.backward_of::<bf16, A>());
    backend.forward(&mut forward).expect("it runs");
    backend.backward(&mut backward).expect("it runs");
    for (id, slot) in Routes::Tiles(tile).slots(96).into_iter().enumerate() {
        let (first, ranks) = (slot.first_rank, slot.ranks);
        assert!(first % 16 == 0 && ranks % 16 == 0, "whole steps of ranks");
        let own = |row: usize| id * tile + row;
        let alone = Spec { m: tile, r: ranks, routes: None, scale: all.scale * slot.scale, ..all };
        let (mut one, mut back) = (alone.forward_of::<bf16, A>(), alone.backward_of::<bf16, A>());
        let HostForward { x, w, a, b, bias, .. } = &mut one;
        let HostBackward { dy, w: dw, a: da, b: db, x: dx, h, .. } = &mut back;
        x.fill(|i, j| forward.x.data[forward.x.index(own(i), j)].to_f64());
        a.fill(|i, j| forward.a.data[forward.a.index(first + i, j)].to_f64());
        b.fill(|i, j| forward.b.data[forward.b.index(i, first + j)].to_f64());
        (*w, *bias) = (forward.w.clone(), forward.bias.clone());
        backend.forward(&mut one).expect("it runs");
        assert_eq!(rows(&one.y, 0, tile), rows(&forward.y, own(0), tile), "y of adapter {id} on {}", backend.name());

        dy.fill(|i, j| backward.dy.data[backward.dy.index(own(i), j)].to_f64());
        da.fill(|i, j| backward.a.data[backward.a.index(first + i, j)].to_f64());
        db.fill(|i, j| backward.b.data[backward.b.index(i, first + j)].to_f64());
        *dw = backward.w.clone();
        let (all_x, all_h) = (backward.x.as_ref().expect("x"), backward.h.as_ref().expect("h"));
        dx.as_mut().expect("x").fill(|i, j| all_x.data[all_x.index(own(i), j)].to_f64());
        let first_column = if full::is_split::<bf16, A>() { 2 * first } else { first };
        h.as_mut().expect("h").fill(|i, j| all_h.data[all_h.index(own(i), first_column + j)].to_f64());
        backend.backward(&mut back).expect("it runs");
        let (got, expected) = (back.dx.as_ref().expect("dx"), backward.dx.as_ref().expect("dx"));
        assert_eq!(rows(got, 0, tile), rows(expected, own(0), tile), "dx of adapter {id} on {}", backend.name());
        let (Some(HostGradient::F32(got)), Some(HostGradient::F32(expected))) = (&back.da, &backward.da) else {
            unreachable!("f32 gradients")
        };
        assert_eq!(rows(got, 0, ranks), rows(expected, first, ranks), "da of adapter {id} on {}", backend.name());
        let (Some(HostGradient::F32(got)), Some(HostGradient::F32(expected))) = (&back.db, &backward.db) else {
            unreachable!("f32 gradients")
        };
        for n in 0..48 {
            let (got, expected) = (rows(got, n, 1), rows(expected, n, 1));
            assert_eq!(got, expected[first..first + ranks], "db of adapter {id} on {}", backend.name());
        }
    }
}

#[test]
fn sorted_rows_have_the_bits_of_each_adapter_alone() {
    for (tile, rows) in [(TileSize::Large, 128), (TileSize::Small, 64)] {
        let backend = Emulated::new(80, 3).with_tile(tile);
        each_has_the_bits_of_itself_alone::<bf16>(&backend, rows);
        each_has_the_bits_of_itself_alone::<f32>(&backend, rows);
    }
}

/// The Hopper kernels: every tile and cluster, dimensions in steps of 8, more ranks than one adapter may have.
fn on_hopper() -> Vec<(Emulated, Spec)> {
    let cases = variants().into_iter().enumerate().flat_map(|(v, options)| {
        let ranks = [24, 64, 136, 256, 640];
        let routes = [Routes::Sorted(3), Routes::Mixed(4), Routes::Tiles(128), Routes::Nobody, Routes::Sorted(7)];
        ranks.into_iter().zip(routes).enumerate().map(move |(i, (r, routes))| {
            let turn = v * 5 + i;
            let (m, n, k) =
                (ROWS[(5 * i + v + 3) % 12], COLUMNS[(7 * i + 2 * v + 3) % 12], COLUMNS[(11 * i + 5 * v) % 12]);
            let dropout = HostDropout { p: 0.5, seed: [7, turn as u64], in_memory: turn % 2 == 0 };
            let spec = Spec {
                placement: PLACEMENTS[turn % 3],
                bias: turn % 2 == 0,
                keep_h: turn % 3 != 0,
                accumulate: turn % 4 == 0,
                f32_gradients: turn % 5 != 0,
                outputs: [true, true, true, turn % 3 == 0],
                dropout: (turn % 4 == 3).then_some(dropout),
                routes: Some(routes),
                ..Spec::new(m, n, k, r)
            };
            let options = [options, options.with_bundle(2), options.with_chunks(2)][turn % 3];
            let emulator = Emulator::new(Device::of_arch("emulated", 90, [2, 3, 5, 33][turn % 4]));
            let timing = [Timing::Eager, Timing::Lazy, Timing::Mixed][turn % 3];
            (Emulated(emulator.with_plan_options(options).with_seed(turn as u64).with_copies(timing)), spec)
        })
    });
    cases.collect()
}

#[test]
fn each_row_through_its_own_adapter_on_hopper() {
    on_hopper().par_iter().for_each(|(backend, spec)| {
        for spec in [*spec, spec.integers()] {
            check::forward::<bf16>(backend, &spec);
            check::backward::<f16>(backend, &spec);
        }
    });
}

#[test]
fn each_row_through_its_own_f32_factors_on_hopper() {
    on_hopper().par_iter().enumerate().for_each(|(turn, (backend, spec))| {
        if turn % 2 == 0 {
            full::check::<bf16>(backend, spec);
        } else {
            full::check::<f16>(backend, spec);
        }
    });
}

#[test]
fn sorted_rows_have_the_bits_of_each_adapter_alone_on_hopper() {
    for options in variants() {
        let emulator = Emulator::new(Device::of_arch("emulated", 90, 5)).with_plan_options(options);
        let backend = Emulated(emulator);
        each_has_the_bits_of_itself_alone::<bf16>(&backend, 128);
        each_has_the_bits_of_itself_alone::<f32>(&backend, 128);
    }
}

/// A table that nobody made: garbage gives garbage, and touches nothing but the outputs. What is read outside a matrix, and what is
/// written there, the emulator reports.
#[test]
fn any_table_stays_inside_the_matrices() {
    let mut rng = Rng(7);
    let mut tables: Vec<(Option<Options>, usize, Vec<u64>)> = Vec::new();
    for (turn, r) in [8, 72, 136, 640].into_iter().enumerate() {
        let len = Routing::words_for(300);
        let options = variants()[(turn * 5 + 1) % 6].with_chunks(2);
        for options in [None, Some(options)] {
            tables.push((options, r, (0..len).map(|_| rng.bits()).collect()));
            tables.push((options, r, vec![u64::MAX; len]));
        }
    }
    tables.par_iter().for_each(|(options, r, words)| {
        let emulator = Emulator::new(Device::of_arch("emulated", if options.is_some() { 90 } else { 80 }, 3));
        let emulator = emulator.with_plan_options(options.unwrap_or_default());
        runs_with::<bf16>(&emulator, *r, words);
        runs_with::<f32>(&emulator, *r, words);
    });
}

fn runs_with<A: Element>(emulator: &Emulator, r: usize, words: &[u64]) {
    let spec = Spec { placement: Placement::Aligned, ..Spec::new(300, 72, 64, r) };
    let (mut forward, mut backward) = (spec.forward_of::<bf16, A>(), spec.backward_of::<bf16, A>());
    (forward.routes, backward.routes) = (Some(words.to_vec()), Some(words.to_vec()));
    emulator.forward(forward.views()).expect("forward runs");
    emulator.backward(backward.views()).expect("backward runs");
}

/// Sectors of global memory: what reads the table, and everything else but looks at flags, which depend on who is late.
fn sectors(counters: &Counters) -> (u64, u64) {
    let mut sum = (0, 0);
    for line in counters.lines().iter().filter(|line| !line.instruction.contains("acquire")) {
        let of_table = line.source.as_ref().is_some_and(|source| source.contains("routes.cuh"));
        *(if of_table { &mut sum.0 } else { &mut sum.1 }) += line.sectors;
    }
    sum
}

/// Forward and backward of `spec`, with a table of routes or without; what they counted.
fn counted<A: Element>(tile: TileSize, spec: &Spec, routing: Option<&Routing>) -> [Counters; 2] {
    let checks = Checks { counters: true, ..Checks::default() };
    let emulator = Emulated::new(80, 4).with_tile(tile).0.with_checks(checks);
    let (mut forward, mut backward) = (spec.forward_of::<bf16, A>(), spec.backward_of::<bf16, A>());
    if let Some(routing) = routing {
        forward.routes = Some(routing.words().to_vec());
        backward.routes = Some(routing.words().to_vec());
    }
    [emulator.forward(forward.views()), emulator.backward(backward.views())]
        .map(|run| run.expect("the kernel runs").counters)
}

/// One adapter for all rows: what is read beyond a call without routes is the table.
#[test]
fn routes_add_no_traffic_but_the_table() {
    fn check<A: Element>() {
        let none = Spec { placement: Placement::Aligned, ..Spec::new(256, 192, 128, 16) };
        let slot = Slot { first_rank: 0, ranks: 16, scale: 1.0 };
        let routing = Routing::new(&[slot], &[Some(0); 256]).expect("a routing");
        for tile in TILES {
            let (without, with) = (counted::<A>(tile, &none, None), counted::<A>(tile, &none, Some(&routing)));
            for (none, routed) in without.iter().zip(&with) {
                assert_eq!((none.copied, none.global_stored), (routed.copied, routed.global_stored));
                let ((nothing, other), (table, same)) = (sectors(none), sectors(routed));
                assert_eq!((nothing, other), (0, same));
                assert!(table > 0 && table * 5 < other, "{table} beside {other}");
            }
        }
    }
    check::<bf16>();
    check::<f32>();
}

/// Rows of one adapter in long runs: blocks of rows and of ranks that have nothing to do with one another are left out.
#[test]
fn long_runs_cost_about_one_adapter() {
    fn check<A: Element>() {
        let one = Spec {
            placement: Placement::Aligned,
            bias: false,
            outputs: [true, true, true, false],
            ..Spec::new(1024, 64, 64, 64)
        };
        let many = Spec { r: 256, ..one };
        let slots: Vec<Slot> = (0..4).map(|at| Slot { first_rank: at * 64, ranks: 64, scale: 1.0 }).collect();
        let ids: Vec<Option<usize>> = (0..1024).map(|row| Some(row / 256)).collect();
        let routing = Routing::new(&slots, &ids).expect("a routing");
        let run = |spec: Spec, routing| counted::<A>(TileSize::Large, &spec, routing).map(|counters| counters.mma);
        let (alone, routed, dense) = (run(one, None), run(many, Some(&routing)), run(many, None));
        assert_eq!(alone, routed, "products");
        assert!(dense.iter().zip(&routed).all(|(dense, routed)| dense > routed));
    }
    check::<bf16>();
    check::<f32>();
}

/// Of f32 factors those are split that some row goes through: of the others no half is stored.
#[test]
fn factors_of_nobody_are_not_split() {
    let many = Spec { placement: Placement::Aligned, keep_h: false, ..Spec::new(64, 64, 320, 256) };
    let slots: Vec<Slot> = (0..4).map(|at| Slot { first_rank: at * 64, ranks: 64, scale: 1.0 }).collect();
    let routing = Routing::new(&slots, &[Some(2); 64]).expect("a routing");
    let stored = |routing| counted::<f32>(TileSize::Small, &many, routing).map(|counters| counters.global_stored);
    let (dense, routed) = (stored(None), stored(Some(&routing)));
    // Bytes of three adapters: in forward A in pairs and B in triples, in backward the other way round.
    let halves = [(2, 3), (3, 2)].map(|(of_a, of_b)| 3 * 64 * (of_a * 320 + of_b * 64) * 2);
    assert_eq!([0, 1].map(|at| dense[at] - routed[at]), halves);
}
