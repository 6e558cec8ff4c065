//! What was measured, as a table.

use std::time::Duration;

use fused_lora::LoraShape;

use crate::{Case, Measurement, Op, SAMPLES};

/// One line per case: its time, its rate, how far its samples spread, its LoRA tax over the plain product of the same run.
pub fn print(measured: &[Measurement]) {
    if measured.is_empty() {
        println!("nothing was measured");
        return;
    }
    println!(
        "\nMedian of {SAMPLES} samples and their spread (slowest - fastest); the plain product is the line with R = 0."
    );
    println!("A tax smaller than the spread says nothing: quieten the machine and measure again.\n");
    println!(
        "{:<9} {:>16} {:>5} {:>4} {:>11} {:>7} {:>9} {:>9}",
        "op", "M x N x K", "dtype", "R", "time", "spread", "GFLOP/s", "LoRA tax"
    );
    for Measurement { case, time, spread } in measured {
        let LoraShape { m, n, k, r } = case.shape;
        let op = match case.op {
            Op::Forward => "forward",
            Op::Backward => "backward",
        };
        let tax = match plain(measured, case) {
            _ if r == 0 => "plain".to_owned(),
            Some(plain) => format!("{:+.1} %", 100.0 * (time.as_secs_f64() / plain.as_secs_f64() - 1.0)),
            None => "no R = 0".to_owned(),
        };
        let spread = format!("{:.1} %", 100.0 * spread);
        let rate = case.flops() as f64 / time.as_secs_f64() / 1e9;
        let (shape, time) = (format!("{m} x {n} x {k}"), format!("{:.1} µs", time.as_secs_f64() * 1e6));
        println!("{op:<9} {shape:>16} {:>5} {r:>4} {time:>11} {spread:>7} {rate:>9.1} {tax:>9}", case.dtype.name());
    }
}

/// The time of the plain product that a case extends.
fn plain(measured: &[Measurement], case: &Case) -> Option<Duration> {
    let plain = Case { shape: LoraShape { r: 0, ..case.shape }, ..*case };
    measured.iter().find(|other| other.case == plain).map(|other| other.time)
}
