//! What no kernel can be faster than: the arithmetic and the memory traffic of a call at the rates of the data sheet.

use crate::plan::Peak;
use crate::{LoraShape, raw};

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

/// Ranks that are counted: with routes none, as a row may go through no adapter.
fn through_any(variant: &raw::Variant, rank: f64) -> f64 {
    if variant.routes.is_some() { 0.0 } else { rank }
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

    pub(super) fn forward(op: &raw::Forward, shape: LoraShape, peak: Option<Peak>) -> Floor {
        let [m, n, k, rank] = [shape.m, shape.n, shape.k, shape.r].map(|extent| extent as f64);
        let r = through_any(&op.variant, rank);
        let elements = m * k + n * k + r * k + n * r + m * n;
        let kept = if op.h.is_some() { m * rank } else { 0.0 };
        let bias = if op.bias.is_some() { n } else { 0.0 };
        let gain = if op.variant.gain.is_some() { 4.0 * n } else { 0.0 };
        Floor {
            flops: 2.0 * m * (n * k + r * (k + n)),
            bytes: (elements + kept + bias) * op.dtype.size() as f64 + gain,
            peak,
        }
    }

    pub(super) fn backward(op: &raw::Backward, shape: LoraShape, peak: Option<Peak>) -> Floor {
        let [m, n, k, rank] = [shape.m, shape.n, shape.k, shape.r].map(|extent| extent as f64);
        let r = through_any(&op.variant, rank);
        let (dx, da, db) = (op.dx.is_some(), op.da.is_some(), op.db.is_some());
        let when = |condition: bool, amount: f64| if condition { amount } else { 0.0 };
        let size = op.dtype.size() as f64;
        let gradient = |gradient: Option<raw::Gradient>, accumulates: bool, elements: f64| {
            let each = gradient.map_or(0.0, |gradient| if gradient.f32 { 4.0 } else { size });
            elements * each * if accumulates { 2.0 } else { 1.0 }
        };
        let macs =
            when(dx, m * n * k + m * r * k) + when(dx || da, m * n * r) + when(da, m * r * k) + when(db, m * n * r);
        let dm = op.dm.map_or(0.0, |dm| {
            let bias = if dm.bias.is_some() { size } else { 0.0 };
            n * (bias + 4.0 + if op.accumulate.dm { 8.0 } else { 4.0 })
        });
        let dora = dm + when(op.variant.gain.is_some(), 4.0 * n);
        let read = m * n
            + when(dx, n * k + r * k)
            + when(dx || da, n * r)
            + when(da, m * k)
            + when(db, m * r)
            + when(op.dm.is_some(), m * n)
            + when(dx, m * k * if op.accumulate.dx { 2.0 } else { 1.0 });
        Floor {
            flops: 2.0 * macs,
            bytes: read * size
                + gradient(op.da, op.accumulate.da, rank * k)
                + gradient(op.db, op.accumulate.db, n * rank)
                + gradient(op.dbias, op.accumulate.dbias, n)
                + dora,
            peak,
        }
    }
}
