//! Dropout in the op and in the layer, and passes that keep no h.

use candle_core::{DType, Device, ModuleT, Result, Tensor, Var};
use fused_lora::candle::{Dropout, LoraLinear, Training, lora, lora_train};
use fused_lora::reference::{self, Expected};
use fused_lora::{Element, bf16};

use crate::case::{Case, bits, dtype, mat};

const ALL: [bool; 3] = [true; 3];

fn dropped(p: f32, offset: u64) -> Training<'static> {
    Training { dropout: Some(Dropout { p, seed: 0x5eed, offset }), ..Training::default() }
}

/// The op with `training` on a case.
fn op(
    training: Training<'static>,
) -> impl Fn(&Tensor, &Tensor, &Tensor, &Tensor, f64, Option<&Tensor>) -> Result<Tensor> {
    move |x, w, a, b, scale, bias| lora_train(x, w, a, b, scale, bias, training)
}

/// y and all gradients of a pass with dropout against the oracle.
fn as_the_oracle<T: Element>(case: &Case, p: f32, offset: u64) -> Result<()> {
    let ours = case.run(ALL, op(dropped(p, offset)))?;
    let plain = case.inputs();
    let (m, k, n, r) = (plain.x.rows, plain.x.cols, plain.w.rows, plain.a.rows);
    let inputs = reference::Inputs { keep: Some(reference::keep(p, [0x5eed, offset], m, k)), ..plain };
    let magnitudes = inputs.magnitudes();
    let ((h, y), (naive_h, naive_y)) = (reference::forward(&inputs), reference::naive_forward::<T>(&inputs));
    let (h_magnitude, y_magnitude) = reference::forward(&magnitudes);
    let truth = reference::backward(&inputs, &h);
    let naive = reference::naive_backward::<T>(&inputs, &naive_h);
    let magnitude = reference::backward(&magnitudes, &h_magnitude);
    let hold = |name: &str, ours: &Tensor, truth, naive: reference::Mat, magnitude, depth| {
        let output = dtype(ours.dtype());
        let naive = if output == T::DTYPE { naive.map(|v| T::from_f64(v).to_f64()) } else { naive };
        let expected = Expected { truth, naive, magnitude, depth, storage: T::DTYPE, output };
        if let Err(complaint) = reference::check(&mat(ours), &expected) {
            panic!("{name} at p = {p}: {complaint}");
        }
    };
    hold("y", &ours.y, y, naive_y, y_magnitude, 2 * k + r + 2);
    let [dx, da, db] = ours.gradients.map(|gradient| gradient.expect("a gradient"));
    hold("dx", &dx, truth.dx, naive.dx, magnitude.dx, 2 * n + r + 2);
    hold("da", &da, truth.da, naive.da, magnitude.da, n + m);
    hold("db", &db, truth.db, naive.db, magnitude.db, k + m);
    Ok(())
}

#[test]
fn a_pass_is_that_of_the_oracle() -> Result<()> {
    for (tokens, sizes) in [(&[7][..], (5, 9, 3)), (&[2, 13], (19, 17, 4)), (&[65], (33, 40, 8))] {
        for (at, p) in [0.1, 0.5, 1.0].into_iter().enumerate() {
            let offset = (tokens.len() * 10 + at) as u64;
            as_the_oracle::<f32>(&Case::new(tokens, sizes, DType::F32, DType::F32)?, p, offset)?;
            as_the_oracle::<bf16>(&Case::new(tokens, sizes, DType::BF16, DType::F32)?, p, offset)?;
            as_the_oracle::<bf16>(&Case::new(tokens, sizes, DType::BF16, DType::BF16)?, p, offset)?;
        }
    }
    Ok(())
}

/// Against differences of the op itself, whose mask stays: the loss is linear in each input.
#[test]
fn gradients_are_the_slopes_of_the_same_pass() -> Result<()> {
    let case = Case::new(&[5], (4, 6, 2), DType::F32, DType::F32)?;
    let training = Training { recompute: true, ..dropped(0.4, 3) };
    let gradients = case.run(ALL, op(training))?.gradients;
    for at in 0..3 {
        let input = [&case.x, &case.a, &case.b][at];
        let gradient = mat(gradients[at].as_ref().expect("a gradient"));
        for (element, slope) in gradient.data.iter().enumerate() {
            let loss = |by: f64| -> Result<f64> {
                let mut data = mat(input).data;
                data[element] += by;
                let moved = Tensor::from_vec(data, input.shape(), &Device::Cpu)?.to_dtype(DType::F32)?;
                let mut inputs = [&case.x, &case.a, &case.b];
                inputs[at] = &moved;
                let y = op(training)(inputs[0], &case.w, inputs[1], inputs[2], case.scale, None)?;
                Ok(mat(&y).data.iter().zip(mat(&case.dy).data).map(|(y, dy)| y * dy).sum())
            };
            let difference = (loss(1.0)? - loss(-1.0)?) / 2.0;
            assert!((difference - slope).abs() < 1e-5, "input {at}, element {element}: {difference} and {slope}");
        }
    }
    Ok(())
}

#[test]
fn h_computed_again_has_the_bits_of_h_kept() -> Result<()> {
    for (dtype, adapter) in [(DType::F32, DType::F32), (DType::BF16, DType::F32)] {
        for (tokens, sizes) in [(&[2, 13][..], (19, 17, 4)), (&[5], (3, 8, 2))] {
            let case = Case::new(tokens, sizes, dtype, adapter)?;
            for training in [dropped(0.3, 1), Training::default()] {
                let results = |recompute| -> Result<Vec<Vec<u64>>> {
                    let results = case.run(ALL, op(Training { recompute, ..training }))?;
                    Ok(results.gradients.iter().flatten().chain([&results.y]).map(bits).collect())
                };
                assert!(results(true)? == results(false)?, "{tokens:?} {dtype:?} {training:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn nothing_dropped_is_no_dropout() -> Result<()> {
    let case = Case::new(&[9], (7, 12, 3), DType::BF16, DType::F32)?;
    let (none, nothing) = (case.run(ALL, Case::fused)?, case.run(ALL, op(dropped(0.0, 5)))?);
    assert_eq!(bits(&none.y), bits(&nothing.y));
    for (none, nothing) in none.gradients.iter().flatten().zip(nothing.gradients.iter().flatten()) {
        assert_eq!(bits(none), bits(nothing));
    }
    Ok(())
}

/// As code that knows no more than the trait calls it.
fn through_the_trait(layer: &impl ModuleT, x: &Tensor, train: bool) -> Result<Vec<u64>> {
    layer.forward_t(x, train).map(|y| bits(&y))
}

#[test]
fn each_training_pass_of_a_layer_has_its_own_mask() -> Result<()> {
    let case = Case::new(&[40], (8, 32, 4), DType::F32, DType::F32)?;
    let layer = || LoraLinear::from_tensors(case.w.clone(), None, case.a.clone(), case.b.clone(), case.scale);
    let pass = |p, seed, offset| -> Result<Vec<u64>> {
        let training = Training { dropout: Some(Dropout { p, seed, offset }), ..Training::default() };
        Ok(bits(&lora_train(&case.x, &case.w, &case.a, &case.b, case.scale, None, training)?))
    };
    let plain = bits(&lora(&case.x, &case.w, &case.a, &case.b, case.scale, None)?);
    let without = layer()?;
    assert_eq!((through_the_trait(&without, &case.x, true)?, without.passes()), (plain.clone(), 0));

    let with = layer()?.with_dropout(0.25, 9)?;
    let (first, second) = (through_the_trait(&with, &case.x, true)?, through_the_trait(&with, &case.x, true)?);
    assert_eq!((&first, &second), (&pass(0.25, 9, 0)?, &pass(0.25, 9, 1)?));
    assert_ne!(first, second);
    // Inference neither drops nor counts.
    assert_eq!(through_the_trait(&with, &case.x, false)?, plain);
    assert_eq!((bits(&with.forward(&case.x)?), with.passes()), (plain, 2));
    // A clone goes on where the layer is, and the layer where the clone is.
    let clone = with.clone();
    assert_eq!(through_the_trait(&clone, &case.x, true)?, pass(0.25, 9, 2)?);
    assert_eq!(through_the_trait(&with, &case.x, true)?, pass(0.25, 9, 3)?);
    with.set_passes(1);
    assert_eq!(through_the_trait(&with, &case.x, true)?, second);
    Ok(())
}

/// Backward comes after other passes, and drops what its own forward did.
#[test]
fn backward_has_the_mask_of_its_forward() -> Result<()> {
    let case = Case::new(&[12], (8, 16, 4), DType::F32, DType::F32)?;
    let (a, b) = (Var::from_tensor(&case.a)?, Var::from_tensor(&case.b)?);
    let layer = LoraLinear::from_tensors(case.w.clone(), None, a.as_tensor().clone(), b.as_tensor().clone(), 2.0)?;
    let layer = layer.with_dropout(0.5, 77)?.with_recompute();
    let losses = [0, 1].map(|_| (layer.forward_t(&case.x, true)? * &case.dy)?.sum_all());
    for (offset, loss) in losses.into_iter().enumerate() {
        let store = loss?.backward()?;
        let training =
            Training { dropout: Some(Dropout { p: 0.5, seed: 77, offset: offset as u64 }), ..Training::default() };
        let expected = Case { scale: 2.0, bias: None, ..case_of(&case) }.run([false, true, true], op(training))?;
        for (var, at) in [(&a, 1), (&b, 2)] {
            let gradient = store.get(var).expect("a gradient");
            assert_eq!(bits(gradient), bits(expected.gradients[at].as_ref().expect("a gradient")), "pass {offset}");
        }
    }
    Ok(())
}

fn case_of(case: &Case) -> Case {
    let Case { x, w, a, b, bias, scale, dy } = case;
    let [x, w, a, b, dy] = [x, w, a, b, dy].map(Tensor::clone);
    Case { x, w, a, b, bias: bias.clone(), scale: *scale, dy }
}
