//! Threads, and the order in which things go.

use std::sync::{Arc, Barrier};

use fused_lora::cuda::{Kernels, Queue, Workspace, cudarc::driver::CudaContext};
use fused_lora::linear::{Adapter, Gradients, Kept, LoraLinear};
use fused_lora::plan::Plan;
use fused_lora::{Error, bf16, cpu, cuda, emulator, linear};

use super::common::data::Spec;
use super::common::gpu::{self, Gpu};
use super::common::layers::{self, Device, Made};
use super::stub::Stub;

/// Compiles only if what the documentation calls a handle can be shared, and the rest can be sent.
#[test]
fn public_types_are_send_and_sync() {
    fn both<T: Send + Sync>() {}
    both::<Error>();
    both::<Plan>();
    both::<fused_lora::plan::Launch>();
    both::<fused_lora::plan::Device>();
    both::<fused_lora::raw::Forward>();
    both::<fused_lora::raw::Backward>();
    both::<cpu::Cpu>();
    both::<cpu::Forward<'_, f32>>();
    both::<cpu::Backward<'_, bf16>>();
    both::<cpu::Merge<'_, bf16>>();
    both::<cpu::Round<'_, bf16>>();
    both::<emulator::Emulator>();
    both::<emulator::Run>();
    both::<Kernels>();
    both::<Workspace>();
    both::<Queue>();
    both::<LoraLinear<cpu::Cpu, f32>>();
    both::<LoraLinear<emulator::Emulator, bf16>>();
    both::<LoraLinear<Queue, bf16>>();
    both::<Adapter<Queue, bf16>>();
    both::<Kept<Queue, bf16>>();
    both::<linear::Pass<'_, cpu::Cpu, f32>>();
    both::<Gradients<'_, cpu::Cpu, f32>>();
    #[cfg(feature = "candle")]
    both::<fused_lora::candle::LoraLinear>();
    #[cfg(feature = "peft")]
    both::<fused_lora::peft::Adapter>();
}

/// Kernels, workspace, stream, context, a buffer and a queue, in every order of leaving.
#[test]
fn things_may_be_dropped_in_any_order() {
    let Some(stub) = Stub::new("things_may_be_dropped_in_any_order", 90) else { return };
    let before = stub.live();
    for order in 0..720 {
        let context = cuda::context(0).expect("a context");
        let kernels = Kernels::new(&context).expect("the kernels load");
        let stream = context.new_stream().expect("a stream");
        let gpu = Gpu::on(kernels.clone(), stream.clone());
        let mut forward = gpu.upload_forward(&Spec::new(40, 24, 16, 4).forward::<bf16>());
        let mut workspace = gpu::workspace::<bf16>(&gpu, forward.shape());
        gpu.kernels.forward(&stream, forward.op(), &mut workspace).expect("forward");
        let queue = Queue::new(&kernels, &stream).expect("a queue");
        drop(gpu);
        let mut things: Vec<Box<dyn std::any::Any>> = vec![
            Box::new(context),
            Box::new(kernels),
            Box::new(stream),
            Box::new(forward),
            Box::new(workspace),
            Box::new(queue),
        ];
        let mut left = order;
        while !things.is_empty() {
            let (at, rest) = (left % things.len(), left / things.len());
            drop(things.remove(at));
            left = rest;
        }
        assert_eq!((stub.live(), stub.misuse()), (before, 0), "order {order}");
    }
}

/// Layers on clones of one queue, from many threads: one workspace, which grows under them.
#[test]
fn threads_share_a_queue() {
    let Some(stub) = Stub::new("threads_share_a_queue", 80) else { return };
    let before = stub.live();
    {
        let kernels = stub.kernels(0);
        let stream = kernels.context().new_stream().expect("a stream");
        let queue = Queue::new(&kernels, &stream).expect("a queue");
        let barrier = Barrier::new(8);
        stub.clear();
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let (queue, barrier) = (queue.clone(), &barrier);
                scope.spawn(move || {
                    let spec = Spec::new(16 << thread, 24, 16, 4);
                    let Made { mut layer, forward, .. } = layers::make::<Queue, bf16>(&queue, &spec, false);
                    layer.activate("one").expect("an adapter");
                    let x = Device::new(&queue, &forward.x);
                    barrier.wait();
                    for _ in 0..50 {
                        layer.forward(x.view()).expect("forward");
                    }
                });
            }
        });
        assert_eq!(stub.launched(), 8 * 50);
    }
    assert_eq!((stub.live(), stub.misuse()), (before, 0));
}

/// Several contexts, of both devices, each with kernels of its own, in threads at once.
#[test]
fn threads_have_contexts_of_their_own() {
    let Some(stub) = Stub::new("threads_have_contexts_of_their_own", 90) else { return };
    let before = stub.live();
    stub.clear();
    std::thread::scope(|scope| {
        for thread in 0..6 {
            scope.spawn(move || {
                let context = CudaContext::new(thread % 2).expect("a context");
                let gpu = Gpu::new(Kernels::new(&context).expect("the kernels load"));
                let mut forward = gpu.upload_forward(&Spec::new(40, 24, 16, 4).forward::<bf16>());
                let mut workspace = gpu::workspace::<bf16>(&gpu, forward.shape());
                for _ in 0..50 {
                    gpu.kernels.forward(&gpu.stream, forward.op(), &mut workspace).expect("forward");
                }
            });
        }
    });
    assert_eq!((stub.launched(), stub.live(), stub.misuse()), (6 * 50, before, 0));
}

/// One workspace between streams, and between threads on the per-thread stream: every change is ordered by an event.
#[test]
fn a_shared_workspace_is_ordered_between_streams() {
    let Some(stub) = Stub::new("a_shared_workspace_is_ordered_between_streams", 80) else { return };
    let kernels = stub.kernels(0);
    // SAFETY: the stub runs everything at once.
    unsafe { kernels.context().disable_event_tracking() };
    let gpu = Gpu::new(kernels);
    let other = gpu.kernels.context().new_stream().expect("a stream");
    let mut forward = gpu.upload_forward(&Spec::new(40, 24, 16, 4).forward::<bf16>());
    let mut workspace = gpu::workspace::<bf16>(&gpu, forward.shape());
    let waits = |stub: &Stub| stub.calls().iter().filter(|call| *call == "cuStreamWaitEvent").count();
    for (stream, expected) in [(&gpu.stream, 0), (&other, 1), (&other, 0), (&gpu.stream, 1)] {
        stub.clear();
        gpu.kernels.forward(stream, forward.op(), &mut workspace).expect("forward");
        let calls = stub.calls();
        assert_eq!(waits(&stub), expected, "{calls:?}");
        let (wait, launch) =
            (calls.iter().position(|c| c == "cuStreamWaitEvent"), calls.iter().position(|c| c.starts_with("cuLaunch")));
        assert!(wait.is_none() || wait < launch, "the launch comes before the wait: {calls:?}");
    }
    let stream: Arc<_> = gpu.kernels.context().per_thread_stream();
    for _ in 0..3 {
        let (gpu, forward, workspace, stub, stream) = (&gpu, &mut forward, &mut workspace, &stub, &stream);
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                gpu.kernels.context().bind_to_thread().expect("a context");
                stub.clear();
                gpu.kernels.forward(stream, forward.op(), workspace).expect("forward");
                assert_eq!(stub.calls().iter().filter(|call| *call == "cuStreamWaitEvent").count(), 1);
                stub.clear();
                gpu.kernels.forward(stream, forward.op(), workspace).expect("forward");
                assert_eq!(stub.calls().iter().filter(|call| *call == "cuStreamWaitEvent").count(), 0);
            });
            thread.join().expect("no panic");
        });
    }
    drop(workspace);
    assert_eq!(stub.misuse(), 0);
}
