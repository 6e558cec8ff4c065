//! Control flow, barriers, shuffles, votes, mma.

use super::{Decoder, Result};
use crate::isa::*;
use crate::parse::Operand;

impl Decoder<'_> {
    /// PTX ISA, "Control Flow", "Parallel Synchronization", "Warp Level Matrix Instructions".
    pub(super) fn control(&self, words: &[&str]) -> Result<Option<Op>> {
        Ok(Some(match *words {
            ["bra"] | ["bra", "uni"] => {
                let [target] = self.operands()?;
                let Operand::Name(target) = target else { return self.unsupported() };
                Op::Bra { target: self.label(target)? }
            }
            ["ret"] | ["exit"] | ["ret", "uni"] => Op::Exit,
            // Without a debugger a breakpoint is an error.
            ["trap" | "brkpt"] => Op::Trap,
            ["nanosleep", "u32"] => {
                let [time] = self.operands()?;
                self.src(time, Ty::U(32))?;
                Op::Nanosleep
            }
            ["bar", "warp", "sync"] => {
                let [mask] = self.operands()?;
                Op::WarpSync { mask: self.src(mask, Ty::U(32))? }
            }
            ["bar" | "barrier", scope, ..] if scope != "cluster" => return self.barrier(words),
            ["shfl", "sync", mode, "b32"] => {
                let mode = match mode {
                    "idx" => Shuffle::Idx,
                    "up" => Shuffle::Up,
                    "down" => Shuffle::Down,
                    "bfly" => Shuffle::Bfly,
                    _ => return self.unsupported(),
                };
                let [d, a, b, c, mask] = self.operands()?;
                let (d, p) = match d {
                    Operand::Pair(d, p) => (self.dst(&Operand::Name(d.clone()))?, Some(self.predicate(p)?)),
                    other => (self.dst(other)?, None),
                };
                let source = |operand| self.src(operand, Ty::U(32));
                Op::Shfl { mode, d, p, a: source(a)?, b: source(b)?, c: source(c)?, mask: source(mask)? }
            }
            ["vote", "sync", mode, ty] => {
                let mode = match (mode, ty) {
                    ("all", "pred") => Vote::All,
                    ("any", "pred") => Vote::Any,
                    ("uni", "pred") => Vote::Uni,
                    ("ballot", "b32") => Vote::Ballot,
                    _ => return self.unsupported(),
                };
                let [d, a, mask] = self.operands()?;
                let (a, mask) = (self.pred(a)?, self.src(mask, Ty::U(32))?);
                if mode == Vote::Ballot {
                    Op::VoteSync { mode, d: self.dst(d)?, p: None, a, mask }
                } else {
                    Op::VoteSync { mode, d: None, p: Some(self.pred(d)?.slot), a, mask }
                }
            }
            ["activemask", "b32"] => {
                let [d] = self.operands()?;
                Op::ActiveMask { d: self.dst(d)? }
            }
            ["mma", "sync", "aligned", shape, "row", "col", "f32", a @ ("f16" | "bf16"), b, "f32"] if a == b => {
                let k = match shape {
                    "m16n8k16" => 16,
                    "m16n8k8" => 8,
                    _ => return self.unsupported(),
                };
                let ab = self.float(a)?;
                let [d, a, b, c] = self.operands()?;
                let list = |operand: &Operand, count: usize, ty| match operand {
                    Operand::Vector(parts) if parts.len() == count => {
                        parts.iter().map(|part| self.src(part, ty)).collect::<Result<Vec<_>>>()
                    }
                    _ => self.unsupported(),
                };
                let Operand::Vector(parts) = d else { return self.unsupported() };
                let d = parts.iter().map(|part| self.dst(part)).collect::<Result<Vec<_>>>()?;
                let c = list(c, 4, Ty::F32)?;
                let (Ok(d), Ok(c)) = (<[Dst; 4]>::try_from(d), <[Src; 4]>::try_from(c)) else {
                    return self.unsupported();
                };
                let pairs = usize::from(k) / 4;
                Op::Mma { k, ab, d, a: list(a, pairs, Ty::B(32))?, b: list(b, pairs / 2, Ty::B(32))?, c }
            }
            _ => return Ok(None),
        }))
    }
}
