//! The host side of the CUDA backend over a stub of the driver: what it calls, what it refuses, what it leaves behind. No kernel
//! runs, so this needs no GPU, and says nothing of what kernels compute.
#![cfg(feature = "cuda")]

#[path = "../arguments/call.rs"]
mod call;
#[path = "../common/mod.rs"]
mod common;
mod faults;
mod graphs;
mod launches;
mod lifetimes;
#[path = "../arguments/on_device.rs"]
mod on_device;
mod refused;
mod stub;
#[path = "../arguments/table.rs"]
mod table;
