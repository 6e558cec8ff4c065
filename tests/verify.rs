//! The program `verify` on recorded layers: right ones pass, spoiled ones fail, hostile ones are refused without a panic.

mod common;
#[path = "../examples/verify/main.rs"]
mod verify;

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use common::data::Rng;
use fused_lora::bf16;
use fused_lora::reference::{self, Inputs, Mat};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

/// Cases that are computed, each with its number of results on a backend that computes in every type.
const COMPUTED: [(&str, usize); 13] = [
    ("plain", 24),
    ("plain_3d_nobias", 24),
    ("odd_sizes", 20),
    ("rslora", 24),
    ("decode_r1", 24),
    ("high_rank", 12),
    ("zero_b", 12),
    ("conv1d_fan_in_fan_out", 24),
    ("bias_lora_only", 10),
    ("lora_bias", 15),
    ("dora", 30),
    ("multi_active", 48),
    ("mixed_batch", 36),
];

struct Output {
    status: u8,
    out: String,
    err: String,
}

fn run(arguments: &[&str]) -> Output {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let status = verify::run(arguments.iter().map(OsString::from).collect(), &mut out, &mut err);
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    Output { status, out: text(out), err: text(err) }
}

fn on_cpu(case: &Path) -> Output {
    run(&["--backend", "cpu", case.to_str().expect("a UTF-8 path")])
}

fn golden(case: &str) -> PathBuf {
    common::project().join("tests/golden").join(case)
}

/// A copy of a case that a test may spoil.
fn copy_of(case: &str, test: &str) -> PathBuf {
    let target = common::scratch().join(format!("{test}-{case}"));
    common::copy_folder(&golden(case), &target);
    target
}

/// Sets the sign-and-exponent byte of the first element of a tensor so that its value is wrong by far.
fn spoil(file: &Path, tensor: &str) {
    let mut bytes = fs::read(file).expect("a file");
    let (header, metadata) = SafeTensors::read_metadata(&bytes).expect("a safetensors header");
    let info = metadata.info(tensor).expect("the tensor");
    let width = info.dtype.bitsize() / 8;
    let last = 8 + header + info.data_offsets.0 + width - 1;
    bytes[last] = if bytes[last] == 0x41 { 0xc1 } else { 0x41 };
    fs::write(file, bytes).expect("a written file");
}

#[test]
fn recorded_layers_are_within_their_bounds() {
    for (case, _) in COMPUTED {
        let Output { status, out, err } = on_cpu(&golden(case));
        assert_eq!(status, 0, "{case}\n{out}{err}");
        assert!(out.starts_with("backend: cpu (as asked)\n"), "{out}");
        assert!(out.contains("errors are within their bounds"), "{out}");
    }
}

/// The kernels themselves, executed on the emulator, give the same table less what is in f32.
#[cfg(feature = "cuda")]
#[test]
fn recorded_layers_are_within_their_bounds_on_the_emulator() {
    for (case, _) in COMPUTED {
        let path = golden(case);
        let Output { status, out, err } = run(&["--backend", "emulator", path.to_str().expect("UTF-8")]);
        assert_eq!(status, 0, "{case}\n{out}{err}");
        assert!(out.starts_with("backend: emulator (emulated sm_80 with 4 SMs)\n"), "{out}");
        assert!(out.contains("errors are within their bounds"), "{out}");
    }
}

#[test]
fn json_has_one_object_per_tensor_and_mode() {
    for (case, results) in COMPUTED {
        let path = golden(case);
        let Output { status, out, err } = run(&["--json", "--backend", "cpu", path.to_str().expect("UTF-8")]);
        assert_eq!((status, err.as_str()), (0, ""));
        let objects: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        assert_eq!(objects.len(), results, "{case}");
        for object in &objects {
            assert_eq!(object["ok"], true);
            assert_eq!(object["backend"], "cpu");
            assert!(object["error"].as_f64() <= object["bound"].as_f64(), "{object}");
            assert!(object["max_abs"].as_f64() <= object["max_abs_bound"].as_f64(), "{object}");
            assert!(object["seconds"].as_f64().is_some_and(|seconds| seconds >= 0.0));
            for key in ["name", "mode", "dtype"] {
                assert!(object[key].is_string(), "{object}");
            }
        }
    }
}

/// Whatever value of the record is wrong, some error exceeds its bound.
#[test]
fn a_wrong_value_anywhere_is_noticed() {
    let spoiled = [
        "W",
        "b",
        "x",
        "dY",
        "f64/y",
        "f64/dX",
        "f64/default.dA",
        "f64/default.dB",
        "f64_a32/y",
        "f64_a32/default.dA",
        "default.A_f32",
        "default.B_f32",
        "f32/y",
        "bf16/y",
        "bf16/dX",
        "bf16/default.dA",
        "f16/default.dB",
        "bf16_amp/y",
        "bf16_amp/default.dB",
        "bf16_a32/y",
        "bf16_a32/default.dA",
        "f16_a32/default.dB",
    ];
    for tensor in spoiled {
        let case = copy_of("plain", "wrong-value");
        spoil(&case.join("tensors.safetensors"), tensor);
        let Output { status, out, err } = on_cpu(&case);
        assert_eq!(status, 1, "{tensor}\n{out}{err}");
        assert!(out.contains("EXCEED"), "{out}");
    }
    let case = copy_of("bias_lora_only", "wrong-value");
    spoil(&case.join("tensors.safetensors"), "f64/db");
    assert_eq!(on_cpu(&case).status, 1);
    for (case, tensor) in [
        ("lora_bias", "f64/default.dBbias"),
        ("lora_bias", "bf16/default.dBbias"),
        ("dora", "f64/default.dm"),
        ("dora", "default.m_f32"),
        ("multi_active", "f64/b.dA"),
        ("multi_active", "f64/c.dB"),
        ("multi_active", "a.A_f32"),
        ("multi_active", "f64/dX"),
        ("mixed_batch", "f64/y"),
        ("mixed_batch", "f64/b.dB"),
        ("mixed_batch", "bf16/a.dA"),
        ("mixed_batch", "bf16_a32/b.dA"),
        ("mixed_batch", "f16_a32/y"),
    ] {
        let spoiled = copy_of(case, "wrong-value");
        spoil(&spoiled.join("tensors.safetensors"), tensor);
        assert_eq!(on_cpu(&spoiled).status, 1, "{case} {tensor}");
    }
}

/// An adapter that is not the one the results were recorded with is no adapter to compare with.
#[test]
fn the_adapter_on_disk_must_be_the_recorded_one() {
    for (file, tensor) in [
        ("tensors.safetensors", "default.A"),
        ("tensors.safetensors", "default.B"),
        ("adapter/adapter_model.safetensors", "base_model.model.lin.lora_A.weight"),
        ("adapter/adapter_model.safetensors", "base_model.model.lin.lora_B.weight"),
    ] {
        let case = copy_of("plain", "other-adapter");
        spoil(&case.join(file), tensor);
        let Output { status, err, .. } = on_cpu(&case);
        assert_eq!(status, 3, "{tensor}");
        assert!(err.contains("adapter_model.safetensors: lora_"), "{err}");
    }
    for (case, file, tensor) in [
        ("lora_bias", "tensors.safetensors", "default.Bbias"),
        ("lora_bias", "adapter/adapter_model.safetensors", "base_model.model.lin.lora_B.bias"),
        ("dora", "tensors.safetensors", "default.m"),
        ("dora", "adapter/adapter_model.safetensors", "base_model.model.lin.lora_magnitude_vector"),
        ("multi_active", "adapter/c/adapter_model.safetensors", "base_model.model.lin.lora_B.weight"),
    ] {
        let case = copy_of(case, "other-adapter");
        spoil(&case.join(file), tensor);
        let Output { status, err, .. } = on_cpu(&case);
        assert!(status == 3 && err.contains("adapter_model.safetensors: "), "{tensor}: {err}");
    }
    for (key, value) in
        [("r", json!(4)), ("lora_alpha", json!(1)), ("fan_in_fan_out", json!(true)), ("use_rslora", json!(true))]
    {
        let case = copy_of("plain", "other-config");
        let file = case.join("adapter/adapter_config.json");
        edit(&file, |config| config[key] = value);
        let Output { status, err, .. } = on_cpu(&case);
        assert_eq!(status, 3, "{key}");
        assert!(err.contains("adapter_config.json: "), "{err}");
    }
}

fn edit(file: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(file).expect("a file")).expect("JSON");
    change(&mut value);
    fs::write(file, value.to_string()).expect("a written file");
}

#[test]
fn what_is_not_built_is_named() {
    for (case, needed) in
        [("dropout", "needs dropout on the adapter branch"), ("embedding", "needs LoRA on embeddings")]
    {
        let Output { status, err, .. } = on_cpu(&golden(case));
        assert_eq!(status, 2, "{case}: {err}");
        assert!(err.contains(needed), "{err}");
    }
    let case = copy_of("plain", "other-kind");
    edit(&case.join("case.json"), |value| value["modes"] = json!(["f64_a32", "bf16_a8"]));
    let Output { status, err, .. } = on_cpu(&case);
    assert_eq!(status, 2);
    assert!(err.contains("needs a recorded mode that the cpu backend computes (recorded: f64_a32, bf16_a8)"), "{err}");
    edit(&case.join("adapter/adapter_config.json"), |value| value["peft_type"] = json!("ADALORA"));
    assert!(on_cpu(&case).err.contains("needs the PEFT method ADALORA"));
}

/// The gravest end of all cases is the exit status, and one bad case does not stop the others.
#[test]
fn several_cases() {
    let (good, refused, absent) = (golden("rslora"), golden("embedding"), golden("no-such-case"));
    let path = |path: &PathBuf| path.to_str().expect("UTF-8").to_owned();
    let run = |cases: &[&PathBuf]| {
        let cases: Vec<String> = cases.iter().map(|case| path(case)).collect();
        let arguments: Vec<&str> = ["--backend", "cpu"].into_iter().chain(cases.iter().map(String::as_str)).collect();
        run(&arguments)
    };
    assert_eq!(run(&[&good, &good]).status, 0);
    let both = run(&[&refused, &good]);
    assert_eq!(both.status, 2);
    assert!(both.out.contains("rslora: M 12"), "{}", both.out);
    assert_eq!(run(&[&absent, &refused, &good]).status, 3);
    let wrong = copy_of("plain", "several");
    spoil(&wrong.join("tensors.safetensors"), "W");
    assert_eq!(run(&[&wrong, &absent, &refused]).status, 1);
}

#[test]
fn the_command_line_is_checked() {
    let help = run(&["--help"]);
    assert_eq!(help.status, 0);
    assert!(help.out.contains("Exit status"));
    for arguments in [&[][..], &["--json"], &["--backend"], &["--backend", "tpu", "x"], &["--fast", "x"]] {
        let Output { status, out, err } = run(arguments);
        assert_eq!((status, out.as_str()), (3, ""), "{arguments:?}");
        assert!(err.starts_with("verify: "), "{err}");
    }
}

/// Without a GPU the default falls back, saying why; asking for CUDA does not.
#[test]
fn the_backend_is_chosen_and_named() {
    let case = golden("decode_r1");
    let case = case.to_str().expect("UTF-8");
    let chosen = run(&[case]);
    assert_eq!(chosen.status, 0, "{}", chosen.err);
    let asked = run(&["--backend", "cuda", case]);
    if cfg!(not(feature = "cuda")) {
        assert!(chosen.out.starts_with("backend: cpu (built without the `cuda` feature)\n"), "{}", chosen.out);
        assert!(asked.err.contains("this build has no cuda backend, expected feature `cuda`"), "{}", asked.err);
    } else if asked.status == 0 {
        assert!(chosen.out.starts_with("backend: cuda ("), "{}", chosen.out);
        return;
    } else {
        assert!(chosen.out.starts_with("backend: cpu (no NVIDIA driver found: CPU backend; "), "{}", chosen.out);
        assert!(asked.err.starts_with("verify: the cuda backend failed: no NVIDIA driver found: "), "{}", asked.err);
    }
    assert_eq!((asked.status, asked.out.as_str()), (3, ""));
}

#[test]
fn truncated_files_are_refused() {
    for file in ["case.json", "tensors.safetensors", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    {
        let whole = fs::read(golden("decode_r1").join(file)).expect("a file");
        // Cutting a JSON file's last newline is no harm; cutting two bytes is.
        for keep in [0, 1, 7, 8, 9, 100, whole.len() / 2, whole.len() - 2] {
            let case = copy_of("decode_r1", "truncated");
            fs::write(case.join(file), &whole[..keep.min(whole.len() - 2)]).expect("a written file");
            let Output { status, err, .. } = on_cpu(&case);
            assert_eq!(status, 3, "{file} cut to {keep} bytes: {err}");
            assert!(err.contains(Path::new(file).file_name().and_then(|name| name.to_str()).expect("a name")), "{err}");
        }
        let case = copy_of("decode_r1", "truncated");
        fs::remove_file(case.join(file)).expect("a removed file");
        assert_eq!(on_cpu(&case).status, 3, "{file} removed");
    }
}

/// Every entry of case.json and of the adapter's config, replaced by values of every kind: any exit status, no panic.
#[test]
fn hostile_json_never_panics() {
    let values = [
        json!(null),
        json!(true),
        json!(-1),
        json!(0),
        json!(1e308),
        json!(u64::MAX),
        json!("../../x"),
        json!([]),
        json!([0, 0]),
        json!([u64::MAX, u64::MAX, 96]),
        json!(["f32", "bf16"]),
        json!({}),
    ];
    for file in ["case.json", "adapter/adapter_config.json"] {
        let original: Value =
            serde_json::from_slice(&fs::read(golden("decode_r1").join(file)).expect("a file")).expect("JSON");
        let case = copy_of("decode_r1", "hostile");
        for key in original.as_object().expect("an object").keys() {
            for value in &values {
                let mut hostile = original.clone();
                hostile[key] = value.clone();
                fs::write(case.join(file), hostile.to_string()).expect("a written file");
                let Output { status, .. } = on_cpu(&case);
                assert!(status <= 3, "{key} = {value}");
            }
        }
        let adapter = &original["adapters"]["default"];
        for key in adapter.as_object().map(|map| map.keys().cloned().collect::<Vec<_>>()).unwrap_or_default() {
            for value in &values {
                let mut hostile = original.clone();
                hostile["adapters"]["default"][&key] = value.clone();
                fs::write(case.join(file), hostile.to_string()).expect("a written file");
                assert!(on_cpu(&case).status <= 3, "{key} = {value}");
            }
        }
        fs::write(case.join(file), original.to_string()).expect("a written file");
        assert_eq!(on_cpu(&case).status, 0);
    }
}

/// Tensors of a case that this test writes itself.
#[derive(Default)]
struct Writer(HashMap<String, (Dtype, Vec<usize>, Vec<u8>)>);

impl Writer {
    fn put(&mut self, name: &str, dtype: Dtype, shape: &[usize], values: &Mat) {
        let bytes = values.data.iter().flat_map(|&value| match dtype {
            Dtype::BF16 => bf16::from_f64(value).to_le_bytes().to_vec(),
            Dtype::F32 => (value as f32).to_le_bytes().to_vec(),
            _ => value.to_le_bytes().to_vec(),
        });
        self.0.insert(name.into(), (dtype, shape.to_vec(), bytes.collect()));
    }

    fn write(&self, file: &Path) {
        let views = self.0.iter().map(|(name, (dtype, shape, bytes))| {
            (name, TensorView::new(*dtype, shape.clone(), bytes).expect("a tensor"))
        });
        fs::write(file, safetensors::serialize(views, None).expect("a file's bytes")).expect("a written file");
    }
}

/// A case as no recording has it: other sizes, x of one or four dimensions, an adapter of another name, one mode, and no
/// error of PEFT's beside it, so that it has to be measured.
#[test]
fn a_case_never_seen_before() {
    for (lead, n, k, r) in [(&[][..], 5, 33, 2), (&[3, 1, 7], 70, 130, 9)] {
        let m: usize = lead.iter().product();
        let mut rng = Rng(7);
        let mut random = |rows, cols| {
            let values: Vec<f64> = (0..rows * cols).map(|_| bf16::from_f64(rng.unit()).to_f64()).collect();
            Mat { rows, cols, data: values }
        };
        let (x, w, a, b, dy) = (random(m, k), random(n, k), random(r, k), random(n, r), random(m, n));
        let inputs = Inputs { x, w, a, b, bias: None, dy, scale: 1.5, keep: None, gate: None, gain: None };
        let truth = reference::forward(&inputs);
        let naive = reference::naive_forward::<bf16>(&inputs);
        let truth = (truth.1, reference::backward(&inputs, &truth.0));
        let naive = (naive.1, reference::naive_backward::<bf16>(&inputs, &naive.0));
        let with = |cols: usize| -> Vec<usize> { lead.iter().copied().chain([cols]).collect() };
        let mut tensors = Writer::default();
        for (name, shape, values) in [
            ("x", &with(k)[..], &inputs.x),
            ("dY", &with(n), &inputs.dy),
            ("W", &[n, k], &inputs.w),
            ("mine.A", &[r, k], &inputs.a),
            ("mine.B", &[n, r], &inputs.b),
        ] {
            tensors.put(name, Dtype::BF16, shape, values);
        }
        for (mode, dtype, (y, gradients)) in [("f64", Dtype::F64, &truth), ("bf16", Dtype::BF16, &naive)] {
            tensors.put(&format!("{mode}/y"), dtype, &with(n), y);
            tensors.put(&format!("{mode}/dX"), dtype, &with(k), &gradients.dx);
            tensors.put(&format!("{mode}/mine.dA"), dtype, &[r, k], &gradients.da);
            tensors.put(&format!("{mode}/mine.dB"), dtype, &[n, r], &gradients.db);
        }
        let case = common::scratch().join(format!("unseen-{k}"));
        fs::create_dir_all(case.join("adapter/mine")).expect("a folder");
        tensors.write(&case.join("tensors.safetensors"));
        let mut adapter = Writer::default();
        adapter.put("base_model.model.block.0.proj.lora_A.weight", Dtype::BF16, &[r, k], &inputs.a);
        adapter.put("base_model.model.block.0.proj.lora_B.weight", Dtype::F32, &[n, r], &inputs.b);
        adapter.write(&case.join("adapter/mine/adapter_model.safetensors"));
        let alpha = 1.5 * r as f64;
        let config = json!({ "peft_type": "LORA", "r": r, "lora_alpha": alpha });
        fs::write(case.join("adapter/mine/adapter_config.json"), config.to_string()).expect("a written file");
        let described = json!({ "mine": { "r": r, "lora_alpha": alpha, "scaling": 1.5, "config": {} } });
        let info = json!({
            "kind": "linear", "name": "unseen", "active": ["mine"], "adapters": described, "modes": ["f64", "bf16"],
            "in_features": k, "out_features": n, "x_shape": with(k), "weight_layout": "[out,in]",
        });
        fs::write(case.join("case.json"), info.to_string()).expect("a written file");
        let Output { status, out, err } = on_cpu(&case);
        assert_eq!(status, 0, "{out}{err}");
        assert!(out.contains("all 4 errors are within their bounds"), "{out}");
    }
}
