//! What no kernel can be faster than: the arithmetic and the memory traffic of a call at the rates of the data sheet.

use crate::plan::Peak;
use crate::{LoraShape, raw, split_columns};

/// The work of a call, and the time that it takes at least.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Floor {
    /// Floating-point operations: two per multiply-add of the products that the outputs need; of adapters that rows are routed
    /// through none, as no row need go through one.
    pub flops: f64,
    /// Bytes of every argument that is read or written, once (twice for an output that is added to).
    pub bytes: f64,
    /// The device's rates, where its data sheet is known.
    pub peak: Option<Peak>,
}

impl Floor {
    /// Microseconds of the arithmetic at the peak rate.
    pub fn arithmetic_microseconds(&self) -> Option<f64> {
        self.peak.map(|peak| self.flops / (f64::from(peak.teraflops) * 1e6))
    }

    /// Microseconds of the traffic at the peak bandwidth.
    pub fn memory_microseconds(&self) -> Option<f64> {
        self.peak.map(|peak| self.bytes / (f64::from(peak.gigabytes_per_second) * 1e3))
    }

    pub(super) fn forward(op: &raw::ForwardShared, shape: LoraShape, peak: Option<Peak>) -> Floor {
        let [m, k, rank] = [shape.m, shape.k, shape.r].map(|extent| extent as f64);
        // With routes no ranks are counted: a row may go through no adapter.
        let counted = |rank: f64| if op.routes.is_some() { 0.0 } else { rank };
        let size = op.dtype.size() as f64;
        let factor = if op.is_split() { 4.0 } else { size };
        let kept = op.h.map_or(0.0, |h| m * h.cols as f64);
        let mut floor = Floor {
            flops: 2.0 * m * counted(rank) * k,
            bytes: (m * k + kept) * size + counted(rank) * k * factor,
            peak,
        };
        for of in op.projections.iter() {
            let (n, r) = (of.w.rows as f64, counted(of.b.cols as f64));
            let bias = if of.bias.is_some() { n } else { 0.0 };
            floor.flops += 2.0 * m * (n * k + n * r);
            floor.bytes +=
                (n * k + m * n + bias) * size + n * r * factor + if of.gain.is_some() { 4.0 * n } else { 0.0 };
        }
        floor
    }

    pub(super) fn backward(op: &raw::BackwardShared, shape: LoraShape, peak: Option<Peak>) -> Floor {
        let [m, k, rank] = [shape.m, shape.k, shape.r].map(|extent| extent as f64);
        let counted = |rank: f64| if op.routes.is_some() { 0.0 } else { rank };
        let (dx, da) = (op.dx.is_some(), op.da.is_some());
        let when = |condition: bool, amount: f64| if condition { amount } else { 0.0 };
        let size = op.dtype.size() as f64;
        let gradient = |gradient: Option<raw::Gradient>, accumulates: bool, elements: f64| {
            let each = gradient.map_or(0.0, |gradient| if gradient.f32 { 4.0 } else { size });
            elements * each * if accumulates { 2.0 } else { 1.0 }
        };
        let r = counted(rank);
        let mut macs = when(dx, m * r * k) + when(da, m * r * k);
        let factor = if op.is_split() { 4.0 } else { size };
        let mut read = when(da, m * k) + when(dx, m * k * if op.accumulate.dx { 2.0 } else { 1.0 });
        let mut others = gradient(op.da, op.accumulate.da, rank * k) + when(dx, r * k * factor);
        for of in op.projections.iter() {
            let (n, rank) = (of.w.rows as f64, of.b.cols as f64);
            let r = counted(rank);
            let db = of.db.is_some();
            macs += when(dx, m * n * k) + when(dx || da, m * n * r) + when(db, m * n * r);
            let reads_dy = dx || da || db || of.dbias.is_some() || of.dm.is_some();
            // Of h a row has the ranks, or their halves.
            let kept = if op.is_split() { split_columns(of.b.cols) as f64 } else { r };
            read += when(reads_dy, m * n) + when(dx, n * k) + when(db, m * kept) + when(of.dm.is_some(), m * n);
            others += gradient(of.db, op.accumulate.db, n * rank) + gradient(of.dbias, op.accumulate.dbias, n);
            others += of.dm.map_or(0.0, |dm| {
                let bias = if dm.bias.is_some() { size } else { 0.0 };
                n * (bias + 4.0 + if op.accumulate.dm { 8.0 } else { 4.0 })
            });
            others += when(of.gain.is_some(), 4.0 * n) + when(dx || da, n * r * factor);
        }
        Floor { flops: 2.0 * macs, bytes: read * size + others, peak }
    }
}
