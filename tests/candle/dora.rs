//! DoRA: a magnitude in the op and in the layer, with its gradient.

use candle_core::{DType, Device, ModuleT, Result, Tensor, Var};
use candle_nn::{AdamW, Optimizer, VarBuilder, VarMap};
use fused_lora::candle::{Dropout, LoraConfig, LoraLinear, Training, cause, lora, lora_train};
use fused_lora::reference::{self, Expected, Inputs, Mat};
use fused_lora::{Dtype, Error};

use crate::case::{Case, Rng, bits, dtype, mat};

/// Either sign, away from zero.
fn magnitude(n: usize, dtype: DType) -> Result<Tensor> {
    let values = mat(&Rng(n as u64).tensor(&[n], 1.0, DType::F32)?).data;
    let values: Vec<f32> = values.into_iter().map(|value| (value + 1.25f64.copysign(value)) as f32).collect();
    Tensor::from_vec(values, n, &Device::Cpu)?.to_dtype(dtype)
}

/// y, and the gradients of x, A, B, the bias and the magnitude where they are tracked.
struct Results {
    y: Tensor,
    gradients: [Option<Tensor>; 5],
}

fn run(
    case: &Case,
    bias: &Tensor,
    magnitude: &Tensor,
    tracked: [bool; 5],
    op: impl Fn(&[Tensor; 5]) -> Result<Tensor>,
) -> Result<Results> {
    let inputs = [&case.x, &case.a, &case.b, bias, magnitude];
    let mut vars: [Option<Var>; 5] = Default::default();
    for (at, var) in vars.iter_mut().enumerate().filter(|(at, _)| tracked[*at]) {
        *var = Some(Var::from_tensor(inputs[at])?);
    }
    let taken = [0, 1, 2, 3, 4].map(|at| vars[at].as_ref().map_or(inputs[at], |var| var.as_tensor()).clone());
    let y = op(&taken)?;
    if !tracked.contains(&true) {
        return Ok(Results { y, gradients: Default::default() });
    }
    let store = (&y * &case.dy)?.sum_all()?.backward()?;
    for at in 0..5 {
        assert!(tracked[at] || store.get(inputs[at]).is_none(), "a gradient that nobody asked for");
    }
    let gradients = vars.each_ref().map(|var| var.as_ref().and_then(|var| store.get(var).cloned()));
    Ok(Results { y: y.detach(), gradients })
}

/// magnitude / ‖W + s · B A‖ ∘ (x Wᵀ + s · (x Aᵀ) Bᵀ) + bias, as one writes it without the op, the norm detached.
fn composed(case: &Case, [x, a, b, bias, magnitude]: &[Tensor; 5]) -> Result<Tensor> {
    let f32 = |tensor: &Tensor| tensor.detach().to_dtype(DType::F32);
    let folded = (f32(&case.w)? + f32(b)?.matmul(&f32(a)?)?.affine(case.scale, 0.0)?)?;
    let norm = folded.sqr()?.sum(1)?.sqrt()?;
    let gain = (magnitude.to_dtype(DType::F32)? / norm)?.to_dtype(x.dtype())?;
    let y = Case::composed(x, &case.w, a, b, case.scale, None)?;
    y.broadcast_mul(&gain)?.broadcast_add(&bias.to_dtype(x.dtype())?)
}

fn fused(case: &Case, [x, a, b, bias, magnitude]: &[Tensor; 5], recompute: bool) -> Result<Tensor> {
    let training = Training { dropout: None, recompute, magnitude: Some(magnitude), ..Training::default() };
    lora_train(x, &case.w, a, b, case.scale, Some(bias), training)
}

/// All that is tracked is held to the oracle, with candle's autograd of the composed expression as the result to be no more than twice
/// as wrong as.
fn judge(case: &Case, bias: &Tensor, magnitude: &Tensor, context: &str) -> Result<()> {
    let all = [true; 5];
    let ours = run(case, bias, magnitude, all, |inputs| fused(case, inputs, false))?;
    let composed = run(case, bias, magnitude, all, |inputs| composed(case, inputs))?;
    // Products of rounded factors; the norm of the factors as they are.
    let norm = reference::norm(&mat(&case.w), &mat(&case.a), &mat(&case.b), case.scale);
    let m32 = mat(magnitude);
    let gain = Mat::from_fn(1, norm.cols, |_, at| m32.at(0, at) / norm.at(0, at));
    let bias = mat(&bias.to_dtype(case.w.dtype())?);
    let inputs = Inputs { gain: Some(gain), bias: Some(bias.clone()), ..case.inputs() };
    let (h, y) = reference::forward(&inputs);
    let of = |inputs: &Inputs, y: &Mat, h: &Mat, sign: f64, m: &Mat| {
        let bias = bias.map(|value| if sign < 0.0 { -value.abs() } else { value });
        let gradients = reference::backward(inputs, h);
        let dm = reference::magnitude_gradient(&inputs.dy, y, Some(&bias), m);
        [gradients.dx, gradients.da, gradients.db, gradients.dbias, dm]
    };
    let magnitudes = inputs.magnitudes();
    let (h_size, y_size) = reference::forward(&magnitudes);
    let truth = of(&inputs, &y, &h, 1.0, &m32);
    let size = of(&magnitudes, &y_size, &h_size, -1.0, &m32.map(f64::abs));
    let (tokens, n, k, r) = (inputs.x.rows, inputs.w.rows, inputs.w.cols, inputs.a.rows);
    let hold = |name: &str, ours: &Tensor, composed: &Tensor, truth: &Mat, magnitude: &Mat, depth| {
        assert_eq!((ours.dims(), ours.dtype()), (composed.dims(), composed.dtype()), "{context}: {name}");
        let (truth, magnitude) = (truth.clone(), magnitude.clone());
        let (storage, output) = (dtype(case.w.dtype()), dtype(ours.dtype()));
        let expected = Expected { truth, naive: mat(composed), magnitude, depth, storage, output };
        if let Err(complaint) = reference::check(&mat(ours), &expected) {
            panic!("{context}: {name}: {complaint}");
        }
    };
    hold("y", &ours.y, &composed.y, &y, &y_size, 2 * k + r + 4);
    let depths = [2 * n + r + 3, n + tokens + 1, k + tokens + 1, tokens, 2 * k + r + tokens + 6];
    for (at, name) in ["dx", "da", "db", "dbias", "dm"].into_iter().enumerate() {
        let (Some(ours), Some(composed)) = (&ours.gradients[at], &composed.gradients[at]) else {
            panic!("{context}: {name} is missing")
        };
        hold(name, ours, composed, &truth[at], &size[at], depths[at]);
    }
    Ok(())
}

#[test]
fn y_and_all_gradients_are_those_of_the_formula() -> Result<()> {
    for (storage, adapter) in
        [(DType::F32, DType::F32), (DType::BF16, DType::F32), (DType::BF16, DType::BF16), (DType::F16, DType::F16)]
    {
        for of_magnitude in [DType::F32, storage] {
            let case = Case::new(&[3, 5], (11, 13, 4), storage, adapter)?;
            let bias = case.bias.as_ref().expect("a bias").to_dtype(adapter)?;
            let magnitude = magnitude(11, of_magnitude)?;
            judge(&case, &bias, &magnitude, &format!("{storage:?} {adapter:?} {of_magnitude:?}"))?;
        }
    }
    Ok(())
}

/// Whatever else is tracked, the bits are the same; nothing that is not tracked gets a gradient.
#[test]
fn every_subset_of_what_is_tracked() -> Result<()> {
    for (storage, adapter, of_magnitude) in [
        (DType::F32, DType::F32, DType::F32),
        (DType::BF16, DType::F32, DType::BF16),
        (DType::F16, DType::F16, DType::F32),
    ] {
        let case = Case::new(&[3, 5], (11, 13, 4), storage, adapter)?;
        let (bias, magnitude) =
            (case.bias.as_ref().expect("a bias").to_dtype(DType::F32)?, magnitude(11, of_magnitude)?);
        let all = run(&case, &bias, &magnitude, [true; 5], |inputs| fused(&case, inputs, false))?;
        for subset in 0..32u32 {
            let tracked = [0, 1, 2, 3, 4].map(|bit| subset >> bit & 1 == 1);
            for recompute in [false, true] {
                let some = run(&case, &bias, &magnitude, tracked, |inputs| fused(&case, inputs, recompute))?;
                assert_eq!(bits(&some.y), bits(&all.y));
                for at in 0..5 {
                    let of = |results: &Results| results.gradients[at].as_ref().map(bits);
                    let expected = of(&all).filter(|_| tracked[at]);
                    // Together in one tensor they are in f32, and rounded behind it.
                    assert_eq!(of(&some), expected, "{storage:?} {tracked:?}: gradient {at}");
                }
            }
        }
    }
    Ok(())
}

/// Views that are no matrix are copied; so is a magnitude cut out of a longer one.
#[test]
fn a_magnitude_may_lie_anywhere() -> Result<()> {
    let case = Case::new(&[6], (8, 9, 2), DType::BF16, DType::F32)?;
    let long = magnitude(24, DType::F32)?;
    let strided = long.reshape((8, 3))?.narrow(1, 1, 1)?.squeeze(1)?;
    let shifted = long.narrow(0, 5, 8)?;
    for magnitude in [strided, shifted] {
        let y = |magnitude: &Tensor| {
            let training = Training { magnitude: Some(magnitude), ..Training::default() };
            lora_train(&case.x, &case.w, &case.a, &case.b, case.scale, None, training)
        };
        assert_eq!(bits(&y(&magnitude)?), bits(&y(&magnitude.contiguous()?.copy()?)?));
    }
    Ok(())
}

fn refused<V: std::fmt::Debug>(got: Result<V>) -> Error {
    let error = got.expect_err("it is refused");
    cause(&error).unwrap_or_else(|| panic!("{error}")).clone()
}

#[test]
fn what_does_not_go_with_a_magnitude() -> Result<()> {
    let case = Case::new(&[6], (8, 9, 2), DType::F32, DType::F32)?;
    let (good, short) = (magnitude(8, DType::F32)?, magnitude(7, DType::F32)?);
    let op = |magnitude: &Tensor, p: Option<f32>| {
        let dropout = p.map(|p| Dropout { p, seed: 1, offset: 2 });
        let training = Training { dropout, recompute: false, magnitude: Some(magnitude), ..Training::default() };
        lora_train(&case.x, &case.w, &case.a, &case.b, case.scale, None, training)
    };
    let elements = Error::Dimension { arg: "magnitude", axis: "elements", got: 7, expected: 8 };
    assert_eq!(refused(op(&short, None)), elements);
    assert_eq!(refused(op(&good.unsqueeze(0)?, None)), Error::Rank { arg: "magnitude", got: 2, expected: "1" });
    let wrong = refused(op(&good.to_dtype(DType::F64)?, None));
    assert!(matches!(wrong, Error::ArgumentDtype { arg: "magnitude", .. }), "{wrong:?}");
    assert_eq!(refused(op(&good, Some(0.5))), Error::Exclusive { arg: "magnitude", other: "dropout" });
    assert_eq!(refused(op(&good, Some(-1.0))), Error::Probability { got: -1.0 });
    assert_eq!(bits(&op(&good, Some(0.0))?), bits(&op(&good, None)?));

    let mut layer =
        LoraLinear::from_tensors(case.w.clone(), None, case.a.clone(), case.b.clone(), 1.0)?.with_dropout(0.25, 3)?;
    assert_eq!(refused(layer.set_magnitude("default", short)), elements);
    assert!(matches!(refused(layer.set_magnitude("other", good.clone())), Error::AdapterName { .. }));
    assert!(layer.magnitude("default").is_none());
    layer.set_magnitude("default", good.clone())?;
    let dropped = refused(layer.forward_t(&case.x, true)).to_string();
    assert!(dropped.contains("`default`") && dropped.contains("dropout is 0.25"), "{dropped}");
    assert_eq!(layer.passes(), 0);
    layer.forward(&case.x)?;
    let both = refused(layer.set_b_bias("default", good.clone())).to_string();
    assert!(both.contains("`default`") && both.contains("magnitude"), "{both}");
    layer.merge()?;
    assert!(matches!(refused(layer.set_magnitude("default", good)), Error::State { operation: "set_magnitude", .. }));
    Ok(())
}

/// A new adapter changes nothing, learns with its magnitude, and can be folded into W.
#[test]
fn a_layer_of_dora_learns() -> Result<()> {
    for storage in [DType::F32, DType::BF16] {
        let (vars, device) = (VarMap::new(), Device::Cpu);
        let mut rng = Rng(5);
        let (w, x) = (rng.tensor(&[10, 12], 0.3, storage)?, rng.tensor(&[7, 12], 1.0, storage)?);
        let wanted = rng.tensor(&[7, 10], 1.0, DType::F32)?;
        let mut layer = LoraLinear::frozen(w.clone(), None)?;
        let config = LoraConfig { r: 3, alpha: 6.0, rslora: false };
        layer.add_dora("default", config, VarBuilder::from_varmap(&vars, DType::F32, &device))?;
        layer.activate("default")?;
        let magnitude = layer.magnitude("default").expect("a magnitude").clone();
        let norms = reference::norm(&mat(&w), &Mat::from_fn(0, 12, |_, _| 0.0), &Mat::from_fn(10, 0, |_, _| 0.0), 1.0);
        for (got, norm) in mat(&magnitude).data.iter().zip(&norms.data) {
            assert!((got - norm).abs() <= 1e-6 * norm, "{got}, expected {norm}");
        }
        let base = mat(&x.matmul(&w.t()?)?);
        let off = mat(&layer.forward(&x)?).plus(&base.map(|v| -v)).norm() / base.norm();
        let u = reference::unit_roundoff(if storage == DType::F32 { Dtype::F32 } else { Dtype::Bf16 });
        assert!(off <= 4.0 * u, "{off:e}");

        let before = mat(&magnitude).data;
        let mut optimizer = AdamW::new_lr(vars.all_vars(), 0.02)?;
        assert_eq!(vars.all_vars().len(), 3);
        let loss = || (layer.forward_t(&x, true)?.to_dtype(DType::F32)? - &wanted)?.sqr()?.mean_all();
        let first = loss()?.to_scalar::<f32>()?;
        for _ in 0..30 {
            optimizer.backward_step(&loss()?)?;
        }
        let last = loss()?.to_scalar::<f32>()?;
        assert!(last < 0.8 * first, "{first} to {last}");
        assert!(mat(&magnitude).data.iter().zip(&before).all(|(now, before)| now != before));

        let beside = layer.forward(&x)?;
        layer.merge()?;
        let merged = mat(&layer.forward(&x)?);
        let off = merged.plus(&mat(&beside).map(|v| -v)).norm() / merged.norm();
        assert!(off <= 8.0 * u, "{off:e}");
        layer.unmerge()?;
        assert_eq!(bits(&layer.forward(&x)?), bits(&beside));

        // A second layer on the same variables has the same magnitude, not the norms anew.
        let mut again = LoraLinear::frozen(w, None)?;
        again.add_dora("default", config, VarBuilder::from_varmap(&vars, DType::F32, &device))?;
        again.activate("default")?;
        assert_eq!(bits(&again.forward(&x)?), bits(&beside));
    }
    Ok(())
}

/// A magnitude of the norms gives what no magnitude gives, up to the rounding of the gain.
#[test]
fn a_gain_of_one_is_none() -> Result<()> {
    let case = Case::new(&[6], (8, 9, 2), DType::F32, DType::F32)?;
    let norm = reference::norm(&mat(&case.w), &mat(&case.a), &mat(&case.b), case.scale);
    let norm: Vec<f32> = norm.data.iter().map(|&norm| norm as f32).collect();
    let magnitude = Tensor::from_vec(norm, 8, &Device::Cpu)?;
    let training = Training { magnitude: Some(&magnitude), ..Training::default() };
    let y = mat(&lora_train(&case.x, &case.w, &case.a, &case.b, case.scale, None, training)?);
    let plain = mat(&lora(&case.x, &case.w, &case.a, &case.b, case.scale, None)?);
    assert!(y.plus(&plain.map(|v| -v)).norm() <= 1e-6 * plain.norm());
    Ok(())
}
