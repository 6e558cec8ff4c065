//! What was measured, as a table and as JSON.

use std::fmt::Write as _;
use std::time::Duration;

use fused_lora::LoraShape;
use serde_json::{Value, json};

use crate::{Backend, Measurement, SAMPLES, origin};

impl Measurement {
    fn microseconds(&self) -> f64 {
        median(self.times.iter().map(Duration::as_secs_f64).collect()) * 1e6
    }

    /// (slowest − fastest) / median of the samples.
    fn spread(&self) -> f64 {
        let seconds = |time: Option<&Duration>| time.map_or(0.0, Duration::as_secs_f64) * 1e6;
        (seconds(self.times.iter().max()) - seconds(self.times.iter().min())) / self.microseconds()
    }

    fn gigaflops(&self) -> f64 {
        self.case.flops() as f64 / self.microseconds() / 1e3
    }

    /// Time over that of the plain product, less one; `None` for a plain product.
    fn tax(&self) -> Option<f64> {
        (!self.ratios.is_empty()).then(|| median(self.ratios.clone()) - 1.0)
    }
}

/// Of at least one value.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0
}

/// One line per case: its time, its rate, how far its samples spread, its LoRA tax over the plain product of the same run.
pub fn table(measured: &[Measurement]) -> String {
    if measured.is_empty() {
        return "nothing was measured\n".to_owned();
    }
    let mut out = format!(
        "\nMedian of {SAMPLES} samples and their spread (slowest - fastest). The tax is the time over that of the plain\n\
         product ({}), which is measured beside each sample, less one: where it is smaller than the spread it says nothing.\n\n",
        measured[0].plain.way.name()
    );
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "{:<9} {:<8} {:>18} {:>5} {:>4} {:>12} {:>7} {:>9} {:>9}  with",
        "op", "way", "M x N x K", "dtype", "R", "time", "spread", "GFLOP/s", "tax"
    );
    for measurement in measured {
        let case = &measurement.case;
        let LoraShape { m, n, k, r } = case.shape;
        let tax = measurement.tax().map_or_else(|| "plain".to_owned(), |tax| format!("{:+.1} %", 100.0 * tax));
        let _ = writeln!(
            out,
            "{:<9} {:<8} {:>18} {:>5} {r:>4} {:>12} {:>7} {:>9.1} {tax:>9}  {}",
            case.op.name(),
            case.way.name(),
            format!("{m} x {n} x {k}"),
            case.dtype.name(),
            format!("{:.1} µs", measurement.microseconds()),
            format!("{:.1} %", 100.0 * measurement.spread()),
            measurement.gigaflops(),
            case.feature,
        );
    }
    out
}

/// The processor's name, where the system tells.
fn processor() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// The file that `scripts/report` reads.
pub fn json(backend: &dyn Backend, measured: &[Measurement]) -> Value {
    let rows: Vec<Value> = measured
        .iter()
        .map(|measurement| {
            let case = &measurement.case;
            let LoraShape { m, n, k, r } = case.shape;
            case.feature.on(json!({
                "op": case.op.name(),
                "way": case.way.name(),
                "dtype": case.dtype.name(),
                "m": m,
                "n": n,
                "k": k,
                "r": r,
                "us": measurement.microseconds(),
                "spread": measurement.spread(),
                "samples": measurement.times.len(),
                "tflops": measurement.gigaflops() / 1e3,
                "tax_percent": measurement.tax().map(|tax| 100.0 * tax),
                "tax_over": measurement.tax().map(|_| measurement.plain.way.name()),
            }))
        })
        .collect();
    let on_gpu = backend.name() == "cuda";
    json!({
        "gpu": on_gpu.then(|| backend.why()),
        "driver": if on_gpu { origin::driver() } else { None },
        "cpu": processor(),
        "cores": std::thread::available_parallelism().ok().map(usize::from),
        "commit": origin::commit(),
        "command": origin::command(),
        "date": origin::date(),
        "rows": rows,
    })
}
