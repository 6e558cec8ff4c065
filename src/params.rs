//! Rust's mirror of `kernels/params.h`, so that planning needs neither nvcc nor libclang.
//!
//! With the `cuda` feature the build compares every size, offset and constant with what bindgen reads from the header.

mod bytes;

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

/// The parameter of a forward kernel. Units of work are numbered h first, then y.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoraForwardParams {
    /// M × K, input.
    pub x: LoraMatrix,
    /// N × K, frozen weight.
    pub w: LoraMatrix,
    /// R × K, down projection.
    pub a: LoraMatrix,
    /// N × R, up projection.
    pub b: LoraMatrix,
    /// M × R, written by the h units and read by the y units: the caller's, or in the workspace.
    pub h: LoraMatrix,
    /// M × N, output.
    pub y: LoraMatrix,
    /// Device address of N elements of the storage type; 0 when absent.
    pub bias: u64,
    /// Device address of the synchronisation words ([`SYNC_BYTES`](super::plan::SYNC_BYTES)).
    pub sync: u64,
    /// Tokens.
    pub m: u32,
    /// Output features.
    pub n: u32,
    /// Input features.
    pub k: u32,
    /// Rank; 0 for the plain product.
    pub r: u32,
    /// Factor of h: α/r or α/√r.
    pub scale: f32,
    /// Tiles along M.
    pub m_blocks: u32,
    /// Tiles along N.
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
    /// Dropout; all zero when there is none.
    pub dropout: LoraDropout,
    /// Device address of the words of a [`Routing`](crate::Routing); 0 when absent.
    pub routes: u64,
    /// Device address of N elements of f32, DoRA's factors of the columns; 0 when absent.
    pub gain: u64,
}

/// The parameter of a backward kernel. Units of work are numbered dh, dx, db (with dbias), da.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoraBackwardParams {
    /// M × N, gradient of the output.
    pub dy: LoraMatrix,
    /// N × K, frozen weight.
    pub w: LoraMatrix,
    /// R × K, down projection.
    pub a: LoraMatrix,
    /// N × R, up projection.
    pub b: LoraMatrix,
    /// M × K, input of forward; read for da only.
    pub x: LoraMatrix,
    /// M × R, as forward wrote it; dy's matrix, unread as h, when db is not computed.
    pub h: LoraMatrix,
    /// M × R, in the workspace; written by the dh units, read by the dx and da units.
    pub dh: LoraMatrix,
    /// M × K, output; absent when not asked for.
    pub dx: LoraMatrix,
    /// R × K, output; absent when not asked for.
    pub da: LoraMatrix,
    /// N × R, output; absent when not asked for.
    pub db: LoraMatrix,
    /// Device address of N elements, output; 0 when not asked for.
    pub dbias: u64,
    /// Device address of f32 partial sums: one block of `partial_stride` per tile and chunk of db, then of da.
    pub partials: u64,
    /// Device address of the synchronisation words ([`SYNC_BYTES`](super::plan::SYNC_BYTES)).
    pub sync: u64,
    /// Tokens.
    pub m: u32,
    /// Output features.
    pub n: u32,
    /// Input features.
    pub k: u32,
    /// Rank; 0 for the plain product.
    pub r: u32,
    /// Factor of dh: α/r or α/√r.
    pub scale: f32,
    /// Tiles along M.
    pub m_blocks: u32,
    /// Tiles along N.
    pub n_blocks: u32,
    /// Tiles along K.
    pub k_blocks: u32,
    /// Units of dh: `m_blocks` × narrow tiles along R.
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
    /// `LORA_ACCUMULATE_*` (which outputs add) and `LORA_*_F32` (which gradients are f32), or-ed.
    pub flags: u32,
    /// Dropout; all zero when there is none.
    pub dropout: LoraDropout,
    /// Device address of the words of a [`Routing`](crate::Routing); 0 when absent.
    pub routes: u64,
    /// Device address of N elements of f32, DoRA's factors of the columns; 0 when absent.
    pub gain: u64,
    /// DoRA's gradient of the magnitude.
    pub magnitude: LoraMagnitude,
}

/// The parameter of a forward kernel of the Hopper family, after its tensor maps. Tickets hand out bundles of h units
/// first, then single y units; a unit belongs to a cluster, whose CTAs take neighbouring blocks of rows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoraSm90ForwardParams {
    /// M × R, as the h units write it: the caller's, or in the workspace.
    pub h: LoraMatrix,
    /// Device address of N elements of the storage type; 0 when absent.
    pub bias: u64,
    /// Device address of the synchronisation words ([`SYNC_BYTES`](super::plan::SYNC_BYTES)).
    pub sync: u64,
    /// Tokens.
    pub m: u32,
    /// Output features.
    pub n: u32,
    /// Input features.
    pub k: u32,
    /// Rank; 0 for the plain product.
    pub r: u32,
    /// Factor of h: α/r or α/√r.
    pub scale: f32,
    /// Blocks of rows over CTAs per cluster.
    pub m_groups: u32,
    /// Blocks of the tile's columns along N.
    pub n_blocks: u32,
    /// Narrow tiles along R.
    pub r_blocks: u32,
    /// Units of h: `m_groups` × `r_blocks`.
    pub h_units: u32,
    /// Tickets of h: ticket t hands out units t, t + `h_tickets` and so on.
    pub h_tickets: u32,
    /// All tickets: `h_tickets` + `m_groups` × `n_blocks`.
    pub tickets: u32,
    /// Groups of M-blocks that pass over w together, for reuse in L2.
    pub group_m: u32,
    /// 2^`flag_shift` M-blocks share one flag.
    pub flag_shift: u32,
    /// Words from `sync` on that the last CTA clears.
    pub sync_words: u32,
    /// Dropout; all zero when there is none.
    pub dropout: LoraDropout,
    /// Device address of the words of a [`Routing`](crate::Routing); 0 when absent.
    pub routes: u64,
    /// Device address of N elements of f32, DoRA's factors of the columns; 0 when absent.
    pub gain: u64,
}

/// The parameter of a backward kernel of the Hopper family, after its tensor maps. Tickets hand out bundles of dh units,
/// then dx, db (with dbias) and da units.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoraSm90BackwardParams {
    /// M × R, in the workspace, as the dh units write it.
    pub dh: LoraMatrix,
    /// M × K, as it is read to accumulate; absent when not asked for.
    pub dx: LoraMatrix,
    /// R × K, output; absent when not asked for.
    pub da: LoraMatrix,
    /// N × R, output; absent when not asked for.
    pub db: LoraMatrix,
    /// Device address of N elements, output; 0 when not asked for.
    pub dbias: u64,
    /// Device address of f32 partial sums: one block of `partial_stride` per slab and chunk of db, then of da.
    pub partials: u64,
    /// Device address of the synchronisation words ([`SYNC_BYTES`](super::plan::SYNC_BYTES)).
    pub sync: u64,
    /// Tokens.
    pub m: u32,
    /// Output features.
    pub n: u32,
    /// Input features.
    pub k: u32,
    /// Rank; 0 for the plain product.
    pub r: u32,
    /// Factor of dh: α/r or α/√r.
    pub scale: f32,
    /// Blocks of rows of dy over CTAs per cluster.
    pub m_groups: u32,
    /// Blocks of rows of db over CTAs per cluster.
    pub n_groups: u32,
    /// Blocks of rows of da transposed over CTAs per cluster.
    pub k_groups: u32,
    /// Blocks of the tile's columns of dx.
    pub k_blocks: u32,
    /// Narrow tiles along R.
    pub r_blocks: u32,
    /// Units of dh: `m_groups` × `r_blocks`.
    pub dh_units: u32,
    /// Tickets of dh: ticket t hands out units t, t + `dh_tickets` and so on.
    pub dh_tickets: u32,
    /// First ticket past dx: `dh_tickets` + `m_groups` × `k_blocks`.
    pub dx_end: u32,
    /// First ticket past db: `dx_end` + tiles of db × `chunks`.
    pub db_end: u32,
    /// First ticket past da, the number of tickets: `db_end` + tiles of da × `chunks`.
    pub tickets: u32,
    /// Chunks in which db and da reduce over tokens.
    pub chunks: u32,
    /// Tokens per chunk, a multiple of the block of rows.
    pub chunk_rows: u32,
    /// Distance between two blocks of partial sums, in f32 elements.
    pub partial_stride: u32,
    /// First counter of finished chunks (one per slab of db and da), in words from `sync`.
    pub counters: u32,
    /// Groups of M-blocks that pass over w together, for reuse in L2.
    pub group_m: u32,
    /// 2^`flag_shift` M-blocks share one flag.
    pub flag_shift: u32,
    /// Words from `sync` on that the last CTA clears.
    pub sync_words: u32,
    /// `LORA_ACCUMULATE_*` (which outputs add) and `LORA_*_F32` (which gradients are f32), or-ed.
    pub flags: u32,
    /// Zero: the struct ends at a multiple of 8 bytes.
    pub padding: u32,
    /// Dropout; all zero when there is none.
    pub dropout: LoraDropout,
    /// Device address of the words of a [`Routing`](crate::Routing); 0 when absent.
    pub routes: u64,
    /// Device address of N elements of f32, DoRA's factors of the columns; 0 when absent.
    pub gain: u64,
    /// DoRA's gradient of the magnitude.
    pub magnitude: LoraMagnitude,
}

/// The parameter of merge: merged = w + scale · B A, a tile per CTA, numbered along K first.
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

/// The parameter of round: rounded_a = A, rounded_b = scale · B, a tile per CTA, those of A first.
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
    /// `LORA_FACTORS_F32` or 0.
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
    LORA_SM90_FORWARD_X = 0;
    LORA_SM90_FORWARD_W = 1;
    LORA_SM90_FORWARD_A = 2;
    LORA_SM90_FORWARD_H = 3;
    LORA_SM90_FORWARD_B = 4;
    LORA_SM90_FORWARD_Y = 5;
    LORA_SM90_FORWARD_MAPS = 6;
    LORA_SM90_BACKWARD_DY = 0;
    LORA_SM90_BACKWARD_W = 1;
    LORA_SM90_BACKWARD_B = 2;
    LORA_SM90_BACKWARD_DH = 3;
    LORA_SM90_BACKWARD_A = 4;
    LORA_SM90_BACKWARD_DX = 5;
    LORA_SM90_BACKWARD_DY_TOKENS = 6;
    LORA_SM90_BACKWARD_H_TOKENS = 7;
    LORA_SM90_BACKWARD_X_TOKENS = 8;
    LORA_SM90_BACKWARD_DH_TOKENS = 9;
    LORA_SM90_BACKWARD_Y_TOKENS = 10;
    LORA_SM90_BACKWARD_MAPS = 11;
    LORA_MERGE_BLOCK = 64;
    LORA_MERGE_THREADS = 256;
    LORA_ROUND_ROWS = 8;
    LORA_ROUND_COLS = 256;
    LORA_ROUND_THREADS = 256;
    LORA_GAIN_ROWS = 16;
    LORA_GAIN_THREADS = 256;
    LORA_FACTORS_F32 = 1;
    LORA_ROUTE_ROWS = 64;
    LORA_ROUTE_RANKS = 64;
    LORA_SYNC_BYTES = 65536;
    LORA_SYNC_FLAGS = 2;
    LORA_ACCUMULATE_DX = 1;
    LORA_ACCUMULATE_DA = 2;
    LORA_ACCUMULATE_DB = 4;
    LORA_ACCUMULATE_DBIAS = 8;
    LORA_DA_F32 = 16;
    LORA_DB_F32 = 32;
    LORA_DBIAS_F32 = 64;
    LORA_ACCUMULATE_DM = 128;
}

#[cfg(all(feature = "cuda", not(fused_lora_no_kernels)))]
#[allow(missing_docs, dead_code, non_camel_case_types)]
mod header {
    include!(concat!(env!("OUT_DIR"), "/params.rs"));

    /// Same size and same offset of every field as in the header.
    macro_rules! same_layout {
        ($name:ident: $($field:ident)*) => {
            assert!(size_of::<super::$name>() == size_of::<$name>());
            $(assert!(core::mem::offset_of!(super::$name, $field) == core::mem::offset_of!($name, $field));)*
        };
    }

    const _: () = {
        same_layout!(LoraMatrix: ptr row_stride);
        same_layout!(LoraDropout: seed offset state threshold padding);
        same_layout!(LoraMagnitude: y bias magnitude dm);
        same_layout!(LoraForwardParams: x w a b h y bias sync m n k r scale m_blocks n_blocks h_units units group_m
            flag_shift sync_words dropout routes gain);
        same_layout!(LoraBackwardParams: dy w a b x h dh dx da db dbias partials sync m n k r scale m_blocks n_blocks
            k_blocks dh_units dx_end db_end units chunks chunk_rows partial_stride counters group_m flag_shift
            sync_words flags dropout routes gain magnitude);
        same_layout!(LoraMergeParams: w a b merged n k r scale k_blocks flags);
        same_layout!(LoraRoundParams: a b rounded_a rounded_b n k r scale a_units k_blocks r_blocks flags);
        same_layout!(LoraGainParams: w a b magnitude norm gain n k r scale flags padding);
        same_layout!(LoraSm90ForwardParams: h bias sync m n k r scale m_groups n_blocks r_blocks h_units h_tickets
            tickets group_m flag_shift sync_words dropout routes gain);
        same_layout!(LoraSm90BackwardParams: dh dx da db dbias partials sync m n k r scale m_groups n_groups k_groups
            k_blocks r_blocks dh_units dh_tickets dx_end db_end tickets chunks chunk_rows partial_stride counters
            group_m flag_shift sync_words flags padding dropout routes gain magnitude);
    };

    /// A block as `Launch::parameter_bytes` lays it out: maps, fields, and padding to whole 128 bytes.
    macro_rules! same_block {
        ($name:ident: $fields:ident after $maps:ident) => {
            assert!(core::mem::offset_of!($name, params) == $maps as usize * super::MAP_BYTES);
            assert!(
                size_of::<$name>()
                    == (core::mem::offset_of!($name, params) + size_of::<super::$fields>())
                        .next_multiple_of(super::MAP_ALIGN)
            );
            assert!(align_of::<$name>() == super::MAP_ALIGN);
        };
    }

    const _: () = {
        same_block!(LoraSm90Forward: LoraSm90ForwardParams after LORA_SM90_FORWARD_MAPS);
        same_block!(LoraSm90Backward: LoraSm90BackwardParams after LORA_SM90_BACKWARD_MAPS);
    };
}

/// Bytes of an encoded tensor map.
pub const MAP_BYTES: usize = 128;
/// Alignment of a tensor map, and so of a parameter block that holds some.
pub const MAP_ALIGN: usize = 128;

/// The fields of a kernel's parameter.
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
