//! A plan in words.

use std::fmt::Write;

use super::calibration::SM90;
use super::{Choice, Params, Part, Plan, SYNC_BYTES};
use crate::params::{LORA_BLOCK_K, LORA_SM90_BLOCK_K, LORA_SM90_BLOCK_M, LoraDropout, LoraSplit};
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

/// The same of the ranks of projections after the first, which start inside the rows of h.
pub(super) fn slow_ranks(notes: &mut Vec<String>, h: Option<raw::Matrix>, parts: &[Part]) {
    for (at, part) in parts.iter().enumerate() {
        let (first, is_read) = (part.first_rank, h.is_some() && part.r != 0);
        if is_read && !first.is_multiple_of(8) {
            notes.push(format!(
                "h of projection {at} is read element by element: its ranks start at {first}, not a multiple of 8 (16 bytes)"
            ));
        }
    }
}

/// Writes lines; writing to a `String` cannot fail.
macro_rules! line {
    ($out:expr, $($arguments:tt)*) => {{ let _ = writeln!($out, $($arguments)*); }};
}

impl Plan {
    /// Which kernel, tiles, grid and workspace, and why: a few lines of text.
    pub fn explain(&self) -> String {
        let LoraShape { m, n, k, r } = self.shape;
        let mut out = String::new();
        let is_forward = matches!(self.launch.params, Params::Forward(_) | Params::Sm90Forward(_));
        let operation = if is_forward { "forward" } else { "backward" };
        line!(out, "{operation} {:?}, M={m} N={n} K={k} R={r}, on {}", self.dtype, self.device.name);
        if let parts @ [_, _, ..] = &self.parts[..] {
            let list =
                |of: fn(&Part) -> usize| parts.iter().map(|part| of(part).to_string()).collect::<Vec<_>>().join(", ");
            let (count, n, r) = (parts.len(), list(|part| part.n), list(|part| part.r));
            line!(out, "  shared     {count} projections of one x: N = {n}; R = {r}");
        }
        match &self.choice {
            Choice::Portable(tile) => self.explain_portable(&mut out, tile),
            Choice::Sm90(choice) => self.explain_sm90(&mut out, choice),
        }
        let split = self.split();
        if split.r != 0 {
            line!(
                out,
                "  factors    f32, as high and low halves of {:?}: split by {} units before the others, multiplied at three times the ranks",
                self.dtype,
                split.units
            );
        }
        let dropout = self.dropout();
        if dropout.threshold != 0 {
            line!(
                out,
                "  dropout    p = {} on x, for h and da; seed and offset {}; {}",
                f64::from(dropout.threshold) / 65536.0,
                if dropout.state != 0 { "read by the launch" } else { "passed" },
                self.cost_of_dropout(),
            );
        }
        if self.routes() != 0 {
            line!(
                out,
                "  routes     each row of x through its own ranks; the predicted time counts all ranks for all rows, the floor none"
            );
        }
        if self.is_gained() {
            line!(out, "  gain       of the columns of y (DoRA); {}", self.cost_of_gain());
        }
        line!(
            out,
            "  workspace  {} bytes: {SYNC_BYTES} of synchronisation words, {} of scratch",
            self.workspace_bytes(),
            self.workspace_bytes() - SYNC_BYTES
        );
        self.explain_time(&mut out);
        for note in &self.notes {
            line!(out, "  note       {note}");
        }
        if self.device.arch < 80 && self.dtype == crate::Dtype::Bf16 {
            line!(out, "  note       sm_75 has no bf16 tensor instruction: products are done in f32 arithmetic");
        }
        out
    }

    fn split(&self) -> LoraSplit {
        match self.launch.params {
            Params::Forward(p) => p.split,
            Params::Backward(p) => p.split,
            Params::Sm90Forward(p) => p.split,
            Params::Sm90Backward(p) => p.split,
            Params::Merge(_) | Params::Round(_) | Params::Gain(_) => LoraSplit::default(),
        }
    }

    fn routes(&self) -> u64 {
        match self.launch.params {
            Params::Forward(p) => p.routes,
            Params::Backward(p) => p.routes,
            Params::Sm90Forward(p) => p.routes,
            Params::Sm90Backward(p) => p.routes,
            Params::Merge(_) | Params::Round(_) | Params::Gain(_) => 0,
        }
    }

    fn dropout(&self) -> LoraDropout {
        match &self.launch.params {
            Params::Forward(p) => p.dropout,
            Params::Backward(p) => p.dropout,
            Params::Sm90Forward(p) => p.dropout,
            Params::Sm90Backward(p) => p.dropout,
            Params::Merge(_) | Params::Round(_) | Params::Gain(_) => LoraDropout::default(),
        }
    }

    fn is_gained(&self) -> bool {
        match &self.launch.params {
            Params::Forward(p) => p.projections.iter().any(|of| of.gain != 0),
            Params::Backward(p) => p.projections.iter().any(|of| of.gain != 0),
            Params::Sm90Forward(p) => p.projections.iter().any(|of| of.gain != 0),
            Params::Sm90Backward(p) => p.projections.iter().any(|of| of.gain != 0),
            Params::Merge(_) | Params::Round(_) | Params::Gain(_) => false,
        }
    }

    fn cost_of_gain(&self) -> String {
        match &self.launch.params {
            Params::Sm90Backward(_) => {
                format!("reckoned, not measured: {} clocks of shared memory a step that reads dy by rows", SM90.gain)
            }
            _ => "no predicted time counts it".to_owned(),
        }
    }

    fn cost_of_dropout(&self) -> String {
        let (drop, column) = (SM90.drop, SM90.drop_column);
        match &self.launch.params {
            Params::Sm90Forward(_) => format!("reckoned, not measured: {drop} clocks a step of h"),
            Params::Sm90Backward(_) => {
                format!("reckoned, not measured: {drop} clocks a step of da, {column} a column of dx for 64 ranks")
            }
            _ => "no predicted time counts it".to_owned(),
        }
    }

    fn reason(&self) -> &'static str {
        if self.options.tile.is_some() { "the shape asked for" } else { "the shape with the shortest predicted time" }
    }

    /// What the model predicts, and what bounds any kernel.
    fn explain_time(&self, out: &mut String) {
        match self.predicted_microseconds() {
            Some(predicted) => {
                line!(out, "  predicted  {predicted:.1} us by the planner's model, whose constants are not measured");
            }
            None => line!(out, "  predicted  none: the planner does not know what mma.sync reaches on this device"),
        }
        let floor = self.floor;
        let (giga, mega) = (floor.flops / 1e9, floor.bytes / 1e6);
        let times = floor.arithmetic_microseconds().zip(floor.memory_microseconds()).zip(floor.peak);
        let Some(((arithmetic, memory), peak)) = times else {
            line!(
                out,
                "  floor      {giga:.1} GFLOP and {mega:.1} MB; the rates of the device are not in the table of data sheets"
            );
            return;
        };
        line!(
            out,
            "  floor      {arithmetic:.1} us for {giga:.1} GFLOP at {} TFLOP/s, {memory:.1} us for {mega:.1} MB at {} GB/s: {} \
             the bound (rates of the data sheet)",
            peak.teraflops,
            peak.gigabytes_per_second,
            if arithmetic >= memory { "arithmetic is" } else { "memory is" },
        );
    }

    fn explain_portable(&self, out: &mut String, tile: &super::portable::Tile) {
        line!(
            out,
            "  kernel     {} (family portable: mma.sync with ldmatrix{}), one launch",
            self.launch.kernel,
            if self.device.arch < 80 { ", register-staged loads" } else { " and cp.async" },
        );
        line!(
            out,
            "  tiles      {0} x {0} x {LORA_BLOCK_K}, {1} threads, {2} bytes of shared memory: {3}",
            tile.block,
            tile.threads,
            self.launch.shared_bytes,
            self.reason()
        );
        match &self.launch.params {
            Params::Forward(p) => line!(out, "  units      {} of h, then {} of y", p.h_units, p.units - p.h_units),
            Params::Backward(p) => {
                let units = [p.dh_units, p.dx_end - p.dh_units, p.db_end - p.dx_end, p.units - p.db_end];
                explain_backward(out, units, p.chunks, p.chunk_rows);
                if p.dropout.threshold != 0 && p.dx_end > p.dh_units && p.r != 0 {
                    line!(out, "  order      dx begins with dh A, to drop from it alone, and so waits for dh first");
                }
            }
            _ => {}
        }
        line!(
            out,
            "  grid       {} CTAs that draw units by ticket ({} SMs x {} CTAs)",
            self.launch.grid[0],
            self.device.sms,
            tile.ctas_per_sm(&self.device)
        );
    }

    fn explain_sm90(&self, out: &mut String, choice: &super::sm90::Choice) {
        line!(out, "  kernel     {} (family sm90: wgmma with TMA), one launch", self.launch.kernel);
        line!(
            out,
            "  tiles      {LORA_SM90_BLOCK_M} x {} x {LORA_SM90_BLOCK_K}, {} stages, {} threads, {} bytes of shared memory: {}",
            choice.tile.columns,
            choice.tile.stages,
            self.launch.block[0],
            self.launch.shared_bytes,
            self.reason()
        );
        match &self.launch.params {
            Params::Sm90Forward(p) => {
                line!(
                    out,
                    "  units      {} of h ({} a ticket), then {} of y, each of {} CTA(s)",
                    p.h_units,
                    p.h_units.div_ceil(p.h_tickets.max(1)),
                    p.tickets - p.split.tickets - p.h_tickets,
                    choice.cluster
                );
            }
            Params::Sm90Backward(p) => {
                let units =
                    [p.dh_units, p.dx_end - p.dh_tickets, p.db_end - p.dx_end, p.tickets - p.split.tickets - p.db_end];
                explain_backward(out, units, p.chunks, p.chunk_rows);
                line!(
                    out,
                    "  tickets    {} unit(s) of dh a ticket, each unit of {} CTA(s)",
                    p.dh_units.div_ceil(p.dh_tickets.max(1)),
                    choice.cluster
                );
            }
            _ => {}
        }
        line!(
            out,
            "  grid       {} CTAs in clusters of {} that draw tickets ({} SMs x 1 CTA)",
            self.launch.grid[0],
            choice.cluster,
            self.device.sms
        );
    }
}

fn explain_backward(out: &mut String, [dh, dx, db, da]: [u32; 4], chunks: u32, rows: u32) {
    line!(out, "  units      {dh} of dh, then {dx} of dx, {db} of db and dbias, {da} of da");
    if db + da > 0 {
        line!(out, "  reduction  db and da over {chunks} chunk(s) of {rows} tokens, added in order");
    }
}
