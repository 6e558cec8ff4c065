//! What units of work are taken to cost, in clocks of an SM.
//!
//! The figures are those of `src/plan/calibration.rs`. They decide between tile shapes, cluster sizes, bundles and chunks; results
//! do not depend on them.

use super::{Tile, narrow_columns};
use crate::params::*;
use crate::plan::Device;
use crate::plan::calibration::SM90;

/// Clocks of a k16 step of one slab with so many columns.
fn mma(columns: u32) -> f64 {
    let columns = f64::from(columns);
    let c = &SM90;
    (columns * c.mma_per_column).max(c.mma_rows + columns * c.mma_shared_per_column)
}

/// k16 steps of both slabs in a step of 64.
const STEPS: f64 = (LORA_SM90_SLABS * (LORA_SM90_BLOCK_K / 16)) as f64;

/// Clocks of a step of 64 of both slabs.
fn products(columns: u32) -> f64 {
    STEPS * mma(columns)
}

/// What happens to rows in shared memory before they are multiplied.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Alters {
    Nothing,
    /// Dropout, of x.
    Drops,
    /// A gain, of dy.
    Gains,
}

impl Alters {
    /// In a call with this dropout, of which some projection has a gain or none has.
    pub(super) fn of(dropout: &LoraDropout, is_gained: bool) -> Alters {
        match (dropout.threshold, is_gained) {
            (0, false) => Alters::Nothing,
            (0, true) => Alters::Gains,
            _ => Alters::Drops,
        }
    }

    /// Of rows of x.
    pub(super) fn of_x(self) -> Alters {
        if self == Alters::Drops { self } else { Alters::Nothing }
    }

    /// Of rows of dy.
    pub(super) fn of_dy(self) -> Alters {
        if self == Alters::Gains { self } else { Alters::Nothing }
    }

    /// Clocks of a step of 64 with so many columns, products and what happens while those of the step before run.
    fn step(self, columns: u32) -> f64 {
        let c = &SM90;
        let beside = match self {
            Alters::Nothing => 0.0,
            Alters::Drops => c.drop,
            Alters::Gains => STEPS * (c.mma_rows + f64::from(columns) * c.mma_shared_per_column) + c.gain,
        };
        products(columns).max(beside)
    }
}

/// Bytes of 64 elements of so many rows.
fn bytes(rows: u32) -> f64 {
    f64::from(rows * LORA_SM90_BLOCK_K * 2)
}

/// Whole clocks, which add up exactly: clusters that are done at the same time are seen to be.
fn whole(clocks: f64) -> f64 {
    clocks.round()
}

/// Microseconds of a launch whose clusters are done after `clocks`.
pub(super) fn microseconds(clocks: f64) -> f64 {
    clocks / SM90.clocks_per_us + SM90.launch
}

/// A device, cut into clusters.
#[derive(Clone, Copy, Debug)]
pub(super) struct Machine {
    /// CTAs of a cluster.
    pub cluster: u32,
    /// Clusters that are there at once.
    pub clusters: u32,
    /// Bytes per clock of memory.
    memory: f64,
}

impl Machine {
    pub(super) fn new(device: &Device, cluster: u32, clusters: u32) -> Machine {
        let c = &SM90;
        let gigabytes = device.known_peak().map_or(c.unknown_gigabytes, |peak| f64::from(peak.gigabytes_per_second));
        Machine { cluster, clusters, memory: gigabytes * 1000.0 * c.memory / c.clocks_per_us }
    }

    /// A step of 64 of a main tile: products, or what L2 has to deliver. A cluster fetches the columns once.
    fn main_step(&self, tile: &Tile) -> f64 {
        let c = &SM90;
        let fetched = bytes(LORA_SM90_BLOCK_M) + bytes(tile.columns) / f64::from(self.cluster);
        let rate = c.l2_per_sm.min(c.l2 / f64::from(self.cluster * self.clusters));
        (products(tile.columns) + c.step + c.per_kib * fetched / 1024.0).max(fetched / rate)
    }

    /// A main tile over `depth`, with a tail of `rank`.
    pub(super) fn main(&self, tile: &Tile, depth: usize, rank: usize) -> MainTile {
        let c = &SM90;
        let step = self.main_step(tile);
        let steps = depth.div_ceil(LORA_SM90_BLOCK_K as usize) as f64;
        let tail = rank.div_ceil(16) as f64 / 4.0;
        let pair = if self.cluster > 1 { c.pair } else { 0.0 };
        MainTile {
            clocks: whole((steps + tail) * step + c.tile + f64::from(tile.columns) * c.column + pair),
            // Copies run ahead by the depth of the ring.
            until_tail: (steps - f64::from(tile.stages)).max(0.0) * step,
        }
    }

    /// A step of 64 of a narrow tile, when `streaming` CTAs read rows from memory at once; `beside`: as many rows of another
    /// matrix too.
    fn narrow_step(&self, columns: u32, streaming: u64, alters: Alters, beside: bool) -> f64 {
        let c = &SM90;
        let rows = bytes(LORA_SM90_BLOCK_M) * if beside { 2.0 } else { 1.0 };
        let fetched = rows + bytes(columns);
        let from_memory = rows * streaming as f64 / self.memory;
        (alters.step(columns) + c.step / 2.0).max(fetched / c.stream).max(from_memory)
    }

    /// A unit that splits factors: what others take beside their steps, and f32 to be read and up to three halves of each written.
    pub(super) fn split(&self) -> f64 {
        let bytes = f64::from(LORA_SPLIT_RANKS * LORA_SPLIT_LENGTH * (4 + 3 * 2));
        whole(SM90.unit + bytes / SM90.stream)
    }

    fn streaming(&self, tickets: u64) -> u64 {
        tickets.min(u64::from(self.clusters)) * u64::from(self.cluster)
    }

    /// A unit of h or dh over `depth`, of which `tickets` can run at once.
    pub(super) fn narrow(&self, depth: usize, rank: usize, tickets: u64, alters: Alters) -> f64 {
        let steps = depth.div_ceil(LORA_SM90_BLOCK_K as usize) as f64;
        whole(steps * self.narrow_step(narrow_columns(rank), self.streaming(tickets), alters, false) + SM90.unit)
    }

    /// A unit of db or da over `tokens`, of which `tickets` can run at once; `partial_bytes` is what a CTA leaves, and reads
    /// again with those of the other chunks; `beside` as for a step.
    pub(super) fn gradient(
        &self,
        tokens: u64,
        rank: usize,
        tickets: u64,
        partial_bytes: f64,
        alters: Alters,
        beside: bool,
    ) -> f64 {
        let steps = tokens.div_ceil(u64::from(LORA_SM90_BLOCK_K)) as f64;
        let step = self.narrow_step(narrow_columns(rank), self.streaming(tickets), alters, beside);
        whole(steps * step + SM90.unit + 2.0 * partial_bytes / SM90.stream)
    }
}

/// Clocks of a main tile.
#[derive(Clone, Copy, Debug)]
pub(super) struct MainTile {
    pub clocks: f64,
    /// From its start until h (or dh) is wanted.
    pub until_tail: f64,
}

impl MainTile {
    /// A tile of dx over `depth`, with a tail of `rank`, where dropout applies to the tail or a gain to all but the tail.
    pub(super) fn altered(self, alters: Alters, tile: &Tile, depth: usize, rank: usize) -> MainTile {
        let steps = |extent: usize| extent.div_ceil(LORA_SM90_BLOCK_K as usize) as f64;
        let more = match alters {
            Alters::Nothing => return self,
            Alters::Drops => {
                let more = steps(rank) * f64::from(tile.columns) * SM90.drop_column;
                return MainTile { clocks: whole(self.clocks + more), ..self };
            }
            Alters::Gains => alters.step(tile.columns) - products(tile.columns),
        };
        let until_tail = self.until_tail + (steps(depth) - f64::from(tile.stages)).max(0.0) * more;
        MainTile { clocks: whole(self.clocks + steps(depth) * more), until_tail }
    }
}
