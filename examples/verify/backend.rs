//! What runs the operations: one interface over host vectors, one implementation per backend.

#[cfg(feature = "cuda")]
mod cuda;
mod slices;

use std::str::FromStr;
use std::time::Duration;

use fused_lora::{Dtype, Element, Result, split_columns};
#[cfg(feature = "cuda")]
use fused_lora::{emulator::Emulator, plan::Device};

use super::failure::Failure;

/// The layer and its data in one storage type, A and B in theirs; every matrix contiguous.
pub struct Problem<T, A> {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub r: usize,
    pub scale: f32,
    pub x: Vec<T>,
    pub w: Vec<T>,
    pub a: Vec<A>,
    pub b: Vec<A>,
    pub bias: Option<Vec<T>>,
    pub dy: Vec<T>,
    /// The words of a `Routing`, where rows go through adapters of their own.
    pub routes: Option<Vec<u64>>,
    /// DoRA's factors of the columns of y.
    pub gain: Option<Vec<f32>>,
}

impl<T: Element, A: Element> Problem<T, A> {
    /// Whether A and B are at full precision: f32 over 16 bits.
    pub fn is_full() -> bool {
        A::DTYPE == Dtype::F32 && T::DTYPE != Dtype::F32
    }

    /// Columns of h, which at full precision has halves of each rank.
    pub fn columns_of_h(&self) -> usize {
        if Self::is_full() { split_columns(self.r) } else { self.r }
    }
}

/// What DoRA's gain is made of: gain = magnitude / ‖W + scale · B A‖ (· earlier).
pub struct Norms<'a, T> {
    pub n: usize,
    pub k: usize,
    pub r: usize,
    pub scale: f32,
    pub w: &'a [T],
    pub a: &'a [f32],
    pub b: &'a [f32],
    pub magnitude: &'a [f32],
    pub earlier: Option<&'a [f32]>,
}

/// What the gradient of a magnitude takes beside the layer.
pub struct OfMagnitude<'a, T> {
    /// What forward gave.
    pub y: &'a [T],
    pub magnitude: &'a [f32],
}

/// What forward gives.
pub struct Forward<T> {
    pub h: Vec<T>,
    pub y: Vec<T>,
    pub time: Duration,
}

/// da, db or dbias, in the type that was asked for.
pub enum Values<T> {
    Storage(Vec<T>),
    F32(Vec<f32>),
}

/// The type in which a gradient is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    Storage,
    F32,
}

impl Form {
    /// A buffer of `elements` zeros in that form.
    pub fn zeros<T: Element>(self, elements: usize) -> Values<T> {
        match self {
            Self::Storage => Values::Storage(vec![T::default(); elements]),
            Self::F32 => Values::F32(vec![0.0; elements]),
        }
    }
}

/// How backward writes the adapter's gradients; dbias only where it is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Forms {
    pub da: Form,
    pub db: Form,
    pub dbias: Option<Form>,
}

/// What backward gives.
pub struct Backward<T> {
    pub dx: Vec<T>,
    pub da: Values<T>,
    pub db: Values<T>,
    pub dbias: Option<Values<T>>,
    pub time: Duration,
}

/// Uploads, runs the fused operation, downloads; `time` is that of the operation alone.
pub trait Runner {
    fn name(&self) -> &'static str;
    fn computes(&self, dtype: Dtype) -> bool;
    fn forward<T: Element, A: Element>(&self, problem: &Problem<T, A>) -> Result<Forward<T>>;
    fn backward<T: Element, A: Element>(&self, problem: &Problem<T, A>, h: &[T], forms: Forms) -> Result<Backward<T>>;
    fn gain<T: Element>(&self, norms: &Norms<'_, T>) -> Result<Vec<f32>>;
    /// dm alone, and its time.
    fn magnitude<T: Element, A: Element>(
        &self,
        problem: &Problem<T, A>,
        of: &OfMagnitude<'_, T>,
    ) -> Result<(Vec<f32>, Duration)>;
}

/// The backend asked for on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    Cuda,
    Cpu,
    Emulator,
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        match name {
            "cuda" => Ok(Self::Cuda),
            "cpu" => Ok(Self::Cpu),
            "emulator" => Ok(Self::Emulator),
            _ => Err("expected cuda, cpu or emulator".into()),
        }
    }
}

/// The backend that runs, and why it is this one.
pub struct Backend {
    pub kind: Kind,
    why: String,
}

/// The backends of this build.
pub enum Kind {
    Cpu(slices::Cpu),
    #[cfg(feature = "cuda")]
    Cuda(cuda::Cuda),
    #[cfg(feature = "cuda")]
    Emulator(Emulator),
}

impl Backend {
    /// The backend asked for, or the best there is.
    pub fn select(choice: Option<Choice>) -> std::result::Result<Self, Failure> {
        match choice {
            Some(Choice::Cpu) => Ok(Self::cpu("as asked".into())),
            Some(Choice::Cuda) => Self::cuda(),
            Some(Choice::Emulator) => Self::emulator(),
            None => Ok(Self::best()),
        }
    }

    fn cpu(why: String) -> Self {
        Self { kind: Kind::Cpu(slices::Cpu), why }
    }

    #[cfg(feature = "cuda")]
    fn cuda() -> std::result::Result<Self, Failure> {
        let runner = cuda::Cuda::new().map_err(|error| Failure::Backend { backend: "cuda", error })?;
        Ok(Self { why: runner.gpu().to_owned(), kind: Kind::Cuda(runner) })
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda() -> std::result::Result<Self, Failure> {
        Err(absent("cuda"))
    }

    /// A small GPU of compute capability 8.0: the kernels that run on everything later as well.
    #[cfg(feature = "cuda")]
    #[allow(clippy::unnecessary_wraps)] // as the other backends
    fn emulator() -> std::result::Result<Self, Failure> {
        let runner = Emulator::new(Device::of_arch("emulated sm_80 with 4 SMs", 80, 4));
        Ok(Self { why: runner.device().name.clone(), kind: Kind::Emulator(runner) })
    }

    /// The emulator runs the PTX that nvcc made of the kernels.
    #[cfg(not(feature = "cuda"))]
    fn emulator() -> std::result::Result<Self, Failure> {
        Err(absent("emulator"))
    }

    /// The GPU where it can be used, else the CPU.
    fn best() -> Self {
        match Self::cuda() {
            Ok(backend) => backend,
            Err(Failure::Backend { error: fused_lora::Error::NoDriver { reason }, .. }) => {
                Self::cpu(format!("no NVIDIA driver found: CPU backend; {reason}"))
            }
            Err(failure) if cfg!(feature = "cuda") => Self::cpu(format!("{failure}: CPU backend")),
            Err(_) => Self::cpu("built without the `cuda` feature".into()),
        }
    }

    pub fn name(&self) -> &'static str {
        match &self.kind {
            Kind::Cpu(runner) => runner.name(),
            #[cfg(feature = "cuda")]
            Kind::Cuda(runner) => runner.name(),
            #[cfg(feature = "cuda")]
            Kind::Emulator(runner) => runner.name(),
        }
    }

    pub fn why(&self) -> &str {
        &self.why
    }
}

#[cfg(not(feature = "cuda"))]
fn absent(name: &str) -> Failure {
    Failure::Usage(format!("this build has no {name} backend, expected feature `cuda`"))
}
