//! "Floating Point Instructions" and "Half Precision Floating Point Instructions". Everything rounds to nearest even, once;
//! subnormal numbers are kept (there is no `.ftz` here).

use super::narrow::{Bf16, F16, NAN16, Narrow, add_odd, odd32};
use super::{Lanes, REFUSED, map, zip, zip3};
use crate::isa::{Binary, Ty, Unary};

/// The NaN that single-precision instructions produce ("Floating Point Instructions").
const NAN32: u32 = 0x7fff_ffff;
/// For f64 the ISA names none; this is `CUDART_NAN`.
const NAN64: u64 = 0xfff8_0000_0000_0000;

/// The bits of a result. Chosen among integers: between floats the compiler may take one NaN for another, and does.
#[inline(always)]
pub(super) fn canonical32(value: f32) -> u32 {
    if value.is_nan() { NAN32 } else { value.to_bits() }
}

#[inline(always)]
pub(super) fn canonical64(value: f64) -> u64 {
    if value.is_nan() { NAN64 } else { value.to_bits() }
}

/// `neg` and `abs` touch the sign alone: the ISA leaves open which NaN they make of a NaN.
pub(super) fn unary(op: Unary, ty: Ty, a: &Lanes) -> Lanes {
    let sign: u64 = match ty {
        Ty::F16 | Ty::Bf16 => 0x8000,
        Ty::F16x2 | Ty::Bf16x2 => 0x8000_8000,
        Ty::F32 => 1 << 31,
        _ => 1 << 63,
    };
    match (op, ty) {
        (Unary::Neg, _) => map(a, |x: u64| x ^ sign),
        (Unary::Abs, _) => map(a, |x: u64| x & !sign),
        (Unary::Rcp, Ty::F32) => map(a, |x: f32| canonical32(1.0 / x)),
        (Unary::Rcp, Ty::F64) => map(a, |x: f64| canonical64(1.0 / x)),
        (Unary::Sqrt, Ty::F32) => map(a, |x: f32| canonical32(x.sqrt())),
        (Unary::Sqrt, Ty::F64) => map(a, |x: f64| canonical64(x.sqrt())),
        _ => REFUSED,
    }
}

pub(super) fn binary(op: Binary, ty: Ty, a: &Lanes, b: &Lanes) -> Lanes {
    match ty {
        Ty::F16 => binary16::<F16>(op, a, b),
        Ty::Bf16 => binary16::<Bf16>(op, a, b),
        Ty::F16x2 => binary16x2::<F16>(op, a, b),
        Ty::Bf16x2 => binary16x2::<Bf16>(op, a, b),
        Ty::F32 => binary32(op, a, b),
        _ => binary64(op, a, b),
    }
}

/// `min` and `max` on the bits of one format, given those of infinity and of the NaN to produce.
macro_rules! extremes {
    ($module:ident, $bits:ident, $infinity:expr, $nan:expr) => {
        mod $module {
            #[inline(always)]
            fn is_nan(x: $bits) -> bool {
                x & ($bits::MAX >> 1) > $infinity
            }

            /// Order of the numbers as an order of integers, -0 before +0: below zero, more magnitude is less.
            #[inline(always)]
            fn less(x: $bits, y: $bits) -> bool {
                let key = |x: $bits| {
                    x.cast_signed() ^ ((x.cast_signed() >> ($bits::BITS - 1)).cast_unsigned() >> 1).cast_signed()
                };
                key(x) < key(y)
            }

            /// `min`, or `max` with `MAX`. A NaN gives way to a number, with `NAN` it does not.
            #[inline(always)]
            pub fn pick<const MAX: bool, const NAN: bool>(x: $bits, y: $bits) -> $bits {
                let take_y = if MAX { less(x, y) } else { less(y, x) };
                let picked = if is_nan(x) | (take_y & !is_nan(y)) { y } else { x };
                let nan = if NAN { is_nan(x) | is_nan(y) } else { is_nan(x) & is_nan(y) };
                if nan { $nan } else { picked }
            }
        }
    };
}

extremes!(extremes_f16, u16, 0x7c00, super::NAN16);
extremes!(extremes_bf16, u16, 0x7f80, super::NAN16);
extremes!(extremes32, u32, 0x7f80_0000, super::NAN32);
extremes!(extremes64, u64, 0x7ff0_0000_0000_0000, super::NAN64);

fn binary32(op: Binary, a: &Lanes, b: &Lanes) -> Lanes {
    use extremes32::pick;
    match op {
        Binary::Add => zip(a, b, |x: f32, y: f32| canonical32(x + y)),
        Binary::Sub => zip(a, b, |x: f32, y: f32| canonical32(x - y)),
        Binary::MulLo => zip(a, b, |x: f32, y: f32| canonical32(x * y)),
        Binary::Div => zip(a, b, |x: f32, y: f32| canonical32(x / y)),
        Binary::Min => zip(a, b, pick::<false, false>),
        Binary::Max => zip(a, b, pick::<true, false>),
        Binary::MinNan => zip(a, b, pick::<false, true>),
        Binary::MaxNan => zip(a, b, pick::<true, true>),
        _ => REFUSED,
    }
}

fn binary64(op: Binary, a: &Lanes, b: &Lanes) -> Lanes {
    use extremes64::pick;
    match op {
        Binary::Add => zip(a, b, |x: f64, y: f64| canonical64(x + y)),
        Binary::Sub => zip(a, b, |x: f64, y: f64| canonical64(x - y)),
        Binary::MulLo => zip(a, b, |x: f64, y: f64| canonical64(x * y)),
        Binary::Div => zip(a, b, |x: f64, y: f64| canonical64(x / y)),
        Binary::Min => zip(a, b, pick::<false, false>),
        Binary::Max => zip(a, b, pick::<true, false>),
        _ => REFUSED,
    }
}

/// Arithmetic of a 16-bit format, on bits.
trait Half: Narrow {
    fn pick<const MAX: bool, const NAN: bool>(x: u16, y: u16) -> u16;

    /// Rounded twice, to f32 and to 16 bits, but as if once. The sum of two p-bit numbers, rounded to 2p + 2 bits or more, is
    /// a tie of the p-bit format only if it is exact (Figueroa, "When is double rounding innocuous?", 1995); p is 11 or 8, f32
    /// has 24. Subnormal results are sums of multiples of the last place, hence exact; and what overflows f32 lies beyond the
    /// largest bf16.
    #[inline(always)]
    fn add(x: u16, y: u16) -> u16 {
        Self::narrow(Self::widen(x) + Self::widen(y))
    }

    #[inline(always)]
    fn sub(x: u16, y: u16) -> u16 {
        Self::narrow(Self::widen(x) - Self::widen(y))
    }

    /// Exact in f32, except what falls below its last place 2^-149: a product of two bf16 has 16 bits, so it is less than
    /// 2^-134 then, half of the least bf16, and 0 whether it was rounded up to that or not.
    #[inline(always)]
    fn mul(x: u16, y: u16) -> u16 {
        Self::narrow(Self::widen(x) * Self::widen(y))
    }

    /// The product is exact in f64; the sum is rounded to odd twice, which is rounding to odd once, and then to nearest.
    #[inline(always)]
    fn fma(x: u16, y: u16, z: u16) -> u16 {
        let product = f64::from(Self::widen(x)) * f64::from(Self::widen(y));
        Self::narrow(odd32(add_odd(product, f64::from(Self::widen(z)))))
    }
}

impl Half for F16 {
    #[inline(always)]
    fn pick<const MAX: bool, const NAN: bool>(x: u16, y: u16) -> u16 {
        extremes_f16::pick::<MAX, NAN>(x, y)
    }
}

impl Half for Bf16 {
    #[inline(always)]
    fn pick<const MAX: bool, const NAN: bool>(x: u16, y: u16) -> u16 {
        extremes_bf16::pick::<MAX, NAN>(x, y)
    }
}

fn binary16<H: Half>(op: Binary, a: &Lanes, b: &Lanes) -> Lanes {
    match op {
        Binary::Add => zip(a, b, H::add),
        Binary::Sub => zip(a, b, H::sub),
        Binary::MulLo => zip(a, b, H::mul),
        Binary::Min => zip(a, b, H::pick::<false, false>),
        Binary::Max => zip(a, b, H::pick::<true, false>),
        Binary::MinNan => zip(a, b, H::pick::<false, true>),
        Binary::MaxNan => zip(a, b, H::pick::<true, true>),
        _ => REFUSED,
    }
}

/// Both halves with the instruction of the scalar format.
fn binary16x2<H: Half>(op: Binary, a: &Lanes, b: &Lanes) -> Lanes {
    let low = binary16::<H>(op, a, b);
    let high = binary16::<H>(op, &upper(a), &upper(b));
    join(&low, &high)
}

fn upper(a: &Lanes) -> Lanes {
    map(a, |x: u32| x >> 16)
}

fn join(low: &Lanes, high: &Lanes) -> Lanes {
    zip(low, high, |low: u32, high: u32| low | high << 16)
}

pub(super) fn fma(ty: Ty, a: &Lanes, b: &Lanes, c: &Lanes) -> Lanes {
    match ty {
        Ty::F16 => zip3(a, b, c, F16::fma),
        Ty::Bf16 => zip3(a, b, c, Bf16::fma),
        Ty::F16x2 => join(&zip3(a, b, c, F16::fma), &zip3(&upper(a), &upper(b), &upper(c), F16::fma)),
        Ty::Bf16x2 => join(&zip3(a, b, c, Bf16::fma), &zip3(&upper(a), &upper(b), &upper(c), Bf16::fma)),
        Ty::F32 => zip3(a, b, c, fma32),
        Ty::F64 => zip3(a, b, c, |x: f64, y: f64, z: f64| canonical64(x.mul_add(y, z))),
        _ => REFUSED,
    }
}

/// The product of two f32 is exact in f64, and the sum rounded to odd has 53 bits for 24. Unlike `f32::mul_add`, which is a
/// call on processors whose baseline lacks the instruction, this vectorises.
#[inline(always)]
fn fma32(x: f32, y: f32, z: f32) -> u32 {
    canonical32(add_odd(f64::from(x) * f64::from(y), f64::from(z)) as f32)
}
