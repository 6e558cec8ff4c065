//! Layers with adapters over any backend: a frozen weight, any number of named adapters, and which of them take part.
//!
//! [`LoraLinear`] owns its buffers through a [`Backend`]: [`Cpu`](crate::cpu::Cpu), `cuda::Queue` (kernels with a stream and a
//! workspace) or, for tests, `emulator::Emulator`. The layer is one code path for all of them, and what it launches on a GPU
//! is what the emulator executes.
//!
//! ```
//! use fused_lora::cpu::Cpu;
//! use fused_lora::linear::{Adapter, Backend, BuffersMut, Gradients, LoraLinear, Scaling};
//! use fused_lora::{Matrix, MatrixMut, bf16};
//!
//! let (m, n, k, r) = (4, 8, 6, 2); // tokens, outputs, inputs, rank
//! let ones = |len| vec![bf16::ONE; len];
//! let mut layer = LoraLinear::upload(Cpu, &ones(n * k), None, n, k)?;
//!
//! // Factors in f32 over a bf16 weight, as PEFT trains them.
//! let adapter = Adapter::upload_f32(layer.backend(), r, Scaling::Lora { alpha: 4.0 }, &[0.5; 12], &[0.25; 16])?;
//! layer.add("default", adapter)?;
//! layer.activate("default")?;
//!
//! let (x, dy) = (ones(m * k), ones(m * n));
//! let (y, pass) = layer.forward_train(Matrix::new(&x[..], m, k))?;
//! assert_eq!(y[0].to_f32(), 6.0 + 2.0 * 0.25 * 6.0);
//!
//! let (mut da, mut db) = (vec![0.0; r * k], vec![0.0; n * r]);
//! let gradients = Gradients {
//!     da: Some(MatrixMut::new(&mut da[..], r, k)),
//!     db: Some(MatrixMut::new(&mut db[..], n, r)),
//!     ..Gradients::default()
//! };
//! layer.backward(&pass, Matrix::new(&dy[..], m, n), gradients)?;
//! assert_eq!((da[0], db[0]), (16.0, 24.0));
//!
//! // A step of gradient descent; the bf16 copies that forward reads are made anew.
//! layer.update("default", |factors| -> fused_lora::Result<()> {
//!     if let BuffersMut::F32 { a, b, .. } = factors {
//!         a.iter_mut().zip(&da).for_each(|(a, da)| *a -= 0.0625 * da);
//!         b.iter_mut().zip(&db).for_each(|(b, db)| *b -= 0.0625 * db);
//!     }
//!     Ok(())
//! })?;
//!
//! layer.merge()?; // forward is the plain product by W + s · B A
//! layer.unmerge()?; // W has its bits again: it was kept
//! layer.disable()?; // forward is the plain product by W
//! layer.enable()?; // and with the adapter again
//! # Ok::<(), fused_lora::Error>(())
//! ```
//!
//! # Which adapters take part
//!
//! None at first. [`activate`](LoraLinear::activate) chooses one, which can then be trained; changing it moves no data, nor do
//! [`disable`](LoraLinear::disable) and [`enable`](LoraLinear::enable). [`activate_all`](LoraLinear::activate_all) chooses several for inference, whose
//! contributions add up: their factors are copied side by side into one pair of rank Σ R, so that forward stays one launch.
//! The scale of the pair is the largest of theirs, sᵢ, and B of every other adapter is multiplied by sᵢ / s in f32
//! and rounded to the storage type. So adapters of equal scale keep their bits, and 16-bit factors of others take one more
//! rounding of B; f32 factors take none more, as they are rounded once in any case. With one of them at
//! [full precision](Adapter::at_full_precision) the copies are f32, and none is rounded to 16 bits. h of the pair is x Aᵀ by the largest scale:
//! in f16 it can pass 65504 where that of an adapter of smaller scale would not by itself.
//!
//! # Training
//!
//! [`forward_train_with`](LoraLinear::forward_train_with) takes dropout, which is an argument of the pass and of nothing else: no
//! other method drops. [`Gradients::accumulate`] adds a pass's gradients to those of others, in f32. A pass that is told not to
//! keep h computes it again where db is asked for.
//!
//! # Full precision
//!
//! f32 factors over a 16-bit weight are rounded for the products, into copies that every change renews. An adapter that is
//! [`at_full_precision`](Adapter::at_full_precision) has none: the products read its factors as they are, at more than 16 bits, as
//! PEFT's do by default. So they do of several adapters, and of a bank of many, of which one is at full precision.
//!
//! # Biases
//!
//! Forward adds one bias. Where active adapters have biases of their own ([`Adapter::with_b_bias`], PEFT's `lora_bias`) that is
//! bias + Σ sᵢ · b_biasᵢ, a vector of N elements that is summed when one of them changes: in f32, and rounded to the storage type
//! once for each adapter. The gradient of the bias is dbias, that of b_biasᵢ is sᵢ times it, and neither needs the vector. A bias
//! that is trained with the adapter (PEFT's `bias`) is the layer's: [`update_bias`](LoraLinear::update_bias) changes it.
//!
//! # DoRA
//!
//! An adapter with a magnitude ([`Adapter::with_magnitude`], PEFT's `use_dora`) multiplies the columns of both products:
//! y = gain ∘ (x Wᵀ + s · x Aᵀ Bᵀ) (+ bias), gain = magnitude / ‖W + s · B A‖ by rows of W. The gain is computed when the adapter is
//! added and whenever it changes, in the order of the stream, from f32 factors where it has them; forward reads N numbers more, and
//! is one launch as before. A new adapter starts with the norms for its magnitude, so that its gain is 1:
//! [`add_dora`](LoraLinear::add_dora). Training gives dm beside da and db ([`Gradients::dm`]) and, as in PEFT, takes the norm for a
//! constant; dropout beside DoRA drops from x for W, too, and is not computed.
//!
//! ```
//! # use fused_lora::{Matrix, MatrixMut, cpu::Cpu, linear::{Adapter, Gradients, LoraLinear, Magnitude, Scaling}};
//! let w = [3.0f32, 4.0, 0.0, 2.0]; // N = K = 2
//! let mut layer = LoraLinear::upload(Cpu, &w, None, 2, 2)?;
//! let adapter = Adapter::upload(&Cpu, 1, Scaling::Lora { alpha: 1.0 }, &[1.0, 1.0], &[0.0, 0.0])?;
//! layer.add_dora("dora", adapter)?;
//! assert_eq!(layer.adapter("dora").and_then(Adapter::magnitude), Some(&vec![5.0, 2.0])); // the norms of W's rows
//! layer.activate("dora")?;
//!
//! let (x, dy) = ([1.0, 1.0], [1.0, 1.0]);
//! let (y, pass) = layer.forward_train(Matrix::new(&x[..], 1, 2))?;
//! let mut dm = [0.0; 2];
//! let magnitude = Magnitude { y: Matrix::new(&y[..], 1, 2), dm: MatrixMut::new(&mut dm[..], 1, 2) };
//! layer.backward(&pass, Matrix::new(&dy[..], 1, 2), Gradients { dm: Some(magnitude), ..Gradients::default() })?;
//! assert_eq!(dm, [7.0 / 5.0, 1.0]); // dy ∘ x Wᵀ / norm
//! # Ok::<(), fused_lora::Error>(())
//! ```
//!
//! Among several active adapters their order matters, as it does in PEFT: each of DoRA multiplies the contributions of those before it, too,
//! and its norm is that of W with itself alone. The one launch multiplies everything by all gains, so rows of B of an adapter behind
//! one of DoRA are divided by the gains before it, in f32, and, without full precision, rounded to the storage type: a row whose gain is 0, or not finite,
//! has no such quotient, and what stands behind it becomes NaN there. An adapter with a bias on B cannot stand before one of DoRA.
//!
//! # Many adapters in one batch
//!
//! [`bank`](LoraLinear::bank) copies adapters side by side, and [`forward_routed`](LoraLinear::forward_routed) takes each row of x
//! through the one that its [`Routes`] name, in one launch. The routes of a batch are made once and serve every layer whose bank has
//! the same slots, that is, ranks and scales in the same order:
//!
//! ```
//! # use fused_lora::{Matrix, Routing, cpu::Cpu, linear::{Adapter, LoraLinear, Routes, Scaling}};
//! # let mut layer = LoraLinear::upload(Cpu, &[1.0f32; 8], None, 4, 2)?;
//! # for (name, r) in [("english", 1), ("french", 2)] {
//! #     let factors = (vec![1.0; 2 * r], vec![1.0; 4 * r]);
//! #     layer.add(name, Adapter::upload(&Cpu, r, Scaling::Lora { alpha: r as f64 }, &factors.0, &factors.1)?)?;
//! # }
//! let bank = layer.bank(&["english", "french"])?;
//! let routing = Routing::new(bank.slots(), &[Some(1), None, Some(0)])?; // three rows: french, no adapter, english
//! let routes = Routes::upload(layer.backend(), &routing)?;
//! let y = layer.forward_routed(Matrix::new(&[1.0; 6][..], 3, 2), &bank, &routes)?;
//! assert_eq!((y[0], y[4], y[8]), (6.0, 2.0, 4.0));
//! # Ok::<(), fused_lora::Error>(())
//! ```
//!
//! Adapters are trained there, too: [`forward_routed_train`](LoraLinear::forward_routed_train) keeps h, and
//! [`backward`](LoraLinear::backward) gives da and db of the whole bank, each adapter's from its own rows, in one launch. After
//! [`update`](LoraLinear::update) the bank wants [`refresh_bank`](LoraLinear::refresh_bank).
//!
//! # Layers that share x
//!
//! [`LoraProjections`] takes q, k and v of attention, or gate and up, into one launch: forward reads x as if for one layer, backward
//! sums dx. Each layer keeps its W, bias and adapters.
//!
//! # Merging
//!
//! [`merge`](LoraLinear::merge) writes W' = W + s · B A to a second buffer and keeps W, so that
//! [`unmerge`](LoraLinear::unmerge) restores the exact bits, at the price of twice the memory.
//! [`merge_for_good`](LoraLinear::merge_for_good) keeps one of the two. W' is summed in f32 and rounded once per adapter, from f32
//! factors where the adapter has them. With DoRA it is gain ∘ (W + s · B A), the sum being what earlier adapters made of W.
//!
//! # Memory and streams
//!
//! Everything runs in the order of the backend's stream. Methods that return a buffer allocate it there, the `_into` ones write
//! where they are told; [`forward_train`](LoraLinear::forward_train) allocates h. The workspace belongs to the backend
//! (all layers on clones of one `cuda::Queue` share one), grows when an operation needs more than any before it, and
//! [`reserve`](LoraLinear::reserve) makes it large enough beforehand. Nothing waits for the stream but
//! [`Backend::download`] and `drop`s of memory on devices without stream-ordered allocation.

mod adapter;
mod backend;
mod bank;
mod bias;
mod dora;
mod factor;
mod joined;
mod merge;
mod pass;
mod projections;
mod set;
mod sharing;
mod train;
mod weight;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub use adapter::{Adapter, Buffers, BuffersMut, Rejected, Scaling};
pub use backend::Backend;
pub use bank::{Bank, Routes};
pub use pass::{Kept, Pass, Training};
pub use projections::{LayerGradients, LoraProjections, ProjectionGradients};
pub use train::{Gradients, Magnitude};

use crate::error::{Error, Result};
use crate::shape::check_length;
use crate::{Element, LoraShape, Matrix, MatrixMut};
use bias::Folded;
use factor::Factor;
use set::{Active, Named};
use weight::Weight;

/// A linear layer y = x Wᵀ (+ bias) with adapters; see the [module](self).
///
/// `T` is the storage type of W, x and y: f16 or bf16, and f32 on the CPU.
pub struct LoraLinear<B: Backend, T: Element> {
    backend: B,
    n: usize,
    k: usize,
    w: Weight<B, T>,
    /// W' of the active adapters, while they are merged.
    merged: Option<B::Buffer<T>>,
    bias: Option<B::Buffer<T>>,
    adapters: Vec<Named<B, T>>,
    active: Active<B, T>,
    /// What `disable` put aside for `enable`; none while adapters are active.
    disabled: Active<B, T>,
    /// Another number whenever W changes.
    version: u64,
    /// Another number whenever the bias changes.
    bias_version: u64,
}

/// A number that no other state of any layer has.
fn next_version() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// What forward and backward read beside their arguments.
struct Operands<'a, B: Backend, T: Element> {
    w: Matrix<'a, B::Read<T>>,
    a: Factor<'a, B, T>,
    b: Factor<'a, B, T>,
    scale: f32,
    bias: Option<Matrix<'a, B::Read<T>>>,
    gain: Option<Matrix<'a, B::Read<f32>>>,
    /// Another number whenever A changes; none without one.
    version: Option<u64>,
}

/// What is made of an adapter is made of this, too.
struct Base<'a, B: Backend, T: Element> {
    backend: &'a B,
    n: usize,
    k: usize,
    w: Matrix<'a, B::Read<T>>,
    bias: Option<&'a B::Buffer<T>>,
}

impl<B: Backend, T: Element> Clone for Base<'_, B, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Backend, T: Element> Copy for Base<'_, B, T> {}

/// The buffer must hold that many elements.
fn check_elements(arg: &'static str, got: usize, expected: usize) -> Result<()> {
    // Devices have no empty allocations.
    if got == expected || expected == 0 {
        Ok(())
    } else {
        Err(Error::Dimension { arg, axis: "elements", got, expected })
    }
}

/// rows · cols, or an error where that overflows.
fn elements(what: &'static str, rows: usize, cols: usize) -> Result<usize> {
    let limit = (isize::MAX as usize) / 8;
    match rows.checked_mul(cols) {
        Some(count) if count <= limit => Ok(count),
        count => Err(Error::TooLarge { what, got: count.map_or(u64::MAX, |count| count as u64), limit: limit as u64 }),
    }
}

/// What a layer is made of but its weight, whose number of elements it returns.
fn check_weight<B: Backend, T: Element>(
    backend: &B,
    bias: Option<&B::Buffer<T>>,
    (n, k): (usize, usize),
) -> Result<usize> {
    for (axis, size) in [("rows", n), ("columns", k)] {
        if size == 0 {
            return Err(Error::ZeroDimension { arg: "w", axis });
        }
    }
    backend.check_dtype(T::DTYPE)?;
    let size = elements("the number of elements of w", n, k)?;
    bias.map_or(Ok(()), |bias| check_elements("bias", B::len(bias), n))?;
    Ok(size)
}

impl<B: Backend, T: Element> LoraLinear<B, T> {
    /// A layer of the weight `w` (N × K, contiguous) and a bias of N elements.
    ///
    /// # Errors
    /// [`Error::ZeroDimension`]; [`Error::TooLarge`]; [`Error::Dimension`] for buffers of other lengths; [`Error::Dtype`]. The
    /// buffers come back with the error.
    #[allow(clippy::type_complexity, reason = "what was passed comes back")]
    pub fn new(
        backend: B,
        w: B::Buffer<T>,
        bias: Option<B::Buffer<T>>,
        n: usize,
        k: usize,
    ) -> Result<Self, Rejected<(B::Buffer<T>, Option<B::Buffer<T>>)>> {
        let check = || {
            let size = check_weight(&backend, bias.as_ref(), (n, k))?;
            check_elements("w", B::len(&w), size)
        };
        match check() {
            Ok(()) => Ok(Self::over(backend, Weight::new(Arc::new(w), 0, n, k), bias, (n, k))),
            Err(error) => Err(Rejected { error, value: (w, bias) }),
        }
    }

    /// A layer of `n` rows of a weight that several layers share, contiguous rows of K elements, from `first_row` on: q, k and v as
    /// one checkpoint has them. Nothing is copied; a layer that is [merged for good](Self::merge_for_good) gets a buffer of its own
    /// while others have this one.
    ///
    /// ```
    /// # use fused_lora::{cpu::Cpu, linear::{LoraLinear, LoraProjections}};
    /// # use std::sync::Arc;
    /// let w = Arc::new(vec![0.5f32; 10 * 8]); // 6 rows of gate, 4 of up
    /// let gate = LoraLinear::of_rows(Cpu, &w, 0, None, 6, 8)?;
    /// let up = LoraLinear::of_rows(Cpu, &w, 6, None, 4, 8)?;
    /// let both = LoraProjections::new([gate, up])?;
    /// # assert_eq!(both.layers()[1].weight_offset(), 48);
    /// # Ok::<(), fused_lora::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`new`](Self::new), but [`Error::BufferTooShort`] for a weight that ends before the rows do.
    pub fn of_rows(
        backend: B,
        w: &Arc<B::Buffer<T>>,
        first_row: usize,
        bias: Option<B::Buffer<T>>,
        n: usize,
        k: usize,
    ) -> Result<Self> {
        let size = check_weight(&backend, bias.as_ref(), (n, k))?;
        let offset = elements("the number of elements of w", first_row, k)?;
        let (got, needed) = (B::len(w), offset.saturating_add(size));
        if got < needed {
            return Err(Error::BufferTooShort { arg: "w", got, needed });
        }
        Ok(Self::over(backend, Weight::new(w.clone(), offset, n, k), bias, (n, k)))
    }

    fn over(backend: B, w: Weight<B, T>, bias: Option<B::Buffer<T>>, (n, k): (usize, usize)) -> Self {
        Self {
            backend,
            n,
            k,
            w,
            merged: None,
            bias,
            adapters: Vec::new(),
            active: Active::None,
            disabled: Active::None,
            version: next_version(),
            bias_version: next_version(),
        }
    }

    /// As [`new`](Self::new), from host memory.
    ///
    /// # Errors
    /// As [`new`](Self::new), and those of [`Backend::upload`].
    pub fn upload(backend: B, w: &[T], bias: Option<&[T]>, n: usize, k: usize) -> Result<Self> {
        let bias = bias.map(|bias| backend.upload(bias)).transpose()?;
        let w = backend.upload(w)?;
        Ok(Self::new(backend, w, bias, n, k)?)
    }

    /// N.
    pub fn out_features(&self) -> usize {
        self.n
    }

    /// K.
    pub fn in_features(&self) -> usize {
        self.k
    }

    /// Where the layer lives.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// The buffer that holds W, or W' while adapters are merged: N × K, contiguous, from [`weight_offset`](Self::weight_offset) on.
    pub fn weight(&self) -> &B::Buffer<T> {
        self.merged.as_ref().unwrap_or(self.w.buffer())
    }

    /// The element of its buffer at which W starts: 0, but for [rows of a weight](Self::of_rows) that several layers share.
    pub fn weight_offset(&self) -> usize {
        if self.is_merged() { 0 } else { self.w.offset() }
    }

    /// Makes the backend's workspace large enough for forward and backward of up to `tokens` rows of x with any of the
    /// adapters, so that no later call allocates for it. Batches with routes: [`reserve_routed`](Self::reserve_routed).
    ///
    /// # Errors
    /// Those of [`Backend::reserve`].
    pub fn reserve(&self, tokens: usize) -> Result<()> {
        let ranks = self.adapters.iter().map(|named| named.adapter.rank()).chain([0, self.active_rank()]);
        let r = ranks.max().unwrap_or(0);
        let shape = LoraShape { m: tokens, n: self.n, k: self.k, r };
        self.backend.reserve(T::DTYPE, shape)?;
        self.backend.reserve(T::DTYPE, LoraShape { n: self.n.min(sharing::COLUMNS), ..shape })
    }

    /// y = x Wᵀ + Σ s · (x Aᵀ) Bᵀ (+ bias) over the active adapters, in a new buffer of M × N; x is M × K. An adapter with a
    /// magnitude (DoRA) multiplies what is there of that sum, its own part included, by its gain.
    ///
    /// # Errors
    /// Those of [`forward_into`](Self::forward_into) and of [`Backend::alloc`].
    pub fn forward(&self, x: Matrix<'_, B::Read<T>>) -> Result<B::Buffer<T>> {
        let mut y = self.output(x)?;
        self.forward_into(x, MatrixMut::new(B::write(&mut y), x.rows, self.n))?;
        Ok(y)
    }

    /// As [`forward`](Self::forward), into `y`.
    ///
    /// # Errors
    /// Those of the backend's forward (`cpu::forward`, `cuda::Kernels::forward`); [`Error::State`] when an
    /// [`update`](Self::update) could not renew the copies that forward reads. Nothing is written then.
    pub fn forward_into(&self, x: Matrix<'_, B::Read<T>>, y: MatrixMut<'_, B::Write<T>>) -> Result<()> {
        self.alone(&[self]).forward(x, [y])
    }

    /// A buffer for y.
    fn output(&self, x: Matrix<'_, B::Read<T>>) -> Result<B::Buffer<T>> {
        self.check_input(x)?;
        self.backend.alloc(elements("the number of elements of y", x.rows, self.n)?)
    }

    /// Whether x is what it says: M is not to be trusted before.
    fn check_input(&self, x: Matrix<'_, B::Read<T>>) -> Result<()> {
        let Matrix { data, offset, rows, cols, row_stride } = x;
        for (axis, size) in [("rows", rows), ("columns", cols)] {
            if size == 0 {
                return Err(Error::ZeroDimension { arg: "x", axis });
            }
        }
        if cols != self.k {
            return Err(Error::Dimension { arg: "x", axis: "columns", got: cols, expected: self.k });
        }
        if row_stride < cols {
            return Err(Error::Stride { arg: "x", got: row_stride, min: cols });
        }
        check_length("x", B::read_len(data), offset, (rows, cols, row_stride))
    }

    fn operands(&self, operation: &'static str) -> Result<Operands<'_, B, T>> {
        match &self.active {
            _ if self.merged.is_some() => Ok(self.plain(self.active_bias())),
            Active::None => Ok(self.plain(None)),
            Active::One(id) => match self.by_id(*id) {
                Some(named) => self.with_adapter(operation, named),
                None => Ok(self.plain(None)),
            },
            Active::Several(joined) => joined.operands(operation, self),
        }
    }

    /// No adapter, but for what it made of the bias: matrices without elements, which lie nowhere in particular.
    fn plain<'a>(&'a self, folded: Option<&'a B::Buffer<T>>) -> Operands<'a, B, T> {
        let merged = self.merged.as_ref().map(|merged| Matrix::new(B::read(merged), self.n, self.k));
        let w = merged.unwrap_or_else(|| self.w.view());
        let (a, b) = (Factor::Storage(Matrix { rows: 0, ..w }), Factor::Storage(Matrix { cols: 0, ..w }));
        let bias = folded.or(self.bias.as_ref()).map(|bias| Matrix::new(B::read(bias), 1, self.n));
        Operands { w, a, b, scale: 1.0, bias, gain: None, version: None }
    }

    fn with_adapter<'a>(&'a self, operation: &'static str, named: &'a Named<B, T>) -> Result<Operands<'a, B, T>> {
        let factors = named.factors(operation, self.n, self.k)?;
        let gain = named.gain().map(|gain| Matrix::new(B::read(gain), 1, self.n));
        let plain = Operands { gain, ..self.plain(named.folded().map(Folded::sum)) };
        let Some((a, b)) = factors else { return Ok(plain) };
        Ok(Operands { a, b, scale: named.adapter.scale(), version: Some(named.version), ..plain })
    }

    fn base(&self) -> Base<'_, B, T> {
        Base { backend: &self.backend, n: self.n, k: self.k, w: self.w.view(), bias: self.bias.as_ref() }
    }
}

impl<B: Backend, T: Element> fmt::Debug for LoraLinear<B, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoraLinear")
            .field("dtype", &T::DTYPE)
            .field("n", &self.n)
            .field("k", &self.k)
            .field("bias", &self.bias.is_some())
            .field("adapters", &self.adapters.iter().map(|named| &*named.name).collect::<Vec<_>>())
            .field("active", &self.active())
            .field("merged", &self.is_merged())
            .finish()
    }
}
