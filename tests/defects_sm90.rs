//! Hopper kernels with a defect, on the emulator: each must be noticed, whatever the order of events (`BY_CHANCE` names the few
//! that only some orders bring out).
//!
//! The first test edits the CUDA sources and compiles them; the second deletes or weakens each synchronising instruction
//! of the PTX in turn.
#![cfg(all(feature = "emulator", feature = "cuda"))]

mod common;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::{Arc, Mutex};

use common::HostDropout;
use common::altered::{self, Edit, Site};
use common::data::{Placement, Routes, Spec};
use common::emulated::Layers;
use common::hopper_defects::{BACKWARD, BY_CHANCE, DEFECTS, Defect, FORWARD};
use fused_lora::bf16;
use fused_lora::emulator::{Checks, Emulator, Timing};
use fused_lora::kernels::Image;
use fused_lora::plan::{Device, Options, TileSize};
use ptx_emulator::Module;
use rayon::prelude::*;

/// A case with what is chosen for it: everything runs in clusters of two.
struct Case {
    layers: Layers,
    sms: u32,
    options: Options,
}

/// Orders of events: copies and products are done late, now and then, and at once.
const SEEDS: u64 = 3;

/// Cases that reach every part of a kernel: each width of narrow tile and length of the last step, rings and slots that
/// are used again, several clusters, ragged edges, a block of rows without a neighbour, reductions in chunks, accumulation.
fn cases(image: &str, tile: TileSize) -> Vec<Case> {
    let options = Options::default().with_tile(tile).with_cluster(2);
    let spec = |m, n, k, r| Spec { placement: Placement::Aligned, ..Spec::new(m, n, k, r) };
    let case = |sms, spec: Spec| Case { layers: spec.into(), sms, options };
    // Several clusters wait for what others split.
    let split = |sms, spec: Spec| Case { layers: Layers::Split(spec), sms, options: options.with_bundle(1) };
    let sharing = |sms, spec, others: &[(usize, usize)]| Case { layers: Layers::shared(spec, others), sms, options };
    let sharing_split =
        |sms, spec, others: &[(usize, usize)]| Case { layers: Layers::shared_split(spec, others), sms, options };
    let chunks = |chunks, case: Case| Case { options: case.options.with_chunks(chunks), ..case };
    let dropout = |in_memory| Some(HostDropout { p: 0.5, seed: [5, 1 << 33], in_memory });
    let dropping = |in_memory, (m, n, k, r)| {
        let spec = Spec { dropout: dropout(in_memory), outputs: [true, true, in_memory, false], ..spec(m, n, k, r) };
        chunks(if in_memory { 1 } else { 3 }, case(2, spec))
    };
    let gained = |spec: Spec| Spec { dora: true, ..spec };
    let few_tokens = |r, db| {
        let spec = Spec { outputs: [false, false, db, false], bias: false, ..spec(70, 520, 72, r) };
        chunks(1, case(2, gained(spec)))
    };
    if image == FORWARD {
        return vec![
            case(4, gained(spec(200, 136, 72, 24))),
            case(4, spec(300, 200, 136, 24)),
            case(2, Spec { keep_h: false, ..spec(200, 456, 456, 72) }),
            case(4, Spec { placement: Placement::Strided, ..spec(300, 72, 72, 136) }),
            case(8, Spec { bias: false, ..spec(390, 136, 264, 16) }),
            case(2, spec(300, 264, 136, 24)),
            case(2, spec(70, 520, 136, 40)),
            dropping(true, (200, 72, 328, 16)),
            dropping(false, (200, 72, 264, 24)),
            dropping(true, (300, 72, 136, 40)),
            dropping(false, (130, 72, 200, 136)),
            sharing(4, spec(300, 72, 136, 24), &[(136, 0), (264, 104)]),
            split(4, spec(200, 136, 264, 5)),
            split(8, spec(300, 264, 72, 68)),
            sharing_split(4, spec(300, 72, 136, 13), &[(136, 0), (264, 60)]),
            split(4, Spec { routes: Some(Routes::Tiles(128)), ..spec(390, 136, 72, 200) }),
        ];
    }
    let strided = Spec { accumulate: true, placement: Placement::Strided, ..spec(390, 72, 264, 16) };
    vec![
        chunks(3, case(4, spec(300, 200, 136, 24))),
        chunks(1, case(2, Spec { accumulate: true, f32_gradients: false, ..spec(200, 456, 264, 72) })),
        case(8, Spec { outputs: [false, true, true, true], ..strided }),
        chunks(3, case(2, strided)),
        chunks(3, case(2, Spec { outputs: [false, true, true, true], ..spec(390, 72, 264, 24) })),
        chunks(2, case(4, Spec { accumulate: true, ..spec(260, 136, 72, 136) })),
        chunks(3, case(2, spec(300, 136, 264, 40))),
        chunks(3, case(2, Spec { outputs: [true, false, false, true], ..spec(300, 520, 72, 24) })),
        chunks(3, case(4, gained(spec(300, 200, 136, 72)))),
        chunks(1, case(2, gained(Spec { accumulate: true, ..spec(70, 520, 72, 136) }))),
        chunks(2, case(2, gained(Spec { outputs: [false; 4], ..spec(520, 264, 72, 16) }))),
        chunks(1, case(2, gained(Spec { outputs: [true, true, true, false], ..spec(400, 328, 136, 16) }))),
        chunks(2, case(2, gained(Spec { bias: false, ..spec(300, 136, 72, 24) }))),
        chunks(2, case(2, gained(Spec { bias: false, ..spec(300, 136, 72, 40) }))),
        dropping(true, (300, 904, 584, 16)),
        dropping(false, (520, 136, 584, 24)),
        dropping(true, (390, 72, 584, 40)),
        dropping(false, (300, 72, 584, 136)),
        chunks(2, sharing(4, spec(300, 72, 136, 24), &[(136, 0), (200, 136)])),
        chunks(3, split(4, spec(300, 136, 264, 13))),
        chunks(1, split(6, Spec { accumulate: true, ..gained(spec(200, 264, 72, 68)) })),
        chunks(2, sharing_split(4, spec(300, 72, 136, 13), &[(136, 0), (200, 60)])),
        chunks(2, split(4, Spec { routes: Some(Routes::Tiles(128)), ..spec(390, 72, 136, 200) })),
        // Tiles of few tokens one after the other: the ring does not keep their sums of dm apart.
        few_tokens(16, true),
        few_tokens(24, true),
        few_tokens(40, true),
        few_tokens(16, false),
    ]
}

/// What a run with one order of events leaves in its outputs; `Err` with the first complaint.
fn run(image: &'static str, module: &Arc<Module>, case: &Case, seed: u64) -> Result<(String, BTreeSet<u32>), String> {
    let emulator = Emulator::new(Device::of_arch("emulated", 90, case.sms))
        .with_module(image, Arc::clone(module))
        .with_plan_options(case.options)
        .with_checks(Checks { counters: seed == 0, ..Checks::default() })
        .with_seed(seed)
        .with_copies([Timing::Eager, Timing::Lazy, Timing::Mixed][seed as usize % 3])
        .with_limit(4_000_000);
    let layers = &case.layers;
    let run = if image == FORWARD { layers.forward::<bf16>(&emulator) } else { layers.backward::<bf16>(&emulator) };
    let (bits, run) = run?;
    Ok((bits, run.counters.lines().iter().map(|line| line.ptx_line).collect()))
}

/// What the kernel as it is makes of each case: the bits, and the lines of its PTX that are executed.
type Right = Vec<(String, BTreeSet<u32>)>;

fn right(image: &'static str, tile: TileSize, module: &Arc<Module>) -> Right {
    let all = cases(image, tile);
    all.iter().map(|case| run(image, module, case, 0).expect("the kernel as it is is right")).collect()
}

/// The first complaint about an altered kernel with one order of events, if there is one. `line`: what the alteration is
/// at, which the cases that count come by.
fn complaint(
    (image, tile): (&'static str, TileSize),
    module: &Arc<Module>,
    right: &Right,
    line: Option<u32>,
    seed: u64,
) -> Option<String> {
    for (case, (bits, lines)) in cases(image, tile).iter().zip(right) {
        if line.is_some_and(|line| !lines.contains(&line)) {
            continue;
        }
        match run(image, module, case, seed) {
            Err(complaint) => return Some(complaint),
            Ok(other) if other.0 != *bits => return Some("other bits".to_owned()),
            Ok(_) => {}
        }
    }
    None
}

fn columns(tile: TileSize) -> u32 {
    match tile {
        TileSize::Sm90N192 => 192,
        _ => 128,
    }
}

/// PTX of one kernel, with edits to the sources.
fn compile(image: &str, tile: TileSize, edits: &[Edit<'_>], folder: &Path) -> String {
    let (operation, launch) =
        if image == FORWARD { ("forward", "LoraSm90Forward") } else { ("backward", "LoraSm90Backward") };
    let source = format!("sm90/{operation}.cu");
    let old = format!("LORA_SM90_KERNELS({operation}, {launch})");
    let new = format!("LORA_SM90_KERNEL({operation}, {launch}, bf16, __nv_bfloat16, {})", columns(tile));
    let only = Edit { file: &source, old: &old, new: &new };
    let edits: Vec<Edit<'_>> = edits.iter().copied().chain([only]).collect();
    altered::compile(&source, "compute_90a", &edits, folder)
}

fn parse(ptx: &str) -> Arc<Module> {
    Arc::new(Module::parse(ptx).expect("the PTX parses"))
}

/// Whether the kernels can be compiled, and were: a build for other architectures leaves them out.
fn can_run(test: &str) -> bool {
    let built = Image::find(FORWARD).is_some() && Image::find(BACKWARD).is_some();
    if !built {
        common::skipped(test, "this build has no Hopper kernels");
    }
    built && altered::can_compile(test)
}

/// The kernels that defects are put into.
const KERNELS: [(&str, TileSize); 4] = [
    (FORWARD, TileSize::Sm90N128),
    (FORWARD, TileSize::Sm90N192),
    (BACKWARD, TileSize::Sm90N128),
    (BACKWARD, TileSize::Sm90N192),
];

#[test]
fn every_defect_of_the_sources_is_noticed() {
    if !can_run("every_defect_of_the_sources_is_noticed") {
        return;
    }
    let folder = common::scratch().join("defects_sm90");
    let rights: Vec<Right> = KERNELS
        .par_iter()
        .enumerate()
        .map(|(i, &(image, tile))| {
            right(image, tile, &parse(&compile(image, tile, &[], &folder.join(format!("as_is_{i}")))))
        })
        .collect();
    let missed = Mutex::new(Vec::new());
    DEFECTS.par_iter().enumerate().for_each(|(at, Defect { what, image, tile, edits })| {
        let kernel = (*image, *tile);
        let module = parse(&compile(image, *tile, edits, &folder.join(at.to_string())));
        let right = KERNELS.iter().zip(&rights).find(|(of, _)| **of == kernel).expect("a kernel of the list").1;
        let found: Vec<_> = (1..=SEEDS).map(|seed| complaint(kernel, &module, right, None, seed)).collect();
        let line =
            format!("{what}: {}", found.iter().flatten().next().and_then(|text| text.lines().next()).unwrap_or(""));
        println!("{line}");
        let unnoticed: Vec<u64> = (1..=SEEDS).filter(|seed| found[*seed as usize - 1].is_none()).collect();
        if unnoticed.len() > if BY_CHANCE.contains(what) { found.len() - 1 } else { 0 } {
            missed.lock().expect("a lock").push(format!("not noticed with seeds {unnoticed:?}: {line}"));
        }
    });
    let missed = missed.into_inner().expect("a lock");
    assert!(missed.is_empty(), "{missed:#?}");
}

/// What becomes of a synchronising instruction: gone, or of no effect on order. A wait is over at once.
fn weakened(text: &str) -> Option<String> {
    let instruction = if text.starts_with('@') { text.split_once(char::is_whitespace)?.1 } else { text };
    if instruction.starts_with("mbarrier.try_wait") {
        let (predicate, _) = instruction.split_once(", ")?;
        let predicate = predicate.rsplit_once(char::is_whitespace)?.1;
        return Some(format!("setp.eq.u32 {predicate}, 0, 0;"));
    }
    let deleted = [
        "bar.",
        "barrier.",
        "fence.",
        "mbarrier.",
        "cp.async.bulk.commit_group",
        "cp.async.bulk.wait_group",
        "wgmma.fence",
        "wgmma.commit_group",
        "wgmma.wait_group",
    ];
    if deleted.iter().any(|opcode| instruction.starts_with(opcode)) {
        return Some(String::new());
    }
    let orders = [("ld.acquire", "ld.relaxed"), ("red.release", "red.relaxed"), ("atom.acq_rel", "atom.relaxed")];
    let found = orders.iter().find(|(strong, _)| instruction.starts_with(strong));
    found.map(|(strong, weak)| text.replace(strong, weak))
}

/// Why nothing is to be noticed without an instruction, when nothing is.
fn redundant(image: &str, lines: &[String], Site { line, text, source, .. }: &Site) -> Option<&'static str> {
    let starts = |start: &'static str| move |line: &String| line.trim().starts_with(start);
    // Whether the step around here begins new accumulators: its first product does not read them.
    let is_first = || {
        let fence = lines[..=*line].iter().rposition(starts("wgmma.fence"))?;
        lines[fence..]
            .iter()
            .find(|line| starts("setp.ne.b32 p,")(line))
            .map(|line| line.trim() == "setp.ne.b32 p, 0, 0;")
    };
    let start = lines.iter().position(starts("barrier.cluster"))?;
    if text.starts_with("wgmma.fence") && is_first() == Some(false) {
        // PTX ISA, "wgmma.fence": in order among themselves.
        return Some("the accumulators are those of products of the same shape that are in flight");
    }
    if source.contains("wgmma_fence();  // of the part before") {
        return Some("parts have registers of their own in PTX; ptxas gives them the same");
    }
    if text.starts_with("wgmma.wait_group.sync.aligned 1;") && is_first() == Some(true) {
        return Some("there is no step before, whose stage it could let go");
    }
    if image == FORWARD && *line < start && text.starts_with("fence.proxy.async") {
        return Some("only backward reads the constants that it guards");
    }
    if text.starts_with("bar.warp.sync") && lines[*line..].iter().take(10).any(starts("barrier.cluster")) {
        return Some("on the emulator the lanes of a warp wait for each other at what they must execute together");
    }
    None
}

#[test]
fn every_synchronising_instruction_is_needed() {
    if !can_run("every_synchronising_instruction_is_needed") {
        return;
    }
    let folder = common::scratch().join("sites_sm90");
    let mut missed = String::new();
    for (image, name) in [(FORWARD, "lora_sm90_forward_bf16_128"), (BACKWARD, "lora_sm90_backward_bf16_128")] {
        let tile = TileSize::Sm90N128;
        let ptx = compile(image, tile, &[], &folder.join(image));
        let (lines, sites) = altered::sites(&ptx, name, weakened);
        assert!(sites.len() > 100, "{name} has {} synchronising instructions", sites.len());
        let right = right(image, tile, &parse(&ptx));
        let found = Mutex::new(String::new());
        let (unneeded, needed): (Vec<_>, Vec<_>) =
            sites.iter().partition(|site| redundant(image, &lines, site).is_some());
        needed.par_iter().for_each(|Site { line, text, replacement, source }| {
            let mut altered = lines.clone();
            altered[*line].clone_from(replacement);
            let module = parse(&altered.join("\n"));
            let number = *line as u32 + 1;
            if (1..=SEEDS).any(|seed| complaint((image, tile), &module, &right, Some(number), seed).is_some()) {
                return;
            }
            let reached = right.iter().any(|(_, lines)| lines.contains(&number));
            let why = if reached { "not noticed" } else { "not reached" };
            // Writing to a String cannot fail.
            let _ = writeln!(found.lock().expect("a lock"), "{name} {why}: `{text}` (line {number}) from `{source}`");
        });
        println!("{name}: {} instructions, {} more without need", needed.len(), unneeded.len());
        missed += &found.into_inner().expect("a lock");
    }
    assert!(missed.is_empty(), "\n{missed}");
}
