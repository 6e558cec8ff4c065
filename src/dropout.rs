//! Which elements of x dropout keeps: Philox-4x32-10 by element, as the kernels compute it.

use crate::params::LoraDropout;
use crate::raw;

/// Values of the 16 random bits of an element.
const VALUES: u32 = 1 << 16;

/// Of how many in [`VALUES`] an element is dropped.
fn threshold(p: f32) -> u32 {
    (f64::from(p) * f64::from(VALUES)).round() as u32
}

/// What multiplies the scale: 1 / (1 − p), with p as it is rounded; 0 where everything is dropped.
pub(crate) fn factor(p: Option<f32>) -> f32 {
    match p.map_or(0, threshold) {
        VALUES.. => 0.0,
        threshold => (f64::from(VALUES) / f64::from(VALUES - threshold)) as f32,
    }
}

impl raw::Dropout {
    /// As kernels take it.
    pub(crate) fn params(dropout: Option<raw::Dropout>) -> LoraDropout {
        let Some(raw::Dropout { p, seed }) = dropout.filter(|dropout| threshold(dropout.p) != 0) else {
            return LoraDropout::default();
        };
        let absent = LoraDropout { threshold: threshold(p), ..LoraDropout::default() };
        match seed {
            raw::Seed::Value { seed, offset } => LoraDropout { seed, offset, ..absent },
            raw::Seed::Memory(state) => LoraDropout { state: state.ptr, ..absent },
        }
    }

    /// What multiplies the scale where there may be dropout.
    pub(crate) fn factor(dropout: Option<raw::Dropout>) -> f32 {
        factor(dropout.map(|dropout| dropout.p))
    }
}

/// The elements that are kept, of a matrix of any extent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Keep {
    seed: u64,
    offset: u64,
    threshold: u32,
}

impl Keep {
    /// `None` where every element is kept.
    pub(crate) fn new(p: f32, seed: u64, offset: u64) -> Option<Keep> {
        Some(threshold(p)).filter(|&threshold| threshold != 0).map(|threshold| Keep { seed, offset, threshold })
    }

    /// Calls `dropped` with the indices, relative to (row, col), of the elements of rows × cols from there on that are dropped.
    pub(crate) fn for_each_dropped(
        &self,
        (row, col): (usize, usize),
        (rows, cols): (usize, usize),
        mut dropped: impl FnMut(usize, usize),
    ) {
        // Eight elements share a result: two rows 8 apart, two pairs of columns 8 apart.
        for high_row in row / 16..(row + rows).div_ceil(16) {
            for high_col in col / 16..(col + cols).div_ceil(16) {
                for cell in 0..32 {
                    let (low_row, pair) = (cell / 4, cell % 4);
                    let words = self.words((high_row * 8 + low_row) as u32, (high_col * 4 + pair) as u32);
                    for element in 0..8 {
                        let word = words[element / 2] >> (element % 2 * 16);
                        let i = (high_row * 16 + low_row + element / 2 % 2 * 8).wrapping_sub(row);
                        let j = (high_col * 16 + pair * 2 + element % 2 + element / 4 * 8).wrapping_sub(col);
                        if (word & (VALUES - 1)) < self.threshold && i < rows && j < cols {
                            dropped(i, j);
                        }
                    }
                }
            }
        }
    }

    fn words(&self, row: u32, col: u32) -> [u32; 4] {
        let halves = |value: u64| [value as u32, (value >> 32) as u32];
        let [offset_low, offset_high] = halves(self.offset);
        philox([row, col, offset_low, offset_high], halves(self.seed))
    }
}

/// Philox-4x32-10.
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let first = u64::from(counter[0]) * 0xd251_1f53;
        let second = u64::from(counter[2]) * 0xcd9e_8d57;
        counter = [
            (second >> 32) as u32 ^ counter[1] ^ key[0],
            second as u32,
            (first >> 32) as u32 ^ counter[3] ^ key[1],
            first as u32,
        ];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that the authors publish with their library Random123.
    #[test]
    fn philox_gives_the_known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(philox(pi, [0xa409_3822, 0x299f_31d0]), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    fn dropped(keep: &Keep, at: (usize, usize), size: (usize, usize)) -> Vec<(usize, usize)> {
        let mut found = Vec::new();
        keep.for_each_dropped(at, size, |i, j| found.push((at.0 + i, at.1 + j)));
        found.sort_unstable();
        found
    }

    /// By the sentence in the documentation of `Dropout`, element by element.
    fn by_definition(keep: &Keep, (i, j): (usize, usize)) -> bool {
        let words = keep.words((8 * (i / 16) + i % 8) as u32, (4 * (j / 16) + j / 2 % 4) as u32);
        let word = words[2 * (j / 8 % 2) + i / 8 % 2];
        (if j % 2 == 0 { word & 0xffff } else { word >> 16 }) < keep.threshold
    }

    #[test]
    fn what_is_dropped_depends_on_the_element_alone() {
        let keep = Keep::new(0.3, 0x0123_4567_89ab_cdef, 7).expect("not 0");
        let expected: Vec<_> =
            (0..50 * 70).map(|at| (at / 70, at % 70)).filter(|&at| by_definition(&keep, at)).collect();
        assert_eq!(dropped(&keep, (0, 0), (50, 70)), expected);
        for (at, size) in [((3, 5), (1, 1)), ((15, 17), (20, 33)), ((16, 16), (16, 16)), ((49, 0), (1, 70))] {
            let inside =
                |&(i, j): &(usize, usize)| (at.0..at.0 + size.0).contains(&i) && (at.1..at.1 + size.1).contains(&j);
            let expected: Vec<_> = expected.iter().copied().filter(inside).collect();
            assert_eq!(dropped(&keep, at, size), expected, "{size:?} at {at:?}");
        }
    }

    /// Counts are binomial: five standard deviations are exceeded once in two million times, and the seeds are fixed.
    #[test]
    fn as_many_are_dropped_as_p_says() {
        let (rows, cols) = (400, 500);
        for (p, seed) in [(0.1, 1), (0.5, 2), (0.9, 3)] {
            let n = (rows * cols) as f64;
            let deviation = (n * p * (1.0 - p)).sqrt();
            let keep = Keep::new(p as f32, seed, 0).expect("not 0");
            let found = dropped(&keep, (0, 0), (rows, cols));
            assert!((found.len() as f64 - n * p).abs() < 5.0 * deviation, "{} of {n} for {p}", found.len());
            // Neighbours, in both directions, and another offset are independent of it.
            let is_dropped = |i: usize, j: usize| found.binary_search(&(i, j)).is_ok();
            let other = dropped(&Keep::new(p as f32, seed, 1).expect("not 0"), (0, 0), (rows, cols));
            let pairs = [
                found.iter().filter(|&&(i, j)| is_dropped(i + 1, j)).count() as f64,
                found.iter().filter(|&&(i, j)| is_dropped(i + 8, j)).count() as f64,
                found.iter().filter(|&&(i, j)| is_dropped(i, j + 1)).count() as f64,
                found.iter().filter(|&&(i, j)| is_dropped(i, j + 8)).count() as f64,
                other.iter().filter(|&&(i, j)| is_dropped(i, j)).count() as f64,
            ];
            let joint = p * p;
            for pair in pairs {
                let slack = 5.0 * (n * joint * (1.0 - joint)).sqrt() + 8.0 * 500.0 * joint;
                assert!((pair - n * joint).abs() < slack, "{pair} of {n} for {p}");
            }
        }
    }

    #[test]
    fn p_is_a_multiple_of_two_to_the_minus_sixteen() {
        let seed = raw::Seed::Value { seed: 0, offset: 0 };
        let dropout = |p| Some(raw::Dropout { p, seed });
        let factors = [0.0, 0.5, 1.0, 1e-6].map(|p| raw::Dropout::factor(dropout(p)));
        assert_eq!(factors, [1.0, 2.0, 0.0, 1.0]);
        assert!(Keep::new(1e-6, 0, 0).is_none() && Keep::new(1.0, 0, 0).is_some_and(|keep| keep.threshold == VALUES));
        assert_eq!(raw::Dropout::factor(None), 1.0);
    }
}
