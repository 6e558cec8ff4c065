//! Tiny kernels, one per primitive and mode, whose output on real hardware the emulator must reproduce.
//!
//! Each [`Case`] is PTX text with a launch and an input that follows from its name. A recorder runs them on a GPU and writes
//! the bytes they leave ([`Recording`]); `tests/calibration.rs` replays every recording here. What the PTX ISA leaves open
//! (the order in which mma adds) is kept out by small integers, or recorded for the record only.

mod kernels;

pub use kernels::cases;

use crate::{
    Counters, Interleave, L2Promotion, Launch, Memory, Module, OobFill, Options, Report, Swizzle, TensorMap, TensorType,
};

/// What the input words hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// Random bits.
    Bits,
    /// Two f16 each: random integers from −8 to 8.
    SmallF16,
    /// Two bf16 each: random integers from −8 to 8.
    SmallBf16,
    /// One f32 each: random bits with an exponent between 2⁻³⁰ and 2³⁰, and now and then a special value.
    F32,
}

/// A tensor map over `in` or `out`: a matrix of 16-bit elements, dimension 0 contiguous, no interleave, zero fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapSpec {
    /// Over `out`, which the kernel stores to; else over `in`.
    pub on_output: bool,
    /// Elements.
    pub dims: [u64; 2],
    /// Elements.
    pub boxes: [u32; 2],
    /// How tiles lie in shared memory.
    pub swizzle: Swizzle,
}

/// One kernel `k(in, out)` or `k(in, out, map)`, and how to launch it: one CTA.
#[derive(Clone, Debug)]
pub struct Case {
    /// Unique; files and reports call it so.
    pub name: String,
    /// Oldest compute capability (major · 10 + minor) that runs it.
    pub arch: u32,
    /// Only on that very major version (`sm_90a` and the like).
    pub exact_arch: bool,
    /// The module.
    pub ptx: String,
    /// Threads of the CTA.
    pub threads: u32,
    /// Words of `in`.
    pub input_words: usize,
    /// Words of `out`.
    pub output_words: usize,
    /// What `in` holds. `out` holds zeros.
    pub input: Input,
    /// The third parameter: by value, at a multiple of 64 bytes.
    pub map: Option<MapSpec>,
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

const SPECIAL: [u32; 8] =
    [0, 0x8000_0000, 0x7f80_0000, 0xff80_0000, 0x7fc0_0000, 0x0000_0001, 0x7f7f_ffff, 0x3f80_8000];

impl Case {
    /// The bytes of `in`.
    pub fn input_bytes(&self) -> Vec<u8> {
        let seed = self.name.bytes().fold(0u64, |seed, byte| seed.wrapping_mul(31).wrapping_add(u64::from(byte)));
        let mut random = Random(seed);
        let mut word = || match self.input {
            Input::Bits => random.next() as u32,
            Input::F32 => {
                let bits = random.next();
                match SPECIAL.get((bits >> 40) as usize % 64) {
                    Some(special) => *special,
                    None => (bits as u32 & 0x807f_ffff) | ((97 + (bits >> 32) as u32 % 61) << 23),
                }
            }
            Input::SmallF16 | Input::SmallBf16 => {
                let mut half = || {
                    let value = (random.next() % 17) as f32 - 8.0;
                    let bits = value.to_bits();
                    match self.input {
                        Input::SmallBf16 => bits >> 16,
                        _ => u32::from(half::f16::from_f32(value).to_bits()),
                    }
                };
                half() | half() << 16
            }
        };
        (0..self.input_words).flat_map(|_| word().to_le_bytes()).collect()
    }

    /// What the emulator leaves in `out`.
    ///
    /// # Errors
    /// The report of a broken rule; a case has none.
    pub fn run(&self, options: &Options) -> Result<(Vec<u8>, Counters), Box<Report>> {
        let fail = |message: String| {
            Box::new(Report {
                rule: crate::Rule::BadLaunch,
                kernel: self.name.clone(),
                message,
                site: None,
                other: None,
            })
        };
        let module = Module::parse(&self.ptx).map_err(|error| fail(error.to_string()))?;
        let mut memory = Memory::new();
        let input = memory.alloc("in", self.input_words * 4);
        let output = memory.alloc("out", self.output_words * 4);
        memory.write(input, &self.input_bytes()).map_err(|error| fail(error.to_string()))?;
        memory.write(output, &vec![0; self.output_words * 4]).map_err(|error| fail(error.to_string()))?;
        let mut params: Vec<u8> = [input, output].into_iter().flat_map(u64::to_le_bytes).collect();
        if let Some(MapSpec { on_output, dims, boxes, swizzle }) = self.map {
            let map = TensorMap::encode_tiled(
                TensorType::Bf16,
                2,
                if on_output { output } else { input },
                &dims,
                &[2 * dims[0]],
                &boxes,
                &[1, 1],
                Interleave::None,
                swizzle,
                L2Promotion::None,
                OobFill::Zeros,
            )
            .map_err(|error| fail(error.to_string()))?;
            params.resize(64, 0);
            params.extend(map.as_bytes());
        }
        let launch = Launch {
            kernel: "k",
            grid: [1, 1, 1],
            cluster: [1, 1, 1],
            block: [self.threads, 1, 1],
            shared_bytes: 0,
            params: &params,
        };
        let counters = module.launch(&mut memory, &launch, options)?;
        let bytes = memory.read(output, self.output_words * 4).map_err(|error| fail(error.to_string()))?;
        Ok((bytes, counters))
    }
}

/// What one GPU left in `out`, as a text file: a head of `key: value` lines, then a line `name hexadecimal-bytes` per case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recording {
    /// `gpu`, `driver`, `commit`, `command`, in order.
    pub head: Vec<(String, String)>,
    /// Output bytes by case.
    pub outputs: Vec<(String, Vec<u8>)>,
}

impl Recording {
    /// Reads the text form.
    ///
    /// # Errors
    /// A sentence with the line that is not understood.
    pub fn parse(text: &str) -> Result<Recording, String> {
        let mut recording = Recording::default();
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let bad = || format!("line {}: expected `key: value` or `name bytes`, found `{line}`", number + 1);
            if let Some((key, value)) = line.split_once(": ") {
                recording.head.push((key.to_owned(), value.to_owned()));
                continue;
            }
            let (name, digits) = line.split_once(' ').ok_or_else(bad)?;
            let byte = |pair: &[u8]| {
                let digit = |byte: u8| char::from(byte).to_digit(16);
                let [high, low] = *pair else { return None };
                Some((digit(high)? << 4 | digit(low)?) as u8)
            };
            let bytes = digits.as_bytes().chunks(2).map(byte).collect::<Option<Vec<u8>>>().ok_or_else(bad)?;
            recording.outputs.push((name.to_owned(), bytes));
        }
        Ok(recording)
    }

    /// Writes the text form.
    pub fn to_text(&self) -> String {
        let mut text: String = self.head.iter().map(|(key, value)| format!("{key}: {value}\n")).collect();
        for (name, bytes) in &self.outputs {
            text += name;
            text.push(' ');
            text.extend(bytes.iter().map(|byte| format!("{byte:02x}")));
            text.push('\n');
        }
        text
    }
}
