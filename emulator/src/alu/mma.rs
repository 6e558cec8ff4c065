//! "Warp Level Matrix Instructions: mma", m16n8k8 and m16n8k16 with f32 accumulators.

use super::float::canonical32;
use super::narrow::{Bf16, F16, Narrow};
use super::{Lane, Lanes};
use crate::isa::Ty;

/// 8 x 8 values, row-major.
type Tile = [[f32; 8]; 8];

/// D = A B + C, where A is 16 x k, B k x 8, and C and D are 16 x 8.
///
/// Lane 4g + t of a fragment register holds row g, columns 2t (low half) and 2t + 1 of an 8 x 8 tile, of B's transpose for B:
/// the lanes' halves one after the other are the tile, row by row. A's registers are the tiles of rows 0-7 and 8-15 of the
/// first eight columns, then of the next eight. C has a register for each of the two columns.
///
/// The ISA leaves the order and the precision of the sums open. Here each element of C takes on the products for k = 0, 1, ... in
/// turn, in f32 to nearest even; the products are exact unless they leave the range of f32.
pub(crate) fn mma(k: u8, ab: Ty, a: &[&Lanes], b: &[&Lanes], c: [&Lanes; 4]) -> [Lanes; 4] {
    match ab {
        Ty::F16 => product::<F16>(usize::from(k), a, b, c),
        _ => product::<Bf16>(usize::from(k), a, b, c),
    }
}

/// The same with f16 accumulators, two columns to a register: summed in f32, rounded once.
pub(crate) fn mma_f16(k: u8, a: &[&Lanes], b: &[&Lanes], c: [&Lanes; 2]) -> [Lanes; 2] {
    let part = |c: &Lanes, shift: u32| super::map(c, |x: u32| F16::widen((x >> shift) as u16));
    let [top, bottom] = c.map(|c| [part(c, 0), part(c, 16)]);
    let [a0, a1, b0, b1] = product::<F16>(usize::from(k), a, b, [&top[0], &top[1], &bottom[0], &bottom[1]]);
    [[a0, a1], [b0, b1]].map(|[even, odd]| {
        super::zip(&even, &odd, |x: f32, y: f32| u32::from(F16::narrow(x)) | u32::from(F16::narrow(y)) << 16)
    })
}

fn product<N: Narrow>(k: usize, a: &[&Lanes], b: &[&Lanes], c: [&Lanes; 4]) -> [Lanes; 4] {
    let mut d = [[0; 32]; 4];
    let mut tile = [[0.0; 8]; 8];
    let mut columns = [[[0.0; 8]; 8]; 2];
    for (columns, b) in columns.iter_mut().zip(b) {
        widen::<N>(b, &mut tile);
        transpose(&tile, columns);
    }
    for (half, d) in d.as_chunks_mut::<2>().0.iter_mut().enumerate() {
        let mut sum = join(c[2 * half], c[2 * half + 1]);
        for (step, b) in columns.iter().enumerate().take(k / 8) {
            widen::<N>(a[2 * step + half], &mut tile);
            multiply(&mut sum, &tile, b);
        }
        split(&sum, d);
    }
    d
}

// Functions of their own: inlined, the loops of the following two are unrolled rather than vectorised.

#[inline(never)]
fn multiply(sum: &mut Tile, a: &Tile, b: &Tile) {
    for (sum, a) in sum.iter_mut().zip(a) {
        let mut row = *sum;
        for (a, b) in a.iter().zip(b) {
            for (sum, b) in row.iter_mut().zip(b) {
                *sum += a * b;
            }
        }
        *sum = row;
    }
}

#[inline(never)]
fn widen<N: Narrow>(register: &Lanes, tile: &mut Tile) {
    let mut words = [0u32; 32];
    for (word, x) in words.iter_mut().zip(register) {
        *word = *x as u32;
    }
    for (pair, word) in tile.as_flattened_mut().as_chunks_mut::<2>().0.iter_mut().zip(&words) {
        *pair = [N::widen(*word as u16), N::widen((*word >> 16) as u16)];
    }
}

#[inline(never)]
fn transpose(tile: &Tile, result: &mut Tile) {
    for (i, row) in tile.iter().enumerate() {
        for (j, x) in row.iter().enumerate() {
            result[j][i] = *x;
        }
    }
}

fn join(even: &Lanes, odd: &Lanes) -> Tile {
    let mut tile = [[0.0; 8]; 8];
    let (pairs, _) = tile.as_flattened_mut().as_chunks_mut::<2>();
    for ((pair, even), odd) in pairs.iter_mut().zip(even).zip(odd) {
        *pair = [f32::get(*even), f32::get(*odd)];
    }
    tile
}

fn split(tile: &Tile, [even, odd]: &mut [Lanes; 2]) {
    let (pairs, _) = tile.as_flattened().as_chunks::<2>();
    for ((pair, even), odd) in pairs.iter().zip(even).zip(odd) {
        *even = canonical32(pair[0]).into();
        *odd = canonical32(pair[1]).into();
    }
}
