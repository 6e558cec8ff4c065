//! Kernels with a defect, on the emulator: each must be noticed. What the suite could not see, it could not guard.
//!
//! The first test edits the CUDA sources and compiles them; the second deletes or weakens each synchronising instruction
//! of the PTX in turn. Neither would notice anything if the emulator or the checks went blind.
#![cfg(all(feature = "emulator", feature = "cuda"))]

mod common;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;

use common::HostDropout;
use common::altered::{self, Site, Sources};
use common::data::{Placement, Routes, Spec};
use common::emulated::Layers;
use common::portable_defects::{BACKWARD, DEFECTS, Defect, FORWARD};
use fused_lora::bf16;
use fused_lora::emulator::{Emulator, Timing};
use fused_lora::kernels::Image;
use fused_lora::plan::{Device, Options, TileSize};
use ptx_emulator::Module;
use rayon::prelude::*;

/// Cases that reach every part of a kernel: several CTAs and units, ragged edges, a tail of several steps, one that begins
/// in the prologue of the ring, reductions in chunks, accumulation, dropout, routes, DoRA, several projections, f32 factors.
fn specs(image: &str) -> Vec<(Layers, u32)> {
    let base = Spec::new(150, 70, 75, 13);
    let dropout = |in_memory| Some(HostDropout { p: 0.4, seed: [0x0123_4567_89ab_cdef, 1 << 40 | 5], in_memory });
    let mut specs: Vec<(Spec, u32)> = vec![
        (Spec { placement: Placement::Aligned, keep_h: false, ..base }, 2),
        (Spec { placement: Placement::Aligned, n: 20, k: 20, outputs: [true, true, false, false], ..base }, 4),
        (Spec { placement: Placement::Unaligned, r: 70, ..base }, 8),
        (Spec { placement: Placement::Strided, accumulate: true, r: 5, ..base }, 3),
        (Spec { placement: Placement::Aligned, dropout: dropout(false), r: 40, ..base }, 5),
        (Spec { placement: Placement::Strided, accumulate: true, n: 40, dropout: dropout(true), ..base }, 2),
        (Spec { placement: Placement::Aligned, routes: Some(Routes::Mixed(3)), r: 70, ..base }, 4),
        (Spec { routes: Some(Routes::Tiles(64)), dropout: dropout(false), n: 20, r: 200, ..base }, 3),
        (Spec { placement: Placement::Aligned, dora: true, ..base }, 4),
        (Spec { placement: Placement::Unaligned, dora: true, accumulate: true, r: 70, ..base }, 8),
        // More steps over k than the ring has stages, the last of them ragged.
        (Spec { placement: Placement::Aligned, k: 139, ..base }, 4),
        // A tail in the prologue of the ring, and more who wait for it than compute what it waits for.
        (Spec { placement: Placement::Aligned, n: 70, k: 30, outputs: [true, false, false, false], ..base }, 12),
    ];
    if image == BACKWARD {
        let chunked = Spec::new(1600, 40, 24, 14);
        specs.push((Spec { placement: Placement::Aligned, outputs: [false, true, true, true], ..chunked }, 6));
        specs.push((Spec { placement: Placement::Aligned, dora: true, ..chunked }, 6));
        // Units of db, and of da, without a step.
        let nobody = Spec { routes: Some(Routes::Nobody), ..Spec::new(700, 16, 24, 16) };
        specs.push((Spec { outputs: [false, false, true, false], ..nobody }, 2));
        specs.push((Spec { outputs: [false, true, false, false], ..nobody }, 2));
        // More steps over n than the ring has stages.
        specs.push((Spec { placement: Placement::Aligned, n: 300, ..base }, 4));
    }
    let shared = Spec { placement: Placement::Aligned, n: 40, r: 16, ..base };
    let others = [(70, 0), (33, 72)];
    let alone = specs.into_iter().map(|(spec, sms)| (Layers::One(spec), sms));
    // Several units split each factor, and several tiles of h wait for them.
    let split = Spec { placement: Placement::Aligned, n: 270, k: 280, r: 40, ..base };
    // Sums so short that what halves leave out of them is more than f32 does.
    let short = Spec { placement: Placement::Aligned, n: 24, k: 16, r: 5, ..base };
    // Tiles of half a block of ranks, blocks that no row goes through, and some that few do.
    let runs = Spec { placement: Placement::Aligned, routes: Some(Routes::Tiles(64)), m: 250, r: 400, ..base };
    let mixed = Spec { routes: Some(Routes::Mixed(3)), n: 40, k: 40, r: 150, ..base };
    // With few CTAs whoever is last to split computes h, and finds everything split when it first looks.
    let mut split = vec![(split, 4), (split, 1), (short, 3), (runs, 4), (mixed, 3)];
    // What lies anywhere, the halves of h that are kept included; and sums in chunks.
    split.push((Spec { placement: Placement::Unaligned, n: 40, k: 40, r: 13, ..base }, 3));
    if image == BACKWARD {
        let chunked = Spec::new(1600, 40, 24, 14);
        split.push((Spec { placement: Placement::Aligned, outputs: [false, true, true, true], ..chunked }, 6));
        split.push((Spec { routes: Some(Routes::Mixed(3)), outputs: [false, true, true, false], ..chunked }, 6));
    }
    let split = split.into_iter().map(|(spec, sms)| (Layers::Split(spec), sms));
    let projections =
        [Layers::shared(shared, &others), Layers::shared_split(Spec { r: 13, ..shared }, &[(70, 0), (270, 21)])];
    alone.chain(projections.map(|layers| (layers, 4))).chain(split).collect()
}

/// What the suite says of a kernel: `Err` with the first complaint.
fn verdict(image: &'static str, tile: TileSize, module: &Arc<Module>, seeds: u64) -> Result<(), String> {
    for (layers, sms) in specs(image) {
        let mut first = None;
        for seed in 1..=seeds {
            let timing = [Timing::Eager, Timing::Lazy, Timing::Mixed][seed as usize % 3];
            let emulator = Emulator::new(Device::of_arch("emulated", 80, sms))
                .with_module(image, Arc::clone(module))
                .with_plan_options(Options::default().with_tile(tile))
                .with_seed(seed)
                .with_copies(timing)
                .with_limit(20_000_000);
            let run =
                if image == FORWARD { layers.forward::<bf16>(&emulator) } else { layers.backward::<bf16>(&emulator) };
            let bits = run?.0;
            if first.get_or_insert_with(|| bits.clone()) != &bits {
                return Err(format!("seed {seed} gives other bits than seed 1"));
            }
        }
    }
    Ok(())
}

/// PTX of the kernels with a defect; `None` is the kernels as they are.
fn compile(image: &str, defect: Option<&Defect>, folder: &Path) -> String {
    let source = format!("portable/{}.cu", image.trim_start_matches("portable_"));
    altered::compile(&source, "compute_80", defect.map(|defect| defect.edit).as_slice(), folder)
}

#[test]
fn every_defect_of_the_sources_is_noticed() {
    if !altered::can_compile("every_defect") {
        return;
    }
    let folder = common::scratch().join("defects");
    let missed = std::sync::Mutex::new(Vec::new());
    (0..DEFECTS.len() + 2).into_par_iter().for_each(|at| {
        let defect = at.checked_sub(2).map(|at| &DEFECTS[at]);
        let image = defect.map_or([FORWARD, BACKWARD][at % 2], |defect| defect.image);
        let ptx = compile(image, defect, &folder.join(at.to_string()));
        let module = Arc::new(Module::parse(&ptx).expect("the PTX parses"));
        let tile = [TileSize::Small, TileSize::Large][at / 2 % 2];
        let found = verdict(image, tile, &module, 6);
        match (defect, found) {
            (None, Ok(())) => println!("{image} as it is: accepted"),
            (None, Err(complaint)) => missed.lock().expect("a lock").push(format!("{image} as it is: {complaint}")),
            (Some(defect), Ok(())) => missed.lock().expect("a lock").push(format!("{}: not noticed", defect.what)),
            (Some(defect), Err(complaint)) => {
                println!("{}: {}", defect.what, complaint.lines().next().unwrap_or_default());
            }
        }
    });
    let missed = missed.into_inner().expect("a lock");
    assert!(missed.is_empty(), "{missed:#?}");
}

/// What becomes of a synchronising instruction: gone, or of no effect on order.
fn weakened(instruction: &str) -> Option<String> {
    let deleted = ["bar.sync", "cp.async.wait_group", "cp.async.commit_group"];
    if deleted.iter().any(|opcode| instruction.starts_with(opcode)) {
        return Some(String::new());
    }
    let orders = [("ld.acquire", "ld.relaxed"), ("red.release", "red.relaxed"), ("atom.acq_rel", "atom.relaxed")];
    orders
        .iter()
        .find(|(strong, _)| instruction.starts_with(strong))
        .map(|(strong, weak)| instruction.replace(strong, weak))
}

#[test]
fn every_synchronising_instruction_is_needed() {
    let kernels = [
        (FORWARD, TileSize::Small, "lora_forward_bf16_small"),
        (FORWARD, TileSize::Large, "lora_forward_bf16_large"),
        (BACKWARD, TileSize::Small, "lora_backward_bf16_small"),
        (BACKWARD, TileSize::Large, "lora_backward_bf16_large"),
    ];
    let mut work = Vec::new();
    for (image, tile, kernel) in kernels {
        let ptx = Image::find(image).and_then(|image| image.ptx.iter().find(|ptx| ptx.0 == 80)).expect("PTX").1;
        let (lines, found) = altered::sites(ptx, kernel, weakened);
        assert!(found.len() > 10, "{kernel} has {} synchronising instructions", found.len());
        let lines = Arc::new(lines);
        work.extend(found.into_iter().map(|site| (image, tile, kernel, Arc::clone(&lines), site)));
    }
    let missed = std::sync::Mutex::new(String::new());
    work.par_iter().for_each(|(image, tile, kernel, lines, site)| {
        let Site { line, text, replacement, source } = site;
        let mut lines = (**lines).clone();
        lines[*line].clone_from(replacement);
        let module = Arc::new(Module::parse(&lines.join("\n")).expect("the PTX parses"));
        if verdict(image, *tile, &module, 4).is_ok() {
            // Writing to a String cannot fail.
            let _ = writeln!(missed.lock().expect("a lock"), "{kernel}: `{text}` from `{source}`");
        }
    });
    let missed = missed.into_inner().expect("a lock");
    assert!(missed.is_empty(), "not noticed of {}:\n{missed}", work.len());
}

/// What an operand of an instruction may be mistaken for: each altered text, with what was done.
fn mistaken(instruction: &str) -> Vec<(&'static str, String)> {
    let mut all = Vec::new();
    let mut add =
        |what, text: Option<String>| all.extend(text.filter(|text| text != instruction).map(|text| (what, text)));
    if instruction.starts_with("mma.sync") {
        add("b0 and b1 swapped", swapped(instruction, 2, 0, 1));
        add("a0 and a1 swapped", swapped(instruction, 1, 0, 1));
        add("a1 and a2 swapped", swapped(instruction, 1, 1, 2));
    } else if instruction.starts_with("ldmatrix") {
        let trans = instruction.contains(".trans");
        let (old, new) = if trans { (".x4.trans", ".x4") } else { (".x4", ".x4.trans") };
        add("transposed otherwise", Some(instruction.replacen(old, new, 1)));
        add("matrices swapped", swapped(instruction, 0, 1, 2));
        add("address 16 off", moved(instruction, 16));
    } else if instruction.starts_with("cp.async.cg") {
        let (start, size) = instruction.rsplit_once(", 16,").unwrap_or((instruction, ""));
        add("copied beyond what is valid", Some(format!("{start}, 16;")).filter(|_| !size.is_empty()));
        add("8 bytes copied", Some(format!("{start}, 8,{size}").replacen(".cg.", ".ca.", 1)));
        add("address 16 off", moved(instruction, 16));
    } else if let Some(pending) = instruction.strip_prefix("cp.async.wait_group") {
        let pending: Option<u32> = pending.trim().trim_end_matches(';').trim().parse().ok();
        add("one group fewer waited for", pending.map(|n| format!("cp.async.wait_group {};", n + 1)));
    } else if ["ld.global", "st.global", "ld.shared", "st.shared"].iter().any(|op| instruction.starts_with(op)) {
        add("address 16 off", moved(instruction, 16));
        add("address 16 off the other way", moved(instruction, -16));
    } else if instruction.starts_with("@%p") {
        add("guard negated", Some(instruction.replacen('@', "@!", 1)));
    } else if instruction.starts_with("@!%p") {
        add("guard not negated", Some(instruction.replacen("@!", "@", 1)));
    } else if instruction.starts_with("mad.lo")
        || instruction.starts_with("mul.lo")
        || instruction.starts_with("shl.b32")
    {
        // Strides of stages and rows.
        let (start, last) = instruction.trim_end_matches(';').rsplit_once(", ").unwrap_or_default();
        add(
            "shift or stride doubled",
            last.parse()
                .ok()
                .filter(|n: &u32| *n > 1)
                .map(|n| format!("{start}, {};", if instruction.starts_with("shl") { n + 1 } else { 2 * n })),
        );
    }
    all
}

/// The n-th `{…}` of an instruction with two of its items exchanged.
fn swapped(instruction: &str, list: usize, one: usize, other: usize) -> Option<String> {
    let open = instruction.match_indices('{').nth(list)?.0 + 1;
    let close = open + instruction[open..].find('}')?;
    let mut items: Vec<&str> = instruction[open..close].split(',').map(str::trim).collect();
    if items.len() <= one.max(other) {
        return None;
    }
    items.swap(one, other);
    Some(format!("{}{}{}", &instruction[..open], items.join(", "), &instruction[close..]))
}

/// The first address of an instruction with another offset.
fn moved(instruction: &str, by: i64) -> Option<String> {
    let end = instruction.find(']')?;
    let start = instruction.find('[')? + 1;
    let (base, offset) = instruction[start..end].split_once('+').unwrap_or((&instruction[start..end], "0"));
    let offset: i64 = offset.parse().ok()?;
    Some(format!("{}{base}+{}{}", &instruction[..start], offset + by, &instruction[end..]))
}

/// Of each kind of mistake this many places per kernel, evenly spread: a kernel has hundreds of `mma`.
const PLACES: usize = 3;

/// Mistakes that change nothing, by the kernel, the mistake, how the instruction begins and what its source line and the
/// one it is inlined in hold; each with the reason.
const HARMLESS: [(&str, &str, &str, [&str; 2]); 3] = [
    // `step % kStages` of the prologue, whose steps are fewer than the stages: what is multiplied is 0.
    ("lora_backward_bf16_large", "shift or stride doubled", "mul.lo.s16", ["", ""]),
    ("lora_backward_bf16_large", "shift or stride doubled", "mul.lo.s32", ["step % kStages", "++step) issue(step);"]),
    // In the prologue: y then waits for h at step 0, which is before it has to.
    ("lora_forward_bf16_small", "guard negated", "@%p", ["dependency.must_wait(step)", "++step) issue(step);"]),
];

#[test]
fn mistaken_operands_are_noticed() {
    let mut work = Vec::new();
    for (image, tile, kernel) in
        [(FORWARD, TileSize::Small, "lora_forward_bf16_small"), (BACKWARD, TileSize::Large, "lora_backward_bf16_large")]
    {
        let ptx = Image::find(image).and_then(|image| image.ptx.iter().find(|ptx| ptx.0 == 80)).expect("PTX").1;
        let mut sources = Sources::new(ptx);
        let (mut lines, mut inside, mut place) = (Vec::new(), false, <[String; 2]>::default());
        let mut kinds: BTreeMap<(&str, String), Vec<(usize, String)>> = BTreeMap::new();
        for line in ptx.lines() {
            let trimmed = line.trim();
            if trimmed.starts_with(".visible .entry") {
                inside = trimmed.contains(&format!("{kernel}("));
            }
            if inside && trimmed.starts_with(".loc") {
                place = sources.lines(trimmed);
            }
            if inside {
                for (what, text) in mistaken(trimmed) {
                    let is_harmless = HARMLESS.iter().any(|(of, mistake, start, [source, outer])| {
                        (*of, *mistake) == (kernel, what)
                            && trimmed.starts_with(start)
                            && place[0].contains(source)
                            && place[1].contains(outer)
                    });
                    if is_harmless {
                        continue;
                    }
                    let opcode = trimmed.split_whitespace().find(|word| !word.starts_with('@')).unwrap_or_default();
                    kinds.entry((what, opcode.to_owned())).or_default().push((lines.len(), text));
                }
            }
            lines.push(line.to_owned());
        }
        assert!(kinds.len() > 12, "{kernel} has {} kinds of operands", kinds.len());
        let lines = Arc::new(lines);
        for ((what, _), places) in kinds {
            let step = places.len().div_ceil(PLACES);
            work.extend(
                places.into_iter().step_by(step).map(|place| (image, tile, kernel, Arc::clone(&lines), what, place)),
            );
        }
    }
    let missed = std::sync::Mutex::new(String::new());
    let unreached = std::sync::Mutex::new(Vec::new());
    work.par_iter().for_each(|(image, tile, kernel, lines, what, (line, text))| {
        let with = |text: &str| {
            let mut lines = (**lines).clone();
            text.clone_into(&mut lines[*line]);
            Arc::new(Module::parse(&lines.join("\n")).expect("the PTX parses"))
        };
        let (module, before) = (with(text), &lines[*line]);
        if verdict(image, *tile, &module, 3).is_ok() {
            if verdict(image, *tile, &with("trap;"), 1).is_ok() {
                unreached.lock().expect("a lock").push(format!("{kernel} line {}: `{}`", line + 1, before.trim()));
                return;
            }
            // Writing to a String cannot fail.
            let _ = writeln!(
                missed.lock().expect("a lock"),
                "{kernel} line {}, {what}: `{}` for `{}`",
                line + 1,
                text,
                before.trim()
            );
        }
    });
    let missed = missed.into_inner().expect("a lock");
    let unreached = unreached.into_inner().expect("a lock");
    println!("{} mistaken operands; {} where no case comes: {unreached:#?}", work.len(), unreached.len());
    assert!(unreached.len() * 8 < work.len(), "the cases leave out too much of the kernels");
    assert!(missed.is_empty(), "not noticed of {}:\n{missed}", work.len());
}
