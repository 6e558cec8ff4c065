//! How a layer, or a group of them, departs from the default: dropout whose every training pass has a mask of its own, h computed
//! again, f32 adapters read as they are.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::op::{Masks, Pass};
use super::{Dropout, check};
use crate::error::Result;

/// What a pass through a layer is made of.
#[derive(Clone, Debug, Default)]
pub(super) struct Modes {
    pub(super) dropout: Option<Passes>,
    pub(super) recompute: bool,
    pub(super) full_precision: bool,
}

impl Modes {
    /// Training passes with dropout so far.
    pub(super) fn passes(&self) -> u64 {
        self.dropout.as_ref().map_or(0, |dropout| dropout.made.load(Ordering::Relaxed))
    }

    pub(super) fn set_passes(&self, passes: u64) {
        if let Some(dropout) = &self.dropout {
            dropout.made.store(passes, Ordering::Relaxed);
        }
    }

    /// With dropout in training.
    pub(super) fn pass(&self, train: bool) -> Pass<'_> {
        let masks = self.dropout.as_ref().filter(|_| train).map(Masks::Next);
        Pass { masks, recompute: self.recompute, full_precision: self.full_precision }
    }
}

/// Dropout, and the number of training passes, which is the offset of the next one.
#[derive(Clone, Debug)]
pub(super) struct Passes {
    pub(super) p: f32,
    seed: u64,
    /// Shared by clones, whose masks would be the same otherwise.
    made: Arc<AtomicU64>,
}

impl Passes {
    pub(super) fn new(p: f32, seed: u64) -> Result<Self> {
        check::probability(p)?;
        Ok(Self { p, seed, made: Arc::default() })
    }

    /// That of another pass.
    pub(super) fn next(&self) -> Dropout {
        Dropout { p: self.p, seed: self.seed, offset: self.made.fetch_add(1, Ordering::Relaxed) }
    }
}
