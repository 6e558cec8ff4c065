//! The loss curve: in memory, as CSV and as SVG.

use std::fmt::Write;
use std::path::Path;

use plotters::prelude::*;

use super::common::failure::{Failure, Result};
use super::files;

/// One step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Record {
    /// Before the step.
    pub loss: f64,
    /// L2 over all adapter gradients.
    pub grad_norm: f64,
    pub tokens_per_second: f64,
}

impl Record {
    pub const COLUMNS: [&str; 3] = ["loss", "grad_norm", "tokens_per_second"];

    pub fn numbers(&self) -> [f64; 3] {
        [self.loss, self.grad_norm, self.tokens_per_second]
    }

    pub fn from_numbers(numbers: &[f64]) -> Option<Self> {
        let &[loss, grad_norm, tokens_per_second] = numbers else { return None };
        Some(Self { loss, grad_norm, tokens_per_second })
    }
}

/// Every step so far, from step 0.
#[derive(Debug, Default)]
pub struct History(pub Vec<Record>);

impl History {
    /// loss.csv and loss.svg.
    pub fn save(&self, directory: &Path) -> Result<()> {
        files::replace(&directory.join("loss.csv"), self.csv().as_bytes())?;
        let svg = self.svg().map_err(|problem| Failure::malformed(&directory.join("loss.svg"), problem))?;
        files::replace(&directory.join("loss.svg"), svg.as_bytes())
    }

    fn csv(&self) -> String {
        let mut csv = format!("step,{}\n", Record::COLUMNS.join(","));
        for (step, record) in self.0.iter().enumerate() {
            let numbers = record.numbers().map(|number| number.to_string()).join(",");
            let _ = writeln!(csv, "{step},{numbers}"); // into a string: cannot fail
        }
        csv
    }

    /// Mean loss of the steps up to each, weighing those about `span` back by 1/e: what the eye should follow.
    fn smoothed(&self, span: f64) -> Vec<f64> {
        let keep = (-1.0 / span).exp();
        let (mut sum, mut weight) = (0.0, 0.0);
        let mean = |record: &Record| {
            sum = keep * sum + record.loss;
            weight = keep * weight + 1.0;
            sum / weight
        };
        self.0.iter().map(mean).collect()
    }

    fn svg(&self) -> Result<String, Box<dyn std::error::Error>> {
        let losses = || self.0.iter().map(|record| record.loss);
        let (low, high) =
            losses().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), loss| (low.min(loss), high.max(loss)));
        // A flat or empty curve still gets an axis with a range.
        let (low, high) = if low <= high { (low, high) } else { (0.0, 1.0) };
        let margin = ((high - low) * 0.05).max(high.abs().max(1e-3) * 1e-3);
        let last = self.0.len().saturating_sub(1).max(1);
        let mut svg = String::new();
        {
            let root = SVGBackend::with_string(&mut svg, (800, 480)).into_drawing_area();
            root.fill(&WHITE)?;
            let mut chart = ChartBuilder::on(&root)
                .margin(16)
                .x_label_area_size(48)
                .y_label_area_size(72)
                .build_cartesian_2d(0..last, low - margin..high + margin)?;
            chart
                .configure_mesh()
                .x_desc("step")
                .y_desc("loss (nats per token)")
                .x_labels(11)
                .y_labels(9)
                .axis_desc_style(("sans-serif", 18))
                .label_style(("sans-serif", 15))
                .light_line_style(TRANSPARENT)
                .y_label_formatter(&|loss| axis_number(*loss, high - low))
                .draw()?;
            let long = self.0.len() > 50;
            let (raw, width) = if long { (RGBColor(170, 195, 230), 1) } else { (RGBColor(30, 90, 180), 2) };
            chart.draw_series(LineSeries::new(losses().enumerate(), raw.stroke_width(width)))?;
            if long {
                let smoothed = self.smoothed(self.0.len() as f64 / 50.0);
                chart.draw_series(LineSeries::new(
                    smoothed.into_iter().enumerate(),
                    RGBColor(30, 90, 180).stroke_width(2),
                ))?;
            }
            root.present()?;
        }
        Ok(svg)
    }
}

/// With the decimals that tell neighbouring labels of an axis of this range apart.
fn axis_number(number: f64, range: f64) -> String {
    let decimals = (1.0 - (range / 8.0).max(1e-9).log10().floor()).clamp(1.0, 8.0) as usize;
    format!("{number:.decimals$}")
}
