//! Captures: what they hold, and what may not enter them.

use std::sync::Arc;

use fused_lora::cuda::cudarc::driver::CudaStream;
use fused_lora::cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use fused_lora::cuda::{Kernels, Queue, Workspace};
use fused_lora::linear::{Adapter, Backend as _, Gradients, Scaling};
use fused_lora::{Error, bf16};

use super::common::data::Spec;
use super::common::gpu::{self, Gpu};
use super::common::layers::{self, Device, Made};
use super::stub::Stub;

const MODE: CUstreamCaptureMode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;

/// Kernels and a stream whose buffers carry no events, as graphs need it.
fn for_graphs(stub: &Stub) -> (Kernels, Arc<CudaStream>) {
    let kernels = stub.kernels(0);
    // SAFETY: the tests use each buffer on one stream.
    unsafe { kernels.context().disable_event_tracking() };
    let stream = kernels.context().new_stream().expect("a stream");
    (kernels, stream)
}

/// Runs `what` in a capture, and says how many nodes that gave.
fn captured(stub: &Stub, stream: &Arc<CudaStream>, what: impl FnOnce()) -> i32 {
    stream.begin_capture(MODE).expect("a capture");
    what();
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).expect("the capture ends").expect("a graph");
    stub.clear();
    graph.launch().expect("the graph runs");
    stub.launched()
}

#[test]
fn forward_and_backward_are_a_node_each() {
    for arch in [80, 90] {
        let Some(stub) = Stub::new("forward_and_backward_are_a_node_each", arch) else { return };
        let (kernels, stream) = for_graphs(&stub);
        let gpu = Gpu::on(kernels, stream.clone());
        let spec = Spec::new(300, 264, 136, 24);
        let mut forward = gpu.upload_forward(&spec.forward::<bf16>());
        let mut backward = gpu.upload_backward(&spec.backward::<bf16>());
        let mut workspace = gpu::workspace::<bf16>(&gpu, forward.shape());
        let nodes = captured(&stub, &stream, || {
            gpu.kernels.forward(&stream, forward.op(), &mut workspace).expect("forward is captured");
            gpu.kernels.backward(&stream, backward.op(), &mut workspace).expect("backward is captured");
        });
        assert_eq!(nodes, 2);
        assert_eq!(stub.misuse(), 0);
    }
}

/// Each is refused by name, and the capture goes on without it.
#[test]
fn what_would_allocate_or_copy_in_a_capture_is_refused() {
    let Some(stub) = Stub::new("what_would_allocate_or_copy_in_a_capture_is_refused", 80) else { return };
    let (kernels, stream) = for_graphs(&stub);
    let queue = Queue::new(&kernels, &stream).expect("a queue");
    let spec = Spec::new(40, 24, 16, 4);
    let Made { mut layer, forward, a32, b32 } = layers::make::<Queue, bf16>(&queue, &spec, true);
    layer.activate("one").expect("an adapter");
    let (x, mut y) = (Device::new(&queue, &forward.x), Device::new(&queue, &forward.y));
    let mut buffer = queue.alloc::<bf16>(8).expect("a buffer");
    let mut workspace = Workspace::new(&stream, 0).expect("a workspace");
    let adapter = |scale| Adapter::upload_f32(&queue, 4, Scaling::Fixed(scale), &a32, &b32);
    let another = adapter(2.0).expect("an adapter");

    // Dropping a buffer in a capture would free it each time the graph runs.
    let mut given_back = None;
    let nodes = captured(&stub, &stream, || {
        let capturing = |what| Err(Error::Capturing { what });
        let allocated = || capturing("a buffer is allocated");
        let workspace_allocated = || capturing("a workspace is allocated");
        assert_eq!(queue.alloc::<f32>(8).map(drop), allocated());
        assert_eq!(queue.upload(&[1.0f32; 8]).map(drop), allocated());
        assert_eq!(queue.upload_words(&[1; 8]).map(drop), allocated());
        assert_eq!(
            queue.overwrite(&[bf16::ONE; 8], Queue::write(&mut buffer)),
            capturing("host memory is copied to a buffer")
        );
        assert_eq!(
            queue.download::<bf16>(Queue::read(&buffer)).map(drop),
            capturing("a buffer is copied to host memory")
        );
        assert_eq!(Workspace::new(&stream, 0).map(drop), workspace_allocated());
        assert_eq!(workspace.reserve(&stream, 1 << 22), workspace_allocated());
        assert_eq!(layer.reserve(100_000), workspace_allocated());
        assert_eq!(layer.forward(x.view()).map(drop), allocated());
        assert_eq!(layer.forward_train(x.view()).map(drop), allocated());
        assert_eq!(layer.forward_train_into(x.view(), y.view_mut()).map(drop), allocated());
        // The workspace of the queue is too small for it still.
        assert_eq!(layer.forward_into(x.view(), y.view_mut()), workspace_allocated());
        assert_eq!(layer.merge(), allocated());
        assert_eq!(layer.activate_all(&["one", "other"]), allocated());
        assert_eq!(layer.active(), ["one"]);
        let rejected = layer.add("new", another).expect_err("a refusal");
        assert_eq!(Err::<(), _>(rejected.error), allocated());
        given_back = Some(rejected.value);
        assert_eq!(adapter(1.0).map(drop), allocated());
    });
    assert_eq!(nodes, 0, "something entered the capture");

    drop(given_back);
    // After that everything is as before, and what writes where it is told can be captured.
    layer.reserve(spec.m).expect("a workspace");
    let pass = layer.forward_train_into(x.view(), y.view_mut()).expect("forward");
    let backward = spec.backward::<bf16>();
    let (dy, mut dx) = (Device::new(&queue, &backward.dy), Device::new(&queue, backward.dx.as_ref().expect("dx")));
    let nodes = captured(&stub, &stream, || {
        layer.forward_into(x.view(), y.view_mut()).expect("forward is captured");
        let gradients = Gradients { dx: Some(dx.view_mut()), ..Gradients::default() };
        layer.backward(&pass, dy.view(), gradients).expect("backward is captured");
    });
    assert_eq!(nodes, 2);
    assert_eq!(stub.misuse(), 0);
}

/// A workspace may not come into a capture from a stream that is not in it; the refusal leaves the capture whole.
#[test]
fn a_used_workspace_does_not_slip_into_a_capture() {
    let Some(stub) = Stub::new("a_used_workspace_does_not_slip_into_a_capture", 80) else { return };
    let (kernels, stream) = for_graphs(&stub);
    let gpu = Gpu::on(kernels, stream.clone());
    let other = gpu.kernels.context().new_stream().expect("a stream");
    let mut forward = gpu.upload_forward(&Spec::new(40, 24, 16, 4).forward::<bf16>());
    let mut workspace = gpu::workspace::<bf16>(&gpu, forward.shape());
    gpu.kernels.forward(&stream, forward.op(), &mut workspace).expect("forward");
    let nodes = captured(&stub, &other, || {
        let refused = gpu.kernels.forward(&other, forward.op(), &mut workspace);
        assert!(matches!(refused, Err(Error::Capturing { .. })), "{refused:?}");
    });
    assert_eq!(nodes, 0);
    gpu.kernels.forward(&other, forward.op(), &mut workspace).expect("forward");
}
