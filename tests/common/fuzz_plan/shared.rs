//! Projections that share x, as a problem for the planner.

use super::*;

/// Plans a forward and a backward of one to four projections.
pub(super) fn solve(
    u: &mut Unstructured<'_>,
    place: &mut Place,
    dtype: Dtype,
    call: &Call<'_>,
    outcome: &mut Outcome,
) -> Result<()> {
    let shape @ LoraShape { m, k, .. } = shape(u)?;
    let mut shapes = vec![shape];
    for _ in 0..u.int_in_range(0..=3)? {
        shapes.push(super::shape(u)?);
    }
    let r = shapes.iter().fold(0_usize, |sum, shape| sum.saturating_add(shape.r));
    let variant = variant(u, place, m)?;
    // Routes with several projections are refused.
    let routes = if u.ratio(1, 4)? { variant.routes } else { None };

    let f32_factors = u.ratio(1, 3)?;
    let op = forward(u, place, (dtype, f32_factors), (m, k, r), &shapes, raw::Variant { routes, ..variant })?;
    let arguments = forward_arguments(&op);
    let plan = || Plan::forward_shared_with(&op, call.device, *call.options);
    if let Some(plan) = call.judge(plan, op.check(), dtype, &arguments, outcome) {
        let judge = |at| legal::forward_shared(&plan, &op, call.device, call.options, at);
        call.place(u, &plan, &arguments, judge, outcome)?;
    }

    let op = backward(u, place, (dtype, f32_factors), (m, k, r), &shapes, raw::Variant { routes, ..variant })?;
    let arguments = backward_arguments(&op);
    let plan = || Plan::backward_shared_with(&op, call.device, *call.options);
    if let Some(plan) = call.judge(plan, op.check(), dtype, &arguments, outcome) {
        let judge = |at| legal::backward_shared(&plan, &op, call.device, call.options, at);
        call.place(u, &plan, &arguments, judge, outcome)?;
    }
    Ok(())
}

/// Columns of h of all.
fn columns_of_all(dtype: Dtype, f32_factors: bool, shapes: &[LoraShape]) -> usize {
    let columns = |shape: &LoraShape| columns_of_h(dtype, (*shape, f32_factors));
    shapes.iter().fold(0_usize, |sum, shape| sum.saturating_add(columns(shape)))
}

fn forward(
    u: &mut Unstructured<'_>,
    place: &mut Place,
    (dtype, f32_factors): (Dtype, bool),
    (m, k, r): (usize, usize, usize),
    shapes: &[LoraShape],
    variant: raw::Variant,
) -> Result<raw::ForwardShared> {
    let bytes = dtype.size();
    let of_factors = if f32_factors { 4 } else { bytes };
    let (x, a) = (place.matrix(u, m, k, bytes)?, place.matrix(u, r, k, of_factors)?);
    let columns = columns_of_all(dtype, f32_factors, shapes);
    let h = if u.arbitrary()? { Some(place.matrix(u, m, columns, bytes)?) } else { None };
    let mut projections = Vec::new();
    for &LoraShape { n, r, .. } in shapes {
        projections.push(raw::ForwardProjection {
            w: place.matrix(u, n, k, bytes)?,
            b: place.matrix(u, n, r, of_factors)?,
            scale: scale(u)?,
            bias: if u.arbitrary()? { Some(place.matrix(u, 1, n, bytes)?) } else { None },
            gain: None,
            y: place.matrix(u, m, n, bytes)?,
        });
    }
    let projections = raw::Projections::new(&projections).expect("one to four");
    Ok(raw::ForwardShared {
        dtype,
        x,
        f32_factors,
        a,
        h,
        projections,
        dropout: variant.dropout,
        routes: variant.routes,
    })
}

fn backward(
    u: &mut Unstructured<'_>,
    place: &mut Place,
    (dtype, f32_factors): (Dtype, bool),
    (m, k, r): (usize, usize, usize),
    shapes: &[LoraShape],
    variant: raw::Variant,
) -> Result<raw::BackwardShared> {
    let bytes = dtype.size();
    let of_factors = if f32_factors { 4 } else { bytes };
    let a = place.matrix(u, r, k, of_factors)?;
    let columns = columns_of_all(dtype, f32_factors, shapes);
    let (x, h) = (Some(place.matrix(u, m, k, bytes)?), Some(place.matrix(u, m, columns, bytes)?));
    let dx = if u.arbitrary()? { Some(place.matrix(u, m, k, bytes)?) } else { None };
    let gradient = |u: &mut Unstructured<'_>, place: &mut Place, rows, cols| {
        let f32 = u.arbitrary()?;
        let matrix = place.matrix(u, rows, cols, if f32 { 4 } else { bytes })?;
        Ok(if u.ratio(2, 3)? { Some(raw::Gradient { matrix, f32 }) } else { None })
    };
    let da = gradient(u, place, r, k)?;
    let mut projections = Vec::new();
    for &LoraShape { n, r, .. } in shapes {
        projections.push(raw::BackwardProjection {
            dy: place.matrix(u, m, n, bytes)?,
            w: place.matrix(u, n, k, bytes)?,
            b: place.matrix(u, n, r, of_factors)?,
            scale: scale(u)?,
            db: gradient(u, place, n, r)?,
            dbias: gradient(u, place, 1, n)?,
            dm: None,
            gain: None,
        });
    }
    let projections = raw::Projections::new(&projections).expect("one to four");
    let accumulate = Accumulate { dx: u.arbitrary()?, ..Accumulate::default() };
    let raw::Variant { dropout, routes, .. } = variant;
    Ok(raw::BackwardShared { dtype, f32_factors, a, x, h, dx, da, projections, accumulate, dropout, routes })
}

/// Inputs, then outputs.
fn forward_arguments(op: &raw::ForwardShared) -> Vec<Argument> {
    let bytes = op.dtype.size();
    let of_factors = if op.f32_factors { 4 } else { bytes };
    let variant = raw::Variant { dropout: op.dropout, routes: op.routes, gain: None };
    let mut all = vec![Argument::new("x", op.x, bytes, false), Argument::new("a", op.a, of_factors, false)];
    for of in op.projections.iter() {
        all.push(Argument::new("b", of.b, of_factors, false));
        let read = [("w", Some(of.w)), ("bias", of.bias)].into_iter();
        all.extend(read.filter_map(|(name, matrix)| Some(Argument::new(name, matrix?, bytes, false))));
    }
    all.extend(variant_arguments(&variant));
    all.extend(op.h.map(|h| Argument::new("h", h, bytes, true)));
    all.extend(op.projections.iter().map(|of| Argument::new("y", of.y, bytes, true)));
    all
}

fn backward_arguments(op: &raw::BackwardShared) -> Vec<Argument> {
    let bytes = op.dtype.size();
    let variant = raw::Variant { dropout: op.dropout, routes: op.routes, gain: None };
    let of_factors = if op.f32_factors { 4 } else { bytes };
    let read = [("x", op.x), ("h", op.h)].into_iter();
    let mut all: Vec<_> = read.filter_map(|(name, matrix)| Some(Argument::new(name, matrix?, bytes, false))).collect();
    all.push(Argument::new("a", op.a, of_factors, false));
    for of in op.projections.iter() {
        all.extend([("dy", of.dy), ("w", of.w)].map(|(name, m)| Argument::new(name, m, bytes, false)));
        all.push(Argument::new("b", of.b, of_factors, false));
    }
    all.extend(variant_arguments(&variant));
    all.extend(op.dx.map(|dx| Argument::new("dx", dx, bytes, true)));
    let own = op.projections.iter().flat_map(|of| [("db", of.db), ("dbias", of.dbias)]);
    all.extend([("da", op.da)].into_iter().chain(own).filter_map(|(name, gradient)| {
        let raw::Gradient { matrix, f32 } = gradient?;
        Some(Argument::new(name, matrix, if f32 { 4 } else { bytes }, true))
    }));
    all
}
