//! What the instructions of `isa::Hopper` do, as far as it fits into a few lines; the rest is in `mbarrier`, `cluster`, `bulk`.

use super::access::lanes_of;
use super::cluster::RANK_SHIFT;
use super::mbarrier::pending_count;
use super::space::{SHARED_WINDOW, space_of};
use super::warp::Flow;
use super::{Context, Cta, Fault, Outcome};
use crate::alu::Lanes;
use crate::clock::Proxy;
use crate::isa::{Hopper, Mbarrier, MbarrierKind, Order, Space};
use crate::report::Rule;

pub(super) fn step(
    context: &mut Context<'_>,
    cta: &mut Cta,
    warp: usize,
    (pc, mask): (u32, u32),
    op: &Hopper,
) -> Outcome<Flow> {
    let state = &cta.warps[warp];
    match op {
        Hopper::Mapa { generic, d, a, rank } => {
            let (a, rank) = (state.read(context, cta, *a), state.read(context, cta, *rank));
            let value = mapa(context, mask, *generic, &a, &rank)?;
            cta.warps[warp].put(*d, mask, &value);
        }
        Hopper::CtaRank { d, a, .. } => {
            let own = u64::from(cta.rank);
            let value =
                state.read(context, cta, *a).map(|at| ((at & 0xffff_ffff) >> RANK_SHIFT).checked_sub(1).unwrap_or(own));
            cta.warps[warp].put(*d, mask, &value);
        }
        Hopper::IsSpace { space, p, a } => {
            let lanes = state.read(context, cta, *a);
            let inside = |at: u64| match (space_of(at), space) {
                ((Space::SharedCluster, at), Space::Shared) => cta.other_rank(at).is_none(),
                ((found, _), space) => found == *space,
            };
            let value = (0..32).filter(|lane| inside(lanes[*lane as usize])).fold(0, |value, lane| value | 1 << lane);
            cta.warps[warp].put_predicate(*p, mask, value);
        }
        Hopper::IsExplicitCluster { p } => {
            let explicit = context.cluster_size() > 1 || context.kernel.cluster.required.is_some();
            cta.warps[warp].put_predicate(*p, mask, if explicit { u32::MAX } else { 0 });
        }
        Hopper::ClusterArrive { release, .. } => cta.arrive_at_cluster(context, warp, mask, *release)?,
        Hopper::ClusterWait { .. } => return cta.wait_for_cluster(context, warp, mask),
        Hopper::ProxyFence { shared, global } => {
            let proxies = match (*shared, *global) {
                (true, true) => &[Proxy::Shared, Proxy::Global][..],
                (true, false) => &[Proxy::Shared],
                _ => &[Proxy::Global],
            };
            cta.fence_proxy(warp, mask, proxies);
        }
        Hopper::TensorMapFence { scope, map } => {
            // A release is one in the generic proxy; an acquire also orders what it learns before later uses of tensor maps.
            cta.fence(context, warp, mask, (*scope, Order::AcqRel, false));
            if map.is_some() {
                cta.fence_proxy(warp, mask, &[Proxy::TensorMap]);
            }
        }
        Hopper::InitFence => cta.fence_proxy(warp, mask, &[Proxy::Inits]),
        Hopper::Mbarrier(op) => return mbarrier(context, cta, warp, (pc, mask), op),
        Hopper::PendingCount { d, a } => {
            let value = state.read(context, cta, *a).map(pending_count);
            cta.warps[warp].put(*d, mask, &value);
        }
        Hopper::Bulk(op) => return cta.bulk(context, warp, (pc, mask), op),
        Hopper::StoreAsync { to, values, ty, reduce, mbarrier } => {
            return cta.store_async(context, warp, (pc, mask), (*to, values, *mbarrier), (*ty, *reduce));
        }
        Hopper::BulkCommit => cta.warps[warp].groups.commit(mask),
        Hopper::BulkWait { read, pending } => cta.wait_for_groups(context, warp, mask, *pending, *read)?,
        Hopper::Prefetch { what, addr, coords, bytes } => {
            cta.prefetch(context, warp, (pc, mask), *what, (*addr, coords, *bytes))?;
        }
        // A cache policy is opaque; the value is one that no kernel makes up.
        Hopper::Policy { d } => cta.warps[warp].put(*d, mask, &[0x10f0_0000_0000_0000; 32]),
        Hopper::GridDependency => {}
    }
    Ok(Flow::Next)
}

/// PTX ISA, "mapa".
fn mapa(context: &Context<'_>, mask: u32, generic: bool, a: &Lanes, rank: &Lanes) -> Outcome<Lanes> {
    let mut value = [0; 32];
    for lane in lanes_of(mask) {
        let (at, rank) = (a[lane as usize], rank[lane as usize] & 0xffff_ffff);
        let fault = |rule, message: String| Err(Fault::new(rule, message).lane(lane));
        if rank >= context.cluster_size() as u64 {
            let size = context.cluster_size();
            return fault(Rule::OutOfBounds, format!("mapa to rank {rank} in a cluster of {size} CTAs"));
        }
        let (space, offset) = if generic { space_of(at) } else { (Space::SharedCluster, at & 0xffff_ffff) };
        if space != Space::SharedCluster {
            return fault(Rule::Trap, format!("mapa of {at:#x}, which is not in shared memory"));
        }
        let window = if generic { SHARED_WINDOW } else { 0 };
        value[lane as usize] = window | (rank + 1) << RANK_SHIFT | (offset & super::cluster::OFFSET);
    }
    Ok(value)
}

fn mbarrier(
    context: &mut Context<'_>,
    cta: &mut Cta,
    warp: usize,
    (pc, mask): (u32, u32),
    op: &Mbarrier,
) -> Outcome<Flow> {
    let state = &cta.warps[warp];
    let addresses = state.addresses(context, cta, op.addr);
    let values = state.read(context, cta, op.a);
    match op.kind {
        MbarrierKind::Test { .. } => {
            return cta.test_mbarriers(context, warp, (pc, mask), op, (&addresses, &values));
        }
        MbarrierKind::Copies { no_inc } => {
            for lane in lanes_of(mask) {
                let place = |fault: Fault| fault.lane(lane);
                let (_, address) = cta.resolve(op.space, addresses[lane as usize]).map_err(place)?;
                let at = cta.own_shared(address).map_err(place)?;
                let user = cta.mbarrier_user(warp, lane, pc);
                cta.increment_pending(context, at, &user, no_inc).map_err(place)?;
                context.arrive_with_copies(cta, warp, (pc, lane), at);
            }
            return Ok(Flow::Yield);
        }
        _ => {}
    }
    let mut states = [0; 32];
    for lane in lanes_of(mask) {
        let place = |fault: Fault| fault.lane(lane);
        let (space, address) = cta.resolve(op.space, addresses[lane as usize]).map_err(place)?;
        if space != Space::Shared {
            let message = format!("an mbarrier at {address:#x}, which is not in shared memory");
            return Err(place(Fault::new(Rule::OutOfBounds, message)));
        }
        let local = matches!(op.kind, MbarrierKind::Init | MbarrierKind::Inval) || op.d.is_some();
        let address = if local { cta.own_shared(address).map_err(place)? } else { address };
        states[lane as usize] =
            cta.mbarrier(context, (warp, lane, pc), op, (address, values[lane as usize])).map_err(place)?;
    }
    // What the warp does next is not covered by what it has released.
    cta.warps[warp].views.next_epoch();
    cta.warps[warp].put(op.d, mask, &states);
    Ok(Flow::Next)
}
