//! The planner, through its public API: what every plan promises the kernels, for any shape and device.
#![allow(clippy::panic)] // helpers of tests fail as tests do

mod common;

use common::raw as ops;
use fused_lora::plan::{
    Device, Family, LoraBackwardParams, LoraForwardParams, Options, Params, Plan, SYNC_BYTES, TileSize, WORKSPACE_ALIGN,
};
use fused_lora::{Dtype, Error, LoraShape, MAX_DIMENSION, raw};
use proptest::prelude::*;

/// Where workspaces are said to be.
const WORKSPACE: u64 = 1 << 63;
/// Columns of h, dh, da and db that one tile computes: LORA_NARROW_N.
const NARROW: u64 = 64;
/// Words before the flags: LORA_SYNC_FLAGS.
const FIRST_FLAG: u32 = 2;

fn devices() -> impl Strategy<Value = Device> {
    (prop::sample::select(vec![75, 80, 86, 90, 100, 120]), 1u32..=300)
        .prop_map(|(arch, sms)| Device::of_arch("a device", arch, sms))
}

fn dtypes() -> impl Strategy<Value = Dtype> {
    prop::sample::select(vec![Dtype::F16, Dtype::Bf16])
}

fn dimension() -> impl Strategy<Value = usize> {
    prop_oneof![3 => 1..=300_usize, 3 => 1..=20_000_usize, 1 => 1..=MAX_DIMENSION]
}

fn shapes() -> impl Strategy<Value = LoraShape> {
    let rank = prop_oneof![1 => Just(0), 6 => 1..=300_usize, 1 => 1..=MAX_DIMENSION];
    (dimension(), dimension(), dimension(), rank).prop_map(|(m, n, k, r)| LoraShape { m, n, k, r })
}

/// What these tests look at; tests/plan_sm90.rs has the other family.
fn portable() -> Options {
    Options::default().with_family(Family::Portable)
}

fn forward_params(params: &Params) -> LoraForwardParams {
    match params {
        Params::Forward(params) => *params,
        other => panic!("the plan of a portable forward holds {other:?}"),
    }
}

fn backward_params(params: &Params) -> LoraBackwardParams {
    match params {
        Params::Backward(params) => *params,
        other => panic!("the plan of a portable backward holds {other:?}"),
    }
}

/// Byte ranges of the workspace must be aligned, disjoint, after the synchronisation words and inside.
fn check_regions(plan: &Plan, mut regions: Vec<(u64, u64)>) {
    regions.push((WORKSPACE, SYNC_BYTES as u64));
    regions.sort_unstable();
    for window in regions.windows(2) {
        assert!(window[0].0 + window[0].1 <= window[1].0, "regions overlap: {regions:?}");
    }
    for (start, bytes) in regions {
        assert!(start.is_multiple_of(WORKSPACE_ALIGN), "{start:#x}");
        assert!(start + bytes <= WORKSPACE + plan.workspace_bytes() as u64, "{start:#x} + {bytes}");
    }
}

/// Limits of the device, and the block of rows that belongs to the launch.
fn check_launch(plan: &Plan, device: &Device, dtype: Dtype, operation: &str) -> (fused_lora::plan::Launch, u64) {
    let launch = plan.launch(WORKSPACE, plan.workspace_bytes()).expect("a launch");
    let (size, block) = match launch.block {
        [256, 1, 1] => ("large", 128),
        [128, 1, 1] => ("small", 64),
        other => panic!("no tile shape has {other:?} threads"),
    };
    assert_eq!(launch.image, format!("portable_{operation}"));
    assert_eq!(launch.kernel, format!("lora_{operation}_{}_{size}", dtype.name()));
    assert_eq!(launch.cluster, [1, 1, 1]);
    assert_eq!(launch.grid[1..], [1, 1]);
    assert!((1..=device.sms * 4).contains(&launch.grid[0]), "{launch:?}");
    // Static shared memory and what the system reserves come on top.
    assert!(launch.shared_bytes + 1152 <= device.shared_per_block, "{launch:?}");
    let ctas_per_sm = launch.grid[0].div_ceil(device.sms);
    assert!(ctas_per_sm == 1 || ctas_per_sm * (launch.shared_bytes + 1152) <= device.shared_per_sm, "{launch:?}");
    assert!(ctas_per_sm * launch.block[0] <= if device.arch == 75 { 1024 } else { 1536 }, "{launch:?}");
    (launch, block)
}

fn assert_covers(what: &str, blocks: u32, block: u64, extent: usize) {
    let (blocks, extent) = (u64::from(blocks), extent as u64);
    assert!(
        blocks * block >= extent && (blocks - 1) * block < extent,
        "{blocks} blocks of {block} for {what} {extent}"
    );
}

/// The flags of all M-blocks lie between the first flag and `end`, and the area holds all words.
fn check_flags(m_blocks: u32, flag_shift: u32, end: u32, sync_words: u32) {
    assert_eq!(FIRST_FLAG + ((m_blocks - 1) >> flag_shift) + 1, end);
    assert!(sync_words >= end && sync_words as usize * 4 <= SYNC_BYTES, "{sync_words} words");
}

fn check_forward(op: &raw::Forward, shape: LoraShape, device: &Device) {
    let plan = Plan::forward_with(op, device, portable()).expect("a plan");
    assert_eq!(plan, Plan::forward_with(op, device, portable()).expect("a plan"), "the same call gives the same plan");
    assert_eq!(plan.shape(), shape);
    let (launch, block) = check_launch(&plan, device, op.dtype, "forward");
    let p = forward_params(&launch.params);
    let LoraShape { m, n, k, r } = shape;
    assert_eq!((p.m as usize, p.n as usize, p.k as usize, p.r as usize), (m, n, k, r));
    assert_eq!((p.x.ptr, p.w.ptr, p.a.ptr, p.b.ptr, p.y.ptr), (op.x.ptr, op.w.ptr, op.a.ptr, op.b.ptr, op.y.ptr));
    assert_eq!((p.sync, p.scale), (WORKSPACE, op.scale));
    assert_covers("M", p.m_blocks, block, m);
    assert_covers("N", p.n_blocks, block, n);
    assert_eq!(u64::from(p.h_units), u64::from(p.m_blocks) * (r as u64).div_ceil(NARROW));
    assert_eq!(u64::from(p.units), u64::from(p.h_units) + u64::from(p.m_blocks) * u64::from(p.n_blocks));
    assert!(launch.grid[0] <= p.units && p.units.checked_add(launch.grid[0]).is_some(), "tickets fit in 32 bits");
    assert!(p.group_m >= 1);
    check_flags(p.m_blocks, p.flag_shift, p.sync_words, p.sync_words);
    match op.h {
        Some(h) => {
            assert_eq!((p.h.ptr, p.h.row_stride), (h.ptr, h.row_stride as i64));
            check_regions(&plan, vec![]);
        }
        None if r == 0 => check_regions(&plan, vec![]),
        None => {
            let stride = p.h.row_stride as u64;
            assert!(stride >= r as u64 && stride.is_multiple_of(8), "rows of h start on 16 bytes");
            check_regions(&plan, vec![(p.h.ptr, m as u64 * stride * 2)]);
        }
    }
}

fn check_backward(op: &raw::Backward, shape: LoraShape, device: &Device) {
    let plan = Plan::backward_with(op, device, portable()).expect("a plan");
    assert_eq!(plan, Plan::backward_with(op, device, portable()).expect("a plan"), "the same call gives the same plan");
    let (launch, block) = check_launch(&plan, device, op.dtype, "backward");
    let p = backward_params(&launch.params);
    let LoraShape { m, n, k, r } = shape;
    assert_eq!((p.m as usize, p.n as usize, p.k as usize, p.r as usize), (m, n, k, r));
    assert_covers("M", p.m_blocks, block, m);
    assert_covers("N", p.n_blocks, block, n);
    assert_covers("K", p.k_blocks, block, k);
    let [m_blocks, n_blocks, k_blocks, chunks] = [p.m_blocks, p.n_blocks, p.k_blocks, p.chunks].map(u64::from);
    let r_blocks = (r as u64).div_ceil(NARROW);
    let (wants_da, wants_db) = (op.da.is_some() && r > 0, op.db.is_some() && r > 0);
    let wants_dh = r > 0 && (op.dx.is_some() || wants_da);
    let db_tiles = if wants_db { n_blocks * r_blocks } else { n_blocks * u64::from(op.dbias.is_some()) };
    let da_tiles = if wants_da { k_blocks * r_blocks } else { 0 };
    let mut end = if wants_dh { m_blocks * r_blocks } else { 0 };
    assert_eq!(u64::from(p.dh_units), end);
    end += if op.dx.is_some() { m_blocks * k_blocks } else { 0 };
    assert_eq!(u64::from(p.dx_end), end);
    end += db_tiles * chunks;
    assert_eq!(u64::from(p.db_end), end);
    end += da_tiles * chunks;
    assert_eq!(u64::from(p.units), end);
    assert!(p.units.checked_add(launch.grid[0]).is_some(), "tickets fit in 32 bits");

    assert_covers("tokens", p.chunks, u64::from(p.chunk_rows), m);
    assert!(u64::from(p.chunk_rows).is_multiple_of(block), "a chunk is whole blocks: its dh flags are");
    check_flags(p.m_blocks, p.flag_shift, p.counters, p.sync_words);
    let mut regions = Vec::new();
    if chunks > 1 {
        assert_eq!(u64::from(p.sync_words), u64::from(p.counters) + db_tiles + da_tiles);
        // Per thread: two sums and four registers for each eight columns (reduce_chunks in backward.cu).
        let registers = 2 + 4 * (r as u64).min(NARROW).div_ceil(8);
        assert!(u64::from(p.partial_stride) >= registers * u64::from(launch.block[0]));
        regions.push((p.partials, 4 * u64::from(p.partial_stride) * chunks * (db_tiles + da_tiles)));
    } else {
        assert_eq!((p.sync_words, p.partials), (p.counters, 0));
    }
    if wants_dh {
        let stride = p.dh.row_stride as u64;
        assert!(stride >= r as u64 && stride.is_multiple_of(8), "rows of dh start on 16 bytes");
        regions.push((p.dh.ptr, m as u64 * stride * 2));
    }
    check_regions(&plan, regions);
    let pointer = |wanted: bool, gradient: Option<raw::Gradient>| match gradient {
        Some(gradient) if wanted => gradient.matrix.ptr,
        _ => 0,
    };
    assert_eq!((p.da.ptr, p.db.ptr), (pointer(wants_da, op.da), pointer(wants_db, op.db)));
    assert_eq!((p.dx.ptr, p.dbias), (op.dx.map_or(0, |dx| dx.ptr), pointer(true, op.dbias)));
}

/// The errors that a shape alone can cause: the arguments or the tiles are more than 64 or 32 bits can count.
fn is_too_large<T>(result: &Result<T, Error>) -> bool {
    matches!(result, Err(Error::TooLarge { .. }))
}

/// Arguments of the largest shapes can reach where these tests place the workspace; a launch says so.
fn is_in_the_way(plan: &Plan, matrices: impl IntoIterator<Item = raw::Matrix>) -> bool {
    let workspace = u128::from(WORKSPACE)..u128::from(WORKSPACE) + plan.workspace_bytes() as u128;
    let reaches = matrices.into_iter().any(|matrix| {
        let from = u128::from(matrix.ptr);
        let to = from + 2 * matrix.rows as u128 * matrix.row_stride as u128;
        from < to && from < workspace.end && workspace.start < to
    });
    let launch = plan.launch(WORKSPACE, plan.workspace_bytes());
    assert!(!reaches || matches!(launch, Err(Error::Overlap { output: "workspace", .. })), "{launch:?}");
    reaches
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn forward_plans_keep_their_promises(
        shape in shapes(), dtype in dtypes(), device in devices(), keeps_h: bool, has_bias: bool,
    ) {
        let mut op = ops::forward(dtype, shape);
        if !has_bias {
            op.bias = None;
        }
        if keeps_h {
            op.h = Some(raw::Matrix::new(1 << 61, shape.m, shape.r));
        }
        match Plan::forward_with(&op, &device, portable()) {
            Ok(plan) if is_in_the_way(&plan, [op.x, op.w, op.a, op.b, op.y].into_iter().chain(op.h)) => {}
            Ok(_) => check_forward(&op, shape, &device),
            // Addresses given out past the end of the address space, or h in the way of y.
            Err(Error::TooLarge { .. } | Error::Overlap { .. } | Error::NullPointer { .. }) => {
                prop_assert!(shape.m.max(shape.n).max(shape.k).max(shape.r) > 20_000);
            }
            Err(error) => prop_assert!(false, "{error}"),
        }
    }

    #[test]
    fn backward_plans_keep_their_promises(
        shape in shapes(), dtype in dtypes(), device in devices(), outputs in 1u32..16,
    ) {
        let mut op = ops::backward(dtype, shape);
        op.dx = op.dx.filter(|_| outputs & 1 != 0);
        op.da = op.da.filter(|_| outputs & 2 != 0);
        op.db = op.db.filter(|_| outputs & 4 != 0);
        op.dbias = op.dbias.filter(|_| outputs & 8 != 0);
        op.accumulate.da = outputs & 2 != 0;
        let inputs = [op.dy, op.w, op.a, op.b].into_iter().chain(op.x).chain(op.h);
        // As if of 16-bit elements.
        let rows = |gradient: raw::Gradient| gradient.matrix.rows * if gradient.f32 { 2 } else { 1 };
        let gradients = [op.da, op.db, op.dbias].into_iter().flatten();
        let outputs = gradients.map(|gradient| raw::Matrix { rows: rows(gradient), ..gradient.matrix }).chain(op.dx);
        match Plan::backward_with(&op, &device, portable()) {
            Ok(plan) if is_in_the_way(&plan, inputs.into_iter().chain(outputs)) => {}
            Ok(_) => check_backward(&op, shape, &device),
            Err(Error::TooLarge { .. } | Error::Overlap { .. } | Error::NullPointer { .. }) => {
                prop_assert!(shape.m.max(shape.n).max(shape.k).max(shape.r) > 20_000);
            }
            Err(error) => prop_assert!(false, "{error}"),
        }
    }

    /// Tokens far beyond a chunk: several chunks, whatever the device.
    #[test]
    fn long_reductions_are_cut(m in 20_000..2_000_000_usize, n in 1..300_usize, k in 1..300_usize, r in 1..40_usize,
                               dtype in dtypes(), device in devices()) {
        let (shape, op) = (LoraShape { m, n, k, r }, ops::backward(dtype, LoraShape { m, n, k, r }));
        check_backward(&op, shape, &device);
        let plan = Plan::backward_with(&op, &device, portable()).expect("a plan");
        let p = backward_params(&plan.launch(WORKSPACE, plan.workspace_bytes()).expect("a launch").params);
        // 600 tiles at most here: only a device with fewer SMs than half the tiles has nothing to gain.
        let tiles = p.n_blocks + p.k_blocks;
        prop_assert!(p.chunks > 1 || 2 * device.sms <= tiles, "{} chunk for {tiles} tiles", p.chunks);
    }

    /// Whatever numbers arrive, from devices to addresses: an answer, not a panic.
    #[test]
    fn nothing_panics(
        shape in shapes(), oversized in 0..32_usize,
        dtype in dtypes(), arch: u32, sms: u32, shared: [u32; 2], workspace: u64, bytes: usize,
        pointers: [u64; 9], strides: [usize; 9], replaced: u32,
    ) {
        let mut shape = shape;
        let dimensions = [&mut shape.m, &mut shape.n, &mut shape.k, &mut shape.r];
        if let Some(dimension) = dimensions.into_iter().nth(oversized) {
            *dimension = MAX_DIMENSION + 1;
        }
        let device = Device { name: String::new(), arch, sms, shared_per_block: shared[0], shared_per_sm: shared[1], peak: None };
        let mut forward = ops::forward(dtype, shape);
        forward.h = Some(raw::Matrix::new(1, shape.m, shape.r));
        let mut backward = ops::backward(dtype, shape);
        let is_replaced = |bit: usize| replaced >> bit & 1 != 0;
        for (index, name) in ["x", "w", "a", "b", "bias", "h", "y"].iter().enumerate() {
            let matrix = ops::forward_argument(&mut forward, name);
            matrix.ptr = if is_replaced(index) { pointers[index] & !1 } else { matrix.ptr };
            matrix.row_stride = if is_replaced(index + 16) { strides[index] } else { matrix.row_stride };
        }
        for (index, name) in ["dy", "w", "x", "h", "dx", "da", "db", "dbias", "b"].iter().enumerate() {
            let matrix = ops::backward_argument(&mut backward, name);
            matrix.ptr = if is_replaced(index) { pointers[index] & !3 } else { matrix.ptr };
            matrix.row_stride = if is_replaced(index + 16) { strides[index] } else { matrix.row_stride };
        }
        for device in [device, Device::of_arch("a device", 90, 132)] {
            for plan in [Plan::forward(&forward, &device), Plan::backward(&backward, &device)].into_iter().flatten() {
                let _ = (plan.explain(), plan.launch(workspace & !255, bytes));
            }
        }
    }
}

#[test]
fn the_largest_shapes_are_answered() {
    let device = Device::of_arch("a device", 90, 132);
    let max = MAX_DIMENSION;
    for (m, n, k, r) in [(max, 1, 1, 1), (1, max, 1, 1), (1, 1, max, 1), (1, 1, 1, max), (max, 64, 64, 16)] {
        let shape = LoraShape { m, n, k, r };
        check_forward(&ops::forward(Dtype::F16, shape), shape, &device);
        check_backward(&ops::backward(Dtype::F16, shape), shape, &device);
    }
    for (m, n, k, r) in [(max, max, max, max), (max, max, 1, 1), (max, 1, 1, max)] {
        let shape = LoraShape { m, n, k, r };
        assert!(is_too_large(&Plan::forward(&ops::forward(Dtype::F16, shape), &device)), "{shape:?}");
        assert!(is_too_large(&Plan::backward(&ops::backward(Dtype::F16, shape), &device)), "{shape:?}");
    }
    // Legal arguments whose da and db tiles outnumber what 64 bits of partial sums could hold.
    let side = 1_518_500_249; // the square is just below 2^61
    let (n, k, r) = (side, side, side);
    let mut op = ops::backward(Dtype::F16, LoraShape { m: 2048, n, k, r });
    let at = |ptr, rows, cols| raw::Matrix::new(ptr, rows, cols);
    (op.a, op.b, op.w) = (at(1 << 61, r, k), at(1 << 61, n, r), at(1 << 61, n, k));
    (op.dy, op.x, op.h) = (at(1 << 46, 2048, n), Some(at(1 << 45, 2048, k)), Some(at(1 << 44, 2048, r)));
    op.da = Some(raw::Gradient { matrix: at(6 << 60, r, k), f32: false });
    op.db = Some(raw::Gradient { matrix: at(0xa << 60, n, r), f32: false });
    (op.dx, op.dbias) = (None, None);
    op.check().expect("disjoint arguments");
    assert!(is_too_large(&Plan::backward_with(&op, &device, portable())));
}

#[test]
fn what_has_no_kernel_is_refused() {
    let shape = LoraShape { m: 64, n: 64, k: 64, r: 8 };
    let device = Device::of_arch("a device", 90, 132);
    let f32_error = Error::Dtype { got: Dtype::F32, backend: "the CUDA kernels", expected: "F16, Bf16" };
    assert_eq!(Plan::forward(&ops::forward(Dtype::F32, shape), &device), Err(f32_error.clone()));
    assert_eq!(Plan::backward(&ops::backward(Dtype::F32, shape), &device), Err(f32_error));
    let refused = |device: &Device| {
        let error = Plan::forward(&ops::forward(Dtype::F16, shape), device).expect_err("no plan");
        assert_eq!(Plan::backward(&ops::backward(Dtype::F16, shape), device), Err(error.clone()));
        error
    };
    for arch in [0, 61, 70, 72, 74] {
        let error = refused(&Device::of_arch("old", arch, 80));
        assert!(matches!(error, Error::UnsupportedArch { got, .. } if got == arch), "{error}");
    }
    // No such GPU exists, but the fields of a Device are public.
    let none = refused(&Device { sms: 0, ..device.clone() });
    assert_eq!(none, Error::ZeroDimension { arg: "device", axis: "SMs" });
    let many = refused(&Device { sms: u32::MAX, ..device.clone() });
    assert_eq!(many, Error::TooLarge { what: "the number of SMs", got: u32::MAX.into(), limit: 1 << 18 });
    let small = refused(&Device { shared_per_block: 48 << 10, ..device });
    assert_eq!(small, Error::TooLarge { what: "the shared memory of a CTA", got: 50304, limit: 49152 });
}

#[test]
fn a_wrong_workspace_is_refused() {
    let device = Device::of_arch("a device", 90, 132);
    let shape = LoraShape { m: 4096, n: 128, k: 128, r: 8 };
    let plans = [
        Plan::forward(&ops::forward(Dtype::F16, shape), &device).expect("a plan"),
        Plan::backward(&ops::backward(Dtype::F16, shape), &device).expect("a plan"),
    ];
    for plan in plans {
        let needed = plan.workspace_bytes();
        assert!(needed > SYNC_BYTES, "h or dh is in it");
        assert_eq!(plan.launch(256, needed - 1), Err(Error::Workspace { got: needed - 1, needed }));
        assert_eq!(plan.launch(256, 0), Err(Error::Workspace { got: 0, needed }));
        assert_eq!(plan.launch(0, needed), Err(Error::NullPointer { arg: "workspace" }));
        let misaligned = Error::Misaligned { arg: "workspace", address: 256 + 128, align: 256 };
        assert_eq!(plan.launch(256 + 128, needed), Err(misaligned));
        let limit = u64::MAX - needed as u64;
        let got = limit + 1; // a multiple of 256, as the size is
        assert_eq!(plan.launch(got, needed), Err(Error::TooLarge { what: "the address of the workspace", got, limit }));
        assert!(plan.launch(got - 256, needed).is_ok());
    }
}

/// A workspace is scratch: no argument may lie in it.
#[test]
fn a_workspace_on_an_argument_is_refused() {
    let device = Device::of_arch("a device", 90, 132);
    let shape = LoraShape { m: 64, n: 128, k: 128, r: 8 };
    let op = ops::forward(Dtype::F16, shape);
    let plan = Plan::forward_with(&op, &device, portable()).expect("a plan");
    let needed = plan.workspace_bytes();
    assert_eq!(plan.launch(op.y.ptr, needed), Err(Error::Overlap { output: "workspace", other: "y" }));
    let before = op.x.ptr - needed as u64;
    assert!(plan.launch(before, needed).is_ok());
    assert_eq!(plan.launch(before + 256, needed), Err(Error::Overlap { output: "workspace", other: "x" }));
}

#[test]
fn explain_names_the_kernel_the_grid_and_every_slow_operand() {
    let shape = LoraShape { m: 100, n: 200, k: 304, r: 16 };
    let device = Device::of_arch("Test GPU", 75, 40);
    let mut op = ops::forward(Dtype::Bf16, shape);
    op.x.ptr += 2;
    (op.w.ptr, op.w.row_stride) = (1 << 40, 305);
    let plan = Plan::forward(&op, &device).expect("a plan");
    let launch = plan.launch(WORKSPACE, plan.workspace_bytes()).expect("a launch");
    let text = plan.explain();
    for part in [
        "forward Bf16, M=100 N=200 K=304 R=16, on Test GPU".to_owned(),
        launch.kernel.to_owned(),
        format!("grid       {} CTAs", launch.grid[0]),
        format!("workspace  {} bytes", plan.workspace_bytes()),
        format!("x is read element by element: its address {:#x} is not a multiple of 16 bytes", op.x.ptr),
        "w is read element by element: its row stride of 305 elements is not a multiple of 8 (16 bytes)".to_owned(),
        "sm_75 has no bf16 tensor instruction".to_owned(),
    ] {
        assert!(text.contains(&part), "`{part}` is missing from\n{text}");
    }
    assert_eq!(text.matches("element by element").count(), 2, "{text}");

    let mut op = ops::backward(Dtype::F16, shape);
    let slow = ["dy", "w", "a", "b", "x", "h"];
    for name in slow {
        ops::backward_argument(&mut op, name).ptr += 2;
    }
    let device = Device::of_arch("Test GPU", 90, 132);
    let explain = |op: &raw::Backward| Plan::backward(op, &device).expect("a plan").explain();
    let text = explain(&op);
    for name in slow {
        assert!(text.contains(&format!("{name} is read element by element: its address")), "{text}");
    }
    assert!(text.contains("reduction") && text.contains("the shape with the shortest predicted time"), "{text}");
    let forced = Options::default().with_tile(TileSize::Small);
    let text = Plan::backward_with(&raw::Backward { da: None, db: None, dbias: None, ..op }, &device, forced)
        .expect("a plan")
        .explain();
    assert!(
        !text.contains("reduction") && text.contains("64 x 64 x 32") && text.contains("the shape asked for"),
        "{text}"
    );
    // What no requested output reads is not slow.
    let text = explain(&raw::Backward { dx: None, da: None, dbias: None, ..op });
    assert_eq!(text.matches("element by element").count(), 2, "{text}");
    assert!(text.contains("note       dy is read") && text.contains("note       h is read"), "{text}");
    // Nor is anything said against what the fastest kernels take.
    let shape = LoraShape { m: 4096, n: 2048, k: 2048, r: 16 };
    assert!(!explain(&ops::backward(Dtype::F16, shape)).contains("note"));
}
