//! The adapters of a layer, and which of them take part.

use std::{iter, mem};

use super::bias::Folded;
use super::dora::gain_into;
use super::factor::Factor;
use super::joined::Joined;
use super::{Adapter, Backend, Base, Buffers, BuffersMut, LoraLinear, Rejected, next_version};
use crate::error::{Error, Result};
use crate::{Element, Matrix, MatrixMut, Round};

/// An adapter of a layer.
pub(super) struct Named<B: Backend, T: Element> {
    pub(super) name: String,
    /// Stays the same for as long as the layer has the adapter.
    pub(super) id: u64,
    /// Another number whenever the factors change.
    pub(super) version: u64,
    pub(super) adapter: Adapter<B, T>,
    /// A and B in the storage type, where the adapter's own are f32 and products do not read those.
    rounded: Option<(B::Buffer<T>, B::Buffer<T>)>,
    /// The bias of the layer with the adapter's own, where it has one.
    folded: Option<Folded<B, T>>,
    /// Magnitude over norm, where it has a magnitude.
    gain: Option<B::Buffer<f32>>,
    /// `rounded`, `folded` or `gain` is older than what it is made of.
    is_stale: bool,
}

/// Which adapters take part.
pub(super) enum Active<B: Backend, T: Element> {
    None,
    /// By its id.
    One(u64),
    Several(Joined<B, T>),
}

impl<B: Backend, T: Element> Active<B, T> {
    fn ids(&self) -> &[u64] {
        match self {
            Active::None => &[],
            Active::One(id) => std::slice::from_ref(id),
            Active::Several(joined) => &joined.ids,
        }
    }
}

/// What is wrong with copies that could not be renewed.
pub(super) fn stale(operation: &'static str, name: &str) -> Error {
    Error::State {
        operation,
        got: format!("the copies of adapter `{name}` are older than its factors"),
        expected: "`refresh`, which copies them, to succeed first",
    }
}

impl<B: Backend, T: Element> Named<B, T> {
    /// What is made of the adapter must be as new as it is.
    pub(super) fn check_fresh(&self, operation: &'static str) -> Result<()> {
        if self.is_stale { Err(stale(operation, &self.name)) } else { Ok(()) }
    }

    /// A and B as products read them; `None` at rank 0.
    #[allow(clippy::type_complexity, reason = "two factors")]
    pub(super) fn factors(
        &self,
        operation: &'static str,
        n: usize,
        k: usize,
    ) -> Result<Option<(Factor<'_, B, T>, Factor<'_, B, T>)>> {
        self.check_fresh(operation)?;
        let r = self.adapter.rank();
        let storage =
            |a, b| (Factor::Storage(Matrix::new(B::read(a), r, k)), Factor::Storage(Matrix::new(B::read(b), n, r)));
        Ok(match (self.adapter.buffers(), &self.rounded) {
            _ if r == 0 => None,
            (Buffers::Storage { a, b, .. }, _) => Some(storage(a, b)),
            (Buffers::F32 { .. }, Some((a, b))) => Some(storage(a, b)),
            (Buffers::F32 { a, b, .. }, None) => {
                Some((Factor::F32(Matrix::new(B::read(a), r, k)), Factor::F32(Matrix::new(B::read(b), n, r))))
            }
        })
    }

    /// What its bias makes of the layer's.
    pub(super) fn folded(&self) -> Option<&Folded<B, T>> {
        self.folded.as_ref()
    }

    /// What multiplies the columns of both products, where it has a magnitude.
    pub(super) fn gain(&self) -> Option<&B::Buffer<f32>> {
        self.gain.as_ref()
    }

    pub(super) fn take_bias(&mut self) -> Option<B::Buffer<T>> {
        self.folded.take().map(Folded::into_sum)
    }

    /// Whether something is made of it, and of W and the bias, which can be older.
    fn is_copied(&self) -> bool {
        self.rounded.is_some() || self.folded.is_some() || self.gain.is_some()
    }

    /// Copies f32 factors to the storage type, sums the biases, and computes the gain.
    fn refresh(&mut self, base: Base<'_, B, T>) -> Result<()> {
        let Base { backend, n, k, bias, .. } = base;
        let r = self.adapter.rank();
        self.is_stale = self.is_copied();
        if let Some((a, b)) = &mut self.rounded {
            backend.round::<T, T>(Round {
                factors: self.adapter.factors(n, k),
                scale: 1.0,
                divisor: None,
                rounded_a: MatrixMut::new(B::write(a), r, k),
                rounded_b: MatrixMut::new(B::write(b), n, r),
            })?;
        }
        if let Some(folded) = &mut self.folded {
            folded.refresh(backend, n, bias, iter::once(&self.adapter))?;
        }
        if let Some(gain) = &mut self.gain {
            gain_into(base, &self.adapter, None, gain)?;
        }
        self.is_stale = false;
        Ok(())
    }
}

impl<B: Backend, T: Element> LoraLinear<B, T> {
    /// Adds an adapter, which takes part once it is activated. For one in f32 this makes the copies in the storage type
    /// that the products read, unless they read f32 ([`Adapter::at_full_precision`]), for one with a bias on B the sum of the
    /// biases, for one with a magnitude the gain.
    ///
    /// # Errors
    /// [`Error::AdapterName`] when there is one of that name; [`Error::Dimension`] when a part has another number of
    /// elements than R × K, N × R or N; [`Error::Exclusive`] for a magnitude beside a bias on B; those of [`Backend::alloc`],
    /// [`Backend::round`], [`Backend::merge`] and [`Backend::gain`]. The adapter comes back with the error, and the layer is as
    /// before.
    pub fn add(&mut self, name: &str, adapter: Adapter<B, T>) -> Result<(), Rejected<Adapter<B, T>>> {
        let (n, k, r) = (self.n, self.k, adapter.rank());
        let check = || {
            if self.adapters.iter().any(|named| named.name == name) {
                let expected = "one that the layer does not have".to_owned();
                return Err(Error::AdapterName { got: name.to_owned(), expected });
            }
            adapter.check(n, k)?;
            let rounded = match adapter.buffers() {
                Buffers::F32 { .. } if r != 0 && !adapter.is_at_full_precision() => {
                    Some((self.backend.alloc(r * k)?, self.backend.alloc(n * r)?))
                }
                _ => None,
            };
            let gain = if adapter.has_magnitude() { Some(self.backend.alloc(n)?) } else { None };
            Ok((rounded, Folded::new(self, iter::once(&adapter))?, gain))
        };
        let (rounded, folded, gain) = match check() {
            Ok(parts) => parts,
            Err(error) => return Err(Rejected { error, value: adapter }),
        };
        let (id, version) = (next_version(), next_version());
        let mut named = Named { name: name.to_owned(), id, version, adapter, rounded, folded, gain, is_stale: false };
        match named.refresh(self.base()) {
            Ok(()) => self.adapters.push(named),
            Err(error) => return Err(Rejected { error, value: named.adapter }),
        }
        Ok(())
    }

    /// Takes an adapter out of the layer.
    ///
    /// # Errors
    /// [`Error::AdapterName`]; [`Error::State`] while it is active.
    pub fn remove(&mut self, name: &str) -> Result<Adapter<B, T>> {
        let at = self.position(name)?;
        if self.is_active(self.adapters[at].id) {
            let got = format!("adapter `{name}` is active");
            return Err(Error::State { operation: "remove", got, expected: "`disable` or another `activate` first" });
        }
        if self.disabled.ids().contains(&self.adapters[at].id) {
            self.disabled = Active::None;
        }
        Ok(self.adapters.remove(at).adapter)
    }

    /// The names of the adapters, in the order in which they were added.
    pub fn names(&self) -> Vec<&str> {
        self.adapters.iter().map(|named| &*named.name).collect()
    }

    /// The names of the adapters that take part, in the order in which they were activated.
    pub fn active(&self) -> Vec<&str> {
        let ids = self.active_ids();
        ids.iter().filter_map(|id| self.by_id(*id)).map(|named| &*named.name).collect()
    }

    /// An adapter by its name.
    pub fn adapter(&self, name: &str) -> Option<&Adapter<B, T>> {
        self.adapters.iter().find(|named| named.name == name).map(|named| &named.adapter)
    }

    /// Lets one adapter take part, instead of those that do. No data moves.
    ///
    /// # Errors
    /// [`Error::AdapterName`]; [`Error::State`] while adapters are merged.
    pub fn activate(&mut self, name: &str) -> Result<()> {
        self.check_unmerged("activate")?;
        self.active = Active::One(self.adapters[self.position(name)?].id);
        self.disabled = Active::None;
        Ok(())
    }

    /// Lets several adapters take part at once, for inference: what they add to y is summed, in this order where DoRA is among
    /// them. Their factors are copied side by side, rounded as the [module](super) says.
    ///
    /// # Errors
    /// [`Error::AdapterName`] for a name that the layer does not have or that comes twice; [`Error::State`] while adapters are
    /// merged, and where one with a bias on B stands before one with a magnitude; those of [`Backend::alloc`],
    /// [`Backend::round`], [`Backend::merge`] and [`Backend::gain`]. The adapters active before stay so.
    pub fn activate_all(&mut self, names: &[&str]) -> Result<()> {
        self.check_unmerged("activate_all")?;
        let mut chosen = Vec::with_capacity(names.len());
        for (at, name) in names.iter().enumerate() {
            if names[..at].contains(name) {
                return Err(Error::AdapterName { got: (*name).to_owned(), expected: "each name once".to_owned() });
            }
            chosen.push(&self.adapters[self.position(name)?]);
        }
        self.active = match &chosen[..] {
            [] => Active::None,
            [one] => Active::One(one.id),
            several => Active::Several(Joined::new(self, several)?),
        };
        self.disabled = Active::None;
        Ok(())
    }

    /// Lets no adapter take part: forward is the plain product. The adapters stay in the layer, and [`enable`](Self::enable)
    /// lets those that took part do so again. No data moves.
    ///
    /// # Errors
    /// [`Error::State`] while adapters are merged.
    pub fn disable(&mut self) -> Result<()> {
        self.check_unmerged("disable")?;
        if !self.active.ids().is_empty() {
            self.disabled = mem::replace(&mut self.active, Active::None);
        }
        Ok(())
    }

    /// Takes [`disable`](Self::disable) back, where no adapter was activated since. An adapter that has left the layer takes
    /// those that it took part with out of this.
    ///
    /// # Errors
    /// [`Error::State`] while adapters are merged.
    pub fn enable(&mut self) -> Result<()> {
        self.check_unmerged("enable")?;
        if self.active.ids().is_empty() {
            self.active = mem::replace(&mut self.disabled, Active::None);
        }
        Ok(())
    }

    /// Changes the parts of an adapter: the only way to do so. Afterwards, whatever `change` returned, the copies in the
    /// storage type are made anew, and the gain is computed, in the order of the stream. A [`Pass`](super::Pass) from before cannot be used any more.
    ///
    /// On a GPU `change` launches what it likes on the backend's stream. An address kept from here and written to later
    /// escapes this; call [`refresh`](Self::refresh) then.
    ///
    /// # Errors
    /// What `change` returns; [`Error::AdapterName`]; [`Error::State`] while the adapter is merged; those of [`Backend::round`],
    /// [`Backend::merge`] and [`Backend::gain`].
    /// When the copies could not be made, and when `change` panicked, forward with the adapter is refused until
    /// [`refresh`](Self::refresh) has made them.
    pub fn update<E: From<Error>>(
        &mut self,
        name: &str,
        change: impl FnOnce(BuffersMut<'_, B, T>) -> Result<(), E>,
    ) -> Result<(), E> {
        let at = self.position(name)?;
        if self.is_active(self.adapters[at].id) {
            self.check_unmerged("update")?;
        }
        self.mark_changed(at);
        let outcome = change(self.adapters[at].adapter.buffers_mut());
        let refreshed = self.renew(at);
        outcome?;
        Ok(refreshed?)
    }

    /// Makes the copies of an adapter in the storage type anew, as [`update`](Self::update) does.
    ///
    /// # Errors
    /// As [`update`](Self::update).
    pub fn refresh(&mut self, name: &str) -> Result<()> {
        self.update(name, |_| Ok(()))
    }

    /// Nothing computed from the factors of this adapter may be used from here on.
    fn mark_changed(&mut self, at: usize) {
        let named = &mut self.adapters[at];
        named.version = next_version();
        named.is_stale = named.is_copied();
        let id = named.id;
        for chosen in [&mut self.active, &mut self.disabled] {
            if let Active::Several(joined) = chosen {
                joined.is_stale |= joined.ids.contains(&id);
            }
        }
    }

    /// No sum with the layer's bias may be used from here on.
    pub(super) fn mark_bias_changed(&mut self) {
        self.bias_version = next_version();
        self.adapters.iter_mut().for_each(|named| named.is_stale |= named.folded.is_some());
        for chosen in [&mut self.active, &mut self.disabled] {
            if let Active::Several(joined) = chosen {
                joined.is_stale |= joined.folded().is_some();
            }
        }
    }

    /// No gain may be used from here on.
    pub(super) fn mark_weight_changed(&mut self) {
        self.version = next_version();
        self.adapters.iter_mut().for_each(|named| named.is_stale |= named.gain.is_some());
        for chosen in [&mut self.active, &mut self.disabled] {
            if let Active::Several(joined) = chosen {
                joined.is_stale |= joined.has_gain();
            }
        }
    }

    pub(super) fn renew(&mut self, at: usize) -> Result<()> {
        let Self { backend, n, k, w, bias, adapters, active, disabled, .. } = self;
        let base = Base { backend, n: *n, k: *k, w: w.view(), bias: bias.as_ref() };
        adapters[at].refresh(base)?;
        for chosen in [active, disabled] {
            match chosen {
                Active::Several(joined) if joined.is_stale => {
                    joined.refresh(base, adapters)?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Makes every sum of biases anew.
    pub(super) fn renew_biases(&mut self) -> Result<()> {
        self.renew_where(|named| named.folded.is_some())
    }

    /// Makes all that is made of W or of the bias anew.
    pub(super) fn renew_all(&mut self) -> Result<()> {
        self.renew_where(|named| named.folded.is_some() || named.gain.is_some())
    }

    fn renew_where(&mut self, concerns: impl Fn(&Named<B, T>) -> bool) -> Result<()> {
        let which: Vec<usize> = (0..self.adapters.len()).filter(|&at| concerns(&self.adapters[at])).collect();
        which.into_iter().try_for_each(|at| self.renew(at))
    }

    pub(super) fn position(&self, name: &str) -> Result<usize> {
        self.adapters.iter().position(|named| named.name == name).ok_or_else(|| {
            let names: Vec<String> = self.adapters.iter().map(|named| format!("{:?}", named.name)).collect();
            let expected = if names.is_empty() { "none: the layer has no adapter".into() } else { names.join(" or ") };
            Error::AdapterName { got: name.to_owned(), expected }
        })
    }

    pub(super) fn by_id(&self, id: u64) -> Option<&Named<B, T>> {
        self.adapters.iter().find(|named| named.id == id)
    }

    pub(super) fn active_ids(&self) -> &[u64] {
        self.active.ids()
    }

    fn is_active(&self, id: u64) -> bool {
        self.active_ids().contains(&id)
    }

    /// Of several that are active, or that `enable` would make so.
    pub(super) fn active_rank(&self) -> usize {
        let rank = |chosen: &Active<B, T>| match chosen {
            Active::Several(joined) => joined.rank,
            _ => 0,
        };
        rank(&self.active).max(rank(&self.disabled))
    }

    pub(super) fn check_unmerged(&self, operation: &'static str) -> Result<()> {
        if !self.is_merged() {
            return Ok(());
        }
        let got = format!("`{}` is merged", self.active().join("`, `"));
        Err(Error::State { operation, got, expected: "`unmerge` first" })
    }
}
