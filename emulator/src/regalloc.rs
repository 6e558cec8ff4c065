//! Register slots by liveness: nvcc names thousands of registers per kernel, of which a few hundred are live at a time.

mod pins;

use std::sync::Arc;

use crate::isa::*;
pub(crate) use pins::Pins;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Use,
    Def,
    UsePred,
    DefPred,
}

fn src(a: &mut Src, visit: &mut impl FnMut(Role, &mut u16)) {
    if let Src::Reg(slot) = a {
        visit(Role::Use, slot);
    }
}

fn dst(d: &mut Dst, visit: &mut impl FnMut(Role, &mut u16)) {
    if let Some(slot) = d {
        visit(Role::Def, slot);
    }
}

/// Every register of an operation, uses before definitions.
fn registers(op: &mut Op, visit: &mut impl FnMut(Role, &mut u16)) {
    match op {
        Op::Unary { d, a, .. } | Op::Cvt { d, a, .. } | Op::Cvta { d, a, .. } => {
            src(a, visit);
            dst(d, visit);
        }
        Op::Binary { d, a, b, .. } | Op::CvtPack { d, a, b, .. } => {
            src(a, visit);
            src(b, visit);
            dst(d, visit);
        }
        Op::Ternary { d, a, b, c, .. } => {
            for s in [a, b, c] {
                src(s, visit);
            }
            dst(d, visit);
        }
        Op::Bfi { d, a, b, pos, len, .. } => {
            for s in [a, b, pos, len] {
                src(s, visit);
            }
            dst(d, visit);
        }
        Op::Pack { d, parts, .. } => {
            parts.iter_mut().for_each(|part| src(part, visit));
            dst(d, visit);
        }
        Op::Unpack { parts, a, .. } => {
            src(a, visit);
            parts.iter_mut().for_each(|part| dst(part, visit));
        }
        Op::Setp { p, q, a, b, combine, .. } => {
            src(a, visit);
            src(b, visit);
            if let Some((_, pred)) = combine {
                visit(Role::UsePred, &mut pred.slot);
            }
            visit(Role::DefPred, p);
            if let Some(q) = q {
                visit(Role::DefPred, q);
            }
        }
        Op::Selp { d, a, b, p } => {
            src(a, visit);
            src(b, visit);
            visit(Role::UsePred, &mut p.slot);
            dst(d, visit);
        }
        Op::PredLogic { p, a, b, .. } => {
            visit(Role::UsePred, &mut a.slot);
            visit(Role::UsePred, &mut b.slot);
            visit(Role::DefPred, p);
        }
        Op::PredMov { p, a } => {
            visit(Role::UsePred, &mut a.slot);
            visit(Role::DefPred, p);
        }
        Op::PredConst { p, .. } => visit(Role::DefPred, p),
        Op::Ld { d, addr, .. } | Op::Ldmatrix { d, addr, .. } => {
            src(&mut addr.base, visit);
            d.iter_mut().for_each(|d| dst(d, visit));
        }
        Op::St { addr, a, .. } => {
            src(&mut addr.base, visit);
            a.iter_mut().for_each(|a| src(a, visit));
        }
        Op::Atom { d, addr, b, c, .. } => {
            for s in [&mut addr.base, b, c] {
                src(s, visit);
            }
            dst(d, visit);
        }
        Op::CpAsync { dst, src: from, valid, .. } => {
            src(&mut dst.base, visit);
            src(&mut from.base, visit);
            if let Some(valid) = valid {
                src(valid, visit);
            }
        }
        Op::Mma { d, a, b, c, .. } => {
            a.iter_mut().chain(b).chain(c).for_each(|s| src(s, visit));
            d.iter_mut().for_each(|d| dst(d, visit));
        }
        Op::Bar(bar) => barrier(bar, visit),
        Op::Warp(op) => warp_op(op, visit),
        Op::Cache(Cache::Priority { addr } | Cache::Discard { addr }) => src(&mut addr.base, visit),
        Op::WarpSync { mask } => src(mask, visit),
        Op::Shfl { d, p, a, b, c, mask, .. } => {
            for s in [a, b, c, mask] {
                src(s, visit);
            }
            dst(d, visit);
            if let Some(p) = p {
                visit(Role::DefPred, p);
            }
        }
        Op::VoteSync { d, p, a, mask, .. } => {
            src(mask, visit);
            visit(Role::UsePred, &mut a.slot);
            dst(d, visit);
            if let Some(p) = p {
                visit(Role::DefPred, p);
            }
        }
        Op::ActiveMask { d } => dst(d, visit),
        Op::Math { d, a, .. } => {
            a.iter_mut().for_each(|a| src(a, visit));
            dst(d, visit);
        }
        Op::Test { p, q, a, combine, .. } => {
            a.iter_mut().for_each(|a| src(a, visit));
            if let Some((_, pred)) = combine {
                visit(Role::UsePred, &mut pred.slot);
            }
            visit(Role::DefPred, p);
            if let Some(q) = q {
                visit(Role::DefPred, q);
            }
        }
        Op::Set { d, a, combine, .. } => {
            a.iter_mut().for_each(|a| src(a, visit));
            if let Some((_, pred)) = combine {
                visit(Role::UsePred, &mut pred.slot);
            }
            dst(d, visit);
        }
        Op::Carry { d, a, carry: [carry_in, carry_out], .. } => {
            a.iter_mut().for_each(|a| src(a, visit));
            if let Some(carry) = carry_in {
                visit(Role::UsePred, carry);
            }
            dst(d, visit);
            if let Some(carry) = carry_out {
                visit(Role::DefPred, carry);
            }
        }
        Op::Hint { a } => a.iter_mut().for_each(|a| src(a, visit)),
        Op::BraIndexed { index, .. } => src(index, visit),
        // The link register is not among those that are allocated here.
        Op::Call { .. } | Op::Return { .. } | Op::CopyResults { .. } | Op::AssertFail { .. } => {}
        Op::Hopper(op) => {
            op.sources().into_iter().for_each(|s| src(s, visit));
            if let Some(d) = op.destination() {
                dst(d, visit);
            }
            if let Some(p) = op.predicate() {
                visit(Role::DefPred, p);
            }
        }
        Op::Warpgroup(op) => warpgroup(op, visit),
        Op::Cache(Cache::Prefetch)
        | Op::Fence { .. }
        | Op::CpAsyncCommit
        | Op::CpAsyncWait { .. }
        | Op::Bra { .. }
        | Op::Exit
        | Op::Trap
        | Op::Nanosleep => {}
    }
}

fn barrier(bar: &mut Bar, visit: &mut impl FnMut(Role, &mut u16)) {
    src(&mut bar.id, visit);
    if let Some(count) = &mut bar.count {
        src(count, visit);
    }
    if let Some((reduce, c)) = &mut bar.reduce {
        visit(Role::UsePred, &mut c.slot);
        match reduce {
            Reduce::Popc(d) => dst(d, visit),
            Reduce::And(p) | Reduce::Or(p) => visit(Role::DefPred, p),
        }
    }
}

fn warp_op(op: &mut WarpOp, visit: &mut impl FnMut(Role, &mut u16)) {
    match op {
        WarpOp::Stmatrix { addr, a, .. } => {
            src(&mut addr.base, visit);
            a.iter_mut().for_each(|a| src(a, visit));
        }
        WarpOp::Movmatrix { d, a } => {
            src(a, visit);
            dst(d, visit);
        }
        WarpOp::Elect { d, p, mask } => {
            src(mask, visit);
            dst(d, visit);
            visit(Role::DefPred, p);
        }
        WarpOp::Match { d, p, a, mask, .. } => {
            src(a, visit);
            src(mask, visit);
            dst(d, visit);
            if let Some(p) = p {
                visit(Role::DefPred, p);
            }
        }
        WarpOp::Redux { d, a, mask, .. } => {
            src(a, visit);
            src(mask, visit);
            dst(d, visit);
        }
        WarpOp::MmaF16 { d, a, b, c, .. } => {
            a.iter_mut().chain(b).chain(c).for_each(|s| src(s, visit));
            d.iter_mut().for_each(|d| dst(d, visit));
        }
    }
}

fn warpgroup(op: &mut Warpgroup, visit: &mut impl FnMut(Role, &mut u16)) {
    let Warpgroup::Mma(op) = op else { return };
    let op = Arc::make_mut(op);
    src(&mut op.b, visit);
    match &mut op.a {
        OperandA::Descriptor(a) => src(a, visit),
        OperandA::Registers(a) => a.iter_mut().for_each(|slot| visit(Role::Use, slot)),
    }
    if let ScaleD::Pred(p) = &mut op.scale_d {
        visit(Role::UsePred, &mut p.slot);
    }
    // Defined as well; but `allocate` keeps a slot for each of them throughout the kernel.
    op.d.iter_mut().for_each(|slot| visit(Role::Use, slot));
}

#[derive(Clone, Default)]
struct BitSet(Vec<u64>);

impl BitSet {
    fn new(bits: usize) -> Self {
        BitSet(vec![0; bits.div_ceil(64)])
    }
    fn insert(&mut self, bit: usize) {
        self.0[bit / 64] |= 1 << (bit % 64);
    }
    fn contains(&self, bit: usize) -> bool {
        self.0[bit / 64] >> (bit % 64) & 1 != 0
    }
    fn ones(&self) -> impl Iterator<Item = usize> + '_ {
        self.0.iter().enumerate().flat_map(|(word, bits)| {
            let mut bits = *bits;
            std::iter::from_fn(move || {
                (bits != 0).then(|| {
                    let bit = bits.trailing_zeros() as usize;
                    bits &= bits - 1;
                    word * 64 + bit
                })
            })
        })
    }
}

struct Block {
    start: usize,
    end: usize,
    successors: Vec<usize>,
    used: BitSet,
    killed: BitSet,
    live_in: BitSet,
    live_out: BitSet,
}

fn blocks(code: &mut [Instruction], data: usize, total: usize) -> Vec<Block> {
    let mut leaders = vec![false; code.len() + 1];
    leaders[0] = true;
    for (i, instruction) in code.iter().enumerate() {
        match &instruction.op {
            Op::Bra { target } => {
                leaders[*target as usize] = true;
                leaders[i + 1] = true;
            }
            Op::BraIndexed { targets, .. } => {
                targets.iter().for_each(|target| leaders[*target as usize] = true);
                leaders[i + 1] = true;
            }
            Op::Exit | Op::Return { .. } | Op::AssertFail { .. } => leaders[i + 1] = true,
            _ => {}
        }
    }
    let starts: Vec<usize> = (0..code.len()).filter(|&i| leaders[i]).collect();
    let block_at = |at: usize| starts.partition_point(|&start| start <= at) - 1;
    let mut out = Vec::with_capacity(starts.len());
    for (index, &start) in starts.iter().enumerate() {
        let end = starts.get(index + 1).copied().unwrap_or(code.len());
        let mut block = Block {
            start,
            end,
            successors: Vec::new(),
            used: BitSet::new(total),
            killed: BitSet::new(total),
            live_in: BitSet::new(total),
            live_out: BitSet::new(total),
        };
        for instruction in &mut code[start..end] {
            let guarded = instruction.guard.is_some();
            let read = |block: &mut Block, bit: usize| {
                if !block.killed.contains(bit) {
                    block.used.insert(bit);
                }
            };
            if let Some(guard) = instruction.guard {
                read(&mut block, data + guard.slot as usize);
            }
            registers(&mut instruction.op, &mut |role, slot| {
                let bit = *slot as usize + if matches!(role, Role::Use | Role::Def) { 0 } else { data };
                // A guarded definition leaves the old value in some lanes.
                if matches!(role, Role::Use | Role::UsePred) || guarded {
                    read(&mut block, bit);
                } else {
                    block.killed.insert(bit);
                }
            });
        }
        let last = &code[end - 1];
        match &last.op {
            Op::Bra { target } => block.successors.push(block_at(*target as usize)),
            Op::BraIndexed { targets, .. } => {
                block.successors.extend(targets.iter().map(|target| block_at(*target as usize)));
            }
            _ => {}
        }
        let leaves = matches!(
            last.op,
            Op::Bra { .. } | Op::BraIndexed { .. } | Op::Exit | Op::Return { .. } | Op::AssertFail { .. }
        );
        let falls_through = !leaves || last.guard.is_some();
        if falls_through && end < code.len() {
            block.successors.push(index + 1);
        }
        out.push(block);
    }
    out
}

/// Moves a function's registers and predicates behind those of others.
pub(crate) fn shift(code: &mut [Instruction], data: u16, preds: u16) {
    for instruction in code {
        if let Some(guard) = &mut instruction.guard {
            guard.slot += preds;
        }
        registers(&mut instruction.op, &mut |role, slot| {
            *slot += if matches!(role, Role::Use | Role::Def) { data } else { preds };
        });
    }
}

/// Renames virtual registers and predicates to slots; returns how many of each the kernel needs.
pub(crate) fn allocate(code: &mut [Instruction], data: u16, preds: u16) -> (u16, u16) {
    let (data, total) = (data as usize, data as usize + preds as usize);
    let mut blocks = blocks(code, data, total);
    let mut changed = true;
    while changed {
        changed = false;
        for i in (0..blocks.len()).rev() {
            let mut out = std::mem::take(&mut blocks[i].live_out);
            for s in blocks[i].successors.clone() {
                for (word, more) in out.0.iter_mut().zip(&blocks[s].live_in.0) {
                    *word |= more;
                }
            }
            let block = &mut blocks[i];
            for w in 0..out.0.len() {
                let live = block.used.0[w] | (out.0[w] & !block.killed.0[w]);
                changed |= live != block.live_in.0[w];
                block.live_in.0[w] = live;
            }
            block.live_out = out;
        }
    }
    // One interval per register, in positions 2i (uses of instruction i) and 2i + 1 (its definitions).
    let mut intervals = vec![(usize::MAX, 0usize); total];
    let mut touch = |bit: usize, at: usize| {
        let interval = &mut intervals[bit];
        *interval = (interval.0.min(at), interval.1.max(at));
    };
    for block in &blocks {
        block.live_in.ones().for_each(|bit| touch(bit, 2 * block.start));
        block.live_out.ones().for_each(|bit| touch(bit, 2 * block.end - 1));
    }
    for (i, instruction) in code.iter_mut().enumerate() {
        if let Some(guard) = instruction.guard {
            touch(data + guard.slot as usize, 2 * i);
        }
        registers(&mut instruction.op, &mut |role, slot| match role {
            Role::Use => touch(*slot as usize, 2 * i),
            Role::Def => touch(*slot as usize, 2 * i + 1),
            Role::UsePred => touch(data + *slot as usize, 2 * i),
            Role::DefPred => touch(data + *slot as usize, 2 * i + 1),
        });
    }
    // Nobody looks at what an atomic returns: it might as well be a `red`.
    for (i, instruction) in code.iter_mut().enumerate() {
        if let Op::Atom { d, .. } = &mut instruction.op
            && d.is_some_and(|slot| intervals[slot as usize] == (2 * i + 1, 2 * i + 1))
        {
            *d = None;
        }
    }
    // What wgmma names stays its own: it may be in flight long after its last use.
    for instruction in code.iter() {
        if let Op::Warpgroup(Warpgroup::Mma(op)) = &instruction.op {
            op.pinned().for_each(|slot| intervals[slot as usize] = (0, usize::MAX));
        }
    }
    let (data_slots, data_count) = assign(&intervals[..data]);
    let (pred_slots, pred_count) = assign(&intervals[data..]);
    for instruction in code {
        if let Some(guard) = &mut instruction.guard {
            guard.slot = pred_slots[guard.slot as usize];
        }
        registers(&mut instruction.op, &mut |role, slot| {
            let slots = if matches!(role, Role::Use | Role::Def) { &data_slots } else { &pred_slots };
            *slot = slots[*slot as usize];
        });
    }
    (data_count, pred_count)
}

/// Linear scan: intervals by start, each takes a slot whose interval has ended.
fn assign(intervals: &[(usize, usize)]) -> (Vec<u16>, u16) {
    let mut order: Vec<usize> = (0..intervals.len()).filter(|&i| intervals[i].0 != usize::MAX).collect();
    order.sort_by_key(|&i| intervals[i]);
    let mut slots = vec![0; intervals.len()];
    let mut active = std::collections::BinaryHeap::new();
    let mut free = Vec::new();
    let mut count = 0u16;
    for i in order {
        let (start, end) = intervals[i];
        while let Some(&std::cmp::Reverse((ended, slot))) = active.peek() {
            if ended >= start {
                break;
            }
            active.pop();
            free.push(slot);
        }
        let slot = free.pop().unwrap_or_else(|| {
            count += 1;
            count - 1
        });
        slots[i] = slot;
        active.push(std::cmp::Reverse((end, slot)));
    }
    (slots, count)
}
