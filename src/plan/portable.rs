//! Plans of the portable family.

mod tile;

pub(super) use tile::Tile;

use super::operands::{Wanted, gradient, magnitude, matrix, optional, read_by_backward, read_by_forward};
use super::{
    Choice, Device, Draft, MAX_COUNTERS, Options, Part, Scratch, blocks, check_units, each, explain, flags,
    gradient_flags, mean_rank, numbered, projection_flags, split,
};
use crate::error::Result;
use crate::params::*;
use crate::{Dtype, LoraShape, raw};
use split::Ranks;
use tile::Product;

/// f32 partial sums of da and db may take this much of the workspace.
const MAX_PARTIAL_BYTES: u64 = 16 << 20;
/// Tokens per chunk are not worth less than this: each chunk costs a round trip of partial sums.
const MIN_CHUNK_ROWS: u64 = 512;

/// Plans forward.
pub(super) fn forward(
    op: &raw::ForwardShared,
    shape: LoraShape,
    parts: &[Part],
    device: &Device,
    options: &Options,
) -> Result<Draft> {
    let LoraShape { m, k, r, .. } = shape;
    let ranks = Ranks::of(op.is_split());
    let columns = parts.iter().map(|part| part.n).collect();
    let (pairs, deep) = (ranks.pairs(parts), ranks.triples(parts));
    let products = [Product { rows: m, columns, depth: k + mean_rank(&deep) }];
    let tile = Tile::choose(device, options.tile, &products);
    let m_blocks = blocks(m, tile.block);
    let (first_blocks, n_blocks) = numbered(parts.iter().map(|part| blocks(part.n, tile.block)));
    let h_units = m_blocks * blocks(Ranks::sum(&pairs), LORA_NARROW_N);
    let units = check_units(h_units + m_blocks * n_blocks)?;
    let (flag_shift, flag_count) = flags(m_blocks);

    let mut scratch = Scratch::new();
    // What the caller keeps of halves are pairs; y reads triples.
    let kept = op.h.filter(|_| !op.is_split());
    let h = kept.or_else(|| (r != 0).then(|| scratch.reserve_middle(m, Ranks::sum(&deep), op.dtype)));
    let split = split::forward(op, parts, 1, &mut scratch)?;
    let all_units = check_units(u64::from(split.units) + u64::from(units))?;
    let factor = raw::Dropout::factor(op.dropout);
    let params = LoraForwardParams {
        x: matrix(op.x),
        a: matrix(op.a),
        h: optional(h),
        sync: 0,
        m: m as u32,
        k: k as u32,
        r: Ranks::sum(&pairs) as u32,
        projection_count: parts.len() as u32,
        m_blocks: m_blocks as u32,
        n_blocks: n_blocks as u32,
        h_units: h_units as u32,
        units,
        group_m: options.group_m(m_blocks),
        flag_shift,
        sync_words: LORA_SYNC_FLAGS + flag_count as u32,
        padding: 0,
        dropout: raw::Dropout::params(op.dropout),
        routes: op.routes.map_or(0, |routes| routes.ptr),
        split,
        projections: each(&op.projections, |at, of| LoraForwardProjection {
            w: matrix(of.w),
            b: matrix(of.b),
            y: matrix(of.y),
            bias: of.bias.map_or(0, |bias| bias.ptr),
            gain: of.gain.map_or(0, |gain| gain.ptr),
            n: parts[at].n as u32,
            r: deep[at].r as u32,
            first_rank: deep[at].first_rank as u32,
            first_block: first_blocks[at] as u32,
            scale: of.scale * factor,
            padding: 0,
        }),
    };
    let mut notes = Vec::new();
    explain::slow_operands(&mut notes, &read_by_forward(op));
    explain::slow_ranks(&mut notes, h, &deep);
    let kernel = match (op.dtype, tile.is_large()) {
        (Dtype::Bf16, true) => "lora_forward_bf16_large",
        (Dtype::Bf16, false) => "lora_forward_bf16_small",
        (_, true) => "lora_forward_f16_large",
        (_, false) => "lora_forward_f16_small",
    };
    let launch = tile.launch("portable_forward", kernel, all_units, device, Params::Forward(params));
    let microseconds = tile.microseconds(device, op.dtype, &products);
    Ok(Draft { choice: Choice::Portable(tile), launch, scratch, notes, microseconds })
}

/// The products that take most of the time of backward.
fn main_products(wanted: &Wanted, shape: LoraShape, parts: &[Part]) -> Vec<Product> {
    let LoraShape { m, n, k, r } = shape;
    if wanted.dx {
        return vec![Product { rows: m, columns: vec![k], depth: n + r }];
    }
    let dh = parts.iter().map(|part| Product { rows: m, columns: vec![part.r.max(1)], depth: part.n });
    let db = parts.iter().map(|part| Product { rows: part.n, columns: vec![part.r.max(1)], depth: m });
    dh.chain(db).collect()
}

/// Tiles of backward.
struct Tiles {
    m_blocks: u64,
    k_blocks: u64,
    /// Tiles along N of each projection.
    n_blocks: Vec<u64>,
    /// First narrow tile of each projection, and narrow tiles of a block of rows.
    narrow: (Vec<u64>, u64),
    /// First step of dx of each projection, and steps.
    steps: (Vec<u64>, u64),
    /// First tile of db of each projection, and tiles.
    db: (Vec<u64>, u64),
    da: u64,
}

impl Tiles {
    fn of(wanted: &Wanted, shape: LoraShape, parts: &[Part], tile: &Tile) -> Tiles {
        let n_blocks: Vec<u64> = parts.iter().map(|part| blocks(part.n, tile.block)).collect();
        let r_blocks = |part: &Part| blocks(part.r, LORA_NARROW_N);
        let k_blocks = blocks(shape.k, tile.block);
        let db = parts.iter().zip(wanted.own.iter()).zip(&n_blocks);
        Tiles {
            m_blocks: blocks(shape.m, tile.block),
            k_blocks,
            narrow: numbered(parts.iter().map(r_blocks)),
            steps: numbered(parts.iter().map(|part| blocks(part.n, LORA_BLOCK_K))),
            db: numbered(db.map(|((part, own), n_blocks)| n_blocks * own.blocks(r_blocks(part)))),
            da: if wanted.da { k_blocks * blocks(shape.r, LORA_NARROW_N) } else { 0 },
            n_blocks,
        }
    }
}

/// Plans backward.
pub(super) fn backward(
    op: &raw::BackwardShared,
    shape: LoraShape,
    parts: &[Part],
    device: &Device,
    options: &Options,
) -> Result<Draft> {
    let LoraShape { m, k, .. } = shape;
    let wanted = Wanted::of(op);
    let ranks = Ranks::of(op.is_split());
    let (pairs, deep) = (ranks.pairs(parts), Ranks::sum(&ranks.triples(parts)));
    let narrow = Ranks::sum(&pairs);
    let main = main_products(&wanted, LoraShape { r: deep, ..shape }, &pairs);
    let tile = Tile::choose(device, options.tile, &main);
    let microseconds = tile.microseconds(device, op.dtype, &main);

    let tiles = Tiles::of(&wanted, LoraShape { r: narrow, ..shape }, &pairs, &tile);
    let gradient_tiles = tiles.db.1 + tiles.da;
    let dh_units = if wanted.dh { tiles.m_blocks * tiles.narrow.1 } else { 0 };
    let (flag_shift, flag_count) = flags(tiles.m_blocks);
    let chunks = Chunks::choose(device, &tile, m, narrow, gradient_tiles);
    let dx_end = dh_units + if wanted.dx { tiles.m_blocks * tiles.k_blocks } else { 0 };
    let db_end = dx_end + tiles.db.1 * chunks.count;
    let units = check_units(db_end + tiles.da * chunks.count)?;

    let mut scratch = Scratch::new();
    // Of halves dx reads triples; of pairs there is a place of their own.
    let dh = (wanted.dh && (wanted.dx || !op.is_split())).then(|| scratch.reserve_middle(m, deep, op.dtype));
    if chunks.count > 1 {
        scratch.partials = Some(scratch.reserve(chunks.bytes(gradient_tiles)));
    }
    let split = split::backward(op, &wanted, parts, 1, &mut scratch)?;
    let all_units = check_units(u64::from(split.units) + u64::from(units))?;
    let counters = LORA_SYNC_FLAGS + flag_count as u32;
    let counter_words = if chunks.count > 1 { gradient_tiles as u32 } else { 0 };
    let params = LoraBackwardParams {
        a: matrix(op.a),
        x: optional(op.x),
        // Of db's narrow operand nothing is read when dbias alone is wanted; it is still an address.
        h: if wanted.any_db() { optional(op.h) } else { matrix(op.projections[0].dy) },
        dh: optional(dh),
        dx: optional(op.dx),
        da: gradient(wanted.da, op.da),
        partials: 0,
        sync: 0,
        m: m as u32,
        k: k as u32,
        r: deep as u32,
        projection_count: parts.len() as u32,
        n_steps: tiles.steps.1 as u32,
        m_blocks: tiles.m_blocks as u32,
        k_blocks: tiles.k_blocks as u32,
        dh_units: dh_units as u32,
        dx_end: dx_end as u32,
        db_end: db_end as u32,
        units,
        chunks: chunks.count as u32,
        chunk_rows: chunks.rows as u32,
        partial_stride: chunks.partial_stride as u32,
        counters,
        group_m: options.group_m(tiles.m_blocks),
        flag_shift,
        sync_words: counters + counter_words,
        flags: gradient_flags(op),
        padding: 0,
        dropout: raw::Dropout::params(op.dropout),
        routes: op.routes.map_or(0, |routes| routes.ptr),
        split,
        projections: projections(op, &pairs, &wanted, &tiles),
    };
    let mut notes = Vec::new();
    explain::slow_operands(&mut notes, &read_by_backward(op));
    explain::slow_ranks(&mut notes, op.h.filter(|_| wanted.any_db()), &pairs);
    let kernel = match (op.dtype, tile.is_large()) {
        (Dtype::Bf16, true) => "lora_backward_bf16_large",
        (Dtype::Bf16, false) => "lora_backward_bf16_small",
        (_, true) => "lora_backward_f16_large",
        (_, false) => "lora_backward_f16_small",
    };
    let launch = tile.launch("portable_backward", kernel, all_units, device, Params::Backward(params));
    Ok(Draft { choice: Choice::Portable(tile), launch, scratch, notes, microseconds })
}

fn projections(
    op: &raw::BackwardShared,
    parts: &[Part],
    wanted: &Wanted,
    tiles: &Tiles,
) -> [LoraBackwardProjection; raw::MAX_PROJECTIONS] {
    let factor = raw::Dropout::factor(op.dropout);
    each(&op.projections, |at, of| LoraBackwardProjection {
        dy: matrix(of.dy),
        w: matrix(of.w),
        b: matrix(of.b),
        db: gradient(wanted.own[at].db, of.db),
        magnitude: magnitude(of.dm),
        dbias: of.dbias.map_or(0, |dbias| dbias.matrix.ptr),
        gain: of.gain.map_or(0, |gain| gain.ptr),
        n: parts[at].n as u32,
        r: parts[at].r as u32,
        first_rank: parts[at].first_rank as u32,
        n_blocks: tiles.n_blocks[at] as u32,
        first_step: tiles.steps.0[at] as u32,
        first_narrow: tiles.narrow.0[at] as u32,
        first_db_tile: tiles.db.0[at] as u32,
        flags: projection_flags(of),
        scale: of.scale * factor,
        padding: 0,
    })
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
