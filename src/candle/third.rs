//! The third input of the graph, which has room for no more: it holds all that is tracked of B, the bias and the magnitude, of every
//! projection.

use candle_core::{DType, Result, Tensor};

use super::op::Projection;
use super::view::{addressable, check_room, view};

/// What the third input can hold of a projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    B,
    Bias,
    Magnitude,
}

/// The third input, and the tensors that the kernels read, which lie beside the graph.
pub(super) struct Third {
    /// One of the parts as it is, or the elements of several behind each other.
    pub(super) input: Tensor,
    /// What it holds, in order, with the number of the projection.
    pub(super) holds: Vec<(usize, Part)>,
    pub(super) beside: Vec<Beside>,
}

/// What the kernels read of a projection, where it is not the input itself.
pub(super) struct Beside {
    pub(super) b: Option<Tensor>,
    pub(super) bias: Option<Tensor>,
    /// In f32.
    pub(super) magnitude: Option<Tensor>,
}

impl Third {
    /// `dtype` is that of the bias in the kernels, `factors` that of B.
    pub(super) fn new(projections: &[Projection<'_>], dtype: DType, factors: DType) -> Result<Self> {
        let parts = projections.iter().enumerate().flat_map(|(at, &Projection { b, bias, magnitude, .. })| {
            let parts = [(Part::B, Some(b)), (Part::Bias, bias), (Part::Magnitude, magnitude)];
            parts.into_iter().filter_map(move |(part, tensor)| Some(((at, part), tensor?)))
        });
        let mut held: Vec<_> = parts.clone().filter(|(_, tensor)| tensor.track_op()).collect();
        if held.is_empty() {
            held.extend(parts.take(1));
        }
        let input = behind(held.iter().map(|(_, tensor)| *tensor))?;
        let holds: Vec<_> = held.into_iter().map(|(part, _)| part).collect();
        // The storage of the input is locked by candle while it is computed with: another lock could wait forever.
        let beside = |part: (usize, Part), tensor: Option<&Tensor>, dtype: DType| match tensor {
            Some(tensor) if holds[..] != [part] => readable(tensor, dtype).map(Some),
            _ => Ok(None),
        };
        let of = |(at, &Projection { b, bias, magnitude, .. }): (usize, &Projection<'_>)| {
            Ok(Beside {
                b: beside((at, Part::B), Some(b), factors)?,
                bias: beside((at, Part::Bias), bias, dtype)?,
                magnitude: beside((at, Part::Magnitude), magnitude, DType::F32)?,
            })
        };
        let beside = projections.iter().enumerate().map(of).collect::<Result<Vec<_>>>()?;
        Ok(Self { input, holds, beside })
    }

    /// What the kernels read in place of the input, where it is a part that they cannot read as it lies.
    pub(super) fn stand_in(&self, dtype: DType, factors: DType) -> Result<Option<Tensor>> {
        match self.holds[..] {
            [(_, Part::B)] => stand_in(&self.input, factors),
            [(_, Part::Magnitude)] => stand_in(&self.input, DType::F32),
            [_] => stand_in(&self.input, dtype),
            _ => Ok(None),
        }
    }

    pub(super) fn is(&self, at: usize, part: Part) -> bool {
        self.holds[..] == [(at, part)]
    }

    pub(super) fn has(&self, at: usize, part: Part) -> bool {
        self.holds.contains(&(at, part))
    }
}

/// One tensor as it is, or the elements of several behind each other, in f32 where their types differ.
fn behind<'a>(tensors: impl Iterator<Item = &'a Tensor> + Clone) -> Result<Tensor> {
    let mut one = tensors.clone();
    match (one.next(), one.next()) {
        (Some(one), None) => Ok(one.clone()),
        _ => Tensor::cat(&alike(tensors, Tensor::flatten_all)?, 0),
    }
}

/// The A of all projections below each other, in f32 where their types differ.
pub(super) fn below(projections: &[Projection<'_>]) -> Result<Tensor> {
    match projections {
        [one] => Ok(one.a.clone()),
        all => Tensor::cat(&alike(all.iter().map(|of| of.a), |a| Ok(a.clone()))?, 0),
    }
}

/// Tensors of one type: theirs, or f32 where they differ.
pub(super) fn alike<'a>(
    tensors: impl Iterator<Item = &'a Tensor> + Clone,
    shaped: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Vec<Tensor>> {
    let mut dtypes = tensors.clone().map(Tensor::dtype);
    let first = dtypes.next().unwrap_or(DType::F32);
    let dtype = if dtypes.all(|dtype| dtype == first) { first } else { DType::F32 };
    let cast = |tensor: &Tensor| {
        check_room(tensor, dtype)?;
        shaped(&tensor.to_dtype(dtype)?)
    };
    tensors.map(cast).collect()
}

/// What the kernels read in place of `tensor`, where it lies or is stored as they cannot read it.
pub(super) fn stand_in(tensor: &Tensor, dtype: DType) -> Result<Option<Tensor>> {
    if tensor.dtype() != dtype {
        check_room(tensor, dtype)?;
        return Ok(Some(tensor.detach().to_dtype(dtype)?.contiguous()?));
    }
    if view(tensor.layout()).is_some() { Ok(None) } else { addressable(tensor).map(Some) }
}

/// As the kernels read it, outside of the graph.
pub(super) fn readable(tensor: &Tensor, dtype: DType) -> Result<Tensor> {
    Ok(stand_in(tensor, dtype)?.unwrap_or_else(|| tensor.detach()))
}
