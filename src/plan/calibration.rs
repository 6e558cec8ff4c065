//! The figures that the planner reckons times with, in one place, to be set by measurements: `scripts/tune` asks for them one by
//! one, `scripts/report --model` holds what they predict against what was measured.
//!
//! So far every one is arithmetic or somebody else's; none was measured on these kernels. They decide between tile shapes, cluster
//! sizes, bundles and chunks. Results do not depend on them.

/// What the portable family reaches.
pub(super) struct Portable {
    /// 10^6 floating-point operations per second of an SM of compute capability 9.0 that is full of large tiles. Not measured:
    /// half of what the same SM does with wgmma, as others' kernels of this kind reach.
    pub hopper_sm_flops_per_us: f64,
    /// The same of one of compute capability 7.5 with bf16, which it has no tensor instruction for. Not measured: 64
    /// multiply-adds a clock at 1.6 GHz, of which 0.7 are reached.
    pub turing_sm_f32_flops_per_us: f64,
    /// The same elsewhere, as part of the data sheet's rate. Not measured.
    pub of_peak: f64,
    /// Work per SM and unit of time with small tiles, relative to large ones, which load less per product. Not measured; from
    /// the ratio of shared-memory reads to products.
    pub small_rate: f64,
    /// What one CTA alone gets of an SM that several would fill. Not measured.
    pub alone: f64,
    /// Microseconds of a launch before the first and after the last step. Not measured.
    pub launch: f64,
}

pub(super) const PORTABLE: Portable = Portable {
    hopper_sm_flops_per_us: 3.1e6,
    turing_sm_f32_flops_per_us: 0.143e6,
    of_peak: 0.7,
    small_rate: 0.7,
    alone: 0.5,
    launch: 4.0,
};

/// What units of work of the Hopper family cost, in clocks of an SM.
pub(super) struct Sm90 {
    /// Clocks per microsecond under the power limit. Not measured: chosen so that the widest tile comes to the rate at which
    /// cuBLAS multiplies large matrices on an H200 (790 TFLOP/s, of whole waves 814).
    pub clocks_per_us: f64,
    /// Clocks of a k16 step of one slab per column: m64nNk16 at the tensor peak of 4096 FLOP per clock and SM. Not measured.
    pub mma_per_column: f64,
    /// The same when shared memory limits it: 16 clocks for the rows, 1/4 per column (128 bytes per clock). Not measured.
    pub mma_rows: f64,
    pub mma_shared_per_column: f64,
    /// Clocks that a step of 64 takes beside its products: barriers and issue. Not measured.
    pub step: f64,
    /// Clocks per KiB that a step fetches, for the power that moving it takes from the products. Not measured.
    pub per_kib: f64,
    /// Bytes per clock that L2 delivers, to all SMs together and to one at most. Not measured.
    pub l2: f64,
    pub l2_per_sm: f64,
    /// Bytes per clock that one SM can stream from memory with its ring full. Not measured.
    pub stream: f64,
    /// Part of the data sheet's memory bandwidth that is reached. Not measured.
    pub memory: f64,
    /// GB/s where the data sheet is not known.
    pub unknown_gigabytes: f64,
    /// Clocks of a main tile beside its steps, and per column of its epilogue. Not measured.
    pub tile: f64,
    pub column: f64,
    /// Clocks for two CTAs to wait for one another, per ticket. Not measured.
    pub pair: f64,
    /// Clocks of a narrow tile beside its steps: start, store, flag or counter. Not measured.
    pub unit: f64,
    /// Clocks that dropout takes of a step of 64 of a narrow tile that reads x, while the products of the step before run: some
    /// 140 logical instructions and comparisons of a warp at two clocks each, beside as long of multiplications, for each of the
    /// two warps of a scheduler. Reckoned from the machine code, not measured.
    pub drop: f64,
    /// Clocks per column that it adds to a step of dx that reads dh: two instructions for each of 32 registers of 64 columns,
    /// again twice, and about as long until products are done. Reckoned, not measured.
    pub drop_column: f64,
    /// Clocks of shared memory that a gain takes of a step of 64 that reads dy, beside what the products read: the 16 KiB of dy
    /// are read and written, 128 bytes per clock. Its instructions, some 100 of each of the two warps of a scheduler, are fewer.
    /// Reckoned, not measured.
    pub gain: f64,
    /// Microseconds of a launch before the first and after the last step. Not measured.
    pub launch: f64,
}

pub(super) const SM90: Sm90 = Sm90 {
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
    drop: 600.0,
    drop_column: 4.0,
    gain: 256.0,
    launch: 4.0,
};
