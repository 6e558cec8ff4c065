//! The one error type of the crate: a sentence per variant, with the argument, what it is and what it must be.

use crate::Dtype;

/// Everything that can go wrong before a kernel is launched, and every failure the driver reports.
///
/// When a call returns an error nothing was launched and no buffer was touched, but for one case: on the per-thread default
/// stream the driver may fail to record the event that follows the launch.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A matrix or vector disagrees with the dimensions the other arguments imply.
    #[error("`{arg}` has {got} {axis}, expected {expected}")]
    Dimension {
        /// Argument, in the letters of the crate (`x`, `w`, `a`, …).
        arg: &'static str,
        /// `"rows"`, `"columns"` or `"elements"`.
        axis: &'static str,
        /// What was passed.
        got: usize,
        /// What the other arguments imply.
        expected: usize,
    },
    /// A dimension that must be at least one is zero.
    #[error("`{arg}` has zero {axis}, expected at least 1")]
    ZeroDimension {
        /// Argument.
        arg: &'static str,
        /// `"rows"` or `"columns"`.
        axis: &'static str,
    },
    /// A size exceeds what the kernels or the address space can hold.
    #[error("{what} is {got}, the limit is {limit}")]
    TooLarge {
        /// The quantity, in words.
        what: &'static str,
        /// Its value (`u64::MAX` when the arithmetic itself overflowed).
        got: u64,
        /// The largest accepted value.
        limit: u64,
    },
    /// Rows would overlap: the distance between rows is smaller than a row.
    #[error("`{arg}` has a row stride of {got} elements, expected at least its {min} columns")]
    Stride {
        /// Argument.
        arg: &'static str,
        /// Row stride in elements.
        got: usize,
        /// Number of columns.
        min: usize,
    },
    /// The buffer ends before the matrix does.
    #[error("`{arg}` needs {needed} elements from the start of its buffer, which holds {got}")]
    BufferTooShort {
        /// Argument.
        arg: &'static str,
        /// Elements in the buffer.
        got: usize,
        /// Elements needed: offset + (rows − 1) · row stride + columns.
        needed: usize,
    },
    /// A device address of 0 was passed for an argument that is read or written.
    #[error("`{arg}` is a null pointer, expected the device address of its first element")]
    NullPointer {
        /// Argument.
        arg: &'static str,
    },
    /// An address is not a multiple of the element size (or of what a workspace needs).
    #[error("`{arg}` starts at address {address:#x}, expected a multiple of {align} bytes")]
    Misaligned {
        /// Argument.
        arg: &'static str,
        /// Address passed.
        address: u64,
        /// Required alignment in bytes.
        align: u64,
    },
    /// An output shares memory with another argument.
    #[error("output `{output}` overlaps `{other}`, expected disjoint memory")]
    Overlap {
        /// The argument that is written.
        output: &'static str,
        /// The argument it collides with.
        other: &'static str,
    },
    /// An optional input is needed by a requested output.
    #[error("`{arg}` is absent, expected it because `{output}` is requested")]
    Missing {
        /// The absent input.
        arg: &'static str,
        /// The output computed from it.
        output: &'static str,
    },
    /// Two arguments rule each other out.
    #[error("`{arg}` and `{other}` are both present, expected one of them: together they are not computed")]
    Exclusive {
        /// Argument.
        arg: &'static str,
        /// The other.
        other: &'static str,
    },
    /// An operation was called without any output.
    #[error("no output is requested, expected at least one of {expected}")]
    NoOutput {
        /// The outputs that it has.
        expected: &'static str,
    },
    /// The scale is NaN or infinite, or becomes so when dropout divides it by 1 − p.
    #[error("`{arg}` is {got}, expected a finite number")]
    Scale {
        /// `"scale"`, or that of one of several projections.
        arg: &'static str,
        /// Value passed.
        got: f32,
    },
    /// The probability of dropout is NaN or not one.
    #[error("`dropout` is {got}, expected a probability from 0 to 1")]
    Probability {
        /// Value passed.
        got: f32,
    },
    /// A row of a batch is routed through an adapter that is not there.
    #[error("row {row} is routed through adapter {got}, expected less than the {adapters} that are there")]
    Route {
        /// Row of x.
        row: usize,
        /// Adapter it names.
        got: usize,
        /// Number of adapters.
        adapters: usize,
    },
    /// None, or too many projections share x.
    #[error("{got} projections share x, expected 1 to {limit}")]
    Projections {
        /// How many were passed.
        got: usize,
        /// The most that one launch takes.
        limit: usize,
    },
    /// Routes, which one projection alone may have.
    #[error("`routes` is present with {got} projections that share x, expected it with one alone")]
    RoutedProjections {
        /// How many were passed.
        got: usize,
    },
    /// The backend does not compute in this element type.
    #[error("dtype {got:?} is not computed by {backend}, expected one of {expected}")]
    Dtype {
        /// Type passed.
        got: Dtype,
        /// Backend, in words.
        backend: &'static str,
        /// Types it computes in.
        expected: &'static str,
    },
    /// A tensor has the wrong element type for its place.
    #[error("`{arg}` is of dtype {got}, expected {expected}")]
    ArgumentDtype {
        /// Argument.
        arg: &'static str,
        /// Its type, as its library names it.
        got: String,
        /// The types it may have, and why.
        expected: String,
    },
    /// A tensor has too few or too many dimensions.
    #[error("`{arg}` has {got} dimensions, expected {expected}")]
    Rank {
        /// Argument.
        arg: &'static str,
        /// How many it has.
        got: usize,
        /// How many it may have.
        expected: &'static str,
    },
    /// A tensor that is frozen takes part in the computation of gradients.
    #[error("`{arg}` is tracked for gradients, which are not computed for it: expected it detached")]
    Tracked {
        /// Argument.
        arg: &'static str,
    },
    /// An option of the planner asks for what another option, the call, the device or the build rules out.
    #[error("the plan option `{option}` is {got}, expected {expected}")]
    PlanOption {
        /// Field of [`Options`](crate::plan::Options).
        option: &'static str,
        /// Its value.
        got: String,
        /// What it may be, and what stands against it.
        expected: String,
    },
    /// The workspace is smaller than the plan asks for.
    #[error("workspace holds {got} bytes, expected at least {needed}")]
    Workspace {
        /// Bytes available.
        got: usize,
        /// Bytes needed, as the plan's `workspace_bytes` said.
        needed: usize,
    },
    /// A buffer or workspace lives in another CUDA context (or on another device) than the kernels.
    #[error(
        "`{arg}` belongs to CUDA device {got}, expected device {expected} and the context the kernels were loaded in"
    )]
    WrongContext {
        /// Argument.
        arg: &'static str,
        /// Device ordinal of the argument's context.
        got: usize,
        /// Device ordinal the kernels were loaded on.
        expected: usize,
    },
    /// A buffer was allocated through another `CudaContext` object of the same device than the stream was made by. cudarc
    /// orders streams and buffers per object.
    #[error("`{arg}` was allocated through another `CudaContext` object than the stream, expected the same one")]
    ForeignContext {
        /// Argument.
        arg: &'static str,
    },
    /// The GPU's architecture has no image in this build.
    #[error("GPU architecture sm_{got} has no kernel image in this build, which holds {built}")]
    UnsupportedArch {
        /// Compute capability as major · 10 + minor.
        got: u32,
        /// The architectures that were compiled, in words.
        built: String,
    },
    /// The NVIDIA driver library is not on this machine.
    #[error("no NVIDIA driver found: {reason}")]
    NoDriver {
        /// What was looked for and what the loader said.
        reason: String,
    },
    /// A layer has no adapter of the given name, or has one already.
    #[error("the adapter name is {got:?}, expected {expected}")]
    AdapterName {
        /// Name passed.
        got: String,
        /// What it may be.
        expected: String,
    },
    /// A layer is in a state that rules the operation out.
    #[error("`{operation}` was called while {got}, expected {expected}")]
    State {
        /// Method of the layer.
        operation: &'static str,
        /// The state.
        got: String,
        /// What must come first.
        expected: &'static str,
    },
    /// The device, or the host where a backend needs scratch there, has too little memory for an allocation.
    #[error("out of memory: could not allocate {bytes} bytes")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
    },
    /// The CUDA driver reported an error.
    #[error("{call} failed: {message}")]
    Driver {
        /// What the crate was doing.
        call: &'static str,
        /// The driver's name and description of the error.
        message: String,
    },
    /// The operation cannot be done while the stream is being captured into a graph.
    #[error("{what} while the stream is being captured, expected it to be done before the capture begins")]
    Capturing {
        /// The operation, in words.
        what: &'static str,
    },
    /// The emulator stopped the kernel with a report.
    #[error("the emulator stopped the kernel: {report}")]
    Emulator {
        /// The report, as the emulator prints it.
        report: String,
    },
}

/// Result with the crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
