//! The CPU backend against the oracle: shapes, placements, exactness, repeatability.

mod common;

use common::data::{
    Placement, Spec, dora_table, dropout_table, integer_table, routes_table, shape_table, subset_table,
};
use common::{Backend, Cpu, HostDropout, check};
use fused_lora::{Dtype, Element, bf16, f16};
use proptest::prelude::*;

fn table<T: Element>() {
    for spec in shape_table() {
        check::forward::<T>(&Cpu, &spec);
        check::backward::<T>(&Cpu, &spec);
    }
}

#[test]
fn shapes_in_f16() {
    table::<f16>();
}

#[test]
fn shapes_in_bf16() {
    table::<bf16>();
}

#[test]
fn shapes_in_f32() {
    table::<f32>();
}

/// All combinations of presence, accumulation and gradient type at one ragged shape.
#[test]
fn any_subset_of_outputs() {
    for spec in subset_table(21, 34, 19, 5) {
        check::backward::<bf16>(&Cpu, &spec);
        check::backward::<f32>(&Cpu, &spec);
    }
}

#[test]
fn small_integers_are_exact() {
    for spec in integer_table() {
        assert!(check::middle_is_exact(&spec, Dtype::Bf16), "the data of {spec:?} is too large");
        check::forward::<f16>(&Cpu, &spec);
        check::forward::<bf16>(&Cpu, &spec);
        check::forward::<f32>(&Cpu, &spec);
        check::backward::<f16>(&Cpu, &spec);
        check::backward::<bf16>(&Cpu, &spec);
        check::backward::<f32>(&Cpu, &spec);
    }
}

/// DoRA's gain and the gradient of its magnitude.
#[test]
fn dora_at_the_edges_of_tiles() {
    for spec in dora_table() {
        check::forward::<f16>(&Cpu, &spec);
        check::forward::<f32>(&Cpu, &spec);
        check::backward::<bf16>(&Cpu, &spec);
        check::backward::<f32>(&Cpu, &spec);
    }
}

/// Dropout, in values and as the small integers that make its zeros exact.
#[test]
fn dropout_as_the_seed_says() {
    for spec in dropout_table() {
        check::forward::<f16>(&Cpu, &spec);
        check::forward::<f32>(&Cpu, &spec);
        check::backward::<bf16>(&Cpu, &spec);
        check::backward::<f32>(&Cpu, &spec);
        let exact = Spec { dropout: spec.dropout.map(|dropout| HostDropout { p: 0.5, ..dropout }), ..spec.integers() };
        check::forward::<f32>(&Cpu, &exact);
        check::backward::<f32>(&Cpu, &exact);
    }
}

/// Each row through its own adapter, in values and as small integers.
#[test]
fn many_adapters_in_one_batch() {
    for spec in routes_table() {
        check::forward::<f16>(&Cpu, &spec);
        check::forward::<f32>(&Cpu, &spec);
        check::backward::<bf16>(&Cpu, &spec);
        check::backward::<f32>(&Cpu, &spec);
        check::forward::<f32>(&Cpu, &spec.integers());
        check::backward::<f32>(&Cpu, &spec.integers());
    }
}

#[test]
fn dropout_of_nothing_gives_the_bits_of_none() {
    let none = Spec::new(70, 33, 50, 6);
    let dropout = Some(HostDropout { p: 0.0, seed: [5, 6], in_memory: false });
    let nothing = Spec { dropout, ..none };
    let mut forward = (none.forward::<bf16>(), nothing.forward::<bf16>());
    Cpu.forward(&mut forward.0).expect("it runs");
    Cpu.forward(&mut forward.1).expect("it runs");
    assert!(forward.0.y == forward.1.y && forward.0.h == forward.1.h);
    let mut backward = (none.backward::<bf16>(), nothing.backward::<bf16>());
    Cpu.backward(&mut backward.0).expect("it runs");
    Cpu.backward(&mut backward.1).expect("it runs");
    let (a, b) = backward;
    assert!(a.dx == b.dx && a.da == b.da && a.db == b.db);
}

/// Tall, wide and deep enough for many tiles and several chains in every direction.
#[test]
fn many_tiles() {
    for (m, n, k, r) in [(600, 300, 40, 16), (3, 1100, 700, 8), (2, 33, 4500, 4), (1, 513, 1025, 1)] {
        let spec = Spec { placement: Placement::Unaligned, ..Spec::new(m, n, k, r) };
        check::forward::<bf16>(&Cpu, &spec);
        check::backward::<f16>(&Cpu, &spec);
        check::backward::<f32>(&Cpu, &spec);
    }
}

#[test]
fn same_bits_for_any_number_of_threads() {
    let spec = Spec::new(300, 520, 390, 24);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
        pool.install(|| {
            let (mut forward, mut backward) = (spec.forward::<bf16>(), spec.backward::<bf16>());
            Cpu.forward(&mut forward).expect("forward runs");
            Cpu.backward(&mut backward).expect("backward runs");
            (forward.y, forward.h, backward.dx, backward.da, backward.db, backward.dbias)
        })
    };
    let one = run(1);
    for threads in [2, 3, 7] {
        assert!(run(threads) == one, "{threads} threads");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any shape, placement and combination of options.
    #[test]
    fn any_case_is_within_tolerance(
        (m, n, k, r) in (1usize..70, 1usize..70, 1usize..70, 0usize..40),
        place in 0usize..4,
        (bias, keep_h, accumulate, f32_gradients) in any::<(bool, bool, bool, bool)>(),
        seed in any::<u64>(),
    ) {
        let placement = Placement::ALL[place];
        let spec = Spec { placement, bias, keep_h, accumulate, f32_gradients, seed, ..Spec::new(m, n, k, r) };
        check::forward::<bf16>(&Cpu, &spec);
        check::backward::<f16>(&Cpu, &spec);
        check::backward::<f32>(&Cpu, &spec);
    }
}
