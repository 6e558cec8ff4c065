//! The algebra of the operations, on the oracle and on every backend: linear, adjoint, the same merged and unmerged.
//!
//! No bound is tuned. Each side of an identity may be as far from its exact value as the tolerance rule lets its elements be, and
//! the identity holds exactly of the exact values.

mod common;

use common::data::{Rng, Spec};
use common::every::{Any, Kind, backends};
use common::layers::Device;
use common::{Backend, Host, HostGradient};
use fused_lora::reference::{self, Gradients, Inputs, Mat, element_bound, unit_roundoff};
use fused_lora::{Dtype, Element, Factors, Merge, bf16, f16, linear};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

/// Something that computes the operations, and how far from exact it may be.
trait Computes {
    fn name(&self) -> String;
    /// h, y.
    fn forward(&self, inputs: &Inputs) -> (Mat, Mat);
    fn backward(&self, inputs: &Inputs, h: &Mat) -> Gradients;
    /// w + scale · B A.
    fn merge(&self, inputs: &Inputs) -> Mat;
    /// Of an element that is a sum of `depth` terms, of this size in absolute values.
    fn bound(&self, depth: usize, magnitude: f64) -> f64;
    /// Of storing a value.
    fn roundoff(&self) -> f64;
    /// The nearest value that can be stored.
    fn stored(&self, value: f64) -> f64;
}

/// The reference, whose only errors are those of f64.
struct Oracle;

impl Computes for Oracle {
    fn name(&self) -> String {
        "the oracle".into()
    }
    fn forward(&self, inputs: &Inputs) -> (Mat, Mat) {
        reference::forward(inputs)
    }
    fn backward(&self, inputs: &Inputs, h: &Mat) -> Gradients {
        reference::backward(inputs, h)
    }
    fn merge(&self, inputs: &Inputs) -> Mat {
        let Inputs { w, a, b, scale, .. } = inputs;
        w.plus(&b.times(a).map(|v| scale * v))
    }
    fn bound(&self, depth: usize, magnitude: f64) -> f64 {
        (depth + 2) as f64 * self.roundoff() * magnitude
    }
    fn roundoff(&self) -> f64 {
        f64::EPSILON / 2.0
    }
    fn stored(&self, value: f64) -> f64 {
        value
    }
}

/// A backend with a storage type.
struct On<'a, T> {
    backend: &'a Any,
    storage: std::marker::PhantomData<T>,
}

fn on<T: Element>(backend: &Any) -> On<'_, T> {
    On { backend, storage: std::marker::PhantomData }
}

fn copy<T: Element>(from: &Mat, to: &mut Host<T>) {
    to.fill(|i, j| from.at(i, j));
}

fn merged<B: linear::Backend, T: Element>(backend: &B, [w, a, b]: [&Host<T>; 3], scale: f32) -> Mat {
    let [dw, da, db] = [w, a, b].map(|host| Device::<B, T>::new(backend, host));
    let mut out = Device::<B, T>::new(backend, w);
    let factors = Factors::Storage { a: da.view(), b: db.view() };
    backend.merge(Merge { w: Some(dw.view()), factors, scale, gain: None, merged: out.view_mut() }).expect("a merge");
    out.download(backend).to_mat()
}

fn gradient<T: Element>(gradient: Option<HostGradient<T>>) -> Mat {
    match gradient.expect("a gradient") {
        HostGradient::Storage(host) => host.to_mat(),
        HostGradient::F32(host) => host.to_mat(),
    }
}

impl<T: Element> Computes for On<'_, T> {
    fn name(&self) -> String {
        format!("{}, {:?}", self.backend.name(), T::DTYPE)
    }
    fn forward(&self, inputs: &Inputs) -> (Mat, Mat) {
        let spec = Spec { scale: inputs.scale as f32, bias: inputs.bias.is_some(), ..spec_of(inputs) };
        let mut op = spec.forward::<T>();
        let targets = [&mut op.x, &mut op.w, &mut op.a, &mut op.b];
        targets.into_iter().zip([&inputs.x, &inputs.w, &inputs.a, &inputs.b]).for_each(|(to, from)| copy(from, to));
        op.bias.iter_mut().zip(&inputs.bias).for_each(|(to, from)| copy(from, to));
        self.backend.forward(&mut op).expect("forward runs");
        (op.h.expect("h").to_mat(), op.y.to_mat())
    }
    fn backward(&self, inputs: &Inputs, h: &Mat) -> Gradients {
        let mut op = Spec { scale: inputs.scale as f32, ..spec_of(inputs) }.backward::<T>();
        let targets = [&mut op.dy, &mut op.w, &mut op.a, &mut op.b];
        targets.into_iter().zip([&inputs.dy, &inputs.w, &inputs.a, &inputs.b]).for_each(|(to, from)| copy(from, to));
        op.x.iter_mut().for_each(|to| copy(&inputs.x, to));
        op.h.iter_mut().for_each(|to| copy(h, to));
        self.backend.backward(&mut op).expect("backward runs");
        let dx = op.dx.expect("dx").to_mat();
        Gradients { dx, da: gradient(op.da), db: gradient(op.db), dbias: gradient(op.dbias) }
    }
    fn merge(&self, inputs: &Inputs) -> Mat {
        let mut op = spec_of(inputs).forward::<T>();
        let targets = [&mut op.w, &mut op.a, &mut op.b];
        targets.into_iter().zip([&inputs.w, &inputs.a, &inputs.b]).for_each(|(to, from)| copy(from, to));
        let (operands, scale) = ([&op.w, &op.a, &op.b], inputs.scale as f32);
        match self.backend {
            Any::Cpu => merged(&fused_lora::cpu::Cpu, operands, scale),
            #[cfg(all(feature = "emulator", feature = "cuda"))]
            Any::Emulated(emulated) => merged(&emulated.0, operands, scale),
            #[cfg(feature = "cuda")]
            Any::Gpu(gpu) => {
                let queue = fused_lora::cuda::Queue::new(&gpu.kernels, &gpu.stream).expect("a queue");
                merged(&queue, operands, scale)
            }
        }
    }
    fn bound(&self, depth: usize, magnitude: f64) -> f64 {
        element_bound(T::DTYPE, depth, magnitude)
    }
    fn roundoff(&self) -> f64 {
        unit_roundoff(T::DTYPE)
    }
    fn stored(&self, value: f64) -> f64 {
        T::from_f64(value).to_f64()
    }
}

fn spec_of(inputs: &Inputs) -> Spec {
    Spec::new(inputs.x.rows, inputs.w.rows, inputs.w.cols, inputs.a.rows)
}

/// M, N, K, R and a seed.
type Shape = (usize, usize, usize, usize, u64);

/// Values in steps of 1/8, so that sums of two are values of every type as well; with the scale an exact one, too.
fn inputs((m, n, k, r, seed): Shape) -> Inputs {
    let mut rng = Rng(seed);
    let mut random = |rows, cols, size: f64| {
        let data = (0..rows * cols).map(|_| rng.integer(8) / 8.0 * size).collect();
        Mat { rows, cols, data }
    };
    let (x, w, a, b) = (random(m, k, 1.0), random(n, k, 0.25), random(r, k, 0.25), random(n, r, 0.5));
    Inputs { x, w, a, b, bias: None, dy: random(m, n, 1.0), scale: -1.75, keep: None, gate: None, gain: None }
}

/// What the rule says of the outputs of both operations: how far each element may be from exact.
struct Bounds {
    h: Mat,
    y: Mat,
    gradients: Gradients,
}

/// With h as forward wrote it, where backward reads one that is not exact.
fn bounds(on: &dyn Computes, inputs: &Inputs) -> Bounds {
    let (m, n, k, r) = (inputs.x.rows, inputs.w.rows, inputs.w.cols, inputs.a.rows);
    let magnitudes = inputs.magnitudes();
    let (h, y) = reference::forward(&magnitudes);
    let Gradients { dx, da, db, dbias } = reference::backward(&magnitudes, &h);
    let of = |depth, magnitude: Mat| magnitude.map(|magnitude| on.bound(depth, magnitude));
    let (dx, da, db, dbias) = (of(2 * n + r + 2, dx), of(n + m, da), of(k + m, db), of(m, dbias));
    Bounds { h: of(k, h), y: of(2 * k + r + 2, y), gradients: Gradients { dx, da, db, dbias } }
}

/// |left − right| ≤ bound, element by element.
fn close(left: &Mat, right: &Mat, bound: &Mat, what: &str) -> Result<(), TestCaseError> {
    for (at, (left, right)) in left.data.iter().zip(&right.data).enumerate() {
        let bound = bound.data[at];
        prop_assert!((left - right).abs() <= bound, "{what}: element {at}: {left} and {right}, within {bound:e}");
    }
    Ok(())
}

/// The sum of two elements, and of the bounds of three results.
fn additive(parts: [&Mat; 2], whole: &Mat, bounds: [&Mat; 3], what: &str) -> Result<(), TestCaseError> {
    close(&parts[0].plus(parts[1]), whole, &bounds[0].plus(bounds[1]).plus(bounds[2]), what)
}

fn linear_in_x(on: &dyn Computes, shape: Shape) -> Result<(), TestCaseError> {
    let first = inputs(shape);
    let second = Inputs { x: inputs((shape.0, shape.1, shape.2, shape.3, !shape.4)).x, ..first.clone() };
    let sum = Inputs { x: first.x.plus(&second.x), ..first.clone() };
    let all = [&first, &second, &sum];
    let [(h0, y0), (h1, y1), (h, y)] = all.map(|inputs| on.forward(inputs));
    let [e0, e1, e] = all.map(|inputs| bounds(on, inputs));
    additive([&h0, &h1], &h, [&e0.h, &e1.h, &e.h], "h")?;
    additive([&y0, &y1], &y, [&e0.y, &e1.y, &e.y], "y")
}

fn linear_in_dy(on: &dyn Computes, shape: Shape) -> Result<(), TestCaseError> {
    let first = inputs(shape);
    let second = Inputs { dy: inputs((shape.0, shape.1, shape.2, shape.3, !shape.4)).dy, ..first.clone() };
    let sum = Inputs { dy: first.dy.plus(&second.dy), ..first.clone() };
    let all = [&first, &second, &sum];
    let h = reference::forward(&first).0.map(|value| on.stored(value));
    let [g0, g1, g] = all.map(|inputs| on.backward(inputs, &h));
    let [e0, e1, e] = all.map(|inputs| bounds(on, inputs).gradients);
    additive([&g0.dx, &g1.dx], &g.dx, [&e0.dx, &e1.dx, &e.dx], "dx")?;
    additive([&g0.da, &g1.da], &g.da, [&e0.da, &e1.da, &e.da], "da")?;
    additive([&g0.db, &g1.db], &g.db, [&e0.db, &e1.db, &e.db], "db")?;
    additive([&g0.dbias, &g1.dbias], &g.dbias, [&e0.dbias, &e1.dbias, &e.dbias], "dbias")
}

fn dot(a: &Mat, b: &Mat) -> f64 {
    a.data.iter().zip(&b.data).map(|(a, b)| a * b).sum()
}

/// ⟨a, b⟩ of absolute values.
fn size(a: &Mat, b: &Mat) -> f64 {
    dot(&a.map(f64::abs), &b.map(f64::abs))
}

/// ⟨dy, F(x)⟩ = ⟨Fᵀ(dy), x⟩, and the gradients of A and B both give ⟨dy, h Bᵀ⟩.
fn adjoint(on: &dyn Computes, shape: Shape) -> Result<(), TestCaseError> {
    let inputs = inputs(shape);
    let (h, y) = on.forward(&inputs);
    let gradients = on.backward(&inputs, &h);
    let Bounds { y: e_y, gradients: e, .. } = bounds(on, &inputs);
    // The sums of the products themselves, in f64.
    let summing = |terms: usize, size: f64| (terms + 1) as f64 * f64::EPSILON * size;
    let (there, back) = (dot(&inputs.dy, &y), dot(&gradients.dx, &inputs.x));
    let rounding =
        summing(y.data.len(), size(&inputs.dy, &y)) + summing(inputs.x.data.len(), size(&gradients.dx, &inputs.x));
    let bound = size(&inputs.dy, &e_y) + size(&e.dx, &inputs.x) + rounding;
    prop_assert!((there - back).abs() <= bound, "<dy, y> = {there}, <dx, x> = {back}, within {bound:e}");
    let (through_a, through_b) = (dot(&gradients.da, &inputs.a), dot(&gradients.db, &inputs.b));
    let rounding = summing(
        inputs.a.data.len() + inputs.b.data.len(),
        size(&gradients.da, &inputs.a) + size(&gradients.db, &inputs.b),
    );
    let bound = size(&e.da, &inputs.a) + size(&e.db, &inputs.b) + rounding;
    prop_assert!(
        (through_a - through_b).abs() <= bound,
        "<da, A> = {through_a}, <db, B> = {through_b}, within {bound:e}"
    );
    Ok(())
}

/// A layer with its adapter computes what the layer with the merged weight does: as far apart as both may be from exact, and as
/// the rounding of the weight moves y.
fn merged_equals_unmerged(on: &dyn Computes, shape: Shape) -> Result<(), TestCaseError> {
    let with = inputs(shape);
    let (n, k, r) = (with.w.rows, with.w.cols, with.a.rows);
    let empty = |rows, cols| Mat { rows, cols, data: Vec::new() };
    let without = Inputs { w: on.merge(&with), a: empty(0, k), b: empty(n, 0), ..with.clone() };
    let (y, plain) = (on.forward(&with).1, on.forward(&without).1);
    // Of W': one rounding to the storage type, and a sum of r + 1 terms with the scale.
    let magnitudes = with.magnitudes();
    let delta = magnitudes.b.times(&magnitudes.a).map(|v| magnitudes.scale * v);
    let moved = magnitudes.w.plus(&delta).map(|size| on.bound(r + 2, size) + on.roundoff() * size);
    let bound = bounds(on, &with).y.plus(&bounds(on, &without).y).plus(&magnitudes.x.times(&moved.transposed()));
    close(&y, &plain, &bound, "y")
}

type Property = fn(&dyn Computes, Shape) -> Result<(), TestCaseError>;

/// Random shapes: each on the oracle, on the CPU in every type, and on one of the other backends.
fn holds(test: &str, property: Property) {
    let all = [Kind::Ragged, Kind::Hopper].map(|kind| backends(kind, test));
    let (ragged, hopper) = (all[0].len(), all[1].len());
    let ragged_shape = (1..40usize, 1..40usize, 1..40usize, 1..14usize, any::<u64>(), 0..ragged.max(1));
    let hopper_shape = (1..70usize, 1..10usize, 1..10usize, 1..4usize, any::<u64>(), 0..hopper.max(1));
    let in_steps = hopper_shape.prop_map(|(m, n, k, r, seed, at)| (Kind::Hopper, (m, 8 * n, 8 * k, 8 * r, seed), at));
    let any_size = ragged_shape.prop_map(|(m, n, k, r, seed, at)| (Kind::Ragged, (m, n, k, r, seed), at));
    let config = ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() };
    let judged = |on: &dyn Computes, shape| {
        property(on, shape).map_err(|error| TestCaseError::fail(format!("{}: {error}", on.name())))
    };
    let result = TestRunner::new(config).run(&prop_oneof![any_size.boxed(), in_steps.boxed()], |(kind, shape, at)| {
        judged(&Oracle, shape)?;
        judged(&on::<f32>(&Any::Cpu), shape)?;
        judged(&on::<f16>(&Any::Cpu), shape)?;
        judged(&on::<bf16>(&Any::Cpu), shape)?;
        if let Some(backend) = all[usize::from(kind == Kind::Hopper)].get(at) {
            judged(&on::<f16>(backend), shape)?;
            judged(&on::<bf16>(backend), shape)?;
        }
        Ok(())
    });
    result.unwrap_or_else(|error| unreachable!("{error}"));
}

#[test]
fn forward_is_linear_in_x() {
    holds("forward_is_linear_in_x", linear_in_x);
}

#[test]
fn backward_is_linear_in_dy() {
    holds("backward_is_linear_in_dy", linear_in_dy);
}

#[test]
fn backward_is_the_adjoint_of_forward() {
    holds("backward_is_the_adjoint_of_forward", adjoint);
}

#[test]
fn merged_computes_what_unmerged_does() {
    holds("merged_computes_what_unmerged_does", merged_equals_unmerged);
}

/// What the bounds above let pass is small: an adapter that is left out, or a scale that is applied twice, is not.
#[test]
fn the_bounds_notice_what_is_wrong() {
    struct Wrong(fn(&Inputs) -> Inputs);
    impl Computes for Wrong {
        fn name(&self) -> String {
            "wrong".into()
        }
        fn forward(&self, inputs: &Inputs) -> (Mat, Mat) {
            Oracle.forward(inputs)
        }
        fn backward(&self, inputs: &Inputs, h: &Mat) -> Gradients {
            Oracle.backward(&(self.0)(inputs), h)
        }
        fn merge(&self, inputs: &Inputs) -> Mat {
            Oracle.merge(&(self.0)(inputs))
        }
        fn bound(&self, depth: usize, magnitude: f64) -> f64 {
            element_bound(Dtype::Bf16, depth, magnitude)
        }
        fn roundoff(&self) -> f64 {
            unit_roundoff(Dtype::Bf16)
        }
        fn stored(&self, value: f64) -> f64 {
            value
        }
    }
    let squared = Wrong(|inputs| Inputs { scale: inputs.scale * inputs.scale, ..inputs.clone() });
    let last_rank = Wrong(|inputs| {
        let mut wrong = inputs.clone();
        let last = wrong.b.cols - 1;
        (0..wrong.b.rows).for_each(|row| wrong.b.data[row * (last + 1) + last] = 0.0);
        wrong
    });
    for wrong in [squared, last_rank] {
        assert!(merged_equals_unmerged(&wrong, (20, 30, 24, 3, 1)).is_err());
        assert!(adjoint(&wrong, (20, 30, 24, 3, 1)).is_err() || adjoint(&wrong, (2, 3, 4, 3, 2)).is_err());
    }
}
