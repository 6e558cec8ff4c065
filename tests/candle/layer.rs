//! The layer: names, start values, merging, exchange of adapters.

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::{Linear, VarBuilder, VarMap};
use fused_lora::candle::{LoraConfig, LoraLinear, lora};

use crate::case::{Case, bits, mat};

#[test]
fn scales_are_pefts() {
    let config = LoraConfig { r: 16, alpha: 8.0, rslora: false };
    assert_eq!((config.scale(), LoraConfig { rslora: true, ..config }.scale()), (0.5, 2.0));
}

#[test]
fn variables_have_pefts_names_and_start_values() -> Result<()> {
    let (n, k, r) = (40, 64, 16);
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let weight = Case::new(&[1], (n, k, r), DType::F32, DType::F32)?.w;
    let config = LoraConfig { r, alpha: 32.0, rslora: false };
    let layer = LoraLinear::new(weight, None, config, vb.pp("model.q_proj"))?;
    let data = vars.data().lock().expect("the variables");
    let mut names: Vec<_> = data.keys().cloned().collect();
    names.sort();
    assert_eq!(names, ["model.q_proj.lora_A.weight", "model.q_proj.lora_B.weight"]);
    let (a, b, scale) = layer.adapter("default").expect("the adapter");
    assert_eq!((a.dims(), b.dims(), scale), (&[r, k][..], &[n, r][..], 2.0));
    assert!(mat(b).data.iter().all(|&v| v == 0.0));
    // Uniform within ±1/√K: the variance is a third of the bound's square, and of r · k samples it is known to 10 %.
    let (a, bound) = (mat(a), 1.0 / (k as f64).sqrt());
    assert!(a.data.iter().all(|v| v.abs() <= bound));
    let variance = a.norm().powi(2) / (r * k) as f64;
    assert!((variance * 3.0 / bound.powi(2) - 1.0).abs() < 0.2, "{variance}");
    Ok(())
}

/// A scale that is not 1 multiplies the adapter's part alone, in forward as in the merged weight.
#[test]
fn the_scale_leaves_the_base_alone() -> Result<()> {
    let case = Case::new(&[6], (5, 8, 2), DType::F32, DType::F32)?;
    let mut layer = LoraLinear::from_tensors(case.w.clone(), None, case.a.clone(), case.b.clone(), 3.0)?;
    let base = mat(&Linear::new(case.w.clone(), None).forward(&case.x)?);
    let delta = mat(&case.x).times(&mat(&case.a).transposed()).times(&mat(&case.b).transposed());
    let expected = base.plus(&delta.map(|v| 3.0 * v));
    let close = |y: &Tensor| mat(y).plus(&expected.map(|v| -v)).norm() <= 1e-5 * expected.norm();
    assert!(close(&layer.forward(&case.x)?), "apart");
    layer.merge()?;
    assert!(close(&layer.forward(&case.x)?), "merged");
    Ok(())
}

#[test]
fn merging_rounds_once_and_can_be_undone() -> Result<()> {
    for (dtype, adapter) in [(DType::F32, DType::F32), (DType::BF16, DType::F32), (DType::F16, DType::F16)] {
        let case = Case::new(&[3, 4], (12, 10, 4), dtype, adapter)?;
        let mut layer =
            LoraLinear::from_tensors(case.w.clone(), case.bias.clone(), case.a.clone(), case.b.clone(), case.scale)?;
        let before = layer.forward(&case.x)?;
        layer.merge()?;
        assert!(layer.is_merged());
        let exact = mat(&case.w).plus(&mat(&case.b).times(&mat(&case.a)).map(|v| case.scale * v));
        let merged = mat(layer.weight());
        let roundoff = match dtype {
            DType::F32 => 2f64.powi(-24),
            DType::F16 => 2f64.powi(-11),
            _ => 2f64.powi(-8),
        };
        for ((merged, exact), w) in merged.data.iter().zip(&exact.data).zip(&mat(&case.w).data) {
            // One rounding, and what is formed in f32 before it.
            let bound = roundoff * exact.abs() + 1e-6 * (w.abs() + 1.0);
            assert!((merged - exact).abs() <= bound, "{dtype:?}: {merged} for {exact}");
        }
        assert!(!layer.forward(&case.x)?.track_op());
        layer.unmerge()?;
        assert_eq!(bits(layer.weight()), bits(&case.w));
        assert_eq!(bits(&layer.forward(&case.x)?), bits(&before));
    }
    Ok(())
}

#[test]
fn adapters_can_be_exchanged_and_switched_off() -> Result<()> {
    let one = Case::new(&[7], (9, 8, 3), DType::F32, DType::F32)?;
    let two = Case::new(&[7], (9, 8, 5), DType::F32, DType::F32)?;
    let mut layer = LoraLinear::frozen(one.w.clone(), one.bias.clone())?;
    layer.add_tensors("one", one.a.clone(), one.b.clone(), 0.5)?;
    layer.add_tensors("two", two.a.clone(), two.b.clone(), 2.0)?;
    let base = bits(&Linear::new(one.w.clone(), one.bias.clone()).forward(&one.x)?);
    let with = |case: &Case, scale| -> Result<_> {
        Ok(bits(&lora(&one.x, &one.w, &case.a, &case.b, scale, one.bias.as_ref())?))
    };
    let now = |layer: &LoraLinear| -> Result<_> { Ok(bits(&layer.forward(&one.x)?)) };
    assert_eq!((layer.active(), now(&layer)?), (None, base.clone()));
    layer.activate("two")?;
    assert_eq!((layer.active(), now(&layer)?), (Some("two"), with(&two, 2.0)?));
    layer.activate("one")?;
    assert_eq!(now(&layer)?, with(&one, 0.5)?);
    layer.disable()?;
    assert_eq!((layer.active(), now(&layer)?), (None, base));
    layer.enable();
    assert_eq!((layer.active(), now(&layer)?), (Some("one"), with(&one, 0.5)?));
    let (a, b, scale) = layer.remove("two")?;
    assert_eq!((bits(&a), bits(&b), scale), (bits(&two.a), bits(&two.b), 2.0));
    Ok(())
}

/// An adapter that is taken out while the layer is disabled does not come back with `enable`, nor under its name.
#[test]
fn a_removed_adapter_is_not_active() -> Result<()> {
    let case = Case::new(&[7], (9, 8, 3), DType::F32, DType::F32)?;
    let mut layer = LoraLinear::from_tensors(case.w.clone(), None, case.a.clone(), case.b.clone(), 2.0)?;
    layer.disable()?;
    let (a, b, scale) = layer.remove("default")?;
    layer.enable();
    assert_eq!((layer.active(), layer.names().count()), (None, 0));
    layer.add_tensors("default", a, b, scale)?;
    assert_eq!(layer.active(), None);
    let base = Linear::new(case.w.clone(), None).forward(&case.x)?;
    assert_eq!(bits(&layer.forward(&case.x)?), bits(&base));
    Ok(())
}

/// Any number of dimensions that forward takes with an adapter it takes without one, and while one is merged.
#[test]
fn every_state_takes_the_same_dimensions() -> Result<()> {
    for tokens in [&[6][..], &[2, 3], &[1, 2, 3], &[1, 2, 1, 3], &[2, 1, 1, 1, 3]] {
        let case = Case::new(tokens, (5, 8, 2), DType::F32, DType::F32)?;
        let flat = case.x.reshape((6, 8))?;
        let mut layer = LoraLinear::from_tensors(case.w.clone(), case.bias.clone(), case.a, case.b, 2.0)?;
        let same = |layer: &LoraLinear| -> Result<_> {
            let (y, flat) = (layer.forward(&case.x)?, layer.forward(&flat)?);
            assert_eq!((y.dims(), bits(&y)), (case.dy.dims(), bits(&flat)), "{tokens:?}");
            Ok(())
        };
        same(&layer)?;
        layer.merge()?;
        same(&layer)?;
        layer.unmerge()?;
        layer.disable()?;
        same(&layer)?;
    }
    Ok(())
}

#[test]
fn a_weight_may_lie_transposed() -> Result<()> {
    let case = Case::new(&[5], (6, 8, 2), DType::F32, DType::F32)?;
    let layer = |weight| LoraLinear::from_tensors(weight, None, case.a.clone(), case.b.clone(), 2.0)?.forward(&case.x);
    let transposed = layer(case.w.t()?.contiguous()?.t()?)?;
    assert_eq!(bits(&transposed), bits(&layer(case.w.clone())?));
    Ok(())
}

#[test]
fn variables_survive_a_file() -> Result<()> {
    let case = Case::new(&[5], (6, 8, 2), DType::F32, DType::F32)?;
    let config = LoraConfig { r: 2, alpha: 3.0, rslora: true };
    let layer = |vars: &VarMap| {
        let vb = VarBuilder::from_varmap(vars, DType::F32, &Device::Cpu);
        LoraLinear::new(case.w.clone(), None, config, vb.pp("layers.0"))
    };
    let saved = VarMap::new();
    let trained = layer(&saved)?;
    for var in saved.all_vars() {
        var.set(&var.randn_like(0.0, 1.0)?)?;
    }
    let path = std::env::temp_dir().join(format!("fused-lora-candle-{}.safetensors", std::process::id()));
    saved.save(&path)?;
    let mut loaded = VarMap::new();
    let other = layer(&loaded)?;
    assert_ne!(bits(&other.forward(&case.x)?), bits(&trained.forward(&case.x)?));
    loaded.load(&path)?;
    // And as constants, straight from the file.
    let tensors = candle_core::safetensors::load(&path, &Device::Cpu)?;
    let constants = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let inference = LoraLinear::new(case.w.clone(), None, config, constants.pp("layers.0"))?;
    std::fs::remove_file(&path)?;
    let expected = bits(&trained.forward(&case.x)?);
    assert_eq!(bits(&other.forward(&case.x)?), expected);
    let y = inference.forward(&case.x)?;
    assert!(!y.track_op());
    assert_eq!(bits(&y), expected);
    Ok(())
}
