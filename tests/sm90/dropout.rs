//! Dropout: against the oracle with the mask of the definition, and the same bits however it comes about.

use fused_lora::{Element, bf16, f16};
use rayon::prelude::*;

use crate::common::data::Spec;
use crate::common::hopper::{COLUMNS, Case, PLACEMENTS, ROWS, table, variants};
use crate::common::{Backend, Cpu, Host, HostDropout, HostGradient, check};
use crate::{TIMINGS, backend, bits, busy, hopper, in_parallel, same_bits, with_dropout};

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
