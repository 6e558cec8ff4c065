//! How the tokens are cut for the reductions of db and da.

use super::narrow_columns;
use crate::params::*;
use crate::plan::{MAX_COUNTERS, Options};

/// f32 partial sums of da and db may take this much of the workspace, however many CTAs there are.
const MAX_PARTIAL_BYTES: u64 = 30 << 20;
/// Tokens per chunk are not worth less than this: each chunk costs a round trip of partial sums.
const MIN_CHUNK_ROWS: u64 = 512;
/// Rounds of tiles and chunks over all clusters that are worth a look: more make the last round shorter, and each costs.
const MAX_ROUNDS: u64 = 8;

/// Chunks of tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Chunks {
    pub count: u64,
    pub rows: u64,
}

impl Chunks {
    pub(super) fn cut(m: usize, count: u64) -> Chunks {
        let rows = (m as u64).div_ceil(count.max(1)).next_multiple_of(u64::from(LORA_SM90_BLOCK_M));
        Chunks { count: (m as u64).div_ceil(rows), rows }
    }

    /// The cuts to choose from, the whole first: those that the options, the memory for partial sums and the counters leave.
    pub(super) fn candidates(
        options: &Options,
        (m, partial_stride): (usize, u64),
        tiles: u64,
        cluster: u32,
        clusters: u32,
    ) -> Vec<Chunks> {
        let slabs = tiles * u64::from(cluster * LORA_SM90_SLABS);
        let mut found = vec![Chunks::cut(m, 1)];
        if tiles == 0 || slabs > MAX_COUNTERS {
            return found;
        }
        let affordable = MAX_PARTIAL_BYTES / (4 * partial_stride * slabs);
        if let Some(decided) = options.chunks {
            return vec![Chunks::cut(m, u64::from(decided).min(affordable))];
        }
        let useful = (MAX_ROUNDS * u64::from(clusters)).div_ceil(tiles);
        let most = useful.min(affordable).min(m as u64 / MIN_CHUNK_ROWS);
        // 2, 3, 4, 6, 8, 12, 16, ...
        let counts = (1..32).flat_map(|power| [1_u64 << power, 3 << (power - 1)]);
        for count in counts.take_while(|&count| count <= most) {
            let cut = Chunks::cut(m, count);
            if found.last() != Some(&cut) {
                found.push(cut);
            }
        }
        found
    }
}

/// f32 elements that a warpgroup leaves: one per thread and accumulator register of half a narrow tile's columns, two column sums,
/// and with `dm`, DoRA's gradient of the magnitude, 64 more of each of the four warps.
pub(super) fn partial_stride(r: usize, dm: bool) -> u64 {
    128 * (u64::from(narrow_columns(r)) / 2 + if dm { 4 } else { 2 })
}

/// Bytes for the partial sums of a launch. A slab that is not cut into chunks needs nobody else's sums: its warpgroup uses a
/// place of its own.
pub(super) fn partial_bytes(chunks: Chunks, partial_stride: u64, slabs: u64, ctas: u32) -> u64 {
    let places = if chunks.count > 1 { slabs * chunks.count } else { u64::from(ctas * LORA_SM90_SLABS) };
    if slabs == 0 { 0 } else { 4 * partial_stride * places }
}

/// Most bytes of partial sums of any call of up to `m` tokens and a rank of up to `r`, where the planner cuts the tokens.
#[cfg(feature = "cuda")]
pub(in crate::plan) fn most_partial_bytes(device: &crate::plan::Device, options: &Options, m: usize, r: usize) -> u64 {
    // At most a CTA per SM: `ctas`.
    let places = u64::from(device.sms.clamp(1, super::MAX_SMS) * LORA_SM90_SLABS);
    let is_cut = options.chunks.is_some() || m as u64 / MIN_CHUNK_ROWS > 1;
    (4 * partial_stride(r, true) * places).max(if is_cut { MAX_PARTIAL_BYTES } else { 0 })
}
