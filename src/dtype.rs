//! Element types: what is stored (`f16`, `bf16`, and `f32` on the CPU) and how it widens to `f32`.

use half::{bf16, f16};

/// Element type of x, w, a, b, h, y and their gradients. Accumulation is always in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE binary32: computed by the CPU backend only.
    F32,
}

impl Dtype {
    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            Dtype::F16 | Dtype::Bf16 => 2,
            Dtype::F32 => 4,
        }
    }

    /// `"f16"`, `"bf16"` or `"f32"`: as in kernel names.
    pub const fn name(self) -> &'static str {
        match self {
            Dtype::F16 => "f16",
            Dtype::Bf16 => "bf16",
            Dtype::F32 => "f32",
        }
    }
}

/// A Rust type that stores one element.
pub trait Element: Copy + Send + Sync + Default + PartialEq + std::fmt::Debug + 'static + sealed::Sealed {
    /// The matching [`Dtype`].
    const DTYPE: Dtype;
    /// Rounds to the nearest representable value, ties to even; overflow gives infinity.
    fn from_f32(value: f32) -> Self;
    /// Widens exactly.
    fn to_f32(self) -> f32;
    /// Rounds an f64 once, ties to even.
    fn from_f64(value: f64) -> Self;
    /// Widens exactly.
    fn to_f64(self) -> f64 {
        f64::from(self.to_f32())
    }
}

mod sealed {
    /// With the feature `cuda` every element can be uploaded as it is.
    #[cfg(feature = "cuda")]
    pub trait Sealed: cudarc::driver::DeviceRepr + cudarc::driver::ValidAsZeroBits {}
    #[cfg(not(feature = "cuda"))]
    pub trait Sealed {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
    impl Sealed for f32 {}
}

impl Element for f16 {
    const DTYPE: Dtype = Dtype::F16;
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    fn from_f64(value: f64) -> Self {
        f16::from_f64(value)
    }
}

impl Element for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    fn from_f64(value: f64) -> Self {
        bf16::from_f64(value)
    }
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;
    fn from_f32(value: f32) -> Self {
        value
    }
    fn to_f32(self) -> f32 {
        self
    }
    fn from_f64(value: f64) -> Self {
        value as f32
    }
}
