//! The bodies of the fuzzer's targets (fuzz/) on inputs that repeat: those in tests/fuzz, which once failed or which the fuzzer
//! starts from, and random ones.
#![allow(clippy::panic)] // helpers of tests fail as tests do

mod common;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::clock::Clock;
use common::data::Rng;
use common::fuzz_plan::{self, Outcome};

/// The kept inputs of a target.
fn kept(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = common::project().join("tests/fuzz").join(target);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let paths = entries.map(|entry| entry.expect("an entry").path());
    let inputs: Vec<_> = paths.map(|path| (path.clone(), fs::read(path).expect("a readable file"))).collect();
    assert!(!inputs.is_empty(), "{} is empty", folder.display());
    inputs
}

fn run_kept(target: &str, run: impl Fn(&[u8])) {
    for (path, input) in kept(target) {
        println!("{}", path.display());
        let clock = Clock::start();
        run(&input);
        assert!(clock.elapsed() < Duration::from_secs(2), "{:?} for {}", clock.elapsed(), path.display());
    }
}

#[test]
fn kept_problems_have_legal_plans_or_errors() {
    run_kept("plan", |input| {
        fuzz_plan::run(input);
    });
}

#[cfg(feature = "peft")]
#[test]
fn kept_configurations_are_refused_or_read_correctly() {
    run_kept("config", |input| drop(common::fuzz_peft::config(input)));
}

#[cfg(feature = "peft")]
#[test]
fn kept_adapters_are_refused_or_read_correctly() {
    run_kept("adapter", |input| drop(common::fuzz_peft::adapter(input)));
}

/// So many random problems, of several operations each.
fn random_problems(count: u64) {
    let mut sum = Outcome::default();
    for seed in 0..count {
        let mut rng = Rng(seed);
        let input: Vec<u8> = (0..fuzz_plan::BYTES / 8).flat_map(|_| rng.bits().to_le_bytes()).collect();
        let start = Instant::now();
        let outcome = std::panic::catch_unwind(|| fuzz_plan::run(&input));
        let outcome = outcome.unwrap_or_else(|_| panic!("problem {seed}"));
        // Microseconds, but the machine may have others to serve.
        assert!(start.elapsed() < Duration::from_secs(10), "problem {seed}: {:?}", start.elapsed());
        sum.portable += outcome.portable;
        sum.sm90 += outcome.sm90;
        sum.adapter += outcome.adapter;
        sum.refused += outcome.refused;
        sum.misplaced += outcome.misplaced;
    }
    println!("{count} problems: {sum:?}");
    let tenth = count as usize / 10;
    // All kinds of ends are reached, and often.
    assert!(sum.portable.min(sum.sm90).min(sum.adapter) > tenth && sum.refused.min(sum.misplaced) > tenth, "{sum:?}");
}

#[test]
fn random_problems_have_legal_plans_or_errors() {
    random_problems(100_000);
}

/// `cargo test --release --test fuzz -- --ignored` runs it.
#[test]
#[ignore = "half a minute"]
fn a_million_random_problems_have_legal_plans_or_errors() {
    random_problems(1_000_000);
}
