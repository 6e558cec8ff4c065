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
    for operation in ["forward", "backward"] {
        let (_, full, _) = run(&format!("--m 8192 --n 4096 --k 4096 --r 12 --gpu h200 --full --op {operation}"));
        assert!(
            full.contains("family sm90") && full.contains("factors    f32, as high and low halves of Bf16"),
            "{full}"
        );
    }
    let (_, ragged, _) = run("--m 8192 --n 4096 --k 4095 --r 16 --gpu h200");
    assert!(ragged.contains("x is read element by element"), "{ragged}");
    assert!(ragged.contains("not the Hopper family: K is 4095, not a multiple of 8"), "{ragged}");
}

/// Of forward, and of backward with dx, da and db, da and db in f32: (operations, bytes), each argument once.
fn work([m, n, k, r]: [f64; 4], backward: bool) -> (f64, f64) {
    let forward = (2.0 * (m * n * k + m * r * k + m * n * r), 2.0 * (m * k + n * k + r * k + n * r + m * n));
    // dh, dx (without an adapter alone), da, db; dy, w, x, dx, h, and the factors with their gradients.
    let backward_flops = 2.0 * (m * n * r + m * n * k + m * r * k + m * r * k + m * n * r);
    let backward_bytes = 2.0 * (m * n + n * k + 2.0 * m * k + m * r) + (2.0 + 4.0) * (r * k + n * r);
    if backward { (backward_flops, backward_bytes) } else { forward }
}

/// Every GPU of the table: plan, predicted time where there is a model, floor, what binds, workspace.
#[test]
fn a_plan_for_every_gpu() {
    // TFLOP/s and GB/s of the data sheets.
    let gpus = [
        ("h200", Some((989.0, 4800.0))),
        ("a100", Some((312.0, 2039.0))),
        ("rtx4090", Some((165.0, 1008.0))),
        ("t4", Some((65.0, 320.0))),
        ("rtx5090", Some((209.0, 1792.0))),
        ("b200", None),
    ];
    let shapes =
        [[8192, 4096, 4096, 16], [16, 4096, 4096, 16], [777, 1001, 513, 7], [1, 1, 1, 1], [2048, 8192, 8192, 300]];
    for ((gpu, rates), [m, n, k, r]) in gpus.into_iter().flat_map(|gpu| shapes.map(|shape| (gpu, shape))) {
        for call in ["forward --dtype f16", "forward --dtype bf16", "backward --dtype f16", "backward --dtype bf16"] {
            let line = format!("--m {m} --n {n} --k {k} --r {r} --gpu {gpu} --op {call}");
            let ((status, out, err), (_, json, _)) = (run(&line), run(&format!("{line} --json")));
            assert_eq!((status, err.as_str()), (0, ""), "{line}");
            for part in ["kernel", "tiles", "units", "grid", "workspace", "predicted", "floor"] {
                assert!(out.contains(&format!("\n  {part} ")), "{line}: no {part} in\n{out}");
            }
            let plan: serde_json::Value = serde_json::from_str(&json).unwrap();
            let predicted = plan["predicted_us"].as_f64();
            let Some((teraflops, gigabytes)) = rates else {
                assert!(predicted.is_none() && out.contains("predicted  none"), "{out}");
                continue;
            };
            let (flops, bytes) = work([m, n, k, r].map(|extent| extent as f64), call.starts_with("backward"));
            let floors = [("arithmetic", flops / teraflops / 1e6), ("memory", bytes / gigabytes / 1e3)];
            for (what, floor) in floors {
                let said = plan[format!("floor_{what}_us")].as_f64().unwrap();
                assert!((said / floor - 1.0).abs() < 1e-9, "{line}: {what} {said}, by hand {floor}");
            }
            let (what, floor) = if floors[0].1 >= floors[1].1 { floors[0] } else { floors[1] };
            assert!(out.contains(&format!("{what} is the bound")), "{line}:\n{out}");
            assert!(predicted.unwrap() > floor, "{line}: {predicted:?}, floor {floor}");
        }
    }
}

/// Whatever stands where a flag or its value is expected: an exit status and a line, never a panic.
#[test]
fn nothing_that_is_typed_panics() {
    let numbers =
        ["0", "1", "7", "4096", "2147483647", "4294967296", "18446744073709551615", "-1", "1e9", "", "\u{0}", "x"];
    let words =
        ["bf16", "f16", "f32", "forward", "backward", "portable", "sm90", "large", "small", "256", "128", "\u{fffd}"];
    let flags = [
        "--m",
        "--n",
        "--k",
        "--r",
        "--gpu",
        "--dtype",
        "--op",
        "--family",
        "--tile",
        "--cluster",
        "--bundle",
        "--chunks",
        "--group-m",
    ];
    let mut state = 1_u64;
    let mut draw = |count: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % count
    };
    let gpus = ["h200", "a100", "rtx4090", "t4", "rtx5090", "b200", "H-100"];
    let mut statuses = [0; 4];
    for _ in 0..20_000 {
        let mut line = Vec::new();
        for flag in &flags[..4] {
            // Mostly something that a plan could be made for.
            let choices = if draw(8) == 0 { numbers.len() } else { 5 };
            line.extend([(*flag).to_owned(), numbers[draw(choices)].to_owned()]);
        }
        line.extend(["--gpu".to_owned(), gpus[draw(gpus.len())].to_owned()]);
        if draw(4) == 0 {
            line.push("--full".to_owned());
        }
        for _ in 0..draw(4) {
            let value = if draw(2) == 0 { words[draw(words.len())] } else { numbers[draw(numbers.len())] };
            line.extend([flags[draw(flags.len())].to_owned(), value.to_owned()]);
        }
        if draw(4) == 0 {
            line.push("--json".to_owned());
        }
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let status = explain::run(line.iter().map(Into::into).collect(), &mut out, &mut err);
        statuses[usize::from(status)] += 1;
        assert_eq!((status == 0, status == 0), (!out.is_empty(), err.is_empty()), "{line:?}");
    }
    assert!(statuses[0] > 500 && statuses[1] > 500 && statuses[3] > 500, "all of it was tried: {statuses:?}");
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
