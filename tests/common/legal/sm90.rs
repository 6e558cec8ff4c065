//! The Hopper family.

use fused_lora::plan::{LoraSm90BackwardParams, LoraSm90ForwardParams, Params, Swizzle, TileSize};
use fused_lora::{Dtype, LoraShape, raw};

use super::{Planned, Region, assert_covers, check_dimensions, check_flags, check_tickets, check_variant, pointer};

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
    assert_eq!(bytes, if operation == "forward" { 896 } else { 1664 }, "the size of the struct");
    columns
}

/// Tickets of h or dh; every unit belongs to one.
fn check_bundles(planned: &Planned<'_>, units: u32, tickets: u32) {
    assert!(tickets <= units && (tickets == 0) == (units == 0), "{tickets} tickets for {units} units");
    if let Some(decided) = planned.options.bundle {
        assert_eq!(tickets, units.div_ceil(decided));
    }
}

pub(super) fn forward(planned: &Planned<'_>, op: &raw::Forward, shape: LoraShape) {
    let columns = check_launch(planned, op.dtype, "forward");
    let p = forward_params(&planned.launch.params);
    let LoraShape { m, n, r, .. } = shape;
    let cluster = planned.launch.cluster[0];
    check_dimensions([p.m, p.n, p.k, p.r], shape);
    assert_eq!((p.sync, p.bias), (planned.workspace, op.bias.map_or(0, |bias| bias.ptr)));
    check_variant((p.scale, p.dropout, p.routes), op.scale, &op.variant);
    assert_covers("M", p.m_groups, BLOCK * cluster, m);
    assert_covers("N", p.n_blocks, columns, n);
    assert_eq!(p.r_blocks as usize, r.div_ceil(NARROW));
    let [m_groups, n_blocks, r_blocks] = [p.m_groups, p.n_blocks, p.r_blocks].map(u128::from);
    assert_eq!(u128::from(p.h_units), m_groups * r_blocks);
    check_bundles(planned, p.h_units, p.h_tickets);
    planned.check_order(p.group_m, p.m_groups, p.n_blocks);
    check_tickets(p.tickets, u128::from(p.h_tickets) + m_groups * n_blocks, &planned.launch);
    check_flags(m_groups * u128::from(cluster), p.flag_shift, p.sync_words, p.sync_words);

    let h = op.h.filter(|_| r != 0).or_else(|| (r != 0).then(|| planned.scratch(p.h, shape)));
    assert_eq!(p.h.ptr, h.map_or(0, |h| h.ptr));
    planned.check_regions(h.filter(|_| op.h.is_none()).map(Region::of));
    assert_eq!(planned.launch.maps.len(), 6);
    check_map(planned, 0, Some(op.x), [64, 128]);
    check_map(planned, 1, Some(op.w), [64, columns / 2]);
    check_map(planned, 2, Some(op.a), [64, narrow_columns(r)]);
    check_map(planned, 3, h, [64, 128]);
    check_map(planned, 4, Some(op.b), [64, columns / 2]);
    check_map(planned, 5, Some(op.y), [64, 64]);
}

/// The tickets of db and da, their counters and sums; the region of the sums.
fn check_gradients(planned: &Planned<'_>, p: &LoraSm90BackwardParams, tiles: [u128; 2]) -> Option<Region> {
    let [db_tiles, da_tiles] = tiles;
    let (cluster, chunks) = (u128::from(planned.launch.cluster[0]), u128::from(p.chunks));
    assert_eq!(u128::from(p.db_end), u128::from(p.dx_end) + db_tiles * chunks);
    let tickets = u128::from(p.db_end) + da_tiles * chunks;
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
    let sums = if p.magnitude.dm == 0 { 2 } else { 4 };
    assert_eq!(p.partial_stride, 128 * (narrow_columns(p.r as usize) / 2 + sums));
    let places = if chunks > 1 { slabs * chunks } else { u128::from(planned.launch.grid[0]) * 2 };
    let bytes = 4 * u128::from(p.partial_stride) * places;
    assert!(slabs == 0 || bytes <= 32 << 20, "{bytes} bytes of sums");
    assert_eq!(p.partials == 0, slabs == 0);
    (slabs > 0).then_some(Region { start: p.partials.into(), bytes })
}

pub(super) fn backward(planned: &Planned<'_>, op: &raw::Backward, shape: LoraShape) {
    let columns = check_launch(planned, op.dtype, "backward");
    let p = backward_params(&planned.launch.params);
    let LoraShape { m, n, k, r } = shape;
    let cluster = planned.launch.cluster[0];
    check_dimensions([p.m, p.n, p.k, p.r], shape);
    assert_eq!(p.sync, planned.workspace);
    check_variant((p.scale, p.dropout, p.routes), op.scale, &op.variant);
    for (what, groups, extent) in [("M", p.m_groups, m), ("N", p.n_groups, n), ("K", p.k_groups, k)] {
        assert_covers(what, groups, BLOCK * cluster, extent);
    }
    assert_covers("K", p.k_blocks, columns, k);
    assert_eq!(p.r_blocks as usize, r.div_ceil(NARROW));
    let [m_groups, n_groups, k_groups] = [p.m_groups, p.n_groups, p.k_groups].map(u128::from);
    let [k_blocks, r_blocks] = [p.k_blocks, p.r_blocks].map(u128::from);
    let (wants_dx, wants_da, wants_db) = (op.dx.is_some(), op.da.is_some() && r > 0, op.db.is_some() && r > 0);
    let wants_dh = r > 0 && (wants_dx || wants_da);
    assert_eq!(u128::from(p.dh_units), if wants_dh { m_groups * r_blocks } else { 0 });
    check_bundles(planned, p.dh_units, p.dh_tickets);
    planned.check_order(p.group_m, p.m_groups, if wants_dx { p.k_blocks } else { 1 });
    let dx_tiles = if wants_dx { m_groups * k_blocks } else { 0 };
    assert_eq!(u128::from(p.dx_end), u128::from(p.dh_tickets) + dx_tiles);
    let db_tiles = n_groups * if wants_db { r_blocks } else { (op.dbias.is_some() || op.dm.is_some()).into() };
    let da_tiles = if wants_da { k_groups * r_blocks } else { 0 };
    let sums = check_gradients(planned, &p, [db_tiles, da_tiles]);
    check_flags(m_groups * u128::from(cluster), p.flag_shift, p.counters, p.sync_words);

    let dh = wants_dh.then(|| planned.scratch(p.dh, shape));
    planned.check_regions(dh.map(Region::of).into_iter().chain(sums));
    assert_eq!((p.da.ptr, p.db.ptr), (pointer(wants_da, op.da), pointer(wants_db, op.db)));
    assert_eq!((p.dx.ptr, p.dbias), (op.dx.map_or(0, |dx| dx.ptr), pointer(true, op.dbias)));
    let narrow = [narrow_columns(r).min(64), 64];
    let when = |condition: bool, matrix: raw::Matrix| condition.then_some(matrix);
    assert_eq!(planned.launch.maps.len(), 11);
    check_map(planned, 0, when(wants_dh || wants_dx, op.dy), [64, 128]);
    check_map(planned, 1, when(wants_dx, op.w), [64, 64]);
    check_map(planned, 2, when(wants_dh, op.b), narrow);
    check_map(planned, 3, dh.filter(|_| wants_dx), [64, 128]);
    check_map(planned, 4, when(wants_dx, op.a), [64, 64]);
    check_map(planned, 5, op.dx, [64, 64]);
    check_map(planned, 6, when(wants_db || op.dbias.is_some() || op.dm.is_some(), op.dy), [64, 64]);
    check_map(planned, 7, op.h.filter(|_| wants_db), narrow);
    check_map(planned, 8, op.x.filter(|_| wants_da), [64, 64]);
    check_map(planned, 9, dh.filter(|_| wants_da), narrow);
    check_map(planned, 10, op.dm.map(|dm| dm.y), [64, 64]);
}
