//! Clusters, mbarriers, proxies and bulk copies: the instructions that came with sm_80's mbarrier and sm_90.

use super::{Address, Atomic, Dst, Order, Scope, Space, Src, Ty};

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Hopper {
    /// `mapa`: the address of the same variable in the shared memory of the CTA of `rank`.
    Mapa {
        generic: bool,
        d: Dst,
        a: Src,
        rank: Src,
    },
    /// `getctarank`.
    CtaRank {
        generic: bool,
        d: Dst,
        a: Src,
    },
    /// `isspacep`.
    IsSpace {
        space: Space,
        p: u16,
        a: Src,
    },
    /// `mov.pred p, %is_explicit_cluster`.
    IsExplicitCluster {
        p: u16,
    },
    ClusterArrive {
        release: bool,
        aligned: bool,
    },
    ClusterWait {
        aligned: bool,
    },
    /// `fence.proxy.async`, for both spaces or one.
    ProxyFence {
        shared: bool,
        global: bool,
    },
    /// `fence.proxy.tensormap::generic`; an acquire names the tensor map.
    TensorMapFence {
        scope: Scope,
        map: Option<Address>,
    },
    /// `fence.mbarrier_init.release.cluster`.
    InitFence,
    Mbarrier(Mbarrier),
    /// `mbarrier.pending_count`.
    PendingCount {
        d: Dst,
        a: Src,
    },
    Bulk(Bulk),
    /// `st.async`, `red.async`: values to shared memory of the cluster, completing at an mbarrier there.
    StoreAsync {
        to: Address,
        values: Vec<Src>,
        ty: Ty,
        reduce: Option<Atomic>,
        mbarrier: Address,
    },
    BulkCommit,
    BulkWait {
        read: bool,
        pending: u32,
    },
    /// `cp.async.bulk.prefetch`, `prefetch.tensormap` and so on: no effect on memory, but the operands must be good.
    Prefetch {
        what: Prefetched,
        addr: Address,
        coords: Vec<Src>,
        bytes: Src,
    },
    /// `createpolicy`: an opaque value.
    Policy {
        d: Dst,
    },
    /// `griddepcontrol`: there is no other grid to wait for.
    GridDependency,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Prefetched {
    Bytes,
    Tensor,
    TensorMap,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MbarrierKind {
    Init,
    Inval,
    Arrive {
        drop: bool,
        no_complete: bool,
        expect: bool,
    },
    ExpectTx,
    CompleteTx,
    Test {
        parity: bool,
        may_block: bool,
    },
    /// `cp.async.mbarrier.arrive`.
    Copies {
        no_inc: bool,
    },
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Mbarrier {
    pub kind: MbarrierKind,
    pub space: Space,
    pub addr: Address,
    /// The state that an arrival returns.
    pub d: Dst,
    /// The result of a test.
    pub p: Option<u16>,
    /// Count of an arrival or initialisation, transaction count, state or parity of a test.
    pub a: Src,
    pub order: Order,
    /// `None` where the instruction names none.
    pub scope: Option<Scope>,
}

/// `cp.async.bulk`, `cp.reduce.async.bulk`, with or without `.tensor`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Bulk {
    pub to: Space,
    pub from: Space,
    /// The side in shared memory that is not `src`, or the plain global destination, or the tensor map of a store.
    pub dst: Address,
    pub src: Address,
    /// Coordinates of a tensor copy; empty for a plain one.
    pub coords: Vec<Src>,
    pub bytes: Src,
    pub mbarrier: Option<Address>,
    pub multicast: Option<Src>,
    pub hint: Option<Src>,
    /// With the type of the elements; a tensor map has its own.
    pub reduce: Option<(Atomic, Option<Ty>)>,
}

impl Hopper {
    /// Every register that is read.
    pub fn sources(&mut self) -> Vec<&mut Src> {
        match self {
            Hopper::Mapa { a, rank, .. } => vec![a, rank],
            Hopper::CtaRank { a, .. } | Hopper::IsSpace { a, .. } | Hopper::PendingCount { a, .. } => vec![a],
            Hopper::TensorMapFence { map: Some(map), .. } => vec![&mut map.base],
            Hopper::Mbarrier(Mbarrier { addr, a, .. }) => vec![&mut addr.base, a],
            Hopper::Bulk(Bulk { dst, src, coords, bytes, mbarrier, multicast, hint, .. }) => {
                let mut all = vec![&mut dst.base, &mut src.base, bytes];
                all.extend(coords.iter_mut().chain(multicast).chain(hint));
                all.extend(mbarrier.as_mut().map(|mbarrier| &mut mbarrier.base));
                all
            }
            Hopper::StoreAsync { to, values, mbarrier, .. } => {
                let mut all = vec![&mut to.base, &mut mbarrier.base];
                all.extend(values);
                all
            }
            Hopper::Prefetch { addr, coords, bytes, .. } => {
                let mut all = vec![&mut addr.base, bytes];
                all.extend(coords);
                all
            }
            _ => Vec::new(),
        }
    }

    /// Every register that is written.
    pub fn destination(&mut self) -> Option<&mut Dst> {
        match self {
            Hopper::Mapa { d, .. }
            | Hopper::CtaRank { d, .. }
            | Hopper::PendingCount { d, .. }
            | Hopper::Policy { d }
            | Hopper::Mbarrier(Mbarrier { d, .. }) => Some(d),
            _ => None,
        }
    }

    pub fn predicate(&mut self) -> Option<&mut u16> {
        match self {
            Hopper::IsSpace { p, .. } | Hopper::IsExplicitCluster { p } => Some(p),
            Hopper::Mbarrier(Mbarrier { p, .. }) => p.as_mut(),
            _ => None,
        }
    }

    /// `.aligned` forms of `barrier.cluster`.
    pub fn is_collective(&self) -> bool {
        matches!(self, Hopper::ClusterArrive { aligned: true, .. } | Hopper::ClusterWait { aligned: true })
    }
}
