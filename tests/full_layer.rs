//! Layers whose adapter is at full precision: f32 factors over 16 bits.

#![allow(clippy::panic, clippy::unwrap_used)] // how a test fails

mod common;

use common::data::{Placement, Spec};
use common::layers::{self, Device, assert_same, bits, compact, download};
use common::{Host, HostBackward, HostDropout, HostForward, HostMagnitude, full};
use fused_lora::cpu::Cpu;
use fused_lora::linear::{
    Adapter, Backend, Buffers, BuffersMut, Gradients, LayerGradients, LoraLinear, LoraProjections, ProjectionGradients,
    Scaling, Training,
};
use fused_lora::reference;
use fused_lora::{Dropout, Element, Error, Matrix, MatrixMut, Result, Seed, bf16, f16, split_columns};

fn table() -> [Spec; 5] {
    let dropout = Some(HostDropout { p: 0.25, seed: [3, 1 << 40], in_memory: false });
    [
        Spec::new(16, 24, 40, 8),
        Spec { placement: Placement::Strided, scale: -0.5, dropout, ..Spec::new(70, 40, 72, 5) },
        Spec { bias: false, accumulate: true, ..Spec::new(33, 65, 24, 16) },
        Spec { dora: true, ..Spec::new(40, 33, 48, 11) },
        Spec { outputs: [false, true, false, true], ..Spec::new(3, 9, 17, 1) },
    ]
}

fn matrix<T>(rows: usize, cols: usize, data: Vec<T>) -> Host<T> {
    Host { rows, cols, offset: 0, row_stride: cols, data }
}

/// A layer with the active adapter "one", and what forward reads of it; the gain is what f64 makes of the magnitude.
struct Made<B: Backend, T: Element> {
    layer: LoraLinear<B, T>,
    forward: HostForward<T, f32>,
    magnitude: Option<Host<f32>>,
}

fn make<B: Backend, T: Element>(backend: &B, spec: &Spec) -> Made<B, T> {
    let Spec { n, k, r, .. } = *spec;
    let mut forward = spec.forward_of::<T, f32>();
    (forward.w, forward.a, forward.b) = (compact(&forward.w), compact(&forward.a), compact(&forward.b));
    forward.bias = forward.bias.as_ref().map(compact);
    let bias = forward.bias.as_ref().map(|bias| &bias.data[..]);
    let mut layer = LoraLinear::upload(backend.clone(), &forward.w.data, bias, n, k).expect("a layer");
    let scaling = Scaling::Fixed(f64::from(spec.scale));
    let adapter = Adapter::upload_f32(backend, r, scaling, &forward.a.data, &forward.b.data).expect("an adapter");
    let mut adapter = adapter.at_full_precision();
    let magnitude = forward.gain.as_ref().map(compact).map(|wanted| {
        let norm =
            reference::norm(&forward.w.to_mat(), &forward.a.to_mat(), &forward.b.to_mat(), f64::from(spec.scale));
        let magnitude = (0..n).map(|at| (f64::from(wanted.data[at]) * norm.at(0, at)) as f32).collect::<Vec<_>>();
        let gain = (0..n).map(|at| (f64::from(magnitude[at]) / norm.at(0, at)) as f32).collect();
        forward.gain = Some(matrix(1, n, gain));
        matrix(1, n, magnitude)
    });
    if let Some(magnitude) = &magnitude {
        adapter = adapter.with_magnitude(backend, &magnitude.data).expect("a magnitude");
    }
    layer.add("one", adapter).expect("an added adapter");
    layer.activate("one").expect("an adapter");
    Made { layer, forward, magnitude }
}

/// Forward, and forward with backward, that keeps h or computes it again: as exact as the operations are.
fn computes<B: Backend, T: Element>(backend: &B) {
    for spec in table() {
        let Spec { m, n, r, .. } = spec;
        let Made { layer, forward, magnitude } = make::<B, T>(backend, &spec);
        layer.reserve(m).expect("a workspace");
        let judged = |outcome: Result<(), String>| outcome.unwrap_or_else(|wrong| panic!("{spec:?}: {wrong}"));
        let x = Device::new(backend, &forward.x);
        let inferred = download(backend, &layer.forward(x.view()).expect("forward"), m * n);
        let poison = matrix(m, n, vec![T::from_f32(f32::NAN); m * n]);
        let of = |y, dropout| HostForward { y, h: None, dropout, ..forward.clone() };
        judged(full::judge_forward(&of(poison.clone(), None), &of(matrix(m, n, inferred.clone()), None)));
        let seed = |HostDropout { p, seed: [seed, offset], .. }| Dropout { p, seed: Seed::Value { seed, offset } };
        let dropout = spec.dropout.map(seed);
        let run =
            |recompute| layer.forward_train_with(x.view(), Training { dropout, recompute }).expect("forward_train");
        let (y, kept) = run(false);
        let y = download(backend, &y, m * n);
        match spec.dropout {
            Some(_) => {
                judged(full::judge_forward(&of(poison, spec.dropout), &of(matrix(m, n, y.clone()), spec.dropout)))
            }
            None => assert_same(&bits(&y), &bits(&inferred), "forward_train and forward"),
        }
        let h = download(backend, kept.h().expect("h"), m * split_columns(r));
        for pass in [kept, run(true).1] {
            let given = spec.backward_of::<T, f32>();
            let start = HostBackward {
                w: forward.w.clone(),
                a: forward.a.clone(),
                b: forward.b.clone(),
                x: Some(forward.x.clone()),
                h: Some(matrix(m, split_columns(r), h.clone())),
                gain: forward.gain.clone(),
                magnitude: magnitude.as_ref().zip(given.magnitude.as_ref()).map(|(magnitude, of)| HostMagnitude {
                    y: matrix(m, n, y.clone()),
                    bias: forward.bias.clone(),
                    magnitude: magnitude.clone(),
                    dm: of.dm.clone(),
                }),
                ..given
            };
            let end = layers::backward(backend, &layer, &pass, &start);
            judged(full::judge_backward(&start, &end));
        }
    }
}

#[test]
fn layers_at_full_precision_on_the_cpu() {
    computes::<_, bf16>(&Cpu);
    computes::<_, f16>(&Cpu);
}

#[cfg(all(feature = "emulator", feature = "cuda"))]
#[test]
fn layers_at_full_precision_on_the_emulator() {
    use fused_lora::emulator::Emulator;
    use fused_lora::plan::Device;
    for arch in [80, 90] {
        computes::<_, bf16>(&Emulator::new(Device::of_arch("emulated", arch, 3)));
    }
    computes::<_, f16>(&Emulator::new(Device::of_arch("emulated", 75, 3)));
}

#[cfg(feature = "cuda")]
#[test]
fn layers_at_full_precision_on_the_gpu() {
    let Some(queue) = common::gpu::queue("layers_at_full_precision_on_the_gpu") else { return };
    computes::<_, bf16>(&queue);
    computes::<_, f16>(&queue);
}

const K: usize = 40;
const N: usize = 24;

fn factors(seed: u64) -> (Vec<f32>, Vec<f32>) {
    let forward = Spec { seed, ..Spec::new(1, N, K, 4) }.forward_of::<bf16, f32>();
    (compact(&forward.a).data, compact(&forward.b).data)
}

/// A layer in bf16 with adapters "full" and "rounded" of the same f32 factors.
fn both() -> (LoraLinear<Cpu, bf16>, Vec<bf16>) {
    let forward = Spec::new(8, N, K, 4).forward::<bf16>();
    let mut layer = LoraLinear::upload(Cpu, &compact(&forward.w).data, None, N, K).expect("a layer");
    let (a, b) = factors(1);
    let adapter = || Adapter::upload_f32(&Cpu, 4, Scaling::Lora { alpha: 8.0 }, &a, &b).expect("an adapter");
    layer.add("full", adapter().at_full_precision()).expect("an adapter");
    layer.add("rounded", adapter()).expect("an adapter");
    (layer, compact(&forward.x).data)
}

#[test]
fn it_is_the_choice_of_an_adapter() {
    let (mut layer, x) = both();
    let x = Matrix::new(&x[..], 8, K);
    let mut y = |name: &str| {
        layer.activate(name).expect("an adapter");
        layer.forward(x).expect("forward")
    };
    let (full, rounded) = (y("full"), y("rounded"));
    assert_ne!(full, rounded);
    assert!(format!("{:?}", layer.adapter("full")).contains("at_full_precision: true"));
    // Elsewhere it changes nothing.
    let (a, b) = factors(1);
    let storage = Adapter::<Cpu, f32>::upload_f32(&Cpu, 4, Scaling::Fixed(1.0), &a, &b).expect("an adapter");
    assert!(!storage.at_full_precision().is_at_full_precision());
    let a16: Vec<bf16> = layers::rounded(&a);
    let b16: Vec<bf16> = layers::rounded(&b);
    let storage = Adapter::<Cpu, bf16>::upload(&Cpu, 4, Scaling::Fixed(1.0), &a16, &b16).expect("an adapter");
    assert!(!storage.at_full_precision().is_at_full_precision());
}

/// Products read the adapter's own buffers: an update shows at once, and there is no copy to be stale.
#[test]
fn updates_are_read() {
    let (mut layer, x) = both();
    let x = Matrix::new(&x[..], 8, K);
    layer.activate("full").expect("an adapter");
    let (_, pass) = layer.forward_train(x).expect("forward_train");
    let (a, b) = factors(2);
    layer
        .update("full", |parts| match parts {
            BuffersMut::F32 { a: own_a, b: own_b, .. } => {
                own_a.copy_from_slice(&a);
                own_b.copy_from_slice(&b);
                Ok::<(), Error>(())
            }
            BuffersMut::Storage { .. } => panic!("f32 factors"),
        })
        .expect("an update");
    let after = layer.forward(x).expect("forward");
    let scaling = Scaling::Lora { alpha: 8.0 };
    let fresh = Adapter::upload_f32(&Cpu, 4, scaling, &a, &b).expect("an adapter").at_full_precision();
    layer.add("fresh", fresh).expect("an adapter");
    layer.activate("fresh").expect("an adapter");
    assert_eq!(after, layer.forward(x).expect("forward"));
    let dy = vec![bf16::from_f32(1.0); 8 * N];
    let refused = layer.backward(&pass, Matrix::new(&dy[..], 8, N), Default::default());
    assert!(matches!(refused, Err(Error::State { .. })), "{refused:?}");
}

/// Merging reads f32 factors in any case.
#[test]
fn merged_all_the_same() {
    let mut layer = both().0;
    let mut merged = |name: &str| {
        layer.activate(name).expect("an adapter");
        layer.merge().expect("a merge");
        let merged = layer.weight().clone();
        layer.unmerge().expect("an unmerge");
        merged
    };
    assert_eq!(merged("full"), merged("rounded"));
    let Some(Buffers::F32 { a, b, .. }) = layer.adapter("full").map(Adapter::buffers) else { panic!("f32 factors") };
    assert_eq!((a.len(), b.len()), (4 * K, N * 4));
}

/// A group has adapters at full precision in every layer that has any, or in none.
#[test]
fn a_group_is_at_full_precision_or_not() {
    let with = |name: &str| {
        let mut layer = both().0;
        layer.activate(name).expect("an adapter");
        layer
    };
    let refused = LoraProjections::new([with("full"), with("rounded")]).err().expect("a refusal").error.to_string();
    assert!(refused.contains("in layer 1") && refused.contains("`rounded` is not at full precision"), "{refused}");
    let mut group = LoraProjections::new([both().0, with("full"), with("full")]).expect("a group");
    let x = both().1;
    let x = Matrix::new(&x[..], 8, K);
    let [plain, first, second] = group.forward(x).expect("forward");
    assert_eq!(first, second);
    assert_eq!(first, with("full").forward(x).expect("forward"));
    assert_eq!(plain, both().0.forward(x).expect("forward"));
    // With other adapters it is of the other type.
    group.layers_mut()[1..].iter_mut().for_each(|layer| layer.activate("rounded").expect("an adapter"));
    group.refresh().expect("copies");
    assert_eq!(group.forward(x).expect("forward")[1], with("rounded").forward(x).expect("forward"));
}

/// Layers with adapters of other ranks, one without: y, h, db and dbias as of each alone, da too, and dx their sum.
fn a_group_is_its_layers<B: Backend>(backend: &B) {
    let specs = [Spec::new(21, 24, K, 5), Spec::new(21, 16, K, 0), Spec::new(21, 40, K, 11)];
    let specs = specs.map(|spec| Spec { bias: false, placement: Placement::Contiguous, ..spec });
    let made = || specs.map(|spec| make::<B, bf16>(backend, &spec).layer);
    let (m, x) = (21, specs[0].forward::<bf16>().x);
    let (x, dys) = (Device::new(backend, &x), specs.map(|spec| Device::new(backend, &spec.backward::<bf16>().dy)));
    let (group, alone) = (LoraProjections::new(made()).unwrap_or_else(|rejected| panic!("{rejected}")), made());
    group.reserve(m).expect("a workspace");
    let (ys, pass) = group.forward_train(x.view()).expect("forward");
    assert_eq!(group.rank(), 16);
    let poison = |count| backend.upload(&vec![f32::NAN; count]).expect("an upload");
    let mut dx = backend.upload(&vec![bf16::NAN; m * K]).expect("an upload");
    let (mut da, mut db) = (poison(16 * K), specs.map(|spec| poison((spec.n * spec.r).max(1))));
    let mut layers: [LayerGradients<'_, B, bf16>; 3] = Default::default();
    for ((layer, db), spec) in layers.iter_mut().zip(&mut db).zip(&specs) {
        layer.db = (spec.r != 0).then(|| MatrixMut::new(B::write(db), spec.n, spec.r));
    }
    let gradients = ProjectionGradients {
        dx: Some(MatrixMut::new(B::write(&mut dx), m, K)),
        da: Some(MatrixMut::new(B::write(&mut da), 16, K)),
        layers,
        ..ProjectionGradients::default()
    };
    group.backward(&pass, [dys[0].view(), dys[1].view(), dys[2].view()], gradients).expect("backward");
    let (dx, da) = (download(backend, &dx, m * K), download(backend, &da, 16 * K));
    let (mut sum, mut first) = (vec![0.0f32; m * K], 0);
    for (at, layer) in alone.iter().enumerate() {
        let Spec { n, r, .. } = specs[at];
        let (y, pass) = layer.forward_train(x.view()).expect("forward");
        let same = |got: &[bf16], expected: &[bf16]| close(got, expected, 1.0 / 128.0);
        assert!(same(&download(backend, &ys[at], m * n), &download(backend, &y, m * n)), "y of layer {at}");
        let mut own_dx = backend.upload(&vec![bf16::NAN; m * K]).expect("an upload");
        let (mut own_da, mut own_db) = (poison((r * K).max(1)), poison((n * r).max(1)));
        let gradients = Gradients {
            dx: Some(MatrixMut::new(B::write(&mut own_dx), m, K)),
            da: (r != 0).then(|| MatrixMut::new(B::write(&mut own_da), r, K)),
            db: (r != 0).then(|| MatrixMut::new(B::write(&mut own_db), n, r)),
            ..Gradients::default()
        };
        layer.backward(&pass, dys[at].view(), gradients).expect("backward");
        sum.iter_mut().zip(download(backend, &own_dx, m * K)).for_each(|(sum, own)| *sum += own.to_f32());
        if r != 0 {
            let own = (download(backend, &own_da, r * K), download(backend, &own_db, n * r));
            assert!(close(&da[first * K..][..r * K], &own.0, 1e-4), "da of layer {at}");
            assert!(close(&download(backend, &db[at], n * r), &own.1, 1e-4), "db of layer {at}");
        }
        first += r;
    }
    let sum: Vec<bf16> = sum.into_iter().map(bf16::from_f32).collect();
    assert!(close(&dx, &sum, 1.0 / 32.0), "dx");
}

/// As near as `part` of the larger of 1 and the number.
fn close<T: Element>(got: &[T], expected: &[T], part: f64) -> bool {
    got.iter()
        .zip(expected)
        .all(|(got, expected)| (got.to_f64() - expected.to_f64()).abs() <= part * expected.to_f64().abs().max(1.0))
}

/// Factors of an adapter as a bank has them, A below each other and B side by side.
type Copied = (Vec<f32>, Vec<f32>);

/// A layer with adapters "full" (R = 5) and "rounded" (R = 3) in f32, "storage" (R = 9) in 16 bits, and "whole", which is all of them
/// in this order as one at full precision, each B times the ratio of its scale to 2.
fn several<B: Backend>(backend: &B) -> (LoraLinear<B, bf16>, Vec<bf16>, [Copied; 3]) {
    let (ranks, scales) = ([5, 3, 9], [2.0, 0.5, -1.0]);
    let forward = Spec { placement: Placement::Contiguous, ..Spec::new(8, N, K, 4) }.forward::<bf16>();
    let mut layer = LoraLinear::upload(backend.clone(), &forward.w.data, None, N, K).expect("a layer");
    let own = [0, 1, 2].map(|at: usize| {
        let seed = at as u64 + 40;
        let made = Spec { placement: Placement::Contiguous, seed, ..Spec::new(1, N, K, ranks[at]) };
        let made = made.forward_of::<bf16, f32>();
        let narrow = |values: Vec<f32>| match at {
            2 => values.iter().map(|&value| bf16::from_f32(value).to_f32()).collect(),
            _ => values,
        };
        (narrow(made.a.data), narrow(made.b.data))
    });
    for (at, name) in ["full", "rounded", "storage"].into_iter().enumerate() {
        let ((a, b), scaling) = (&own[at], Scaling::Fixed(scales[at]));
        let adapter = match at {
            2 => Adapter::upload(backend, ranks[at], scaling, &layers::rounded(a), &layers::rounded(b)),
            _ => Adapter::upload_f32(backend, ranks[at], scaling, a, b),
        };
        let adapter = adapter.expect("an adapter");
        layer.add(name, if at == 0 { adapter.at_full_precision() } else { adapter }).expect("added");
    }
    let a: Vec<f32> = own.iter().flat_map(|(a, _)| a.clone()).collect();
    let row = |n: usize| (0..3).flat_map(move |at| (0..ranks[at]).map(move |rank| (at, n * ranks[at] + rank)));
    let b: Vec<f32> =
        (0..N).flat_map(|n| row(n).map(|(at, index)| own[at].1[index] * (scales[at] / 2.0) as f32)).collect();
    let whole = Adapter::upload_f32(backend, 17, Scaling::Fixed(2.0), &a, &b).expect("an adapter");
    layer.add("whole", whole.at_full_precision()).expect("added");
    (layer, forward.x.data, own)
}

/// Several adapters of which one is at full precision are what one adapter of all ranks at full precision is, bit by bit.
fn several_are_as_one<B: Backend>(backend: &B) {
    let (mut layer, x, _) = several(backend);
    let x = backend.upload(&x).expect("an upload");
    let mut y = |names: &[&str]| {
        layer.activate_all(names).expect("adapters");
        let y = layer.forward(Matrix::new(B::read(&x), 8, K)).expect("forward");
        bits(&download(backend, &y, 8 * N))
    };
    assert_same(&y(&["full", "rounded", "storage"]), &y(&["whole"]), "three adapters");
    assert_ne!(y(&["rounded", "storage"]), y(&["full", "rounded", "storage"]));
}

/// A bank of which one adapter is at full precision has f32 factors, and widens the others exactly.
fn a_bank_is_in_f32<B: Backend>(backend: &B) {
    let (layer, _, own) = several(backend);
    let names = ["storage", "full", "rounded"];
    let bank = layer.bank(&names).expect("a bank");
    let rank = bank.rank();
    let Buffers::F32 { a, b, .. } = bank.buffers() else { panic!("an adapter is at full precision") };
    let (a, b) = (download(backend, a, rank * K), download(backend, b, N * rank));
    for (slot, (own_a, own_b)) in bank.slots().iter().zip([&own[2], &own[0], &own[1]]) {
        let (first, r) = (slot.first_rank, slot.ranks);
        assert_eq!(a[first * K..][..r * K], own_a[..]);
        for n in 0..N {
            assert_eq!(b[n * rank + first..][..r], own_b[n * r..][..r]);
        }
    }
    let narrow = layer.bank(&["storage", "rounded"]).expect("a bank");
    assert!(matches!(narrow.buffers(), Buffers::Storage { .. }));
}

#[test]
fn several_adapters_banks_and_groups_on_the_cpu() {
    a_group_is_its_layers(&Cpu);
    several_are_as_one(&Cpu);
    a_bank_is_in_f32(&Cpu);
}

#[cfg(all(feature = "emulator", feature = "cuda"))]
#[test]
fn several_adapters_banks_and_groups_on_the_emulator() {
    use fused_lora::emulator::Emulator;
    use fused_lora::plan::Device;
    for arch in [80, 90] {
        let emulator = Emulator::new(Device::of_arch("emulated", arch, 3));
        a_group_is_its_layers(&emulator);
        several_are_as_one(&emulator);
        a_bank_is_in_f32(&emulator);
    }
}
