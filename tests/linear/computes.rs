//! Layers against the oracle and against what PEFT recorded, merge and rounding bit by bit.

use fused_lora::cpu::Cpu;
use fused_lora::linear::Backend;
use fused_lora::{Element, bf16, f16};

use crate::common::golden::{self, Golden};
use crate::common::layers;

/// Layers that the CPU and the emulated kernels compute alike.
fn computes<T: Element>(backend: &impl Backend) {
    for spec in layers::layer_table() {
        for f32_factors in [false, true] {
            layers::computes::<_, T>(backend, &spec, f32_factors);
        }
    }
}

/// Merge, bit by bit.
fn merges<T: Element>(backend: &impl Backend) {
    for spec in layers::merge_table() {
        layers::merges_views::<_, T>(backend, &spec);
        if spec.r != 0 {
            layers::merges::<_, T>(backend, &spec, false);
            layers::merges::<_, T>(backend, &spec, true);
        }
    }
}

mod cpu_backend {
    use super::*;

    #[test]
    fn computes_what_the_oracle_does() {
        computes::<f16>(&Cpu);
        computes::<bf16>(&Cpu);
        computes::<f32>(&Cpu);
    }

    #[test]
    fn merges_bit_by_bit() {
        merges::<f16>(&Cpu);
        merges::<bf16>(&Cpu);
        merges::<f32>(&Cpu);
        layers::merges_near_ties::<_, f16>(&Cpu, f16::from_bits, 0x7c00, 1);
        layers::merges_near_ties::<_, bf16>(&Cpu, bf16::from_bits, 0x7f80, 1);
    }

    #[test]
    fn rounds_every_neighbour() {
        layers::rounds_every_neighbour::<_, f16>(&Cpu, f16::from_bits);
        layers::rounds_every_neighbour::<_, bf16>(&Cpu, bf16::from_bits);
    }

    #[test]
    fn sums_several_adapters() {
        for f32_factors in [false, true] {
            layers::sums_several::<_, f16>(&Cpu, f32_factors);
            layers::sums_several::<_, bf16>(&Cpu, f32_factors);
            layers::sums_several::<_, f32>(&Cpu, f32_factors);
        }
    }

    #[test]
    fn follows_updates_of_f32_factors() {
        layers::follows_updates::<_, f16>(&Cpu);
        layers::follows_updates::<_, bf16>(&Cpu);
        layers::follows_updates::<_, f32>(&Cpu);
    }

    #[test]
    fn as_exact_as_peft() {
        for name in GOLDEN {
            let case = Golden::load(name);
            case.check::<_, f32>(&Cpu, golden::F32);
            case.check::<_, bf16>(&Cpu, golden::BF16);
            case.check::<_, f16>(&Cpu, golden::F16);
            case.check::<_, bf16>(&Cpu, golden::BF16_AMP);
        }
        // Recorded in fewer modes.
        for name in ["lora_bias", "high_rank", "zero_b"] {
            Golden::load(name).check::<_, f32>(&Cpu, golden::F32);
            Golden::load(name).check::<_, bf16>(&Cpu, golden::BF16);
        }
        Golden::load("bias_lora_only").check::<_, f32>(&Cpu, golden::F32);
    }

    #[test]
    fn dropout_means_what_peft_means() {
        Golden::load("dropout").check_oracle();
    }
}

const GOLDEN: [&str; 6] = ["plain", "plain_3d_nobias", "rslora", "odd_sizes", "decode_r1", "multi_active"];

#[cfg(all(feature = "emulator", feature = "cuda"))]
mod emulated {
    use super::*;
    use fused_lora::emulator::Emulator;
    use fused_lora::linear::LoraLinear;
    use fused_lora::plan::Device;
    use fused_lora::{Dtype, Error};

    /// With bf16 tensor instructions (80) and without (75).
    fn emulator(arch: u32) -> Emulator {
        Emulator::new(Device::of_arch("emulated", arch, 3))
    }

    #[test]
    fn computes_what_the_oracle_does() {
        computes::<f16>(&emulator(80));
        computes::<bf16>(&emulator(80));
    }

    #[test]
    fn merges_bit_by_bit() {
        merges::<f16>(&emulator(75));
        merges::<bf16>(&emulator(80));
        merges::<bf16>(&emulator(75));
        layers::merges_near_ties::<_, f16>(&emulator(80), f16::from_bits, 0x7c00, 5);
        layers::merges_near_ties::<_, bf16>(&emulator(75), bf16::from_bits, 0x7f80, 5);
        layers::merges_near_ties::<_, bf16>(&emulator(80), bf16::from_bits, 0x7f80, 5);
    }

    #[test]
    fn rounds_every_neighbour() {
        layers::rounds_every_neighbour::<_, f16>(&emulator(80), f16::from_bits);
        layers::rounds_every_neighbour::<_, bf16>(&emulator(75), bf16::from_bits);
        layers::rounds_every_neighbour::<_, bf16>(&emulator(80), bf16::from_bits);
    }

    #[test]
    fn sums_several_adapters() {
        layers::sums_several::<_, f16>(&emulator(80), false);
        layers::sums_several::<_, bf16>(&emulator(80), true);
    }

    #[test]
    fn follows_updates_of_f32_factors() {
        layers::follows_updates::<_, bf16>(&emulator(80));
    }

    #[test]
    fn as_exact_as_peft() {
        Golden::load("lora_bias").check::<_, bf16>(&emulator(80), golden::BF16);
        for name in ["plain", "rslora", "multi_active"] {
            let case = Golden::load(name);
            case.check::<_, bf16>(&emulator(80), golden::BF16);
            case.check::<_, f16>(&emulator(80), golden::F16);
            case.check::<_, bf16>(&emulator(80), golden::BF16_AMP);
        }
    }

    #[test]
    fn f32_layers_are_refused() {
        let refused = LoraLinear::upload(emulator(80), &[0.0f32; 4], None, 2, 2).map(drop);
        assert!(matches!(refused, Err(Error::Dtype { got: Dtype::F32, .. })), "{refused:?}");
    }
}
