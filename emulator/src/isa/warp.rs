//! Instructions of a warp, and of the barriers of a CTA.

use super::{Address, Dst, Pred, Space, Src, Ty};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Redux {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum WarpOp {
    Stmatrix {
        trans: bool,
        space: Space,
        addr: Address,
        a: Vec<Src>,
    },
    Movmatrix {
        d: Dst,
        a: Src,
    },
    Elect {
        d: Dst,
        p: u16,
        mask: Src,
    },
    Match {
        all: bool,
        d: Dst,
        p: Option<u16>,
        a: Src,
        mask: Src,
    },
    Redux {
        op: Redux,
        ty: Ty,
        d: Dst,
        a: Src,
        mask: Src,
    },
    /// `mma` with accumulators in f16.
    MmaF16 {
        k: u8,
        d: [Dst; 2],
        a: Vec<Src>,
        b: Vec<Src>,
        c: [Src; 2],
    },
}

impl WarpOp {
    /// The lanes that must take part, when the instruction names them.
    pub fn mask(&self) -> Option<Src> {
        match self {
            WarpOp::Elect { mask, .. } | WarpOp::Match { mask, .. } | WarpOp::Redux { mask, .. } => Some(*mask),
            _ => None,
        }
    }
}

/// What `bar.red` computes over the threads' predicates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reduce {
    Popc(Dst),
    And(u16),
    Or(u16),
}

/// `bar` and `barrier`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Bar {
    pub id: Src,
    pub count: Option<Src>,
    pub arrive: bool,
    /// All lanes of a warp arrive together.
    pub aligned: bool,
    pub reduce: Option<(Reduce, Pred)>,
}

/// Instructions about caches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Cache {
    /// `prefetch`, which may name any address.
    Prefetch,
    /// `applypriority`: the line must exist.
    Priority { addr: Address },
    /// `discard`: the line's contents are lost.
    Discard { addr: Address },
}
