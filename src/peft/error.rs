//! The error of this module: what went wrong, and in which file.

use std::path::{Path, PathBuf};

/// Why an adapter or its configuration was refused, or could not be written.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{}{kind}", file.as_ref().map(|file| format!("{}: ", file.display())).unwrap_or_default())]
#[non_exhaustive]
pub struct Error {
    /// The file it is about, where there is one.
    pub file: Option<PathBuf>,
    /// What is wrong.
    pub kind: ErrorKind,
}

impl Error {
    /// The same error, about `file`.
    pub(super) fn at(mut self, file: &Path) -> Self {
        self.file = Some(file.to_path_buf());
        self
    }
}

impl From<ErrorKind> for Error {
    fn from(kind: ErrorKind) -> Self {
        Self { file: None, kind }
    }
}

/// What can be wrong with an adapter: each names the tensor, the module or the configuration's key, what it is and what
/// it must be.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The operating system refused.
    #[error("could not {what}: {message}")]
    Io {
        /// `"read"`, `"write"`, …
        what: &'static str,
        /// The kind of failure, to match on.
        kind: std::io::ErrorKind,
        /// What the system said.
        message: String,
    },
    /// The configuration is not a JSON object.
    #[error("the configuration is not valid JSON: {message}")]
    Json {
        /// What the parser said, with line and column.
        message: String,
    },
    /// The file of tensors is not valid safetensors: truncated, or its header contradicts it.
    #[error("not a valid safetensors file: {message}")]
    Safetensors {
        /// What the reader said.
        message: String,
    },
    /// A key of the configuration has a value that PEFT does not accept.
    #[error("`{key}` is {got}, expected {expected}")]
    Field {
        /// Key of adapter_config.json.
        key: String,
        /// Its value as JSON, shortened; `absent` without one.
        got: String,
        /// What it may be.
        expected: String,
    },
    /// The adapter needs something that this crate does not compute.
    #[error("`{key}` is {got}: {feature} is not supported, expected {expected}")]
    Unsupported {
        /// Key of adapter_config.json, or the tensor that shows it.
        key: String,
        /// Its value as JSON, shortened, or the tensor's shape.
        got: String,
        /// The feature's name, as PEFT's documentation calls it.
        feature: &'static str,
        /// What would be accepted.
        expected: &'static str,
    },
    /// A regular expression is invalid or too large.
    #[error("the pattern {pattern:?} of `{key}` is refused: {message}")]
    Pattern {
        /// Key of adapter_config.json.
        key: &'static str,
        /// The expression, shortened.
        pattern: String,
        /// What is wrong with it.
        message: String,
    },
    /// Matching the patterns takes more work than any adapter needs.
    #[error("matching the pattern {pattern:?} of `{key}` on `{name}` takes too long: {message}")]
    PatternCost {
        /// Key of adapter_config.json.
        key: &'static str,
        /// The expression, shortened.
        pattern: String,
        /// The module's name, shortened.
        name: String,
        /// Which limit was hit.
        message: String,
    },
    /// A tensor has an element type that adapters are not stored in.
    #[error("tensor `{tensor}` is {got}, expected F32, F16 or BF16")]
    Dtype {
        /// Key in the file.
        tensor: String,
        /// Its type as safetensors names it.
        got: String,
    },
    /// A tensor's shape disagrees with the configuration, with its partner or with the base model.
    #[error("tensor `{tensor}` has shape {got:?}, expected {expected}")]
    Shape {
        /// Key in the file.
        tensor: String,
        /// Its shape.
        got: Vec<usize>,
        /// What it must be, and because of what.
        expected: String,
    },
    /// A tensor that must be there is not.
    #[error("tensor `{tensor}` is absent, expected it because {because}")]
    Missing {
        /// Key in the file.
        tensor: String,
        /// What asks for it.
        because: String,
    },
    /// A tensor that nothing in the configuration asks for.
    #[error("tensor `{tensor}` is not expected: {because}")]
    Unexpected {
        /// Key in the file.
        tensor: String,
        /// Why not.
        because: String,
    },
    /// Values of another number than the shape holds.
    #[error("{got} values for a tensor of shape {shape:?}, expected {expected}")]
    Length {
        /// Values passed.
        got: usize,
        /// The shape.
        shape: Vec<usize>,
        /// Values it holds (`usize::MAX` when the product overflows).
        expected: usize,
    },
    /// `all-linear` was asked about a name before the base model's linear modules were named.
    #[error("`target_modules` is \"all-linear\", expected `expand_all_linear` before `{name}` is looked up")]
    AllLinear {
        /// The name that was looked up.
        name: String,
    },
}

/// Result with this module's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// At most 80 characters of it, for a message.
pub(super) fn shorten(text: &str) -> String {
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
