//! "Asynchronous Warpgroup Level Matrix Multiply-Accumulate": the product, on dense matrices.
//!
//! All matrices are cut into panels of eight columns of B and D, which is how fragments hold them: registers 4p to 4p + 3 of
//! the accumulator (2p and 2p + 1 of one in f16) are panel p.

use super::float::canonical32;
use super::narrow::{Bf16, F16, Narrow};
use super::{Lane, Lanes};
use crate::isa::Ty;

/// Columns `8p..8p + 8` of D, row by row.
pub(crate) type Sums = [[f32; 8]; 64];
/// Columns `8p..8p + 8` of B, a row for each k.
pub(crate) type Panel = [[f32; 8]; 16];
/// A, row by row.
pub(crate) type Rows = [[f32; 16]; 64];

/// D += A B for one panel. As in `mma`, each element of D takes on the products for k = 0, 1, ... in turn, in f32 to nearest
/// even; one in f16 is rounded after that. The ISA leaves order and precision open.
pub(crate) fn accumulate(sums: &mut Sums, a: &Rows, b: &Panel, in_f16: bool) {
    for (sums, a) in sums.as_chunks_mut::<4>().0.iter_mut().zip(a.as_chunks::<4>().0) {
        multiply(sums, a, b);
    }
    if in_f16 {
        sums.as_flattened_mut().iter_mut().for_each(|sum| *sum = F16::widen(F16::narrow(*sum)));
    }
}

/// Four rows at a time: their sums stay in registers.
#[inline(never)]
fn multiply(sums: &mut [[f32; 8]; 4], a: &[[f32; 16]; 4], b: &Panel) {
    let mut rows = *sums;
    for (k, b) in b.iter().enumerate() {
        for (row, a) in rows.iter_mut().zip(a) {
            let a = a[k];
            for (sum, b) in row.iter_mut().zip(b) {
                *sum += a * b;
            }
        }
    }
    *sums = rows;
}

/// Eight 16-bit elements in memory order.
#[inline(always)]
pub(crate) fn widen8(ty: Ty, bytes: [u8; 16], negate: bool) -> [f32; 8] {
    let sign = if negate { 0x8000 } else { 0 };
    let (pairs, _) = bytes.as_chunks::<2>();
    let mut values = [0.0; 8];
    for (value, pair) in values.iter_mut().zip(pairs) {
        let bits = u16::from_le_bytes(*pair) ^ sign;
        *value = if ty == Ty::F16 { F16::widen(bits) } else { Bf16::widen(bits) };
    }
    values
}

/// The two elements in a fragment's register, lower one first.
pub(crate) fn widen2(ty: Ty, register: u64, negate: bool) -> [f32; 2] {
    let sign = if negate { 0x8000 } else { 0 };
    [register as u16 ^ sign, (register >> 16) as u16 ^ sign]
        .map(|bits| if ty == Ty::F16 { F16::widen(bits) } else { Bf16::widen(bits) })
}

/// The rows of warp `warp` of a panel, out of its registers: four in f32, two in f16.
pub(crate) fn load(sums: &mut Sums, warp: usize, registers: &[&Lanes]) {
    for half in 0..2 {
        let first = 16 * warp + 8 * half;
        let (pairs, _) = sums[first..first + 8].as_flattened_mut().as_chunks_mut::<2>();
        match *registers {
            [even0, odd0, even1, odd1] => {
                let (even, odd) = if half == 0 { (even0, odd0) } else { (even1, odd1) };
                for ((pair, even), odd) in pairs.iter_mut().zip(even).zip(odd) {
                    *pair = [f32::get(*even), f32::get(*odd)];
                }
            }
            _ => {
                for (pair, packed) in pairs.iter_mut().zip(registers[half]) {
                    *pair = widen2(Ty::F16, *packed, false);
                }
            }
        }
    }
}

/// The rows of warp `warp` of a panel, for its registers.
pub(crate) fn store(sums: &Sums, warp: usize, in_f16: bool, register: usize) -> Lanes {
    let half = if in_f16 { register } else { register / 2 };
    let first = 16 * warp + 8 * half;
    let (pairs, _) = sums[first..first + 8].as_flattened().as_chunks::<2>();
    let mut lanes = [0; 32];
    for (lane, [even, odd]) in lanes.iter_mut().zip(pairs) {
        *lane = match (in_f16, register % 2) {
            (true, _) => u64::from(F16::narrow(*even)) | u64::from(F16::narrow(*odd)) << 16,
            (_, 0) => canonical32(*even).into(),
            _ => canonical32(*odd).into(),
        };
    }
    lanes
}
