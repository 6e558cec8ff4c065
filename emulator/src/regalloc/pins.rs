//! Registers that `wgmma` names.

use super::{Role, registers};
use crate::isa::*;

/// The registers that some `wgmma` names, and which instructions touch them.
#[derive(Debug, Default)]
pub(crate) struct Pins {
    pub count: usize,
    /// By register: its number among the pinned ones, plus one.
    number: Vec<u16>,
    /// By instruction, other than `wgmma`: the pinned registers it reads and (`true`) writes. Empty when there are none.
    pub touches: Vec<Vec<(u16, bool)>>,
}

impl Pins {
    pub fn new(code: &mut [Instruction], slots: u16) -> Pins {
        let mut pins = Pins { count: 0, number: vec![0; slots as usize], touches: Vec::new() };
        for instruction in code.iter() {
            let Op::Warpgroup(Warpgroup::Mma(op)) = &instruction.op else { continue };
            for slot in op.pinned() {
                if pins.number[slot as usize] == 0 {
                    pins.count += 1;
                    pins.number[slot as usize] = pins.count as u16;
                }
            }
        }
        if pins.count == 0 {
            return pins;
        }
        for instruction in code {
            let mut touched = Vec::new();
            if !matches!(instruction.op, Op::Warpgroup(_)) {
                registers(&mut instruction.op, &mut |role, slot: &mut u16| {
                    let is_data = matches!(role, Role::Use | Role::Def);
                    if let Some(number @ 1..) = pins.number.get(*slot as usize).filter(|_| is_data) {
                        touched.push((number - 1, role == Role::Def));
                    }
                });
            }
            pins.touches.push(touched);
        }
        pins
    }

    /// The number of a pinned register.
    pub fn of_slot(&self, slot: u16) -> usize {
        usize::from(self.number[slot as usize].saturating_sub(1))
    }
}
