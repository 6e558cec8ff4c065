//! From candle's layouts to matrices that the kernels address.

use candle_core::{DType, Layout, Result, Tensor};

use super::wrap;
use crate::error::Error;

/// A matrix inside a storage; an activation of more dimensions is the matrix of all its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct View {
    pub(super) offset: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row_stride: usize,
}

/// The matrix that `layout` is: the last dimension without gaps, the others one sequence of rows that do not overlap. `None`
/// where it is not (transposed, broadcast, or cut in two dimensions).
pub(super) fn view(layout: &Layout) -> Option<View> {
    let (&cols, outer) = layout.dims().split_last()?;
    let (&step, outer_strides) = layout.stride().split_last()?;
    let offset = layout.start_offset();
    let all_rows = outer.iter().try_fold(1usize, |rows, &dim| rows.checked_mul(dim))?;
    if all_rows == 0 || cols == 0 {
        return Some(View { offset, rows: all_rows, cols, row_stride: cols });
    }
    if cols > 1 && step != 1 {
        return None;
    }
    let (mut rows, mut row_stride) = (1usize, None);
    for (&dim, &stride) in outer.iter().zip(outer_strides).rev().filter(|&(&dim, _)| dim > 1) {
        if row_stride.get_or_insert(stride).checked_mul(rows) != Some(stride) {
            return None;
        }
        rows *= dim;
    }
    let row_stride = row_stride.unwrap_or(cols);
    (row_stride >= cols).then_some(View { offset, rows, cols, row_stride })
}

/// `tensor` outside the graph, copied only where the kernels cannot address it as it lies.
pub(super) fn addressable(tensor: &Tensor) -> Result<Tensor> {
    let tensor = tensor.detach();
    if view(tensor.layout()).is_some() {
        return Ok(tensor);
    }
    check_room(&tensor, tensor.dtype())?;
    tensor.contiguous()
}

/// Whether a copy in `dtype` finds room on the host, where candle ends the process when it does not: a tensor that was broadcast can be
/// larger than memory.
pub(super) fn check_room(tensor: &Tensor, dtype: DType) -> Result<()> {
    let elements = tensor.dims().iter().try_fold(1usize, |elements, &dim| elements.checked_mul(dim));
    let bytes = elements.and_then(|elements| elements.checked_mul(dtype.size_in_bytes()));
    let fits = |bytes: &usize| !tensor.device().is_cpu() || Vec::<u8>::new().try_reserve_exact(*bytes).is_ok();
    match bytes.filter(fits) {
        Some(_) => Ok(()),
        None => Err(wrap(Error::OutOfMemory { bytes: bytes.unwrap_or(usize::MAX) })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Shape;

    fn layout(dims: &[usize], strides: &[usize], offset: usize) -> Layout {
        Layout::new(Shape::from(dims), strides.to_vec(), offset)
    }

    #[test]
    fn layouts_that_are_matrices() {
        for (dims, strides, rows, cols, row_stride) in [
            (&[6, 4][..], &[4, 1][..], 6, 4, 4),
            (&[6, 4], &[9, 1], 6, 4, 9),                // columns of a wider matrix
            (&[2, 3, 4], &[12, 4, 1], 6, 4, 4),         // tokens of a batch
            (&[2, 3, 4], &[27, 9, 1], 6, 4, 9),         // … of a wider one
            (&[2, 1, 4], &[8, 777, 1], 2, 4, 8),        // a token of each sequence
            (&[5, 2, 3, 4], &[24, 12, 4, 1], 30, 4, 4), // four dimensions
            (&[1, 1, 4], &[0, 0, 1], 1, 4, 4),          // one row has no stride
            (&[6, 1], &[3, 55], 6, 1, 3),               // nor has one column a step
            (&[4], &[1], 1, 4, 4),                      // a vector
            (&[0, 4], &[3, 1], 0, 4, 4),                // nothing
        ] {
            assert_eq!(view(&layout(dims, strides, 7)), Some(View { offset: 7, rows, cols, row_stride }), "{dims:?}");
        }
    }

    #[test]
    fn layouts_that_are_not() {
        for (dims, strides) in [
            (&[4, 6][..], &[1, 4][..]), // transposed
            (&[6, 4], &[0, 1]),         // one row, broadcast
            (&[6, 4], &[1, 0]),         // one column, broadcast
            (&[6, 4], &[2, 1]),         // windows that overlap
            (&[2, 3, 4], &[0, 4, 1]),   // one sequence, broadcast
            (&[2, 3, 4], &[20, 4, 1]),  // the first tokens of longer sequences
            (&[2, 3, 4], &[4, 8, 1]),   // batch and time exchanged
        ] {
            assert_eq!(view(&layout(dims, strides, 0)), None, "{dims:?} {strides:?}");
        }
    }
}
