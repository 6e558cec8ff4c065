//! The raw layer: addresses, dimensions, strides and a dtype, for stacks on another cudarc version or none.
//!
//! [`Forward::check`] and [`Backward::check`] judge everything that can be judged without the memory itself, as do
//! [`ForwardShared::check`] and [`BackwardShared::check`] for projections that share x;
//! the typed layers above build these structs and add what they know about buffer lengths.

mod projections;

pub use projections::{
    BackwardProjection, BackwardShared, ForwardProjection, ForwardShared, MAX_PROJECTIONS, Projections,
};
pub(crate) use projections::{named, share_ranks};

use crate::{Accumulate, Dtype};

/// A row-major matrix at a device (or host) address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// Address of element (0, 0).
    pub ptr: u64,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Elements between the starts of two rows, at least `cols`.
    pub row_stride: usize,
}

impl Matrix {
    /// A contiguous matrix.
    pub const fn new(ptr: u64, rows: usize, cols: usize) -> Self {
        Self { ptr, rows, cols, row_stride: cols }
    }
}

/// da, db or dbias: where it goes and whether it is f32 or the storage type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gradient {
    /// Where it goes; dbias is a matrix of one row.
    pub matrix: Matrix,
    /// `true`: f32; `false`: the storage type of the operation.
    pub f32: bool,
}

/// Where seed and offset of dropout come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "as in crate::Seed")]
pub enum Seed {
    Value {
        seed: u64,
        offset: u64,
    },
    /// 1 × 2 elements of 64 bits.
    Memory(Matrix),
}

/// Dropout on the adapter branch, as [`crate::Dropout`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability that an element of x is dropped, from 0 to 1.
    pub p: f32,
    /// Seed and offset.
    pub seed: Seed,
}

/// How a layer departs from the plain formula, as [`crate::Variant`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Variant {
    /// Elements of x that the adapter branch does not see.
    pub dropout: Option<Dropout>,
    /// 1 × [`Routing::words_for`](crate::Routing::words_for)(M) elements of 64 bits.
    pub routes: Option<Matrix>,
    /// 1 × N elements of f32.
    pub gain: Option<Matrix>,
}

/// The gradient of DoRA's magnitude, as [`crate::MagnitudeGradient`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MagnitudeGradient {
    /// M × N.
    pub y: Matrix,
    /// 1 × N.
    pub bias: Option<Matrix>,
    /// 1 × N elements of f32.
    pub magnitude: Matrix,
    /// 1 × N elements of f32, output.
    pub dm: Matrix,
}

/// Arguments of forward; fields as in [`crate::Forward`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Forward {
    /// Storage type of every matrix but f32 factors.
    pub dtype: Dtype,
    /// M × K.
    pub x: Matrix,
    /// N × K.
    pub w: Matrix,
    /// `true`: A and B are f32, which a 16-bit layer takes at full precision; `false`: the storage type.
    pub f32_factors: bool,
    /// R × K.
    pub a: Matrix,
    /// N × R.
    pub b: Matrix,
    /// α/r or α/√r.
    pub scale: f32,
    /// 1 × N.
    pub bias: Option<Matrix>,
    /// M × R; M × [`split_columns`](crate::split_columns)(R) with f32 factors.
    pub h: Option<Matrix>,
    /// M × N.
    pub y: Matrix,
    /// Dropout, routes and DoRA.
    pub variant: Variant,
}

/// Arguments of backward; fields as in [`crate::Backward`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Backward {
    /// Storage type of every matrix except f32 factors and gradients.
    pub dtype: Dtype,
    /// M × N.
    pub dy: Matrix,
    /// N × K.
    pub w: Matrix,
    /// `true`: A and B are f32, which a 16-bit layer takes at full precision; `false`: the storage type.
    pub f32_factors: bool,
    /// R × K.
    pub a: Matrix,
    /// N × R.
    pub b: Matrix,
    /// α/r or α/√r.
    pub scale: f32,
    /// M × K, needed for da.
    pub x: Option<Matrix>,
    /// As in forward, needed for db.
    pub h: Option<Matrix>,
    /// M × K.
    pub dx: Option<Matrix>,
    /// R × K.
    pub da: Option<Gradient>,
    /// N × R.
    pub db: Option<Gradient>,
    /// 1 × N.
    pub dbias: Option<Gradient>,
    /// 1 × N.
    pub dm: Option<MagnitudeGradient>,
    /// Which outputs add to what is there.
    pub accumulate: Accumulate,
    /// Dropout, routes and DoRA.
    pub variant: Variant,
}

/// Arguments of merge; fields as in [`crate::Merge`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Merge {
    /// Storage type of w and merged.
    pub dtype: Dtype,
    /// N × K; when absent, what `merged` holds.
    pub w: Option<Matrix>,
    /// `true`: A and B are f32; `false`: the storage type.
    pub f32_factors: bool,
    /// R × K.
    pub a: Matrix,
    /// N × R.
    pub b: Matrix,
    /// α/r or α/√r.
    pub scale: f32,
    /// 1 × N elements of f32.
    pub gain: Option<Matrix>,
    /// N × K.
    pub merged: Matrix,
}

/// Arguments of round; fields as in [`crate::Round`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Round {
    /// Storage type of the layer.
    pub dtype: Dtype,
    /// `true`: A and B are f32; `false`: the storage type.
    pub f32_factors: bool,
    /// The same of both outputs.
    pub f32_rounded: bool,
    /// R × K.
    pub a: Matrix,
    /// N × R.
    pub b: Matrix,
    /// Factor of B.
    pub scale: f32,
    /// 1 × N elements of f32.
    pub divisor: Option<Matrix>,
    /// R × K.
    pub rounded_a: Matrix,
    /// N × R.
    pub rounded_b: Matrix,
}

/// Arguments of gain; fields as in [`crate::Gain`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gain {
    /// Storage type of w.
    pub dtype: Dtype,
    /// N × K.
    pub w: Matrix,
    /// `true`: A and B are f32; `false`: the storage type.
    pub f32_factors: bool,
    /// R × K.
    pub a: Matrix,
    /// N × R.
    pub b: Matrix,
    /// α/r or α/√r.
    pub scale: f32,
    /// 1 × N elements of f32.
    pub magnitude: Option<Matrix>,
    /// 1 × N elements of f32.
    pub earlier: Option<Matrix>,
    /// 1 × N elements of f32.
    pub norm: Option<Matrix>,
    /// 1 × N elements of f32.
    pub gain: Option<Matrix>,
}
