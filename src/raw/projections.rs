//! Projections that share x: the general form of both operations, of which a single layer is the case of one.

use std::fmt;
use std::ops::{Deref, DerefMut};

use super::{Backward, Dropout, Forward, Gradient, MagnitudeGradient, Matrix, Variant};
use crate::error::{Error, Result};
use crate::params::LORA_MAX_PROJECTIONS;
use crate::{Accumulate, Dtype};

/// Largest number of projections that share x in one launch.
pub const MAX_PROJECTIONS: usize = LORA_MAX_PROJECTIONS as usize;

/// From one to [`MAX_PROJECTIONS`] projections, in place: a slice of them.
#[derive(Clone, Copy)]
pub struct Projections<P> {
    held: [P; MAX_PROJECTIONS],
    len: usize,
}

impl<P: Copy> Projections<P> {
    /// One alone.
    pub const fn one(projection: P) -> Self {
        Self { held: [projection; MAX_PROJECTIONS], len: 1 }
    }

    /// Those of a slice.
    ///
    /// # Errors
    /// [`Error::Projections`] for none, and for more than [`MAX_PROJECTIONS`].
    pub fn new(projections: &[P]) -> Result<Self> {
        let len = projections.len();
        let mut held = match projections {
            [first, ..] if len <= MAX_PROJECTIONS => [*first; MAX_PROJECTIONS],
            _ => return Err(Error::Projections { got: len, limit: MAX_PROJECTIONS }),
        };
        held[..len].copy_from_slice(projections);
        Ok(Self { held, len })
    }

    /// As many of something else.
    pub(crate) fn map<Q>(self, of: impl FnMut(P) -> Q) -> Projections<Q> {
        Projections { held: self.held.map(of), len: self.len }
    }
}

impl<P> Deref for Projections<P> {
    type Target = [P];
    fn deref(&self) -> &[P] {
        &self.held[..self.len]
    }
}

impl<P> DerefMut for Projections<P> {
    fn deref_mut(&mut self) -> &mut [P] {
        &mut self.held[..self.len]
    }
}

impl<P: PartialEq> PartialEq for Projections<P> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl<P: fmt::Debug> fmt::Debug for Projections<P> {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.deref().fmt(to)
    }
}

/// One of the projections of [`ForwardShared`]; fields as in [`crate::ForwardProjection`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ForwardProjection {
    /// N × K.
    pub w: Matrix,
    /// N × R.
    pub b: Matrix,
    /// α/r or α/√r.
    pub scale: f32,
    /// 1 × N.
    pub bias: Option<Matrix>,
    /// 1 × N elements of f32.
    pub gain: Option<Matrix>,
    /// M × N.
    pub y: Matrix,
}

/// Arguments of forward for projections that share x; fields as in [`crate::ForwardShared`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ForwardShared {
    /// Storage type of every matrix but f32 factors.
    pub dtype: Dtype,
    /// M × K.
    pub x: Matrix,
    /// `true`: A and B are f32, which a 16-bit layer takes at full precision; `false`: the storage type.
    pub f32_factors: bool,
    /// ΣR × K.
    pub a: Matrix,
    /// M × ΣR; M × Σ [`split_columns`](crate::split_columns)(R) with f32 factors.
    pub h: Option<Matrix>,
    /// What is computed from x.
    pub projections: Projections<ForwardProjection>,
    /// Elements of x that no adapter branch sees.
    pub dropout: Option<Dropout>,
    /// 1 × [`Routing::words_for`](crate::Routing::words_for)(M) elements of 64 bits; with one projection alone.
    pub routes: Option<Matrix>,
}

impl ForwardShared {
    /// Whether factors are to be split: f32 over a 16-bit layer. Without a rank there are none.
    pub(crate) fn is_split(&self) -> bool {
        self.f32_factors && self.dtype != Dtype::F32 && self.a.rows != 0
    }
}

impl From<&Forward> for ForwardShared {
    fn from(op: &Forward) -> Self {
        let Forward { dtype, x, w, f32_factors, a, b, scale, bias, h, y, variant } = *op;
        let Variant { dropout, routes, gain } = variant;
        let projections = Projections::one(ForwardProjection { w, b, scale, bias, gain, y });
        Self { dtype, x, f32_factors, a, h, projections, dropout, routes }
    }
}

/// One of the projections of [`BackwardShared`]; fields as in [`crate::BackwardProjection`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BackwardProjection {
    /// M × N.
    pub dy: Matrix,
    /// N × K.
    pub w: Matrix,
    /// N × R.
    pub b: Matrix,
    /// α/r or α/√r.
    pub scale: f32,
    /// N × R.
    pub db: Option<Gradient>,
    /// 1 × N.
    pub dbias: Option<Gradient>,
    /// 1 × N.
    pub dm: Option<MagnitudeGradient>,
    /// 1 × N elements of f32, as in forward.
    pub gain: Option<Matrix>,
}

/// Arguments of backward for projections that share x; fields as in [`crate::BackwardShared`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BackwardShared {
    /// Storage type of every matrix except f32 factors and gradients.
    pub dtype: Dtype,
    /// As in forward.
    pub f32_factors: bool,
    /// ΣR × K.
    pub a: Matrix,
    /// M × K, needed for da.
    pub x: Option<Matrix>,
    /// As in forward, needed for db.
    pub h: Option<Matrix>,
    /// M × K.
    pub dx: Option<Matrix>,
    /// ΣR × K.
    pub da: Option<Gradient>,
    /// What was computed from x.
    pub projections: Projections<BackwardProjection>,
    /// Which outputs add to what is there.
    pub accumulate: Accumulate,
    /// Elements of x that no adapter branch sees.
    pub dropout: Option<Dropout>,
    /// 1 × [`Routing::words_for`](crate::Routing::words_for)(M) elements of 64 bits; with one projection alone.
    pub routes: Option<Matrix>,
}

impl BackwardShared {
    /// As [`ForwardShared::is_split`].
    pub(crate) fn is_split(&self) -> bool {
        self.f32_factors && self.dtype != Dtype::F32 && self.a.rows != 0
    }
}

impl From<&Backward> for BackwardShared {
    fn from(op: &Backward) -> Self {
        let Backward { dtype, dy, w, f32_factors, a, b, scale, x, h, dx, da, db, dbias, dm, accumulate, variant } = *op;
        let Variant { dropout, routes, gain } = variant;
        let projections = Projections::one(BackwardProjection { dy, w, b, scale, db, dbias, dm, gain });
        Self { dtype, f32_factors, a, x, h, dx, da, projections, accumulate, dropout, routes }
    }
}

/// The name of an argument of projection `at` of `count`: where there is one alone, that of a single layer's.
pub(crate) fn named(name: &'static str, at: usize, count: usize) -> &'static str {
    macro_rules! table {
        ($($known:literal)*) => {
            match (name, at) {
                $(($known, 0) => concat!($known, " of projection 0"),
                  ($known, 1) => concat!($known, " of projection 1"),
                  ($known, 2) => concat!($known, " of projection 2"),
                  ($known, 3) => concat!($known, " of projection 3"),)*
                _ => name,
            }
        };
    }
    if count == 1 {
        return name;
    }
    table!("w" "a" "b" "scale" "bias" "gain" "y" "dy" "db" "dbias" "magnitude" "dm")
}

/// The ranks that each projection has of the `r` of all, from the columns of their b in turn: the last has what is left, and
/// none has more than that. A b of other columns is at odds with a.
pub(crate) fn share_ranks(r: usize, columns: &[usize]) -> Vec<usize> {
    let last = columns.len().saturating_sub(1);
    let mut left = r;
    let share = |(at, &columns): (usize, &usize)| {
        let ranks = if at == last { left } else { columns.min(left) };
        left -= ranks;
        ranks
    };
    columns.iter().enumerate().map(share).collect()
}
