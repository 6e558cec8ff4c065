//! Where a layer's buffers live and what runs its operations.

use crate::cpu::{self, Cpu};
use crate::error::{Error, Result};
use crate::{BackwardShared, Dtype, Element, Forward, ForwardShared, Gain, LoraShape, Merge, Round};

/// Where a layer's buffers live and what runs its operations. A handle: clones share what is behind it.
///
/// Operations run in the order in which they are called. None waits for the ones before it, but for
/// [`download`](Self::download).
pub trait Backend: Clone {
    /// Memory that holds elements of `T`.
    type Buffer<T: Element>: Send + Sync;
    /// What is read: `[T]`, or `dyn DevicePtr<T>` on a GPU.
    type Read<T: Element>: ?Sized;
    /// What is written: `[T]`, or `dyn DevicePtrMut<T>` on a GPU.
    type Write<T: Element>: ?Sized;
    /// Words of 64 bits that are read: `[u64]`, or `dyn DevicePtr<u64>` on a GPU.
    type Words: ?Sized;
    /// Memory that holds words of 64 bits.
    type WordBuffer: Send + Sync;

    /// Whether operations of both run in one order, so that each reads what the other has written. On a GPU: on one stream.
    fn is_same(&self, _other: &Self) -> bool {
        true
    }

    /// The buffer as an operand.
    fn read<T: Element>(buffer: &Self::Buffer<T>) -> &Self::Read<T>;
    /// The buffer as an output.
    fn write<T: Element>(buffer: &mut Self::Buffer<T>) -> &mut Self::Write<T>;
    /// Its elements.
    fn len<T: Element>(buffer: &Self::Buffer<T>) -> usize {
        Self::read_len(Self::read(buffer))
    }
    /// The elements of an operand.
    fn read_len<T: Element>(operand: &Self::Read<T>) -> usize;

    /// Memory for `len` elements, which hold anything. For 0 elements there may be more.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Capturing`], [`Error::Driver`].
    fn alloc<T: Element>(&self, len: usize) -> Result<Self::Buffer<T>>;
    /// A copy of host memory.
    ///
    /// # Errors
    /// As [`alloc`](Self::alloc).
    fn upload<T: Element>(&self, from: &[T]) -> Result<Self::Buffer<T>>;
    /// Copies host memory into the first elements of a buffer.
    ///
    /// # Errors
    /// [`Error::BufferTooShort`], [`Error::Capturing`], [`Error::Driver`].
    fn overwrite<T: Element>(&self, from: &[T], to: &mut Self::Write<T>) -> Result<()>;
    /// A copy in host memory, after all operations that were called before.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Capturing`], [`Error::Driver`].
    fn download<T: Element>(&self, from: &Self::Read<T>) -> Result<Vec<T>>;

    /// A copy of words in host memory. Of none there may be more, as with [`alloc`](Self::alloc).
    ///
    /// # Errors
    /// As [`alloc`](Self::alloc).
    fn upload_words(&self, from: &[u64]) -> Result<Self::WordBuffer>;
    /// The words as an operand.
    fn words(buffer: &Self::WordBuffer) -> &Self::Words;

    /// Whether layers of this storage type can be computed.
    ///
    /// # Errors
    /// [`Error::Dtype`].
    fn check_dtype(&self, dtype: Dtype) -> Result<()>;
    /// Makes the workspace large enough for forward and backward of a shape, and of every one with fewer tokens or a lower rank.
    ///
    /// # Errors
    /// Those of planning and of [`alloc`](Self::alloc).
    fn reserve(&self, dtype: Dtype, shape: LoraShape) -> Result<()>;

    /// [`ForwardShared`], with A and B of `T` or f32.
    ///
    /// # Errors
    /// What [`raw::ForwardShared::check`](crate::raw::ForwardShared::check) finds, and the backend's own. Nothing is written then.
    #[allow(clippy::type_complexity, reason = "an operand type for each kind of argument")]
    fn forward_shared<T: Element, A: Element>(
        &self,
        op: ForwardShared<'_, Self::Read<T>, Self::Write<T>, Self::Words, Self::Read<f32>, Self::Read<A>>,
    ) -> Result<()>;
    /// [`BackwardShared`], with A and B of `T` or f32.
    ///
    /// # Errors
    /// What [`raw::BackwardShared::check`](crate::raw::BackwardShared::check) finds, and the backend's own. Nothing is written
    /// then.
    #[allow(clippy::type_complexity, reason = "an operand type for each kind of argument")]
    fn backward_shared<T: Element, A: Element>(
        &self,
        op: BackwardShared<
            '_,
            Self::Read<T>,
            Self::Write<T>,
            Self::Write<f32>,
            Self::Words,
            Self::Read<f32>,
            Self::Read<A>,
        >,
    ) -> Result<()>;
    /// [`Forward`]: the case of one projection.
    ///
    /// # Errors
    /// Those of [`forward_shared`](Self::forward_shared).
    #[allow(clippy::type_complexity, reason = "an operand type for each kind of argument")]
    fn forward<T: Element, A: Element>(
        &self,
        op: Forward<'_, Self::Read<T>, Self::Write<T>, Self::Words, Self::Read<f32>, Self::Read<A>>,
    ) -> Result<()> {
        self.forward_shared(op.into())
    }
    /// [`Merge`].
    ///
    /// # Errors
    /// What [`raw::Merge::check`](crate::raw::Merge::check) finds, and the backend's own. Nothing is written then.
    fn merge<T: Element>(&self, op: Merge<'_, Self::Read<T>, Self::Write<T>, Self::Read<f32>>) -> Result<()>;
    /// [`Round`], with outputs of `T` or f32.
    ///
    /// # Errors
    /// What [`raw::Round::check`](crate::raw::Round::check) finds, and the backend's own. Nothing is written then.
    fn round<T: Element, A: Element>(
        &self,
        op: Round<'_, Self::Read<T>, Self::Write<A>, Self::Read<f32>>,
    ) -> Result<()>;
    /// [`Gain`].
    ///
    /// # Errors
    /// What [`raw::Gain::check`](crate::raw::Gain::check) finds, and the backend's own. Nothing is written then.
    fn gain<T: Element>(&self, op: Gain<'_, Self::Read<T>, Self::Read<f32>, Self::Write<f32>>) -> Result<()>;
}

fn vector<T: Element>(len: usize) -> Result<Vec<T>> {
    let mut vector = Vec::new();
    let bytes = len.saturating_mul(size_of::<T>());
    vector.try_reserve_exact(len).map_err(|_| Error::OutOfMemory { bytes })?;
    vector.resize(len, T::default());
    Ok(vector)
}

/// The parts of a backend whose buffers are vectors.
macro_rules! host_memory {
    () => {
        type Buffer<T: Element> = Vec<T>;
        type Read<T: Element> = [T];
        type Write<T: Element> = [T];
        type Words = [u64];
        type WordBuffer = Vec<u64>;

        fn read<T: Element>(buffer: &Vec<T>) -> &[T] {
            buffer
        }
        fn write<T: Element>(buffer: &mut Vec<T>) -> &mut [T] {
            buffer
        }
        fn read_len<T: Element>(operand: &[T]) -> usize {
            operand.len()
        }
        fn alloc<T: Element>(&self, len: usize) -> Result<Vec<T>> {
            vector(len)
        }
        fn upload<T: Element>(&self, from: &[T]) -> Result<Vec<T>> {
            let mut buffer = vector(from.len())?;
            buffer.copy_from_slice(from);
            Ok(buffer)
        }
        fn overwrite<T: Element>(&self, from: &[T], to: &mut [T]) -> Result<()> {
            let short = Error::BufferTooShort { arg: "to", got: to.len(), needed: from.len() };
            to.get_mut(..from.len()).ok_or(short)?.copy_from_slice(from);
            Ok(())
        }
        fn download<T: Element>(&self, from: &[T]) -> Result<Vec<T>> {
            self.upload(from)
        }
        fn upload_words(&self, from: &[u64]) -> Result<Vec<u64>> {
            let mut words = Vec::new();
            words.try_reserve_exact(from.len()).map_err(|_| Error::OutOfMemory { bytes: size_of_val(from) })?;
            words.extend_from_slice(from);
            Ok(words)
        }
        fn words(buffer: &Vec<u64>) -> &[u64] {
            buffer
        }
        fn reserve(&self, _: Dtype, _: LoraShape) -> Result<()> {
            Ok(())
        }
    };
}

impl Backend for Cpu {
    host_memory!();

    fn check_dtype(&self, _: Dtype) -> Result<()> {
        Ok(())
    }
    fn forward_shared<T: Element, A: Element>(&self, op: cpu::ForwardShared<'_, T, A>) -> Result<()> {
        cpu::forward_shared(op)
    }
    fn backward_shared<T: Element, A: Element>(&self, op: cpu::BackwardShared<'_, T, A>) -> Result<()> {
        cpu::backward_shared(op)
    }
    fn merge<T: Element>(&self, op: cpu::Merge<'_, T>) -> Result<()> {
        cpu::merge(op)
    }
    fn round<T: Element, A: Element>(&self, op: cpu::Round<'_, T, A>) -> Result<()> {
        cpu::round(op)
    }
    fn gain<T: Element>(&self, op: cpu::Gain<'_, T>) -> Result<()> {
        cpu::gain(op)
    }
}

#[cfg(all(feature = "emulator", feature = "cuda"))]
impl Backend for crate::emulator::Emulator {
    host_memory!();

    fn check_dtype(&self, dtype: Dtype) -> Result<()> {
        crate::plan::check_dtype(dtype)
    }
    fn forward_shared<T: Element, A: Element>(&self, op: cpu::ForwardShared<'_, T, A>) -> Result<()> {
        self.forward_shared(op).map(drop)
    }
    fn backward_shared<T: Element, A: Element>(&self, op: cpu::BackwardShared<'_, T, A>) -> Result<()> {
        self.backward_shared(op).map(drop)
    }
    fn merge<T: Element>(&self, op: cpu::Merge<'_, T>) -> Result<()> {
        self.merge(op).map(drop)
    }
    fn round<T: Element, A: Element>(&self, op: cpu::Round<'_, T, A>) -> Result<()> {
        self.round(op).map(drop)
    }
    fn gain<T: Element>(&self, op: cpu::Gain<'_, T>) -> Result<()> {
        self.gain(op).map(drop)
    }
}
