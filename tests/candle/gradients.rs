//! Forward and the gradients of the op.

use candle_core::{DType, Device, Result, Tensor, Var};
use fused_lora::candle::lora;

use crate::case::{Case, Op, Rng, bits, mat};

const ALL: [bool; 3] = [true; 3];
const DTYPES: [(DType, DType); 5] = [
    (DType::F32, DType::F32),
    (DType::F16, DType::F16),
    (DType::BF16, DType::BF16),
    (DType::F16, DType::F32),
    (DType::BF16, DType::F32),
];

/// Tokens, and (N, K, R).
type Sizes = (&'static [usize], (usize, usize, usize));
const SHAPES: [Sizes; 6] = [
    (&[7], (5, 9, 3)),
    (&[1], (16, 24, 1)),
    (&[65], (33, 40, 8)),
    (&[2, 13], (19, 17, 4)),
    (&[1, 31], (1, 64, 16)),
    (&[2, 3, 5], (24, 7, 13)),
];

#[test]
fn equal_candles_own_for_any_shape_and_dtype() -> Result<()> {
    for (dtype, adapter) in DTYPES {
        for (tokens, sizes) in SHAPES {
            let mut case = Case::new(tokens, sizes, dtype, adapter)?;
            case.check(ALL, &format!("{tokens:?} {sizes:?} {dtype:?}, adapters {adapter:?}"));
            case.bias = None;
            case.check(ALL, &format!("{tokens:?} {sizes:?} {dtype:?}, adapters {adapter:?}, no bias"));
        }
    }
    Ok(())
}

#[test]
fn only_tracked_inputs_get_a_gradient() -> Result<()> {
    for (dtype, adapter) in [(DType::F32, DType::F32), (DType::BF16, DType::F32)] {
        let case = Case::new(&[3, 7], (11, 13, 4), dtype, adapter)?;
        for subset in 1..8 {
            let tracked = [subset & 1 != 0, subset & 2 != 0, subset & 4 != 0];
            case.check(tracked, &format!("tracked {tracked:?}"));
        }
        let untracked = lora(&case.x, &case.w, &case.a, &case.b, case.scale, case.bias.as_ref())?;
        assert!(!untracked.track_op(), "nothing to differentiate, yet it is part of a graph");
    }
    Ok(())
}

/// One adapter in f32, the other in the type of the layer.
#[test]
fn each_adapter_has_its_own_dtype() -> Result<()> {
    let mut case = Case::new(&[17], (9, 12, 5), DType::BF16, DType::F32)?;
    case.a = case.a.to_dtype(DType::BF16)?;
    case.check(ALL, "A in bf16, B in f32");
    let mut case = Case::new(&[17], (9, 12, 5), DType::BF16, DType::F32)?;
    case.b = case.b.to_dtype(DType::BF16)?;
    case.check(ALL, "A in f32, B in bf16");
    Ok(())
}

/// f32 gradients of f32 adapters are not 16-bit sums widened.
#[test]
fn gradients_of_f32_adapters_have_more_than_16_bits() -> Result<()> {
    let case = Case::new(&[64], (16, 16, 4), DType::BF16, DType::F32)?;
    let [_, da, db] = case.run(ALL, Case::fused)?.gradients;
    for gradient in [da, db].into_iter().flatten() {
        let narrow = gradient.to_dtype(DType::BF16)?.to_dtype(DType::F32)?;
        assert_ne!(bits(&gradient), bits(&narrow));
    }
    Ok(())
}

type Reshaped = fn(&Tensor) -> Result<Tensor>;

/// Views of a 2 × 6 × 8 × 10 tensor.
const LAYOUTS: [(&str, Reshaped); 11] = [
    ("as it is", |t| Ok(t.clone())),
    ("from a token on", |t| t.flatten(0, 2)?.narrow(0, 3, 11)),
    ("columns of a wider one", |t| t.narrow(3, 2, 7)),
    ("columns, as a matrix", |t| t.flatten(0, 2)?.narrow(1, 3, 5)),
    ("every second token", |t| t.reshape((48, 20))?.narrow(1, 10, 10)),
    ("the first tokens of each sequence", |t| t.narrow(2, 1, 4)),
    ("tokens and features exchanged", |t| t.transpose(2, 3)),
    ("batch and tokens exchanged", |t| t.transpose(1, 2)),
    ("one sequence, broadcast", |t| t.narrow(0, 0, 1)?.broadcast_as((3, 6, 8, 10))),
    ("one token everywhere", |t| t.flatten(0, 2)?.narrow(0, 5, 1)?.broadcast_as((9, 10))),
    ("one token, broadcast", |t| t.narrow(2, 5, 1)?.broadcast_as((2, 6, 4, 10))),
];

/// The layout of a variable cannot be chosen, so x is a view of one: its gradient goes on through candle's own view.
#[test]
fn layouts_of_x() -> Result<()> {
    for dtype in [DType::F32, DType::BF16] {
        for (name, reshaped) in LAYOUTS {
            let whole = Var::from_tensor(&Rng(5).tensor(&[2, 6, 8, 10], 1.0, dtype)?)?;
            let x = reshaped(&whole)?;
            let (&k, tokens) = x.dims().split_last().expect("a dimension");
            let case = Case { x: x.detach(), ..Case::new(tokens, (9, k, 3), dtype, dtype)? };
            case.check([false, true, true], name);
            let y = lora(&x, &case.w, &case.a, &case.b, case.scale, None)?;
            let through_view = (y * &case.dy)?.sum_all()?.backward()?;
            let contiguous = Case { x: case.x.contiguous()?, bias: None, ..case };
            let [dx, ..] = contiguous.run(ALL, Case::fused)?.gradients;
            // What the view hands back for that gradient.
            let expected = (&x * dx.expect("a gradient"))?.sum_all()?.backward()?;
            let gradient = |store: &candle_core::backprop::GradStore| bits(store.get(&whole).expect("a gradient"));
            assert_eq!(gradient(&through_view), gradient(&expected), "{name}, {dtype:?}");
        }
    }
    Ok(())
}

#[test]
fn layouts_of_the_other_tensors() -> Result<()> {
    for (dtype, adapter) in [(DType::F32, DType::F32), (DType::F16, DType::F16), (DType::F16, DType::F32)] {
        let (m, n, k, r) = (7, 6, 10, 3);
        let plain = Case::new(&[m], (n, k, r), dtype, adapter)?;
        let mut rng = Rng(9);
        // Each in the middle of a wider matrix.
        let mut inside = |t: &Tensor| -> Result<Tensor> {
            let (rows, cols) = t.dims2()?;
            let around = rng.tensor(&[rows + 2, cols + 5], 9.0, t.dtype())?;
            around.slice_assign(&[1..rows + 1, 2..cols + 2], t)?.narrow(0, 1, rows)?.narrow(1, 2, cols)
        };
        let (w, a, b, dy) = (inside(&plain.w)?, inside(&plain.a)?, inside(&plain.b)?, inside(&plain.dy)?);
        let bias = plain.bias.clone();
        let strided = Case { x: plain.x.clone(), w, a, b, dy, bias, scale: plain.scale };
        strided.check([true, false, false], "windows");
        // Columns of another matrix.
        let turned = |t: &Tensor| t.t()?.contiguous()?.t();
        let (w, a, b, dy) = (turned(&plain.w)?, turned(&plain.a)?, turned(&plain.b)?, turned(&plain.dy)?);
        let bias =
            plain.bias.as_ref().map(|bias| Tensor::stack(&[bias, bias], 1)?.narrow(1, 1, 1)?.squeeze(1)).transpose()?;
        assert!(bias.as_ref().is_some_and(|bias| bias.stride() == [2]));
        let transposed = Case { x: plain.x.clone(), w, a, b, dy, bias, scale: plain.scale };
        transposed.check([true, false, false], "transposed");
        let (one, other) = (plain.run(ALL, Case::fused)?, transposed.run(ALL, Case::fused)?);
        assert_eq!(bits(&one.y), bits(&other.y), "the layout changes the result");
        // Everything the same number, seen through strides of zero.
        let constant =
            |t: &Tensor| Tensor::full(0.5f32, (), &Device::Cpu)?.to_dtype(t.dtype())?.broadcast_as(t.shape());
        let case = Case {
            x: constant(&plain.x)?,
            w: constant(&plain.w)?,
            a: constant(&plain.a)?,
            b: constant(&plain.b)?,
            bias: plain.bias.as_ref().map(constant).transpose()?,
            dy: constant(&plain.dy)?,
            scale: 2.0,
        };
        let results = case.run(ALL, Case::fused)?;
        let exact = |value: f64| move |t: &Tensor| mat(t).data.iter().all(|&v| v == value);
        let y = k as f64 / 4.0 + 2.0 * (k as f64 / 4.0) * r as f64 * 0.5 + 0.5;
        let dh = 2.0 * n as f64 / 4.0;
        assert!(exact(y)(&results.y), "broadcast: y");
        let expected = [n as f64 / 4.0 + dh * r as f64 / 2.0, m as f64 * dh / 2.0, m as f64 / 2.0 * (k as f64 / 2.0)];
        for (gradient, expected) in results.gradients.iter().flatten().zip(expected) {
            assert!(exact(expected)(gradient), "broadcast: {expected} {gradient}");
        }
    }
    Ok(())
}

/// Against differences of the op itself: an error shared with the oracle would show.
#[test]
fn gradients_are_the_slopes_of_forward() -> Result<()> {
    let case = Case::new(&[5], (4, 6, 2), DType::F32, DType::F32)?;
    let gradients = case.run(ALL, Case::fused)?.gradients;
    let loss = |x: &Tensor, a: &Tensor, b: &Tensor| -> Result<f64> {
        let y = mat(&lora(x, &case.w, a, b, case.scale, case.bias.as_ref())?);
        Ok(y.data.iter().zip(mat(&case.dy).data).map(|(y, dy)| y * dy).sum())
    };
    // The loss is linear in each input, so that a difference of any size is exact but for rounding.
    let step = 1.0;
    for (at, input) in [&case.x, &case.a, &case.b].into_iter().enumerate() {
        let gradient = mat(gradients[at].as_ref().expect("a gradient"));
        for (element, slope) in gradient.data.iter().enumerate() {
            let moved = |by: f64| -> Result<f64> {
                let mut data = mat(input).data;
                data[element] += by;
                let moved = Tensor::from_vec(data, input.shape(), &Device::Cpu)?.to_dtype(DType::F32)?;
                let mut inputs = [&case.x, &case.a, &case.b];
                inputs[at] = &moved;
                loss(inputs[0], inputs[1], inputs[2])
            };
            let difference = (moved(step)? - moved(-step)?) / (2.0 * step);
            assert!((difference - slope).abs() < 1e-5, "input {at}, element {element}: {difference} and {slope}");
        }
    }
    Ok(())
}

/// Gradients of two uses add up; a second backward finds what the first one did.
#[test]
fn results_may_be_used_twice_and_differentiated_twice() -> Result<()> {
    let case = Case::new(&[2, 5], (8, 6, 3), DType::F32, DType::F32)?;
    let (x, a, b) = (Var::from_tensor(&case.x)?, Var::from_tensor(&case.a)?, Var::from_tensor(&case.b)?);
    let y = lora(&x, &case.w, &a, &b, case.scale, None)?;
    let gradients = |loss: &Tensor| -> Result<Vec<Vec<f64>>> {
        let store = loss.backward()?;
        Ok([&x, &a, &b].map(|var| mat(store.get(var).expect("a gradient")).data).to_vec())
    };
    let once = (&y * &case.dy)?.sum_all()?;
    let twice = ((&y * &case.dy)? + (&y * &case.dy)?)?.sum_all()?;
    let first = gradients(&once)?;
    assert_eq!(gradients(&once)?, first, "backward again");
    let doubled: Vec<Vec<f64>> = first.iter().map(|g| g.iter().map(|g| 2.0 * g).collect()).collect();
    assert_eq!(gradients(&twice)?, doubled, "used twice");
    // Two in a row share A and B, the second's x depends on both.
    let square = Case::new(&[5], (6, 6, 3), DType::F32, DType::F32)?;
    let (a, b) = (Var::from_tensor(&square.a)?, Var::from_tensor(&square.b)?);
    let chained = |op: Op| -> Result<_> {
        let y = op(&square.x, &square.w, &a, &b, square.scale, None)?;
        let z = op(&y, &square.w, &a, &b, square.scale, None)?;
        let store = (z * &square.dy)?.sum_all()?.backward()?;
        Ok([&a, &b].map(|var| mat(store.get(var).expect("a gradient"))))
    };
    for (ours, composed) in chained(Case::fused)?.iter().zip(chained(Case::composed)?) {
        let difference = ours.plus(&composed.map(|v| -v)).norm();
        assert!(difference <= 1e-5 * composed.norm(), "two in a row: {difference:e}");
    }
    Ok(())
}

#[test]
fn threads_share_adapters_and_graphs() -> Result<()> {
    let case = Case::new(&[33], (20, 24, 4), DType::BF16, DType::F32)?;
    let (x, a, b) = (Var::from_tensor(&case.x)?, Var::from_tensor(&case.a)?, Var::from_tensor(&case.b)?);
    let y = lora(&x, &case.w, &a, &b, case.scale, None)?;
    let results = |y: &Tensor| -> Result<Vec<Vec<u64>>> {
        let store = (y * &case.dy)?.sum_all()?.backward()?;
        Ok([&x, &a, &b].map(|var| bits(store.get(var).expect("a gradient"))).to_vec())
    };
    let expected = results(&y)?;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| -> Result<_> {
                    let own = lora(&x, &case.w, &a, &b, case.scale, None)?;
                    Ok((results(&y)?, results(&own)?))
                })
            })
            .collect();
        for thread in threads {
            let (shared, own) = thread.join().expect("no panic")?;
            assert!(shared == expected && own == expected);
        }
        Ok(())
    })
}
