//! Names to slots: registers, special registers, variables, labels.

use std::collections::HashMap;

use super::{Decoder, Result};
use crate::isa::*;
use crate::parse::{Function, Operand, RegType, Source};
use crate::report::ParseError;

/// First address of shared memory: what lies below is the system's, so that a null pointer is out of bounds.
pub(crate) const SHARED_BASE: u32 = 1024;
/// First address of a thread's local memory.
pub(crate) const LOCAL_BASE: u32 = 16;

/// What the names in a kernel stand for.
#[derive(Debug)]
pub(crate) struct Names {
    registers: HashMap<String, (RegType, u16)>,
    variables: HashMap<String, u64>,
    labels: HashMap<String, u32>,
    /// Address past the statically sized shared variables; dynamic shared memory begins at the next multiple of
    /// `dynamic_align`.
    pub shared_bytes: u32,
    pub dynamic_align: u32,
    pub local_bytes: u32,
    pub param_bytes: u32,
    pub virtual_registers: u16,
    pub virtual_predicates: u16,
}

fn place(offset: &mut u32, align: u32, bytes: u32) -> Option<u32> {
    let at = offset.checked_next_multiple_of(align)?;
    *offset = at.checked_add(bytes)?;
    Some(at)
}

impl Names {
    pub(crate) fn new(function: &Function, source: &Source) -> Result<Names> {
        let fail = |message: String| ParseError { line: function.body.first().map_or(0, |s| s.line), message };
        let too_large = || fail(format!("{}: variables too large", function.name));
        let mut names = Names {
            registers: HashMap::new(),
            variables: HashMap::new(),
            labels: HashMap::new(),
            shared_bytes: SHARED_BASE,
            dynamic_align: 1,
            local_bytes: LOCAL_BASE,
            param_bytes: 0,
            virtual_registers: 0,
            virtual_predicates: 0,
        };
        let mut sorted: Vec<_> = function.registers.iter().collect();
        sorted.sort_by(|a, b| a.0.cmp(b.0));
        for (name, kind) in sorted {
            let counter = match kind {
                RegType::Pred => &mut names.virtual_predicates,
                RegType::Bits(_) => &mut names.virtual_registers,
            };
            names.registers.insert(name.clone(), (*kind, *counter));
            *counter = counter.checked_add(1).ok_or_else(|| fail("more than 65535 registers".to_owned()))?;
        }
        for variable in source.shared.iter().chain(&function.shared).filter(|v| !v.dynamic) {
            let at = place(&mut names.shared_bytes, variable.align, variable.bytes).ok_or_else(too_large)?;
            names.variables.insert(variable.name.clone(), u64::from(at));
        }
        // All dynamic variables start at the same address.
        let dynamic: Vec<_> = source.shared.iter().filter(|variable| variable.dynamic).collect();
        names.dynamic_align = dynamic.iter().map(|variable| variable.align).max().unwrap_or(16);
        let start = names.shared_bytes.next_multiple_of(names.dynamic_align);
        for variable in dynamic {
            names.variables.insert(variable.name.clone(), u64::from(start));
        }
        for variable in &function.local {
            let at = place(&mut names.local_bytes, variable.align, variable.bytes).ok_or_else(too_large)?;
            names.variables.insert(variable.name.clone(), u64::from(at));
        }
        for param in &function.params {
            let at = place(&mut names.param_bytes, param.align, param.bytes).ok_or_else(too_large)?;
            names.variables.insert(param.name.clone(), u64::from(at));
        }
        for (label, index) in &function.labels {
            names.labels.insert(label.clone(), *index as u32);
        }
        Ok(names)
    }
}

fn special(name: &str) -> Option<Special> {
    let axis = |suffix: &str| match suffix {
        "x" => Some(0),
        "y" => Some(1),
        "z" => Some(2),
        _ => None,
    };
    if let Some((register, suffix)) = name.split_once('.') {
        let axis = axis(suffix)?;
        return match register {
            "%tid" => Some(Special::Tid(axis)),
            "%ntid" => Some(Special::Ntid(axis)),
            "%ctaid" => Some(Special::Ctaid(axis)),
            "%nctaid" => Some(Special::Nctaid(axis)),
            _ => None,
        };
    }
    let numbered = |prefix: &str, count: u32| {
        let number = name.strip_prefix(prefix).map(|rest| rest.strip_suffix("_64").unwrap_or(rest));
        number.and_then(|number| number.parse::<u32>().ok()).is_some_and(|number| number < count)
    };
    // Performance counters, and what the driver puts there: nothing here.
    if numbered("%pm", 8) || (numbered("%envreg", 32) && !name.ends_with("_64")) {
        return Some(Special::Zero);
    }
    Some(match name {
        "%smid" => Special::SmId,
        "%nsmid" => Special::NsmId,
        "%nwarpid" => Special::NwarpId,
        "%gridid" | "%current_graph_exec" => Special::Zero,
        "%globaltimer" | "%globaltimer_lo" => Special::Clock,
        "%globaltimer_hi" | "%clock_hi" => Special::Zero,
        "%laneid" => Special::LaneId,
        "%warpid" => Special::WarpId,
        "%lanemask_eq" => Special::LaneMask(Compare::Eq),
        "%lanemask_lt" => Special::LaneMask(Compare::Lt),
        "%lanemask_le" => Special::LaneMask(Compare::Le),
        "%lanemask_gt" => Special::LaneMask(Compare::Gt),
        "%lanemask_ge" => Special::LaneMask(Compare::Ge),
        "%dynamic_smem_size" => Special::DynamicSharedBytes,
        "%total_smem_size" => Special::TotalSharedBytes,
        "%clock" | "%clock64" => Special::Clock,
        _ => return None,
    })
}

impl Decoder<'_> {
    pub(super) fn operands<const N: usize>(&self) -> Result<[&Operand; N]> {
        let all: Vec<&Operand> = self.statement.operands.iter().collect();
        let found = all.len();
        all.try_into()
            .or_else(|_| self.fail(format!("`{}` has {found} operands, {N} are implemented", self.statement.text)))
    }

    fn register(&self, name: &str) -> Result<(RegType, u16)> {
        match self.names.registers.get(name) {
            Some(register) => Ok(*register),
            None => self.fail(format!("`{name}` is not declared, in `{}`", self.statement.text)),
        }
    }

    pub(super) fn predicate(&self, name: &str) -> Result<u16> {
        match self.register(name)? {
            (RegType::Pred, slot) => Ok(slot),
            _ => self.fail(format!("`{name}` is not a predicate, in `{}`", self.statement.text)),
        }
    }

    pub(super) fn pred(&self, operand: &Operand) -> Result<Pred> {
        match operand {
            Operand::Name(name) => Ok(Pred { slot: self.predicate(name)?, negated: false }),
            Operand::Not(name) => Ok(Pred { slot: self.predicate(name)?, negated: true }),
            _ => self.unsupported(),
        }
    }

    pub(super) fn dst(&self, operand: &Operand) -> Result<Dst> {
        match operand {
            Operand::Name(name) if name == "_" => Ok(None),
            Operand::Name(name) => match self.register(name)? {
                (RegType::Bits(_), slot) => Ok(Some(slot)),
                _ => self.fail(format!("`{name}` is a predicate, in `{}`", self.statement.text)),
            },
            _ => self.unsupported(),
        }
    }

    /// Bits of the (first) register of a destination; 64 for the sink.
    pub(super) fn register_bits(&self, operand: &Operand) -> u8 {
        match operand {
            Operand::Vector(parts) => parts.iter().map(|part| self.register_bits(part)).min().unwrap_or(64),
            Operand::Name(name) => match self.names.registers.get(name) {
                Some((RegType::Bits(bytes), _)) => bytes * 8,
                _ => 64,
            },
            _ => 64,
        }
    }

    pub(super) fn src(&self, operand: &Operand, ty: Ty) -> Result<Src> {
        let mask = u64::MAX >> (64 - ty.bits());
        match operand {
            Operand::Literal(value) => Ok(Src::Imm(value & mask)),
            Operand::Name(name) => {
                if name == "WARP_SZ" {
                    return Ok(Src::Imm(32));
                }
                if let Some(special) = special(name) {
                    return Ok(Src::Special(special));
                }
                if let Some(offset) = self.names.variables.get(name) {
                    return Ok(Src::Imm(*offset));
                }
                Ok(Src::Reg(self.dst(operand)?.unwrap_or_default()))
            }
            _ => self.unsupported(),
        }
    }

    pub(super) fn address(&self, operand: &Operand) -> Result<Address> {
        let Operand::Address { base, offset } = operand else { return self.unsupported() };
        let base = match base {
            Some(name) => self.src(&Operand::Name(name.clone()), Ty::U(64))?,
            None => Src::Imm(0),
        };
        Ok(Address { base, offset: *offset })
    }

    pub(super) fn label(&self, name: &str) -> Result<u32> {
        match self.names.labels.get(name) {
            Some(target) => Ok(*target),
            None => self.fail(format!("label `{name}` is not defined")),
        }
    }

    pub(super) fn int(&self, ty: &str) -> Result<Ty> {
        super::int(ty).map_or_else(|| self.unsupported(), Ok)
    }

    pub(super) fn bits(&self, ty: &str) -> Result<Ty> {
        super::bits(ty).filter(|ty| ty.bits() >= 16).map_or_else(|| self.unsupported(), Ok)
    }

    pub(super) fn float(&self, ty: &str) -> Result<Ty> {
        super::float(ty).map_or_else(|| self.unsupported(), Ok)
    }
}
