//! Words of the command line to what they mean.

use std::ffi::OsString;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use lexopt::prelude::*;
use ptx_emulator::{Options, Timing};

pub const HELP: &str = "\
Executes a kernel of a PTX file on a CPU model of the PTX ISA and reports what it does wrong.

  ptx-emulator list FILE.ptx [--json]
  ptx-emulator run FILE.ptx [--kernel NAME] --grid X[,Y[,Z]] --block X[,Y[,Z]] [options]

Parameters of the kernel, in their order:
  --arg TYPE:VALUE       u8 u16 u32 u64 s8 s16 s32 s64 f32 f64, or bytes:HEX for a struct
  --buffer NAME=N        the address of N bytes that nothing has written; N may end in K or M
  --buffer NAME=zero:N   of N bytes of 0
  --buffer NAME=@FILE    of a file's content
  --arg ptr:NAME         the address of an earlier buffer again

Options:
  --cluster X[,Y[,Z]]    CTAs per cluster
  --shared BYTES         dynamic shared memory
  --save NAME=FILE       write a buffer to a file after the run
  --seed N               the order of events (1)
  --seeds N              run with seeds 1 to N, until a rule is broken
  --copies WHEN          asynchronous copies land eager, lazy or mixed (mixed)
  --sms N                streaming multiprocessors of the device (4)
  --no-races             do not look for data races
  --json                 the outcome as JSON

The exit status is 0 when no rule was broken, 1 when one was, 2 when something is wrong with the command or the PTX.
";

pub enum Command {
    Help,
    List { ptx: PathBuf, json: bool },
    Run(Box<Run>),
}

/// What a buffer holds at first.
pub enum Content {
    File(PathBuf),
    Zero(usize),
    Unwritten(usize),
}

/// One parameter.
pub enum Value {
    Bytes(Vec<u8>),
    Pointer(String),
    Buffer { name: String, content: Content },
}

pub struct Run {
    pub ptx: PathBuf,
    pub kernel: Option<String>,
    pub grid: [u32; 3],
    pub cluster: [u32; 3],
    pub block: [u32; 3],
    pub shared_bytes: u32,
    pub values: Vec<Value>,
    pub saves: Vec<(String, PathBuf)>,
    pub seeds: RangeInclusive<u64>,
    pub options: Options,
    pub json: bool,
}

/// Largest buffer: a typing error should not take the machine down.
pub const MOST_BYTES: usize = 4 << 30;

fn extent(text: &str) -> Result<[u32; 3], String> {
    let mut extent = [1; 3];
    let words: Vec<&str> = text.split(',').collect();
    if words.len() > 3 {
        return Err(format!("`{text}` has more than three axes"));
    }
    for (axis, word) in extent.iter_mut().zip(words) {
        *axis = word.parse().map_err(|_| format!("`{text}` is not X, X,Y or X,Y,Z"))?;
    }
    Ok(extent)
}

fn size(text: &str) -> Result<usize, String> {
    let (digits, unit) = match text.strip_suffix(['K', 'M']) {
        Some(digits) => (digits, if text.ends_with('K') { 1 << 10 } else { 1 << 20 }),
        None => (text, 1),
    };
    let bytes = digits.parse().ok().and_then(|number: usize| number.checked_mul(unit));
    bytes.filter(|bytes| *bytes <= MOST_BYTES).ok_or_else(|| format!("`{text}` is not a size up to {MOST_BYTES}"))
}

fn value(text: &str) -> Result<Value, String> {
    let Some((ty, value)) = text.split_once(':') else { return Err(format!("`{text}` is not TYPE:VALUE")) };
    let wrong = || format!("`{value}` is not a value of type {ty}");
    macro_rules! number {
        ($ty:ty) => {
            value.parse::<$ty>().map(|value| value.to_le_bytes().to_vec()).map_err(|_| wrong())
        };
    }
    Ok(Value::Bytes(match ty {
        "u8" => number!(u8)?,
        "u16" => number!(u16)?,
        "u32" => number!(u32)?,
        "u64" => number!(u64)?,
        "s8" => number!(i8)?,
        "s16" => number!(i16)?,
        "s32" => number!(i32)?,
        "s64" => number!(i64)?,
        "f32" => number!(f32)?,
        "f64" => number!(f64)?,
        "bytes" => {
            let digits = value.as_bytes().chunks(2).map(|pair| {
                let text = std::str::from_utf8(pair).ok().filter(|text| text.len() == 2)?;
                if text.starts_with('+') { None } else { u8::from_str_radix(text, 16).ok() }
            });
            digits.collect::<Option<Vec<u8>>>().ok_or_else(wrong)?
        }
        "ptr" => return Ok(Value::Pointer(value.to_owned())),
        _ => return Err(format!("`{ty}` is not a type of --arg")),
    }))
}

fn buffer(text: &str) -> Result<Value, String> {
    let Some((name, content)) = text.split_once('=') else {
        return Err(format!("`{text}` is not NAME=SIZE, NAME=zero:SIZE or NAME=@FILE"));
    };
    let content = match (content.strip_prefix('@'), content.strip_prefix("zero:")) {
        (Some(path), _) => Content::File(path.into()),
        (_, Some(bytes)) => Content::Zero(size(bytes)?),
        _ => Content::Unwritten(size(content)?),
    };
    Ok(Value::Buffer { name: name.to_owned(), content })
}

/// The command, or what is wrong with it.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, String> {
    read(args).map_err(|error| error.to_string())
}

fn read(args: impl IntoIterator<Item = OsString>) -> Result<Command, lexopt::Error> {
    let mut parser = lexopt::Parser::from_args(args);
    let (mut words, mut grid, mut block) = (Vec::new(), None, None);
    let mut run = Run {
        ptx: PathBuf::new(),
        kernel: None,
        grid: [1; 3],
        cluster: [1; 3],
        block: [1; 3],
        shared_bytes: 0,
        values: Vec::new(),
        saves: Vec::new(),
        seeds: 1..=1,
        options: Options::default(),
        json: false,
    };
    while let Some(arg) = parser.next()? {
        match arg {
            Value(word) => words.push(word),
            Short('h') | Long("help") => return Ok(Command::Help),
            Long("kernel") => run.kernel = Some(parser.value()?.string()?),
            Long("grid") => grid = Some(extent(&parser.value()?.string()?)?),
            Long("block") => block = Some(extent(&parser.value()?.string()?)?),
            Long("cluster") => run.cluster = extent(&parser.value()?.string()?)?,
            Long("shared") => run.shared_bytes = parser.value()?.parse()?,
            Long("arg") => run.values.push(value(&parser.value()?.string()?)?),
            Long("buffer") => run.values.push(buffer(&parser.value()?.string()?)?),
            Long("save") => {
                let text = parser.value()?.string()?;
                let Some((name, path)) = text.split_once('=') else {
                    return Err(format!("`{text}` is not NAME=FILE").into());
                };
                run.saves.push((name.to_owned(), path.into()));
            }
            Long("seed") => {
                let seed = parser.value()?.parse()?;
                run.seeds = seed..=seed;
            }
            Long("seeds") => run.seeds = 1..=parser.value()?.parse()?,
            Long("copies") => {
                run.options.copies = match parser.value()?.string()?.as_str() {
                    "eager" => Timing::Eager,
                    "lazy" => Timing::Lazy,
                    "mixed" => Timing::Mixed,
                    other => return Err(format!("`{other}` is not eager, lazy or mixed").into()),
                }
            }
            Long("sms") => run.options.device.sms = parser.value()?.parse()?,
            Long("no-races") => run.options.checks.races = false,
            Long("json") => run.json = true,
            _ => return Err(arg.unexpected()),
        }
    }
    match (&words[..], grid, block) {
        ([], ..) => Err("a command is missing: run or list".into()),
        ([command, ptx], ..) if command == "list" => Ok(Command::List { ptx: ptx.into(), json: run.json }),
        ([command, ptx], Some(grid), Some(block)) if command == "run" => {
            Ok(Command::Run(Box::new(Run { ptx: ptx.into(), grid, block, ..run })))
        }
        ([command, _], ..) if command == "run" => Err("--grid and --block are needed".into()),
        ([command], ..) if command == "run" || command == "list" => Err("a PTX file is missing".into()),
        _ => Err(format!(
            "`{}` is not understood",
            words.iter().map(|w| w.to_string_lossy()).collect::<Vec<_>>().join(" ")
        )
        .into()),
    }
}
