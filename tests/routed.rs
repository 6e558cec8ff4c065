//! Many adapters in one batch, through layers: each row as with its adapter alone.

mod common;

use common::golden::{self, Golden};
use common::layers::download;
use fused_lora::cpu::Cpu;
use fused_lora::linear::{
    Adapter, Backend, Bank, Buffers, BuffersMut, Gradients, Kept, LoraLinear, Pass, Rejected, Routes, Scaling, Training,
};
use fused_lora::{Dropout, Element, Error, Matrix, MatrixMut, Routing, Seed, bf16, f16};

const N: usize = 40;
const K: usize = 72;
/// Ranks of the adapters of the tests' layer; the second is past a multiple of 16, the last beyond one step of ranks.
const RANKS: [usize; 4] = [8, 24, 1, 80];
const NAMES: [&str; 4] = ["a", "b", "c", "d"];

/// Numbers in [−1, 1) that are exact in every type.
fn numbers<T: Element>(count: usize, seed: usize) -> Vec<T> {
    (0..count).map(|at| T::from_f64(((at * 37 + seed * 101 + at / 7 * 11) % 128) as f64 / 64.0 - 1.0)).collect()
}

/// How the adapters of the tests' layer are kept and read.
#[derive(Clone, Copy, Debug)]
enum Precision {
    Storage,
    /// At full precision, with numbers that 16 bits do not hold.
    Full,
}

fn layer<B: Backend, T: Element>(backend: &B) -> LoraLinear<B, T> {
    layer_of(backend, Precision::Storage)
}

fn layer_of<B: Backend, T: Element>(backend: &B, precision: Precision) -> LoraLinear<B, T> {
    let (w, bias) = (numbers::<T>(N * K, 1), numbers::<T>(N, 2));
    let mut layer = LoraLinear::upload(backend.clone(), &w, Some(&bias), N, K).expect("a layer");
    for (at, (name, r)) in NAMES.into_iter().zip(RANKS).enumerate() {
        let (a, b) = (numbers::<T>(r * K, 3 + at), numbers::<T>(N * r, 13 + at));
        let scaling = Scaling::Lora { alpha: r as f64 * [2.0, 0.5, -1.0, 0.25][at] };
        let thirds = |values: &[T]| values.iter().map(|value| value.to_f32() / 3.0).collect::<Vec<_>>();
        let adapter = match precision {
            Precision::Storage => Adapter::upload(backend, r, scaling, &a, &b),
            Precision::Full => {
                Adapter::upload_f32(backend, r, scaling, &thirds(&a), &thirds(&b)).map(Adapter::at_full_precision)
            }
        };
        layer.add(name, adapter.expect("an adapter")).expect("added");
    }
    layer
}

/// Rows sorted into whole tiles have the bits of each adapter alone; `close` takes the place of equality elsewhere.
fn each_row_as_alone<B: Backend, T: Element>(
    backend: &B,
    precision: Precision,
    ids: &[Option<usize>],
    same: fn(&[T], &[T]) -> bool,
) {
    let m = ids.len();
    let mut layer = layer_of::<B, T>(backend, precision);
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
            each_row_as_alone::<_, bf16>(&Cpu, Precision::Storage, &ids, close);
            each_row_as_alone::<_, bf16>(&Cpu, Precision::Full, &ids, close);
            each_row_as_alone::<_, f32>(&Cpu, Precision::Storage, &ids, |got, expected| {
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
    case.check_mixed::<_, bf16>(&Cpu, golden::full::BF16_A32);
    case.check_mixed::<_, f16>(&Cpu, golden::full::F16_A32);
}

/// What a pass through a bank gives: y, dx, da and db of all adapters.
struct Trained<T> {
    y: Vec<T>,
    dx: Vec<T>,
    da: Vec<f32>,
    db: Vec<f32>,
}

fn backward<B: Backend, T: Element>(
    backend: &B,
    layer: &LoraLinear<B, T>,
    (y, pass): (B::Buffer<T>, Pass<'_, B, T>),
    dy: &[T],
    rank: usize,
) -> Trained<T> {
    let m = dy.len() / N;
    let dy = backend.upload(dy).expect("an upload");
    let mut dx = backend.upload(&vec![T::from_f32(f32::NAN); m * K]).expect("an upload");
    let [mut da, mut db] = [rank * K, N * rank].map(|count| backend.upload(&vec![f32::NAN; count]).expect("an upload"));
    let gradients = Gradients {
        dx: Some(MatrixMut::new(B::write(&mut dx), m, K)),
        da: Some(MatrixMut::new(B::write(&mut da), rank, K)),
        db: Some(MatrixMut::new(B::write(&mut db), N, rank)),
        ..Gradients::default()
    };
    layer.backward(&pass, Matrix::new(B::read(&dy), m, N), gradients).expect("backward");
    Trained {
        y: download(backend, &y, m * N),
        dx: download(backend, &dx, m * K),
        da: download(backend, &da, rank * K),
        db: download(backend, &db, N * rank),
    }
}

/// Gradients of every adapter are those of its own rows alone; a pass that keeps no h gives the same, bit by bit where `same_bits`.
fn trains_each_adapter_on_its_rows<B: Backend, T: Element>(
    backend: &B,
    precision: Precision,
    ids: &[Option<usize>],
    same_bits: bool,
) {
    let m = ids.len();
    let mut layer = layer_of::<B, T>(backend, precision);
    let (x, dy) = (numbers::<T>(m * K, 23), numbers::<T>(m * N, 29));
    let bank = layer.bank(&NAMES).expect("a bank");
    let rank = bank.rank();
    let routes = Routes::upload(backend, &Routing::new(bank.slots(), ids).expect("a routing")).expect("an upload");
    layer.reserve_routed(m, &bank).expect("a workspace");
    let device = backend.upload(&x).expect("an upload");
    let view = Matrix::new(B::read(&device), m, K);
    let run = |recompute| {
        let training = Training { recompute, ..Training::default() };
        let pass = layer.forward_routed_train(view, &bank, &routes, training).expect("forward");
        assert_eq!(pass.1.h().is_none(), recompute);
        // Put together again.
        let (y, kept) = (pass.0, pass.1.into_kept());
        let pass = kept.with_routes(view, &bank, &routes, None).expect("the same x, bank and routes");
        backward(backend, &layer, (y, pass), &dy, rank)
    };
    let (all, again) = (run(false), run(true));
    assert!(!same_bits || (&all.dx, &all.da, &all.db) == (&again.dx, &again.da, &again.db), "h computed again");
    let slots = bank.slots().to_vec();
    for (id, name) in NAMES.into_iter().enumerate() {
        layer.activate(name).expect("an adapter");
        let rows: Vec<usize> = (0..m).filter(|&row| ids[row] == Some(id)).collect();
        if rows.is_empty() {
            continue;
        }
        let of = |from: &[T], cols: usize| -> Vec<T> {
            rows.iter().flat_map(|row| from[row * cols..][..cols].to_vec()).collect()
        };
        let own = backend.upload(&of(&x, K)).expect("an upload");
        let pass = layer.forward_train(Matrix::new(B::read(&own), rows.len(), K)).expect("forward alone");
        let alone = backward(backend, &layer, pass, &of(&dy, N), RANKS[id]);
        for (what, got, expected, cols) in [("y", &all.y, &alone.y, N), ("dx", &all.dx, &alone.dx, K)] {
            assert!(close(&of(got, cols), expected), "{what} of {name}");
        }
        // Sums of as many products of a size near h and x, in another order.
        let near = |got: f32, expected: f32| (got - expected).abs() <= 1e-4 * expected.abs().max(1.0);
        let (first, r) = (slots[id].first_rank, RANKS[id]);
        assert!(all.da[first * K..].iter().zip(&alone.da).all(|(got, expected)| near(*got, *expected)), "da of {name}");
        for row in 0..N {
            let (got, expected) = (&all.db[row * rank + first..][..r], &alone.db[row * r..][..r]);
            assert!(got.iter().zip(expected).all(|(got, expected)| near(*got, *expected)), "db of {name}, row {row}");
        }
    }
}

#[test]
fn every_adapter_is_trained_on_its_rows_on_the_cpu() {
    for m in [1, 64, 131] {
        for ids in [mixed(m), in_runs(m)] {
            trains_each_adapter_on_its_rows::<_, f32>(&Cpu, Precision::Storage, &ids, true);
            trains_each_adapter_on_its_rows::<_, bf16>(&Cpu, Precision::Storage, &ids, true);
            trains_each_adapter_on_its_rows::<_, bf16>(&Cpu, Precision::Full, &ids, true);
        }
    }
}

/// A step of an optimiser: what has changed is copied to the bank, and a pass from before is none of it.
#[test]
fn a_bank_is_refreshed_after_a_step() {
    let mut layer = layer::<_, f32>(&Cpu);
    let x = numbers::<f32>(3 * K, 23);
    let x = Matrix::new(&x[..], 3, K);
    let mut bank = layer.bank(&NAMES).expect("a bank");
    let routing = Routing::new(bank.slots(), &[Some(1), Some(3), None]).expect("a routing");
    let routes = Routes::upload(&Cpu, &routing).expect("an upload");
    let dropout = Some(Dropout { p: 0.25, seed: Seed::Value { seed: 1, offset: 2 } });
    let training = Training { dropout, ..Training::default() };
    let (before, pass) = layer.forward_routed_train(x, &bank, &routes, training).expect("forward");
    assert_ne!(before, layer.forward_routed(x, &bank, &routes).expect("forward"), "something was dropped");
    let kept = pass.into_kept();
    layer
        .update("b", |factors| -> fused_lora::Result<()> {
            let BuffersMut::Storage { a, .. } = factors else { unreachable!("factors in the storage type") };
            a.iter_mut().for_each(|a| *a *= 0.5);
            Ok(())
        })
        .expect("an update");
    let stale = |layer: &LoraLinear<Cpu, f32>, bank: &Bank<Cpu, f32>| {
        let refused = layer.forward_routed_train(x, bank, &routes, training).map(drop).expect_err("a refusal");
        assert!(matches!(refused, Error::State { operation: "forward_routed_train", .. }), "{refused}");
        assert!(refused.to_string().contains("`b`"), "{refused}");
    };
    stale(&layer, &bank);
    let pass = kept.with_routes(x, &bank, &routes, None).expect("the same bank");
    let dy = numbers::<f32>(3 * N, 29);
    let mut db = vec![9.0; N * bank.rank()];
    let gradients = Gradients { db: Some(MatrixMut::new(&mut db[..], N, bank.rank())), ..Gradients::default() };
    let refused = layer.backward(&pass, Matrix::new(&dy[..], 3, N), gradients).expect_err("a refusal");
    assert!(matches!(refused, Error::State { operation: "backward", .. }), "{refused}");
    assert!(db.iter().all(|&value| value == 9.0), "something was written");

    let kept = pass.into_kept();
    layer.refresh_bank(&mut bank).expect("copies");
    let anew = layer.bank(&NAMES).expect("a bank");
    let elements = |bank: &Bank<Cpu, f32>| match bank.buffers() {
        Buffers::Storage { a, b, .. } => (a.clone(), b.clone()),
        Buffers::F32 { .. } => unreachable!("no adapter is at full precision"),
    };
    assert_eq!(elements(&bank), elements(&anew));
    let (after, _) = layer.forward_routed_train(x, &bank, &routes, training).expect("forward");
    assert_ne!(before, after);
    let state = |rejected: Rejected<Kept<Cpu, f32>>, operation| {
        assert!(
            matches!(rejected.error, Error::State { operation: got, .. } if got == operation),
            "{}",
            rejected.error
        );
        rejected.value
    };
    let kept = state(kept.with_routes(x, &bank, &routes, None).map(drop).expect_err("another bank"), "with_routes");
    let rejected = kept.with(x).map(drop).expect_err("a pass of a bank");
    assert_eq!(rejected.error, Error::Missing { arg: "routes", output: "a pass of a bank" });
    layer.activate("a").expect("an adapter");
    let plain = layer.forward_train(x).expect("forward").1.into_kept();
    state(plain.with_routes(x, &bank, &routes, None).map(drop).expect_err("a pass of no bank"), "with_routes");
    layer.disable().expect("no adapter");
    layer.remove("d").expect("not active");
    let stray = layer.refresh_bank(&mut bank).expect_err("a refusal");
    assert!(matches!(&stray, Error::State { operation: "refresh_bank", got, .. } if got.contains("`d`")), "{stray}");
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
            for precision in [Precision::Storage, Precision::Full] {
                each_row_as_alone::<_, bf16>(&emulator, precision, &mixed(131), close);
                each_row_as_alone::<_, f16>(&emulator, precision, &in_runs(131), close);
            }
        }
    }

    #[test]
    fn every_adapter_is_trained_on_its_rows() {
        for arch in [80, 90] {
            let emulator = Emulator::new(Device::of_arch("emulated", arch, 3));
            for precision in [Precision::Storage, Precision::Full] {
                trains_each_adapter_on_its_rows::<_, bf16>(&emulator, precision, &mixed(70), false);
                trains_each_adapter_on_its_rows::<_, bf16>(&emulator, precision, &in_runs(131), false);
            }
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
            case.check_mixed::<_, bf16>(&emulator, golden::full::BF16_A32);
            case.check_mixed::<_, f16>(&emulator, golden::full::F16_A32);
        }
    }
}
