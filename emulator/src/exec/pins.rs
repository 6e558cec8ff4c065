//! Registers that `wgmma` uses: in flight from issue to wait, and ordered by `wgmma.fence`.

use super::warp::Warp;
use super::{Fault, Outcome};
use crate::isa::{OperandA, Wgmma};
use crate::module::Kernel;
use crate::report::Rule;
use crate::shadow::Access;

/// What accumulators must have in common to follow each other without a fence.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Shape {
    n: u16,
    d_f16: bool,
}

/// An operation that is under way with a register.
#[derive(Clone, Copy, Debug)]
struct Flight {
    serial: u32,
    pc: u32,
    /// When the register is part of the accumulator, not of A.
    accumulator: Option<Shape>,
}

/// The last access to a register that matters to the next `wgmma`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Last {
    /// No `wgmma.fence` yet.
    #[default]
    Never,
    Fenced,
    /// As accumulator of this shape.
    Wgmma(Shape),
    Read(u32),
    Written(u32),
}

#[derive(Clone, Copy, Debug, Default)]
struct Pin {
    last: Last,
    flight: Option<Flight>,
}

/// The registers of a warp that some `wgmma` names, and how far its operations are.
#[derive(Debug, Default)]
pub(super) struct Pins {
    pins: Vec<Pin>,
    /// Operations issued, and of those waited for.
    pub issued: u32,
    pub waited: u32,
    /// Operations issued when each group was committed.
    pub groups: Vec<u32>,
}

impl Pins {
    pub fn new(kernel: &Kernel) -> Pins {
        Pins { pins: vec![Pin::default(); kernel.pins.count], ..Pins::default() }
    }

    /// `wgmma.fence`
    pub fn fence(&mut self) {
        self.pins.iter_mut().for_each(|pin| pin.last = Last::Fenced);
    }

    /// Whether the accumulator continues one that is in flight.
    pub fn continues(&self, kernel: &Kernel, op: &Wgmma) -> bool {
        op.d.first().is_some_and(|d| self.pins[kernel.pins.of_slot(*d)].flight.is_some())
    }

    /// The operation's registers are its own from now on.
    pub fn fly(&mut self, kernel: &Kernel, op: &Wgmma, pc: u32) {
        self.issued += 1;
        let flight = Flight { serial: self.issued, pc, accumulator: None };
        for slot in op.pinned() {
            self.pins[kernel.pins.of_slot(slot)].flight = Some(flight);
        }
        let shape = Shape { n: op.n, d_f16: op.d_f16 };
        for slot in &op.d {
            let flight = Some(Flight { accumulator: Some(shape), ..flight });
            self.pins[kernel.pins.of_slot(*slot)] = Pin { last: Last::Wgmma(shape), flight };
        }
    }

    /// Operations up to number `complete` have been waited for.
    pub fn land(&mut self, complete: u32) {
        self.waited = self.waited.max(complete);
        for pin in &mut self.pins {
            if pin.flight.is_some_and(|flight| flight.serial <= complete) {
                pin.flight = None;
            }
        }
    }
}

impl Warp {
    /// An instruction other than `wgmma` is about to read and write registers.
    pub fn touch(&mut self, kernel: &Kernel, pc: u32, serial: u32) -> Outcome<()> {
        let Some(touches) = kernel.pins.touches.get(pc as usize) else { return Ok(()) };
        for &(pin, write) in touches {
            let pin = &mut self.wgmma.pins[pin as usize];
            if let Some(flight) = pin.flight
                && (write || flight.accumulator.is_some())
            {
                let verb = if write { "written" } else { "read" };
                let what = if flight.accumulator.is_some() { "the accumulator" } else { "A" };
                let message =
                    format!("a register of {what} is {verb} before wgmma.wait_group has waited for the wgmma");
                return Err(other(Fault::new(Rule::InFlight, message), serial, self.id, flight.pc));
            }
            pin.last = match pin.last {
                _ if write => Last::Written(pc),
                Last::Written(_) => pin.last,
                _ => Last::Read(pc),
            };
        }
        Ok(())
    }

    /// PTX ISA, "wgmma.fence": where one is needed before `wgmma` may use its registers.
    pub fn check_pins(&self, kernel: &Kernel, op: &Wgmma, serial: u32) -> Outcome<()> {
        let pin = |slot: u16| &self.wgmma.pins[kernel.pins.of_slot(slot)];
        let fault = |rule, message: String, pc: u32| Err(other(Fault::new(rule, message), serial, self.id, pc));
        let unfenced = |what: &str, did: &str, pc: u32| {
            fault(Rule::RegisterFence, format!("a register of {what} was {did} and no wgmma.fence came after it"), pc)
        };
        let shape = Shape { n: op.n, d_f16: op.d_f16 };
        let continues = self.wgmma.continues(kernel, op);
        for slot in &op.d {
            let pin = pin(*slot);
            if let Some(flight) = pin.flight {
                if flight.accumulator == Some(shape) && continues {
                    continue;
                }
                let message = "the accumulator overlaps registers of a wgmma of another shape that is in flight";
                return fault(Rule::InFlight, message.to_owned(), flight.pc);
            }
            match pin.last {
                Last::Fenced => {}
                Last::Wgmma(last) if last == shape => {}
                Last::Never => {
                    return Err(Fault::new(Rule::RegisterFence, "no wgmma.fence before the first wgmma"));
                }
                Last::Read(pc) => return unfenced("the accumulator", "read", pc),
                Last::Written(pc) => return unfenced("the accumulator", "written", pc),
                Last::Wgmma(Shape { n, .. }) => {
                    let message = format!("the accumulator was one of m64n{n}k16, and no wgmma.fence came after that");
                    return Err(Fault::new(Rule::RegisterFence, message));
                }
            }
        }
        let OperandA::Registers(a) = &op.a else { return Ok(()) };
        for slot in a {
            let pin = pin(*slot);
            if let Some(flight) = pin.flight.filter(|flight| flight.accumulator.is_some()) {
                let message = "a register of A is in the accumulator of a wgmma that is in flight";
                return fault(Rule::InFlight, message.to_owned(), flight.pc);
            }
            match pin.last {
                Last::Fenced | Last::Read(_) => {}
                Last::Written(pc) => return unfenced("A", "written", pc),
                Last::Never | Last::Wgmma(_) => {
                    let message = "no wgmma.fence orders a register of A before the wgmma";
                    return Err(Fault::new(Rule::RegisterFence, message));
                }
            }
        }
        Ok(())
    }
}

/// Names the instruction on the other side.
fn other(fault: Fault, cta: u32, warp: u32, pc: u32) -> Fault {
    Fault { other: Some(Access { cta, agent: 2 * warp as u16, pc, ..Access::default() }), ..fault }
}
