//! The CUDA backend: against the oracle, bit for bit against itself, in graphs, across streams; and what it says where
//! there is no GPU.
#![cfg(feature = "cuda")]

mod common;

use std::sync::Arc;

use common::data::{Placement, Spec, integer_table, shape_table, subset_table};
use common::golden::{self, Golden};
use common::gpu::{self, Gpu, backward_bits, forward_bits, kernels};
use common::hopper::{self, Case};
use common::{Backend, check, layers, skipped};
use fused_lora::cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use fused_lora::cuda::cudarc::driver::{CudaContext, CudaStream};
use fused_lora::cuda::{self, Kernels, Queue, Workspace};
use fused_lora::plan::{Family, Options};
use fused_lora::{Dtype, Element, Error, Matrix, MatrixMut, bf16, f16};

fn table<T: Element>(test: &str) {
    let Some(kernels) = kernels(test) else { return };
    let gpu = Gpu::new(kernels);
    for spec in shape_table() {
        check::forward::<T>(&gpu, &spec);
        check::backward::<T>(&gpu, &spec);
    }
}

#[test]
fn shapes_in_f16() {
    table::<f16>("shapes_in_f16");
}

#[test]
fn shapes_in_bf16() {
    table::<bf16>("shapes_in_bf16");
}

/// All combinations of presence, accumulation and gradient type at one ragged shape.
#[test]
fn any_subset_of_outputs() {
    let Some(kernels) = kernels("any_subset_of_outputs") else { return };
    let gpu = Gpu::new(kernels);
    for spec in subset_table(21, 34, 19, 5) {
        check::backward::<bf16>(&gpu, &spec);
        check::backward::<f16>(&gpu, &spec);
    }
}

#[test]
fn small_integers_are_exact() {
    let Some(kernels) = kernels("small_integers_are_exact") else { return };
    let gpu = Gpu::new(kernels);
    for spec in integer_table() {
        check::forward::<f16>(&gpu, &spec);
        check::forward::<bf16>(&gpu, &spec);
        check::backward::<f16>(&gpu, &spec);
        check::backward::<bf16>(&gpu, &spec);
    }
}

/// Enough tokens that db and da are reduced in chunks, and enough tiles for several waves.
#[test]
fn many_tiles() {
    let Some(kernels) = kernels("many_tiles") else { return };
    let gpu = Gpu::new(kernels);
    for (m, n, k, r) in [(2100, 264, 136, 24), (3, 1100, 700, 8), (513, 33, 1500, 4), (1200, 1300, 70, 200)] {
        for placement in [Placement::Aligned, Placement::Unaligned] {
            let spec = Spec { placement, ..Spec::new(m, n, k, r) };
            check::forward::<bf16>(&gpu, &spec);
            check::backward::<f16>(&gpu, &spec);
        }
    }
}

/// Kernels, a stream and a workspace for layers.
fn queue(test: &str) -> Option<Queue> {
    let kernels = kernels(test)?;
    let stream = kernels.context().new_stream().expect("a stream");
    Some(Queue::new(&kernels, &stream).expect("a queue"))
}

#[test]
fn layers_compute_what_the_oracle_does() {
    let Some(queue) = queue("layers_compute_what_the_oracle_does") else { return };
    for spec in layers::layer_table() {
        for f32_factors in [false, true] {
            layers::computes::<_, bf16>(&queue, &spec, f32_factors);
            layers::computes::<_, f16>(&queue, &spec, f32_factors);
        }
    }
    for f32_factors in [false, true] {
        layers::sums_several::<_, f16>(&queue, f32_factors);
        layers::sums_several::<_, bf16>(&queue, f32_factors);
    }
    layers::follows_updates::<_, f16>(&queue);
    layers::follows_updates::<_, bf16>(&queue);
}

#[test]
fn layers_merge_and_round_bit_by_bit() {
    let Some(queue) = queue("layers_merge_and_round_bit_by_bit") else { return };
    for spec in layers::merge_table() {
        layers::merges_views::<_, f16>(&queue, &spec);
        layers::merges_views::<_, bf16>(&queue, &spec);
        for f32_factors in [false, true] {
            layers::merges::<_, f16>(&queue, &spec, f32_factors);
            layers::merges::<_, bf16>(&queue, &spec, f32_factors);
        }
    }
    layers::merges_near_ties::<_, f16>(&queue, f16::from_bits, 0x7c00, 1);
    layers::merges_near_ties::<_, bf16>(&queue, bf16::from_bits, 0x7f80, 1);
    layers::rounds_every_neighbour::<_, f16>(&queue, f16::from_bits);
    layers::rounds_every_neighbour::<_, bf16>(&queue, bf16::from_bits);
}

#[test]
fn layers_are_as_exact_as_peft() {
    let Some(queue) = queue("layers_are_as_exact_as_peft") else { return };
    for name in ["plain", "rslora", "odd_sizes", "decode_r1", "multi_active"] {
        let case = Golden::load(name);
        case.check::<_, bf16>(&queue, golden::BF16);
        case.check::<_, f16>(&queue, golden::F16);
        case.check::<_, bf16>(&queue, golden::BF16_AMP);
    }
}

fn has_hopper_kernels(kernels: &Kernels) -> bool {
    kernels.device().arch == 90 && !kernels.plan_options().without_sm90
}

/// Every tile and cluster of the Hopper family, with bundles and chunks, whatever the planner would choose.
#[test]
fn hopper_kernels() {
    let Some(kernels) = kernels("hopper_kernels") else { return };
    if !has_hopper_kernels(&kernels) {
        return skipped("hopper_kernels", "this GPU, or this build, has no Hopper kernels");
    }
    for Case { spec, options, .. } in hopper::table() {
        let gpu = Gpu::new(kernels.with_plan_options(options));
        check::forward::<bf16>(&gpu, &spec);
        check::forward::<f16>(&gpu, &spec);
        check::backward::<bf16>(&gpu, &spec);
        check::backward::<f16>(&gpu, &spec);
    }
}

/// Large enough for chunks and for both kinds of scratch.
fn repeated() -> Spec {
    Spec { placement: Placement::Aligned, ..Spec::new(1500, 520, 392, 24) }
}

#[test]
fn same_bits_again_and_on_a_used_workspace() {
    let Some(kernels) = kernels("same_bits_again_and_on_a_used_workspace") else { return };
    let (first, other) = (Gpu::new(kernels.clone()), Gpu::new(kernels));
    let run = |gpu: &Gpu| {
        let (mut forward, mut backward) = (repeated().forward::<bf16>(), repeated().backward::<bf16>());
        gpu.forward(&mut forward).expect("forward runs");
        gpu.backward(&mut backward).expect("backward runs");
        (forward_bits(&forward), backward_bits(&backward))
    };
    let expected = run(&first);
    for _ in 0..20 {
        assert!(run(&first) == expected, "a used workspace changes the result");
        assert!(run(&other) == expected, "another workspace changes the result");
    }
}

/// Half of them forward, half backward, on one workspace; without a hang or a differing bit.
#[test]
#[ignore = "minutes of GPU time"]
fn a_hundred_thousand_launches_give_the_same_bits() {
    let Some(kernels) = kernels("a_hundred_thousand_launches_give_the_same_bits") else { return };
    let mut choices = vec![Options::default().with_family(Family::Portable)];
    if has_hopper_kernels(&kernels) {
        choices.extend(hopper::variants());
    }
    for options in choices {
        let gpu = Gpu::new(kernels.with_plan_options(options));
        let (mut forward, mut backward) = (repeated().forward::<bf16>(), repeated().backward::<bf16>());
        let (mut on_forward, mut on_backward) = (gpu.upload_forward(&forward), gpu.upload_backward(&backward));
        let mut workspace = gpu::workspace::<bf16>(&gpu, on_forward.shape());
        let mut first = None;
        for round in 0..50 {
            for _ in 0..1000 {
                gpu.kernels.forward(&gpu.stream, on_forward.op(), &mut workspace).expect("forward is launched");
                gpu.kernels.backward(&gpu.stream, on_backward.op(), &mut workspace).expect("backward is launched");
            }
            gpu.download_forward(&on_forward, &mut forward);
            gpu.download_backward(&on_backward, &mut backward);
            let bits = (forward_bits(&forward), backward_bits(&backward));
            assert!(*first.get_or_insert_with(|| bits.clone()) == bits, "{options:?}: other bits in round {round}");
        }
        println!("{options:?}: 100,000 launches");
    }
}

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

/// The raw layer computes what the typed one does.
#[test]
fn raw_addresses_give_the_same_bits() {
    use fused_lora::cuda::cudarc::driver::{DevicePtr, DevicePtrMut};
    use fused_lora::{plan::Plan, raw};
    let Some(kernels) = kernels("raw_addresses_give_the_same_bits") else { return };
    let gpu = Gpu::new(kernels.clone());
    let stream = &gpu.stream;
    let spec = Spec { bias: false, keep_h: false, ..Spec::new(70, 130, 50, 9) };
    let mut expected = spec.forward::<f16>();
    let upload = |data: &Vec<f16>| stream.clone_htod(data).expect("an upload");
    let (x, w) = (upload(&expected.x.data), upload(&expected.w.data));
    let (a, b) = (upload(&expected.a.data), upload(&expected.b.data));
    let mut y = upload(&expected.y.data);
    gpu.forward(&mut expected).expect("forward runs");
    assert!(!forward_bits(&expected)[0].is_empty(), "nothing to compare with");
    {
        let ((x, _x), (w, _w)) = (x.device_ptr(stream), w.device_ptr(stream));
        let ((a, _a), (b, _b)) = (a.device_ptr(stream), b.device_ptr(stream));
        let (y, _y) = y.device_ptr_mut(stream);
        let op = raw::Forward {
            dtype: Dtype::F16,
            x: raw::Matrix::new(x, 70, 50),
            w: raw::Matrix::new(w, 130, 50),
            a: raw::Matrix::new(a, 9, 50),
            b: raw::Matrix::new(b, 130, 9),
            scale: spec.scale,
            bias: None,
            h: None,
            y: raw::Matrix::new(y, 70, 130),
            variant: raw::Variant::default(),
        };
        let bytes = Plan::forward(&op, kernels.device()).expect("a plan").workspace_bytes();
        let mut workspace = stream.alloc_zeros::<u8>(bytes).expect("a workspace");
        let (workspace, _workspace) = workspace.device_ptr_mut(stream);
        // SAFETY: all memory was just allocated with the extents of the matrices, the workspace zeroed, on this stream; the
        // guards above order its being freed.
        unsafe { kernels.forward_raw(&op, workspace, bytes, stream.cu_stream().cast()) }.expect("forward runs");
        // SAFETY: refused before anything is launched.
        let refused = unsafe { kernels.forward_raw(&op, workspace, bytes - 1, stream.cu_stream().cast()) };
        assert_eq!(refused, Err(Error::Workspace { got: bytes - 1, needed: bytes }));
    }
    assert!(stream.clone_dtoh(&y).expect("a download") == expected.y.data, "the raw layer computes something else");
}

#[test]
fn wrong_arguments_are_refused_and_touch_nothing() {
    let Some(kernels) = kernels("wrong_arguments_are_refused_and_touch_nothing") else { return };
    let gpu = Gpu::new(kernels);
    let refuses = |spoil: &dyn Fn(&mut common::HostForward<bf16>), error: Error| {
        let mut op = Spec { placement: Placement::Strided, ..Spec::new(4, 6, 5, 3) }.forward::<bf16>();
        spoil(&mut op);
        let before = op.clone();
        assert_eq!(gpu.forward(&mut op), Err(error));
        assert!(format!("{op:?}") == format!("{before:?}"), "an output was touched");
    };
    refuses(&|op| op.w.cols = 4, Error::Dimension { arg: "x", axis: "columns", got: 5, expected: 4 });
    refuses(&|op| op.scale = f32::INFINITY, Error::Scale { got: f32::INFINITY });
    refuses(&|op| op.w.row_stride = 4, Error::Stride { arg: "w", got: 4, min: 5 });
    refuses(&|op| op.x.data.truncate(64), Error::BufferTooShort { arg: "x", got: 64, needed: 64 + 3 * 32 + 5 });
    refuses(
        &|op| op.bias.as_mut().expect("bias").offset = usize::MAX,
        Error::BufferTooShort { arg: "bias", got: 64 + 6 + 9, needed: usize::MAX },
    );
    let mut op = Spec::new(4, 6, 5, 3).forward::<f32>();
    let dtype = Error::Dtype { got: Dtype::F32, backend: "the CUDA kernels", expected: "F16, Bf16" };
    assert_eq!(gpu.forward(&mut op), Err(dtype));
}

#[test]
fn a_small_workspace_is_refused() {
    let Some(kernels) = kernels("a_small_workspace_is_refused") else { return };
    let gpu = Gpu::new(kernels);
    let host = Spec { keep_h: false, ..repeated() }.forward::<bf16>();
    let mut device = gpu.upload_forward(&host);
    let needed = gpu.kernels.plan_forward(&gpu.stream, &mut device.op()).expect("a plan").workspace_bytes();
    let mut workspace = Workspace::new(&gpu.stream, needed - 1).expect("a workspace");
    let refused = gpu.kernels.forward(&gpu.stream, device.op(), &mut workspace);
    assert_eq!(refused, Err(Error::Workspace { got: needed - 1, needed }));
    workspace.reserve(&gpu.stream, needed).expect("more memory");
    assert_eq!(workspace.bytes(), needed);
    gpu.kernels.forward(&gpu.stream, device.op(), &mut workspace).expect("forward runs");
    let too_much = Workspace::new(&gpu.stream, 1 << 50).map(|_| ());
    assert_eq!(too_much, Err(Error::OutOfMemory { bytes: 1 << 50 }));
}

#[test]
fn another_context_is_refused() {
    let test = "another_context_is_refused";
    let Some(kernels) = kernels(test) else { return };
    let Ok(second) = cuda::context(1) else {
        skipped(test, "no second GPU");
        return;
    };
    let gpu = Gpu::new(kernels);
    let (stream, foreign) = (&gpu.stream, second.new_stream().expect("a stream"));
    let here = |elements| stream.alloc_zeros::<bf16>(elements).expect("memory");
    let (x, w, a, b, mut y) = (here(16), here(16), here(4), here(4), here(16));
    let there = foreign.alloc_zeros::<bf16>(16).expect("memory");
    let mut op = |x: &_, stream: &Arc<CudaStream>, workspace: &mut Workspace| {
        let op = cuda::Forward {
            x: Matrix::new(x, 4, 4),
            w: Matrix::new(&w, 4, 4),
            a: Matrix::new(&a, 1, 4),
            b: Matrix::new(&b, 4, 1),
            scale: 1.0,
            bias: None,
            h: None,
            y: MatrixMut::new(&mut y, 4, 4),
            variant: Default::default(),
        };
        gpu.kernels.forward(stream, op, workspace)
    };
    let wrong = |arg| Err(Error::WrongContext { arg, got: 1, expected: 0 });
    let mut workspace = Workspace::new(stream, 1 << 20).expect("a workspace");
    assert_eq!(op(&there, stream, &mut workspace), wrong("x"));
    assert_eq!(op(&x, &foreign, &mut workspace), wrong("stream"));
    let mut elsewhere = Workspace::new(&foreign, 1 << 20).expect("a workspace");
    assert_eq!(op(&x, stream, &mut elsewhere), wrong("workspace"));
    assert_eq!(op(&x, stream, &mut workspace), Ok(()));
}

/// The sizes known before there are buffers suffice for what the buffers then need.
#[test]
fn a_workspace_for_the_shape_suffices() {
    let Some(kernels) = kernels("a_workspace_for_the_shape_suffices") else { return };
    let gpu = Gpu::new(kernels);
    for bits in 1..16u32 {
        let outputs = std::array::from_fn(|i| bits >> i & 1 == 1);
        let host = Spec { outputs, ..repeated() }.backward::<f16>();
        let mut device = gpu.upload_backward(&host);
        let enough = gpu.kernels.backward_workspace_bytes(Dtype::F16, device.shape()).expect("a plan");
        let plan = gpu.kernels.plan_backward(&gpu.stream, &mut device.op()).expect("a plan");
        assert!(plan.workspace_bytes() <= enough, "{outputs:?}: {} of {enough}", plan.workspace_bytes());
        assert!(plan.explain().contains(&gpu.kernels.device().name), "{}", plan.explain());
    }
}

/// On a machine with a driver there is nothing to see here; on one without, an error is all that happens.
#[test]
fn no_driver_is_an_error_and_no_panic() {
    match Kernels::on_device(0) {
        Ok(kernels) => assert!(kernels.device().arch >= 75),
        Err(error) => {
            assert!(matches!(error, Error::NoDriver { .. } | Error::UnsupportedArch { .. }), "{error:?}");
            assert!(cuda::context(0).is_err() || matches!(error, Error::UnsupportedArch { .. }));
            let message = error.to_string();
            assert!(
                message.starts_with("no NVIDIA driver found: ") || message.starts_with("GPU architecture"),
                "{message}"
            );
            assert!(message.len() < 400 && !message.contains('\n'), "{message}");
        }
    }
}

#[test]
fn a_device_that_is_not_there_is_refused() {
    let Some(_) = kernels("a_device_that_is_not_there_is_refused") else { return };
    let count = CudaContext::device_count().expect("a count") as u64;
    for ordinal in [count as usize, 1 << 32, usize::MAX] {
        let error = cuda::context(ordinal).err();
        let limit = count - 1;
        assert_eq!(error, Some(Error::TooLarge { what: "the device ordinal", got: ordinal as u64, limit }));
    }
}
