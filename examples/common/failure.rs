//! How a program can fail, and its exit statuses.

use std::path::Path;

use fused_lora::peft::ErrorKind;

/// Exit status when everything asked for was done.
pub const DONE: u8 = 0;
/// Exit status after Ctrl-C, as shells report it.
pub const INTERRUPTED: u8 = 130;

#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A flag is missing, malformed, or contradicts another or the files.
    #[error("{0}")]
    Usage(String),
    #[error("{file}: {problem}")]
    Malformed { file: String, problem: String },
    #[error("needs {0}, which is not built yet")]
    NotBuilt(String),
    #[error("{0}")]
    Adapter(#[from] fused_lora::peft::Error),
    #[error("{0}")]
    Computation(#[from] candle_core::Error),
    #[error("step {step}: {problem}")]
    Diverged { step: usize, problem: String },
    #[error("cannot write {file}: {error}")]
    Output { file: String, error: std::io::Error },
}

impl Failure {
    pub fn malformed(file: &Path, problem: impl std::fmt::Display) -> Self {
        Self::Malformed { file: file.display().to_string(), problem: problem.to_string() }
    }

    pub fn output(file: impl std::fmt::Display, error: std::io::Error) -> Self {
        Self::Output { file: file.to_string(), error }
    }

    /// 1: it went wrong on the way; 2: not built yet; 3: the command line or a file is wrong, nothing was begun.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Computation(_) | Self::Diverged { .. } | Self::Output { .. } => 1,
            Self::NotBuilt(_) => 2,
            Self::Adapter(error) if matches!(error.kind, ErrorKind::Unsupported { .. }) => 2,
            Self::Usage(_) | Self::Malformed { .. } | Self::Adapter(_) => 3,
        }
    }
}

pub type Result<T, E = Failure> = std::result::Result<T, E>;
