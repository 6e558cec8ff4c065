//! What a measured call has beside the plain adapter.

use std::fmt;

use fused_lora::split_columns;
use serde_json::{Value, json};

/// What a call has beside the plain adapter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Feature {
    /// Part of x's elements that the adapter does not see.
    pub dropout: f32,
    /// That the rows of a batch go through.
    pub adapters: usize,
    /// A gain, and the gradient of the magnitude.
    pub dora: bool,
    /// Factors in f32.
    pub full: bool,
    /// That share x.
    pub projections: usize,
}

impl Default for Feature {
    fn default() -> Self {
        Self { dropout: 0.0, adapters: 1, dora: false, full: false, projections: 1 }
    }
}

impl Feature {
    /// Of the plain product.
    pub fn without_adapter(self) -> Self {
        Self { projections: self.projections, ..Self::default() }
    }

    /// Of all projections, with `r` ranks each.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))] // only what runs on a GPU keeps h
    pub fn columns_of_h(&self, r: usize) -> usize {
        self.projections * if self.full { split_columns(r) } else { r }
    }

    /// Bytes of an element of A and B.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))] // only what runs on a GPU has addresses
    pub fn factor_bytes(&self) -> u64 {
        if self.full { 4 } else { 2 }
    }

    /// Nothing: what separate products compute as well.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// A row of results with it.
    pub fn on(&self, mut row: Value) -> Value {
        // As it was asked for: 0.1, not the next f32.
        row["dropout"] = json!(self.dropout.to_string().parse::<f64>().unwrap_or_default());
        row["adapters"] = json!(self.adapters);
        row["dora"] = json!(self.dora);
        row["full"] = json!(self.full);
        row["projections"] = json!(self.projections);
        row
    }
}

impl fmt::Display for Feature {
    /// In the words of `scripts/report`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { dropout, adapters, dora, full, projections } = *self;
        let parts = [
            (dropout > 0.0).then(|| format!("dropout {dropout}")),
            (adapters > 1).then(|| format!("{adapters} adapters")),
            dora.then(|| "DoRA".to_owned()),
            full.then(|| "f32 factors".to_owned()),
            (projections > 1).then(|| format!("{projections} projections")),
        ];
        f.write_str(&parts.into_iter().flatten().collect::<Vec<_>>().join(", "))
    }
}
