//! A and B as operations read them.

use super::{Backend, Operands};
use crate::error::{Error, Result};
use crate::{Element, Matrix, split_columns};

/// A or B.
pub(super) enum Factor<'a, B: Backend, T: Element> {
    /// In the storage type of the layer: its own, or a copy.
    Storage(Matrix<'a, B::Read<T>>),
    /// The adapter's own, at full precision.
    F32(Matrix<'a, B::Read<f32>>),
}

impl<B: Backend, T: Element> Clone for Factor<'_, B, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Backend, T: Element> Copy for Factor<'_, B, T> {}

impl<'a, B: Backend, T: Element> Factor<'a, B, T> {
    pub(super) fn rows(&self) -> usize {
        match self {
            Self::Storage(matrix) => matrix.rows,
            Self::F32(matrix) => matrix.rows,
        }
    }

    /// The first rows.
    pub(super) fn with_rows(self, rows: usize) -> Self {
        match self {
            Self::Storage(matrix) => Self::Storage(Matrix { rows, ..matrix }),
            Self::F32(matrix) => Self::F32(Matrix { rows, ..matrix }),
        }
    }

    pub(super) fn in_storage(self) -> Option<Matrix<'a, B::Read<T>>> {
        match self {
            Self::Storage(matrix) => Some(matrix),
            Self::F32(_) => None,
        }
    }

    pub(super) fn in_f32(self) -> Option<Matrix<'a, B::Read<f32>>> {
        match self {
            Self::Storage(_) => None,
            Self::F32(matrix) => Some(matrix),
        }
    }
}

/// Columns of h, given A: halves of each rank at full precision.
pub(super) fn columns_of_h<B: Backend, T: Element>(a: Factor<'_, B, T>) -> usize {
    match a {
        Factor::Storage(a) => a.rows,
        Factor::F32(a) => split_columns(a.rows),
    }
}

/// B of every layer, in the type of A that `read` finds.
pub(super) fn each_b<'a, B: Backend, T: Element, M>(
    operands: Vec<Operands<'a, B, T>>,
    read: impl Fn(Factor<'a, B, T>) -> Option<M>,
) -> Result<Vec<(Operands<'a, B, T>, M)>> {
    let refused = Error::Projections { got: operands.len(), limit: 1 };
    operands.into_iter().map(|of| read(of.b).map(|b| (of, b))).collect::<Option<_>>().ok_or(refused)
}
