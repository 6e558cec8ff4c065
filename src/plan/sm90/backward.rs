//! Plans of backward.

use super::chunks::{self, Chunks};
use super::maps::Maps;
use super::middle::{Middle, Ran};
use super::model::{Alters, Machine, microseconds};
use super::{Choice, Tile, candidates, check_tickets, ctas, groups, narrow_columns, shortest};
use crate::error::Result;
use crate::params::*;
use crate::plan::operands::{Wanted, gradient, magnitude, optional, read_by_backward, results_of_dora};
use crate::plan::split::{self, Ranks};
use crate::plan::{
    Device, Draft, Options, Part, Scratch, TensorMap, blocks, each, flags, gradient_flags, numbered, projection_flags,
};
use crate::{Dtype, LoraShape, raw};

/// The matrices that go through tensor maps.
pub(in crate::plan) fn operands(op: &raw::BackwardShared) -> Vec<(&'static str, Option<raw::Matrix>)> {
    read_by_backward(op).into_iter().chain(results_of_dora(op)).chain([("dx", op.dx)]).collect()
}

/// Plans a call that nothing stands against.
pub(in crate::plan) fn backward(
    op: &raw::BackwardShared,
    shape: LoraShape,
    parts: &[Part],
    device: &Device,
    options: &Options,
) -> Result<Draft> {
    let LoraShape { m, k, .. } = shape;
    let wanted = Wanted::of(op);
    let dropout = raw::Dropout::params(op.dropout);
    let alters = Alters::of(&dropout, op.projections.iter().any(|of| of.gain.is_some()));
    let ranks = Ranks::of(op.is_split());
    let (own, triples) = (parts, ranks.triples(parts));
    let parts = &ranks.pairs(own)[..];
    let (pairs, deep) = (Ranks::sum(parts), Ranks::sum(&triples));
    let problem = Problem {
        wanted,
        shape: LoraShape { r: pairs, ..shape },
        deep,
        parts,
        splits: split::backward_units(op, &wanted, own),
        alters,
    };
    let Setup { tile, cluster, bundle, chunks, clocks } = choose(&problem, device, options)?;
    let counts = Counts::of(&problem, &tile, cluster);
    let slabs = counts.slabs(cluster);
    let dh_tickets = counts.dh_units.div_ceil(bundle);
    let dx_end = dh_tickets + counts.dx_tiles(wanted);
    let db_end = dx_end + counts.db.1 * chunks.count;
    let (flag_shift, flag_count) = flags(counts.m_groups * u64::from(cluster));

    let mut scratch = Scratch::new();
    // Of halves dx reads triples; of pairs there is a place of their own.
    let dh = (wanted.dh && (wanted.dx || !op.is_split())).then(|| scratch.reserve_middle(m, deep, op.dtype));
    let split = split::backward(op, &wanted, own, cluster, &mut scratch)?;
    let tickets = check_tickets(u64::from(split.tickets) + db_end + counts.da_tiles * chunks.count)?;
    let ctas = ctas(tickets, cluster, device);
    let partial_stride = chunks::partial_stride(pairs, wanted.any_dm());
    if slabs > 0 {
        scratch.partials = Some(scratch.reserve(chunks::partial_bytes(chunks, partial_stride, slabs, ctas)));
    }
    let counters = LORA_SYNC_FLAGS + flag_count as u32;
    let params = LoraSm90BackwardParams {
        dh: optional(dh),
        dx: optional(op.dx),
        da: gradient(wanted.da, op.da),
        partials: 0,
        sync: 0,
        m: m as u32,
        k: k as u32,
        r: deep as u32,
        most_r: most_rank(parts) as u32,
        projection_count: parts.len() as u32,
        n_steps: parts.iter().map(|part| blocks(part.n, LORA_SM90_BLOCK_K)).sum::<u64>() as u32,
        m_groups: counts.m_groups as u32,
        k_groups: counts.k_groups as u32,
        k_blocks: counts.k_blocks as u32,
        dh_blocks: counts.narrow.1 as u32,
        dh_units: counts.dh_units as u32,
        dh_tickets: dh_tickets as u32,
        dx_end: dx_end as u32,
        db_end: db_end as u32,
        tickets,
        chunks: chunks.count as u32,
        chunk_rows: chunks.rows as u32,
        partial_stride: partial_stride as u32,
        counters,
        group_m: options.group_m(counts.m_groups),
        flag_shift,
        sync_words: counters + if chunks.count > 1 { slabs as u32 } else { 0 },
        flags: gradient_flags(op),
        padding: 0,
        dropout,
        routes: op.routes.map_or(0, |routes| routes.ptr),
        split,
        projections: projections(op, parts, wanted, &counts),
    };
    let of_tokens = split::dh_of_tokens(dh, &split, m, parts);
    let maps = maps(&split::halved_backward(op, &split, [parts, &triples]), parts, [dh, of_tokens], wanted);
    let is_bf16 = op.dtype == Dtype::Bf16;
    let launch = tile.launch(cluster, tickets, device, maps, Params::Sm90Backward(params), is_bf16);
    let choice = crate::plan::Choice::Sm90(Choice { tile, cluster });
    Ok(Draft { choice, launch, scratch, notes: Vec::new(), microseconds: Some(microseconds(clocks)) })
}

fn projections(
    op: &raw::BackwardShared,
    parts: &[Part],
    wanted: Wanted,
    counts: &Counts,
) -> [LoraSm90BackwardProjection; raw::MAX_PROJECTIONS] {
    let factor = raw::Dropout::factor(op.dropout);
    each(&op.projections, |at, of| LoraSm90BackwardProjection {
        db: gradient(wanted.own[at].db, of.db),
        magnitude: magnitude(of.dm),
        dbias: of.dbias.map_or(0, |dbias| dbias.matrix.ptr),
        gain: of.gain.map_or(0, |gain| gain.ptr),
        n: parts[at].n as u32,
        r: parts[at].r as u32,
        first_rank: parts[at].first_rank as u32,
        n_groups: counts.n_groups[at] as u32,
        first_narrow: counts.narrow.0[at] as u32,
        first_db_tile: counts.db.0[at] as u32,
        flags: projection_flags(of),
        scale: of.scale * factor,
    })
}

/// The largest rank of a projection: narrow tiles of dh and db are as wide.
fn most_rank(parts: &[Part]) -> usize {
    parts.iter().map(|part| part.r).max().unwrap_or(0)
}

/// What a unit of dh reduces over, on average.
fn mean_depth(parts: &[Part]) -> usize {
    let units = |part: &Part| blocks(part.r, LORA_SM90_NARROW_N) as usize;
    let count: usize = parts.iter().map(units).sum();
    parts.iter().map(|part| part.n * units(part)).sum::<usize>().checked_div(count).unwrap_or(0)
}

/// What dx reduces over: whole steps of each projection.
fn main_depth(parts: &[Part]) -> usize {
    parts.iter().map(|part| part.n.next_multiple_of(LORA_SM90_BLOCK_K as usize)).sum()
}

/// What a call computes, and how it counts ranks.
struct Problem<'a> {
    wanted: Wanted,
    /// With the ranks that dh is computed in, and da.
    shape: LoraShape,
    /// Ranks that dx reduces over.
    deep: usize,
    /// With ranks as those of `shape`.
    parts: &'a [Part],
    /// Units that split factors before.
    splits: u64,
    alters: Alters,
}

/// Units and tiles of a call, for one tile shape and cluster size.
struct Counts {
    m_groups: u64,
    k_groups: u64,
    k_blocks: u64,
    /// Of each projection.
    n_groups: Vec<u64>,
    /// First narrow tile of dh of each projection, and narrow tiles of a group.
    narrow: (Vec<u64>, u64),
    dh_units: u64,
    /// First tile of db of each projection, and tiles.
    db: (Vec<u64>, u64),
    da_tiles: u64,
}

impl Counts {
    fn of(problem: &Problem, tile: &Tile, cluster: u32) -> Counts {
        let Problem { wanted, shape: LoraShape { m, k, r, .. }, parts, .. } = *problem;
        let r_blocks = |part: &Part| blocks(part.r, LORA_SM90_NARROW_N);
        let [m_groups, k_groups] = [m, k].map(|extent| groups(extent, cluster));
        let n_groups: Vec<u64> = parts.iter().map(|part| groups(part.n, cluster)).collect();
        let narrow = numbered(parts.iter().map(r_blocks));
        let db = parts.iter().zip(wanted.own.iter()).zip(&n_groups);
        Counts {
            m_groups,
            k_groups,
            k_blocks: blocks(k, tile.columns),
            dh_units: if wanted.dh { m_groups * narrow.1 } else { 0 },
            narrow,
            db: numbered(db.map(|((part, own), n_groups)| n_groups * own.blocks(r_blocks(part)))),
            da_tiles: if wanted.da { k_groups * blocks(r, LORA_SM90_NARROW_N) } else { 0 },
            n_groups,
        }
    }

    fn dx_tiles(&self, wanted: Wanted) -> u64 {
        if wanted.dx { self.m_groups * self.k_blocks } else { 0 }
    }

    /// Tiles of db that sum up the gradient of a magnitude, too.
    fn with_dm(&self, wanted: Wanted) -> u64 {
        self.n_groups.iter().zip(wanted.own.iter()).filter(|(_, own)| own.dm).map(|(n_groups, _)| n_groups).sum()
    }

    /// Of all tiles of db and da.
    fn slabs(&self, cluster: u32) -> u64 {
        (self.db.1 + self.da_tiles) * u64::from(cluster * LORA_SM90_SLABS)
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
fn choose(problem: &Problem, device: &Device, options: &Options) -> Result<Setup> {
    let mut candidates = candidates(options, device, problem.shape.m)?;
    if !problem.wanted.dx {
        // No main tile: the shapes differ in nothing.
        let size = candidates.first().map(|(tile, _)| tile.size);
        candidates.retain(|(tile, _)| Some(tile.size) == size);
    }
    shortest(
        options,
        candidates,
        |tile, cluster| choose_for(problem, device, options, (tile, cluster)),
        |setup| setup.clocks,
    )
}

/// Bundle and chunks for one tile shape and cluster size.
fn choose_for(problem: &Problem, device: &Device, options: &Options, (tile, cluster): (Tile, u32)) -> Result<Setup> {
    let Problem { wanted, shape: LoraShape { m, r, .. }, deep, parts, splits, alters } = *problem;
    let counts = Counts::of(problem, &tile, cluster);
    let dx_tiles = counts.dx_tiles(wanted);
    let gradient_tiles = counts.db.1 + counts.da_tiles;
    // Chunks are counted further down; they do not make fewer clusters.
    let tickets = check_tickets(counts.dh_units + dx_tiles + gradient_tiles)?;
    let clusters = ctas(tickets, cluster, device) / cluster;
    let partial_stride = chunks::partial_stride(r, wanted.any_dm());
    let cuts = Chunks::candidates(options, (m, partial_stride), gradient_tiles, cluster, device.sms / cluster);
    let middle = |machine: &Machine| Middle {
        splits: splits.div_ceil(cluster.into()),
        groups: counts.m_groups,
        columns: dx_tiles / counts.m_groups,
        units: counts.dh_units,
        depth: mean_depth(parts),
        rank: most_rank(parts),
        alters: alters.of_dy(),
        main: machine.main(&tile, main_depth(parts), deep).altered(alters, &tile, main_depth(parts), deep),
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
            let unit = |rank, alters, beside| machine.gradient(tokens, rank, tickets, left, alters, beside);
            let with_dm = counts.with_dm(wanted);
            timeline.draw(with_dm * chunks.count, unit(most_rank(parts), Alters::Nothing, true));
            timeline.draw((counts.db.1 - with_dm) * chunks.count, unit(most_rank(parts), Alters::Nothing, false));
            if counts.da_tiles > 0 {
                timeline.wait(ready);
            }
            timeline.draw(counts.da_tiles * chunks.count, unit(r, alters.of_x(), false));
            let clocks = timeline.end() + stall;
            if clocks < best.clocks {
                best = Setup { tile, cluster, bundle, chunks, clocks };
            }
        }
    }
    // Where every cut has too many tickets, the error of the last says so.
    if best.clocks.is_finite() { Ok(best) } else { refused.map(|_| best) }
}

/// `dh` as dx reads it, and as da does.
fn maps(
    op: &raw::BackwardShared,
    parts: &[Part],
    dh: [Option<raw::Matrix>; 2],
    wanted: Wanted,
) -> Vec<Option<TensorMap>> {
    let maps = Maps { dtype: op.dtype };
    let rows = [LORA_SM90_BLOCK_K, LORA_SM90_BLOCK_M];
    // A matrix that is read across its rows: blocks of 64 columns.
    let across = [LORA_SM90_SLAB_M, LORA_SM90_BLOCK_K];
    let narrow = |rank| [narrow_columns(rank).min(LORA_SM90_BLOCK_K), LORA_SM90_BLOCK_K];
    let (own, of_da) = (narrow(most_rank(parts)), narrow(dh[1].map_or(0, |dh| dh.cols)));
    let when = |condition: bool, matrix: raw::Matrix| Some(matrix).filter(|_| condition);
    let mut all = vec![None; LORA_SM90_BACKWARD_MAPS as usize];
    for (index, map) in [
        (LORA_SM90_BACKWARD_DH, maps.read(dh[0].filter(|_| wanted.dx), rows)),
        (LORA_SM90_BACKWARD_A, maps.read(when(wanted.dx, op.a), across)),
        (LORA_SM90_BACKWARD_DX, maps.written(op.dx)),
        (LORA_SM90_BACKWARD_H_TOKENS, maps.read(op.h.filter(|_| wanted.any_db()), own)),
        (LORA_SM90_BACKWARD_X_TOKENS, maps.read(op.x.filter(|_| wanted.da), across)),
        (LORA_SM90_BACKWARD_DH_TOKENS, maps.read(dh[1].filter(|_| wanted.da), of_da)),
    ] {
        all[index as usize] = map;
    }
    let firsts = (LORA_SM90_BACKWARD_FIRST..).step_by(LORA_SM90_BACKWARD_EACH as usize);
    for ((of, own_outputs), first) in op.projections.iter().zip(wanted.own.iter()).zip(firsts) {
        for (index, map) in [
            (LORA_SM90_BACKWARD_DY, maps.read(when(wanted.dh || wanted.dx, of.dy), rows)),
            (LORA_SM90_BACKWARD_W, maps.read(when(wanted.dx, of.w), across)),
            (LORA_SM90_BACKWARD_B, maps.read(when(wanted.dh, of.b), own)),
            (LORA_SM90_BACKWARD_DY_TOKENS, maps.read(when(own_outputs.db || own_outputs.sums, of.dy), across)),
            (LORA_SM90_BACKWARD_Y_TOKENS, maps.read(of.dm.map(|dm| dm.y), across)),
        ] {
            all[(first + index) as usize] = map;
        }
    }
    all
}
