//! Kernels for an adapter's factors with a defect, on the emulator: each must be noticed.
#![cfg(all(feature = "emulator", feature = "cuda"))]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use common::altered::{self, Edit};
use common::data::{Placement, Rng, Spec};
use common::{layers, row_factors};
use fused_lora::emulator::Emulator;
use fused_lora::kernels::Image;
use fused_lora::plan::Device;
use fused_lora::{Element, bf16, f16};
use ptx_emulator::Module;
use rayon::prelude::*;

const IMAGE: &str = "portable_adapter";
const SOURCE: &str = "portable/adapter.cu";

/// What is wrong, and the edits that make it so.
const DEFECTS: [(&str, Edit<'static>); 16] = [
    edit(
        "product and sum rounded at once",
        "__fadd_rn(sums[i][e], product)",
        "__fmaf_rn(step.b[first_row + i][rank], step.a[rank][col + e], sums[i][e])",
    ),
    edit(
        "the adapter's part rounded by itself",
        "__fmul_rn(p.scale, sums[e])",
        "widen(round_to<T>(p.scale * sums[e]))",
    ),
    edit("too many ranks in the last step", "min(p.r - r, kMergeRanks)", "kMergeRanks"),
    edit("columns stored past the end", "if (col + e >= p.k) continue;", ""),
    edit("rows stored past the end", "if (n + first_row + i < p.n) store_merged", "store_merged"),
    edit("rows of b loaded past the end", "[b_rank] = n + row < p.n ?", "[b_rank] = true ?"),
    edit("stride of w taken for that of merged", "row * p.merged.row_stride", "row * p.w.row_stride"),
    edit("factors always read in the storage type", "return f32 ?", "return false ?"),
    edit("A multiplied by the scale as well", "p.r, p.k, 1.0f, 0, blockIdx.x", "p.r, p.k, p.scale, 0, blockIdx.x"),
    edit("columns of a factor rounded past the end", "min(cols - first, kRoundCols)", "kRoundCols"),
    edit("the gain of the first row for all", "(p.gain)[row] : 1.0f", "(p.gain)[0] : 1.0f"),
    edit("the gain left out", "round_to<T>(__fmul_rn(gain, sum))", "round_to<T>(sum)"),
    edit("the gain times each part", "__fmul_rn(gain, sum)", "__fmaf_rn(gain, widen(w[e]), gain * p.scale * sums[e])"),
    edit(
        "f32 rounded on its way",
        "reinterpret_cast<float*>(out.ptr)[to + i] = result",
        "reinterpret_cast<float*>(out.ptr)[to + i] = widen(round_to<T>(result))",
    ),
    edit("the divisor left out", "divisors != 0 ? __fdiv_rn(product, divisor) : product", "product"),
    edit("the divisor as a reciprocal", "__fdiv_rn(product, divisor)", "product * __frcp_rn(divisor)"),
];

const fn edit(what: &'static str, old: &'static str, new: &'static str) -> (&'static str, Edit<'static>) {
    (what, Edit { file: SOURCE, old, new })
}

/// Factors at the edges of round's tiles.
fn round_all<T: Element>(emulator: &Emulator) {
    let mut rng = Rng(3);
    let mut factor = |rows: usize, cols: usize| {
        let values: Vec<f32> = (0..rows * cols).map(|_| rng.unit() as f32).collect();
        layers::matrix_of(&values, rows, cols)
    };
    let factors = [factor(9, 259), factor(17, 9)];
    layers::rounds::<_, T, T>(emulator, &factors, 0.7, |value| T::from_f64(f64::from(value)));
    layers::rounds::<_, T, f32>(emulator, &factors, 0.7, |value| value);
}

fn all<T: Element>(emulator: &Emulator) {
    for (at, (n, k, r)) in [(65, 70, 33), (3, 129, 5)].into_iter().enumerate() {
        let placement = [Placement::Strided, Placement::Unaligned][at];
        let spec = Spec { placement, ..Spec::new(2, n, k, r) };
        layers::merges_views::<_, T>(emulator, &spec);
        layers::merges::<_, T>(emulator, &spec, true);
    }
    round_all::<T>(emulator);
    // As many elements as it takes for the last bit of an f32 to decide a rounding.
    let many = Spec { placement: Placement::Strided, ..Spec::new(2, 2500, 70, 33) };
    row_factors::rows_times_and_over::<_, T>(emulator, &many);
}

/// Whether the checks accept the kernels of a module; a refusal is a panic with the complaint.
fn accepts(ptx: &str, seeds: u64) -> Result<(), String> {
    let module = Arc::new(Module::parse(ptx).expect("the PTX parses"));
    for seed in 0..seeds {
        let device = Device::of_arch("emulated", 80, 2);
        let emulator =
            Emulator::new(device).with_module(IMAGE, Arc::clone(&module)).with_seed(seed).with_limit(5_000_000);
        let run = AssertUnwindSafe(|| if seed % 2 == 0 { all::<bf16>(&emulator) } else { all::<f16>(&emulator) });
        catch_unwind(run).map_err(|panic| {
            let text = panic.downcast::<String>().map_or_else(|_| "a panic".to_owned(), |text| *text);
            text.lines().next().unwrap_or_default().to_owned()
        })?;
    }
    Ok(())
}

#[test]
fn every_defect_of_the_sources_is_noticed() {
    if !altered::can_compile("every_defect") {
        return;
    }
    let folder = common::scratch().join("defects_adapter");
    let missed = Mutex::new(Vec::new());
    (0..=DEFECTS.len()).into_par_iter().for_each(|at| {
        let defect = at.checked_sub(1).map(|at| &DEFECTS[at]);
        let edits: Vec<Edit<'_>> = defect.map(|(_, edit)| *edit).into_iter().collect();
        let ptx = altered::compile(SOURCE, "compute_80", &edits, &folder.join(at.to_string()));
        match (defect, accepts(&ptx, 2)) {
            (None, Ok(())) => println!("as it is: accepted"),
            (None, Err(complaint)) => missed.lock().expect("a lock").push(format!("as it is: {complaint}")),
            (Some((what, _)), Ok(())) => missed.lock().expect("a lock").push(format!("{what}: not noticed")),
            (Some((what, _)), Err(complaint)) => println!("{what}: {complaint}"),
        }
    });
    let missed = missed.into_inner().expect("a lock");
    assert!(missed.is_empty(), "{missed:#?}");
}

#[test]
fn both_barriers_of_merge_are_needed() {
    let ptx = Image::find(IMAGE).and_then(|image| image.ptx.iter().find(|ptx| ptx.0 == 80)).expect("PTX").1;
    let barrier = |text: &str| text.starts_with("bar.sync").then(String::new);
    for kernel in ["lora_merge_bf16", "lora_merge_f16"] {
        let (lines, sites) = altered::sites(ptx, kernel, barrier);
        assert_eq!(sites.len(), 2, "{kernel}");
        for site in sites {
            let mut lines = lines.clone();
            lines[site.line].clone_from(&site.replacement);
            let noticed = accepts(&lines.join("\n"), 4);
            assert!(noticed.is_err(), "{kernel} without `{}` of `{}`", site.text, site.source);
        }
    }
}
