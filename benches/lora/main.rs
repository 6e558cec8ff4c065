//! Times forward and backward against the plain product through the same backend, which is the same call with R = 0.
//!
//! `cargo bench` measures; `cargo bench -- --test` runs every case once; `cargo bench -- forward` runs what matches. The
//! figure of merit is the LoRA tax: time with the adapter over time of the plain product, less one.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod table;

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};
use fused_lora::{Dtype, LoraShape};

/// Samples per case; the smallest number criterion accepts, so that the last ones recorded are always measurements.
const SAMPLES: usize = 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Forward,
    Backward,
}

/// One thing to time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Case {
    op: Op,
    dtype: Dtype,
    shape: LoraShape,
}

impl Case {
    /// Floating-point operations. Backward computes dx, da and db; with R = 0 dx alone, the plain product.
    fn flops(&self) -> u64 {
        let LoraShape { m, n, k, r } = self.shape;
        let adapter = match self.op {
            Op::Forward => m * r * (k + n),
            Op::Backward => 2 * m * r * (k + n),
        };
        2 * (m * n * k + adapter) as u64
    }
}

/// Runs a prepared case this many times; returns how long that took.
type Timed = Box<dyn FnMut(u64) -> fused_lora::Result<Duration>>;

/// Something that can prepare a case: allocates and fills its buffers, runs it once.
trait Backend {
    /// In the names of the groups.
    fn name(&self) -> &'static str;
    /// Why this backend runs.
    fn why(&self) -> String;
    /// Cases in order: for every shape and type R = 0 first, the others beside it.
    fn cases(&self, op: Op) -> Vec<Case>;
    fn prepare(&self, case: &Case) -> fused_lora::Result<Timed>;
}

/// Every shape in every type, with every rank.
fn cases(op: Op, dtypes: &[Dtype], shapes: &[(usize, usize, usize)], ranks: &[usize]) -> Vec<Case> {
    let mut cases = Vec::new();
    for &(m, n, k) in shapes {
        for &dtype in dtypes {
            cases.extend(ranks.iter().map(|&r| Case { op, dtype, shape: LoraShape { m, n, k, r } }));
        }
    }
    cases
}

/// Deterministic values in [−1, 1), different in every place: data of zeros would flatter power-limited GPUs.
fn values<T: fused_lora::Element>(count: usize, seed: u32) -> Vec<T> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        T::from_f32(state as f32 / (1u32 << 31) as f32 - 1.0)
    };
    (0..count).map(|_| next()).collect()
}

/// What criterion measured of a case.
struct Measurement {
    case: Case,
    /// Median time of one run.
    time: Duration,
    /// (slowest − fastest) / median of the samples.
    spread: f64,
}

/// Times all cases of an operation in one criterion group; returns those that were measured.
fn run(criterion: &mut Criterion, backend: &dyn Backend, op: Op) -> fused_lora::Result<Vec<Measurement>> {
    let name = match op {
        Op::Forward => "forward",
        Op::Backward => "backward",
    };
    let mut measured = Vec::new();
    let mut failure: Option<fused_lora::Error> = None;
    let mut group = criterion.benchmark_group(format!("{name}/{}", backend.name()));
    for case in backend.cases(op) {
        let LoraShape { m, n, k, r } = case.shape;
        let id = BenchmarkId::from_parameter(format!("{m}x{n}x{k}/{}/r{r}", case.dtype.name()));
        group.throughput(Throughput::Elements(case.flops()));
        // Prepared when criterion asks for it: a case that the filter leaves out costs nothing.
        let mut timed = None;
        let mut samples = Vec::new();
        let mut sample = |iterations: u64| {
            let timed = match &mut timed {
                Some(timed) => timed,
                None => timed.insert(backend.prepare(&case)?),
            };
            let time = timed(iterations)?;
            samples.push(time.div_f64(iterations as f64));
            Ok(time)
        };
        group.bench_function(id, |bencher| {
            bencher.iter_custom(|iterations| {
                // Criterion cannot stop midway: after a failure it gets a second per call, and the failure ends the run.
                sample(iterations).unwrap_or_else(|error| {
                    failure = Some(error);
                    Duration::from_secs(1)
                })
            });
        });
        if let Some(error) = failure {
            return Err(error);
        }
        if samples.len() >= SAMPLES {
            let mut last = samples.split_off(samples.len() - SAMPLES);
            last.sort_unstable();
            let time = (last[(SAMPLES - 1) / 2] + last[SAMPLES / 2]) / 2;
            let spread = (last[SAMPLES - 1] - last[0]).as_secs_f64() / time.as_secs_f64();
            measured.push(Measurement { case, time, spread });
        }
    }
    group.finish();
    Ok(measured)
}

fn main() -> fused_lora::Result<()> {
    let backend: Box<dyn Backend> = select();
    println!("backend: {} ({})", backend.name(), backend.why());
    let mut criterion = Criterion::default()
        .sample_size(SAMPLES)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_millis(1500))
        .without_plots()
        .configure_from_args();
    let mut measured = run(&mut criterion, &*backend, Op::Forward)?;
    measured.extend(run(&mut criterion, &*backend, Op::Backward)?);
    criterion.final_summary();
    table::print(&measured);
    Ok(())
}

/// The GPU where there is one, else the CPU.
#[cfg(feature = "cuda")]
fn select() -> Box<dyn Backend> {
    match cuda::Gpu::new() {
        Ok(gpu) => Box::new(gpu),
        Err(error) => Box::new(cpu::Cpu { why: error.to_string() }),
    }
}

#[cfg(not(feature = "cuda"))]
fn select() -> Box<dyn Backend> {
    Box::new(cpu::Cpu { why: "built without the `cuda` feature".into() })
}
