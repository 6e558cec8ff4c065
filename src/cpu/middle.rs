//! h or dh: in the storage type, or in f32 beside f32 factors.

use std::ops::Range;

use rayon::prelude::*;

use super::product::{Epilogue, Operand, Term, product};
use super::{columns_of, reborrow, reborrow_columns, shared};
use crate::error::{Error, Result};
use crate::shape::LoraShape;
use crate::split::{columns_of as halves_of, halves, split_columns, whole};
use crate::{Dtype, Element, Matrix, MatrixMut};

/// M × R, with one column for each rank.
pub(super) enum Middle<'a, T> {
    /// As the caller has it.
    Kept(MatrixMut<'a, [T]>),
    /// The same, which is only read.
    Read(Matrix<'a, [T]>),
    Scratch(Vec<T>, LoraShape),
    /// With the halves that the caller keeps of it, which those of each projection begin anew.
    Wide(Vec<f32>, LoraShape, Option<MatrixMut<'a, [T]>>),
}

/// An M × R matrix without gaps.
fn zeros<T: Element>(shape: LoraShape) -> Result<Vec<T>> {
    let elements = shape.m.saturating_mul(shape.r);
    let bytes = elements.saturating_mul(size_of::<T>());
    let mut scratch = Vec::new();
    scratch.try_reserve_exact(elements).map_err(|_| Error::OutOfMemory { bytes })?;
    scratch.resize(elements, T::default());
    Ok(scratch)
}

/// Whether factors of `A` are wider than the layer, and there are any.
fn is_split<T: Element, A: Element>(shape: LoraShape) -> bool {
    A::DTYPE == Dtype::F32 && T::DTYPE != Dtype::F32 && shape.r != 0
}

impl<'a, T: Element> Middle<'a, T> {
    /// h, to be computed.
    pub(super) fn of_forward<A: Element>(h: Option<MatrixMut<'a, [T]>>, shape: LoraShape) -> Result<Self> {
        match h {
            h if is_split::<T, A>(shape) => Ok(Self::Wide(zeros(shape)?, shape, h)),
            Some(h) => Ok(Self::Kept(h)),
            None => Self::scratch::<A>(shape),
        }
    }

    /// dh, to be computed.
    pub(super) fn scratch<A: Element>(shape: LoraShape) -> Result<Self> {
        if is_split::<T, A>(shape) {
            return Ok(Self::Wide(zeros(shape)?, shape, None));
        }
        Ok(Self::Scratch(zeros(shape)?, shape))
    }

    /// h as forward kept it, of projections with so many ranks.
    pub(super) fn kept<A: Element>(h: Matrix<'a, [T]>, shape: LoraShape, ranks: &[usize]) -> Result<Self> {
        if !is_split::<T, A>(shape) {
            return Ok(Self::Read(h));
        }
        let mut wide = zeros::<f32>(shape)?;
        wide.par_chunks_exact_mut(shape.r).enumerate().for_each(|(row, line)| {
            let from = &h.data[h.offset + row * h.row_stride..][..h.cols];
            let (mut line, mut from) = (line, from);
            for &r in ranks {
                let (own, others) = line.split_at_mut(r);
                for (rank, value) in own.iter_mut().enumerate() {
                    let (high, low) = halves_of(rank);
                    *value = whole(from[high], from[low]);
                }
                (line, from) = (others, &from[split_columns(r)..]);
            }
        });
        Ok(Self::Wide(wide, shape, None))
    }

    /// Some of its ranks, from a product; their halves begin in column `first`.
    pub(super) fn compute(&mut self, term: Term<'_, T>, epilogue: &Epilogue<'_>, ranks: Range<usize>, first: usize) {
        match self {
            Self::Kept(kept) => product(&[term], epilogue, reborrow_columns(kept, ranks)),
            Self::Read(_) => {} // by construction what is read is not computed
            Self::Scratch(scratch, shape) => {
                let mut whole = MatrixMut::new(scratch.as_mut_slice(), shape.m, shape.r);
                product(&[term], epilogue, reborrow_columns(&mut whole, ranks));
            }
            Self::Wide(wide, shape, kept) => {
                let mut all = MatrixMut::new(wide.as_mut_slice(), shape.m, shape.r);
                product(&[term], epilogue, reborrow_columns(&mut all, ranks.clone()));
                if let Some(kept) = kept {
                    keep_halves(wide, shape.r, ranks, reborrow(kept), first);
                }
            }
        }
    }

    /// Some of its ranks, to be multiplied.
    pub(super) fn ranks(&self, ranks: Range<usize>) -> Operand<'_, T> {
        match self {
            Self::Kept(kept) => columns_of(shared(kept), ranks).into(),
            Self::Read(read) => columns_of(*read, ranks).into(),
            Self::Scratch(scratch, shape) => columns_of(Matrix::new(&scratch[..], shape.m, shape.r), ranks).into(),
            Self::Wide(wide, shape, _) => Operand::Wide(columns_of(Matrix::new(&wide[..], shape.m, shape.r), ranks)),
        }
    }
}

/// High and low halves of some columns of a matrix that has `r`, from column `first` on; zeros past them.
fn keep_halves<T: Element>(wide: &[f32], r: usize, ranks: Range<usize>, kept: MatrixMut<'_, [T]>, first: usize) {
    let MatrixMut { data, offset, row_stride, .. } = kept;
    let lines = data[offset..].par_chunks_mut(row_stride);
    lines.zip(wide.par_chunks_exact(r)).for_each(|(line, values)| {
        let line = &mut line[first..][..split_columns(ranks.len())];
        line.fill(T::default());
        for (rank, &value) in values[ranks.clone()].iter().enumerate() {
            let (high, low) = halves_of(rank);
            (line[high], line[low]) = halves(value);
        }
    });
}
