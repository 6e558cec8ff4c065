//! What an operation asks of the driver.

use std::collections::BTreeSet;

use fused_lora::cuda::{Queue, Workspace};
use fused_lora::linear::Gradients;
use fused_lora::{Element, bf16, f16};

use super::common::HostDropout;
use super::common::data::{Placement, Routes, Spec};
use super::common::gpu::{self, Gpu};
use super::common::layers::{self, Device, Made};
use super::stub::Stub;

/// What an operation may call beside its launch: nothing of this allocates, frees, copies or waits on the host. Events and waits
/// are cudarc's, which orders the streams of buffers.
const HARMLESS: [&str; 6] = [
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuStreamIsCapturing",
    "cuTensorMapEncodeTiled",
    "cuEventRecord",
    "cuStreamWaitEvent",
];

/// One launch, and nothing that is not harmless.
#[track_caller]
fn one_launch(stub: &Stub, what: &str) {
    let calls = stub.calls();
    let launches = calls.iter().filter(|call| call.starts_with("cuLaunchKernel")).count();
    assert_eq!(launches, 1, "{what}: {calls:?}");
    let others: BTreeSet<_> = calls.iter().filter(|call| !call.starts_with("cuLaunchKernel")).collect();
    let more: Vec<_> = others.iter().filter(|call| !HARMLESS.contains(&call.as_str())).collect();
    assert!(more.is_empty(), "{what} called {more:?}");
}

fn operations<T: Element>(stub: &Stub, spec: &Spec) {
    let gpu = Gpu::new(stub.kernels(0));
    let (mut forward, mut backward) =
        (gpu.upload_forward(&spec.forward::<T>()), gpu.upload_backward(&spec.backward::<T>()));
    let mut workspace = gpu::workspace::<T>(&gpu, forward.shape());
    // On another stream as well: the workspace waits for the first, on the device.
    for stream in [gpu.stream.clone(), gpu.kernels.context().new_stream().expect("a stream")] {
        stub.clear();
        gpu.kernels.forward(&stream, forward.op(), &mut workspace).expect("forward is launched");
        one_launch(stub, &format!("forward of {spec:?}"));
        stub.clear();
        gpu.kernels.backward(&stream, backward.op(), &mut workspace).expect("backward is launched");
        one_launch(stub, &format!("backward of {spec:?}"));
    }
}

fn specs() -> [Spec; 5] {
    let dropout = Some(HostDropout { p: 0.1, seed: [1, 2], in_memory: true });
    [
        Spec::new(5, 7, 11, 3),
        Spec { placement: Placement::Aligned, ..Spec::new(300, 264, 136, 24) },
        Spec { placement: Placement::Strided, keep_h: false, bias: false, ..Spec::new(1500, 64, 64, 8) },
        Spec { r: 0, accumulate: true, ..Spec::new(64, 64, 64, 0) },
        Spec { dropout, routes: Some(Routes::Mixed(3)), ..Spec::new(130, 72, 64, 24) },
    ]
}

#[test]
fn one_launch_forward_and_one_backward_without_allocation_or_synchronisation() {
    for arch in [80, 90] {
        let test = "one_launch_forward_and_one_backward_without_allocation_or_synchronisation";
        let Some(stub) = Stub::new(test, arch) else { return };
        for spec in specs() {
            operations::<f16>(&stub, &spec);
            operations::<bf16>(&stub, &spec);
        }
        assert_eq!(stub.misuse(), 0);
    }
}

/// Of a layer, once its workspace is reserved, and where outputs are the caller's; h is all that is allocated in training.
#[test]
fn a_layer_adds_nothing_to_the_launches() {
    for arch in [80, 90] {
        let Some(stub) = Stub::new("a_layer_adds_nothing_to_the_launches", arch) else { return };
        for spec in specs() {
            let kernels = stub.kernels(0);
            let stream = kernels.context().new_stream().expect("a stream");
            let queue = Queue::new(&kernels, &stream).expect("a queue");
            let Made { mut layer, forward, .. } = layers::make::<Queue, bf16>(&queue, &spec, true);
            layer.activate("one").expect("an adapter");
            layer.reserve(spec.m).expect("a workspace");
            let (x, mut y) = (Device::new(&queue, &forward.x), Device::new(&queue, &forward.y));
            stub.clear();
            layer.forward_into(x.view(), y.view_mut()).expect("forward is launched");
            one_launch(&stub, &format!("forward_into of {spec:?}"));
            let pass = layer.forward_train_into(x.view(), y.view_mut()).expect("forward is launched");
            let backward = spec.backward::<bf16>();
            let dy = Device::new(&queue, &backward.dy);
            let mut dx = Device::new(&queue, &layers::compact(&backward.dx.expect("dx")));
            stub.clear();
            let gradients = Gradients { dx: Some(dx.view_mut()), ..Gradients::default() };
            layer.backward(&pass, dy.view(), gradients).expect("backward is launched");
            one_launch(&stub, &format!("backward of {spec:?}"));
        }
    }
}

/// The size that a workspace must have is known before there is any buffer, and is all that operations of the shape take.
#[test]
fn the_size_of_a_workspace_is_known_before() {
    for arch in [80, 90] {
        let Some(stub) = Stub::new("the_size_of_a_workspace_is_known_before", arch) else { return };
        let kernels = stub.kernels(0);
        for spec in specs() {
            let shape = fused_lora::LoraShape { m: spec.m, n: spec.n, k: spec.k, r: spec.r };
            let bytes = kernels.workspace_bytes(fused_lora::Dtype::Bf16, shape).expect("a size");
            let gpu = Gpu::new(kernels.clone());
            let mut workspace = Workspace::new(&gpu.stream, bytes).expect("a workspace");
            assert_eq!(workspace.bytes(), bytes);
            let mut forward = gpu.upload_forward(&spec.forward::<bf16>());
            let mut backward = gpu.upload_backward(&spec.backward::<bf16>());
            gpu.kernels.forward(&gpu.stream, forward.op(), &mut workspace).expect("forward is launched");
            gpu.kernels.backward(&gpu.stream, backward.op(), &mut workspace).expect("backward is launched");
        }
    }
}

/// Launches go to the stream that the caller names, and to no other.
#[test]
fn everything_is_on_the_stream_of_the_caller() {
    let Some(stub) = Stub::new("everything_is_on_the_stream_of_the_caller", 90) else { return };
    let spec = specs()[1];
    let gpu = Gpu::new(stub.kernels(0));
    // SAFETY: each buffer is used on one stream.
    unsafe { gpu.kernels.context().disable_event_tracking() };
    let mut forward = gpu.upload_forward(&spec.forward::<f16>());
    let mut workspace = gpu::workspace::<f16>(&gpu, forward.shape());
    use fused_lora::cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
    let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    gpu.stream.begin_capture(mode).expect("a capture");
    stub.clear();
    gpu.kernels.forward(&gpu.stream, forward.op(), &mut workspace).expect("forward is captured");
    assert_eq!(stub.launched(), 0, "something ran beside the capture");
    let graph = gpu.stream.end_capture(CUgraphInstantiate_flags(0)).expect("the capture ends").expect("a graph");
    graph.launch().expect("the graph runs");
    assert_eq!(stub.launched(), 1, "the capture holds something else");
}
