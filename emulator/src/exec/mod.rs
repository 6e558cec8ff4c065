//! Runs a launch: CTAs that come and go, warps that take turns at random, until all have exited or a rule is broken.

mod access;
mod call;
mod collective;
mod copy;
mod count;
mod flags;
mod matrix;
mod pins;
mod registers;
mod step;
mod sync;
mod views;
mod warp;
mod warpgroup;

use std::collections::BTreeMap;

use crate::clock::Clock;
use crate::counters::Counters;
use crate::isa::Instruction;
use crate::launch::{Checked, Launch, Options};
use crate::memory::Memory;
use crate::module::{Kernel, Module};
use crate::report::{Report, Rule, Site};
use crate::shadow::{Access, Clusters, Shadow, WGMMA};
use count::LineCount;
use flags::{Flag, Place};
use registers::RegisterPool;
use sync::Barrier;
use warp::{Stop, Warp};
use warpgroup::Warpgroup;

/// Barriers of a CTA (PTX ISA, "bar, barrier").
const BARRIERS: usize = 16;

/// A broken rule, before it is known where.
#[derive(Debug)]
pub(crate) struct Fault {
    rule: Rule,
    message: String,
    lane: Option<u32>,
    /// Where, when it is not the instruction at hand.
    pc: Option<u32>,
    /// The other side of a race.
    other: Option<Access>,
}

impl Fault {
    fn new(rule: Rule, message: impl Into<String>) -> Fault {
        Fault { rule, message: message.into(), lane: None, pc: None, other: None }
    }

    fn lane(self, lane: u32) -> Fault {
        Fault { lane: Some(lane), ..self }
    }
}

type Outcome<T> = Result<T, Fault>;

/// What all CTAs share.
struct Context<'a> {
    kernel: &'a Kernel,
    launch: &'a Launch<'a>,
    options: &'a Options,
    memory: &'a mut Memory,
    threads: u32,
    shared_bytes: u32,
    flags: BTreeMap<Place, Flag>,
    clusters: Clusters,
    random: u64,
    counters: Counters,
    /// By instruction, when counters are asked for.
    lines: Option<Vec<LineCount>>,
    /// Instructions since the last one with an effect outside its warp.
    idle: u64,
    /// Warps of the CTA at hand that a barrier has let go.
    woken: Vec<usize>,
}

impl Context<'_> {
    /// Xorshift: repeatable, and good enough to shuffle with.
    fn random(&mut self, below: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) as usize % below.max(1)
    }
}

/// Shared memory of a CTA; offset 0 is address [`SHARED_BASE`](crate::decode::SHARED_BASE).
struct Shared {
    data: Vec<u8>,
    /// One byte per byte: 0 while unwritten.
    written: Vec<u8>,
    shadow: Shadow,
}

struct Cta {
    serial: u32,
    index: [u32; 3],
    warps: Vec<Warp>,
    shared: Shared,
    barriers: Vec<Barrier>,
    warpgroups: Vec<Warpgroup>,
    registers: RegisterPool,
    live_warps: usize,
}

impl Cta {
    fn new(context: &Context<'_>, serial: u32) -> Cta {
        let [x, y, _] = context.launch.grid;
        let warps = context.threads.div_ceil(32);
        let bytes = context.shared_bytes as usize;
        // A warp and its copies; a warpgroup's matrix operations.
        let agents = 2 * warps + warps.div_ceil(4);
        Cta {
            serial,
            index: [serial % x, serial / x % y, serial / x / y],
            warps: (0..warps).map(|id| Warp::new(context, serial, id, agents as usize)).collect(),
            shared: Shared { data: vec![0; bytes], written: vec![0; bytes], shadow: Shadow::default() },
            barriers: (0..BARRIERS).map(|_| Barrier::default()).collect(),
            warpgroups: (0..warps.div_ceil(4)).map(|_| Warpgroup::default()).collect(),
            registers: RegisterPool::default(),
            live_warps: warps as usize,
        }
    }
}

/// A warp by its CTA's slot and its place in the CTA.
type WarpId = (usize, usize);

struct Machine<'a> {
    context: Context<'a>,
    module: &'a Module,
    slots: Vec<Option<Cta>>,
    /// CTAs that have not started, next one last.
    waiting: Vec<u32>,
    runnable: Vec<WarpId>,
}

impl Module {
    /// Runs one launch to its end.
    ///
    /// # Errors
    /// The [`Report`] of the first broken rule. Memory then holds what had been written by that time.
    pub fn launch(&self, memory: &mut Memory, launch: &Launch<'_>, options: &Options) -> Result<Counters, Box<Report>> {
        let Checked { kernel, threads, ctas, shared_bytes, resident } = launch.check(self, options)?;
        memory.clear_shadow();
        self.load(memory).map_err(|message| launch.bad(message))?;
        let context = Context {
            kernel,
            launch,
            options,
            memory,
            threads,
            shared_bytes,
            flags: BTreeMap::new(),
            clusters: Clusters { grid: launch.grid, cluster: launch.cluster },
            lines: options.checks.counters.then(|| vec![LineCount::default(); kernel.code.len()]),
            random: options.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            counters: Counters { resident_ctas: resident, ..Counters::default() },
            idle: 0,
            woken: Vec::new(),
        };
        let mut machine =
            Machine { context, module: self, slots: Vec::new(), waiting: Vec::new(), runnable: Vec::new() };
        machine.prepare(ctas, resident);
        machine.run()?;
        machine.context.sum_up(self);
        Ok(machine.context.counters)
    }
}

impl Machine<'_> {
    /// CTAs start in any order: the hardware promises none.
    fn prepare(&mut self, ctas: u32, resident: u32) {
        self.waiting = (0..ctas).collect();
        for i in (1..self.waiting.len()).rev() {
            let j = self.context.random(i + 1);
            self.waiting.swap(i, j);
        }
        self.slots.resize_with(resident as usize, || None);
        (0..self.slots.len()).for_each(|slot| self.start(slot));
    }

    /// Fills a slot with the next CTA, if there is one.
    fn start(&mut self, slot: usize) {
        self.slots[slot] = self.waiting.pop().map(|serial| Cta::new(&self.context, serial));
        if let Some(cta) = &self.slots[slot] {
            self.runnable.extend((0..cta.warps.len()).map(|warp| (slot, warp)));
        }
    }

    fn run(&mut self) -> Result<(), Box<Report>> {
        while self.slots.iter().any(Option::is_some) {
            if self.runnable.is_empty() {
                return Err(self.deadlock());
            }
            let at = self.context.random(self.runnable.len());
            let (slot, warp) = self.runnable[at];
            let Some(cta) = &mut self.slots[slot] else { continue };
            let stop = match warp::run(&mut self.context, cta, warp) {
                Ok(stop) => stop,
                Err((pc, fault)) => return Err(self.report(slot, warp, pc, fault)),
            };
            if stop != Stop::Runnable {
                self.runnable.swap_remove(at);
            }
            if stop == Stop::Done {
                cta.live_warps -= 1;
                if cta.live_warps == 0 {
                    self.start(slot);
                }
            }
            self.runnable.extend(self.context.woken.drain(..).map(|warp| (slot, warp)));
            if self.context.idle > self.context.options.patience {
                return Err(self.livelock(slot, warp));
            }
            let limit = self.context.options.limit;
            if self.context.counters.instructions > limit {
                let message = format!("not done after the limit of {limit} instructions:{}", self.table());
                return Err(self.simple_report(Rule::Livelock, message));
            }
        }
        Ok(())
    }

    /// One line per warp that is still there: where it is and what it waits for.
    fn table(&self) -> String {
        const MOST: usize = 64;
        let mut lines = Vec::new();
        for cta in self.slots.iter().flatten() {
            for warp in &cta.warps {
                lines.extend(warp.describe(&self.context, cta));
            }
        }
        let more = lines.len().saturating_sub(MOST);
        lines.truncate(MOST);
        if more > 0 {
            lines.push(format!("\n    and {more} more"));
        }
        lines.concat()
    }

    /// Warps that wait for others of their warpgroup, which will never come.
    fn diverged(&self) -> Option<Box<Report>> {
        let mut ctas = self.slots.iter().flatten();
        let (cta, first, (pc, here)) = ctas.find_map(|cta| {
            let mut groups = cta.warpgroups.iter().enumerate();
            groups.find_map(|(group, state)| Some((cta, 4 * group as u32, state.waits()?)))
        })?;
        let missing: Vec<String> =
            (0..4).filter(|warp| here >> warp & 1 == 0).map(|warp| (first + warp).to_string()).collect();
        let message =
            format!("warps {} of the warpgroup never reach it; no warp can run:{}", missing.join(", "), self.table());
        let site = Some(self.site(cta.serial, first + here.trailing_zeros(), None, pc));
        Some(Box::new(Report { site, ..*self.simple_report(Rule::Diverged, message) }))
    }

    fn deadlock(&self) -> Box<Report> {
        if let Some(report) = self.diverged() {
            return report;
        }
        let started = self.slots.iter().flatten().count();
        let message =
            format!("no warp can run; {started} CTAs alive, {} not started:{}", self.waiting.len(), self.table());
        self.simple_report(Rule::Deadlock, message)
    }

    fn livelock(&self, slot: usize, warp: usize) -> Box<Report> {
        let patience = self.context.options.patience;
        let message = format!(
            "{patience} instructions without an effect, the last by warp {warp} of CTA {:?}:{}",
            self.slots[slot].as_ref().map(|cta| cta.index).unwrap_or_default(),
            self.table()
        );
        self.simple_report(Rule::Livelock, message)
    }

    fn simple_report(&self, rule: Rule, message: String) -> Box<Report> {
        Box::new(Report { rule, kernel: self.context.kernel.name.clone(), message, site: None, other: None })
    }

    fn site(&self, cta: u32, warp: u32, lane: Option<u32>, pc: u32) -> Site {
        let Instruction { line, location, text, .. } = &self.context.kernel.code[pc as usize];
        let [x, y, _] = self.context.launch.grid;
        Site {
            cta: [cta % x, cta / x % y, cta / x / y],
            warp,
            lane,
            ptx_line: *line,
            instruction: text.to_string(),
            source: self.module.source_line(*location),
        }
    }

    /// The warp whose access it was; the first one of a warpgroup.
    fn warp_of(&self, access: &Access) -> u32 {
        let (agent, warps) = (u32::from(access.agent), self.context.threads.div_ceil(32));
        if access.kind & WGMMA != 0 { 4 * (agent - 2 * warps) } else { agent / 2 }
    }

    fn report(&self, slot: usize, warp: usize, pc: u32, fault: Fault) -> Box<Report> {
        let serial = self.slots[slot].as_ref().map_or(0, |cta| cta.serial);
        let site = self.site(serial, warp as u32, fault.lane, fault.pc.unwrap_or(pc));
        let other = fault.other.map(|access| {
            let lane = Some(access.lanes.trailing_zeros()).filter(|lane| *lane < 32);
            let lane = lane.filter(|_| access.kind & WGMMA == 0);
            self.site(access.cta, self.warp_of(&access), lane, access.pc)
        });
        Box::new(Report {
            rule: fault.rule,
            kernel: self.context.kernel.name.clone(),
            message: fault.message,
            site: Some(site),
            other,
        })
    }
}
