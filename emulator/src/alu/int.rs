//! "Integer Arithmetic Instructions" and "Logic and Shift Instructions".

use super::{Lane, Lanes, REFUSED, map, zip, zip3};
use crate::isa::{Binary, Ternary, Ty, Unary};

/// Runs `$body` with `$T` the Rust type of `$ty` and `$Wide` one of twice the width.
macro_rules! by_type {
    ($ty:expr, $T:ident, $Wide:ident => $body:expr) => {{
        macro_rules! with {
            ($narrow:ty, $wide:ty) => {{
                type $T = $narrow;
                type $Wide = $wide;
                $body
            }};
        }
        match $ty {
            Ty::U(16) | Ty::B(16) => with!(u16, u32),
            Ty::U(32) | Ty::B(32) => with!(u32, u64),
            Ty::U(64) | Ty::B(64) => with!(u64, u128),
            Ty::S(16) => with!(i16, i32),
            Ty::S(32) => with!(i32, i64),
            Ty::S(64) => with!(i64, i128),
            _ => REFUSED,
        }
    }};
}

pub(super) fn unary(op: Unary, ty: Ty, a: &Lanes) -> Lanes {
    let mask = u64::MAX >> (64 - ty.bits());
    match (op, ty) {
        (Unary::Not, _) => map(a, |x: u64| !x & mask),
        (Unary::Cnot, _) => map(a, |x: u64| u64::from(x & mask == 0)),
        // The two's complement of the least number is itself.
        (Unary::Neg, Ty::S(16)) => map(a, i16::wrapping_neg),
        (Unary::Neg, Ty::S(32)) => map(a, i32::wrapping_neg),
        (Unary::Neg, Ty::S(64)) => map(a, i64::wrapping_neg),
        (Unary::Abs, Ty::S(16)) => map(a, i16::wrapping_abs),
        (Unary::Abs, Ty::S(32)) => map(a, i32::wrapping_abs),
        (Unary::Abs, Ty::S(64)) => map(a, i64::wrapping_abs),
        (Unary::Popc, Ty::B(32)) => map(a, u32::count_ones),
        (Unary::Popc, Ty::B(64)) => map(a, u64::count_ones),
        (Unary::Clz, Ty::B(32)) => map(a, u32::leading_zeros),
        (Unary::Clz, Ty::B(64)) => map(a, u64::leading_zeros),
        (Unary::Brev, Ty::B(32)) => map(a, u32::reverse_bits),
        (Unary::Brev, Ty::B(64)) => map(a, u64::reverse_bits),
        // All ones (of a 32-bit register) when no bit is set.
        (Unary::Bfind, Ty::U(32)) => map(a, |x: u32| 31u32.wrapping_sub(x.leading_zeros())),
        (Unary::Bfind, Ty::U(64)) => map(a, |x: u64| 63u32.wrapping_sub(x.leading_zeros())),
        _ => REFUSED,
    }
}

/// Division by zero is unspecified in the ISA: all ones here, for the remainder too. The least number divided by -1 is itself.
pub(super) fn binary(op: Binary, ty: Ty, a: &Lanes, b: &Lanes) -> Lanes {
    match op {
        Binary::And => return zip(a, b, |x: u64, y: u64| x & y),
        Binary::Or => return zip(a, b, |x: u64, y: u64| x | y),
        Binary::Xor => return zip(a, b, |x: u64, y: u64| x ^ y),
        Binary::MulWide => return mul_wide(ty, a, b),
        _ => {}
    }
    by_type!(ty, T, Wide => match op {
        Binary::Add => zip(a, b, T::wrapping_add),
        Binary::Sub => zip(a, b, T::wrapping_sub),
        Binary::MulLo => zip(a, b, T::wrapping_mul),
        Binary::MulHi => zip(a, b, |x: T, y: T| ((Wide::from(x) * Wide::from(y)) >> T::BITS) as T),
        Binary::Div => zip(a, b, |x: T, y: T| if y == 0 { !0 } else { x.wrapping_div(y) }),
        Binary::Rem => zip(a, b, |x: T, y: T| if y == 0 { !0 } else { x.wrapping_rem(y) }),
        Binary::Min => zip(a, b, |x: T, y: T| x.min(y)),
        Binary::Max => zip(a, b, |x: T, y: T| x.max(y)),
        // Amounts are 32-bit whatever is shifted, and clamp at the width.
        Binary::Shl => zip(a, b, |x: T, by: u32| if by < T::BITS { x << by } else { 0 }),
        Binary::Shr if matches!(ty, Ty::S(_)) => zip(a, b, |x: T, by: u32| x >> by.min(T::BITS - 1)),
        Binary::Shr => zip(a, b, |x: T, by: u32| if by < T::BITS { x >> by } else { 0 }),
        _ => REFUSED,
    })
}

fn mul_wide(ty: Ty, a: &Lanes, b: &Lanes) -> Lanes {
    match ty {
        Ty::U(16) => zip(a, b, |x: u16, y: u16| u32::from(x) * u32::from(y)),
        Ty::S(16) => zip(a, b, |x: i16, y: i16| i32::from(x) * i32::from(y)),
        Ty::U(32) => zip(a, b, |x: u32, y: u32| u64::from(x) * u64::from(y)),
        Ty::S(32) => zip(a, b, |x: i32, y: i32| i64::from(x) * i64::from(y)),
        _ => REFUSED,
    }
}

pub(super) fn ternary(op: Ternary, ty: Ty, a: &Lanes, b: &Lanes, c: &Lanes) -> Lanes {
    match (op, ty) {
        (Ternary::MadLo, _) => binary(Binary::Add, ty, &binary(Binary::MulLo, ty, a, b), c),
        (Ternary::MadHi, _) => binary(Binary::Add, ty, &binary(Binary::MulHi, ty, a, b), c),
        (Ternary::MadWide, Ty::U(16) | Ty::S(16)) => zip(&mul_wide(ty, a, b), c, u32::wrapping_add),
        (Ternary::MadWide, Ty::U(32) | Ty::S(32)) => zip(&mul_wide(ty, a, b), c, u64::wrapping_add),
        (Ternary::Bfe, Ty::U(32 | 64)) => extract(ty.bits(), a, b, c, unsigned_field),
        (Ternary::Bfe, Ty::S(32)) => extract(32, &map(a, |x: i32| i64::from(x)), b, c, signed_field),
        (Ternary::Bfe, Ty::S(64)) => extract(64, a, b, c, signed_field),
        (Ternary::Prmt, Ty::B(32)) => zip3(a, b, c, permute),
        (Ternary::ShfL { wrap }, Ty::B(32)) => zip3(a, b, c, |low: u32, high: u32, by: u32| {
            let both = u64::from(high) << 32 | u64::from(low);
            ((both << funnel(by, wrap)) >> 32) as u32
        }),
        (Ternary::ShfR { wrap }, Ty::B(32)) => zip3(a, b, c, |low: u32, high: u32, by: u32| {
            let both = u64::from(high) << 32 | u64::from(low);
            (both >> funnel(by, wrap)) as u32
        }),
        (Ternary::Lop3(table), Ty::B(32)) => lop3(table, a, b, c),
        _ => REFUSED,
    }
}

/// How far `shf` shifts: at most 32.
#[inline(always)]
fn funnel(by: u32, wrap: bool) -> u32 {
    if wrap { by & 31 } else { by.min(32) }
}

/// `bfe` of a source extended to 64 bits as `shift` (right shift by at most 64) goes on extending it: beyond its most
/// significant bit the ISA asks for zeros, or copies of the sign. Position and length are the low 8 bits of their operands.
#[inline(always)]
fn extract<T: Lane>(bits: u32, a: &Lanes, pos: &Lanes, len: &Lanes, shift: impl Fn(T, u32, u32) -> T) -> Lanes {
    let mask = u64::MAX >> (64 - bits);
    zip3(a, pos, len, |x: T, pos: u32, len: u32| {
        let (pos, len) = ((pos & 0xff).min(64), (len & 0xff).min(64));
        let field = shift(x, pos, 64 - len.max(1)).put();
        if len == 0 { 0 } else { field & mask }
    })
}

/// The bits from `pos` on, less the top `unused`.
#[inline(always)]
fn unsigned_field(x: u64, pos: u32, unused: u32) -> u64 {
    let shifted = if pos > 63 { 0 } else { x >> pos };
    shifted << unused >> unused
}

#[inline(always)]
fn signed_field(x: i64, pos: u32, unused: u32) -> i64 {
    (x >> pos.min(63)) << unused >> unused
}

/// Bit field insert: the low bits of `a` into `b`, `len` of them at `pos`; what would go beyond the top is dropped.
pub(crate) fn bfi(ty: Ty, a: &Lanes, b: &Lanes, pos: &Lanes, len: &Lanes) -> Lanes {
    let all = u64::MAX >> (64 - ty.bits());
    let mut d = *b;
    for (((d, a), pos), len) in d.iter_mut().zip(a).zip(pos).zip(len) {
        let (pos, len) = (*pos as u32 & 0xff, *len as u32 & 0xff);
        let field = if len >= 64 { u64::MAX } else { (1 << len) - 1 };
        let (field, value) = if pos >= 64 { (0, 0) } else { (field << pos & all, *a << pos) };
        *d = *d & !field | value & field;
    }
    d
}

/// `prmt`, generic mode: byte i of the result is the byte of `{y, x}` that nibble i of `selector` names, or, if the nibble's
/// top bit is set, that byte's sign eight times.
#[inline(always)]
fn permute(x: u32, y: u32, selector: u32) -> u32 {
    let both = u64::from(y) << 32 | u64::from(x);
    let mut result = 0;
    for i in 0..4 {
        let nibble = selector >> (4 * i);
        let byte = (both >> (8 * (nibble & 7))) as u8;
        let sign = if byte & 0x80 == 0 { 0 } else { 0xff };
        result |= u32::from(if nibble & 8 == 0 { byte } else { sign }) << (8 * i);
    }
    result
}

/// `lop3`: bit 4a + 2b + c of the table is the result for the bits a, b, c.
fn lop3(table: u8, a: &Lanes, b: &Lanes, c: &Lanes) -> Lanes {
    let entry: [u32; 8] = std::array::from_fn(|i| if table >> i & 1 == 0 { 0 } else { u32::MAX });
    let choose = |bit: u32, zero: u32, one: u32| zero ^ ((zero ^ one) & bit);
    zip3(a, b, c, |a: u32, b: u32, c: u32| {
        let for_a_b = |i: usize| choose(c, entry[i], entry[i + 1]);
        choose(a, choose(b, for_a_b(0), for_a_b(2)), choose(b, for_a_b(4), for_a_b(6)))
    })
}
