//! An adapter: its factors, its rank and its scale.

use std::{fmt, mem};

use super::{Backend, check_elements, elements};
use crate::error::{Error, Result};
use crate::{Dtype, Element, Factors, Matrix};

/// How the scale s follows from α and the rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scaling {
    /// α / r.
    Lora {
        /// PEFT's `lora_alpha`.
        alpha: f64,
    },
    /// α / √r: rank-stabilised LoRA, PEFT's `use_rslora`.
    RsLora {
        /// PEFT's `lora_alpha`.
        alpha: f64,
    },
    /// The scale itself.
    Fixed(f64),
}

impl Scaling {
    /// The scale at a rank, rounded to f32 once; 1 at rank 0, where nothing is scaled.
    ///
    /// ```
    /// use fused_lora::linear::Scaling;
    ///
    /// assert_eq!(Scaling::Lora { alpha: 16.0 }.scale(8), 2.0);
    /// assert_eq!(Scaling::RsLora { alpha: 8.0 }.scale(16), 2.0);
    /// ```
    pub fn scale(self, rank: usize) -> f32 {
        let r = rank as f64;
        match self {
            _ if rank == 0 => 1.0,
            Self::Lora { alpha } => (alpha / r) as f32,
            Self::RsLora { alpha } => (alpha / r.sqrt()) as f32,
            Self::Fixed(scale) => scale as f32,
        }
    }
}

/// A value that was not taken, with why. Turns into the [`Error`] alone where the value does not matter.
pub struct Rejected<V> {
    /// Why.
    pub error: Error,
    /// What was passed, as it was.
    pub value: V,
}

impl<V> fmt::Debug for Rejected<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rejected").field("error", &self.error).finish_non_exhaustive()
    }
}

impl<V> fmt::Display for Rejected<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl<V> std::error::Error for Rejected<V> {}

impl<V> From<Rejected<V>> for Error {
    fn from(rejected: Rejected<V>) -> Self {
        rejected.error
    }
}

/// A (R × K) and B (N × R), contiguous, and what is added to B's product where the adapter has it, in one type; beside them the
/// magnitude of DoRA, which is f32 in any case.
pub enum Buffers<B: Backend, T: Element> {
    /// In the storage type of the layer.
    Storage {
        /// R × K.
        a: B::Buffer<T>,
        /// N × R.
        b: B::Buffer<T>,
        /// N, PEFT's `lora_bias`: y += s · (B A x + this).
        b_bias: Option<B::Buffer<T>>,
        /// N, PEFT's `use_dora`: y = this / ‖W + s · B A‖ ∘ (x Wᵀ + s · x Aᵀ Bᵀ) (+ bias), norms of rows.
        magnitude: Option<B::Buffer<f32>>,
    },
    /// In f32, as PEFT keeps them by default while they are trained.
    F32 {
        /// R × K.
        a: B::Buffer<f32>,
        /// N × R.
        b: B::Buffer<f32>,
        /// N, PEFT's `lora_bias`: y += s · (B A x + this).
        b_bias: Option<B::Buffer<f32>>,
        /// N, PEFT's `use_dora`: y = this / ‖W + s · B A‖ ∘ (x Wᵀ + s · x Aᵀ Bᵀ) (+ bias), norms of rows.
        magnitude: Option<B::Buffer<f32>>,
    },
}

/// The parts of an adapter, to be changed.
pub enum BuffersMut<'a, B: Backend, T: Element> {
    /// In the storage type of the layer.
    Storage {
        /// R × K.
        a: &'a mut B::Write<T>,
        /// N × R.
        b: &'a mut B::Write<T>,
        /// N, where the adapter has it.
        b_bias: Option<&'a mut B::Write<T>>,
        /// N, where the adapter has it.
        magnitude: Option<&'a mut B::Write<f32>>,
    },
    /// In f32.
    F32 {
        /// R × K.
        a: &'a mut B::Write<f32>,
        /// N × R.
        b: &'a mut B::Write<f32>,
        /// N, where the adapter has it.
        b_bias: Option<&'a mut B::Write<f32>>,
        /// N, where the adapter has it.
        magnitude: Option<&'a mut B::Write<f32>>,
    },
}

/// The factors of an adapter with their rank and scale, and what else it has.
pub struct Adapter<B: Backend, T: Element> {
    rank: usize,
    scale: f32,
    buffers: Buffers<B, T>,
    at_full_precision: bool,
}

impl<B: Backend, T: Element> Adapter<B, T> {
    /// An adapter over buffers of the backend. Whether they have the layer's dimensions is checked by
    /// [`LoraLinear::add`](super::LoraLinear::add).
    ///
    /// # Errors
    /// [`Error::Scale`] when the scale is not finite; the buffers come back with it.
    pub fn new(rank: usize, scaling: Scaling, buffers: Buffers<B, T>) -> Result<Self, Rejected<Buffers<B, T>>> {
        let scale = scaling.scale(rank);
        if scale.is_finite() {
            Ok(Self { rank, scale, buffers, at_full_precision: false })
        } else {
            Err(Rejected { error: Error::Scale { arg: "scale", got: scale }, value: buffers })
        }
    }

    /// An adapter in the storage type, from host memory: `a` is R × K, `b` is N × R.
    ///
    /// # Errors
    /// As [`new`](Self::new), and those of [`Backend::upload`].
    pub fn upload(backend: &B, rank: usize, scaling: Scaling, a: &[T], b: &[T]) -> Result<Self> {
        let buffers = Buffers::Storage { a: backend.upload(a)?, b: backend.upload(b)?, b_bias: None, magnitude: None };
        Ok(Self::new(rank, scaling, buffers)?)
    }

    /// An adapter in f32, from host memory: `a` is R × K, `b` is N × R.
    ///
    /// # Errors
    /// As [`new`](Self::new), and those of [`Backend::upload`].
    pub fn upload_f32(backend: &B, rank: usize, scaling: Scaling, a: &[f32], b: &[f32]) -> Result<Self> {
        let buffers = Buffers::F32 { a: backend.upload(a)?, b: backend.upload(b)?, b_bias: None, magnitude: None };
        Ok(Self::new(rank, scaling, buffers)?)
    }

    /// The same with a bias of its own on B (PEFT's `lora_bias`), N elements, rounded once to the type of A and B:
    /// y = x Wᵀ + s · (x Aᵀ Bᵀ + `b_bias`) (+ bias).
    ///
    /// # Errors
    /// Those of [`Backend::upload`].
    pub fn with_b_bias(mut self, backend: &B, b_bias: &[f32]) -> Result<Self> {
        match &mut self.buffers {
            Buffers::Storage { b_bias: to, .. } => {
                let rounded: Vec<T> = b_bias.iter().map(|&value| T::from_f32(value)).collect();
                *to = Some(backend.upload(&rounded)?);
            }
            Buffers::F32 { b_bias: to, .. } => *to = Some(backend.upload(b_bias)?),
        }
        Ok(self)
    }

    /// The same with a magnitude of N elements: DoRA (PEFT's `use_dora`). y = gain ∘ (x Wᵀ + s · x Aᵀ Bᵀ) (+ bias), where
    /// gain = magnitude / ‖W + s · B A‖ by rows is computed whenever the adapter changes; gradients take the norm for a constant.
    /// A new adapter starts from the norms: [`LoraLinear::add_dora`](super::LoraLinear::add_dora).
    ///
    /// # Errors
    /// Those of [`Backend::upload`].
    pub fn with_magnitude(mut self, backend: &B, magnitude: &[f32]) -> Result<Self> {
        self.replace_magnitude(Some(backend.upload(magnitude)?));
        Ok(self)
    }

    /// The same, but products read f32 factors as they are and keep both halves of each number, as PEFT does by default over a
    /// 16-bit base: y and dx have one rounding, da and db nearly the precision of f32 ([`Forward`](crate::Forward) says how
    /// exact they are). Forward and backward stay one launch each; h has [`split_columns`](crate::split_columns)(R) columns, and
    /// no copies in the storage type are held. An adapter in the storage type stays as it is, and so does one of a layer in f32.
    ///
    /// Where several adapters take part ([`activate_all`](super::LoraLinear::activate_all)) and in a [`Bank`](super::Bank) one of them
    /// is enough for the copies of all to be f32. In a group of layers ([`LoraProjections`](super::LoraProjections)) all adapters that take
    /// part are at full precision, or none.
    #[must_use]
    pub fn at_full_precision(self) -> Self {
        Self { at_full_precision: true, ..self }
    }

    /// Whether products read f32 factors as they are.
    pub fn is_at_full_precision(&self) -> bool {
        self.at_full_precision && T::DTYPE != Dtype::F32 && matches!(self.buffers, Buffers::F32 { .. })
    }

    /// Returns the one before.
    pub(super) fn replace_magnitude(&mut self, new: Option<B::Buffer<f32>>) -> Option<B::Buffer<f32>> {
        match &mut self.buffers {
            Buffers::Storage { magnitude, .. } | Buffers::F32 { magnitude, .. } => mem::replace(magnitude, new),
        }
    }

    /// R.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// s.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Whether B has a bias of its own.
    pub fn has_b_bias(&self) -> bool {
        match &self.buffers {
            Buffers::Storage { b_bias, .. } => b_bias.is_some(),
            Buffers::F32 { b_bias, .. } => b_bias.is_some(),
        }
    }

    /// Whether it is one of DoRA.
    pub fn has_magnitude(&self) -> bool {
        self.magnitude().is_some()
    }

    /// DoRA's magnitude, N elements.
    pub fn magnitude(&self) -> Option<&B::Buffer<f32>> {
        match &self.buffers {
            Buffers::Storage { magnitude, .. } | Buffers::F32 { magnitude, .. } => magnitude.as_ref(),
        }
    }

    /// A and B.
    pub fn buffers(&self) -> &Buffers<B, T> {
        &self.buffers
    }

    /// A and B, given away.
    pub fn into_buffers(self) -> Buffers<B, T> {
        self.buffers
    }

    pub(super) fn buffers_mut(&mut self) -> BuffersMut<'_, B, T> {
        match &mut self.buffers {
            Buffers::Storage { a, b, b_bias, magnitude } => BuffersMut::Storage {
                a: B::write(a),
                b: B::write(b),
                b_bias: b_bias.as_mut().map(B::write),
                magnitude: magnitude.as_mut().map(B::write),
            },
            Buffers::F32 { a, b, b_bias, magnitude } => BuffersMut::F32 {
                a: B::write(a),
                b: B::write(b),
                b_bias: b_bias.as_mut().map(B::write),
                magnitude: magnitude.as_mut().map(B::write),
            },
        }
    }

    /// As an operation takes them.
    pub(super) fn factors(&self, n: usize, k: usize) -> Factors<'_, B::Read<T>, B::Read<f32>> {
        let r = self.rank;
        match &self.buffers {
            Buffers::Storage { a, b, .. } => {
                Factors::Storage { a: Matrix::new(B::read(a), r, k), b: Matrix::new(B::read(b), n, r) }
            }
            Buffers::F32 { a, b, .. } => {
                Factors::F32 { a: Matrix::new(B::read(a), r, k), b: Matrix::new(B::read(b), n, r) }
            }
        }
    }

    /// All parts must have the layer's dimensions.
    pub(super) fn check(&self, n: usize, k: usize) -> Result<()> {
        let (a, b, b_bias) = match &self.buffers {
            Buffers::Storage { a, b, b_bias, .. } => (B::len(a), B::len(b), b_bias.as_ref().map(B::len)),
            Buffers::F32 { a, b, b_bias, .. } => (B::len(a), B::len(b), b_bias.as_ref().map(B::len)),
        };
        check_elements("a", a, elements("the number of elements of a", self.rank, k)?)?;
        check_elements("b", b, elements("the number of elements of b", n, self.rank)?)?;
        if let Some(magnitude) = self.magnitude() {
            check_elements("magnitude", B::len(magnitude), n)?;
            if b_bias.is_some() {
                return Err(Error::Exclusive { arg: "magnitude", other: "b_bias" });
            }
        }
        b_bias.map_or(Ok(()), |b_bias| check_elements("b_bias", b_bias, n))
    }
}

impl<B: Backend, T: Element> fmt::Debug for Adapter<B, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let f32_factors = matches!(self.buffers, Buffers::F32 { .. });
        f.debug_struct("Adapter")
            .field("rank", &self.rank)
            .field("scale", &self.scale)
            .field("f32_factors", &f32_factors)
            .field("at_full_precision", &self.is_at_full_precision())
            .field("b_bias", &self.has_b_bias())
            .field("magnitude", &self.has_magnitude())
            .finish_non_exhaustive()
    }
}
