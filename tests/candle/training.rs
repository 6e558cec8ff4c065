//! Training with candle's optimisers follows the composed expression's trajectory.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, SGD, VarBuilder, VarMap};
use fused_lora::candle::{LoraConfig, LoraLinear};

use crate::case::{Case, Rng, mat};

const STEPS: usize = 40;

/// Two layers with a non-linearity between them, towards fixed targets; the losses of every step, and A and B at the end.
fn train<O: Optimizer>(
    dtype: DType,
    optimizer: impl Fn(Vec<Var>) -> Result<O>,
    fused: bool,
) -> Result<(Vec<f64>, Vec<Tensor>)> {
    let (tokens, k, hidden, n, r) = ([3, 8], 12, 20, 6, 4);
    let mut rng = Rng(77);
    let x = rng.tensor(&[tokens[0], tokens[1], k], 1.0, dtype)?;
    let target = rng.tensor(&[tokens[0], tokens[1], n], 1.0, dtype)?;
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let config = LoraConfig { r, alpha: 6.0, rslora: false };
    let mut layer = |name: &str, n: usize, k: usize| -> Result<LoraLinear> {
        let (w, bias) = (rng.tensor(&[n, k], 0.3, dtype)?, rng.tensor(&[n], 0.1, dtype)?);
        let layer = LoraLinear::new(w, Some(bias), config, vb.pp(name))?;
        // Both runs start from the same numbers.
        for (part, dims) in [("lora_A", [r, k]), ("lora_B", [n, r])] {
            let start = rng.tensor(&dims, 0.2, DType::F32)?;
            vars.clone().set_one(format!("{name}.{part}.weight"), start)?;
        }
        Ok(layer)
    };
    let (up, down) = (layer("up", hidden, k)?, layer("down", n, hidden)?);
    let names = ["up.lora_A", "up.lora_B", "down.lora_A", "down.lora_B"];
    let parameters: Vec<Var> = {
        let data = vars.data().lock().expect("the variables");
        names.iter().map(|name| data[&format!("{name}.weight")].clone()).collect()
    };
    let forward = |layer: &LoraLinear, x: &Tensor| {
        if fused {
            return layer.forward(x);
        }
        let (a, b, scale) = layer.adapter("default").expect("the adapter");
        Case::composed(x, layer.weight(), a, b, scale, layer.bias())
    };
    let mut optimizer = optimizer(parameters.clone())?;
    let mut losses = Vec::new();
    for _ in 0..STEPS {
        let y = forward(&down, &forward(&up, &x)?.tanh()?)?;
        let loss = (y - &target)?.to_dtype(DType::F32)?.sqr()?.mean_all()?;
        losses.push(f64::from(loss.to_scalar::<f32>()?));
        optimizer.backward_step(&loss)?;
    }
    Ok((losses, parameters.iter().map(|var| var.as_tensor().clone()).collect()))
}

fn compare<O: Optimizer>(dtype: DType, tolerance: f64, optimizer: impl Fn(Vec<Var>) -> Result<O>) -> Result<()> {
    let (ours, parameters) = train(dtype, &optimizer, true)?;
    let (composed, others) = train(dtype, &optimizer, false)?;
    assert!(ours[STEPS - 1] < 0.7 * ours[0], "the loss does not fall: {} to {}", ours[0], ours[STEPS - 1]);
    for (step, (ours, composed)) in ours.iter().zip(&composed).enumerate() {
        assert!((ours - composed).abs() <= tolerance * composed, "step {step}: {ours} and {composed}");
    }
    for (ours, other) in parameters.iter().zip(&others) {
        let (ours, other) = (mat(ours), mat(other));
        let difference = ours.plus(&other.map(|v| -v)).norm();
        assert!(difference <= 10.0 * tolerance * other.norm(), "parameters differ by {difference:e}");
    }
    Ok(())
}

fn adamw(vars: Vec<Var>) -> Result<AdamW> {
    AdamW::new(vars, ParamsAdamW { lr: 0.01, weight_decay: 0.02, ..ParamsAdamW::default() })
}

#[test]
fn adamw_in_f32() -> Result<()> {
    compare(DType::F32, 1e-4, adamw)
}

#[test]
fn sgd_in_f32() -> Result<()> {
    compare(DType::F32, 1e-4, |vars| SGD::new(vars, 1.0))
}

/// f32 adapters over bf16 layers: each step's rounding differs, the way down does not.
#[test]
fn sgd_over_bf16() -> Result<()> {
    compare(DType::BF16, 0.02, |vars| SGD::new(vars, 1.0))
}
