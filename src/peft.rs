//! Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, read and written (feature `peft`).
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
