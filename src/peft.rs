//! Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, read and written (feature `peft`).
//!
//! [`Adapter::load`] takes what PEFT 0.21 loads and this crate computes, [`Adapter::save`] writes what PEFT loads.
//! Names of modules are relative to the base model, as `model.layers.0.self_attn.q_proj`; A is R × K, B is N × R,
//! row-major, and never transposed.
//!
//! ```
//! use fused_lora::Dtype;
//! use fused_lora::peft::{Adapter, Config, Factors, Tensor};
//!
//! // Rank 2, α = 4, for every module named `q_proj`.
//! let mut adapter = Adapter::new(Config::new(2, 4.0, ["q_proj"]));
//! let a = Tensor::from_f32(Dtype::F32, &[2, 3], &[0.5; 6])?; // R × K
//! let b = Tensor::from_f32(Dtype::F32, &[4, 2], &[0.0; 8])?; // N × R
//! adapter.insert("model.layers.0.self_attn.q_proj", Factors::new(a, b))?;
//!
//! let dir = std::env::temp_dir().join(format!("fused-lora-doc-{}", std::process::id()));
//! adapter.save(&dir)?; // PEFT loads this folder
//! let again = Adapter::load(&dir)?;
//! for (name, module, factors) in again.modules() {
//!     assert_eq!((name, module.r, module.scale), ("model.layers.0.self_attn.q_proj", 2, 2.0));
//!     assert_eq!(factors.a.to_f32(), [0.5; 6]);
//! }
//! # std::fs::remove_dir_all(&dir).ok();
//! # Ok::<(), fused_lora::peft::Error>(())
//! ```
//!
//! # What is refused
//!
//! Features that change the maths are refused by name ([`ErrorKind::Unsupported`]), never ignored: aLoRA, QALoRA,
//! BD-LoRA, KaSA, Arrow, MonteCLoRA, VeLoRA, Megatron, `target_parameters`, `trainable_token_indices`,
//! `layer_replication`; initialisations that change the base; factors of embeddings and convolutions, with DoRA or without; and any
//! `use_…` that is not known. The crate is stricter than PEFT where that only warns: every tensor must be asked for by the
//! configuration, named with the prefix `base_model.model.` and accompanied by its partner, and ranks must agree with
//! the shapes. Keys of the configuration that PEFT 0.21 does not know are kept, and listed by [`Config::unknown_keys`].
//!
//! Whether the adapter fits a base model, [`Adapter::check_base`] says.
//!
//! # Regular expressions
//!
//! They are read in Python's syntax, as far as `fancy-regex` knows it. Their size is bounded when they are compiled,
//! and the work of matching them, over all names that one [`Matcher`] is asked about ([`ErrorKind::PatternCost`]).

mod adapter;
mod config;
mod error;
mod field;
mod file;
mod key;
mod matching;
mod pattern;
mod tensor;

pub use adapter::{Adapter, Factors, Linear};
pub use config::{Bias, Config, Module, Names, Targets};
pub use error::{Error, ErrorKind, Result};
pub use matching::Matcher;
pub use tensor::Tensor;
