//! `benches/tax` without a GPU: the order of measuring, statistics, rows, and what cuBLASLt would be asked for.
#![cfg(feature = "cuda")]
#![allow(clippy::panic)] // helpers of tests fail as tests do

mod common;

#[path = "../benches/tax/arguments.rs"]
mod arguments;
#[allow(dead_code)] // what needs the library
#[path = "../benches/tax/cublaslt.rs"]
mod cublaslt;
#[path = "../benches/feature.rs"]
mod feature;
#[path = "../benches/tax/measure.rs"]
mod measure;
#[path = "../benches/origin.rs"]
mod origin;
#[path = "../benches/tax/report.rs"]
mod report;

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;

use cublaslt::{CublasLt, Product, places};
use feature::Feature;
use fused_lora::plan::{Family, TileSize};
use fused_lora::{Dtype, LoraShape};
use measure::{Effort, Measured, disagreement, interleaved, median, quantile, spread, tax};
use report::{Machine, Op, Row, Way, baseline, json, row_tax, table};

#[test]
fn medians_and_spreads() {
    assert_eq!((median(&[3.0, 1.0, 2.0]), median(&[4.0, 1.0, 3.0, 2.0])), (2.0, 2.5));
    let hundred: Vec<f64> = (0..=100).rev().map(f64::from).collect();
    assert_eq!((quantile(&hundred, 0.0), quantile(&hundred, 0.9), quantile(&hundred, 1.0)), (0.0, 90.0, 100.0));
    assert_eq!(spread(&hundred), 80.0 / 50.0);
    assert!(median(&[]).is_nan());
    assert_eq!(quantile(&[7.0], 0.3), 7.0);
}

/// The baseline slows down by half and so does what is compared with it: the tax is that of every round.
#[test]
fn a_tax_is_free_of_drift() {
    let baseline: Vec<f64> = (0..40).map(|round| 100.0 + 1.25 * f64::from(round)).collect();
    let way: Vec<f64> = baseline.iter().map(|time| time * 1.02).collect();
    assert!((tax(&way, &baseline) - 0.02).abs() < 1e-12);
    let apart = median(&way[20..]) / median(&baseline[..20]) - 1.0;
    assert!(apart > 0.2, "one after the other it would have been {apart}");
}

fn effort(rounds: usize, warm_up: f64, limit: f64) -> Effort {
    Effort { rounds, warm_up, limit }
}

#[test]
fn rounds_begin_with_another_way_each() {
    let mut order = Vec::new();
    let measured = interleaved(3, effort(4, 0.0, 0.0), |way| {
        order.push(way);
        Ok::<_, ()>((10.0 * way as f64 + order.len() as f64, 100.0))
    });
    assert_eq!(order, [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2]);
    let Measured { samples, settled } = measured.expect("nothing fails");
    assert_eq!(samples, [[1.0, 6.0, 8.0, 10.0], [12.0, 14.0, 19.0, 21.0], [23.0, 25.0, 27.0, 32.0]]);
    assert!(!settled, "no warm-up, nothing is known");
}

#[test]
fn the_warm_up_ends_when_clocks_settle() {
    // Slower by a percent each round, until the 30th.
    let run = |warm_up: f64, limit: f64| {
        let mut rounds = 0_u32;
        let measured = interleaved(1, effort(2, warm_up, limit), |_| {
            rounds += 1;
            let time = 100.0 * 1.01_f64.powi(rounds.min(30) as i32);
            Ok::<_, ()>((time, 1000.0))
        });
        (rounds - 2, measured.expect("nothing fails").settled)
    };
    assert_eq!(run(0.0, 1e9), (34, true), "five rounds alike");
    assert_eq!(run(50_000.0, 1e9), (50, true), "alike, but not yet warm");
    assert_eq!(run(0.0, 20_000.0), (20, false), "the limit ends it");
}

#[test]
fn a_failure_ends_the_measurement() {
    let mut calls = 0;
    let failed = interleaved(2, effort(5, 0.0, 0.0), |way| {
        calls += 1;
        if way == 1 { Err("no") } else { Ok((1.0, 1.0)) }
    });
    assert_eq!((failed, calls), (Err("no"), 2));
}

#[test]
fn results_of_the_same_product_agree() {
    let theirs = [1.0, -2.0, 0.0, 100.0];
    assert_eq!(disagreement(&[1.0078125, -2.0, 1e-6, 99.5], &theirs, 64), None);
    assert_eq!(disagreement(&[1.0, -2.0, 0.1, 100.0], &theirs, 64), Some(2));
    assert_eq!(disagreement(&[1.0, -2.0, 0.0, f32::NAN], &theirs, 64), Some(3));
    assert_eq!(disagreement(&[1.0], &theirs, 64), Some(1));
}

fn row(op: Op, way: Way, r: usize, samples: &[f64]) -> Row {
    Row {
        op,
        way,
        dtype: Dtype::Bf16,
        shape: LoraShape { m: 8192, n: 4096, k: 4096, r },
        feature: Feature::default(),
        flops: 2.0 * 8192.0 * 4096.0 * 4096.0,
        floor: Some(278.0),
        floor_bytes: 168e6,
        predicted: None,
        what: "a kernel".to_owned(),
        samples: samples.to_vec(),
    }
}

fn rows() -> Vec<Row> {
    vec![
        row(Op::Forward, Way::Plain, 0, &[347.5, 695.0, 347.5]),
        row(Op::Forward, Way::Fused, 0, &[347.5, 695.0, 347.5]),
        row(Op::Forward, Way::Unfused, 16, &[400.0, 800.0, 400.0]),
        row(Op::Forward, Way::Fused, 16, &[353.0, 706.0, 353.0]),
        row(Op::Backward, Way::Plain, 0, &[300.0]),
        row(Op::Backward, Way::Fused, 16, &[330.0]),
    ]
}

#[test]
fn taxes_are_over_the_plain_product_of_the_same_operation() {
    let rows = rows();
    assert!(baseline(&rows, &rows[0]).is_none(), "it is the baseline");
    assert_eq!(row_tax(&rows, &rows[1]), Some(0.0));
    assert!((row_tax(&rows, &rows[3]).expect("a tax") - 100.0 * 5.5 / 347.5).abs() < 1e-9);
    assert!((row_tax(&rows, &rows[5]).expect("a tax") - 10.0).abs() < 1e-9);
    // Without cuBLASLt this crate's own plain product stands in, and is then no row with a tax.
    let ours = &rows[1..4];
    assert!(baseline(ours, &ours[0]).is_none());
    assert_eq!(baseline(ours, &ours[2]).map(|row| row.way), Some(Way::Fused));
    assert!(baseline(&rows[5..], &rows[5]).is_none(), "nothing plain was measured");
    // Another shape's plain product is none of this one's.
    let mut other = rows.clone();
    other[4].shape.m = 4096;
    assert!(baseline(&other, &other[5]).is_none());
}

#[test]
fn a_row_of_the_table() {
    let text = table(&rows());
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines.len(), 7);
    let plain = ["forward", "cublaslt", "8192", "x", "4096", "x", "4096", "bf16", "0", "347.5"];
    assert_eq!(lines[1][..10], plain);
    assert_eq!(lines[1][12..], ["791.0", "80.0", "%"], "TFLOP/s, the floor's share, and no tax");
    assert_eq!(lines[4][lines[4].len() - 3..], ["+1.6", "%", "met"]);
    assert_eq!(lines[6][lines[6].len() - 4..], ["+10.0", "%", "6.0", "%"], "the goal that was missed");
}

#[test]
fn rows_as_json() {
    let machine = Machine { gpu: "a GPU".to_owned(), command: "tax --quick".to_owned(), ..Machine::default() };
    let value = json(&machine, &rows());
    for key in ["gpu", "driver", "toolkit", "cublaslt", "commit", "command", "label", "settled"] {
        assert!(value.get(key).is_some(), "{key}");
    }
    let row = &value["rows"][3];
    assert_eq!((&row["op"], &row["way"], &row["r"]), (&"forward".into(), &"fused".into(), &16.into()));
    assert_eq!((&row["us"], &row["tax_over"], &row["samples"]), (&353.0.into(), &"cublaslt".into(), &3.into()));
    assert!((row["tax_percent"].as_f64().expect("a tax") - 1.583).abs() < 1e-3);
    assert_eq!((&row["goal_percent"], &value["rows"][0]["tax_percent"]), (&2.0.into(), &serde_json::Value::Null));
    assert_eq!((&row["floor_bytes"], &row["dropout"]), (&168e6.into(), &0.0.into()));
}

/// Of `--once`: no time, and nothing that a time would be needed for.
#[test]
fn a_launch_that_was_not_timed_as_json() {
    let rows =
        json(&Machine::default(), &[row(Op::Forward, Way::Fused, 0, &[]), row(Op::Forward, Way::Fused, 16, &[])]);
    let row = &rows["rows"][1];
    for field in ["us", "spread", "tflops", "floor_percent", "tax_percent"] {
        assert_eq!(row[field], serde_json::Value::Null, "{field}");
    }
    assert_eq!((&row["what"], &row["samples"]), (&"a kernel".into(), &0.into()));
}

/// What was typed where make says it, else what was started, as it would be started again.
#[test]
fn the_command_of_a_file() {
    let typed = |make: Option<&str>, argv: &[&str]| {
        origin::typed(make.map(str::to_owned), argv.iter().map(OsString::from).collect::<Vec<_>>())
    };
    let bench = ["/target/release/deps/lora-0123456789abcdef", "--bench", "forward"];
    assert_eq!(typed(Some("make bench ARGS=\"forward\""), &bench), "make bench ARGS=\"forward\"");
    assert_eq!(typed(None, &bench), "lora --bench forward");
    assert_eq!(typed(Some(""), &["bin/example-tax", "--json", "tax.json"]), "example-tax --json tax.json");
    assert_eq!(typed(None, &["peers-2026"]), "peers-2026");
    assert_eq!(typed(None, &[]), "");
}

/// Where this test runs, make's word comes first; there is a date in any case.
#[test]
fn the_origin_of_a_file() {
    assert!(!origin::command().is_empty());
    let date = origin::date().expect("there is a `date`");
    assert!(date.len() == 20 && date.ends_with('Z'), "{date}");
    for named in [origin::commit(), origin::driver()].into_iter().flatten() {
        assert!(!named.is_empty(), "what has no name is absent");
    }
    assert_eq!(origin::said("false", &[]), None);
    assert_eq!(origin::said("echo", &[" two "]), Some("two".to_owned()));
    assert_eq!(origin::said("/no/such/program", &[]), None);
}

fn parse(line: &str) -> Result<Option<arguments::Arguments>, String> {
    arguments::parse(line.split_whitespace().map(OsString::from)).map_err(|error| error.to_string())
}

#[test]
fn the_command_line() {
    let usual = parse("").expect("no argument is needed").expect("not the help");
    assert_eq!(
        (usual.tokens.as_slice(), usual.layers.len(), usual.ranks.as_slice()),
        (&[8192][..], 5, &[16, 64, 128][..])
    );
    let line = "--m 16,512 --nk 64x128,8x8 --ranks 8 --dtype f16 --op backward --dropout 0.1 --rounds 5 --once --no-unfused --hot --tile 192 --cluster 1 \
                --bundle 2 --chunks 3 --group-m 16 --json out.json --label stages";
    let all = parse(line).expect("all are known").expect("not the help");
    assert_eq!((all.tokens, all.layers, all.ranks), (vec![16, 512], vec![(64, 128), (8, 8)], vec![8]));
    assert_eq!(
        (all.dtype, all.ops, all.rounds, all.once, all.unfused, all.hot),
        (Dtype::F16, vec![Op::Backward], 5, true, false, true)
    );
    assert_eq!(all.feature, Feature { dropout: 0.1, ..Feature::default() });
    let dora = parse("--dora --projections 2").expect("they are known").expect("not the help").feature;
    assert_eq!(dora, Feature { dora: true, projections: 2, ..Feature::default() });
    assert_eq!(dora.without_adapter(), Feature { projections: 2, ..Feature::default() });
    let full = parse("--full --dropout 0.1").expect("they are known").expect("not the help").feature;
    assert_eq!(full, Feature { full: true, dropout: 0.1, ..Feature::default() });
    for others in ["--adapters 2", "--projections 2 --dora"] {
        let both = parse(&format!("--full {others}")).expect("they are known").expect("not the help").feature;
        assert!(both.full && both.adapters * both.projections == 2);
    }
    let projections = Feature { full: true, projections: 3, ..Feature::default() };
    assert_eq!((projections.columns_of_h(12), projections.factor_bytes()), (96, 4));
    assert!(!full.is_none() && (full.columns_of_h(12), dora.columns_of_h(12)) == (32, 24));
    let many = parse("--adapters 8").expect("it is known").expect("not the help").feature;
    assert!(many.adapters == 8 && !many.is_none() && Feature::default().is_none());
    let options = all.options;
    assert_eq!((options.tile, options.cluster, options.bundle), (Some(TileSize::Sm90N192), Some(1), Some(2)));
    assert_eq!((options.chunks, options.group_m), (Some(3), Some(16)));
    assert_eq!((all.json, all.label.as_str()), (Some(PathBuf::from("out.json")), "stages"));
    let portable = parse("--family portable").expect("it is known").expect("not the help");
    assert_eq!(portable.options.family, Some(Family::Portable));
    let quick = parse("--quick").expect("it is known").expect("not the help");
    assert_eq!((quick.layers.len(), quick.rounds), (1, 10));
    assert_eq!(parse("--help"), Ok(None));
    for flag in line.split_whitespace().filter(|word| word.starts_with("--")) {
        assert!(arguments::HELP.contains(flag), "{flag} is not in the help");
    }
    for (line, says) in [
        ("--nk 4096", "expected N and K as 4096x4096"),
        ("--ranks 16,x", "expected whole numbers"),
        ("--m 0", "expected whole numbers"),
        ("--dropout 1", "expected 0 or more and less than 1"),
        ("--dropout NaN", "expected 0 or more and less than 1"),
        ("--adapters 0", "expected whole numbers"),
        ("--adapters 2 --dora", "exclude one another"),
        ("--dropout 0.5 --adapters 3", "exclude one another"),
        ("--adapters 2 --projections 2", "excludes --projections"),
        ("--projections 5", "expected 4 at most"),
        ("--nk 64x64 --projections 3", "N = 64 cannot be cut into 3"),
        ("--op both", "expected forward or backward"),
        ("--tile 64", "expected large, small, 256, 192 or 128"),
        ("--family sm100", "expected portable or sm90"),
        ("--test", "--test"),
    ] {
        let error = parse(line).expect_err(line);
        assert!(error.contains(says), "{line}: {error}");
    }
}

#[test]
fn cublaslt_is_looked_for_where_it_may_be() {
    let variable = |name: &str| match name {
        "LD_LIBRARY_PATH" => Some(OsString::from("/first:/second")),
        "CUDA_HOME" => Some(OsString::from("/toolkit")),
        _ => None,
    };
    let found = places(variable, &[PathBuf::from("/python/site-packages")]);
    let at =
        |place: &str| found.iter().position(|other| other == Path::new(place)).unwrap_or_else(|| panic!("{place}"));
    // By its bare name it is the loader's to find.
    assert_eq!(at("libcublasLt.so.13"), 0);
    let in_order = [
        "libcublasLt.so.13",
        "/first/libcublasLt.so.13",
        "/second/libcublasLt.so.13",
        "/toolkit/lib64/libcublasLt.so.13",
        "/usr/local/cuda/lib64/libcublasLt.so.13",
        "/python/site-packages/nvidia/cu13/lib/libcublasLt.so.13",
        "libcublasLt.so.12",
        "/python/site-packages/nvidia/cublas/lib/libcublasLt.so.12",
    ];
    assert!(in_order.map(at).is_sorted(), "{found:?}");
}

/// The four ways in which operands can lie, as a row-major product on small integers: exact in f32.
fn products() -> impl Iterator<Item = (Product, Vec<f32>, Vec<f32>, Vec<f32>)> {
    let (rows, columns, depth) = (3, 5, 4);
    [(false, false), (false, true), (true, false), (true, true)].into_iter().map(
        move |(left_transposed, right_transposed)| {
            let (alpha, beta) = (2.0, if left_transposed { 1.0 } else { 0.0 });
            let (dtype, out) = (Dtype::F32, Dtype::F32);
            let product = Product { rows, columns, depth, left_transposed, right_transposed, dtype, out, alpha, beta };
            let left: Vec<f32> = (0..rows * depth).map(|i| (7 * i % 11) as f32).collect();
            let right: Vec<f32> = (0..depth * columns).map(|i| (5 * i % 13) as f32).collect();
            let left_at = |i: usize, k: usize| left[if left_transposed { k * rows + i } else { i * depth + k }];
            let right_at = |k: usize, j: usize| right[if right_transposed { j * depth + k } else { k * columns + j }];
            let sum = |i, j| (0..depth).map(|k| left_at(i, k) * right_at(k, j)).sum::<f32>();
            let meant =
                (0..rows * columns).map(|at| alpha * sum(at / columns, at % columns) + beta * at as f32).collect();
            (product, left, right, meant)
        },
    )
}

/// Calls a library that does on the CPU what cuBLASLt does: every signature, attribute and layout has to be right.
#[test]
fn row_major_products_of_a_column_major_library() {
    let test = "row_major_products_of_a_column_major_library";
    let library = common::scratch().join(format!("libcublasLt-{}.so", std::process::id()));
    let source = common::project().join("tests/stub/cublaslt.c");
    let compiled = source.is_file().then(|| {
        Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"])
            .arg(&library)
            .arg(&source)
            .status()
    });
    match compiled {
        Some(Ok(status)) => assert!(status.success(), "the library does not compile"),
        _ => return common::skipped(test, "no C compiler, or no source, where this runs"),
    }
    let library = CublasLt::open(library.as_os_str()).expect("the library loads");
    assert_eq!(library.version, 130_101);
    let (mut workspace, mut stream) = (0_u64, 0_u64);
    for (product, left, right, meant) in products() {
        let candidates = library.candidates(product).expect("there are algorithms");
        assert_eq!(candidates.len(), 2, "one of three cannot be used");
        for candidate in &candidates {
            let mut out: Vec<f32> = (0..meant.len()).map(|at| at as f32).collect();
            if product.beta == 0.0 {
                out.fill(f32::NAN);
            }
            let operands = [left.as_ptr() as u64, right.as_ptr() as u64, out.as_mut_ptr() as u64];
            // SAFETY: the library works on the host, on matrices of the product's extents; workspace and stream it only looks at.
            unsafe { library.run(candidate, operands, &raw mut workspace as u64, (&raw mut stream).cast()) }
                .expect("the product is computed");
            assert_eq!(out, meant, "{product:?}");
        }
        // SAFETY: refused before anything is read or written.
        let refused = unsafe { library.run(&candidates[0], [1, 1, 1], 0, (&raw mut stream).cast()) };
        assert_eq!(refused.expect_err("no workspace").to_string(), "cublasLtMatmul of cuBLASLt returned status 15");
    }
    let missing = CublasLt::open(OsStr::new("/no/such/libcublasLt.so.13"));
    assert!(missing.is_err(), "nothing is there");
}
