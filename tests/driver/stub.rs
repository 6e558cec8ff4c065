//! The stub: compiled from tests/stub/cuda.c, loaded before anything asks for libcuda, and one test at a time.

use std::ffi::{CStr, c_char, c_int, c_long};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use fused_lora::cuda::Kernels;
use libloading::Library;

use super::common;

/// What the stub counts of; the order is that of its source.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    Stream = 1,
    Event = 2,
    Module = 3,
    Graph = 4,
    Exec = 5,
    Memory = 6,
}

pub const KINDS: [Kind; 6] = [Kind::Stream, Kind::Event, Kind::Module, Kind::Graph, Kind::Exec, Kind::Memory];

/// CUDA_ERROR_OUT_OF_MEMORY, CUDA_ERROR_UNKNOWN.
pub const OUT_OF_MEMORY: i32 = 2;
pub const UNKNOWN: i32 = 999;

/// The stub while a test has it for itself.
pub struct Stub {
    library: &'static Library,
    _alone: MutexGuard<'static, ()>,
}

/// The loader gives this to whoever asks for libcuda.so.1 later, by its soname.
fn library() -> Option<&'static Library> {
    static LIBRARY: OnceLock<Option<Library>> = OnceLock::new();
    let load = || {
        let source = common::project().join("tests/stub/cuda.c");
        let path = common::scratch().join(format!("libcuda-{}.so", std::process::id()));
        if !source.is_file() {
            return None;
        }
        let flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-Wl,-soname,libcuda.so.1", "-o"];
        let compiled = Command::new("cc").args(flags).arg(&path).arg(&source).arg("-lpthread").status().ok()?;
        assert!(compiled.success(), "the stub does not compile");
        // SAFETY: it was just compiled from our source, which has no initialisers.
        Some(unsafe { Library::new(&path) }.expect("the stub loads"))
    };
    LIBRARY.get_or_init(load).as_ref()
}

impl Stub {
    /// The stub as new, for a GPU of `arch`; `None`, after a line that says so, where it cannot be compiled.
    pub fn new(test: &str, arch: i32) -> Option<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(library) = library() else {
            common::skipped(test, "no C compiler, or no source, where this runs");
            return None;
        };
        let stub = Self { library, _alone: alone };
        stub.set("stub_arch", arch);
        stub.fail(0, 0);
        stub.limit(0);
        stub.clear();
        Some(stub)
    }

    fn set(&self, name: &str, value: c_int) {
        // SAFETY: the stub's functions of this shape take an integer.
        unsafe { self.library.get::<unsafe extern "C" fn(c_int)>(name.as_bytes()).expect("a function")(value) }
    }

    fn get(&self, name: &str) -> c_int {
        // SAFETY: the stub's functions of this shape return an integer.
        unsafe { self.library.get::<unsafe extern "C" fn() -> c_int>(name.as_bytes()).expect("a function")() }
    }

    /// Forgets the calls so far.
    pub fn clear(&self) {
        // SAFETY: the function takes nothing and returns nothing.
        unsafe { self.library.get::<unsafe extern "C" fn()>(b"stub_clear").expect("a function")() }
    }

    /// The `nth` call from the last `clear` on fails, once; 0: none does.
    pub fn fail(&self, nth: usize, code: i32) {
        type Fail = unsafe extern "C" fn(c_long, c_int, c_int);
        // SAFETY: the function takes these.
        unsafe { self.library.get::<Fail>(b"stub_fail").expect("a function")(nth as c_long, code, 0) }
    }

    /// Bytes of device memory; 0: as much as there is.
    pub fn limit(&self, bytes: usize) {
        // SAFETY: the function takes a size.
        unsafe { self.library.get::<unsafe extern "C" fn(usize)>(b"stub_limit").expect("a function")(bytes) }
    }

    /// The names of the calls since the last `clear`.
    pub fn calls(&self) -> Vec<String> {
        type Call = unsafe extern "C" fn(c_long) -> *const c_char;
        // SAFETY: the functions take nothing, and the number of a call; names are literals of the stub.
        unsafe {
            let count = self.library.get::<unsafe extern "C" fn() -> c_long>(b"stub_calls").expect("a function")();
            let call = self.library.get::<Call>(b"stub_call").expect("a function");
            (0..count).map(|at| CStr::from_ptr(call(at)).to_string_lossy().into_owned()).collect()
        }
    }

    /// Kernels that ran since the last `clear`, those of graphs among them.
    pub fn launched(&self) -> i32 {
        self.get("stub_launched")
    }

    /// Calls with what was not alive, or memory that was not allocated, ever.
    pub fn misuse(&self) -> i32 {
        self.get("stub_misuse")
    }

    /// How many objects of each kind there are.
    pub fn live(&self) -> [i32; 6] {
        type Live = unsafe extern "C" fn(c_int) -> c_int;
        // SAFETY: the function takes a kind and returns a count.
        let live = unsafe { self.library.get::<Live>(b"stub_live") }.expect("a function");
        // SAFETY: as above.
        KINDS.map(|kind| unsafe { live(kind as c_int) })
    }

    /// The kernels in the context of a GPU of the stub, of which there are two.
    pub fn kernels(&self, ordinal: usize) -> Kernels {
        Kernels::on_device(ordinal).expect("the kernels load")
    }
}
