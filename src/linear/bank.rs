//! Many adapters of a layer in one batch: each row of x goes through its own.

use super::{Backend, LoraLinear, Operands, elements};
use crate::error::{Error, Result};
use crate::{Element, Forward, LoraShape, Matrix, MatrixMut, Round, Routing, Slot, Variant};

/// Every adapter starts at a multiple of so many ranks: of what tensor cores sum at once, so that its sums are those of the adapter
/// alone, and of what the Hopper kernels ask for.
const ALIGN: usize = 16;

/// Adapters of a layer side by side, for batches whose rows choose among them: [`LoraLinear::bank`].
pub struct Bank<B: Backend, T: Element> {
    /// (id, version) of each adapter when it was copied.
    copied: Vec<(u64, u64)>,
    slots: Vec<Slot>,
    rank: usize,
    a: B::Buffer<T>,
    b: B::Buffer<T>,
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

    /// The A of all adapters below each other, [`rank`](Self::rank) × K; rows between slots are zeros.
    pub fn a(&self) -> &B::Buffer<T> {
        &self.a
    }

    /// Their B side by side, N × [`rank`](Self::rank).
    pub fn b(&self) -> &B::Buffer<T> {
        &self.b
    }

    /// Ranks of all adapters and of the gaps between them.
    pub fn rank(&self) -> usize {
        self.rank
    }
}

impl<B: Backend, T: Element> LoraLinear<B, T> {
    /// Copies adapters side by side, for [`forward_routed`](Self::forward_routed). Later changes of an adapter do not reach the copies.
    /// f32 factors are rounded to the storage type.
    ///
    /// # Errors
    /// [`Error::AdapterName`]; [`Error::State`] for an adapter with a bias on B, and for one with a magnitude (DoRA); [`Error::TooLarge`] for more ranks than [`MAX_ROUTED_RANK`](crate::MAX_ROUTED_RANK), each adapter's
    /// counted as the next multiple of 16; those of [`Backend::upload`] and [`Backend::round`].
    pub fn bank(&self, names: &[&str]) -> Result<Bank<B, T>> {
        let mut chosen = Vec::with_capacity(names.len());
        let (mut slots, mut rank) = (Vec::with_capacity(names.len()), 0);
        for name in names {
            let named = &self.adapters[self.position(name)?];
            if named.adapter.has_b_bias() {
                let got = format!("adapter `{name}` has a bias on B");
                let expected = "adapters without one: forward adds the same bias to every row";
                return Err(Error::State { operation: "bank", got, expected });
            }
            if named.adapter.has_magnitude() {
                let got = format!("adapter `{name}` has a magnitude (DoRA)");
                let expected = "adapters without one: each row would have a gain of its own";
                return Err(Error::State { operation: "bank", got, expected });
            }
            let ranks = named.adapter.rank();
            slots.push(Slot { first_rank: rank, ranks, scale: named.adapter.scale() });
            rank = ranks.checked_next_multiple_of(ALIGN).map_or(usize::MAX, |ranks| ranks.saturating_add(rank));
            if rank > crate::MAX_ROUTED_RANK {
                let (what, limit) = ("the rank of a bank of adapters", crate::MAX_ROUTED_RANK as u64);
                return Err(Error::TooLarge { what, got: rank as u64, limit });
            }
            chosen.push(named);
        }
        // What lies between the slots is multiplied by zeros, so it must be finite.
        let zeros = |what, rows, cols| Ok::<_, Error>(vec![T::default(); elements(what, rows, cols)?]);
        let mut a = self.backend.upload(&zeros("the number of elements of a", rank, self.k)?)?;
        let mut b = self.backend.upload(&zeros("the number of elements of b", self.n, rank)?)?;
        for (named, slot) in chosen.iter().zip(&slots).filter(|(_, slot)| slot.ranks != 0) {
            let (first, ranks) = (slot.first_rank, slot.ranks);
            self.backend.round(Round {
                factors: named.adapter.factors(self.n, self.k),
                scale: 1.0,
                divisor: None,
                rounded_a: MatrixMut::new(B::write(&mut a), ranks, self.k).with_offset(first * self.k),
                rounded_b: MatrixMut::new(B::write(&mut b), self.n, ranks).with_offset(first).with_row_stride(rank),
            })?;
        }
        let copied = chosen.iter().map(|named| (named.id, named.version)).collect();
        Ok(Bank { copied, slots, rank, a, b })
    }

    /// Makes the backend's workspace large enough for [`forward_routed`](Self::forward_routed) of up to `tokens` rows through a bank.
    ///
    /// # Errors
    /// Those of [`Backend::reserve`].
    pub fn reserve_routed(&self, tokens: usize, bank: &Bank<B, T>) -> Result<()> {
        self.backend.reserve(T::DTYPE, LoraShape { m: tokens, n: self.n, k: self.k, r: bank.rank })
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
    /// Those of the backend's forward; [`Error::Dimension`] for routes of another number of rows; [`Error::State`]
    /// for routes that were made for other slots, when an adapter of the bank has changed or left the layer, and while adapters are merged.
    pub fn forward_routed_into(
        &self,
        x: Matrix<'_, B::Read<T>>,
        bank: &Bank<B, T>,
        routes: &Routes<B>,
        y: MatrixMut<'_, B::Write<T>>,
    ) -> Result<()> {
        self.check_unmerged("forward_routed")?;
        let is_current = |&(id, version): &(u64, u64)| self.by_id(id).is_some_and(|named| named.version == version);
        if !bank.copied.iter().all(is_current) {
            let got = "an adapter of the bank has changed since, or is not the layer's".to_owned();
            return Err(Error::State { operation: "forward_routed", got, expected: "`bank` anew first" });
        }
        if routes.rows != x.rows {
            return Err(Error::Dimension { arg: "routes", axis: "rows", got: routes.rows, expected: x.rows });
        }
        if routes.slots != bank.slots {
            let got = "the routes were made for other ranks or scales than the bank's".to_owned();
            return Err(Error::State { operation: "forward_routed", got, expected: "routes of the bank's `slots`" });
        }
        let plain = self.plain(None);
        let (a, b) = match bank.rank {
            0 => (plain.a, plain.b),
            rank => (Matrix::new(B::read(&bank.a), rank, self.k), Matrix::new(B::read(&bank.b), self.n, rank)),
        };
        let variant = Variant { routes: Some(routes.view()), ..Variant::default() };
        let Operands { w, bias, .. } = plain;
        self.backend.forward(Forward { x, w, a, b, scale: 1.0, bias, h: None, y, variant })
    }
}
