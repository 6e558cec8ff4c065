//! What a run tells while it runs: a bar on a terminal, plain lines elsewhere, JSON for programs.

use std::io::Write;
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use serde_json::json;

use super::common::failure::{Failure, Result};
use super::history::Record;

/// Where a program writes. `terminal`: `err` is one, and is the process's own stderr.
pub struct Streams<'a> {
    pub out: &'a mut dyn Write,
    pub err: &'a mut dyn Write,
    pub terminal: bool,
}

pub struct Progress {
    json: bool,
    bar: Option<ProgressBar>,
    steps: usize,
    first: usize,
    began: Instant,
    last_line: Instant,
}

impl Progress {
    pub fn new(steps: usize, first: usize, json: bool, streams: &Streams<'_>) -> Self {
        let bar = streams.terminal.then(|| {
            let bar = ProgressBar::new(steps as u64).with_position(first as u64);
            let style = ProgressStyle::with_template("{pos}/{len} {wide_bar} {msg}, {eta} left");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar
        });
        let now = Instant::now();
        Self { json, bar, steps, first, began: now, last_line: now }
    }

    pub fn step(&mut self, step: usize, record: &Record, streams: &mut Streams<'_>) -> Result<()> {
        let &Record { loss, grad_norm, tokens_per_second } = record;
        if self.json {
            let object = json!({
                "step": step,
                "loss": loss,
                "grad_norm": grad_norm,
                "tokens_per_second": tokens_per_second,
            });
            writeln!(streams.out, "{object}").and_then(|()| streams.out.flush()).map_err(on_stdout)?;
        }
        if let Some(bar) = &self.bar {
            bar.set_message(format!("loss {loss:.4}, {tokens_per_second:.0} tokens/s"));
            bar.set_position(step as u64 + 1);
            return Ok(());
        }
        // Without a terminal: every step of a short run, twenty lines of a long one, and a sign of life each minute.
        let due = (step + 1).is_multiple_of(self.steps.div_ceil(20)) || step + 1 == self.steps;
        if !self.json && (due || self.last_line.elapsed() > Duration::from_secs(60)) {
            self.last_line = Instant::now();
            let per_step = self.began.elapsed().as_secs_f64() / (step + 1 - self.first) as f64;
            let left = Duration::try_from_secs_f64(per_step * (self.steps - step - 1) as f64).unwrap_or(Duration::MAX);
            writeln!(
                streams.err,
                "step {}/{}: loss {loss:.4}, {tokens_per_second:.0} tokens/s, {} left",
                step + 1,
                self.steps,
                HumanDuration(left)
            )
            .map_err(|error| Failure::output("stderr", error))?;
        }
        Ok(())
    }

    /// Leaves the bar's last state on the screen, on a line of its own.
    pub fn finish(&self, streams: &mut Streams<'_>) -> Result<()> {
        let Some(bar) = &self.bar else { return Ok(()) };
        bar.abandon();
        writeln!(streams.err).map_err(|error| Failure::output("stderr", error))
    }
}

pub fn on_stdout(error: std::io::Error) -> Failure {
    Failure::output("stdout", error)
}
