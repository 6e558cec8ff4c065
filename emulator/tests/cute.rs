//! The emulator's layouts against CuTe's: `make cute-check` compiles `cute/table.cpp`, which writes CuTe's down, and runs this.

#![allow(clippy::panic)] // helpers of tests fail as tests do

use std::collections::BTreeMap;

use ptx_emulator::layout::{self, Descriptor, Major, Swizzle};

fn numbers<const N: usize>(words: &[&str]) -> [u32; N] {
    let numbers: Vec<u32> = words.iter().map(|word| word.parse().expect("a number")).collect();
    numbers.try_into().unwrap_or_else(|_| panic!("{words:?} are not {N} numbers"))
}

/// `NAME thread value row column`
fn fragment(words: &[&str]) -> bool {
    let [thread, value, row, column] = numbers(&words[1..]);
    let (register, half) = (value / 2, value % 2);
    let found = match words[0] {
        "mma_a" => layout::mma_a(thread, register, half),
        // CuTe speaks of B's transpose.
        "mma_b" => {
            let (k, n) = layout::mma_b(thread, register, half);
            (n, k)
        }
        "mma_c" => layout::mma_c(thread, value),
        "wgmma_a" => layout::operand_a(thread, value),
        "wgmma_d" => layout::accumulator(thread, value),
        other => panic!("unknown fragment {other}"),
    };
    found == (row, column)
}

/// `plain|trans lane half row column`, in matrices one below the other.
fn matrix(words: &[&str]) -> bool {
    let [lane, half, row, column] = numbers(&words[1..]);
    let (in_matrix, column_found) = layout::matrix(lane, half % 2, words[0] == "trans");
    (8 * (half / 2) + in_matrix, column_found) == (row, column)
}

/// `bytes address result`
fn swizzle(words: &[&str]) -> bool {
    let [bytes, address, expected] = numbers(words);
    let mode = match bytes {
        16 => Swizzle::None,
        32 => Swizzle::B32,
        64 => Swizzle::B64,
        128 => Swizzle::B128,
        other => panic!("unknown swizzling of {other} bytes"),
    };
    mode.apply(address) == expected
}

/// `K|MN rows descriptor mn k address`
fn shared(words: &[&str]) -> bool {
    let major = if words[0] == "K" { Major::K } else { Major::Mn };
    let [rows] = numbers(&words[1..2]);
    let bits = u64::from_str_radix(words[2], 16).expect("a descriptor");
    let [mn, k, address] = numbers(&words[3..]);
    let descriptor = Descriptor::new(bits);
    if let Err(error) = descriptor.check(major, rows) {
        panic!("CuTe's descriptor {bits:#x} is refused: {error}");
    }
    descriptor.element(major, mn, k) == address
}

#[test]
#[ignore = "needs CuTe: make cute-check"]
fn layouts_are_those_of_cute() {
    let path = std::env::var("CUTE_TABLE").expect("CUTE_TABLE names the file that cute/table.cpp wrote");
    let table = std::fs::read_to_string(&path).expect("the table can be read");
    // By kind of fact: how many, and which are wrong.
    let mut kinds: BTreeMap<String, (usize, Vec<&str>)> = BTreeMap::new();
    for line in table.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let agrees = match words[0] {
            "fragment" => fragment(&words[1..]),
            "matrix" => matrix(&words[1..]),
            "swizzle" => swizzle(&words[1..]),
            "shared" => shared(&words[1..]),
            other => panic!("unknown fact {other}"),
        };
        // A layout in shared memory by its swizzling mode, which the descriptor's first digit holds.
        let mode = if words[0] == "shared" && words[3].len() == 16 { &words[3][..1] } else { "" };
        let (count, wrong) = kinds.entry(format!("{} {} {mode}", words[0], words[1])).or_default();
        *count += 1;
        if !agrees {
            wrong.push(line);
        }
    }
    for (kind, (count, wrong)) in &kinds {
        println!("{kind:18} {count:6} facts, {} differ", wrong.len());
    }
    assert_eq!(kinds.len(), 19, "five fragments, two kinds of matrix, four swizzling modes, eight layouts");
    let wrong: Vec<&str> = kinds.values().flat_map(|(_, wrong)| wrong.iter().take(3).copied()).collect();
    assert!(wrong.is_empty(), "not as CuTe has it, among others: {wrong:#?}");
}
