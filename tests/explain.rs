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
    let (_, ragged, _) = run("--m 8192 --n 4096 --k 4095 --r 16 --gpu h200");
    assert!(ragged.contains("x is read element by element"), "{ragged}");
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
