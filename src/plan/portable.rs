//! Plans of the portable family.

mod tile;

pub(super) use tile::Tile;

use super::operands::{Wanted, gradient, magnitude, matrix, optional, read_by_backward, read_by_forward};
use super::{
    Choice, Device, Draft, MAX_COUNTERS, Options, Scratch, blocks, check_units, explain, flags, gradient_flags,
};
use crate::error::Result;
use crate::params::*;
use crate::{Dtype, LoraShape, raw};

/// f32 partial sums of da and db may take this much of the workspace.
const MAX_PARTIAL_BYTES: u64 = 16 << 20;
/// Tokens per chunk are not worth less than this: each chunk costs a round trip of partial sums.
const MIN_CHUNK_ROWS: u64 = 512;

/// Plans forward.
pub(super) fn forward(op: &raw::Forward, shape: LoraShape, device: &Device, options: &Options) -> Result<Draft> {
    let LoraShape { m, n, k, r } = shape;
    let products = [(m, n, k + r)];
    let tile = Tile::choose(device, options.tile, &products);
    let (m_blocks, n_blocks) = (blocks(m, tile.block), blocks(n, tile.block));
    let h_units = m_blocks * blocks(r, LORA_NARROW_N);
    let units = check_units(h_units + m_blocks * n_blocks)?;
    let (flag_shift, flag_count) = flags(m_blocks);

    let mut scratch = Scratch::new();
    let h = op.h.or_else(|| (r != 0).then(|| scratch.reserve_middle(m, r, op.dtype)));
    let params = LoraForwardParams {
        x: matrix(op.x),
        w: matrix(op.w),
        a: matrix(op.a),
        b: matrix(op.b),
        h: optional(h),
        y: matrix(op.y),
        bias: op.bias.map_or(0, |bias| bias.ptr),
        sync: 0,
        m: m as u32,
        n: n as u32,
        k: k as u32,
        r: r as u32,
        scale: op.scale * op.variant.factor(),
        m_blocks: m_blocks as u32,
        n_blocks: n_blocks as u32,
        h_units: h_units as u32,
        units,
        group_m: options.group_m(m_blocks),
        flag_shift,
        sync_words: LORA_SYNC_FLAGS + flag_count as u32,
        dropout: op.variant.dropout(),
        routes: op.variant.routes.map_or(0, |routes| routes.ptr),
        gain: op.variant.gain.map_or(0, |gain| gain.ptr),
    };
    let mut notes = Vec::new();
    explain::slow_operands(&mut notes, &read_by_forward(op));
    let kernel = match (op.dtype, tile.is_large()) {
        (Dtype::Bf16, true) => "lora_forward_bf16_large",
        (Dtype::Bf16, false) => "lora_forward_bf16_small",
        (_, true) => "lora_forward_f16_large",
        (_, false) => "lora_forward_f16_small",
    };
    let launch = tile.launch("portable_forward", kernel, units, device, Params::Forward(params));
    let microseconds = tile.microseconds(device, op.dtype, &products);
    Ok(Draft { choice: Choice::Portable(tile), launch, scratch, notes, microseconds })
}

/// Plans backward.
pub(super) fn backward(op: &raw::Backward, shape: LoraShape, device: &Device, options: &Options) -> Result<Draft> {
    let LoraShape { m, n, k, r } = shape;
    let wanted = Wanted::of(op);
    let main = if wanted.dx { vec![(m, k, n + r)] } else { vec![(m, r.max(1), n), (n, r.max(1), m)] };
    let tile = Tile::choose(device, options.tile, &main);
    let microseconds = tile.microseconds(device, op.dtype, &main);

    let r_blocks = blocks(r, LORA_NARROW_N);
    let (m_blocks, n_blocks, k_blocks) = (blocks(m, tile.block), blocks(n, tile.block), blocks(k, tile.block));
    let dh_units = if wanted.dh { m_blocks * r_blocks } else { 0 };
    let dx_units = if wanted.dx { m_blocks * k_blocks } else { 0 };
    // dbias and dm ride on the db tiles of the first block of ranks, which therefore exist even without db.
    let db_tiles = n_blocks * if wanted.db { r_blocks } else { u64::from(wanted.dbias || wanted.dm) };
    let da_tiles = if wanted.da { k_blocks * r_blocks } else { 0 };
    let (flag_shift, flag_count) = flags(m_blocks);
    let chunks = Chunks::choose(device, &tile, m, r, db_tiles + da_tiles);
    let dx_end = dh_units + dx_units;
    let db_end = dx_end + db_tiles * chunks.count;
    let units = check_units(db_end + da_tiles * chunks.count)?;

    let mut scratch = Scratch::new();
    let dh = wanted.dh.then(|| scratch.reserve_middle(m, r, op.dtype));
    if chunks.count > 1 {
        scratch.partials = Some(scratch.reserve(chunks.bytes(db_tiles + da_tiles)));
    }
    let counters = LORA_SYNC_FLAGS + flag_count as u32;
    let counter_words = if chunks.count > 1 { (db_tiles + da_tiles) as u32 } else { 0 };
    let params = LoraBackwardParams {
        dy: matrix(op.dy),
        w: matrix(op.w),
        a: matrix(op.a),
        b: matrix(op.b),
        x: optional(op.x),
        // Of db's narrow operand nothing is read when dbias alone is wanted; it is still an address.
        h: if wanted.db { optional(op.h) } else { matrix(op.dy) },
        dh: optional(dh),
        dx: optional(op.dx),
        da: gradient(wanted.da, op.da),
        db: gradient(wanted.db, op.db),
        dbias: op.dbias.map_or(0, |dbias| dbias.matrix.ptr),
        partials: 0,
        sync: 0,
        m: m as u32,
        n: n as u32,
        k: k as u32,
        r: r as u32,
        scale: op.scale * op.variant.factor(),
        m_blocks: m_blocks as u32,
        n_blocks: n_blocks as u32,
        k_blocks: k_blocks as u32,
        dh_units: dh_units as u32,
        dx_end: dx_end as u32,
        db_end: db_end as u32,
        units,
        chunks: chunks.count as u32,
        chunk_rows: chunks.rows as u32,
        partial_stride: chunks.partial_stride as u32,
        counters,
        group_m: options.group_m(m_blocks),
        flag_shift,
        sync_words: counters + counter_words,
        flags: gradient_flags(op),
        dropout: op.variant.dropout(),
        routes: op.variant.routes.map_or(0, |routes| routes.ptr),
        gain: op.variant.gain.map_or(0, |gain| gain.ptr),
        magnitude: magnitude(op.dm),
    };
    let mut notes = Vec::new();
    explain::slow_operands(&mut notes, &read_by_backward(op));
    let kernel = match (op.dtype, tile.is_large()) {
        (Dtype::Bf16, true) => "lora_backward_bf16_large",
        (Dtype::Bf16, false) => "lora_backward_bf16_small",
        (_, true) => "lora_backward_f16_large",
        (_, false) => "lora_backward_f16_small",
    };
    let launch = tile.launch("portable_backward", kernel, units, device, Params::Backward(params));
    Ok(Draft { choice: Choice::Portable(tile), launch, scratch, notes, microseconds })
}

/// How the tokens are cut for the reductions of da and db.
struct Chunks {
    count: u64,
    rows: u64,
    partial_stride: u64,
}

/// Most bytes of partial sums of any call of up to `m` tokens.
#[cfg(feature = "cuda")]
pub(super) fn most_partial_bytes(m: usize) -> u64 {
    if m as u64 / MIN_CHUNK_ROWS <= 1 { 0 } else { MAX_PARTIAL_BYTES }
}

impl Chunks {
    /// Enough chunks for two db and da tiles per SM, within the memory for partial sums.
    fn choose(device: &Device, tile: &Tile, m: usize, r: usize, tiles: u64) -> Chunks {
        let block = u64::from(tile.block);
        let columns = (r as u64).min(u64::from(LORA_NARROW_N)).next_multiple_of(16);
        // One f32 per thread and accumulator register: the active columns, two of the column sums, two of the products for dm.
        let partial_stride = block * columns + 4 * u64::from(tile.threads);
        let whole = (m as u64).next_multiple_of(block);
        let wanted = (2 * u64::from(device.sms)).div_ceil(tiles.max(1));
        let affordable = MAX_PARTIAL_BYTES / (4 * partial_stride).saturating_mul(tiles.max(1));
        let most = wanted.min(affordable).min(m as u64 / MIN_CHUNK_ROWS);
        if most <= 1 || tiles > MAX_COUNTERS {
            return Chunks { count: 1, rows: whole, partial_stride };
        }
        let rows = (m as u64).div_ceil(most).next_multiple_of(block);
        Chunks { count: (m as u64).div_ceil(rows), rows, partial_stride }
    }

    fn bytes(&self, tiles: u64) -> u64 {
        4 * self.partial_stride * self.count * tiles
    }
}
