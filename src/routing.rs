//! Which adapter each row of a batch goes through: the table that a launch reads, and how it is made.

use crate::error::{Error, Result};
use crate::params::{LORA_ROUTE_RANKS, LORA_ROUTE_ROWS};

/// Largest number of ranks, over all adapters, of a batch with routes.
pub const MAX_ROUTED_RANK: usize = LORA_ROUTE_RANKS as usize * 64;

/// An adapter among others whose A lie below each other and whose B lie side by side.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slot {
    /// First of its rows of a and of its columns of b.
    pub first_rank: usize,
    /// Its rank.
    pub ranks: usize,
    /// Its α/r or α/√r, by which [`scale`](crate::Forward::scale) is multiplied.
    pub scale: f32,
}

/// The table of routes of one batch, as a launch reads it from memory: layers whose adapters have the
/// same slots can share it, and both directions do.
///
/// ```
/// use fused_lora::{Routing, Slot};
///
/// let slots = [Slot { first_rank: 0, ranks: 16, scale: 2.0 }, Slot { first_rank: 16, ranks: 8, scale: 1.0 }];
/// let routing = Routing::new(&slots, &[Some(1), Some(1), None, Some(0)])?; // four rows of x
/// assert_eq!(routing.words().len(), Routing::words_for(4));
/// # Ok::<(), fused_lora::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Routing {
    words: Vec<u64>,
    slots: Vec<Slot>,
    rows: usize,
    ranks: usize,
}

/// What of h and dh one row keeps: ranks `begin` up to `end`, times `scale`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Route {
    pub begin: usize,
    pub end: usize,
    pub scale: f32,
}

impl Route {
    const BITS: u32 = 16;

    /// Scale in the lower half, then begin and end.
    fn to_word(self) -> u64 {
        u64::from(self.scale.to_bits()) | (self.begin as u64) << 32 | (self.end as u64) << (32 + Self::BITS)
    }

    pub(crate) fn from_word(word: u64) -> Route {
        let rank = |shift: u32| (word >> shift) as usize & ((1 << Self::BITS) - 1);
        Route { begin: rank(32), end: rank(32 + Self::BITS), scale: f32::from_bits(word as u32) }
    }
}

impl Routing {
    /// Routes row i through adapter `ids[i]`, or through none.
    ///
    /// # Errors
    /// [`Error::Route`] for an id that `slots` does not have; [`Error::TooLarge`] for a slot that ends past
    /// [`MAX_ROUTED_RANK`]; [`Error::Scale`]; [`Error::ZeroDimension`] without rows; [`Error::OutOfMemory`].
    pub fn new(slots: &[Slot], ids: &[Option<usize>]) -> Result<Routing> {
        if ids.is_empty() {
            return Err(Error::ZeroDimension { arg: "ids", axis: "elements" });
        }
        let mut routes = Vec::with_capacity(slots.len());
        for slot in slots {
            let end = slot.first_rank.saturating_add(slot.ranks);
            if end > MAX_ROUTED_RANK {
                let (what, limit) = ("the end of a slot, in ranks", MAX_ROUTED_RANK as u64);
                return Err(Error::TooLarge { what, got: end as u64, limit });
            }
            if !slot.scale.is_finite() {
                return Err(Error::Scale { arg: "scale", got: slot.scale });
            }
            routes.push(Route { begin: slot.first_rank, end, scale: slot.scale });
        }
        let len = Self::words_for(ids.len());
        let mut words = Vec::new();
        words.try_reserve_exact(len).map_err(|_| Error::OutOfMemory { bytes: len.saturating_mul(8) })?;
        words.resize(len, 0);
        let (rows, masks) = words.split_at_mut(ids.len());
        let mut ranks = 0;
        for (at, (&id, row)) in ids.iter().zip(rows).enumerate() {
            let Some(id) = id else { continue };
            let Some(route) = routes.get(id).copied() else {
                return Err(Error::Route { row: at, got: id, adapters: slots.len() });
            };
            *row = route.to_word();
            ranks = ranks.max(route.end);
            // Bit i of a block of rows: some row of it keeps some of the ranks from 64 i on.
            let blocks = route.begin / 64..route.end.div_ceil(64);
            if let Some(mask) = masks.get_mut(at / LORA_ROUTE_ROWS as usize).filter(|_| route.begin < route.end) {
                blocks.for_each(|block| *mask |= 1 << block);
            }
        }
        Ok(Routing { words, slots: slots.to_vec(), rows: ids.len(), ranks })
    }

    /// Words of the table of `rows` rows: one per row, and one for each 64 of them.
    pub fn words_for(rows: usize) -> usize {
        rows.saturating_add(rows.div_ceil(LORA_ROUTE_ROWS as usize))
    }

    /// The table: what [`Variant::routes`](crate::Variant::routes) points to, as a matrix of one row.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// The adapters that the rows were routed among.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Rows of the batch.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// One past the last rank that any row goes through: the least R that the table fits.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// The order that brings rows of one adapter together, the first adapter first and those without one last, each in the order
    /// in which they were: `order[i]` is the row that becomes row i. Routes need no order; long runs of one adapter are
    /// faster, because a block of rows then reads the factors of one.
    pub fn grouped(ids: &[Option<usize>]) -> Vec<usize> {
        let mut order: Vec<usize> = (0..ids.len()).collect();
        order.sort_by_key(|&row| ids.get(row).copied().flatten().unwrap_or(usize::MAX));
        order
    }
}

/// Every adapter starts at a multiple of so many ranks: of what tensor cores sum at once, so that its sums are those of the adapter
/// alone, and of what the Hopper kernels ask for.
const ALIGN: usize = 16;

/// Slots for adapters of these ranks and scales, one after the other, and the ranks of all with the gaps between them.
pub(crate) fn side_by_side(adapters: impl IntoIterator<Item = (usize, f32)>) -> Result<(Vec<Slot>, usize)> {
    let (mut slots, mut rank) = (Vec::new(), 0usize);
    for (ranks, scale) in adapters {
        slots.push(Slot { first_rank: rank, ranks, scale });
        rank = ranks.checked_next_multiple_of(ALIGN).map_or(usize::MAX, |ranks| ranks.saturating_add(rank));
        if rank > MAX_ROUTED_RANK {
            let (what, limit) = ("the rank of a bank of adapters", MAX_ROUTED_RANK as u64);
            return Err(Error::TooLarge { what, got: rank as u64, limit });
        }
    }
    Ok((slots, rank))
}

/// What each row can have or not: a bias on B would be added to every row, and with DoRA each row would have a gain of its own.
pub(crate) fn check_routable(operation: &'static str, name: &str, has_b_bias: bool, has_magnitude: bool) -> Result<()> {
    let (has, expected) = match (has_b_bias, has_magnitude) {
        (true, _) => ("a bias on B", "adapters without one: forward adds the same bias to every row"),
        (_, true) => ("a magnitude (DoRA)", "adapters without one: each row would have a gain of its own"),
        _ => return Ok(()),
    };
    Err(Error::State { operation, got: format!("adapter `{name}` has {has}"), expected })
}

/// Routes must have been made among the slots of the bank that they are used with; `name` is that of each of its adapters.
pub(crate) fn same_slots<'a>(
    operation: &'static str,
    name: impl Fn(usize) -> &'a str,
    routed: &[Slot],
    bank: &[Slot],
) -> Result<()> {
    let got = match routed.iter().zip(bank).position(|(theirs, ours)| theirs != ours) {
        Some(at) => format!("the routes were made for another rank or scale of adapter `{}` than the bank's", name(at)),
        None if routed.len() == bank.len() => return Ok(()),
        None => format!("the routes were made for {} adapters, the bank has {}", routed.len(), bank.len()),
    };
    Err(Error::State { operation, got, expected: "routes of the bank's `slots`" })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOTS: [Slot; 3] = [
        Slot { first_rank: 0, ranks: 16, scale: 2.0 },
        Slot { first_rank: 16, ranks: 100, scale: -0.5 },
        Slot { first_rank: 4090, ranks: 6, scale: 1.0 },
    ];

    #[test]
    fn a_table_says_what_each_row_and_each_block_keeps() {
        let ids: Vec<Option<usize>> = (0..130).map(|row| [None, Some(1), None][row / 50]).collect();
        let routing = Routing::new(&SLOTS, &ids).expect("a table");
        assert_eq!((routing.words().len(), routing.rows(), routing.ranks()), (133, 130, 116));
        let route = |row: usize| Route::from_word(routing.words()[row]);
        assert_eq!(route(49), Route { begin: 0, end: 0, scale: 0.0 });
        assert_eq!(route(50), Route { begin: 16, end: 116, scale: -0.5 });
        assert_eq!(routing.words()[130..], [0b11, 0b11, 0]);
        let last = Routing::new(&SLOTS, &[Some(2)]).expect("a table");
        assert_eq!((last.ranks(), last.words()[1]), (4096, 1 << 63));
    }

    #[test]
    fn bad_routes_are_named() {
        let wide = Slot { first_rank: 4000, ranks: 97, scale: 1.0 };
        let limit = MAX_ROUTED_RANK as u64;
        let what = "the end of a slot, in ranks";
        assert_eq!(Routing::new(&[wide], &[None]), Err(Error::TooLarge { what, got: 4097, limit }));
        let endless = Slot { first_rank: usize::MAX, ranks: 2, scale: 1.0 };
        assert!(matches!(Routing::new(&[endless], &[None]), Err(Error::TooLarge { got: u64::MAX, .. })));
        assert_eq!(Routing::new(&SLOTS, &[None, Some(3)]), Err(Error::Route { row: 1, got: 3, adapters: 3 }));
        let infinite = Slot { scale: f32::INFINITY, ..SLOTS[0] };
        assert_eq!(Routing::new(&[infinite], &[None]), Err(Error::Scale { arg: "scale", got: f32::INFINITY }));
        assert!(matches!(Routing::new(&SLOTS, &[]), Err(Error::ZeroDimension { .. })));
    }

    #[test]
    fn grouping_is_stable() {
        let ids = [Some(1), None, Some(0), Some(1), None, Some(0)];
        assert_eq!(Routing::grouped(&ids), [2, 5, 0, 3, 1, 4]);
    }
}
