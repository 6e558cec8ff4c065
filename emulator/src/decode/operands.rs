//! Names to slots: registers, special registers, variables, labels.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use super::call::{CallGraph, Place, Signature, places};
use super::{Decoder, Result};
use crate::isa::*;
use crate::parse::{Function, Operand, Param, RegType, Source};
use crate::report::ParseError;

/// First address of shared memory: what lies below is the system's, so that a null pointer is out of bounds.
pub(crate) const SHARED_BASE: u32 = 1024;
/// First address of a thread's local memory.
pub(crate) const LOCAL_BASE: u32 = 16;

/// Where the variables of the module stand, the same for all kernels.
#[derive(Debug, Default)]
pub(crate) struct Layout {
    pub addresses: HashMap<String, u64>,
    /// Declared `.extern` and defined elsewhere.
    pub external: HashSet<String>,
}

/// What the names in a kernel or a function stand for.
#[derive(Debug, Default)]
pub(crate) struct Names {
    registers: HashMap<String, (RegType, u16)>,
    variables: HashMap<String, u64>,
    /// Local variables, by address in the frame.
    locals: HashMap<String, u32>,
    /// `.param` variables of functions and of calls.
    pub(super) frame: HashMap<String, Place>,
    labels: HashMap<String, u32>,
    pub(super) targets: HashMap<String, Vec<String>>,
    /// The functions that may be called, and where their code begins.
    pub(super) signatures: Rc<HashMap<String, Signature>>,
    pub(super) targets_of: Rc<HashMap<String, u32>>,
    layout: Rc<Layout>,
    /// The link register of a function; a kernel has none.
    pub link: Option<u16>,
    /// Frames move with the depth of calls.
    recursive: bool,
    /// The predicate that holds the carry flag.
    pub(super) carry: Option<u16>,
    pub virtual_registers: u16,
    pub virtual_predicates: u16,
}

/// Memory of a kernel with everything that it calls.
#[derive(Debug)]
pub(crate) struct Frame {
    /// Address past the statically sized shared variables; dynamic shared memory begins at the next multiple of
    /// `dynamic_align`.
    pub shared_bytes: u32,
    pub dynamic_align: u32,
    pub local_bytes: u32,
    pub param_bytes: u32,
    shared: HashMap<String, u64>,
    /// Shared variables of each function's own.
    own_shared: HashMap<String, HashMap<String, u64>>,
}

/// Shared or local memory that a kernel can have at the most, whatever the device: bounds what a text can ask for.
const MOST_BYTES: u32 = 1 << 20;

pub(super) fn place(offset: &mut u32, align: u32, bytes: u32) -> Option<u32> {
    let at = offset.checked_next_multiple_of(align)?;
    *offset = at.checked_add(bytes).filter(|end| *end <= MOST_BYTES)?;
    Some(at)
}

fn too_large(function: &Function) -> ParseError {
    let message = format!("{}: more than {MOST_BYTES} bytes of variables", function.name);
    ParseError { line: function.line, message }
}

impl Frame {
    pub(crate) fn new(graph: &CallGraph<'_>, source: &Source) -> Result<Frame> {
        let mut frame = Frame {
            shared_bytes: SHARED_BASE,
            dynamic_align: 1,
            local_bytes: LOCAL_BASE,
            param_bytes: 0,
            shared: HashMap::new(),
            own_shared: HashMap::new(),
        };
        let kernel = graph.functions[graph.functions.len() - 1];
        for variable in source.shared.iter().filter(|v| !v.dynamic) {
            let at = place(&mut frame.shared_bytes, variable.align, variable.bytes).ok_or_else(|| too_large(kernel))?;
            frame.shared.insert(variable.name.clone(), u64::from(at));
        }
        for function in &graph.functions {
            let mut own = HashMap::new();
            for variable in &function.shared {
                let at = place(&mut frame.shared_bytes, variable.align, variable.bytes)
                    .ok_or_else(|| too_large(function))?;
                own.insert(variable.name.clone(), u64::from(at));
            }
            frame.own_shared.insert(function.name.clone(), own);
        }
        // All dynamic variables start at the same address.
        let dynamic: Vec<_> = source.shared.iter().filter(|variable| variable.dynamic).collect();
        frame.dynamic_align = dynamic.iter().map(|variable| variable.align).max().unwrap_or(16);
        let start = frame.shared_bytes.next_multiple_of(frame.dynamic_align);
        for variable in dynamic {
            frame.shared.insert(variable.name.clone(), u64::from(start));
        }
        Ok(frame)
    }
}

impl Names {
    /// The names of one of a kernel's functions; its variables are added to the kernel's.
    pub(crate) fn new(function: &Function, frame: &mut Frame, layout: &Rc<Layout>, recursive: bool) -> Result<Names> {
        let fail = |message: String| ParseError { line: function.line, message };
        let mut names = Names {
            variables: frame.shared.clone(),
            targets: function.targets.clone(),
            layout: Rc::clone(layout),
            recursive,
            ..Names::default()
        };
        names.variables.extend(frame.own_shared.remove(&function.name).unwrap_or_default());
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
        if function.body.iter().any(|statement| super::math::uses_carry(&statement.opcode)) {
            names.carry = Some(names.virtual_predicates);
            names.virtual_predicates =
                names.virtual_predicates.checked_add(1).ok_or_else(|| fail("more than 65535 predicates".to_owned()))?;
        }
        for variable in &function.local {
            let at =
                place(&mut frame.local_bytes, variable.align, variable.bytes).ok_or_else(|| too_large(function))?;
            names.locals.insert(variable.name.clone(), at);
        }
        if function.entry {
            for param in &function.params {
                let at = place(&mut frame.param_bytes, param.align, param.bytes).ok_or_else(|| too_large(function))?;
                names.variables.insert(param.name.clone(), u64::from(at));
            }
        }
        Ok(names)
    }

    /// Lays out what a function takes and gives, and the arguments of its own calls.
    pub(crate) fn add_params(&mut self, function: &Function, frame: &mut Frame) -> Result<Signature> {
        let mut lay_out = |params: &[Param]| -> Result<Vec<Place>> {
            let places = places(&mut frame.local_bytes, params).ok_or_else(|| too_large(function))?;
            self.frame.extend(params.iter().zip(&places).map(|(param, place)| (param.name.clone(), *place)));
            Ok(places)
        };
        lay_out(&function.temporaries)?;
        if function.entry {
            return Ok(Signature::default());
        }
        Ok(Signature { params: lay_out(&function.params)?, results: lay_out(&function.results)?, link: 0 })
    }

    pub(crate) fn link_to(&mut self, signatures: &Rc<HashMap<String, Signature>>, targets: &Rc<HashMap<String, u32>>) {
        self.signatures = Rc::clone(signatures);
        self.targets_of = Rc::clone(targets);
    }

    pub(super) fn set_labels(&mut self, function: &Function, starts: &[u32]) {
        self.labels = function.labels.iter().map(|(label, index)| (label.clone(), starts[*index])).collect();
    }

    pub(super) fn is_register(&self, name: &str) -> bool {
        self.registers.contains_key(name)
    }

    /// Whether a `.param` address is one of a function's or a call's, not of the kernel's own parameters.
    pub(super) fn in_frame(&self, base: Option<&String>) -> bool {
        base.is_some_and(|name| self.frame.contains_key(name) || (self.link.is_some() && self.is_register(name)))
    }

    fn address_of(&self, at: u32) -> Src {
        if self.recursive { Src::Special(Special::Frame(at)) } else { Src::Imm(at.into()) }
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
            "%cluster_ctaid" => Some(Special::ClusterCtaid(axis)),
            "%cluster_nctaid" => Some(Special::ClusterNctaid(axis)),
            "%clusterid" => Some(Special::ClusterId(axis)),
            "%nclusterid" => Some(Special::NclusterId(axis)),
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
        "%cluster_ctarank" => Special::ClusterCtaRank,
        "%cluster_nctarank" => Special::ClusterNctaRank,
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
                let in_frame = self.names.frame.get(name).map(|place| place.at);
                if let Some(at) = in_frame.or_else(|| self.names.locals.get(name).copied()) {
                    return Ok(self.names.address_of(at));
                }
                if let Some(address) = self.names.layout.addresses.get(name).filter(|_| !self.names.is_register(name)) {
                    return Ok(Src::Imm(*address));
                }
                if self.names.layout.external.contains(name) {
                    return self.fail(format!("`{name}` is declared `.extern` and has no definition in this file"));
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
