//! Hostile adapters: damaged in thousands of ways, they are refused or loaded, without a panic and in bounded memory
//! and time.
#![cfg(feature = "peft")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::panic::catch_unwind;
use std::time::Duration;

use common::clock::Clock;
use common::data::Rng;
use common::fuzz_peft;
use fused_lora::peft::{Adapter, Config, ErrorKind};
use serde_json::{Map, Value, json};

/// Counts what each thread holds, and its peak.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // The thread's counters may be gone while it ends.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(held.get())));
    });
}

// SAFETY: every call goes to the system's allocator as it is; counting allocates nothing (constant thread-locals).
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise is System's.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both exist while it is moved.
        count(size as isize);
        // SAFETY: as above.
        let moved = unsafe { System.realloc(pointer, layout, size) };
        count(-(layout.size() as isize));
        moved
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Bytes that `run` held at its worst, beside what was there before.
fn peak<T>(run: impl FnOnce() -> T) -> (T, usize) {
    let before = HELD.get();
    PEAK.set(before);
    let result = run();
    (result, (PEAK.get() - before).max(0) as usize)
}

struct Files {
    config: Vec<u8>,
    tensors: Vec<u8>,
}

fn files(path: &str) -> Files {
    let dir = common::project().join("tests/golden").join(path);
    let read = |name: &str| fs::read(dir.join(name)).expect("a readable file");
    Files { config: read("adapter_config.json"), tensors: read("adapter_model.safetensors") }
}

fn valid() -> Vec<Files> {
    let paths = [
        "peft/llama/adapters/patterns",
        "peft/llama/adapters/layers",
        "lora_bias/adapter",
        "dora/adapter",
        "bias_lora_only/adapter",
        "peft/format/mixed_dtypes_on_disk",
    ];
    paths.map(files).into()
}

/// Header of a safetensors file, and what follows it, where it still has a header with tensors.
fn split(tensors: &[u8]) -> Option<(Map<String, Value>, &[u8])> {
    let (length, rest) = tensors.split_first_chunk()?;
    let (header, data) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
    let header: Map<String, Value> = serde_json::from_slice(header).ok()?;
    (!header.is_empty()).then_some((header, data))
}

fn join(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

/// A value that fits badly.
fn odd(rng: &mut Rng) -> Value {
    let values = [
        json!(null),
        json!(true),
        json!(0),
        json!(-1),
        json!(1),
        json!(7),
        json!(u64::MAX),
        json!(1e308),
        json!(0.5),
        json!(""),
        json!("^"),
        json!("(a+)+$"),
        json!("a{1000}{1000}"),
        json!("(?=(.*)*)b\\1"),
        json!("all-linear"),
        json!("BF16"),
        json!("F64"),
        json!([]),
        json!([""]),
        json!(["q_proj", null]),
        json!([0, u64::MAX]),
        json!([1u64 << 62, 4]),
        json!({}),
        json!({"": 1}),
        json!({"(": 1}),
        json!({"q_proj": 0}),
        json!({".*": 3}),
        json!([[[[[[]]]]]]),
    ];
    values[rng.bits() as usize % values.len()].clone()
}

fn flip(bytes: &mut [u8], rng: &mut Rng, limit: usize) {
    for _ in 0..=rng.bits() % 3 {
        let at = rng.bits() as usize % limit.min(bytes.len()).max(1);
        if let Some(byte) = bytes.get_mut(at) {
            *byte = if rng.bits().is_multiple_of(2) { *byte ^ (1 << (rng.bits() % 8)) } else { rng.bits() as u8 };
        }
    }
}

/// The key or index of one entry, chosen at random.
fn any_key(map: &Map<String, Value>, rng: &mut Rng) -> String {
    map.keys().nth(rng.bits() as usize % map.len()).expect("a key").clone()
}

fn mutate_header(header: &mut Map<String, Value>, rng: &mut Rng) {
    let key = any_key(header, rng);
    match (rng.bits() % 4, header[&key].clone()) {
        (0, _) => drop(header.remove(&key)),
        (1, value) => {
            let suffix = ["", ".default", "x", "\u{0}", "😀"][rng.bits() as usize % 5];
            header.insert(format!("{key}{suffix}"), value);
        }
        (_, Value::Object(mut fields)) if !fields.is_empty() => {
            let field = any_key(&fields, rng);
            match fields.get_mut("shape").and_then(Value::as_array_mut) {
                // Another shape of as many elements.
                Some(shape) if field == "shape" && rng.bits().is_multiple_of(2) => shape.reverse(),
                Some(shape) if field == "shape" && rng.bits().is_multiple_of(2) => shape.insert(0, json!(1)),
                _ => fields[&field] = odd(rng),
            }
            header[&key] = Value::Object(fields);
        }
        _ => header[&key] = odd(rng),
    }
}

fn mutate(files: &mut Files, rng: &mut Rng) {
    match rng.bits() % 9 {
        0 => flip(&mut files.tensors, rng, usize::MAX),
        // The header, where it hurts more.
        1 => flip(&mut files.tensors, rng, 600),
        2 => files.tensors.truncate(rng.bits() as usize % files.tensors.len().max(1)),
        3 => {
            if let Some(length) = files.tensors.first_chunk_mut() {
                *length = (rng.bits() >> (rng.bits() % 64)).to_le_bytes();
            }
        }
        4 | 5 => {
            if let Some((mut header, data)) = split(&files.tensors) {
                mutate_header(&mut header, rng);
                files.tensors = join(&Value::Object(header).to_string(), data);
            }
        }
        6 => flip(&mut files.config, rng, usize::MAX),
        7 => files.config.truncate(rng.bits() as usize % files.config.len().max(1)),
        _ => {
            if let Ok(mut config) = serde_json::from_slice::<Map<String, Value>>(&files.config)
                && !config.is_empty()
            {
                let key = any_key(&config, rng);
                config[&key] = odd(rng);
                files.config = Value::Object(config).to_string().into_bytes();
            }
        }
    }
}

/// Ten thousand damaged adapters: no panic, little memory and time, and what is loaded is what a second reading says.
#[test]
fn mutations_are_refused_or_read_correctly() {
    let (mut loaded, mut refused) = (0, std::collections::BTreeMap::<String, usize>::new());
    for seed in 0..10_000 {
        let mut rng = Rng(seed);
        let mut files = valid().swap_remove(rng.bits() as usize % 5);
        for _ in 0..=rng.bits() % 2 {
            mutate(&mut files, &mut rng);
        }
        let start = Clock::start();
        let tensors = files.tensors.clone();
        let (_, peak) = peak(|| catch_unwind(|| Adapter::load_bytes(&files.config, tensors)));
        let outcome = catch_unwind(|| fuzz_peft::files(&files.config, &files.tensors));
        let outcome = outcome.unwrap_or_else(|_| panic!("seed {seed} panicked"));
        let size = files.tensors.len() + files.config.len();
        assert!(peak <= 8 * size + (2 << 20), "seed {seed}: {peak} bytes for files of {size}");
        assert!(start.elapsed() < Duration::from_secs(5), "seed {seed}: {:?}", start.elapsed());
        match outcome {
            Ok(_) => loaded += 1,
            Err(kind) => {
                let kind = format!("{kind:?}");
                *refused.entry(kind.split([' ', '(']).next().expect("a name").to_owned()).or_default() += 1;
            }
        }
    }
    println!("{loaded} loaded, refused: {refused:?}");
    // The mutations reach every layer: some change values only, and every kind of refusal but a few occurs.
    assert!(loaded > 100, "{loaded}");
    assert!(refused.len() >= 8, "{refused:?}");
}

/// Memory follows the file, not what its header claims; and a large file is held once.
#[test]
fn memory_follows_the_file() {
    let config = br#"{"peft_type": "LORA", "r": 8, "target_modules": ["q_proj", "v_proj"]}"#.to_vec();
    let check = |name: &str, config: Vec<u8>, tensors: Vec<u8>, loads: bool, factor: usize| {
        let size = config.len() + tensors.len();
        // The vector itself was allocated before.
        let (result, peak) = peak(|| Adapter::load_bytes(&config, tensors));
        assert_eq!(result.is_ok(), loads, "{name}: {:?}", result.err());
        println!("{name}: {peak} bytes beside files of {size}");
        assert!(peak <= factor * size + (64 << 10), "{name}: {peak} bytes for files of {size}");
    };
    let claim = |length: u64| [&length.to_le_bytes()[..], b"{}"].concat();
    for length in [u64::MAX, 1 << 62, 100_000_000, 99_999_999, 3] {
        check("a header's length", config.clone(), claim(length), false, 0);
    }
    let huge = r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}"#;
    check("a shape", config.clone(), join(huge, &[0; 16]), false, 0);
    // A million bytes of factors: nothing but their description is allocated.
    let (r, k, n) = (8, 20_000, 10_000);
    let a = r * k * 4;
    let header = format!(
        r#"{{"base_model.model.q_proj.lora_A.weight":{{"dtype":"F32","shape":[{r},{k}],"data_offsets":[0,{a}]}},"base_model.model.q_proj.lora_B.weight":{{"dtype":"F32","shape":[{n},{r}],"data_offsets":[{a},{}]}}}}"#,
        a + n * r * 4
    );
    check("a large adapter", config.clone(), join(&header, &vec![0; a + n * r * 4]), true, 0);
    // Headers that become many small things.
    let shape = format!(r#"{{"a":{{"dtype":"F32","shape":[{}0],"data_offsets":[0,0]}}}}"#, "1,".repeat(200_000));
    check("a long shape", config.clone(), join(&shape, &[]), false, 40);
    let tensors: Vec<String> =
        (0..20_000).map(|index| format!(r#""{index}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#)).collect();
    check("many tensors", config.clone(), join(&format!("{{{}}}", tensors.join(",")), &[]), false, 40);
    let metadata: Vec<String> = (0..50_000).map(|index| format!(r#""{index}":"""#)).collect();
    check(
        "much metadata",
        config.clone(),
        join(&format!(r#"{{"__metadata__":{{{}}}}}"#, metadata.join(",")), &[]),
        false,
        40,
    );
    let list = format!(r#"{{"peft_type": "LORA", "target_modules": [{}"q"]}}"#, r#""","#.repeat(100_000));
    check("a long list", list.into_bytes(), claim(2), false, 100);
    let list = format!(r#"{{"peft_type": "LORA", "target_modules": ["q"], "x": [{}0]}}"#, "0,".repeat(200_000));
    check("a long unknown list", list.into_bytes(), claim(2), false, 100);
    let list = format!(r#"{{"peft_type": "LORA", "target_modules": ["q"], "x": {}}}"#, "[".repeat(200_000));
    check("a deep list", list.into_bytes(), claim(2), false, 1);
}

/// Names and lists whose product would be slow: a key of a million dots, and many modules to save against many biases.
#[test]
fn time_follows_the_file() {
    let config = |more: &str| format!(r#"{{"peft_type": "LORA", "target_modules": ["q"], "bias": "all"{more}}}"#);
    let one = |name: &str| {
        let tensor = format!(r#"{{"base_model.model.{name}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}}}"#);
        join(&tensor, &[])
    };
    let refused = |config: String, tensors: Vec<u8>, expected: &str| {
        let start = Clock::start();
        let error = Adapter::load_bytes(config.as_bytes(), tensors).expect_err("refused").to_string();
        assert!(error.contains(expected) && error.len() < 2_000, "{}", error.get(..200).unwrap_or(&error));
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    };
    let dots = "q.".repeat(1_000_000);
    let saved = r#", "modules_to_save": ["head"]"#;
    for name in [format!("{dots}q.lora_A.weight"), format!("{dots}bias"), dots.clone()] {
        refused(config(saved), one(&name), "at most 1024 are accepted");
    }
    let many = format!(r#", "modules_to_save": [{}"head"]"#, r#""zz","#.repeat(300_000));
    refused(config(&many), one("a.bias"), "`modules_to_save` is a list of 300001, expected at most 256 names");
}

/// Every way in which an expression may be dear: refused when it is compiled, or stopped when it is matched.
#[test]
fn expressions_are_bounded() {
    let name = format!("model.{}.q_proj", "a".repeat(200));
    let cases = [
        // Backtracking, exponential in the name.
        r"(?=.)(a+)+$",
        r"model\.((a|aa)+)+\1b",
        r"(?:(?=(a*)*b)a|.)*c",
        r"(.*)(.*)(.*)(.*)(.*)(.*)\1\2\3\4\5\6x",
        // Size.
        r"(.{1000}){1000}",
        r"\w{256}\w{256}",
        r"(((((a{10}){10}){10}){10}){10}){10}",
        r"(?:(?=a)|b){4000000000}",
        r"((((?=a){1000}){1000}){1000}){1000}",
        r"(?:\w(?=\w)){200,256}z",
        r".*a.{250}",
        &"(".repeat(5_000),
        &"(?:a|".repeat(3_000),
        &"[".repeat(5_000),
        &"x?".repeat(8_000),
        &"a".repeat(20_000),
        // Not Python's, or nobody's.
        r"(",
        r"a**",
        r"(?P<n>a)(?P<n>b)",
        r"\1",
        r"(?<=a*)b",
    ];
    for pattern in cases {
        let shown: String = pattern.chars().take(40).collect();
        for config in [
            json!({"peft_type": "LORA", "target_modules": pattern}),
            json!({"peft_type": "LORA", "target_modules": [name], "exclude_modules": pattern}),
            json!({"peft_type": "LORA", "target_modules": [name], "rank_pattern": {pattern: 2}}),
            json!({"peft_type": "LORA", "target_modules": [name], "modules_to_save": [pattern]}),
            json!({"peft_type": "LORA", "target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": [pattern]}),
        ] {
            let text = config.to_string();
            let start = Clock::start();
            let (outcome, peak) = peak(|| Config::from_json(&text).and_then(|config| config.targets(&name)));
            if let Err(error) = outcome {
                assert!(
                    matches!(error.kind, ErrorKind::Pattern { .. } | ErrorKind::PatternCost { .. }),
                    "{shown}: {error}"
                );
            }
            assert!(start.elapsed() < Duration::from_secs(3), "{shown}: {:?}", start.elapsed());
            assert!(peak < 64 << 20, "{shown}: {peak} bytes");
        }
    }
    let exponential =
        Config::from_json(&json!({"peft_type": "LORA", "target_modules": cases[1]}).to_string()).expect("compiles");
    let error = exponential.targets(&name).expect_err("too dear").to_string();
    assert!(error.contains("`target_modules`") && error.contains("model.aaa"), "{error}");
}

/// An expression that is dear for every name, but not too dear for one, is stopped over all of them.
#[test]
fn work_is_bounded_over_all_names() {
    let config = Config::from_json(
        &json!({"peft_type": "LORA", "target_modules": r"model\.(?=.)((a|aa)+)+x?\.q\d+"}).to_string(),
    )
    .expect("compiles");
    let matcher = config.matcher().expect("compiles");
    let start = Clock::start();
    let mut asked = 0;
    let error = (0..1_000_000).find_map(|index| {
        asked += 1;
        matcher.targets(&format!("model.{}.k{index}", "a".repeat(9))).err()
    });
    let error = error.expect("stopped").to_string();
    assert!(error.contains("work allowed for all names"), "{error}");
    assert!(asked > 100, "the bound on one name stopped it: {error}");
    println!("{asked} names in {:?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
}

/// A mixture of experts with a pattern for each of its modules is read at once.
#[test]
fn twenty_thousand_modules() {
    let name = |index: usize| format!("model.layers.{}.mlp.experts.{}.up_proj", index / 300, index % 300);
    let ranks: Map<String, Value> =
        (0..20_000).map(|index| (format!("^{}", name(index)), json!(index % 7 + 1))).collect();
    let config = json!({"peft_type": "LORA", "target_modules": r".*\.experts\.\d+\.(up|down)_proj", "exclude_modules": r"^(?!model\.).*",
        "rank_pattern": ranks});
    let start = Clock::start();
    let config = Config::from_json(&config.to_string()).expect("read");
    let matcher = config.matcher().expect("compiles");
    for index in 0..20_000 {
        let module = matcher.targets(&name(index)).expect("matched").expect("targeted");
        assert_eq!(module.r, index % 7 + 1, "{}", name(index));
    }
    println!("{:?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}
