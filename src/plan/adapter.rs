//! Launches of the kernels for an adapter's factors: nothing is chosen, and no workspace is needed.

use super::operands::matrix;
use super::{Launch, Params, blocks, check_dtype};
use crate::error::{Error, Result};
use crate::params::*;
use crate::{Dtype, LoraShape, raw};

const IMAGE: &str = "portable_adapter";

/// The largest grid.
const MAX_GRID: u64 = i32::MAX as u64;

fn flags(f32_factors: bool) -> u32 {
    if f32_factors { LORA_FACTORS_F32 } else { 0 }
}

fn address(vector: Option<raw::Matrix>) -> u64 {
    vector.map_or(0, |vector| vector.ptr)
}

fn launch(kernel: &'static str, tiles: u64, threads: u32, params: Params) -> Result<Launch> {
    let too_many = Error::TooLarge { what: "the number of tiles", got: tiles, limit: MAX_GRID };
    let tiles = u32::try_from(tiles).ok().filter(|&tiles| u64::from(tiles) <= MAX_GRID).ok_or(too_many)?;
    Ok(Launch {
        image: IMAGE,
        kernel,
        grid: [tiles, 1, 1],
        cluster: [1, 1, 1],
        block: [threads, 1, 1],
        shared_bytes: 0,
        maps: Vec::new(),
        params,
    })
}

impl Launch {
    /// The launch of norm = ‖W + scale · B A‖ and gain = magnitude / norm (· earlier).
    ///
    /// # Errors
    /// As [`merge`](Self::merge), with what [`raw::Gain::check`] finds.
    pub fn gain(op: &raw::Gain) -> Result<Launch> {
        let LoraShape { n, k, r, .. } = op.check()?;
        check_dtype(op.dtype)?;
        let params = LoraGainParams {
            w: matrix(op.w),
            a: matrix(op.a),
            b: matrix(op.b),
            magnitude: address(op.magnitude),
            earlier: address(op.earlier),
            norm: address(op.norm),
            gain: address(op.gain),
            n: n as u32,
            k: k as u32,
            r: r as u32,
            scale: op.scale,
            flags: flags(op.f32_factors),
            padding: 0,
        };
        let kernel = if op.dtype == Dtype::Bf16 { "lora_gain_bf16" } else { "lora_gain_f16" };
        launch(kernel, blocks(n, LORA_GAIN_ROWS), LORA_GAIN_THREADS, Params::Gain(params))
    }

    /// The launch of merged = w + scale · B A, or that times a gain.
    ///
    /// # Errors
    /// Those of [`raw::Merge::check`]; [`Error::Dtype`] for f32; [`Error::TooLarge`] when there are more tiles than a launch can
    /// number.
    pub fn merge(op: &raw::Merge) -> Result<Launch> {
        let LoraShape { n, k, r, .. } = op.check()?;
        check_dtype(op.dtype)?;
        let k_blocks = blocks(k, LORA_MERGE_BLOCK);
        let params = LoraMergeParams {
            w: matrix(op.w.unwrap_or(op.merged)),
            a: matrix(op.a),
            b: matrix(op.b),
            merged: matrix(op.merged),
            gain: address(op.gain),
            n: n as u32,
            k: k as u32,
            r: r as u32,
            scale: op.scale,
            k_blocks: k_blocks as u32,
            flags: flags(op.f32_factors),
        };
        let kernel = if op.dtype == Dtype::Bf16 { "lora_merge_bf16" } else { "lora_merge_f16" };
        launch(kernel, k_blocks * blocks(n, LORA_MERGE_BLOCK), LORA_MERGE_THREADS, Params::Merge(params))
    }

    /// The launch of rounded_a = A, rounded_b = scale · B, or that over a divisor; `None` when both are empty.
    ///
    /// # Errors
    /// As [`merge`](Self::merge), with what [`raw::Round::check`] finds.
    pub fn round(op: &raw::Round) -> Result<Option<Launch>> {
        let LoraShape { n, k, r, .. } = op.check()?;
        check_dtype(op.dtype)?;
        let (k_blocks, r_blocks) = (blocks(k, LORA_ROUND_COLS), blocks(r, LORA_ROUND_COLS));
        let a_units = blocks(r, LORA_ROUND_ROWS) * k_blocks;
        let tiles = a_units + blocks(n, LORA_ROUND_ROWS) * r_blocks;
        if tiles == 0 {
            return Ok(None);
        }
        let params = LoraRoundParams {
            a: matrix(op.a),
            b: matrix(op.b),
            rounded_a: matrix(op.rounded_a),
            rounded_b: matrix(op.rounded_b),
            divisor: address(op.divisor),
            n: n as u32,
            k: k as u32,
            r: r as u32,
            scale: op.scale,
            a_units: a_units as u32,
            k_blocks: k_blocks as u32,
            r_blocks: r_blocks as u32,
            flags: flags(op.f32_factors) | if op.f32_rounded { LORA_ROUNDED_F32 } else { 0 },
        };
        let kernel = if op.dtype == Dtype::Bf16 { "lora_round_bf16" } else { "lora_round_f16" };
        launch(kernel, tiles, LORA_ROUND_THREADS, Params::Round(params)).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merge(dtype: Dtype, n: usize, k: usize, r: usize) -> raw::Merge {
        let at = |index: u64, rows, cols| raw::Matrix::new(index << 40, rows, cols);
        let (a, b, merged) = (at(1, r, k), at(2, n, r), at(3, n, k));
        raw::Merge { dtype, w: None, f32_factors: true, a, b, scale: 1.0, gain: None, merged }
    }

    fn round(dtype: Dtype, n: usize, k: usize, r: usize) -> raw::Round {
        let at = |index: u64, rows, cols| raw::Matrix::new(index << 40, rows, cols);
        let (a, b) = (at(1, r, k), at(2, n, r));
        let (rounded_a, rounded_b) = (at(3, r, k), at(4, n, r));
        let f32_rounded = false;
        raw::Round { dtype, f32_factors: true, f32_rounded, a, b, scale: 1.0, divisor: None, rounded_a, rounded_b }
    }

    #[test]
    fn tiles_cover_the_matrices() {
        let launch = Launch::merge(&merge(Dtype::Bf16, 65, 128, 3)).unwrap();
        assert_eq!((launch.kernel, launch.grid, launch.shared_bytes), ("lora_merge_bf16", [4, 1, 1], 0));
        let launch = Launch::round(&round(Dtype::F16, 17, 257, 9)).unwrap().unwrap();
        assert_eq!((launch.kernel, launch.grid), ("lora_round_f16", [2 * 2 + 3, 1, 1]));
        let Params::Round(params) = launch.params else { unreachable!("a launch of round") };
        assert_eq!((params.a_units, params.k_blocks, params.r_blocks), (4, 2, 1));
        assert_eq!(Launch::round(&round(Dtype::F16, 17, 257, 0)), Ok(None));
    }

    #[test]
    fn what_no_kernel_computes_is_refused() {
        assert!(matches!(Launch::merge(&merge(Dtype::F32, 1, 1, 1)), Err(Error::Dtype { .. })));
        assert!(matches!(Launch::round(&round(Dtype::F32, 1, 1, 1)), Err(Error::Dtype { .. })));
        assert!(matches!(Launch::merge(&merge(Dtype::F16, 0, 1, 1)), Err(Error::ZeroDimension { arg: "merged", .. })));
        let shared = raw::Merge { w: Some(merge(Dtype::F16, 4, 4, 1).merged), ..merge(Dtype::F16, 4, 4, 1) };
        assert_eq!(Launch::merge(&shared), Err(Error::Overlap { output: "merged", other: "w" }));
        let mut wrong = round(Dtype::F16, 4, 6, 2);
        wrong.rounded_b.cols = 3;
        let dimension = Error::Dimension { arg: "rounded_b", axis: "columns", got: 3, expected: 2 };
        assert_eq!(Launch::round(&wrong), Err(dimension));
        let huge = merge(Dtype::F16, 1 << 22, 1 << 22, 1);
        let tiles = Error::TooLarge { what: "the number of tiles", got: 1 << 32, limit: MAX_GRID };
        assert_eq!(
            Launch::merge(&raw::Merge { merged: raw::Matrix { ptr: 1 << 60, ..huge.merged }, ..huge }),
            Err(tiles)
        );
    }
}
