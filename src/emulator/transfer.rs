//! Operands on their way into simulated memory, and results on their way out of it.

use ptx_emulator::Memory;

use super::{memory_error, report};
use crate::error::Result;
use crate::{Dropout, Dtype, Element, Factors, Gradient, MagnitudeGradient, Matrix, MatrixMut, Seed, cpu, raw};

fn row_bytes<T: Element>(matrix: Matrix<'_, [T]>, row: usize) -> Vec<u8> {
    let start = matrix.offset + row * matrix.row_stride;
    let mut bytes = Vec::with_capacity(matrix.cols * T::DTYPE.size());
    matrix.data[start..start + matrix.cols].iter().for_each(|element| element.append_bytes(&mut bytes));
    bytes
}

/// An allocation of the slice's size, with the matrix's elements written where `initialised`.
pub(super) fn upload<T: Element>(
    memory: &mut Memory,
    name: &str,
    matrix: Matrix<'_, [T]>,
    initialised: bool,
) -> Result<raw::Matrix> {
    let Matrix { data, offset, rows, cols, row_stride } = matrix;
    let size = T::DTYPE.size();
    let base = memory.try_alloc(name, data.len() * size).map_err(memory_error)?;
    let ptr = base + (offset * size) as u64;
    if initialised && cols != 0 {
        for row in 0..rows {
            memory.write(ptr + (row * row_stride * size) as u64, &row_bytes(matrix, row)).map_err(memory_error)?;
        }
    }
    Ok(raw::Matrix { ptr, rows, cols, row_stride })
}

/// Words of 64 bits, on the same terms as [`upload`].
pub(super) fn upload_words(memory: &mut Memory, name: &str, matrix: Matrix<'_, [u64]>) -> Result<raw::Matrix> {
    let Matrix { data, offset, rows, cols, row_stride } = matrix;
    let base = memory.try_alloc(name, data.len() * 8).map_err(memory_error)?;
    for row in 0..rows {
        let start = offset + row * row_stride;
        let bytes: Vec<u8> = data[start..start + cols].iter().flat_map(|word| word.to_le_bytes()).collect();
        memory.write(base + 8 * start as u64, &bytes).map_err(memory_error)?;
    }
    Ok(raw::Matrix { ptr: base + 8 * offset as u64, rows, cols, row_stride })
}

pub(super) fn upload_dropout(
    memory: &mut Memory,
    dropout: &Option<Dropout<'_, [u64]>>,
) -> Result<Option<raw::Dropout>> {
    let Some(Dropout { p, seed }) = *dropout else { return Ok(None) };
    let seed = match seed {
        Seed::Value { seed, offset } => raw::Seed::Value { seed, offset },
        Seed::Memory(state) => raw::Seed::Memory(upload_words(memory, "seed", state)?),
    };
    Ok(Some(raw::Dropout { p, seed }))
}

/// What DoRA's gradient of the magnitude takes; dm itself where it `keeps` what it holds.
pub(super) fn upload_magnitude<T: Element>(
    memory: &mut Memory,
    name: impl Fn(&'static str) -> &'static str,
    from: &MagnitudeGradient<'_, [T], [f32], [f32]>,
    keeps: bool,
) -> Result<raw::MagnitudeGradient> {
    Ok(raw::MagnitudeGradient {
        y: upload(memory, name("y"), from.y, true)?,
        bias: from.bias.map(|bias| upload(memory, name("bias"), bias, true)).transpose()?,
        magnitude: upload(memory, name("magnitude"), from.magnitude, true)?,
        dm: upload(memory, name("dm"), cpu::shared(&from.dm), keeps)?,
    })
}

/// da, db or dbias, with what it holds where `keeps`.
pub(super) fn upload_gradient<T: Element>(
    memory: &mut Memory,
    name: &str,
    gradient: &Option<Gradient<'_, [T], [f32]>>,
    keeps: bool,
) -> Result<Option<raw::Gradient>> {
    let (matrix, f32) = match gradient {
        Some(Gradient::Storage(m)) => (upload(memory, name, cpu::shared(m), keeps)?, T::DTYPE == Dtype::F32),
        Some(Gradient::F32(m)) => (upload(memory, name, cpu::shared(m), keeps)?, true),
        None => return Ok(None),
    };
    Ok(Some(raw::Gradient { matrix, f32 }))
}

pub(super) fn download_gradient<T: Element>(
    memory: &Memory,
    name: &str,
    from: Option<raw::Gradient>,
    target: &mut Option<Gradient<'_, [T], [f32]>>,
) -> Result<()> {
    match (target, from) {
        (Some(Gradient::Storage(target)), Some(from)) => download(memory, name, from.matrix, target),
        (Some(Gradient::F32(target)), Some(from)) => download(memory, name, from.matrix, target),
        _ => Ok(()),
    }
}

/// A and B, and whether they are f32.
pub(super) fn upload_factors<T: Element>(
    memory: &mut Memory,
    factors: &Factors<'_, [T], [f32]>,
) -> Result<(raw::Matrix, raw::Matrix, bool)> {
    Ok(match *factors {
        Factors::Storage { a, b } => {
            (upload(memory, "a", a, true)?, upload(memory, "b", b, true)?, T::DTYPE == Dtype::F32)
        }
        Factors::F32 { a, b } => (upload(memory, "a", a, true)?, upload(memory, "b", b, true)?, true),
    })
}

/// Copies every element back; each must have been written, and nothing around them.
pub(super) fn download<T: Element>(
    memory: &Memory,
    name: &str,
    from: raw::Matrix,
    target: &mut MatrixMut<'_, [T]>,
) -> Result<()> {
    let MatrixMut { ref mut data, offset, rows, cols, row_stride } = *target;
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    let size = T::DTYPE.size();
    let base = from.ptr - (offset * size) as u64;
    let written = memory.written(base, data.len() * size).map_err(memory_error)?;
    let inside = |at: usize| at.checked_sub(offset).is_some_and(|at| at / row_stride < rows && at % row_stride < cols);
    if let Some(at) = (0..data.len()).find(|&at| !inside(at) && written[at * size..(at + 1) * size].contains(&true)) {
        return Err(report(format!("element {at} of the buffer of {name}, which is not the matrix's, was written")));
    }
    for row in 0..rows {
        let start = row * row_stride;
        let bytes = memory.read(from.ptr + (start * size) as u64, cols * size).map_err(memory_error)?;
        for (element, bytes) in data[offset + start..][..cols].iter_mut().zip(bytes.chunks_exact(size)) {
            *element = T::from_bytes(bytes);
        }
    }
    Ok(())
}
