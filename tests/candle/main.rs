//! The candle op and layer on the CPU, against candle's own autograd of the composed expression and the f64 oracle.

mod case;
mod gradients;
mod layer;
mod refused;
mod training;
