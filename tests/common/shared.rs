//! Projections that share x, over host buffers: the case, its data and the checks. Each projection is held to the oracle as the
//! single layer that it is.

use fused_lora::reference::Mat;
use fused_lora::{Element, Result, cpu, split_columns};

use super::check::{self, fail};
use super::data::{POISON, Spec, Values};
use super::{Backend, Host, HostBackward, HostDropout, HostForward, HostGradient, HostMagnitude, full, is_same};

/// One case: a layer's spec, of which N and R are those of each projection instead.
#[derive(Clone, Debug)]
pub struct SharedSpec {
    pub base: Spec,
    /// N and R.
    pub parts: Vec<(usize, usize)>,
}

impl SharedSpec {
    pub fn new(m: usize, k: usize, parts: &[(usize, usize)]) -> Self {
        Self { base: Spec::new(m, parts[0].0, k, parts[0].1), parts: parts.to_vec() }
    }

    /// The single layer of a projection. Scales, biases and the types of gradients differ.
    pub fn part(&self, at: usize) -> Spec {
        let (n, r) = self.parts[at];
        let base = &self.base;
        let scale = base.scale * [1.0, 0.5, -2.0, 4.0][at];
        let (bias, seed) = (base.bias && at != 1, base.seed + 1000 * at as u64);
        Spec { n, r, scale, bias, f32_gradients: base.f32_gradients != (at == 2), seed, ..*base }
    }

    fn ranks(&self) -> Vec<std::ops::Range<usize>> {
        let mut end = 0;
        let range = |&(_, r): &(usize, usize)| {
            end += r;
            end - r..end
        };
        self.parts.iter().map(range).collect()
    }

    pub fn forward<T: Element>(&self) -> SharedForward<T> {
        self.forward_of::<T, T>()
    }

    /// With factors of `A`.
    pub fn forward_of<T: Element, A: Element>(&self) -> SharedForward<T, A> {
        let mut own: Vec<HostForward<T, A>> = (0..self.parts.len()).map(|at| self.part(at).forward_of()).collect();
        let x = own[0].x.clone();
        own.iter_mut().for_each(|op| op.x = x.clone());
        let base = &self.base;
        let a = join(base, own.iter().map(|op| &op.a), Axis::Rows, f32::NAN);
        let h = base.keep_h.then(|| join(base, own.iter().filter_map(|op| op.h.as_ref()), Axis::Columns, POISON));
        SharedForward { a, h, own, ranks: self.ranks() }
    }

    pub fn backward<T: Element>(&self) -> SharedBackward<T> {
        self.backward_of::<T, T>()
    }

    /// With factors of `A`.
    pub fn backward_of<T: Element, A: Element>(&self) -> SharedBackward<T, A> {
        let mut own: Vec<HostBackward<T, A>> = (0..self.parts.len()).map(|at| self.part(at).backward_of()).collect();
        let (x, dx) = (own[0].x.clone(), own[0].dx.clone());
        own.iter_mut().for_each(|op| (op.x, op.dx) = (x.clone(), dx.clone()));
        let base = &self.base;
        let a = join(base, own.iter().map(|op| &op.a), Axis::Rows, f32::NAN);
        let [_, has_da, has_db, _] = base.outputs;
        let h = has_db.then(|| join(base, own.iter().filter_map(|op| op.h.as_ref()), Axis::Columns, f32::NAN));
        // One type for the A of all.
        let f32_da = base.f32_gradients;
        let das: Vec<Host<f32>> = own.iter().filter_map(|op| op.da.as_ref().map(HostGradient::to_f32)).collect();
        let wide = || join(base, das.iter(), Axis::Rows, POISON);
        let da = has_da.then(|| if f32_da { HostGradient::F32(wide()) } else { HostGradient::Storage(wide().to()) });
        for (op, ranks) in own.iter_mut().zip(self.ranks()) {
            op.da = da.as_ref().map(|da| da.rows(ranks));
        }
        SharedBackward { a, h, dx, da, own, ranks: self.ranks() }
    }
}

/// Forward of projections that share x: `own` are the single layers, whose x, a, h and dropout are the same as these.
#[derive(Clone, Debug)]
pub struct SharedForward<T, A = T> {
    pub a: Host<A>,
    pub h: Option<Host<T>>,
    pub own: Vec<HostForward<T, A>>,
    pub ranks: Vec<std::ops::Range<usize>>,
}

/// The columns of h that each projection has, from its ranks.
fn columns<T: Element, A: Element>(ranks: &[std::ops::Range<usize>]) -> Vec<std::ops::Range<usize>> {
    let mut end = 0;
    let columns = ranks.iter().map(|ranks| {
        let own = if full::is_split::<T, A>() { split_columns(ranks.len()) } else { ranks.len() };
        end += own;
        end - own..end
    });
    columns.collect()
}

impl<T: Element, A: Element> SharedForward<T, A> {
    /// As the backends that compute on slices take it.
    pub fn views(&mut self) -> cpu::ForwardShared<'_, T, A> {
        let Self { a, h, own, .. } = self;
        let mut all = own.iter_mut();
        let HostForward { x, w, b, scale, bias, y, dropout, gain, .. } = all.next().expect("a projection");
        let first = cpu::ForwardProjection {
            w: w.view(),
            b: b.view(),
            scale: *scale,
            bias: bias.as_ref().map(Host::view),
            gain: gain.as_ref().map(Host::view),
            y: y.view_mut(),
        };
        let others = all.map(|op| cpu::ForwardProjection {
            w: op.w.view(),
            b: op.b.view(),
            scale: op.scale,
            bias: op.bias.as_ref().map(Host::view),
            gain: op.gain.as_ref().map(Host::view),
            y: op.y.view_mut(),
        });
        cpu::ForwardShared {
            x: x.view(),
            a: a.view(),
            h: h.as_mut().map(Host::view_mut),
            projections: [first].into_iter().chain(others).collect(),
            dropout: dropout.as_ref().map(HostDropout::view),
            routes: None,
        }
    }

    /// Each projection as the single layer that it is.
    pub fn alone(&self) -> Vec<HostForward<T, A>> {
        let own = |(op, columns): (&HostForward<T, A>, std::ops::Range<usize>)| HostForward {
            h: self.h.as_ref().map(|h| h.columns(columns)),
            ..op.clone()
        };
        self.own.iter().zip(columns::<T, A>(&self.ranks)).map(own).collect()
    }
}

/// Backward of projections that share x: `own` are the single layers, whose x, a, h, dropout and accumulation are the same as these.
#[derive(Clone, Debug)]
pub struct SharedBackward<T, A = T> {
    pub a: Host<A>,
    pub h: Option<Host<T>>,
    pub dx: Option<Host<T>>,
    pub da: Option<HostGradient<T>>,
    pub own: Vec<HostBackward<T, A>>,
    pub ranks: Vec<std::ops::Range<usize>>,
}

impl<T: Element, A: Element> SharedBackward<T, A> {
    /// As the backends that compute on slices take it.
    pub fn views(&mut self) -> cpu::BackwardShared<'_, T, A> {
        let Self { a, h, dx, da, own, .. } = self;
        let accumulate = own[0].accumulate;
        let mut shared = (None, None);
        let mut projections = Vec::new();
        for op in own {
            let HostBackward { dy, w, b, scale, x, db, dbias, dropout, gain, magnitude, .. } = op;
            shared = (x.as_ref(), dropout.as_ref());
            projections.push(cpu::BackwardProjection {
                dy: dy.view(),
                w: w.view(),
                b: b.view(),
                scale: *scale,
                db: db.as_mut().map(HostGradient::view_mut),
                dbias: dbias.as_mut().map(HostGradient::view_mut),
                dm: magnitude.as_mut().map(HostMagnitude::view_mut),
                gain: gain.as_ref().map(Host::view),
            });
        }
        cpu::BackwardShared {
            a: a.view(),
            x: shared.0.map(Host::view),
            h: h.as_ref().map(Host::view),
            dx: dx.as_mut().map(Host::view_mut),
            da: da.as_mut().map(HostGradient::view_mut),
            projections,
            accumulate,
            dropout: shared.1.map(HostDropout::view),
            routes: None,
        }
    }

    /// Each projection as the single layer that it is, but for dx.
    pub fn alone(&self) -> Vec<HostBackward<T, A>> {
        let columns = columns::<T, A>(&self.ranks);
        let own = |at: usize| HostBackward {
            h: self.h.as_ref().map(|h| h.columns(columns[at].clone())),
            dx: None,
            da: self.da.as_ref().map(|da| da.rows(self.ranks[at].clone())),
            ..self.own[at].clone()
        };
        (0..self.own.len()).map(own).collect()
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Axis {
    Rows,
    Columns,
}

/// Matrices below each other or side by side in one that lies as the spec says.
fn join<'a, T: Element>(
    spec: &Spec,
    parts: impl Iterator<Item = &'a Host<T>> + Clone,
    axis: Axis,
    around: f32,
) -> Host<T> {
    let sum = |of: fn(&Host<T>) -> usize| parts.clone().map(of).sum::<usize>();
    let one = |of: fn(&Host<T>) -> usize| parts.clone().next().map_or(0, of);
    let (rows, cols) = match axis {
        Axis::Rows => (sum(|host| host.rows), one(|host| host.cols)),
        Axis::Columns => (one(|host| host.rows), sum(|host| host.cols)),
    };
    let mut whole = spec.place(rows, cols, T::from_f32(around));
    let mut first = 0;
    for part in parts {
        for row in 0..part.rows {
            for col in 0..part.cols {
                let (to_row, to_col) = if axis == Axis::Rows { (first + row, col) } else { (row, first + col) };
                let to = whole.index(to_row, to_col);
                whole.data[to] = part.data[part.index(row, col)];
            }
        }
        first += if axis == Axis::Rows { part.rows } else { part.cols };
    }
    whole
}

/// Forward of `spec` in `T`, every projection held to the oracle of a single layer; nothing touched around the outputs.
pub fn forward<T: Element>(backend: &impl Backend, spec: &SharedSpec) {
    let before = spec.forward::<T>();
    let mut after = before.clone();
    let context = format!("forward on {}, {:?}, {spec:?}", backend.name(), T::DTYPE);
    backend.forward_shared(&mut after).unwrap_or_else(|error| fail(&context, &error.to_string()));
    if let Err(complaint) = judge_forward(&before, &after, spec.base.values) {
        fail(&context, &complaint);
    }
}

/// Backward of `spec` in `T`: as [`forward`], and dx held to the sum over all projections.
pub fn backward<T: Element>(backend: &impl Backend, spec: &SharedSpec) {
    let before = spec.backward::<T>();
    let mut after = before.clone();
    let context = format!("backward on {}, {:?}, {spec:?}", backend.name(), T::DTYPE);
    backend.backward_shared(&mut after).unwrap_or_else(|error| fail(&context, &error.to_string()));
    if let Err(complaint) = judge_backward(&before, &after, spec.base.values) {
        fail(&context, &complaint);
    }
}

fn around<T: Element>(name: &str, before: &Host<T>, after: &Host<T>) -> Result<(), String> {
    let written = (0..after.data.len()).find(|&at| !after.is_element(at) && !is_same(after.data[at], before.data[at]));
    written.map_or(Ok(()), |at| Err(format!("{name}: position {at} outside the matrix was written")))
}

/// What forward made of `before`.
pub fn judge_forward<T: Element>(
    before: &SharedForward<T>,
    after: &SharedForward<T>,
    values: Values,
) -> Result<(), String> {
    if let (Some(before), Some(after)) = (&before.h, &after.h) {
        around("h", before, after)?;
    }
    for (at, (before, after)) in before.alone().iter().zip(&after.alone()).enumerate() {
        check::judge_forward(before, after, values).map_err(|complaint| format!("projection {at}: {complaint}"))?;
    }
    Ok(())
}

/// What backward made of `before`.
pub fn judge_backward<T: Element>(
    before: &SharedBackward<T>,
    after: &SharedBackward<T>,
    values: Values,
) -> Result<(), String> {
    match (&before.da, &after.da) {
        (Some(HostGradient::Storage(before)), Some(HostGradient::Storage(after))) => around("da", before, after)?,
        (Some(HostGradient::F32(before)), Some(HostGradient::F32(after))) => around("da", before, after)?,
        _ => {}
    }
    for (at, (before, after)) in before.alone().iter().zip(&after.alone()).enumerate() {
        check::judge_backward(before, after, values).map_err(|complaint| format!("projection {at}: {complaint}"))?;
    }
    if let (Some(old), Some(new)) = (&before.dx, &after.dx) {
        check::judge_sum(&before.alone(), old, new, values)?;
    }
    Ok(())
}

/// What forward made of `before` with f32 factors.
pub fn judge_full_forward<T: Element>(
    before: &SharedForward<T, f32>,
    after: &SharedForward<T, f32>,
) -> Result<(), String> {
    if let (Some(before), Some(after)) = (&before.h, &after.h) {
        around("h", before, after)?;
    }
    for (at, (before, after)) in before.alone().iter().zip(&after.alone()).enumerate() {
        full::judge_forward(before, after).map_err(|complaint| format!("projection {at}: {complaint}"))?;
    }
    Ok(())
}

/// What backward made of `before` with f32 factors.
pub fn judge_full_backward<T: Element>(
    before: &SharedBackward<T, f32>,
    after: &SharedBackward<T, f32>,
) -> Result<(), String> {
    for (at, (before, after)) in before.alone().iter().zip(&after.alone()).enumerate() {
        full::judge_backward(before, after).map_err(|complaint| format!("projection {at}: {complaint}"))?;
    }
    match (&before.dx, &after.dx) {
        (Some(old), Some(new)) => full::judge_sum(&before.alone(), old, new),
        _ => Ok(()),
    }
}

/// Forward and backward of `spec` in `T` with f32 factors.
pub fn with_f32_factors<T: Element>(backend: &impl Backend, spec: &SharedSpec) {
    let context = |what| format!("{what} on {}, f32 over {:?}, {spec:?}", backend.name(), T::DTYPE);
    let before = spec.forward_of::<T, f32>();
    let mut after = before.clone();
    backend.forward_shared(&mut after).unwrap_or_else(|error| fail(&context("forward"), &error.to_string()));
    judge_full_forward(&before, &after).unwrap_or_else(|complaint| fail(&context("forward"), &complaint));
    let before = spec.backward_of::<T, f32>();
    let mut after = before.clone();
    backend.backward_shared(&mut after).unwrap_or_else(|error| fail(&context("backward"), &error.to_string()));
    judge_full_backward(&before, &after).unwrap_or_else(|complaint| fail(&context("backward"), &complaint));
}

/// Every bit that must be that of single layers on the same backend: y, h, db, dbias and dm; whether they are.
pub fn same_bits_as_alone<T: Element, A: Element>(backend: &impl Backend, spec: &SharedSpec) -> Result<(), String> {
    let mut forward = spec.forward_of::<T, A>();
    let mut alone = forward.alone();
    backend.forward_shared(&mut forward).map_err(|error| error.to_string())?;
    for (at, (op, together)) in alone.iter_mut().zip(forward.alone()).enumerate() {
        backend.forward(op).map_err(|error| error.to_string())?;
        same_elements(&format!("y of projection {at}"), &op.y, &together.y)?;
        if let (Some(alone), Some(together)) = (&op.h, &together.h) {
            same_elements(&format!("h of projection {at}"), alone, together)?;
        }
    }
    let mut backward = spec.backward_of::<T, A>();
    let mut alone = backward.alone();
    backend.backward_shared(&mut backward).map_err(|error| error.to_string())?;
    for (at, (op, together)) in alone.iter_mut().zip(backward.alone()).enumerate() {
        op.da = None;
        if op.db.is_none() && op.dbias.is_none() && op.magnitude.is_none() {
            continue;
        }
        backend.backward(op).map_err(|error| error.to_string())?;
        for (name, alone, together) in [("db", &op.db, &together.db), ("dbias", &op.dbias, &together.dbias)] {
            if let (Some(alone), Some(together)) = (alone, together) {
                same_elements(&format!("{name} of projection {at}"), &alone.to_f32(), &together.to_f32())?;
            }
        }
        if let (Some(alone), Some(together)) = (&op.magnitude, &together.magnitude) {
            same_elements(&format!("dm of projection {at}"), &alone.dm, &together.dm)?;
        }
    }
    Ok(())
}

fn same_elements<T: Element>(name: &str, alone: &Host<T>, together: &Host<T>) -> Result<(), String> {
    let bits = |mat: Mat| mat.data.into_iter().map(f64::to_bits).collect::<Vec<_>>();
    if bits(alone.to_mat()) == bits(together.to_mat()) { Ok(()) } else { Err(format!("{name} has other bits alone")) }
}

/// Cases at the edges of tiles: two, three and four projections, ranks that are none, small, odd and several blocks, and everything
/// that can be there or not.
pub fn table() -> Vec<SharedSpec> {
    use super::data::Placement;
    let parts: [&[(usize, usize)]; 8] = [
        &[(64, 16), (65, 16)],
        &[(129, 8), (1, 8), (63, 8)],
        &[(40, 0), (70, 16), (33, 100)],
        &[(7, 64), (128, 0), (130, 13), (64, 3)],
        &[(200, 100), (20, 64)],
        &[(16, 0), (24, 0), (130, 0)],
        &[(65, 1)],
        &[(31, 70), (64, 5), (97, 16), (8, 0)],
    ];
    let of = |(i, parts): (usize, &&[(usize, usize)])| {
        let (m, k) = ([1, 63, 65, 128, 129, 200, 70, 130][i], [40, 129, 64, 7, 72, 65, 200, 33][i]);
        let dropout =
            (i % 4 == 1).then_some(HostDropout { p: 0.4, seed: [0x1234_5678_9abc, 7], in_memory: i % 8 == 1 });
        let mut spec = SharedSpec::new(m, k, parts);
        spec.base = Spec {
            placement: Placement::ALL[(i + i / 4) % 4],
            accumulate: i % 2 == 1,
            f32_gradients: i % 3 != 1,
            keep_h: i % 5 != 2,
            outputs: [i != 4, true, i != 3, i != 2],
            dropout,
            dora: i == 7,
            ..spec.base
        };
        spec
    };
    parts.iter().enumerate().map(of).collect()
}
