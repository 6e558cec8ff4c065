//! One warp: its registers, how its lanes diverge and meet again.

use std::borrow::Cow;
use std::fmt::Write;

use super::bulk::Groups;
use super::call::Saved;
use super::copy::Copies;
use super::meet;
use super::pins::Pins;
use super::step::step;
use super::views::Views;
use super::{Context, Cta, Fault, Outcome};
use crate::alu::Lanes;
use crate::isa::{Address, Dst, Pred, Src};
use crate::report::Rule;

/// Longest run of instructions before another warp gets a turn.
const LONGEST_TURN: usize = 256;

/// Lanes of a warp that are at the same instruction.
#[derive(Clone, Copy, Debug)]
pub(super) struct Split {
    pub pc: u32,
    pub mask: u32,
    /// At a collective instruction that the other lanes have not reached.
    pub parked: bool,
    /// At a barrier, where they arrived without the other lanes.
    pub barrier: Option<u32>,
    /// At an instruction that is tried again once this has changed.
    waits: Option<Wait>,
}

/// What some lanes of a warp wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// The mbarrier at this address of the own CTA.
    Mbarrier(u32),
    Cluster,
}

impl Split {
    fn new(pc: u32, mask: u32) -> Split {
        Split { pc, mask, parked: false, barrier: None, waits: None }
    }

    fn is_ready(&self) -> bool {
        !self.parked && self.barrier.is_none() && self.waits.is_none()
    }
}

#[derive(Debug)]
pub(super) struct Warp {
    pub id: u32,
    /// Lanes that have not exited.
    pub live: u32,
    pub splits: Vec<Split>,
    /// The barrier the warp waits for.
    pub blocked: Option<u32>,
    pub registers: Vec<Lanes>,
    pub predicates: Vec<u32>,
    pub views: Views,
    pub copies: Copies,
    pub groups: Groups,
    /// Lanes that have arrived at the cluster's barrier, and in which phase.
    pub at_cluster: (u32, u32),
    /// Lanes that arrived in a phase before that and have not waited yet.
    pub owe_cluster: u32,
    /// Has stopped, and must be woken.
    pub asleep: bool,
    /// The next test of an mbarrier that fails gives up instead of waiting on.
    pub expired: bool,
    /// Local memory by lane.
    pub local: Vec<Vec<u8>>,
    /// What recursive calls saved, by lane.
    pub saved: Vec<Vec<Saved>>,
    pub wgmma: Pins,
    /// What else than a barrier it waits for.
    pub stalled: Option<Stall>,
    /// Registers per thread, once a `setmaxnreg` has been executed, and which ones were.
    pub registers_held: Option<u32>,
    pub resized: Vec<u32>,
}

/// What a warp waits for, when it is not a barrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stall {
    /// The others of its warpgroup.
    Warpgroup,
    /// So many registers per thread.
    Registers(u32),
}

/// How a turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    Runnable,
    Blocked,
    Done,
}

/// Where lanes go after an instruction.
pub(super) enum Flow {
    Next,
    /// To the target with these lanes, on with the others.
    Branch(u32),
    /// Each lane to a target of its own, on with the others.
    Scatter([u32; 32]),
    Exit,
    /// On, but let others run first.
    Yield,
    /// On, once the barrier lets go.
    Block,
    /// The same for these lanes only.
    BlockLanes(u32),
    /// The same again, once what is waited for has changed.
    Wait(Wait),
}

impl Warp {
    pub fn new(context: &Context<'_>, cta: u32, id: u32, agents: usize) -> Warp {
        let kernel = context.kernel;
        let lanes = (context.threads - id * 32).min(32);
        let live = u32::MAX >> (32 - lanes);
        Warp {
            id,
            live,
            splits: vec![Split::new(kernel.entry, live)],
            blocked: None,
            registers: vec![[0; 32]; kernel.registers as usize],
            predicates: vec![0; kernel.predicates as usize],
            views: Views::new(cta, id, agents),
            copies: Copies::default(),
            groups: Groups::default(),
            at_cluster: (0, 0),
            owe_cluster: 0,
            asleep: false,
            expired: false,
            wgmma: Pins::new(kernel),
            stalled: None,
            registers_held: None,
            resized: Vec::new(),
            local: vec![Vec::new(); 32],
            saved: (0..32).map(|_| Vec::new()).collect(),
        }
    }

    /// Whether it must not run.
    pub fn waits(&self) -> bool {
        self.blocked.is_some() || self.stalled.is_some()
    }

    /// Lanes that wait at a barrier of their own go on.
    pub fn release(&mut self, id: u32) {
        let waiting = self.splits.iter_mut().filter(|split| split.barrier == Some(id));
        waiting.for_each(|split| split.barrier = None);
    }

    pub fn resume(&mut self) {
        self.splits.iter_mut().for_each(|split| split.parked = false);
    }

    /// What waits for this may try again; whether there was anything.
    pub fn stop_waiting(&mut self, wait: Wait) -> bool {
        let waiting = self.splits.iter_mut().filter(|split| split.waits == Some(wait));
        waiting.map(|split| split.waits = None).count() != 0
    }

    /// Ends the waits for mbarriers, which may give up after some time; whether the warp goes on for that.
    pub fn expire(&mut self) -> bool {
        let mut found = false;
        for split in &mut self.splits {
            if matches!(split.waits, Some(Wait::Mbarrier(_))) {
                split.waits = None;
                found = true;
            }
        }
        let goes_on = found && self.asleep;
        self.asleep &= !goes_on;
        self.expired |= goes_on;
        goes_on
    }

    pub fn put(&mut self, d: Dst, mask: u32, values: &Lanes) {
        let Some(d) = d else { return };
        let register = &mut self.registers[d as usize];
        if mask == u32::MAX {
            *register = *values;
            return;
        }
        for (lane, (target, value)) in register.iter_mut().zip(values).enumerate() {
            if mask >> lane & 1 != 0 {
                *target = *value;
            }
        }
    }

    pub fn predicate(&self, p: Pred) -> u32 {
        let value = self.predicates[p.slot as usize];
        if p.negated { !value } else { value }
    }

    pub fn put_predicate(&mut self, p: u16, mask: u32, value: u32) {
        let target = &mut self.predicates[p as usize];
        *target = *target & !mask | value & mask;
    }

    /// A source operand for all lanes, where it lies.
    #[inline]
    pub fn operand(&self, context: &Context<'_>, cta: &Cta, source: Src) -> Cow<'_, Lanes> {
        match source {
            Src::Reg(slot) => Cow::Borrowed(&self.registers[slot as usize]),
            other => Cow::Owned(self.read(context, cta, other)),
        }
    }

    /// A source operand for all lanes.
    pub fn read(&self, context: &Context<'_>, cta: &Cta, source: Src) -> Lanes {
        match source {
            Src::Reg(slot) => self.registers[slot as usize],
            Src::Imm(value) => [value; 32],
            Src::Special(special) => self.special(context, cta, special),
        }
    }

    pub fn addresses(&self, context: &Context<'_>, cta: &Cta, address: Address) -> Lanes {
        let mut lanes = self.read(context, cta, address.base);
        lanes.iter_mut().for_each(|lane| *lane = lane.wrapping_add(address.offset as u64));
        lanes
    }

    /// One line per group of lanes, for tables of who waits for what.
    pub fn describe(&self, context: &Context<'_>, cta: &Cta) -> Option<String> {
        if self.live == 0 {
            return None;
        }
        let mut text = String::new();
        for split in &self.splits {
            let at = &context.kernel.code[split.pc as usize];
            let what = match (self.blocked.or(split.barrier), self.stalled) {
                (Some(id), _) => {
                    let barrier = &cta.barriers[id as usize];
                    let expected = barrier.expected.flatten().unwrap_or_else(|| cta.live_threads());
                    format!(
                        "waits at barrier {id}, which {} of {expected} threads have reached, before",
                        barrier.arrived
                    )
                }
                (_, Some(Stall::Warpgroup)) => "waits for the others of its warpgroup before".to_owned(),
                (_, Some(Stall::Registers(count))) => format!("waits for {count} registers per thread before"),
                _ if split.waits.is_some() => cta.describe_wait(context, split.waits),
                _ if split.parked => "waits for the other lanes at".to_owned(),
                _ => "is at".to_owned(),
            };
            let (cta, warp, lanes) = (cta.index, self.id, split.mask);
            // Writing to a String cannot fail.
            let _ = write!(
                text,
                "\n    cta {},{},{} warp {warp} lanes {lanes:#010x} {what} PTX line {}: `{}`",
                cta[0], cta[1], cta[2], at.line, at.text
            );
        }
        Some(text)
    }

    /// Joins lanes that are at the same place; those that waited for each other may go on.
    fn merge(&mut self) {
        let mut i = 0;
        while i < self.splits.len() {
            let mut j = i + 1;
            while j < self.splits.len() {
                let free = self.splits[i].barrier.is_none() && self.splits[j].barrier.is_none();
                if free && self.splits[i].pc == self.splits[j].pc {
                    self.splits[i].mask |= self.splits[j].mask;
                    self.splits[i].parked = false;
                    self.splits[i].waits = None;
                    self.splits.swap_remove(j);
                } else {
                    j += 1;
                }
            }
            i += 1;
        }
    }

    /// Takes the lanes that go next: those furthest behind, so that the others can be caught up with; now and then others,
    /// so that lanes that wait for each other all get their turns.
    fn select(&mut self, context: &mut Context<'_>) -> Option<Split> {
        if self.splits.len() > 1 {
            self.merge();
        }
        let ready: Vec<usize> = (0..self.splits.len()).filter(|&i| self.splits[i].is_ready()).collect();
        let behind = ready.iter().copied().min_by_key(|&i| self.splits[i].pc)?;
        let chosen =
            if ready.len() > 1 && context.random(8) == 0 { ready[context.random(ready.len())] } else { behind };
        Some(self.splits.swap_remove(chosen))
    }
}

pub(super) type Located<T> = Result<T, (u32, Fault)>;

/// Gives a warp a turn.
pub(super) fn run(context: &mut Context<'_>, cta: &mut Cta, warp: usize) -> Located<Stop> {
    let mut turn = 1 + context.random(LONGEST_TURN);
    loop {
        let state = &mut cta.warps[warp];
        if state.live == 0 {
            return Ok(Stop::Done);
        }
        if state.waits() {
            return Ok(Stop::Blocked);
        }
        let Some(split) = state.select(context) else {
            if state.splits.iter().any(|split| split.barrier.is_some() || split.waits.is_some()) {
                return Ok(Stop::Blocked);
            }
            let at = state.splits.first().map_or(0, |split| split.pc);
            let table = cta.warps[warp].describe(context, cta).unwrap_or_default();
            let message = format!("lanes of one warp wait for each other at different instructions:{table}");
            return Err((at, Fault::new(Rule::Diverged, message)));
        };
        run_split(context, cta, warp, split, &mut turn)?;
        if turn == 0 {
            let state = &mut cta.warps[warp];
            let stop = if state.live == 0 {
                Stop::Done
            } else if state.waits() {
                Stop::Blocked
            } else {
                Stop::Runnable
            };
            if stop == Stop::Runnable && context.random(4) == 0 {
                cta.land_one(context, warp).map_err(|fault| (0, fault))?;
                cta.execute_one(context, warp).map_err(|fault| (0, fault))?;
            }
            return Ok(stop);
        }
    }
}

/// Runs lanes until they meet others, diverge, wait, exit or use up the turn.
fn run_split(context: &mut Context<'_>, cta: &mut Cta, warp: usize, split: Split, turn: &mut usize) -> Located<()> {
    let Split { mut pc, mask, .. } = split;
    let kernel = context.kernel;
    loop {
        let others = &mut cta.warps[warp].splits;
        let meets = others
            .iter()
            .any(|other| other.barrier.is_none() && (other.pc == pc || (other.is_ready() && other.pc < pc)));
        if *turn == 0 || (meets && pc != split.pc) {
            others.push(Split::new(pc, mask));
            return Ok(());
        }
        *turn -= 1;
        let instruction = &kernel.code[pc as usize];
        let active = match instruction.guard {
            Some(guard) => mask & cta.warps[warp].predicate(guard),
            None => mask,
        };
        context.counters.instructions += 1;
        context.idle += 1;
        if let Some(lines) = &mut context.lines {
            lines[pc as usize].executed += 1;
        }
        if active == 0 {
            pc += 1;
            continue;
        }
        if let Some(named) = meet::named(&instruction.op) {
            let waiting = meet::by_mask(context, cta, warp, (pc, mask, active), (&instruction.op, named))?;
            pc += 1;
            if waiting != 0 {
                let splits = &mut cta.warps[warp].splits;
                splits.push(Split { parked: true, ..Split::new(pc - 1, waiting) });
                if waiting != mask {
                    splits.push(Split::new(pc, mask & !waiting));
                }
                return Ok(());
            }
            continue;
        }
        if instruction.op.is_collective() && !meet::all(cta, warp, (pc, mask, active), &instruction.op)? {
            cta.warps[warp].splits.push(Split { parked: true, ..Split::new(pc, mask) });
            return Ok(());
        }
        let serial = cta.serial;
        cta.warps[warp].touch(kernel, pc, serial).map_err(|fault| (pc, fault))?;
        let flow = step(context, cta, warp, (pc, active), &instruction.op).map_err(|fault| (pc, fault))?;
        let state = &mut cta.warps[warp];
        match flow {
            Flow::Next => pc += 1,
            Flow::Branch(target) if active == mask => pc = target,
            Flow::Branch(target) => {
                state.splits.push(Split::new(target, active));
                state.splits.push(Split::new(pc + 1, mask & !active));
                return Ok(());
            }
            Flow::Scatter(targets) => {
                let rest = mask & !active;
                let first = targets[active.trailing_zeros() as usize];
                let goes_on = targets.iter().enumerate().all(|(lane, to)| active >> lane & 1 == 0 || *to == first);
                if goes_on && rest == 0 {
                    pc = first;
                    continue;
                }
                for lane in (0..32).filter(|lane| active >> lane & 1 != 0) {
                    state.splits.push(Split::new(targets[lane], 1 << lane));
                }
                if rest != 0 {
                    state.splits.push(Split::new(pc + 1, rest));
                }
                return Ok(());
            }
            Flow::Exit => {
                exit(context, cta, warp, active).map_err(|fault| (pc, fault))?;
                if mask & !active != 0 {
                    cta.warps[warp].splits.push(Split::new(pc + 1, mask & !active));
                }
                return Ok(());
            }
            Flow::Yield => {
                state.splits.push(Split::new(pc + 1, mask));
                *turn = 0;
                return Ok(());
            }
            Flow::Block => {
                state.splits.push(Split::new(pc + 1, mask));
                return Ok(());
            }
            Flow::BlockLanes(id) => {
                state.splits.push(Split { barrier: Some(id), ..Split::new(pc + 1, active) });
                if active != mask {
                    state.splits.push(Split::new(pc + 1, mask & !active));
                }
                return Ok(());
            }
            Flow::Wait(wait) => {
                state.splits.push(Split { waits: Some(wait), ..Split::new(pc, active) });
                if active != mask {
                    state.splits.push(Split::new(pc + 1, mask & !active));
                }
                return Ok(());
            }
        }
    }
}

fn exit(context: &mut Context<'_>, cta: &mut Cta, warp: usize, lanes: u32) -> Outcome<()> {
    let state = &mut cta.warps[warp];
    // What an mbarrier is told of may be waited for by others.
    let owner = (cta.serial, warp as u32);
    let mut left: Vec<_> = state.copies.of_lanes(lanes).collect();
    left.retain(|(_, lane, epoch)| !context.arrives_for(owner, *lane, *epoch));
    if let Some((pc, lane, _)) = left.first() {
        let message = format!("{} asynchronous copies were never waited for", left.len());
        return Err(Fault { pc: Some(*pc), ..Fault::new(Rule::AsyncLeft, message) }.lane(*lane));
    }
    if state.wgmma.issued > state.wgmma.waited {
        let count = state.wgmma.issued - state.wgmma.waited;
        let message = format!("{count} wgmma operations were never waited for");
        return Err(Fault::new(Rule::AsyncLeft, message).lane(lanes.trailing_zeros()));
    }
    context.check_groups(cta, warp, lanes)?;
    let state = &mut cta.warps[warp];
    state.live &= !lanes;
    if state.live == 0 {
        cta.check_resized(warp)?;
    }
    let state = &mut cta.warps[warp];
    // Lanes that wait for the whole warp wait for fewer now.
    state.resume();
    context.idle = 0;
    if state.live == 0 {
        if let Some((pc, _)) = cta.warpgroups[warp / 4].waits() {
            let message =
                format!("warp {warp} exits while the others of its warpgroup wait for it at this instruction");
            return Err(Fault { pc: Some(pc), ..Fault::new(Rule::Diverged, message) });
        }
        for id in 0..cta.barriers.len() {
            cta.release_barrier(context, id)?;
        }
        let Warp { views, live, .. } = &cta.warps[warp];
        cta.exited.join(&views.published(u32::MAX, *live));
        if cta.warps.iter().all(|warp| warp.live == 0) {
            cta.check_end(context)?;
        }
    }
    cta.release_cluster(context);
    Ok(())
}
