//! The command line: what is asked for, and the two commands.

mod arguments;
mod output;

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use arguments::{Command, Content, MOST_BYTES, Run, Value};
use output::{json_string, outcome};
use ptx_emulator::{KernelInfo, Launch, Memory, MemoryError, Module};

/// The kernel broke no rule.
pub const CLEAN: u8 = 0;
/// It broke one.
pub const BROKEN: u8 = 1;
/// The command, a file or the PTX is wrong.
pub const USAGE: u8 = 2;

/// Runs one command and returns the exit status.
pub fn main(args: impl IntoIterator<Item = OsString>, out: &mut dyn Write, err: &mut dyn Write) -> u8 {
    let done = match arguments::parse(args) {
        Ok(Command::Help) => Ok((CLEAN, arguments::HELP.to_owned())),
        Ok(Command::List { ptx, json }) => list(&ptx, json),
        Ok(Command::Run(run)) => launch(&run),
        Err(message) => Err(format!("{message}\nptx-emulator --help says more")),
    };
    // When nobody listens there is nobody to tell.
    match done {
        Ok((status, text)) => {
            let _ = out.write_all(text.as_bytes());
            status
        }
        Err(message) => {
            let _ = writeln!(err, "ptx-emulator: {message}");
            USAGE
        }
    }
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// A file that may be as large as other buffers.
fn read_buffer(path: &Path) -> Result<Vec<u8>, String> {
    let say = |error: std::io::Error| format!("{}: {error}", path.display());
    let too_large = || Err(format!("{}: more than {MOST_BYTES} bytes", path.display()));
    let (file, mut data) = (File::open(path).map_err(say)?, Vec::new());
    if file.metadata().map_err(say)?.len() > MOST_BYTES as u64 {
        return too_large();
    }
    // Devices and pipes do not say how much there is.
    file.take(MOST_BYTES as u64 + 1).read_to_end(&mut data).map_err(say)?;
    if data.len() > MOST_BYTES { too_large() } else { Ok(data) }
}

fn load(path: &Path) -> Result<Module, String> {
    let text = String::from_utf8(read(path)?).map_err(|_| format!("{}: not text", path.display()))?;
    Module::parse(&text).map_err(|error| format!("{}: {error}", path.display()))
}

/// Kernels, what they take and need, and what of them is not implemented.
fn list(path: &Path, json: bool) -> Result<(u8, String), String> {
    let module = load(path)?;
    let mut text = String::new();
    let mut entries = Vec::new();
    for kernel in module.kernels() {
        let Some(info) = module.kernel_info(kernel) else { continue };
        let errors = module.kernel_errors(kernel);
        if json {
            entries.push(output::json_kernel(kernel, &info, errors));
            continue;
        }
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{kernel} ({} bytes of parameters)", param_bytes(&info));
        for parameter in info.parameters {
            let _ = writeln!(text, "  {:>5} bytes at {:>4}  {}", parameter.bytes, parameter.offset, parameter.name);
        }
        for error in errors {
            let _ = writeln!(text, "  {error}");
        }
        if errors.is_empty() {
            let KernelInfo { instructions, registers, predicates, shared_bytes, local_bytes, .. } = info;
            let _ = writeln!(
                text,
                "  {instructions} instructions, {registers} registers, {predicates} predicates, {shared_bytes} bytes shared, \
                 {local_bytes} bytes local"
            );
        }
    }
    if json {
        text = format!("{{\"target\":{},\"kernels\":[{}]}}\n", json_string(module.target()), entries.join(","));
    }
    Ok((CLEAN, text))
}

fn param_bytes(info: &KernelInfo<'_>) -> usize {
    info.parameters.last().map_or(0, |last| (last.offset + last.bytes) as usize)
}

/// Name, address and bytes.
type Buffer = (String, u64, usize);

/// Buffers in a fresh memory, and the parameter bytes that name them.
fn prepare(run: &Run, info: &KernelInfo<'_>) -> Result<(Memory, Vec<Buffer>, Vec<u8>), String> {
    let mut memory = Memory::new();
    let mut buffers: Vec<Buffer> = Vec::new();
    let mut params = vec![0; param_bytes(info)];
    if run.values.len() != info.parameters.len() {
        let names: Vec<&str> = info.parameters.iter().map(|parameter| parameter.name.as_str()).collect();
        let (given, expected) = (run.values.len(), names.len());
        return Err(format!("{given} values for the {expected} parameters {}", names.join(", ")));
    }
    for (value, parameter) in run.values.iter().zip(info.parameters) {
        let bytes = match value {
            Value::Bytes(bytes) => bytes.clone(),
            Value::Pointer(name) => match buffers.iter().find(|(other, ..)| other == name) {
                Some((_, address, _)) => address.to_le_bytes().to_vec(),
                None => return Err(format!("no --buffer {name} before --arg ptr:{name}")),
            },
            Value::Buffer { name, content } => {
                let (data, size) = match content {
                    Content::File(path) => {
                        let data = read_buffer(path)?;
                        let size = data.len();
                        (data, size)
                    }
                    Content::Zero(size) => (vec![0; *size], *size),
                    Content::Unwritten(size) => (Vec::new(), *size),
                };
                let address = memory.try_alloc(name, size).map_err(|error| error.to_string())?;
                memory.write(address, &data).map_err(|error| error.to_string())?;
                buffers.push((name.clone(), address, size));
                address.to_le_bytes().to_vec()
            }
        };
        if bytes.len() != parameter.bytes as usize {
            let (given, expected, name) = (bytes.len(), parameter.bytes, &parameter.name);
            return Err(format!("{given} bytes for parameter {name}, expected {expected}"));
        }
        let at = parameter.offset as usize;
        params[at..at + bytes.len()].copy_from_slice(&bytes);
    }
    Ok((memory, buffers, params))
}

/// What a buffer holds; bytes that nothing wrote are 0. Also how many those are.
fn content(memory: &Memory, address: u64, size: usize) -> Result<(Vec<u8>, usize), MemoryError> {
    let written = memory.written(address, size)?;
    let mut data = vec![0; size];
    let mut at = 0;
    while at < size {
        let run = written[at..].iter().take_while(|&&other| other == written[at]).count();
        if written[at] {
            data[at..at + run].copy_from_slice(&memory.read(address + at as u64, run)?);
        }
        at += run;
    }
    let unwritten = written.iter().filter(|&&written| !written).count();
    Ok((data, unwritten))
}

fn launch(run: &Run) -> Result<(u8, String), String> {
    let module = load(&run.ptx)?;
    let kernels = module.kernels();
    let kernel = match (&run.kernel, &kernels[..]) {
        (Some(kernel), _) => kernel.as_str(),
        (None, [only]) => only,
        (None, _) => return Err(format!("--kernel must say which of {}", kernels.join(", "))),
    };
    let Some(info) = module.kernel_info(kernel) else {
        return Err(format!("no kernel {kernel}, expected one of {}", kernels.join(", ")));
    };
    let mut last = None;
    for seed in run.seeds.clone() {
        let (mut memory, buffers, params) = prepare(run, &info)?;
        let launch = Launch {
            kernel,
            grid: run.grid,
            cluster: run.cluster,
            block: run.block,
            shared_bytes: run.shared_bytes,
            params: &params,
        };
        let options = ptx_emulator::Options { seed, ..run.options.clone() };
        let result = module.launch(&mut memory, &launch, &options);
        let broken = result.is_err();
        last = Some((seed, result, memory, buffers));
        if broken {
            break;
        }
    }
    let Some((seed, result, memory, buffers)) = last else { return Err("--seeds must be 1 or more".to_owned()) };
    let mut notes = Vec::new();
    for (name, path) in &run.saves {
        let Some((_, address, size)) = buffers.iter().find(|(other, ..)| other == name) else {
            return Err(format!("--save {name}: there is no --buffer {name}"));
        };
        let (data, unwritten) = content(&memory, *address, *size).map_err(|error| error.to_string())?;
        std::fs::write(path, data).map_err(|error| format!("{}: {error}", path.display()))?;
        if unwritten > 0 {
            notes.push(format!("{unwritten} of {size} bytes of {name} were never written; they are saved as 0"));
        }
    }
    let status = if result.is_ok() { CLEAN } else { BROKEN };
    Ok((status, outcome(kernel, seed, run.seeds.clone().count(), &result, &notes, run.json)))
}
