//! Special registers.

use super::warp::Warp;
use super::{Context, Cta};
use crate::alu::Lanes;
use crate::decode::LOCAL_BASE;
use crate::isa::{Compare, Special};

impl Warp {
    /// PTX ISA, "Special Registers".
    pub(super) fn special(&self, context: &Context<'_>, cta: &Cta, special: Special) -> Lanes {
        let [x, y, _] = context.launch.block;
        let per_lane = |value: &dyn Fn(u32) -> u64| std::array::from_fn(|lane| value(lane as u32));
        let thread = |lane: u32| self.id * 32 + lane;
        match special {
            Special::Tid(0) => per_lane(&|lane| u64::from(thread(lane) % x)),
            Special::Tid(1) => per_lane(&|lane| u64::from(thread(lane) / x % y)),
            Special::Tid(_) => per_lane(&|lane| u64::from(thread(lane) / x / y)),
            Special::Ntid(axis) => [u64::from(context.launch.block[axis as usize]); 32],
            Special::Ctaid(axis) => [u64::from(cta.index[axis as usize]); 32],
            Special::Nctaid(axis) => [u64::from(context.launch.grid[axis as usize]); 32],
            // CTAs of a launch go round the multiprocessors.
            Special::SmId => [u64::from(cta.serial % context.options.device.sms.max(1)); 32],
            Special::NsmId => [u64::from(context.options.device.sms); 32],
            Special::NwarpId => [u64::from(context.options.device.threads_per_sm / 32); 32],
            Special::Zero => [0; 32],
            Special::LaneId => per_lane(&u64::from),
            Special::WarpId => [u64::from(self.id); 32],
            Special::LaneMask(compare) => per_lane(&|lane| {
                let bit = 1u64 << lane;
                match compare {
                    Compare::Lt => bit - 1,
                    Compare::Le => bit | (bit - 1),
                    Compare::Gt => !(bit | (bit - 1)) & 0xffff_ffff,
                    Compare::Ge => !(bit - 1) & 0xffff_ffff,
                    _ => bit,
                }
            }),
            Special::DynamicSharedBytes => [u64::from(context.launch.shared_bytes); 32],
            Special::TotalSharedBytes => [u64::from(context.shared_bytes); 32],
            Special::Frame(at) => {
                let stride = u64::from(context.kernel.local_end - LOCAL_BASE);
                per_lane(&|lane| u64::from(at) + stride * self.saved[lane as usize].len() as u64)
            }
            Special::Clock => [context.counters.instructions; 32],
            Special::ClusterCtaid(axis) => [u64::from(context.in_cluster(cta.rank)[axis as usize]); 32],
            Special::ClusterNctaid(axis) => [u64::from(context.clusters.cluster[axis as usize]); 32],
            Special::ClusterCtaRank => [u64::from(cta.rank); 32],
            Special::ClusterNctaRank => [context.cluster_size() as u64; 32],
            Special::ClusterId(axis) => {
                [u64::from(cta.index[axis as usize] / context.clusters.cluster[axis as usize]); 32]
            }
            Special::NclusterId(axis) => {
                [u64::from(context.launch.grid[axis as usize] / context.clusters.cluster[axis as usize]); 32]
            }
        }
    }
}
