//! Plans of backward.

use super::maps::Maps;
use super::{Choice, Tile, check_tickets, clusters, ctas, groups, narrow_columns, tiles};
use crate::error::Result;
use crate::params::*;
use crate::plan::{
    Device, Draft, GROUP_M, MAX_COUNTERS, Options, SYNC_BYTES, Scratch, TensorMap, blocks, flags, gradient_flags,
    matrix, scratch_stride,
};
use crate::{Dtype, LoraShape, raw};

/// f32 partial sums of da and db may take this much of the workspace.
const MAX_PARTIAL_BYTES: u64 = 30 << 20;
/// Tokens per chunk are not worth less than this: each chunk costs a round trip of partial sums.
const MIN_CHUNK_ROWS: u64 = 512;

/// What a call computes.
#[derive(Clone, Copy)]
struct Wanted {
    dh: bool,
    dx: bool,
    da: bool,
    db: bool,
    dbias: bool,
}

impl Wanted {
    fn of(op: &raw::Backward) -> Wanted {
        let has_adapter = op.a.rows != 0;
        let (dx, da, db) = (op.dx.is_some(), op.da.is_some() && has_adapter, op.db.is_some() && has_adapter);
        Wanted { dh: has_adapter && (dx || da), dx, da, db, dbias: op.dbias.is_some() }
    }
}

/// The matrices that go through tensor maps.
pub(in crate::plan) fn operands(op: &raw::Backward) -> [(&'static str, Option<raw::Matrix>); 7] {
    let wanted = Wanted::of(op);
    [
        ("dy", Some(op.dy)),
        ("w", op.dx.map(|_| op.w)),
        ("a", op.dx.map(|_| op.a)),
        ("b", Some(op.b).filter(|_| wanted.dh)),
        ("x", op.x.filter(|_| wanted.da)),
        ("h", op.h.filter(|_| wanted.db)),
        ("dx", op.dx),
    ]
}

/// Plans a call that nothing stands against.
pub(in crate::plan) fn backward(
    op: &raw::Backward,
    shape: LoraShape,
    device: &Device,
    options: &Options,
) -> Result<Draft> {
    let LoraShape { m, n, k, r } = shape;
    let wanted = Wanted::of(op);
    let tile = tiles(options)[0];
    let cluster = clusters(options, device)?[0];
    let bundle = u64::from(options.bundle.unwrap_or(1));

    let r_blocks = blocks(r, LORA_SM90_NARROW_N);
    let [m_groups, n_groups, k_groups] = [m, n, k].map(|extent| groups(extent, cluster));
    let k_blocks = blocks(k, tile.columns);
    let dh_units = if wanted.dh { m_groups * r_blocks } else { 0 };
    let bundle = bundle.clamp(1, dh_units.max(1));
    let dh_tickets = dh_units.div_ceil(bundle);
    let dx_tickets = if wanted.dx { m_groups * k_blocks } else { 0 };
    // dbias rides on the db tiles of the first block of ranks, which therefore exist even without db.
    let db_tiles = n_groups * if wanted.db { r_blocks } else { u64::from(wanted.dbias) };
    let da_tiles = if wanted.da { k_groups * r_blocks } else { 0 };
    let slabs = (db_tiles + da_tiles) * u64::from(cluster * LORA_SM90_SLABS);
    let (flag_shift, flag_count) = flags(m_groups * u64::from(cluster));
    let chunks = Chunks::choose(device, options, m, r, db_tiles + da_tiles, slabs);
    let dx_end = dh_tickets + dx_tickets;
    let db_end = dx_end + db_tiles * chunks.count;
    let tickets = check_tickets(db_end + da_tiles * chunks.count)?;

    let mut scratch = Scratch { end: SYNC_BYTES as u64, ..Scratch::default() };
    let dh = raw::Matrix { ptr: 0, rows: m, cols: r, row_stride: scratch_stride(r) };
    if wanted.dh {
        scratch.h = Some(scratch.reserve((m * dh.row_stride * op.dtype.size()) as u64));
    }
    if slabs > 0 {
        // A slab that is not cut into chunks needs nobody else's sums: its warpgroup uses a place of its own.
        let ctas = u64::from(ctas(tickets, cluster, device));
        let places = if chunks.count > 1 { slabs * chunks.count } else { ctas * u64::from(LORA_SM90_SLABS) };
        scratch.partials = Some(scratch.reserve(4 * chunks.partial_stride * places));
    }
    let gradient = |wanted: bool, argument: Option<raw::Gradient>| {
        argument.filter(|_| wanted).map(|gradient| matrix(gradient.matrix)).unwrap_or_default()
    };
    let counters = LORA_SYNC_FLAGS + flag_count as u32;
    let params = LoraSm90BackwardParams {
        dh: if wanted.dh { matrix(dh) } else { LoraMatrix::default() },
        dx: op.dx.map(matrix).unwrap_or_default(),
        da: gradient(wanted.da, op.da),
        db: gradient(wanted.db, op.db),
        dbias: op.dbias.map_or(0, |dbias| dbias.matrix.ptr),
        partials: 0,
        sync: 0,
        m: m as u32,
        n: n as u32,
        k: k as u32,
        r: r as u32,
        scale: op.scale,
        m_groups: m_groups as u32,
        n_groups: n_groups as u32,
        k_groups: k_groups as u32,
        k_blocks: k_blocks as u32,
        r_blocks: r_blocks as u32,
        dh_units: dh_units as u32,
        dh_bundle: bundle as u32,
        dh_tickets: dh_tickets as u32,
        dx_end: dx_end as u32,
        db_end: db_end as u32,
        tickets,
        chunks: chunks.count as u32,
        chunk_rows: chunks.rows as u32,
        partial_stride: chunks.partial_stride as u32,
        counters,
        group_m: GROUP_M,
        flag_shift,
        sync_words: counters + if chunks.count > 1 { slabs as u32 } else { 0 },
        flags: gradient_flags(op),
    };
    let maps = maps(op, dh, wanted, &tile);
    let is_bf16 = op.dtype == Dtype::Bf16;
    let launch = tile.launch(cluster, tickets, device, maps, Params::Sm90Backward(params), is_bf16);
    let choice = crate::plan::Choice::Sm90(Choice { tile, cluster });
    Ok(Draft { choice, launch, scratch, notes: Vec::new() })
}

fn maps(op: &raw::Backward, dh: raw::Matrix, wanted: Wanted, _tile: &Tile) -> Vec<Option<TensorMap>> {
    let maps = Maps { dtype: op.dtype };
    let rows = [LORA_SM90_BLOCK_K, LORA_SM90_BLOCK_M];
    // A matrix that is read across its rows: blocks of 64 columns.
    let across = [LORA_SM90_SLAB_M, LORA_SM90_BLOCK_K];
    let narrow = [narrow_columns(op.a.rows).min(LORA_SM90_BLOCK_K), LORA_SM90_BLOCK_K];
    let when = |condition: bool, matrix: raw::Matrix| Some(matrix).filter(|_| condition);
    let mut all = vec![None; LORA_SM90_BACKWARD_MAPS as usize];
    for (index, map) in [
        (LORA_SM90_BACKWARD_DY, maps.read(when(wanted.dh || wanted.dx, op.dy), rows)),
        (LORA_SM90_BACKWARD_W, maps.read(when(wanted.dx, op.w), across)),
        (LORA_SM90_BACKWARD_B, maps.read(when(wanted.dh, op.b), narrow)),
        (LORA_SM90_BACKWARD_DH, maps.read(when(wanted.dx, dh), rows)),
        (LORA_SM90_BACKWARD_A, maps.read(when(wanted.dx, op.a), across)),
        (LORA_SM90_BACKWARD_DX, maps.written(op.dx)),
        (LORA_SM90_BACKWARD_DY_TOKENS, maps.read(when(wanted.db || wanted.dbias, op.dy), across)),
        (LORA_SM90_BACKWARD_H_TOKENS, maps.read(op.h.filter(|_| wanted.db), narrow)),
        (LORA_SM90_BACKWARD_X_TOKENS, maps.read(op.x.filter(|_| wanted.da), across)),
        (LORA_SM90_BACKWARD_DH_TOKENS, maps.read(when(wanted.da, dh), narrow)),
    ] {
        all[index as usize] = map;
    }
    all
}

/// How the tokens are cut for the reductions of da and db.
struct Chunks {
    count: u64,
    rows: u64,
    partial_stride: u64,
}

impl Chunks {
    /// Enough chunks for two tiles of db and da per cluster, within the memory for partial sums and the counters.
    fn choose(device: &Device, options: &Options, m: usize, r: usize, tiles: u64, slabs: u64) -> Chunks {
        let block = u64::from(LORA_SM90_BLOCK_M);
        // One f32 per thread and accumulator register: half a narrow tile's columns, and two of the column sums.
        let partial_stride = 128 * (u64::from(narrow_columns(r)) / 2 + 2);
        let affordable = MAX_PARTIAL_BYTES / (4 * partial_stride).saturating_mul(slabs.max(1));
        let wanted = match options.chunks {
            Some(chunks) => u64::from(chunks).min((m as u64).div_ceil(block)),
            None => u64::from(device.sms).div_ceil(tiles.max(1)).min(m as u64 / MIN_CHUNK_ROWS),
        };
        let most = wanted.min(affordable);
        if most <= 1 || tiles == 0 || slabs > MAX_COUNTERS {
            return Chunks { count: 1, rows: (m as u64).next_multiple_of(block), partial_stride };
        }
        let rows = (m as u64).div_ceil(most).next_multiple_of(block);
        Chunks { count: (m as u64).div_ceil(rows), rows, partial_stride }
    }
}
