//! Rust's mirror of `kernels/params.h`, so that planning needs neither nvcc nor libclang.
//!
//! With the `cuda` feature the build compares every size, offset and constant with what bindgen reads from the header.

/// A row-major matrix in device memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoraMatrix {
    /// Device address of element (0, 0); 0 when the matrix is absent.
    pub ptr: u64,
    /// Elements between the starts of two rows.
    pub row_stride: i64,
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
    LORA_SYNC_BYTES = 65536;
    LORA_SYNC_FLAGS = 2;
    LORA_ACCUMULATE_DX = 1;
    LORA_ACCUMULATE_DA = 2;
    LORA_ACCUMULATE_DB = 4;
    LORA_ACCUMULATE_DBIAS = 8;
    LORA_DA_F32 = 16;
    LORA_DB_F32 = 32;
    LORA_DBIAS_F32 = 64;
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
        same_layout!(LoraForwardParams: x w a b h y bias sync m n k r scale m_blocks n_blocks h_units units group_m
            flag_shift sync_words);
        same_layout!(LoraBackwardParams: dy w a b x h dh dx da db dbias partials sync m n k r scale m_blocks n_blocks
            k_blocks dh_units dx_end db_end units chunks chunk_rows partial_stride counters group_m flag_shift
            sync_words flags);
    };
}

/// The parameter block of one launch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Params {
    /// Of a forward kernel.
    Forward(LoraForwardParams),
    /// Of a backward kernel.
    Backward(LoraBackwardParams),
}

impl Params {
    /// The bytes the kernel reads, in the order of the header.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(256);
        match self {
            Params::Forward(p) => p.write(&mut out),
            Params::Backward(p) => p.write(&mut out),
        }
        out
    }
}

/// Appends fields in order. Neither struct has padding: u64s first, then an even number of u32s (asserted below).
macro_rules! write_fields {
    ($name:ident: matrices $($matrix:ident)*; words $($word:ident)*) => {
        impl $name {
            fn write(&self, out: &mut Vec<u8>) {
                $(out.extend(self.$matrix.ptr.to_ne_bytes());
                  out.extend(self.$matrix.row_stride.to_ne_bytes());)*
                $(out.extend(self.$word.to_ne_bytes());)*
            }
        }
        const _: () = assert!(size_of::<$name>() == 0 $(+ { let _ = stringify!($matrix); 16 })* $(+ write_fields!(@size $word))*);
    };
    (@size bias) => { 8 };
    (@size dbias) => { 8 };
    (@size partials) => { 8 };
    (@size sync) => { 8 };
    (@size $word:ident) => { 4 };
}

write_fields!(LoraForwardParams: matrices x w a b h y;
    words bias sync m n k r scale m_blocks n_blocks h_units units group_m flag_shift sync_words);
write_fields!(LoraBackwardParams: matrices dy w a b x h dh dx da db;
    words dbias partials sync m n k r scale m_blocks n_blocks k_blocks dh_units dx_end db_end units chunks chunk_rows
    partial_stride counters group_m flag_shift sync_words flags);
