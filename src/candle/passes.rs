//! Dropout of a layer, whose every training pass has a mask of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Dropout, check};
use crate::error::Result;

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

    pub(super) fn made(&self) -> u64 {
        self.made.load(Ordering::Relaxed)
    }

    pub(super) fn set(&self, made: u64) {
        self.made.store(made, Ordering::Relaxed);
    }

    /// That of another pass.
    pub(super) fn next(&self) -> Dropout {
        Dropout { p: self.p, seed: self.seed, offset: self.made.fetch_add(1, Ordering::Relaxed) }
    }
}
