//! Counts by instruction: executions, wavefronts of shared memory, sectors of global memory. The model is described at
//! [`Line`].

use super::Context;
use super::space::resolve;
use crate::alu::Lanes;
use crate::counters::{Class, Line};
use crate::isa::{Hopper, Op, Space, WarpOp};
use crate::module::Module;

const BANKS: u64 = 32;
const SECTOR: u64 = 32;

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LineCount {
    pub executed: u64,
    wavefronts: u64,
    /// Wavefronts without conflicts.
    least_wavefronts: u64,
    sectors: u64,
    least_sectors: u64,
}

/// The most words that one bank must serve, where each address stands for one or more whole banks' words.
fn wavefronts(addresses: impl Iterator<Item = u64> + Clone, bytes: u64) -> u64 {
    let unit = bytes.max(4);
    let banks = BANKS * 4 / unit;
    // Mostly every address has a bank of its own.
    let mut taken = 0u32;
    let apart = addresses.clone().all(|address| {
        let bank = 1 << (address / unit % banks);
        let free = taken & bank == 0;
        taken |= bank;
        free
    });
    if apart {
        return 1;
    }
    let mut units: Vec<u64> = addresses.map(|address| address / unit).collect();
    units.sort_unstable();
    units.dedup();
    let mut load = [0; BANKS as usize];
    units.iter().for_each(|unit| load[(unit % banks) as usize] += 1);
    load.into_iter().max().unwrap_or(0)
}

fn sectors(addresses: impl Iterator<Item = u64> + Clone) -> u64 {
    let (mut last, mut count, mut ascending) = (None, 0, true);
    for sector in addresses.clone().map(|address| address / SECTOR) {
        ascending &= last.is_none_or(|last| sector >= last);
        count += u64::from(last != Some(sector));
        last = Some(sector);
    }
    if ascending {
        return count;
    }
    let mut all: Vec<u64> = addresses.map(|address| address / SECTOR).collect();
    all.sort_unstable();
    all.dedup();
    all.len() as u64
}

impl LineCount {
    fn shared(&mut self, addresses: &[u64], mask: u32, bytes: usize) {
        let group = 32 / (bytes / 4).max(1);
        for (i, addresses) in addresses.chunks(group).enumerate() {
            let active = mask >> (i * group);
            let active = addresses.iter().enumerate().filter(|(lane, _)| active >> lane & 1 != 0).map(|(_, at)| *at);
            if active.clone().next().is_some() {
                self.wavefronts += wavefronts(active, bytes as u64);
                self.least_wavefronts += 1;
            }
        }
    }

    fn global(&mut self, addresses: &[u64], mask: u32, bytes: u64) {
        let active = addresses.iter().enumerate().filter(|(lane, _)| mask >> lane & 1 != 0).map(|(_, at)| *at);
        let count = sectors(active);
        self.sectors += count;
        self.least_sectors += bytes.div_ceil(SECTOR).min(count);
    }
}

fn class(op: &Op) -> Class {
    match op {
        Op::Ld { .. } => Class::Load,
        Op::St { .. } => Class::Store,
        Op::Atom { .. } => Class::Atomic,
        Op::CpAsync { .. } | Op::CpAsyncCommit | Op::CpAsyncWait { .. } => Class::Copy,
        Op::Ldmatrix { .. } | Op::Warp(WarpOp::Stmatrix { .. }) => Class::Matrix,
        Op::Mma { .. } => Class::Tensor,
        Op::Bar { .. } | Op::WarpSync { .. } | Op::Fence { .. } => Class::Barrier,
        Op::Shfl { .. } | Op::VoteSync { .. } | Op::ActiveMask { .. } => Class::Warp,
        Op::Bra { .. } | Op::Exit | Op::Trap | Op::Nanosleep => Class::Control,
        Op::Unary { .. }
        | Op::Binary { .. }
        | Op::Ternary { .. }
        | Op::Bfi { .. }
        | Op::Cvt { .. }
        | Op::CvtPack { .. }
        | Op::Pack { .. }
        | Op::Unpack { .. }
        | Op::Setp { .. }
        | Op::Selp { .. }
        | Op::PredLogic { .. }
        | Op::PredMov { .. }
        | Op::PredConst { .. }
        | Op::Cvta { .. } => Class::Arithmetic,
        Op::Hopper(op) => match **op {
            Hopper::Bulk(_) | Hopper::StoreAsync { .. } | Hopper::BulkCommit | Hopper::BulkWait { .. } => Class::Copy,
            Hopper::ClusterArrive { .. }
            | Hopper::ClusterWait { .. }
            | Hopper::ProxyFence { .. }
            | Hopper::TensorMapFence { .. }
            | Hopper::InitFence
            | Hopper::Mbarrier(_) => Class::Barrier,
            Hopper::Mapa { .. } | Hopper::CtaRank { .. } | Hopper::IsSpace { .. } => Class::Arithmetic,
            Hopper::IsExplicitCluster { .. } | Hopper::PendingCount { .. } | Hopper::Policy { .. } => Class::Arithmetic,
            Hopper::Prefetch { .. } | Hopper::GridDependency => Class::Other,
        },
        // Other families add their operations and need no place here.
        #[allow(unreachable_patterns, reason = "as long as there are none")]
        _ => Class::Other,
    }
}

impl Context<'_> {
    /// A load, store or atomic of `bytes` by each lane.
    #[inline]
    pub(super) fn count_access(&mut self, pc: u32, space: Space, (addresses, mask): (&Lanes, u32), bytes: usize) {
        let Some(lines) = &mut self.lines else { return };
        let line = &mut lines[pc as usize];
        match resolve(space, addresses[mask.trailing_zeros() as usize & 31]).0 {
            Space::Shared => line.shared(addresses, mask, bytes),
            Space::Global => line.global(addresses, mask, u64::from(mask.count_ones()) * bytes as u64),
            _ => {}
        }
    }

    /// A `cp.async`; the shared side counts as a store would.
    #[inline]
    pub(super) fn count_copy(
        &mut self,
        pc: u32,
        (to, from, valid, mask): (&Lanes, &Lanes, Option<&Lanes>, u32),
        bytes: u8,
    ) {
        let Some(lines) = &mut self.lines else { return };
        let line = &mut lines[pc as usize];
        line.shared(to, mask, bytes.into());
        let (mut read, mut total) = (mask, u64::from(mask.count_ones()) * u64::from(bytes));
        if let Some(valid) = valid {
            let valid = |lane: &u32| if mask >> lane & 1 != 0 { valid[*lane as usize] & 0xffff_ffff } else { 0 };
            read = (0..32).filter(|lane| valid(lane) != 0).map(|lane| 1 << lane).sum();
            total = (0..32).map(|lane| valid(&lane)).sum();
        }
        line.global(from, read, total);
    }

    /// The rows of an `ldmatrix` or `stmatrix`.
    #[inline]
    pub(super) fn count_rows(&mut self, pc: u32, rows: &[u64]) {
        if let Some(lines) = &mut self.lines {
            lines[pc as usize].shared(rows, u32::MAX, 16);
        }
    }

    /// Brings the counts by instruction into the counters.
    pub(super) fn sum_up(&mut self, module: &Module) {
        let Some(lines) = self.lines.take() else { return };
        for (count, instruction) in lines.iter().zip(&self.kernel.code).filter(|(count, _)| count.executed != 0) {
            let conflicts = count.wavefronts - count.least_wavefronts;
            let class = class(&instruction.op);
            *self.counters.mix.entry(class).or_default() += count.executed;
            self.counters.wavefronts += count.wavefronts;
            self.counters.conflicts += conflicts;
            self.counters.sectors += count.sectors;
            self.counters.lines.push(Line {
                ptx_line: instruction.line,
                instruction: instruction.text.to_string(),
                source: module.source_line(instruction.location),
                class,
                executed: count.executed,
                wavefronts: count.wavefronts,
                conflicts,
                sectors: count.sectors,
                least_sectors: count.least_sectors,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn banks_serve_one_word_at_a_time() {
        let of = |stride: u64, bytes: usize| {
            let mut line = LineCount::default();
            let addresses: Vec<u64> = (0..32).map(|lane| 1024 + lane * stride).collect();
            line.shared(&addresses, u32::MAX, bytes);
            (line.wavefronts, line.least_wavefronts)
        };
        // One word each, the same word, every second bank, one bank, and a stride of 33 words, which meets every bank.
        assert_eq!([4, 0, 8, 128, 132].map(|stride| of(stride, 4)), [(1, 1), (1, 1), (2, 1), (32, 1), (1, 1)]);
        // Two lanes per word.
        assert_eq!(of(2, 2), (1, 1));
        assert_eq!([8, 16, 128].map(|stride| of(stride, 8)), [(2, 2), (4, 2), (32, 2)]);
        assert_eq!([16, 64, 128, 144].map(|stride| of(stride, 16)), [(4, 4), (16, 4), (32, 4), (4, 4)]);
    }

    #[test]
    fn sectors_are_counted_once() {
        assert_eq!(sectors((0..32).map(|lane| 4 * lane)), 4);
        assert_eq!(sectors((0..32).map(|lane| 4 * (31 - lane))), 4);
        assert_eq!(sectors((0..32).map(|lane| 4 * lane + 16)), 5);
        assert_eq!(sectors((0..32).map(|lane| 64 * lane)), 32);
        assert_eq!(sectors((0..32).map(|lane| lane % 2 * 64)), 2);
    }
}
