//! What units of work are taken to cost, in clocks of an SM.
//!
//! Every figure of [`CALIBRATION`] is arithmetic or somebody else's, none was measured on these kernels. They decide between
//! tile shapes, cluster sizes, bundles and chunks; results do not depend on them.

use super::{Tile, narrow_columns};
use crate::params::*;
use crate::plan::Device;

/// The figures of the model.
struct Calibration {
    /// Clocks per microsecond under the power limit. Not measured: chosen so that the widest tile comes to the rate at which
    /// cuBLAS multiplies large matrices on an H200 (790 TFLOP/s, of whole waves 814).
    clocks_per_us: f64,
    /// Clocks of a k16 step of one slab per column: m64nNk16 at the tensor peak of 4096 FLOP per clock and SM. Not measured.
    mma_per_column: f64,
    /// The same when shared memory limits it: 16 clocks for the rows, 1/4 per column (128 bytes per clock). Not measured.
    mma_rows: f64,
    mma_shared_per_column: f64,
    /// Clocks that a step of 64 takes beside its products: barriers and issue. Not measured.
    step: f64,
    /// Clocks per KiB that a step fetches, for the power that moving it takes from the products. Not measured.
    per_kib: f64,
    /// Bytes per clock that L2 delivers, to all SMs together and to one at most. Not measured.
    l2: f64,
    l2_per_sm: f64,
    /// Bytes per clock that one SM can stream from memory with its ring full. Not measured.
    stream: f64,
    /// Part of the data sheet's memory bandwidth that is reached. Not measured.
    memory: f64,
    /// GB/s where the data sheet is not known.
    unknown_gigabytes: f64,
    /// Clocks of a main tile beside its steps, and per column of its epilogue. Not measured.
    tile: f64,
    column: f64,
    /// Clocks for two CTAs to wait for one another, per ticket. Not measured.
    pair: f64,
    /// Clocks of a narrow tile beside its steps: start, store, flag or counter. Not measured.
    unit: f64,
    /// Microseconds of a launch before the first and after the last step. Not measured.
    launch: f64,
}

const CALIBRATION: Calibration = Calibration {
    clocks_per_us: 1750.0,
    mma_per_column: 0.5,
    mma_rows: 16.0,
    mma_shared_per_column: 0.25,
    step: 100.0,
    per_kib: 2.0,
    l2: 6154.0,
    l2_per_sm: 64.0,
    stream: 51.0,
    memory: 0.9,
    unknown_gigabytes: 3000.0,
    tile: 600.0,
    column: 6.0,
    pair: 200.0,
    unit: 2000.0,
    launch: 4.0,
};

/// Clocks of a k16 step of one slab with so many columns.
fn mma(columns: u32) -> f64 {
    let columns = f64::from(columns);
    let c = &CALIBRATION;
    (columns * c.mma_per_column).max(c.mma_rows + columns * c.mma_shared_per_column)
}

/// Clocks of a step of 64 of both slabs.
fn products(columns: u32) -> f64 {
    f64::from(LORA_SM90_SLABS * (LORA_SM90_BLOCK_K / 16)) * mma(columns)
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
    clocks / CALIBRATION.clocks_per_us + CALIBRATION.launch
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
        let c = &CALIBRATION;
        let gigabytes = device.peak.map_or(c.unknown_gigabytes, |peak| f64::from(peak.gigabytes_per_second));
        Machine { cluster, clusters, memory: gigabytes * 1000.0 * c.memory / c.clocks_per_us }
    }

    /// A step of 64 of a main tile: products, or what L2 has to deliver. A cluster fetches the columns once.
    fn main_step(&self, tile: &Tile) -> f64 {
        let c = &CALIBRATION;
        let fetched = bytes(LORA_SM90_BLOCK_M) + bytes(tile.columns) / f64::from(self.cluster);
        let rate = c.l2_per_sm.min(c.l2 / f64::from(self.cluster * self.clusters));
        (products(tile.columns) + c.step + c.per_kib * fetched / 1024.0).max(fetched / rate)
    }

    /// A main tile over `depth`, with a tail of `rank`.
    pub(super) fn main(&self, tile: &Tile, depth: usize, rank: usize) -> MainTile {
        let c = &CALIBRATION;
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

    /// A step of 64 of a narrow tile, when `streaming` CTAs read rows from memory at once.
    fn narrow_step(&self, columns: u32, streaming: u64) -> f64 {
        let c = &CALIBRATION;
        let fetched = bytes(LORA_SM90_BLOCK_M) + bytes(columns);
        let from_memory = bytes(LORA_SM90_BLOCK_M) * streaming as f64 / self.memory;
        (products(columns) + c.step / 2.0).max(fetched / c.stream).max(from_memory)
    }

    fn streaming(&self, tickets: u64) -> u64 {
        tickets.min(u64::from(self.clusters)) * u64::from(self.cluster)
    }

    /// A unit of h or dh over `depth`, of which `tickets` can run at once.
    pub(super) fn narrow(&self, depth: usize, rank: usize, tickets: u64) -> f64 {
        let steps = depth.div_ceil(LORA_SM90_BLOCK_K as usize) as f64;
        whole(steps * self.narrow_step(narrow_columns(rank), self.streaming(tickets)) + CALIBRATION.unit)
    }

    /// A unit of db or da over `tokens`, of which `tickets` can run at once; `partial_bytes` is what a CTA leaves, and reads
    /// again with those of the other chunks.
    pub(super) fn gradient(&self, tokens: u64, rank: usize, tickets: u64, partial_bytes: f64) -> f64 {
        let steps = tokens.div_ceil(u64::from(LORA_SM90_BLOCK_K)) as f64;
        let step = self.narrow_step(narrow_columns(rank), self.streaming(tickets));
        whole(steps * step + CALIBRATION.unit + 2.0 * partial_bytes / CALIBRATION.stream)
    }
}

/// Clocks of a main tile.
#[derive(Clone, Copy, Debug)]
pub(super) struct MainTile {
    pub clocks: f64,
    /// From its start until h (or dh) is wanted.
    pub until_tail: f64,
}
