//! Operands, types, state spaces and what accesses say of order.

use super::Compare;

/// A per-lane source. 32-bit and 16-bit registers hold their value zero-extended to 64 bits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Src {
    Reg(u16),
    Imm(u64),
    Special(Special),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Special {
    Tid(u8),
    Ntid(u8),
    Ctaid(u8),
    Nctaid(u8),
    LaneId,
    WarpId,
    LaneMask(Compare),
    SmId,
    NsmId,
    NwarpId,
    /// Registers that hold what the host or the environment decides.
    Zero,
    DynamicSharedBytes,
    TotalSharedBytes,
    Clock,
    ClusterCtaid(u8),
    ClusterNctaid(u8),
    ClusterCtaRank,
    ClusterNctaRank,
    ClusterId(u8),
    NclusterId(u8),
    /// Address in local memory of a variable in the frame of the function at hand.
    Frame(u32),
}

/// Bytes of `.param` memory from one place of a thread's frame to another, by their offsets; a call moves them between the
/// caller's frame and the callee's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moved {
    pub from: u32,
    pub to: u32,
    pub bytes: u32,
}

/// A destination register; `None` is the sink `_`.
pub(crate) type Dst = Option<u16>;
/// A predicate register with negation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Pred {
    pub slot: u16,
    pub negated: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ty {
    B(u8),
    U(u8),
    S(u8),
    F16,
    Bf16,
    F16x2,
    Bf16x2,
    F32,
    F64,
}

impl Ty {
    pub fn bits(self) -> u32 {
        match self {
            Ty::B(bits) | Ty::U(bits) | Ty::S(bits) => u32::from(bits),
            Ty::F16 | Ty::Bf16 => 16,
            Ty::F16x2 | Ty::Bf16x2 | Ty::F32 => 32,
            Ty::F64 => 64,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    Generic,
    Global,
    /// Of the executing CTA.
    Shared,
    /// Of any CTA of the cluster.
    SharedCluster,
    Local,
    Param,
    Const,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Weak,
    Relaxed,
    Acquire,
    Release,
    AcqRel,
}

/// Of a strong access or a fence. `.sys` is the GPU here: nothing beyond it takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Scope {
    Cta,
    Cluster,
    Gpu,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Semantics {
    pub order: Order,
    pub scope: Scope,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Address {
    pub base: Src,
    pub offset: i64,
}
