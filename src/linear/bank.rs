//! Many adapters of a layer in one batch: each row of x goes through its own.

use super::{Backend, LoraLinear, Operands, elements};
use crate::error::{Error, Result};
use crate::{Element, Forward, LoraShape, Matrix, MatrixMut, Round, Routing, Slot, Variant};

/// Every adapter starts at a multiple of so many ranks: of what tensor cores sum at once, so that its sums are those of the adapter
/// alone, and of what the Hopper kernels ask for.
const ALIGN: usize = 16;

/// Adapters of a layer side by side, for batches whose rows choose among them: [`LoraLinear::bank`].
pub struct Bank<B: Backend, T: Element> {
    /// What each adapter was when it was copied.
    copied: Vec<Copied>,
    slots: Vec<Slot>,
    rank: usize,
    a: B::Buffer<T>,
    b: B::Buffer<T>,
}

/// An adapter of a bank.
struct Copied {
    name: String,
    id: u64,
    version: u64,
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

    /// Routes must have been made among these slots.
    fn check_slots(&self, slots: &[Slot]) -> Result<()> {
        let got = match slots.iter().zip(&self.slots).position(|(theirs, ours)| theirs != ours) {
            Some(at) => {
                let name = self.copied.get(at).map_or("", |copied| &copied.name);
                format!("the routes were made for another rank or scale of adapter `{name}` than the bank's")
            }
            None if slots.len() == self.slots.len() => return Ok(()),
            None => format!("the routes were made for {} adapters, the bank has {}", slots.len(), self.slots.len()),
        };
        Err(Error::State { operation: "forward_routed", got, expected: "routes of the bank's `slots`" })
    }
}

impl<B: Backend, T: Element> LoraLinear<B, T> {
    /// Copies adapters side by side, for [`forward_routed`](Self::forward_routed). Later changes of an adapter do not reach the copies.
    /// f32 factors are rounded to the storage type.
    ///
    /// # Errors
    /// [`Error::AdapterName`]; [`Error::State`] for an adapter with a bias on B, and for one with a magnitude (DoRA), which it names;
    /// [`Error::TooLarge`] for more ranks than [`MAX_ROUTED_RANK`](crate::MAX_ROUTED_RANK), each adapter's counted as the next multiple
    /// of 16; those of [`Backend::upload`] and [`Backend::round`].
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
        let copied =
            chosen.iter().map(|named| Copied { name: named.name.clone(), id: named.id, version: named.version });
        let copied = copied.collect();
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
        self.check_unmerged("forward_routed")?;
        self.check_bank(bank)?;
        if routes.rows != x.rows {
            return Err(Error::Dimension { arg: "routes", axis: "rows", got: routes.rows, expected: x.rows });
        }
        bank.check_slots(&routes.slots)?;
        let plain = self.plain(None);
        let Operands { w, bias, .. } = plain;
        let (a, b) = match bank.rank {
            // They lie nowhere in particular.
            0 => (Matrix { rows: 0, ..w }, Matrix { cols: 0, ..w }),
            rank => (Matrix::new(B::read(&bank.a), rank, self.k), Matrix::new(B::read(&bank.b), self.n, rank)),
        };
        let variant = Variant { routes: Some(routes.view()), ..Variant::default() };
        self.backend.forward::<T, T>(Forward { x, w, a, b, scale: 1.0, bias, h: None, y, variant })
    }

    /// Every adapter of the bank must be the layer's, as it was when it was copied.
    fn check_bank(&self, bank: &Bank<B, T>) -> Result<()> {
        for Copied { name, id, version } in &bank.copied {
            let got = match self.by_id(*id) {
                Some(named) if named.version == *version => continue,
                Some(_) => format!("adapter `{name}` has changed since it was copied to the bank"),
                None => format!("adapter `{name}` of the bank is not in the layer"),
            };
            return Err(Error::State { operation: "forward_routed", got, expected: "`bank` anew first" });
        }
        Ok(())
    }
}
