//! Bulk copies: `cp.async.bulk` and its relatives.

use super::{Decoder, Result, atomic, scalar};
use crate::isa::*;
use crate::parse::Operand;

impl Decoder<'_> {
    /// PTX ISA, "Data Movement: Asynchronous copy: cp.async.bulk, cp.reduce.async.bulk, … .tensor". The words after `bulk`.
    pub(super) fn bulk(&self, words: &[&str], reduces: bool) -> Result<Hopper> {
        match *words {
            ["commit_group"] if !reduces => {
                let [] = self.operands()?;
                return Ok(Hopper::BulkCommit);
            }
            ["wait_group", ref rest @ ..] if !reduces && matches!(*rest, [] | ["read"]) => {
                let [Operand::Literal(pending)] = self.operands()? else { return self.unsupported() };
                return Ok(Hopper::BulkWait { read: !rest.is_empty(), pending: *pending as u32 });
            }
            ["prefetch", ref rest @ ..] if !reduces => return self.bulk_prefetch(rest),
            _ => {}
        }
        let (rank, words) = match *words {
            ["tensor", dim, ref rest @ ..] => (Some(self.rank(dim)?), rest),
            _ => (None, words),
        };
        let (to, from, rest) = match *words {
            ["shared::cluster", "global", ref rest @ ..] if !reduces => (Space::SharedCluster, Space::Global, rest),
            ["shared::cta", "global", ref rest @ ..] if !reduces => (Space::Shared, Space::Global, rest),
            ["shared::cluster", "shared::cta", ref rest @ ..] if rank.is_none() => {
                (Space::SharedCluster, Space::Shared, rest)
            }
            ["global", "shared::cta", ref rest @ ..] => (Space::Global, Space::Shared, rest),
            _ => return self.unsupported(),
        };
        let mut words = rest.iter().copied().peekable();
        let by_mbarrier = to != Space::Global;
        let mut reduce = None;
        if reduces && rank.is_some() {
            reduce = words.next().and_then(bulk_reduction).map(|op| (op, None));
        }
        let mut take = |word: &str| words.next_if(|next| *next == word).is_some();
        if rank.is_some() {
            take("tile");
        }
        if !take(if by_mbarrier { "mbarrier::complete_tx::bytes" } else { "bulk_group" }) {
            return self.unsupported();
        }
        let multicast = from == Space::Global && to == Space::SharedCluster && take("multicast::cluster");
        let may_hint = from == Space::Global || to == Space::Global;
        let mut hinted = may_hint && take("L2::cache_hint");
        if reduces && rank.is_none() {
            let op = words.next().and_then(bulk_reduction);
            let noftz = words.next_if(|next| *next == "noftz").is_some();
            let typed = op.zip(words.next().and_then(scalar));
            let legal = typed.filter(|(op, ty)| reducible(*op, *ty, noftz, by_mbarrier));
            reduce = legal.map(|(op, ty)| (op, Some(ty)));
            // ptxas takes the hint in either place.
            hinted |= may_hint && !hinted && words.next_if(|next| *next == "L2::cache_hint").is_some();
        }
        if words.next().is_some() || reduces != reduce.is_some() {
            return self.unsupported();
        }
        self.bulk_operands(Shape { to, from, rank, multicast, hinted, reduce })
    }

    fn rank(&self, word: &str) -> Result<usize> {
        match word {
            "1d" => Ok(1),
            "2d" => Ok(2),
            "3d" => Ok(3),
            "4d" => Ok(4),
            "5d" => Ok(5),
            _ => self.unsupported(),
        }
    }

    /// `[tensorMap, {c0, c1, …}]`.
    fn tensor(&self, operand: &Operand, rank: usize) -> Result<(Address, Vec<Src>)> {
        let Operand::Tensor { base, offset, coords } = operand else { return self.unsupported() };
        if coords.len() != rank {
            return self.fail(format!(
                "{} coordinates for {rank} dimensions in `{}`",
                coords.len(),
                self.statement.text
            ));
        }
        let map = self.address(&Operand::Address { base: Some(base.clone()), offset: *offset })?;
        Ok((map, coords.iter().map(|coord| self.src(coord, Ty::S(32))).collect::<Result<Vec<_>>>()?))
    }

    fn bulk_operands(&self, shape: Shape) -> Result<Hopper> {
        let Shape { to, from, rank, multicast, hinted, reduce } = shape;
        let by_mbarrier = to != Space::Global;
        let mut operands = self.statement.operands.iter();
        let mut next = || operands.next().map_or_else(|| self.unsupported(), Ok);
        let (first, second) = (next()?, next()?);
        let (dst, src, coords) = match rank {
            None => (self.address(first)?, self.address(second)?, Vec::new()),
            Some(rank) if by_mbarrier => {
                let (map, coords) = self.tensor(second, rank)?;
                (self.address(first)?, map, coords)
            }
            Some(rank) => {
                let (map, coords) = self.tensor(first, rank)?;
                (map, self.address(second)?, coords)
            }
        };
        let bytes = if rank.is_none() { self.src(next()?, Ty::U(32))? } else { Src::Imm(0) };
        let mbarrier = if by_mbarrier { Some(self.address(next()?)?) } else { None };
        let multicast = if multicast { Some(self.src(next()?, Ty::U(16))?) } else { None };
        let hint = if hinted { Some(self.src(next()?, Ty::B(64))?) } else { None };
        if operands.next().is_some() {
            return self.unsupported();
        }
        Ok(Hopper::Bulk(Bulk { to, from, dst, src, coords, bytes, mbarrier, multicast, hint, reduce }))
    }

    fn bulk_prefetch(&self, words: &[&str]) -> Result<Hopper> {
        let (rank, rest) = match *words {
            ["L2", "global", ref rest @ ..] => (None, rest),
            ["tensor", dim, "L2", "global", "tile", ref rest @ ..] | ["tensor", dim, "L2", "global", ref rest @ ..] => {
                (Some(self.rank(dim)?), rest)
            }
            _ => return self.unsupported(),
        };
        let hinted = match *rest {
            [] => false,
            ["L2::cache_hint"] => true,
            _ => return self.unsupported(),
        };
        let operands = &self.statement.operands;
        if operands.len() != 1 + usize::from(rank.is_none()) + usize::from(hinted) {
            return self.unsupported();
        }
        if hinted && let Some(hint) = operands.last() {
            self.src(hint, Ty::B(64))?;
        }
        Ok(match rank {
            Some(rank) => {
                let (addr, coords) = self.tensor(&operands[0], rank)?;
                Hopper::Prefetch { what: Prefetched::Tensor, addr, coords, bytes: Src::Imm(0) }
            }
            None => {
                let (addr, bytes) = (self.address(&operands[0])?, self.src(&operands[1], Ty::U(32))?);
                Hopper::Prefetch { what: Prefetched::Bytes, addr, coords: Vec::new(), bytes }
            }
        })
    }

    /// PTX ISA, "st.async".
    pub(super) fn store_async(&self, words: &[&str]) -> Result<Hopper> {
        let words = words.strip_prefix(&["weak"]).unwrap_or(words);
        let (count, ty) = match *words {
            ["shared::cluster", "mbarrier::complete_tx::bytes", ty] => (1, ty),
            ["shared::cluster", "mbarrier::complete_tx::bytes", "v2", ty] => (2, ty),
            ["shared::cluster", "mbarrier::complete_tx::bytes", "v4", ty] => (4, ty),
            _ => return self.unsupported(),
        };
        let Some(ty) = scalar(ty).filter(|ty| {
            matches!(ty, Ty::B(32 | 64) | Ty::U(32 | 64) | Ty::S(32 | 64) | Ty::F32 | Ty::F64)
                && count * ty.bits() <= 128
        }) else {
            return self.unsupported();
        };
        let [to, value, mbarrier] = self.operands()?;
        let values = match value {
            Operand::Vector(parts) if count > 1 && parts.len() == count as usize => {
                parts.iter().map(|part| self.src(part, ty)).collect::<Result<Vec<_>>>()?
            }
            single if count == 1 => vec![self.src(single, ty)?],
            _ => return self.unsupported(),
        };
        let (to, mbarrier) = (self.address(to)?, self.address(mbarrier)?);
        Ok(Hopper::StoreAsync { to, values, ty, reduce: None, mbarrier })
    }

    /// PTX ISA, "red.async".
    pub(super) fn reduce_async(&self, words: &[&str]) -> Result<Hopper> {
        let ["relaxed", "cluster", "shared::cluster", "mbarrier::complete_tx::bytes", op, ty] = *words else {
            return self.unsupported();
        };
        let legal = bulk_reduction(op).zip(scalar(ty)).filter(|(op, ty)| reducible(*op, *ty, false, true));
        let Some((op, ty)) = legal else { return self.unsupported() };
        let [to, value, mbarrier] = self.operands()?;
        let values = vec![self.src(value, ty)?];
        let (to, mbarrier) = (self.address(to)?, self.address(mbarrier)?);
        Ok(Hopper::StoreAsync { to, values, ty, reduce: Some(op), mbarrier })
    }

    /// PTX ISA, "createpolicy". What a policy does to a cache cannot be seen here.
    pub(super) fn policy(&self, words: &[&str]) -> Result<Hopper> {
        let priority = |word: &str| {
            matches!(word, "L2::evict_last" | "L2::evict_normal" | "L2::evict_first" | "L2::evict_unchanged")
        };
        let found = self.statement.operands.len();
        let legal = match *words {
            ["fractional", primary, "b64"] => priority(primary) && matches!(found, 1 | 2),
            ["fractional", primary, secondary, "b64"] => {
                priority(primary) && priority(secondary) && matches!(found, 1 | 2)
            }
            ["range", "global", primary, secondary, "b64"] => priority(primary) && priority(secondary) && found == 4,
            ["range", primary, "b64"] => priority(primary) && found == 4,
            ["range", primary, secondary, "b64"] => {
                (primary == "global" || priority(primary)) && priority(secondary) && found == 4
            }
            ["cvt", "L2", "b64"] => found == 2,
            _ => false,
        };
        match self.statement.operands.first() {
            Some(d) if legal => Ok(Hopper::Policy { d: self.dst(d)? }),
            _ => self.unsupported(),
        }
    }
}

/// What the words of a bulk copy say.
struct Shape {
    to: Space,
    from: Space,
    rank: Option<usize>,
    multicast: bool,
    hinted: bool,
    reduce: Option<(Atomic, Option<Ty>)>,
}

fn bulk_reduction(word: &str) -> Option<Atomic> {
    atomic(word).filter(|op| !matches!(op, Atomic::Exch | Atomic::Cas))
}

/// PTX ISA, "cp.reduce.async.bulk": the types of each operation, for global and for shared memory.
pub(crate) fn reducible(op: Atomic, ty: Ty, noftz: bool, to_shared: bool) -> bool {
    let half = matches!(ty, Ty::F16 | Ty::Bf16);
    if noftz != (half && op == Atomic::Add) {
        return false;
    }
    match op {
        Atomic::Add if to_shared => matches!(ty, Ty::U(32 | 64) | Ty::S(32)),
        Atomic::Add => half || matches!(ty, Ty::U(32 | 64) | Ty::S(32) | Ty::F32 | Ty::F64),
        Atomic::Min | Atomic::Max if to_shared => matches!(ty, Ty::U(32) | Ty::S(32)),
        Atomic::Min | Atomic::Max => half || matches!(ty, Ty::U(32 | 64) | Ty::S(32 | 64)),
        Atomic::Inc | Atomic::Dec => ty == Ty::U(32),
        Atomic::And | Atomic::Or | Atomic::Xor if to_shared => ty == Ty::B(32),
        Atomic::And | Atomic::Or | Atomic::Xor => matches!(ty, Ty::B(32 | 64)),
        Atomic::Exch | Atomic::Cas => false,
    }
}
