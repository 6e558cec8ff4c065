//! What a caller writes: matrices over borrowed memory and the two operations, [`Forward`] and [`Backward`].
//!
//! One definition serves every backend. The type parameters are the borrowed memory: `[T]` on the CPU
//! ([`cpu::Forward`](crate::cpu::Forward)), `dyn DevicePtr<T>` on a GPU (`cuda::Forward`).

/// A row-major matrix over borrowed memory that is only read.
#[derive(Debug)]
pub struct Matrix<'a, D: ?Sized> {
    pub(crate) data: &'a D,
    pub(crate) offset: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) row_stride: usize,
}

impl<D: ?Sized> Clone for Matrix<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: ?Sized> Copy for Matrix<'_, D> {}

impl<'a, D: ?Sized> Matrix<'a, D> {
    /// `rows` × `cols` elements, contiguous from the start of `data`. The length is checked by the operation.
    pub fn new(data: &'a D, rows: usize, cols: usize) -> Self {
        Self { data, offset: 0, rows, cols, row_stride: cols }
    }

    /// Distance between the starts of two rows, in elements.
    #[must_use]
    pub fn with_row_stride(mut self, row_stride: usize) -> Self {
        self.row_stride = row_stride;
        self
    }

    /// Element of `data` at which the matrix starts.
    #[must_use]
    pub fn with_offset(mut self, offset: usize) -> Self {
        self.offset = offset;
        self
    }
}

/// A row-major matrix over borrowed memory that is written.
#[derive(Debug)]
pub struct MatrixMut<'a, D: ?Sized> {
    pub(crate) data: &'a mut D,
    pub(crate) offset: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) row_stride: usize,
}

impl<'a, D: ?Sized> MatrixMut<'a, D> {
    /// `rows` × `cols` elements, contiguous from the start of `data`. The length is checked by the operation.
    pub fn new(data: &'a mut D, rows: usize, cols: usize) -> Self {
        Self { data, offset: 0, rows, cols, row_stride: cols }
    }

    /// Distance between the starts of two rows, in elements. What lies between rows is not touched.
    #[must_use]
    pub fn with_row_stride(mut self, row_stride: usize) -> Self {
        self.row_stride = row_stride;
        self
    }

    /// Element of `data` at which the matrix starts.
    #[must_use]
    pub fn with_offset(mut self, offset: usize) -> Self {
        self.offset = offset;
        self
    }
}

/// Where da, db or dbias go: in the storage type of the layer, or in f32. A vector is a matrix of one row.
#[derive(Debug)]
pub enum Gradient<'a, O: ?Sized, G: ?Sized> {
    /// Rounded once to the storage type.
    Storage(MatrixMut<'a, O>),
    /// The f32 accumulators as they are.
    F32(MatrixMut<'a, G>),
}

/// Which outputs of [`Backward`] add to what their buffer holds (in f32, rounded once) instead of overwriting it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accumulate {
    /// dx += …
    pub dx: bool,
    /// da += …
    pub da: bool,
    /// db += …
    pub db: bool,
    /// dbias += …
    pub dbias: bool,
    /// dm += …
    pub dm: bool,
}

/// Which elements of x the adapter branch sees: h = scale / (1 − p) · (x ∘ keep) Aᵀ, as PEFT's `lora_dropout` has it while it
/// trains. The base product sees all of x.
///
/// Nothing is stored for backward: whether element (i, j) of x is kept follows from the seed, the offset and (i, j) alone, on
/// every backend, by Philox-4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011). Forward and backward
/// of one pass take the same seed and offset; another pass takes another offset.
///
/// Element (i, j) has 16 random bits u, and is kept when u ≥ 2¹⁶ p. Counter and key are (8 ⌊i/16⌋ + i mod 8,
/// 4 ⌊j/16⌋ + ⌊j/2⌋ mod 4, offset) and seed, low word first; u is the lower half of word 2 · (⌊j/8⌋ mod 2) + ⌊i/8⌋ mod 2 of
/// the result for even j, its upper half for odd j. A dropped element is a zero, whatever it was.
#[derive(Debug)]
pub struct Dropout<'a, U: ?Sized> {
    /// Probability that an element is dropped, from 0 to 1. It is rounded to a multiple of 2⁻¹⁶, and the factor 1 / (1 − p)
    /// with it; 0 gives the bits of no dropout, as anything below 2⁻¹⁷ does, and 1 drops everything, as anything from 1 − 2⁻¹⁷ on
    /// does.
    pub p: f32,
    /// Seed and offset.
    pub seed: Seed<'a, U>,
}

/// Where seed and offset come from.
#[derive(Debug)]
pub enum Seed<'a, U: ?Sized> {
    /// From the caller.
    Value {
        /// Key of the generator.
        seed: u64,
        /// Upper half of its counter.
        offset: u64,
    },
    /// 1 × 2, the seed and the offset, read by the launch itself: a CUDA graph can be replayed with others.
    Memory(Matrix<'a, U>),
}

/// How a layer departs from the plain formula. [`Variant::default`] leaves it as it is.
#[derive(Debug)]
pub struct Variant<'a, U: ?Sized, F: ?Sized> {
    /// Elements of x that the adapter branch does not see.
    pub dropout: Option<Dropout<'a, U>>,
    /// Many adapters in one batch: the words of a [`Routing`](crate::Routing) of M rows, 1 × [`Routing::words_for`](crate::Routing::words_for)(M). a holds
    /// the A of all adapters below each other, b their B side by side, and of h and dh a row keeps the ranks of its own
    /// adapter, times its scale; the others are zeros. So are da and db of an adapter sums over its own rows. A launch reads the
    /// table itself: a CUDA graph can be replayed with another one. R is at most [`MAX_ROUTED_RANK`](crate::MAX_ROUTED_RANK).
    ///
    /// Whatever the table holds, nothing outside the matrices is touched. Zeros are multiplied like other numbers: an infinity or
    /// NaN in one adapter's factors, or in a row of x or dy, may make a NaN of rows and gradients of other adapters.
    pub routes: Option<Matrix<'a, U>>,
    /// DoRA (Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024): 1 × N in f32, what multiplies the columns of both
    /// products, y = gain ∘ (x Wᵀ + h Bᵀ) (+ bias). It is magnitude / ‖W + scale · B A‖, which [`Gain`] computes; as in PEFT the
    /// norm is a constant of the gradients. With dropout, DoRA drops from x for the base product, too, and with routes each row has
    /// a gain of its own: neither is computed.
    pub gain: Option<Matrix<'a, F>>,
}

impl<U: ?Sized> Clone for Dropout<'_, U> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<U: ?Sized> Copy for Dropout<'_, U> {}
impl<U: ?Sized> Clone for Seed<'_, U> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<U: ?Sized> Copy for Seed<'_, U> {}
impl<U: ?Sized, F: ?Sized> Clone for Variant<'_, U, F> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<U: ?Sized, F: ?Sized> Copy for Variant<'_, U, F> {}
impl<U: ?Sized, F: ?Sized> Default for Variant<'_, U, F> {
    fn default() -> Self {
        Self { dropout: None, routes: None, gain: None }
    }
}

/// y = x Wᵀ + h Bᵀ (+ bias), h = scale · x Aᵀ.
///
/// **Full precision.** A and B are of the storage type, or of f32 over a 16-bit layer, as PEFT keeps them while they are trained. Then
/// they are not rounded: a launch splits them, and h with them, into the nearest 16-bit number and what is left of it, and multiplies
/// both halves. y and dx are rounded once, at their end; da and db are exact to about 2⁻¹⁷ of h and dh in bf16 and to those of f32
/// in f16, where numbers below 2⁻³⁶ are lost. h is the same halves in the storage type, for backward to read and nobody else:
/// M × [`split_columns`](crate::split_columns)(R).
///
/// What remains: with a gain (DoRA) dh is that of gain ∘ dy rounded to 16 bits, and so dx and da have that rounding, too. In f16 on a GPU
/// an h or dh counts in y and dx with an error of about 2⁻²⁵, however small it is, which shows beside large B or A alone. An
/// element of A or B, or an h or dh, that is beyond the storage type's largest number is infinite on a GPU; on a CPU only the h
/// that is kept is.
#[derive(Debug)]
pub struct Forward<'a, D: ?Sized, O: ?Sized, U: ?Sized, F: ?Sized, A: ?Sized = D> {
    /// M × K, input activations.
    pub x: Matrix<'a, D>,
    /// N × K, frozen weight.
    pub w: Matrix<'a, D>,
    /// R × K, down projection. R = 0 gives the plain product x Wᵀ.
    pub a: Matrix<'a, A>,
    /// N × R, up projection.
    pub b: Matrix<'a, A>,
    /// α/r or α/√r.
    pub scale: f32,
    /// 1 × N, added to every row of y.
    pub bias: Option<Matrix<'a, D>>,
    /// M × R, kept for backward; in the workspace when absent. With f32 factors it has more columns.
    pub h: Option<MatrixMut<'a, O>>,
    /// M × N, output.
    pub y: MatrixMut<'a, O>,
    /// Dropout, routes and DoRA; the default is none of them.
    pub variant: Variant<'a, U, F>,
}

/// DoRA's gradient of the magnitude: dm = Σ dy ∘ (y − bias) / magnitude, over tokens.
///
/// It is Σ dy ∘ (x Wᵀ + h Bᵀ) / ‖W + scale · B A‖, with the products taken from what forward wrote: y is their only trace. Where the
/// magnitude is 0 there is none, and dm is not a number.
#[derive(Debug)]
pub struct MagnitudeGradient<'a, D: ?Sized, F: ?Sized, G: ?Sized> {
    /// M × N, as forward wrote it.
    pub y: Matrix<'a, D>,
    /// 1 × N, as in forward.
    pub bias: Option<Matrix<'a, D>>,
    /// 1 × N in f32, what the gain was computed from.
    pub magnitude: Matrix<'a, F>,
    /// 1 × N in f32, output.
    pub dm: MatrixMut<'a, G>,
}

/// dx = dy W + dh A, da = dhᵀ x, db = dyᵀ h, dbias = Σ dy, with dh = scale · dy B; every output is optional.
///
/// With a gain (DoRA) dx and dh are of dz = gain ∘ dy, rounded to the storage type, in place of dy, and db = gain ∘ dyᵀ h.
#[derive(Debug)]
pub struct Backward<'a, D: ?Sized, O: ?Sized, G: ?Sized, U: ?Sized, F: ?Sized, A: ?Sized = D> {
    /// M × N, gradient of the output.
    pub dy: Matrix<'a, D>,
    /// N × K, frozen weight.
    pub w: Matrix<'a, D>,
    /// R × K, down projection.
    pub a: Matrix<'a, A>,
    /// N × R, up projection.
    pub b: Matrix<'a, A>,
    /// α/r or α/√r, as in forward.
    pub scale: f32,
    /// M × K, the input of forward; needed for da.
    pub x: Option<Matrix<'a, D>>,
    /// M × R, the h that forward wrote; needed for db. With routes it must be zero, as forward writes it, where a row does not go
    /// through a rank: blocks of zeros are not read.
    pub h: Option<Matrix<'a, D>>,
    /// M × K.
    pub dx: Option<MatrixMut<'a, O>>,
    /// R × K.
    pub da: Option<Gradient<'a, O, G>>,
    /// N × R.
    pub db: Option<Gradient<'a, O, G>>,
    /// 1 × N.
    pub dbias: Option<Gradient<'a, O, G>>,
    /// 1 × N, of DoRA's magnitude; asks for a gain.
    pub dm: Option<MagnitudeGradient<'a, D, F, G>>,
    /// Which outputs add instead of overwriting.
    pub accumulate: Accumulate,
    /// As in forward.
    pub variant: Variant<'a, U, F>,
}

/// One of the projections of [`ForwardShared`]: y = x Wᵀ + h Bᵀ (+ bias), with its own ranks of h.
#[derive(Debug)]
pub struct ForwardProjection<'a, D: ?Sized, O: ?Sized, F: ?Sized, A: ?Sized = D> {
    /// N × K, frozen weight: its own, or some rows of one that several projections share.
    pub w: Matrix<'a, D>,
    /// N × R, up projection. R = 0 gives the plain product x Wᵀ.
    pub b: Matrix<'a, A>,
    /// α/r or α/√r.
    pub scale: f32,
    /// 1 × N, added to every row of y.
    pub bias: Option<Matrix<'a, D>>,
    /// 1 × N in f32, as [`Variant::gain`].
    pub gain: Option<Matrix<'a, F>>,
    /// M × N, output: its own, or some columns of one that several projections share.
    pub y: MatrixMut<'a, O>,
}

/// Projections that share x, as q, k and v of attention or gate and up of a feed-forward block do: for each,
/// y = x Wᵀ + h Bᵀ (+ bias), with h = scale · x Aᵀ. One launch reads x as if for one.
///
/// N, R and scale are each projection's own. a holds the A of all below each other and h their ranks side by side, in the order of
/// the projections: the first has the first R ranks, the next the following ones. [`Forward`] is the case of one projection, and gives
/// each y and each column of h the bits that it has here wherever the same tile shape is chosen.
///
/// Dropout has one mask for all projections; PEFT draws one for each, of the same distribution. Routes are for one
/// projection alone.
#[derive(Debug)]
pub struct ForwardShared<'a, D: ?Sized, O: ?Sized, U: ?Sized, F: ?Sized, A: ?Sized = D> {
    /// M × K, input activations.
    pub x: Matrix<'a, D>,
    /// ΣR × K, down projections of all.
    pub a: Matrix<'a, A>,
    /// M × ΣR, kept for backward; in the workspace when absent. With f32 factors M × Σ [`split_columns`](crate::split_columns)(R).
    pub h: Option<MatrixMut<'a, O>>,
    /// One to [`MAX_PROJECTIONS`](crate::raw::MAX_PROJECTIONS).
    pub projections: Vec<ForwardProjection<'a, D, O, F, A>>,
    /// Elements of x that no adapter branch sees.
    pub dropout: Option<Dropout<'a, U>>,
    /// Many adapters in one batch, as [`Variant::routes`]; with one projection alone.
    pub routes: Option<Matrix<'a, U>>,
}

impl<'a, D: ?Sized, O: ?Sized, U: ?Sized, F: ?Sized, A: ?Sized> From<Forward<'a, D, O, U, F, A>>
    for ForwardShared<'a, D, O, U, F, A>
{
    fn from(op: Forward<'a, D, O, U, F, A>) -> Self {
        let Forward { x, w, a, b, scale, bias, h, y, variant } = op;
        let Variant { dropout, routes, gain } = variant;
        Self { x, a, h, projections: vec![ForwardProjection { w, b, scale, bias, gain, y }], dropout, routes }
    }
}

/// One of the projections of [`BackwardShared`].
#[derive(Debug)]
pub struct BackwardProjection<'a, D: ?Sized, O: ?Sized, G: ?Sized, F: ?Sized, A: ?Sized = D> {
    /// M × N, gradient of the output.
    pub dy: Matrix<'a, D>,
    /// N × K, frozen weight.
    pub w: Matrix<'a, D>,
    /// N × R, up projection.
    pub b: Matrix<'a, A>,
    /// α/r or α/√r, as in forward.
    pub scale: f32,
    /// N × R.
    pub db: Option<Gradient<'a, O, G>>,
    /// 1 × N.
    pub dbias: Option<Gradient<'a, O, G>>,
    /// 1 × N, of DoRA's magnitude; asks for a gain.
    pub dm: Option<MagnitudeGradient<'a, D, F, G>>,
    /// 1 × N in f32, as in forward.
    pub gain: Option<Matrix<'a, F>>,
}

/// Backward of projections that share x: dx = Σ dy W + dh A over all of them in one sum, da = dhᵀ x for the A of all, and for each
/// db = dyᵀ h and dbias = Σ dy, with dh = scale · dy B; every output is optional. Ranks are as in [`ForwardShared`].
#[derive(Debug)]
pub struct BackwardShared<'a, D: ?Sized, O: ?Sized, G: ?Sized, U: ?Sized, F: ?Sized, A: ?Sized = D> {
    /// ΣR × K, down projections of all.
    pub a: Matrix<'a, A>,
    /// M × K, the input of forward; needed for da.
    pub x: Option<Matrix<'a, D>>,
    /// The h that forward wrote; needed for db.
    pub h: Option<Matrix<'a, D>>,
    /// M × K.
    pub dx: Option<MatrixMut<'a, O>>,
    /// ΣR × K.
    pub da: Option<Gradient<'a, O, G>>,
    /// One to [`MAX_PROJECTIONS`](crate::raw::MAX_PROJECTIONS).
    pub projections: Vec<BackwardProjection<'a, D, O, G, F, A>>,
    /// Which outputs add instead of overwriting; of db, dbias and dm, those of all projections.
    pub accumulate: Accumulate,
    /// As in forward.
    pub dropout: Option<Dropout<'a, U>>,
    /// As in forward.
    pub routes: Option<Matrix<'a, U>>,
}

impl<'a, D: ?Sized, O: ?Sized, G: ?Sized, U: ?Sized, F: ?Sized, A: ?Sized> From<Backward<'a, D, O, G, U, F, A>>
    for BackwardShared<'a, D, O, G, U, F, A>
{
    fn from(op: Backward<'a, D, O, G, U, F, A>) -> Self {
        let Backward { dy, w, a, b, scale, x, h, dx, da, db, dbias, dm, accumulate, variant } = op;
        let Variant { dropout, routes, gain } = variant;
        let projections = vec![BackwardProjection { dy, w, b, scale, db, dbias, dm, gain }];
        Self { a, x, h, dx, da, projections, accumulate, dropout, routes }
    }
}

/// The two factors of an adapter, both in the storage type or both in f32.
#[derive(Debug)]
pub enum Factors<'a, D: ?Sized, F: ?Sized> {
    /// In the storage type of the layer.
    Storage {
        /// R × K, down projection.
        a: Matrix<'a, D>,
        /// N × R, up projection.
        b: Matrix<'a, D>,
    },
    /// In f32, as PEFT keeps them while they are trained.
    F32 {
        /// R × K, down projection.
        a: Matrix<'a, F>,
        /// N × R, up projection.
        b: Matrix<'a, F>,
    },
}

/// merged = w + scale · B A: what the layer's weight becomes when an adapter is folded into it. With a gain (DoRA)
/// merged = gain ∘ (w + scale · B A), row by row.
///
/// Sums are in f32, rank by rank in ascending order from 0, each product and each sum rounded to f32; then the sum is
/// multiplied by the scale, w is added, the gain multiplies, and the result is rounded once to the storage type. Every backend
/// gives these bits.
#[derive(Debug)]
pub struct Merge<'a, D: ?Sized, O: ?Sized, F: ?Sized> {
    /// N × K; when absent, what `merged` holds.
    pub w: Option<Matrix<'a, D>>,
    /// A and B. R = 0 copies w, but that −0 may become 0.
    pub factors: Factors<'a, D, F>,
    /// α/r or α/√r.
    pub scale: f32,
    /// 1 × N in f32, a factor of each row of the result: what [`Gain`] computes.
    pub gain: Option<Matrix<'a, F>>,
    /// N × K, output.
    pub merged: MatrixMut<'a, O>,
}

/// rounded_a = A and rounded_b = scale · B in the storage type: the 16-bit copies of f32 factors, or a part of several adapters
/// side by side. Or both in f32, for adapters side by side of which some are of f32.
///
/// The product by the scale is rounded to f32 and then to the storage type, to nearest with ties to even; a scale of 1 leaves
/// one rounding, and in f32 none. With a divisor the product is divided before, and rounded to f32 once more: B of an adapter that
/// adds to the result of DoRA takes no part in that gain, which multiplies the columns of everything.
#[derive(Debug)]
pub struct Round<'a, D: ?Sized, O: ?Sized, F: ?Sized> {
    /// A and B.
    pub factors: Factors<'a, D, F>,
    /// Factor of B; 1 for copies.
    pub scale: f32,
    /// 1 × N in f32: rounded_b = scale · B / divisor, row by row.
    pub divisor: Option<Matrix<'a, F>>,
    /// R × K, output.
    pub rounded_a: MatrixMut<'a, O>,
    /// N × R, output.
    pub rounded_b: MatrixMut<'a, O>,
}

/// norm = ‖W + scale · B A‖ and gain = magnitude / norm, row by row of W: what DoRA's forward multiplies by, anew whenever the adapter
/// changes. Where there is an `earlier` gain, of DoRA adapters whose result this one multiplies, gain = magnitude / norm · earlier.
///
/// The norm is Euclidean, over the row of W with the adapter folded in, unrounded: sums in f32, or exacter. PEFT rounds the norm to
/// the storage type, this does not. A row of zeros has an infinite gain, or none.
#[derive(Debug)]
pub struct Gain<'a, D: ?Sized, F: ?Sized, G: ?Sized> {
    /// N × K, frozen weight.
    pub w: Matrix<'a, D>,
    /// A and B; R = 0 leaves the norms of W alone.
    pub factors: Factors<'a, D, F>,
    /// α/r or α/√r.
    pub scale: f32,
    /// 1 × N in f32; needed for the gain.
    pub magnitude: Option<Matrix<'a, F>>,
    /// 1 × N in f32, a factor of the gain.
    pub earlier: Option<Matrix<'a, F>>,
    /// 1 × N in f32, output; the magnitude of a new adapter.
    pub norm: Option<MatrixMut<'a, G>>,
    /// 1 × N in f32, output.
    pub gain: Option<MatrixMut<'a, G>>,
}
