//! A PTX file, ready to launch from.

use crate::decode;
use crate::isa::Instruction;
use crate::parse::{self, Location, Source};
use crate::regalloc::{self, Pins};
use crate::report::ParseError;
use std::collections::HashMap;

/// A kernel as the executor sees it.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub name: String,
    pub code: Vec<Instruction>,
    pub registers: u16,
    pub predicates: u16,
    /// Address past the static shared variables.
    pub shared_end: u32,
    pub dynamic_align: u32,
    /// Address past the local variables of a thread.
    pub local_end: u32,
    pub param_bytes: u32,
    pub max_threads: Option<u32>,
    /// Registers per thread that the kernel is compiled for, when it says so.
    pub max_registers: Option<u32>,
    pub pins: Pins,
}

/// The kernels of one PTX file.
///
/// A kernel that holds an instruction or modifier the emulator does not implement is reported by [`Module::kernel_error`]
/// and when it is launched; the others can be used.
#[derive(Debug)]
pub struct Module {
    kernels: HashMap<String, Result<Kernel, ParseError>>,
    files: HashMap<u32, String>,
    locations: Vec<Location>,
    target: String,
}

impl Module {
    /// Reads PTX text (ISA 8.0 and later, 64-bit addresses).
    ///
    /// # Errors
    /// [`ParseError`] with the line, when the text is not PTX or declares what is not implemented.
    pub fn parse(text: &str) -> Result<Module, ParseError> {
        let source = parse::parse(text)?;
        let kernels =
            source.functions.iter().map(|function| (function.name.clone(), kernel(function, &source))).collect();
        let Source { files, locations, target, .. } = source;
        Ok(Module { kernels, files, locations, target })
    }

    /// Names of the kernels, sorted.
    pub fn kernels(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.kernels.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// Why a kernel cannot be launched: `None` when it can, or when there is no such kernel.
    pub fn kernel_error(&self, kernel: &str) -> Option<&ParseError> {
        self.kernels.get(kernel)?.as_ref().err()
    }

    /// The `.target` of the file, such as `sm_80`.
    pub fn target(&self) -> &str {
        &self.target
    }

    pub(crate) fn kernel(&self, name: &str) -> Option<&Result<Kernel, ParseError>> {
        self.kernels.get(name)
    }

    /// `file:line` of the source with the line it is inlined at; `None` without line information.
    pub(crate) fn source_line(&self, location: u32) -> Option<String> {
        let location = self.locations.get(location as usize).filter(|location| location.line != 0)?;
        let place = |file: u32, line: u32| {
            let file = self.files.get(&file).map_or("?", String::as_str);
            format!("{}:{line}", file.rsplit(['/', '\\']).next().unwrap_or(file))
        };
        let mut text = place(location.file, location.line);
        if let Some((file, line)) = location.inlined_at {
            text += &format!(" inlined at {}", place(file, line));
        }
        Some(text)
    }
}

fn kernel(function: &parse::Function, source: &Source) -> Result<Kernel, ParseError> {
    let (mut code, names) = decode::decode(function, source)?;
    let (registers, predicates) = regalloc::allocate(&mut code, names.virtual_registers, names.virtual_predicates);
    let pins = Pins::new(&mut code, registers);
    Ok(Kernel {
        name: function.name.clone(),
        code,
        registers,
        predicates,
        shared_end: names.shared_bytes,
        dynamic_align: names.dynamic_align,
        local_end: names.local_bytes,
        param_bytes: names.param_bytes,
        max_threads: function.max_threads,
        max_registers: function.max_registers,
        pins,
    })
}
