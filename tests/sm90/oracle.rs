//! Against the f64 oracle.

use fused_lora::plan::{Family, Options};
use fused_lora::{Element, bf16, f16};

use crate::common::data::{Placement, Spec, subset_table};
use crate::common::emulated::Emulated;
use crate::common::hopper::{COLUMNS, Case, PLACEMENTS, RANKS, ROWS, table, variants};
use crate::common::{Host, HostGradient, check};
use crate::{TIMINGS, backend, hopper, in_parallel};

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
