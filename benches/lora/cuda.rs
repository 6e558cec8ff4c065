//! The CUDA backend beside cuBLASLt, by CUDA events around the launches of a sample.
//!
//! Launches are queued back to back, as in training, over copies of the layer that together exceed L2 twice: no launch
//! finds its operands there because the one before left them.

use std::time::Duration;

use fused_lora::plan::Options;
use fused_lora::{Dtype, LoraShape, Result};

use crate::feature::Feature;
use crate::tax::cublaslt::CublasLt;
use crate::tax::gpu;
use crate::tax::report::Op as Product;
use crate::{Backend, Case, Failure, Op, Timed, Way, cases};

/// Decoding, a small batch, a training batch through Llama-3-8B's attention and MLP projections.
const SHAPES: &[(usize, usize, usize)] =
    &[(16, 4096, 4096), (512, 4096, 4096), (8192, 4096, 4096), (8192, 14336, 4096)];

/// A GPU, and cuBLASLt where it is found. Both live as long as the process, as what is prepared with them does.
pub struct Gpu {
    gpu: &'static gpu::Gpu,
    rival: Option<&'static CublasLt>,
}

impl Gpu {
    pub fn new() -> Result<Self> {
        let gpu = Box::leak(Box::new(gpu::Gpu::new()?));
        let rival = CublasLt::find();
        match &rival {
            Ok(rival) => println!("cuBLASLt {} from {}", rival.version, rival.path.display()),
            Err(error) => println!("{error}: taxes are over this crate's own plain product"),
        }
        Ok(Self { gpu, rival: rival.ok().map(|rival| &*Box::leak(Box::new(rival))) })
    }

    fn job(&self, product: Product, case: &Case, layers: &[gpu::Layer]) -> Result<gpu::Job<'static>, Failure> {
        let what = (product, case.dtype, case.shape);
        match (case.way, self.rival, layers.first()) {
            (Way::Cublaslt | Way::Unfused, Some(rival), _) => self.gpu.with_rival(rival, what, layers),
            (_, _, Some(layer)) => Ok(self.gpu.fused(Options::default(), what, layer)?.0),
            (_, _, None) => Err("no copy of the layer".into()),
        }
    }
}

impl Backend for Gpu {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn why(&self) -> String {
        self.gpu.name()
    }

    fn cases(&self, op: Op) -> Vec<Case> {
        let ways: &[Way] =
            if self.rival.is_some() { &[Way::Cublaslt, Way::Fused, Way::Unfused] } else { &[Way::Fused] };
        let mut cases = cases(op, &[Dtype::Bf16, Dtype::F16], SHAPES, &[0, 16, 64], ways);
        cases.retain(|case| case.way == Way::Fused || (case.way == Way::Cublaslt) == (case.shape.r == 0));
        cases
    }

    fn baseline(&self) -> Way {
        if self.rival.is_some() { Way::Cublaslt } else { Way::Fused }
    }

    fn prepare(&self, case: &Case) -> Result<Timed, Failure> {
        let LoraShape { r, .. } = case.shape;
        let (layers, memory) =
            self.gpu.layers(case.dtype, false, Feature::default(), LoraShape { r: r.max(1), ..case.shape })?;
        let products: &[Product] = match case.op {
            Op::Forward => &[Product::Forward],
            Op::Backward => &[Product::Backward],
            Op::Step => &[Product::Forward, Product::Backward],
        };
        let jobs: Vec<gpu::Job<'static>> =
            products.iter().map(|&product| self.job(product, case, &layers)).collect::<Result<_, _>>()?;
        let gpu = self.gpu;
        let all: gpu::Job<'static> = Box::new(move |layer| jobs.iter().try_for_each(|job| job(layer)));
        Ok(Box::new(move |iterations| {
            let _memory = &memory; // the layers are addresses in it
            let microseconds = gpu.time(&all, &layers, usize::try_from(iterations)?)?;
            Ok(Duration::from_secs_f64(microseconds / 1e6))
        }))
    }
}
