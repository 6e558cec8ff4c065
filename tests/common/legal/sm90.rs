//! The Hopper family.

use fused_lora::plan::{LoraSm90BackwardParams, LoraSm90ForwardParams, LoraSplit, Params, Swizzle, TileSize};
use fused_lora::{Dtype, LoraShape, raw};

use super::split::{self, Factors, Ranks};
use super::{
    Planned, Region, address, assert_covers, check_flags, check_tickets, check_variant, db_blocks, numbered, pointer,
    ranks_of, scaled,
};

/// Rows of a block.
const BLOCK: u32 = 128;
/// Columns of a narrow tile: LORA_SM90_NARROW_N.
const NARROW: usize = 128;
const TILES: [(TileSize, u32); 3] = [(TileSize::Sm90N256, 256), (TileSize::Sm90N192, 192), (TileSize::Sm90N128, 128)];

fn forward_params(params: &Params) -> LoraSm90ForwardParams {
    match params {
        Params::Sm90Forward(params) => *params,
        other => panic!("the plan of a forward holds {other:?}"),
    }
}

fn backward_params(params: &Params) -> LoraSm90BackwardParams {
    match params {
        Params::Sm90Backward(params) => *params,
        other => panic!("the plan of a backward holds {other:?}"),
    }
}

fn narrow_columns(r: usize) -> u32 {
    [16, 32, 64].into_iter().find(|&columns| r <= columns as usize).unwrap_or(NARROW as u32)
}

/// The map of a matrix with boxes of `boxes`, absent when the matrix is not wanted or empty.
fn check_map(planned: &Planned<'_>, index: usize, matrix: Option<raw::Matrix>, boxes: [u32; 2]) {
    let map = planned.launch.maps[index];
    let Some(matrix) = matrix.filter(|matrix| matrix.rows != 0 && matrix.cols != 0) else {
        assert_eq!(map, None, "map {index}");
        return;
    };
    let map = map.unwrap_or_else(|| panic!("map {index} is absent"));
    assert_eq!(map.address, matrix.ptr, "map {index}");
    assert_eq!(map.dims, [matrix.cols as u64, matrix.rows as u64], "map {index}");
    assert!(matrix.rows == 1 || map.row_bytes == 2 * matrix.row_stride as u64, "map {index}");
    assert!(map.row_bytes >= 2 * matrix.cols as u64, "map {index}");
    assert_eq!(map.boxes, boxes, "map {index}");
    // A span holds a row of the box: the kernels' layouts have no other.
    let span = match map.swizzle {
        Swizzle::Bytes32 => 32,
        Swizzle::Bytes64 => 64,
        Swizzle::Bytes128 => 128,
    };
    assert_eq!(span, 2 * boxes[0], "map {index}");
}

/// What the options decide and limits of the device; the columns of the tile.
fn check_launch(planned: &Planned<'_>, dtype: Dtype, operation: &str) -> u32 {
    let Planned { launch, device, options, .. } = planned;
    let &(tile, columns) = TILES
        .iter()
        .find(|(_, columns)| launch.kernel == format!("lora_sm90_{operation}_{}_{columns}", dtype.name()))
        .unwrap_or_else(|| panic!("no tile shape belongs to {}", launch.kernel));
    assert!(options.tile.is_none_or(|decided| decided == tile), "{launch:?}");
    assert_eq!(launch.image, format!("sm90_{operation}"));
    let cluster = launch.cluster[0];
    assert!((1..=2).contains(&cluster) && options.cluster.is_none_or(|decided| decided == cluster), "{launch:?}");
    assert_eq!(launch.block, [384, 1, 1]);
    assert!((cluster..=device.sms).contains(&launch.grid[0]), "{launch:?}");
    let stages = if columns == 128 { 6 } else { 4 };
    assert_eq!(launch.shared_bytes, stages * 128 * (128 + columns) + 4 * 8192 + 1024);
    let bytes = launch.parameter_bytes(super::encode).expect("legal maps").len();
    assert_eq!(bytes, if operation == "forward" { 2816 } else { 4096 }, "the size of the struct");
    columns
}

/// Tickets of h or dh; every unit belongs to one.
fn check_bundles(planned: &Planned<'_>, units: u32, tickets: u32) {
    assert!(tickets <= units && (tickets == 0) == (units == 0), "{tickets} tickets for {units} units");
    if let Some(decided) = planned.options.bundle {
        assert_eq!(tickets, units.div_ceil(decided));
    }
}

/// The tickets of units that split what is wanted of `factors`: a unit for each CTA of a cluster.
fn check_split(planned: &Planned<'_>, split: &LoraSplit, counted: Ranks, factors: &Factors<'_>) -> u128 {
    let tickets = factors.check(split, counted).div_ceil(planned.launch.cluster[0].into());
    assert_eq!(u128::from(split.tickets), tickets);
    tickets
}

pub(super) fn forward(planned: &Planned<'_>, op: &raw::ForwardShared, shape: LoraShape) {
    let columns = check_launch(planned, op.dtype, "forward");
    let p = forward_params(&planned.launch.params);
    let LoraShape { m, k, r, .. } = shape;
    let all_b: Vec<raw::Matrix> = op.projections.iter().map(|of| of.b).collect();
    let own_ranks: Vec<usize> = all_b.iter().map(|b| b.cols).collect();
    let counted = Ranks::of(op.f32_factors, op.dtype, &own_ranks);
    let cluster = planned.launch.cluster[0];
    let [got_m, got_k, pairs, projections] = [p.m, p.k, p.r, p.projection_count].map(|count| count as usize);
    assert_eq!([got_m, got_k, pairs, projections], [m, k, counted.pairs, op.projections.len()]);
    assert_eq!(p.sync, planned.workspace);
    check_variant((p.dropout, p.routes), op.dropout, op.routes);
    assert_covers("M", p.m_groups, BLOCK * cluster, m);
    assert_eq!(p.r_blocks as usize, pairs.div_ceil(NARROW));
    let (first_ranks, deep) = numbered(own_ranks.iter().map(|&r| counted.triples_of(r) as u128));
    let (first_blocks, n_blocks) =
        numbered(op.projections.iter().map(|of| of.w.rows.div_ceil(columns as usize) as u128));
    assert_eq!((deep, n_blocks), (counted.triples as u128, p.n_blocks.into()));
    let [m_groups, r_blocks] = [p.m_groups, p.r_blocks].map(u128::from);
    assert_eq!(u128::from(p.h_units), m_groups * r_blocks);
    check_bundles(planned, p.h_units, p.h_tickets);
    planned.check_order(p.group_m, p.m_groups, p.n_blocks);
    let factors = Factors { a: &op.a, b: &all_b, wanted: [true; 2] };
    let split_tickets = check_split(planned, &p.split, counted, &factors);
    check_tickets(p.tickets, split_tickets + u128::from(p.h_tickets) + m_groups * n_blocks, &planned.launch);
    check_flags(m_groups * u128::from(cluster), p.flag_shift, p.sync_words, p.sync_words);

    let kept = op.h.filter(|_| r != 0 && !counted.is_split);
    let of_y = LoraShape { r: counted.triples, ..shape };
    let h = kept.or_else(|| (r != 0).then(|| planned.scratch(p.h, of_y)));
    assert_eq!(p.h.ptr, h.map_or(0, |h| h.ptr));
    let a = counted.is_split.then(|| split::halves_of_a(&p.split, counted.pairs, k));
    let b = counted.is_split.then(|| split::halves_of_b(&p.split, &all_b, |r| counted.triples_of(r)));
    if counted.is_split {
        split::check_kept(&p.split, op.h);
    }
    let of_all_b = b.as_ref().map(|b| b.0);
    planned.check_regions([h.filter(|_| kept.is_none()), a, of_all_b].into_iter().flatten().map(Region::of));
    assert_eq!(planned.launch.maps.len(), 2 + 4 * 4);
    check_map(planned, 0, Some(op.x), [64, 128]);
    check_map(planned, 1, a.or(Some(op.a)), [64, narrow_columns(pairs)]);
    for (at, (of, got)) in op.projections.iter().zip(p.projections).enumerate() {
        assert_eq!((got.bias, got.gain), (address(of.bias), address(of.gain)));
        let ranks = counted.triples_of(of.b.cols);
        assert_eq!((got.n as usize, got.r as usize), (of.w.rows, ranks));
        assert_eq!([got.first_rank, got.first_block].map(u128::from), [first_ranks[at], first_blocks[at]]);
        assert_eq!(got.scale, scaled(of.scale, op.dropout));
        let (first, own_h) = (2 + 4 * at, h.map(|h| ranks_of(h, got.first_rank as usize, ranks)));
        check_map(planned, first, Some(of.w), [64, columns / 2]);
        check_map(planned, first + 1, own_h, [64, 128]);
        let own_b = b.as_ref().map_or(of.b, |b| b.1[at]);
        check_map(planned, first + 2, Some(own_b), [64, columns / 2]);
        check_map(planned, first + 3, Some(of.y), [64, 64]);
    }
}

/// The tickets of db and da, their counters and sums; the region of the sums.
fn check_gradients(
    planned: &Planned<'_>,
    p: &LoraSm90BackwardParams,
    (split_tickets, [db_tiles, da_tiles]): (u128, [u128; 2]),
    ranks: usize,
) -> Option<Region> {
    let (cluster, chunks) = (u128::from(planned.launch.cluster[0]), u128::from(p.chunks));
    assert_eq!(u128::from(p.db_end), u128::from(p.dx_end) + db_tiles * chunks);
    let tickets = split_tickets + u128::from(p.db_end) + da_tiles * chunks;
    if tickets == 0 {
        // Nothing is wanted but da or db without ranks: one cluster finds no ticket.
        assert_eq!((p.tickets, planned.launch.grid[0]), (0, planned.launch.cluster[0]));
    } else {
        check_tickets(p.tickets, tickets, &planned.launch);
    }
    assert_covers("tokens", p.chunks, p.chunk_rows, p.m as usize);
    assert!(p.chunk_rows.is_multiple_of(BLOCK), "a chunk is whole blocks: its dh flags are");
    assert!(planned.options.chunks.is_none_or(|most| p.chunks <= most));
    let slabs = (db_tiles + da_tiles) * cluster * 2;
    let counters = if chunks > 1 { slabs } else { 0 };
    assert_eq!(u128::from(p.sync_words), u128::from(p.counters) + counters);
    // Per thread: a register for each two columns of the narrow tile, two sums, and two of the gradient of the magnitude.
    let sums = if p.projections.iter().all(|of| of.magnitude.dm == 0) { 2 } else { 4 };
    assert_eq!(p.partial_stride, 128 * (narrow_columns(ranks) / 2 + sums));
    let places = if chunks > 1 { slabs * chunks } else { u128::from(planned.launch.grid[0]) * 2 };
    let bytes = 4 * u128::from(p.partial_stride) * places;
    assert!(slabs == 0 || bytes <= 32 << 20, "{bytes} bytes of sums");
    assert_eq!(p.partials == 0, slabs == 0);
    (slabs > 0).then_some(Region { start: p.partials.into(), bytes })
}

pub(super) fn backward(planned: &Planned<'_>, op: &raw::BackwardShared, shape: LoraShape) {
    let columns = check_launch(planned, op.dtype, "backward");
    let p = backward_params(&planned.launch.params);
    let LoraShape { m, k, r, .. } = shape;
    let all_b: Vec<raw::Matrix> = op.projections.iter().map(|of| of.b).collect();
    let own_ranks: Vec<usize> = all_b.iter().map(|b| b.cols).collect();
    let counted = Ranks::of(op.f32_factors, op.dtype, &own_ranks);
    let cluster = planned.launch.cluster[0];
    let [got_m, got_k, deep, projections] = [p.m, p.k, p.r, p.projection_count].map(|count| count as usize);
    assert_eq!([got_m, got_k, deep, projections], [m, k, counted.triples, op.projections.len()]);
    assert_eq!(p.sync, planned.workspace);
    check_variant((p.dropout, p.routes), op.dropout, op.routes);
    for (what, groups, extent) in [("M", p.m_groups, m), ("K", p.k_groups, k)] {
        assert_covers(what, groups, BLOCK * cluster, extent);
    }
    assert_covers("K", p.k_blocks, columns, k);
    let [m_groups, k_groups, k_blocks] = [p.m_groups, p.k_groups, p.k_blocks].map(u128::from);
    let (wants_dx, wants_da) = (op.dx.is_some(), op.da.is_some() && r > 0);
    let wants_dh = r > 0 && (wants_dx || wants_da);
    let (narrow, db_tiles) = check_projections(op, &p, cluster, counted);
    assert_eq!(u128::from(p.dh_units), if wants_dh { m_groups * narrow } else { 0 });
    check_bundles(planned, p.dh_units, p.dh_tickets);
    planned.check_order(p.group_m, p.m_groups, if wants_dx { p.k_blocks } else { 1 });
    let dx_tiles = if wants_dx { m_groups * k_blocks } else { 0 };
    assert_eq!(u128::from(p.dx_end), u128::from(p.dh_tickets) + dx_tiles);
    let da_tiles = if wants_da { k_groups * counted.pairs.div_ceil(NARROW) as u128 } else { 0 };
    let factors = Factors { a: &op.a, b: &all_b, wanted: [wants_dh && wants_dx, wants_dh] };
    let split_tickets = check_split(planned, &p.split, counted, &factors);
    let sums = check_gradients(planned, &p, (split_tickets, [db_tiles, da_tiles]), counted.pairs);
    check_flags(m_groups * u128::from(cluster), p.flag_shift, p.counters, p.sync_words);

    let dh = (wants_dh && (wants_dx || !counted.is_split))
        .then(|| planned.scratch(p.dh, LoraShape { r: counted.triples, ..shape }));
    let when = |wanted: bool| counted.is_split && wanted;
    let a = when(wants_dh && wants_dx).then(|| split::halves_of_a(&p.split, counted.triples, k));
    let b = when(wants_dh).then(|| split::halves_of_b(&p.split, &all_b, |r| counted.pairs_of(r)));
    let pairs = p.split.pairs;
    let of_tokens = when(wants_da).then(|| split::matrix(pairs.ptr, pairs.row_stride as usize, m, counted.pairs));
    let of_all_b = b.as_ref().map(|b| b.0);
    planned.check_regions([dh, a, of_all_b, of_tokens].into_iter().flatten().map(Region::of).chain(sums));
    assert_eq!((p.da.ptr, p.dx.ptr), (pointer(wants_da, op.da), address(op.dx)));
    let (own, of_da) = ([narrow_columns(p.most_r as usize).min(64), 64], [narrow_columns(counted.pairs).min(64), 64]);
    let when = |condition: bool, matrix: raw::Matrix| condition.then_some(matrix);
    assert_eq!(planned.launch.maps.len(), 6 + 5 * 4);
    check_map(planned, 0, dh.filter(|_| wants_dx), [64, 128]);
    check_map(planned, 1, a.or(when(wants_dx, op.a)), [64, 64]);
    check_map(planned, 2, op.dx, [64, 64]);
    let wants_db = |of: &raw::BackwardProjection| of.db.is_some() && of.b.cols > 0;
    check_map(planned, 3, op.h.filter(|_| op.projections.iter().any(wants_db)), own);
    check_map(planned, 4, op.x.filter(|_| wants_da), [64, 64]);
    check_map(planned, 5, of_tokens.or(dh).filter(|_| wants_da), of_da);
    for (at, of) in op.projections.iter().enumerate() {
        let first = 6 + 5 * at;
        let has_tiles = wants_db(of) || of.dbias.is_some() || of.dm.is_some();
        check_map(planned, first, when(wants_dh || wants_dx, of.dy), [64, 128]);
        check_map(planned, first + 1, when(wants_dx, of.w), [64, 64]);
        let own_b = b.as_ref().map_or(of.b, |b| b.1[at]);
        check_map(planned, first + 2, when(wants_dh, own_b), own);
        check_map(planned, first + 3, when(has_tiles, of.dy), [64, 64]);
        check_map(planned, first + 4, of.dm.map(|dm| dm.y), [64, 64]);
    }
}

/// What the kernel has for each projection; the narrow tiles of dh in a block of rows, and the tiles of db.
fn check_projections(
    op: &raw::BackwardShared,
    p: &LoraSm90BackwardParams,
    cluster: u32,
    counted: Ranks,
) -> (u128, u128) {
    let pairs = |of: &raw::BackwardProjection| counted.pairs_of(of.b.cols);
    let all = op.projections.iter();
    let n_groups = |of: &raw::BackwardProjection| of.w.rows.div_ceil((BLOCK * cluster) as usize) as u128;
    let (first_ranks, ranks) = numbered(all.clone().map(|of| pairs(of) as u128));
    let (first_narrow, narrow) = numbered(all.clone().map(|of| pairs(of).div_ceil(NARROW) as u128));
    let (first_tiles, tiles) = numbered(all.clone().map(|of| n_groups(of) * db_blocks(of, pairs(of), NARROW)));
    let steps: u128 = all.clone().map(|of| of.w.rows.div_ceil(64) as u128).sum();
    let most = all.clone().map(pairs).max().unwrap_or(0);
    assert_eq!((ranks, steps, narrow), (counted.pairs as u128, p.n_steps.into(), p.dh_blocks.into()));
    assert_eq!(p.most_r as usize, most);
    for (at, (of, got)) in all.zip(p.projections).enumerate() {
        assert_eq!((got.db.ptr, got.dbias), (pointer(of.b.cols > 0, of.db), pointer(true, of.dbias)));
        assert_eq!((got.n as usize, got.r as usize), (of.w.rows, pairs(of)));
        let firsts = [got.first_rank, got.first_narrow, got.first_db_tile].map(u128::from);
        assert_eq!(firsts, [first_ranks[at], first_narrow[at], first_tiles[at]]);
        assert_eq!((u128::from(got.n_groups), got.scale), (n_groups(of), scaled(of.scale, op.dropout)));
    }
    (narrow, tiles)
}
