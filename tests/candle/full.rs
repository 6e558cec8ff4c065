//! f32 adapters over 16 bits, read as they are.

use candle_core::{DType, Result, Tensor, Var};
use fused_lora::Error;
use fused_lora::candle::{Dropout, LoraLinear, LoraProjections, Training, cause, lora_train};
use fused_lora::reference::{self, Mat, unit_roundoff};

use crate::case::{Case, Results, bits, dtype, mat};

const ALL: [bool; 3] = [true; 3];
const FULL: Training<'static> =
    Training { dropout: None, recompute: false, magnitude: None, routes: None, full_precision: true };

fn run(case: &Case, training: Training<'_>) -> Result<Results> {
    case.run(ALL, |x, w, a, b, scale, bias| lora_train(x, w, a, b, scale, bias, training))
}

fn relative(got: &Mat, truth: &Mat) -> f64 {
    got.plus(&truth.map(|v| -v)).norm() / truth.norm()
}

/// How far y, dx, da and db are from those of the factors as they are.
fn errors(case: &Case, results: &Results) -> [f64; 4] {
    let inputs = reference::Inputs { a: mat(&case.a), b: mat(&case.b), ..case.inputs() };
    let (h, y) = reference::forward(&inputs);
    let truth = reference::backward(&inputs, &h);
    let gradient = |at: usize| mat(results.gradients[at].as_ref().expect("it is tracked"));
    [
        relative(&mat(&results.y), &y),
        relative(&gradient(0), &truth.dx),
        relative(&gradient(1), &truth.da),
        relative(&gradient(2), &truth.db),
    ]
}

#[test]
fn gradients_are_nearly_f32() -> Result<()> {
    for (of, limit) in [(DType::BF16, 2f64.powi(-17)), (DType::F16, 1e-6)] {
        for (tokens, sizes) in [(&[65][..], (33, 40, 8)), (&[2, 13], (19, 17, 4)), (&[2, 3, 40], (64, 96, 17))] {
            let case = Case::new(tokens, sizes, of, DType::F32)?;
            let full = run(&case, FULL)?;
            let [y, dx, da, db] = errors(&case, &full);
            // One rounding moves no value by more than the roundoff, and most by less.
            let u = unit_roundoff(dtype(of));
            assert!(y <= 0.6 * u && dx <= 0.6 * u, "{of:?} {sizes:?}: y is off by {y:e}, dx by {dx:e}");
            assert!(da <= limit && db <= limit, "{of:?} {sizes:?}: da is off by {da:e}, db by {db:e}");
            let [_, _, da, db] = errors(&case, &run(&case, Training::default())?);
            assert!(da > 10.0 * limit && db > 10.0 * limit, "rounded, they are off by {da:e} and {db:e}");

            let again = run(&case, Training { recompute: true, ..FULL })?;
            for (kept, computed) in full.gradients.iter().zip(&again.gradients) {
                assert_eq!(kept.as_ref().map(bits), computed.as_ref().map(bits), "h computed again");
            }
        }
    }
    Ok(())
}

#[test]
fn with_dropout_and_a_magnitude() -> Result<()> {
    let case = Case::new(&[48], (24, 40, 8), DType::BF16, DType::F32)?;
    let dropout = Some(Dropout { p: 0.5, seed: 3, offset: 1 });
    // The same mask; the rounding of the factors is all that differs.
    for (changed, limit) in [(Training { dropout, ..FULL }, 0.02), (FULL, 0.02)] {
        let (full, rounded) = (run(&case, changed)?, run(&case, Training { full_precision: false, ..changed })?);
        for at in 0..3 {
            let [full, rounded] = [&full, &rounded].map(|of| mat(of.gradients[at].as_ref().expect("tracked")));
            let apart = relative(&full, &rounded);
            assert!(apart > 0.0 && apart < limit, "{at}: {apart:e}");
        }
    }
    let magnitude = Var::from_tensor(&case.bias.as_ref().expect("a bias").to_dtype(DType::F32)?.affine(0.1, 2.0)?)?;
    let training = Training { magnitude: Some(&magnitude), ..FULL };
    let (a, b) = (Var::from_tensor(&case.a)?, Var::from_tensor(&case.b)?);
    let y = |training| lora_train(&case.x, &case.w, &a, &b, case.scale, None, training);
    let dm = |training| Ok::<_, candle_core::Error>(y(training)?.sum_all()?.backward()?.get(&magnitude).map(mat));
    let (full, rounded) = (dm(training)?, dm(Training { full_precision: false, ..training })?);
    let (full, rounded) = (full.expect("dm"), rounded.expect("dm"));
    let apart = relative(&full, &rounded);
    assert!(apart > 0.0 && apart < 0.05, "{apart:e}");
    Ok(())
}

/// One f32 factor is enough; where both have the type of the layer, or the layer is in f32, the bits do not change.
#[test]
fn it_concerns_f32_factors_over_16_bits() -> Result<()> {
    let same = |case: &Case| -> Result<bool> {
        let (full, plain) = (run(case, FULL)?, run(case, Training::default())?);
        let all = |of: &Results| [vec![bits(&of.y)], of.gradients.iter().flatten().map(bits).collect()].concat();
        Ok(all(&full) == all(&plain))
    };
    for (of, adapter, is_same) in
        [(DType::F32, DType::F32, true), (DType::BF16, DType::BF16, true), (DType::BF16, DType::F32, false)]
    {
        assert_eq!(same(&Case::new(&[9], (8, 12, 4), of, adapter)?)?, is_same, "{of:?} {adapter:?}");
    }
    let mut case = Case::new(&[9], (8, 12, 4), DType::BF16, DType::F32)?;
    case.b = case.b.to_dtype(DType::BF16)?;
    let [_, _, da, _] = errors(&case, &run(&case, FULL)?);
    assert!(da <= 2f64.powi(-9), "its gradient is in bf16 where it is: {da:e}");
    assert!(!same(&case)?, "A is read as it is");
    Ok(())
}

#[test]
fn a_layer_can_be_at_full_precision() -> Result<()> {
    let case = Case::new(&[2, 7], (16, 24, 4), DType::BF16, DType::F32)?;
    let layer = LoraLinear::from_tensors(case.w.clone(), None, case.a.clone(), case.b.clone(), case.scale)?;
    let full = layer.clone().with_full_precision();
    assert!(full.is_at_full_precision() && !layer.is_at_full_precision());
    let op = |training| lora_train(&case.x, &case.w, &case.a, &case.b, case.scale, None, training);
    assert_eq!(bits(&full.forward(&case.x)?), bits(&op(FULL)?));
    assert_eq!(bits(&layer.forward(&case.x)?), bits(&op(Training::default())?));
    assert_ne!(bits(&full.forward(&case.x)?), bits(&layer.forward(&case.x)?));
    let refused = |outcome: Result<()>, operation| match cause(&outcome.expect_err("a group")) {
        Some(Error::State { operation: of, got, .. }) => {
            assert_eq!((*of, &**got), (operation, "layer 1 is at full precision by itself"));
        }
        other => panic!("{other:?}"),
    };
    refused(LoraProjections::new([layer.clone(), full.clone()]).map(drop), "new");
    let mut group = LoraProjections::new([layer.clone(), layer])?;
    group.layers_mut()[1] = full;
    refused(group.forward(&case.x).map(drop), "forward_t");
    Ok(())
}

/// A group at full precision: y of each layer is that of the layer alone, and so are its gradients of A and B.
#[test]
fn a_group_can_be_at_full_precision() -> Result<()> {
    let mut cases = [16, 40].map(|n| Case::new(&[2, 7], (n, 24, n / 8), DType::BF16, DType::F32).expect("a case"));
    cases[1].x = cases[0].x.clone();
    let layer = |case: &Case, a: &Tensor, b: &Tensor| {
        LoraLinear::from_tensors(case.w.clone(), None, a.clone(), b.clone(), case.scale)
    };
    let vars =
        cases.each_ref().map(|case| [&case.a, &case.b].map(|factor| Var::from_tensor(factor).expect("a variable")));
    let layers = [0, 1].map(|at| layer(&cases[at], &vars[at][0], &vars[at][1]).expect("a layer"));
    let group = LoraProjections::new(layers.clone())?.with_full_precision();
    let (together, plain) = (group.forward(&cases[0].x)?, LoraProjections::new(layers.clone())?.forward(&cases[0].x)?);
    let sum = |ys: &[Tensor]| -> Result<Tensor> {
        ys.iter().try_fold(Tensor::zeros((), DType::F32, ys[0].device())?, |sum, y| {
            sum + y.to_dtype(DType::F32)?.sqr()?.sum_all()?
        })
    };
    let gradients = sum(&together)?.backward()?;
    for (at, layer) in layers.into_iter().enumerate() {
        let alone = layer.with_full_precision().forward(&cases[0].x)?;
        assert_eq!(bits(&together[at]), bits(&alone));
        assert_ne!(bits(&together[at]), bits(&plain[at]));
        let own = sum(&[alone])?.backward()?;
        for var in &vars[at] {
            let (got, expected) = (gradients.get(var).expect("a gradient"), own.get(var).expect("a gradient"));
            assert_eq!(got.flatten_all()?.to_vec1::<f32>()?, expected.flatten_all()?.to_vec1::<f32>()?);
        }
    }
    Ok(())
}

/// What the tensor lies in does not matter.
#[test]
fn factors_may_be_views() -> Result<()> {
    let case = Case::new(&[11], (16, 24, 4), DType::F16, DType::F32)?;
    let transposed = |tensor: &Tensor| tensor.t()?.contiguous()?.t();
    let op = |a: &Tensor, b: &Tensor| lora_train(&case.x, &case.w, a, b, case.scale, None, FULL);
    assert_eq!(bits(&op(&transposed(&case.a)?, &transposed(&case.b)?)?), bits(&op(&case.a, &case.b)?));
    Ok(())
}
