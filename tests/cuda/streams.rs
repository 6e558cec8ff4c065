//! Streams, threads and contexts beside one another.

use std::sync::Barrier;

use fused_lora::cuda::cudarc::driver::CudaContext;
use fused_lora::cuda::{Kernels, Queue};
use fused_lora::linear::{Backend as _, Gradients};
use fused_lora::{Error, Result, bf16};

use super::common::Backend as _;
use super::common::data::Spec;
use super::common::gpu::{self, Gpu, forward_bits, kernels};
use super::common::layers::{self, Device, Made};
use super::repeated;

/// Two streams with a workspace each overlap; one workspace goes to and fro without a mix-up.
#[test]
fn streams_do_not_disturb_each_other() {
    let Some(kernels) = kernels("streams_do_not_disturb_each_other") else { return };
    let gpus = [Gpu::new(kernels.clone()), Gpu::new(kernels)];
    let host = repeated().forward::<bf16>();
    let mut expected = host.clone();
    gpus[0].forward(&mut expected).expect("forward runs");
    let mut devices = gpus.each_ref().map(|gpu| gpu.upload_forward(&host));
    let shape = devices[0].shape();

    let mut own = gpus.each_ref().map(|gpu| gpu::workspace::<bf16>(gpu, shape));
    for _ in 0..20 {
        for ((gpu, device), workspace) in gpus.iter().zip(&mut devices).zip(&mut own) {
            gpu.kernels.forward(&gpu.stream, device.op(), workspace).expect("forward runs");
        }
    }
    let mut shared = gpus[0].workspace.lock().expect("no panic before");
    for _ in 0..20 {
        for (gpu, device) in gpus.iter().zip(&mut devices) {
            gpu.kernels.forward(&gpu.stream, device.op(), &mut shared).expect("forward runs");
        }
    }
    for (gpu, device) in gpus.iter().zip(&devices) {
        let mut result = host.clone();
        gpu.download_forward(device, &mut result);
        assert!(forward_bits(&result) == forward_bits(&expected), "streams disturb each other");
    }
}

/// The per-thread stream is one handle with a stream behind it in every thread.
#[test]
fn a_workspace_goes_from_thread_to_thread() {
    let Some(kernels) = kernels("a_workspace_goes_from_thread_to_thread") else { return };
    let host = repeated().forward::<bf16>();
    let mut expected = host.clone();
    Gpu::new(kernels.clone()).forward(&mut expected).expect("forward runs");
    let stream = kernels.context().per_thread_stream();
    let gpu = Gpu::on(kernels, stream.clone());
    let mut shared = gpu::workspace::<bf16>(&gpu, gpu.upload_forward(&host).shape());
    for _ in 0..4 {
        let shared = &mut shared;
        let (gpu, host, expected, stream) = (&gpu, &host, &expected, &stream);
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                let mut device = gpu.upload_forward(host);
                for _ in 0..5 {
                    gpu.kernels.forward(stream, device.op(), shared).expect("forward runs");
                }
                let mut result = host.clone();
                gpu.download_forward(&device, &mut result);
                assert!(forward_bits(&result) == forward_bits(expected), "threads disturb each other");
            });
            thread.join().expect("no panic");
        });
    }
}

/// Threads with a context object, kernels and a stream each, all on one GPU.
#[test]
fn threads_with_contexts_of_their_own_do_not_disturb_each_other() {
    let Some(kernels) = kernels("threads_with_contexts_of_their_own_do_not_disturb_each_other") else { return };
    let host = repeated().forward::<bf16>();
    let mut expected = host.clone();
    Gpu::new(kernels).forward(&mut expected).expect("forward runs");
    let barrier = Barrier::new(4);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let context = CudaContext::new(0).expect("a context");
                let gpu = Gpu::new(Kernels::new(&context).expect("the kernels load"));
                let mut device = gpu.upload_forward(&host);
                let mut workspace = gpu::workspace::<bf16>(&gpu, device.shape());
                barrier.wait();
                for _ in 0..50 {
                    gpu.kernels.forward(&gpu.stream, device.op(), &mut workspace).expect("forward runs");
                }
                let mut result = host.clone();
                gpu.download_forward(&device, &mut result);
                assert!(forward_bits(&result) == forward_bits(&expected), "threads disturb each other");
            });
        }
    });
}

/// One queue, and a layer of another size on it in every thread: the shared workspace grows under them.
#[test]
fn threads_share_a_queue() {
    let Some(kernels) = kernels("threads_share_a_queue") else { return };
    let stream = kernels.context().new_stream().expect("a stream");
    let queue = Queue::new(&kernels, &stream).expect("a queue");
    std::thread::scope(|scope| {
        for thread in 0..6 {
            let queue = queue.clone();
            scope.spawn(move || {
                let spec = Spec::new(100 << thread, 72, 64, 8);
                let Made { mut layer, forward, .. } = layers::make::<Queue, bf16>(&queue, &spec, true);
                layer.activate("one").expect("an adapter");
                let x = Device::new(&queue, &forward.x);
                let y = |layer: &fused_lora::linear::LoraLinear<Queue, bf16>| {
                    let y = layer.forward(x.view()).expect("forward");
                    layers::bits(&layers::download(&queue, &y, spec.m * spec.n))
                };
                let first = y(&layer);
                (0..20).for_each(|_| assert!(y(&layer) == first, "threads disturb each other"));
            });
        }
    });
}

/// Forward, backward and a download of a layer in training.
fn step(queue: &Queue, layer: &fused_lora::linear::LoraLinear<Queue, bf16>, spec: &Spec) -> Result<Vec<f32>> {
    let host = spec.forward::<bf16>();
    let x = queue.upload(&layers::compact(&host.x).data)?;
    let (y, pass) = layer.forward_train(fused_lora::Matrix::new(Queue::read(&x), spec.m, spec.k))?;
    let mut da = queue.alloc::<f32>(spec.r * spec.k)?;
    let gradients = Gradients {
        da: Some(fused_lora::MatrixMut::new(Queue::write(&mut da), spec.r, spec.k)),
        ..Gradients::default()
    };
    layer.backward(&pass, fused_lora::Matrix::new(Queue::read(&y), spec.m, spec.n), gradients)?;
    queue.download::<f32>(Queue::read(&da))
}

/// Memory that others hold runs out at one allocation of a step after the other; afterwards the same layer trains on.
#[test]
#[ignore = "takes all memory of the GPU"]
fn out_of_memory_in_the_middle_of_a_step_leaves_everything_usable() {
    let test = "out_of_memory_in_the_middle_of_a_step_leaves_everything_usable";
    let Some(kernels) = kernels(test) else { return };
    let stream = kernels.context().new_stream().expect("a stream");
    let queue = Queue::new(&kernels, &stream).expect("a queue");
    // Every buffer of a step is tens of megabytes.
    let spec = Spec::new(16384, 2048, 1024, 1024);
    let Made { mut layer, .. } = layers::make::<Queue, bf16>(&queue, &spec, true);
    layer.activate("one").expect("an adapter");
    let expected = step(&queue, &layer, &spec).expect("a step");
    let mut refused = 0;
    for left in (0..400usize).step_by(8).map(|mebibytes| mebibytes << 20) {
        stream.synchronize().expect("nothing is left to do");
        let mut taken = Vec::new();
        for bytes in [1usize << 34, 1 << 30, 1 << 26, 1 << 23] {
            while let Ok(block) = queue.alloc::<f32>(bytes / 4) {
                taken.push(block);
            }
        }
        // The last ones are of 8 MiB.
        taken.truncate(taken.len().saturating_sub(left >> 23));
        stream.synchronize().expect("nothing is left to do");
        let result = step(&queue, &layer, &spec);
        drop(taken);
        match result {
            Err(Error::OutOfMemory { bytes }) => {
                assert!(bytes > 0);
                refused += 1;
            }
            Err(other) => unreachable!("{other}"),
            Ok(da) => assert!(da == expected, "a step computes something else"),
        }
        assert!(
            step(&queue, &layer, &spec).expect("a step with memory again") == expected,
            "it computes something else"
        );
    }
    assert!(refused > 3, "memory ran out {refused} times");
}
