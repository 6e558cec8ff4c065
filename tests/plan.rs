//! The planner, through its public API: what every plan promises the kernels, for any shape and device.
#![allow(clippy::panic)] // helpers of tests fail as tests do

mod common;

use common::legal::{self, WORKSPACE};
use common::raw as ops;
use fused_lora::plan::{Device, Family, Options, Params, Plan, SYNC_BYTES, TileSize};
use fused_lora::{Dtype, Error, LoraShape, MAX_DIMENSION, raw};
use proptest::prelude::*;

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

fn check_forward(op: &raw::Forward, shape: LoraShape, device: &Device) {
    let plan = Plan::forward_with(op, device, portable()).expect("a plan");
    assert_eq!(plan, Plan::forward_with(op, device, portable()).expect("a plan"), "the same call gives the same plan");
    assert_eq!((plan.family(), plan.shape()), (Family::Portable, shape));
    legal::forward(&plan, op, device, &portable(), WORKSPACE);
}

fn check_backward(op: &raw::Backward, shape: LoraShape, device: &Device) {
    let plan = Plan::backward_with(op, device, portable()).expect("a plan");
    assert_eq!(plan, Plan::backward_with(op, device, portable()).expect("a plan"), "the same call gives the same plan");
    assert_eq!((plan.family(), plan.shape()), (Family::Portable, shape));
    legal::backward(&plan, op, device, &portable(), WORKSPACE);
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

    /// One to four projections that share x, some without ranks, each with outputs of its own.
    #[test]
    fn shared_plans_keep_their_promises(
        m in 1..=9000_usize, k in 1..=5000_usize, parts in prop::collection::vec((1..=5000_usize, 0..=30_usize), 1..=4), dtype in dtypes(),
        device in devices(), keeps_h: bool, outputs: u32,
    ) {
        let mut forward = ops::forward_shared(dtype, m, k, &parts);
        forward.h = keeps_h.then(|| raw::Matrix::new(1 << 61, m, forward.a.rows));
        let mut backward = ops::backward_shared(dtype, m, k, &parts);
        let wants = |bit: usize| outputs >> bit & 1 != 0;
        backward.da = backward.da.filter(|_| wants(0));
        // At least dx is asked for.
        backward.dx = backward.dx.filter(|_| wants(1) || (2..10).all(|bit| !wants(bit)));
        for (at, of) in backward.projections.iter_mut().enumerate() {
            of.db = of.db.filter(|_| wants(2 + at));
            of.dbias = of.dbias.filter(|_| wants(6 + at));
        }
        let is_asked = backward.check().is_ok();
        match Plan::forward_shared_with(&forward, &device, portable()) {
            Ok(plan) => {
                prop_assert_eq!(plan.family(), Family::Portable);
                legal::forward_shared(&plan, &forward, &device, &portable(), WORKSPACE);
            }
            Err(error) => prop_assert!(false, "{}", error),
        }
        match Plan::backward_shared_with(&backward, &device, portable()) {
            Ok(plan) => {
                prop_assert_eq!(plan.family(), Family::Portable);
                legal::backward_shared(&plan, &backward, &device, &portable(), WORKSPACE);
            }
            Err(Error::NoOutput { .. }) => prop_assert!(!is_asked),
            Err(error) => prop_assert!(false, "{}", error),
        }
    }

    /// Tokens far beyond a chunk: several chunks, whatever the device.
    #[test]
    fn long_reductions_are_cut(m in 20_000..2_000_000_usize, n in 1..300_usize, k in 1..300_usize, r in 1..40_usize,
                               dtype in dtypes(), device in devices()) {
        let (shape, op) = (LoraShape { m, n, k, r }, ops::backward(dtype, LoraShape { m, n, k, r }));
        check_backward(&op, shape, &device);
        let plan = Plan::backward_with(&op, &device, portable()).expect("a plan");
        let launch = plan.launch(WORKSPACE, plan.workspace_bytes()).expect("a launch");
        let Params::Backward(p) = launch.params else { panic!("{launch:?}") };
        // 600 tiles at most here: only a device with fewer SMs than half the tiles has nothing to gain.
        let tiles = p.projections[0].n_blocks + p.k_blocks;
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

/// q, k and v, gate and up: one launch is predicted to take no longer than one for each, in either family, and its floor is lower by
/// the x that is read once.
#[test]
fn sharing_x_is_never_predicted_to_cost() {
    let layers: [&[(usize, usize)]; 3] = [
        &[(4096, 16), (1024, 16), (1024, 16)],
        &[(14336, 64), (14336, 64)],
        &[(3584, 8), (512, 0), (512, 8), (512, 8)],
    ];
    for device in ["h200", "a100", "l4"].map(|name| Device::named(name).expect("it is in the table")) {
        for (parts, m) in layers.iter().flat_map(|&parts| [64, 2048, 8192].map(|m| (parts, m))) {
            let k = 4096;
            let time = |plan: Result<Plan, Error>| plan.expect("a plan").predicted_microseconds().expect("it predicts");
            let single = |&(n, r): &(usize, usize)| LoraShape { m, n, k, r };
            let forward = Plan::forward_shared(&ops::forward_shared(Dtype::Bf16, m, k, parts), &device);
            let backward = Plan::backward_shared(&ops::backward_shared(Dtype::Bf16, m, k, parts), &device);
            let [forwards, backwards] = [true, false].map(|is_forward| {
                let of = |shape| match is_forward {
                    true => time(Plan::forward(&ops::forward(Dtype::Bf16, shape), &device)),
                    false => time(Plan::backward(&ops::backward(Dtype::Bf16, shape), &device)),
                };
                parts.iter().map(single).map(of).sum::<f64>()
            });
            let text = forward.as_ref().expect("a plan").explain();
            assert!(
                text.contains(&format!("shared     {} projections of one x: N = {}", parts.len(), parts[0].0)),
                "{text}"
            );
            let floor = forward.as_ref().expect("a plan").floor();
            let alone =
                |part| Plan::forward(&ops::forward(Dtype::Bf16, single(part)), &device).expect("a plan").floor();
            let sum = parts.iter().map(alone).fold((0.0, 0.0), |sum, floor| (sum.0 + floor.flops, sum.1 + floor.bytes));
            assert_eq!((floor.flops, floor.bytes), (sum.0, sum.1 - ((parts.len() - 1) * m * k * 2) as f64));
            let (forward, backward) = (time(forward), time(backward));
            assert!(forward <= forwards, "{} M={m} {parts:?}: {forward} for {forwards}", device.name);
            assert!(backward <= backwards, "{} M={m} {parts:?}: {backward} for {backwards}", device.name);
        }
    }
}
