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
    pub trait Device: cudarc::driver::DeviceRepr + cudarc::driver::ValidAsZeroBits {}
    #[cfg(feature = "cuda")]
    impl<T: cudarc::driver::DeviceRepr + cudarc::driver::ValidAsZeroBits> Device for T {}
    #[cfg(not(feature = "cuda"))]
    pub trait Device {}
    #[cfg(not(feature = "cuda"))]
    impl<T> Device for T {}

    /// Bytes in memory, little-endian as on the GPU.
    pub trait Sealed: Sized + Device {
        fn append_bytes(self, out: &mut Vec<u8>);
        /// From the first bytes of `bytes`, which holds at least one element.
        fn from_bytes(bytes: &[u8]) -> Self;
    }

    macro_rules! sealed {
        ($($ty:ty: $first:pat => $bytes:expr;)*) => {
            $(impl Sealed for $ty {
                fn append_bytes(self, out: &mut Vec<u8>) {
                    out.extend(self.to_le_bytes());
                }
                fn from_bytes(bytes: &[u8]) -> Self {
                    match *bytes {
                        $first => <$ty>::from_le_bytes($bytes),
                        _ => Self::default(),
                    }
                }
            })*
        };
    }

    sealed! {
        half::f16: [a, b, ..] => [a, b];
        half::bf16: [a, b, ..] => [a, b];
        f32: [a, b, c, d, ..] => [a, b, c, d];
    }
}

/// f64 to f32, cut off, with the last bit set where anything was lost. An f32 has at least two bits more than either
/// 16-bit type has at the same size, so rounding the result to one of those is rounding `value` once. (The conversions of the
/// crate half are not: one ignores the lower half of an f64, the other may round to f32 first.)
fn to_odd(value: f64) -> f32 {
    let nearest = value as f32;
    if f64::from(nearest) == value || value.is_nan() {
        return nearest;
    }
    let is_above = f64::from(nearest).abs() > value.abs();
    f32::from_bits((nearest.to_bits() - u32::from(is_above)) | 1)
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
        f16::from_f32(to_odd(value))
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
        bf16::from_f32(to_odd(value))
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Every pair of neighbours, and what lies between them: the tie, and one f64 to either side of it.
    fn rounds_to_nearest<T: Element>(from_bits: fn(u16) -> T, infinity: u16) {
        for bits in 0..infinity {
            let (low, high) = (from_bits(bits), from_bits(bits + 1));
            // Past the largest finite value the next power of two takes the place of infinity.
            let next =
                if bits + 1 == infinity { 2.0 * low.to_f64() - from_bits(bits - 1).to_f64() } else { high.to_f64() };
            let tie = (low.to_f64() + next) / 2.0;
            let even = if bits % 2 == 0 { low } else { high };
            let cases = [(low.to_f64(), low), (tie.next_down(), low), (tie, even), (tie.next_up(), high), (next, high)];
            for (value, expected) in cases {
                assert_eq!(T::from_f64(value), expected, "{value:e} between {low:?} and {high:?}");
                let negated = T::from_f64(-value).to_f64();
                assert!(negated == -expected.to_f64() && negated.is_sign_negative(), "-{value:e}");
            }
        }
    }

    #[test]
    fn f64_is_rounded_once() {
        rounds_to_nearest(f16::from_bits, 0x7c00);
        rounds_to_nearest(bf16::from_bits, 0x7f80);
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        for value in [f64::INFINITY, f64::MAX, 1e300] {
            assert_eq!((f16::from_f64(value), bf16::from_f64(-value)), (f16::INFINITY, bf16::NEG_INFINITY));
        }
        assert!(<f16 as Element>::from_f64(f64::NAN).is_nan() && <bf16 as Element>::from_f64(f64::NAN).is_nan());
        assert_eq!(<f16 as Element>::from_f64(f64::MIN_POSITIVE).to_bits(), 0);
        assert_eq!(<bf16 as Element>::from_f64(-5e-324).to_bits(), 0x8000);
    }
}
