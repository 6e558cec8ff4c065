//! What the op needs of a backend: the operations over one of candle's storages.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{Result, Storage, WithDType};

use super::op::Dropout;
use super::routes::Routes;
use super::view::View;
use crate::{Element, Seed, split_columns};

/// A matrix in one of candle's storages.
#[derive(Debug)]
pub(super) struct Operand<'a, S> {
    pub(super) storage: &'a S,
    pub(super) view: View,
}

impl<S> Clone for Operand<'_, S> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<S> Copy for Operand<'_, S> {}

impl<S> Operand<'_, S> {
    pub(super) fn first_rows(self, rows: usize) -> Self {
        Self { view: View { rows, ..self.view }, ..self }
    }
}

/// [`crate::ForwardShared`] that allocates what it writes.
pub(super) struct Forward<'a, S> {
    pub(super) x: Operand<'a, S>,
    pub(super) a: Operand<'a, S>,
    /// A and B are in f32, not in the type of W.
    pub(super) f32_factors: bool,
    pub(super) projections: Vec<ForwardProjection<'a, S>>,
    pub(super) dropout: Option<Dropout>,
    pub(super) routes: Option<&'a Routes>,
    pub(super) keep_h: bool,
}

impl<S> Forward<'_, S> {
    pub(super) fn columns_of_h(&self) -> usize {
        let ranks = self.projections.iter().map(|of| of.b.view.cols);
        if self.f32_factors { ranks.map(split_columns).sum() } else { ranks.sum() }
    }
}

/// [`crate::ForwardProjection`] that allocates y.
pub(super) struct ForwardProjection<'a, S> {
    pub(super) w: Operand<'a, S>,
    pub(super) b: Operand<'a, S>,
    pub(super) bias: Option<Operand<'a, S>>,
    /// In f32.
    pub(super) gain: Option<Operand<'a, S>>,
    pub(super) scale: f32,
}

/// y of each projection, and h where it is kept.
pub(super) struct Outputs<S> {
    pub(super) ys: Vec<S>,
    pub(super) h: Option<S>,
}

/// [`crate::BackwardShared`] that allocates what it writes.
pub(super) struct Backward<'a, S> {
    pub(super) a: Operand<'a, S>,
    pub(super) x: Operand<'a, S>,
    pub(super) h: Option<Operand<'a, S>>,
    pub(super) projections: Vec<BackwardProjection<'a, S>>,
    pub(super) dropout: Option<Dropout>,
    pub(super) routes: Option<&'a Routes>,
    pub(super) dx: bool,
    pub(super) da: Option<Precision>,
}

/// [`crate::BackwardProjection`] that allocates what it writes.
pub(super) struct BackwardProjection<'a, S> {
    pub(super) dy: Operand<'a, S>,
    pub(super) w: Operand<'a, S>,
    pub(super) b: Operand<'a, S>,
    /// In f32.
    pub(super) gain: Option<Operand<'a, S>>,
    pub(super) scale: f32,
    pub(super) db: Option<Precision>,
    pub(super) dbias: Option<Precision>,
    pub(super) dm: Option<OfMagnitude<'a, S>>,
}

impl<'a, S> BackwardProjection<'a, S> {
    /// Forward to a few columns of y, as many as fill 16 bytes.
    pub(super) fn first_columns(&self) -> ForwardProjection<'a, S> {
        let rows = self.w.view.rows.min(8);
        let (w, b) = (self.w.first_rows(rows), self.b.first_rows(rows));
        ForwardProjection { w, b, bias: None, gain: None, scale: self.scale }
    }
}

/// What the gradient of DoRA's magnitude, in f32, is computed from.
pub(super) struct OfMagnitude<'a, S> {
    pub(super) y: Operand<'a, S>,
    pub(super) bias: Option<Operand<'a, S>>,
    /// In f32.
    pub(super) magnitude: Operand<'a, S>,
}

/// [`crate::Gain`] that allocates the gain.
pub(super) struct Gain<'a, S> {
    pub(super) w: Operand<'a, S>,
    pub(super) a: Operand<'a, S>,
    pub(super) b: Operand<'a, S>,
    /// As in [`Forward`].
    pub(super) f32_factors: bool,
    pub(super) scale: f32,
    /// In f32.
    pub(super) magnitude: Operand<'a, S>,
}

/// Dropout as both operations take it.
pub(super) fn dropout<'a, U: ?Sized>(dropout: Option<Dropout>) -> Option<crate::Dropout<'a, U>> {
    dropout.map(|Dropout { p, seed, offset }| crate::Dropout { p, seed: Seed::Value { seed, offset } })
}

/// The type of the gradient of an adapter or a bias: its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Precision {
    Storage,
    F32,
}

/// What [`Backward`] asked for.
pub(super) struct Gradients<S> {
    pub(super) dx: Option<S>,
    pub(super) da: Option<S>,
    pub(super) projections: Vec<Own<S>>,
}

/// The gradients of one projection.
pub(super) struct Own<S> {
    pub(super) db: Option<S>,
    pub(super) dbias: Option<S>,
    /// In f32.
    pub(super) dm: Option<S>,
}

/// An element type that candle has, too.
#[cfg(not(feature = "candle-cuda"))]
pub(super) trait Scalar: Element + WithDType {}
#[cfg(not(feature = "candle-cuda"))]
impl<T: Element + WithDType> Scalar for T {}

/// An element type that candle has, too, in host and device memory.
#[cfg(feature = "candle-cuda")]
pub(super) trait Scalar: Element + WithDType + candle_core::cuda::CudaDType {}
#[cfg(feature = "candle-cuda")]
impl<T: Element + WithDType + candle_core::cuda::CudaDType> Scalar for T {}

pub(super) trait Backend {
    type Storage: BackendStorage<Device: BackendDevice<Storage = Self::Storage>>;
    /// The storage of this backend; an error for another's.
    fn of(storage: &Storage) -> Result<&Self::Storage>;
    fn wrap(storage: Self::Storage) -> Storage;
    /// With A and B of `A`.
    fn forward<T: Scalar, A: Scalar>(op: &Forward<'_, Self::Storage>) -> Result<Outputs<Self::Storage>>;
    /// With A and B of `A`.
    fn backward<T: Scalar, A: Scalar>(op: &Backward<'_, Self::Storage>) -> Result<Gradients<Self::Storage>>;
    /// N elements of f32.
    fn gain<T: Scalar>(op: &Gain<'_, Self::Storage>) -> Result<Self::Storage>;
}
