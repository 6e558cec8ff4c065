//! Times forward, backward and both (a training step) against the plain products of the same run.
//!
//! `cargo bench` measures; `cargo bench -- --test` runs every case once; `cargo bench -- forward` runs what matches. The
//! figure of merit is the LoRA tax: time with the adapter over time of the plain product, less one. Each sample of a case is taken
//! beside one of its plain product, and the tax is the median of their ratios, so that drifting clocks cancel.
//! `FUSED_LORA_BENCH_JSON=FILE` writes what was measured to a file as well.

#[cfg(feature = "candle")]
mod candle;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[path = "../feature.rs"]
mod feature;
#[path = "../origin.rs"]
mod origin;
mod report;
/// What the example `tax` measures with, which has no criterion and times everything in turn.
#[cfg(feature = "cuda")]
#[allow(dead_code)] // its tables are its own
#[path = "../tax"]
mod tax {
    use crate::feature;

    pub mod arguments;
    pub mod cublaslt;
    pub mod gpu;
    pub mod measure;
    pub mod report;
}

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use feature::Feature;
use fused_lora::{Dtype, LoraShape};

/// Samples per case; the smallest number criterion accepts, so that the last ones recorded are always measurements.
const SAMPLES: usize = 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Forward,
    Backward,
    /// Forward, then backward.
    Step,
}

impl Op {
    const ALL: [Op; 3] = [Op::Forward, Op::Backward, Op::Step];

    fn name(self) -> &'static str {
        match self {
            Op::Forward => "forward",
            Op::Backward => "backward",
            Op::Step => "step",
        }
    }
}

/// Who computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// This crate. With R = 0 the plain product.
    Fused,
    /// The plain product by cuBLASLt.
    #[cfg(feature = "cuda")]
    Cublaslt,
    /// Separate products by cuBLASLt.
    #[cfg(feature = "cuda")]
    Unfused,
    /// candle's products and sums, one after the other, on the CPU.
    #[cfg(feature = "candle")]
    Candle,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Way::Fused => "fused",
            #[cfg(feature = "cuda")]
            Way::Cublaslt => "cublaslt",
            #[cfg(feature = "cuda")]
            Way::Unfused => "unfused",
            #[cfg(feature = "candle")]
            Way::Candle => "candle",
        }
    }
}

/// One thing to time. Of several projections n is that of all, of several adapters r that of each.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Case {
    op: Op,
    way: Way,
    dtype: Dtype,
    shape: LoraShape,
    feature: Feature,
}

impl Case {
    /// Floating-point operations. Backward computes dx, da and db; with R = 0 dx alone, the plain product.
    fn flops(&self) -> u64 {
        let LoraShape { m, n, k, r } = self.shape;
        let (forward, backward) = (m * n * k + m * r * (k + n), m * n * k + 2 * m * r * (k + n));
        2 * match self.op {
            Op::Forward => forward as u64,
            Op::Backward => backward as u64,
            Op::Step => (forward + backward) as u64,
        }
    }
}

/// Whatever fails ends the run.
type Failure = Box<dyn std::error::Error>;

/// Runs a prepared case this many times; returns how long that took.
type Timed = Box<dyn FnMut(u64) -> Result<Duration, Failure>>;

/// Something that can prepare a case: allocates and fills its buffers, runs it once.
trait Backend {
    /// In the names of the groups.
    fn name(&self) -> &'static str;
    /// Why this backend runs.
    fn why(&self) -> String;
    /// Cases in order.
    fn cases(&self, op: Op) -> Vec<Case>;
    fn prepare(&self, case: &Case) -> Result<Timed, Failure>;
    /// Whose plain products are the baseline.
    fn baseline(&self) -> Way;

    /// The plain product that a case is held against; the case itself when it is one.
    fn plain(&self, case: &Case) -> Case {
        let feature = case.feature.without_adapter();
        Case { way: self.baseline(), shape: LoraShape { r: 0, ..case.shape }, feature, ..*case }
    }
}

/// Every shape in every type, with every rank, in every way.
fn cases(op: Op, dtypes: &[Dtype], shapes: &[(usize, usize, usize)], ranks: &[usize], ways: &[Way]) -> Vec<Case> {
    let mut cases = Vec::new();
    for &(m, n, k) in shapes {
        for &dtype in dtypes {
            for &r in ranks {
                let (shape, feature) = (LoraShape { m, n, k, r }, Feature::default());
                cases.extend(ways.iter().map(|&way| Case { op, way, dtype, shape, feature }));
            }
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
    plain: Case,
    /// Time of one run, of each sample.
    times: Vec<Duration>,
    /// Time over that of the plain product beside it, of each sample; empty for a plain product.
    ratios: Vec<f64>,
}

/// A case and the plain product it is held against, both prepared.
struct Pair {
    timed: Timed,
    plain: Option<Timed>,
    times: Vec<Duration>,
    ratios: Vec<f64>,
}

impl Pair {
    fn prepare(backend: &dyn Backend, case: &Case) -> Result<Self, Failure> {
        let plain = backend.plain(case);
        let plain = (*case != plain).then(|| backend.prepare(&plain)).transpose()?;
        Ok(Self { timed: backend.prepare(case)?, plain, times: Vec::new(), ratios: Vec::new() })
    }

    /// One sample of `iterations` runs, and as many of the plain product.
    fn sample(&mut self, iterations: u64) -> Result<Duration, Failure> {
        let plain = self.plain.as_mut().map(|plain| plain(iterations)).transpose()?;
        let time = (self.timed)(iterations)?;
        self.times.push(time.div_f64(iterations as f64));
        self.ratios.extend(plain.map(|plain| time.as_secs_f64() / plain.as_secs_f64()));
        Ok(time)
    }
}

/// Times all cases of an operation in one criterion group; returns those that were measured.
fn run(criterion: &mut Criterion, backend: &dyn Backend, op: Op) -> Result<Vec<Measurement>, Failure> {
    let mut measured = Vec::new();
    let mut failure: Option<Failure> = None;
    let mut group = criterion.benchmark_group(format!("{}/{}", op.name(), backend.name()));
    group.sampling_mode(SamplingMode::Flat);
    for case in backend.cases(op) {
        let LoraShape { m, n, k, r } = case.shape;
        let with = if case.feature.is_none() { String::new() } else { format!("/{}", case.feature) };
        let id = format!("{m}x{n}x{k}/{}/r{r}/{}{with}", case.dtype.name(), case.way.name());
        group.throughput(Throughput::Elements(case.flops()));
        // Prepared when criterion asks for it: a case that the filter leaves out costs nothing.
        let mut pair = None;
        let mut sample = |iterations: u64| match &mut pair {
            Some(pair) => Pair::sample(pair, iterations),
            None => pair.insert(Pair::prepare(backend, &case)?).sample(iterations),
        };
        group.bench_function(BenchmarkId::from_parameter(id), |bencher| {
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
        if let Some(Pair { mut times, mut ratios, .. }) = pair.filter(|pair| pair.times.len() >= SAMPLES) {
            let warm = times.len() - SAMPLES; // what came before were criterion's warm-up runs
            ratios.drain(..warm.min(ratios.len()));
            measured.push(Measurement { case, plain: backend.plain(&case), times: times.split_off(warm), ratios });
        }
    }
    group.finish();
    Ok(measured)
}

fn main() -> Result<(), Failure> {
    let backend: Box<dyn Backend> = select();
    println!("backend: {} ({})", backend.name(), backend.why());
    let mut criterion = Criterion::default()
        .sample_size(SAMPLES)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_millis(1500))
        .without_plots()
        .configure_from_args();
    let mut measured = Vec::new();
    for op in Op::ALL {
        measured.extend(run(&mut criterion, &*backend, op)?);
    }
    criterion.final_summary();
    print!("{}", report::table(&measured));
    if let Some(path) = std::env::var_os("FUSED_LORA_BENCH_JSON") {
        std::fs::write(&path, format!("{:#}\n", report::json(&*backend, &measured)))?;
        println!("written: {}", path.display());
    }
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
