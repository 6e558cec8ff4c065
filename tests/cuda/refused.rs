//! What the backend refuses, and the raw layer beside the typed one.

use std::sync::Arc;

use fused_lora::cuda::cudarc::driver::{CudaContext, CudaStream};
use fused_lora::cuda::{self, Kernels, Workspace};
use fused_lora::{Dtype, Error, Matrix, MatrixMut, bf16, f16};

use super::call::{OnBuffers, same, table};
use super::common::data::Spec;
use super::common::gpu::{Gpu, forward_bits, kernels};
use super::common::{Backend as _, skipped};
use super::on_device;
use super::repeated;
use super::table::OPS;

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
            f32_factors: false,
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

/// The error matrix: every entry gives its error and writes nothing.
#[test]
fn every_entry_of_the_error_matrix_is_refused() {
    let Some(kernels) = kernels("every_entry_of_the_error_matrix_is_refused") else { return };
    let gpu = on_device::gpu(kernels);
    for (op, wide) in OPS.into_iter().flat_map(|op| [(op, false), (op, true)]) {
        let got = on_device::run(&gpu, &mut OnBuffers::<f16>::new(op, wide), None);
        assert_eq!(got, Ok(()), "{op:?} without a fault");
        for row in table(op, wide).iter().filter(|row| row.is_of_buffers()) {
            let mut call = OnBuffers::<f16>::new(op, wide);
            call.spoil(row);
            let before = format!("{call:?}");
            let got = on_device::run(&gpu, &mut call, None);
            assert!(same(&got, &row.error), "{row:?}: {got:?}");
            assert!(format!("{call:?}") == before, "{row:?}: something was written");
        }
        let dtype = Error::Dtype { got: Dtype::F32, backend: "the CUDA kernels", expected: "F16, Bf16" };
        assert_eq!(on_device::run(&gpu, &mut OnBuffers::<f32>::new(op, wide), None), Err(dtype), "{op:?}");
    }
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
