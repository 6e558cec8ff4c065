//! mbarrier objects. PTX ISA, "Parallel Synchronization and Communication: mbarrier".

use std::collections::HashMap;
use std::fmt::Write;

use super::warp::{Flow, Wait, Warp};
use super::{Clock, Context, Cta, Fault, Outcome};
use crate::alu::Lanes;
use crate::clock::{Proxy, View};
use crate::isa::{Mbarrier as Instruction, MbarrierKind, Order, Scope};
use crate::report::Rule;
use crate::shadow::{ATOMIC, Access, TOGETHER, UPDATE, WRITE};

/// Counts and transaction counts reach from 1 (or minus this) to this.
const MOST: i64 = (1 << 20) - 1;
/// Bits of a state below the number of its phase: the pending count.
const PENDING_BITS: u32 = 24;
/// What `Shared::written` holds for the bytes of a live mbarrier.
const LIVE: u8 = 4;

#[derive(Debug)]
pub(super) struct Mbarrier {
    /// Arrivals of a phase.
    expected: i64,
    pending: i64,
    tx: i64,
    /// Phases that are complete.
    phase: u64,
    init: Access,
    /// What the arrivals of this phase have released.
    arriving: Option<Clock>,
    /// What those of the last phase had.
    done: Option<Clock>,
    /// The agent that bulk copies which complete here belong to: CTA and agent.
    agent: Option<(u32, u16)>,
    /// Number of the last such copies, those of one instruction having the same, that instruction, and what is under way.
    issued: u32,
    issue: u64,
    under_way: Vec<u32>,
    /// By warp and lane: the phase in which a test has failed and that is waited for since.
    failed: HashMap<(usize, u32), u64>,
    /// Bytes of bulk copies that no test has seen complete, and the last copy's instruction, warp and CTA.
    unseen: Option<(u32, (u32, u32))>,
}

/// A lane, or an operation it issues, that uses an mbarrier.
pub(super) struct User {
    pub access: Access,
    pub view: View,
    /// What it knows of initialisations that were fenced.
    pub inits: View,
}

fn misuse<T>(message: impl Into<String>) -> Outcome<T> {
    Err(Fault::new(Rule::MbarrierMisuse, message))
}

/// A use that its initialisation does not happen before.
fn unordered(address: u64, init: Access, in_generic: bool) -> Fault {
    let how = if in_generic { "is ordered in the generic proxy only" } else { "is not ordered" };
    let message = format!("use of the mbarrier at {address:#x} {how} after its initialisation");
    Fault { other: Some(init), ..Fault::new(Rule::Race, message) }
}

impl Mbarrier {
    pub fn describe(&self) -> String {
        let Mbarrier { phase, pending, expected, tx, .. } = self;
        let mut text = format!("phase {phase}, {pending} of {expected} arrivals pending, {tx} bytes expected");
        if !self.under_way.is_empty() {
            // Writing to a String cannot fail.
            let _ = write!(text, ", {} copies under way", self.under_way.len());
        }
        text
    }

    fn transact(&mut self, bytes: i64) -> Outcome<()> {
        self.tx += bytes;
        if self.tx.abs() > MOST {
            return misuse(format!("transaction count {} is out of range, expected at most {MOST}", self.tx));
        }
        Ok(())
    }

    fn release(&mut self, clock: &Clock) {
        match &mut self.arriving {
            Some(arriving) => arriving.join(clock),
            None => self.arriving = Some(clock.clone()),
        }
    }

    fn arrive(&mut self, count: i64) -> Outcome<()> {
        if !(1..=MOST).contains(&count) {
            return misuse(format!("an arrival with count {count}, expected 1 to {MOST}"));
        }
        if count > self.pending {
            return misuse(format!("{count} arrivals at an mbarrier that expects {} more in its phase", self.pending));
        }
        self.pending -= count;
        Ok(())
    }
}

impl Cta {
    /// Refuses plain accesses to the bytes of a live mbarrier.
    pub(super) fn refuse_mbarrier(&self, address: u64, bytes: usize) -> Outcome<()> {
        let offset = self.shared_offset(address, bytes)?;
        // This runs for every byte that is written.
        match self.shared.written[offset..offset + bytes].iter().position(|&written| written == LIVE) {
            Some(at) => {
                let at = (address + at as u64) & !7;
                misuse(format!("a plain access to the mbarrier at shared address {at:#x}"))
            }
            None => Ok(()),
        }
    }

    fn mbarrier_mut(&mut self, address: u64) -> Outcome<&mut Mbarrier> {
        if !address.is_multiple_of(8) {
            return Err(Fault::new(Rule::Misaligned, format!("an mbarrier of 8 bytes at {address:#x}")));
        }
        self.shared_offset(address, 8)?;
        match self.mbarriers.get_mut(&(address as u32)) {
            Some(mbarrier) => Ok(mbarrier),
            None => misuse(format!("no mbarrier has been initialised at shared address {address:#x}")),
        }
    }

    fn init_mbarrier(&mut self, context: &mut Context<'_>, address: u64, count: i64, user: &User) -> Outcome<()> {
        if !address.is_multiple_of(8) {
            return Err(Fault::new(Rule::Misaligned, format!("an mbarrier of 8 bytes at {address:#x}")));
        }
        if !(1..=MOST).contains(&count) {
            return misuse(format!("an mbarrier for {count} arrivals, expected 1 to {MOST}"));
        }
        let offset = self.shared_offset(address, 8)?;
        self.refuse_mbarrier(address, 8)
            .or_else(|_| misuse(format!("the mbarrier at {address:#x} is initialised again without mbarrier.inval")))?;
        self.check_shared(context, (offset, 8), user.access, &user.view, false)?;
        self.shared.written[offset..offset + 8].fill(LIVE);
        let mbarrier = Mbarrier {
            expected: count,
            pending: count,
            tx: 0,
            phase: 0,
            init: Access { bytes: u16::MAX, ..user.access },
            arriving: None,
            done: None,
            agent: None,
            issued: 0,
            issue: 0,
            under_way: Vec::new(),
            failed: HashMap::new(),
            unseen: None,
        };
        self.mbarriers.insert(address as u32, mbarrier);
        Ok(())
    }

    fn invalidate_mbarrier(&mut self, context: &mut Context<'_>, address: u64, user: &User) -> Outcome<()> {
        let mbarrier = self.mbarrier_mut(address)?;
        if mbarrier.tx != 0 || !mbarrier.under_way.is_empty() {
            return misuse(format!("mbarrier.inval in use: {}", mbarrier.describe()));
        }
        let offset = self.shared_offset(address, 8)?;
        let access = Access { kind: WRITE, ..user.access };
        self.check_shared(context, (offset, 8), access, &user.view, false)?;
        self.mbarriers.remove(&(address as u32));
        self.shared.written[offset..offset + 8].fill(0);
        Ok(())
    }

    /// An operation on a live mbarrier, which must be ordered after its initialisation and before what ends it.
    fn use_mbarrier(&mut self, context: &mut Context<'_>, address: u64, user: &User) -> Outcome<()> {
        self.after_init(context, address, user)?;
        let offset = self.shared_offset(address, 8)?;
        self.check_shared(context, (offset, 8), user.access, &user.view, false)
    }

    fn after_init(&mut self, context: &Context<'_>, address: u64, user: &User) -> Outcome<()> {
        let init = self.mbarrier_mut(address)?.init;
        if context.options.checks.races && !user.view.covers(&init) && !user.inits.covers(&init) {
            let fenced = user.view.proxied.is_some() && user.view.covers_generically(&init);
            return Err(unordered(address, init, fenced));
        }
        Ok(())
    }

    /// A lane as a user of mbarriers.
    pub(super) fn mbarrier_user(&self, warp: usize, lane: u32, pc: u32) -> User {
        let views = &self.warps[warp].views;
        let access = views.access(self.serial, pc, UPDATE | WRITE | ATOMIC).of_lane(lane);
        User { access, view: views.view(lane), inits: views.in_proxy(lane, Proxy::Inits, false) }
    }

    /// A bulk copy is issued that completes here, by an access through the asynchronous proxy or, for `st.async`, the generic
    /// one. Returns its agent and number.
    pub(super) fn expect_copy(
        &mut self,
        context: &mut Context<'_>,
        address: u64,
        user: &User,
    ) -> Outcome<((u32, u16), u32)> {
        self.after_init(context, address, user)?;
        let agent = match self.mbarrier_mut(address)?.agent {
            Some(agent) => agent,
            None => (self.serial, self.new_agent()),
        };
        let mbarrier = self.mbarrier_mut(address)?;
        mbarrier.agent = Some(agent);
        mbarrier.issued += u32::from(std::mem::replace(&mut mbarrier.issue, context.issues) != context.issues);
        mbarrier.under_way.push(mbarrier.issued);
        Ok((agent, mbarrier.issued))
    }

    /// A bulk copy has landed.
    pub(super) fn complete_copy(
        &mut self,
        context: &mut Context<'_>,
        address: u64,
        number: u32,
        bytes: u32,
        site: (u32, (u32, u32)),
    ) -> Outcome<()> {
        let mbarrier = self.mbarrier_mut(address)?;
        if let Some(at) = mbarrier.under_way.iter().position(|other| *other == number) {
            mbarrier.under_way.swap_remove(at);
        }
        mbarrier.unseen = Some(site);
        mbarrier.transact(-i64::from(bytes))?;
        self.complete_phase(context, address)
    }

    /// Arrives for the copies of a lane that have landed (`cp.async.mbarrier.arrive`).
    pub(super) fn arrive_for_copies(&mut self, context: &mut Context<'_>, address: u64, landed: &Clock) -> Outcome<()> {
        let mbarrier = self.mbarrier_mut(address)?;
        mbarrier.release(landed);
        mbarrier.arrive(1)?;
        self.complete_phase(context, address)
    }

    /// Ends the phase when nothing is pending, and wakes who waits for that.
    fn complete_phase(&mut self, context: &mut Context<'_>, address: u64) -> Outcome<()> {
        context.idle = 0;
        let serial = self.serial;
        let mbarrier = self.mbarrier_mut(address)?;
        if mbarrier.pending != 0 || mbarrier.tx != 0 {
            return Ok(());
        }
        mbarrier.phase += 1;
        mbarrier.pending = mbarrier.expected;
        let mut done = mbarrier.arriving.take().unwrap_or_else(|| Clock::new(serial, 0));
        if let Some((cta, agent)) = mbarrier.agent {
            let known = mbarrier.under_way.iter().map(|number| number - 1).min().unwrap_or(mbarrier.issued);
            done.learn_async(cta, agent, known);
        }
        mbarrier.done = Some(done);
        for warp in 0..self.warps.len() {
            if self.warps[warp].stop_waiting(Wait::Mbarrier(address as u32)) {
                self.wake(context, warp);
            }
        }
        Ok(())
    }

    /// Everything but tests, for one lane. Returns the state before an arrival.
    pub(super) fn mbarrier(
        &mut self,
        context: &mut Context<'_>,
        (warp, lane, pc): (usize, u32, u32),
        op: &Instruction,
        (address, value): (u64, u64),
    ) -> Outcome<u64> {
        let user = self.mbarrier_user(warp, lane, pc);
        // A release of CTA scope says nothing to another CTA; one that names no scope is taken to reach its mbarrier.
        let remote = self.other_rank(address).is_some();
        let releases = op.order == Order::Release && !(remote && op.scope == Some(Scope::Cta));
        let views = &self.warps[warp].views;
        let released: Vec<Clock> = match op.kind {
            MbarrierKind::Arrive { .. } if releases => vec![views.published(1 << lane, u32::MAX)],
            MbarrierKind::Arrive { .. } => {
                let reaches = |scope: Scope| !remote || scope != Scope::Cta;
                views.fenced_by(1 << lane).filter(|(_, scope)| reaches(*scope)).map(|(clock, _)| clock).collect()
            }
            _ => Vec::new(),
        };
        let count = i64::from(value as u32);
        self.on(context, address, |cta, context, at| {
            match op.kind {
                MbarrierKind::Init => return cta.init_mbarrier(context, at, count, &user).map(|()| 0),
                MbarrierKind::Inval => return cta.invalidate_mbarrier(context, at, &user).map(|()| 0),
                _ => {}
            }
            cta.use_mbarrier(context, at, &user)?;
            let mbarrier = cta.mbarrier_mut(at)?;
            let state = mbarrier.phase << PENDING_BITS | mbarrier.pending as u64;
            match op.kind {
                MbarrierKind::ExpectTx => mbarrier.transact(count)?,
                MbarrierKind::CompleteTx => mbarrier.transact(-count)?,
                MbarrierKind::Arrive { drop, no_complete, expect } => {
                    let (count, bytes) = if expect { (1, count) } else { (count, 0) };
                    mbarrier.transact(bytes)?;
                    mbarrier.arrive(count)?;
                    mbarrier.expected -= if drop { count } else { 0 };
                    if no_complete && mbarrier.pending == 0 && mbarrier.tx == 0 {
                        return misuse("an arrival with .noComplete completes the phase");
                    }
                    released.iter().for_each(|released| mbarrier.release(released));
                }
                _ => {}
            }
            // `expect_tx` alone may make the counts meet only when bytes came before they were expected.
            cta.complete_phase(context, at)?;
            Ok(state)
        })
    }

    /// `cp.async.mbarrier.arrive` without `.noinc`: one more arrival is pending in this phase.
    pub(super) fn increment_pending(
        &mut self,
        context: &mut Context<'_>,
        address: u64,
        user: &User,
        no_inc: bool,
    ) -> Outcome<()> {
        self.use_mbarrier(context, address, user)?;
        let mbarrier = self.mbarrier_mut(address)?;
        mbarrier.pending += i64::from(!no_inc);
        if mbarrier.pending > MOST {
            return misuse(format!("{} pending arrivals, expected at most {MOST}", mbarrier.pending));
        }
        Ok(())
    }

    /// `test_wait` and `try_wait` for all lanes in `mask`. A test that fails again stops the warp until the mbarrier's phase
    /// ends, or nothing else can run.
    pub(super) fn test_mbarriers(
        &mut self,
        context: &mut Context<'_>,
        warp: usize,
        (pc, mask): (u32, u32),
        op: &Instruction,
        (addresses, values): (&Lanes, &Lanes),
    ) -> Outcome<Flow> {
        let (mut complete, mut again, mut last) = (0u32, true, 0);
        // By mbarrier: lanes that mostly wait for the same one learn together.
        let mut learned: Vec<(u64, u32)> = Vec::new();
        for lane in super::access::lanes_of(mask) {
            let place = |fault: Fault| fault.lane(lane);
            let (_, address) = self.resolve(op.space, addresses[lane as usize]).map_err(place)?;
            let at = self.own_shared(address).map_err(place)?;
            let mut user = self.mbarrier_user(warp, lane, pc);
            // What a lane does once the test has let it go, such as to end the mbarrier, comes after those of its warp.
            user.access.kind |= TOGETHER;
            self.use_mbarrier(context, at, &user).map_err(place)?;
            let mbarrier = self.mbarrier_mut(at)?;
            let is_complete = mbarrier.test(warp, lane, op, values[lane as usize]).map_err(place)?;
            last = at as u32;
            if !is_complete {
                again &= mbarrier.failed.insert((warp, lane), mbarrier.phase) == Some(mbarrier.phase);
                continue;
            }
            complete |= 1 << lane;
            mbarrier.unseen = None;
            match learned.iter_mut().find(|(other, _)| *other == at) {
                Some((_, lanes)) => *lanes |= 1 << lane,
                None => learned.push((at, 1 << lane)),
            }
        }
        for (at, lanes) in learned {
            let Some(done) = self.mbarrier_mut(at)?.done.clone() else { continue };
            let Warp { views, live, .. } = &mut self.warps[warp];
            if op.order == Order::Acquire {
                views.learn(lanes, *live, &done);
            } else {
                views.see(lanes, done);
            }
        }
        let state = &mut self.warps[warp];
        if complete == 0 && again && !std::mem::take(&mut state.expired) {
            return Ok(Flow::Wait(Wait::Mbarrier(last)));
        }
        if let Some(p) = op.p {
            state.put_predicate(p, mask, complete);
        }
        Ok(if complete == mask { Flow::Next } else { Flow::Yield })
    }

    /// At the end of the CTA: everything that was expected has come, and someone has waited for it.
    pub(super) fn check_mbarriers(&self, context: &Context<'_>) -> Outcome<()> {
        for (address, mbarrier) in &self.mbarriers {
            if let Some(copy) = context.copy_to(self, *address) {
                let message = format!("the CTA exits while a bulk copy is under way to its mbarrier at {address:#x}");
                return Err(Fault { pc: Some(copy.0), by: Some(copy.1), ..Fault::new(Rule::AsyncLeft, message) });
            }
            if mbarrier.tx != 0 {
                return misuse(format!("the CTA exits, mbarrier at {address:#x}: {}", mbarrier.describe()));
            }
            if let Some((pc, by)) = mbarrier.unseen {
                let message = format!("nobody waited for a bulk copy at the mbarrier at {address:#x}");
                return Err(Fault { pc: Some(pc), by: Some(by), ..Fault::new(Rule::AsyncLeft, message) });
            }
        }
        Ok(())
    }
}

impl Mbarrier {
    /// Whether the phase is complete that a state was returned in, or that has this parity. Only the current phase and the
    /// one before can be told apart.
    fn test(&mut self, warp: usize, lane: u32, op: &Instruction, value: u64) -> Outcome<bool> {
        let waited_for = self.failed.get(&(warp, lane)).copied();
        if let Some(phase) = waited_for
            && self.phase >= phase + 2
        {
            return misuse(format!("waits for phase {phase}, but phase {} has begun: the wait was lapped", self.phase));
        }
        let parity = matches!(op.kind, MbarrierKind::Test { parity: true, .. });
        let complete = if parity {
            if value as u32 > 1 {
                return misuse(format!("phase parity {}, expected 0 or 1", value as u32));
            }
            self.phase & 1 != value & 1
        } else {
            let phase = value >> PENDING_BITS;
            if phase > self.phase || self.phase > phase + 1 {
                let now = self.phase;
                return misuse(format!("the state is one of phase {phase}, expected {now} or the one before"));
            }
            self.phase != phase
        };
        if complete {
            self.failed.remove(&(warp, lane));
        }
        Ok(complete)
    }
}

/// `mbarrier.pending_count`.
pub(super) fn pending_count(state: u64) -> u64 {
    state & ((1 << PENDING_BITS) - 1)
}
