//! Plans of forward.

use super::maps::Maps;
use super::middle::Middle;
use super::model::{Alters, Machine, microseconds};
use super::{Choice, Tile, candidates, check_tickets, ctas, groups, narrow_columns, shortest};
use crate::error::Result;
use crate::params::*;
use crate::plan::operands::{optional, ranks_of, read_by_forward, written_by_forward};
use crate::plan::split::{self, Ranks};
use crate::plan::{Device, Draft, Options, Part, Scratch, blocks, each, flags, mean_rank, numbered};
use crate::{Dtype, LoraShape, raw};

/// The matrices that go through tensor maps.
pub(in crate::plan) fn operands(op: &raw::ForwardShared) -> Vec<(&'static str, Option<raw::Matrix>)> {
    read_by_forward(op).into_iter().chain(written_by_forward(op)).collect()
}

/// Plans a call that nothing stands against.
pub(in crate::plan) fn forward(
    op: &raw::ForwardShared,
    shape: LoraShape,
    parts: &[Part],
    device: &Device,
    options: &Options,
) -> Result<Draft> {
    let LoraShape { m, k, r, .. } = shape;
    let dropout = raw::Dropout::params(op.dropout);
    let alters = Alters::of(&dropout, op.projections.iter().any(|of| of.gain.is_some()));
    let ranks = Ranks::of(op.is_split());
    let (narrow, deep) = (ranks.pairs(parts), ranks.triples(parts));
    let pairs = Ranks::sum(&narrow);
    let Setup { tile, cluster, bundle, clocks } =
        choose(LoraShape { r: pairs, ..shape }, &deep, split::forward_units(op, parts), alters, device, options)?;
    let m_groups = groups(m, cluster);
    let r_blocks = blocks(pairs, LORA_SM90_NARROW_N);
    let (first_blocks, n_blocks) = numbered(parts.iter().map(|part| blocks(part.n, tile.columns)));
    let h_units = m_groups * r_blocks;
    let h_tickets = h_units.div_ceil(bundle);
    let (flag_shift, flag_count) = flags(m_groups * u64::from(cluster));

    let mut scratch = Scratch::new();
    // What the caller keeps of halves are pairs; y reads triples.
    let kept = op.h.filter(|_| r != 0 && !op.is_split());
    let h = kept.or_else(|| (r != 0).then(|| scratch.reserve_middle(m, Ranks::sum(&deep), op.dtype)));
    let split = split::forward(op, parts, cluster, &mut scratch)?;
    let tickets = check_tickets(u64::from(split.tickets) + h_tickets + m_groups * n_blocks)?;
    let factor = raw::Dropout::factor(op.dropout);
    let params = LoraSm90ForwardParams {
        h: optional(h),
        sync: 0,
        m: m as u32,
        k: k as u32,
        r: pairs as u32,
        projection_count: parts.len() as u32,
        m_groups: m_groups as u32,
        n_blocks: n_blocks as u32,
        r_blocks: r_blocks as u32,
        h_units: h_units as u32,
        h_tickets: h_tickets as u32,
        tickets,
        group_m: options.group_m(m_groups),
        flag_shift,
        sync_words: LORA_SYNC_FLAGS + flag_count as u32,
        padding: 0,
        dropout,
        routes: op.routes.map_or(0, |routes| routes.ptr),
        split,
        projections: each(&op.projections, |at, of| LoraSm90ForwardProjection {
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
    let maps = maps(&split::halved_forward(op, &split, [&narrow, &deep]), &deep, h, &tile);
    let is_bf16 = op.dtype == Dtype::Bf16;
    let launch = tile.launch(cluster, tickets, device, maps, Params::Sm90Forward(params), is_bf16);
    let choice = crate::plan::Choice::Sm90(Choice { tile, cluster });
    Ok(Draft { choice, launch, scratch, notes: Vec::new(), microseconds: Some(microseconds(clocks)) })
}

/// One way to run a call, and how long it takes by the model.
#[derive(Clone, Copy)]
struct Setup {
    tile: Tile,
    cluster: u32,
    bundle: u64,
    clocks: f64,
}

/// The way with the shortest predicted time among those that the options leave. `shape` has the ranks that h is computed in, `parts`
/// those that y goes through; `splits` units split factors before.
fn choose(
    shape: LoraShape,
    parts: &[Part],
    splits: u64,
    alters: Alters,
    device: &Device,
    options: &Options,
) -> Result<Setup> {
    let candidates = candidates(options, device, shape.m)?;
    shortest(
        options,
        candidates,
        |tile, cluster| choose_for(shape, parts, splits, alters, device, options, (tile, cluster)),
        |setup| setup.clocks,
    )
}

/// The bundle for one tile shape and cluster size.
fn choose_for(
    shape: LoraShape,
    parts: &[Part],
    splits: u64,
    alters: Alters,
    device: &Device,
    options: &Options,
    (tile, cluster): (Tile, u32),
) -> Result<Setup> {
    let LoraShape { m, k, r, .. } = shape;
    let (m_groups, n_blocks) = (groups(m, cluster), parts.iter().map(|part| blocks(part.n, tile.columns)).sum::<u64>());
    let group_m = options.group_m(m_groups);
    let units = m_groups * blocks(r, LORA_SM90_NARROW_N);
    let most = ctas(check_tickets(units + m_groups * n_blocks)?, cluster, device) / cluster;
    let setup = |bundle: u64, clusters: u32| {
        let machine = Machine::new(device, cluster, clusters);
        let main = machine.main(&tile, k, mean_rank(parts));
        let alters = alters.of_x();
        let (groups, columns, splits) = (m_groups, n_blocks, splits.div_ceil(cluster.into()));
        let middle = Middle { splits, groups, columns, units, depth: k, rank: r, alters, main, group_m };
        (middle, machine, Setup { tile, cluster, bundle, clocks: f64::INFINITY })
    };
    let (middle, machine, mut best) = setup(1, most);
    for bundle in middle.bundles(&machine, options.bundle) {
        let tickets = check_tickets(middle.tickets(bundle) + m_groups * n_blocks)?;
        let (middle, machine, mut found) = setup(bundle, ctas(tickets, cluster, device) / cluster);
        let ran = middle.run(&machine, bundle);
        found.clocks = ran.timeline.end() + ran.stall;
        if found.clocks < best.clocks {
            best = found;
        }
    }
    Ok(best)
}

fn maps(
    op: &raw::ForwardShared,
    parts: &[Part],
    h: Option<raw::Matrix>,
    tile: &Tile,
) -> Vec<Option<crate::plan::TensorMap>> {
    let maps = Maps { dtype: op.dtype };
    let rows = [LORA_SM90_BLOCK_K, LORA_SM90_BLOCK_M];
    // Each CTA of a pair fetches a half for both.
    let columns = [LORA_SM90_BLOCK_K, tile.columns / 2];
    let narrow = [LORA_SM90_BLOCK_K, narrow_columns(op.a.rows)];
    let mut all = vec![None; LORA_SM90_FORWARD_MAPS as usize];
    all[LORA_SM90_FORWARD_X as usize] = maps.read(Some(op.x), rows);
    all[LORA_SM90_FORWARD_A as usize] = maps.read(Some(op.a), narrow);
    let firsts = (LORA_SM90_FORWARD_FIRST..).step_by(LORA_SM90_FORWARD_EACH as usize);
    for ((of, part), first) in op.projections.iter().zip(parts).zip(firsts) {
        for (index, map) in [
            (LORA_SM90_FORWARD_W, maps.read(Some(of.w), columns)),
            (LORA_SM90_FORWARD_H, maps.read(h.map(|h| ranks_of(h, part)), rows)),
            (LORA_SM90_FORWARD_B, maps.read(Some(of.b), columns)),
            (LORA_SM90_FORWARD_Y, maps.written(Some(of.y))),
        ] {
            all[(first + index) as usize] = map;
        }
    }
    all
}
