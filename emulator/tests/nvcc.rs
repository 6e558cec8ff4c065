//! Kernels as they are written in CUDA, through nvcc: no false alarm, and every synchronisation is needed. Skipped without nvcc.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use half::bf16;
use ptx_emulator::{
    Device, Interleave, L2Promotion, Launch, Memory, Module, OobFill, Options, Rule, Swizzle, TensorMap, TensorType,
    Timing,
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

/// The PTX of a file in `tests/kernels`; `None`, after a line that says so, where there is no nvcc.
fn compile(name: &str, arch: &str) -> Option<String> {
    let Some(nvcc) = nvcc() else {
        // Past the harness, which captures what macros print.
        let _ = std::io::stderr().write_all(format!("\nSKIPPED: no nvcc: {name}\n").as_bytes());
        return None;
    };
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kernels").join(name);
    let ptx = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name).with_extension("ptx");
    let status = Command::new(nvcc)
        .args(["-std=c++17", "-ptx", "-lineinfo", arch, "-o"])
        .args([&ptx, &source])
        .status()
        .expect("nvcc starts");
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
    let Some(text) = compile("ring.cu", "-arch=compute_90a") else { return };
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

/// A kernel of three or four parameters: `in`, `out`, `work` if there are words of it, and a count.
struct Kernel {
    grid: u32,
    block: u32,
    shared_bytes: u32,
    work: usize,
    count: u32,
    input: Vec<u8>,
    expected: Vec<u32>,
}

impl Kernel {
    /// Whether it leaves what is expected, or what is reported.
    fn run(&self, module: &Module, kernel: &str, seed: u64) -> Result<bool, (Rule, String)> {
        let mut memory = Memory::new();
        let (input, output) = (memory.alloc("in", self.input.len()), memory.alloc("out", 4 * self.expected.len()));
        memory.write(input, &self.input).expect("in range");
        let mut params: Vec<u8> = [input, output].into_iter().flat_map(u64::to_le_bytes).collect();
        if self.work != 0 {
            let work = memory.alloc("work", 4 * self.work);
            memory.write(work, &vec![0; 4 * self.work]).expect("in range");
            params.extend(work.to_le_bytes());
        }
        params.extend(self.count.to_le_bytes());
        let (grid, block) = ([self.grid, 1, 1], [self.block, 1, 1]);
        let launch = Launch { kernel, grid, cluster: [1; 3], block, shared_bytes: self.shared_bytes, params: &params };
        let copies = [Timing::Eager, Timing::Lazy, Timing::Mixed][seed as usize % 3];
        let options = Options { seed, copies, device: Device::hopper(), patience: 50_000, ..Options::default() };
        module.launch(&mut memory, &launch, &options).map_err(|report| (report.rule, report.to_string()))?;
        let expected: Vec<u8> = self.expected.iter().flat_map(|word| word.to_le_bytes()).collect();
        Ok(memory.read(output, expected.len()).is_ok_and(|out| out == expected))
    }

    /// `name_0` is right with every seed; each `name_i` is reported with every seed under one of its rules, at a line that holds
    /// these words, or (no rules) leaves something else.
    fn check(&self, module: &Module, name: &str, broken: &[(&[Rule], &str)]) {
        for seed in 1..=20 {
            assert_eq!(self.run(module, &format!("{name}_0"), seed), Ok(true), "{name}, seed {seed}");
            for (i, (rules, at)) in broken.iter().enumerate() {
                let kernel = format!("{name}_{}", i + 1);
                match self.run(module, &kernel, seed) {
                    Ok(right) => assert!(rules.is_empty() && !right, "{kernel}, seed {seed}: nothing is reported"),
                    Err((rule, text)) => {
                        assert!(rules.contains(&rule) && text.contains(at), "{kernel}, seed {seed}: {text}");
                    }
                }
            }
        }
    }
}

const RACE: &[Rule] = &[Rule::Race];

/// Grid barrier, last block, stream-K and histogram: flags and counters in global memory that are set back.
#[test]
fn grids_that_synchronise() {
    let Some(text) = compile("grid.cu", "-arch=compute_80") else { return };
    let module = Module::parse(&text).expect("parses");
    let input: Vec<u32> = (0..16384).map(|i| i * 7 % 1000 + 1).collect();
    let kernel = |grid: u32, expected: Vec<u32>| Kernel {
        grid,
        block: 64,
        shared_bytes: 0,
        work: 1024,
        count: 3,
        input: input.iter().flat_map(|word| word.to_le_bytes()).collect(),
        expected,
    };
    let neighbour = |i: u32| (0..3).map(|round| round * 1000 + (i / 64 + 1) % 6 + ((i % 64) ^ 33)).sum();
    let at = "of `work` at offset";
    kernel(6, (0..6 * 64).map(neighbour).collect()).check(&module, "barrier", &[(RACE, at); 4]);
    let sum = |i: u32| (0..5).map(|cta| input[(cta * 64 + ((i % 64) ^ 33)) as usize] * (i / 64 + 1)).sum();
    kernel(5, (0..3 * 64).map(sum).collect()).check(&module, "last_block", &[(RACE, at); 5]);
    let pair = |i: u32| {
        let (round, pair, t) = (i / 192, i / 64 % 3, i % 64);
        (0..2).map(|half| input[((2 * pair + half) * 64 + t) as usize] + round).sum()
    };
    kernel(6, (0..3 * 192).map(pair).collect()).check(&module, "fix_up", &[(RACE, at); 6]);
    let bin = |bin| input[..1024].iter().filter(|word| *word % 64 == bin).count() as u32;
    kernel(4, (0..64).map(bin).collect()).check(&module, "histogram", &[(RACE, at); 3]);
}

/// Where an element of an operand lies that is 64 x 64: `[k / 8][row][k % 8]`.
fn place(row: usize, k: usize) -> usize {
    k / 8 * 512 + row * 8 + k % 8
}

#[test]
fn warpgroups_that_work_together() {
    let Some(text) = compile("warpgroup.cu", "-arch=compute_90a") else { return };
    let module = Module::parse(&text).expect("parses");
    let value = |i: usize| ((i * 7 + i / 64 * 3 + i / 4096) % 5) as f32 - 2.0;
    let halves = |operands: usize| -> Vec<u8> {
        (0..operands * 4096).flat_map(|i| bf16::from_f32(value(i)).to_bits().to_le_bytes()).collect()
    };
    const WAITS: &[Rule] = &[Rule::Race, Rule::Uninitialised, Rule::MbarrierMisuse];

    let product = |i: usize| {
        let (tile, row, column) = (i / 4096, i / 64 % 64, i % 64);
        let each = (0..192).map(|k| {
            let step = (tile * 3 + k / 64) * 8192;
            value(step + place(row, k % 64)) * value(step + 4096 + place(column, k % 64))
        });
        each.sum::<f32>().to_bits()
    };
    let expected = (0..6 * 4096).map(product).collect();
    Kernel { grid: 1, block: 384, shared_bytes: 65536, work: 0, count: 6, input: halves(36), expected }.check(
        &module,
        "ping_pong",
        &[
            // A stage is let go one group too early; offsets swapped; bytes missing; the parity of the other phase; no wait for a
            // free stage; no fence of the registers; no wait for a full one; sums that are in flight.
            (RACE, "wgmma"),
            (&[], ""),
            (&[Rule::Deadlock], "16 bytes"),
            (&[Rule::Deadlock], "waits for the mbarrier"),
            (WAITS, ""),
            (&[Rule::RegisterFence], "fence"),
            (WAITS, ""),
            (&[Rule::InFlight], "wait_group has waited"),
        ],
    );

    let mut expected = vec![0.0f32; 8192];
    for (i, sum) in expected.iter_mut().enumerate() {
        let (group, row, column) = (i / 4096, i / 64 % 64, i % 64);
        for block in (0..4).map(|block| (2 + 2 * block) * 4096) {
            for key in 0..64 {
                let score: f32 =
                    (0..64).map(|k| value(group * 4096 + place(row, k)) * value(block + place(key, k))).sum();
                let v = block + 4096 + key / 8 * 512 + column / 8 * 64 + key % 8 * 8 + column % 8;
                *sum += bf16::from_f32(score.max(0.0)).to_f32() * value(v);
            }
        }
    }
    let expected = expected.into_iter().map(f32::to_bits).collect();
    Kernel { grid: 1, block: 256, shared_bytes: 65536, work: 0, count: 4, input: halves(10), expected }.check(
        &module,
        "attention",
        &[
            // No proxy fence; one before the stores; no barrier after it; offsets swapped; a stage that is still read.
            (RACE, "generic proxy only"),
            (RACE, "generic proxy only"),
            (RACE, "wgmma"),
            (WAITS, ""),
            (RACE, "wgmma"),
        ],
    );

    let word = |i: usize| (i * 7 % 1000) as f32;
    let sum = |t: usize| {
        let each = (0..8).flat_map(|tile| (0..4).map(move |j| word(tile * 256 + (t * 5 + j * 64) % 256)));
        each.sum::<f32>().to_bits()
    };
    let input = (0..8 * 256).flat_map(|i| word(i).to_le_bytes()).collect();
    const COPIES: &[Rule] = &[Rule::Race, Rule::Uninitialised, Rule::AsyncLeft];
    let kernel =
        Kernel { grid: 1, block: 128, shared_bytes: 0, work: 0, count: 8, input, expected: (0..64).map(sum).collect() };
    // No wait for a free stage; an arrival that does not wait for the copies; one too many expected; the other parity.
    let wrong_parity: &[Rule] = &[Rule::Race, Rule::Uninitialised, Rule::Deadlock, Rule::MbarrierMisuse];
    kernel.check(&module, "copies", &[(RACE, ""), (COPIES, ""), (&[Rule::Deadlock], ""), (wrong_parity, "")]);
}
