//! A sum of matrix products, tile by tile on all cores: the one loop under every operation of this backend.

use rayon::prelude::*;

use super::convert::{Sum, cast, widen};
use crate::dropout::Keep;
use crate::routing::Route;
use crate::{Dtype, Element, Matrix, MatrixMut};

/// Largest extent of an output tile. With the depth block it bounds the scratch of a thread to 2 MiB (4 MiB where sums are in
/// f64). Every tile packs its operands anew: half of this costs 5 % at M = 512, N = K = 4096.
const TILE: usize = 512;
/// Most terms summed in one chain.
const DEPTH: usize = 256;
/// Tiles to cut an output into at least, where it is large enough: more would keep more cores busy, and pack more often.
const ENOUGH_TILES: usize = 16;
/// Terms from which operands that need no widening go to `gemm` in one piece. It cuts them into chains of about 512 by itself.
const DEEP: usize = 4096;
/// Multiply-adds up to which products of f32 operands are summed in f64: in small layers one rounding more or less shows,
/// and time does not.
const SMALL_WORK: usize = 1 << 22;
/// Multiply-adds below which starting other threads costs more than it saves.
const SERIAL_WORK: usize = 1 << 19;

/// What is multiplied: a matrix of the storage type, or one of f32 beside those.
#[derive(Debug)]
pub(super) enum Operand<'a, T> {
    Storage(Matrix<'a, [T]>),
    Wide(Matrix<'a, [f32]>),
}

impl<T> Clone for Operand<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Operand<'_, T> {}

impl<'a, T> From<Matrix<'a, [T]>> for Operand<'a, T> {
    fn from(matrix: Matrix<'a, [T]>) -> Self {
        Self::Storage(matrix)
    }
}

impl<'a, T: Element> Operand<'a, T> {
    /// A matrix of the storage type or of f32; without an element, any.
    pub(super) fn of<A: Element>(matrix: Matrix<'a, [A]>) -> Self {
        let Matrix { data, offset, rows, cols, row_stride } = matrix;
        match (cast::<A, T>(data), cast::<A, f32>(data)) {
            (Some(data), _) => Self::Storage(Matrix { data, offset, rows, cols, row_stride }),
            (None, Some(data)) => Self::Wide(Matrix { data, offset, rows, cols, row_stride }),
            (None, None) => Self::Storage(Matrix { data: &[], offset: 0, rows, cols, row_stride }),
        }
    }

    /// Rows and columns.
    fn extents(&self) -> (usize, usize) {
        match self {
            Self::Storage(matrix) => (matrix.rows, matrix.cols),
            Self::Wide(matrix) => (matrix.rows, matrix.cols),
        }
    }
}

/// One side of a product, seen as *outer × depth*: outer runs along the output, depth is summed over.
pub(super) struct Side<'a, T> {
    operand: Operand<'a, T>,
    depth_along_rows: bool,
    keep: Option<Keep>,
    gain: Option<&'a [f32]>,
}

impl<'a, T: Element> Side<'a, T> {
    /// The rows of `matrix` are outer, its columns depth.
    pub(super) fn rows(matrix: impl Into<Operand<'a, T>>) -> Self {
        Self { operand: matrix.into(), depth_along_rows: false, keep: None, gain: None }
    }

    /// The columns of `matrix` are outer, its rows depth.
    pub(super) fn columns(matrix: impl Into<Operand<'a, T>>) -> Self {
        Self { operand: matrix.into(), depth_along_rows: true, keep: None, gain: None }
    }

    /// Elements that are not kept are zeros.
    pub(super) fn keeping(self, keep: Option<Keep>) -> Self {
        Self { keep, ..self }
    }

    /// Columns are multiplied by these, and the products rounded to the type of the matrix.
    pub(super) fn gaining(self, gain: Option<&'a [f32]>) -> Self {
        Self { gain, ..self }
    }

    /// Whether [`panel`](Self::panel) copies nothing.
    fn is_borrowed<S: Sum>(&self) -> bool {
        let borrowed = match self.operand {
            Operand::Storage(_) => S::borrow::<T>(&[]),
            Operand::Wide(_) => S::borrow::<f32>(&[]),
        };
        self.is_as_it_lies() && borrowed.is_some()
    }

    /// Whether nothing happens to its elements on the way.
    fn is_as_it_lies(&self) -> bool {
        self.keep.is_none() && self.gain.is_none()
    }

    fn depth(&self) -> usize {
        let (rows, cols) = self.operand.extents();
        if self.depth_along_rows { rows } else { cols }
    }

    /// Outer `at.0 ..` × depth `at.1 ..` of extent `size`, with its (outer, depth) strides: where it lies when its elements
    /// are of type `S` already and nothing happens to them, else widened into `scratch`.
    fn panel<'s, S: Sum>(
        &'s self,
        at: (usize, usize),
        size: (usize, usize),
        scratch: &'s mut [S],
    ) -> (&'s [S], (usize, usize)) {
        match self.operand {
            Operand::Storage(matrix) => self.panel_of(matrix, at, size, scratch),
            Operand::Wide(matrix) => self.panel_of(matrix, at, size, scratch),
        }
    }

    fn panel_of<'s, S: Sum, E: Element>(
        &'s self,
        matrix: Matrix<'s, [E]>,
        at: (usize, usize),
        size: (usize, usize),
        scratch: &'s mut [S],
    ) -> (&'s [S], (usize, usize)) {
        let swap = |(outer, depth)| if self.depth_along_rows { (depth, outer) } else { (outer, depth) };
        let ((row, col), (rows, cols)) = (swap(at), swap(size));
        let Matrix { data, offset, row_stride, .. } = matrix;
        let start = offset + row * row_stride + col;
        let lines = &data[start..start + (rows - 1) * row_stride + cols];
        if let Some(panel) = S::borrow(lines).filter(|_| self.is_as_it_lies()) {
            return (panel, swap((row_stride, 1)));
        }
        let panel = &mut scratch[..rows * cols];
        for (source, line) in lines.chunks(row_stride).zip(panel.chunks_exact_mut(cols)) {
            S::load(&source[..cols], line);
            if let Some(gain) = self.gain {
                let gained = source.iter().zip(&gain[col..]).map(|(value, gain)| E::from_f32(value.to_f32() * gain));
                line.iter_mut().zip(gained).for_each(|(to, value)| *to = S::from(value.to_f32()));
            }
        }
        if let Some(keep) = self.keep {
            keep.for_each_dropped((row, col), (rows, cols), |i, j| panel[i * cols + j] = S::from(0.0));
        }
        (panel, swap((cols, 1)))
    }
}

/// lhs · rhsᵀ, both seen as outer × depth.
pub(super) struct Term<'a, T> {
    lhs: Side<'a, T>,
    rhs: Side<'a, T>,
    keep: Option<Keep>,
}

impl<'a, T: Element> Term<'a, T> {
    pub(super) fn new(lhs: Side<'a, T>, rhs: Side<'a, T>) -> Self {
        Self { lhs, rhs, keep: None }
    }

    /// Of this term and those before it, elements that are not kept are zeros.
    pub(super) fn keeping(self, keep: Option<Keep>) -> Self {
        Self { keep, ..self }
    }
}

/// What happens to a finished sum before it is rounded to the output's type.
#[derive(Default)]
pub(super) struct Epilogue<'a> {
    /// Multiplies the sum.
    pub(super) scale: Option<f32>,
    /// Multiplies the sums, one per output column.
    pub(super) gain: Option<&'a [f32]>,
    /// Multiplies the sums, one per output row.
    pub(super) row_gain: Option<&'a [f32]>,
    /// What of a row's sum is kept, and another factor: one per output row.
    pub(super) routes: Option<&'a [u64]>,
    /// One value per output column.
    pub(super) bias: Option<&'a [f32]>,
    /// Adds what the output holds.
    pub(super) accumulate: bool,
}

/// A rectangle of the output, as the pieces of its rows.
struct Tile<'a, O> {
    row: usize,
    col: usize,
    lines: Vec<&'a mut [O]>,
}

/// Tile extents from the shape alone: results must not depend on the number of threads.
fn tile_extents(rows: usize, cols: usize) -> (usize, usize) {
    let (mut tile_rows, mut tile_cols) = (rows.min(TILE), cols.min(TILE));
    while rows.div_ceil(tile_rows) * cols.div_ceil(tile_cols) < ENOUGH_TILES && tile_rows.max(tile_cols) > TILE / 4 {
        let longer = if tile_rows > tile_cols { &mut tile_rows } else { &mut tile_cols };
        *longer = longer.div_ceil(2).next_multiple_of(16);
    }
    (tile_rows, tile_cols)
}

/// Splits the borrow of the output into one per tile, so that threads write without sharing.
fn tiles<O>(output: MatrixMut<'_, [O]>, (tile_rows, tile_cols): (usize, usize)) -> Vec<Tile<'_, O>> {
    let MatrixMut { data, offset, rows, cols, row_stride } = output;
    let across = cols.div_ceil(tile_cols);
    let mut tiles = Vec::with_capacity(rows.div_ceil(tile_rows) * across);
    for (row, mut line) in data[offset..].chunks_mut(row_stride).take(rows).enumerate() {
        if row % tile_rows == 0 {
            let lines = tile_rows.min(rows - row);
            tiles.extend((0..across).map(|i| Tile { row, col: i * tile_cols, lines: Vec::with_capacity(lines) }));
        }
        line = &mut line[..cols];
        let first = row / tile_rows * across;
        for (tile, piece) in tiles[first..].iter_mut().zip(line.chunks_mut(tile_cols)) {
            tile.lines.push(piece);
        }
    }
    tiles
}

/// Terms summed in one chain before they are added to the total. Rounding errors of f32 sums grow with the length of a
/// chain; about 16 chains keep them far below those of one chain, at no cost where time matters.
fn chain(depth: usize) -> usize {
    (depth / 16).next_multiple_of(16).clamp(16, DEPTH)
}

struct Scratch<S> {
    lhs: Vec<S>,
    rhs: Vec<S>,
    sums: Vec<S>,
}

/// output = epilogue(Σ over terms), rounded once. Each element is summed in an order that depends on the shape alone.
pub(super) fn product<T: Element, O: Element>(
    terms: &[Term<'_, T>],
    epilogue: &Epilogue<'_>,
    output: MatrixMut<'_, [O]>,
) {
    let depth: usize = terms.iter().map(|term| term.lhs.depth()).sum();
    let work = output.rows.saturating_mul(output.cols).saturating_mul(depth);
    if T::DTYPE == Dtype::F32 && work <= SMALL_WORK {
        product_in::<f64, T, O>(terms, epilogue, output, depth);
    } else {
        product_in::<f32, T, O>(terms, epilogue, output, depth);
    }
}

/// [`product`] with sums of type `S`.
fn product_in<S: Sum, T: Element, O: Element>(
    terms: &[Term<'_, T>],
    epilogue: &Epilogue<'_>,
    output: MatrixMut<'_, [O]>,
    depth: usize,
) {
    if output.rows == 0 || output.cols == 0 {
        return;
    }
    let work = output.rows.saturating_mul(output.cols).saturating_mul(depth);
    let extents = tile_extents(output.rows, output.cols);
    let deepest = terms.iter().map(|term| chain(term.lhs.depth()).min(term.lhs.depth())).max().unwrap_or(0);
    let zeros = |length| vec![S::from(0.0); length];
    let scratch = || Scratch {
        lhs: zeros(extents.0 * deepest),
        rhs: zeros(extents.1 * deepest),
        sums: zeros(extents.0 * extents.1),
    };
    let tiles = tiles(output, extents);
    if work < SERIAL_WORK || tiles.len() == 1 {
        let mut scratch = scratch();
        tiles.into_iter().for_each(|tile| fill(terms, epilogue, tile, &mut scratch));
    } else {
        tiles.into_par_iter().for_each_init(scratch, |scratch, tile| fill(terms, epilogue, tile, scratch));
    }
}

fn fill<S: Sum, T: Element, O: Element>(
    terms: &[Term<'_, T>],
    epilogue: &Epilogue<'_>,
    tile: Tile<'_, O>,
    scratch: &mut Scratch<S>,
) {
    let (rows, cols) = (tile.lines.len(), tile.lines[0].len());
    let sums = &mut scratch.sums[..rows * cols];
    sums.fill(S::from(0.0));
    for Term { lhs, rhs, keep } in terms {
        let depth = lhs.depth();
        let in_one_piece = depth >= DEEP && lhs.is_borrowed::<S>() && rhs.is_borrowed::<S>();
        let step = if in_one_piece { depth } else { chain(depth) };
        for from in (0..depth).step_by(step) {
            let length = step.min(depth - from);
            let lhs = lhs.panel((tile.row, from), (rows, length), &mut scratch.lhs);
            let rhs = rhs.panel((tile.col, from), (cols, length), &mut scratch.rhs);
            multiply_add(sums, (rows, cols, length), lhs, rhs);
        }
        if let Some(keep) = keep {
            keep.for_each_dropped((tile.row, tile.col), (rows, cols), |i, j| sums[i * cols + j] = S::from(0.0));
        }
    }
    let bias = epilogue.bias.map(|bias| &bias[tile.col..tile.col + cols]);
    let (row, col) = (tile.row, tile.col);
    for (at, (line, sums)) in tile.lines.into_iter().zip(sums.chunks_exact_mut(cols)).enumerate() {
        let route = epilogue.routes.map(|routes| Route::from_word(routes[row + at]));
        if let Some(scale) = epilogue.scale {
            sums.iter_mut().for_each(|sum| *sum *= S::from(scale));
        }
        if let Some(route) = route {
            keep_route(&route, col, sums);
        }
        if let Some(gain) = epilogue.gain {
            sums.iter_mut().zip(&gain[col..]).for_each(|(sum, &gain)| *sum *= S::from(gain));
        }
        if let Some(gain) = epilogue.row_gain {
            sums.iter_mut().for_each(|sum| *sum *= S::from(gain[row + at]));
        }
        if let Some(bias) = bias {
            sums.iter_mut().zip(bias).for_each(|(sum, &bias)| *sum += S::from(bias));
        }
        if epilogue.accumulate {
            sums.iter_mut().zip(line.iter()).for_each(|(sum, old)| *sum += S::from(old.to_f32()));
        }
        S::store(sums, line);
    }
}

/// Of the columns from `col` on, those that the route keeps, times its scale; zeros elsewhere.
fn keep_route<S: Sum>(route: &Route, col: usize, sums: &mut [S]) {
    for (at, sum) in sums.iter_mut().enumerate() {
        if (route.begin..route.end).contains(&(col + at)) {
            *sum *= S::from(route.scale);
        } else {
            *sum = S::from(0.0);
        }
    }
}

/// sums (rows × cols, contiguous) += lhs · rhsᵀ; strides are (outer, depth).
fn multiply_add<S: Sum>(
    sums: &mut [S],
    (rows, cols, depth): (usize, usize, usize),
    (lhs, lhs_strides): (&[S], (usize, usize)),
    (rhs, rhs_strides): (&[S], (usize, usize)),
) {
    let last = |outer: usize, strides: (usize, usize)| (outer - 1) * strides.0 + (depth - 1) * strides.1;
    assert!(rows > 0 && cols > 0 && depth > 0, "empty tile");
    assert!(sums.len() == rows * cols && last(rows, lhs_strides) < lhs.len() && last(cols, rhs_strides) < rhs.len());
    // SAFETY: by the assertions above every address the strides reach lies inside its slice; `sums` is borrowed
    // exclusively and the slices cannot overlap it.
    unsafe {
        gemm::gemm(
            rows,
            cols,
            depth,
            sums.as_mut_ptr(),
            1,
            cols as isize,
            true,
            lhs.as_ptr(),
            lhs_strides.1 as isize,
            lhs_strides.0 as isize,
            rhs.as_ptr(),
            rhs_strides.0 as isize,
            rhs_strides.1 as isize,
            S::from(1.0),
            S::from(1.0),
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// output (1 × N) = Σ over rows of `matrix` (+ old), summed in f64 and rounded once to f32 first.
pub(super) fn column_sums<T: Element, O: Element>(
    matrix: Matrix<'_, [T]>,
    accumulate: bool,
    output: MatrixMut<'_, [O]>,
) {
    let target = &mut output.data[output.offset..output.offset + output.cols];
    target.par_chunks_mut(TILE).enumerate().for_each(|(block, target)| {
        let mut sums = [0f64; TILE];
        let mut line = [0f32; TILE];
        let (sums, line) = (&mut sums[..target.len()], &mut line[..target.len()]);
        for row in 0..matrix.rows {
            let start = matrix.offset + row * matrix.row_stride + block * TILE;
            widen(&matrix.data[start..start + line.len()], line);
            sums.iter_mut().zip(line.iter()).for_each(|(sum, &value)| *sum += f64::from(value));
        }
        for (target, &sum) in target.iter_mut().zip(sums.iter()) {
            let old = if accumulate { target.to_f32() } else { 0.0 };
            *target = O::from_f32(sum as f32 + old);
        }
    });
}

/// output (1 × N) = Σ over rows of dy ∘ (y − bias), over the magnitude (+ old): summed in f64 and rounded once to f32 first.
pub(super) fn magnitude_sums<T: Element>(
    dy: Matrix<'_, [T]>,
    y: Matrix<'_, [T]>,
    bias: Option<&[f32]>,
    magnitude: &[f32],
    accumulate: bool,
    output: MatrixMut<'_, [f32]>,
) {
    let target = &mut output.data[output.offset..output.offset + output.cols];
    target.par_chunks_mut(TILE).enumerate().for_each(|(block, target)| {
        let first = block * TILE;
        let mut sums = [0f64; TILE];
        let line = |matrix: Matrix<'_, [T]>, row: usize, line: &mut [f32]| {
            let start = matrix.offset + row * matrix.row_stride + first;
            widen(&matrix.data[start..start + line.len()], line);
        };
        let (mut gradients, mut results) = ([0f32; TILE], [0f32; TILE]);
        let (gradients, results) = (&mut gradients[..target.len()], &mut results[..target.len()]);
        for row in 0..dy.rows {
            line(dy, row, gradients);
            line(y, row, results);
            for (at, (&gradient, &result)) in gradients.iter().zip(results.iter()).enumerate() {
                let bias = bias.map_or(0.0, |bias| bias[first + at]);
                sums[at] += f64::from(gradient) * (f64::from(result) - f64::from(bias));
            }
        }
        for (at, target) in target.iter_mut().enumerate() {
            let old = if accumulate { *target } else { 0.0 };
            *target = (sums[at] / f64::from(magnitude[first + at])) as f32 + old;
        }
    });
}
