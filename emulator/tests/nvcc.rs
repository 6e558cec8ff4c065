//! A kernel as it is written in CUDA, through nvcc: no false alarm, and every synchronisation is needed. Skipped without nvcc.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use ptx_emulator::{
    Device, Interleave, L2Promotion, Launch, Memory, Module, OobFill, Options, Swizzle, TensorMap, TensorType, Timing,
};

/// nvcc as NVCC, CUDA_HOME, CUDA_PATH or PATH name it, or where CUDA installs itself.
fn nvcc() -> Option<PathBuf> {
    let named = std::env::var_os("NVCC").map(PathBuf::from);
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os);
    let homes = homes.map(|home| PathBuf::from(home).join("bin/nvcc"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path: Vec<PathBuf> = std::env::split_paths(&path).map(|folder| folder.join("nvcc")).collect();
    let mut all = named.into_iter().chain(homes).chain(on_path).chain([PathBuf::from("/usr/local/cuda/bin/nvcc")]);
    all.find(|path| path.is_file())
}

/// The PTX of a kernel in `tests/kernels`; `None`, after a line that says so, where there is no nvcc.
fn compile(name: &str) -> Option<String> {
    let Some(nvcc) = nvcc() else {
        // Past the harness, which captures what macros print.
        let _ = std::io::stderr().write_all(format!("\nSKIPPED: no nvcc: {name}\n").as_bytes());
        return None;
    };
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kernels").join(name);
    let ptx = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name).with_extension("ptx");
    let arguments = ["-std=c++17", "-ptx", "-arch=compute_90a", "-o"];
    let status = Command::new(nvcc).args(arguments).args([&ptx, &source]).status().expect("nvcc starts");
    assert!(status.success(), "nvcc on {}", source.display());
    Some(std::fs::read_to_string(ptx).expect("nvcc wrote it"))
}

const TILES: u32 = 7;
const TILE_BYTES: usize = 64 * 64 * 2;

fn ring(text: &str, seed: u64) -> Result<Vec<u8>, String> {
    let module = Module::parse(text).map_err(|error| error.to_string())?;
    let mut memory = Memory::new();
    let bytes = TILES as usize * TILE_BYTES;
    let (input, output) = (memory.alloc("in", bytes), memory.alloc("out", 2 * bytes));
    let words: Vec<u8> = (0..bytes / 2).flat_map(|word| (word as u16).to_le_bytes()).collect();
    memory.write(input, &words).expect("in range");
    let map = |address, tiles: u32, rows, swizzle| {
        let (dims, boxes) = ([64, u64::from(tiles) * 64], [64, rows]);
        let (interleave, l2, fill) = (Interleave::None, L2Promotion::None, OobFill::Zeros);
        TensorMap::encode_tiled(
            TensorType::Bf16,
            2,
            address,
            &dims,
            &[128],
            &boxes,
            &[1, 1],
            interleave,
            swizzle,
            l2,
            fill,
        )
        .expect("a good map")
    };
    let mut params = map(input, TILES, 32, Swizzle::Bytes128).as_bytes().to_vec();
    params.extend(map(output, 2 * TILES, 64, Swizzle::None).as_bytes());
    params.extend(TILES.to_le_bytes());
    let launch = Launch {
        kernel: "ring",
        grid: [2, 1, 1],
        cluster: [2, 1, 1],
        block: [160, 1, 1],
        shared_bytes: 5 * TILE_BYTES as u32,
        params: &params,
    };
    let copies = [Timing::Eager, Timing::Lazy, Timing::Mixed][seed as usize % 3];
    let options = Options { seed, copies, device: Device::hopper(), patience: 20_000, ..Options::default() };
    module.launch(&mut memory, &launch, &options).map_err(|report| report.to_string())?;
    memory.read(output, 2 * bytes).map_err(|error| error.to_string())
}

#[test]
fn a_ring_as_written_in_cuda() {
    let Some(text) = compile("ring.cu") else { return };
    let words = 64 * 64 * TILES;
    let expected: Vec<u8> =
        (0..2 * words).flat_map(|word| ((word % words) as u16).wrapping_add(1).to_le_bytes()).collect();
    for seed in 1..=20 {
        assert!(ring(&text, seed).expect("no report") == expected, "seed {seed}");
    }
    let lines: Vec<&str> = text.lines().collect();
    let synchronises = |line: &str| {
        let starts =
            ["bar.sync", "barrier", "fence", "mbarrier.init", "mbarrier.arrive", "@p mbarrier", "cp.async.bulk."];
        starts.iter().any(|start| line.trim().starts_with(start)) && !line.contains("tensor")
    };
    let synchronising: Vec<usize> = (0..lines.len()).filter(|at| synchronises(lines[*at])).collect();
    assert!(synchronising.len() >= 16, "{synchronising:?}");
    for removed in synchronising {
        let kept: Vec<&str> = (0..lines.len()).filter(|at| *at != removed).map(|at| lines[at]).collect();
        let text = kept.join("\n");
        for seed in 1..=3 {
            assert!(ring(&text, seed).is_err(), "seed {seed}: nothing is noticed without `{}`", lines[removed]);
        }
    }
}
