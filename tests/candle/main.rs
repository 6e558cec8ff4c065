//! The candle op and layer, against candle's own autograd of the composed expression and the f64 oracle.

#![allow(clippy::panic)] // how a test fails

mod biases;
mod case;
mod dora;
mod dropout;
mod full;
#[cfg(feature = "candle-cuda")]
mod gpu;
mod gradients;
mod layer;
mod matrix;
mod projections;
mod refused;
mod routes;
mod training;
