//! Rust's mirror of `kernels/params.h`, so that planning needs neither nvcc nor libclang.
//!
//! With the `cuda` feature the build compares every size, offset and constant with what bindgen reads from the header.

mod bytes;
mod sm90;

pub use sm90::*;

/// A row-major matrix in device memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoraMatrix {
    /// Device address of element (0, 0); 0 when the matrix is absent.
    pub ptr: u64,
    /// Elements between the starts of two rows.
    pub row_stride: i64,
}

/// Dropout on the adapter branch, as [`Dropout`](crate::Dropout) has it. The factor 1 / (1 − p) is in `scale`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoraDropout {
    /// Key of the generator.
    pub seed: u64,
    /// Upper half of its counter.
    pub offset: u64,
    /// Device address of seed and offset, read instead; 0 when absent.
    pub state: u64,
    /// An element is dropped when its 16 random bits are less; 0 for no dropout, 65536 when all are dropped.
    pub threshold: u32,
    /// Zero: the struct ends at a multiple of 8 bytes.
    pub padding: u32,
}

/// What DoRA's gradient of the magnitude is computed from, and where it goes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoraMagnitude {
    /// M × N, as forward wrote it.
    pub y: LoraMatrix,
    /// Device address of N elements of the storage type; 0 when absent.
    pub bias: u64,
    /// Device address of N elements of f32.
    pub magnitude: u64,
    /// Device address of N elements of f32, output; 0 when not asked for.
    pub dm: u64,
}

/// f32 factors over a 16-bit layer, and the halves that a launch splits them into.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoraSplit {
    /// R × K in f32, of all projections.
    pub a: LoraMatrix,
    /// N × R in f32 of each projection.
    pub b: [LoraMatrix; LORA_MAX_PROJECTIONS as usize],
    /// h or dh in pairs of columns; absent when nothing reads it.
    pub pairs: LoraMatrix,
    /// Device address of A in pairs (forward) or triples (backward) of rows, in the workspace; 0 when nothing reads it.
    pub split_a: u64,
    /// The same of B in triples (forward) or pairs (backward) of columns, those of all projections below each other.
    pub split_b: u64,
    /// Elements between row starts of the halves of A.
    pub split_a_stride: u32,
    /// Elements between row starts of the halves of B.
    pub split_b_stride: u32,
    /// Rank of each projection.
    pub ranks: [u32; LORA_MAX_PROJECTIONS as usize],
    /// Rank of all together; 0 when nothing is split.
    pub r: u32,
    /// Units that split A.
    pub a_units: u32,
    /// Units that split A or B.
    pub units: u32,
    /// Tickets of those units: one each, or one for each CTA of a cluster.
    pub tickets: u32,
}

/// A projection of forward. Blocks of columns are numbered over all projections, and so are ranks.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoraForwardProjection {
    /// N × K, frozen weight.
    pub w: LoraMatrix,
    /// N × R, up projection.
    pub b: LoraMatrix,
    /// M × N, output.
    pub y: LoraMatrix,
    /// Device address of N elements of the storage type; 0 when absent.
    pub bias: u64,
    /// Device address of N elements of f32, DoRA's factors of the columns; 0 when absent.
    pub gain: u64,
    /// Output features.
    pub n: u32,
    /// Rank: columns `first_rank` to `first_rank` + r of h are its own. 0 for the plain product.
    pub r: u32,
    /// Ranks of the projections before.
    pub first_rank: u32,
    /// Tiles along N of the projections before.
    pub first_block: u32,
    /// Factor of its ranks of h: α/r or α/√r.
    pub scale: f32,
    /// Zero: the struct ends at a multiple of 8 bytes.
    pub padding: u32,
}

/// The parameter of a forward kernel. Units of work are numbered h first, then y, after those that split f32 factors. With such
/// factors A is in pairs, with `r` rows, B and h in triples, with as many columns as the `r` of the projection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoraForwardParams {
    /// M × K, input.
    pub x: LoraMatrix,
    /// R × K, down projections of all projections below each other.
    pub a: LoraMatrix,
    /// M × R, written by the h units and read by the y units: the caller's, or in the workspace.
    pub h: LoraMatrix,
    /// Device address of the synchronisation words ([`SYNC_BYTES`](super::plan::SYNC_BYTES)).
    pub sync: u64,
    /// Tokens.
    pub m: u32,
    /// Input features.
    pub k: u32,
    /// Ranks of all projections.
    pub r: u32,
    /// Projections that are there, at least 1.
    pub projection_count: u32,
    /// Tiles along M.
    pub m_blocks: u32,
    /// Tiles along the N of all projections.
    pub n_blocks: u32,
    /// Units of h: `m_blocks` × narrow tiles along R.
    pub h_units: u32,
    /// All units: `h_units` + `m_blocks` × `n_blocks`.
    pub units: u32,
    /// M-blocks that pass over w together, for reuse in L2.
    pub group_m: u32,
    /// 2^`flag_shift` M-blocks share one flag.
    pub flag_shift: u32,
    /// Words from `sync` on that the last CTA clears.
    pub sync_words: u32,
    /// Zero.
    pub padding: u32,
    /// Dropout; all zero when there is none.
    pub dropout: LoraDropout,
    /// Device address of the words of a [`Routing`](crate::Routing); 0 when absent, and with more than one projection.
    pub routes: u64,
    /// f32 factors to be split; all zero when they are of the storage type.
    pub split: LoraSplit,
    /// Those that are there first.
    pub projections: [LoraForwardProjection; LORA_MAX_PROJECTIONS as usize],
}

/// A projection of backward. Steps of the reduction of dx over N, narrow tiles of dh along its ranks, and tiles of db are
/// numbered over all projections.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoraBackwardProjection {
    /// M × N, gradient of the output.
    pub dy: LoraMatrix,
    /// N × K, frozen weight.
    pub w: LoraMatrix,
    /// N × R, up projection.
    pub b: LoraMatrix,
    /// N × R, output; absent when not asked for.
    pub db: LoraMatrix,
    /// DoRA's gradient of the magnitude.
    pub magnitude: LoraMagnitude,
    /// Device address of N elements, output; 0 when not asked for.
    pub dbias: u64,
    /// Device address of N elements of f32, DoRA's factors of the columns; 0 when absent.
    pub gain: u64,
    /// Output features.
    pub n: u32,
    /// Rank: columns `first_rank` to `first_rank` + r of h and dh are its own. 0 for the plain product.
    pub r: u32,
    /// Ranks of the projections before.
    pub first_rank: u32,
    /// Tiles along N.
    pub n_blocks: u32,
    /// Steps of the reduction of dx over the N of the projections before.
    pub first_step: u32,
    /// Narrow tiles of dh in a block of rows, of the projections before.
    pub first_narrow: u32,
    /// Tiles of db (with dbias) of the projections before.
    pub first_db_tile: u32,
    /// `LORA_DB_F32` and `LORA_DBIAS_F32`, or-ed.
    pub flags: u32,
    /// Factor of its ranks of dh: α/r or α/√r.
    pub scale: f32,
    /// Zero: the struct ends at a multiple of 8 bytes.
    pub padding: u32,
}

/// The parameter of a backward kernel. Units of work are numbered dh, dx, db (with dbias), da, after those that split f32 factors.
/// With such factors A and dh are in triples, with `r` rows or columns, B and h in pairs, with as many as the `r` of the projection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoraBackwardParams {
    /// R × K, down projections of all projections below each other.
    pub a: LoraMatrix,
    /// M × K, input of forward; read for da only.
    pub x: LoraMatrix,
    /// M × R, as forward wrote it; a dy, unread as h, when no db is computed.
    pub h: LoraMatrix,
    /// M × R, in the workspace; written by the dh units, read by the dx and da units.
    pub dh: LoraMatrix,
    /// M × K, output; absent when not asked for.
    pub dx: LoraMatrix,
    /// R × K, output; absent when not asked for.
    pub da: LoraMatrix,
    /// Device address of f32 partial sums: one block of `partial_stride` per tile and chunk of db, then of da.
    pub partials: u64,
    /// Device address of the synchronisation words ([`SYNC_BYTES`](super::plan::SYNC_BYTES)).
    pub sync: u64,
    /// Tokens.
    pub m: u32,
    /// Input features.
    pub k: u32,
    /// Ranks of all projections.
    pub r: u32,
    /// Projections that are there, at least 1.
    pub projection_count: u32,
    /// Steps of the reduction of dx over the N of all projections.
    pub n_steps: u32,
    /// Tiles along M.
    pub m_blocks: u32,
    /// Tiles along K.
    pub k_blocks: u32,
    /// Units of dh: `m_blocks` × narrow tiles along the ranks of each projection.
    pub dh_units: u32,
    /// First unit past dx: `dh_units` + `m_blocks` × `k_blocks`.
    pub dx_end: u32,
    /// First unit past db: `dx_end` + tiles of db × `chunks`.
    pub db_end: u32,
    /// First unit past da, the number of units: `db_end` + tiles of da × `chunks`.
    pub units: u32,
    /// Chunks in which db and da reduce over tokens.
    pub chunks: u32,
    /// Tokens per chunk, a multiple of the block of rows.
    pub chunk_rows: u32,
    /// Distance between two blocks of partial sums, in f32 elements.
    pub partial_stride: u32,
    /// First counter of finished chunks (one per tile of db and da), in words from `sync`.
    pub counters: u32,
    /// M-blocks that pass over w together, for reuse in L2.
    pub group_m: u32,
    /// 2^`flag_shift` M-blocks share one flag.
    pub flag_shift: u32,
    /// Words from `sync` on that the last CTA clears.
    pub sync_words: u32,
    /// `LORA_ACCUMULATE_*` (which outputs add), `LORA_DA_F32` and `LORA_GAINED` (some projection has a gain), or-ed.
    pub flags: u32,
    /// Zero.
    pub padding: u32,
    /// Dropout; all zero when there is none.
    pub dropout: LoraDropout,
    /// Device address of the words of a [`Routing`](crate::Routing); 0 when absent, and with more than one projection.
    pub routes: u64,
    /// f32 factors to be split; all zero when they are of the storage type.
    pub split: LoraSplit,
    /// Those that are there first.
    pub projections: [LoraBackwardProjection; LORA_MAX_PROJECTIONS as usize],
}

/// The parameter of merge: merged = (gain ∘) (w + scale · B A), a tile per CTA, numbered along K first.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoraMergeParams {
    /// N × K; may be `merged` itself.
    pub w: LoraMatrix,
    /// R × K, of the storage type or f32.
    pub a: LoraMatrix,
    /// N × R, as `a`.
    pub b: LoraMatrix,
    /// N × K, output.
    pub merged: LoraMatrix,
    /// Device address of N elements of f32, a factor of each row; 0 when absent.
    pub gain: u64,
    /// Output features.
    pub n: u32,
    /// Input features.
    pub k: u32,
    /// Rank.
    pub r: u32,
    /// α/r or α/√r.
    pub scale: f32,
    /// Tiles along K.
    pub k_blocks: u32,
    /// `LORA_FACTORS_F32` or 0.
    pub flags: u32,
}

/// The parameter of round: rounded_a = A, rounded_b = scale · B (/ divisor), a tile per CTA, those of A first.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoraRoundParams {
    /// R × K, of the storage type or f32.
    pub a: LoraMatrix,
    /// N × R, as `a`.
    pub b: LoraMatrix,
    /// R × K, output.
    pub rounded_a: LoraMatrix,
    /// N × R, output.
    pub rounded_b: LoraMatrix,
    /// Device address of N elements of f32, by which rows of B are divided; 0 when absent.
    pub divisor: u64,
    /// Output features.
    pub n: u32,
    /// Input features.
    pub k: u32,
    /// Rank.
    pub r: u32,
    /// Factor of B.
    pub scale: f32,
    /// Tiles of A.
    pub a_units: u32,
    /// Tiles along the columns of A.
    pub k_blocks: u32,
    /// Tiles along the columns of B.
    pub r_blocks: u32,
    /// `LORA_FACTORS_F32`, `LORA_ROUNDED_F32`.
    pub flags: u32,
}

/// The parameter of gain: norm = ‖w + scale · B A‖ of each row and gain = magnitude / norm; a CTA has `LORA_GAIN_ROWS` rows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoraGainParams {
    /// N × K.
    pub w: LoraMatrix,
    /// R × K, of the storage type or f32.
    pub a: LoraMatrix,
    /// N × R, as `a`.
    pub b: LoraMatrix,
    /// Device address of N elements of f32; 0 when absent.
    pub magnitude: u64,
    /// Device address of N elements of f32, a factor of the gain; 0 when absent.
    pub earlier: u64,
    /// Device address of N elements of f32, output; 0 when not asked for.
    pub norm: u64,
    /// Device address of N elements of f32, output; 0 when not asked for.
    pub gain: u64,
    /// Output features.
    pub n: u32,
    /// Input features.
    pub k: u32,
    /// Rank.
    pub r: u32,
    /// α/r or α/√r.
    pub scale: f32,
    /// `LORA_FACTORS_F32` or 0.
    pub flags: u32,
    /// Zero: the struct ends at a multiple of 8 bytes.
    pub padding: u32,
}

/// Defines each constant once and, with the header at hand, proves that it agrees.
macro_rules! constants {
    ($($name:ident = $value:expr;)*) => {
        $(pub const $name: u32 = $value;)*
        #[cfg(all(feature = "cuda", not(fused_lora_no_kernels)))]
        const _: () = { $(assert!($name == header::$name, concat!(stringify!($name), " differs from params.h"));)* };
    };
}

constants! {
    LORA_BLOCK_K = 32;
    LORA_NARROW_N = 64;
    LORA_LARGE_BLOCK = 128;
    LORA_LARGE_THREADS = 256;
    LORA_LARGE_STAGES = 3;
    LORA_SMALL_BLOCK = 64;
    LORA_SMALL_THREADS = 128;
    LORA_SMALL_STAGES = 4;
    LORA_SM90_BLOCK_M = 128;
    LORA_SM90_BLOCK_K = 64;
    LORA_SM90_SLAB_M = 64;
    LORA_SM90_SLABS = 2;
    LORA_SM90_THREADS = 384;
    LORA_SM90_NARROW_N = 128;
    LORA_SM90_STORE_N = 64;
    LORA_SM90_STORE_BOXES = 2;
    LORA_SM90_STAGES_256 = 4;
    LORA_SM90_STAGES_192 = 4;
    LORA_SM90_STAGES_128 = 6;
    LORA_SM90_TAIL_BYTES = 1024;
    LORA_MAX_PROJECTIONS = 4;
    LORA_SM90_FORWARD_X = 0;
    LORA_SM90_FORWARD_A = 1;
    LORA_SM90_FORWARD_FIRST = 2;
    LORA_SM90_FORWARD_W = 0;
    LORA_SM90_FORWARD_H = 1;
    LORA_SM90_FORWARD_B = 2;
    LORA_SM90_FORWARD_Y = 3;
    LORA_SM90_FORWARD_EACH = 4;
    LORA_SM90_FORWARD_MAPS = 18;
    LORA_SM90_BACKWARD_DH = 0;
    LORA_SM90_BACKWARD_A = 1;
    LORA_SM90_BACKWARD_DX = 2;
    LORA_SM90_BACKWARD_H_TOKENS = 3;
    LORA_SM90_BACKWARD_X_TOKENS = 4;
    LORA_SM90_BACKWARD_DH_TOKENS = 5;
    LORA_SM90_BACKWARD_FIRST = 6;
    LORA_SM90_BACKWARD_DY = 0;
    LORA_SM90_BACKWARD_W = 1;
    LORA_SM90_BACKWARD_B = 2;
    LORA_SM90_BACKWARD_DY_TOKENS = 3;
    LORA_SM90_BACKWARD_Y_TOKENS = 4;
    LORA_SM90_BACKWARD_EACH = 5;
    LORA_SM90_BACKWARD_MAPS = 26;
    LORA_MERGE_BLOCK = 64;
    LORA_MERGE_THREADS = 256;
    LORA_ROUND_ROWS = 8;
    LORA_ROUND_COLS = 256;
    LORA_ROUND_THREADS = 256;
    LORA_GAIN_ROWS = 16;
    LORA_GAIN_THREADS = 256;
    LORA_FACTORS_F32 = 1;
    LORA_ROUNDED_F32 = 2;
    LORA_ROUTE_ROWS = 64;
    LORA_ROUTE_RANKS = 64;
    LORA_SYNC_BYTES = 65536;
    LORA_SYNC_FLAGS = 3;
    LORA_SPLIT_RANKS = 8;
    LORA_SPLIT_LENGTH = 256;
    LORA_ACCUMULATE_DX = 1;
    LORA_ACCUMULATE_DA = 2;
    LORA_ACCUMULATE_DB = 4;
    LORA_ACCUMULATE_DBIAS = 8;
    LORA_DA_F32 = 16;
    LORA_DB_F32 = 32;
    LORA_DBIAS_F32 = 64;
    LORA_ACCUMULATE_DM = 128;
    LORA_GAINED = 256;
}

#[cfg(all(feature = "cuda", not(fused_lora_no_kernels)))]
#[allow(missing_docs, dead_code, non_camel_case_types)]
mod header;

/// Bytes of an encoded tensor map.
pub const MAP_BYTES: usize = 128;
/// Alignment of a tensor map, and so of a parameter block that holds some.
pub const MAP_ALIGN: usize = 128;

/// The fields of a kernel's parameter.
#[allow(clippy::large_enum_variant, reason = "there is one in a launch")]
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Params {
    /// Of a forward kernel.
    Forward(LoraForwardParams),
    /// Of a backward kernel.
    Backward(LoraBackwardParams),
    /// Of a forward kernel of the Hopper family, after its tensor maps.
    Sm90Forward(LoraSm90ForwardParams),
    /// Of a backward kernel of the Hopper family, after its tensor maps.
    Sm90Backward(LoraSm90BackwardParams),
    /// Of merge.
    Merge(LoraMergeParams),
    /// Of round.
    Round(LoraRoundParams),
    /// Of gain.
    Gain(LoraGainParams),
}
