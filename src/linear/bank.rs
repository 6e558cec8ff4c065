//! Many adapters of a layer in one batch: each row of x goes through its own.

use super::factor::{Copies, Put};
use super::pass::Routed;
use super::sharing::{COLUMNS, Sharing};
use super::{Backend, Buffers, LoraLinear, Operands, Pass, Training, next_version};
use crate::error::{Error, Result};
use crate::routing::{check_routable, same_slots, side_by_side};
use crate::{Element, LoraShape, Matrix, MatrixMut, Routing, Slot};

/// Adapters of a layer side by side, for batches whose rows choose among them: [`LoraLinear::bank`].
pub struct Bank<B: Backend, T: Element> {
    /// What each adapter was when it was copied.
    copied: Vec<Copied>,
    slots: Vec<Slot>,
    rank: usize,
    copies: Copies<B, T>,
    /// Another number whenever it is made anew.
    version: u64,
}

/// An adapter of a bank.
struct Copied {
    name: String,
    id: u64,
    /// None where copying failed.
    version: Option<u64>,
}

/// Rows of a batch with the adapters they go through, in the backend's memory. Layers whose banks have the same
/// [slots](Bank::slots) can share it.
pub struct Routes<B: Backend> {
    words: B::WordBuffer,
    rows: usize,
    slots: Vec<Slot>,
}

impl<B: Backend> Routes<B> {
    /// Copies the table of a batch to the backend.
    ///
    /// # Errors
    /// Those of [`Backend::upload_words`].
    pub fn upload(backend: &B, routing: &Routing) -> Result<Self> {
        let words = backend.upload_words(routing.words())?;
        Ok(Self { words, rows: routing.rows(), slots: routing.slots().to_vec() })
    }

    /// As an operation takes it.
    pub fn view(&self) -> Matrix<'_, B::Words> {
        Matrix::new(B::words(&self.words), 1, Routing::words_for(self.rows))
    }
}

impl<B: Backend, T: Element> Bank<B, T> {
    /// Where each adapter lies, in the order in which they were named: what [`Routing::new`] takes.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// The A of all adapters below each other, [`rank`](Self::rank) × K, and their B side by side, N × [`rank`](Self::rank): in f32
    /// where an adapter is at full precision, else in the storage type; between slots are zeros.
    pub fn buffers(&self) -> &Buffers<B, T> {
        self.copies.buffers()
    }

    /// Ranks of all adapters and of the gaps between them.
    pub fn rank(&self) -> usize {
        self.rank
    }

    pub(super) fn version(&self) -> u64 {
        self.version
    }

    /// Routes must have been made among these slots.
    fn check_slots(&self, operation: &'static str, slots: &[Slot]) -> Result<()> {
        same_slots(operation, |at| self.copied.get(at).map_or("", |copied| &copied.name), slots, &self.slots)
    }
}

impl<B: Backend, T: Element> LoraLinear<B, T> {
    /// Copies adapters side by side, for [`forward_routed`](Self::forward_routed). Later changes of an adapter do not reach the copies.
    /// Where one is at full precision ([`Adapter::at_full_precision`](super::Adapter::at_full_precision)) all are copied in f32, which
    /// loses nothing, and rows of every adapter are computed as at full precision; else f32 factors are rounded to the storage type.
    ///
    /// # Errors
    /// [`Error::AdapterName`]; [`Error::State`] for an adapter with a bias on B, and for one with a magnitude (DoRA), which it names;
    /// [`Error::TooLarge`] for more ranks than [`MAX_ROUTED_RANK`](crate::MAX_ROUTED_RANK), each adapter's counted as the next multiple
    /// of 16; those of [`Backend::upload`] and [`Backend::round`].
    pub fn bank(&self, names: &[&str]) -> Result<Bank<B, T>> {
        let mut chosen = Vec::with_capacity(names.len());
        for name in names {
            let named = &self.adapters[self.position(name)?];
            check_routable("bank", name, named.adapter.has_b_bias(), named.adapter.has_magnitude())?;
            chosen.push(named);
        }
        let (slots, rank) = side_by_side(chosen.iter().map(|named| (named.adapter.rank(), named.adapter.scale())))?;
        // What lies between the slots is multiplied by zeros, so it must be finite.
        let copies = Copies::new(&self.backend, (self.n, self.k, rank), Copies::are_full(&chosen), true)?;
        // No state of an adapter has been copied yet.
        let copied = chosen.iter().map(|named| Copied { name: named.name.clone(), id: named.id, version: None });
        let mut bank = Bank { copied: copied.collect(), slots, rank, copies, version: next_version() };
        self.refresh_bank(&mut bank)?;
        Ok(bank)
    }

    /// Copies the adapters of a bank that have changed since, a launch for each: after [`update`](Self::update), to train them.
    ///
    /// # Errors
    /// [`Error::State`] for an adapter that has left the layer or is another layer's; those of [`Backend::round`]. What could not be
    /// copied is not computed with until this has succeeded.
    pub fn refresh_bank(&self, bank: &mut Bank<B, T>) -> Result<()> {
        bank.version = next_version();
        for (copied, slot) in bank.copied.iter_mut().zip(&bank.slots) {
            let named = self.by_id(copied.id).ok_or_else(|| copied.stray("refresh_bank"))?;
            if copied.version == Some(named.version) {
                continue;
            }
            copied.version = None;
            let (first, ranks) = (slot.first_rank, slot.ranks);
            if ranks != 0 {
                let factors = named.adapter.factors(self.n, self.k);
                bank.copies.put(&self.backend, first, ranks, Put { factors, scale: 1.0, divisor: None })?;
            }
            copied.version = Some(named.version);
        }
        Ok(())
    }

    /// Makes the backend's workspace large enough for forward and backward of up to `tokens` rows through a bank.
    ///
    /// # Errors
    /// Those of [`Backend::reserve`].
    pub fn reserve_routed(&self, tokens: usize, bank: &Bank<B, T>) -> Result<()> {
        let shape = LoraShape { m: tokens, n: self.n, k: self.k, r: bank.rank };
        self.backend.reserve(T::DTYPE, shape)?;
        self.backend.reserve(T::DTYPE, LoraShape { n: self.n.min(COLUMNS), ..shape })
    }

    /// y = x Wᵀ + s · (x Aᵀ) Bᵀ (+ bias), row by row with the adapter that `routes` has for it, or with none; in a new buffer of
    /// M × N. Which adapters are active does not matter.
    ///
    /// # Errors
    /// As [`forward_routed_into`](Self::forward_routed_into), and those of [`Backend::alloc`].
    pub fn forward_routed(
        &self,
        x: Matrix<'_, B::Read<T>>,
        bank: &Bank<B, T>,
        routes: &Routes<B>,
    ) -> Result<B::Buffer<T>> {
        let mut y = self.output(x)?;
        self.forward_routed_into(x, bank, routes, MatrixMut::new(B::write(&mut y), x.rows, self.n))?;
        Ok(y)
    }

    /// As [`forward_routed`](Self::forward_routed), into `y`.
    ///
    /// # Errors
    /// Those of the backend's forward; [`Error::Dimension`] for routes of another number of rows; [`Error::State`], which names the
    /// adapter, for routes that were made for other slots and when an adapter of the bank has changed, has left the layer or is another
    /// layer's, and while adapters are merged. Nothing is written then.
    pub fn forward_routed_into(
        &self,
        x: Matrix<'_, B::Read<T>>,
        bank: &Bank<B, T>,
        routes: &Routes<B>,
        y: MatrixMut<'_, B::Write<T>>,
    ) -> Result<()> {
        self.routed(&[self], bank, routes).forward(x, [y])
    }

    /// As [`forward_routed`](Self::forward_routed), keeping what [`backward`](Self::backward) needs, with dropout, or without keeping
    /// h. Allocates h where it is kept, M × the bank's rank, or its halves where the bank is in f32.
    ///
    /// ```
    /// # use fused_lora::{Matrix, MatrixMut, Routing, cpu::Cpu};
    /// # use fused_lora::linear::{Adapter, Gradients, LoraLinear, Routes, Scaling, Training};
    /// # let mut layer = LoraLinear::upload(Cpu, &[1.0f32; 8], None, 4, 2)?;
    /// # for (name, r) in [("english", 1), ("french", 2)] {
    /// #     let factors = (vec![1.0; 2 * r], vec![1.0; 4 * r]);
    /// #     layer.add(name, Adapter::upload(&Cpu, r, Scaling::Lora { alpha: r as f64 }, &factors.0, &factors.1)?)?;
    /// # }
    /// let bank = layer.bank(&["english", "french"])?;
    /// let routes = Routes::upload(layer.backend(), &Routing::new(bank.slots(), &[Some(1), None, Some(0)])?)?;
    /// let (x, dy) = ([1.0; 6], [1.0; 12]);
    /// let x = Matrix::new(&x[..], 3, 2);
    /// let (_, pass) = layer.forward_routed_train(x, &bank, &routes, Training::default())?;
    /// let mut db = vec![0.0; 4 * bank.rank()]; // of all adapters, N × R of the bank
    /// let gradients = Gradients { db: Some(MatrixMut::new(&mut db[..], 4, bank.rank())), ..Gradients::default() };
    /// layer.backward(&pass, Matrix::new(&dy[..], 3, 4), gradients)?;
    /// let [english, french] = [0, 1].map(|at| db[bank.slots()[at].first_rank]);
    /// assert_eq!((english, french), (2.0, 2.0));
    /// # Ok::<(), fused_lora::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`forward_routed`](Self::forward_routed); [`Error::Probability`].
    #[allow(clippy::type_complexity, reason = "y and the pass")]
    pub fn forward_routed_train<'a>(
        &self,
        x: Matrix<'a, B::Read<T>>,
        bank: &'a Bank<B, T>,
        routes: &'a Routes<B>,
        training: Training<'a, B>,
    ) -> Result<(B::Buffer<T>, Pass<'a, B, T>)> {
        let mut y = self.output(x)?;
        let into = MatrixMut::new(B::write(&mut y), x.rows, self.n);
        let pass = self.forward_routed_train_into(x, bank, routes, into, training)?;
        Ok((y, pass))
    }

    /// As [`forward_routed_train`](Self::forward_routed_train), into `y`.
    ///
    /// # Errors
    /// As [`forward_routed_into`](Self::forward_routed_into); [`Error::Probability`]; those of [`Backend::alloc`].
    pub fn forward_routed_train_into<'a>(
        &self,
        x: Matrix<'a, B::Read<T>>,
        bank: &'a Bank<B, T>,
        routes: &'a Routes<B>,
        y: MatrixMut<'_, B::Write<T>>,
        training: Training<'a, B>,
    ) -> Result<Pass<'a, B, T>> {
        let pass = self.routed(&[self], bank, routes).forward_train(x, [y], training)?;
        Ok(pass.through(Routed { bank, routes }))
    }

    fn routed<'s, 'a>(
        &'a self,
        layers: &'s [&'a Self],
        bank: &'a Bank<B, T>,
        routes: &'a Routes<B>,
    ) -> Sharing<'s, 'a, B, T> {
        Sharing { routed: Some(Routed { bank, routes }), ..self.alone(layers) }
    }

    /// What a launch reads of the layer and of the bank.
    pub(super) fn routed_operands<'a>(
        &'a self,
        operation: &'static str,
        Routed { bank, routes }: Routed<'a, B, T>,
        rows: usize,
    ) -> Result<Operands<'a, B, T>> {
        self.check_unmerged(operation)?;
        self.check_bank(operation, bank)?;
        if routes.rows != rows {
            return Err(Error::Dimension { arg: "routes", axis: "rows", got: routes.rows, expected: rows });
        }
        bank.check_slots(operation, &routes.slots)?;
        let plain = self.plain(None);
        if bank.rank == 0 {
            return Ok(plain);
        }
        let (a, b) = bank.copies.read();
        Ok(Operands { a, b, ..plain })
    }

    /// Every adapter of the bank must be the layer's, as it was when it was copied.
    fn check_bank(&self, operation: &'static str, bank: &Bank<B, T>) -> Result<()> {
        for copied in &bank.copied {
            let named = self.by_id(copied.id).ok_or_else(|| copied.stray(operation))?;
            if copied.version != Some(named.version) {
                let got = format!("adapter `{}` has changed since it was copied to the bank", copied.name);
                return Err(Error::State { operation, got, expected: "`refresh_bank` first" });
            }
        }
        Ok(())
    }
}

impl Copied {
    fn stray(&self, operation: &'static str) -> Error {
        let got = format!("adapter `{}` of the bank is not in the layer", self.name);
        Error::State { operation, got, expected: "`bank` anew first" }
    }
}
