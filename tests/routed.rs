//! Many adapters in one batch, through layers: each row as with its adapter alone.

mod common;

use common::golden::{self, Golden};
use common::layers::download;
use fused_lora::cpu::Cpu;
use fused_lora::linear::{Adapter, Backend, Bank, LoraLinear, Routes, Scaling};
use fused_lora::{Element, Error, Matrix, Routing, bf16, f16};

const N: usize = 40;
const K: usize = 72;
/// Ranks of the adapters of the tests' layer; the second is past a multiple of 16, the last beyond one step of ranks.
const RANKS: [usize; 4] = [8, 24, 1, 80];
const NAMES: [&str; 4] = ["a", "b", "c", "d"];

/// Numbers in [−1, 1) that are exact in every type.
fn numbers<T: Element>(count: usize, seed: usize) -> Vec<T> {
    (0..count).map(|at| T::from_f64(((at * 37 + seed * 101 + at / 7 * 11) % 128) as f64 / 64.0 - 1.0)).collect()
}

fn layer<B: Backend, T: Element>(backend: &B) -> LoraLinear<B, T> {
    let (w, bias) = (numbers::<T>(N * K, 1), numbers::<T>(N, 2));
    let mut layer = LoraLinear::upload(backend.clone(), &w, Some(&bias), N, K).expect("a layer");
    for (at, (name, r)) in NAMES.into_iter().zip(RANKS).enumerate() {
        let (a, b) = (numbers::<T>(r * K, 3 + at), numbers::<T>(N * r, 13 + at));
        let scaling = Scaling::Lora { alpha: r as f64 * [2.0, 0.5, -1.0, 0.25][at] };
        layer.add(name, Adapter::upload(backend, r, scaling, &a, &b).expect("an adapter")).expect("added");
    }
    layer
}

/// Rows sorted into whole tiles have the bits of each adapter alone; `close` takes the place of equality elsewhere.
fn each_row_as_alone<B: Backend, T: Element>(
    backend: &B,
    m: usize,
    ids: &[Option<usize>],
    same: fn(&[T], &[T]) -> bool,
) {
    let mut layer = layer::<B, T>(backend);
    let x = backend.upload(&numbers::<T>(m * K, 23)).expect("an upload");
    let x = Matrix::new(B::read(&x), m, K);
    let bank = layer.bank(&NAMES).expect("a bank");
    let routes = Routes::upload(backend, &Routing::new(bank.slots(), ids).expect("a routing")).expect("an upload");
    let routed = layer.forward_routed(x, &bank, &routes).expect("forward");
    let routed = download(backend, &routed, m * N);
    for (id, name) in NAMES.into_iter().enumerate().map(|(id, name)| (Some(id), name)).chain([(None, "no adapter")]) {
        match id {
            Some(_) => layer.activate(name).expect("an adapter"),
            None => layer.disable().expect("no adapter"),
        }
        let alone = layer.forward(x).expect("forward");
        let alone = download(backend, &alone, m * N);
        for row in (0..m).filter(|&row| ids[row] == id) {
            let (got, expected) = (&routed[row * N..][..N], &alone[row * N..][..N]);
            assert!(same(got, expected), "row {row} with {name}: {got:?}, expected {expected:?}");
        }
    }
}

/// One spacing of the type apart at most: the sums are the same up to their order.
fn close<T: Element>(got: &[T], expected: &[T]) -> bool {
    let u = fused_lora::reference::unit_roundoff(T::DTYPE);
    got.iter().zip(expected).all(|(got, expected)| {
        let (got, expected) = (got.to_f64(), expected.to_f64());
        (got - expected).abs() <= 2.0 * u * expected.abs().max(1.0)
    })
}

fn mixed(m: usize) -> Vec<Option<usize>> {
    (0..m).map(|row| Some(row * 7 % 5).filter(|&id| id < 4)).collect()
}

fn in_runs(m: usize) -> Vec<Option<usize>> {
    (0..m).map(|row| [Some(2), None, Some(3), Some(0), Some(1)][row * 5 / m]).collect()
}

#[test]
fn each_row_as_with_its_adapter_alone_on_the_cpu() {
    for m in [1, 5, 64, 131] {
        for ids in [mixed(m), in_runs(m), vec![None; m]] {
            each_row_as_alone::<_, bf16>(&Cpu, m, &ids, close);
            each_row_as_alone::<_, f32>(&Cpu, m, &ids, |got, expected| {
                got.iter().zip(expected).all(|(got, expected)| (got - expected).abs() <= 1e-5 * expected.abs().max(1.0))
            });
        }
    }
}

#[test]
fn a_batch_that_peft_recorded() {
    let case = Golden::load("mixed_batch");
    case.check_mixed::<_, f32>(&Cpu, golden::F32);
    case.check_mixed::<_, bf16>(&Cpu, golden::BF16);
    case.check_mixed::<_, f16>(&Cpu, golden::F16);
    case.check_mixed::<_, bf16>(&Cpu, golden::BF16_AMP);
}

fn refused(m: usize, change: impl FnOnce(&mut LoraLinear<Cpu, f32>, &Bank<Cpu, f32>) -> Routes<Cpu>) -> Error {
    let mut layer = layer::<_, f32>(&Cpu);
    let bank = layer.bank(&NAMES[..2]).expect("a bank");
    let routes = change(&mut layer, &bank);
    let x = numbers::<f32>(m * K, 23);
    layer.forward_routed(Matrix::new(&x[..], m, K), &bank, &routes).expect_err("a refusal")
}

#[test]
fn banks_and_routes_that_do_not_fit_are_refused() {
    let routes = |bank: &Bank<Cpu, f32>, m: usize| {
        Routes::upload(&Cpu, &Routing::new(bank.slots(), &vec![Some(1); m]).expect("a routing")).expect("an upload")
    };
    let error = refused(3, |_, bank| routes(bank, 4));
    assert_eq!(error, Error::Dimension { arg: "routes", axis: "rows", got: 4, expected: 3 });
    let error = refused(3, |layer, _| {
        let bank = layer.bank(&NAMES).expect("a larger bank");
        Routes::upload(&Cpu, &Routing::new(bank.slots(), &[Some(3); 3]).expect("a routing")).expect("an upload")
    });
    assert!(matches!(error, Error::State { operation: "forward_routed", .. }), "{error}");
    let error = refused(3, |layer, bank| {
        layer.refresh("b").expect("a change");
        routes(bank, 3)
    });
    assert!(matches!(error, Error::State { operation: "forward_routed", .. }), "{error}");
    let error = refused(3, |layer, bank| {
        layer.remove("a").expect("not active");
        routes(bank, 3)
    });
    assert!(matches!(error, Error::State { operation: "forward_routed", .. }), "{error}");
    let layer = layer::<_, f32>(&Cpu);
    assert!(matches!(layer.bank(&["a", "nobody"]), Err(Error::AdapterName { .. })));
}

#[cfg(all(feature = "emulator", feature = "cuda"))]
mod on_the_emulator {
    use super::*;
    use fused_lora::emulator::Emulator;
    use fused_lora::plan::Device;

    /// In both families: 90 takes the Hopper kernels where an adapter's rank lets it.
    #[test]
    fn each_row_as_with_its_adapter_alone() {
        for arch in [80, 90] {
            let emulator = Emulator::new(Device::of_arch("emulated", arch, 3));
            each_row_as_alone::<_, bf16>(&emulator, 131, &mixed(131), close);
            each_row_as_alone::<_, f16>(&emulator, 131, &in_runs(131), close);
        }
    }

    #[test]
    fn a_batch_that_peft_recorded() {
        let case = Golden::load("mixed_batch");
        for arch in [75, 80, 90] {
            let emulator = Emulator::new(Device::of_arch("emulated", arch, 3));
            case.check_mixed::<_, bf16>(&emulator, golden::BF16);
            case.check_mixed::<_, f16>(&emulator, golden::F16);
            case.check_mixed::<_, bf16>(&emulator, golden::BF16_AMP);
        }
    }
}
