//! The planner's Hopper family, through its public API: what every plan promises the kernels, and when there is none.
#![allow(clippy::panic)] // helpers of tests fail as tests do

mod common;

use common::legal::{self, WORKSPACE};
use common::raw as ops;
use fused_lora::plan::{Device, Family, Options, Plan, TileSize};
use fused_lora::{Dtype, Error, LoraShape, MAX_DIMENSION, raw};
use proptest::prelude::*;

const TILES: [TileSize; 3] = [TileSize::Sm90N256, TileSize::Sm90N192, TileSize::Sm90N128];

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
        options.tile = tile;
        (options.cluster, options.bundle, options.chunks, options.group_m) = (cluster, bundle, chunks, group_m);
        options
    })
}

fn check_forward(plan: &Plan, op: &raw::Forward, device: &Device, options: &Options) {
    assert_eq!(plan.family(), Family::Sm90);
    legal::forward(plan, op, device, options, WORKSPACE);
}

fn check_backward(plan: &Plan, op: &raw::Backward, device: &Device, options: &Options) {
    assert_eq!(plan.family(), Family::Sm90);
    legal::backward(plan, op, device, options, WORKSPACE);
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
            Ok(plan) => check_forward(&plan, &op, &device, &options),
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
            Ok(plan) => check_backward(&plan, &op, &device, &options),
            Err(error) => {
                prop_assert!(is_out_of_room(&error, shape) || is_impossible(&error, &options, &device), "{error}");
            }
        }
    }

    /// One to four projections that share x, some without ranks, each with outputs of its own.
    #[test]
    fn shared_plans_keep_their_promises(
        m in 1..=9000_usize, k in 1..=600_usize, parts in prop::collection::vec((1..=600_usize, 0..=30_usize), 1..=4), dtype in dtypes(),
        device in devices(), options in choices(), keeps_h: bool, outputs: u32,
    ) {
        let parts: Vec<_> = parts.into_iter().map(|(n, r)| (n * 8, r * 8)).collect();
        let mut forward = ops::forward_shared(dtype, m, k * 8, &parts);
        forward.h = keeps_h.then(|| raw::Matrix::new(1 << 61, m, forward.a.rows));
        let mut backward = ops::backward_shared(dtype, m, k * 8, &parts);
        let wants = |bit: usize| outputs >> bit & 1 != 0;
        backward.da = backward.da.filter(|_| wants(0));
        // At least dx is asked for.
        backward.dx = backward.dx.filter(|_| wants(1) || (2..10).all(|bit| !wants(bit)));
        for (at, of) in backward.projections.iter_mut().enumerate() {
            of.db = of.db.filter(|_| wants(2 + at));
            of.dbias = of.dbias.filter(|_| wants(6 + at));
        }
        let is_asked = backward.check().is_ok();
        match Plan::forward_shared_with(&forward, &device, options) {
            Ok(plan) => {
                prop_assert_eq!(plan.family(), Family::Sm90);
                legal::forward_shared(&plan, &forward, &device, &options, WORKSPACE);
            }
            Err(error) if is_impossible(&error, &options, &device) => {}
            Err(error) => prop_assert!(false, "{}", error),
        }
        match Plan::backward_shared_with(&backward, &device, options) {
            Ok(plan) => {
                prop_assert_eq!(plan.family(), Family::Sm90);
                legal::backward_shared(&plan, &backward, &device, &options, WORKSPACE);
            }
            Err(Error::NoOutput { .. }) => prop_assert!(!is_asked),
            Err(error) if is_impossible(&error, &options, &device) => {}
            Err(error) => prop_assert!(false, "{}", error),
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
            launch.parameter_bytes(legal::encode).unwrap_or_else(|error| panic!("{error}: {launch:?}"));
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
    check_forward(&plan, &op, &device, &sm90);
    let op = ops::backward(Dtype::F16, shape);
    let op = raw::Backward { w: moved(op.w), dx: None, da: None, ..op };
    check_backward(&Plan::backward_with(&op, &device, sm90).expect("a plan"), &op, &device, &sm90);
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
