//! Nothing that the decoder takes goes without a test.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use ptx_emulator::Module;

use crate::harness::Case;

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
    let (folders, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    folders
        .iter()
        .flat_map(|folder| self::files(folder))
        .chain(files)
        .filter(|path| path.extension().is_some_and(|e| e == "rs"))
        .collect()
}

fn text(folder: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = files(&root.join(folder));
    paths.sort();
    // This file names what it does not find.
    paths.retain(|path| !path.ends_with("conformance/coverage.rs"));
    paths.into_iter().map(|path| fs::read_to_string(path).expect("a source file")).collect()
}

/// The string literals of the decoder that look like words of an opcode.
fn vocabulary() -> BTreeSet<String> {
    let source = text("src/decode");
    let literals = source.split('"').skip(1).step_by(2);
    let word = |word: &&str| {
        !word.is_empty()
            && word.len() < 20
            && word.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, ':' | '_'))
            && !word.starts_with('_')
    };
    literals.filter(word).map(str::to_owned).collect()
}

/// Each word that the decoder knows stands in a test.
#[test]
fn every_word_of_the_decoder_is_in_a_test() {
    let tests = text("tests");
    let mut words: BTreeSet<&str> = BTreeSet::new();
    words.extend(tests.split(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, ':' | '_'))));
    // `{ty}{bits}` in a table stands for these.
    let composed = ["u", "s", "b"].iter().flat_map(|ty| [16, 32, 64].map(|bits| format!("{ty}{bits}")));
    let composed: BTreeSet<String> = composed.collect();
    let vocabulary = vocabulary();
    assert!(vocabulary.len() > 150, "{} words found in the decoder", vocabulary.len());
    let missing: Vec<_> =
        vocabulary.iter().filter(|word| !words.contains(word.as_str()) && !composed.contains(*word)).collect();
    assert!(missing.is_empty(), "no test has {missing:?}");
}

fn accepted(case: &Case, old: &str, new: &str) -> bool {
    let text = case.text.replacen(old, new, 1);
    let module = Module::parse(&Case { text, ..case.clone() }.kernel());
    module.is_ok_and(|module| module.kernel_error("k").is_none())
}

/// All that differs from `opcode` by one word of `words`: replaced, added or left out.
fn neighbours(opcode: &str, words: &BTreeSet<String>) -> BTreeSet<String> {
    let parts: Vec<&str> = opcode.split('.').collect();
    let mut all = BTreeSet::new();
    for at in 1..=parts.len() {
        if at < parts.len() {
            let mut left_out = parts.clone();
            left_out.remove(at);
            all.insert(left_out.join("."));
        }
        for word in words {
            let mut added = parts.clone();
            added.insert(at, word);
            all.insert(added.join("."));
            if at < parts.len() {
                let mut replaced = parts.clone();
                replaced[at] = word;
                all.insert(replaced.join("."));
            }
        }
    }
    all
}

/// From each opcode of the tables, every opcode that is one word away and that the decoder takes is in the tables as well.
#[test]
fn opcodes_beside_those_of_the_tables_are_in_the_tables() {
    const EVERY_WORD: usize = 3;
    let cases = crate::all();
    let known: BTreeSet<String> = cases.iter().flat_map(|case| case.opcodes().map(str::to_owned)).collect();
    let mut by_root: BTreeMap<&str, BTreeMap<&str, &Case>> = BTreeMap::new();
    for case in &cases {
        for opcode in case.opcodes().filter(|opcode| !["ld", "st", "cvta"].contains(opcode)) {
            let root = opcode.split('.').next().unwrap_or(opcode);
            by_root.entry(root).or_default().entry(opcode).or_insert(case);
        }
    }
    let every_word = vocabulary();
    let mut missing = BTreeSet::new();
    for opcodes in by_root.values() {
        let own: BTreeSet<String> =
            opcodes.keys().flat_map(|opcode| opcode.split('.').skip(1)).map(str::to_owned).collect();
        let step = opcodes.len().div_ceil(EVERY_WORD);
        // Many opcodes of one root are each other's neighbours: a share of them reaches all.
        let sparse = opcodes.len().div_ceil(60);
        for (i, (opcode, case)) in opcodes.iter().enumerate() {
            let words = match i {
                _ if i % step == 0 => &every_word,
                _ if i % sparse == 0 => &own,
                _ => continue,
            };
            let unknown = neighbours(opcode, words).into_iter().filter(|new| !known.contains(new));
            missing.extend(unknown.filter(|new| accepted(case, opcode, new)));
        }
    }
    assert!(missing.is_empty(), "not in the tables: {missing:#?}");
}
