//! `wgmma`: where each element lies, and what each rule reports.
//!
//! Layouts are written here a second time, as the ISA's figures show them ("Shared Memory Matrix Layout", "Register Fragments
//! for wgmma.mma_async.m64nNk16").

#![allow(clippy::panic)] // helpers of tests fail as tests do

use half::{bf16, f16};
use ptx_emulator::{Launch, Memory, Module, Options, Report, Timing};

#[path = "wgmma/layouts.rs"]
mod layouts;
use layouts::{LAYOUTS, Layout};

const SEEDS: u64 = 20;

#[derive(Clone, Copy, PartialEq)]
enum Element {
    F16,
    Bf16,
}

impl Element {
    fn bits(self, value: f32) -> u16 {
        match self {
            Element::F16 => f16::from_f32(value).to_bits(),
            Element::Bf16 => bf16::from_f32(value).to_bits(),
        }
    }

    fn value(self, bits: u16) -> f32 {
        match self {
            Element::F16 => f16::from_bits(bits).to_f32(),
            Element::Bf16 => bf16::from_bits(bits).to_f32(),
        }
    }
}

/// One wgmma.
#[derive(Clone, Copy)]
struct Case {
    n: usize,
    ab: Element,
    d_f16: bool,
    /// `None`: in registers.
    a: Option<Layout>,
    b: Layout,
    scale_d: bool,
    scale_a: i32,
    scale_b: i32,
}

impl Case {
    fn registers(&self) -> usize {
        self.n / if self.d_f16 { 4 } else { 2 }
    }

    fn instruction(&self) -> String {
        let ab = if self.ab == Element::F16 { "f16" } else { "bf16" };
        let d = if self.d_f16 { "f16" } else { "f32" };
        let (a, trans_a) = match self.a {
            Some(layout) => ("%rd10", format!("{}, ", u8::from(layout.mn_major))),
            None => ("{%a0, %a1, %a2, %a3}", String::new()),
        };
        let registers: Vec<String> = (0..self.registers()).map(|i| format!("%d{i}")).collect();
        let (scale_a, scale_b, trans_b) = (self.scale_a, self.scale_b, u8::from(self.b.mn_major));
        format!(
            "wgmma.mma_async.sync.aligned.m64n{}k16.{d}.{ab}.{ab} {{{}}}, {a}, %rd11, %p1, {scale_a}, {scale_b}, {trans_a}{trans_b};",
            self.n,
            registers.join(", ")
        )
    }

    /// Loads shared memory, accumulator and A's fragment, multiplies once, stores the accumulator.
    fn kernel(&self) -> Module {
        let count = self.registers();
        let lines = |text: &str| -> String {
            (0..count).map(|i| text.replace('#', &i.to_string()).replace('@', &(4 * i).to_string())).collect()
        };
        let text = format!(
            "
.version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 tile[];
.visible .entry k(.param .u64 image, .param .u32 bytes, .param .u32 scale, .param .u64 c, .param .u64 fragment,
    .param .u64 out, .param .u64 a, .param .u64 b)
{{
    .reg .pred %p<4>;
    .reg .b32 %a<4>, %d<{count}>, %r<16>;
    .reg .b64 %rd<20>;
    ld.param.u64 %rd1, [image];
    ld.param.u32 %r1, [bytes];
    mov.u32 %r2, %tid.x;
    shl.b32 %r3, %r2, 4;
    mov.u32 %r4, tile;
FILL:
    setp.ge.u32 %p2, %r3, %r1;
    @%p2 bra FILLED;
    cvt.u64.u32 %rd2, %r3;
    add.s64 %rd3, %rd1, %rd2;
    add.s32 %r5, %r4, %r3;
    ld.global.v4.u32 {{%r6, %r7, %r8, %r9}}, [%rd3];
    st.shared.v4.u32 [%r5], {{%r6, %r7, %r8, %r9}};
    add.s32 %r3, %r3, 2048;
    bra FILL;
FILLED:
    fence.proxy.async;
    bar.sync 0;
    ld.param.u64 %rd10, [a];
    ld.param.u64 %rd11, [b];
    shr.u32 %r5, %r4, 4;
    cvt.u64.u32 %rd2, %r5;
    add.s64 %rd10, %rd10, %rd2;
    add.s64 %rd11, %rd11, %rd2;
    ld.param.u64 %rd4, [fragment];
    mul.wide.u32 %rd5, %r2, 16;
    add.s64 %rd4, %rd4, %rd5;
    ld.global.v4.u32 {{%a0, %a1, %a2, %a3}}, [%rd4];
    ld.param.u64 %rd4, [c];
    ld.param.u64 %rd6, [out];
    mul.wide.u32 %rd5, %r2, {};
    add.s64 %rd4, %rd4, %rd5;
    add.s64 %rd6, %rd6, %rd5;
{}
    ld.param.u32 %r5, [scale];
    setp.ne.u32 %p1, %r5, 0;
    wgmma.fence.sync.aligned;
    {}
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
{}
    ret;
}}",
            4 * count,
            lines("    ld.global.u32 %d#, [%rd4+@];\n"),
            self.instruction(),
            lines("    st.global.u32 [%rd6+@], %d#;\n"),
        );
        let module = Module::parse(&text).expect("the kernel parses");
        assert_eq!(module.kernel_error("k"), None);
        module
    }

    /// Runs with A (64 x 16), B (16 x n) and C (64 x n) and returns D.
    fn run(&self, module: &Module, a: &[u16], b: &[u16], c: &[f32], seed: u64) -> Result<Vec<f32>, Box<Report>> {
        self.run_with(module, a, b, c, (seed, self.b.descriptor(self.n)))
    }

    /// The same with a descriptor of B of one's own.
    fn run_with(
        &self,
        module: &Module,
        a: &[u16],
        b: &[u16],
        c: &[f32],
        (seed, b_descriptor): (u64, u64),
    ) -> Result<Vec<f32>, Box<Report>> {
        let mut image = vec![0u8; 1 << 16];
        if let Some(layout) = self.a {
            layout.write(&mut image[..1 << 13], 64, |m, k| a[m * 16 + k]);
        }
        self.b.write(&mut image[1 << 13..], self.n, |n, k| b[k * self.n + n]);
        let mut fragment = vec![0u8; 128 * 16];
        for thread in 0..128 {
            for i in 0..8 {
                let row = 16 * (thread / 32) + thread % 32 / 4 + if i % 4 >= 2 { 8 } else { 0 };
                let k = thread % 4 * 2 + i % 2 + if i >= 4 { 8 } else { 0 };
                fragment[thread * 16 + 2 * i..][..2].copy_from_slice(&a[row * 16 + k].to_le_bytes());
            }
        }
        let size = if self.d_f16 { 2 } else { 4 };
        let per_thread = self.n / 2;
        let mut initial = vec![0u8; 128 * per_thread * size];
        for (index, place) in initial.chunks_mut(size).enumerate() {
            let value = c[self.place(index / per_thread, index % per_thread)];
            if self.d_f16 {
                place.copy_from_slice(&f16::from_f32(value).to_le_bytes());
            } else {
                place.copy_from_slice(&value.to_le_bytes());
            }
        }
        let mut memory = Memory::new();
        let mut upload = |name: &str, bytes: &[u8]| {
            let address = memory.alloc(name, bytes.len());
            memory.write(address, bytes).expect("in range");
            address
        };
        let (image_at, c_at, fragment_at) =
            (upload("image", &image), upload("c", &initial), upload("fragment", &fragment));
        let out = memory.alloc("out", initial.len());
        let mut params = image_at.to_le_bytes().to_vec();
        params.extend((image.len() as u32).to_le_bytes());
        params.extend(u32::from(self.scale_d).to_le_bytes());
        let a = self.a.map_or(0, |layout| layout.descriptor(64));
        let b = b_descriptor + (1 << 13 >> 4);
        [c_at, fragment_at, out, a, b].iter().for_each(|value| params.extend(value.to_le_bytes()));
        let launch = Launch {
            kernel: "k",
            grid: [1, 1, 1],
            cluster: [1, 1, 1],
            block: [128, 1, 1],
            shared_bytes: 1 << 16,
            params: &params,
        };
        module.launch(&mut memory, &launch, &options(seed))?;
        let bytes = memory.read(out, initial.len()).expect("everything is written");
        let mut d = vec![f32::NAN; 64 * self.n];
        for (index, place) in bytes.chunks(size).enumerate() {
            d[self.place(index / per_thread, index % per_thread)] = match place {
                &[a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
                bytes => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
            };
        }
        Ok(d)
    }

    /// Index in D of a thread's element.
    fn place(&self, thread: usize, i: usize) -> usize {
        let row = 16 * (thread / 32) + thread % 32 / 4 + if i % 4 >= 2 { 8 } else { 0 };
        let column = i / 4 * 8 + thread % 4 * 2 + i % 2;
        row * self.n + column
    }

    fn expected(&self, a: &[u16], b: &[u16], c: &[f32]) -> Vec<f32> {
        let sign = (self.scale_a * self.scale_b) as f32;
        (0..64 * self.n)
            .map(|at| {
                let (row, column) = (at / self.n, at % self.n);
                let sum: f32 =
                    (0..16).map(|k| self.ab.value(a[row * 16 + k]) * self.ab.value(b[k * self.n + column])).sum();
                sign * sum + if self.scale_d { c[at] } else { 0.0 }
            })
            .collect()
    }

    /// All elements of A, then all of B, distinct, against a matrix that selects; then small integers everywhere.
    #[track_caller]
    fn check(&self) {
        let module = self.kernel();
        let n = self.n;
        let one = self.ab.bits(1.0);
        // Numbers from 2^-3 in f16, distinct down to the last bit.
        let distinct = |count: usize| -> Vec<u16> { (0..count).map(|i| 0x3000 + i as u16).collect() };
        let zero = vec![0.0; 64 * n];
        let select_b: Vec<u16> = (0..16 * n).map(|i| if i / n == i % n % 16 { one } else { 0 }).collect();
        let select_a: Vec<u16> = (0..64 * 16).map(|i| if i % 16 == i / 16 % 16 { one } else { 0 }).collect();
        let small = |count: usize, step: usize| -> Vec<u16> {
            (0..count).map(|i| self.ab.bits((i * step % 7) as f32 - 3.0)).collect()
        };
        let c: Vec<f32> = (0..64 * n).map(|i| (i * 5 % 31) as f32 - 15.0).collect();
        for (seed, a, b, c) in [
            (1, &distinct(1024), &select_b, &zero),
            (2, &select_a, &distinct(16 * n), &zero),
            (3, &small(1024, 11), &small(16 * n, 17), &c),
        ] {
            let found = self.run(&module, a, b, c, seed).unwrap_or_else(|report| panic!("{}: {report}", self.name()));
            let expected = self.expected(a, b, c);
            let wrong = found.iter().zip(&expected).position(|(found, expected)| found != expected);
            if let Some(at) = wrong {
                let (row, column) = (at / n, at % n);
                panic!("{}: D[{row}][{column}] = {}, expected {}", self.name(), found[at], expected[at]);
            }
        }
    }

    fn name(&self) -> String {
        let a = self.a.map_or("in registers".to_owned(), |layout| format!("{layout:?}"));
        format!("{} with A {a}, B {:?}", self.instruction(), self.b)
    }
}

fn options(seed: u64) -> Options {
    let copies = [Timing::Eager, Timing::Lazy, Timing::Mixed][seed as usize % 3];
    Options { seed, copies, patience: 20_000, ..Options::default() }
}

fn case(n: usize, a: Option<Layout>, b: Layout) -> Case {
    Case { n, ab: Element::F16, d_f16: false, a, b, scale_d: true, scale_a: 1, scale_b: 1 }
}

#[test]
fn every_n_with_every_layout_of_b() {
    for n in (8..=256).step_by(8) {
        for (i, b) in LAYOUTS.iter().enumerate() {
            let a = LAYOUTS[(n / 8 + i) % LAYOUTS.len()];
            let ab = if (n / 8 + i) % 2 == 0 { Element::F16 } else { Element::Bf16 };
            Case { ab, ..case(n, Some(a), *b) }.check();
        }
    }
}

#[test]
fn every_layout_and_registers_for_a() {
    for b in LAYOUTS {
        for a in LAYOUTS.iter().copied().map(Some).chain([None]) {
            for ab in [Element::F16, Element::Bf16] {
                Case { ab, ..case(64, a, *b) }.check();
            }
        }
    }
}

#[test]
fn accumulators_in_f16() {
    for n in (8..=256).step_by(8) {
        Case { d_f16: true, ..case(n, None, LAYOUTS[0]) }.check();
    }
}

#[test]
fn scales() {
    for (scale_a, scale_b) in [(1, -1), (-1, 1), (-1, -1)] {
        for a in [None, Some(LAYOUTS[0])] {
            for scale_d in [false, true] {
                Case { scale_d, scale_a, scale_b, ..case(24, a, LAYOUTS[7]) }.check();
            }
        }
    }
}

/// A descriptor with another swizzling mode, or with its offsets swapped, is reported, or gives another product: whatever the
/// layout and the seed. (Where nothing is in the descriptor twice, swapped offsets may name memory that is there.)
#[test]
fn wrong_descriptors_show() {
    let n = 128;
    let a: Vec<u16> = (0..1024).map(|i| 0x3000 + i as u16).collect();
    let b: Vec<u16> = (0..16 * n).map(|i| 0x3000 + (i * 7 % 2039) as u16).collect();
    let c = vec![0.0; 64 * n];
    for layout in LAYOUTS {
        let case = case(n, None, *layout);
        let module = case.kernel();
        let right = layout.descriptor(n);
        let (leading, stride) = (right >> 16 & 0x3fff, right >> 32 & 0x3fff);
        let swapped = right & !0x3fff_3fff_0000 | stride << 16 | leading << 32;
        let modes = (0..4).map(|mode| right & !(3 << 62) | mode << 62);
        for wrong in modes.chain([swapped]).filter(|wrong| *wrong != right) {
            for seed in 1..=SEEDS {
                let found = case.run_with(&module, &a, &b, &c, (seed, wrong));
                let expected = case.expected(&a, &b, &c);
                let close = |(found, expected): (&f32, &f32)| (found - expected).abs() <= 1e-3 * expected.abs();
                let same = found.is_ok_and(|found| found.iter().zip(&expected).all(close));
                assert!(!same, "{layout:?} read through {wrong:#x} in place of {right:#x}");
            }
        }
    }
}
