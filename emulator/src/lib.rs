#![forbid(unsafe_code)]
#![doc = include_str!("../README.md")]

mod alu;
mod clock;
mod decode;
mod exec;
mod isa;
mod launch;
#[doc(hidden)]
pub mod layout;
mod memory;
mod module;
mod parse;
mod regalloc;
mod report;
mod shadow;

pub use launch::{Counters, Device, Launch, Options, Timing};
pub use memory::{Memory, MemoryError};
pub use module::Module;
pub use report::{ParseError, Report, Rule, Site};
