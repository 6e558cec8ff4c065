//! The CPU backend, by the wall clock.

use std::hint::black_box;
use std::time::Instant;

use fused_lora::{Accumulate, Dtype, Element, Gradient, LoraShape, Matrix, MatrixMut, Result, bf16, cpu, f16};

use crate::{Backend, Case, Failure, Op, Timed, Way, cases, values};

/// Many tokens through a projection of Llama-3-8B, and a few: two cores finish the whole table in minutes.
const SHAPES: &[(usize, usize, usize)] = &[(512, 4096, 4096), (16, 2048, 2048)];

#[cfg(feature = "candle")]
const WAYS: &[Way] = &[Way::Fused, Way::Candle];
#[cfg(not(feature = "candle"))]
const WAYS: &[Way] = &[Way::Fused];

pub struct Cpu {
    pub why: String,
}

impl Backend for Cpu {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn why(&self) -> String {
        self.why.clone()
    }

    fn cases(&self, op: Op) -> Vec<Case> {
        cases(op, &[Dtype::F32, Dtype::Bf16], SHAPES, &[0, 16], WAYS)
    }

    fn baseline(&self) -> Way {
        Way::Fused
    }

    fn prepare(&self, case: &Case) -> Result<Timed, Failure> {
        #[cfg(feature = "candle")]
        if case.way == Way::Candle {
            return Ok(crate::candle::prepare(case)?);
        }
        Ok(match case.dtype {
            Dtype::F16 => prepare::<f16>(case),
            Dtype::Bf16 => prepare::<bf16>(case),
            Dtype::F32 => prepare::<f32>(case),
        }?)
    }
}

fn prepare<T: Element>(case: &Case) -> Result<Timed> {
    let mut layer = Layer::<T>::new(case.shape);
    let run = match case.op {
        Op::Forward => Layer::forward,
        Op::Backward => Layer::backward,
        Op::Step => |layer: &mut Layer<T>| layer.forward().and_then(|()| layer.backward()),
    };
    run(&mut layer)?; // pages and caches are warm before anything is timed
    Ok(Box::new(move |iterations| {
        let start = Instant::now();
        for _ in 0..iterations {
            run(black_box(&mut layer))?;
        }
        Ok(start.elapsed())
    }))
}

struct Layer<T> {
    shape: LoraShape,
    x: Vec<T>,
    w: Vec<T>,
    a: Vec<T>,
    b: Vec<T>,
    h: Vec<T>,
    y: Vec<T>,
    dy: Vec<T>,
    dx: Vec<T>,
    da: Vec<f32>,
    db: Vec<f32>,
}

impl<T: Element> Layer<T> {
    fn new(shape: LoraShape) -> Self {
        let LoraShape { m, n, k, r } = shape;
        let zeros = |count| vec![T::default(); count];
        Self {
            shape,
            x: values(m * k, 1),
            w: values(n * k, 2),
            a: values(r * k, 3),
            b: values(n * r, 4),
            h: values(m * r, 5),
            y: zeros(m * n),
            dy: values(m * n, 6),
            dx: zeros(m * k),
            da: vec![0.0; r * k],
            db: vec![0.0; n * r],
        }
    }

    fn forward(&mut self) -> Result<()> {
        let LoraShape { m, n, k, r } = self.shape;
        cpu::forward(cpu::Forward {
            x: Matrix::new(&self.x[..], m, k),
            w: Matrix::new(&self.w[..], n, k),
            a: Matrix::new(&self.a[..], r, k),
            b: Matrix::new(&self.b[..], n, r),
            scale: 2.0,
            bias: None,
            h: Some(MatrixMut::new(&mut self.h[..], m, r)),
            y: MatrixMut::new(&mut self.y[..], m, n),
            variant: Default::default(),
        })
    }

    fn backward(&mut self) -> Result<()> {
        let LoraShape { m, n, k, r } = self.shape;
        let gradient = |values, rows, cols| (r != 0).then(|| Gradient::F32(MatrixMut::new(values, rows, cols)));
        cpu::backward(cpu::Backward {
            dy: Matrix::new(&self.dy[..], m, n),
            w: Matrix::new(&self.w[..], n, k),
            a: Matrix::new(&self.a[..], r, k),
            b: Matrix::new(&self.b[..], n, r),
            scale: 2.0,
            x: Some(Matrix::new(&self.x[..], m, k)),
            h: Some(Matrix::new(&self.h[..], m, r)),
            dx: Some(MatrixMut::new(&mut self.dx[..], m, k)),
            da: gradient(&mut self.da[..], r, k),
            db: gradient(&mut self.db[..], n, r),
            dbias: None,
            dm: None,
            accumulate: Accumulate::default(),
            variant: Default::default(),
        })
    }
}
