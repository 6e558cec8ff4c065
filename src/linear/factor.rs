//! A and B as operations read them.

use super::set::Named;
use super::{Backend, Buffers, Operands, elements};
use crate::error::{Error, Result};
use crate::{Element, Factors, Matrix, MatrixMut, Round, split_columns};

/// A or B.
pub(super) enum Factor<'a, B: Backend, T: Element> {
    /// In the storage type of the layer: its own, or a copy.
    Storage(Matrix<'a, B::Read<T>>),
    /// The adapter's own at full precision, or a copy.
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

    /// Without columns it lies nowhere in particular: where `a` does.
    pub(super) fn in_f32(self, a: Matrix<'a, B::Read<f32>>) -> Option<Matrix<'a, B::Read<f32>>> {
        match self {
            Self::Storage(Matrix { rows, cols: 0, .. }) => Some(Matrix { rows, cols: 0, ..a }),
            Self::Storage(_) => None,
            Self::F32(matrix) => Some(matrix),
        }
    }
}

/// Columns of h, given A of all and the operands of each: halves of each rank at full precision.
pub(super) fn columns_of_h<B: Backend, T: Element>(a: Factor<'_, B, T>, operands: &[Operands<'_, B, T>]) -> usize {
    let ranks = operands.iter().map(|of| of.a.rows());
    match a {
        Factor::Storage(_) => ranks.sum(),
        Factor::F32(_) => ranks.map(split_columns).sum(),
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

/// A and B of several adapters side by side, copied: in the storage type, or in f32 where one of them is at full precision.
pub(super) struct Copies<B: Backend, T: Element> {
    /// A, ΣR × K, and B, N × ΣR.
    buffers: Buffers<B, T>,
    n: usize,
    k: usize,
    rank: usize,
}

/// What is copied of an adapter: A, and scale · B over a divisor.
pub(super) struct Put<'a, B: Backend, T: Element> {
    pub(super) factors: Factors<'a, B::Read<T>, B::Read<f32>>,
    pub(super) scale: f32,
    pub(super) divisor: Option<Matrix<'a, B::Read<f32>>>,
}

impl<B: Backend, T: Element> Copies<B, T> {
    /// Room for adapters of `rank` ranks with what lies between them, in f32 where `is_full`; zeros where `zeroed`, and anything otherwise.
    pub(super) fn new(backend: &B, (n, k, rank): (usize, usize, usize), is_full: bool, zeroed: bool) -> Result<Self> {
        let lengths =
            [elements("the number of elements of a", rank, k)?, elements("the number of elements of b", n, rank)?];
        let (b_bias, magnitude) = (None, None);
        let buffers = if is_full {
            let [a, b] = room(backend, lengths, zeroed)?;
            Buffers::F32 { a, b, b_bias: None, magnitude }
        } else {
            let [a, b] = room(backend, lengths, zeroed)?;
            Buffers::Storage { a, b, b_bias, magnitude }
        };
        Ok(Self { buffers, n, k, rank })
    }

    /// Whether copies of these adapters are f32: one at full precision is enough.
    pub(super) fn are_full(chosen: &[&Named<B, T>]) -> bool {
        chosen.iter().any(|named| named.adapter.is_at_full_precision() && named.adapter.rank() != 0)
    }

    /// Copies `ranks` ranks of an adapter to their place, from `first` on: one launch.
    pub(super) fn put(&mut self, backend: &B, first: usize, ranks: usize, from: Put<'_, B, T>) -> Result<()> {
        let (n, k, rank) = (self.n, self.k, self.rank);
        match &mut self.buffers {
            Buffers::Storage { a, b, .. } => put::<_, _, T>(backend, (a, b), (n, k, rank), (first, ranks), from),
            Buffers::F32 { a, b, .. } => put::<_, _, f32>(backend, (a, b), (n, k, rank), (first, ranks), from),
        }
    }

    pub(super) fn buffers(&self) -> &Buffers<B, T> {
        &self.buffers
    }

    /// As operations read them.
    pub(super) fn read(&self) -> (Factor<'_, B, T>, Factor<'_, B, T>) {
        let Self { n, k, rank, .. } = *self;
        match &self.buffers {
            Buffers::Storage { a, b, .. } => {
                (Factor::Storage(Matrix::new(B::read(a), rank, k)), Factor::Storage(Matrix::new(B::read(b), n, rank)))
            }
            Buffers::F32 { a, b, .. } => {
                (Factor::F32(Matrix::new(B::read(a), rank, k)), Factor::F32(Matrix::new(B::read(b), n, rank)))
            }
        }
    }
}

fn room<B: Backend, A: Element>(backend: &B, lengths: [usize; 2], zeroed: bool) -> Result<[B::Buffer<A>; 2]> {
    let [a, b] = lengths.map(|len| if zeroed { backend.upload(&vec![A::default(); len]) } else { backend.alloc(len) });
    Ok([a?, b?])
}

fn put<B: Backend, T: Element, A: Element>(
    backend: &B,
    (a, b): (&mut B::Buffer<A>, &mut B::Buffer<A>),
    (n, k, rank): (usize, usize, usize),
    (first, ranks): (usize, usize),
    Put { factors, scale, divisor }: Put<'_, B, T>,
) -> Result<()> {
    backend.round::<T, A>(Round {
        factors,
        scale,
        divisor,
        rounded_a: MatrixMut::new(B::write(a), ranks, k).with_offset(first * k),
        rounded_b: MatrixMut::new(B::write(b), n, ranks).with_offset(first).with_row_stride(rank),
    })
}
