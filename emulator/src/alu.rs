//! Arithmetic of one warp instruction: every function takes and returns all 32 lanes.
//!
//! The type is looked at once, outside the loop over the lanes, so that each loop is one the compiler can vectorise. What a
//! lane that does not execute the instruction computes is not used, hence nothing here may trap whatever the operands hold.
//!
//! Section names are those of the PTX ISA 9.0. Where it leaves a result open, the choice is stated beside the code.

mod convert;
mod float;
mod int;
mod math;
mod mma;
mod narrow;
mod soft;
#[cfg(test)]
mod tests;
mod wgmma;

use crate::isa::*;
pub(crate) use convert::{cvt, cvt_pack};
pub(crate) use int::bfi;
pub(crate) use math::{float_mode_exists, math, test as test_math, truth};
pub(crate) use mma::{mma, mma_f16};
pub(crate) use wgmma::{Panel, Rows, Sums, accumulate, load, store, widen2, widen8};

/// A register: one value per lane. 32-bit and 16-bit registers hold their value zero-extended.
pub(crate) type Lanes = [u64; 32];

/// A lane's value as a Rust type. Whatever lies above the type in the register is ignored.
trait Lane: Copy {
    fn get(bits: u64) -> Self;
    fn put(self) -> u64;
}

macro_rules! lane {
    ($($ty:ident as $bits:ident: $get:expr, $put:expr;)*) => {$(
        impl Lane for $ty {
            #[inline(always)]
            fn get(bits: u64) -> Self {
                $get(bits as $bits)
            }
            #[inline(always)]
            fn put(self) -> u64 {
                u64::from($put(self) as $bits)
            }
        }
    )*};
}

lane! {
    u16 as u16: u16::from, u16::from;
    u32 as u32: u32::from, u32::from;
    u64 as u64: u64::from, u64::from;
    i16 as u16: u16::cast_signed, i16::cast_unsigned;
    i32 as u32: u32::cast_signed, i32::cast_unsigned;
    i64 as u64: u64::cast_signed, i64::cast_unsigned;
    f32 as u32: f32::from_bits, f32::to_bits;
    f64 as u64: f64::from_bits, f64::to_bits;
}

#[inline(always)]
fn map<T: Lane, R: Lane>(a: &Lanes, f: impl Fn(T) -> R) -> Lanes {
    let mut d = [0; 32];
    for (d, a) in d.iter_mut().zip(a) {
        *d = f(T::get(*a)).put();
    }
    d
}

#[inline(always)]
fn zip<T: Lane, U: Lane, R: Lane>(a: &Lanes, b: &Lanes, f: impl Fn(T, U) -> R) -> Lanes {
    let mut d = [0; 32];
    for ((d, a), b) in d.iter_mut().zip(a).zip(b) {
        *d = f(T::get(*a), U::get(*b)).put();
    }
    d
}

#[inline(always)]
fn zip3<T: Lane, U: Lane, V: Lane, R: Lane>(a: &Lanes, b: &Lanes, c: &Lanes, f: impl Fn(T, U, V) -> R) -> Lanes {
    let mut d = [0; 32];
    for (((d, a), b), c) in d.iter_mut().zip(a).zip(b).zip(c) {
        *d = f(T::get(*a), U::get(*b), V::get(*c)).put();
    }
    d
}

fn is_float(ty: Ty) -> bool {
    matches!(ty, Ty::F16 | Ty::Bf16 | Ty::F16x2 | Ty::Bf16x2 | Ty::F32 | Ty::F64)
}

fn is_packed(ty: Ty) -> bool {
    matches!(ty, Ty::F16x2 | Ty::Bf16x2)
}

/// Whether this module gives the instruction the meaning that the PTX ISA does. The functions below must be called for no
/// other: they return all ones then.
pub(crate) fn implemented(op: &Op) -> bool {
    let int = |ty| matches!(ty, Ty::U(16 | 32 | 64) | Ty::S(16 | 32 | 64));
    let bits = |ty| matches!(ty, Ty::B(16 | 32 | 64));
    let wide = |ty| matches!(ty, Ty::U(16 | 32) | Ty::S(16 | 32));
    match *op {
        Op::Unary { op, ty, .. } => match op {
            Unary::Mov => true,
            Unary::Not | Unary::Cnot => bits(ty),
            Unary::Neg | Unary::Abs => is_float(ty) || matches!(ty, Ty::S(16 | 32 | 64)),
            Unary::Popc | Unary::Clz | Unary::Brev => matches!(ty, Ty::B(32 | 64)),
            Unary::Bfind => matches!(ty, Ty::U(32 | 64)),
            Unary::Rcp | Unary::Sqrt => matches!(ty, Ty::F32 | Ty::F64),
        },
        Op::Binary { op, ty, .. } => match op {
            Binary::Add | Binary::Sub | Binary::MulLo | Binary::Min | Binary::Max => is_float(ty) || int(ty),
            Binary::MulHi | Binary::Rem => int(ty),
            Binary::MulWide => wide(ty),
            Binary::Div => int(ty) || matches!(ty, Ty::F32 | Ty::F64),
            Binary::MinNan | Binary::MaxNan => is_float(ty) && ty != Ty::F64,
            Binary::And | Binary::Or | Binary::Xor | Binary::Shl => bits(ty),
            Binary::Shr => bits(ty) || int(ty),
        },
        Op::Ternary { op, ty, .. } => match op {
            Ternary::MadLo | Ternary::MadHi => int(ty),
            Ternary::MadWide => wide(ty),
            Ternary::Fma => is_float(ty),
            Ternary::Bfe => matches!(ty, Ty::U(32 | 64) | Ty::S(32 | 64)),
            Ternary::Prmt | Ternary::ShfL { .. } | Ternary::ShfR { .. } | Ternary::Lop3(_) => ty == Ty::B(32),
        },
        Op::Bfi { ty, .. } => matches!(ty, Ty::B(32 | 64)),
        Op::Setp { cmp, ty, .. } => match cmp {
            Compare::Eq | Compare::Ne => !is_packed(ty) && ty.bits() >= 16,
            Compare::Lt | Compare::Le | Compare::Gt | Compare::Ge => int(ty) || (is_float(ty) && !is_packed(ty)),
            _ => is_float(ty) && !is_packed(ty),
        },
        Op::Cvt { to, from, round, integer, sat, relu, .. } => {
            convert::implemented(to, from, round, integer, sat, relu)
        }
        Op::CvtPack { to, .. } => is_packed(to),
        Op::Atom { op, ty, .. } => match op {
            Atomic::Add => matches!(ty, Ty::U(32 | 64) | Ty::S(32)) || is_float(ty),
            Atomic::Min | Atomic::Max => matches!(ty, Ty::U(32 | 64) | Ty::S(32 | 64)),
            Atomic::Inc | Atomic::Dec => ty == Ty::U(32),
            Atomic::Cas => matches!(ty, Ty::B(16 | 32 | 64)),
            Atomic::And | Atomic::Or | Atomic::Xor | Atomic::Exch => matches!(ty, Ty::B(32 | 64)),
        },
        Op::Mma { k, ab, ref a, ref b, .. } => {
            let fragments = usize::from(k) / 8;
            matches!((k, ab), (8 | 16, Ty::F16 | Ty::Bf16)) && a.len() == 2 * fragments && b.len() == fragments
        }
        _ => true,
    }
}

/// What a function returns for a combination that [`implemented`] refuses.
const REFUSED: Lanes = [u64::MAX; 32];

pub(crate) fn unary(op: Unary, ty: Ty, a: &Lanes) -> Lanes {
    if op == Unary::Mov {
        *a
    } else if is_float(ty) {
        float::unary(op, ty, a)
    } else {
        int::unary(op, ty, a)
    }
}

pub(crate) fn binary(op: Binary, ty: Ty, a: &Lanes, b: &Lanes) -> Lanes {
    if is_float(ty) { float::binary(op, ty, a, b) } else { int::binary(op, ty, a, b) }
}

pub(crate) fn ternary(op: Ternary, ty: Ty, a: &Lanes, b: &Lanes, c: &Lanes) -> Lanes {
    if op == Ternary::Fma { float::fma(ty, a, b, c) } else { int::ternary(op, ty, a, b, c) }
}

/// A bit per lane, lane 0 lowest.
pub(crate) fn setp(cmp: Compare, ty: Ty, a: &Lanes, b: &Lanes) -> u32 {
    match ty {
        Ty::B(16) | Ty::U(16) => compare::<u16>(cmp, a, b),
        Ty::B(32) | Ty::U(32) => compare::<u32>(cmp, a, b),
        Ty::B(64) | Ty::U(64) => compare::<u64>(cmp, a, b),
        Ty::S(16) => compare::<i16>(cmp, a, b),
        Ty::S(32) => compare::<i32>(cmp, a, b),
        Ty::S(64) => compare::<i64>(cmp, a, b),
        Ty::F16 => compare::<f32>(cmp, &narrow::widen_lanes(Ty::F16, a), &narrow::widen_lanes(Ty::F16, b)),
        Ty::Bf16 => compare::<f32>(cmp, &narrow::widen_lanes(Ty::Bf16, a), &narrow::widen_lanes(Ty::Bf16, b)),
        Ty::F32 => compare::<f32>(cmp, a, b),
        Ty::F64 => compare::<f64>(cmp, a, b),
        _ => u32::MAX,
    }
}

/// "Floating Point Comparisons": the ordered ones (`ne` among them) are false when an operand is NaN, `equ` to `geu` true.
/// Every integer is ordered.
fn compare<T: Lane + PartialOrd>(cmp: Compare, a: &Lanes, b: &Lanes) -> u32 {
    match cmp {
        Compare::Eq => test(a, b, |x: T, y: T| x == y),
        Compare::Ne => test(a, b, |x: T, y: T| (x < y) | (x > y)),
        Compare::Lt => test(a, b, |x: T, y: T| x < y),
        Compare::Le => test(a, b, |x: T, y: T| x <= y),
        Compare::Gt => test(a, b, |x: T, y: T| x > y),
        Compare::Ge => test(a, b, |x: T, y: T| x >= y),
        Compare::Equ => !compare::<T>(Compare::Ne, a, b),
        Compare::Neu => !compare::<T>(Compare::Eq, a, b),
        Compare::Ltu => !compare::<T>(Compare::Ge, a, b),
        Compare::Leu => !compare::<T>(Compare::Gt, a, b),
        Compare::Gtu => !compare::<T>(Compare::Le, a, b),
        Compare::Geu => !compare::<T>(Compare::Lt, a, b),
        Compare::Num => test(a, b, |x: T, y: T| (x <= y) | (x > y)),
        Compare::Nan => !compare::<T>(Compare::Num, a, b),
    }
}

#[inline(always)]
fn test<T: Lane>(a: &Lanes, b: &Lanes, f: impl Fn(T, T) -> bool) -> u32 {
    let mut flags = [0u8; 32];
    for ((flag, a), b) in flags.iter_mut().zip(a).zip(b) {
        *flag = u8::from(f(T::get(*a), T::get(*b)));
    }
    let (eights, _) = flags.as_chunks::<8>();
    let mut mask = 0;
    for (i, eight) in eights.iter().enumerate() {
        // The multiplication gathers bit 0 of byte j at bit 56 + j; no two terms of it meet.
        let gathered = u64::from_le_bytes(*eight).wrapping_mul(0x0102_0408_1020_4080) >> 56;
        mask |= (gathered as u32) << (8 * i);
    }
    mask
}

/// The memory side of `atom` and `red` on one element: what replaces `old`. ("Parallel Synchronization and Communication:
/// atom".) Additions to subnormal f32 are not flushed, as in shared memory; the ISA says that global memory flushes at
/// present.
pub(crate) fn atomic(op: Atomic, ty: Ty, old: u64, b: u64, c: u64) -> u64 {
    let mask = u64::MAX >> (64 - ty.bits());
    let signed = |x: u64| (x << (64 - ty.bits())).cast_signed();
    let new = match (op, ty) {
        (Atomic::Add, Ty::F32) => float::canonical32(f32::get(old) + f32::get(b)).into(),
        (Atomic::Add, Ty::F64) => float::canonical64(f64::get(old) + f64::get(b)),
        (Atomic::Add, Ty::F16 | Ty::Bf16 | Ty::F16x2 | Ty::Bf16x2) => {
            float::binary(Binary::Add, ty, &[old; 32], &[b; 32])[0]
        }
        (Atomic::Add, _) => old.wrapping_add(b),
        (Atomic::Min, Ty::S(_)) => {
            if signed(b) < signed(old) {
                b
            } else {
                old
            }
        }
        (Atomic::Max, Ty::S(_)) => {
            if signed(b) > signed(old) {
                b
            } else {
                old
            }
        }
        (Atomic::Min, _) => (old & mask).min(b & mask),
        (Atomic::Max, _) => (old & mask).max(b & mask),
        (Atomic::Inc, _) => {
            if old & mask >= b & mask {
                0
            } else {
                old + 1
            }
        }
        (Atomic::Dec, _) => {
            if old & mask == 0 || old & mask > b & mask {
                b
            } else {
                old - 1
            }
        }
        (Atomic::And, _) => old & b,
        (Atomic::Or, _) => old | b,
        (Atomic::Xor, _) => old ^ b,
        (Atomic::Exch, _) => b,
        (Atomic::Cas, _) => {
            if old & mask == b & mask {
                c
            } else {
                old
            }
        }
    };
    new & mask
}
