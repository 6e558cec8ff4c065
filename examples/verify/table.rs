//! The report as a table for people and as JSON lines for programs.

use std::io::{Result, Write};
use std::time::Duration;

use serde_json::json;

use super::check::{Report, Row};
use super::failure::Outcome;

const HEADINGS: [&str; 10] = ["tensor", "mode", "shape", "dtype", "error", "allowed", "max abs", "allowed", "time", ""];
/// Columns of words, set left; numbers are set right.
const WORDS: [bool; 10] = [true, true, true, true, false, false, false, false, false, true];

/// A heading, one aligned line per result, what was left out, the verdict.
pub fn human(report: &Report, out: &mut dyn Write) -> Result<()> {
    let [m, n, k, r] = report.dimensions;
    writeln!(out, "\n{}: M {m}, N {n}, K {k}, R {r}", report.case)?;
    let lines: Vec<[String; 10]> = report.rows.iter().map(cells).collect();
    let width = |column: usize| {
        let cells = lines.iter().map(|line| line[column].chars().count());
        cells.chain([HEADINGS[column].len()]).max().unwrap_or(0)
    };
    let widths: [usize; 10] = std::array::from_fn(width);
    write_line(out, &HEADINGS.map(String::from), &widths)?;
    for line in &lines {
        write_line(out, line, &widths)?;
    }
    for row in report.rows.iter().filter(|row| !row.ok() && row.error.within(row.bound)) {
        let (got, bound) = (row.from_peft.largest, row.from_peft_bound.largest);
        writeln!(out, "  {}/{} is {got:.2e} from the tensor PEFT recorded, allowed {bound:.2e}", row.mode, row.name)?;
    }
    for (mode, why) in &report.left_out {
        writeln!(out, "  not computed: {mode} ({why})")?;
    }
    let failed = report.rows.iter().filter(|row| !row.ok()).count();
    match report.outcome() {
        Outcome::Within => writeln!(out, "  all {} errors are within their bounds", lines.len()),
        _ => writeln!(out, "  {failed} of {} errors EXCEED their bounds", lines.len()),
    }
}

fn cells(row: &Row) -> [String; 10] {
    let shape: Vec<String> = row.shape.iter().map(usize::to_string).collect();
    [
        row.name.clone(),
        row.mode.into(),
        shape.join("×"),
        format!("{:?}", row.dtype).to_lowercase(),
        format!("{:.2e}", row.error.relative),
        format!("{:.2e}", row.bound.relative),
        format!("{:.2e}", row.error.largest),
        format!("{:.2e}", row.bound.largest),
        time(row.time),
        if row.ok() { "ok".into() } else { "EXCEEDED".into() },
    ]
}

fn time(time: Duration) -> String {
    match time.as_secs_f64() {
        seconds if seconds < 1e-3 => format!("{:.1} µs", seconds * 1e6),
        seconds if seconds < 1.0 => format!("{:.1} ms", seconds * 1e3),
        seconds => format!("{seconds:.2} s"),
    }
}

fn write_line(out: &mut dyn Write, cells: &[String; 10], widths: &[usize; 10]) -> Result<()> {
    let mut line = String::new();
    for ((cell, &width), word) in cells.iter().zip(widths).zip(WORDS) {
        line += "  ";
        line += &if word { format!("{cell:<width$}") } else { format!("{cell:>width$}") };
    }
    writeln!(out, "{}", line.trim_end())
}

/// One object per tensor and mode.
pub fn json(report: &Report, backend: &str, out: &mut dyn Write) -> Result<()> {
    for row in &report.rows {
        let object = json!({
            "case": report.case,
            "name": row.name,
            "mode": row.mode,
            "shape": row.shape,
            "dtype": format!("{:?}", row.dtype).to_lowercase(),
            "error": row.error.relative,
            "bound": row.bound.relative,
            "max_abs": row.error.largest,
            "max_abs_bound": row.bound.largest,
            "max_abs_from_peft": row.from_peft.largest,
            "max_abs_from_peft_bound": row.from_peft_bound.largest,
            "ok": row.ok(),
            "backend": backend,
            "seconds": row.time.as_secs_f64(),
        });
        writeln!(out, "{object}")?;
    }
    Ok(())
}
