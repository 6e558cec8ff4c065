//! From buffers to addresses, with the guards that order the streams.

use std::sync::Arc;

use cudarc::driver::sys::CUresult;
use cudarc::driver::{CudaContext, CudaStream, DevicePtr, DevicePtrMut, SyncOnDrop};

use super::driver::failed;
use super::{BackwardShared, ForwardShared, Gain, Merge, Round};
use crate::error::{Error, Result};
use crate::shape::{check_factors, check_length};
use crate::{Dropout, Dtype, Element, Factors, Gradient, MagnitudeGradient, Matrix, MatrixMut, Seed, raw};

/// The buffers of one operation while it is being launched.
///
/// Taking an address makes the stream wait for what other streams do with the buffer; dropping this, after the launch,
/// tells other streams to wait for ours.
pub(super) struct Access<'s> {
    context: &'s CudaContext,
    stream: &'s CudaStream,
    guards: Vec<SyncOnDrop<'s>>,
    /// The first matrix that leaves its buffer.
    lengths: Result<()>,
}

/// `got` must be the context of the kernels.
pub(super) fn check_context(arg: &'static str, got: &CudaContext, expected: &CudaContext) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::WrongContext { arg, got: got.ordinal(), expected: expected.ordinal() })
}

impl<'s> Access<'s> {
    pub(super) fn new(context: &'s CudaContext, stream: &'s CudaStream) -> Result<Self> {
        check_context("stream", stream.context(), context)?;
        Ok(Self { context, stream, guards: Vec::with_capacity(32), lengths: Ok(()) })
    }

    pub(super) fn forward<T: Element, A: Element>(
        &mut self,
        op: &'s mut ForwardShared<'_, T, A>,
    ) -> Result<raw::ForwardShared> {
        check_factors::<T, A>("a")?;
        let (x, a) = (self.read("x", op.x)?, self.read("a", op.a)?);
        let count = op.projections.len();
        let mut projections = Vec::with_capacity(count);
        for (at, of) in op.projections.iter_mut().enumerate() {
            let name = |arg| raw::named(arg, at, count);
            projections.push(raw::ForwardProjection {
                w: self.read(name("w"), of.w)?,
                b: self.read(name("b"), of.b)?,
                scale: of.scale,
                bias: of.bias.map(|bias| self.read(name("bias"), bias)).transpose()?,
                gain: of.gain.map(|gain| self.read(name("gain"), gain)).transpose()?,
                y: self.write(name("y"), &mut of.y)?,
            });
        }
        Ok(raw::ForwardShared {
            dtype: T::DTYPE,
            x,
            f32_factors: A::DTYPE == Dtype::F32,
            a,
            h: op.h.as_mut().map(|h| self.write("h", h)).transpose()?,
            projections: raw::Projections::new(&projections)?,
            dropout: self.dropout(&op.dropout)?,
            routes: op.routes.map(|routes| self.read("routes", routes)).transpose()?,
        })
    }

    pub(super) fn backward<T: Element, A: Element>(
        &mut self,
        op: &'s mut BackwardShared<'_, T, A>,
    ) -> Result<raw::BackwardShared> {
        check_factors::<T, A>("a")?;
        let count = op.projections.len();
        let mut projections = Vec::with_capacity(count);
        for (at, of) in op.projections.iter_mut().enumerate() {
            let name = |arg| raw::named(arg, at, count);
            projections.push(raw::BackwardProjection {
                dy: self.read(name("dy"), of.dy)?,
                w: self.read(name("w"), of.w)?,
                b: self.read(name("b"), of.b)?,
                scale: of.scale,
                db: of.db.as_mut().map(|db| self.gradient(name("db"), db)).transpose()?,
                dbias: of.dbias.as_mut().map(|dbias| self.gradient(name("dbias"), dbias)).transpose()?,
                dm: of.dm.as_mut().map(|dm| self.magnitude(name, dm)).transpose()?,
                gain: of.gain.map(|gain| self.read(name("gain"), gain)).transpose()?,
            });
        }
        Ok(raw::BackwardShared {
            dtype: T::DTYPE,
            f32_factors: A::DTYPE == Dtype::F32,
            a: self.read("a", op.a)?,
            x: op.x.map(|x| self.read("x", x)).transpose()?,
            h: op.h.map(|h| self.read("h", h)).transpose()?,
            dx: op.dx.as_mut().map(|dx| self.write("dx", dx)).transpose()?,
            da: op.da.as_mut().map(|da| self.gradient("da", da)).transpose()?,
            projections: raw::Projections::new(&projections)?,
            accumulate: op.accumulate,
            dropout: self.dropout(&op.dropout)?,
            routes: op.routes.map(|routes| self.read("routes", routes)).transpose()?,
        })
    }

    pub(super) fn merge<T: Element>(&mut self, op: &'s mut Merge<'_, T>) -> Result<raw::Merge> {
        let (a, b, f32_factors) = self.factors(&op.factors)?;
        Ok(raw::Merge {
            dtype: T::DTYPE,
            w: op.w.map(|w| self.read("w", w)).transpose()?,
            f32_factors,
            a,
            b,
            scale: op.scale,
            gain: op.gain.map(|gain| self.read("gain", gain)).transpose()?,
            merged: self.write("merged", &mut op.merged)?,
        })
    }

    pub(super) fn round<T: Element, A: Element>(&mut self, op: &'s mut Round<'_, T, A>) -> Result<raw::Round> {
        check_factors::<T, A>("rounded_a")?;
        let (a, b, f32_factors) = self.factors(&op.factors)?;
        Ok(raw::Round {
            dtype: T::DTYPE,
            f32_factors,
            f32_rounded: A::DTYPE == Dtype::F32,
            a,
            b,
            scale: op.scale,
            divisor: op.divisor.map(|divisor| self.read("divisor", divisor)).transpose()?,
            rounded_a: self.write("rounded_a", &mut op.rounded_a)?,
            rounded_b: self.write("rounded_b", &mut op.rounded_b)?,
        })
    }

    fn dropout(&mut self, dropout: &Option<Dropout<'s, dyn DevicePtr<u64> + 's>>) -> Result<Option<raw::Dropout>> {
        let Some(Dropout { p, seed }) = *dropout else { return Ok(None) };
        let seed = match seed {
            Seed::Value { seed, offset } => raw::Seed::Value { seed, offset },
            Seed::Memory(state) => raw::Seed::Memory(self.read("seed", state)?),
        };
        Ok(Some(raw::Dropout { p, seed }))
    }

    fn magnitude<T>(
        &mut self,
        name: impl Fn(&'static str) -> &'static str,
        from: &'s mut MagnitudeGradient<'_, dyn DevicePtr<T> + '_, dyn DevicePtr<f32> + '_, dyn DevicePtrMut<f32> + '_>,
    ) -> Result<raw::MagnitudeGradient> {
        Ok(raw::MagnitudeGradient {
            y: self.read(name("y"), from.y)?,
            bias: from.bias.map(|bias| self.read(name("bias"), bias)).transpose()?,
            magnitude: self.read(name("magnitude"), from.magnitude)?,
            dm: self.write(name("dm"), &mut from.dm)?,
        })
    }

    pub(super) fn gain<T: Element>(&mut self, op: &'s mut Gain<'_, T>) -> Result<raw::Gain> {
        let (a, b, f32_factors) = self.factors(&op.factors)?;
        Ok(raw::Gain {
            dtype: T::DTYPE,
            w: self.read("w", op.w)?,
            f32_factors,
            a,
            b,
            scale: op.scale,
            magnitude: op.magnitude.map(|magnitude| self.read("magnitude", magnitude)).transpose()?,
            earlier: op.earlier.map(|earlier| self.read("earlier", earlier)).transpose()?,
            norm: op.norm.as_mut().map(|norm| self.write("norm", norm)).transpose()?,
            gain: op.gain.as_mut().map(|gain| self.write("gain", gain)).transpose()?,
        })
    }

    /// A and B, and whether they are f32.
    fn factors<T>(
        &mut self,
        factors: &Factors<'s, dyn DevicePtr<T> + 's, dyn DevicePtr<f32> + 's>,
    ) -> Result<(raw::Matrix, raw::Matrix, bool)> {
        Ok(match *factors {
            Factors::Storage { a, b } => (self.read("a", a)?, self.read("b", b)?, false),
            Factors::F32 { a, b } => (self.read("a", a)?, self.read("b", b)?, true),
        })
    }

    /// A buffer of this context, allocated through the very object that the stream was made by: cudarc decides per object
    /// whether streams wait for one another.
    fn check_buffer(&self, arg: &'static str, buffer: &CudaStream) -> Result<()> {
        check_context(arg, buffer.context(), self.context)?;
        if Arc::ptr_eq(buffer.context(), self.stream.context()) {
            return Ok(());
        }
        Err(Error::ForeignContext { arg })
    }

    fn read<T>(&mut self, arg: &'static str, matrix: Matrix<'s, dyn DevicePtr<T> + 's>) -> Result<raw::Matrix> {
        let Matrix { data, offset, rows, cols, row_stride } = matrix;
        self.check_buffer(arg, data.stream())?;
        self.note(check_length(arg, data.len(), offset, (rows, cols, row_stride)));
        let (base, guard) = data.device_ptr(self.stream);
        self.guards.push(guard);
        Ok(raw::Matrix { ptr: address::<T>(base, offset), rows, cols, row_stride })
    }

    fn write<T>(
        &mut self,
        arg: &'static str,
        matrix: &'s mut MatrixMut<'_, dyn DevicePtrMut<T> + '_>,
    ) -> Result<raw::Matrix> {
        let MatrixMut { ref mut data, offset, rows, cols, row_stride } = *matrix;
        self.check_buffer(arg, data.stream())?;
        self.note(check_length(arg, data.len(), offset, (rows, cols, row_stride)));
        let (base, guard) = data.device_ptr_mut(self.stream);
        self.guards.push(guard);
        Ok(raw::Matrix { ptr: address::<T>(base, offset), rows, cols, row_stride })
    }

    fn gradient<T>(
        &mut self,
        arg: &'static str,
        gradient: &'s mut Gradient<'_, dyn DevicePtrMut<T> + '_, dyn DevicePtrMut<f32> + '_>,
    ) -> Result<raw::Gradient> {
        match gradient {
            Gradient::Storage(matrix) => Ok(raw::Gradient { matrix: self.write(arg, matrix)?, f32: false }),
            Gradient::F32(matrix) => Ok(raw::Gradient { matrix: self.write(arg, matrix)?, f32: true }),
        }
    }

    fn note(&mut self, length: Result<()>) {
        if self.lengths.is_ok() {
            self.lengths = length;
        }
    }

    /// What to report. An address that looks wrong may be the consequence of a matrix that leaves its buffer.
    pub(super) fn judge<V>(&self, verdict: Result<V>) -> Result<V> {
        match verdict {
            Ok(_) | Err(Error::Overlap { .. } | Error::NullPointer { .. } | Error::TooLarge { .. }) => {
                self.lengths.clone().and(verdict)
            }
            Err(_) => verdict,
        }
    }

    /// Taking an address cannot fail, so cudarc keeps the error for later: it is asked for before the launch relies on the
    /// waits.
    pub(super) fn check_waits(&self) -> Result<()> {
        // cudarc keeps it in the context object of the stream, which need not be the kernels' own.
        self.stream.context().check_err().map_err(|error| match error.0 {
            CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION => {
                Error::Capturing { what: "a buffer waits for earlier work on it, as cudarc's event tracking asks," }
            }
            _ => failed("waiting for earlier work on the buffers")(error),
        })
    }
}

/// Only a matrix that leaves its buffer, which is refused, makes this wrap.
fn address<T>(base: u64, offset: usize) -> u64 {
    base.wrapping_add((offset as u64).wrapping_mul(size_of::<T>() as u64))
}
