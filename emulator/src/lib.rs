//! Wiring of a development branch.
#![forbid(unsafe_code)]
#![allow(dead_code, unused_imports)]
mod alu;
mod isa;
