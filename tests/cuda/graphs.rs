//! Operations in CUDA graphs.

use std::sync::Arc;

use fused_lora::cuda::cudarc::driver::CudaStream;
use fused_lora::cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode, cuGraphGetNodes};
use fused_lora::cuda::{self, Kernels, Queue, Workspace};
use fused_lora::linear::Backend as _;
use fused_lora::{Error, bf16, f16};

use super::common::Backend as _;
use super::common::gpu::{self, Gpu, backward_bits, forward_bits, kernels};
use super::repeated;

/// A context of its own whose buffers carry no events, as graphs need it, and a stream in it.
fn for_graphs() -> (Kernels, Arc<CudaStream>) {
    let context = cuda::context(0).expect("there is a GPU");
    // SAFETY: the tests use each buffer on one stream, which orders everything, or wait for the stream in between.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().expect("a stream");
    (Kernels::new(&context).expect("the kernels load"), stream)
}

const MODE: CUstreamCaptureMode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;

#[test]
fn a_replayed_graph_gives_the_same_bits() {
    if kernels("a_replayed_graph_gives_the_same_bits").is_none() {
        return;
    }
    let (kernels, stream) = for_graphs();
    let gpu = Gpu::on(kernels, stream.clone());
    let (mut forward, mut backward) = (repeated().forward::<bf16>(), repeated().backward::<bf16>());
    let (mut device_forward, mut device_backward) = (gpu.upload_forward(&forward), gpu.upload_backward(&backward));
    let mut workspace = gpu::workspace::<bf16>(&gpu, device_forward.shape());
    stream.synchronize().expect("uploads finish");

    stream.begin_capture(MODE).expect("a capture");
    gpu.kernels.forward(&stream, device_forward.op(), &mut workspace).expect("forward is captured");
    gpu.kernels.backward(&stream, device_backward.op(), &mut workspace).expect("backward is captured");
    let refused = Workspace::new(&stream, 0).map(|_| ());
    assert_eq!(refused, Err(Error::Capturing { what: "a workspace is allocated" }));
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).expect("the capture ends").expect("a graph");

    let before = forward.y.data.clone();
    gpu.download_forward(&device_forward, &mut forward);
    assert!(forward.y.data == before, "capturing has run something");
    for _ in 0..3 {
        graph.launch().expect("the graph runs");
    }
    gpu.download_forward(&device_forward, &mut forward);
    gpu.download_backward(&device_backward, &mut backward);
    let replayed = (forward_bits(&forward), backward_bits(&backward));
    let (mut forward, mut backward) = (repeated().forward::<bf16>(), repeated().backward::<bf16>());
    gpu.forward(&mut forward).expect("forward runs");
    gpu.backward(&mut backward).expect("backward runs");
    assert!(replayed == (forward_bits(&forward), backward_bits(&backward)), "the graph computes something else");
}

/// A workspace that one stream has just used may not slip into the capture of another.
#[test]
fn a_workspace_cannot_enter_a_capture_from_another_stream() {
    if kernels("a_workspace_cannot_enter_a_capture_from_another_stream").is_none() {
        return;
    }
    let (kernels, stream) = for_graphs();
    let gpu = Gpu::on(kernels, stream.clone());
    let other = gpu.kernels.context().new_stream().expect("a stream");
    let host = repeated().forward::<f16>();
    let mut device = gpu.upload_forward(&host);
    let mut workspace = gpu::workspace::<f16>(&gpu, device.shape());
    gpu.kernels.forward(&stream, device.op(), &mut workspace).expect("forward runs");
    stream.synchronize().expect("forward finishes");
    other.begin_capture(MODE).expect("a capture");
    let result = gpu.kernels.forward(&other, device.op(), &mut workspace);
    assert!(matches!(result, Err(Error::Capturing { .. })), "{result:?}");
    // The refusal has not broken the capture.
    other.end_capture(CUgraphInstantiate_flags(0)).expect("the capture ends");
    gpu.kernels.forward(&other, device.op(), &mut workspace).expect("forward runs on the other stream");
    other.synchronize().expect("forward finishes");
}

/// Forward and backward as one kernel each, ten thousand times: the bits of the first run.
#[test]
fn ten_thousand_replays_give_the_same_bits() {
    if kernels("ten_thousand_replays_give_the_same_bits").is_none() {
        return;
    }
    let (kernels, stream) = for_graphs();
    let gpu = Gpu::on(kernels, stream.clone());
    let (mut forward, mut backward) = (repeated().forward::<bf16>(), repeated().backward::<bf16>());
    let (mut device_forward, mut device_backward) = (gpu.upload_forward(&forward), gpu.upload_backward(&backward));
    let mut workspace = gpu::workspace::<bf16>(&gpu, device_forward.shape());
    stream.synchronize().expect("uploads finish");
    stream.begin_capture(MODE).expect("a capture");
    gpu.kernels.forward(&stream, device_forward.op(), &mut workspace).expect("forward is captured");
    gpu.kernels.backward(&stream, device_backward.op(), &mut workspace).expect("backward is captured");
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).expect("the capture ends").expect("a graph");
    let mut nodes = 0;
    // SAFETY: the graph is alive, and without a place for the nodes the driver counts them.
    let counted = unsafe { cuGraphGetNodes(graph.cu_graph(), std::ptr::null_mut(), &mut nodes) }.result();
    assert_eq!((counted.is_ok(), nodes), (true, 2), "a launch each, and nothing else");

    let mut first = None;
    for round in 0..100 {
        for _ in 0..100 {
            graph.launch().expect("the graph runs");
        }
        gpu.download_forward(&device_forward, &mut forward);
        gpu.download_backward(&device_backward, &mut backward);
        let bits = (forward_bits(&forward), backward_bits(&backward));
        assert!(*first.get_or_insert_with(|| bits.clone()) == bits, "other bits after {} replays", 100 * (round + 1));
    }
    let (mut forward, mut backward) = (repeated().forward::<bf16>(), repeated().backward::<bf16>());
    gpu.forward(&mut forward).expect("forward runs");
    gpu.backward(&mut backward).expect("backward runs");
    assert!(first == Some((forward_bits(&forward), backward_bits(&backward))), "the graph computes something else");
}

/// Refused by name, and the capture goes on.
#[test]
fn what_would_allocate_or_copy_is_refused() {
    if kernels("what_would_allocate_or_copy_is_refused").is_none() {
        return;
    }
    let (kernels, stream) = for_graphs();
    let queue = Queue::new(&kernels, &stream).expect("a queue");
    let mut buffer = queue.alloc::<bf16>(8).expect("a buffer");
    stream.synchronize().expect("nothing is left to do");
    stream.begin_capture(MODE).expect("a capture");
    let capturing = |what| Err(Error::Capturing { what });
    assert_eq!(queue.alloc::<f32>(8).map(drop), capturing("a buffer is allocated"));
    let overwritten = queue.overwrite(&[bf16::ONE; 8], Queue::write(&mut buffer));
    assert_eq!(overwritten, capturing("host memory is copied to a buffer"));
    let downloaded = queue.download::<bf16>(Queue::read(&buffer)).map(drop);
    assert_eq!(downloaded, capturing("a buffer is copied to host memory"));
    assert_eq!(Workspace::new(&stream, 0).map(drop), capturing("a workspace is allocated"));
    stream.end_capture(CUgraphInstantiate_flags(0)).expect("the capture ends");
    assert_eq!(queue.download::<bf16>(Queue::read(&buffer)).map(|data| data.len()), Ok(8));
}
