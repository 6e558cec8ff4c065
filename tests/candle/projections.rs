//! Projections that share x, in the op and in the layers: as each alone, with dx the sum; and what they refuse.

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor, Var, bail};
use candle_nn::VarMap;
use fused_lora::Error;
use fused_lora::candle::{
    Dropout, LoraLinear, LoraProjections, Projection, SharedTraining, Training, cause, lora, lora_shared, lora_train,
};
use fused_lora::reference::{self, Expected, Mat};

use crate::case::{Case, Results, Rng, bits, dtype, mat};

/// N and R.
const SHAPES: [(usize, usize); 3] = [(11, 4), (5, 7), (16, 1)];
const TOKENS: [usize; 2] = [3, 7];
const K: usize = 13;

/// Three layers of one x.
fn cases(storage: DType, adapters: [DType; 3]) -> Result<[Case; 3]> {
    let case = |at: usize| -> Result<Case> {
        let (n, r) = SHAPES[at];
        let mut case = Case::new(&TOKENS, (n, K, r), storage, adapters[at])?;
        case.scale = [1.7, -0.5, 2.25][at];
        case.bias = case.bias.filter(|_| at != 1);
        Ok(case)
    };
    let [first, mut second, mut third] = [case(0)?, case(1)?, case(2)?];
    (second.x, third.x) = (first.x.clone(), first.x.clone());
    Ok([first, second, third])
}

/// x, and A, B and the bias of each, as variables.
struct Vars {
    x: Var,
    own: Vec<(Var, Var, Option<Var>)>,
}

impl Vars {
    fn new(cases: &[Case]) -> Result<Self> {
        let own = |case: &Case| {
            let bias = case.bias.as_ref().map(Var::from_tensor).transpose()?;
            Ok((Var::from_tensor(&case.a)?, Var::from_tensor(&case.b)?, bias))
        };
        Ok(Self { x: Var::from_tensor(&cases[0].x)?, own: cases.iter().map(own).collect::<Result<_>>()? })
    }

    fn projection<'a>(&'a self, cases: &'a [Case], at: usize) -> Projection<'a> {
        let (a, b, bias) = &self.own[at];
        let (w, scale, bias) = (&cases[at].w, cases[at].scale, bias.as_ref().map(|bias| bias.as_tensor()));
        Projection { w, a, b, scale, bias, magnitude: None }
    }

    fn shared(&self, cases: &[Case], training: SharedTraining) -> Result<[Tensor; 3]> {
        lora_shared(&self.x, [0, 1, 2].map(|at| self.projection(cases, at)), training)
    }

    /// The bits of all gradients; none for a tensor that has none.
    fn gradients(&self, store: &candle_core::backprop::GradStore) -> Vec<Option<Vec<u64>>> {
        let own = self.own.iter().flat_map(|(a, b, bias)| [Some(a), Some(b), bias.as_ref()]);
        let all = [Some(&self.x)].into_iter().chain(own).flatten();
        all.map(|var| store.get(var).map(bits)).collect()
    }
}

fn dropped(p: f32, seed: u64, offset: u64) -> SharedTraining {
    SharedTraining { dropout: Some(Dropout { p, seed, offset }), ..SharedTraining::default() }
}

/// Σ y ∘ dy.
fn loss(ys: &[Tensor], cases: &[Case]) -> Result<Tensor> {
    let products = ys.iter().zip(cases).map(|(y, case)| (y * &case.dy)?.to_dtype(DType::F32)?.sum_all());
    products.reduce(|sum, next| sum? + next?).unwrap_or_else(|| bail!("no y"))
}

#[test]
fn every_projection_is_that_of_the_oracle() -> Result<()> {
    let f32 = DType::F32;
    judge_all(
        &Device::Cpu,
        &[
            (f32, [f32; 3]),
            (DType::BF16, [DType::BF16; 3]),
            (DType::F16, [f32; 3]),
            (DType::BF16, [DType::BF16, f32, DType::BF16]),
        ],
    )
}

/// y, with the bits of each projection alone, and the gradients of one loss of all.
pub fn judge_all(device: &Device, types: &[(DType, [DType; 3])]) -> Result<()> {
    for &(storage, adapters) in types {
        let (cases, context) = (cases(storage, adapters)?, format!("{storage:?}, adapters {adapters:?}"));
        let [first, second, third] = cases.each_ref().map(|case| case.to_device(device));
        let cases = [first?, second?, third?];
        let vars = Vars::new(&cases)?;
        let ys = vars.shared(&cases, SharedTraining::default())?;
        let store = loss(&ys, &cases)?.backward()?;
        for (at, (case, y)) in cases.iter().zip(&ys).enumerate() {
            let (a, b, _) = &vars.own[at];
            let gradients = [None, store.get(a).cloned(), store.get(b).cloned()];
            let ours = Results { y: y.detach(), gradients, stray: false };
            case.judge(&ours, [false, true, true], &format!("projection {at}, {context}"));
            let alone = lora(&case.x, &case.w, &case.a, &case.b, case.scale, case.bias.as_ref())?;
            assert_eq!(bits(y), bits(&alone), "y of projection {at}, {context}");
        }
        let dx = store.get(&vars.x).expect("dx");
        assert_eq!((dx.dims(), dx.dtype()), (cases[0].x.dims(), storage));
        let (mut truth, mut magnitude, mut naive) = (None, None, None);
        let add =
            |sum: &mut Option<Mat>, next: Mat| *sum = Some(sum.take().map_or(next.clone(), |sum| sum.plus(&next)));
        for case in &cases {
            for (sum, inputs) in [(&mut truth, case.inputs()), (&mut magnitude, case.inputs().magnitudes())] {
                let (h, _) = reference::forward(&inputs);
                add(sum, reference::backward(&inputs, &h).dx);
            }
            let [dx, ..] = case.run([true, false, false], Case::composed)?.gradients;
            naive = Some(naive.map_or(Ok(dx.clone()), |sum: Option<Tensor>| match (sum, &dx) {
                (Some(sum), Some(dx)) => (sum + dx).map(Some),
                _ => bail!("candle's dx is missing"),
            })?);
        }
        let naive = mat(&naive.flatten().expect("candle's dx"));
        let (truth, magnitude) = (truth.expect("dx"), magnitude.expect("dx"));
        let depth = SHAPES.iter().map(|(n, r)| 2 * n + r + 2).sum();
        let (storage, output) = (dtype(storage), dtype(dx.dtype()));
        let expected = Expected { truth, naive, magnitude, depth, storage, output };
        reference::check(&mat(dx), &expected).unwrap_or_else(|complaint| panic!("{context}: dx: {complaint}"));
    }
    Ok(())
}

/// Backward again, in several threads at once, and of a loss that some of the outputs take no part in.
#[test]
fn backward_comes_as_often_as_it_likes() -> Result<()> {
    let cases = cases(DType::BF16, [DType::F32; 3])?;
    let vars = Vars::new(&cases)?;
    let ys = vars.shared(&cases, SharedTraining::default())?;
    let whole = loss(&ys, &cases)?;
    let first = vars.gradients(&whole.backward()?);
    assert!(first.iter().all(Option::is_some));
    std::thread::scope(|scope| {
        let run = |at: usize| {
            let (ys, cases, vars, whole, first) = (&ys, &cases, &vars, &whole, &first);
            scope.spawn(move || -> Result<()> {
                for _ in 0..8 {
                    match at {
                        0..2 => assert_eq!(&vars.gradients(&whole.backward()?), first),
                        _ => partial(vars, cases, ys, at - 2)?,
                    }
                }
                Ok(())
            })
        };
        let threads = [0, 1, 2, 3, 4].map(run);
        threads.into_iter().try_for_each(|thread| thread.join().expect("a thread"))
    })
}

/// The gradients of one y are those of it alone, those of the others zeros.
fn partial(vars: &Vars, cases: &[Case], ys: &[Tensor], at: usize) -> Result<()> {
    let gradients = vars.gradients(&loss(&ys[at..=at], &cases[at..=at])?.backward()?);
    let alone = Vars::new(&cases[at..=at])?;
    let [y] = lora_shared(&alone.x, [alone.projection(&cases[at..=at], 0)], SharedTraining::default())?;
    let expected = alone.gradients(&loss(&[y], &cases[at..=at])?.backward()?);
    assert_eq!(gradients[0], expected[0], "dx, to which the others add zeros");
    // A, B and a bias of each.
    let starts = [1, 4, 6, 9];
    for (index, gradient) in gradients.iter().enumerate().skip(1) {
        let gradient = gradient.as_ref().expect("a gradient");
        match index.checked_sub(starts[at]) {
            Some(own) if index < starts[at + 1] => assert_eq!(Some(gradient), expected[1 + own].as_ref(), "{index}"),
            _ => assert!(gradient.iter().all(|&bits| f64::from_bits(bits) == 0.0), "{index}"),
        }
    }
    Ok(())
}

/// A magnitude of 0 makes a NaN of its gradient, but not where the loss does not depend on y.
#[test]
fn the_magnitude_of_a_y_that_is_not_used() -> Result<()> {
    let cases = cases(DType::F32, [DType::F32; 3])?;
    let magnitudes = SHAPES.map(|(n, _)| Var::zeros(n, DType::F32, &Device::Cpu));
    let magnitudes = magnitudes.into_iter().collect::<Result<Vec<_>>>()?;
    let projections = [0, 1, 2].map(|at| {
        let Case { w, a, b, scale, .. } = &cases[at];
        Projection { w, a, b, scale: *scale, bias: None, magnitude: Some(&magnitudes[at]) }
    });
    let [_, y, _] = lora_shared(&cases[0].x, projections, SharedTraining::default())?;
    let store = y.sum_all()?.backward()?;
    for (at, magnitude) in magnitudes.iter().enumerate() {
        let dm = store.get(magnitude).expect("dm").to_vec1::<f32>()?;
        assert_eq!(dm.len(), SHAPES[at].0);
        assert!(dm.iter().all(|dm| if at == 1 { dm.is_nan() } else { *dm == 0.0 }), "{at}: {dm:?}");
    }
    Ok(())
}

/// An op that is the identity, and has no gradient.
struct Fails;

impl CustomOp1 for Fails {
    fn name(&self) -> &'static str {
        "fails"
    }
    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        Ok((storage.try_clone(layout)?, layout.shape().clone()))
    }
    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        bail!("as it must")
    }
}

/// What arrived in a backward that failed is no part of the next one.
#[test]
fn a_backward_that_fails_leaves_nothing() -> Result<()> {
    let cases = cases(DType::F32, [DType::F32; 3])?;
    let vars = Vars::new(&cases)?;
    for failing in 0..3 {
        let ys = vars.shared(&cases, SharedTraining::default())?;
        let mut broken = ys.to_vec();
        broken[failing] = broken[failing].apply_op1(Fails)?;
        for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2]] {
            let in_order = |from: &[Tensor]| order.map(|at| from[at].clone());
            let dys = order.map(|at| Case {
                dy: cases[at].dy.clone(),
                ..Case::new(&[1], (1, 1, 1), DType::F32, DType::F32).expect("a case")
            });
            let error = loss(&in_order(&broken), &dys)?.backward().map(drop).expect_err("a failure");
            assert!(error.to_string().contains("as it must"), "{error}");
            for at in 0..3 {
                partial(&vars, &cases, &ys, at)?;
            }
        }
    }
    Ok(())
}

#[test]
fn dropout_and_h_computed_again() -> Result<()> {
    let cases = cases(DType::BF16, [DType::BF16; 3])?;
    let vars = Vars::new(&cases)?;
    let dropout = Some(Dropout { p: 0.3, seed: 5, offset: 9 });
    let run = |recompute| -> Result<_> {
        let ys = vars.shared(&cases, SharedTraining { dropout, recompute, ..SharedTraining::default() })?;
        Ok((ys.each_ref().map(bits), vars.gradients(&loss(&ys, &cases)?.backward()?)))
    };
    let (kept, again) = (run(false)?, run(true)?);
    assert!(kept == again, "h computed again is another");
    for (at, (case, y)) in cases.iter().zip(&kept.0).enumerate() {
        let Projection { w, a, b, scale, bias, .. } = vars.projection(&cases, at);
        let training = Training { dropout, ..Training::default() };
        assert_eq!(y, &bits(&lora_train(&case.x, w, a, b, scale, bias, training)?), "the mask of projection {at}");
    }
    Ok(())
}

/// Only what is tracked makes a graph; a weight of several projections is read where it lies.
#[test]
fn rows_of_one_weight_and_what_is_tracked() -> Result<()> {
    let [one, two, three] = cases(DType::F32, [DType::F32; 3])?;
    let w = Tensor::cat(&[&one.w, &two.w, &three.w], 0)?;
    let mut first = 0;
    let mut rows = |case: Case| -> Result<Case> {
        let n = case.w.dims()[0];
        first += n;
        Ok(Case { w: w.narrow(0, first - n, n)?, ..case })
    };
    let cases = [rows(one)?, rows(two)?, rows(three)?];
    let plain = |case: &Case| lora(&case.x, &case.w, &case.a, &case.b, case.scale, case.bias.as_ref());
    let projections = cases.each_ref().map(|Case { w, a, b, bias, scale, .. }| Projection {
        w,
        a,
        b,
        scale: *scale,
        bias: bias.as_ref(),
        magnitude: None,
    });
    let ys = lora_shared(&cases[0].x, projections, SharedTraining::default())?;
    for (y, case) in ys.iter().zip(&cases) {
        assert!(!y.track_op(), "nothing to differentiate, yet it is part of a graph");
        assert_eq!(bits(y), bits(&plain(case)?));
    }
    // One factor alone.
    let b = Var::from_tensor(&cases[2].b)?;
    let mut tracked = projections;
    tracked[2].b = &b;
    let ys = lora_shared(&cases[0].x, tracked, SharedTraining::default())?;
    let store = loss(&ys, &cases)?.backward()?;
    let alone = cases[2].run([false, false, true], Case::fused)?;
    assert_eq!(store.get(&b).map(bits), alone.gradients[2].as_ref().map(bits));
    let x = cases[0].x.t()?.contiguous()?.t()?;
    assert_eq!(lora_shared(&x, projections, SharedTraining::default())?.each_ref().map(bits), ys.each_ref().map(bits));
    Ok(())
}

/// DoRA beside plain projections: gradients of each alone.
#[test]
fn a_magnitude_beside_others() -> Result<()> {
    let cases = cases(DType::BF16, [DType::F32; 3])?;
    let vars = Vars::new(&cases)?;
    let magnitude = Var::from_tensor(&Rng(3).tensor(&[SHAPES[1].0], 0.25, DType::F32)?.affine(1.0, 1.0)?)?;
    let mut projections = [0, 1, 2].map(|at| vars.projection(&cases, at));
    projections[1].magnitude = Some(&magnitude);
    let ys = lora_shared(&vars.x, projections, dropped(0.0, 1, 1))?;
    let store = loss(&ys, &cases)?.backward()?;
    let Projection { w, a, b, scale, bias, magnitude: of_dora } = projections[1];
    let training = Training { magnitude: of_dora, ..Training::default() };
    let y = lora_train(&vars.x, w, a, b, scale, bias, training)?;
    assert_eq!(bits(&y), bits(&ys[1]));
    let alone = loss(&[y], &cases[1..2])?.backward()?;
    for var in [&magnitude, &vars.own[1].1] {
        let [together, alone] = [&store, &alone].map(|store| bits(store.get(var).expect("a gradient")));
        assert_eq!(together, alone);
    }
    Ok(())
}

/// Every argument of every projection is named with its number.
#[test]
fn what_the_op_refuses() -> Result<()> {
    let cases = cases(DType::F32, [DType::F32; 3])?;
    let zeros = |dims: &[usize], dtype| Tensor::zeros(dims, dtype, &Device::Cpu);
    let f32 = |dims: &[usize]| zeros(dims, DType::F32);
    let dimension = |arg, axis, got, expected| Error::Dimension { arg, axis, got, expected };
    let (n, r) = SHAPES[1];
    let of_dtype =
        |arg, got: &str, expected: &str| Error::ArgumentDtype { arg, got: got.into(), expected: expected.into() };
    type Change<'a> = Box<dyn Fn(&mut Projection<'a>) + 'a>;
    let tensors = [f32(&[n, K + 1])?, f32(&[r, K + 1])?, f32(&[n + 1, r])?, f32(&[n, r + 1])?, f32(&[n + 1])?];
    let [wide_w, wide_a, long_b, wide_b, long] = &tensors;
    let (half_w, half_b) = (zeros(&[n, K], DType::F16)?, zeros(&[n, r], DType::F16)?);
    let (tracked, flat) = (Var::from_tensor(&f32(&[n, K])?)?, f32(&[n * K])?);
    let rows: Vec<(Change<'_>, Error)> = vec![
        (Box::new(|of| of.w = wide_w), dimension("x", "columns", K, K + 1)),
        (Box::new(|of| of.w = &half_w), of_dtype("x", "f32", "f16, that of w")),
        (Box::new(|of| of.w = &tracked), Error::Tracked { arg: "w of projection 1" }),
        (Box::new(|of| of.w = &flat), Error::Rank { arg: "w of projection 1", got: 1, expected: "2" }),
        (Box::new(|of| of.a = wide_a), dimension("a of projection 1", "columns", K + 1, K)),
        (Box::new(|of| of.b = long_b), dimension("b of projection 1", "rows", n + 1, n)),
        (Box::new(|of| of.b = wide_b), dimension("b of projection 1", "columns", r + 1, r)),
        (Box::new(|of| of.b = &half_b), of_dtype("b of projection 1", "f16", "f32, that of w, or f32")),
        (Box::new(|of| of.bias = Some(long)), dimension("bias of projection 1", "elements", n + 1, n)),
        (Box::new(|of| of.magnitude = Some(long)), dimension("magnitude of projection 1", "elements", n + 1, n)),
        (Box::new(|of| of.scale = f64::INFINITY), Error::Scale { arg: "scale of projection 1", got: f32::INFINITY }),
    ];
    let legal = || {
        cases.each_ref().map(|Case { w, a, b, scale, .. }| Projection {
            w,
            a,
            b,
            scale: *scale,
            bias: None,
            magnitude: None,
        })
    };
    let x = &cases[0].x;
    for (change, error) in rows {
        let mut projections = legal();
        change(&mut projections[1]);
        let got = lora_shared(x, projections, SharedTraining::default()).map(drop).expect_err("a refusal");
        assert_eq!(cause(&got), Some(&error), "{got}");
    }
    let count = |error: candle_core::Error| cause(&error).cloned();
    assert_eq!(
        lora_shared(x, [], SharedTraining::default()).map(drop).err().and_then(count),
        Some(Error::Projections { got: 0, limit: 4 })
    );
    let five = lora_shared(x, [legal()[0]; 5], SharedTraining::default()).map(drop);
    assert_eq!(five.err().and_then(count), Some(Error::Projections { got: 5, limit: 4 }));
    let magnitude = f32(&[n])?;
    let mut endless = legal();
    (endless[1].magnitude, endless[1].scale) = (Some(&magnitude), f64::INFINITY);
    let endless = lora_shared(x, endless, SharedTraining::default()).map(drop);
    let scale = Error::Scale { arg: "scale of projection 1", got: f32::INFINITY };
    assert_eq!(endless.err().and_then(count), Some(scale), "before a gain is computed of it");
    let mut of_dora = legal();
    of_dora[1].magnitude = Some(&magnitude);
    let dora = lora_shared(x, of_dora, dropped(0.5, 1, 1)).map(drop);
    let exclusive = Error::Exclusive { arg: "magnitude of projection 1", other: "dropout" };
    assert_eq!(dora.err().and_then(count), Some(exclusive));
    Ok(())
}

fn layer(case: &Case) -> Result<LoraLinear> {
    LoraLinear::from_tensors(case.w.clone(), case.bias.clone(), case.a.clone(), case.b.clone(), case.scale)
}

fn group(cases: &[Case; 3]) -> Result<LoraProjections<3>> {
    let [one, two, three] = cases.each_ref().map(layer);
    LoraProjections::new([one?, two?, three?])
}

/// Whatever takes part in each layer.
#[test]
fn layers_together_are_those_alone() -> Result<()> {
    let cases = cases(DType::F32, [DType::F32; 3])?;
    let mut group = group(&cases)?;
    let x = &cases[0].x;
    let same = |group: &LoraProjections<3>, what: &str| -> Result<()> {
        let alone = group.layers().each_ref().map(|layer| layer.forward(x).map(|y| bits(&y)).expect("forward"));
        assert_eq!(group.forward(x)?.each_ref().map(bits), alone, "{what}");
        Ok(())
    };
    same(&group, "adapters")?;
    let b_bias = Rng(4).tensor(&[SHAPES[0].0], 1.0, DType::F32)?;
    group.layers_mut()[0].set_b_bias("default", b_bias)?;
    same(&group, "a bias on B")?;
    group.layers_mut()[1].disable()?;
    same(&group, "one without an adapter")?;
    group.layers_mut()[2].merge()?;
    same(&group, "one merged")?;
    group.layers_mut()[0].disable()?;
    same(&group, "no adapter beside W")?;
    Ok(())
}

#[test]
fn dropout_of_a_group() -> Result<()> {
    let cases = cases(DType::F32, [DType::F32; 3])?;
    let group = group(&cases)?.with_dropout(0.5, 42)?.with_recompute();
    let x = &cases[0].x;
    let pass = |train| -> Result<_> { Ok(group.forward_t(x, train)?.each_ref().map(bits)) };
    let (inference, first, second) = (pass(false)?, pass(true)?, pass(true)?);
    assert_eq!(group.passes(), 2);
    assert!(inference != first && first != second, "the masks are the same");
    group.clone().set_passes(0);
    assert!(pass(true)? == first && group.passes() == 1, "a pass that is made again");
    let vars = Vars::new(&cases)?;
    let ys = vars.shared(&cases, dropped(0.5, 42, 0))?;
    assert!(first == ys.each_ref().map(bits), "the mask is that of the op");
    Ok(())
}

#[test]
fn groups_that_are_none() -> Result<()> {
    let cases = cases(DType::F32, [DType::F32; 3])?;
    let refused = |error: candle_core::Error| cause(&error).cloned().expect("an error of the crate");
    let none = LoraProjections::new([]).map(drop).map_err(refused);
    assert_eq!(none, Err(Error::Projections { got: 0, limit: 4 }));
    let one = layer(&cases[0])?;
    let five = LoraProjections::new([(); 5].map(|()| one.clone())).map(drop).map_err(refused);
    assert_eq!(five, Err(Error::Projections { got: 5, limit: 4 }));
    let of = |k, dtype| LoraLinear::frozen(Tensor::zeros((2, k), dtype, &Device::Cpu)?, None);
    let pair = |other: LoraLinear| LoraProjections::new([one.clone(), other]).map(drop).map_err(refused);
    let columns = Error::Dimension { arg: "w of projection 1", axis: "columns", got: K + 1, expected: K };
    assert_eq!(pair(of(K + 1, DType::F32)?), Err(columns));
    let (got, expected) = ("bf16".to_owned(), "f32, that of the first".to_owned());
    assert_eq!(pair(of(K, DType::BF16)?), Err(Error::ArgumentDtype { arg: "w of projection 1", got, expected }));
    let expected = "layers that do not, and the same of the group";
    let state = |got: &str| Err(Error::State { operation: "new", got: got.to_owned(), expected });
    assert_eq!(pair(one.clone().with_dropout(0.5, 1)?), state("layer 1 has dropout by itself"));
    assert_eq!(pair(one.clone().with_recompute()), state("layer 1 recomputes by itself"));

    let mut group = group(&cases)?.with_dropout(0.5, 1)?;
    let vars = VarMap::new();
    let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let config = fused_lora::candle::LoraConfig { r: 2, alpha: 1.0, rslora: false };
    group.layers_mut()[2].add_dora("dora", config, vb)?;
    group.layers_mut()[2].activate("dora")?;
    let got = "in layer 2 adapter `dora` has a magnitude (DoRA) and dropout is 0.5".to_owned();
    let expected = "dropout of 0: together they are not computed";
    let both = Error::State { operation: "forward_t", got, expected };
    assert_eq!(group.forward_t(&cases[0].x, true).map(drop).map_err(refused), Err(both));
    group.layers_mut()[2].activate("default")?;
    let narrow = Tensor::zeros((2, K - 1), DType::F32, &Device::Cpu)?;
    let columns = Error::Dimension { arg: "x", axis: "columns", got: K - 1, expected: K };
    assert_eq!(group.forward_t(&narrow, true).map(drop).map_err(refused), Err(columns));
    // A copy of a broadcast x that is larger than memory: refused last of all.
    let wide = Tensor::zeros((1, 1 << 20), DType::F32, &Device::Cpu)?;
    let of_wide =
        LoraLinear::from_tensors(wide.clone(), None, wide, Tensor::ones((1, 1), DType::F32, &Device::Cpu)?, 1.0)?;
    let of_wide = LoraProjections::new([of_wide.clone(), of_wide])?.with_dropout(0.5, 1)?;
    let vast = Tensor::zeros((1, 1), DType::F32, &Device::Cpu)?.broadcast_as(((1 << 31) - 1, 1 << 20))?;
    let outcome = of_wide.forward_t(&vast, true).map(drop).map_err(refused);
    assert!(matches!(outcome, Err(Error::OutOfMemory { .. })), "{outcome:?}");
    assert_eq!((group.passes(), of_wide.passes()), (0, 0), "no pass is counted");
    Ok(())
}
