//! The backends that compute on slices in host memory: the CPU, and the emulator, which copies them itself.

use std::time::{Duration, Instant};

use fused_lora::{
    Accumulate, Dtype, Element, Factors, Gradient, MagnitudeGradient, Matrix, MatrixMut, Result, Variant, cpu,
};

use super::{Backward, Form, Forms, Forward, Norms, OfMagnitude, Problem, Runner, Values};

/// A backend over slices.
trait OnSlices {
    const NAME: &'static str;
    fn computes(&self, dtype: Dtype) -> bool;
    fn forward<T: Element, A: Element>(&self, op: cpu::Forward<'_, T, A>) -> Result<()>;
    fn backward<T: Element, A: Element>(&self, op: cpu::Backward<'_, T, A>) -> Result<()>;
    fn gain<T: Element>(&self, op: cpu::Gain<'_, T>) -> Result<()>;
}

/// All cores.
pub struct Cpu;

impl OnSlices for Cpu {
    const NAME: &'static str = "cpu";

    fn computes(&self, _: Dtype) -> bool {
        true
    }

    fn forward<T: Element, A: Element>(&self, op: cpu::Forward<'_, T, A>) -> Result<()> {
        cpu::forward(op)
    }

    fn backward<T: Element, A: Element>(&self, op: cpu::Backward<'_, T, A>) -> Result<()> {
        cpu::backward(op)
    }

    fn gain<T: Element>(&self, op: cpu::Gain<'_, T>) -> Result<()> {
        cpu::gain(op)
    }
}

#[cfg(feature = "cuda")]
impl OnSlices for fused_lora::emulator::Emulator {
    const NAME: &'static str = "emulator";

    fn computes(&self, dtype: Dtype) -> bool {
        dtype != Dtype::F32
    }

    fn forward<T: Element, A: Element>(&self, op: cpu::Forward<'_, T, A>) -> Result<()> {
        self.forward(op).map(drop)
    }

    fn backward<T: Element, A: Element>(&self, op: cpu::Backward<'_, T, A>) -> Result<()> {
        self.backward(op).map(drop)
    }

    fn gain<T: Element>(&self, op: cpu::Gain<'_, T>) -> Result<()> {
        self.gain(op).map(drop)
    }
}

impl<S: OnSlices> Runner for S {
    fn name(&self) -> &'static str {
        S::NAME
    }

    fn computes(&self, dtype: Dtype) -> bool {
        self.computes(dtype)
    }

    fn forward<T: Element, A: Element>(&self, problem: &Problem<T, A>) -> Result<Forward<T>> {
        let Problem { m, n, k, r, scale, x, w, a, b, bias, .. } = problem;
        let (m, n, k, r, columns) = (*m, *n, *k, *r, problem.columns_of_h());
        let (mut h, mut y) = (vec![T::default(); m * columns], vec![T::default(); m * n]);
        let start = Instant::now();
        OnSlices::forward(
            self,
            cpu::Forward {
                x: Matrix::new(&x[..], m, k),
                w: Matrix::new(&w[..], n, k),
                a: Matrix::new(&a[..], r, k),
                b: Matrix::new(&b[..], n, r),
                scale: *scale,
                bias: bias.as_ref().map(|bias| Matrix::new(&bias[..], 1, n)),
                h: Some(MatrixMut::new(&mut h[..], m, columns)),
                y: MatrixMut::new(&mut y[..], m, n),
                variant: variant(problem),
            },
        )?;
        Ok(Forward { h, y, time: start.elapsed() })
    }

    fn backward<T: Element, A: Element>(&self, problem: &Problem<T, A>, h: &[T], forms: Forms) -> Result<Backward<T>> {
        let Problem { m, n, k, r, scale, x, w, a, b, dy, .. } = problem;
        let (m, n, k, r) = (*m, *n, *k, *r);
        let (mut dx, mut da, mut db) = (vec![T::default(); m * k], forms.da.zeros(r * k), forms.db.zeros(n * r));
        let mut dbias = forms.dbias.map(|form: Form| form.zeros(n));
        let start = Instant::now();
        OnSlices::backward(
            self,
            cpu::Backward {
                dy: Matrix::new(&dy[..], m, n),
                w: Matrix::new(&w[..], n, k),
                a: Matrix::new(&a[..], r, k),
                b: Matrix::new(&b[..], n, r),
                scale: *scale,
                x: Some(Matrix::new(&x[..], m, k)),
                h: Some(Matrix::new(h, m, problem.columns_of_h())),
                dx: Some(MatrixMut::new(&mut dx[..], m, k)),
                da: Some(view(&mut da, r, k)),
                db: Some(view(&mut db, n, r)),
                dbias: dbias.as_mut().map(|dbias| view(dbias, 1, n)),
                dm: None,
                accumulate: Accumulate::default(),
                variant: variant(problem),
            },
        )?;
        Ok(Backward { dx, da, db, dbias, time: start.elapsed() })
    }

    fn gain<T: Element>(&self, norms: &Norms<'_, T>) -> Result<Vec<f32>> {
        let Norms { n, k, r, scale, .. } = *norms;
        let mut gain = vec![0.0; n];
        OnSlices::gain(
            self,
            cpu::Gain {
                w: Matrix::new(norms.w, n, k),
                factors: Factors::F32 { a: Matrix::new(norms.a, r, k), b: Matrix::new(norms.b, n, r) },
                scale,
                magnitude: Some(Matrix::new(norms.magnitude, 1, n)),
                earlier: norms.earlier.map(|earlier| Matrix::new(earlier, 1, n)),
                norm: None,
                gain: Some(MatrixMut::new(&mut gain[..], 1, n)),
            },
        )?;
        Ok(gain)
    }

    fn magnitude<T: Element, A: Element>(
        &self,
        problem: &Problem<T, A>,
        of: &OfMagnitude<'_, T>,
    ) -> Result<(Vec<f32>, Duration)> {
        let Problem { m, n, k, r, scale, w, a, b, bias, dy, .. } = problem;
        let (m, n, k, r) = (*m, *n, *k, *r);
        let mut dm = vec![0.0; n];
        let start = Instant::now();
        OnSlices::backward(
            self,
            cpu::Backward {
                dy: Matrix::new(&dy[..], m, n),
                w: Matrix::new(&w[..], n, k),
                a: Matrix::new(&a[..], r, k),
                b: Matrix::new(&b[..], n, r),
                scale: *scale,
                x: None,
                h: None,
                dx: None,
                da: None,
                db: None,
                dbias: None,
                dm: Some(MagnitudeGradient {
                    y: Matrix::new(of.y, m, n),
                    bias: bias.as_ref().map(|bias| Matrix::new(&bias[..], 1, n)),
                    magnitude: Matrix::new(of.magnitude, 1, n),
                    dm: MatrixMut::new(&mut dm[..], 1, n),
                }),
                accumulate: Accumulate::default(),
                variant: variant(problem),
            },
        )?;
        Ok((dm, start.elapsed()))
    }
}

fn variant<T, A>(problem: &Problem<T, A>) -> Variant<'_, [u64], [f32]> {
    let routes = problem.routes.as_ref().map(|words| Matrix::new(&words[..], 1, words.len()));
    let gain = problem.gain.as_ref().map(|gain| Matrix::new(&gain[..], 1, gain.len()));
    Variant { routes, gain, ..Variant::default() }
}

fn view<T>(values: &mut Values<T>, rows: usize, cols: usize) -> Gradient<'_, [T], [f32]> {
    match values {
        Values::Storage(values) => Gradient::Storage(MatrixMut::new(&mut values[..], rows, cols)),
        Values::F32(values) => Gradient::F32(MatrixMut::new(&mut values[..], rows, cols)),
    }
}
