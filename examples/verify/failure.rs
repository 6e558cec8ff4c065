//! How a case can end, and the exit statuses.

/// Ends of a case, from the least grave to the gravest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// Every error is within its bound.
    Within,
    /// The case needs something that is not built yet.
    NotBuilt,
    /// The command line or the case is wrong.
    Unreadable,
    /// An error exceeds its bound.
    Exceeded,
}

impl Outcome {
    pub fn exit_status(self) -> u8 {
        match self {
            Self::Within => 0,
            Self::Exceeded => 1,
            Self::NotBuilt => 2,
            Self::Unreadable => 3,
        }
    }
}

/// Why a case gives no numbers.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("{0}")]
    Usage(String),
    #[error("{file}: {problem}")]
    Malformed { file: String, problem: String },
    #[error("needs {0}, which is not built yet")]
    NotBuilt(String),
    #[error("the {backend} backend failed: {error}")]
    Backend { backend: &'static str, error: fused_lora::Error },
    #[error("cannot write the results: {0}")]
    Output(#[from] std::io::Error),
}

impl Failure {
    pub fn malformed(file: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Malformed { file: file.into(), problem: problem.into() }
    }

    pub fn outcome(&self) -> Outcome {
        match self {
            Self::NotBuilt(_) => Outcome::NotBuilt,
            Self::Usage(_) | Self::Malformed { .. } | Self::Backend { .. } | Self::Output(_) => Outcome::Unreadable,
        }
    }
}
