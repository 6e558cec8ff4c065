//! Collectives: which lanes execute an instruction together, and whether they are all there.

use super::step::step;
use super::warp::Located;
use super::{Context, Cta, Fault};
use crate::isa::{Op, Src};
use crate::report::Rule;

/// The operand that names the lanes.
pub(super) fn named(op: &Op) -> Option<Src> {
    match op {
        Op::WarpSync { mask } | Op::Shfl { mask, .. } | Op::VoteSync { mask, .. } => Some(*mask),
        Op::Warp(op) => op.mask(),
        _ => None,
    }
}

fn diverged<T>(pc: u32, message: String) -> Located<T> {
    Err((pc, Fault::new(Rule::Diverged, message)))
}

/// Executes a collective for each group of lanes whose masks name that very group (PTX ISA, "shfl.sync" and its like: all
/// lanes of a mask execute the instruction with the same mask; lanes of other masks do so on their own). The lanes that wait for
/// others instead.
pub(super) fn by_mask(
    context: &mut Context<'_>,
    cta: &mut Cta,
    warp: usize,
    (pc, mask, active): (u32, u32, u32),
    (op, named): (&Op, Src),
) -> Located<u32> {
    let masks = cta.warps[warp].read(context, cta, named).map(|mask| mask as u32);
    let (mut left, mut waiting) = (active, 0);
    while left != 0 {
        let named = masks[left.trailing_zeros() as usize];
        let group = (0..32).filter(|lane| active >> lane & 1 != 0 && masks[*lane] == named);
        let group = group.fold(0u32, |group, lane| group | 1 << lane);
        left &= !group;
        let live = cta.warps[warp].live;
        if group & !named != 0 {
            return diverged(pc, format!("lanes {group:#010x} execute it, its mask names {named:#010x}"));
        }
        if named & !live != 0 {
            return diverged(pc, format!("its mask names lanes {:#010x} that have exited", named & !live));
        }
        if named & mask & !active != 0 {
            let message = format!("lanes {named:#010x} must execute it, the predicate lets only {active:#010x}");
            return diverged(pc, message);
        }
        if named & active & !group != 0 {
            let others = named & active & !group;
            let message = format!("lanes {group:#010x} name {named:#010x}, lanes {others:#010x} of these name others");
            return diverged(pc, message);
        }
        if group == named || (matches!(op, Op::WarpSync { .. }) && elsewhere(context, cta, warp, group, named)) {
            step(context, cta, warp, (pc, named), op).map_err(|fault| (pc, fault))?;
        } else if cta.warps[warp].splits.is_empty() {
            return diverged(pc, format!("lanes {named:#010x} must execute it, only {group:#010x} do"));
        } else {
            waiting |= group;
        }
    }
    Ok(waiting)
}

/// Whether the other lanes that `named` names wait at a `bar.warp.sync` of the same mask, be it another one; they go on then.
fn elsewhere(context: &Context<'_>, cta: &mut Cta, warp: usize, group: u32, named: u32) -> bool {
    let state = &cta.warps[warp];
    let mut here = group;
    let mut found = Vec::new();
    for (at, split) in state.splits.iter().enumerate().filter(|(_, split)| split.parked) {
        let Op::WarpSync { mask } = context.kernel.code[split.pc as usize].op else { continue };
        let masks = state.read(context, cta, mask);
        let same = (0..32).all(|lane| split.mask >> lane & 1 == 0 || masks[lane] as u32 == named);
        if same {
            here |= split.mask;
            found.push(at);
        }
    }
    if here != named {
        return false;
    }
    for at in found {
        let split = &mut cta.warps[warp].splits[at];
        (split.pc, split.parked) = (split.pc + 1, false);
    }
    true
}

/// Whether the lanes that must execute a collective without a mask are all here. PTX ISA: `.aligned` needs the whole warp.
pub(super) fn all(cta: &Cta, warp: usize, (pc, mask, active): (u32, u32, u32), op: &Op) -> Located<bool> {
    let state = &cta.warps[warp];
    let needed = if matches!(op, Op::Bar(_) | Op::Hopper(_)) { state.live } else { u32::MAX };
    if mask & needed != needed && state.splits.is_empty() {
        return diverged(pc, format!("lanes {needed:#010x} must execute it, only {mask:#010x} exist"));
    }
    if mask & needed == needed && active & needed != needed {
        return diverged(pc, format!("lanes {needed:#010x} must execute it, the predicate lets only {active:#010x}"));
    }
    Ok(mask & needed == needed)
}
