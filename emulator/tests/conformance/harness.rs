//! A kernel of one instruction, or a few, over 32 lanes of operands.

use std::fmt::Write as _;
use std::rc::Rc;

use ptx_emulator::{Launch, Memory, Module, Options, Report};

/// Operands of one lane and what they give.
pub type Expect = Rc<dyn Fn([u64; 3]) -> Vec<u64>>;

/// One instruction: `%d` (and `%e`) from `%a`, `%b` and `%c`, or predicates `%p`, `%q` from them.
#[derive(Clone)]
pub struct Case {
    /// Instructions, with `;` after each. The first word of each is held to be covered.
    pub text: String,
    /// Chapter or instruction of the PTX ISA.
    pub section: &'static str,
    /// Bits of the registers `%d`, `%a`, `%b`, `%c`; 1 for predicates.
    pub bits: [u32; 4],
    pub inputs: Vec<[u64; 3]>,
    /// Values of `%d` that are right: one, but where the ISA leaves a choice.
    pub expect: Expect,
}

/// xorshift64*.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// Zeros, ones, ends, ties and random patterns of a width: 32 lanes, several times.
pub fn patterns(bits: [u32; 3], seed: u64) -> Vec<[u64; 3]> {
    let mut random = Random(seed | 1);
    let special = |random: &mut Random, bits: u32| {
        let top = 1u64 << (bits.max(2) - 1);
        let all = u64::MAX >> (64 - bits);
        let choices =
            [0, 1, 2, 3, 7, 31, 32, top, top - 1, top + 1, all, all - 1, 0x3c00_3c00, 0x3f80_0000, 0x8000_0000];
        match random.next() % 3 {
            0 => choices[random.next() as usize % choices.len()] & all,
            // Of every magnitude.
            1 => (random.next() & all) >> (random.next() % u64::from(bits)),
            _ => random.next() & all,
        }
    };
    (0..128).map(|_| bits.map(|bits| special(&mut random, bits.max(1)))).collect()
}

fn register(bits: u32) -> &'static str {
    match bits {
        1 => ".pred",
        16 => ".b16",
        32 => ".b32",
        _ => ".b64",
    }
}

impl Case {
    /// `bits` of the destination and the sources; inputs are chosen here.
    pub fn new(text: &str, section: &'static str, bits: [u32; 4], expect: impl Fn([u64; 3]) -> u64 + 'static) -> Case {
        let seed = text.bytes().fold(7, |seed: u64, byte| seed.wrapping_mul(31).wrapping_add(byte.into()));
        let inputs = patterns([bits[1], bits[2], bits[3]], seed);
        Case { text: text.to_owned(), section, bits, inputs, expect: Rc::new(move |x| vec![expect(x)]) }
    }

    /// The same with other operands.
    pub fn with_inputs(self, inputs: Vec<[u64; 3]>) -> Case {
        Case { inputs, ..self }
    }

    /// Opcodes of the instructions.
    pub fn opcodes(&self) -> impl Iterator<Item = &str> {
        self.text.split(';').filter_map(|line| {
            let line = line.trim();
            let line = if line.starts_with('@') { line.split_once(' ')?.1 } else { line };
            line.split_whitespace().next()
        })
    }

    /// The kernel around the instruction; `opcode` may stand in place of the first one.
    pub fn kernel(&self) -> String {
        let [d, a, b, c] = self.bits;
        let mut text = String::from(
            ".version 9.0\n.target sm_90a\n.address_size 64\n.visible .entry k(.param .u64 in, .param .u64 out)\n{\n\
             .reg .b32 %t, %w;\n.reg .b64 %in, %out, %x;\n.reg .b32 %r<8>;\n.reg .b64 %l<8>;\n.reg .b16 %h<8>;\n\
             .reg .pred %p<8>;\n",
        );
        for (name, bits) in [("%d", d), ("%a", a), ("%b", b), ("%c", c)] {
            // Writing to a String cannot fail.
            let _ = writeln!(text, ".reg {} {name};", register(bits));
        }
        text += "ld.param.u64 %in, [in];\nld.param.u64 %out, [out];\nmov.u32 %t, %tid.x;\n\
                 mad.wide.u32 %in, %t, 24, %in;\nmad.wide.u32 %out, %t, 8, %out;\n";
        for (i, (name, bits)) in [("%a", a), ("%b", b), ("%c", c)].into_iter().enumerate() {
            let _ = match bits {
                1 => {
                    writeln!(text, "ld.global.u32 %w, [%in+{}];\nand.b32 %w, %w, 1;\nsetp.ne.u32 {name}, %w, 0;", 8 * i)
                }
                bits => writeln!(text, "ld.global.b{bits} {name}, [%in+{}];", 8 * i),
            };
        }
        text += &self.text;
        text += match d {
            1 => "\nselp.b64 %x, 1, 0, %d;\n",
            16 => "\ncvt.u64.u16 %x, %d;\n",
            32 => "\ncvt.u64.u32 %x, %d;\n",
            _ => "\nmov.b64 %x, %d;\n",
        };
        text + "st.global.b64 [%out], %x;\nret;\n}\n"
    }

    /// Runs it: what is wrong, if anything is.
    pub fn check(&self) -> Result<(), String> {
        let module = Module::parse(&self.kernel()).map_err(|error| format!("{}: {error}", self.text))?;
        for lanes in self.inputs.chunks(32) {
            let found = run(&module, lanes).map_err(|report| format!("{}: {report}", self.text))?;
            for (inputs, found) in lanes.iter().zip(found) {
                let expected = (self.expect)(*inputs);
                if !expected.contains(&found) {
                    let Case { text, section, .. } = self;
                    return Err(format!("{text} ({section}) of {inputs:x?}: {found:#x}, expected {expected:x?}"));
                }
            }
        }
        Ok(())
    }
}

/// Runs a kernel of [`Case::kernel`]'s shape for up to 32 lanes.
pub fn run(module: &Module, lanes: &[[u64; 3]]) -> Result<Vec<u64>, Box<Report>> {
    let mut memory = Memory::new();
    let bytes: Vec<u8> = lanes.iter().flatten().flat_map(|value| value.to_le_bytes()).collect();
    let (input, output) = (memory.alloc("in", bytes.len()), memory.alloc("out", 8 * lanes.len()));
    memory.write(input, &bytes).expect("in range");
    let params: Vec<u8> = [input, output].into_iter().flat_map(u64::to_le_bytes).collect();
    let launch = Launch {
        kernel: "k",
        grid: [1; 3],
        cluster: [1; 3],
        block: [lanes.len() as u32, 1, 1],
        shared_bytes: 0,
        params: &params,
    };
    module.launch(&mut memory, &launch, &Options::default())?;
    let data = memory.read(output, 8 * lanes.len()).expect("all written");
    Ok(data.chunks_exact(8).map(|value| u64::from_le_bytes(value.try_into().expect("eight"))).collect())
}

pub fn signed(x: u64, bits: u32) -> i128 {
    i128::from((x << (64 - bits)) as i64 >> (64 - bits))
}

pub fn mask(bits: u32) -> u64 {
    u64::MAX >> (64 - bits)
}
