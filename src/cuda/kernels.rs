//! The kernels in a context, and the operations.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::sys::CUstream;
use cudarc::driver::{CudaContext, CudaStream};

use super::access::{Access, check_context};
use super::driver::failed;
use super::launch::launch;
use super::module::{self, Module};
use super::{Backward, BackwardShared, Forward, ForwardShared, Gain, Merge, Round, Workspace, driver, lent, size};
use crate::error::Result;
use crate::plan::{Device, Launch, Options, Plan};
use crate::{Dtype, Element, LoraShape, raw};

/// The kernels of this crate, loaded into a CUDA context.
///
/// A handle: clones share what is loaded, and any thread may use them. Dropping the last one waits for the device and unloads
/// the kernels; graphs that were captured with them must not run after that.
#[derive(Clone, Debug)]
pub struct Kernels {
    loaded: Arc<Loaded>,
    options: Options,
}

/// Whether a workspace that is too small grows, or is an error.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    Given,
    Grows,
}

#[derive(Debug)]
struct Loaded {
    context: Arc<CudaContext>,
    device: Device,
    modules: Vec<Module>,
}

impl Kernels {
    /// Loads the kernels into `context`; [`context`](super::context) makes one without a panic.
    ///
    /// # Errors
    /// [`Error::UnsupportedArch`](crate::Error::UnsupportedArch) when this build has no image for the GPU;
    /// [`Error::Driver`](crate::Error::Driver).
    pub fn new(context: &Arc<CudaContext>) -> Result<Self> {
        let device = driver::properties(context)?;
        let modules = module::load_all(context, &device)?;
        // A build may hold fewer families than the planner knows.
        let options = Options { without_sm90: !module::has_sm90(&modules), ..Options::default() };
        Ok(Self { loaded: Arc::new(Loaded { context: context.clone(), device, modules }), options })
    }

    /// Loads the kernels into the primary context of GPU `ordinal`.
    ///
    /// # Errors
    /// As [`context`](super::context) and [`Kernels::new`].
    pub fn on_device(ordinal: usize) -> Result<Self> {
        Self::new(&driver::context(ordinal)?)
    }

    /// The context the kernels are loaded in.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.loaded.context
    }

    /// The GPU as plans see it.
    pub fn device(&self) -> &Device {
        &self.loaded.device
    }

    /// What these kernels leave the planner to choose from, and what [`with_plan_options`](Self::with_plan_options) decided:
    /// [`Plan::forward_with`] gives the plan that they would launch when it is passed these.
    pub fn plan_options(&self) -> Options {
        self.options
    }

    /// A handle to the same kernels that makes some choices instead of the planner: to measure what it chooses between.
    #[must_use]
    pub fn with_plan_options(&self, options: Options) -> Self {
        let without_sm90 = options.without_sm90 || self.options.without_sm90;
        Self { loaded: self.loaded.clone(), options: Options { without_sm90, ..options } }
    }

    /// Bytes of workspace that suffice for forward and for backward of `shape`, with any choice of optional arguments.
    ///
    /// # Errors
    /// As [`Plan::forward`].
    pub fn workspace_bytes(&self, dtype: Dtype, shape: LoraShape) -> Result<usize> {
        Ok(self.forward_workspace_bytes(dtype, shape)?.max(self.backward_workspace_bytes(dtype, shape)?))
    }

    /// Bytes of workspace that suffice for forward of `shape`, whether h is kept or not.
    ///
    /// # Errors
    /// As [`Plan::forward`].
    pub fn forward_workspace_bytes(&self, dtype: Dtype, shape: LoraShape) -> Result<usize> {
        size::forward(dtype, shape, self.device(), self.options)
    }

    /// Bytes of workspace that suffice for backward of `shape`, with any choice of outputs.
    ///
    /// # Errors
    /// As [`Plan::backward`].
    pub fn backward_workspace_bytes(&self, dtype: Dtype, shape: LoraShape) -> Result<usize> {
        size::backward(dtype, shape, self.device(), self.options)
    }

    /// Bytes of workspace that suffice for `shape` and for every shape with fewer tokens or a lower rank.
    pub(super) fn workspace_bytes_up_to(&self, dtype: Dtype, shape: LoraShape) -> Result<usize> {
        size::up_to(dtype, shape, self.device(), self.options)
    }

    /// Bytes of workspace that suffice for [`forward_shared`](Self::forward_shared) and
    /// [`backward_shared`](Self::backward_shared) of up to `m` tokens and `r` ranks of all projections together, with factors in the
    /// storage type.
    pub fn shared_workspace_bytes(&self, dtype: Dtype, m: usize, r: usize) -> usize {
        size::shared(dtype, m, r, self.device(), self.options)
    }

    /// The same with f32 factors over a layer of 16 bits, whose halves are in there: N is that of all projections together, and each
    /// one's ranks count as the next multiple of 8.
    pub fn shared_f32_workspace_bytes(&self, dtype: Dtype, shape: LoraShape) -> usize {
        size::shared_f32(dtype, shape, self.device(), self.options)
    }

    /// What [`forward`](Self::forward) would do: [`Plan::explain`] says it in words, and [`Plan::workspace_bytes`] is
    /// exactly what it needs. Nothing is launched.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), less what concerns the workspace.
    pub fn plan_forward<T: Element, A: Element>(
        &self,
        stream: &CudaStream,
        op: &mut Forward<'_, T, A>,
    ) -> Result<Plan> {
        self.plan_forward_shared(stream, &mut lent::forward(op))
    }

    /// What [`forward_shared`](Self::forward_shared) would do, as [`plan_forward`](Self::plan_forward).
    ///
    /// # Errors
    /// As [`forward_shared`](Self::forward_shared), less what concerns the workspace.
    pub fn plan_forward_shared<T: Element, A: Element>(
        &self,
        stream: &CudaStream,
        op: &mut ForwardShared<'_, T, A>,
    ) -> Result<Plan> {
        let mut access = Access::new(self.context(), stream)?;
        let op = access.forward(op)?;
        access.judge(Plan::forward_shared_with(&op, self.device(), self.options))
    }

    /// What [`backward`](Self::backward) would do, as [`plan_forward`](Self::plan_forward).
    ///
    /// # Errors
    /// As [`backward`](Self::backward), less what concerns the workspace.
    pub fn plan_backward<T: Element, A: Element>(
        &self,
        stream: &CudaStream,
        op: &mut Backward<'_, T, A>,
    ) -> Result<Plan> {
        self.plan_backward_shared(stream, &mut lent::backward(op))
    }

    /// What [`backward_shared`](Self::backward_shared) would do, as [`plan_forward`](Self::plan_forward).
    ///
    /// # Errors
    /// As [`backward_shared`](Self::backward_shared), less what concerns the workspace.
    pub fn plan_backward_shared<T: Element, A: Element>(
        &self,
        stream: &CudaStream,
        op: &mut BackwardShared<'_, T, A>,
    ) -> Result<Plan> {
        let mut access = Access::new(self.context(), stream)?;
        let op = access.backward(op)?;
        access.judge(Plan::backward_shared_with(&op, self.device(), self.options))
    }

    /// y = x Wᵀ + h Bᵀ (+ bias), h = scale · x Aᵀ: one launch on `stream`.
    ///
    /// # Errors
    /// What [`Plan::forward_with`] finds of the operands and, of the workspace, [`Plan::launch`];
    /// [`Error::BufferTooShort`](crate::Error::BufferTooShort); [`Error::WrongContext`](crate::Error::WrongContext);
    /// [`Error::ForeignContext`](crate::Error::ForeignContext); [`Error::Capturing`](crate::Error::Capturing);
    /// [`Error::Driver`](crate::Error::Driver). Nothing is launched then, but for one case: on the per-thread default stream
    /// the driver may fail to record the event that follows the launch.
    pub fn forward<T: Element, A: Element>(
        &self,
        stream: &Arc<CudaStream>,
        op: Forward<'_, T, A>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.forward_in(stream, op.into(), workspace, Room::Given)
    }

    /// For each projection y = x Wᵀ + h Bᵀ (+ bias), h = scale · x Aᵀ, all of one x: one launch on `stream`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), with what [`Plan::forward_shared_with`] finds, and
    /// [`Error::Projections`](crate::Error::Projections).
    pub fn forward_shared<T: Element, A: Element>(
        &self,
        stream: &Arc<CudaStream>,
        op: ForwardShared<'_, T, A>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.forward_in(stream, op, workspace, Room::Given)
    }

    pub(super) fn forward_in<T: Element, A: Element>(
        &self,
        stream: &Arc<CudaStream>,
        mut op: ForwardShared<'_, T, A>,
        workspace: &mut Workspace,
        room: Room,
    ) -> Result<()> {
        check_context("workspace", workspace.context(), self.context())?;
        let mut access = Access::new(self.context(), stream)?;
        let op = access.forward(&mut op)?;
        let plan = access.judge(Plan::forward_shared_with(&op, self.device(), self.options))?;
        self.run(&plan, stream, &access, workspace, room)
    }

    /// dx = dy W + dh A, da = dhᵀ x, db = dyᵀ h, dbias = Σ dy, with dh = scale · dy B: one launch on `stream` for the
    /// outputs that are present.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), with what [`Plan::backward_with`] finds.
    pub fn backward<T: Element, A: Element>(
        &self,
        stream: &Arc<CudaStream>,
        op: Backward<'_, T, A>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.backward_in(stream, op.into(), workspace, Room::Given)
    }

    /// dx = Σ dy W + dh A over all projections, da = dhᵀ x, and for each db = dyᵀ h, dbias = Σ dy, with dh = scale · dy B: one
    /// launch on `stream` for the outputs that are present.
    ///
    /// # Errors
    /// As [`forward_shared`](Self::forward_shared), with what [`Plan::backward_shared_with`] finds.
    pub fn backward_shared<T: Element, A: Element>(
        &self,
        stream: &Arc<CudaStream>,
        op: BackwardShared<'_, T, A>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.backward_in(stream, op, workspace, Room::Given)
    }

    pub(super) fn backward_in<T: Element, A: Element>(
        &self,
        stream: &Arc<CudaStream>,
        mut op: BackwardShared<'_, T, A>,
        workspace: &mut Workspace,
        room: Room,
    ) -> Result<()> {
        check_context("workspace", workspace.context(), self.context())?;
        let mut access = Access::new(self.context(), stream)?;
        let op = access.backward(&mut op)?;
        let plan = access.judge(Plan::backward_shared_with(&op, self.device(), self.options))?;
        self.run(&plan, stream, &access, workspace, room)
    }

    /// merged = w + scale · B A: one launch on `stream`, without a workspace.
    ///
    /// # Errors
    /// What [`Launch::merge`] finds; otherwise as [`forward`](Self::forward), less what concerns the workspace.
    pub fn merge<T: Element>(&self, stream: &Arc<CudaStream>, mut op: Merge<'_, T>) -> Result<()> {
        let mut access = Access::new(self.context(), stream)?;
        let op = access.merge(&mut op)?;
        let launch = access.judge(Launch::merge(&op))?;
        self.run_alone(&launch, stream, &access)
    }

    /// rounded_a = A and rounded_b = scale · B in the storage type or in f32: one launch on `stream`, without a workspace.
    ///
    /// # Errors
    /// What [`Launch::round`] finds; otherwise as [`forward`](Self::forward), less what concerns the workspace.
    pub fn round<T: Element, A: Element>(&self, stream: &Arc<CudaStream>, mut op: Round<'_, T, A>) -> Result<()> {
        let mut access = Access::new(self.context(), stream)?;
        let op = access.round(&mut op)?;
        match access.judge(Launch::round(&op))? {
            Some(launch) => self.run_alone(&launch, stream, &access),
            None => Ok(()),
        }
    }

    /// norm = ‖W + scale · B A‖ and gain = magnitude / norm, of DoRA: one launch on `stream`, without a workspace.
    ///
    /// # Errors
    /// What [`Launch::gain`] finds; otherwise as [`forward`](Self::forward), less what concerns the workspace.
    pub fn gain<T: Element>(&self, stream: &Arc<CudaStream>, mut op: Gain<'_, T>) -> Result<()> {
        let mut access = Access::new(self.context(), stream)?;
        let op = access.gain(&mut op)?;
        let launch = access.judge(Launch::gain(&op))?;
        self.run_alone(&launch, stream, &access)
    }

    /// As [`run`](Self::run), of a launch that needs no workspace.
    fn run_alone(&self, launch: &Launch, stream: &Arc<CudaStream>, access: &Access<'_>) -> Result<()> {
        access.check_waits()?;
        // SAFETY: the buffers hold the matrices (`judge`), belong to this context, and are borrowed until the launch is
        // queued; their guards, and the order in which streams free memory, cover the time until it has run.
        unsafe { self.launch(launch, stream.cu_stream()) }
    }

    /// `access` is only looked at: the caller drops it, and with it the guards of the buffers, after the launch.
    fn run(
        &self,
        plan: &Plan,
        stream: &Arc<CudaStream>,
        access: &Access<'_>,
        workspace: &mut Workspace,
        room: Room,
    ) -> Result<()> {
        if room == Room::Grows {
            workspace.reserve(stream, plan.workspace_bytes())?;
        }
        let launch = plan.launch(workspace.address(), workspace.bytes())?;
        access.check_waits()?;
        workspace.order_on(stream)?;
        // SAFETY: the buffers hold the matrices (`judge`), belong to this context, and are borrowed until the launch is
        // queued; their guards, and the order in which streams free memory, cover the time until it has run. The workspace
        // holds what the plan asked for, zeroed where it must be, and was ordered on this stream.
        unsafe { self.launch(&launch, stream.cu_stream()) }?;
        workspace.used_on(stream)
    }

    /// [`forward`](Self::forward) over addresses, for stacks on another version of cudarc or none: `stream` is a `CUstream`
    /// (or `cudaStream_t`), and `workspace` holds `workspace_bytes` bytes. [`Plan::forward_with`]
    /// with [`device`](Self::device) and [`plan_options`](Self::plan_options) says how many are needed, and explains.
    ///
    /// # Errors
    /// What [`Plan::forward_with`] and [`Plan::launch`] find; [`Error::Driver`](crate::Error::Driver).
    ///
    /// # Safety
    /// - `stream` is a stream of the context the kernels are loaded in (the primary context of the device after
    ///   [`on_device`](Self::on_device), which is also that of the CUDA runtime).
    /// - Every matrix lies in device memory of that context, of the extent its dimensions and stride give and of the dtype of
    ///   the operation. Until the launch has run it stays allocated, what is read is not written, and what is written is not
    ///   accessed by anything else.
    /// - So does the workspace, and its first [`SYNC_BYTES`](crate::plan::SYNC_BYTES) bytes were zeroed once after it was
    ///   allocated and only touched by launches of this crate since.
    /// - The kernels are not dropped before the launch, or any graph that it was captured into, has run for the last time.
    pub unsafe fn forward_raw(
        &self,
        op: &raw::Forward,
        workspace: u64,
        workspace_bytes: usize,
        stream: *mut c_void,
    ) -> Result<()> {
        // SAFETY: what that asks of its caller is what this function asks of its own.
        unsafe { self.forward_shared_raw(&op.into(), workspace, workspace_bytes, stream) }
    }

    /// [`forward_shared`](Self::forward_shared) over addresses, as [`forward_raw`](Self::forward_raw). Here the y of several
    /// projections may be columns of one matrix.
    ///
    /// # Errors
    /// What [`Plan::forward_shared_with`] and [`Plan::launch`] find; [`Error::Driver`](crate::Error::Driver).
    ///
    /// # Safety
    /// As [`forward_raw`](Self::forward_raw).
    pub unsafe fn forward_shared_raw(
        &self,
        op: &raw::ForwardShared,
        workspace: u64,
        workspace_bytes: usize,
        stream: *mut c_void,
    ) -> Result<()> {
        let launch = Plan::forward_shared_with(op, self.device(), self.options)?.launch(workspace, workspace_bytes)?;
        // SAFETY: what `launch` relies on is what this function asks of its caller.
        unsafe { self.launch(&launch, stream.cast()) }
    }

    /// [`backward`](Self::backward) over addresses, as [`forward_raw`](Self::forward_raw).
    ///
    /// # Errors
    /// What [`Plan::backward_with`] and [`Plan::launch`] find; [`Error::Driver`](crate::Error::Driver).
    ///
    /// # Safety
    /// As [`forward_raw`](Self::forward_raw); gradients marked `f32` lie in memory for f32 elements.
    pub unsafe fn backward_raw(
        &self,
        op: &raw::Backward,
        workspace: u64,
        workspace_bytes: usize,
        stream: *mut c_void,
    ) -> Result<()> {
        // SAFETY: what that asks of its caller is what this function asks of its own.
        unsafe { self.backward_shared_raw(&op.into(), workspace, workspace_bytes, stream) }
    }

    /// [`backward_shared`](Self::backward_shared) over addresses, as [`forward_raw`](Self::forward_raw).
    ///
    /// # Errors
    /// What [`Plan::backward_shared_with`] and [`Plan::launch`] find; [`Error::Driver`](crate::Error::Driver).
    ///
    /// # Safety
    /// As [`backward_raw`](Self::backward_raw).
    pub unsafe fn backward_shared_raw(
        &self,
        op: &raw::BackwardShared,
        workspace: u64,
        workspace_bytes: usize,
        stream: *mut c_void,
    ) -> Result<()> {
        let launch = Plan::backward_shared_with(op, self.device(), self.options)?.launch(workspace, workspace_bytes)?;
        // SAFETY: what `launch` relies on is what this function asks of its caller.
        unsafe { self.launch(&launch, stream.cast()) }
    }

    /// # Safety
    /// `stream` is a stream of the kernels' context; what the parameters point to is as the launch says until it has run.
    unsafe fn launch(&self, planned: &Launch, stream: CUstream) -> Result<()> {
        let function = module::find(&self.loaded.modules, planned.image, planned.kernel, self.device().arch)?;
        self.context().bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;
        // SAFETY: the function was found by the launch's own names in a module of this context, now current, which waits
        // for the device before it unloads; the rest is what the caller vouches for.
        unsafe { launch(function, stream, planned) }
    }
}

#[cfg(test)]
mod tests {
    use super::{Kernels, Workspace};

    /// Compiles only if handles can be shared and workspaces sent.
    #[test]
    fn handles_are_shared_between_threads() {
        fn shared<T: Send + Sync>() {}
        shared::<Kernels>();
        shared::<Workspace>();
    }
}
