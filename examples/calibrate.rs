//! Records what a GPU does with the emulator's calibration kernels, and says where the emulator differs.
//!
//! ```text
//! cargo run --release --example calibrate -- --out emulator/calibration/h200.txt
//! ```
//!
//! The file is data for the emulator's tests: commit it as it is.

use std::ffi::{CString, OsString, c_void};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use fused_lora::cuda::{self, cudarc};
use ptx_emulator::calibration::{Case, MapSpec, Recording, cases};
use ptx_emulator::{Options, Swizzle};

use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, result, sys};

const HELP: &str = "\
Usage: calibrate [--device N] [--out FILE]

Runs every calibration kernel of the emulator on GPU N (0), compares the bytes it leaves with the emulator's, and writes them
to FILE. Exit status: 0 all agree; 1 some differ; 3 no GPU, or wrong usage.
";

type Failure = Box<dyn std::error::Error>;

struct Arguments {
    device: usize,
    out: Option<PathBuf>,
}

fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Option<Arguments>, Failure> {
    use lexopt::prelude::{Long, Short, ValueExt};
    let mut parsed = Arguments { device: 0, out: None };
    let mut parser = lexopt::Parser::from_args(arguments);
    while let Some(argument) = parser.next()? {
        match argument {
            Long("device") => parsed.device = parser.value()?.parse()?,
            Long("out") => parsed.out = Some(parser.value()?.into()),
            Long("help") | Short('h') => return Ok(None),
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(Some(parsed))
}

/// What the GPU leaves in `out`.
fn record(stream: &Arc<CudaStream>, case: &Case) -> Result<Vec<u8>, Failure> {
    let input = stream.clone_htod(&case.input_bytes())?;
    let mut output = stream.alloc_zeros::<u8>(case.output_words * 4)?;
    stream.context().bind_to_thread()?;
    let text = CString::new(case.ptx.as_str())?;
    // SAFETY: a context is current, and the text is PTX with a terminating zero.
    let module = unsafe { result::module::load_data(text.as_ptr().cast()) }?;
    // SAFETY: `module` was just loaded.
    let function = unsafe { result::module::get_function(module, CString::new("k")?) }?;
    {
        let (mut input, _input_guard) = input.device_ptr(stream);
        let (mut output, _output_guard) = output.device_ptr_mut(stream);
        let mut map = case.map.map(|spec| encode(&spec, input, output)).transpose()?;
        let mut params: Vec<*mut c_void> = vec![(&raw mut input).cast(), (&raw mut output).cast()];
        params.extend(map.as_mut().map(|map| std::ptr::from_mut(map).cast::<c_void>()));
        // SAFETY: the kernel takes two pointers, to as many words as `case` says, which are allocated until it has run, and a
        // tensor map over one of them when the case has one.
        unsafe {
            sys::cuLaunchKernel(
                function,
                1,
                1,
                1,
                case.threads,
                1,
                1,
                0,
                stream.cu_stream(),
                params.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()?;
    }
    stream.synchronize()?;
    let bytes = stream.clone_dtoh(&output)?;
    // SAFETY: nothing of the module runs any more.
    unsafe { result::module::unload(module) }?;
    Ok(bytes)
}

/// The driver's encoding of a case's tensor map.
fn encode(spec: &MapSpec, input: u64, output: u64) -> Result<sys::CUtensorMap, Failure> {
    let swizzle = match spec.swizzle {
        Swizzle::None => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
        Swizzle::Bytes32 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_32B,
        Swizzle::Bytes64 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
        Swizzle::Bytes128 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
    };
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    let address = if spec.on_output { output } else { input };
    // SAFETY: every array has the two (strides: one) entries that rank 2 asks for; the driver only reads them and writes `map`.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut map,
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            2,
            address as *mut c_void,
            spec.dims.as_ptr(),
            [2 * spec.dims[0]].as_ptr(),
            spec.boxes.as_ptr(),
            [1, 1].as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_NONE,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()?;
    Ok(map)
}

fn driver_version() -> String {
    let mut version = 0;
    // SAFETY: the driver writes one integer.
    match unsafe { sys::cuDriverGetVersion(&raw mut version) }.result() {
        Ok(()) => format!("CUDA {}.{}", version / 1000, version % 1000 / 10),
        Err(error) => format!("unknown ({error:?})"),
    }
}

fn run(arguments: &Arguments) -> Result<bool, Failure> {
    let context = cuda::context(arguments.device)?;
    let kernels = cuda::Kernels::new(&context)?;
    let arch = kernels.device().arch;
    let stream = context.default_stream();
    let command: Vec<String> = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    let head = |key: &str, value: String| (key.to_owned(), value);
    let mut recording = Recording {
        head: vec![
            head("gpu", format!("{} (sm_{arch})", kernels.device().name)),
            head("driver", driver_version()),
            head("commit", option_env!("FUSED_LORA_COMMIT").unwrap_or("unknown").to_owned()),
            head("command", command.join(" ")),
        ],
        outputs: Vec::new(),
    };
    let mut differing = 0;
    for case in cases() {
        if case.arch > arch || (case.exact_arch && case.arch != arch) {
            println!("{:<40} needs sm_{}", case.name, case.arch);
            continue;
        }
        let bytes = record(&stream, &case)?;
        let verdict = match case.run(&Options::default()) {
            Ok((emulated, _)) if emulated == bytes => "agrees".to_owned(),
            Ok((emulated, _)) => {
                let word = emulated.chunks(4).zip(bytes.chunks(4)).position(|(a, b)| a != b).unwrap_or(0);
                format!("DIFFERS from word {word} on")
            }
            Err(report) => format!("the emulator REPORTS {report}"),
        };
        differing += u32::from(verdict != "agrees");
        println!("{:<40} {verdict}", case.name);
        recording.outputs.push((case.name, bytes));
    }
    if let Some(path) = &arguments.out {
        std::fs::write(path, recording.to_text())?;
        println!("{} cases written to {}", recording.outputs.len(), path.display());
    }
    println!("{differing} cases differ from the emulator");
    Ok(differing == 0)
}

fn main() -> ExitCode {
    let outcome = parse(std::env::args_os().skip(1)).and_then(|arguments| match arguments {
        Some(arguments) => run(&arguments),
        None => {
            print!("{HELP}");
            Ok(true)
        }
    });
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("calibrate: {error}");
            ExitCode::from(3)
        }
    }
}
