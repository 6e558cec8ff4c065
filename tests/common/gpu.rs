//! The GPU of the machine, and the operations on it; or one visible line per test that needs one and finds none.

use std::sync::{Arc, Mutex, OnceLock};

use fused_lora::cuda::cudarc::driver::{CudaSlice, CudaStream};
use fused_lora::cuda::{self, Kernels, Queue, Workspace};
use fused_lora::{Dropout, Element, Error, Gradient, LoraShape, MagnitudeGradient, Matrix, MatrixMut, Result, Seed};

use super::data::POISON;
use super::shared::{SharedBackward, SharedForward};
use super::{Backend, Host, HostBackward, HostDropout, HostForward, HostGradient, skipped};

/// The kernels on GPU 0. Without a GPU the test is over: it says `SKIPPED: no GPU` on a line of its own, or fails when
/// `FUSED_LORA_REQUIRE_GPU` is 1. Any error but that of a missing driver fails in any case.
pub fn kernels(test: &str) -> Option<Kernels> {
    static KERNELS: OnceLock<Result<Kernels>> = OnceLock::new();
    match KERNELS.get_or_init(|| Kernels::on_device(0)) {
        Ok(kernels) => Some(kernels.clone()),
        Err(error @ Error::NoDriver { .. }) => {
            if std::env::var_os("FUSED_LORA_REQUIRE_GPU").is_some_and(|value| value == "1") {
                fail(test, &format!("{error}, and FUSED_LORA_REQUIRE_GPU is set"));
            }
            skipped(test, &format!("no GPU ({error})"));
            None
        }
        Err(error) => fail(test, &error.to_string()),
    }
}

/// Kernels, a stream and a workspace for layers.
pub fn queue(test: &str) -> Option<Queue> {
    let kernels = kernels(test)?;
    let stream = kernels.context().new_stream().expect("a stream");
    Some(Queue::new(&kernels, &stream).expect("a queue"))
}

#[track_caller]
#[allow(clippy::panic)] // how a test fails
fn fail(test: &str, why: &str) -> ! {
    panic!("{test}: {why}")
}

/// The CUDA backend on a stream of its own, with one workspace for all its operations.
pub struct Gpu {
    pub kernels: Kernels,
    pub stream: Arc<CudaStream>,
    pub workspace: Mutex<Workspace>,
}

/// Forward in device memory.
pub struct DeviceForward<T, A = T> {
    pub host: HostForward<T, A>,
    x: CudaSlice<T>,
    w: CudaSlice<T>,
    a: CudaSlice<A>,
    b: CudaSlice<A>,
    bias: Option<CudaSlice<T>>,
    h: Option<CudaSlice<T>>,
    y: CudaSlice<T>,
    seed: CudaSlice<u64>,
    routes: Option<CudaSlice<u64>>,
    gain: Option<CudaSlice<f32>>,
}

/// da, db or dbias in device memory.
enum DeviceGradient<T> {
    Storage(CudaSlice<T>),
    F32(CudaSlice<f32>),
}

/// DoRA's gradient of the magnitude in device memory.
struct DeviceMagnitude<T> {
    y: CudaSlice<T>,
    bias: Option<CudaSlice<T>>,
    magnitude: CudaSlice<f32>,
    dm: CudaSlice<f32>,
}

/// Backward in device memory.
pub struct DeviceBackward<T, A = T> {
    pub host: HostBackward<T, A>,
    dy: CudaSlice<T>,
    w: CudaSlice<T>,
    a: CudaSlice<A>,
    b: CudaSlice<A>,
    x: Option<CudaSlice<T>>,
    h: Option<CudaSlice<T>>,
    dx: Option<CudaSlice<T>>,
    da: Option<DeviceGradient<T>>,
    db: Option<DeviceGradient<T>>,
    dbias: Option<DeviceGradient<T>>,
    magnitude: Option<DeviceMagnitude<T>>,
    seed: CudaSlice<u64>,
    routes: Option<CudaSlice<u64>>,
    gain: Option<CudaSlice<f32>>,
}

impl Gpu {
    pub fn new(kernels: Kernels) -> Self {
        let stream = kernels.context().new_stream().expect("a stream");
        Self::on(kernels, stream)
    }

    pub fn on(kernels: Kernels, stream: Arc<CudaStream>) -> Self {
        let workspace = Mutex::new(Workspace::new(&stream, 0).expect("a workspace"));
        Self { kernels, stream, workspace }
    }

    /// A whole buffer, with what surrounds the matrix. CUDA has no empty allocations: an empty one gets one element.
    fn upload<T: Element>(&self, host: &Host<T>) -> CudaSlice<T> {
        let uploaded = if host.data.is_empty() {
            self.stream.clone_htod(&[T::default()])
        } else {
            self.stream.clone_htod(&host.data)
        };
        uploaded.expect("an upload")
    }

    /// Workspace of projections that share x.
    fn shared_bytes<'a, T: Element, A: Element>(
        &self,
        m: usize,
        a: &Host<A>,
        b: impl Iterator<Item = &'a Host<A>>,
    ) -> usize {
        let of_storage = self.kernels.shared_workspace_bytes(T::DTYPE, m, a.rows);
        if !super::full::is_split::<T, A>() {
            return of_storage;
        }
        let (n, r) = b.fold((0, 0), |(n, r), b| (n + b.rows, r + b.cols.next_multiple_of(8)));
        self.kernels.shared_f32_workspace_bytes(T::DTYPE, LoraShape { m, n, k: a.cols, r }).max(of_storage)
    }

    fn upload_seed(&self, dropout: Option<HostDropout>) -> CudaSlice<u64> {
        self.stream.clone_htod(&dropout.map_or([0; 2], |dropout| dropout.seed)).expect("an upload")
    }

    fn upload_routes(&self, routes: &Option<Vec<u64>>) -> Option<CudaSlice<u64>> {
        let upload = |words: &Vec<u64>| self.stream.clone_htod(if words.is_empty() { &[0][..] } else { words });
        routes.as_ref().map(|words| upload(words).expect("an upload"))
    }

    fn download<T: Element>(&self, device: &CudaSlice<T>, host: &mut Host<T>) {
        let all = self.stream.clone_dtoh(device).expect("a download");
        let elements = host.data.len();
        host.data.copy_from_slice(&all[..elements]);
    }

    pub fn upload_forward<T: Element, A: Element>(&self, host: &HostForward<T, A>) -> DeviceForward<T, A> {
        DeviceForward {
            x: self.upload(&host.x),
            w: self.upload(&host.w),
            a: self.upload(&host.a),
            b: self.upload(&host.b),
            bias: host.bias.as_ref().map(|bias| self.upload(bias)),
            h: host.h.as_ref().map(|h| self.upload(h)),
            y: self.upload(&host.y),
            seed: self.upload_seed(host.dropout),
            routes: self.upload_routes(&host.routes),
            gain: host.gain.as_ref().map(|gain| self.upload(gain)),
            host: host.clone(),
        }
    }

    pub fn upload_backward<T: Element, A: Element>(&self, host: &HostBackward<T, A>) -> DeviceBackward<T, A> {
        let optional = |host: &Option<Host<T>>| host.as_ref().map(|host| self.upload(host));
        let gradient = |host: &Option<HostGradient<T>>| {
            host.as_ref().map(|host| match host {
                HostGradient::Storage(host) => DeviceGradient::Storage(self.upload(host)),
                HostGradient::F32(host) => DeviceGradient::F32(self.upload(host)),
            })
        };
        DeviceBackward {
            dy: self.upload(&host.dy),
            w: self.upload(&host.w),
            a: self.upload(&host.a),
            b: self.upload(&host.b),
            x: optional(&host.x),
            h: optional(&host.h),
            dx: optional(&host.dx),
            da: gradient(&host.da),
            db: gradient(&host.db),
            dbias: gradient(&host.dbias),
            magnitude: host.magnitude.as_ref().map(|host| DeviceMagnitude {
                y: self.upload(&host.y),
                bias: host.bias.as_ref().map(|bias| self.upload(bias)),
                magnitude: self.upload(&host.magnitude),
                dm: self.upload(&host.dm),
            }),
            seed: self.upload_seed(host.dropout),
            routes: self.upload_routes(&host.routes),
            gain: host.gain.as_ref().map(|gain| self.upload(gain)),
            host: host.clone(),
        }
    }

    /// Writes the outputs back into `op`, whole.
    pub fn download_forward<T: Element, A: Element>(&self, device: &DeviceForward<T, A>, op: &mut HostForward<T, A>) {
        self.download(&device.y, &mut op.y);
        if let (Some(device), Some(h)) = (&device.h, &mut op.h) {
            self.download(device, h);
        }
    }

    /// Writes the outputs back into `op`, whole.
    pub fn download_backward<T: Element, A: Element>(
        &self,
        device: &DeviceBackward<T, A>,
        op: &mut HostBackward<T, A>,
    ) {
        if let (Some(device), Some(dx)) = (&device.dx, &mut op.dx) {
            self.download(device, dx);
        }
        if let (Some(device), Some(host)) = (&device.magnitude, &mut op.magnitude) {
            self.download(&device.dm, &mut host.dm);
        }
        let gradients = [(&device.da, &mut op.da), (&device.db, &mut op.db), (&device.dbias, &mut op.dbias)];
        for (device, host) in gradients {
            match (device, host) {
                (Some(DeviceGradient::Storage(device)), Some(HostGradient::Storage(host))) => {
                    self.download(device, host)
                }
                (Some(DeviceGradient::F32(device)), Some(HostGradient::F32(host))) => self.download(device, host),
                _ => {}
            }
        }
    }
}

fn view<'a, T: Element>(
    data: &'a CudaSlice<T>,
    host: &Host<T>,
) -> Matrix<'a, dyn cuda::cudarc::driver::DevicePtr<T> + 'a> {
    cuda::matrix::<T>(data, host.rows, host.cols).with_offset(host.offset).with_row_stride(host.row_stride)
}

fn variant<'a>(
    dropout: Option<HostDropout>,
    state: &'a CudaSlice<u64>,
    (routes, words): (&'a Option<CudaSlice<u64>>, &Option<Vec<u64>>),
    (gain, factors): (&'a Option<CudaSlice<f32>>, &Option<Host<f32>>),
) -> cuda::Variant<'a> {
    let seed = |[seed, offset]: [u64; 2], in_memory: bool| match in_memory {
        true => Seed::Memory(cuda::matrix::<u64>(state, 1, 2)),
        false => Seed::Value { seed, offset },
    };
    let dropout = dropout.map(|HostDropout { p, seed: of, in_memory }| Dropout { p, seed: seed(of, in_memory) });
    let routes = routes.as_ref().zip(words.as_ref()).map(|(on, words)| cuda::matrix::<u64>(on, 1, words.len()));
    let gain = gain.as_ref().zip(factors.as_ref()).map(|(on, host)| view(on, host));
    cuda::Variant { dropout, routes, gain }
}

fn view_mut<'a, T: Element>(
    data: &'a mut CudaSlice<T>,
    host: &Host<T>,
) -> MatrixMut<'a, dyn cuda::cudarc::driver::DevicePtrMut<T> + 'a> {
    cuda::matrix_mut::<T>(data, host.rows, host.cols).with_offset(host.offset).with_row_stride(host.row_stride)
}

impl<T: Element, A: Element> DeviceForward<T, A> {
    pub fn op(&mut self) -> cuda::Forward<'_, T, A> {
        let Self { host, x, w, a, b, bias, h, y, seed, routes, gain } = self;
        cuda::Forward {
            x: view(x, &host.x),
            w: view(w, &host.w),
            a: view(a, &host.a),
            b: view(b, &host.b),
            scale: host.scale,
            bias: bias.as_ref().zip(host.bias.as_ref()).map(|(bias, host)| view(bias, host)),
            h: h.as_mut().zip(host.h.as_ref()).map(|(h, host)| view_mut(h, host)),
            y: view_mut(y, &host.y),
            variant: variant(host.dropout, seed, (routes, &host.routes), (gain, &host.gain)),
        }
    }

    /// Exchanges the buffer of an argument with that of another call.
    pub fn exchange(&mut self, arg: &str, other: &mut Self) {
        let swap = std::mem::swap::<CudaSlice<T>>;
        let optional = std::mem::swap::<Option<CudaSlice<T>>>;
        match arg {
            "x" => swap(&mut self.x, &mut other.x),
            "w" => swap(&mut self.w, &mut other.w),
            "a" => std::mem::swap(&mut self.a, &mut other.a),
            "b" => std::mem::swap(&mut self.b, &mut other.b),
            "bias" => optional(&mut self.bias, &mut other.bias),
            "h" => optional(&mut self.h, &mut other.h),
            "routes" => std::mem::swap(&mut self.routes, &mut other.routes),
            "seed" => std::mem::swap(&mut self.seed, &mut other.seed),
            "gain" => std::mem::swap(&mut self.gain, &mut other.gain),
            _ => swap(&mut self.y, &mut other.y),
        }
    }

    pub fn shape(&self) -> LoraShape {
        LoraShape { m: self.host.x.rows, n: self.host.w.rows, k: self.host.w.cols, r: self.host.a.rows }
    }
}

type GradientView<'a, T> =
    Gradient<'a, dyn cuda::cudarc::driver::DevicePtrMut<T> + 'a, dyn cuda::cudarc::driver::DevicePtrMut<f32> + 'a>;

fn gradient<'a, T: Element>(
    device: &'a mut Option<DeviceGradient<T>>,
    host: &Option<HostGradient<T>>,
) -> Option<GradientView<'a, T>> {
    match (device, host) {
        (Some(DeviceGradient::Storage(device)), Some(HostGradient::Storage(host))) => {
            Some(Gradient::Storage(view_mut(device, host)))
        }
        (Some(DeviceGradient::F32(device)), Some(HostGradient::F32(host))) => {
            Some(Gradient::F32(view_mut(device, host)))
        }
        _ => None,
    }
}

impl<T: Element, A: Element> DeviceBackward<T, A> {
    pub fn op(&mut self) -> cuda::Backward<'_, T, A> {
        let Self { host, dy, w, a, b, x, h, dx, da, db, dbias, magnitude, seed, routes, gain } = self;
        cuda::Backward {
            dy: view(dy, &host.dy),
            w: view(w, &host.w),
            a: view(a, &host.a),
            b: view(b, &host.b),
            scale: host.scale,
            x: x.as_ref().zip(host.x.as_ref()).map(|(x, host)| view(x, host)),
            h: h.as_ref().zip(host.h.as_ref()).map(|(h, host)| view(h, host)),
            dx: dx.as_mut().zip(host.dx.as_ref()).map(|(dx, host)| view_mut(dx, host)),
            da: gradient(da, &host.da),
            db: gradient(db, &host.db),
            dbias: gradient(dbias, &host.dbias),
            dm: magnitude.as_mut().zip(host.magnitude.as_ref()).map(|(on, host)| MagnitudeGradient {
                y: view(&on.y, &host.y),
                bias: on.bias.as_ref().zip(host.bias.as_ref()).map(|(bias, host)| view(bias, host)),
                magnitude: view(&on.magnitude, &host.magnitude),
                dm: view_mut(&mut on.dm, &host.dm),
            }),
            accumulate: host.accumulate,
            variant: variant(host.dropout, seed, (routes, &host.routes), (gain, &host.gain)),
        }
    }

    /// Exchanges the buffer of an argument with that of another call.
    pub fn exchange(&mut self, arg: &str, other: &mut Self) {
        let swap = std::mem::swap::<CudaSlice<T>>;
        let optional = std::mem::swap::<Option<CudaSlice<T>>>;
        match arg {
            "dy" => swap(&mut self.dy, &mut other.dy),
            "w" => swap(&mut self.w, &mut other.w),
            "a" => std::mem::swap(&mut self.a, &mut other.a),
            "b" => std::mem::swap(&mut self.b, &mut other.b),
            "x" => optional(&mut self.x, &mut other.x),
            "h" => optional(&mut self.h, &mut other.h),
            "dx" => optional(&mut self.dx, &mut other.dx),
            "da" => std::mem::swap(&mut self.da, &mut other.da),
            "db" => std::mem::swap(&mut self.db, &mut other.db),
            "routes" => std::mem::swap(&mut self.routes, &mut other.routes),
            "seed" => std::mem::swap(&mut self.seed, &mut other.seed),
            "gain" => std::mem::swap(&mut self.gain, &mut other.gain),
            "dbias" => std::mem::swap(&mut self.dbias, &mut other.dbias),
            _ => {
                let (Some(own), Some(other)) = (&mut self.magnitude, &mut other.magnitude) else { return };
                match arg {
                    "y" => swap(&mut own.y, &mut other.y),
                    "bias" => optional(&mut own.bias, &mut other.bias),
                    "magnitude" => std::mem::swap(&mut own.magnitude, &mut other.magnitude),
                    _ => std::mem::swap(&mut own.dm, &mut other.dm),
                }
            }
        }
    }

    pub fn shape(&self) -> LoraShape {
        LoraShape { m: self.host.dy.rows, n: self.host.w.rows, k: self.host.w.cols, r: self.host.a.rows }
    }
}

impl Backend for Gpu {
    fn name(&self) -> String {
        format!("cuda ({})", self.kernels.device().name)
    }

    fn forward<T: Element, A: Element>(&self, op: &mut HostForward<T, A>) -> Result<()> {
        let mut device = self.upload_forward(op);
        let mut workspace = self.workspace.lock().expect("no other test has failed here");
        let plan = self.kernels.plan_forward(&self.stream, &mut device.op())?;
        workspace.reserve(&self.stream, plan.workspace_bytes())?;
        self.kernels.forward(&self.stream, device.op(), &mut workspace)?;
        self.download_forward(&device, op);
        Ok(())
    }

    fn backward<T: Element, A: Element>(&self, op: &mut HostBackward<T, A>) -> Result<()> {
        let mut device = self.upload_backward(op);
        let mut workspace = self.workspace.lock().expect("no other test has failed here");
        let plan = self.kernels.plan_backward(&self.stream, &mut device.op())?;
        workspace.reserve(&self.stream, plan.workspace_bytes())?;
        self.kernels.backward(&self.stream, device.op(), &mut workspace)?;
        self.download_backward(&device, op);
        Ok(())
    }

    fn forward_shared<T: Element, A: Element>(&self, op: &mut SharedForward<T, A>) -> Result<()> {
        let mut own: Vec<_> = op.own.iter().map(|op| self.upload_forward(op)).collect();
        let (x, a, host) = (self.upload(&op.own[0].x), self.upload(&op.a), &op.own[0]);
        let mut h = op.h.as_ref().map(|h| self.upload(h));
        let state = self.upload_seed(host.dropout);
        let projections = own.iter_mut().map(DeviceForward::op);
        let projections = projections.map(|cuda::Forward { w, b, scale, bias, y, variant, .. }| {
            cuda::ForwardProjection { w, b, scale, bias, gain: variant.gain, y }
        });
        let shared = cuda::ForwardShared {
            x: view(&x, &host.x),
            a: view(&a, &op.a),
            h: h.as_mut().zip(op.h.as_ref()).map(|(h, host)| view_mut(h, host)),
            projections: projections.collect(),
            dropout: variant(host.dropout, &state, (&None, &None), (&None, &None)).dropout,
            routes: None,
        };
        let mut workspace = self.workspace.lock().expect("no other test has failed here");
        workspace
            .reserve(&self.stream, self.shared_bytes::<T, A>(host.x.rows, &op.a, op.own.iter().map(|op| &op.b)))?;
        self.kernels.forward_shared(&self.stream, shared, &mut workspace)?;
        own.iter().zip(&mut op.own).for_each(|(device, op)| self.download(&device.y, &mut op.y));
        if let (Some(device), Some(h)) = (&h, &mut op.h) {
            self.download(device, h);
        }
        Ok(())
    }

    fn backward_shared<T: Element, A: Element>(&self, op: &mut SharedBackward<T, A>) -> Result<()> {
        let host = &op.own[0];
        let mut whole = HostBackward { h: op.h.clone(), dx: op.dx.clone(), da: op.da.clone(), ..host.clone() };
        whole.a = op.a.clone();
        let mut own: Vec<_> = op.own.iter().map(|op| self.upload_backward(op)).collect();
        let mut device = self.upload_backward(&whole);
        let projections = own.iter_mut().map(DeviceBackward::op);
        let projections = projections.map(|cuda::Backward { dy, w, b, scale, db, dbias, dm, variant, .. }| {
            cuda::BackwardProjection { dy, w, b, scale, db, dbias, dm, gain: variant.gain }
        });
        let projections = projections.collect();
        let cuda::Backward { a, x, h, dx, da, accumulate, variant, .. } = device.op();
        let dropout = variant.dropout;
        let shared = cuda::BackwardShared { a, x, h, dx, da, projections, accumulate, dropout, routes: None };
        let mut workspace = self.workspace.lock().expect("no other test has failed here");
        workspace
            .reserve(&self.stream, self.shared_bytes::<T, A>(host.dy.rows, &op.a, op.own.iter().map(|op| &op.b)))?;
        self.kernels.backward_shared(&self.stream, shared, &mut workspace)?;
        self.download_backward(&device, &mut whole);
        (op.dx, op.da) = (whole.dx, whole.da);
        for (device, op) in own.iter().zip(&mut op.own) {
            self.download_backward(device, op);
        }
        Ok(())
    }
}

/// A workspace for everything of that shape.
pub fn workspace<T: Element>(gpu: &Gpu, shape: LoraShape) -> Workspace {
    let bytes = gpu.kernels.workspace_bytes(T::DTYPE, shape).expect("a plan");
    Workspace::new(&gpu.stream, bytes).expect("a workspace")
}

/// The bits of an output, every element of which must have been written.
fn bits<T: Element>(host: &Host<T>) -> Vec<u32> {
    let bits = |(at, value): (usize, &T)| {
        assert!(!host.is_element(at) || value.to_f32() != POISON, "element {at} was not written");
        value.to_f32().to_bits()
    };
    host.data.iter().enumerate().map(bits).collect()
}

/// The bits of what forward wrote: y, h.
pub fn forward_bits<T: Element>(op: &HostForward<T>) -> [Vec<u32>; 2] {
    [bits(&op.y), op.h.as_ref().map(bits).unwrap_or_default()]
}

/// The bits of what backward wrote: dx, da, db, dbias.
pub fn backward_bits<T: Element>(op: &HostBackward<T>) -> [Vec<u32>; 4] {
    let gradient = |gradient: &Option<HostGradient<T>>| match gradient {
        Some(HostGradient::Storage(host)) => bits(host),
        Some(HostGradient::F32(host)) => bits(host),
        None => Vec::new(),
    };
    [op.dx.as_ref().map(bits).unwrap_or_default(), gradient(&op.da), gradient(&op.db), gradient(&op.dbias)]
}
