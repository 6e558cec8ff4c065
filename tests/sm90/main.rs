//! The Hopper kernels executed on a CPU model of the PTX ISA: every tile and cluster, shapes, exactness, repeatability, and what they
//! move through memory.
#![cfg(all(feature = "emulator", feature = "cuda"))]

#[path = "../common/mod.rs"]
mod common;
mod dropout;
mod oracle;
mod repeat;
mod traffic;

use common::data::{Placement, Spec};
use common::emulated::Emulated;
use common::hopper::Case;
use common::{HostBackward, HostDropout, HostForward};
use fused_lora::Element;
use fused_lora::emulator::{Emulator, Timing};
use fused_lora::plan::{Device, Family, Options};
use rayon::prelude::*;

const TIMINGS: [Timing; 3] = [Timing::Eager, Timing::Lazy, Timing::Mixed];

/// A Hopper GPU of `sms` SMs.
fn hopper(sms: u32, options: Options) -> Emulator {
    Emulator::new(Device::of_arch("emulated", 90, sms)).with_plan_options(options)
}

/// A case on a GPU with too few SMs for its units, or with more than enough, and with its own order of events.
fn backend(case: &Case) -> Emulated {
    let Case { options, turn, .. } = *case;
    let sms = [2, 3, 5, 33][(turn / 2) % 4];
    Emulated(hopper(sms, options).with_seed(turn as u64).with_copies(TIMINGS[turn % 3]))
}

fn in_parallel(cases: Vec<Case>, check: impl Fn(&Case) + Sync + Send) {
    cases.par_iter().for_each(check);
}

/// Every bit a run leaves in its outputs.
fn bits<T: Element>(emulator: &Emulator, spec: &Spec) -> (HostForward<T>, HostBackward<T>) {
    let (mut forward, mut backward) = (spec.forward::<T>(), spec.backward::<T>());
    emulator.forward(forward.views()).expect("forward runs");
    let run = emulator.backward(backward.views()).expect("backward runs");
    assert_eq!(run.plan.family(), Family::Sm90);
    (forward, backward)
}

fn same_bits<T: Element>(a: &(HostForward<T>, HostBackward<T>), b: &(HostForward<T>, HostBackward<T>)) -> bool {
    // Inputs hold NaN around their matrices, so only what was written is compared.
    a.0.y.data == b.0.y.data
        && a.0.h.as_ref().map(|h| &h.data) == b.0.h.as_ref().map(|h| &h.data)
        && a.1.dx.as_ref().map(|dx| &dx.data) == b.1.dx.as_ref().map(|dx| &dx.data)
        && (&a.1.da, &a.1.db, &a.1.dbias) == (&b.1.da, &b.1.db, &b.1.dbias)
}

/// Many units, three chunks whose sums are added by whoever comes last, a last block of rows without its neighbour.
fn busy() -> Spec {
    Spec { placement: Placement::Aligned, ..Spec::new(300, 200, 136, 24) }
}

fn with_dropout(p: f32, in_memory: bool) -> Spec {
    Spec { dropout: Some(HostDropout { p, seed: [11, 1 << 40], in_memory }), ..busy() }
}
