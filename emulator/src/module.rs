//! A PTX file, ready to launch from.

use std::collections::HashMap;
use std::fmt::Write;
use std::rc::Rc;

use cpp_demangle::{DemangleOptions, Symbol};

use crate::decode::{self, CallGraph, Frame, LOCAL_BASE, Layout, Names, SHARED_BASE};
use crate::isa::{Instruction, Op};
use crate::memory::{Memory, Preset};
use crate::parse::{self, ClusterRule, Global, Location, Relocation, Source};
use crate::regalloc::{self, Pins};
use crate::report::ParseError;

/// A kernel as the executor sees it.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub name: String,
    /// What it calls, and then the kernel itself.
    pub code: Vec<Instruction>,
    /// Where the kernel begins.
    pub entry: u32,
    /// A function calls itself, if only through others.
    pub recursive: bool,
    pub registers: u16,
    pub predicates: u16,
    /// Address past the static shared variables.
    pub shared_end: u32,
    pub dynamic_align: u32,
    /// Address past the local variables of a thread.
    pub local_end: u32,
    pub param_bytes: u32,
    pub max_threads: Option<u32>,
    /// `.maxnreg`.
    pub max_registers: Option<u32>,
    pub cluster: ClusterRule,
    pub pins: Pins,
}

impl Kernel {
    /// Bytes of local memory that a thread can have.
    pub fn local_bytes(&self) -> usize {
        let frames = if self.recursive { MOST_LEVELS as usize + 1 } else { 1 };
        (self.local_end - LOCAL_BASE) as usize * frames
    }
}

/// One parameter of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Parameter {
    /// Its name in the PTX.
    pub name: String,
    /// Where it begins among the parameter bytes of a [`Launch`](crate::Launch).
    pub offset: u32,
    /// Its size.
    pub bytes: u32,
}

/// What a kernel takes and needs. Registers and memory are 0 when it holds something that is not implemented.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct KernelInfo<'a> {
    /// In order.
    pub parameters: &'a [Parameter],
    /// Instructions, those of called functions included.
    pub instructions: usize,
    /// Registers the emulator needs per thread: a register is counted once whatever its width, and ptxas arrives at other
    /// numbers.
    pub registers: u32,
    /// Predicates the emulator needs per thread.
    pub predicates: u32,
    /// Static shared memory in bytes.
    pub shared_bytes: u32,
    /// Local memory per thread in bytes, the arguments of calls included.
    pub local_bytes: u32,
    /// `.maxntid` or `.reqntid`: threads per CTA.
    pub max_threads: Option<u32>,
}

/// Lays parameters out as [`Frame`] does.
fn parameters(function: &parse::Function) -> Vec<Parameter> {
    let mut end = 0u32;
    let mut place = |param: &parse::Param| {
        let offset = end.next_multiple_of(param.align);
        end = offset.saturating_add(param.bytes).min(1 << 30);
        Parameter { name: param.name.clone(), offset, bytes: param.bytes }
    };
    function.params.iter().map(&mut place).collect()
}

/// Deepest recursion: about what a device's stack of a kilobyte or two would hold.
pub(crate) const MOST_LEVELS: u32 = 64;

/// The kernels of one PTX file.
///
/// A kernel that holds an instruction or modifier the emulator does not implement is reported by [`Module::kernel_error`]
/// and when it is launched; the others can be used.
#[derive(Debug)]
pub struct Module {
    kernels: HashMap<String, Result<Kernel, Vec<ParseError>>>,
    parameters: HashMap<String, Vec<Parameter>>,
    files: HashMap<u32, String>,
    locations: Vec<Location>,
    strings: HashMap<String, String>,
    target: String,
    /// Where the variables begin, and which text they are of.
    base: u64,
    hash: u64,
    variables: Vec<Preset>,
}

impl Module {
    /// Reads PTX text (ISA 8.0 and later, 64-bit addresses).
    ///
    /// # Errors
    /// [`ParseError`] with the line, when the text is not PTX or declares what is not implemented.
    pub fn parse(text: &str) -> Result<Module, ParseError> {
        let source = parse::parse(text)?;
        let hash = hash(text);
        let (base, layout, variables) = lay_out(&source, hash)?;
        let layout = Rc::new(layout);
        let entries = || source.functions.iter().filter(|function| function.entry);
        let parameters = entries().map(|function| (function.name.clone(), parameters(function))).collect();
        let kernels = entries().map(|function| (function.name.clone(), kernel(function, &source, &layout))).collect();
        let Source { files, locations, strings, target, .. } = source;
        Ok(Module { kernels, parameters, files, locations, strings, target, base, hash, variables })
    }

    /// Address and bytes of a variable of the module (`__device__`, `__constant__`), which is loaded into `memory` if it was
    /// not yet; `None` when there is no such variable. Variables keep what launches write to them for as long as the memory
    /// lives.
    ///
    /// ```
    /// use ptx_emulator::{Memory, Module};
    ///
    /// let module = Module::parse(".version 8.0\n.target sm_80\n.address_size 64\n.global .align 4 .u32 count = 5;")?;
    /// let mut memory = Memory::new();
    /// let (address, bytes) = module.variable(&mut memory, "count").ok_or("no such variable")?;
    /// assert_eq!(memory.read(address, bytes)?, 5u32.to_le_bytes());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn variable(&self, memory: &mut Memory, name: &str) -> Option<(u64, usize)> {
        self.load(memory).ok()?;
        let variable = self.variables.iter().find(|variable| variable.name == name)?;
        Some((variable.address, variable.data.len()))
    }

    pub(crate) fn load(&self, memory: &mut Memory) -> Result<(), String> {
        if self.variables.is_empty() { Ok(()) } else { memory.load(self.base, self.hash, &self.variables) }
    }

    /// Names of the kernels, sorted.
    pub fn kernels(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.kernels.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// Why a kernel cannot be launched: `None` when it can, or when there is no such kernel.
    pub fn kernel_error(&self, kernel: &str) -> Option<&ParseError> {
        self.kernel_errors(kernel).first()
    }

    /// Every instruction of a kernel and of what it calls that is not implemented, with its line.
    pub fn kernel_errors(&self, kernel: &str) -> &[ParseError] {
        match self.kernels.get(kernel) {
            Some(Err(errors)) => errors,
            _ => &[],
        }
    }

    /// What a kernel takes and needs: `None` when there is no such kernel.
    pub fn kernel_info(&self, kernel: &str) -> Option<KernelInfo<'_>> {
        let mut info = KernelInfo { parameters: self.parameters.get(kernel)?, ..KernelInfo::default() };
        if let Some(Ok(kernel)) = self.kernels.get(kernel) {
            info.instructions = kernel.code.len();
            info.registers = kernel.registers.into();
            info.predicates = kernel.predicates.into();
            info.shared_bytes = kernel.shared_end - SHARED_BASE;
            info.local_bytes = kernel.local_end - LOCAL_BASE;
            info.max_threads = kernel.max_threads;
        }
        Some(info)
    }

    /// The `.target` of the file, such as `sm_80`.
    pub fn target(&self) -> &str {
        &self.target
    }

    pub(crate) fn kernel(&self, name: &str) -> Option<&Result<Kernel, Vec<ParseError>>> {
        self.kernels.get(name)
    }

    /// `file:line` of the source with the line it is inlined at; `None` without line information.
    pub(crate) fn source_line(&self, location: u32) -> Option<String> {
        let location = self.locations.get(location as usize).filter(|location| location.line != 0)?;
        let mut text = String::new();
        let mut next = Some(location);
        while let Some(Location { file, line, function, inlined_at }) = next {
            let file = self.files.get(file).map_or("?", String::as_str);
            // Writing to a String cannot fail.
            let _ = write!(text, "{}:{line}", file.rsplit(['/', '\\']).next().unwrap_or(file));
            let name = function.as_ref().and_then(|label| self.strings.get(label));
            next = inlined_at.and_then(|outer| self.locations.get(outer as usize));
            match (name, next) {
                (Some(name), Some(_)) => drop(write!(text, " in {} inlined at ", readable(name))),
                (None, Some(_)) => text.push_str(" inlined at "),
                _ => {}
            }
        }
        Some(text)
    }
}

/// A mangled name without the parameters and the arguments of templates, which may be pages long.
fn readable(name: &str) -> String {
    let options = DemangleOptions::new().no_params().no_return_type();
    let demangled = Symbol::new(name).ok().and_then(|symbol| symbol.demangle_with_options(&options).ok());
    let (mut depth, mut text) = (0usize, String::new());
    for c in demangled.as_deref().unwrap_or(name).chars() {
        match c {
            '<' => depth += 1,
            '>' => depth = depth.saturating_sub(1),
            c if depth == 0 => text.push(c),
            _ => {}
        }
    }
    text
}

/// Where variables of modules begin; one module's from a multiple of [`MODULE_BYTES`] on. Below the windows of shared and
/// local memory, which are below what `Memory` hands out.
const MODULE_BASE: u64 = 0x1000_0000_0000;
const MODULE_BYTES: u64 = 512 << 20;
const MODULES: u64 = 1 << 17;
/// Distance between variables, so that an overrun lands in none.
const GUARD: u64 = 256;

/// FNV-1a: the same text gets the same addresses in every run.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Addresses and contents of the module's variables.
fn lay_out(source: &Source, hash: u64) -> Result<(u64, Layout, Vec<Preset>), ParseError> {
    let base = MODULE_BASE + hash % MODULES * MODULE_BYTES;
    let mut layout = Layout::default();
    let mut at = base;
    for Global { variable, external, line, .. } in &source.globals {
        if *external {
            layout.external.insert(variable.name.clone());
            continue;
        }
        let address = at.next_multiple_of(u64::from(variable.align.max(16)));
        at = address + u64::from(variable.bytes) + GUARD;
        if at > base + MODULE_BYTES {
            return Err(ParseError { line: *line, message: "too many variables".to_owned() });
        }
        if layout.addresses.insert(variable.name.clone(), address).is_some() {
            return Err(ParseError { line: *line, message: format!("`{}` is defined twice", variable.name) });
        }
    }
    layout.external.retain(|name| !layout.addresses.contains_key(name));
    let mut presets = Vec::new();
    for Global { variable, constant, external, bytes, relocations, line } in &source.globals {
        if *external {
            continue;
        }
        let mut data = bytes.clone();
        data.resize(variable.bytes as usize, 0);
        for Relocation { offset, bytes, symbol, addend } in relocations {
            let address = match layout.addresses.get(symbol) {
                Some(address) => *address,
                // Calls through pointers are errors where they stand; here it is enough that none is null.
                None if is_function(source, symbol) || layout.external.contains(symbol) => u64::from(u32::MAX),
                None => {
                    let message = format!("`{}` is initialised with `{symbol}`, which is not defined", variable.name);
                    return Err(ParseError { line: *line, message });
                }
            };
            let value = address.wrapping_add_signed(*addend).to_le_bytes();
            data[*offset..offset + bytes].copy_from_slice(&value[..*bytes]);
        }
        let (name, constant) = (variable.name.clone(), *constant);
        presets.push(Preset { address: layout.addresses[&name], name, data, constant });
    }
    Ok((base, layout, presets))
}

fn is_function(source: &Source, name: &str) -> bool {
    source.functions.iter().any(|function| function.name == name)
}

/// Decodes a kernel with all that it calls.
fn kernel(function: &parse::Function, source: &Source, layout: &Rc<Layout>) -> Result<Kernel, Vec<ParseError>> {
    let one = |error| vec![error];
    let graph = CallGraph::new(function, source).map_err(one)?;
    let mut frame = Frame::new(&graph, source).map_err(one)?;
    let too_many = || one(ParseError { line: function.line, message: "more than 65535 registers".to_owned() });
    let (mut all_names, mut signatures, mut targets) = (Vec::new(), HashMap::new(), HashMap::new());
    let mut start = 0;
    for (index, function) in graph.functions.iter().enumerate() {
        let mut names = Names::new(function, &mut frame, layout, graph.recursive).map_err(one)?;
        let mut signature = names.add_params(function, &mut frame).map_err(one)?;
        if !function.entry {
            signature.link = index as u16;
            names.link = Some(signature.link);
            signatures.insert(function.name.clone(), signature);
        }
        targets.insert(function.name.clone(), start);
        start += decode::starts(function).last().copied().unwrap_or_default() + 1;
        all_names.push(names);
    }
    let (signatures, targets) = (Rc::new(signatures), Rc::new(targets));
    let mut errors = Vec::new();
    let (mut code, mut registers, mut predicates, mut entry) = (Vec::new(), 0u16, 0u16, 0);
    for (function, names) in graph.functions.iter().zip(&mut all_names) {
        names.link_to(&signatures, &targets);
        let mut part = match decode::decode(function, names) {
            Ok(part) => part,
            Err(more) => {
                errors.extend(more);
                continue;
            }
        };
        let (data, preds) = regalloc::allocate(&mut part, names.virtual_registers, names.virtual_predicates);
        let sums = (registers.checked_add(data), predicates.checked_add(preds));
        let (Some(more_registers), Some(more_predicates)) = sums else { return Err(too_many()) };
        regalloc::shift(&mut part, registers, predicates);
        (registers, predicates, entry) = (more_registers, more_predicates, code.len() as u32);
        for instruction in &mut part {
            match &mut instruction.op {
                Op::Bra { target } => *target += entry,
                Op::BraIndexed { targets, .. } => targets.iter_mut().for_each(|target| *target += entry),
                _ => {}
            }
        }
        code.append(&mut part);
    }
    if !errors.is_empty() {
        return Err(errors);
    }
    let pins = Pins::new(&mut code, registers);
    // The link registers stand behind all others.
    let links = registers;
    registers = registers.checked_add(graph.functions.len() as u16).ok_or_else(too_many)?;
    for instruction in &mut code {
        if let Op::Call { link, .. } | Op::Return { link } = &mut instruction.op {
            *link += links;
        }
    }
    // Frames of recursive calls keep the alignment of their variables.
    let local = frame.local_bytes - LOCAL_BASE;
    let local_end = LOCAL_BASE + if graph.recursive { local.next_multiple_of(4096) } else { local };
    Ok(Kernel {
        name: function.name.clone(),
        code,
        entry,
        recursive: graph.recursive,
        registers,
        predicates,
        shared_end: frame.shared_bytes,
        dynamic_align: frame.dynamic_align,
        local_end,
        param_bytes: frame.param_bytes,
        max_threads: function.max_threads,
        max_registers: function.max_registers,
        cluster: function.cluster.clone(),
        pins,
    })
}
