//! Device memory that launches use beside their arguments.

use std::sync::Arc;
use std::thread::{self, ThreadId};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{CUdeviceptr, CUresult};
use cudarc::driver::{CudaContext, CudaEvent, CudaStream};

use super::driver::{failed, is_capturing};
use crate::error::{Error, Result};
use crate::plan::SYNC_BYTES;

/// The handle that means "the stream of the calling thread": one handle, many streams.
const PER_THREAD: usize = 2;

/// Device memory for h or dh, partial sums and synchronisation words.
///
/// One workspace serves any number of operations, one after the other. It may go from stream to stream: the second stream is
/// then made to wait, on the device, for the last operation of the first. Operations that shall overlap need a workspace
/// each. It is freed in the order of the stream that used it last, or leaked if that stream is being captured.
///
/// Operations of a CUDA graph use the workspace each time the graph runs, which this type cannot see: keep the workspace
/// alive, and use it elsewhere only in the order of the stream the graph is launched on.
#[derive(Debug)]
pub struct Workspace {
    address: CUdeviceptr,
    bytes: usize,
    last: Use,
    /// Marks the last use when another stream has to wait for it.
    done: CudaEvent,
}

/// Where the workspace was used.
#[derive(Debug)]
struct Use {
    stream: Arc<CudaStream>,
    thread: ThreadId,
}

impl Use {
    fn new(stream: &Arc<CudaStream>) -> Self {
        Self { stream: stream.clone(), thread: thread::current().id() }
    }

    fn is_per_thread(&self) -> bool {
        self.stream.cu_stream() as usize == PER_THREAD
    }

    /// On the stream of another thread, which has no name in this one.
    fn is_out_of_reach(&self) -> bool {
        self.is_per_thread() && self.thread != thread::current().id()
    }

    fn is_on(&self, stream: &CudaStream) -> bool {
        *self.stream == *stream && !self.is_out_of_reach()
    }
}

impl Workspace {
    /// At least `bytes` bytes, as [`Kernels::workspace_bytes`](super::Kernels::workspace_bytes) or a
    /// [`Plan`](crate::plan::Plan) says, allocated and made ready in the order of `stream`.
    ///
    /// # Errors
    /// [`Error::Capturing`], [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn new(stream: &Arc<CudaStream>, bytes: usize) -> Result<Self> {
        let bytes = bytes.max(SYNC_BYTES);
        let context = stream.context();
        context.bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;
        if is_capturing(stream)? {
            return Err(Error::Capturing { what: "a workspace is allocated" });
        }
        let done = context.new_event(None).map_err(failed("cuEventCreate"))?;
        let refused = |call| {
            move |error: DriverError| match error.0 {
                CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::OutOfMemory { bytes },
                _ => failed(call)(error),
            }
        };
        let address = if context.has_async_alloc() {
            // SAFETY: the stream is alive. The memory is used on this stream, and on others after an event.
            unsafe { result::malloc_async(stream.cu_stream(), bytes) }.map_err(refused("cuMemAllocAsync"))?
        } else {
            // SAFETY: a context is current.
            unsafe { result::malloc_sync(bytes) }.map_err(refused("cuMemAlloc"))?
        };
        // From here on dropping it frees the memory.
        let mut workspace = Self { address, bytes, last: Use::new(stream), done };
        // SAFETY: the memory was just allocated, with at least SYNC_BYTES bytes, and nothing else uses it.
        unsafe { result::memset_d8_async(address, 0, SYNC_BYTES, stream.cu_stream()) }
            .map_err(failed("cuMemsetD8Async"))?;
        workspace.used_on(stream)?;
        Ok(workspace)
    }

    /// Replaces the memory if it holds less than `bytes`. The old memory is freed when the operations that use it are
    /// done; a graph captured with it must not run any more.
    ///
    /// # Errors
    /// As [`Workspace::new`]; the workspace is unchanged then.
    pub fn reserve(&mut self, stream: &Arc<CudaStream>, bytes: usize) -> Result<()> {
        if bytes > self.bytes {
            *self = Self::new(stream, bytes)?;
        }
        Ok(())
    }

    /// How many bytes it holds.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The context the memory belongs to.
    pub fn context(&self) -> &Arc<CudaContext> {
        self.last.stream.context()
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    /// Makes `stream` wait for the last use, if that was on another stream.
    pub(super) fn order_on(&self, stream: &CudaStream) -> Result<()> {
        if self.last.is_on(stream) {
            return Ok(());
        }
        // Within one capture the event becomes an edge of the graph. Between captured and other work it would either
        // break the capture or drag the other stream into it.
        let capturing = is_capturing(stream)?;
        let other = if self.last.is_out_of_reach() { false } else { is_capturing(&self.last.stream)? };
        if capturing != other {
            return Err(Error::Capturing {
                what: "a workspace goes from one stream to another, only one of them captured,",
            });
        }
        if !self.last.is_out_of_reach() {
            self.done.record(&self.last.stream).map_err(failed("cuEventRecord"))?;
        }
        stream.wait(&self.done).map_err(failed("cuStreamWaitEvent"))
    }

    /// Remembers where the workspace is in use now.
    pub(super) fn used_on(&mut self, stream: &Arc<CudaStream>) -> Result<()> {
        if !self.last.is_on(stream) {
            self.last = Use::new(stream);
        }
        // Other threads cannot name this stream later, so its event is recorded now. In a capture it would be lost.
        if self.last.is_per_thread() && !is_capturing(stream)? {
            self.done.record(stream).map_err(failed("cuEventRecord"))?;
        }
        Ok(())
    }

    /// Frees the memory after the last use.
    fn free(&self) -> Result<()> {
        let stream = &self.last.stream;
        let context = stream.context();
        context.bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;
        if is_capturing(stream)? {
            return Ok(()); // the graph under construction uses it
        }
        self.order_on(stream)?;
        if context.has_async_alloc() {
            // SAFETY: `address` came from `malloc_async`, its last use comes earlier on this stream, and it is not used
            // again.
            unsafe { result::free_async(self.address, stream.cu_stream()) }.map_err(failed("cuMemFreeAsync"))
        } else {
            stream.synchronize().map_err(failed("cuStreamSynchronize"))?;
            // SAFETY: `address` came from `malloc_sync`, and the stream of its last use has just finished.
            unsafe { result::free_sync(self.address) }.map_err(failed("cuMemFree"))
        }
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        // Memory that cannot be freed in order is leaked. That happens after an error that has broken the context, which
        // every later call reports.
        let _ = self.free();
    }
}
