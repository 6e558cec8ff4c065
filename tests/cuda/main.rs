//! The CUDA backend: against the oracle, bit for bit against itself, in graphs, across streams; and what it says where
//! there is no GPU.
#![cfg(feature = "cuda")]

#[path = "../arguments/call.rs"]
mod call;
#[path = "../common/mod.rs"]
mod common;
mod graphs;
#[path = "../arguments/on_device.rs"]
mod on_device;
mod refused;
mod streams;
#[path = "../arguments/table.rs"]
mod table;

use common::data::{
    Placement, Spec, dora_table, dropout_table, integer_table, routes_table, shape_table, subset_table,
};
use common::golden::{self, Golden};
use common::gpu::{self, Gpu, backward_bits, forward_bits, kernels, queue};
use common::hopper::{self, Case};
use common::{Backend, check, layers, skipped};
use fused_lora::cuda::Kernels;
use fused_lora::plan::{Family, Options};
use fused_lora::{Element, bf16, f16};

fn table<T: Element>(test: &str) {
    let Some(kernels) = kernels(test) else { return };
    let gpu = Gpu::new(kernels);
    for spec in shape_table() {
        check::forward::<T>(&gpu, &spec);
        check::backward::<T>(&gpu, &spec);
    }
}

#[test]
fn shapes_in_f16() {
    table::<f16>("shapes_in_f16");
}

#[test]
fn shapes_in_bf16() {
    table::<bf16>("shapes_in_bf16");
}

/// All combinations of presence, accumulation and gradient type at one ragged shape.
#[test]
fn any_subset_of_outputs() {
    let Some(kernels) = kernels("any_subset_of_outputs") else { return };
    let gpu = Gpu::new(kernels);
    for spec in subset_table(21, 34, 19, 5) {
        check::backward::<bf16>(&gpu, &spec);
        check::backward::<f16>(&gpu, &spec);
    }
}

#[test]
fn small_integers_are_exact() {
    let Some(kernels) = kernels("small_integers_are_exact") else { return };
    let gpu = Gpu::new(kernels);
    for spec in integer_table() {
        check::forward::<f16>(&gpu, &spec);
        check::forward::<bf16>(&gpu, &spec);
        check::backward::<f16>(&gpu, &spec);
        check::backward::<bf16>(&gpu, &spec);
    }
}

/// Dropout, rows through different adapters, and DoRA: what seed, table and gain say, in whichever family.
#[test]
fn dropout_routes_and_dora() {
    let Some(kernels) = kernels("dropout_routes_and_dora") else { return };
    let gpu = Gpu::new(kernels);
    // Dimensions in steps of 8 are for the Hopper kernels.
    let eights = |spec: Spec| {
        let [n, k, r] = [spec.n, spec.k, spec.r].map(|extent| extent.next_multiple_of(8));
        Spec { n, k, r, placement: Placement::Aligned, ..spec }
    };
    for spec in dropout_table().into_iter().chain(routes_table()).chain(dora_table()) {
        for spec in [spec, eights(spec)] {
            check::forward::<f16>(&gpu, &spec);
            check::forward::<bf16>(&gpu, &spec);
            check::backward::<f16>(&gpu, &spec);
            check::backward::<bf16>(&gpu, &spec);
        }
    }
}

/// Enough tokens that db and da are reduced in chunks, and enough tiles for several waves.
#[test]
fn many_tiles() {
    let Some(kernels) = kernels("many_tiles") else { return };
    let gpu = Gpu::new(kernels);
    for (m, n, k, r) in [(2100, 264, 136, 24), (3, 1100, 700, 8), (513, 33, 1500, 4), (1200, 1300, 70, 200)] {
        for placement in [Placement::Aligned, Placement::Unaligned] {
            let spec = Spec { placement, ..Spec::new(m, n, k, r) };
            check::forward::<bf16>(&gpu, &spec);
            check::backward::<f16>(&gpu, &spec);
        }
    }
}

#[test]
fn layers_compute_what_the_oracle_does() {
    let Some(queue) = queue("layers_compute_what_the_oracle_does") else { return };
    for spec in layers::layer_table() {
        for f32_factors in [false, true] {
            layers::computes::<_, bf16>(&queue, &spec, f32_factors);
            layers::computes::<_, f16>(&queue, &spec, f32_factors);
        }
    }
    for f32_factors in [false, true] {
        layers::sums_several::<_, f16>(&queue, f32_factors);
        layers::sums_several::<_, bf16>(&queue, f32_factors);
    }
    layers::follows_updates::<_, f16>(&queue);
    layers::follows_updates::<_, bf16>(&queue);
}

#[test]
fn layers_merge_and_round_bit_by_bit() {
    let Some(queue) = queue("layers_merge_and_round_bit_by_bit") else { return };
    for spec in layers::merge_table() {
        layers::merges_views::<_, f16>(&queue, &spec);
        layers::merges_views::<_, bf16>(&queue, &spec);
        for f32_factors in [false, true] {
            layers::merges::<_, f16>(&queue, &spec, f32_factors);
            layers::merges::<_, bf16>(&queue, &spec, f32_factors);
        }
    }
    layers::merges_near_ties::<_, f16>(&queue, f16::from_bits, 0x7c00, 1);
    layers::merges_near_ties::<_, bf16>(&queue, bf16::from_bits, 0x7f80, 1);
    layers::rounds_every_neighbour::<_, f16>(&queue, f16::from_bits);
    layers::rounds_every_neighbour::<_, bf16>(&queue, bf16::from_bits);
}

#[test]
fn layers_are_as_exact_as_peft() {
    let Some(queue) = queue("layers_are_as_exact_as_peft") else { return };
    for name in ["plain", "rslora", "odd_sizes", "decode_r1", "multi_active"] {
        let case = Golden::load(name);
        case.check::<_, bf16>(&queue, golden::BF16);
        case.check::<_, f16>(&queue, golden::F16);
        case.check::<_, bf16>(&queue, golden::BF16_AMP);
    }
}

fn has_hopper_kernels(kernels: &Kernels) -> bool {
    kernels.device().arch == 90 && !kernels.plan_options().without_sm90
}

/// Every tile and cluster of the Hopper family, with bundles and chunks, whatever the planner would choose.
#[test]
fn hopper_kernels() {
    let Some(kernels) = kernels("hopper_kernels") else { return };
    if !has_hopper_kernels(&kernels) {
        return skipped("hopper_kernels", "this GPU, or this build, has no Hopper kernels");
    }
    for Case { spec, options, .. } in hopper::table() {
        let gpu = Gpu::new(kernels.with_plan_options(options));
        check::forward::<bf16>(&gpu, &spec);
        check::forward::<f16>(&gpu, &spec);
        check::backward::<bf16>(&gpu, &spec);
        check::backward::<f16>(&gpu, &spec);
    }
}

/// Large enough for chunks and for both kinds of scratch.
fn repeated() -> Spec {
    Spec { placement: Placement::Aligned, ..Spec::new(1500, 520, 392, 24) }
}

#[test]
fn same_bits_again_and_on_a_used_workspace() {
    let Some(kernels) = kernels("same_bits_again_and_on_a_used_workspace") else { return };
    let (first, other) = (Gpu::new(kernels.clone()), Gpu::new(kernels));
    let run = |gpu: &Gpu| {
        let (mut forward, mut backward) = (repeated().forward::<bf16>(), repeated().backward::<bf16>());
        gpu.forward(&mut forward).expect("forward runs");
        gpu.backward(&mut backward).expect("backward runs");
        (forward_bits(&forward), backward_bits(&backward))
    };
    let expected = run(&first);
    for _ in 0..20 {
        assert!(run(&first) == expected, "a used workspace changes the result");
        assert!(run(&other) == expected, "another workspace changes the result");
    }
}

/// Half of them forward, half backward, on one workspace; without a hang or a differing bit.
#[test]
#[ignore = "minutes of GPU time"]
fn a_hundred_thousand_launches_give_the_same_bits() {
    let Some(kernels) = kernels("a_hundred_thousand_launches_give_the_same_bits") else { return };
    let mut choices = vec![Options::default().with_family(Family::Portable)];
    if has_hopper_kernels(&kernels) {
        choices.extend(hopper::variants());
    }
    for options in choices {
        let gpu = Gpu::new(kernels.with_plan_options(options));
        let (mut forward, mut backward) = (repeated().forward::<bf16>(), repeated().backward::<bf16>());
        let (mut on_forward, mut on_backward) = (gpu.upload_forward(&forward), gpu.upload_backward(&backward));
        let mut workspace = gpu::workspace::<bf16>(&gpu, on_forward.shape());
        let mut first = None;
        for round in 0..50 {
            for _ in 0..1000 {
                gpu.kernels.forward(&gpu.stream, on_forward.op(), &mut workspace).expect("forward is launched");
                gpu.kernels.backward(&gpu.stream, on_backward.op(), &mut workspace).expect("backward is launched");
            }
            gpu.download_forward(&on_forward, &mut forward);
            gpu.download_backward(&on_backward, &mut backward);
            let bits = (forward_bits(&forward), backward_bits(&backward));
            assert!(*first.get_or_insert_with(|| bits.clone()) == bits, "{options:?}: other bits in round {round}");
        }
        println!("{options:?}: 100,000 launches");
    }
}
