//! Functions: what a kernel calls, in which order their code stands, how arguments and results move.
//!
//! Each function has registers and a frame of its own at fixed places; a lane that calls keeps where it returns to in the
//! function's link register. A kernel whose functions call themselves has one set of frames per level of its calls, and
//! calls save the registers of the function they enter.

use std::collections::{HashMap, HashSet};

use super::{Decoder, Result};
use crate::isa::{Moved, Op};
use crate::parse::{Function, Operand, Param, Source, Statement};
use crate::report::ParseError;

/// Called by `assert` when it fails.
pub(super) const ASSERT: &str = "__assertfail";
/// Functions of one kernel.
const MOST_FUNCTIONS: usize = 4096;

/// The kernel and what it calls.
pub(crate) struct CallGraph<'a> {
    /// What is called stands before what calls it, so that lanes inside a call are behind those that wait for them; the
    /// kernel stands last.
    pub functions: Vec<&'a Function>,
    pub recursive: bool,
}

/// The name of the function that a statement calls.
fn callee(statement: &Statement) -> Option<&str> {
    if statement.opcode != "call" && statement.opcode != "call.uni" {
        return None;
    }
    // `call (results), f, (arguments)`, without results `call f, (arguments)`.
    statement.operands.iter().find_map(|operand| match operand {
        Operand::Name(name) => Some(name.as_str()),
        _ => None,
    })
}

impl<'a> CallGraph<'a> {
    pub(crate) fn new(kernel: &'a Function, source: &'a Source) -> Result<CallGraph<'a>> {
        let by_name: HashMap<&str, &Function> =
            source.functions.iter().filter(|f| !f.entry && !f.external).map(|f| (f.name.as_str(), f)).collect();
        let callees = |function: &'a Function| {
            function.body.iter().filter_map(callee).filter_map(|name| by_name.get(name).copied()).collect::<Vec<_>>()
        };
        let mut graph = CallGraph { functions: Vec::new(), recursive: false };
        // Depth first, without recursion of our own: (function, its callees, how many of them are done).
        let mut stack = vec![(kernel, callees(kernel), 0)];
        let (mut entered, mut open) = (HashSet::new(), HashSet::new());
        while let Some((function, callees_of, done)) = stack.last_mut() {
            match callees_of.get(*done) {
                Some(next) => {
                    *done += 1;
                    let next = *next;
                    if open.contains(next.name.as_str()) {
                        graph.recursive = true;
                    } else if entered.insert(next.name.as_str()) {
                        open.insert(next.name.as_str());
                        stack.push((next, callees(next), 0));
                    }
                }
                None => {
                    open.remove(function.name.as_str());
                    graph.functions.push(*function);
                    stack.pop();
                }
            }
            if graph.functions.len() > MOST_FUNCTIONS {
                let message = format!("`{}` calls more than {MOST_FUNCTIONS} functions", kernel.name);
                return Err(ParseError { line: kernel.line, message });
            }
        }
        Ok(graph)
    }
}

/// What other code must know of a function in order to call it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Signature {
    /// Set when the function's code stands.
    pub params: Vec<Place>,
    pub results: Vec<Place>,
    /// Register with the return address, by number among those of the kernel.
    pub link: u16,
}

/// A `.param` variable in a thread's frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub at: u32,
    pub bytes: u32,
}

/// Lays out `.param` variables in a frame.
pub(crate) fn places(frame: &mut u32, params: &[Param]) -> Option<Vec<Place>> {
    params
        .iter()
        .map(|param| Some(Place { at: super::operands::place(frame, param.align, param.bytes)?, bytes: param.bytes }))
        .collect()
}

impl Decoder<'_> {
    /// PTX ISA, "Control Flow Instructions: call, ret".
    pub(super) fn call(&self, words: &[&str]) -> Result<Option<Op>> {
        match *words {
            ["call"] | ["call", "uni"] => self.direct_call().map(Some),
            ["ret"] | ["ret", "uni"] => Ok(self.names.link.map(|link| Op::Return { link })),
            ["brx", "idx"] | ["brx", "idx", "uni"] => {
                let [index, list] = self.operands()?;
                let Operand::Name(list) = list else { return self.unsupported() };
                let Some(targets) = self.names.targets.get(list) else {
                    return self.fail(format!("`{list}` is not a list of `.branchtargets`"));
                };
                let targets = targets.iter().map(|target| self.label(target)).collect::<Result<Vec<_>>>()?;
                Ok(Some(Op::BraIndexed { index: self.src(index, crate::isa::Ty::U(32))?, targets }))
            }
            _ => Ok(None),
        }
    }

    fn direct_call(&self) -> Result<Op> {
        let empty = Vec::new();
        let (results, name, arguments) = match &self.statement.operands[..] {
            [Operand::Name(name)] => (&empty, name, &empty),
            [Operand::Name(name), Operand::Vector(arguments)] => (&empty, name, arguments),
            [Operand::Vector(results), Operand::Name(name)] => (results, name, &empty),
            [Operand::Vector(results), Operand::Name(name), Operand::Vector(arguments)] => (results, name, arguments),
            _ => return self.indirect(),
        };
        let arguments = self.places_of(arguments)?;
        if name == ASSERT && arguments.len() == 5 && results.is_empty() && !self.names.signatures.contains_key(name) {
            return Ok(Op::AssertFail { args: arguments.iter().map(|place| place.at).collect() });
        }
        let Some(signature) = self.names.signatures.get(name) else {
            if self.names.is_register(name) {
                return self.indirect();
            }
            return self
                .fail(format!("`{name}`, which is called here, has no body in this file and is not implemented"));
        };
        let results = self.places_of(results)?;
        let copies = self.copies(&arguments, &signature.params)?;
        // Checked here for the instruction that follows.
        self.copies(&signature.results, &results)?;
        let Some(target) = self.names.targets_of.get(name) else {
            return self.fail(format!("`{name}` is not laid out"));
        };
        Ok(Op::Call { target: *target, link: signature.link, copies })
    }

    /// What moves the results of the call at hand, once it has returned.
    pub(super) fn results_of_call(&self) -> Result<Op> {
        let copies = match &self.statement.operands[..] {
            [Operand::Vector(results), Operand::Name(name), ..] => match self.names.signatures.get(name) {
                Some(signature) => self.copies(&signature.results, &self.places_of(results)?)?,
                None => Vec::new(),
            },
            _ => Vec::new(),
        };
        Ok(Op::CopyResults { copies })
    }

    fn indirect<T>(&self) -> Result<T> {
        self.fail(format!("calls through a register are not implemented, in `{}`", self.statement.text))
    }

    fn places_of(&self, operands: &[Operand]) -> Result<Vec<Place>> {
        let place = |operand: &Operand| match operand {
            Operand::Name(name) => self.names.frame.get(name).copied(),
            _ => None,
        };
        operands
            .iter()
            .map(|operand| match place(operand) {
                Some(place) => Ok(place),
                None => self.fail(format!("only `.param` variables can be passed, in `{}`", self.statement.text)),
            })
            .collect()
    }

    fn copies(&self, from: &[Place], to: &[Place]) -> Result<Vec<Moved>> {
        if from.len() != to.len() || from.iter().zip(to).any(|(from, to)| from.bytes != to.bytes) {
            return self.fail(format!("`{}` does not suit the function's parameters", self.statement.text));
        }
        Ok(from.iter().zip(to).map(|(from, to)| Moved { from: from.at, to: to.at, bytes: from.bytes }).collect())
    }
}
