//! Any bytes as a problem for the planner: what it plans is legal, and what it refuses was to be refused.
//!
//! Shared with the fuzzer's target `plan`, which has no more of the tests' modules than [`legal`].
#![allow(clippy::panic)] // fails as tests do

use arbitrary::{Result, Unstructured};
use fused_lora::plan::{Device, Family, Launch, Options, Plan};
use fused_lora::{Accumulate, Dtype, Error, LoraShape, MAX_DIMENSION, Routing, raw, split_columns};

use super::legal;

#[path = "fuzz_plan/drawn.rs"]
mod drawn;
#[path = "fuzz_plan/shared.rs"]
mod shared;

use drawn::{device, dtype, options, scale, shape};

/// Bytes that a problem reads at most; those that lack are zero.
pub const BYTES: usize = 3072;

/// What became of a problem's operations.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    pub portable: usize,
    pub sm90: usize,
    /// Launches for an adapter's factors.
    pub adapter: usize,
    pub refused: usize,
    /// Launches refused for where their workspace lies.
    pub misplaced: usize,
}

/// Plans the operations that `bytes` describe.
pub fn run(bytes: &[u8]) -> Outcome {
    let mut outcome = Outcome::default();
    solve(&mut Unstructured::new(bytes), &mut outcome).expect("bytes that lack are zero");
    outcome
}

fn solve(u: &mut Unstructured<'_>, outcome: &mut Outcome) -> Result<()> {
    let (device, options, dtype) = (device(u)?, options(u)?, dtype(u)?);
    let (shape, mut place) = (shape(u)?, Place::new(u)?);
    let call = Call { device: &device, options: &options };

    operations(u, &mut place, dtype, (shape, false), &call, outcome)?;
    factors(u, &mut place, dtype, shape, outcome)?;
    shared::solve(u, &mut place, dtype, &call, outcome)?;
    operations(u, &mut place, dtype, (shape, true), &call, outcome)
}

/// Forward and backward, with factors in f32 or of the storage type.
fn operations(
    u: &mut Unstructured<'_>,
    place: &mut Place,
    dtype: Dtype,
    problem: (LoraShape, bool),
    call: &Call<'_>,
    outcome: &mut Outcome,
) -> Result<()> {
    let op = forward(u, place, dtype, problem)?;
    let of_factors = if op.f32_factors { 4 } else { dtype.size() };
    let inputs = [("x", op.x), ("w", op.w)].into_iter().chain(op.bias.map(|bias| ("bias", bias)));
    let factors = [("a", op.a), ("b", op.b)].map(|(name, matrix)| Argument::new(name, matrix, of_factors, false));
    let outputs = [("y", op.y)].into_iter().chain(op.h.map(|h| ("h", h)));
    let arguments: Vec<Argument> = (inputs.map(|(name, matrix)| Argument::new(name, matrix, dtype.size(), false)))
        .chain(factors)
        .chain(variant_arguments(&op.variant))
        .chain(outputs.map(|(name, matrix)| Argument::new(name, matrix, dtype.size(), true)))
        .collect();
    let plan = || Plan::forward_with(&op, call.device, *call.options);
    if let Some(plan) = call.judge(plan, op.check(), dtype, &arguments, outcome) {
        let judge = |at| legal::forward(&plan, &op, call.device, call.options, at);
        call.place(u, &plan, &arguments, judge, outcome)?;
    }

    let op = backward(u, place, dtype, problem)?;
    let arguments = backward_arguments(&op);
    let plan = || Plan::backward_with(&op, call.device, *call.options);
    if let Some(plan) = call.judge(plan, op.check(), dtype, &arguments, outcome) {
        let judge = |at| legal::backward(&plan, &op, call.device, call.options, at);
        call.place(u, &plan, &arguments, judge, outcome)?;
    }
    Ok(())
}

/// Columns of h.
fn columns_of_h(dtype: Dtype, (shape, f32_factors): (LoraShape, bool)) -> usize {
    if f32_factors && dtype != Dtype::F32 { split_columns(shape.r) } else { shape.r }
}

/// Launches for an adapter's factors: nothing is chosen.
fn factors(
    u: &mut Unstructured<'_>,
    place: &mut Place,
    dtype: Dtype,
    shape: LoraShape,
    outcome: &mut Outcome,
) -> Result<()> {
    let LoraShape { n, k, r, .. } = shape;
    let f32_factors = u.arbitrary()?;
    let (bytes, scale) = (if f32_factors { 4 } else { dtype.size() }, scale(u)?);
    let (a, b) = (place.matrix(u, r, k, bytes)?, place.matrix(u, n, r, bytes)?);
    let w = if u.ratio(1, 3)? { None } else { Some(place.matrix(u, n, k, dtype.size())?) };
    let gain = if u.ratio(1, 3)? { Some(place.matrix(u, 1, n, 4)?) } else { None };
    let op = raw::Merge { dtype, w, f32_factors, a, b, scale, gain, merged: place.matrix(u, n, k, dtype.size())? };
    match Launch::merge(&op) {
        Ok(launch) => {
            outcome.adapter += 1;
            legal::merge(&launch, &op);
        }
        Err(error) => refused(&error, op.check().err(), dtype, false, outcome),
    }
    let f32_rounded = u.arbitrary()?;
    let bytes = if f32_rounded { 4 } else { dtype.size() };
    let [rounded_a, rounded_b] = [place.matrix(u, r, k, bytes)?, place.matrix(u, n, r, bytes)?];
    let op = raw::Round { dtype, f32_factors, f32_rounded, a, b, scale, divisor: gain, rounded_a, rounded_b };
    match Launch::round(&op) {
        Ok(launch) => {
            outcome.adapter += 1;
            legal::round(launch.as_ref(), &op);
        }
        Err(error) => refused(&error, op.check().err(), dtype, false, outcome),
    }
    Ok(())
}

/// An error is that of the arguments where they have one, and otherwise one that a family can have.
fn refused(error: &Error, of_arguments: Option<Error>, dtype: Dtype, has_options: bool, outcome: &mut Outcome) {
    outcome.refused += 1;
    if let Some(expected) = of_arguments {
        // A scale or a probability may be NaN, which is not equal to itself.
        assert!(
            *error == expected || matches!(expected, Error::Scale { .. } | Error::Probability { .. }),
            "{error} for {expected}"
        );
        return;
    }
    match error {
        Error::Dtype { .. } => assert_eq!(dtype, Dtype::F32),
        Error::TooLarge { what, got, limit } => {
            assert!(["the number of tiles", "the number of tickets"].contains(what), "{error}");
            assert!(got > limit, "{error}");
        }
        Error::PlanOption { .. } => assert!(has_options, "{error}"),
        _ => panic!("{error} for legal arguments"),
    }
}

/// What the operations are planned for.
struct Call<'a> {
    device: &'a Device,
    options: &'a Options,
}

impl Call<'_> {
    /// Holds what the planner says against what it was asked; the plan, where there is one.
    fn judge(
        &self,
        plan: impl Fn() -> fused_lora::Result<Plan>,
        check: fused_lora::Result<LoraShape>,
        dtype: Dtype,
        arguments: &[Argument],
        outcome: &mut Outcome,
    ) -> Option<Plan> {
        match plan() {
            Ok(found) => {
                check.expect("what is planned is legal");
                check_arguments(arguments);
                assert_ne!(dtype, Dtype::F32);
                assert_eq!(plan().as_ref(), Ok(&found), "the same call gives the same plan");
                assert!(!found.explain().is_empty());
                assert!(
                    found.predicted_microseconds().is_none_or(|us| us.is_finite() && us >= 0.0),
                    "{}",
                    found.explain()
                );
                match found.family() {
                    Family::Portable => outcome.portable += 1,
                    Family::Sm90 => outcome.sm90 += 1,
                }
                Some(found)
            }
            Err(error) => {
                let is_unfit = check.is_ok() && dtype != Dtype::F32 && self.is_unfit(&error);
                if is_unfit {
                    outcome.refused += 1;
                } else {
                    refused(&error, check.err(), dtype, *self.options != Options::default(), outcome);
                }
                None
            }
        }
    }

    /// Whether no kernel runs on the device, as `error` says.
    fn is_unfit(&self, error: &Error) -> bool {
        let Device { arch, sms, shared_per_block, .. } = *self.device;
        match error {
            Error::UnsupportedArch { got, .. } => *got == arch && arch < 75,
            Error::ZeroDimension { arg: "device", .. } => sms == 0,
            Error::TooLarge { what: "the number of SMs", got, limit } => *got == u64::from(sms) && got > limit,
            Error::TooLarge { what: "the shared memory of a CTA", got, limit } => {
                *limit == u64::from(shared_per_block) && got > limit
            }
            _ => false,
        }
    }

    /// Launches with the workspace at two addresses, one of them any.
    fn place(
        &self,
        u: &mut Unstructured<'_>,
        plan: &Plan,
        arguments: &[Argument],
        judge: impl Fn(u64),
        outcome: &mut Outcome,
    ) -> Result<()> {
        let needed = plan.workspace_bytes();
        let near = arguments.iter().find(|argument| !argument.is_empty()).map_or(0, |argument| argument.matrix.ptr);
        let any = match u.int_in_range(0..=3)? {
            0 => u.arbitrary()?,
            1 => near.wrapping_sub(needed as u64) & !255,
            2 => near & !255,
            _ => u64::MAX - 255 - u64::from(u.arbitrary::<u16>()?) * 256,
        };
        for address in [legal::WORKSPACE, any] {
            let (from, to) = (u128::from(address), u128::from(address) + needed as u128);
            let is_free = arguments
                .iter()
                .all(|argument| argument.is_empty() || argument.end() <= from || to <= argument.start());
            let is_legal = address != 0 && address.is_multiple_of(256) && to <= u64::MAX.into() && is_free;
            match plan.launch(address, needed) {
                Ok(_) => {
                    assert!(is_legal, "a workspace of {needed} bytes at {address:#x} among {arguments:?}");
                    judge(address);
                }
                Err(error) => {
                    assert!(!is_legal, "{error}: a workspace of {needed} bytes at {address:#x} among {arguments:?}");
                    outcome.misplaced += 1;
                }
            }
            let short = plan.launch(address, needed - 1);
            assert!(matches!(short, Err(Error::Workspace { .. })), "{short:?}");
        }
        Ok(())
    }
}

/// A matrix argument and what the rules for arguments speak of.
#[derive(Clone, Copy, Debug)]
struct Argument {
    name: &'static str,
    matrix: raw::Matrix,
    bytes: usize,
    is_written: bool,
}

impl Argument {
    fn new(name: &'static str, matrix: raw::Matrix, bytes: usize, is_written: bool) -> Argument {
        Argument { name, matrix, bytes, is_written }
    }

    fn is_empty(&self) -> bool {
        self.matrix.rows == 0 || self.matrix.cols == 0
    }

    fn start(&self) -> u128 {
        self.matrix.ptr.into()
    }

    fn row(&self, row: usize) -> std::ops::Range<u128> {
        let start = self.start() + row as u128 * self.matrix.row_stride as u128 * self.bytes as u128;
        start..start + (self.matrix.cols * self.bytes) as u128
    }

    /// One past the last byte.
    fn end(&self) -> u128 {
        self.row(self.matrix.rows.saturating_sub(1)).end
    }
}

/// What the planner relies on, looked at row by row where there are few.
fn check_arguments(arguments: &[Argument]) {
    for argument in arguments {
        let Argument { name, matrix, bytes, .. } = *argument;
        // The table of routes has a word for each row and some more.
        let is_small = matrix.rows.max(matrix.cols) <= MAX_DIMENSION;
        assert!(is_small || name == "routes", "{name}: {matrix:?}");
        assert!(matrix.row_stride >= matrix.cols, "{name}: {matrix:?}");
        if !argument.is_empty() {
            assert!(matrix.ptr != 0 && matrix.ptr.is_multiple_of(bytes as u64), "{name}: {matrix:?}");
            assert!(argument.end() <= u64::MAX.into(), "{name}: {matrix:?}");
        }
    }
    for (index, output) in arguments.iter().enumerate().filter(|(_, argument)| argument.is_written) {
        // Inputs come first.
        for other in &arguments[..index] {
            let is_small = output.matrix.rows * other.matrix.rows <= 256;
            if is_small && !output.is_empty() && !other.is_empty() {
                let meet = (0..output.matrix.rows).any(|row| {
                    let row = output.row(row);
                    (0..other.matrix.rows)
                        .map(|row| other.row(row))
                        .any(|other| row.start < other.end && other.start < row.end)
                });
                assert!(!meet, "{output:?} overlaps {other:?}");
            }
        }
    }
}

/// Lays matrices side by side, and some of them anyhow.
struct Place {
    next: u64,
    last: raw::Matrix,
    /// Multiple of which addresses, and strides in elements, are.
    align: usize,
    /// One matrix in so many lies anyhow.
    odd: u8,
}

impl Place {
    fn new(u: &mut Unstructured<'_>) -> Result<Place> {
        let (align, odd) = (*u.choose(&[8, 8, 8, 8, 4, 1])?, *u.choose(&[0, 0, 0, 0, 60, 20])?);
        Ok(Place { next: 1 << 20, last: raw::Matrix::new(1 << 20, 1, 1), align, odd })
    }

    fn matrix(&mut self, u: &mut Unstructured<'_>, rows: usize, cols: usize, bytes: usize) -> Result<raw::Matrix> {
        let gap = if u.ratio(1, 2)? { 0 } else { u.int_in_range(0..=40)? };
        let row_stride = match (gap, u.ratio(1, 2)?) {
            (0, true) => cols,
            _ => cols.saturating_add(gap).checked_next_multiple_of(self.align).unwrap_or(cols),
        };
        let ptr = self.next.wrapping_add((self.align * bytes) as u64 & 15);
        let mut matrix = raw::Matrix { ptr, rows, cols, row_stride };
        if self.odd != 0 && u.ratio(1, self.odd)? {
            self.bend(u, &mut matrix, bytes)?;
        } else {
            let size = (rows as u64).wrapping_mul(row_stride as u64).wrapping_mul(bytes as u64);
            self.next = ptr.wrapping_add(size).wrapping_add(511) & !255;
        }
        self.last = matrix;
        Ok(matrix)
    }

    /// Makes one thing of a matrix any, or lays it beside the last one, between its rows.
    fn bend(&self, u: &mut Unstructured<'_>, matrix: &mut raw::Matrix, bytes: usize) -> Result<()> {
        let extremes = [0, 1, 7, 8, 64, MAX_DIMENSION, MAX_DIMENSION + 1, 1 << 39, 1 << 61, usize::MAX / 2, usize::MAX];
        match u.int_in_range(0..=7)? {
            0 => matrix.ptr = u.arbitrary()?,
            1 => matrix.ptr = u.arbitrary::<u64>()? & !15,
            2 => matrix.row_stride = *u.choose(&extremes)?,
            3 => matrix.row_stride = u.arbitrary()?,
            4 => matrix.rows = *u.choose(&extremes)?,
            5 => matrix.cols = *u.choose(&extremes)?,
            kind => {
                let shift = if kind == 6 { self.last.cols } else { u.int_in_range(0..=64)? };
                matrix.ptr = self.last.ptr.wrapping_add((shift as u64).wrapping_mul(bytes as u64));
                matrix.row_stride = self.last.row_stride;
            }
        }
        Ok(())
    }
}

/// Dropout in a third of the calls, routes in as many.
fn variant(u: &mut Unstructured<'_>, place: &mut Place, m: usize) -> Result<raw::Variant> {
    let mut variant = raw::Variant::default();
    if u.ratio(1, 3)? {
        let p = if u.ratio(1, 20)? { f32::from_bits(u.arbitrary()?) } else { 0.25 };
        let seed = match u.arbitrary()? {
            true => raw::Seed::Memory(place.matrix(u, 1, 2, 8)?),
            false => raw::Seed::Value { seed: u.arbitrary()?, offset: u.arbitrary()? },
        };
        variant.dropout = Some(raw::Dropout { p, seed });
    }
    if u.ratio(1, 3)? {
        variant.routes = Some(place.matrix(u, 1, Routing::words_for(m), 8)?);
    }
    Ok(variant)
}

fn variant_arguments(variant: &raw::Variant) -> impl Iterator<Item = Argument> {
    let state = variant.dropout.and_then(|dropout| match dropout.seed {
        raw::Seed::Memory(state) => Some(("seed", state)),
        raw::Seed::Value { .. } => None,
    });
    let read = variant.routes.map(|routes| ("routes", routes)).into_iter().chain(state);
    read.map(|(name, matrix)| Argument::new(name, matrix, 8, false))
}

fn forward(
    u: &mut Unstructured<'_>,
    place: &mut Place,
    dtype: Dtype,
    problem: (LoraShape, bool),
) -> Result<raw::Forward> {
    let (LoraShape { m, n, k, r }, f32_factors) = problem;
    let of_factors = if f32_factors { 4 } else { dtype.size() };
    let mut matrix = |u: &mut Unstructured<'_>, rows, cols| place.matrix(u, rows, cols, dtype.size());
    let (keeps_h, has_bias) = (u.arbitrary()?, u.arbitrary()?);
    let (x, w) = (matrix(u, m, k)?, matrix(u, n, k)?);
    let (a, b) = (place.matrix(u, r, k, of_factors)?, place.matrix(u, n, r, of_factors)?);
    let mut matrix = |u: &mut Unstructured<'_>, rows, cols| place.matrix(u, rows, cols, dtype.size());
    Ok(raw::Forward {
        dtype,
        x,
        w,
        f32_factors,
        a,
        b,
        scale: scale(u)?,
        bias: if has_bias { Some(matrix(u, 1, n)?) } else { None },
        h: if keeps_h { Some(matrix(u, m, columns_of_h(dtype, problem))?) } else { None },
        y: matrix(u, m, n)?,
        variant: variant(u, place, m)?,
    })
}

fn backward(
    u: &mut Unstructured<'_>,
    place: &mut Place,
    dtype: Dtype,
    problem: (LoraShape, bool),
) -> Result<raw::Backward> {
    let (LoraShape { m, n, k, r }, f32_factors) = problem;
    let of_factors = if f32_factors { 4 } else { dtype.size() };
    let [dx, da, db, dbias]: [bool; 4] = u.arbitrary()?;
    // Now and then without what an output needs, or without any output.
    let is_given: [bool; 2] = [!u.ratio(1, 30)?, !u.ratio(1, 30)?];
    let mut required = |u: &mut Unstructured<'_>, rows, cols, bytes| place.matrix(u, rows, cols, bytes);
    let (dy, w) = (required(u, m, n, dtype.size())?, required(u, n, k, dtype.size())?);
    let (a, b) = (required(u, r, k, of_factors)?, required(u, n, r, of_factors)?);
    let mut matrix = |u: &mut Unstructured<'_>, is_there: bool, rows, cols| {
        if is_there { place.matrix(u, rows, cols, dtype.size()).map(Some) } else { Ok(None) }
    };
    let (x, h) = (matrix(u, is_given[0], m, k)?, matrix(u, is_given[1], m, columns_of_h(dtype, problem))?);
    let dx = matrix(u, dx, m, k)?;
    let mut gradient = |u: &mut Unstructured<'_>, is_there: bool, rows, cols| {
        let f32 = u.arbitrary()?;
        let bytes = if f32 { 4 } else { dtype.size() };
        if !is_there {
            return Ok(None);
        }
        place.matrix(u, rows, cols, bytes).map(|matrix| Some(raw::Gradient { matrix, f32 }))
    };
    let (da, db, dbias) = (gradient(u, da, r, k)?, gradient(u, db, n, r)?, gradient(u, dbias, 1, n)?);
    let [into_dx, into_da, into_db, into_dbias] = u.arbitrary()?;
    let accumulate = Accumulate { dx: into_dx, da: into_da, db: into_db, dbias: into_dbias, dm: false };
    let variant = variant(u, place, m)?;
    Ok(raw::Backward {
        dtype,
        dy,
        w,
        f32_factors,
        a,
        b,
        scale: scale(u)?,
        x,
        h,
        dx,
        da,
        db,
        dbias,
        dm: None,
        accumulate,
        variant,
    })
}

fn backward_arguments(op: &raw::Backward) -> Vec<Argument> {
    let bytes = op.dtype.size();
    let of_factors = if op.f32_factors { 4 } else { bytes };
    let inputs = [
        ("dy", Some(op.dy), bytes),
        ("w", Some(op.w), bytes),
        ("a", Some(op.a), of_factors),
        ("b", Some(op.b), of_factors),
        ("x", op.x, bytes),
        ("h", op.h, bytes),
    ];
    let inputs =
        inputs.into_iter().filter_map(|(name, matrix, bytes)| Some(Argument::new(name, matrix?, bytes, false)));
    let gradients = [("da", op.da), ("db", op.db), ("dbias", op.dbias)];
    let gradients = gradients.into_iter().filter_map(|(name, gradient)| {
        let raw::Gradient { matrix, f32 } = gradient?;
        Some(Argument::new(name, matrix, if f32 { 4 } else { bytes }, true))
    });
    let inputs = inputs.chain(variant_arguments(&op.variant));
    inputs.chain(op.dx.map(|dx| Argument::new("dx", dx, bytes, true))).chain(gradients).collect()
}
