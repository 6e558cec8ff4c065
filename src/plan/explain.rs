//! A plan in words.

use std::fmt::Write;

use super::{Params, Plan, SYNC_BYTES};
use crate::{LoraShape, raw};

/// Notes which operands miss the alignment of 16-byte loads, and what would cure it.
pub(super) fn slow_operands(notes: &mut Vec<String>, operands: &[(&str, Option<raw::Matrix>)]) {
    for (name, matrix) in operands {
        let Some(matrix) = matrix.filter(|matrix| matrix.rows != 0 && matrix.cols != 0) else { continue };
        if !matrix.ptr.is_multiple_of(16) {
            notes.push(format!(
                "{name} is read element by element: its address {:#x} is not a multiple of 16 bytes",
                matrix.ptr
            ));
        } else if !matrix.row_stride.is_multiple_of(8) {
            notes.push(format!(
                "{name} is read element by element: its row stride of {} elements is not a multiple of 8 (16 bytes)",
                matrix.row_stride
            ));
        }
    }
}

impl Plan {
    /// Which kernel, tiles, grid and workspace, and why: a few lines of text.
    pub fn explain(&self) -> String {
        let LoraShape { m, n, k, r } = self.shape;
        let mut out = String::new();
        // Writing to a String cannot fail.
        let mut line = |text: std::fmt::Arguments<'_>| {
            let _ = writeln!(out, "{text}");
        };
        let operation = if matches!(self.launch.params, Params::Forward(_)) { "forward" } else { "backward" };
        line(format_args!("{operation} {:?}, M={m} N={n} K={k} R={r}, on {}", self.dtype, self.device.name));
        line(format_args!(
            "  kernel     {} (family portable: mma.sync with ldmatrix{}), one launch",
            self.launch.kernel,
            if self.device.arch < 80 { ", register-staged loads" } else { " and cp.async" },
        ));
        line(format_args!(
            "  tiles      {0} x {0} x {1}, {2} threads, {3} bytes of shared memory: {4}",
            self.tile.block,
            crate::params::LORA_BLOCK_K,
            self.tile.threads,
            self.launch.shared_bytes,
            if self.forced_tile { "the shape asked for" } else { "the shape with the shortest predicted time" }
        ));
        match &self.launch.params {
            Params::Forward(p) => {
                line(format_args!("  units      {} of h, then {} of y", p.h_units, p.units - p.h_units));
            }
            Params::Backward(p) => {
                line(format_args!(
                    "  units      {} of dh, then {} of dx, {} of db and dbias, {} of da",
                    p.dh_units,
                    p.dx_end - p.dh_units,
                    p.db_end - p.dx_end,
                    p.units - p.db_end
                ));
                if p.units > p.dx_end {
                    line(format_args!(
                        "  reduction  db and da over {} chunk(s) of {} tokens, added in order",
                        p.chunks, p.chunk_rows
                    ));
                }
            }
        }
        line(format_args!(
            "  grid       {} CTAs that draw units by ticket ({} SMs x {} CTAs)",
            self.launch.grid[0],
            self.device.sms,
            self.tile.ctas_per_sm(&self.device)
        ));
        line(format_args!(
            "  workspace  {} bytes: {SYNC_BYTES} of synchronisation words, {} of scratch",
            self.workspace_bytes(),
            self.workspace_bytes() - SYNC_BYTES
        ));
        for note in &self.notes {
            line(format_args!("  note       {note}"));
        }
        if self.device.arch < 80 && self.dtype == crate::Dtype::Bf16 {
            line(format_args!(
                "  note       sm_75 has no bf16 tensor instruction: products are done in f32 arithmetic"
            ));
        }
        out
    }
}
