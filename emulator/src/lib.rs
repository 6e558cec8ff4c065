#![forbid(unsafe_code)]
#![doc = include_str!("../README.md")]

mod alu;
mod clock;
mod decode;
mod exec;
mod isa;
mod launch;
mod memory;
mod module;
mod parse;
mod regalloc;
mod report;
mod shadow;
mod tensormap;

pub use launch::{Counters, Device, Launch, Options, Timing};
pub use memory::{Memory, MemoryError};
pub use module::Module;
pub use report::{ParseError, Report, Rule, Site};
pub use tensormap::{Interleave, L2Promotion, OobFill, Swizzle, TensorMap, TensorMapError, TensorType};
