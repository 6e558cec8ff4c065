//! Integers, bits, predicates, moves, comparison.

use super::{Decoder, Result, bits, compare, int, logic, scalar};
use crate::isa::*;
use crate::parse::Operand;

impl Decoder<'_> {
    /// PTX ISA, "Integer Arithmetic", "Logic and Shift", "Data Movement: mov", "Comparison and Selection".
    pub(super) fn arithmetic(&self, words: &[&str]) -> Result<Option<Op>> {
        match *words {
            ["add", ty] if int(ty).is_some() => self.binary(Binary::Add, self.int(ty)?),
            ["sub", ty] if int(ty).is_some() => self.binary(Binary::Sub, self.int(ty)?),
            ["mul", "lo", ty] => self.binary(Binary::MulLo, self.int(ty)?),
            ["mul", "hi", ty] => self.binary(Binary::MulHi, self.int(ty)?),
            ["mul", "wide", ty @ ("u16" | "s16" | "u32" | "s32")] => self.binary(Binary::MulWide, self.int(ty)?),
            ["mad", "lo", ty] => self.ternary(Ternary::MadLo, self.int(ty)?),
            ["mad", "hi", ty] => self.ternary(Ternary::MadHi, self.int(ty)?),
            ["mad", "wide", ty @ ("u16" | "s16" | "u32" | "s32")] => self.ternary(Ternary::MadWide, self.int(ty)?),
            ["div", ty] => self.binary(Binary::Div, self.int(ty)?),
            ["rem", ty] => self.binary(Binary::Rem, self.int(ty)?),
            ["min", ty] if int(ty).is_some() => self.binary(Binary::Min, self.int(ty)?),
            ["max", ty] if int(ty).is_some() => self.binary(Binary::Max, self.int(ty)?),
            ["abs", ty @ ("s16" | "s32" | "s64")] => self.unary(Unary::Abs, self.int(ty)?),
            ["neg", ty @ ("s16" | "s32" | "s64")] => self.unary(Unary::Neg, self.int(ty)?),
            ["popc", ty @ ("b32" | "b64")] => self.unary(Unary::Popc, self.bits(ty)?),
            ["clz", ty @ ("b32" | "b64")] => self.unary(Unary::Clz, self.bits(ty)?),
            ["brev", ty @ ("b32" | "b64")] => self.unary(Unary::Brev, self.bits(ty)?),
            ["bfind", ty @ ("u32" | "u64")] => self.unary(Unary::Bfind, self.int(ty)?),
            ["bfe", ty @ ("u32" | "u64" | "s32" | "s64")] => {
                let [d, a, b, c] = self.operands()?;
                let ty = self.int(ty)?;
                let (b, c) = (self.src(b, Ty::U(32))?, self.src(c, Ty::U(32))?);
                Ok(Some(Op::Ternary { op: Ternary::Bfe, ty, d: self.dst(d)?, a: self.src(a, ty)?, b, c }))
            }
            ["bfi", ty @ ("b32" | "b64")] => {
                let [d, a, b, pos, len] = self.operands()?;
                let ty = self.bits(ty)?;
                let (pos, len) = (self.src(pos, Ty::U(32))?, self.src(len, Ty::U(32))?);
                Ok(Some(Op::Bfi { ty, d: self.dst(d)?, a: self.src(a, ty)?, b: self.src(b, ty)?, pos, len }))
            }
            ["prmt", "b32"] => self.ternary(Ternary::Prmt, Ty::B(32)),
            ["lop3", "b32"] => {
                let [d, a, b, c, table] = self.operands()?;
                let Operand::Literal(table) = table else { return self.unsupported() };
                let source = |operand| self.src(operand, Ty::B(32));
                let (a, b, c) = (source(a)?, source(b)?, source(c)?);
                Ok(Some(Op::Ternary { op: Ternary::Lop3(*table as u8), ty: Ty::B(32), d: self.dst(d)?, a, b, c }))
            }
            ["shf", direction @ ("l" | "r"), mode @ ("wrap" | "clamp"), "b32"] => {
                let wrap = mode == "wrap";
                let op = if direction == "l" { Ternary::ShfL { wrap } } else { Ternary::ShfR { wrap } };
                self.ternary(op, Ty::B(32))
            }
            ["and" | "or" | "xor" | "not", "pred"] => self.predicate_logic(words[0]),
            ["and", ty] => self.binary(Binary::And, self.bits(ty)?),
            ["or", ty] => self.binary(Binary::Or, self.bits(ty)?),
            ["xor", ty] => self.binary(Binary::Xor, self.bits(ty)?),
            ["not", ty] => self.unary(Unary::Not, self.bits(ty)?),
            ["cnot", ty] => self.unary(Unary::Cnot, self.bits(ty)?),
            ["shl", ty] => self.binary(Binary::Shl, self.bits(ty)?),
            ["shr", ty] => match int(ty).or_else(|| bits(ty)) {
                Some(ty) => self.binary(Binary::Shr, ty),
                None => self.unsupported(),
            },
            ["mov", ty] => self.mov(ty),
            ["setp", cmp, ty] => self.setp(cmp, None, ty),
            ["setp", cmp, combine, ty] if logic(combine).is_some() => self.setp(cmp, logic(combine), ty),
            ["selp", ty] if scalar(ty).is_some_and(|ty| ty.bits() >= 16) => {
                let [d, a, b, p] = self.operands()?;
                let Some(ty) = scalar(ty) else { return self.unsupported() };
                Ok(Some(Op::Selp { d: self.dst(d)?, a: self.src(a, ty)?, b: self.src(b, ty)?, p: self.pred(p)? }))
            }
            _ => Ok(None),
        }
    }

    fn predicate_logic(&self, word: &str) -> Result<Option<Op>> {
        Ok(Some(match logic(word) {
            Some(op) => {
                let [p, a, b] = self.operands()?;
                Op::PredLogic { op, p: self.pred(p)?.slot, a: self.pred(a)?, b: self.pred(b)? }
            }
            None => {
                let [p, a] = self.operands()?;
                let a = self.pred(a)?;
                Op::PredMov { p: self.pred(p)?.slot, a: Pred { negated: !a.negated, ..a } }
            }
        }))
    }

    fn mov(&self, ty: &str) -> Result<Option<Op>> {
        let [d, a] = self.operands()?;
        if ty == "pred" {
            let p = self.pred(d)?.slot;
            return Ok(Some(match a {
                Operand::Literal(value) => Op::PredConst { p, value: *value != 0 },
                _ => Op::PredMov { p, a: self.pred(a)? },
            }));
        }
        let Some(ty) = scalar(ty).filter(|ty| ty.bits() >= 16) else { return self.unsupported() };
        match (d, a) {
            (Operand::Vector(parts), a) => {
                let parts = parts.iter().map(|part| self.dst(part)).collect::<Result<Vec<_>>>()?;
                let Some(part) = self.part(ty, parts.len()) else { return self.unsupported() };
                Ok(Some(Op::Unpack { part, parts, a: self.src(a, ty)? }))
            }
            (d, Operand::Vector(parts)) => {
                let Some(part) = self.part(ty, parts.len()) else { return self.unsupported() };
                let parts = parts.iter().map(|p| self.src(p, Ty::B(part))).collect::<Result<Vec<_>>>()?;
                Ok(Some(Op::Pack { part, d: self.dst(d)?, parts }))
            }
            _ => self.unary(Unary::Mov, ty),
        }
    }

    fn part(&self, ty: Ty, count: usize) -> Option<u8> {
        let part = ty.bits() as usize / count.max(1);
        (matches!(count, 2 | 4) && part * count == ty.bits() as usize && part >= 8).then_some(part as u8)
    }

    fn setp(&self, cmp: &str, combine: Option<Logic>, ty: &str) -> Result<Option<Op>> {
        let (Some(cmp), Some(ty)) = (compare(cmp, ty), scalar(ty).filter(|ty| ty.bits() >= 16)) else {
            return self.unsupported();
        };
        let operands = &self.statement.operands;
        if operands.len() != 3 + usize::from(combine.is_some()) {
            return self.unsupported();
        }
        let (p, q) = match &operands[0] {
            Operand::Pair(p, q) => (self.predicate(p)?, Some(self.predicate(q)?)),
            other => (self.pred(other)?.slot, None),
        };
        let combine = match combine {
            Some(logic) => Some((logic, self.pred(&operands[3])?)),
            None => None,
        };
        Ok(Some(Op::Setp { cmp, ty, p, q, a: self.src(&operands[1], ty)?, b: self.src(&operands[2], ty)?, combine }))
    }
}
