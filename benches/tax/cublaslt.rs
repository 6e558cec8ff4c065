//! cuBLASLt, the rival, found at run time: plain row-major products in 16 bits, summed in f32.

use std::env;
use std::ffi::{OsStr, OsString, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr;

use fused_lora::Dtype;
use libloading::Library;

/// Its files, newest first.
const NAMES: [&str; 2] = ["libcublasLt.so.13", "libcublasLt.so.12"];
/// Where wheels keep them below a folder of Python packages.
const IN_WHEELS: [&str; 2] = ["nvidia/cu13/lib", "nvidia/cublas/lib"];
/// What each product may use beside its operands.
pub const WORKSPACE_BYTES: usize = 64 << 20;
/// Algorithms that the heuristic is asked for, each of which is timed.
const CANDIDATES: usize = 8;

/// Every file to try: what the loader finds by itself (LD_LIBRARY_PATH, the system's folders), toolkits, Python's wheels.
pub fn places(variable: impl Fn(&str) -> Option<OsString>, packages: &[PathBuf]) -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = vec![PathBuf::new()];
    folders.extend(variable("LD_LIBRARY_PATH").iter().flat_map(env::split_paths));
    folders
        .extend(["CUDA_HOME", "CUDA_PATH"].iter().filter_map(|name| Some(Path::new(&variable(name)?).join("lib64"))));
    folders.extend(
        ["/usr/local/cuda/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu"].map(PathBuf::from),
    );
    folders.extend(packages.iter().flat_map(|folder| IN_WHEELS.map(|inside| folder.join(inside))));
    NAMES.iter().flat_map(|name| folders.iter().map(move |folder| folder.join(name))).collect()
}

/// Folders of Python packages, as the `python3` of PATH names them; none without it.
pub fn python_packages() -> Vec<PathBuf> {
    let script =
        "import site, sys; print('\\n'.join([*sys.path, *site.getsitepackages(), site.getusersitepackages()]))";
    let Ok(output) = Command::new("python3").args(["-c", script]).output() else { return Vec::new() };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut folders: Vec<PathBuf> =
        text.lines().filter(|line| line.ends_with("-packages")).map(PathBuf::from).collect();
    folders.dedup();
    folders
}

/// Why there is no figure of cuBLASLt.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("cuBLASLt was not found in {0} places; LD_LIBRARY_PATH may name its folder. The last: {1}")]
    NotFound(usize, String),
    #[error("{call} of cuBLASLt returned status {status}")]
    Status { call: &'static str, status: c_int },
    #[error("cuBLASLt has no algorithm for {0:?}")]
    NoAlgorithm(Box<Product>),
}

/// out = alpha · left · right + beta · out, all row-major and contiguous: left is `rows` × `depth`, or stored as its
/// transpose; right is `depth` × `columns`, or stored as its transpose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Product {
    pub rows: usize,
    pub columns: usize,
    pub depth: usize,
    pub left_transposed: bool,
    pub right_transposed: bool,
    pub dtype: Dtype,
    pub out: Dtype,
    pub alpha: f32,
    pub beta: f32,
}

/// A column-major matrix as cuBLASLt sees it: rows, columns, distance between columns.
type Layout = (u64, u64, i64);

impl Product {
    /// cuBLASLt is column-major: what is row-major is to it the transpose, so it multiplies outᵀ = rightᵀ · leftᵀ. Its A, B and
    /// C, and whether it transposes A and B.
    pub fn column_major(&self) -> ([Layout; 3], [bool; 2]) {
        let of_rows = |rows: usize, columns: usize| (columns as u64, rows as u64, columns as i64);
        let stored =
            |rows, columns, transposed| if transposed { of_rows(columns, rows) } else { of_rows(rows, columns) };
        let right = stored(self.depth, self.columns, self.right_transposed);
        let left = stored(self.rows, self.depth, self.left_transposed);
        ([right, left, of_rows(self.rows, self.columns)], [self.right_transposed, self.left_transposed])
    }
}

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Heuristic {
    algorithm: [u64; 8],
    workspace_bytes: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

type Handle = *mut c_void;
type Matmul = unsafe extern "C" fn(
    Handle,
    Handle,
    *const c_void,
    *const c_void,
    Handle,
    *const c_void,
    Handle,
    *const c_void,
    *const c_void,
    Handle,
    *mut c_void,
    Handle,
    *const [u64; 8],
    *mut c_void,
    usize,
    *mut c_void,
) -> c_int;
type GetHeuristic = unsafe extern "C" fn(
    Handle,
    Handle,
    Handle,
    Handle,
    Handle,
    Handle,
    Handle,
    c_int,
    *mut Heuristic,
    *mut c_int,
) -> c_int;

/// The loaded library with a handle of its own.
pub struct CublasLt {
    library: Library,
    handle: Handle,
    pub path: PathBuf,
    /// As `cublasLtGetVersion` says: 130101 is 13.1.1.
    pub version: usize,
}

/// A product with its descriptors. They live as long as the process: there are few.
pub struct Prepared {
    product: Product,
    description: Handle,
    layouts: [Handle; 3],
    algorithm: [u64; 8],
}

fn check(call: &'static str, status: c_int) -> Result<(), Failure> {
    if status == 0 { Ok(()) } else { Err(Failure::Status { call, status }) }
}

fn data_type(dtype: Dtype) -> c_int {
    match dtype {
        Dtype::F32 => 0,   // CUDA_R_32F
        Dtype::F16 => 2,   // CUDA_R_16F
        Dtype::Bf16 => 14, // CUDA_R_16BF
    }
}

impl CublasLt {
    /// The first of [`places`] that loads and can make a handle; the CUDA context must be current.
    pub fn find() -> Result<CublasLt, Failure> {
        let places = places(|name| env::var_os(name), &python_packages());
        let mut last = String::new();
        for place in &places {
            match CublasLt::open(place.as_os_str()) {
                Ok(found) => return Ok(found),
                Err(error) => last = format!("{}: {error}", place.display()),
            }
        }
        Err(Failure::NotFound(places.len(), last))
    }

    /// The library at `path`, or of that name where the loader finds it.
    pub fn open(path: &OsStr) -> Result<CublasLt, Box<dyn std::error::Error>> {
        // SAFETY: loading runs the initialisers of NVIDIA's library, which are made to run in any process.
        let library = unsafe { Library::new(path) }?;
        let mut handle = ptr::null_mut();
        // SAFETY: the signatures are those of cublasLt.h, the same in CUDA 12 and 13; the handle is written to a place of its own.
        let version = unsafe {
            let create = library.get::<unsafe extern "C" fn(*mut Handle) -> c_int>(b"cublasLtCreate")?;
            check("cublasLtCreate", create(&raw mut handle))?;
            library.get::<unsafe extern "C" fn() -> usize>(b"cublasLtGetVersion")?()
        };
        Ok(CublasLt { library, handle, path: path.into(), version })
    }

    /// One function; a library without it is not cuBLASLt.
    ///
    /// # Safety
    /// `F` is the signature that cublasLt.h gives it.
    unsafe fn function<F: Copy>(&self, name: &'static str) -> Result<F, Failure> {
        // SAFETY: the caller vouches for the signature.
        unsafe { self.library.get::<F>(name.as_bytes()) }
            .map(|symbol| *symbol)
            .map_err(|_| Failure::Status { call: name, status: -1 })
    }

    fn describe(&self, product: &Product) -> Result<(Handle, [Handle; 3]), Failure> {
        type Set = unsafe extern "C" fn(Handle, c_int, *const c_void, usize) -> c_int;
        let (matrices, transposed) = product.column_major();
        let (mut description, mut layouts) = (ptr::null_mut(), [ptr::null_mut(); 3]);
        // SAFETY: the signatures are those of cublasLt.h; what the attributes are set from is alive during each call.
        unsafe {
            let create =
                self.function::<unsafe extern "C" fn(*mut Handle, c_int, c_int) -> c_int>("cublasLtMatmulDescCreate")?;
            // CUBLAS_COMPUTE_32F, and factors in CUDA_R_32F.
            check("cublasLtMatmulDescCreate", create(&raw mut description, 68, 0))?;
            let set = self.function::<Set>("cublasLtMatmulDescSetAttribute")?;
            // CUBLASLT_MATMUL_DESC_TRANSA and _TRANSB; CUBLAS_OP_T is 1.
            for (attribute, transposed) in [3, 4].into_iter().zip(transposed) {
                let operation = c_int::from(transposed);
                let value = (&raw const operation).cast();
                check("cublasLtMatmulDescSetAttribute", set(description, attribute, value, size_of::<c_int>()))?;
            }
            let layout = self.function::<unsafe extern "C" fn(*mut Handle, c_int, u64, u64, i64) -> c_int>(
                "cublasLtMatrixLayoutCreate",
            )?;
            let dtypes = [product.dtype, product.dtype, product.out];
            for ((made, (rows, columns, distance)), dtype) in layouts.iter_mut().zip(matrices).zip(dtypes) {
                check("cublasLtMatrixLayoutCreate", layout(made, data_type(dtype), rows, columns, distance))?;
            }
        }
        Ok((description, layouts))
    }

    /// The candidates of the heuristic for a product, at least one.
    pub fn candidates(&self, product: Product) -> Result<Vec<Prepared>, Failure> {
        type Set = unsafe extern "C" fn(Handle, c_int, *const c_void, usize) -> c_int;
        let (description, layouts) = self.describe(&product)?;
        let [a, b, c] = layouts;
        let (mut preference, mut returned) = (ptr::null_mut(), 0);
        let mut found = [Heuristic::default(); CANDIDATES];
        // SAFETY: as above; `found` has room for as many results as are asked for.
        unsafe {
            let create =
                self.function::<unsafe extern "C" fn(*mut Handle) -> c_int>("cublasLtMatmulPreferenceCreate")?;
            check("cublasLtMatmulPreferenceCreate", create(&raw mut preference))?;
            let set = self.function::<Set>("cublasLtMatmulPreferenceSetAttribute")?;
            let bytes = WORKSPACE_BYTES;
            // CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES.
            let status = set(preference, 1, (&raw const bytes).cast(), size_of::<usize>());
            check("cublasLtMatmulPreferenceSetAttribute", status)?;
            let heuristic = self.function::<GetHeuristic>("cublasLtMatmulAlgoGetHeuristic")?;
            let (most, into) = (CANDIDATES as c_int, found.as_mut_ptr());
            let status = heuristic(self.handle, description, a, b, c, c, preference, most, into, &raw mut returned);
            check("cublasLtMatmulAlgoGetHeuristic", status)?;
        }
        let usable = found.iter().take(usize::try_from(returned).unwrap_or(0)).filter(|result| result.state == 0);
        let prepared: Vec<Prepared> =
            usable.map(|result| Prepared { product, description, layouts, algorithm: result.algorithm }).collect();
        if prepared.is_empty() { Err(Failure::NoAlgorithm(Box::new(product))) } else { Ok(prepared) }
    }

    /// Starts a product on `stream`.
    ///
    /// # Safety
    /// `left`, `right` and `out` are device addresses of the product's matrices, `workspace` one of [`WORKSPACE_BYTES`] bytes; all
    /// stay allocated, and in order with what else uses them, until the stream has come by. `stream` is a stream of the current
    /// context.
    pub unsafe fn run(
        &self,
        prepared: &Prepared,
        [left, right, out]: [u64; 3],
        workspace: u64,
        stream: *mut c_void,
    ) -> Result<(), Failure> {
        let Prepared { product, description, layouts: [a, b, c], algorithm } = prepared;
        let factor = |value: &f32| ptr::from_ref(value).cast::<c_void>();
        let at = |address: u64| address as *mut c_void;
        // SAFETY: the signature is that of cublasLt.h; descriptors and algorithm were made for each other by this library; for
        // the addresses the caller vouches.
        let status = unsafe {
            let matmul = self.function::<Matmul>("cublasLtMatmul")?;
            matmul(
                self.handle,
                *description,
                factor(&product.alpha),
                at(right),
                *a,
                at(left),
                *b,
                factor(&product.beta),
                at(out),
                *c,
                at(out),
                *c,
                algorithm,
                at(workspace),
                WORKSPACE_BYTES,
                stream,
            )
        };
        check("cublasLtMatmul", status)
    }
}
