//! The layer as candle's products and sums, one after the other, on the CPU: what it costs without this crate.
//!
//! The gradients are written out, as in the formulas of the crate. candle's own autograd would also compute the gradient of
//! the frozen weight.

use std::hint::black_box;
use std::time::Instant;

use candle_core::{Device, Result, Tensor, WithDType};
use fused_lora::{Dtype, Element, Error, LoraShape, bf16, f16};

use crate::{Case, Op, Timed, values};

pub fn prepare(case: &Case) -> fused_lora::Result<Timed> {
    let prepared = match case.dtype {
        Dtype::F16 => timed::<f16>(case),
        Dtype::Bf16 => timed::<bf16>(case),
        Dtype::F32 => timed::<f32>(case),
    };
    prepared.map_err(failed)
}

fn failed(error: candle_core::Error) -> Error {
    Error::Driver { call: "candle", message: error.to_string() }
}

fn timed<T: Element + WithDType>(case: &Case) -> Result<Timed> {
    let (layer, op) = (Layer::new::<T>(case.shape)?, case.op);
    layer.run(op)?;
    Ok(Box::new(move |iterations| {
        let start = Instant::now();
        for _ in 0..iterations {
            layer.run(op).map_err(failed)?;
        }
        Ok(start.elapsed())
    }))
}

struct Layer {
    x: Tensor,
    w: Tensor,
    dy: Tensor,
    h: Tensor,
    /// a, b; none with R = 0.
    adapter: Option<(Tensor, Tensor)>,
}

impl Layer {
    const SCALE: f64 = 2.0;

    fn new<T: Element + WithDType>(LoraShape { m, n, k, r }: LoraShape) -> Result<Self> {
        let tensor = |rows, cols, seed| Tensor::from_vec(values::<T>(rows * cols, seed), (rows, cols), &Device::Cpu);
        let adapter = if r == 0 { None } else { Some((tensor(r, k, 3)?, tensor(n, r, 4)?)) };
        Ok(Self { x: tensor(m, k, 1)?, w: tensor(n, k, 2)?, dy: tensor(m, n, 6)?, h: tensor(m, r, 5)?, adapter })
    }

    fn run(&self, op: Op) -> Result<()> {
        match op {
            Op::Forward => self.forward().map(drop),
            Op::Backward => self.backward(&self.h),
            Op::Step => self.backward(&self.forward()?),
        }
    }

    /// Returns h.
    fn forward(&self) -> Result<Tensor> {
        let y = self.x.matmul(&self.w.t()?)?;
        let Some((a, b)) = &self.adapter else {
            black_box(y);
            return Ok(self.h.clone());
        };
        let h = (self.x.matmul(&a.t()?)? * Self::SCALE)?;
        black_box((y + h.matmul(&b.t()?)?)?);
        Ok(h)
    }

    fn backward(&self, h: &Tensor) -> Result<()> {
        let dx = self.dy.matmul(&self.w)?;
        let Some((a, b)) = &self.adapter else {
            black_box(dx);
            return Ok(());
        };
        let dh = (self.dy.matmul(b)? * Self::SCALE)?;
        black_box((dx + dh.matmul(a)?)?);
        black_box((dh.t()?.matmul(&self.x)?, self.dy.t()?.matmul(h)?));
        Ok(())
    }
}
