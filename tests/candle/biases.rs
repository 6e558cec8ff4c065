//! Biases that are trained: that of the layer, and that of B.

use candle_core::{DType, Device, Result, Tensor, Var};
use fused_lora::candle::{LoraLinear, lora};
use fused_lora::reference::Mat;

use crate::case::{Case, Rng, bits, mat};

fn tracked(tensor: &Tensor, wanted: bool) -> Result<(Tensor, Option<Var>)> {
    if !wanted {
        return Ok((tensor.clone(), None));
    }
    let var = Var::from_tensor(tensor)?;
    Ok((var.as_tensor().clone(), Some(var)))
}

/// Σ dy over tokens, rounded as the gradient is; f32 sums of few terms are good to some 2⁻²³ of their size.
#[track_caller]
fn is_sum_of(gradient: &Tensor, dy: &Tensor, scale: f64) {
    let (gradient, dy) = (mat(gradient), mat(dy));
    let ones = Mat::from_fn(1, dy.rows, |_, _| scale);
    let (sums, sizes) = (ones.times(&dy), ones.map(f64::abs).times(&dy.map(f64::abs)));
    for ((got, sum), size) in gradient.data.iter().zip(&sums.data).zip(&sizes.data) {
        assert!((got - sum).abs() <= 1e-6 * size, "{got} for {sum}");
    }
}

#[test]
fn only_a_tracked_bias_gets_a_gradient_and_it_changes_nothing_else() -> Result<()> {
    for (dtype, adapter) in [(DType::F32, DType::F32), (DType::BF16, DType::F32), (DType::F16, DType::F16)] {
        let case = Case::new(&[3, 5], (11, 13, 4), dtype, adapter)?;
        let bias = case.bias.as_ref().expect("a bias").to_dtype(DType::F32)?;
        for subset in 0..16u32 {
            let wanted = [0, 1, 2, 3].map(|bit| subset >> bit & 1 == 1);
            let run = |with_bias: bool| -> Result<(Tensor, Vec<Option<Tensor>>)> {
                let (x, x_var) = tracked(&case.x, wanted[0])?;
                let (a, a_var) = tracked(&case.a, wanted[1])?;
                let (b, b_var) = tracked(&case.b, wanted[2])?;
                let (bias, bias_var) = tracked(&bias, wanted[3] && with_bias)?;
                let y = lora(&x, &case.w, &a, &b, case.scale, Some(&bias))?;
                if !y.track_op() {
                    return Ok((y, vec![None; 4]));
                }
                let store = (&y * &case.dy)?.sum_all()?.backward()?;
                for (tensor, var) in [(&x, &x_var), (&a, &a_var), (&b, &b_var), (&bias, &bias_var)] {
                    assert!(var.is_some() || store.get(tensor).is_none(), "a gradient that nobody asked for");
                }
                let gradient = |var: Option<Var>| var.and_then(|var| store.get(&var).cloned());
                Ok((y.detach(), [x_var, a_var, b_var, bias_var].map(gradient).to_vec()))
            };
            let ((y, gradients), (plain_y, plain)) = (run(true)?, run(false)?);
            assert_eq!(bits(&y), bits(&plain_y));
            for at in 0..3 {
                let of = |gradients: &[Option<Tensor>]| gradients[at].as_ref().map(bits);
                assert_eq!(of(&gradients), of(&plain), "{dtype:?} {wanted:?}: gradient {at}");
                assert_eq!(gradients[at].is_some(), wanted[at]);
            }
            assert_eq!(gradients[3].is_some(), wanted[3]);
            if let Some(dbias) = &gradients[3] {
                assert_eq!((dbias.dims(), dbias.dtype()), (&[11][..], DType::F32));
                is_sum_of(dbias, &case.dy, 1.0);
            }
        }
    }
    Ok(())
}

/// A bias of the layer's type, with B of it or of f32, gets a gradient of its own type.
#[test]
fn a_bias_has_a_dtype_of_its_own() -> Result<()> {
    for adapter in [DType::F32, DType::BF16] {
        let case = Case::new(&[6], (8, 9, 2), DType::BF16, adapter)?;
        let (bias, b) = (Var::from_tensor(case.bias.as_ref().expect("a bias"))?, Var::from_tensor(&case.b)?);
        let y = lora(&case.x, &case.w, &case.a, &b, case.scale, Some(&bias))?;
        assert_eq!(bits(&y), bits(&lora(&case.x, &case.w, &case.a, &case.b, case.scale, case.bias.as_ref())?));
        let store = (&y * &case.dy)?.sum_all()?.backward()?;
        let (dbias, db) = (store.get(&bias).expect("a gradient"), store.get(&b).expect("a gradient"));
        assert_eq!((dbias.dtype(), db.dtype()), (DType::BF16, adapter));
        let sums = Mat::from_fn(1, 6, |_, _| 1.0).times(&mat(&case.dy));
        for (got, sum) in mat(dbias).data.iter().zip(&sums.data) {
            assert!((got - sum).abs() <= 2f64.powi(-8) * sum.abs() + 1e-5, "{got} for {sum}");
        }
    }
    Ok(())
}

/// A layer with a bias on B: its output, gradients, merged form, and a way without.
#[test]
fn a_bias_on_b() -> Result<()> {
    for dtype in [DType::F32, DType::BF16] {
        for based in [true, false] {
            let case = Case::new(&[2, 4], (10, 12, 3), dtype, DType::F32)?;
            let own = Var::from_tensor(&Rng(3).tensor(&[10], 1.0, DType::F32)?)?;
            let base = if based {
                Some(Var::from_tensor(&case.bias.as_ref().expect("a bias").to_dtype(DType::F32)?)?)
            } else {
                None
            };
            let bias = base.as_ref().map(|base| base.as_tensor().clone());
            let b = Var::from_tensor(&case.b)?;
            let mut layer = LoraLinear::from_tensors(case.w.clone(), bias, case.a.clone(), b.as_tensor().clone(), 1.5)?;
            let without = bits(&layer.forward(&case.x)?);
            layer.set_b_bias("default", own.as_tensor().clone())?;
            assert_eq!(layer.b_bias("default").map(Tensor::id), Some(own.as_tensor().id()));
            let sum = own.as_detached_tensor().affine(1.5, 0.0)?;
            let sum = match &base {
                Some(base) => (base.as_detached_tensor() + sum)?,
                None => sum,
            };
            let y = layer.forward(&case.x)?;
            let expected = lora(&case.x, &case.w, &case.a, &case.b, 1.5, Some(&sum.to_dtype(dtype)?))?;
            assert_eq!(bits(&y), bits(&expected), "rounded once");
            assert_ne!(bits(&y), without);
            let store = (&y * &case.dy)?.sum_all()?.backward()?;
            is_sum_of(store.get(&own).expect("a gradient"), &case.dy, 1.5);
            if let Some(base) = &base {
                is_sum_of(store.get(base).expect("a gradient"), &case.dy, 1.0);
            }
            assert!(store.get(&b).is_some());

            layer.merge()?;
            assert_eq!(bits(layer.bias().expect("a bias")), bits(&sum.to_dtype(dtype)?));
            let merged = candle_nn::Linear::new(layer.weight().clone(), layer.bias().cloned());
            use candle_core::Module;
            assert_eq!(bits(&layer.forward(&case.x)?), bits(&merged.forward(&case.x)?));
            layer.unmerge()?;
            assert_eq!(layer.bias().is_some(), based);
            layer.disable()?;
            let bias = base.as_ref().map(|base| base.as_detached_tensor().to_dtype(dtype)).transpose()?;
            let plain = candle_nn::Linear::new(case.w.clone(), bias);
            assert_eq!(bits(&layer.forward(&case.x)?), bits(&plain.forward(&case.x)?), "without the adapter");
        }
    }
    Ok(())
}

/// A trained bias beside a disabled adapter still gets its gradient, by candle's own operations.
#[test]
fn a_bias_is_trained_without_an_adapter_too() -> Result<()> {
    let case = Case::new(&[7], (6, 5, 2), DType::BF16, DType::F32)?;
    let bias = Var::from_tensor(&Tensor::zeros(6, DType::F32, &Device::Cpu)?)?;
    let layer = LoraLinear::frozen(case.w.clone(), Some(bias.as_tensor().clone()))?;
    let store = (layer.forward(&case.x)? * &case.dy)?.sum_all()?.backward()?;
    let dbias = mat(store.get(&bias).expect("a gradient"));
    let sums = Mat::from_fn(1, 7, |_, _| 1.0).times(&mat(&case.dy));
    for (got, sum) in dbias.data.iter().zip(&sums.data) {
        assert!((got - sum).abs() <= 7.0 * 2f64.powi(-8), "{got} for {sum}"); // candle sums in bf16
    }
    Ok(())
}
