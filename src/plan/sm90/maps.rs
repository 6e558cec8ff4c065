//! Tensor maps, and what they ask of matrices.

use super::{ARCH, TILES};
use crate::params::*;
use crate::plan::{Device, Part, Swizzle, TensorMap};
use crate::{Dtype, MAX_ROUTED_RANK, raw};

/// Largest rank of an adapter; of many in one batch each block of rows reads those that it goes through.
const MAX_RANK: usize = 256;
/// Addresses and row strides are multiples of this, in bytes.
const ALIGN: u64 = 16;
/// The same in elements, of which N, K and R must be multiples.
const ALIGN_ELEMENTS: usize = 8;
/// Row strides are less than this, in bytes.
const MAX_ROW_BYTES: u64 = 1 << 40;

/// What keeps the family from running a call, in words; nothing when it can. `operands` are the matrices that the call
/// copies through tensor maps; what departs from the plain formula are routes, f32 factors, and gains.
pub(in crate::plan) fn obstacles(
    device: &Device,
    k: usize,
    parts: &[Part],
    (is_routed, is_split, gains): (bool, bool, &[(&'static str, Option<raw::Matrix>)]),
    operands: &[(&'static str, Option<raw::Matrix>)],
) -> Vec<String> {
    let mut found = Vec::new();
    if device.arch != ARCH {
        let (major, minor) = (device.arch / 10, device.arch % 10);
        found.push(format!("the device has compute capability {major}.{minor}, its kernels run on 9.0 alone"));
    }
    let needed = TILES.iter().map(|tile| tile.shared_bytes()).max().unwrap_or(0);
    if device.shared_per_block < needed {
        let has = device.shared_per_block;
        found.push(format!("a CTA may have {has} bytes of shared memory, its kernels take up to {needed}"));
    }
    let most = if is_routed { MAX_ROUTED_RANK } else { MAX_RANK };
    for (at, part) in parts.iter().enumerate() {
        let of = if parts.len() == 1 { String::new() } else { format!(" of projection {at}") };
        // Halves come in whole groups of ranks.
        let r = if is_split { 0 } else { part.r };
        for (name, value) in [("N", part.n), ("K", k), ("R", r)] {
            if !value.is_multiple_of(ALIGN_ELEMENTS) {
                found.push(format!("{name}{of} is {value}, not a multiple of {ALIGN_ELEMENTS}"));
            }
        }
        if part.r > most {
            found.push(format!("R{of} is {}, more than {most}", part.r));
        }
    }
    for (arg, gain) in gains.iter().filter_map(|(arg, gain)| Some((arg, (*gain)?))) {
        if !gain.ptr.is_multiple_of(ALIGN) {
            found.push(format!("the address of {arg} is {:#x}, not a multiple of {ALIGN} bytes", gain.ptr));
        }
    }
    for (name, matrix) in operands {
        let Some(matrix) = matrix.filter(|matrix| matrix.rows != 0 && matrix.cols != 0) else { continue };
        if !matrix.ptr.is_multiple_of(ALIGN) {
            found.push(format!("the address of {name} is {:#x}, not a multiple of {ALIGN} bytes", matrix.ptr));
        }
        // Of a single row the stride is never used.
        if matrix.rows > 1 && !matrix.row_stride.is_multiple_of(ALIGN_ELEMENTS) {
            let stride = matrix.row_stride;
            found.push(format!(
                "the row stride of {name} is {stride} elements, not a multiple of {ALIGN_ELEMENTS} ({ALIGN} bytes)"
            ));
        }
        if matrix.rows > 1 && matrix.row_stride as u64 >= MAX_ROW_BYTES / 2 {
            let stride = matrix.row_stride;
            found.push(format!("the row stride of {name} is {stride} elements, not less than {}", MAX_ROW_BYTES / 2));
        }
    }
    found
}

/// Makes the maps of one call.
#[derive(Clone, Copy)]
pub(super) struct Maps {
    pub dtype: Dtype,
}

impl Maps {
    /// A matrix whose boxes of `boxes` (columns, rows) are read; `None` for one that is absent.
    pub(super) fn read(self, matrix: Option<raw::Matrix>, boxes: [u32; 2]) -> Option<TensorMap> {
        self.map(matrix?, boxes, true)
    }

    /// A matrix whose boxes are written.
    pub(super) fn written(self, matrix: Option<raw::Matrix>) -> Option<TensorMap> {
        self.map(matrix?, [LORA_SM90_STORE_N, LORA_SM90_SLAB_M], false)
    }

    fn map(self, matrix: raw::Matrix, boxes: [u32; 2], is_read: bool) -> Option<TensorMap> {
        if matrix.rows == 0 || matrix.cols == 0 {
            return None;
        }
        let stride = if matrix.rows == 1 { matrix.cols.next_multiple_of(ALIGN_ELEMENTS) } else { matrix.row_stride };
        let swizzle = match boxes[0] {
            ..=16 => Swizzle::Bytes32,
            17..=32 => Swizzle::Bytes64,
            _ => Swizzle::Bytes128,
        };
        Some(TensorMap {
            dtype: self.dtype,
            address: matrix.ptr,
            dims: [matrix.cols as u64, matrix.rows as u64],
            row_bytes: (stride * self.dtype.size()) as u64,
            boxes,
            swizzle,
            is_read,
        })
    }
}
