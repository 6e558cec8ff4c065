//! Any call of the driver may fail: that is an error, nothing is lost, and the next step works.

use fused_lora::cuda::{Kernels, Queue, cudarc::driver::CudaContext};
use fused_lora::linear::{Backend as _, BuffersMut, Gradients, LoraLinear};
use fused_lora::{Error, Result, bf16};

use super::common::data::Spec;
use super::common::layers::{self, Device, Made};
use super::stub::{OUT_OF_MEMORY, Stub, UNKNOWN};

fn spec() -> Spec {
    Spec::new(300, 72, 64, 8)
}

/// A layer in training, with what its steps read.
struct Training {
    queue: Queue,
    layer: LoraLinear<Queue, bf16>,
    x: Device<Queue, bf16>,
    dy: Device<Queue, bf16>,
    a: Vec<f32>,
}

impl Training {
    fn new(kernels: &Kernels) -> Self {
        let stream = kernels.context().new_stream().expect("a stream");
        let queue = Queue::new(kernels, &stream).expect("a queue");
        let Made { mut layer, forward, a32, .. } = layers::make::<Queue, bf16>(&queue, &spec(), true);
        layer.activate("one").expect("an adapter");
        let (x, dy) = (Device::new(&queue, &forward.x), Device::new(&queue, &spec().backward::<bf16>().dy));
        Self { queue, layer, x, dy, a: a32 }
    }

    /// Forward, backward into fresh buffers, and new factors.
    fn step(&mut self) -> Result<()> {
        let Self { queue, layer, x, dy, a } = self;
        let (r, k) = (spec().r, spec().k);
        let (y, pass) = layer.forward_train(x.view())?;
        let mut da = queue.alloc::<f32>(r * k)?;
        let mut dx = queue.alloc::<bf16>(spec().m * k)?;
        let gradients = Gradients {
            dx: Some(fused_lora::MatrixMut::new(Queue::write(&mut dx), spec().m, k)),
            da: Some(fused_lora::MatrixMut::new(Queue::write(&mut da), r, k)),
            ..Gradients::default()
        };
        layer.backward(&pass, dy.view(), gradients)?;
        queue.download::<f32>(Queue::read(&da))?;
        drop(y);
        layer.update("one", |factors| match factors {
            BuffersMut::F32 { a: to, .. } => queue.overwrite(a, to),
            BuffersMut::Storage { .. } => unreachable!("the factors are f32"),
        })
    }

    /// A step after a failure. The failed one may have left the copies of the factors behind, which is said and can be mended; and
    /// cudarc reports what failed in a `drop` on the next occasion.
    fn recovers(&mut self) {
        let _ = self.queue.stream().context().check_err();
        self.layer.refresh("one").expect("the copies can be made anew");
        self.step().expect("a step after a failure");
    }
}

/// Calls that cudarc makes where it cannot return an error (in a `drop`, or for an address), and those after an allocation whose
/// failure makes it lose the memory.
fn is_cudarcs_own(call: &str) -> bool {
    let in_drop = ["Destroy", "Free", "Unload", "Release", "EventRecord", "WaitEvent", "CtxSynchronize", "IsCapturing"];
    in_drop.iter().any(|part| call.contains(part)) || call == "cuCtxGetCurrent"
}

fn may_leak(call: &str) -> bool {
    is_cudarcs_own(call) || call == "cuEventCreate"
}

#[test]
fn any_call_of_a_training_step_may_fail() {
    for arch in [80, 90] {
        let Some(stub) = Stub::new("any_call_of_a_training_step_may_fail", arch) else { return };
        let mut training = Training::new(&stub.kernels(0));
        training.step().expect("the first step, in which the workspace grows");
        training.step().expect("a step");
        stub.clear();
        training.step().expect("a step");
        let count = stub.calls().len();
        assert!(count > 20, "{count} calls");
        let mut told = 0;
        for (code, nth) in [OUT_OF_MEMORY, UNKNOWN].into_iter().flat_map(|code| (0..count).map(move |nth| (code, nth)))
        {
            let live = stub.live();
            stub.clear();
            stub.fail(nth + 1, code);
            let result = training.step();
            stub.fail(0, 0);
            let call = stub.calls().swap_remove(nth);
            let context = format!("call {nth}, {call}, fails with {code}: {result:?}");
            match &result {
                Err(Error::Driver { message, .. }) => assert!(message.contains("STUB_ERROR"), "{context}"),
                Err(Error::OutOfMemory { bytes }) => assert!(*bytes > 0 && code == OUT_OF_MEMORY, "{context}"),
                other => assert!(other.is_ok() && is_cudarcs_own(&call), "{context}"),
            }
            let is_memory = call == "cuMemAllocAsync" && code == OUT_OF_MEMORY;
            assert!(!is_memory || matches!(result, Err(Error::OutOfMemory { .. })), "{context}");
            told += u32::from(result.is_err());
            training.recovers();
            assert!(stub.live() == live || may_leak(&call), "{context}, and leaves {:?} of {live:?}", stub.live());
        }
        assert!(told as usize > count, "only {told} of {} failures are told", 2 * count);
        assert_eq!(stub.misuse(), 0);
    }
}

/// Memory runs out at every allocation of the first step, and of what comes before it.
#[test]
fn out_of_memory_in_the_middle_of_a_step_leaves_everything_usable() {
    let test = "out_of_memory_in_the_middle_of_a_step_leaves_everything_usable";
    let Some(stub) = Stub::new(test, 90) else { return };
    let kernels = stub.kernels(0);
    let before = stub.live();
    let mut refused = 0;
    for bytes in (0..400).map(|kibibytes| 1 + 1024 * kibibytes) {
        let mut training = Training::new(&kernels);
        stub.limit(bytes);
        let result = training.step();
        stub.limit(0);
        match result {
            Ok(()) => break,
            Err(Error::OutOfMemory { bytes }) => assert!(bytes > 0),
            Err(other) => unreachable!("{other}"),
        }
        refused += 1;
        training.recovers();
        drop(training);
        assert_eq!(stub.live(), before, "after a step with {bytes} bytes");
    }
    assert!(refused > 10, "memory ran out {refused} times");
    assert_eq!(stub.misuse(), 0);
}

/// Everything up to the first launch.
fn start() -> Result<()> {
    let context = fused_lora::cuda::context(0)?;
    let kernels = Kernels::new(&context)?;
    let stream =
        context.new_stream().map_err(|error| Error::Driver { call: "new_stream", message: error.to_string() })?;
    let queue = Queue::new(&kernels, &stream)?;
    let (n, k) = (spec().n, spec().k);
    let layer = LoraLinear::<Queue, bf16>::upload(queue.clone(), &vec![bf16::ONE; n * k], None, n, k)?;
    let x = queue.upload(&vec![bf16::ONE; 2 * k])?;
    layer.forward(fused_lora::Matrix::new(Queue::read(&x), 2, k)).map(drop)
}

#[test]
fn any_call_on_the_way_to_the_first_launch_may_fail() {
    for arch in [80, 90] {
        let Some(stub) = Stub::new("any_call_on_the_way_to_the_first_launch_may_fail", arch) else { return };
        start().expect("a forward"); // from here on a context is current
        let live = stub.live();
        stub.clear();
        start().expect("a forward");
        assert_eq!(stub.live(), live, "something is left over without any failure");
        for nth in 0..stub.calls().len() {
            let live = stub.live();
            stub.clear();
            stub.fail(nth + 1, UNKNOWN);
            let result = start();
            stub.fail(0, 0);
            let call = stub.calls().swap_remove(nth);
            let context = format!("call {nth}, {call}: {result:?}");
            assert!(is_cudarcs_own(&call) || matches!(result, Err(Error::Driver { .. })), "{context}");
            assert!(stub.live() == live || may_leak(&call), "{context}, and leaves {:?} of {live:?}", stub.live());
            stub.clear();
            start().unwrap_or_else(|error| unreachable!("after {call} failed: {error}"));
        }
        assert_eq!(stub.misuse(), 0);
    }
}

#[test]
fn a_context_that_is_made_anew_is_as_good() {
    let Some(stub) = Stub::new("a_context_that_is_made_anew_is_as_good", 90) else { return };
    for _ in 0..3 {
        let context = CudaContext::new(1).expect("a context");
        let kernels = Kernels::new(&context).expect("the kernels load");
        let mut training = Training::new(&kernels);
        training.step().expect("a step");
        drop((kernels, context));
        training.step().expect("a step with what the layer itself keeps alive");
    }
    assert_eq!(stub.misuse(), 0);
}
