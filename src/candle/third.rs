//! The third input of the graph, which has room for no more: it holds all that is tracked of B, the bias and the magnitude.

use candle_core::{DType, Result, Tensor};

use super::view::{addressable, check_room, view};

/// What the third input can hold.
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
    /// What it holds, in order.
    pub(super) holds: Vec<Part>,
    /// B where it is not the input itself, as the kernels read it.
    pub(super) b: Option<Tensor>,
    /// Likewise.
    pub(super) bias: Option<Tensor>,
    /// In f32; likewise.
    pub(super) magnitude: Option<Tensor>,
}

impl Third {
    /// `dtype` is that of B and the bias in the kernels.
    pub(super) fn new(b: &Tensor, bias: Option<&Tensor>, magnitude: Option<&Tensor>, dtype: DType) -> Result<Self> {
        let parts = [(Part::B, Some(b)), (Part::Bias, bias), (Part::Magnitude, magnitude)];
        let parts = parts.into_iter().filter_map(|(part, tensor)| Some((part, tensor?)));
        let mut held: Vec<_> = parts.filter(|(_, tensor)| tensor.track_op()).collect();
        if held.is_empty() {
            held.push((Part::B, b));
        }
        let input = match &held[..] {
            [(_, one)] => (*one).clone(),
            several => {
                let first = several[0].1.dtype();
                let same = several.iter().all(|(_, tensor)| tensor.dtype() == first);
                let dtype = if same { first } else { DType::F32 };
                let flat = several.iter().map(|(_, tensor)| {
                    check_room(tensor, dtype)?;
                    tensor.to_dtype(dtype)?.flatten_all()
                });
                Tensor::cat(&flat.collect::<Result<Vec<_>>>()?, 0)?
            }
        };
        let holds: Vec<Part> = held.into_iter().map(|(part, _)| part).collect();
        // The storage of the input is locked by candle while it is computed with: another lock could wait forever.
        let beside = |part: Part, tensor: Option<&Tensor>, dtype: DType| match tensor {
            Some(tensor) if holds[..] != [part] => readable(tensor, dtype).map(Some),
            _ => Ok(None),
        };
        let (b, bias) = (beside(Part::B, Some(b), dtype)?, beside(Part::Bias, bias, dtype)?);
        let magnitude = beside(Part::Magnitude, magnitude, DType::F32)?;
        Ok(Self { input, holds, b, bias, magnitude })
    }

    /// What the kernels read in place of the input, where it is a part that they cannot read as it lies.
    pub(super) fn stand_in(&self, dtype: DType) -> Result<Option<Tensor>> {
        match self.holds[..] {
            [Part::Magnitude] => stand_in(&self.input, DType::F32),
            [_] => stand_in(&self.input, dtype),
            _ => Ok(None),
        }
    }

    pub(super) fn is(&self, part: Part) -> bool {
        self.holds[..] == [part]
    }

    pub(super) fn has(&self, part: Part) -> bool {
        self.holds.contains(&part)
    }
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
