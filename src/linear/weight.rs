//! W of a layer: a buffer of its own, or rows of one that several layers share.

use std::sync::Arc;

use super::Backend;
use crate::{Element, Matrix};

/// N × K, contiguous.
pub(super) struct Weight<B: Backend, T: Element> {
    buffer: Arc<B::Buffer<T>>,
    /// Of its first element.
    offset: usize,
    n: usize,
    k: usize,
}

impl<B: Backend, T: Element> Weight<B, T> {
    pub(super) fn new(buffer: Arc<B::Buffer<T>>, offset: usize, n: usize, k: usize) -> Self {
        Self { buffer, offset, n, k }
    }

    pub(super) fn buffer(&self) -> &B::Buffer<T> {
        &self.buffer
    }

    pub(super) fn offset(&self) -> usize {
        self.offset
    }

    pub(super) fn view(&self) -> Matrix<'_, B::Read<T>> {
        Matrix::new(B::read(&self.buffer), self.n, self.k).with_offset(self.offset)
    }

    /// The buffer, where it starts with W and nobody else has it.
    pub(super) fn own(&mut self) -> Option<&mut B::Buffer<T>> {
        if self.offset == 0 { Arc::get_mut(&mut self.buffer) } else { None }
    }

    /// Another W in a buffer of its own.
    pub(super) fn replace(&mut self, buffer: B::Buffer<T>) {
        (self.buffer, self.offset) = (Arc::new(buffer), 0);
    }
}
