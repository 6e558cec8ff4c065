//! The CPU backend, by the wall clock.

use std::hint::black_box;
use std::time::Instant;

use fused_lora::{
    Accumulate, Dropout, Dtype, Element, Gradient, LoraShape, MagnitudeGradient, Matrix, MatrixMut, Result, Routing,
    Seed, Slot, bf16, cpu, f16,
};

use crate::feature::Feature;
use crate::{Backend, Case, Failure, Op, Timed, Way, cases, values};

/// Many tokens through a projection of Llama-3-8B, and a few: two cores finish the whole table in minutes.
const SHAPES: &[(usize, usize, usize)] = &[(512, 4096, 4096), (16, 2048, 2048)];

/// Each by itself, on the first shape.
const FEATURES: [Feature; 4] = {
    let plain = Feature { dropout: 0.0, adapters: 1, dora: false, full: false, projections: 1 };
    [
        Feature { dropout: 0.1, ..plain },
        Feature { adapters: 4, ..plain },
        Feature { dora: true, ..plain },
        Feature { projections: 2, ..plain },
    ]
};

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
        let mut cases = cases(op, &[Dtype::F32, Dtype::Bf16], SHAPES, &[0, 16], WAYS);
        let (m, n, k) = SHAPES[0];
        let shape = LoraShape { m, n, k, r: 16 };
        cases.extend(FEATURES.map(|feature| Case { op, way: Way::Fused, dtype: Dtype::Bf16, shape, feature }));
        cases
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
    let mut layer = Layer::<T>::new(case)?;
    let run = match case.op {
        Op::Forward => Layer::forward,
        Op::Backward => Layer::backward,
        Op::Step => |layer: &mut Layer<T>| layer.forward().and_then(|()| layer.backward()),
    };
    layer.forward()?; // backward reads h, and with a gain y
    run(&mut layer)?; // pages and caches are warm before anything is timed
    Ok(Box::new(move |iterations| {
        let start = Instant::now();
        for _ in 0..iterations {
            run(black_box(&mut layer))?;
        }
        Ok(start.elapsed())
    }))
}

/// A layer, or projections of equal N, whose matrices lie behind each other: those of w and b as rows of one.
struct Layer<T> {
    /// n and r are those of each projection.
    shape: LoraShape,
    feature: Feature,
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
    routing: Option<Routing>,
    /// Of DoRA, and its magnitude.
    gain: Vec<f32>,
    dm: Vec<f32>,
}

impl<T: Element> Layer<T> {
    fn new(&Case { shape: LoraShape { m, n, k, r }, feature, .. }: &Case) -> Result<Self> {
        let Feature { adapters, projections, .. } = feature;
        let zeros = |count| vec![T::default(); count];
        let slots: Vec<_> = (0..adapters).map(|at| Slot { first_rank: at * r, ranks: r, scale: 2.0 }).collect();
        let ids: Vec<_> = (0..m).map(|row| Some(row * adapters / m)).collect();
        let routing = if adapters > 1 && r != 0 { Some(Routing::new(&slots, &ids)?) } else { None };
        let (own, all) = (r * adapters, r * adapters * projections);
        Ok(Self {
            shape: LoraShape { m, n: n / projections, k, r: own },
            feature,
            x: values(m * k, 1),
            w: values(n * k, 2),
            a: values(all * k, 3),
            b: values(n * own, 4),
            h: zeros(m * all),
            y: zeros(m * n),
            dy: values(m * n, 6),
            dx: zeros(m * k),
            da: vec![0.0; all * k],
            db: vec![0.0; n * own],
            routing,
            gain: values(n, 7).into_iter().map(|value: f32| value + 2.0).collect(),
            dm: vec![0.0; n],
        })
    }

    fn forward(&mut self) -> Result<()> {
        let LoraShape { m, n, k, r } = self.shape;
        let ranks = r * self.feature.projections;
        let projection = |(at, y)| cpu::ForwardProjection {
            w: Matrix::new(&self.w[..], n, k).with_offset(at * n * k),
            b: Matrix::new(&self.b[..], n, r).with_offset(at * n * r),
            scale: 2.0,
            bias: None,
            gain: gain(self.feature, &self.gain, r, n, at),
            y: MatrixMut::new(y, m, n),
        };
        cpu::forward_shared(cpu::ForwardShared {
            x: Matrix::new(&self.x[..], m, k),
            a: Matrix::new(&self.a[..], ranks, k),
            h: Some(MatrixMut::new(&mut self.h[..], m, ranks)),
            projections: self.y.chunks_mut(m * n).enumerate().map(projection).collect(),
            dropout: dropout(self.feature),
            routes: self.routing.as_ref().map(table),
        })
    }

    fn backward(&mut self) -> Result<()> {
        let LoraShape { m, n, k, r } = self.shape;
        let ranks = r * self.feature.projections;
        let mut dbs = self.db.chunks_mut((n * r).max(1));
        let projection = |(at, dm)| {
            let gain = gain(self.feature, &self.gain, r, n, at);
            cpu::BackwardProjection {
                dy: Matrix::new(&self.dy[..], m, n).with_offset(at * m * n),
                w: Matrix::new(&self.w[..], n, k).with_offset(at * n * k),
                b: Matrix::new(&self.b[..], n, r).with_offset(at * n * r),
                scale: 2.0,
                db: dbs.next().map(|db| Gradient::F32(MatrixMut::new(db, n, r))),
                dbias: None,
                dm: gain.map(|magnitude| MagnitudeGradient {
                    y: Matrix::new(&self.y[..], m, n).with_offset(at * m * n),
                    bias: None,
                    magnitude,
                    dm: MatrixMut::new(dm, 1, n),
                }),
                gain,
            }
        };
        cpu::backward_shared(cpu::BackwardShared {
            a: Matrix::new(&self.a[..], ranks, k),
            x: Some(Matrix::new(&self.x[..], m, k)),
            h: Some(Matrix::new(&self.h[..], m, ranks)),
            dx: Some(MatrixMut::new(&mut self.dx[..], m, k)),
            da: (ranks != 0).then(|| Gradient::F32(MatrixMut::new(&mut self.da[..], ranks, k))),
            projections: self.dm.chunks_mut(n).enumerate().map(projection).collect(),
            accumulate: Accumulate::default(),
            dropout: dropout(self.feature),
            routes: self.routing.as_ref().map(table),
        })
    }
}

fn dropout(feature: Feature) -> Option<Dropout<'static, [u64]>> {
    let seed = Seed::Value { seed: 1, offset: 0 };
    (feature.dropout > 0.0).then_some(Dropout { p: feature.dropout, seed })
}

fn table(routing: &Routing) -> Matrix<'_, [u64]> {
    Matrix::new(routing.words(), 1, routing.words().len())
}

/// That of projection `at`.
fn gain(feature: Feature, gain: &[f32], r: usize, n: usize, at: usize) -> Option<Matrix<'_, [f32]>> {
    (feature.dora && r != 0).then(|| Matrix::new(gain, 1, n).with_offset(at * n))
}
