//! The GPU: buffers of a layer, what runs on them, and the time it takes by CUDA events.

#[path = "layer.rs"]
mod layer;

use std::ffi::c_void;
use std::sync::Arc;

use cuda::cudarc::driver::sys::{CUdevice_attribute, CUevent_flags};
use cuda::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DriverError, Profiler};
use fused_lora::plan::{Options, Plan};
use fused_lora::{Dtype, Error, LoraShape, Routing, Slot, bf16, cuda, f16};

use super::arguments::Arguments;
use super::cublaslt::{CublasLt, WORKSPACE_BYTES};
use super::feature::Feature;
use super::measure::{Effort, disagreement, interleaved};
use super::report::{Op, Row, Way};
pub use layer::Layer;

/// Microseconds of a sample, about: long beside what an event costs.
const SAMPLE: f64 = 4_000.0;
/// Of a layer's random data; a prime, so that rows do not repeat one another.
const PERIOD: usize = 1_000_003;
/// Elements in which cuBLASLt's result and ours are compared.
const COMPARED: usize = 1 << 16;

fn failed(call: &'static str) -> impl Fn(DriverError) -> Error {
    move |error| Error::Driver { call, message: error.to_string() }
}

/// A GPU, the kernels loaded on it, and what every product may use beside its operands.
pub struct Gpu {
    kernels: cuda::Kernels,
    stream: Arc<CudaStream>,
    l2_bytes: usize,
    scratch: CudaSlice<u8>,
}

/// Whatever fails in a measurement ends it.
pub type Failure = Box<dyn std::error::Error>;

/// Something that runs on a copy of the layer.
pub type Job<'a> = Box<dyn Fn(&Layer) -> Result<(), Failure> + 'a>;

impl Gpu {
    pub fn new() -> fused_lora::Result<Gpu> {
        let kernels = cuda::Kernels::on_device(0)?;
        let context = kernels.context();
        // SAFETY: everything here happens on one stream, which orders it.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(failed("cuStreamCreate"))?;
        let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE;
        let l2_bytes = context.attribute(attribute).map_err(failed("cuDeviceGetAttribute"))?;
        let scratch = stream.alloc_zeros(WORKSPACE_BYTES).map_err(failed("cuMemAlloc"))?;
        Ok(Gpu { stream, l2_bytes: usize::try_from(l2_bytes).unwrap_or(0), scratch, kernels })
    }

    pub fn name(&self) -> String {
        self.kernels.device().name.clone()
    }

    fn address<T>(&self, slice: &CudaSlice<T>) -> u64 {
        slice.device_ptr(&self.stream).0
    }

    /// Copies of a layer, and the memory they lie in: at least two, between whose turns more than L2 holds twice goes through it;
    /// one when it may stay there.
    pub fn layers(
        &self,
        dtype: Dtype,
        hot: bool,
        feature: Feature,
        shape: LoraShape,
    ) -> fused_lora::Result<(Vec<Layer>, Vec<CudaSlice<u16>>)> {
        let LoraShape { m, n, k, r } = shape;
        // Ranks of a and h, over all projections, and of b, which has one projection's for each row.
        let (ranks, own) = (r * feature.adapters * feature.projections, r * feature.adapters);
        // Elements of 16 bits that one of a and b takes; bits of two are some number of f32.
        let width = if feature.full { 2 } else { 1 };
        let bytes = 2 * (m * k + n * k + m * n);
        let copies = if hot { 1 } else { 2 * self.l2_bytes / bytes + 2 };
        let mut memory = Vec::new();
        let mut allocate = |elements: usize, seed: u32| {
            let data = random(elements, seed, dtype);
            memory.push(self.stream.clone_htod(&data).map_err(failed("cuMemAlloc or cuMemcpyHtoD"))?);
            Ok::<u64, Error>(memory.last().map_or(0, |slice| self.address(slice)))
        };
        let mut layers = Vec::new();
        for copy in 0..copies as u32 {
            let mut at = |elements, number: u32| allocate(elements, 16 * copy + number);
            layers.push(Layer {
                x: at(m * k, 1)?,
                w: at(n * k, 2)?,
                a: at(width * ranks * k, 3)?,
                b: at(width * n * own, 4)?,
                h: at(m * feature.columns_of_h(own), 5)?,
                dh: at(m * ranks, 6)?,
                y: at(m * n, 7)?,
                dy: at(m * n, 8)?,
                dx: at(m * k, 9)?,
                // f32: two elements of 16 bits each.
                da: at(2 * ranks * k, 10)?,
                db: at(2 * n * own, 11)?,
                gain: at(2 * n, 12)?,
                magnitude: at(2 * n, 13)?,
                dm: at(2 * n, 14)?,
                feature,
                seed: 1,
            });
        }
        Ok((layers, memory))
    }

    /// Runs `job` `count` times over the copies in turn; microseconds by CUDA events. One run goes ahead of the first event:
    /// the GPU is at work while the host queues the rest.
    pub fn time(&self, job: &Job<'_>, layers: &[Layer], count: usize) -> Result<f64, Failure> {
        let event = || self.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).map_err(failed("cuEventRecord"));
        let mut turns = layers.iter().cycle();
        let mut next = || turns.next().map_or(Ok(()), job);
        next()?;
        let start = event()?;
        for _ in 0..count {
            next()?;
        }
        let end = event()?;
        Ok(f64::from(start.elapsed_ms(&end).map_err(failed("cuEventElapsedTime"))?) * 1e3)
    }

    /// An operation as products of cuBLASLt, each with the fastest of the algorithms that its heuristic offers.
    pub fn with_rival<'a>(
        &'a self,
        rival: &'a CublasLt,
        (op, dtype, shape): (Op, Dtype, LoraShape),
        layers: &[Layer],
    ) -> Result<Job<'a>, Failure> {
        let stream = self.stream.cu_stream().cast::<c_void>();
        let scratch = self.address(&self.scratch);
        let mut chosen = Vec::new();
        let products = layers.first().map(|layer| layer.products(op, dtype, shape)).unwrap_or_default();
        for (index, (product, _)) in products.into_iter().enumerate() {
            let mut best = None;
            for candidate in rival.candidates(product)? {
                let job: Job<'_> = Box::new(|layer| {
                    let (_, operands) = layer.products(op, dtype, shape)[index];
                    // SAFETY: as below.
                    Ok(unsafe { rival.run(&candidate, operands, scratch, stream) }?)
                });
                // A candidate that does not run is none.
                let Ok(time) = self.time(&job, layers, 10) else { continue };
                drop(job);
                if best.as_ref().is_none_or(|(least, _)| time < *least) {
                    best = Some((time, candidate));
                }
            }
            chosen.push(best.ok_or_else(|| format!("no algorithm of cuBLASLt runs for {product:?}"))?.1);
        }
        Ok(Box::new(move |layer| {
            for (prepared, (_, operands)) in chosen.iter().zip(layer.products(op, dtype, shape)) {
                // SAFETY: the operands are matrices of a `Layer`, allocated with the product's extents for as long as anything
                // is measured, the scratch is of the size that algorithms may use, and all is on this one stream of the context
                // that was made current when the memory was allocated.
                unsafe { rival.run(prepared, operands, scratch, stream) }?;
            }
            Ok(())
        }))
    }

    /// An operation by this crate, with the planner's choices made by `options`; its plan, too.
    pub fn fused(
        &self,
        options: Options,
        (op, dtype, shape): (Op, Dtype, LoraShape),
        layer: &Layer,
    ) -> Result<(Job<'static>, Plan), Failure> {
        let kernels = self.kernels.with_plan_options(options);
        let (device, options) = (kernels.device(), kernels.plan_options());
        let table = self.table(layer.feature, shape)?;
        let routes = table.as_ref().map(|table| self.address(table));
        let plan = match op {
            Op::Forward => Plan::forward_shared_with(&layer.forward(dtype, shape, routes)?, device, options),
            Op::Backward => Plan::backward_shared_with(&layer.backward(dtype, shape, routes)?, device, options),
        }?;
        let bytes = plan.workspace_bytes();
        let workspace = self.stream.alloc_zeros::<u8>(bytes).map_err(failed("cuMemAlloc"))?;
        let stream = self.stream.clone();
        let job = move |layer: &Layer| {
            let (address, on) = (workspace.device_ptr(&stream).0, stream.cu_stream().cast::<c_void>());
            let routes = table.as_ref().map(|table| table.device_ptr(&stream).0);
            // SAFETY: the matrices are those of a `Layer`, allocated with the extents of the shape for as long as anything is
            // measured; the workspace was zeroed when it was allocated, and only these launches, on one stream, use it.
            unsafe {
                match op {
                    Op::Forward => {
                        kernels.forward_shared_raw(&layer.forward(dtype, shape, routes)?, address, bytes, on)
                    }
                    Op::Backward => {
                        kernels.backward_shared_raw(&layer.backward(dtype, shape, routes)?, address, bytes, on)
                    }
                }
            }?;
            Ok(())
        };
        Ok((Box::new(job), plan))
    }

    /// Runs of equal length through each of several adapters of the shape's rank, in device memory.
    fn table(&self, feature: Feature, LoraShape { m, r, .. }: LoraShape) -> Result<Option<CudaSlice<u64>>, Failure> {
        if feature.adapters == 1 || r == 0 {
            return Ok(None);
        }
        let slots: Vec<_> = (0..feature.adapters).map(|at| Slot { first_rank: at * r, ranks: r, scale: 1.0 }).collect();
        let ids: Vec<_> = (0..m).map(|row| Some(row * feature.adapters / m)).collect();
        let routing = Routing::new(&slots, &ids)?;
        Ok(Some(self.stream.clone_htod(routing.words()).map_err(failed("cuMemAlloc or cuMemcpyHtoD"))?))
    }

    /// Launches every operation of this crate once, at one number of tokens and layer, for a profiler: one row per launch, in
    /// their order, without times.
    pub fn once(&self, arguments: &Arguments, (m, n, k): (usize, usize, usize)) -> Result<Vec<Row>, Failure> {
        let shape = |r| LoraShape { m, n, k, r };
        let most = arguments.ranks.iter().copied().max().unwrap_or(0).max(1);
        let (layers, _memory) = self.layers(arguments.dtype, true, arguments.feature, shape(most))?;
        let layer = layers.first().ok_or("no copy of the layer")?;
        if arguments.feature.dropout > 0.0 {
            self.drops(arguments, layer, shape(most))?;
        }
        // What follows is what a profiler that was told to wait for it looks at.
        let _profiled = Profiler::new().map_err(failed("cuProfilerStart"))?;
        let mut rows = Vec::new();
        for &op in &arguments.ops {
            for r in [0].into_iter().chain(arguments.ranks.iter().copied()) {
                let what = (op, arguments.dtype, shape(r));
                let (job, plan) = self.fused(arguments.options, what, layer)?;
                job(layer)?;
                self.stream.synchronize().map_err(failed("cuStreamSynchronize"))?;
                rows.push(row(what, arguments.feature, &plan)?);
            }
        }
        Ok(rows)
    }

    /// Times every way of every operation at one number of tokens and layer; whether the clocks had settled.
    pub fn measure(
        &self,
        arguments: &Arguments,
        rival: Option<&CublasLt>,
        (m, n, k): (usize, usize, usize),
    ) -> Result<(Vec<Row>, bool), Failure> {
        let dtype = arguments.dtype;
        let shape = |r| LoraShape { m, n, k, r };
        let most = arguments.ranks.iter().copied().max().unwrap_or(0).max(1);
        let (layers, _memory) = self.layers(dtype, arguments.hot, arguments.feature, shape(most))?;
        let first = layers.first().ok_or("no copy of the layer")?;
        if arguments.feature.dropout > 0.0 {
            self.drops(arguments, first, shape(most))?;
        }
        let (mut rows, mut jobs) = (Vec::new(), Vec::new());
        for &op in &arguments.ops {
            for r in [0].into_iter().chain(arguments.ranks.iter().copied()) {
                let what = (op, dtype, shape(r));
                let (job, plan) = self.fused(arguments.options, what, first)?;
                if let Some(rival) = rival.filter(|_| r == 0 || arguments.unfused && arguments.feature.is_none()) {
                    let way = if r == 0 { Way::Plain } else { Way::Unfused };
                    rows.push(Row {
                        way,
                        what: format!("cuBLASLt {}", rival.version),
                        predicted: None,
                        ..row(what, arguments.feature, &plan)?
                    });
                    jobs.push(self.with_rival(rival, what, &layers)?);
                    if r == 0 {
                        self.compare(op, [&jobs[jobs.len() - 1], &job], first, shape(r), dtype)?;
                    }
                }
                rows.push(row(what, arguments.feature, &plan)?);
                jobs.push(job);
            }
        }
        let counts: Vec<usize> = jobs
            .iter()
            .map(|job| Ok((SAMPLE / (self.time(job, &layers, 3)? / 3.0)).ceil().clamp(1.0, 1000.0) as usize))
            .collect::<Result<_, Failure>>()?;
        let seconds = if arguments.quick { 0.2 } else { 3.0 };
        let effort = Effort { rounds: arguments.rounds, warm_up: seconds * 1e6, limit: 4.0 * seconds * 1e6 };
        let measured = interleaved(jobs.len(), effort, |way| -> Result<(f64, f64), Failure> {
            let (count, time) = (counts[way] as f64, self.time(&jobs[way], &layers, counts[way])?);
            Ok((time / count, time * (count + 1.0) / count))
        })?;
        for (row, samples) in rows.iter_mut().zip(measured.samples) {
            row.samples = samples;
        }
        Ok((rows, measured.settled))
    }

    /// With another seed other elements must be dropped: what is timed as dropout has it.
    fn drops(&self, arguments: &Arguments, layer: &Layer, shape: LoraShape) -> Result<(), Failure> {
        let h = |seed| -> Result<Vec<u16>, Failure> {
            let layer = Layer { seed, ..*layer };
            let (job, _) = self.fused(arguments.options, (Op::Forward, arguments.dtype, shape), &layer)?;
            job(&layer)?;
            self.stream.synchronize().map_err(failed("cuStreamSynchronize"))?;
            let mut bits = vec![0_u16; (shape.m * shape.r).min(COMPARED)];
            // SAFETY: h holds M · R elements of 16 bits, and nothing writes it any more.
            unsafe { cuda::cudarc::driver::result::memcpy_dtoh_sync(&mut bits, layer.h) }
                .map_err(failed("cuMemcpyDtoH"))?;
            Ok(bits)
        };
        if h(1)? == h(2)? {
            return Err("h is the same with two seeds: nothing is dropped".into());
        }
        Ok(())
    }

    /// cuBLASLt and this crate must have multiplied the same matrices.
    fn compare(
        &self,
        op: Op,
        [theirs, ours]: [&Job<'_>; 2],
        layer: &Layer,
        LoraShape { m, n, k, .. }: LoraShape,
        dtype: Dtype,
    ) -> Result<(), Failure> {
        let (out, count, depth) = match op {
            Op::Forward => (layer.y, m * n, k),
            Op::Backward => (layer.dx, m * k, n),
        };
        let result = |job: &Job<'_>| -> Result<Vec<f32>, Failure> {
            job(layer)?;
            self.stream.synchronize().map_err(failed("cuStreamSynchronize"))?;
            let mut bits = vec![0_u16; count.min(COMPARED)];
            // SAFETY: the output holds `count` elements of 16 bits, and nothing writes it any more.
            unsafe { cuda::cudarc::driver::result::memcpy_dtoh_sync(&mut bits, out) }
                .map_err(failed("cuMemcpyDtoH"))?;
            let widen = |bits: u16| match dtype {
                Dtype::F16 => f16::from_bits(bits).to_f32(),
                _ => bf16::from_bits(bits).to_f32(),
            };
            Ok(bits.into_iter().map(widen).collect())
        };
        let (theirs, ours) = (result(theirs)?, result(ours)?);
        match disagreement(&ours, &theirs, depth) {
            None => Ok(()),
            Some(at) => Err(format!(
                "{} of M={m} N={n} K={k}: element {at} is {} by this crate and {} by cuBLASLt",
                op.name(),
                ours[at],
                theirs[at]
            )
            .into()),
        }
    }
}

/// The row of an operation by this crate, not yet timed.
fn row((op, dtype, shape): (Op, Dtype, LoraShape), feature: Feature, plan: &Plan) -> Result<Row, Failure> {
    let floor = plan.floor();
    Ok(Row {
        op,
        way: Way::Fused,
        dtype,
        shape,
        feature: if shape.r == 0 { feature.without_adapter() } else { feature },
        flops: floor.flops,
        floor: floor.arithmetic_microseconds().zip(floor.memory_microseconds()).map(|(a, b)| a.max(b)),
        floor_bytes: floor.bytes,
        predicted: plan.predicted_microseconds(),
        what: plan.launch(1 << 62, plan.workspace_bytes())?.kernel.to_owned(),
        samples: Vec::new(),
    })
}

/// Values in [−1, 1), as bits: zeros would flatter a GPU under a power limit.
fn random(elements: usize, seed: u32, dtype: Dtype) -> Vec<u16> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        let value = state as f32 / (1_u32 << 31) as f32 - 1.0;
        if dtype == Dtype::F16 { f16::from_f32(value).to_bits() } else { bf16::from_f32(value).to_bits() }
    };
    let period: Vec<u16> = (0..elements.min(PERIOD)).map(|_| next()).collect();
    period.iter().copied().cycle().take(elements).collect()
}
