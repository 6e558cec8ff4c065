//! Recordings from real GPUs, replayed: the emulator must leave the same bytes.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use ptx_emulator::Options;
use ptx_emulator::calibration::{Recording, cases};

/// Every recording in `calibration/`, by file name.
fn recordings() -> Vec<(String, Recording)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("calibration");
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "txt") {
            let text = fs::read_to_string(&path).expect("a readable file");
            found.push((path.display().to_string(), Recording::parse(&text).expect("a recording")));
        }
    }
    found
}

#[test]
fn every_case_runs_and_repeats() {
    let mut names = BTreeSet::new();
    for case in cases() {
        assert!(names.insert(case.name.clone()), "{} is there twice", case.name);
        let first = case.run(&Options::default()).unwrap_or_else(|report| panic!("{}: {report}", case.name)).0;
        let other = case.run(&Options { seed: 9, ..Options::default() }).expect("it ran before").0;
        assert_eq!(first, other, "{}", case.name);
        assert_eq!(first.len(), case.output_words * 4);
    }
}

#[test]
fn recordings_are_reproduced() {
    let recordings = recordings();
    let recorded: BTreeSet<&str> =
        recordings.iter().flat_map(|(_, recording)| &recording.outputs).map(|(name, _)| name.as_str()).collect();
    for case in cases() {
        let bytes = case.run(&Options::default()).unwrap_or_else(|report| panic!("{}: {report}", case.name)).0;
        for (file, recording) in &recordings {
            if let Some((_, expected)) = recording.outputs.iter().find(|(name, _)| *name == case.name) {
                let differs = bytes.chunks(4).zip(expected.chunks(4)).position(|(got, expected)| got != expected);
                assert_eq!(differs, None, "{file}: {} differs from word {differs:?} on", case.name);
                assert_eq!(bytes.len(), expected.len(), "{file}: {}", case.name);
            }
        }
    }
    let missing: Vec<String> =
        cases().into_iter().map(|case| case.name).filter(|name| !recorded.contains(name.as_str())).collect();
    println!("{} of {} cases recorded on hardware; missing: {missing:?}", recorded.len(), cases().len());
}

#[test]
fn recordings_survive_the_text_form() {
    let recording = Recording {
        head: vec![("gpu".into(), "NVIDIA X".into()), ("command".into(), "a b: c".into())],
        outputs: vec![("add.f32".into(), vec![0, 255, 16]), ("empty".into(), vec![])],
    };
    assert_eq!(Recording::parse(&recording.to_text()), Ok(recording));
    for broken in ["add.f32", "add.f32 0", "add.f32 xy", "add.f32 0g"] {
        assert!(Recording::parse(broken).is_err(), "{broken}");
    }
}
