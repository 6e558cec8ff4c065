//! What tensors can get wrong that matrices cannot: types, dimensions, devices, the wish for a gradient.

use candle_core::{DType, Device, Tensor};

use super::op::Projection;
use super::routes::Routes;
use crate::MAX_DIMENSION;
use crate::error::{Error, Result};
use crate::raw::{Projections, named};

/// Which of several projections an argument is of.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) at: usize,
    pub(super) count: usize,
}

/// A layer alone.
pub(super) const ALONE: Place = Place { at: 0, count: 1 };

impl Place {
    fn name(self, arg: &'static str) -> &'static str {
        named(arg, self.at, self.count)
    }
}

/// All arguments of the op but devices.
pub(super) fn projections(x: &Tensor, projections: &[Projection<'_>], p: Option<f32>) -> Result<()> {
    // Judges their number.
    Projections::new(projections)?;
    for (at, &Projection { w, a, b, scale, bias, magnitude }) in projections.iter().enumerate() {
        let place = Place { at, count: projections.len() };
        base(place, w, bias)?;
        input(w, x)?;
        adapter(place, w, a, b)?;
        self::scale(place.name("scale"), scale)?;
        if let Some(of_dora) = magnitude {
            self::magnitude(place, w, of_dora, p)?;
        }
    }
    Ok(())
}

/// Of as many rows as x, and of ranks that A has; not beside a magnitude.
pub(super) fn routes(x: &Tensor, projections: &[Projection<'_>], routes: &Routes) -> Result<()> {
    const ARG: &str = "routes";
    if projections.iter().any(|of| of.magnitude.is_some()) {
        return Err(Error::Exclusive { arg: "magnitude", other: ARG });
    }
    rows(x, routes)?;
    let limit = projections.iter().map(|of| of.a.dims()[0]).sum::<usize>() as u64;
    match routes.ranks() as u64 {
        got if got > limit => Err(Error::TooLarge { what: "the ranks of `routes`", got, limit }),
        _ => Ok(()),
    }
}

/// A route for each row of an x that [`input`] accepts.
pub(super) fn rows(x: &Tensor, routes: &Routes) -> Result<()> {
    let (_, tokens) = x.dims().split_last().unwrap_or((&0, &[]));
    dimension("routes", "rows", routes.rows(), tokens.iter().product())
}

/// Of layers that share x: one K and one type.
pub(super) fn weights(weights: &[&Tensor]) -> Result<()> {
    Projections::new(weights)?;
    let first = weights[0];
    for (at, w) in weights.iter().enumerate() {
        let arg = Place { at, count: weights.len() }.name("w");
        dimension(arg, "columns", w.dims()[1], first.dims()[1])?;
        if w.dtype() != first.dtype() {
            return Err(dtype(arg, w, format!("{}, that of the first", first.dtype().as_str())));
        }
    }
    Ok(())
}

/// The weight, frozen, N × K, and the bias of its type or f32, N.
pub(super) fn base(place: Place, w: &Tensor, bias: Option<&Tensor>) -> Result<()> {
    let arg = place.name("w");
    frozen(arg, w)?;
    rank(arg, w, 2)?;
    match (w.dtype(), w.device()) {
        (DType::F16 | DType::BF16, _) | (DType::F32, Device::Cpu) => {}
        (_, Device::Cpu) => return Err(dtype(arg, w, "f32, f16 or bf16".to_owned())),
        _ => return Err(dtype(arg, w, "f16 or bf16, what GPUs compute in".to_owned())),
    }
    nonzero(arg, &w.dims()[..1], w.dims()[1])?;
    at_most("N (rows of w)", w.dims()[..1].iter())?;
    at_most("K (columns of w)", w.dims()[1..].iter())?;
    let Some(bias) = bias else { return Ok(()) };
    vector(place.name("bias"), w, bias)
}

/// N, of the weight's type or f32.
pub(super) fn vector(arg: &'static str, w: &Tensor, tensor: &Tensor) -> Result<()> {
    rank(arg, tensor, 1)?;
    as_weight_or_f32(arg, tensor, w)?;
    dimension(arg, "elements", tensor.elem_count(), w.dims()[0])
}

/// R × K and N × R, of the weight's type or f32.
pub(super) fn adapter(place: Place, w: &Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
    let [a_name, b_name] = ["a", "b"].map(|arg| place.name(arg));
    for (arg, tensor) in [(a_name, a), (b_name, b)] {
        rank(arg, tensor, 2)?;
        as_weight_or_f32(arg, tensor, w)?;
    }
    ranks(a_name, a.dims()[0])?;
    dimension(a_name, "columns", a.dims()[1], w.dims()[1])?;
    dimension(b_name, "rows", b.dims()[0], w.dims()[0])?;
    dimension(b_name, "columns", b.dims()[1], a.dims()[0])
}

/// … × K, of the weight's type.
pub(super) fn input(w: &Tensor, x: &Tensor) -> Result<()> {
    if x.rank() < 2 {
        return Err(Error::Rank { arg: "x", got: x.rank(), expected: "at least 2 (tokens, features)" });
    }
    as_weight("x", x, w)?;
    let (tokens, features) = x.dims().split_at(x.rank() - 1);
    nonzero("x", tokens, features[0])?;
    at_most("M (rows of x)", tokens.iter())?;
    dimension("x", "columns", features[0], w.dims()[1])
}

fn nonzero(arg: &'static str, rows: &[usize], columns: usize) -> Result<()> {
    if rows.contains(&0) {
        return Err(Error::ZeroDimension { arg, axis: "rows" });
    }
    if columns == 0 { Err(Error::ZeroDimension { arg, axis: "columns" }) } else { Ok(()) }
}

fn frozen(arg: &'static str, tensor: &Tensor) -> Result<()> {
    if tensor.track_op() { Err(Error::Tracked { arg }) } else { Ok(()) }
}

fn rank(arg: &'static str, tensor: &Tensor, expected: usize) -> Result<()> {
    let got = tensor.rank();
    if got == expected {
        Ok(())
    } else {
        Err(Error::Rank { arg, got, expected: if expected == 1 { "1" } else { "2" } })
    }
}

fn as_weight(arg: &'static str, tensor: &Tensor, w: &Tensor) -> Result<()> {
    if tensor.dtype() == w.dtype() {
        return Ok(());
    }
    Err(dtype(arg, tensor, format!("{}, that of w", w.dtype().as_str())))
}

fn as_weight_or_f32(arg: &'static str, tensor: &Tensor, w: &Tensor) -> Result<()> {
    if tensor.dtype() == w.dtype() || tensor.dtype() == DType::F32 {
        return Ok(());
    }
    Err(dtype(arg, tensor, format!("{}, that of w, or f32", w.dtype().as_str())))
}

fn dtype(arg: &'static str, tensor: &Tensor, expected: String) -> Error {
    Error::ArgumentDtype { arg, got: tensor.dtype().as_str().to_owned(), expected }
}

fn dimension(arg: &'static str, axis: &'static str, got: usize, expected: usize) -> Result<()> {
    if got == expected { Ok(()) } else { Err(Error::Dimension { arg, axis, got, expected }) }
}

/// The product of `dims`, before anything is copied for it.
fn at_most<'a>(what: &'static str, mut dims: impl Iterator<Item = &'a usize>) -> Result<()> {
    match dims.try_fold(1usize, |product, &dim| product.checked_mul(dim)).map_or(u64::MAX, |product| product as u64) {
        got if got > MAX_DIMENSION as u64 => Err(Error::TooLarge { what, got, limit: MAX_DIMENSION as u64 }),
        _ => Ok(()),
    }
}

/// At least 1, and no more than the kernels take.
pub(super) fn ranks(arg: &'static str, r: usize) -> Result<()> {
    nonzero(arg, &[r], 1)?;
    at_most("R (rows of a)", [r].iter())
}

/// N, of the weight's type or f32, and no dropout beside it.
fn magnitude(place: Place, w: &Tensor, magnitude: &Tensor, p: Option<f32>) -> Result<()> {
    let arg = place.name("magnitude");
    vector(arg, w, magnitude)?;
    let Some(p) = p else { return Ok(()) };
    probability(p)?;
    if p == 0.0 { Ok(()) } else { Err(Error::Exclusive { arg, other: "dropout" }) }
}

/// From 0 to 1.
pub(super) fn probability(got: f32) -> Result<()> {
    if (0.0..=1.0).contains(&got) { Ok(()) } else { Err(Error::Probability { got }) }
}

/// Finite in f32, which the products take it in.
pub(super) fn scale(arg: &'static str, scale: f64) -> Result<()> {
    let got = scale as f32;
    if got.is_finite() { Ok(()) } else { Err(Error::Scale { arg, got }) }
}
