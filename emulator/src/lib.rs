#![forbid(unsafe_code)]
#![doc = include_str!("../README.md")]

mod alu;
#[doc(hidden)]
pub mod calibration;
mod clock;
mod counters;
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
mod tensormap;

pub use counters::{Class, Counters, Line};
pub use launch::{Checks, Device, Launch, Options, Timing};
pub use memory::{Memory, MemoryError};
pub use module::{KernelInfo, Module, Parameter};
pub use report::{ParseError, Report, Rule, Site};
pub use tensormap::{Interleave, L2Promotion, OobFill, Swizzle, TensorMap, TensorMapError, TensorType};
