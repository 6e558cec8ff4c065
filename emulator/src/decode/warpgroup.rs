//! `wgmma` and `setmaxnreg`.

use std::sync::Arc;

use super::{Decoder, Result};
use crate::isa::*;
use crate::parse::Operand;

impl Decoder<'_> {
    /// PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions", "Miscellaneous: setmaxnreg".
    pub(super) fn warpgroup(&self, words: &[&str]) -> Result<Option<Op>> {
        let op = match *words {
            ["wgmma", "fence", "sync", "aligned"] => {
                let [] = self.operands()?;
                Warpgroup::Fence
            }
            ["wgmma", "commit_group", "sync", "aligned"] => {
                let [] = self.operands()?;
                Warpgroup::Commit
            }
            ["wgmma", "wait_group", "sync", "aligned"] => {
                let [pending] = self.operands()?;
                Warpgroup::Wait { pending: self.literal(pending)? }
            }
            ["wgmma", "mma_async", "sync", "aligned", shape, d, a @ ("f16" | "bf16"), b] if a == b => {
                self.wgmma(shape, d, a)?
            }
            ["setmaxnreg", direction @ ("inc" | "dec"), "sync", "aligned", "u32"] => {
                let [count] = self.operands()?;
                let count = self.literal(count)?;
                if !(24..=256).contains(&count) || !count.is_multiple_of(8) {
                    return self.fail(format!("{count} registers, expected a multiple of 8 from 24 to 256"));
                }
                Warpgroup::Registers { grow: direction == "inc", count }
            }
            _ => return Ok(None),
        };
        Ok(Some(Op::Warpgroup(op)))
    }

    fn literal(&self, operand: &Operand) -> Result<u32> {
        match operand {
            Operand::Literal(value) => match u32::try_from(*value) {
                Ok(value) => Ok(value),
                Err(_) => self.fail(format!("{value} is too large in `{}`", self.statement.text)),
            },
            _ => self.unsupported(),
        }
    }

    fn wgmma(&self, shape: &str, d_type: &str, ab: &str) -> Result<Warpgroup> {
        let n =
            shape.strip_prefix("m64n").and_then(|rest| rest.strip_suffix("k16")).and_then(|n| n.parse::<u16>().ok());
        let Some(n) = n.filter(|n| (8..=256).contains(n) && n.is_multiple_of(8)) else { return self.unsupported() };
        let d_f16 = match (d_type, ab) {
            ("f32", _) => false,
            ("f16", "f16") => true,
            _ => return self.unsupported(),
        };
        let [Operand::Vector(d), a, b, scale_d, scales @ ..] = &self.statement.operands[..] else {
            return self.unsupported();
        };
        let expected = usize::from(n) / if d_f16 { 4 } else { 2 };
        if d.len() != expected {
            return self.fail(format!("{} accumulator registers of each thread, expected {expected}", d.len()));
        }
        let d = d.iter().map(|part| self.pinned(part)).collect::<Result<Vec<_>>>()?;
        let mut sorted = d.clone();
        sorted.sort_unstable();
        if sorted.windows(2).any(|pair| pair[0] == pair[1]) {
            return self.fail("a register is named twice in the accumulator".to_owned());
        }
        let (a, [scale_a, scale_b, trans_a, trans_b]) = match (a, scales) {
            (Operand::Vector(parts), [scale_a, scale_b, trans_b]) if parts.len() == 4 => {
                let parts = parts.iter().map(|part| self.pinned(part)).collect::<Result<Vec<_>>>()?;
                let parts = parts.try_into().or_else(|_| self.unsupported())?;
                (OperandA::Registers(parts), [scale_a, scale_b, &Operand::Literal(0), trans_b])
            }
            (descriptor, [scale_a, scale_b, trans_a, trans_b]) => {
                (OperandA::Descriptor(self.src(descriptor, Ty::U(64))?), [scale_a, scale_b, trans_a, trans_b])
            }
            _ => return self.unsupported(),
        };
        // The immediates exclude everything but these values.
        let choose = |operand: &Operand, what: &str, values: [i64; 2]| match operand {
            Operand::Literal(value) if values.contains(&value.cast_signed()) => Ok(value.cast_signed() == values[1]),
            _ => self.fail(format!("{what} must be {} or {}, in `{}`", values[0], values[1], self.statement.text)),
        };
        let scale_d = match scale_d {
            Operand::Literal(_) => ScaleD::Const(choose(scale_d, "scale-d", [0, 1])?),
            predicate => ScaleD::Pred(self.pred(predicate)?),
        };
        Ok(Warpgroup::Mma(Arc::new(Wgmma {
            n,
            ab: self.float(ab)?,
            d_f16,
            d,
            a,
            b: self.src(b, Ty::U(64))?,
            scale_d,
            negate_a: choose(scale_a, "imm-scale-a", [1, -1])?,
            negate_b: choose(scale_b, "imm-scale-b", [1, -1])?,
            trans_a: choose(trans_a, "imm-trans-a", [0, 1])?,
            trans_b: choose(trans_b, "imm-trans-b", [0, 1])?,
        })))
    }

    /// A register by name, 32 bits wide.
    fn pinned(&self, operand: &Operand) -> Result<u16> {
        match self.dst(operand)? {
            Some(slot) if self.register_bits(operand) == 32 => Ok(slot),
            _ => self.fail(format!("expected registers of 32 bits in `{}`", self.statement.text)),
        }
    }
}
