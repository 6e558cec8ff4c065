//! Calls, returns, carries and the other instructions of `isa::math` that are more than a value for one register.

use super::access::lanes_of;
use super::warp::Flow;
use super::{Context, Cta, Fault, Outcome};
use crate::alu::{self, Lanes};
use crate::decode::LOCAL_BASE;
use crate::isa::{Carry, Logic, Moved, Op, Test, Ty};
use crate::module::MOST_LEVELS;
use crate::report::Rule;

/// Registers that a recursive call saves: of one lane, all of the kernel.
#[derive(Debug)]
pub(super) struct Saved {
    registers: Vec<u64>,
    predicates: Vec<bool>,
}

impl Cta {
    pub(super) fn control(&mut self, context: &mut Context<'_>, warp: usize, at: (u32, u32), op: &Op) -> Outcome<Flow> {
        let (pc, mask) = at;
        match op {
            Op::Test { .. } => self.test(context, warp, mask, op),
            Op::Set { .. } => self.set(context, warp, mask, op),
            Op::Carry { .. } => self.carry(context, warp, mask, op),
            Op::Hint { .. } => {}
            Op::Call { target, link, copies } => {
                self.enter(context, warp, mask, copies)?;
                self.warps[warp].put(Some(*link), mask, &[u64::from(pc) + 1; 32]);
                return Ok(Flow::Branch(*target));
            }
            Op::Return { link } => {
                let to = self.warps[warp].registers[*link as usize].map(|to| to as u32);
                self.leave(context, warp, mask);
                return Ok(Flow::Scatter(to));
            }
            Op::CopyResults { copies } => {
                let deeper = u32::from(context.kernel.recursive);
                for lane in lanes_of(mask) {
                    self.copy_params(context, warp, lane, copies, (deeper, 0))?;
                }
            }
            Op::BraIndexed { index, targets } => {
                let index = self.warps[warp].read(context, self, *index);
                let mut to = [0; 32];
                for lane in lanes_of(mask) {
                    let at = index[lane as usize] as u32;
                    // PTX ISA, "brx.idx": behaviour is undefined when the index is out of range.
                    let Some(target) = targets.get(at as usize) else {
                        let message = format!("index {at}, and {} targets", targets.len());
                        return Err(Fault::new(Rule::Trap, message).lane(lane));
                    };
                    to[lane as usize] = *target;
                }
                return Ok(Flow::Scatter(to));
            }
            Op::AssertFail { args } => return Err(self.assertion(context, warp, mask.trailing_zeros(), args)),
            _ => return Err(Fault::new(Rule::Trap, format!("{op:?} is not implemented"))),
        }
        Ok(Flow::Next)
    }

    /// Arguments go to the callee's frame; of a recursive kernel that is the next level's.
    fn enter(&mut self, context: &Context<'_>, warp: usize, mask: u32, copies: &[Moved]) -> Outcome<()> {
        let recursive = context.kernel.recursive;
        for lane in lanes_of(mask) {
            let state = &mut self.warps[warp];
            if recursive && state.saved[lane as usize].len() as u32 >= MOST_LEVELS {
                let message = format!("calls nested deeper than {MOST_LEVELS}");
                return Err(Fault::new(Rule::Trap, message).lane(lane));
            }
            self.copy_params(context, warp, lane, copies, (0, u32::from(recursive)))?;
            if recursive {
                self.warps[warp].save(lane);
            }
        }
        Ok(())
    }

    fn leave(&mut self, context: &Context<'_>, warp: usize, mask: u32) {
        if context.kernel.recursive {
            lanes_of(mask).for_each(|lane| self.warps[warp].restore(lane));
        }
    }

    /// From the frame `levels.0` below the current one to that `levels.1` below.
    fn copy_params(
        &mut self,
        context: &Context<'_>,
        warp: usize,
        lane: u32,
        copies: &[Moved],
        levels: (u32, u32),
    ) -> Outcome<()> {
        let stride = context.kernel.local_end - LOCAL_BASE;
        let level = self.warps[warp].saved[lane as usize].len() as u32;
        let at = |deeper: u32, offset: u32| u64::from(offset) + u64::from((level + deeper) * stride);
        for Moved { from, to, bytes } in copies {
            let bytes = *bytes as usize;
            let data = self.local(context, warp, lane, at(levels.0, *from), bytes)?.to_vec();
            self.local(context, warp, lane, at(levels.1, *to), bytes)?.copy_from_slice(&data);
        }
        Ok(())
    }

    fn test(&mut self, context: &Context<'_>, warp: usize, mask: u32, op: &Op) {
        let Op::Test { test, p, q, a, combine } = op else { return };
        let (first, second) = self.truths(context, warp, *test, a, *combine);
        let state = &mut self.warps[warp];
        state.put_predicate(*p, mask, first);
        if let Some(q) = q {
            state.put_predicate(*q, mask, second);
        }
    }

    /// The two results of a test: of the lower and the upper half, or of the comparison and its contrary.
    fn truths(
        &self,
        context: &Context<'_>,
        warp: usize,
        test: Test,
        a: &[crate::isa::Src; 2],
        combine: Option<(Logic, crate::isa::Pred)>,
    ) -> (u32, u32) {
        let state = &self.warps[warp];
        let [a, b] = [a[0], a[1]].map(|source| state.read(context, self, source));
        let (first, second) = alu::test_math(test, &a, &b);
        let combined = |value: u32| match combine {
            Some((Logic::And, c)) => value & state.predicate(c),
            Some((Logic::Or, c)) => value | state.predicate(c),
            Some((Logic::Xor, c)) => value ^ state.predicate(c),
            None => value,
        };
        (combined(first), combined(second))
    }

    fn set(&mut self, context: &Context<'_>, warp: usize, mask: u32, op: &Op) {
        let Op::Set { test, to, d, a, combine } = op else { return };
        let (first, second) = self.truths(context, warp, *test, a, *combine);
        let bit = |mask: u32, lane: usize| mask >> lane & 1 == 1;
        let Test::Compare { ty, .. } = *test else { return };
        let two = matches!(ty, Ty::F16x2 | Ty::Bf16x2);
        // Each half has 16 bits of its own: all ones for an integer, 1.0 for a float.
        let half = match to {
            Ty::F16x2 => alu::truth(Ty::F16),
            Ty::Bf16x2 => alu::truth(Ty::Bf16),
            _ => 0xffff,
        };
        let value: Lanes = std::array::from_fn(|lane| match (two, bit(first, lane), bit(second, lane)) {
            (true, low, high) => (if low { half } else { 0 }) | (if high { half << 16 } else { 0 }),
            (false, true, _) => alu::truth(*to),
            (false, false, _) => 0,
        });
        self.warps[warp].put(*d, mask, &value);
    }

    /// PTX ISA, "Extended-Precision Integer Arithmetic Instructions": subtraction leaves the borrow in the flag.
    fn carry(&mut self, context: &Context<'_>, warp: usize, mask: u32, op: &Op) {
        let Op::Carry { op, ty, d, a, carry } = op else { return };
        let state = &self.warps[warp];
        let [a, b, c] = a.map(|source| state.read(context, self, source));
        let flags = carry[0].map_or(0, |slot| state.predicate(crate::isa::Pred { slot, negated: false }));
        let (bits, mut out, mut value) = (ty.bits(), 0, [0; 32]);
        let low = u128::from(u64::MAX >> (64 - bits));
        for lane in 0..32 {
            let carry_in = u128::from(flags >> lane & 1);
            let [x, y, z] = [a, b, c].map(|lanes| u128::from(lanes[lane]) & low);
            let product = || match ty {
                Ty::S(_) => {
                    let extend = |v: u128| i128::from(((v as u64) << (64 - bits)).cast_signed() >> (64 - bits));
                    (extend(x) * extend(y)).cast_unsigned()
                }
                _ => x * y,
            };
            let sum = match op {
                Carry::Add => x + y + carry_in,
                // The bit above the result is the borrow.
                Carry::Sub => x.wrapping_sub(y).wrapping_sub(carry_in),
                Carry::MadLo => (product() & low) + z + carry_in,
                Carry::MadHi => (product() >> bits & low) + z + carry_in,
            };
            value[lane] = (sum & low) as u64;
            out |= u32::from(sum >> bits & 1 == 1) << lane;
        }
        let state = &mut self.warps[warp];
        state.put(*d, mask, &value);
        if let Some(slot) = carry[1] {
            state.put_predicate(slot, mask, out);
        }
    }

    /// `assert` failed: its text, file, line and function, as far as the strings can be read.
    fn assertion(&mut self, context: &Context<'_>, warp: usize, lane: u32, args: &[u32]) -> Fault {
        let stride = context.kernel.local_end - LOCAL_BASE;
        let base = self.warps[warp].saved[lane as usize].len() as u32 * stride;
        let mut value = |i: usize, bytes: usize| {
            let at = u64::from(args.get(i).copied().unwrap_or_default() + base);
            let mut word = [0; 8];
            match self.local(context, warp, lane, at, bytes) {
                Ok(data) => word[..bytes].copy_from_slice(data),
                Err(_) => return 0,
            }
            u64::from_le_bytes(word)
        };
        let [text, file, function] = [0, 1, 3].map(|i| context.memory.text(value(i, 8)));
        let line = value(2, 4);
        Fault::new(Rule::Trap, format!("assertion `{text}` failed at {file}:{line} in `{function}`")).lane(lane)
    }
}

impl super::warp::Warp {
    fn save(&mut self, lane: u32) {
        let saved = Saved {
            registers: self.registers.iter().map(|register| register[lane as usize]).collect(),
            predicates: self.predicates.iter().map(|predicate| predicate >> lane & 1 == 1).collect(),
        };
        self.saved[lane as usize].push(saved);
    }

    fn restore(&mut self, lane: u32) {
        let Some(saved) = self.saved[lane as usize].pop() else { return };
        for (register, value) in self.registers.iter_mut().zip(saved.registers) {
            register[lane as usize] = value;
        }
        for (predicate, value) in self.predicates.iter_mut().zip(saved.predicates) {
            *predicate = *predicate & !(1 << lane) | u32::from(value) << lane;
        }
    }
}
