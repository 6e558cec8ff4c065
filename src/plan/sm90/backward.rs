//! Plans of backward.

use super::chunks::{self, Chunks};
use super::maps::Maps;
use super::middle::{Middle, Ran};
use super::model::{Alters, Machine, microseconds};
use super::{Choice, Tile, candidates, check_tickets, ctas, groups, narrow_columns, shortest};
use crate::error::Result;
use crate::params::*;
use crate::plan::operands::{Wanted, gradient, magnitude, optional, read_by_backward};
use crate::plan::{Device, Draft, Options, Scratch, TensorMap, blocks, flags, gradient_flags};
use crate::{Dtype, LoraShape, raw};

/// The matrices that go through tensor maps.
pub(in crate::plan) fn operands(op: &raw::Backward) -> Vec<(&'static str, Option<raw::Matrix>)> {
    read_by_backward(op).into_iter().chain([("y", op.dm.map(|dm| dm.y)), ("dx", op.dx)]).collect()
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
    let Setup { tile, cluster, bundle, chunks, clocks } =
        choose(wanted, shape, Alters::of(&op.variant), device, options)?;
    let counts = Counts::of(wanted, shape, &tile, cluster);
    let Counts { m_groups, n_groups, k_groups, k_blocks, r_blocks, dh_units, db_tiles, da_tiles } = counts;
    let slabs = counts.slabs(cluster);
    let dh_tickets = dh_units.div_ceil(bundle);
    let dx_end = dh_tickets + counts.dx_tiles(wanted);
    let db_end = dx_end + db_tiles * chunks.count;
    let tickets = check_tickets(db_end + da_tiles * chunks.count)?;
    let ctas = ctas(tickets, cluster, device);
    let (flag_shift, flag_count) = flags(m_groups * u64::from(cluster));

    let mut scratch = Scratch::new();
    let dh = wanted.dh.then(|| scratch.reserve_middle(m, r, op.dtype));
    let partial_stride = chunks::partial_stride(r, wanted.dm);
    if slabs > 0 {
        scratch.partials = Some(scratch.reserve(chunks::partial_bytes(chunks, partial_stride, slabs, ctas)));
    }
    let counters = LORA_SYNC_FLAGS + flag_count as u32;
    let params = LoraSm90BackwardParams {
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
        m_groups: m_groups as u32,
        n_groups: n_groups as u32,
        k_groups: k_groups as u32,
        k_blocks: k_blocks as u32,
        r_blocks: r_blocks as u32,
        dh_units: dh_units as u32,
        dh_tickets: dh_tickets as u32,
        dx_end: dx_end as u32,
        db_end: db_end as u32,
        tickets,
        chunks: chunks.count as u32,
        chunk_rows: chunks.rows as u32,
        partial_stride: partial_stride as u32,
        counters,
        group_m: options.group_m(m_groups),
        flag_shift,
        sync_words: counters + if chunks.count > 1 { slabs as u32 } else { 0 },
        flags: gradient_flags(op),
        padding: 0,
        dropout: op.variant.dropout(),
        routes: op.variant.routes.map_or(0, |routes| routes.ptr),
        gain: op.variant.gain.map_or(0, |gain| gain.ptr),
        magnitude: magnitude(op.dm),
    };
    let maps = maps(op, dh, wanted);
    let is_bf16 = op.dtype == Dtype::Bf16;
    let launch = tile.launch(cluster, tickets, device, maps, Params::Sm90Backward(params), is_bf16);
    let choice = crate::plan::Choice::Sm90(Choice { tile, cluster });
    Ok(Draft { choice, launch, scratch, notes: Vec::new(), microseconds: Some(microseconds(clocks)) })
}

/// Units and tiles of a call, for one tile shape and cluster size.
#[derive(Clone, Copy)]
struct Counts {
    m_groups: u64,
    n_groups: u64,
    k_groups: u64,
    k_blocks: u64,
    r_blocks: u64,
    dh_units: u64,
    db_tiles: u64,
    da_tiles: u64,
}

impl Counts {
    fn of(wanted: Wanted, shape: LoraShape, tile: &Tile, cluster: u32) -> Counts {
        let LoraShape { m, n, k, r } = shape;
        let r_blocks = blocks(r, LORA_SM90_NARROW_N);
        let [m_groups, n_groups, k_groups] = [m, n, k].map(|extent| groups(extent, cluster));
        Counts {
            m_groups,
            n_groups,
            k_groups,
            k_blocks: blocks(k, tile.columns),
            r_blocks,
            dh_units: if wanted.dh { m_groups * r_blocks } else { 0 },
            // dbias and dm ride on the db tiles of the first block of ranks, which therefore exist even without db.
            db_tiles: n_groups * if wanted.db { r_blocks } else { u64::from(wanted.dbias || wanted.dm) },
            da_tiles: if wanted.da { k_groups * r_blocks } else { 0 },
        }
    }

    fn dx_tiles(&self, wanted: Wanted) -> u64 {
        if wanted.dx { self.m_groups * self.k_blocks } else { 0 }
    }

    /// Of all tiles of db and da.
    fn slabs(&self, cluster: u32) -> u64 {
        (self.db_tiles + self.da_tiles) * u64::from(cluster * LORA_SM90_SLABS)
    }
}

/// One way to run a call, and how long it takes by the model.
#[derive(Clone, Copy)]
struct Setup {
    tile: Tile,
    cluster: u32,
    bundle: u64,
    chunks: Chunks,
    clocks: f64,
}

/// The way with the shortest predicted time among those that the options leave.
fn choose(wanted: Wanted, shape: LoraShape, alters: Alters, device: &Device, options: &Options) -> Result<Setup> {
    let mut candidates = candidates(options, device, shape.m)?;
    if !wanted.dx {
        // No main tile: the shapes differ in nothing.
        let size = candidates.first().map(|(tile, _)| tile.size);
        candidates.retain(|(tile, _)| Some(tile.size) == size);
    }
    shortest(
        options,
        candidates,
        |tile, cluster| choose_for(wanted, shape, alters, device, options, tile, cluster),
        |setup| setup.clocks,
    )
}

/// Bundle and chunks for one tile shape and cluster size.
fn choose_for(
    wanted: Wanted,
    shape: LoraShape,
    alters: Alters,
    device: &Device,
    options: &Options,
    tile: Tile,
    cluster: u32,
) -> Result<Setup> {
    let LoraShape { m, n, r, .. } = shape;
    let counts = Counts::of(wanted, shape, &tile, cluster);
    let dx_tiles = counts.dx_tiles(wanted);
    let gradient_tiles = counts.db_tiles + counts.da_tiles;
    // Chunks are counted further down; they do not make fewer clusters.
    let tickets = check_tickets(counts.dh_units + dx_tiles + gradient_tiles)?;
    let clusters = ctas(tickets, cluster, device) / cluster;
    let partial_stride = chunks::partial_stride(r, wanted.dm);
    let cuts = Chunks::candidates(options, (m, partial_stride), gradient_tiles, cluster, device.sms / cluster);
    let middle = |machine: &Machine| Middle {
        groups: counts.m_groups,
        columns: dx_tiles / counts.m_groups,
        units: counts.dh_units,
        depth: n,
        rank: r,
        alters: alters.of_dy(),
        main: machine.main(&tile, n, r).altered(alters, &tile, n, r),
        group_m: options.group_m(counts.m_groups),
    };
    let whole = Chunks::cut(m, 1);
    let mut best = Setup { tile, cluster, bundle: 1, chunks: whole, clocks: f64::INFINITY };
    let mut refused = Ok(());
    let machine = Machine::new(device, cluster, clusters);
    for bundle in middle(&machine).bundles(&machine, options.bundle) {
        for &chunks in &cuts {
            let total = counts.dh_units.div_ceil(bundle) + dx_tiles + gradient_tiles * chunks.count;
            let tickets = match check_tickets(total) {
                Ok(tickets) => tickets,
                Err(error) => {
                    refused = Err(error);
                    continue;
                }
            };
            let clusters = ctas(tickets, cluster, device) / cluster;
            let machine = Machine::new(device, cluster, clusters);
            let Ran { mut timeline, ready, stall } = middle(&machine).run(&machine, bundle);
            let left = 4.0 * (u64::from(LORA_SM90_SLABS) * partial_stride) as f64;
            let (tokens, tickets) = (chunks.rows.min(m as u64), gradient_tiles * chunks.count);
            let unit = |alters, beside| machine.gradient(tokens, r, tickets, left, alters, beside);
            let with_dm = if wanted.dm { counts.n_groups } else { 0 };
            timeline.draw(with_dm * chunks.count, unit(Alters::Nothing, true));
            timeline.draw((counts.db_tiles - with_dm) * chunks.count, unit(Alters::Nothing, false));
            if counts.da_tiles > 0 {
                timeline.wait(ready);
            }
            timeline.draw(counts.da_tiles * chunks.count, unit(alters.of_x(), false));
            let clocks = timeline.end() + stall;
            if clocks < best.clocks {
                best = Setup { tile, cluster, bundle, chunks, clocks };
            }
        }
    }
    // Where every cut has too many tickets, the error of the last says so.
    if best.clocks.is_finite() { Ok(best) } else { refused.map(|_| best) }
}

fn maps(op: &raw::Backward, dh: Option<raw::Matrix>, wanted: Wanted) -> Vec<Option<TensorMap>> {
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
        (LORA_SM90_BACKWARD_DH, maps.read(dh.filter(|_| wanted.dx), rows)),
        (LORA_SM90_BACKWARD_A, maps.read(when(wanted.dx, op.a), across)),
        (LORA_SM90_BACKWARD_DX, maps.written(op.dx)),
        (LORA_SM90_BACKWARD_DY_TOKENS, maps.read(when(wanted.db || wanted.dbias || wanted.dm, op.dy), across)),
        (LORA_SM90_BACKWARD_H_TOKENS, maps.read(op.h.filter(|_| wanted.db), narrow)),
        (LORA_SM90_BACKWARD_X_TOKENS, maps.read(op.x.filter(|_| wanted.da), across)),
        (LORA_SM90_BACKWARD_DH_TOKENS, maps.read(dh.filter(|_| wanted.da), narrow)),
        (LORA_SM90_BACKWARD_Y_TOKENS, maps.read(op.dm.map(|dm| dm.y), across)),
    ] {
        all[index as usize] = map;
    }
    all
}
