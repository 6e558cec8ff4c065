//! A call of the error matrix in device memory.
#![allow(dead_code)] // each test binary uses its part

use fused_lora::cuda::{Kernels, Queue};
use fused_lora::linear::Backend;
use fused_lora::{Element, Factors, Gain, Merge, Result, Round};

use super::call::OnBuffers;
use super::common::gpu::Gpu;
use super::common::layers::Device;
use super::common::{Host, HostGradient};

/// A factor of a merge in device memory.
enum Factor<T: Element> {
    Storage(Device<Queue, T>),
    F32(Device<Queue, f32>),
}

fn upload<T: Element>(queue: &Queue, factor: &HostGradient<T>) -> Factor<T> {
    match factor {
        HostGradient::Storage(host) => Factor::Storage(Device::new(queue, host)),
        HostGradient::F32(host) => Factor::F32(Device::new(queue, host)),
    }
}

type Pair<'a, T> = Factors<'a, <Queue as Backend>::Read<T>, <Queue as Backend>::Read<f32>>;

fn factors<'a, T: Element>(a: &'a Factor<T>, b: &'a Factor<T>) -> Pair<'a, T> {
    match (a, b) {
        (Factor::Storage(a), Factor::Storage(b)) => Factors::Storage { a: a.view(), b: b.view() },
        (Factor::F32(a), Factor::F32(b)) => Factors::F32 { a: a.view(), b: b.view() },
        _ => unreachable!("both factors are of one type"),
    }
}

/// Uploads every buffer (that of `elsewhere` by the other queue), runs, and brings the outputs back whole.
pub fn run<T: Element>(gpu: &Gpu, call: &mut OnBuffers<T>, elsewhere: Option<(&str, &Gpu)>) -> Result<()> {
    let queue = Queue::new(&gpu.kernels, &gpu.stream).expect("a queue");
    let other = elsewhere.map(|(arg, gpu)| (arg, Queue::new(&gpu.kernels, &gpu.stream).expect("a queue")));
    let of = |name: &str| match &other {
        Some((arg, other)) if *arg == name => other,
        _ => &queue,
    };
    let mut workspace = gpu.workspace.lock().expect("no other test has failed here");
    match call {
        OnBuffers::Forward(op) => {
            let mut device = gpu.upload_forward(op);
            let mut other = elsewhere.map(|(arg, gpu)| (arg, gpu.upload_forward(op)));
            other.iter_mut().for_each(|(arg, other)| device.exchange(arg, other));
            let result = gpu.kernels.forward(&gpu.stream, device.op(), &mut workspace);
            other.iter_mut().for_each(|(arg, other)| device.exchange(arg, other));
            gpu.download_forward(&device, op);
            result
        }
        OnBuffers::Backward(op) => {
            let mut device = gpu.upload_backward(op);
            let mut other = elsewhere.map(|(arg, gpu)| (arg, gpu.upload_backward(op)));
            other.iter_mut().for_each(|(arg, other)| device.exchange(arg, other));
            let result = gpu.kernels.backward(&gpu.stream, device.op(), &mut workspace);
            other.iter_mut().for_each(|(arg, other)| device.exchange(arg, other));
            gpu.download_backward(&device, op);
            result
        }
        OnBuffers::Merge(op) => {
            let w = op.w.as_ref().map(|w| Device::<Queue, T>::new(of("w"), w));
            let (a, b) = (upload(of("a"), &op.a), upload(of("b"), &op.b));
            let mut merged = Device::new(of("merged"), &op.merged);
            let w = w.as_ref().map(Device::view);
            let gain = op.gain.as_ref().map(|gain| Device::<Queue, f32>::new(of("gain"), gain));
            let gain = gain.as_ref().map(Device::view);
            let merge = Merge { w, factors: factors(&a, &b), scale: op.scale, gain, merged: merged.view_mut() };
            let result = queue.merge::<T>(merge);
            op.merged = merged.download(of("merged"));
            result
        }
        OnBuffers::Round(op) => {
            let (a, b) = (upload(of("a"), &op.a), upload(of("b"), &op.b));
            let (mut to_a, mut to_b) =
                (Device::new(of("rounded_a"), &op.rounded_a), Device::new(of("rounded_b"), &op.rounded_b));
            let (rounded_a, rounded_b) = (to_a.view_mut(), to_b.view_mut());
            let divisor = op.divisor.as_ref().map(|divisor| Device::<Queue, f32>::new(of("divisor"), divisor));
            let divisor = divisor.as_ref().map(Device::view);
            let (factors, scale) = (factors(&a, &b), op.scale);
            let result = queue.round::<T, T>(Round { factors, scale, divisor, rounded_a, rounded_b });
            (op.rounded_a, op.rounded_b) = (to_a.download(of("rounded_a")), to_b.download(of("rounded_b")));
            result
        }
        OnBuffers::Gain(op) => {
            let w = Device::<Queue, T>::new(of("w"), &op.w);
            let (a, b) = (upload(of("a"), &op.a), upload(of("b"), &op.b));
            let vector = |name: &str, host: &Option<Host<f32>>| {
                host.as_ref().map(|host| Device::<Queue, f32>::new(of(name), host))
            };
            let (magnitude, earlier) = (vector("magnitude", &op.magnitude), vector("earlier", &op.earlier));
            let (mut norm, mut gain) = (vector("norm", &op.norm), vector("gain", &op.gain));
            let result = queue.gain::<T>(Gain {
                w: w.view(),
                factors: factors(&a, &b),
                scale: op.scale,
                magnitude: magnitude.as_ref().map(Device::view),
                earlier: earlier.as_ref().map(Device::view),
                norm: norm.as_mut().map(Device::view_mut),
                gain: gain.as_mut().map(Device::view_mut),
            });
            op.norm = norm.map(|norm| norm.download(of("norm")));
            op.gain = gain.map(|gain| gain.download(of("gain")));
            result
        }
    }
}

/// With a workspace that is large enough for every entry.
pub fn gpu(kernels: Kernels) -> Gpu {
    let gpu = Gpu::new(kernels);
    gpu.workspace.lock().expect("nobody else").reserve(&gpu.stream, 1 << 20).expect("a workspace");
    gpu
}
