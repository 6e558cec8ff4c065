//! `wgmma`: operations of four warps together, that take place some time between being issued and being waited for.
//!
//! PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions". A warpgroup's operations are an agent of their own, whose
//! epochs count them. They read shared memory in the async proxy: B on behalf of all four warps, so that it must be ordered
//! before each warp's issue, and of A for each warp the rows whose sums it holds. The ISA does not say so of A;
//! kernels whose warps write a factor each for itself rely on the hardware for it. The warps meet at the instruction; that
//! orders no memory.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use super::operand::major;
use super::warp::Stall;
use super::{Clock, Context, Cta, Fault, Outcome};
use crate::alu::{self, Lanes};
use crate::clock::{Proxied, Proxy, View};
use crate::isa::{OperandA, ScaleD, Wgmma};
use crate::launch::Timing;
use crate::layout::Descriptor;
use crate::report::Rule;

/// A in registers is read when the operation is issued.
#[derive(Debug)]
enum SourceA {
    Rows(Box<alu::Rows>),
    Shared(Descriptor),
}

/// An operation that has not taken place.
#[derive(Debug)]
pub(super) struct Issued {
    pub serial: u32,
    pub pc: u32,
    pub op: Arc<Wgmma>,
    a: SourceA,
    pub b: Descriptor,
    accumulate: bool,
    /// What all four warps know, in the async proxy and in the generic one.
    pub known: View,
    /// What each of them knows, in the generic proxy and in the async one, when A is in shared memory.
    each: Option<Box<[Knowledge; 4]>>,
}

impl Issued {
    /// What the rows of A that a warp reads for itself are held against.
    pub fn known_by(&self, warp: usize) -> Option<View> {
        self.each.as_ref().map(|each| view(each[warp].clone(), self.known.agent, true))
    }
}

/// Clocks of the generic and of the async proxy.
type Knowledge = (Rc<Clock>, Rc<Clock>);

/// What the operations of a warpgroup's agent are held against.
fn view((generic, shared): Knowledge, agent: u16, by_part: bool) -> View {
    let proxied = Some(Rc::new(Proxied { clock: shared, own: (0, 0), fence_reads: false, by_part }));
    View { clock: generic, agent, lane: None, own: 0, waited: 0, proxied }
}

/// An accumulator in flight: its registers hold it again when they have been waited for.
#[derive(Debug)]
struct Chain {
    op: Arc<Wgmma>,
    /// The last operation upon it.
    serial: u32,
    sums: Vec<alu::Sums>,
    /// Warps that have waited for it.
    waited: u8,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Operands {
    a: Option<u64>,
    b: u64,
    accumulate: bool,
    /// Groups the warp has committed.
    groups: usize,
    /// The accumulator is in flight.
    continues: bool,
}

/// Warps that wait for the others at a `wgmma.mma_async`.
#[derive(Debug)]
struct Gathering {
    pc: u32,
    /// A bit for each warp that is here.
    warps: u8,
    operands: Operands,
}

/// Four warps, the first of which has a number that is a multiple of four.
#[derive(Debug, Default)]
pub(super) struct Warpgroup {
    gathering: Option<Gathering>,
    queue: VecDeque<Issued>,
    chains: Vec<Chain>,
    issued: u32,
}

impl Warpgroup {
    /// Where warps wait for others of the warpgroup, and which they are.
    pub fn waits(&self) -> Option<(u32, u8)> {
        self.gathering.as_ref().map(|gathering| (gathering.pc, gathering.warps))
    }
}

fn names(first: usize, warps: u8) -> String {
    let names: Vec<String> =
        (0..4).filter(|warp| warps >> warp & 1 != 0).map(|warp| (first + warp).to_string()).collect();
    names.join(", ")
}

impl Cta {
    /// The agent that a warpgroup's operations are.
    fn wgmma_agent(&self, warpgroup: usize) -> u16 {
        (2 * self.warps.len() + warpgroup) as u16
    }

    /// A warp reaches a `wgmma.mma_async`; `true` when it must wait for the others of its warpgroup.
    pub(super) fn wgmma(&mut self, context: &mut Context<'_>, warp: usize, pc: u32, op: &Arc<Wgmma>) -> Outcome<bool> {
        let (warpgroup, place) = (warp / 4, warp % 4);
        let first = 4 * warpgroup;
        if self.warps.len() < first + 4 {
            let message = format!("warp {warp} is not part of four whole warps, as wgmma needs them");
            return Err(Fault::new(Rule::Diverged, message));
        }
        if let Some(gone) = (first..first + 4).find(|warp| self.warps[*warp].live == 0) {
            return Err(Fault::new(Rule::Diverged, format!("warp {gone} of the warpgroup has exited")));
        }
        self.warps[warp].check_pins(context.kernel, op, self.serial)?;
        let operands = self.wgmma_operands(context, warp, op)?;
        let group = &mut self.warpgroups[warpgroup];
        let gathering = group.gathering.get_or_insert(Gathering { pc, warps: 0, operands });
        if gathering.pc != pc {
            let line = context.kernel.code[gathering.pc as usize].line;
            let others = names(first, gathering.warps);
            let message = format!("warps {others} of the warpgroup are at the wgmma of PTX line {line}");
            return Err(Fault::new(Rule::Diverged, message));
        }
        agree(&gathering.operands, &operands)?;
        gathering.warps |= 1 << place;
        if gathering.warps != 15 {
            self.warps[warp].stalled = Some(Stall::Warpgroup);
            return Ok(true);
        }
        group.gathering = None;
        for other in (first..first + 4).filter(|other| *other != warp) {
            self.warps[other].stalled = None;
            self.wake(context, other);
        }
        self.issue(context, warpgroup, pc, op, operands)?;
        Ok(false)
    }

    fn wgmma_operands(&self, context: &Context<'_>, warp: usize, op: &Wgmma) -> Outcome<Operands> {
        let state = &self.warps[warp];
        let uniform = |what: &str, source| {
            let lanes = state.read(context, self, source);
            match lanes.iter().position(|lane| *lane != lanes[0]) {
                Some(lane) => {
                    let message = format!("the descriptor of {what} differs: {:#x} and {:#x}", lanes[0], lanes[lane]);
                    Err(Fault::new(Rule::BadDescriptor, message).lane(lane as u32))
                }
                None => Ok(lanes[0]),
            }
        };
        let checked = |what: &str, bits: u64, trans: bool, rows: u32| {
            let check = Descriptor::new(bits).check(major(trans), rows);
            check.map_err(|error| Fault::new(Rule::BadDescriptor, format!("descriptor {bits:#x} of {what}: {error}")))
        };
        let a = match op.a {
            OperandA::Descriptor(source) => {
                let bits = uniform("A", source)?;
                checked("A", bits, op.trans_a, 64)?;
                Some(bits)
            }
            OperandA::Registers(_) => None,
        };
        let b = uniform("B", op.b)?;
        checked("B", b, op.trans_b, u32::from(op.n))?;
        let accumulate = match op.scale_d {
            ScaleD::Const(value) => value,
            ScaleD::Pred(p) => match state.predicate(p) {
                0 => false,
                u32::MAX => true,
                lanes => {
                    let message = format!("scale-d is true in the lanes {lanes:#010x} only");
                    return Err(Fault::new(Rule::Diverged, message));
                }
            },
        };
        let continues = state.wgmma.continues(context.kernel, op);
        Ok(Operands { a, b, accumulate, groups: state.wgmma.groups.len(), continues })
    }

    /// All four warps are here.
    fn issue(
        &mut self,
        context: &mut Context<'_>,
        warpgroup: usize,
        pc: u32,
        op: &Arc<Wgmma>,
        operands: Operands,
    ) -> Outcome<()> {
        let first = 4 * warpgroup;
        let warps = &self.warps[first..first + 4];
        let serial = self.warpgroups[warpgroup].issued + 1;
        let each: [Knowledge; 4] = std::array::from_fn(|warp| warps[warp].views.known(warps[warp].live, Proxy::Shared));
        let (mut generic, mut shared) = each[0].clone();
        for (theirs_generic, theirs_shared) in &each[1..] {
            Rc::make_mut(&mut generic).meet(theirs_generic);
            Rc::make_mut(&mut shared).meet(theirs_shared);
        }
        let known = view((generic, shared), self.wgmma_agent(warpgroup), false);
        let each = operands.a.map(|_| Box::new(each));
        let a = match (op.a, operands.a) {
            (OperandA::Registers(slots), _) => SourceA::Rows(rows_of(warps, slots, op)),
            (_, bits) => SourceA::Shared(Descriptor::new(bits.unwrap_or_default())),
        };
        // Overlapping accumulators in flight that are not the same one are excluded by `check_pins`, up to their order.
        let group = &self.warpgroups[warpgroup];
        let chain = group.chains.iter().position(|chain| operands.continues && chain.op.d == op.d);
        if operands.continues && chain.is_none() {
            let message = "the accumulator is in flight with its registers in another order: not implemented";
            return Err(Fault::new(Rule::InFlight, message));
        }
        let chain = chain.unwrap_or_else(|| {
            let sums = sums_of(warps, op, operands.accumulate);
            let group = &mut self.warpgroups[warpgroup];
            group.chains.push(Chain { op: Arc::clone(op), serial, sums, waited: 0 });
            group.chains.len() - 1
        });
        let group = &mut self.warpgroups[warpgroup];
        (group.issued, group.chains[chain].serial) = (serial, serial);
        let b = Descriptor::new(operands.b);
        let op = Arc::clone(op);
        for warp in &mut self.warps[first..first + 4] {
            warp.wgmma.fly(context.kernel, &op, pc);
            // What the warps do after this must not count as ordered before the operation.
            warp.views.next_epoch();
        }
        let accumulate = operands.accumulate;
        group.queue.push_back(Issued { serial, pc, op, a, b, accumulate, known, each });
        context.idle = 0;
        let eager = match context.options.copies {
            Timing::Eager => true,
            Timing::Lazy => false,
            Timing::Mixed => context.random(2) == 0,
        };
        if eager {
            self.execute_upto(context, warpgroup, serial)?;
        }
        Ok(())
    }

    /// `wgmma.commit_group`
    pub(super) fn wgmma_commit(&mut self, warp: usize) {
        let wgmma = &mut self.warps[warp].wgmma;
        wgmma.groups.push(wgmma.issued);
    }

    /// `wgmma.wait_group`: until at most `pending` of the groups that the warp has committed are in flight. What has been
    /// waited for is visible to the generic proxy.
    pub(super) fn wgmma_wait(&mut self, context: &mut Context<'_>, warp: usize, pending: u32) -> Outcome<()> {
        let groups = &self.warps[warp].wgmma.groups;
        let last = groups.len().checked_sub(pending as usize + 1);
        let Some(complete) = last.map(|last| groups[last]) else { return Ok(()) };
        let warpgroup = warp / 4;
        if self.warps[warp].wgmma.waited >= complete {
            return Ok(());
        }
        self.execute_upto(context, warpgroup, complete)?;
        let bit = 1 << (warp % 4);
        let (state, group) = (&mut self.warps[warp], &mut self.warpgroups[warpgroup]);
        for chain in group.chains.iter_mut().filter(|chain| chain.serial <= complete && chain.waited & bit == 0) {
            chain.waited |= bit;
            let (per_panel, in_f16) = if chain.op.d_f16 { (2, true) } else { (4, false) };
            for (registers, sums) in chain.op.d.chunks(per_panel).zip(&chain.sums) {
                for (register, slot) in registers.iter().enumerate() {
                    state.registers[*slot as usize] = alu::store(sums, warp % 4, in_f16, register);
                }
            }
        }
        group.chains.retain(|chain| chain.waited != 15);
        state.wgmma.land(complete);
        let agent = self.wgmma_agent(warpgroup);
        self.warps[warp].views.learn_async(self.serial, agent, complete);
        Ok(())
    }

    /// Lets the next operation of the warp's warpgroup take place, if there is one.
    pub(super) fn execute_one(&mut self, context: &mut Context<'_>, warp: usize) -> Outcome<()> {
        let warpgroup = warp / 4;
        match self.warpgroups.get(warpgroup).and_then(|group| group.queue.front()) {
            Some(next) => {
                let serial = next.serial;
                self.execute_upto(context, warpgroup, serial)
            }
            None => Ok(()),
        }
    }

    fn execute_upto(&mut self, context: &mut Context<'_>, warpgroup: usize, serial: u32) -> Outcome<()> {
        while self.warpgroups[warpgroup].queue.front().is_some_and(|issued| issued.serial <= serial) {
            let Some(issued) = self.warpgroups[warpgroup].queue.pop_front() else { break };
            let place = |fault: Fault| Fault { pc: Some(issued.pc), ..fault };
            let op = &issued.op;
            let group = &mut self.warpgroups[warpgroup];
            let chain = group.chains.iter().position(|chain| chain.op.d == op.d && chain.waited == 0);
            let Some(chain) = chain else { continue };
            let mut sums = std::mem::take(&mut group.chains[chain].sums);
            if !issued.accumulate {
                sums.iter_mut().for_each(|sums| sums.as_flattened_mut().fill(0.0));
            }
            let shared;
            let a = match &issued.a {
                SourceA::Rows(rows) => &**rows,
                SourceA::Shared(descriptor) => {
                    shared = self.read_a(context, &issued, descriptor).map_err(place)?;
                    &shared
                }
            };
            for (panel, sums) in sums.iter_mut().enumerate() {
                let b = self.read_b(context, &issued, panel as u32).map_err(place)?;
                alu::accumulate(sums, a, &b, op.d_f16);
            }
            self.warpgroups[warpgroup].chains[chain].sums = sums;
            context.counters.wgmma += 1;
            context.counters.shared_loaded += if matches!(issued.a, SourceA::Shared(_)) { 2048 } else { 0 };
            context.counters.shared_loaded += 32 * u64::from(op.n);
        }
        Ok(())
    }
}

/// The operands of all warps of the warpgroup must be the same.
fn agree(theirs: &Operands, ours: &Operands) -> Outcome<()> {
    let differ = |what: &str, theirs: u64, ours: u64| {
        let message = format!("the descriptor of {what} is {ours:#x}, in other warps of the warpgroup {theirs:#x}");
        Err(Fault::new(Rule::BadDescriptor, message))
    };
    if theirs.a != ours.a {
        return differ("A", theirs.a.unwrap_or_default(), ours.a.unwrap_or_default());
    }
    if theirs.b != ours.b {
        return differ("B", theirs.b, ours.b);
    }
    let what = if theirs.accumulate != ours.accumulate {
        "scale-d differs"
    } else if theirs.groups != ours.groups {
        "the number of groups committed differs"
    } else if theirs.continues != ours.continues {
        "whether the accumulator has been waited for differs"
    } else {
        return Ok(());
    };
    Err(Fault::new(Rule::Diverged, format!("{what} between warps of the warpgroup")))
}

/// A out of registers: those of 0 and 1 hold the first eight columns of rows g and g + 8, those of 2 and 3 the next eight.
fn rows_of(warps: &[super::warp::Warp], slots: [u16; 4], op: &Wgmma) -> Box<alu::Rows> {
    let mut rows = Box::new([[0.0; 16]; 64]);
    for (warp, state) in warps.iter().enumerate() {
        for (register, slot) in slots.iter().enumerate() {
            for (lane, value) in state.registers[*slot as usize].iter().enumerate() {
                let (row, k) = crate::layout::operand_a((32 * warp + lane) as u32, 2 * register as u32);
                rows[row as usize][k as usize..k as usize + 2].copy_from_slice(&alu::widen2(
                    op.ab,
                    *value,
                    op.negate_a,
                ));
            }
        }
    }
    rows
}

fn sums_of(warps: &[super::warp::Warp], op: &Wgmma, accumulate: bool) -> Vec<alu::Sums> {
    let mut sums = vec![[[0.0; 8]; 64]; usize::from(op.n) / 8];
    if accumulate {
        let per_panel = if op.d_f16 { 2 } else { 4 };
        for (warp, state) in warps.iter().enumerate() {
            for (sums, slots) in sums.iter_mut().zip(op.d.chunks(per_panel)) {
                let registers: Vec<&Lanes> = slots.iter().map(|slot| &state.registers[*slot as usize]).collect();
                alu::load(sums, warp, &registers);
            }
        }
    }
    sums
}
