//! The op and the layer for candle.
