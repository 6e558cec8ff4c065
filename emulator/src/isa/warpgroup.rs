//! Instructions of a warpgroup.

use std::sync::Arc;

use super::{Pred, Src, Ty};

/// Whether the accumulator takes part in the sum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum ScaleD {
    Const(bool),
    Pred(Pred),
}

/// Where A comes from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum OperandA {
    Descriptor(Src),
    Registers([u16; 4]),
}

/// `wgmma.mma_async` of 64 x n x 16.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Wgmma {
    pub n: u16,
    /// Type of A and B.
    pub ab: Ty,
    /// The accumulator is f16, two elements to a register; f32 otherwise.
    pub d_f16: bool,
    pub d: Vec<u16>,
    pub a: OperandA,
    pub b: Src,
    pub scale_d: ScaleD,
    pub negate_a: bool,
    pub negate_b: bool,
    pub trans_a: bool,
    pub trans_b: bool,
}

impl Wgmma {
    /// Registers that belong to the operation until it has been waited for.
    pub fn pinned(&self) -> impl Iterator<Item = u16> + '_ {
        let a: &[u16] = match &self.a {
            OperandA::Registers(a) => a,
            OperandA::Descriptor(_) => &[],
        };
        self.d.iter().chain(a).copied()
    }
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Warpgroup {
    Mma(Arc<Wgmma>),
    /// `wgmma.fence`
    Fence,
    /// `wgmma.commit_group`
    Commit,
    /// `wgmma.wait_group`
    Wait {
        pending: u32,
    },
    /// `setmaxnreg`
    Registers {
        grow: bool,
        count: u32,
    },
}
