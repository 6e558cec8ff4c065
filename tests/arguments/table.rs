//! The error matrix: every argument of every operation, every way in which it can be wrong, and the error it gives.
#![allow(dead_code)] // each test binary uses its part

use fused_lora::{Error, LoraShape, MAX_DIMENSION, Routing};

/// No two of these are equal, so that an error shows what it speaks of.
pub const SHAPE: LoraShape = LoraShape { m: 4, n: 6, k: 5, r: 3 };

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Forward,
    Backward,
    /// Forward with a gain, which rules out what [`Op::Forward`] has beside the matrices.
    DoraForward,
    /// Backward with a gain, and with the gradient of the magnitude.
    DoraBackward,
    Merge,
    Round,
    Gain,
}

pub const OPS: [Op; 7] = [Op::Forward, Op::Backward, Op::DoraForward, Op::DoraBackward, Op::Merge, Op::Round, Op::Gain];

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// Another number of rows.
    Rows(usize),
    /// Another number of columns.
    Cols(usize),
    /// Another distance between rows.
    Stride(usize),
    /// An optional argument that another one needs is not there.
    Absent,
    /// An optional argument that this one rules out is there.
    Beside(&'static str),
    /// No output is there.
    NoOutput,
    Scale(f32),
    /// Of dropout.
    Probability(f32),
    /// The matrix starts so many elements later in its buffer.
    Later(usize),
    /// The buffer ends one element before the matrix does.
    Short,
    /// Address 0.
    Null,
    /// So many bytes past an aligned address.
    Past(u64),
    /// The address space ends before the matrix does.
    AtTheEnd,
    /// An output begins at the first element of another argument.
    OnFirst(&'static str),
    /// … at the last element.
    OnLast(&'static str),
}

impl Fault {
    /// What a caller who passes addresses can get wrong.
    pub fn is_of_addresses(self) -> bool {
        !matches!(self, Self::Later(_) | Self::Short)
    }

    /// What a caller who passes buffers can get wrong.
    pub fn is_of_buffers(self) -> bool {
        !matches!(self, Self::Null | Self::Past(_) | Self::AtTheEnd | Self::OnFirst(_) | Self::OnLast(_))
    }
}

impl Row {
    /// What the buffers of tests can show: a table of routes is as long as it is, and a seed is one.
    pub fn is_of_buffers(&self) -> bool {
        let is_possible = match (self.arg, self.fault) {
            ("routes", Fault::Cols(words)) => words < 100,
            ("routes" | "seed", _) => false,
            _ => true,
        };
        is_possible && self.fault.is_of_buffers()
    }
}

/// One entry of the matrix.
#[derive(Clone, Debug)]
pub struct Row {
    pub op: Op,
    /// `""` where no single argument is meant.
    pub arg: &'static str,
    pub fault: Fault,
    pub error: Error,
}

impl Op {
    pub fn inputs(self) -> &'static [&'static str] {
        match self {
            Self::Forward => &["x", "w", "a", "b", "bias", "routes", "seed"],
            Self::Backward => &["dy", "w", "a", "b", "x", "h", "routes", "seed"],
            Self::DoraForward => &["x", "w", "a", "b", "bias", "gain"],
            Self::DoraBackward => &["dy", "w", "a", "b", "x", "h", "gain", "y", "bias", "magnitude"],
            Self::Merge => &["a", "b", "w", "gain"],
            Self::Round => &["a", "b", "divisor"],
            Self::Gain => &["w", "a", "b", "magnitude", "earlier"],
        }
    }

    pub fn outputs(self) -> &'static [&'static str] {
        match self {
            Self::Forward | Self::DoraForward => &["y", "h"],
            Self::Backward => &["dx", "da", "db", "dbias"],
            Self::DoraBackward => &["dm", "dx", "da", "db", "dbias"],
            Self::Gain => &["norm", "gain"],
            Self::Merge => &["merged"],
            Self::Round => &["rounded_a", "rounded_b"],
        }
    }

    pub fn arguments(self) -> impl Iterator<Item = &'static str> {
        self.inputs().iter().chain(self.outputs()).copied()
    }

    /// Rows and columns.
    pub fn dims(self, arg: &str) -> (usize, usize) {
        let LoraShape { m, n, k, r } = SHAPE;
        match arg {
            "x" | "dx" => (m, k),
            "w" | "merged" => (n, k),
            "a" | "da" | "rounded_a" => (r, k),
            "b" | "db" | "rounded_b" => (n, r),
            "y" | "dy" => (m, n),
            "h" => (m, r),
            "bias" | "dbias" | "gain" | "divisor" | "magnitude" | "earlier" | "norm" | "dm" => (1, n),
            "routes" => (1, Routing::words_for(m)),
            "seed" => (1, 2),
            _ => unreachable!("no operation has an argument {arg}"),
        }
    }

    /// Bytes of an element; `wide`: gradients or factors are f32.
    pub fn element_bytes(self, arg: &str, wide: bool) -> u64 {
        if matches!(arg, "routes" | "seed") {
            return 8;
        }
        if matches!(arg, "gain" | "divisor" | "magnitude" | "earlier" | "norm" | "dm") {
            return 4;
        }
        let is_wide = match self {
            Self::Forward | Self::DoraForward => false,
            Self::Backward | Self::DoraBackward => matches!(arg, "da" | "db" | "dbias"),
            Self::Merge | Self::Round | Self::Gain => matches!(arg, "a" | "b"),
        };
        if wide && is_wide { 4 } else { 2 }
    }

    /// Whom another number of rows of `arg` brings into conflict. The shape is read from a few arguments, which are taken at
    /// their word; the first to disagree with them is named, with the axis.
    fn disagrees_on_rows(self, arg: &'static str) -> (&'static str, &'static str) {
        match (self, arg) {
            (Self::Forward, "x") => ("routes", "columns"),
            (Self::DoraForward, "x") => ("y", "rows"),
            (Self::Forward | Self::DoraForward | Self::Gain, "w") => ("b", "rows"),
            (Self::Backward | Self::DoraBackward, "dy") => ("x", "rows"),
            (Self::Backward | Self::DoraBackward, "w") => ("dy", "columns"),
            (Self::Merge, "merged") => ("b", "rows"),
            (Self::Round, "b") => ("divisor", "columns"),
            (_, "a") => ("b", "columns"),
            _ => (arg, "rows"),
        }
    }

    /// The same for columns.
    fn disagrees_on_columns(self, arg: &'static str) -> (&'static str, &'static str) {
        match (self, arg) {
            (Self::Forward | Self::DoraForward, "w") => ("x", "columns"),
            (Self::Backward | Self::DoraBackward | Self::Gain, "w") | (Self::Merge, "merged") => ("a", "columns"),
            (Self::Round, "a") => ("rounded_a", "columns"),
            _ => (arg, "columns"),
        }
    }

    /// The arguments that may not be empty.
    fn is_nonzero(self, arg: &str) -> bool {
        match self {
            Self::Forward | Self::DoraForward => matches!(arg, "x" | "w"),
            Self::Backward | Self::DoraBackward => matches!(arg, "dy" | "w"),
            Self::Merge => arg == "merged",
            Self::Round => false,
            Self::Gain => arg == "w",
        }
    }
}

/// Elements from the start of the buffer that `arg` needs where tests place it.
pub fn needed((rows, cols): (usize, usize), offset: usize, row_stride: usize) -> usize {
    offset.saturating_add((rows - 1) * row_stride + cols)
}

/// The matrix of one operation. `place` is where buffers are: offset, distance between rows and length of each argument that tests
/// place in one.
pub fn rows(op: Op, wide: bool, place: impl Fn(&str) -> Option<(usize, usize, usize)>) -> Vec<Row> {
    let mut table = Vec::new();
    let mut add = |arg, fault, error| table.push(Row { op, arg, fault, error });
    for arg in op.arguments() {
        let (rows, cols) = op.dims(arg);
        for size in [rows + 1, rows - 1, 0, MAX_DIMENSION + 1, usize::MAX] {
            let error = disagreement(op, arg, "rows", size, op.disagrees_on_rows(arg));
            error.into_iter().for_each(|error| add(arg, Fault::Rows(size), error));
        }
        for size in [cols + 1, cols - 1, 0, MAX_DIMENSION + 1, usize::MAX] {
            let error = disagreement(op, arg, "columns", size, op.disagrees_on_columns(arg));
            error.into_iter().for_each(|error| add(arg, Fault::Cols(size), error));
        }
        for got in [cols - 1, 0] {
            add(arg, Fault::Stride(got), Error::Stride { arg, got, min: cols });
        }
        let limit = i64::MAX as u64 / 4;
        let extent = |got| Error::TooLarge { what: "a matrix extent in elements", got, limit };
        if rows > 1 {
            let last = (rows as u64 - 1) * limit + cols as u64;
            add(arg, Fault::Stride(limit as usize), extent(last));
            add(arg, Fault::Stride(usize::MAX), extent(u64::MAX));
        }

        if let Some((offset, row_stride, got)) = place(arg) {
            let end = needed((rows, cols), offset, row_stride);
            for later in [got - end + 1, usize::MAX - offset] {
                let needed = end.saturating_add(later);
                add(arg, Fault::Later(later), Error::BufferTooShort { arg, got, needed });
            }
            add(arg, Fault::Short, Error::BufferTooShort { arg, got: end - 1, needed: end });
        }

        add(arg, Fault::Null, Error::NullPointer { arg });
        let align = op.element_bytes(arg, wide);
        for past in (1..align).filter(|past| past.is_power_of_two()) {
            // Which address is for the caller to know.
            add(arg, Fault::Past(past), Error::Misaligned { arg, address: past, align });
        }
        let end = Error::TooLarge { what: "the end address of a matrix", got: u64::MAX, limit: u64::MAX - 1 };
        add(arg, Fault::AtTheEnd, end);
    }
    for (at, &output) in op.outputs().iter().enumerate() {
        for &other in op.inputs() {
            add(output, Fault::OnFirst(other), Error::Overlap { output, other });
            add(output, Fault::OnLast(other), Error::Overlap { output, other });
        }
        for (other_at, &other) in op.outputs().iter().enumerate().filter(|&(other_at, _)| other_at != at) {
            let (output, named) = if at > other_at { (output, other) } else { (other, output) };
            let error = Error::Overlap { output, other: named };
            add(op.outputs()[at], Fault::OnFirst(other), error.clone());
            add(op.outputs()[at], Fault::OnLast(other), error);
        }
    }
    for got in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        add("", Fault::Scale(got), Error::Scale { arg: "scale", got });
    }
    if matches!(op, Op::Forward | Op::Backward) {
        for got in [f32::NAN, f32::INFINITY, -1e-9, 1.0f32.next_up()] {
            add("", Fault::Probability(got), Error::Probability { got });
        }
    }
    if matches!(op, Op::Backward | Op::DoraBackward) {
        add("x", Fault::Absent, Error::Missing { arg: "x", output: "da" });
        add("h", Fault::Absent, Error::Missing { arg: "h", output: "db" });
        add("", Fault::NoOutput, Error::NoOutput { expected: "dx, da, db, dbias, dm" });
    }
    if matches!(op, Op::DoraForward | Op::DoraBackward) {
        for other in ["dropout", "routes"] {
            add("gain", Fault::Beside(other), Error::Exclusive { arg: "gain", other });
        }
    }
    if op == Op::DoraBackward {
        add("gain", Fault::Absent, Error::Missing { arg: "gain", output: "dm" });
    }
    if op == Op::Gain {
        add("magnitude", Fault::Absent, Error::Missing { arg: "magnitude", output: "gain" });
        add("", Fault::NoOutput, Error::NoOutput { expected: "norm, gain" });
    }
    table
}

/// `arg` has `size` rows or columns; none where that is what it has.
fn disagreement(
    op: Op,
    arg: &'static str,
    axis: &'static str,
    size: usize,
    (named, named_axis): (&'static str, &'static str),
) -> Option<Error> {
    let of = |arg, axis| if axis == "rows" { op.dims(arg).0 } else { op.dims(arg).1 };
    if size == of(arg, axis) {
        return None;
    }
    if size == 0 && op.is_nonzero(arg) {
        return Some(Error::ZeroDimension { arg, axis });
    }
    let itself = named == arg;
    let implied = if named == "routes" { Routing::words_for(size) } else { size };
    let (got, expected) = if itself { (size, of(arg, axis)) } else { (of(named, named_axis), implied) };
    Some(Error::Dimension { arg: named, axis: named_axis, got, expected })
}
