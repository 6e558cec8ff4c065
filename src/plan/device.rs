//! The properties of a GPU that planning looks at.

/// A GPU as the planner sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// For messages.
    pub name: String,
    /// Compute capability as major · 10 + minor.
    pub arch: u32,
    /// Streaming multiprocessors.
    pub sms: u32,
    /// Shared memory a CTA can opt in to, in bytes.
    pub shared_per_block: u32,
    /// Shared memory of an SM, in bytes.
    pub shared_per_sm: u32,
}

impl Device {
    /// A device of the given compute capability with that architecture's shared memory (CUDA C++ Programming Guide,
    /// "Technical Specifications per Compute Capability"), for planning without a GPU.
    pub fn of_arch(name: &str, arch: u32, sms: u32) -> Device {
        let (shared_per_sm, shared_per_block) = match arch {
            75 => (64, 64),
            80 | 87 => (164, 163),
            90 | 100 | 103 | 110 => (228, 227),
            _ => (100, 99),
        };
        Device {
            name: name.to_owned(),
            arch,
            sms,
            shared_per_block: shared_per_block << 10,
            shared_per_sm: shared_per_sm << 10,
        }
    }
}
