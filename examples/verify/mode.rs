//! The ways in which a layer was recorded.

use fused_lora::Dtype;

/// A recorded way of computing the layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    pub name: &'static str,
    /// The mode that holds the truth for this one.
    pub truth: &'static str,
    pub storage: Dtype,
    pub factors: Factors,
}

/// How a mode keeps an adapter, and what its products read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Factors {
    /// Both in the storage type.
    Storage,
    /// Kept in f32 (`A_f32`, `B_f32`), and rounded to the storage type for the products.
    Rounded,
    /// Both in f32: full precision.
    Full,
}

const fn mode(name: &'static str, storage: Dtype, factors: Factors) -> Mode {
    let truth = if matches!(factors, Factors::Storage) { "f64" } else { "f64_a32" };
    Mode { name, truth, storage, factors }
}

pub const MODES: [Mode; 6] = [
    mode("f32", Dtype::F32, Factors::Storage),
    mode("bf16", Dtype::Bf16, Factors::Storage),
    mode("f16", Dtype::F16, Factors::Storage),
    mode("bf16_amp", Dtype::Bf16, Factors::Rounded),
    mode("bf16_a32", Dtype::Bf16, Factors::Full),
    mode("f16_a32", Dtype::F16, Factors::Full),
];
