//! `examples/explain.rs`, called as a function: what it prints and its exit statuses.

#[path = "../examples/explain.rs"]
mod explain;

/// Exit status, stdout, stderr.
fn run(line: &str) -> (u8, String, String) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let status = explain::run(line.split_whitespace().map(Into::into).collect(), &mut out, &mut err);
    let text = |bytes| String::from_utf8(bytes).expect("the output is UTF-8");
    (status, text(out), text(err))
}

#[test]
fn a_plan_in_words() {
    let (status, out, err) = run("--m 8192 --n 4096 --k 4096 --r 16 --gpu h200");
    assert_eq!((status, err.as_str()), (0, ""));
    assert!(out.starts_with("forward Bf16, M=8192 N=4096 K=4096 R=16, on NVIDIA H200\n"), "{out}");
    assert!(!out.contains("note"), "aligned operands need no note: {out}");
    for part in
        ["family sm90", "128 x 256 x 64", "in clusters of 2", "constants are not measured", "arithmetic is the bound"]
    {
        assert!(out.contains(part), "`{part}` is missing from\n{out}");
    }
    let (_, ragged, _) = run("--m 8192 --n 4096 --k 4095 --r 16 --gpu h200");
    assert!(ragged.contains("x is read element by element"), "{ragged}");
    assert!(ragged.contains("not the Hopper family: K is 4095, not a multiple of 8"), "{ragged}");
}

/// Every GPU of the table: plan, predicted time where there is a model, floor, what binds, workspace.
#[test]
fn a_plan_for_every_gpu() {
    for (gpu, is_modelled) in
        [("h200", true), ("a100", true), ("rtx4090", true), ("t4", true), ("rtx5090", true), ("b200", false)]
    {
        for (m, resource) in [(8192, "arithmetic is the bound"), (16, "memory is the bound")] {
            let (status, out, err) = run(&format!("--m {m} --n 4096 --k 4096 --r 16 --gpu {gpu} --dtype f16"));
            assert_eq!((status, err.as_str()), (0, ""));
            assert_eq!(out.contains("  predicted  "), is_modelled, "{out}");
            assert!(out.contains(resource) && out.contains("  floor      ") && out.contains("  workspace  "), "{out}");
        }
    }
}

#[test]
fn choices_instead_of_the_planner() {
    let call = "--m 8192 --n 4096 --k 4096 --r 16 --gpu h100 --op backward --json";
    let plan = |options: &str| -> serde_json::Value {
        let (status, out, err) = run(&format!("{call} {options}"));
        assert_eq!(status, 0, "{err}");
        serde_json::from_str(&out).unwrap()
    };
    let chosen = plan("--tile 192 --cluster 1 --bundle 3 --chunks 2");
    assert_eq!((&chosen["family"], &chosen["bundle"], &chosen["chunks"]), (&"sm90".into(), &3.into(), &2.into()));
    assert_eq!(chosen["kernel"], "lora_sm90_backward_bf16_192");
    assert_eq!(chosen["cluster"], serde_json::json!([1, 1, 1]));
    assert!(chosen["predicted_us"].as_f64().unwrap() > chosen["floor_arithmetic_us"].as_f64().unwrap());
    assert!(chosen["floor_memory_us"].as_f64().unwrap() > 0.0);
    let portable = plan("--family portable --tile small");
    assert_eq!(portable["family"], "portable");
    assert!(portable["predicted_us"].as_f64().unwrap() > chosen["predicted_us"].as_f64().unwrap());
    assert_eq!(plan("--group-m 3")["kernel"], plan("")["kernel"]);
    assert_eq!(portable["kernel"], "lora_backward_bf16_small");
}

#[test]
fn a_plan_as_json() {
    let (status, out, _) = run("--m 100 --n 200 --k 300 --r 0 --gpu t4 --dtype f16 --op backward --json");
    assert_eq!(status, 0);
    let plan: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(plan["op"], "backward");
    assert_eq!(plan["arch"], 75);
    assert_eq!(plan["image"], "portable_backward");
    assert!(plan["kernel"].as_str().unwrap().starts_with("lora_backward_f16_"));
    assert!(plan["workspace_bytes"].as_u64().unwrap() >= fused_lora::plan::SYNC_BYTES as u64);
}

#[test]
fn what_the_planner_refuses_is_status_1() {
    for (line, says) in [
        ("--m 1 --n 1 --k 0 --r 1 --gpu a100", "`x` has zero columns"),
        ("--m 1 --n 1 --k 1 --r 1 --gpu a100 --dtype f32", "dtype F32 is not computed"),
        ("--m 2147483648 --n 1 --k 1 --r 1 --gpu a100", "the limit is 2147483647"),
        (
            "--m 8 --n 8 --k 8 --r 8 --gpu a100 --tile 256",
            "the plan option `tile` is Sm90N256, expected a choice of the portable",
        ),
        ("--m 8 --n 8 --k 8 --r 8 --gpu h100 --cluster 4", "the plan option `cluster` is 4, expected 1 or 2"),
        ("--m 18446744073709551615 --n 3 --k 9 --r 1 --gpu a100 --op backward", "the limit is"),
    ] {
        let (status, out, err) = run(line);
        assert_eq!((status, out.as_str()), (1, ""), "{line}");
        assert!(err.starts_with("explain: ") && err.contains(says), "{line}: {err}");
    }
}

#[test]
fn wrong_usage_is_status_3() {
    for (line, says) in [
        ("--m 1 --n 1 --k 1 --r 1", "`--gpu` is missing"),
        ("--m 1 --n 1 --k 1 --gpu t4", "`--r` is missing"),
        ("--m 1 --n 1 --k 1 --r 1 --gpu voodoo2", "`--gpu` is voodoo2, expected one of t4, "),
        ("--m -1", "invalid digit"),
        ("--op sideways", "expected forward or backward"),
        ("--dtype f64", "expected bf16 or f16"),
        ("--family sm100", "expected portable or sm90"),
        ("--tile 64", "expected large, small, 256, 192 or 128"),
        ("extra", "unexpected argument"),
    ] {
        let (status, out, err) = run(line);
        assert_eq!((status, out.as_str()), (3, ""), "{line}");
        assert!(err.contains(says), "{line}: {err}");
    }
    let (status, out, _) = run("--help");
    assert_eq!(status, 0);
    assert!(out.contains("Usage: explain") && out.contains("h200"));
}
