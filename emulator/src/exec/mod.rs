//! Runs a launch: CTAs that come and go, warps that take turns at random, until all have exited or a rule is broken.

mod access;
mod bulk;
mod bytes;
mod call;
mod cluster;
mod collective;
mod copy;
mod count;
mod flags;
mod hopper;
mod issue;
mod matrix;
mod mbarrier;
mod meet;
mod operand;
mod pins;
mod registers;
mod space;
mod special;
mod step;
mod sync;
mod tensor;
mod views;
mod warp;
mod warpgroup;

use std::collections::{BTreeMap, HashMap};

use crate::clock::Clock;
use crate::counters::Counters;
use crate::isa::Instruction;
use crate::launch::{Checked, Launch, Options};
use crate::memory::Memory;
use crate::module::{Kernel, Module};
use crate::report::{Report, Rule, Site};
use crate::shadow::{Access, Clusters, Shadow, WGMMA};
use bulk::InFlight;
use cluster::ClusterBarrier;
use count::LineCount;
use flags::{Flag, Place};
use mbarrier::Mbarrier;
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
    /// Whose, when it is not the warp at hand: CTA and warp.
    by: Option<(u32, u32)>,
    /// The other side of a race.
    other: Option<Access>,
}

impl Fault {
    fn new(rule: Rule, message: impl Into<String>) -> Fault {
        Fault { rule, message: message.into(), lane: None, pc: None, by: None, other: None }
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
    /// Warps that something they wait for has let go.
    woken: Vec<WarpId>,
    /// CTAs alive, a cluster's next to each other; `None` while one of its warps has its turn.
    ctas: Vec<Option<Box<Cta>>>,
    /// By slot of the cluster's first CTA.
    cluster_barriers: HashMap<usize, ClusterBarrier>,
    /// Bulk copies that have not landed, or that their groups have not been waited for.
    in_flight: Vec<InFlight>,
    /// Instructions that have issued bulk copies.
    issues: u64,
    /// CTA and warp that issued the last operation of an agent that is not a warp's own.
    issuers: HashMap<(u32, u16), (u32, u32)>,
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
    /// Its place among the CTAs alive.
    slot: usize,
    index: [u32; 3],
    /// `%cluster_ctarank`.
    rank: u32,
    warps: Vec<Warp>,
    shared: Shared,
    barriers: Vec<Barrier>,
    /// By address.
    mbarriers: BTreeMap<u32, Mbarrier>,
    warpgroups: Vec<Warpgroup>,
    registers: RegisterPool,
    live_warps: usize,
    /// Agents so far: those of warps and warpgroups, then those of bulk copies, by need.
    agents: u16,
    /// What its warps knew when they exited, for accesses by others of the cluster.
    exited: Clock,
}

impl Cta {
    fn new(context: &Context<'_>, slot: usize, rank: u32, serial: u32) -> Cta {
        let [x, y, _] = context.launch.grid;
        let warps = context.threads.div_ceil(32);
        let bytes = context.shared_bytes as usize;
        // A warp and its copies; a warpgroup's matrix operations.
        let agents = 2 * warps + warps.div_ceil(4);
        Cta {
            serial,
            slot,
            index: [serial % x, serial / x % y, serial / x / y],
            rank,
            warps: (0..warps).map(|id| Warp::new(context, serial, id, agents as usize)).collect(),
            shared: Shared { data: vec![0; bytes], written: vec![0; bytes], shadow: Shadow::default() },
            barriers: (0..BARRIERS).map(|_| Barrier::default()).collect(),
            mbarriers: BTreeMap::new(),
            warpgroups: (0..warps.div_ceil(4)).map(|_| Warpgroup::default()).collect(),
            registers: RegisterPool::default(),
            live_warps: warps as usize,
            agents: agents as u16,
            exited: Clock::new(serial, 0),
        }
    }

    /// A new agent of this CTA: an asynchronous engine whose operations are numbered by its epochs, from 1.
    fn new_agent(&mut self) -> u16 {
        self.agents += 1;
        self.agents - 1
    }

    /// Lets a warp go on that has stopped.
    fn wake(&mut self, context: &mut Context<'_>, warp: usize) {
        if std::mem::take(&mut self.warps[warp].asleep) {
            context.woken.push((self.slot, warp));
        }
    }
}

/// A warp by its CTA's slot and its place in the CTA.
type WarpId = (usize, usize);

struct Machine<'a> {
    context: Context<'a>,
    module: &'a Module,
    /// Clusters that have not started, next one last.
    waiting: Vec<u32>,
    runnable: Vec<WarpId>,
    /// Instructions executed and idle when all waits were last told that their time is up, and how often in a row that
    /// has changed nothing.
    timeouts: (u64, u64, u32),
}

impl Module {
    /// Runs one launch to its end.
    ///
    /// # Errors
    /// The [`Report`] of the first broken rule. Memory then holds what had been written by that time.
    pub fn launch(&self, memory: &mut Memory, launch: &Launch<'_>, options: &Options) -> Result<Counters, Box<Report>> {
        let Checked { kernel, threads, ctas, shared_bytes, resident, cluster } = launch.check(self, options)?;
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
            clusters: Clusters { grid: launch.grid, cluster },
            lines: options.checks.counters.then(|| vec![LineCount::default(); kernel.code.len()]),
            random: options.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            counters: Counters { resident_ctas: resident, ..Counters::default() },
            idle: 0,
            woken: Vec::new(),
            ctas: Vec::new(),
            cluster_barriers: HashMap::new(),
            in_flight: Vec::new(),
            issues: 0,
            issuers: HashMap::new(),
        };
        let (waiting, runnable) = (Vec::new(), Vec::new());
        let mut machine = Machine { context, module: self, waiting, runnable, timeouts: (0, 0, 0) };
        machine.prepare(ctas, resident);
        machine.run()?;
        machine.context.sum_up(self);
        Ok(machine.context.counters)
    }
}

/// After so many rounds in which waits gave up and nothing else happened, nothing will.
const ROUNDS: u32 = 3;
/// Instructions without an effect after which a copy that is as lazy as can be lands all the same: someone may be polling.
const LAZY_PATIENCE: u64 = 1000;

impl Machine<'_> {
    /// Clusters start in any order: the hardware promises none.
    fn prepare(&mut self, ctas: u32, resident: u32) {
        let size = self.context.cluster_size();
        self.waiting = (0..ctas / size as u32).collect();
        for i in (1..self.waiting.len()).rev() {
            let j = self.context.random(i + 1);
            self.waiting.swap(i, j);
        }
        self.context.ctas.resize_with(resident as usize, || None);
        (0..resident as usize).step_by(size).for_each(|slot| self.start(slot));
    }

    /// Fills the slots of a cluster with the next one, if there is one.
    fn start(&mut self, slot: usize) {
        let Some(cluster) = self.waiting.pop() else { return };
        self.context.cluster_barriers.insert(slot, ClusterBarrier::default());
        for rank in 0..self.context.cluster_size() {
            let serial = self.context.serial(cluster, rank as u32);
            let cta = Cta::new(&self.context, slot + rank, rank as u32, serial);
            self.runnable.extend((0..cta.warps.len()).map(|warp| (slot + rank, warp)));
            self.context.ctas[slot + rank] = Some(Box::new(cta));
        }
    }

    fn run(&mut self) -> Result<(), Box<Report>> {
        while self.context.ctas.iter().any(Option::is_some) {
            if self.runnable.is_empty() {
                self.revive()?;
                continue;
            }
            let at = self.context.random(self.runnable.len());
            let (slot, warp) = self.runnable[at];
            let Some(mut cta) = self.context.ctas[slot].take() else { continue };
            let outcome = warp::run(&mut self.context, &mut cta, warp);
            let stop = match outcome {
                Ok(stop) => stop,
                Err((pc, fault)) => return Err(self.report(cta.serial, warp as u32, pc, fault)),
            };
            if stop != Stop::Runnable {
                self.runnable.swap_remove(at);
                cta.warps[warp].asleep = stop == Stop::Blocked;
            }
            if stop == Stop::Done {
                cta.live_warps -= 1;
            }
            let done = cta.live_warps == 0;
            if done {
                self.context.forget_flags(cta.serial);
            }
            self.context.ctas[slot] = Some(cta).filter(|_| !done);
            if done {
                let size = self.context.cluster_size();
                let first = slot / size * size;
                if self.context.ctas[first..first + size].iter().all(Option::is_none) {
                    self.start(first);
                }
            }
            self.land_some()?;
            if self.context.idle > self.context.options.patience {
                return Err(self.livelock(slot, warp));
            }
            let limit = self.context.options.limit;
            if self.context.counters.instructions > limit {
                let message = format!("not done after the limit of {limit} instructions:{}", self.table());
                return Err(self.simple_report(Rule::Livelock, message));
            }
        }
        // What stores and reductions had read lands at the latest now.
        while self.context.is_under_way() {
            self.land(0)?;
        }
        Ok(())
    }

    /// Between turns: bulk copies that land at once, and now and then another.
    fn land_some(&mut self) -> Result<(), Box<Report>> {
        while let Some(at) = self.context.due() {
            self.land(at)?;
        }
        let lazy = self.context.options.copies == crate::launch::Timing::Lazy;
        if self.context.is_under_way()
            && if lazy { self.context.idle > LAZY_PATIENCE } else { self.context.random(4) == 0 }
        {
            let at = self.context.random(usize::MAX);
            self.land(at)?;
        }
        self.runnable.append(&mut self.context.woken);
        Ok(())
    }

    /// Lets a copy land, counted from `at` around.
    fn land(&mut self, at: usize) -> Result<(), Box<Report>> {
        let landed = self.context.land(at);
        self.runnable.append(&mut self.context.woken);
        landed.map_err(|(owner, pc, fault)| self.report(owner.0, owner.1, pc, fault))
    }

    /// No warp can run: a copy lands, or waits that may give up do so.
    fn revive(&mut self) -> Result<(), Box<Report>> {
        if self.context.is_under_way() {
            let at = self.context.random(usize::MAX);
            return self.land(at);
        }
        let now = (self.context.counters.instructions, self.context.idle);
        let (instructions, idle, rounds) = self.timeouts;
        let nothing = now.0 - instructions == now.1.wrapping_sub(idle);
        let rounds = if nothing { rounds + 1 } else { 0 };
        self.timeouts = (now.0, now.1, rounds);
        if rounds < ROUNDS {
            for (slot, cta) in self.context.ctas.iter_mut().enumerate() {
                let Some(cta) = cta else { continue };
                let expired = cta.warps.iter_mut().enumerate().filter(|(_, warp)| warp.live != 0);
                self.runnable.extend(expired.filter_map(|(id, warp)| warp.expire().then_some((slot, id))));
            }
        }
        if self.runnable.is_empty() { Err(self.deadlock()) } else { Ok(()) }
    }

    /// One line per warp that is still there: where it is and what it waits for.
    fn table(&self) -> String {
        const MOST: usize = 64;
        let mut lines = Vec::new();
        for cta in self.context.ctas.iter().flatten() {
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

    /// Warps that wait for others of their warpgroup, which have gone past it and wait at a barrier of the CTA. What else
    /// holds the others up is a deadlock.
    fn diverged(&self) -> Option<Box<Report>> {
        let mut ctas = self.context.ctas.iter().flatten();
        let (cta, first, (pc, here)) = ctas.find_map(|cta| {
            let mut groups = cta.warpgroups.iter().enumerate();
            groups.find_map(|(group, state)| {
                let (pc, here) = state.waits()?;
                let mut missing = (0..4).filter(|warp| here >> warp & 1 == 0).map(|warp| &cta.warps[4 * group + warp]);
                missing.all(|warp| warp.blocked.is_some()).then_some((cta, 4 * group as u32, (pc, here)))
            })
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
        let started = self.context.ctas.iter().flatten().count();
        let waiting = self.waiting.len() * self.context.cluster_size();
        let message = format!("no warp can run; {started} CTAs alive, {waiting} not started:{}", self.table());
        self.simple_report(Rule::Deadlock, message)
    }

    fn livelock(&self, slot: usize, warp: usize) -> Box<Report> {
        let patience = self.context.options.patience;
        let message = format!(
            "{patience} instructions without an effect, the last by warp {warp} of CTA {:?}:{}",
            self.context.ctas[slot].as_ref().map(|cta| cta.index).unwrap_or_default(),
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

    fn report(&self, serial: u32, warp: u32, pc: u32, fault: Fault) -> Box<Report> {
        let (serial, warp) = fault.by.unwrap_or((serial, warp));
        let site = self.site(serial, warp, fault.lane, fault.pc.unwrap_or(pc));
        let other = fault.other.map(|access| match self.context.issuers.get(&(access.cta, access.agent)) {
            Some((cta, warp)) => self.site(*cta, *warp, None, access.pc),
            None => {
                let lane = Some(access.lanes.trailing_zeros()).filter(|lane| *lane < 32);
                let lane = lane.filter(|_| access.kind & WGMMA == 0);
                self.site(access.cta, self.warp_of(&access), lane, access.pc)
            }
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
