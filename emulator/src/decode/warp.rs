//! Matrices in registers, elections, matches and reductions of a warp; barriers; caches.

use super::{Decoder, Result};
use crate::isa::*;
use crate::parse::Operand;

impl Decoder<'_> {
    /// PTX ISA, "stmatrix", "movmatrix", "elect.sync", "match.sync", "redux.sync", "mma".
    pub(super) fn warp(&self, words: &[&str]) -> Result<Option<Op>> {
        let op = match *words {
            ["stmatrix", "sync", "aligned", ref form @ ..] => {
                let (count, trans, space) = self.matrix_form(form)?;
                let [addr, a] = self.operands()?;
                let a = self.list(a, count, Ty::B(32))?;
                WarpOp::Stmatrix { trans, space, addr: self.address(addr)?, a }
            }
            ["movmatrix", "sync", "aligned", "m8n8", "trans", "b16"] => {
                let [d, a] = self.operands()?;
                WarpOp::Movmatrix { d: self.dst(d)?, a: self.src(a, Ty::B(32))? }
            }
            ["elect", "sync"] => {
                let [Operand::Pair(d, p), mask] = self.operands()? else { return self.unsupported() };
                let d = self.dst(&Operand::Name(d.clone()))?;
                WarpOp::Elect { d, p: self.predicate(p)?, mask: self.src(mask, Ty::U(32))? }
            }
            ["match", mode @ ("any" | "all"), "sync", ty @ ("b32" | "b64")] => {
                let [d, a, mask] = self.operands()?;
                let all = mode == "all";
                let (d, p) = match d {
                    Operand::Pair(d, p) if all => (self.dst(&Operand::Name(d.clone()))?, Some(self.predicate(p)?)),
                    other => (self.dst(other)?, None),
                };
                WarpOp::Match { all, d, p, a: self.src(a, self.bits(ty)?)?, mask: self.src(mask, Ty::U(32))? }
            }
            ["redux", "sync", op, ty] => {
                let op = match (op, ty) {
                    ("add", "u32" | "s32") => Redux::Add,
                    ("min", "u32" | "s32") => Redux::Min,
                    ("max", "u32" | "s32") => Redux::Max,
                    ("and", "b32") => Redux::And,
                    ("or", "b32") => Redux::Or,
                    ("xor", "b32") => Redux::Xor,
                    _ => return self.unsupported(),
                };
                let ty = if ty == "s32" { Ty::S(32) } else { Ty::U(32) };
                let [d, a, mask] = self.operands()?;
                WarpOp::Redux { op, ty, d: self.dst(d)?, a: self.src(a, ty)?, mask: self.src(mask, Ty::U(32))? }
            }
            ["mma", "sync", "aligned", shape, "row", "col", "f16", "f16", "f16", "f16"] => {
                let k = match shape {
                    "m16n8k16" => 16,
                    "m16n8k8" => 8,
                    _ => return self.unsupported(),
                };
                let [d, a, b, c] = self.operands()?;
                let Operand::Vector(parts) = d else { return self.unsupported() };
                let d = parts.iter().map(|part| self.dst(part)).collect::<Result<Vec<_>>>()?;
                let c = self.list(c, 2, Ty::F16x2)?;
                let (Ok(d), Ok(c)) = (<[Dst; 2]>::try_from(d), <[Src; 2]>::try_from(c)) else {
                    return self.unsupported();
                };
                let pairs = usize::from(k) / 4;
                WarpOp::MmaF16 { k, d, a: self.list(a, pairs, Ty::B(32))?, b: self.list(b, pairs / 2, Ty::B(32))?, c }
            }
            _ => return self.cache(words),
        };
        Ok(Some(Op::Warp(op)))
    }

    fn list(&self, operand: &Operand, count: usize, ty: Ty) -> Result<Vec<Src>> {
        match operand {
            Operand::Vector(parts) if parts.len() == count => parts.iter().map(|part| self.src(part, ty)).collect(),
            _ => self.unsupported(),
        }
    }

    /// `.m8n8.x1|.x2|.x4[.trans][.shared].b16` of `ldmatrix` and `stmatrix`; without a space the address is generic. ptxas takes
    /// shape, number and `.trans` in any order, and CUTLASS has the number first.
    pub(super) fn matrix_form(&self, words: &[&str]) -> Result<(usize, bool, Space)> {
        let (form, space) = match words {
            [form @ .., "shared" | "shared::cta", "b16"] => (form, Space::Shared),
            [form @ .., "b16"] => (form, Space::Generic),
            _ => return self.unsupported(),
        };
        let has = |word: &str| form.contains(&word);
        let counts: Vec<usize> = [1, 2, 4].into_iter().filter(|count| has(&format!("x{count}"))).collect();
        let trans = has("trans");
        match counts[..] {
            [count] if has("m8n8") && form.len() == 2 + usize::from(trans) => Ok((count, trans, space)),
            _ => self.unsupported(),
        }
    }

    /// PTX ISA, "prefetch, prefetchu", "applypriority", "discard", "griddepcontrol".
    fn cache(&self, words: &[&str]) -> Result<Option<Op>> {
        let line = || -> Result<Address> {
            let [addr, Operand::Literal(128)] = self.operands()? else { return self.unsupported() };
            self.address(addr)
        };
        let cache = match *words {
            ["prefetch", "global" | "local", "L1" | "L2"]
            | ["prefetch", "L1" | "L2"]
            | ["prefetch", "global", "L2::evict_last" | "L2::evict_normal"]
            | ["prefetchu", "L1"] => {
                let [addr] = self.operands()?;
                self.address(addr)?;
                Cache::Prefetch
            }
            ["applypriority", "global", "L2::evict_normal"] | ["applypriority", "L2::evict_normal"] => {
                Cache::Priority { addr: line()? }
            }
            ["discard", "global", "L2"] | ["discard", "L2"] => Cache::Discard { addr: line()? },
            // Grids that depend on one another are not modelled: a launch begins when the one before has ended.
            ["griddepcontrol", "launch_dependents" | "wait"] => {
                let [] = self.operands()?;
                Cache::Prefetch
            }
            _ => return Ok(None),
        };
        Ok(Some(Op::Cache(cache)))
    }

    /// PTX ISA, "bar, barrier": `bar` is `barrier.aligned`.
    pub(super) fn barrier(&self, words: &[&str]) -> Result<Option<Op>> {
        let (name, rest) = (words[0], &words[1..]);
        let rest = rest.strip_prefix(&["cta"]).unwrap_or(rest);
        let (aligned, rest) = match (name, rest) {
            ("bar", rest) => (true, rest),
            (_, [rest @ .., "aligned"]) => (true, rest),
            // `barrier.red.op.aligned.type`
            (_, ["red", op, "aligned", ty]) => (true, &["red", *op, *ty][..]),
            (_, rest) => (false, rest),
        };
        let operands = &self.statement.operands;
        let source = |at: usize| operands.get(at).map(|operand| self.src(operand, Ty::U(32))).transpose();
        let bar = match *rest {
            ["sync"] | ["arrive"] => {
                let arrive = rest[0] == "arrive";
                let (Some(id), count) = (source(0)?, source(1)?) else { return self.unsupported() };
                if operands.len() > 2 || (arrive && count.is_none()) {
                    return self.unsupported();
                }
                Bar { id, count, arrive, aligned, reduce: None }
            }
            ["red", op, ty] => {
                let (Some(d), Some(c), 3 | 4) = (operands.first(), operands.last(), operands.len()) else {
                    return self.unsupported();
                };
                let reduce = match (op, ty) {
                    ("popc", "u32") => Reduce::Popc(self.dst(d)?),
                    ("and", "pred") => Reduce::And(self.pred(d)?.slot),
                    ("or", "pred") => Reduce::Or(self.pred(d)?.slot),
                    _ => return self.unsupported(),
                };
                let count = if operands.len() == 4 { source(2)? } else { None };
                let Some(id) = source(1)? else { return self.unsupported() };
                Bar { id, count, arrive: false, aligned, reduce: Some((reduce, self.pred(c)?)) }
            }
            _ => return self.unsupported(),
        };
        Ok(Some(Op::Bar(bar)))
    }
}
