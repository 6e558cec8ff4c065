//! The planner's Hopper family, through its public API: what every plan promises the kernels, and when there is none.
#![allow(clippy::panic)] // helpers of tests fail as tests do

mod common;

use common::raw as ops;
use fused_lora::plan::{
    Device, Family, Launch, LoraSm90BackwardParams, LoraSm90ForwardParams, Options, Params, Plan, SYNC_BYTES, Swizzle,
    TensorMap, TileSize, WORKSPACE_ALIGN,
};
use fused_lora::{Dtype, Error, LoraShape, MAX_DIMENSION, raw};
use proptest::prelude::*;

/// Where workspaces are said to be.
const WORKSPACE: u64 = 1 << 63;
/// Rows of a block.
const BLOCK: u64 = 128;
/// Columns of a narrow tile: LORA_SM90_NARROW_N.
const NARROW: u64 = 128;
/// Words before the flags: LORA_SYNC_FLAGS.
const FIRST_FLAG: u32 = 2;
const TILES: [(TileSize, u32); 3] = [(TileSize::Sm90N256, 256), (TileSize::Sm90N192, 192), (TileSize::Sm90N128, 128)];

fn devices() -> impl Strategy<Value = Device> {
    (1u32..=300).prop_map(|sms| Device::of_arch("a device", 90, sms))
}

fn dtypes() -> impl Strategy<Value = Dtype> {
    prop::sample::select(vec![Dtype::F16, Dtype::Bf16])
}

/// Multiples of 8, as the family wants N and K.
fn extent() -> impl Strategy<Value = usize> {
    prop_oneof![3 => 1..=40_usize, 3 => 1..=2500_usize, 1 => 1..=MAX_DIMENSION / 8].prop_map(|eighths| eighths * 8)
}

fn shapes() -> impl Strategy<Value = LoraShape> {
    let tokens = prop_oneof![3 => 1..=300_usize, 3 => 1..=20_000_usize, 1 => 1..=MAX_DIMENSION];
    (tokens, extent(), extent(), 0..=32_usize).prop_map(|(m, n, k, r)| LoraShape { m, n, k, r: r * 8 })
}

/// Choices that any device with two SMs can fulfil.
fn choices() -> impl Strategy<Value = Options> {
    let tile = prop::option::of(prop::sample::select(TILES.to_vec()));
    let some = |most| prop::option::of(1..=most);
    let group_m = prop::option::of(prop_oneof![1..=20_u32, Just(u32::MAX)]);
    (tile, some(2_u32), some(70_u32), some(40_u32), group_m).prop_map(|(tile, cluster, bundle, chunks, group_m)| {
        let mut options = Options::default().with_family(Family::Sm90);
        options.tile = tile.map(|tile| tile.0);
        (options.cluster, options.bundle, options.chunks, options.group_m) = (cluster, bundle, chunks, group_m);
        options
    })
}

fn forward_params(launch: &Launch) -> LoraSm90ForwardParams {
    match launch.params {
        Params::Sm90Forward(params) => params,
        ref other => panic!("the plan of a forward holds {other:?}"),
    }
}

fn backward_params(launch: &Launch) -> LoraSm90BackwardParams {
    match launch.params {
        Params::Sm90Backward(params) => params,
        ref other => panic!("the plan of a backward holds {other:?}"),
    }
}

/// The map as bytes, under the rules of the driver's documentation.
fn encode(map: &TensorMap) -> Result<[u8; 128], ptx_emulator::TensorMapError> {
    use ptx_emulator::{Interleave, L2Promotion, OobFill, Swizzle as Emulated, TensorType};
    let swizzle = match map.swizzle {
        Swizzle::Bytes32 => Emulated::Bytes32,
        Swizzle::Bytes64 => Emulated::Bytes64,
        Swizzle::Bytes128 => Emulated::Bytes128,
    };
    let dtype = if map.dtype == Dtype::F16 { TensorType::F16 } else { TensorType::Bf16 };
    ptx_emulator::TensorMap::encode_tiled(
        dtype,
        2,
        map.address,
        &map.dims,
        &[map.row_bytes],
        &map.boxes,
        &[1, 1],
        Interleave::None,
        swizzle,
        L2Promotion::None,
        OobFill::Zeros,
    )
    .map(|map| *map.as_bytes())
}

/// The map of a matrix with boxes of `boxes`, absent when the matrix is not wanted or empty.
fn check_map(launch: &Launch, index: usize, matrix: Option<raw::Matrix>, boxes: [u32; 2]) {
    let map = launch.maps[index];
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

/// What the options decide, limits of the device, legal maps, and the launch with the columns of its tile.
fn check_launch(plan: &Plan, device: &Device, options: &Options, dtype: Dtype, operation: &str) -> (Launch, u32) {
    assert_eq!(plan.family(), Family::Sm90);
    let launch = plan.launch(WORKSPACE, plan.workspace_bytes()).expect("a launch");
    let &(tile, columns) = TILES
        .iter()
        .find(|(_, columns)| launch.kernel == format!("lora_sm90_{operation}_{}_{columns}", dtype.name()))
        .unwrap_or_else(|| panic!("no tile shape belongs to {}", launch.kernel));
    assert!(options.tile.is_none_or(|decided| decided == tile), "{launch:?}");
    assert_eq!(launch.image, format!("sm90_{operation}"));
    let cluster = launch.cluster[0];
    assert!((1..=2).contains(&cluster) && options.cluster.is_none_or(|decided| decided == cluster), "{launch:?}");
    assert_eq!((launch.cluster[1..].to_vec(), launch.grid[1..].to_vec()), (vec![1, 1], vec![1, 1]));
    assert_eq!(launch.block, [384, 1, 1]);
    assert!(launch.grid[0].is_multiple_of(cluster) && (cluster..=device.sms).contains(&launch.grid[0]), "{launch:?}");
    assert!(launch.shared_bytes <= device.shared_per_block, "{launch:?}");
    let stages = if columns == 128 { 6 } else { 4 };
    assert_eq!(launch.shared_bytes, stages * 128 * (128 + columns) + 4 * 8192 + 1024);
    let bytes = launch.parameter_bytes(encode).unwrap_or_else(|error| panic!("{error}: {launch:?}"));
    assert_eq!(bytes.len(), if operation == "forward" { 896 } else { 1536 }, "the size of the struct");
    for (map, bytes) in launch.maps.iter().zip(bytes.chunks(128)) {
        assert_eq!(map.is_none(), bytes == [0; 128], "an absent map is zero bytes");
    }
    (launch, columns)
}

fn assert_covers(what: &str, blocks: u32, block: u64, extent: usize) {
    let (blocks, extent) = (u64::from(blocks), extent as u64);
    assert!(blocks * block >= extent && (blocks - 1) * block < extent, "{blocks} of {block} for {what} {extent}");
}

/// Byte ranges of the workspace must be aligned, disjoint, after the synchronisation words and inside.
fn check_regions(plan: &Plan, mut regions: Vec<(u64, u64)>) {
    let middle_and_sums: u64 = regions.iter().map(|region| region.1).sum();
    let end = WORKSPACE + plan.workspace_bytes() as u64;
    assert!(plan.workspace_bytes() as u64 <= SYNC_BYTES as u64 + middle_and_sums + 2 * WORKSPACE_ALIGN);
    regions.push((WORKSPACE, SYNC_BYTES as u64));
    regions.sort_unstable();
    for window in regions.windows(2) {
        assert!(window[0].0 + window[0].1 <= window[1].0, "regions overlap: {regions:?}");
    }
    for (start, bytes) in regions {
        assert!(start.is_multiple_of(WORKSPACE_ALIGN) && start + bytes <= end, "{start:#x} + {bytes}");
    }
}

/// One flag for each 2^shift blocks, padded to whole clusters, and the words behind them.
fn check_flags(blocks: u32, flag_shift: u32, end: u32, sync_words: u32) {
    assert_eq!(FIRST_FLAG + ((blocks - 1) >> flag_shift) + 1, end);
    assert!(sync_words >= end && sync_words as usize * 4 <= SYNC_BYTES, "{sync_words} words");
}

/// Tickets of h or dh; every unit belongs to one.
fn check_bundles(units: u32, tickets: u32, options: &Options) {
    assert!(tickets <= units && (tickets == 0) == (units == 0), "{tickets} tickets for {units} units");
    if let Some(decided) = options.bundle {
        assert_eq!(tickets, units.div_ceil(decided));
    }
}

/// The order of main tiles: as decided or the planner's, and within what the kernels' 32 bits can multiply.
fn check_order(group_m: u32, groups: u32, columns: u32, options: &Options) {
    assert_eq!(group_m, options.group_m.unwrap_or(8).min(groups));
    assert!(group_m >= 1 && group_m.checked_mul(columns).is_some(), "{group_m} groups of {columns} tiles");
}

/// h or dh in the workspace.
fn scratch(matrix: fused_lora::plan::LoraMatrix, shape: LoraShape) -> raw::Matrix {
    assert!(matrix.row_stride as usize >= shape.r && matrix.row_stride % 8 == 0, "rows start on 16 bytes");
    raw::Matrix { ptr: matrix.ptr, rows: shape.m, cols: shape.r, row_stride: matrix.row_stride as usize }
}

fn region(matrix: raw::Matrix) -> (u64, u64) {
    (matrix.ptr, (matrix.rows * matrix.row_stride * 2) as u64)
}

fn narrow_columns(r: usize) -> u32 {
    [16, 32, 64].into_iter().find(|&columns| r <= columns as usize).unwrap_or(128)
}

fn check_forward(plan: &Plan, op: &raw::Forward, shape: LoraShape, device: &Device, options: &Options) {
    let (launch, columns) = check_launch(plan, device, options, op.dtype, "forward");
    let p = forward_params(&launch);
    let LoraShape { m, n, k, r } = shape;
    let cluster = launch.cluster[0];
    assert_eq!((p.m as usize, p.n as usize, p.k as usize, p.r as usize), (m, n, k, r));
    assert_eq!((p.sync, p.scale, p.bias), (WORKSPACE, op.scale, op.bias.map_or(0, |bias| bias.ptr)));
    assert_covers("M", p.m_groups, BLOCK * u64::from(cluster), m);
    assert_covers("N", p.n_blocks, columns.into(), n);
    assert_eq!(u64::from(p.r_blocks), (r as u64).div_ceil(NARROW));
    assert_eq!(p.h_units, p.m_groups * p.r_blocks);
    check_bundles(p.h_units, p.h_tickets, options);
    check_order(p.group_m, p.m_groups, p.n_blocks, options);
    assert_eq!(u64::from(p.tickets), u64::from(p.h_tickets) + u64::from(p.m_groups) * u64::from(p.n_blocks));
    assert!(launch.grid[0] / cluster <= p.tickets, "every cluster has work");
    assert!(p.tickets.checked_add(launch.grid[0]).is_some(), "tickets fit in 32 bits");
    check_flags(p.m_groups * cluster, p.flag_shift, p.sync_words, p.sync_words);

    let h = op.h.filter(|_| r != 0).or_else(|| (r != 0).then(|| scratch(p.h, shape)));
    assert_eq!(p.h.ptr, h.map_or(0, |h| h.ptr));
    check_regions(plan, if op.h.is_some() { vec![] } else { h.map(region).into_iter().collect() });
    assert_eq!(launch.maps.len(), 6);
    check_map(&launch, 0, Some(op.x), [64, 128]);
    check_map(&launch, 1, Some(op.w), [64, columns / 2]);
    check_map(&launch, 2, Some(op.a), [64, narrow_columns(r)]);
    check_map(&launch, 3, h, [64, 128]);
    check_map(&launch, 4, Some(op.b), [64, columns / 2]);
    check_map(&launch, 5, Some(op.y), [64, 64]);
}

/// The tickets of db and da, their counters and sums; the region of the sums.
fn check_gradients(p: &LoraSm90BackwardParams, launch: &Launch, [db_tiles, da_tiles]: [u64; 2]) -> Option<(u64, u64)> {
    let (cluster, chunks) = (launch.cluster[0], u64::from(p.chunks));
    assert_eq!(u64::from(p.db_end), u64::from(p.dx_end) + db_tiles * chunks);
    assert_eq!(u64::from(p.tickets), u64::from(p.db_end) + da_tiles * chunks);
    assert_covers("tokens", p.chunks, p.chunk_rows.into(), p.m as usize);
    assert!(u64::from(p.chunk_rows).is_multiple_of(BLOCK), "a chunk is whole blocks: its dh flags are");
    let slabs = (db_tiles + da_tiles) * u64::from(cluster) * 2;
    let counters = if chunks > 1 { slabs } else { 0 };
    assert_eq!(u64::from(p.sync_words), u64::from(p.counters) + counters);
    // Per thread: a register for each two columns of the narrow tile, and two sums.
    assert_eq!(p.partial_stride, 128 * (narrow_columns(p.r as usize) / 2 + 2));
    let places = if chunks > 1 { slabs * chunks } else { u64::from(launch.grid[0]) * 2 };
    let bytes = 4 * u64::from(p.partial_stride) * places;
    assert!(slabs == 0 || bytes <= 32 << 20, "{bytes} bytes of sums");
    assert_eq!(p.partials == 0, slabs == 0);
    (slabs > 0).then_some((p.partials, bytes))
}

fn check_backward(plan: &Plan, op: &raw::Backward, shape: LoraShape, device: &Device, options: &Options) {
    let (launch, columns) = check_launch(plan, device, options, op.dtype, "backward");
    let p = backward_params(&launch);
    let LoraShape { m, n, k, r } = shape;
    let cluster = launch.cluster[0];
    assert_eq!((p.m as usize, p.n as usize, p.k as usize, p.r as usize), (m, n, k, r));
    for (what, groups, extent) in [("M", p.m_groups, m), ("N", p.n_groups, n), ("K", p.k_groups, k)] {
        assert_covers(what, groups, BLOCK * u64::from(cluster), extent);
    }
    assert_covers("K", p.k_blocks, columns.into(), k);
    assert_eq!(u64::from(p.r_blocks), (r as u64).div_ceil(NARROW));
    let (wants_dx, wants_da, wants_db) = (op.dx.is_some(), op.da.is_some() && r > 0, op.db.is_some() && r > 0);
    let wants_dh = r > 0 && (wants_dx || wants_da);
    assert_eq!(p.dh_units, if wants_dh { p.m_groups * p.r_blocks } else { 0 });
    check_bundles(p.dh_units, p.dh_tickets, options);
    check_order(p.group_m, p.m_groups, if wants_dx { p.k_blocks } else { 1 }, options);
    let dx_tiles = if wants_dx { u64::from(p.m_groups) * u64::from(p.k_blocks) } else { 0 };
    assert_eq!(u64::from(p.dx_end), u64::from(p.dh_tickets) + dx_tiles);
    assert!(options.chunks.is_none_or(|most| p.chunks <= most));
    assert!(p.tickets.checked_add(launch.grid[0]).is_some(), "tickets fit in 32 bits");
    let db_tiles = u64::from(p.n_groups * if wants_db { p.r_blocks } else { u32::from(op.dbias.is_some()) });
    let da_tiles = if wants_da { u64::from(p.k_groups * p.r_blocks) } else { 0 };
    let sums = check_gradients(&p, &launch, [db_tiles, da_tiles]);
    check_flags(p.m_groups * cluster, p.flag_shift, p.counters, p.sync_words);

    let dh = wants_dh.then(|| scratch(p.dh, shape));
    check_regions(plan, dh.map(region).into_iter().chain(sums).collect());
    let pointer = |wanted: bool, gradient: Option<raw::Gradient>| match gradient {
        Some(gradient) if wanted => gradient.matrix.ptr,
        _ => 0,
    };
    assert_eq!((p.da.ptr, p.db.ptr), (pointer(wants_da, op.da), pointer(wants_db, op.db)));
    assert_eq!((p.dx.ptr, p.dbias), (op.dx.map_or(0, |dx| dx.ptr), pointer(true, op.dbias)));
    let narrow = [narrow_columns(r).min(64), 64];
    let when = |condition: bool, matrix: raw::Matrix| condition.then_some(matrix);
    assert_eq!(launch.maps.len(), 10);
    check_map(&launch, 0, when(wants_dh || wants_dx, op.dy), [64, 128]);
    check_map(&launch, 1, when(wants_dx, op.w), [64, 64]);
    check_map(&launch, 2, when(wants_dh, op.b), narrow);
    check_map(&launch, 3, dh.filter(|_| wants_dx), [64, 128]);
    check_map(&launch, 4, when(wants_dx, op.a), [64, 64]);
    check_map(&launch, 5, op.dx, [64, 64]);
    check_map(&launch, 6, when(wants_db || op.dbias.is_some(), op.dy), [64, 64]);
    check_map(&launch, 7, op.h.filter(|_| wants_db), narrow);
    check_map(&launch, 8, op.x.filter(|_| wants_da), [64, 64]);
    check_map(&launch, 9, dh.filter(|_| wants_da), narrow);
}

/// The largest shapes run out of addresses or tickets, or reach where these tests place the workspace.
fn is_out_of_room(error: &Error, shape: LoraShape) -> bool {
    let is_large = shape.m.max(shape.n).max(shape.k) > 20_000;
    is_large && matches!(error, Error::TooLarge { .. } | Error::Overlap { .. } | Error::NullPointer { .. })
}

fn is_impossible(error: &Error, options: &Options, device: &Device) -> bool {
    matches!(error, Error::PlanOption { option: "cluster", .. }) && options.cluster == Some(2) && device.sms == 1
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn forward_plans_keep_their_promises(
        shape in shapes(), dtype in dtypes(), device in devices(), options in choices(), keeps_h: bool, has_bias: bool,
    ) {
        let mut op = ops::forward(dtype, shape);
        op.bias = op.bias.filter(|_| has_bias);
        op.h = keeps_h.then(|| raw::Matrix::new(1 << 61, shape.m, shape.r));
        match Plan::forward_with(&op, &device, options) {
            Ok(plan) if plan.launch(WORKSPACE, plan.workspace_bytes()).is_err_and(|e| is_out_of_room(&e, shape)) => {}
            Ok(plan) => check_forward(&plan, &op, shape, &device, &options),
            Err(error) => {
                prop_assert!(is_out_of_room(&error, shape) || is_impossible(&error, &options, &device), "{error}");
            }
        }
    }

    #[test]
    fn backward_plans_keep_their_promises(
        shape in shapes(), dtype in dtypes(), device in devices(), options in choices(), outputs in 1u32..16,
    ) {
        let mut op = ops::backward(dtype, shape);
        op.dx = op.dx.filter(|_| outputs & 1 != 0);
        op.da = op.da.filter(|_| outputs & 2 != 0);
        op.db = op.db.filter(|_| outputs & 4 != 0);
        op.dbias = op.dbias.filter(|_| outputs & 8 != 0);
        op.accumulate.dx = outputs & 1 != 0;
        match Plan::backward_with(&op, &device, options) {
            Ok(plan) if plan.launch(WORKSPACE, plan.workspace_bytes()).is_err_and(|e| is_out_of_room(&e, shape)) => {}
            Ok(plan) => check_backward(&plan, &op, shape, &device, &options),
            Err(error) => {
                prop_assert!(is_out_of_room(&error, shape) || is_impossible(&error, &options, &device), "{error}");
            }
        }
    }

    /// Left to the planner, wherever the matrices lie: one of the families, and maps that can be encoded.
    #[test]
    fn any_placement_has_a_legal_plan(
        m in 1..2000_usize, n in 1..2000_usize, k in 1..2000_usize, r in 0..300_usize, dtype in dtypes(),
        device in devices(), eighths: bool, shifted in 0..9_usize, widened in 0..9_usize, by in 1..17_usize,
    ) {
        let round = |extent: usize| if eighths { extent.next_multiple_of(8) } else { extent };
        let shape = LoraShape { m, n: round(n), k: round(k), r: round(r) };
        let mut forward = ops::forward(dtype, shape);
        forward.h = Some(raw::Matrix::new(1 << 61, shape.m, shape.r));
        let mut backward = ops::backward(dtype, shape);
        let place = |at: usize, index: usize, matrix: &mut raw::Matrix| {
            // Far apart, so that neither can make arguments overlap.
            matrix.ptr += (index as u64) << 40;
            matrix.ptr += if at == shifted { 4 * by as u64 } else { 0 };
            matrix.row_stride += if at == widened { by } else { 0 };
        };
        for (index, name) in ["x", "w", "a", "b", "h", "y"].iter().enumerate() {
            place(index, index, ops::forward_argument(&mut forward, name));
        }
        for (index, name) in ["dy", "w", "a", "b", "x", "h", "dx", "da", "db"].iter().enumerate() {
            place(index, index, ops::backward_argument(&mut backward, name));
        }
        for plan in [Plan::forward(&forward, &device), Plan::backward(&backward, &device)] {
            let plan = plan.expect("a plan");
            let launch = plan.launch(WORKSPACE, plan.workspace_bytes()).expect("a launch");
            launch.parameter_bytes(encode).unwrap_or_else(|error| panic!("{error}: {launch:?}"));
            prop_assert_eq!(plan.family() == Family::Sm90, !launch.maps.is_empty());
            prop_assert!(!plan.explain().is_empty());
        }
    }

    /// Whatever is asked for: a plan that does it, or an error that names the option.
    #[test]
    fn options_are_followed_or_refused(
        shape in shapes(), device in devices(), arch in prop::sample::select(vec![75, 80, 90, 100]),
        family in prop::option::of(prop::sample::select(vec![Family::Portable, Family::Sm90])),
        tile in prop::option::of(prop::sample::select(vec![TileSize::Small, TileSize::Large, TileSize::Sm90N192])),
        numbers: [Option<u32>; 3], small: bool, without_sm90: bool,
    ) {
        let device = Device { arch, ..device };
        let mut options = Options::default();
        (options.family, options.tile, options.without_sm90) = (family, tile, without_sm90);
        let shrink = |number: Option<u32>| number.map(|number| if small { number % 3 } else { number });
        let [cluster, bundle, chunks] = numbers.map(shrink);
        (options.cluster, options.bundle, options.chunks) = (cluster, bundle, chunks);
        let plans = [
            Plan::forward_with(&ops::forward(Dtype::F16, shape), &device, options),
            Plan::backward_with(&ops::backward(Dtype::F16, shape), &device, options),
        ];
        for plan in plans {
            match plan {
                Ok(plan) => {
                    prop_assert!(family.is_none_or(|family| family == plan.family()));
                    prop_assert!(tile.is_none_or(|tile| tile.family() == plan.family()));
                    prop_assert!(plan.family() == Family::Sm90 || cluster.or(bundle).or(chunks).is_none());
                    prop_assert!(plan.family() == Family::Portable || (arch == 90 && !without_sm90));
                }
                Err(Error::PlanOption { option, .. }) => {
                    prop_assert!(["family", "tile", "cluster", "bundle", "chunks"].contains(&option));
                }
                Err(error) => prop_assert!(is_out_of_room(&error, shape), "{error}"),
            }
        }
    }
}

/// Each condition on its own keeps the family away, and is named with its value where the call is explained and where the
/// family is asked for.
#[test]
fn a_condition_that_fails_is_named() {
    let device = Device::of_arch("a device", 90, 132);
    let shape = LoraShape { m: 4096, n: 4096, k: 4096, r: 16 };
    let base = ops::forward(Dtype::F16, shape);
    let wide = |matrix: raw::Matrix, row_stride| raw::Matrix { row_stride, ..matrix };
    let moved = |matrix: raw::Matrix| raw::Matrix { ptr: matrix.ptr + 8, ..matrix };
    let of_shape = |n, k, r| ops::forward(Dtype::F16, LoraShape { n, k, r, ..shape });
    let far = 1 << 39;
    let apart = |matrix: raw::Matrix| raw::Matrix { ptr: 1 << 62, ..matrix };
    let cases = [
        (of_shape(4095, 4096, 16), "N is 4095, not a multiple of 8".to_owned()),
        (of_shape(4096, 4100, 16), "K is 4100, not a multiple of 8".to_owned()),
        (of_shape(4096, 4096, 9), "R is 9, not a multiple of 8".to_owned()),
        (of_shape(4096, 4096, 264), "R is 264, more than 256".to_owned()),
        (raw::Forward { x: moved(base.x), ..base }, format!("the address of x is {:#x}, not a", base.x.ptr + 8)),
        (
            raw::Forward { y: wide(apart(base.y), 4100), ..base },
            "the row stride of y is 4100 elements, not a".to_owned(),
        ),
        (
            raw::Forward { y: wide(apart(base.y), far), ..base },
            format!("the row stride of y is {far} elements, not less than {far}"),
        ),
    ];
    for (op, says) in cases {
        let plan = Plan::forward(&op, &device).expect("a plan");
        assert_eq!(plan.family(), Family::Portable);
        let text = plan.explain();
        assert!(
            text.contains(&format!("note       not the Hopper family: {says}")),
            "`{says}` is missing from\n{text}"
        );
        let forced = Plan::forward_with(&op, &device, Options::default().with_tile(TileSize::Sm90N256));
        let Err(Error::PlanOption { option: "tile", got, expected }) = forced else { panic!("{forced:?}") };
        assert!(got == "Sm90N256" && expected.contains(&says), "{expected}");
    }
    let absent = Plan::forward_with(&base, &device, Options::default().without_sm90()).expect("a plan").explain();
    assert!(absent.contains("not the Hopper family: this build holds no kernels of the Hopper family"), "{absent}");
    // The stride of a single row is never used, and what no requested output reads may lie anywhere.
    let row = LoraShape { m: 1, n: 64, k: 64, r: 8 };
    let sm90 = Options::default().with_family(Family::Sm90);
    let op = ops::forward(Dtype::F16, row);
    let plan = Plan::forward_with(&raw::Forward { x: wide(op.x, 67), ..op }, &device, sm90).expect("a plan");
    check_forward(&plan, &op, row, &device, &sm90);
    let op = ops::backward(Dtype::F16, shape);
    let op = raw::Backward { w: moved(op.w), dx: None, da: None, ..op };
    check_backward(&Plan::backward_with(&op, &device, sm90).expect("a plan"), &op, shape, &device, &sm90);
}

#[test]
fn contradictions_are_refused() {
    let shape = LoraShape { m: 256, n: 256, k: 256, r: 16 };
    let plan = |arch, options| {
        Plan::forward_with(&ops::forward(Dtype::F16, shape), &Device::of_arch("a device", arch, 1), options)
    };
    let default = Options::default();
    for (options, option, got) in [
        (default.with_cluster(0), "cluster", "0"),
        (default.with_cluster(3), "cluster", "3"),
        (default.with_cluster(2), "cluster", "2"), // of one SM
        (default.with_bundle(0), "bundle", "0"),
        (default.with_chunks(0), "chunks", "0"),
        (default.with_group_m(0), "group_m", "0"),
        (default.with_family(Family::Portable).with_tile(TileSize::Sm90N128), "tile", "Sm90N128"),
        (default.with_family(Family::Sm90).with_tile(TileSize::Small), "tile", "Small"),
        (default.with_family(Family::Portable).with_cluster(1), "cluster", "1"),
        (default.with_tile(TileSize::Large).with_bundle(4), "bundle", "4"),
        (default.with_tile(TileSize::Large).with_chunks(2), "chunks", "2"),
        (default.with_family(Family::Sm90).without_sm90(), "family", "Sm90"),
    ] {
        match plan(90, options) {
            Err(Error::PlanOption { option: named, got: value, .. }) => assert_eq!((named, &*value), (option, got)),
            other => panic!("{options:?}: {other:?}"),
        }
    }
    let refused = plan(80, default.with_family(Family::Sm90)).expect_err("an A100 has no such kernels");
    let says = "the plan option `family` is Sm90, expected a choice of the portable family: the device has compute \
                capability 8.0, its kernels run on 9.0 alone";
    assert_eq!(refused.to_string(), says);
}
