//! What each instruction does.

use std::borrow::Cow;

use super::space::convert_address;
use super::sync::Arrival;
use super::warp::Flow;
use super::{Context, Cta, Fault, Outcome};
use crate::alu::{self, Lanes};
use crate::isa::{Logic, Op, Src, Warpgroup};
use crate::report::Rule;

/// Executes one instruction for the lanes in `mask`.
pub(super) fn step(
    context: &mut Context<'_>,
    cta: &mut Cta,
    warp: usize,
    (pc, mask): (u32, u32),
    op: &Op,
) -> Outcome<Flow> {
    let state = &cta.warps[warp];
    let read = |source: &Src| state.operand(context, cta, *source);
    let (d, value) = match op {
        Op::Unary { op, ty, d, a } => (d, alu::unary(*op, *ty, &read(a))),
        Op::Binary { op, ty, d, a, b } => (d, alu::binary(*op, *ty, &read(a), &read(b))),
        Op::Ternary { op, ty, d, a, b, c } => (d, alu::ternary(*op, *ty, &read(a), &read(b), &read(c))),
        Op::Bfi { ty, d, a, b, pos, len } => (d, alu::bfi(*ty, &read(a), &read(b), &read(pos), &read(len))),
        Op::Cvt { to, from, round, integer, sat, relu, d, a } => {
            (d, alu::cvt(*to, *from, *round, *integer, *sat, *relu, &read(a)))
        }
        Op::CvtPack { to, relu, d, a, b } => (d, alu::cvt_pack(*to, *relu, &read(a), &read(b))),
        Op::Pack { part, d, parts } => (d, pack(*part, parts.iter().map(read))),
        Op::Selp { d, a, b, p } => {
            let (chosen, mut value) = (state.predicate(*p), read(b).into_owned());
            let a = read(a);
            (0..32).filter(|lane| chosen >> lane & 1 != 0).for_each(|lane| value[lane] = a[lane]);
            (d, value)
        }
        Op::Cvta { space, to_space, d, a } => (d, read(a).map(|address| convert_address(*space, *to_space, address))),
        Op::Math { op, d, a } => (d, alu::math(*op, &a.iter().map(|a| read(a).into_owned()).collect::<Vec<_>>())),
        Op::ActiveMask { d } => (d, [u64::from(mask); 32]),
        _ => return effect(context, cta, warp, (pc, mask), op),
    };
    cta.warps[warp].put(*d, mask, &value);
    Ok(Flow::Next)
}

fn pack<'a>(part: u8, parts: impl Iterator<Item = Cow<'a, Lanes>>) -> Lanes {
    let mut out = [0; 32];
    for (i, lanes) in parts.enumerate() {
        let (keep, shift) = (u64::MAX >> (64 - u32::from(part)), i as u32 * u32::from(part));
        out.iter_mut().zip(lanes.iter()).for_each(|(out, lane)| *out |= (lane & keep) << shift);
    }
    out
}

/// Instructions that do more than give one register a value.
fn effect(context: &mut Context<'_>, cta: &mut Cta, warp: usize, (pc, mask): (u32, u32), op: &Op) -> Outcome<Flow> {
    let at = (pc, mask);
    match op {
        Op::Setp { .. } | Op::PredLogic { .. } | Op::PredMov { .. } | Op::PredConst { .. } => {
            set_predicate(context, cta, warp, mask, op);
        }
        Op::Unpack { part, parts, a } => {
            let value = cta.warps[warp].read(context, cta, *a);
            let keep = u64::MAX >> (64 - u32::from(*part));
            for (i, d) in parts.iter().enumerate() {
                cta.warps[warp].put(*d, mask, &value.map(|value| value >> (i as u32 * u32::from(*part)) & keep));
            }
        }
        Op::Ld { space, ty, to, d, addr, sem } => cta.load(context, warp, at, (*space, *ty, *to), (d, *addr), *sem)?,
        Op::St { space, ty, addr, a, sem } => cta.store(context, warp, at, (*space, *ty), (a, *addr), *sem)?,
        Op::Atom { space, op, ty, d, addr, b, c, sem, reduces } => {
            cta.atomic(context, warp, at, (*space, *op, *ty), (*d, *addr, *b, *c), (*sem, *reduces))?;
        }
        Op::Fence { scope, order, sc } => cta.fence(context, warp, mask, (*scope, *order, *sc)),
        Op::CpAsync { bytes, dst, src, valid } => {
            cta.issue_copies(context, warp, at, *bytes, (*dst, *src, *valid))?;
        }
        Op::CpAsyncCommit => cta.warps[warp].copies.commit(mask),
        Op::CpAsyncWait { pending } => cta.wait_copies(context, warp, mask, *pending)?,
        Op::Ldmatrix { trans, space, d, addr } => cta.ldmatrix(context, warp, pc, (*trans, *space), (d, *addr))?,
        Op::Mma { k, ab, d, a, b, c } => cta.mma(context, warp, (*k, *ab), (d, a, b, c)),
        Op::Shfl { mode, d, p, a, b, c, .. } => cta.shuffle(context, warp, mask, *mode, (*d, *p, *a, *b, *c))?,
        Op::VoteSync { mode, d, p, a, .. } => cta.vote(warp, mask, *mode, (*d, *p, *a)),
        Op::WarpSync { .. } => cta.warp_sync(warp, mask),
        Op::Bar(bar) => match cta.arrive(context, warp, mask, bar)? {
            Arrival::GoesOn => {}
            Arrival::Waits => return Ok(Flow::Block),
            Arrival::LanesWait(id) => return Ok(Flow::BlockLanes(id)),
        },
        Op::Warp(op) => cta.warp_op(context, warp, at, op)?,
        Op::Cache(op) => cta.cache(context, warp, at, *op)?,
        Op::Warpgroup(Warpgroup::Mma(op)) => {
            if cta.wgmma(context, warp, pc, op)? {
                return Ok(Flow::Block);
            }
        }
        Op::Warpgroup(Warpgroup::Registers { grow, count }) => {
            if cta.set_registers(context, warp, pc, (*grow, *count))? {
                return Ok(Flow::Block);
            }
        }
        Op::Warpgroup(Warpgroup::Fence) => cta.warps[warp].wgmma.fence(),
        Op::Warpgroup(Warpgroup::Commit) => cta.wgmma_commit(warp),
        Op::Warpgroup(Warpgroup::Wait { pending }) => cta.wgmma_wait(context, warp, *pending)?,
        Op::Bra { target } => return Ok(Flow::Branch(*target)),
        Op::Exit => return Ok(Flow::Exit),
        Op::Trap => return Err(Fault::new(Rule::Trap, "the kernel executed a trap")),
        Op::Nanosleep => return Ok(Flow::Yield),
        Op::Hopper(op) => return super::hopper::step(context, cta, warp, at, op),
        _ => return cta.control(context, warp, at, op),
    }
    Ok(Flow::Next)
}

fn set_predicate(context: &Context<'_>, cta: &mut Cta, warp: usize, mask: u32, op: &Op) {
    let state = &cta.warps[warp];
    let logic = |op: Logic, a: u32, b: u32| match op {
        Logic::And => a & b,
        Logic::Or => a | b,
        Logic::Xor => a ^ b,
    };
    let (p, value) = match op {
        Op::Setp { cmp, ty, p, q, a, b, combine } => {
            let (a, b) = (state.operand(context, cta, *a), state.operand(context, cta, *b));
            let holds = alu::setp(*cmp, *ty, &a, &b);
            // PTX ISA, "setp": p = (a cmp b) op c, q = !(a cmp b) op c.
            let combined = |value| match combine {
                Some((op, c)) => logic(*op, value, state.predicate(*c)),
                None => value,
            };
            let (holds, fails) = (combined(holds), combined(!holds));
            if let Some(q) = q {
                cta.warps[warp].put_predicate(*q, mask, fails);
            }
            (*p, holds)
        }
        Op::PredLogic { op, p, a, b } => (*p, logic(*op, state.predicate(*a), state.predicate(*b))),
        Op::PredMov { p, a } => (*p, state.predicate(*a)),
        Op::PredConst { p, value } => (*p, if *value { u32::MAX } else { 0 }),
        _ => return,
    };
    cta.warps[warp].put_predicate(p, mask, value);
}
