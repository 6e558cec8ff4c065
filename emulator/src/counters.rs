//! What a run did, in numbers.

use std::collections::BTreeMap;
use std::fmt;

/// Kinds of instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Class {
    /// Integer and floating-point arithmetic, comparisons, conversions, moves.
    Arithmetic,
    /// Branches, exits, traps.
    Control,
    /// Loads, of any space.
    Load,
    /// Stores, of any space.
    Store,
    /// `atom` and `red`.
    Atomic,
    /// `cp.async` with commits and waits.
    Copy,
    /// `ldmatrix` and `stmatrix`.
    Matrix,
    /// `mma`.
    Tensor,
    /// Barriers and fences.
    Barrier,
    /// Shuffles, votes.
    Warp,
    /// Anything else.
    Other,
}

/// What one instruction of the kernel did, over the whole run.
///
/// **Shared memory** is modelled as 32 banks, each four bytes wide: a *wavefront* serves one word of each bank. Lanes are served
/// together in groups that together ask for 128 bytes: 32 lanes of up to 4 bytes, 16 of 8, 8 of 16, the eight rows of a
/// matrix of `ldmatrix` or `stmatrix`; lanes with the same word share it. Without conflicts each group takes one wavefront.
///
/// **Global memory** is fetched in sectors of 32 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Line {
    /// Line of the PTX text.
    pub ptx_line: u32,
    /// The instruction as written.
    pub instruction: String,
    /// `file:line` of the CUDA source, when the PTX has line information.
    pub source: Option<String>,
    /// Its kind.
    pub class: Class,
    /// How often a warp executed it.
    pub executed: u64,
    /// Wavefronts of shared memory.
    pub wavefronts: u64,
    /// Wavefronts beyond those that accesses without bank conflicts would have taken.
    pub conflicts: u64,
    /// Sectors of global memory.
    pub sectors: u64,
    /// Sectors if the bytes of each access were next to each other.
    pub least_sectors: u64,
}

/// What a run did. Numbers marked * are 0 unless [`Checks::counters`](crate::Checks::counters) is set.
#[derive(Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// Instructions executed, one for all lanes of a warp.
    pub instructions: u64,
    /// `mma.sync` instructions.
    pub mma: u64,
    /// `wgmma.mma_async` instructions, one for each warpgroup.
    pub wgmma: u64,
    /// Arrivals of warps at barriers of their CTA.
    pub barriers: u64,
    /// Atomic operations, one for each lane.
    pub atomics: u64,
    /// Bytes loaded from global memory, asynchronous copies included.
    pub global_loaded: u64,
    /// Bytes stored to global memory, atomics included.
    pub global_stored: u64,
    /// Bytes loaded from shared memory.
    pub shared_loaded: u64,
    /// Bytes stored to shared memory, asynchronous copies included.
    pub shared_stored: u64,
    /// Bytes that asynchronous copies brought from global to shared memory.
    pub copied: u64,
    /// Bytes loaded from local memory.
    pub local_loaded: u64,
    /// Bytes stored to local memory.
    pub local_stored: u64,
    /// Bytes of parameters loaded.
    pub param_loaded: u64,
    /// CTAs that were alive at once, at the most.
    pub resident_ctas: u32,
    /// * Executed instructions by kind.
    pub mix: BTreeMap<Class, u64>,
    /// * Wavefronts of shared memory.
    pub wavefronts: u64,
    /// * Wavefronts beyond those that accesses without bank conflicts would have taken.
    pub conflicts: u64,
    /// * Sectors of 32 bytes of global memory that accesses asked for.
    pub sectors: u64,
    pub(crate) lines: Vec<Line>,
}

impl Counters {
    /// * One entry for each instruction of the kernel that was executed, in the order of the PTX text.
    pub fn lines(&self) -> &[Line] {
        &self.lines
    }
}

impl fmt::Debug for Counters {
    /// Without the lines.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Counters")
            .field("instructions", &self.instructions)
            .field("mma", &self.mma)
            .field("barriers", &self.barriers)
            .field("atomics", &self.atomics)
            .field("global_loaded", &self.global_loaded)
            .field("global_stored", &self.global_stored)
            .field("shared_loaded", &self.shared_loaded)
            .field("shared_stored", &self.shared_stored)
            .field("copied", &self.copied)
            .field("local_loaded", &self.local_loaded)
            .field("local_stored", &self.local_stored)
            .field("param_loaded", &self.param_loaded)
            .field("resident_ctas", &self.resident_ctas)
            .field("mix", &self.mix)
            .field("wavefronts", &self.wavefronts)
            .field("conflicts", &self.conflicts)
            .field("sectors", &self.sectors)
            .finish_non_exhaustive()
    }
}
