//! Rust's mirror of `kernels/params.h`, so that planning needs neither nvcc nor libclang.
//!
//! With the `cuda` feature the build compares every size, offset and constant with what bindgen reads from the header.

/// See `LoraMatrix` in `kernels/params.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoraMatrix {
    pub ptr: u64,
    pub row_stride: i64,
}

/// See `LoraForwardParams` in `kernels/params.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoraForwardParams {
    pub x: LoraMatrix,
    pub w: LoraMatrix,
    pub a: LoraMatrix,
    pub b: LoraMatrix,
    pub h: LoraMatrix,
    pub y: LoraMatrix,
    pub bias: u64,
    pub sync: u64,
    pub m: u32,
    pub n: u32,
    pub k: u32,
    pub r: u32,
    pub scale: f32,
    pub m_blocks: u32,
    pub n_blocks: u32,
    pub h_units: u32,
    pub units: u32,
    pub group_m: u32,
    pub flag_shift: u32,
    pub sync_words: u32,
}

/// See `LoraBackwardParams` in `kernels/params.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoraBackwardParams {
    pub dy: LoraMatrix,
    pub w: LoraMatrix,
    pub a: LoraMatrix,
    pub b: LoraMatrix,
    pub x: LoraMatrix,
    pub h: LoraMatrix,
    pub dh: LoraMatrix,
    pub dx: LoraMatrix,
    pub da: LoraMatrix,
    pub db: LoraMatrix,
    pub dbias: u64,
    pub partials: u64,
    pub sync: u64,
    pub m: u32,
    pub n: u32,
    pub k: u32,
    pub r: u32,
    pub scale: f32,
    pub m_blocks: u32,
    pub n_blocks: u32,
    pub k_blocks: u32,
    pub dh_units: u32,
    pub dx_end: u32,
    pub db_end: u32,
    pub units: u32,
    pub chunks: u32,
    pub chunk_rows: u32,
    pub partial_stride: u32,
    pub counters: u32,
    pub group_m: u32,
    pub flag_shift: u32,
    pub sync_words: u32,
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
