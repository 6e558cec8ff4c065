#![forbid(unsafe_code)]
#![allow(dead_code)]
mod alu;
mod isa;
