//! `setmaxnreg`: registers that warps give back to their CTA and take from it.
//!
//! PTX ISA, "Miscellaneous Instructions: setmaxnreg". How many registers a thread starts with is for `.maxnreg` to say, or for
//! the compiler: without it, as many as fit, which is what a launch bound of one CTA per SM makes of it.

use super::warp::Stall;
use super::{Context, Cta, Fault, Outcome};
use crate::report::Rule;

/// Registers of a multiprocessor.
const REGISTERS: u32 = 65536;

/// Registers that no warp of the CTA holds, as multiples of one per thread of a warp.
#[derive(Debug, Default)]
pub(super) struct RegisterPool {
    pub free: u32,
}

/// Registers per thread at launch.
fn at_launch(context: &Context<'_>) -> u32 {
    let fit = REGISTERS / context.threads.next_multiple_of(32) / 8 * 8;
    context.kernel.max_registers.map_or(fit.min(256), |registers| registers.next_multiple_of(8))
}

impl Cta {
    /// `true` when the warp must wait until others have given enough back.
    pub(super) fn set_registers(
        &mut self,
        context: &mut Context<'_>,
        warp: usize,
        pc: u32,
        (grow, count): (bool, u32),
    ) -> Outcome<bool> {
        let first = warp / 4 * 4;
        if self.warps.len() < first + 4 {
            let message = format!("warp {warp} is not part of four whole warps, as setmaxnreg needs them");
            return Err(Fault::new(Rule::Diverged, message));
        }
        let state = &mut self.warps[warp];
        let held = *state.registers_held.get_or_insert_with(|| at_launch(context));
        state.resized.push(pc);
        context.idle = 0;
        if !grow {
            state.registers_held = Some(held.min(count));
            self.registers.free += held.saturating_sub(count);
            self.serve(context);
            return Ok(false);
        }
        let more = count.saturating_sub(held);
        if more <= self.registers.free {
            self.registers.free -= more;
            state.registers_held = Some(held.max(count));
            return Ok(false);
        }
        state.stalled = Some(Stall::Registers(count));
        Ok(true)
    }

    /// Lets warps go on for which there are enough registers now.
    fn serve(&mut self, context: &mut Context<'_>) {
        for warp in 0..self.warps.len() {
            let state = &mut self.warps[warp];
            let Some(Stall::Registers(count)) = state.stalled else { continue };
            let more = count.saturating_sub(state.registers_held.unwrap_or_default());
            if more <= self.registers.free {
                self.registers.free -= more;
                state.registers_held = Some(count);
                state.stalled = None;
                self.wake(context, warp);
            }
        }
    }

    /// A warp exits: all of its warpgroup must have executed the same `setmaxnreg`.
    pub(super) fn check_resized(&self, warp: usize) -> Outcome<()> {
        let resized = &self.warps[warp].resized;
        let group = self.warps.iter().enumerate().skip(warp / 4 * 4).take(4);
        let other = group.filter(|(_, state)| state.live == 0).find(|(_, state)| state.resized != *resized);
        let Some((other, state)) = other else { return Ok(()) };
        let differs = (0..).find(|at| state.resized.get(*at) != resized.get(*at));
        let at = differs.and_then(|at| resized.get(at).or(state.resized.get(at)));
        let message = format!("warps {warp} and {other} of one warpgroup have not both executed this setmaxnreg");
        Err(Fault { pc: at.copied(), ..Fault::new(Rule::Diverged, message) })
    }
}
