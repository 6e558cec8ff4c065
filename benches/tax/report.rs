//! Rows of the result, as a table and as JSON.

use std::fmt::Write as _;

use fused_lora::{Dtype, LoraShape};
use serde_json::{Value, json};

use super::feature::Feature;
use super::measure::{median, spread, tax};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Forward,
    Backward,
}

/// Who computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// cuBLASLt's product of x Wᵀ, or dy W: what LoRA comes on top of.
    Plain,
    /// This crate, in one launch. With R = 0 the same product.
    Fused,
    /// cuBLASLt, a product after the other.
    Unfused,
}

impl Op {
    pub fn name(self) -> &'static str {
        match self {
            Op::Forward => "forward",
            Op::Backward => "backward",
        }
    }
}

impl Way {
    pub fn name(self) -> &'static str {
        match self {
            Way::Plain => "cublaslt",
            Way::Fused => "fused",
            Way::Unfused => "unfused",
        }
    }
}

/// One thing that was timed.
#[derive(Clone, Debug)]
pub struct Row {
    pub op: Op,
    pub way: Way,
    pub dtype: Dtype,
    pub shape: LoraShape,
    /// What the call has beside the plain adapter.
    pub feature: Feature,
    /// Of the products that the outputs need.
    pub flops: f64,
    /// Microseconds that no kernel can be faster than, by the data sheet where it is known.
    pub floor: Option<f64>,
    /// Bytes that every argument has.
    pub floor_bytes: f64,
    /// Microseconds that the planner predicted.
    pub predicted: Option<f64>,
    /// What ran: the kernel, or the algorithms' library.
    pub what: String,
    /// Microseconds per run, one of each round; none where nothing is timed.
    pub samples: Vec<f64>,
}

/// What the run was about, for whoever reads the file later.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    pub gpu: String,
    pub driver: String,
    pub toolkit: String,
    pub cublaslt: Option<String>,
    pub commit: String,
    pub command: String,
    pub date: String,
    /// Of the measurement: where constants or plan options are other than usual.
    pub label: String,
    pub settled: bool,
}

/// The largest tax that was aimed at, in percent: (rank, forward, backward). Of the plain product 98 % of cuBLASLt's speed.
const GOALS: [(usize, f64, f64); 4] = [(0, 2.04, 2.04), (16, 2.0, 6.0), (64, 4.0, 9.0), (128, 6.0, 14.0)];

impl Row {
    pub fn microseconds(&self) -> f64 {
        median(&self.samples)
    }

    pub fn teraflops(&self) -> f64 {
        self.flops / self.microseconds() / 1e6
    }

    /// Part of the floor's speed, in percent.
    pub fn floor_share(&self) -> Option<f64> {
        self.floor.map(|floor| 100.0 * floor / self.microseconds())
    }

    pub fn goal(&self) -> Option<f64> {
        // Many adapters have more ranks than the row says, factors in f32 more products, and projections more than one adapter.
        let Feature { adapters, full, projections, .. } = self.feature;
        let is_aimed_at = self.way == Way::Fused && (adapters, full, projections) == (1, false, 1);
        let goal = GOALS.iter().find(|goal| is_aimed_at && goal.0 == self.shape.r)?;
        Some(if self.op == Op::Forward { goal.1 } else { goal.2 })
    }
}

/// The row whose time is the baseline of `row`: the plain product of the same operation and shape, by cuBLASLt, or by this
/// crate where cuBLASLt is absent. None for the baseline itself.
pub fn baseline<'a>(rows: &'a [Row], row: &Row) -> Option<&'a Row> {
    let same = |other: &&Row| {
        let LoraShape { m, n, k, .. } = other.shape;
        (other.op, other.dtype, m, n, k) == (row.op, row.dtype, row.shape.m, row.shape.n, row.shape.k)
    };
    let plain = |way: Way| rows.iter().filter(same).find(|other| other.way == way && other.shape.r == 0);
    plain(Way::Plain)
        .or_else(|| plain(Way::Fused))
        .filter(|baseline| (baseline.way, baseline.shape.r) != (row.way, row.shape.r))
}

/// In percent.
pub fn row_tax(rows: &[Row], row: &Row) -> Option<f64> {
    baseline(rows, row).map(|baseline| 100.0 * tax(&row.samples, &baseline.samples))
}

pub fn table(rows: &[Row]) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "{:<8} {:<8} {:>18} {:>5} {:>4} {:>10} {:>7} {:>8} {:>7} {:>8} {:>7} {:>10}",
        "op", "way", "M x N x K", "dtype", "R", "us", "spread", "TFLOP/s", "floor", "tax", "goal", "predicted"
    );
    let percent = |value: Option<f64>, sign: bool| match value {
        Some(value) if sign => format!("{value:+.1} %"),
        Some(value) => format!("{value:.1} %"),
        None => String::new(),
    };
    for row in rows {
        let LoraShape { m, n, k, r } = row.shape;
        let (tax, goal) = (row_tax(rows, row), row.goal());
        let goal = goal.map_or(String::new(), |goal| match tax {
            Some(tax) if tax <= goal => "met".to_owned(),
            Some(_) => format!("{goal:.1} %"),
            None => String::new(),
        });
        let _ = writeln!(
            out,
            "{:<8} {:<8} {:>18} {:>5} {r:>4} {:>10.1} {:>7} {:>8.1} {:>7} {:>8} {goal:>7} {:>10}",
            row.op.name(),
            row.way.name(),
            format!("{m} x {n} x {k}"),
            row.dtype.name(),
            row.microseconds(),
            percent(Some(100.0 * spread(&row.samples)), false),
            row.teraflops(),
            percent(row.floor_share(), false),
            percent(tax, true),
            row.predicted.map_or(String::new(), |predicted| format!("{predicted:.1}")),
        );
    }
    out
}

pub fn json(machine: &Machine, rows: &[Row]) -> Value {
    let rows: Vec<Value> = rows
        .iter()
        .map(|row| {
            let LoraShape { m, n, k, r } = row.shape;
            row.feature.on(json!({
                "op": row.op.name(),
                "way": row.way.name(),
                "dtype": row.dtype.name(),
                "m": m,
                "n": n,
                "k": k,
                "r": r,
                "us": row.microseconds(),
                "spread": spread(&row.samples),
                "samples": row.samples.len(),
                "tflops": row.teraflops(),
                "floor_us": row.floor,
                "floor_bytes": row.floor_bytes,
                "floor_percent": row.floor_share(),
                "tax_percent": row_tax(rows, row),
                "tax_over": baseline(rows, row).map(|baseline| baseline.way.name()),
                "goal_percent": row.goal(),
                "predicted_us": row.predicted,
                "what": row.what,
            }))
        })
        .collect();
    json!({
        "gpu": machine.gpu,
        "driver": machine.driver,
        "toolkit": machine.toolkit,
        "cublaslt": machine.cublaslt,
        "commit": machine.commit,
        "command": machine.command,
        "date": machine.date,
        "label": machine.label,
        "settled": machine.settled,
        "rows": rows,
    })
}
