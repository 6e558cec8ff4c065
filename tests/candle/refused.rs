//! What the op and the layer refuse, with the words they find.

use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use fused_lora::Error;
use fused_lora::candle::{Dropout, LoraConfig, LoraLinear, Training, cause, lora, lora_train};

fn zeros(dims: &[usize], dtype: DType) -> Tensor {
    Tensor::zeros(dims, dtype, &Device::Cpu).expect("zeros")
}

#[track_caller]
fn refused<T>(result: Result<T>, message: &str) -> Error {
    let error = result.err().unwrap_or_else(|| panic!("accepted, expected: {message}"));
    assert_eq!(error.to_string(), message);
    cause(&error).unwrap_or_else(|| panic!("not an error of the crate: {error}")).clone()
}

/// x 4 × 6, W 5 × 6, A 2 × 6, B 5 × 2, bias 5, with some of them exchanged.
#[derive(Clone)]
struct Arguments {
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor,
    scale: f64,
}

impl Arguments {
    fn new() -> Self {
        let [x, w, a, b] = [[4, 6], [5, 6], [2, 6], [5, 2]].map(|dims| zeros(&dims, DType::F32));
        Self { x, w, a, b, bias: zeros(&[5], DType::F32), scale: 2.0 }
    }

    fn apply(change: impl FnOnce(&mut Self)) -> Result<Tensor> {
        let mut arguments = Self::new();
        change(&mut arguments);
        let Self { x, w, a, b, bias, scale } = &arguments;
        lora(x, w, a, b, *scale, Some(bias))
    }
}

#[test]
fn tracked_weights() -> Result<()> {
    let tracked = |dims: &[usize]| Var::from_tensor(&zeros(dims, DType::F32)).expect("a variable").as_tensor().clone();
    let message =
        |arg| format!("`{arg}` is tracked for gradients, which are not computed for it: expected it detached");
    let error = refused(Arguments::apply(|it| it.w = tracked(&[5, 6])), &message("w"));
    assert_eq!(error, Error::Tracked { arg: "w" });
    // A result of a variable as much as the variable itself.
    refused(Arguments::apply(|it| it.w = tracked(&[6, 5]).t().expect("a view")), &message("w"));
    refused(LoraLinear::frozen(tracked(&[5, 6]), None), &message("w"));
    Arguments::apply(|it| it.w = tracked(&[5, 6]).detach())?;
    Ok(())
}

#[test]
fn dtypes() {
    let cast = |tensor: &Tensor, dtype| tensor.to_dtype(dtype).expect("a cast");
    let error = refused(
        Arguments::apply(|it| it.x = cast(&it.x, DType::BF16)),
        "`x` is of dtype bf16, expected f32, that of w",
    );
    let (got, expected) = ("bf16".to_owned(), "f32, that of w".to_owned());
    assert_eq!(error, Error::ArgumentDtype { arg: "x", got, expected });
    for (dtype, message) in [
        (DType::F64, "`w` is of dtype f64, expected f32, f16 or bf16"),
        (DType::U8, "`w` is of dtype u8, expected f32, f16 or bf16"),
    ] {
        refused(Arguments::apply(|it| it.w = cast(&it.w, dtype)), message);
    }
    refused(
        Arguments::apply(|it| it.a = cast(&it.a, DType::F16)),
        "`a` is of dtype f16, expected f32, that of w, or f32",
    );
    refused(
        Arguments::apply(|it| it.b = cast(&it.b, DType::F64)),
        "`b` is of dtype f64, expected f32, that of w, or f32",
    );
    refused(
        Arguments::apply(|it| it.bias = cast(&it.bias, DType::F16)),
        "`bias` is of dtype f16, expected f32, that of w, or f32",
    );
}

#[test]
fn shapes() {
    let f32 = |dims: &[usize]| zeros(dims, DType::F32);
    let error = refused(
        Arguments::apply(|it| it.x = f32(&[6])),
        "`x` has 1 dimensions, expected at least 2 (tokens, features)",
    );
    assert!(matches!(error, Error::Rank { arg: "x", got: 1, .. }));
    refused(Arguments::apply(|it| it.w = f32(&[1, 5, 6])), "`w` has 3 dimensions, expected 2");
    refused(Arguments::apply(|it| it.a = f32(&[12])), "`a` has 1 dimensions, expected 2");
    refused(Arguments::apply(|it| it.b = f32(&[])), "`b` has 0 dimensions, expected 2");
    refused(Arguments::apply(|it| it.bias = f32(&[1, 5])), "`bias` has 2 dimensions, expected 1");
    let error = refused(Arguments::apply(|it| it.x = f32(&[2, 2, 7])), "`x` has 7 columns, expected 6");
    assert_eq!(error, Error::Dimension { arg: "x", axis: "columns", got: 7, expected: 6 });
    refused(Arguments::apply(|it| it.a = f32(&[2, 5])), "`a` has 5 columns, expected 6");
    refused(Arguments::apply(|it| it.b = f32(&[6, 2])), "`b` has 6 rows, expected 5");
    refused(Arguments::apply(|it| it.b = f32(&[5, 3])), "`b` has 3 columns, expected 2");
    refused(Arguments::apply(|it| it.bias = f32(&[6])), "`bias` has 6 elements, expected 5");
    refused(Arguments::apply(|it| it.x = f32(&[3, 0, 6])), "`x` has zero rows, expected at least 1");
    refused(Arguments::apply(|it| it.a = f32(&[0, 6])), "`a` has zero rows, expected at least 1");
    refused(Arguments::apply(|it| it.w = f32(&[5, 0])), "`w` has zero columns, expected at least 1");
    refused(Arguments::apply(|it| it.scale = f64::NAN), "`scale` is NaN, expected a finite number");
    refused(Arguments::apply(|it| it.scale = 1e39), "`scale` is inf, expected a finite number");
    let Arguments { x, w, a, b, .. } = Arguments::new();
    let training = Training { dropout: Some(Dropout { p: -0.5, seed: 1, offset: 2 }), ..Training::default() };
    let message = "`dropout` is -0.5, expected a probability from 0 to 1";
    refused(lora_train(&x, &w, &a, &b, 1.0, None, training), message);
    refused(LoraLinear::frozen(w.clone(), None).and_then(|layer| layer.with_dropout(-0.5, 1)), message);
}

#[test]
fn a_cause_is_found_under_what_candle_puts_around_it() {
    use candle_core::Context;
    let error = || Arguments::apply(|it| it.scale = f64::INFINITY).expect_err("refused");
    let scale = Error::Scale { arg: "scale", got: f32::INFINITY };
    assert_eq!(cause(&error().context("in layer 3")), Some(&scale));
    assert_eq!(cause(&error().with_path("model.safetensors").context("loading")), Some(&scale));
    let wrapped: Result<Tensor> = Err(error()).context("in layer 3");
    assert_eq!(cause(&wrapped.expect_err("refused")), Some(&scale));
    assert_eq!(cause(&candle_core::Error::msg("something else")), None);
}

#[test]
fn what_a_layer_is_not_ready_for() -> Result<()> {
    let f32 = |dims: &[usize]| zeros(dims, DType::F32);
    let mut layer = LoraLinear::frozen(f32(&[5, 6]), Some(f32(&[5])))?;
    refused(layer.activate("default"), "the adapter name is \"default\", expected none: the layer has no adapter");
    refused(layer.merge(), "`merge` was called while no adapter is active, expected `activate` first");
    refused(layer.unmerge(), "`unmerge` was called while no adapter is merged, expected `merge` first");
    layer.add_tensors("one", f32(&[2, 6]), f32(&[5, 2]), 1.0)?;
    layer.add_tensors("two", f32(&[3, 6]), f32(&[5, 3]), 1.0)?;
    refused(
        layer.add_tensors("one", f32(&[2, 6]), f32(&[5, 2]), 1.0),
        "the adapter name is \"one\", expected one that the layer does not have",
    );
    refused(layer.activate("three"), "the adapter name is \"three\", expected \"one\" or \"two\"");
    refused(layer.add_tensors("three", f32(&[2, 7]), f32(&[5, 2]), 1.0), "`a` has 7 columns, expected 6");
    refused(
        layer.add_tensors("three", f32(&[2, 6]), f32(&[5, 2]), f64::NAN),
        "`scale` is NaN, expected a finite number",
    );
    refused(layer.set_b_bias("three", f32(&[5])), "the adapter name is \"three\", expected \"one\" or \"two\"");
    refused(layer.set_b_bias("one", f32(&[6])), "`b_bias` has 6 elements, expected 5");
    refused(layer.set_b_bias("one", f32(&[5, 1])), "`b_bias` has 2 dimensions, expected 1");
    layer.activate("one")?;
    refused(
        layer.remove("one"),
        "`remove` was called while adapter `one` is active, expected another `activate` first",
    );
    layer.merge()?;
    let merged = |operation| format!("`{operation}` was called while `one` is merged, expected `unmerge` first");
    refused(layer.activate("two"), &merged("activate"));
    refused(layer.disable(), &merged("disable"));
    refused(layer.set_b_bias("one", f32(&[5])), &merged("set_b_bias"));
    layer.set_b_bias("two", f32(&[5]))?;
    refused(layer.merge(), &merged("merge"));
    layer.remove("two")?;
    assert_eq!(layer.names().collect::<Vec<_>>(), ["one"]);

    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let config = LoraConfig { r: 0, alpha: 1.0, rslora: false };
    refused(LoraLinear::new(f32(&[5, 6]), None, config, vb), "`a` has zero rows, expected at least 1");
    assert!(vars.all_vars().is_empty());
    Ok(())
}

/// As candle's own linear layer, which wants a matrix as well.
#[test]
fn a_vector_is_no_activation_for_either_layer() -> Result<()> {
    let layer = candle_nn::Linear::new(zeros(&[5, 6], DType::F32), None);
    assert!(layer.forward(&zeros(&[6], DType::F32)).is_err());
    Ok(())
}
