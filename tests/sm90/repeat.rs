//! The same bits whatever the order of events, the number of SMs and what ran before.

use fused_lora::emulator::Emulator;
use fused_lora::plan::{Options, Params, Plan, SYNC_BYTES};
use fused_lora::{Accumulate, Dtype, Element, bf16, f16, raw};
use ptx_emulator::Memory;
use rayon::prelude::*;

use crate::common::data::Spec;
use crate::common::hopper::variants;
use crate::common::{Host, HostBackward, HostForward, HostGradient};
use crate::{TIMINGS, bits, busy, hopper, same_bits};

fn chunks(plan: &Plan) -> u32 {
    match plan.launch(256, plan.workspace_bytes()).expect("a launch").params {
        Params::Sm90Backward(params) => params.chunks,
        _ => 0,
    }
}

/// Twenty orders of events; tiles, clusters and types take turns.
#[test]
fn the_same_bits_for_every_seed() {
    fn run<T: Element>(turn: usize, options: Options) {
        let emulator = hopper(6, options.with_chunks(3));
        let first = bits::<T>(&emulator, &busy());
        let mut op = busy().backward::<T>();
        assert_eq!(chunks(&emulator.backward(op.views()).expect("backward runs").plan), 3);
        for seed in (2..22).filter(|seed| seed % 2 == turn as u64 % 2) {
            let emulator = emulator.clone().with_seed(seed).with_copies(TIMINGS[seed as usize % 3]);
            assert!(same_bits(&first, &bits::<T>(&emulator, &busy())), "{:?}, seed {seed}, {options:?}", T::DTYPE);
        }
    }
    let all: Vec<_> = (0..2).flat_map(|turn| variants().into_iter().map(move |options| (turn, options))).collect();
    all.into_par_iter().for_each(|(turn, options)| {
        run::<f16>(turn, options);
        run::<bf16>(1 - turn, options);
    });
}

/// Where the plan's choices are made, the number of SMs does not change a bit.
#[test]
fn the_same_bits_for_any_number_of_sms() {
    for options in variants() {
        let run = |sms| bits::<bf16>(&hopper(sms, options.with_chunks(3)).with_seed(u64::from(sms)), &busy());
        let first = run(2);
        for sms in [3, 7, 64] {
            assert!(same_bits(&first, &run(sms)), "{sms} SMs, {options:?}");
        }
    }
}

/// A second and third launch on the same workspace find it as the first did.
#[test]
fn replays_find_the_workspace_clean() {
    for options in variants() {
        let emulator = hopper(4, options.with_chunks(2));
        let once = bits::<f16>(&emulator, &busy());
        assert!(same_bits(&once, &bits::<f16>(&emulator.with_replays(2), &busy())), "{options:?}");
    }
}

/// Launches a plan in which 2^`shift` blocks of rows share a flag, as the planner has it from a million rows on.
fn with_shared_flags(emulator: &Emulator, memory: &mut Memory, plan: &Plan, shift: u32) {
    let workspace = memory.alloc("workspace", plan.workspace_bytes());
    memory.write(workspace, &[0; SYNC_BYTES]).expect("a workspace");
    let mut launch = plan.launch(workspace, plan.workspace_bytes()).expect("a launch");
    match &mut launch.params {
        Params::Sm90Forward(params) => params.flag_shift = shift,
        Params::Sm90Backward(params) => params.flag_shift = shift,
        _ => unreachable!("a launch of the Hopper family"),
    }
    emulator.run(memory, &launch).expect("the kernel runs");
}

fn upload(memory: &mut Memory, host: &Host<bf16>, initialised: bool) -> raw::Matrix {
    let bytes: Vec<u8> = host.data.iter().flat_map(|value| value.to_le_bytes()).collect();
    let ptr = memory.alloc("matrix", bytes.len());
    if initialised {
        memory.write(ptr, &bytes).expect("an upload");
    }
    raw::Matrix::new(ptr, host.rows, host.cols)
}

fn download(memory: &Memory, from: raw::Matrix) -> Vec<bf16> {
    let bytes = memory.read(from.ptr, from.rows * from.cols * 2).expect("a download");
    bytes.as_chunks().0.iter().map(|bytes| bf16::from_le_bytes(*bytes)).collect()
}

#[test]
fn shared_flags() {
    for (turn, options) in variants().into_iter().enumerate() {
        let spec = Spec { f32_gradients: false, outputs: [true, true, false, false], ..Spec::new(700, 72, 136, 24) };
        let shift = 1 + turn as u32 % 3;
        let emulator = hopper(4, options.with_chunks(2)).with_seed(turn as u64);
        let expected = bits::<bf16>(&emulator, &spec);
        let mut memory = Memory::new();
        let HostForward { x, w, a, b, bias, .. } = &expected.0;
        let [x, w, a, b] = [x, w, a, b].map(|host| upload(&mut memory, host, true));
        let y = upload(&mut memory, &expected.0.y, false);
        let bias = bias.as_ref().map(|bias| upload(&mut memory, bias, true));
        let variant = raw::Variant::default();
        let op = raw::Forward {
            dtype: Dtype::Bf16,
            x,
            w,
            f32_factors: false,
            a,
            b,
            scale: spec.scale,
            bias,
            h: None,
            y,
            variant,
        };
        let plan = Plan::forward_with(&op, emulator.device(), options).expect("a plan");
        with_shared_flags(&emulator, &mut memory, &plan, shift);
        assert!(download(&memory, y) == expected.0.y.data, "y, {options:?}");

        let HostBackward { dy, w, a, b, x, dx, da, .. } = &expected.1;
        let [dy, w, a, b] = [dy, w, a, b].map(|host| upload(&mut memory, host, true));
        let x = x.as_ref().map(|x| upload(&mut memory, x, true));
        let dx = dx.as_ref().map(|dx| (upload(&mut memory, dx, false), &dx.data));
        let Some(HostGradient::Storage(da)) = da else { unreachable!("da is of the storage type") };
        let da = (upload(&mut memory, da, false), &da.data);
        let op = raw::Backward {
            dtype: Dtype::Bf16,
            dy,
            w,
            f32_factors: false,
            a,
            b,
            scale: spec.scale,
            x,
            h: None,
            dx: dx.map(|(dx, _)| dx),
            da: Some(raw::Gradient { matrix: da.0, f32: false }),
            db: None,
            dbias: None,
            dm: None,
            accumulate: Accumulate::default(),
            variant: raw::Variant::default(),
        };
        let plan = Plan::backward_with(&op, emulator.device(), options.with_chunks(2)).expect("a plan");
        with_shared_flags(&emulator, &mut memory, &plan, shift);
        for (matrix, expected) in dx.into_iter().chain([da]) {
            assert!(&download(&memory, matrix) == expected, "dx or da, {options:?}");
        }
    }
}
