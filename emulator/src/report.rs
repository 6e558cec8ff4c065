//! What goes wrong: parse errors, launch errors and the reports of a run.

use std::fmt;

/// PTX that cannot be read or holds something the emulator does not implement.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("PTX line {line}: {message}")]
pub struct ParseError {
    /// Line of the PTX text, from 1.
    pub line: u32,
    /// What was found, and what is expected or supported.
    pub message: String,
}

/// The rule that a kernel broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Rule {
    /// The launch itself is wrong: unknown kernel, size of the parameters, too many threads or bytes.
    BadLaunch,
    /// An access outside every allocation, or across the end of one.
    OutOfBounds,
    /// An address that is not a multiple of the access size.
    Misaligned,
    /// A read of bytes that nothing has written.
    Uninitialised,
    /// Two accesses to the same bytes, one of them a write, without an order between them.
    Race,
    /// A collective instruction that not all threads of the warp (or the barrier's threads) reach.
    Diverged,
    /// `bar.sync` with a bad id or count, or with different counts for one barrier; `barrier.cluster` out of turn.
    BarrierMisuse,
    /// An mbarrier used before it is initialised, with a bad count, by plain accesses, or past what its phase allows.
    MbarrierMisuse,
    /// No warp can make progress.
    Deadlock,
    /// The instruction limit was reached.
    Livelock,
    /// Asynchronous copies or matrix operations that no one waited for at the end of the kernel.
    AsyncLeft,
    /// A register of a `wgmma` is used before the operation has been waited for.
    InFlight,
    /// `wgmma` uses a register without the `wgmma.fence` that must come between it and an earlier access.
    RegisterFence,
    /// A matrix descriptor of `wgmma` that is wrong, or not the same in all warps.
    BadDescriptor,
    /// `trap`, or an operand outside what the instruction allows.
    Trap,
}

/// A place in the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// CTA index.
    pub cta: [u32; 3],
    /// Warp within the CTA.
    pub warp: u32,
    /// First lane concerned, when one can be named.
    pub lane: Option<u32>,
    /// Line of the PTX text.
    pub ptx_line: u32,
    /// The instruction as written.
    pub instruction: String,
    /// `file:line` of the CUDA source with what it is inlined at, when the PTX has line information.
    pub source: Option<String>,
}

/// Characters of a long instruction that are shown, of its beginning and of its end.
const HEAD: usize = 100;
const TAIL: usize = 40;

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [x, y, z] = self.cta;
        write!(f, "cta {x},{y},{z} warp {}", self.warp)?;
        if let Some(lane) = self.lane {
            write!(f, " lane {lane}")?;
        }
        write!(f, ", PTX line {}: `", self.ptx_line)?;
        // An instruction of a warpgroup may name more than a hundred registers.
        let text = self.instruction.as_str();
        match (text.char_indices().nth(HEAD), text.char_indices().rev().nth(TAIL - 1)) {
            (Some((head, _)), Some((tail, _))) if head + TAIL < tail => {
                write!(f, "{} … {}`", &text[..head], &text[tail..])?
            }
            _ => write!(f, "{text}`")?,
        }
        if let Some(source) = &self.source {
            write!(f, " ({source})")?;
        }
        Ok(())
    }
}

/// Why a run stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The rule that was broken.
    pub rule: Rule,
    /// The kernel.
    pub kernel: String,
    /// What happened, with addresses and buffer names.
    pub message: String,
    /// Where, when a single place can be named.
    pub site: Option<Site>,
    /// The other side of a race.
    pub other: Option<Site>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} in {}: {}", self.rule, self.kernel, self.message)?;
        if let Some(site) = &self.site {
            write!(f, "\n  at {site}")?;
        }
        if let Some(other) = &self.other {
            write!(f, "\n  and {other}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Report {}
