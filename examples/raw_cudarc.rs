//! Training an adapter with nothing but cudarc: fused forward and backward over `CudaSlice`s, AdamW on the host.
//!
//! ```text
//! cargo run --release --example raw_cudarc
//! ```
//!
//! The adapter learns a target that differs from a frozen bf16 weight by a matrix of rank 4. Its factors are f32, as PEFT keeps
//! them; `Kernels::round` makes the bf16 copies that the products read. The optimiser is on the host because the factors are
//! small and cudarc brings no elementwise kernels; a stack with an optimiser of its own hands it `a32`, `b32`, `da` and `db`.
//! Without a GPU this says so and exits with status 0.

use fused_lora::cuda::{Backward, Forward, Kernels, Round, Workspace};
use fused_lora::{Accumulate, Dtype, Error, Factors, Gradient, LoraShape, Matrix, MatrixMut, Variant, bf16};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const SHAPE: LoraShape = LoraShape { m: 256, n: 192, k: 128, r: 8 };
const SCALE: f32 = 2.0; // α / r
const STEPS: i32 = 200;

/// The moments of one parameter.
struct AdamW {
    m: Vec<f32>,
    v: Vec<f32>,
}

impl AdamW {
    fn new(len: usize) -> Self {
        Self { m: vec![0.0; len], v: vec![0.0; len] }
    }

    /// Step `t`, counted from 1, with PyTorch's default settings but for the rate.
    fn step(&mut self, t: i32, parameter: &mut [f32], gradient: &[f32]) {
        let (lr, beta1, beta2, eps, decay) = (5e-3f32, 0.9f32, 0.999f32, 1e-8, 0.01);
        for (((p, g), m), v) in parameter.iter_mut().zip(gradient).zip(&mut self.m).zip(&mut self.v) {
            *m = beta1 * *m + (1.0 - beta1) * g;
            *v = beta2 * *v + (1.0 - beta2) * g * g;
            let (m, v) = (*m / (1.0 - beta1.powi(t)), *v / (1.0 - beta2.powi(t)));
            *p -= lr * (m / (v.sqrt() + eps) + decay * *p);
        }
    }
}

/// `len` numbers in [−size, size), the same for the same seed.
fn random(seed: u32, len: usize, size: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        size * (state as f32 / (1u32 << 31) as f32 - 1.0)
    };
    (0..len).map(|_| next()).collect()
}

/// x · (W + D)ᵀ for the D of rank 4 that is to be learned.
fn target(x: &[bf16], w: &[bf16]) -> Vec<f32> {
    let LoraShape { m, n, k, .. } = SHAPE;
    let (p, q) = (random(4, n * 4, 0.3), random(5, 4 * k, 0.3));
    let weight = |j: usize, i: usize| w[j * k + i].to_f32() + (0..4).map(|d| p[j * 4 + d] * q[d * k + i]).sum::<f32>();
    let weights: Vec<f32> = (0..n * k).map(|at| weight(at / k, at % k)).collect();
    let dot = |at: usize| -> f32 {
        let (x, w) = (&x[at / n * k..][..k], &weights[at % n * k..][..k]);
        x.iter().zip(w).map(|(x, w)| x.to_f32() * w).sum()
    };
    (0..m * n).map(dot).collect()
}

fn train(kernels: &Kernels) -> Result<()> {
    let LoraShape { m, n, k, r } = SHAPE;
    let narrow = |values: Vec<f32>| -> Vec<bf16> { values.into_iter().map(bf16::from_f32).collect() };
    let (x, w) = (narrow(random(1, m * k, 1.0)), narrow(random(2, n * k, 0.2)));
    let wanted = target(&x, &w);
    let (mut a32, mut b32) = (random(3, r * k, 0.1), vec![0.0f32; n * r]); // B starts at zero, so that y starts at x Wᵀ
    let (mut adam_a, mut adam_b) = (AdamW::new(r * k), AdamW::new(n * r));

    let stream = kernels.context().new_stream()?;
    let mut workspace = Workspace::new(&stream, kernels.workspace_bytes(Dtype::Bf16, SHAPE)?)?;
    let (x, w) = (stream.clone_htod(&x)?, stream.clone_htod(&w)?);
    let (mut a, mut b) = (stream.alloc_zeros::<bf16>(r * k)?, stream.alloc_zeros::<bf16>(n * r)?);
    let (mut h, mut y) = (stream.alloc_zeros::<bf16>(m * r)?, stream.alloc_zeros::<bf16>(m * n)?);
    let (mut da, mut db) = (stream.alloc_zeros::<f32>(r * k)?, stream.alloc_zeros::<f32>(n * r)?);

    for step in 1..=STEPS {
        let (device_a, device_b) = (stream.clone_htod(&a32)?, stream.clone_htod(&b32)?);
        let round = Round {
            factors: Factors::F32 { a: Matrix::new(&device_a, r, k), b: Matrix::new(&device_b, n, r) },
            scale: 1.0,
            divisor: None,
            rounded_a: MatrixMut::new(&mut a, r, k),
            rounded_b: MatrixMut::new(&mut b, n, r),
        };
        kernels.round::<bf16, bf16>(&stream, round)?;
        let forward = Forward {
            x: Matrix::new(&x, m, k),
            w: Matrix::new(&w, n, k),
            a: Matrix::new(&a, r, k),
            b: Matrix::new(&b, n, r),
            scale: SCALE,
            bias: None,
            h: Some(MatrixMut::new(&mut h, m, r)),
            y: MatrixMut::new(&mut y, m, n),
            variant: Variant::default(),
        };
        kernels.forward::<bf16, bf16>(&stream, forward, &mut workspace)?;

        // Mean squared error and its gradient; a model has its next layers here.
        let error: Vec<f32> = stream.clone_dtoh(&y)?.iter().zip(&wanted).map(|(y, t)| y.to_f32() - t).collect();
        let loss = error.iter().map(|e| e * e).sum::<f32>() / (m * n) as f32;
        let dy = stream.clone_htod(&narrow(error.iter().map(|e| 2.0 * e / (m * n) as f32).collect()))?;

        let backward = Backward {
            dy: Matrix::new(&dy, m, n),
            w: Matrix::new(&w, n, k),
            a: Matrix::new(&a, r, k),
            b: Matrix::new(&b, n, r),
            scale: SCALE,
            x: Some(Matrix::new(&x, m, k)),
            h: Some(Matrix::new(&h, m, r)),
            dx: None, // x is the input of the model
            da: Some(Gradient::F32(MatrixMut::new(&mut da, r, k))),
            db: Some(Gradient::F32(MatrixMut::new(&mut db, n, r))),
            dbias: None,
            dm: None,
            accumulate: Accumulate::default(),
            variant: Variant::default(),
        };
        kernels.backward::<bf16, bf16>(&stream, backward, &mut workspace)?;
        adam_a.step(step, &mut a32, &stream.clone_dtoh(&da)?);
        adam_b.step(step, &mut b32, &stream.clone_dtoh(&db)?);
        if step == 1 || step % 50 == 0 {
            println!("step {step:3}  loss {loss:.5}");
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    match Kernels::on_device(0) {
        Ok(kernels) => train(&kernels),
        Err(error @ Error::NoDriver { .. }) => {
            println!("nothing to do: {error}");
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}
