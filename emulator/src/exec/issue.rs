//! Issuing bulk copies: what their operands must be, and to which agent they belong.
//!
//! PTX ISA, "cp.async.bulk, cp.reduce.async.bulk, cp.async.bulk.prefetch" and their forms with `.tensor`.

use super::access::lanes_of;
use super::bulk::{Chunk, Done, InFlight, Plan, Side};
use super::cluster::{OFFSET, RANK_SHIFT};
use super::warp::Flow;
use super::{Context, Cta, Fault, Outcome};
use crate::clock::Proxy;
use crate::isa::{Address, Atomic, Bulk, Prefetched, Space, Src, Ty};
use crate::report::Rule;
use crate::shadow::ASYNC;

impl Cta {
    /// Issues a copy for each lane.
    pub(super) fn bulk(
        &mut self,
        context: &mut Context<'_>,
        warp: usize,
        (pc, mask): (u32, u32),
        op: &Bulk,
    ) -> Outcome<Flow> {
        let state = &self.warps[warp];
        let dst = state.addresses(context, self, op.dst);
        let src = state.addresses(context, self, op.src);
        let bytes = state.read(context, self, op.bytes);
        let coords: Vec<_> = op.coords.iter().map(|coord| state.read(context, self, *coord)).collect();
        let mbarrier = op.mbarrier.map(|mbarrier| state.addresses(context, self, mbarrier));
        let multicast = op.multicast.map(|mask| state.read(context, self, mask));
        context.issues += 1;
        for lane in lanes_of(mask) {
            let at = lane as usize;
            let place = |fault: Fault| fault.lane(lane);
            let plan = if coords.is_empty() {
                plain(op, dst[at], src[at], bytes[at] & 0xffff_ffff)
            } else {
                let coords: Vec<i64> = coords.iter().map(|coord| i64::from(coord[at] as u32 as i32)).collect();
                let (map, shared) = if op.to == Space::Global { (dst[at], src[at]) } else { (src[at], dst[at]) };
                self.tensor_plan(context, (warp, lane, pc), op, map, (shared & OFFSET, &coords))
            };
            let plan = plan.map_err(place)?;
            let issued = match &mbarrier {
                Some(mbarrier) => {
                    let ranks = multicast.as_ref().map(|ranks| ranks[at] & 0xffff);
                    if op.to == Space::Shared {
                        self.own_shared(dst[at] & 0xffff_ffff).map_err(place)?;
                    }
                    let own = Side::Shared(self.serial, self.slot);
                    let from = if op.from == Space::Global { Side::Global } else { own };
                    self.issue_to_shared(context, (warp, pc, lane), from, plan, (dst[at], mbarrier[at], ranks))
                }
                None => self.issue_to_global(context, (warp, pc, lane), plan, src[at]),
            };
            issued.map_err(place)?;
        }
        self.warps[warp].views.next_epoch();
        // What lands at once does so before anything else happens.
        Ok(Flow::Yield)
    }

    fn issue_to_global(
        &mut self,
        context: &mut Context<'_>,
        (warp, pc, lane): (usize, u32, u32),
        plan: Plan,
        src: u64,
    ) -> Outcome<()> {
        self.own_shared(src & 0xffff_ffff)?;
        let (read, write) = match self.warps[warp].groups.agents {
            Some(agents) => agents,
            None => (self.new_agent(), self.new_agent()),
        };
        let manner = (context.is_eager(), context.options.fence_reads);
        let groups = &mut self.warps[warp].groups;
        groups.agents = Some((read, write));
        groups.number += u32::from(std::mem::replace(&mut groups.issue, context.issues) != context.issues);
        let (number, group) = (groups.number, groups.committed[lane as usize]);
        let mut copy = InFlight::new(self, warp, (pc, lane), manner);
        for agent in [read, write] {
            context.issuers.insert((self.serial, agent), copy.owner);
        }
        (copy.from, copy.to) = (Side::Shared(self.serial, self.slot), Side::Global);
        (copy.reads, copy.writes, copy.number) = ((self.serial, read), (self.serial, write), number);
        copy.done = Done::Group { group, read: false, seen: false };
        copy.plan = plan;
        context.in_flight.push(copy);
        Ok(())
    }

    /// To this CTA, another one, or all of a multicast; each destination is a copy of its own.
    fn issue_to_shared(
        &mut self,
        context: &mut Context<'_>,
        (warp, pc, lane): (usize, u32, u32),
        from: Side,
        plan: Plan,
        (dst, mbarrier, ranks): (u64, u64, Option<u64>),
    ) -> Outcome<()> {
        let own = u64::from(self.rank);
        let rank_of = |address: u64| ((address & 0xffff_ffff) >> RANK_SHIFT).checked_sub(1).unwrap_or(own);
        if rank_of(dst) != rank_of(mbarrier) {
            let message =
                format!("destination {dst:#x} and mbarrier {mbarrier:#x} of a bulk copy are in different CTAs");
            return Err(Fault::new(Rule::Trap, message));
        }
        let size = context.cluster_size();
        if rank_of(dst) >= size as u64 {
            let message = format!("shared address {dst:#x} of rank {} in a cluster of {size} CTAs", rank_of(dst));
            return Err(Fault::new(Rule::OutOfBounds, message));
        }
        let ranks = ranks.unwrap_or(1 << rank_of(dst));
        if ranks == 0 || ranks >> size != 0 {
            let message = format!("a multicast to CTAs {ranks:#b} of a cluster of {size}");
            return Err(Fault::new(Rule::Trap, message));
        }
        // Values that come with the instruction go through the generic proxy.
        let generic = from == Side::None;
        let mut user = self.mbarrier_user(warp, lane, pc);
        if !generic {
            user.access.kind |= ASYNC;
            user.view = self.warps[warp].views.in_proxy(lane, Proxy::Shared, false);
        }
        let mut first = true;
        for rank in (0..size as u64).filter(|rank| ranks >> rank & 1 != 0) {
            let manner = (context.is_eager(), context.options.fence_reads);
            let mut copy = InFlight::new(self, warp, (pc, lane), manner);
            let target = (rank + 1) << RANK_SHIFT | (mbarrier & OFFSET);
            let ((agent, number), to) = self.on(context, target, |cta, context, at| {
                let issued = cta.expect_copy(context, at, &user)?;
                Ok((issued, Side::Shared(cta.serial, cta.slot)))
            })?;
            context.issuers.insert(agent, copy.owner);
            copy.from = from;
            if generic {
                copy.make_generic();
            }
            (copy.to, copy.reads, copy.writes, copy.number) = (to, agent, agent, number);
            copy.done = Done::Mbarrier((mbarrier & OFFSET) as u32);
            copy.counts = std::mem::take(&mut first);
            copy.plan = plan.clone();
            context.in_flight.push(copy);
        }
        Ok(())
    }

    /// PTX ISA, "st.async, red.async".
    pub(super) fn store_async(
        &mut self,
        context: &mut Context<'_>,
        warp: usize,
        (pc, mask): (u32, u32),
        (to, values, mbarrier): (Address, &[Src], Address),
        (ty, reduce): (Ty, Option<Atomic>),
    ) -> Outcome<Flow> {
        let state = &self.warps[warp];
        let to = state.addresses(context, self, to);
        let mbarrier = state.addresses(context, self, mbarrier);
        let values: Vec<_> = values.iter().map(|value| state.read(context, self, *value)).collect();
        let each = ty.bits() as usize / 8;
        let bytes = each * values.len();
        context.issues += 1;
        for lane in lanes_of(mask) {
            let at = lane as usize;
            if !to[at].is_multiple_of(bytes as u64) {
                return Err(Fault::new(Rule::Misaligned, format!("{bytes} bytes at {:#x}", to[at])).lane(lane));
            }
            let mut fill = [0; 16];
            for (i, value) in values.iter().enumerate() {
                fill[i * each..(i + 1) * each].copy_from_slice(&value[at].to_le_bytes()[..each]);
            }
            let chunk = Chunk { from: None, to: to[at] & OFFSET, bytes: bytes as u8 };
            let plan =
                Plan { chunks: vec![chunk], fill, bytes: bytes as u32, reduce: reduce.map(|reduce| (reduce, ty)) };
            self.issue_to_shared(context, (warp, pc, lane), Side::None, plan, (to[at], mbarrier[at], None))
                .map_err(|fault| fault.lane(lane))?;
        }
        self.warps[warp].views.next_epoch();
        Ok(Flow::Yield)
    }

    /// Prefetches change nothing, but what they name must exist.
    pub(super) fn prefetch(
        &mut self,
        context: &mut Context<'_>,
        warp: usize,
        (pc, mask): (u32, u32),
        what: Prefetched,
        (addr, coords, bytes): (Address, &[Src], Src),
    ) -> Outcome<()> {
        let state = &self.warps[warp];
        let (addresses, bytes) = (state.addresses(context, self, addr), state.read(context, self, bytes));
        for lane in lanes_of(mask) {
            let place = |fault: Fault| fault.lane(lane);
            let (at, bytes) = (addresses[lane as usize], bytes[lane as usize] & 0xffff_ffff);
            match what {
                Prefetched::Bytes => {
                    check_units("prefetch", &[at], bytes).map_err(place)?;
                    context.memory.find(at, bytes as usize).map_err(super::bytes::memory_fault).map_err(place)?;
                }
                Prefetched::Tensor | Prefetched::TensorMap => {
                    let map = self.tensor_map(context, (warp, lane, pc), at).map_err(place)?;
                    if what == Prefetched::Tensor && map.dims.len() != coords.len() {
                        return Err(place(super::tensor::wrong_rank(&map, coords.len())));
                    }
                }
            }
        }
        Ok(())
    }
}

fn check_units(what: &str, addresses: &[u64], bytes: u64) -> Outcome<()> {
    if bytes > OFFSET {
        return Err(Fault::new(Rule::OutOfBounds, format!("{what} of {bytes} bytes, more than any shared memory")));
    }
    if !bytes.is_multiple_of(16) {
        return Err(Fault::new(Rule::Trap, format!("{what} of {bytes} bytes, expected a multiple of 16")));
    }
    match addresses.iter().find(|address| !address.is_multiple_of(16)) {
        Some(address) => {
            Err(Fault::new(Rule::Misaligned, format!("{what} at {address:#x}, expected a multiple of 16")))
        }
        None => Ok(()),
    }
}

/// A copy of contiguous bytes.
fn plain(op: &Bulk, dst: u64, src: u64, bytes: u64) -> Outcome<Plan> {
    check_units("a bulk copy", &[dst, src], bytes)?;
    let local = |space: Space, address: u64| if space == Space::Global { address } else { address & OFFSET };
    let (dst, src) = (local(op.to, dst), local(op.from, src));
    let chunk = |at: u64| Chunk { from: Some(src.wrapping_add(at)), to: dst.wrapping_add(at), bytes: 16 };
    let reduce = op.reduce.and_then(|(op, ty)| ty.map(|ty| (op, ty)));
    Ok(Plan { chunks: (0..bytes / 16).map(|i| chunk(16 * i)).collect(), fill: [0; 16], bytes: bytes as u32, reduce })
}
