//! No text makes the parser, the decoder or the executor panic, loop or take memory without bound.

#[path = "support/exercise.rs"]
mod exercise;

use std::path::PathBuf;
use std::time::{Duration, Instant};
use std::{env, fs};

use exercise::exercise;
use ptx_emulator::Module;

const TILE: &str = include_str!("ptx/tile.ptx");
const CALLS: &str = include_str!("ptx/calls.ptx");
const MATHS: &str = include_str!("ptx/maths.ptx");

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, below: usize) -> usize {
        self.next() as usize % below.max(1)
    }

    fn of<'a, T: ?Sized>(&mut self, all: &[&'a T]) -> &'a T {
        all[self.below(all.len())]
    }
}

const NUMBERS: [&str; 16] = [
    "0",
    "1",
    "-1",
    "7",
    "31",
    "32",
    "33",
    "255",
    "4096",
    "65536",
    "2147483647",
    "4294967295",
    "-2147483648",
    "9223372036854775807",
    "18446744073709551615",
    "0x7fffffffffffffff",
];

fn words(text: &str) -> Vec<&str> {
    let mut words: Vec<&str> =
        text.split_inclusive(|c: char| !(c.is_ascii_alphanumeric() || "_%$.:".contains(c))).collect();
    words.retain(|word| !word.is_empty());
    words
}

/// One to four edits of words, numbers, lines or bytes.
fn mutate(text: &str, others: &[&str], random: &mut Random) -> String {
    let mut all: Vec<String> = words(text).into_iter().map(str::to_owned).collect();
    for _ in 0..=random.below(4) {
        let at = random.below(all.len());
        match random.below(9) {
            0 => {
                all.remove(at);
            }
            1 => all[at] = random.of(others).to_owned(),
            2 => all.insert(at, random.of(others).to_owned()),
            3 => {
                let other = random.below(all.len());
                all.swap(at, other);
            }
            4 => all.truncate(at + 1),
            5 => {
                // A number somewhere after this place.
                if let Some(number) = all[at..].iter_mut().find(|word| word.starts_with(|c: char| c.is_ascii_digit())) {
                    let end: String = number.chars().skip_while(|c| c.is_ascii_alphanumeric()).collect();
                    *number = random.of(&NUMBERS).to_owned() + &end;
                }
            }
            6 => {
                let end = (at + random.below(12)).min(all.len());
                let copy: Vec<String> = all[at..end].to_vec();
                all.splice(at..at, copy);
            }
            7 => {
                // Registers, other registers.
                if let Some(register) = all[at..].iter_mut().find(|word| word.starts_with('%')) {
                    let end: String =
                        register.chars().skip_while(|c| c.is_ascii_alphanumeric() || "%._".contains(*c)).collect();
                    *register = format!("%{}{}{end}", random.of(&["r", "rd", "p", "f", "h"]), random.below(9));
                }
            }
            _ => all.insert(
                at,
                random
                    .of(&[
                        "{", "}", "(", ")", "[", "]", ";", ",", "\"", "/*", "//", "|", "!", "@", "-", "<", ">",
                        "\u{e9}",
                    ])
                    .to_owned(),
            ),
        }
        if all.is_empty() {
            break;
        }
    }
    all.concat()
}

#[test]
fn mutated_texts_are_parsed_and_run_or_refused() {
    const ROUNDS: u64 = 12_000;
    let all = [TILE, CALLS, MATHS];
    let pool: Vec<&str> = all.iter().flat_map(|text| words(text)).collect();
    for text in all {
        let module = Module::parse(text).expect("as it is, it parses");
        for kernel in module.kernels() {
            assert_eq!(module.kernel_error(kernel), None);
        }
        assert!(exercise(text, 1), "as it is, it runs");
        let mut random = Random(0x5eed ^ text.len() as u64);
        let ran = (0..ROUNDS).filter(|round| exercise(&mutate(text, &pool, &mut random), *round)).count();
        assert!(
            ran > ROUNDS as usize / 20,
            "only {ran} of {ROUNDS} ran to the end: the mutations are too wild to test much"
        );
    }
}

/// Those in tests/fuzz, which once failed or which the fuzzer starts from.
#[test]
fn kept_texts_are_parsed_and_run_or_refused() {
    // Asked at run time first, because a bundle runs the tests where they were not compiled.
    let project: PathBuf =
        env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into()).into();
    let mut count = 0;
    for entry in fs::read_dir(project.join("tests/fuzz")).expect("the folder of kept texts") {
        let path = entry.expect("an entry").path();
        println!("{}", path.display());
        let text = fs::read(&path).expect("a readable file");
        for seed in 0..3 {
            exercise(&String::from_utf8_lossy(&text), seed);
        }
        count += 1;
    }
    assert!(count > 0);
}

/// Bytes that never were PTX.
#[test]
fn noise_is_refused() {
    let mut random = Random(77);
    let alphabet: Vec<char> = " \n\t.{}[]()<>,;:@!%$|+-=\"/*0123456789abxf_\u{e9}\u{20ac}".chars().collect();
    for _ in 0..20_000 {
        let text: String = (0..random.below(60)).map(|_| alphabet[random.below(alphabet.len())]).collect();
        exercise(&text, 1);
        exercise(&format!(".visible .entry k(.param .u64 p) {{ {text} }}"), 1);
        exercise(&format!(".global .u32 x = {text};"), 1);
    }
}

/// Texts that ask for a lot: each answer comes at once.
#[test]
fn nothing_takes_memory_or_time_without_bound() {
    let entry = |body: &str| {
        format!(".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 p)\n{{\n{body}\n}}")
    };
    let texts = [
        ".global .b8 huge[4294967295];".to_owned(),
        ".global .b8 huge[1073741824];".to_owned(),
        ".global .v4 .b64 huge[65536][65536];".to_owned(),
        (0..9).map(|i| format!(".global .b8 part{i}[134217728];")).collect(),
        ".global .align 2147483648 .b8 x[1];".to_owned(),
        ".global .align 0 .b8 x[1];".to_owned(),
        format!(".global .u32 x = {}1{};", "{".repeat(100_000), "}".repeat(100_000)),
        ".visible .entry k(.param .b8 p[4294967295]) { ret; }".to_owned(),
        ".visible .entry k(.param .align 3 .b8 p[8]) { ret; }".to_owned(),
        format!(
            ".visible .entry k({}) {{ ret; }}",
            (0..60_000).map(|i| format!(".param .b8 p{i}[65536],")).collect::<String>()
        ),
        entry(".reg .b32 %r<4294967295>;"),
        entry(".reg .b32 %r<1048576>;"),
        entry(&(0..100).map(|i| format!(".reg .b32 %r{i}_<60000>;")).collect::<String>()),
        entry(".local .b8 depot[4294967295];"),
        entry(".local .b8 depot[1048000]; ret;"),
        entry(".shared .b8 tile[4294967295]; ret;"),
        entry(&(0..5000).map(|i| format!(".shared .align 4096 .b8 tile{i}[1048576];")).collect::<String>()),
        entry(&"{".repeat(200_000)),
        entry(&format!("mov.b64 %r1, {}", "{".repeat(200_000))),
        entry(&format!("mov.b64 %r1, {}", "(".repeat(200_000))),
        entry(&format!("@!%p1 {};", "a.".repeat(500_000))),
        entry(&format!("mov.u32 %{}, 1;", "r".repeat(1_000_000))),
        entry(&format!(
            ".reg .b32 %r<60000>; .reg .pred %p; {}",
            (0..20_000).map(|i| format!("L{i}: @%p bra L{};", (i + 1) % 20_000)).collect::<String>()
        )),
        entry(&format!("ts: .branchtargets {} ts; brx.idx 0, ts;", "A,".repeat(100_000))),
        entry(&"/* ".repeat(100_000)),
        entry(&".pragma \"x\";".repeat(50_000)),
        entry(".loc 4294967295 4294967295 0, function_name x, inlined_at 1 2 3;"),
        entry("ld.param.u64 %r1, [p+9223372036854775807]; mov.u32 %r1, 0x; mov.u32 %r2, 0f1; mov.u32 %r3, 0b2;"),
        entry(
            ".reg .b64 %d<9>; ld.param.u64 %d1, [p+-9223372036854775808]; st.global.u8 [%d1+9223372036854775807], 1;",
        ),
        (0..3000).map(|i| format!(".func f{i}() {{ call f{}; ret; }}", i + 1)).collect::<String>()
            + ".func f3000() { ret; }"
            + &entry("call f0; ret;"),
        ".func f() { call f; }".to_owned() + &entry("call f; ret;"),
        ".file 1 \"".to_owned(),
        ".section .debug { {".to_owned(),
        ".maxntid".to_owned(),
        ".visible .entry k() .maxntid 4294967295, 4294967295, 4294967295 { ret; }".to_owned(),
    ];
    for text in texts {
        let start = Instant::now();
        exercise(&text, 1);
        let taken = start.elapsed();
        assert!(taken < Duration::from_secs(4), "{taken:?} for {}…", text.chars().take(120).collect::<String>());
    }
}

/// nvcc declares ranges of registers of which it uses a few.
#[test]
fn registers_that_nothing_names_do_not_count() {
    let kernel =
        |body: &str| format!(".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k()\n{{\n{body}\n}}");
    let few = Module::parse(&kernel(".reg .f32 %f<200000>; mov.f32 %f199999, 0f3f800000; ret;")).expect("it parses");
    assert_eq!(few.kernel_error("k"), None);
    assert!(few.kernel_info("k").expect("a kernel").registers < 10);
    let all: String = (0..70_000).map(|i| format!("mov.f32 %f{i}, 0f3f800000;")).collect();
    let all = Module::parse(&kernel(&format!(".reg .f32 %f<200000>; {all} ret;"))).expect("it parses");
    let error = all.kernel_error("k").expect("too many are used");
    assert!(error.to_string().contains("more than 65535 registers"), "{error}");
}

/// Each operand at its extremes.
#[test]
fn extreme_operands_do_not_panic() {
    let instructions = [
        "shl.b32 %r1, %r2, %r3;",
        "shr.s64 %l1, %l2, %r3;",
        "shr.u16 %h1, %h2, %r3;",
        "bfe.s64 %l1, %l2, %r3, %r4;",
        "bfi.b64 %l1, %l2, %l3, %r3, %r4;",
        "div.s32 %r1, %r2, %r3;",
        "rem.s64 %l1, %l2, %l3;",
        "mul.hi.s64 %l1, %l2, %l3;",
        "mad.lo.s64 %l1, %l2, %l3, %l2;",
        "sad.s64 %l1, %l2, %l3, %l2;",
        "fns.b32 %r1, %r2, %r3, %r4;",
        "bmsk.clamp.b32 %r1, %r2, %r3;",
        "szext.wrap.s32 %r1, %r2, %r3;",
        "cvt.rzi.s64.f64 %l1, %l2;",
        "cvt.rn.f32.f64 %r1, %l2;",
        "cvt.rz.f64.s64 %l1, %l2;",
        "fma.rz.f64 %l1, %l2, %l3, %l2;",
        "div.rm.f64 %l1, %l2, %l3;",
        "sqrt.rp.f64 %l1, %l2;",
        "rcp.rz.ftz.f32 %r1, %r2;",
        "mad.hi.cc.s64 %l1, %l2, %l3, %l2;",
        "shfl.sync.idx.b32 %r1, %r2, %r3, %r4, -1;",
        "bar.sync %r3;",
        "bar.sync 0, %r3;",
        "nanosleep.u32 %r3;",
        "ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%l2];",
        "st.shared.u64 [%r2], %l1;",
        "ld.local.u8 %r1, [%l2];",
        "ld.u64 %l1, [%l2];",
        "atom.add.u32 %r1, [%l2], %r3;",
        "ld.param.u64 %l1, [%l2];",
        "cvta.shared.u64 %l1, %l2;",
        "ld.shared.v2.u64 {%l1, %l2}, [%l2];",
        "cp.async.ca.shared.global [%r2], [%l2], 16, %r3;",
        "bar.warp.sync %r2;",
        "vote.sync.ballot.b32 %r1, %p1, %r2;",
        "ld.const.u8 %r1, [%l2];",
        "dp4a.s32.s32 %r1, %r2, %r3, %r4;",
        "neg.s64 %l1, %l2;",
        "abs.s16 %h1, %h2;",
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r2];",
        "ts: .branchtargets A; brx.idx %r2, ts; A:",
    ];
    let values = [
        0u64,
        1,
        31,
        32,
        33,
        63,
        64,
        65,
        255,
        256,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        1 << 63,
        u64::MAX,
        u64::MAX - 7,
        0x7000_0000_0400,
        0x6000_0000_0010,
    ];
    for instruction in instructions {
        for x in values {
            for y in values {
                let text = format!(
                    ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 p)\n{{ .reg .b16 %h<3>; .reg .b32 %r<5>; \
                     .reg .b64 %l<4>; .reg .pred %p<2>; .local .b8 depot[16]; mov.u64 %l2, {x}; mov.u64 %l3, {y}; cvt.u32.u64 %r2, %l2; \
                     cvt.u32.u64 %r3, %l3; mov.u32 %r4, %r3; cvt.u16.u64 %h2, %l2; {instruction} ret; }}"
                );
                exercise(&text, x ^ y);
            }
        }
    }
}
