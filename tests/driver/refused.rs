//! The error matrix on the CUDA backend: each entry gives its error, launches nothing and writes nothing.

use fused_lora::cuda::{Kernels, Queue, Workspace, cudarc::driver::CudaContext};
use fused_lora::linear::{Backend as _, LoraLinear};
use fused_lora::plan::{Options, Plan};
use fused_lora::{Dtype, Element, Error, LoraShape, MAX_DIMENSION, Matrix, bf16, f16};

use super::call::{OnAddresses, OnBuffers, same, table};
use super::common::Host;
use super::common::gpu::Gpu;
use super::common::layers::Device;
use super::on_device::{gpu, run};
use super::stub::Stub;
use super::table::{OPS, Op};

fn refuses<T: Element>(stub: &Stub) {
    let gpu = gpu(stub.kernels(0));
    for (op, wide) in OPS.into_iter().flat_map(|op| [(op, false), (op, true)]) {
        stub.clear();
        assert_eq!(run(&gpu, &mut OnBuffers::<T>::new(op, wide), None), Ok(()), "{op:?} without a fault");
        assert_eq!(stub.launched(), 1, "{op:?} without a fault");
        for row in table(op, wide).iter().filter(|row| row.is_of_buffers()) {
            let mut call = OnBuffers::<T>::new(op, wide);
            call.spoil(row);
            let before = format!("{call:?}");
            stub.clear();
            let got = run(&gpu, &mut call, None);
            assert!(same(&got, &row.error), "{row:?}: {got:?}");
            assert_eq!(stub.launched(), 0, "{row:?} was launched");
            assert!(format!("{call:?}") == before, "{row:?}: something was written");
        }
        let dtype = Error::Dtype { got: Dtype::F32, backend: "the CUDA kernels", expected: "F16, Bf16" };
        assert_eq!(run(&gpu, &mut OnBuffers::<f32>::new(op, wide), None), Err(dtype), "{op:?}");
    }
}

#[test]
fn the_cuda_backend_refuses_every_entry_and_launches_nothing() {
    for arch in [80, 90] {
        let test = "the_cuda_backend_refuses_every_entry_and_launches_nothing";
        let Some(stub) = Stub::new(test, arch) else { return };
        refuses::<f16>(&stub);
        refuses::<bf16>(&stub);
        assert_eq!(stub.misuse(), 0);
    }
}

#[test]
fn raw_addresses_are_refused_and_nothing_is_launched() {
    let Some(stub) = Stub::new("raw_addresses_are_refused_and_nothing_is_launched", 80) else { return };
    let gpu = gpu(stub.kernels(0));
    let (kernels, stream) = (&gpu.kernels, gpu.stream.cu_stream().cast());
    stub.clear();
    let run = |call: &OnAddresses, workspace, bytes| match call {
        // SAFETY: everything here is refused before anything is launched, which this test counts.
        OnAddresses::Forward(op) => unsafe { kernels.forward_raw(op, workspace, bytes, stream) },
        // SAFETY: as above.
        OnAddresses::Backward(op) => unsafe { kernels.backward_raw(op, workspace, bytes, stream) },
        _ => unreachable!("no such function"),
    };
    for op in [Op::Forward, Op::Backward] {
        for row in table(op, true).iter().filter(|row| row.fault.is_of_addresses()) {
            let mut call = OnAddresses::new(op, true);
            let error = call.spoil(row, true);
            let got = run(&call, 1 << 50, usize::MAX);
            assert!(same(&got, &error), "{row:?}: {got:?}");
        }
        let legal = OnAddresses::new(op, true);
        let needed = match &legal {
            OnAddresses::Forward(op) => Plan::forward(op, kernels.device()),
            OnAddresses::Backward(op) => Plan::backward(op, kernels.device()),
            _ => unreachable!("no such plan"),
        };
        let needed = needed.expect("a plan").workspace_bytes();
        assert_eq!(run(&legal, 1 << 50, needed - 1), Err(Error::Workspace { got: needed - 1, needed }));
        assert_eq!(run(&legal, 0, needed), Err(Error::NullPointer { arg: "workspace" }));
        let address = (1 << 50) + 16;
        assert_eq!(run(&legal, address, needed), Err(Error::Misaligned { arg: "workspace", address, align: 256 }));
    }
    assert_eq!(stub.launched(), 0);
}

/// Every argument from another device, and from another object for the same device.
#[test]
fn buffers_of_other_contexts_are_named() {
    let Some(stub) = Stub::new("buffers_of_other_contexts_are_named", 80) else { return };
    let here = gpu(stub.kernels(0));
    let there = gpu(stub.kernels(1));
    let twin = CudaContext::new(0).expect("another object for the same context");
    let twin = gpu(Kernels::new(&twin).expect("the kernels load"));
    for op in OPS {
        for arg in op.arguments() {
            let run_with = |gpu: &Gpu| {
                let mut call = OnBuffers::<f16>::new(op, true);
                let before = format!("{call:?}");
                stub.clear();
                let got = run(&here, &mut call, Some((arg, gpu)));
                assert_eq!(stub.launched(), 0, "{op:?}, {arg}");
                assert!(format!("{call:?}") == before, "{op:?}, {arg}: something was written");
                got
            };
            assert_eq!(run_with(&there), Err(Error::WrongContext { arg, got: 1, expected: 0 }), "{op:?}");
            assert_eq!(run_with(&twin), Err(Error::ForeignContext { arg }), "{op:?}");
        }
    }
    // The stream, and the workspace.
    let wrong = |arg| Err(Error::WrongContext { arg, got: 1, expected: 0 });
    assert_eq!(Queue::new(&here.kernels, &there.stream).map(drop), wrong("stream"));
    let OnBuffers::Forward(op) = OnBuffers::<f16>::new(Op::Forward, true) else { unreachable!("it was made so") };
    let mut device = here.upload_forward(&op);
    let mut elsewhere = Workspace::new(&there.stream, 1 << 20).expect("a workspace");
    stub.clear();
    assert_eq!(here.kernels.forward(&here.stream, device.op(), &mut elsewhere), wrong("workspace"));
    let mut own = here.workspace.lock().expect("nobody else");
    assert_eq!(here.kernels.forward(&there.stream, device.op(), &mut own), wrong("stream"));
    assert_eq!((stub.launched(), stub.misuse()), (0, 0));
}

/// As on the CPU, where no driver is asked.
#[test]
fn host_memory_that_does_not_fit_is_refused() {
    let Some(stub) = Stub::new("host_memory_that_does_not_fit_is_refused", 80) else { return };
    let gpu = gpu(stub.kernels(0));
    let queue = Queue::new(&gpu.kernels, &gpu.stream).expect("a queue");
    let mut buffer = queue.alloc::<f16>(3).expect("a buffer");
    stub.clear();
    let short = queue.overwrite(&[f16::ONE; 4], Queue::write(&mut buffer));
    assert_eq!(short, Err(Error::BufferTooShort { arg: "to", got: 3, needed: 4 }));
    assert_eq!(queue.alloc::<f32>(usize::MAX).map(drop), Err(Error::OutOfMemory { bytes: usize::MAX }));
    assert!(!stub.calls().iter().any(|call| call.starts_with("cuMem")), "{:?}", stub.calls());
    let host = Host { rows: 1, cols: 3, offset: 0, row_stride: 3, data: vec![f16::ONE; 3] };
    assert_eq!(Device::<Queue, f16>::new(&queue, &host).download(&queue).data, host.data);
}

/// The host's address of no elements is none.
#[test]
fn nothing_is_copied_where_there_is_nothing() {
    let Some(stub) = Stub::new("nothing_is_copied_where_there_is_nothing", 80) else { return };
    let gpu = gpu(stub.kernels(0));
    let queue = Queue::new(&gpu.kernels, &gpu.stream).expect("a queue");
    let mut buffer = queue.alloc::<f16>(1).expect("a buffer");
    stub.clear();
    let words = queue.upload_words(&[]).expect("words");
    let elements = queue.upload::<f16>(&[]).expect("elements");
    queue.overwrite::<f16>(&[], Queue::write(&mut buffer)).expect("nothing to do");
    assert!(!stub.calls().iter().any(|call| call.starts_with("cuMemcpy")), "{:?}", stub.calls());
    // What is there is something to be passed on nevertheless.
    let lengths = (Queue::len(&elements), words.len());
    drop((words, elements));
    assert_eq!((lengths, stub.misuse()), ((1, 1), 0));
    let two = queue.upload_words(&[1, 2]).expect("words");
    assert!(stub.calls().iter().any(|call| call.starts_with("cuMemcpyHtoD")), "{:?}", stub.calls());
    assert_eq!(two.len(), 2);
}

/// Sizes, ordinals and options that no GPU has, through a queue and a layer on it.
#[test]
fn what_no_gpu_has_is_refused() {
    let Some(stub) = Stub::new("what_no_gpu_has_is_refused", 90) else { return };
    let gpu = gpu(stub.kernels(0));
    let kernels = &gpu.kernels;
    let layer = |kernels: &Kernels| {
        let queue = Queue::new(kernels, &gpu.stream).expect("a queue");
        LoraLinear::upload(queue, &[f16::ONE; 64], None, 8, 8).expect("a layer")
    };
    let here = layer(kernels);
    let bank = here.bank(&[]).expect("a bank of none");
    let x = here.backend().upload(&[f16::ONE; 16]).expect("an upload");
    stub.clear();
    let none = Error::ZeroDimension { arg: "x", axis: "rows" };
    let too_large = |what, got, limit| Error::TooLarge { what, got, limit };
    let m = |tokens| too_large("M (rows of x)", tokens, MAX_DIMENSION as u64);
    let all = too_large("the size of all matrices", u64::MAX, i64::MAX as u64);
    for (tokens, error) in [(0, none.clone()), (1 << 31, m(1 << 31)), (1 << 40, m(1 << 40)), (usize::MAX, all.clone())]
    {
        assert_eq!(here.reserve(tokens), Err(error.clone()));
        assert_eq!(here.reserve_routed(tokens, &bank), Err(error));
    }
    let bytes = |dtype, m| kernels.workspace_bytes(dtype, LoraShape { m, n: 1, k: 1, r: 1 });
    assert_eq!((bytes(Dtype::F16, 0), bytes(Dtype::F16, usize::MAX)), (Err(none), Err(all)));
    let dtype = Error::Dtype { got: Dtype::F32, backend: "the CUDA kernels", expected: "F16, Bf16" };
    assert_eq!(bytes(Dtype::F32, 1), Err(dtype.clone()));
    let f32 = LoraLinear::upload(here.backend().clone(), &[1.0f32; 4], None, 2, 2);
    assert_eq!(f32.map(drop), Err(dtype));
    for ordinal in [2, usize::MAX] {
        let error = too_large("the device ordinal", ordinal as u64, 1);
        assert_eq!(Kernels::on_device(ordinal).map(drop), Err(error));
    }
    let endless = Workspace::new(&gpu.stream, usize::MAX).map(drop);
    assert_eq!(endless, Err(Error::OutOfMemory { bytes: usize::MAX }));
    let odd = layer(&kernels.with_plan_options(Options::default().with_chunks(0)));
    let option = Err(Error::PlanOption { option: "chunks", got: "0".into(), expected: "at least 1".into() });
    assert_eq!((odd.reserve(3), odd.forward(Matrix::new(Queue::read(&x), 2, 8)).map(drop)), (option.clone(), option));
    assert_eq!((stub.launched(), stub.misuse()), (0, 0));
    assert_eq!(here.forward(Matrix::new(Queue::read(&x), 2, 8)).map(drop), Ok(()), "nothing of it stayed");
    assert_eq!(stub.launched(), 1);
}
