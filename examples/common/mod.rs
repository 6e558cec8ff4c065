//! What `finetune` and `generate` share: a Llama from Hugging Face's files, its tokens, its adapters, and the command line.

pub mod adapters;
pub mod config;
pub mod failure;
pub mod flags;
pub mod linear;
pub mod llama;
pub mod rng;
pub mod tokens;
pub mod weights;
