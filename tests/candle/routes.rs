//! Many adapters in one batch: each row as with its adapter alone, in the op and in the layer; and what they refuse.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{AdamW, Optimizer, VarBuilder, VarMap};
use fused_lora::Error;
use fused_lora::candle::{Bank, Dropout, LoraConfig, LoraLinear, Routes, Training, cause, lora_train};
use fused_lora::reference::{self, Inputs, Mat};
use fused_lora::{Routing, Slot};

use crate::case::{Case, Results, Rng, bits, mat};

const ALL: [bool; 3] = [true; 3];
const K: usize = 24;
const N: usize = 11;
/// Ranks of the adapters that lie side by side: without a gap, with one, and the last past 64 ranks.
const SLOTS: [Slot; 3] = [
    Slot { first_rank: 0, ranks: 8, scale: 2.0 },
    Slot { first_rank: 8, ranks: 3, scale: -0.5 },
    Slot { first_rank: 16, ranks: 60, scale: 1.25 },
];
const R: usize = 76;

/// Every row another adapter, and now and then none.
fn mixed(rows: usize) -> Vec<Option<usize>> {
    (0..rows).map(|row| Some(row * 7 % 4).filter(|&id| id < SLOTS.len())).collect()
}

fn routing(rows: usize) -> Routing {
    Routing::new(&SLOTS, &mixed(rows)).expect("a table")
}

fn routes(rows: usize) -> Routes {
    Routes::new(routing(rows), &Device::Cpu).expect("a table")
}

fn case(tokens: &[usize], storage: DType, adapter: DType) -> Result<Case> {
    Case::new(tokens, (N, K, R), storage, adapter)
}

fn run(case: &Case, training: Training<'_>) -> Result<Results> {
    case.run(ALL, |x, w, a, b, scale, bias| lora_train(x, w, a, b, scale, bias, training))
}

fn rows_of(case: &Case) -> usize {
    case.x.elem_count() / K
}

/// The factors of h, M × R.
fn gate(case: &Case) -> Mat {
    let m = rows_of(case);
    reference::gate(routing(m).words(), m, R)
}

/// x Wᵀ + s · ((x Aᵀ) ∘ gate) Bᵀ + bias, as one writes it without the op.
fn composed(case: &Case) -> impl Fn(&Tensor, &Tensor, &Tensor, &Tensor, f64, Option<&Tensor>) -> Result<Tensor> {
    let gate = Tensor::from_vec(gate(case).data, (rows_of(case), R), &Device::Cpu);
    move |x, w, a, b, scale, bias| {
        let (a, b) = (a.to_dtype(x.dtype())?, b.to_dtype(x.dtype())?);
        let gate = gate.as_ref().expect("a gate").to_dtype(x.dtype())?.to_device(x.device())?;
        let dims = [&x.dims()[..x.rank() - 1], &[N]].concat();
        let x = x.reshape(((), K))?;
        let h = (x.matmul(&a.t()?)? * gate)?.affine(scale, 0.0)?;
        let y = (x.matmul(&w.t()?)? + h.matmul(&b.t()?)?)?;
        bias.map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))?.reshape(dims)
    }
}

#[test]
fn every_row_goes_through_its_adapter() -> Result<()> {
    let own = [DType::F32, DType::BF16, DType::F16].map(|dtype| (dtype, dtype));
    judge_all(&Device::Cpu, &[own[0], own[1], own[2], (DType::BF16, DType::F32)])
}

/// y and gradients; with h computed again the same bits.
pub fn judge_all(device: &Device, types: &[(DType, DType)]) -> Result<()> {
    for &(storage, adapter) in types {
        for tokens in [&[1][..], &[70], &[3, 43]] {
            let context = format!("{tokens:?} {storage:?} {adapter:?}");
            let case = case(tokens, storage, adapter)?.to_device(device)?;
            let routes = Routes::new(routing(rows_of(&case)), device)?;
            let training = Training { routes: Some(&routes), ..Training::default() };
            let ours = run(&case, training)?;
            let inputs = Inputs { gate: Some(gate(&case)), ..case.inputs() };
            case.judge_by(&inputs, &ours, (ALL, composed(&case)), &context);

            let again = run(&case, Training { recompute: true, ..training })?;
            for (kept, computed) in ours.gradients.iter().zip(&again.gradients) {
                assert_eq!(kept.as_ref().map(bits), computed.as_ref().map(bits), "{context}: h computed again");
            }
        }
    }
    Ok(())
}

/// The mask is that of the op without routes.
#[test]
fn with_dropout() -> Result<()> {
    let (p, seed, offset) = (0.4, 9, 3);
    let case = case(&[70], DType::F32, DType::F32)?;
    let routes = routes(70);
    let dropout = Some(Dropout { p, seed, offset });
    let ours = run(&case, Training { routes: Some(&routes), dropout, ..Training::default() })?;
    let keep = reference::keep(p, [seed, offset], 70, K);
    let inputs = Inputs { gate: Some(gate(&case)), keep: Some(keep), ..case.inputs() };
    let (h, y) = reference::forward(&inputs);
    let truth = reference::backward(&inputs, &h);
    let gradient = |at: usize| mat(ours.gradients[at].as_ref().expect("it is tracked"));
    for (name, got, truth) in [
        ("y", mat(&ours.y), y),
        ("dx", gradient(0), truth.dx),
        ("da", gradient(1), truth.da),
        ("db", gradient(2), truth.db),
    ] {
        let apart = got.plus(&truth.map(|v| -v)).norm() / truth.norm();
        assert!(apart < 1e-6, "{name}: {apart:e}");
    }
    Ok(())
}

/// f32 factors over 16 bits, read as they are: y and dx have one rounding, da and db nearly none.
#[test]
fn at_full_precision() -> Result<()> {
    judge_full(&Device::Cpu)
}

/// y, dx, da and db of the op.
pub fn judge_full(device: &Device) -> Result<()> {
    for (storage, limit) in [(DType::BF16, 2f64.powi(-17)), (DType::F16, 1e-6)] {
        let case = case(&[3, 43], storage, DType::F32)?.to_device(device)?;
        let routes = Routes::new(routing(129), device)?;
        let training = Training { routes: Some(&routes), full_precision: true, ..Training::default() };
        let ours = run(&case, training)?;
        let inputs = Inputs { a: mat(&case.a), b: mat(&case.b), gate: Some(gate(&case)), ..case.inputs() };
        let (h, y) = reference::forward(&inputs);
        let truth = reference::backward(&inputs, &h);
        let gradient = |at: usize| mat(ours.gradients[at].as_ref().expect("it is tracked"));
        let u = 0.6 * reference::unit_roundoff(crate::case::dtype(storage));
        for (name, got, truth, limit) in [
            ("y", mat(&ours.y), y, u),
            ("dx", gradient(0), truth.dx, u),
            ("da", gradient(1), truth.da, limit),
            ("db", gradient(2), truth.db, limit),
        ] {
            let apart = got.plus(&truth.map(|v| -v)).norm() / truth.norm();
            assert!(apart <= limit, "{storage:?} {name}: {apart:e}");
        }
    }
    Ok(())
}

#[test]
fn a_layer_at_full_precision() -> Result<()> {
    for storage in [DType::BF16, DType::F16] {
        let (layer, _) = layer(storage, [DType::F32; 3])?;
        let x = Rng(4).tensor(&[5, K], 1.0, storage)?;
        let bank = layer.bank(&NAMES)?;
        let routes = bank.routes(&[Some(2), Some(0), None, Some(1), Some(1)], &x)?;
        let rounded = layer.forward_routed(&x, &bank, &routes)?;
        let full = layer.with_full_precision();
        assert_ne!(bits(&full.forward_routed(&x, &bank, &routes)?), bits(&rounded));
    }
    Ok(())
}

const NAMES: [&str; 3] = ["a", "b", "c"];
const RANKS: [usize; 3] = [4, 20, 1];

/// A layer with three adapters of variables, A before B.
fn layer(storage: DType, adapters: [DType; 3]) -> Result<(LoraLinear, Vec<Var>)> {
    let mut rng = Rng(5);
    let bias = rng.tensor(&[N], 1.0, storage)?;
    let mut layer = LoraLinear::frozen(rng.tensor(&[N, K], 0.2, storage)?, Some(bias))?;
    let mut vars = Vec::new();
    for ((name, r), dtype) in NAMES.into_iter().zip(RANKS).zip(adapters) {
        let factors = [rng.tensor(&[r, K], 0.2, dtype)?, rng.tensor(&[N, r], 0.5, dtype)?];
        let [a, b] = factors.map(|factor| Var::from_tensor(&factor));
        let (a, b) = (a?, b?);
        layer.add_tensors(name, a.as_tensor().clone(), b.as_tensor().clone(), 16.0 / r as f64)?;
        vars.extend([a, b]);
    }
    Ok((layer, vars))
}

/// y, dx and the gradients of all variables of Σ y ∘ dy.
fn pass(y: &Tensor, x: &Var, dy: &Tensor, vars: &[Var]) -> Result<Vec<Option<Mat>>> {
    let store = (y * dy)?.sum_all()?.backward()?;
    Ok([Some(mat(y)), store.get(x).map(mat)]
        .into_iter()
        .chain(vars.iter().map(|var| store.get(var).map(mat)))
        .collect())
}

/// Rows in runs of one adapter, against the layer with that adapter active over those rows.
#[test]
fn a_layer_is_its_adapters_over_their_rows() -> Result<()> {
    let f32 = DType::F32;
    for (storage, adapters, limit) in
        [(f32, [f32; 3], 1e-6), (DType::BF16, [DType::BF16, f32, DType::BF16], 6e-3), (DType::F16, [f32; 3], 1e-3)]
    {
        let (mut layer, vars) = layer(storage, adapters)?;
        let mut rng = Rng(77);
        let x = Var::from_tensor(&rng.tensor(&[4, 8, K], 1.0, storage)?)?;
        let dy = rng.tensor(&[4, 8, N], 1.0, storage)?;
        let ids: Vec<_> = [Some(2), None, Some(0), Some(1)].into_iter().flat_map(|id| [id; 8]).collect();
        let bank = layer.bank(&NAMES)?;
        let routes = bank.routes(&ids, &x)?;
        let got = pass(&layer.forward_routed(&x, &bank, &routes)?, &x, &dy, &vars)?;

        let mut ys = Vec::new();
        for (at, id) in [Some("c"), None, Some("a"), Some("b")].into_iter().enumerate() {
            match id {
                Some(name) => layer.activate(name)?,
                None => layer.disable()?,
            }
            ys.push(layer.forward(&x.narrow(0, at, 1)?)?);
        }
        let expected = pass(&Tensor::cat(&ys, 0)?, &x, &dy, &vars)?;
        for (at, (got, expected)) in got.iter().zip(&expected).enumerate() {
            let (got, expected) = (got.as_ref().expect("it is there"), expected.as_ref().expect("it is there"));
            let apart = got.plus(&expected.map(|v| -v)).norm() / expected.norm();
            assert!(apart <= limit, "{storage:?} {adapters:?}, {at}: {apart:e}");
        }
    }
    Ok(())
}

#[test]
fn training_moves_the_adapters_that_rows_go_through() -> Result<()> {
    let (vars, device) = (VarMap::new(), Device::Cpu);
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &device);
    let mut layer = LoraLinear::frozen(Rng(1).tensor(&[N, K], 0.2, DType::F32)?, None)?.with_dropout(0.1, 3)?;
    for name in NAMES {
        layer.add(name, LoraConfig { r: 4, alpha: 8.0, rslora: false }, vb.pp(name))?;
    }
    let (x, aim) = (Rng(2).tensor(&[30, K], 1.0, DType::F32)?, Rng(3).tensor(&[30, N], 1.0, DType::F32)?);
    let ids: Vec<_> = (0..30).map(|row| [Some(0), None, Some(2)][row % 3]).collect();
    let routes = layer.bank(&NAMES)?.routes(&ids, &x)?;
    let loss = |train| {
        let bank = layer.bank(&NAMES)?; // of the variables as they are
        (layer.forward_routed_t(&x, &bank, &routes, train)? - &aim)?.sqr()?.mean_all()
    };
    let before: Vec<_> = NAMES.iter().map(|name| bits(layer.adapter(name).expect("an adapter").1)).collect();
    let mut optimizer = AdamW::new_lr(vars.all_vars(), 0.02)?;
    let first = loss(false)?.to_scalar::<f32>()?;
    for _ in 0..20 {
        optimizer.backward_step(&loss(true)?)?;
    }
    assert_eq!(layer.passes(), 20, "each pass has a mask of its own");
    let last = loss(false)?.to_scalar::<f32>()?;
    assert!(last < 0.8 * first, "{first} to {last}");
    let moved = NAMES.iter().zip(before).map(|(name, b)| bits(layer.adapter(name).expect("an adapter").1) != b);
    assert_eq!(moved.collect::<Vec<_>>(), [true, false, true]);
    Ok(())
}

/// What an optimiser does does not reach a bank, whatever its adapters' ranks.
#[test]
fn a_bank_is_a_copy() -> Result<()> {
    let mut layer = LoraLinear::frozen(Rng(1).tensor(&[N, K], 0.2, DType::F32)?, None)?;
    let x = Rng(2).tensor(&[1, K], 1.0, DType::F32)?;
    for r in [1, 15, 16, 32] {
        let [a, b] = [[r, K], [N, r]].map(|dims| Rng(r as u64).tensor(&dims, 1.0, DType::F32));
        let (a, b) = (Var::from_tensor(&a?)?, Var::from_tensor(&b?)?);
        let name = r.to_string();
        layer.add_tensors(&name, a.as_tensor().clone(), b.as_tensor().clone(), 1.0)?;
        let bank = layer.bank(&[&name])?;
        let routes = bank.routes(&[Some(0)], &x)?;
        let y = || layer.forward_routed(&x, &bank, &routes);
        let before = y()?;
        let store = before.sum_all()?.backward()?;
        assert!(store.get(&a).is_some() && store.get(&b).is_some(), "through the copy, rank {r}");
        a.set(&a.affine(3.0, 0.0)?)?;
        b.set(&b.affine(3.0, 0.0)?)?;
        assert_eq!(bits(&y()?), bits(&before), "rank {r}");
    }
    Ok(())
}

#[test]
fn no_adapter_at_all() -> Result<()> {
    let (layer, _) = layer(DType::F32, [DType::F32; 3])?;
    let x = Rng(4).tensor(&[5, K], 1.0, DType::F32)?;
    let bank = layer.bank(&[])?;
    assert_eq!((bank.rank(), bank.slots().len()), (0, 0));
    let y = layer.forward_routed(&x, &bank, &bank.routes(&[None; 5], &x)?)?;
    assert_eq!(bits(&y), bits(&layer.forward(&x)?));
    Ok(())
}

#[track_caller]
fn refused<T>(outcome: Result<T>) -> Error {
    let error = outcome.err().expect("a refusal");
    cause(&error).unwrap_or_else(|| panic!("not an error of the crate: {error}")).clone()
}

#[test]
fn what_the_op_refuses() -> Result<()> {
    let case = case(&[2, 9], DType::F32, DType::F32)?;
    let apply = |a: &Tensor, b: &Tensor, training| lora_train(&case.x, &case.w, a, b, 1.0, None, training);
    let of = |routes| Training { routes: Some(routes), ..Training::default() };
    let (fits, other) = (routes(18), routes(17));
    let (arg, axis) = ("routes", "rows");
    assert_eq!(refused(apply(&case.a, &case.b, of(&other))), Error::Dimension { arg, axis, got: 17, expected: 18 },);
    let (a, b) = (case.a.narrow(0, 0, 75)?, case.b.narrow(1, 0, 75)?);
    assert_eq!(
        refused(apply(&a, &b, of(&fits))),
        Error::TooLarge { what: "the ranks of `routes`", got: 76, limit: 75 },
    );
    let magnitude = case.bias.clone().expect("a bias");
    assert_eq!(
        refused(apply(&case.a, &case.b, Training { magnitude: Some(&magnitude), ..of(&fits) })),
        Error::Exclusive { arg: "magnitude", other: "routes" },
    );
    apply(&case.a, &case.b, of(&fits)).map(drop)
}

#[test]
fn what_a_layer_refuses() -> Result<()> {
    let (mut layer, _) = layer(DType::F32, [DType::F32; 3])?;
    let x = Rng(4).tensor(&[5, K], 1.0, DType::F32)?;
    let bank = layer.bank(&NAMES)?;
    let routes = |bank: &Bank, rows: usize| bank.routes(&vec![Some(0); rows], &x);
    let state = |error| match error {
        Error::State { operation, got, .. } => format!("{operation}: {got}"),
        other => panic!("{other}"),
    };

    assert!(matches!(refused(layer.bank(&["a", "d"])), Error::AdapterName { got, .. } if got == "d"));
    let (got, limit) = (4112, 4096);
    layer.add_tensors(
        "wide",
        Tensor::zeros((4090, K), DType::F32, &Device::Cpu)?,
        Tensor::zeros((N, 4090), DType::F32, &Device::Cpu)?,
        1.0,
    )?;
    let what = "the rank of a bank of adapters";
    assert_eq!(refused(layer.bank(&["a", "wide"])), Error::TooLarge { what, got, limit });
    assert!(matches!(refused(bank.routes(&[Some(3)], &x)), Error::Route { row: 0, got: 3, adapters: 3 }));

    let rows = refused(layer.forward_routed(&x, &bank, &routes(&bank, 4)?));
    assert_eq!(rows, Error::Dimension { arg: "routes", axis: "rows", got: 4, expected: 5 });
    let other = layer.bank(&["b", "a"])?;
    let slots = refused(layer.forward_routed(&x, &bank, &routes(&other, 5)?));
    assert_eq!(
        state(slots),
        "forward_routed: the routes were made for another rank or scale of adapter `a` than the bank's",
    );
    let fewer = layer.bank(&["a"])?;
    let fewer = refused(layer.forward_routed(&x, &bank, &routes(&fewer, 5)?));
    assert_eq!(state(fewer), "forward_routed: the routes were made for 1 adapters, the bank has 3");

    let stray = |layer: &LoraLinear| -> Result<String> {
        Ok(state(refused(layer.forward_routed(&x, &bank, &routes(&bank, 5)?))))
    };
    let (mut without, twin) = (layer.clone(), self::layer(DType::F32, [DType::F32; 3])?.0);
    assert_eq!(stray(&twin)?, "forward_routed: adapter `a` of the bank is not in the layer");
    layer.clone().forward_routed(&x, &bank, &routes(&bank, 5)?)?;
    without.remove("b")?;
    assert_eq!(stray(&without)?, "forward_routed: adapter `b` of the bank is not in the layer");

    layer.set_b_bias("b", Tensor::zeros(N, DType::F32, &Device::Cpu)?)?;
    assert_eq!(stray(&layer)?, "forward_routed: adapter `b` has a bias on B");
    assert_eq!(state(refused(layer.bank(&NAMES))), "bank: adapter `b` has a bias on B");
    layer.set_magnitude("c", Tensor::ones(N, DType::F32, &Device::Cpu)?)?;
    assert_eq!(state(refused(layer.bank(&["a", "c"]))), "bank: adapter `c` has a magnitude (DoRA)");

    layer.activate("a")?;
    layer.merge()?;
    assert_eq!(stray(&layer)?, "forward_routed: `a` is merged");
    Ok(())
}

/// A refused training pass has not been.
#[test]
fn passes_are_those_that_were() -> Result<()> {
    let layer = layer(DType::F32, [DType::F32; 3])?.0.with_dropout(0.5, 1)?;
    let x = Rng(4).tensor(&[5, K], 1.0, DType::F32)?;
    let bank = layer.bank(&NAMES)?;
    let short = bank.routes(&[Some(0); 4], &x)?;
    refused(layer.forward_routed_t(&x, &bank, &short, true));
    assert_eq!(layer.passes(), 0);
    layer.forward_routed_t(&x, &bank, &bank.routes(&[Some(0); 5], &x)?, true)?;
    assert_eq!(layer.passes(), 1);
    Ok(())
}
