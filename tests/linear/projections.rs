//! Layers that share x: against the oracle, bit by bit as layers alone, and what they refuse.

use std::array;
use std::sync::Arc;

use fused_lora::cpu::Cpu;
use fused_lora::linear::{
    Adapter, Backend, BuffersMut, LayerGradients, LoraLinear, LoraProjections, Magnitude, ProjectionGradients,
    Rejected, Scaling, Training,
};
use fused_lora::{Dropout, Element, Error, Matrix, MatrixMut, Result, Seed, bf16, f16};

use crate::common::data::Spec;
use crate::common::layers::{Device, bits, compact, download};
use crate::common::shared::{self, SharedBackward, SharedForward, SharedSpec};
use crate::common::{Host, HostDropout, HostForward, HostGradient};
use crate::matrix::host;

type Group<B, T, const P: usize> = LoraProjections<B, T, P>;

/// A layer with an adapter of its factors, which are f32 where `wide` is set.
fn layer<B: Backend, T: Element>(backend: &B, op: &HostForward<T>, wide: bool) -> LoraLinear<B, T> {
    let w = compact(&op.w).data;
    let bias = op.bias.as_ref().map(|bias| compact(bias).data);
    let mut layer = LoraLinear::upload(backend.clone(), &w, bias.as_deref(), op.w.rows, op.w.cols).expect("a layer");
    with_adapter(backend, &mut layer, op, wide);
    layer
}

fn with_adapter<B: Backend, T: Element>(backend: &B, layer: &mut LoraLinear<B, T>, op: &HostForward<T>, wide: bool) {
    let [a, b] = [&op.a, &op.b].map(|host| compact(host).data);
    let f32 = |factor: &[T]| factor.iter().map(|value| value.to_f32()).collect::<Vec<_>>();
    let scaling = Scaling::Fixed(f64::from(op.scale));
    let adapter = match wide {
        true => Adapter::upload_f32(backend, op.a.rows, scaling, &f32(&a), &f32(&b)),
        false => Adapter::upload(backend, op.a.rows, scaling, &a, &b),
    };
    layer.add("one", adapter.expect("an adapter")).expect("an added adapter");
    layer.activate("one").expect("an adapter");
}

fn group<B: Backend, T: Element, const P: usize>(backend: &B, op: &SharedForward<T>) -> Group<B, T, P> {
    let layers = array::from_fn(|at| layer(backend, &op.own[at], at % 2 == 1));
    LoraProjections::new(layers).expect("layers that share x")
}

fn plain<T: Element>(rows: usize, cols: usize, data: Vec<T>) -> Host<T> {
    Host { rows, cols, offset: 0, row_stride: cols, data }
}

fn trained<B: Backend<Words = [u64]>, T: Element, const P: usize>(backend: &B, spec: &SharedSpec, same_bits: bool) {
    let mut before = spec.forward::<T>();
    let group = group::<B, T, P>(backend, &before);
    let (m, rank) = (spec.base.m, group.rank());
    group.reserve(m).expect("a workspace");
    let x = Device::new(backend, &before.own[0].x);
    let dropout = before.own[0].dropout;
    let training = |recompute| Training { dropout: dropout.as_ref().map(HostDropout::view), recompute };

    let mut ys: [Device<B, T>; P] = array::from_fn(|at| Device::new(backend, &before.own[at].y));
    let pass = group.forward_train_with_into(x.view(), ys.each_mut().map(Device::view_mut), training(false));
    let pass = pass.expect("forward");
    let h = pass.h().map_or_else(Vec::new, |h| download(backend, h, m * rank));
    before.h = Some(plain(m, rank, vec![T::from_f32(f32::NAN); m * rank]));
    let mut after = SharedForward { h: Some(plain(m, rank, h)), ..before.clone() };
    for (op, y) in after.own.iter_mut().zip(&ys) {
        op.y = y.download(backend);
    }
    shared::judge_forward(&before, &after, spec.base.values).expect("forward");
    let again = group.forward_train_with(x.view(), training(true)).expect("forward");
    for (at, (y, again)) in ys.iter().zip(&again.0).enumerate() {
        let (y, n) = (bits(&compact(&y.download(backend)).data), spec.parts[at].0);
        assert_eq!(y, bits(&download(backend, again, m * n)), "new buffers and given ones: {at}");
        let alone = group.layers()[at].forward_train_with(x.view(), training(false)).expect("forward alone").0;
        assert!(!same_bits || y == bits(&download(backend, &alone, m * n)), "layer {at} alone, {spec:?}");
    }

    let start = start(spec, &before, after.h.clone());
    let end = backward(backend, &group, &pass, &start);
    shared::judge_backward(&start, &end, spec.base.values).expect("backward");
    let outputs = |op: &SharedBackward<T>| {
        let own: Vec<_> = op.own.iter().map(|op| (&op.db, &op.dbias)).collect();
        format!("{:?}", (&op.dx, &op.da, own))
    };
    let recomputed = backward(backend, &group, &again.1, &start);
    assert!(!same_bits || outputs(&end) == outputs(&recomputed), "h computed again, {spec:?}");
    shared::judge_backward(&start, &recomputed, spec.base.values).expect("backward with h computed again");
}

/// Backward of what forward was, with f32 gradients.
fn start<T: Element>(spec: &SharedSpec, forward: &SharedForward<T>, h: Option<Host<T>>) -> SharedBackward<T> {
    let in_f32 = |gradient: &Option<HostGradient<T>>| gradient.as_ref().map(|it| HostGradient::F32(it.to_f32()));
    let mut start = spec.backward::<T>();
    (start.a, start.h, start.da) = (forward.a.clone(), h, in_f32(&start.da));
    for (op, from) in start.own.iter_mut().zip(&forward.own) {
        (op.w, op.a, op.b) = (from.w.clone(), from.a.clone(), from.b.clone());
        (op.x, op.dropout) = (Some(from.x.clone()), from.dropout);
        (op.db, op.dbias) = (in_f32(&op.db), in_f32(&op.dbias));
    }
    start
}

fn backward<B: Backend, T: Element, const P: usize>(
    backend: &B,
    group: &Group<B, T, P>,
    pass: &fused_lora::linear::Pass<'_, B, T>,
    start: &SharedBackward<T>,
) -> SharedBackward<T> {
    let device = |gradient: &Option<HostGradient<T>>| match gradient {
        Some(HostGradient::F32(host)) => Some(Device::new(backend, host)),
        _ => None,
    };
    let dys: [_; P] = array::from_fn(|at| Device::new(backend, &start.own[at].dy));
    let mut dx = start.dx.as_ref().map(|dx| Device::new(backend, dx));
    let mut da = device(&start.da);
    let mut layers: [_; P] = array::from_fn(|at| (device(&start.own[at].db), device(&start.own[at].dbias)));
    let gradients = ProjectionGradients {
        dx: dx.as_mut().map(Device::view_mut),
        da: da.as_mut().map(Device::view_mut),
        layers: layers.each_mut().map(|(db, dbias)| LayerGradients {
            db: db.as_mut().map(Device::view_mut),
            dbias: dbias.as_mut().map(Device::view_mut),
            dm: None,
        }),
        accumulate: start.own[0].accumulate,
    };
    group.backward(pass, dys.each_ref().map(Device::view), gradients).expect("backward");
    let f32 = |out: &Option<Device<B, f32>>| out.as_ref().map(|out| HostGradient::F32(out.download(backend)));
    let mut end = start.clone();
    (end.dx, end.da) = (dx.map(|dx| dx.download(backend)), f32(&da));
    for (op, (db, dbias)) in end.own.iter_mut().zip(&layers) {
        (op.db, op.dbias) = (f32(db), f32(dbias));
    }
    end
}

/// Every case of the operations, less DoRA, whose gain is the layer's own affair.
fn as_the_oracle<B: Backend<Words = [u64]>, T: Element>(backend: &B, same_bits: bool) {
    for mut spec in shared::table() {
        spec.base = Spec { dora: false, ..spec.base };
        match spec.parts.len() {
            1 => trained::<B, T, 1>(backend, &spec, same_bits),
            2 => trained::<B, T, 2>(backend, &spec, same_bits),
            3 => trained::<B, T, 3>(backend, &spec, same_bits),
            _ => trained::<B, T, 4>(backend, &spec, same_bits),
        }
    }
}

#[test]
fn layers_that_share_x_are_those_of_the_oracle() {
    as_the_oracle::<_, f32>(&Cpu, true);
    as_the_oracle::<_, bf16>(&Cpu, true);
    as_the_oracle::<_, f16>(&Cpu, true);
}

#[cfg(all(feature = "emulator", feature = "cuda"))]
#[test]
fn emulated_layers_that_share_x_are_those_of_the_oracle() {
    let device = fused_lora::plan::Device::of_arch("emulated", 80, 3);
    as_the_oracle::<_, bf16>(&fused_lora::emulator::Emulator::new(device), false);
}

const M: usize = 2;
const K: usize = 4;
const SHAPES: [(usize, usize); 3] = [(3, 2), (5, 3), (1, 1)];

/// N and R of [`SHAPES`], a bias, and adapters "one", which is f32, "other" and, where it is the second layer, "dora".
fn small() -> Group<Cpu, bf16, 3> {
    let mut spec = SharedSpec::new(M, K, &SHAPES);
    spec.base.bias = true;
    let layers: [_; 3] = array::from_fn(|at| {
        let mut layer = layer(&Cpu, &spec.part(at).forward::<bf16>(), true);
        let other = Spec { seed: 7, ..spec.part(at) }.forward::<bf16>();
        let adapter = |op: &HostForward<bf16>| {
            let (a, b) = (compact(&op.a).data, compact(&op.b).data);
            Adapter::upload(&Cpu, op.a.rows, Scaling::Fixed(0.5), &a, &b).expect("an adapter")
        };
        layer.add("other", adapter(&other)).expect("an added adapter");
        if at == 1 {
            layer.add_dora("dora", adapter(&other)).expect("an added adapter");
        }
        layer
    });
    LoraProjections::new(layers).expect("layers that share x")
}

pub fn values(rows: usize, cols: usize) -> Vec<bf16> {
    (0..rows * cols).map(|at| bf16::from_f32((at as f32 * 0.7).sin())).collect()
}

/// What forward gives, each layer as if alone.
#[track_caller]
fn same_as_alone(group: &Group<Cpu, bf16, 3>, what: &str) {
    let x = values(M, K);
    let x = Matrix::new(&x[..], M, K);
    let alone = group.layers().each_ref().map(|layer| layer.forward(x).expect("forward alone"));
    assert_eq!(group.forward(x).expect("forward"), alone, "{what}");
}

#[test]
fn whatever_layers_can_is_computed_after_a_refresh() {
    type Change = fn(&mut [LoraLinear<Cpu, bf16>; 3]) -> Result<()>;
    let changes: [(&str, Change); 9] = [
        ("an update", |layers| {
            layers[1].update("one", |factors| {
                if let BuffersMut::F32 { a, .. } = factors {
                    a.iter_mut().for_each(|a| *a *= 0.5);
                }
                Ok(())
            })
        }),
        ("another adapter of the same rank", |layers| layers[0].activate("other")),
        ("several", |layers| layers[2].activate_all(&["one", "other"])),
        ("several that change", |layers| layers[2].refresh("other")),
        ("DoRA", |layers| layers[1].activate("dora")),
        ("none", |layers| layers[0].disable()),
        ("one merged", |layers| layers[2].merge()),
        ("all merged", |layers| layers[1].merge()),
        ("unmerged", |layers| layers[1].unmerge().and_then(|()| layers[2].unmerge())),
    ];
    let mut group = small();
    same_as_alone(&group, "at first");
    let x = values(M, K);
    for (what, change) in changes {
        change(group.layers_mut()).expect(what);
        let stale = group.forward(Matrix::new(&x[..], M, K));
        let is_refused = |error: &Error| crate::state(error, "forward") && error.to_string().contains("in layer");
        assert!(stale.is_err_and(|error| is_refused(&error)), "{what}");
        group.refresh().expect(what);
        same_as_alone(&group, what);
    }
}

/// Gradients of DoRA beside plain layers: those of layers alone.
#[test]
fn a_magnitude_beside_other_layers() {
    let mut group = small();
    group.layers_mut()[1].activate("dora").expect("an adapter");
    group.refresh().expect("copies");
    let x = values(M, K);
    let x = Matrix::new(&x[..], M, K);
    let dys = SHAPES.map(|(n, _)| values(M, n));
    let (n, r) = SHAPES[1];
    let dy = |at: usize| Matrix::new(&dys[at][..], M, SHAPES[at].0);
    let [mut db, mut dm, mut db_alone, mut dm_alone] = [n * r, n, n * r, n].map(|len| vec![0.0f32; len]);
    let no_dropout = Training { dropout: Some(Dropout { p: 0.0, seed: SEED }), recompute: false };
    let (ys, pass) = group.forward_train_with(x, no_dropout).expect("forward");
    let mut gradients = ProjectionGradients::default();
    let y = Matrix::new(&ys[1][..], M, n);
    let magnitude = |dm| Magnitude { y, dm: MatrixMut::new(dm, 1, n) };
    gradients.layers[1].db = Some(MatrixMut::new(&mut db[..], n, r));
    gradients.layers[1].dm = Some(magnitude(&mut dm[..]));
    group.backward(&pass, [dy(0), dy(1), dy(2)], gradients).expect("backward");
    let layer = &group.layers()[1];
    let (_, pass) = layer.forward_train(x).expect("forward");
    let db_out = Some(MatrixMut::new(&mut db_alone[..], n, r));
    let dm_out = Some(magnitude(&mut dm_alone[..]));
    let gradients = fused_lora::linear::Gradients { db: db_out, dm: dm_out, ..Default::default() };
    layer.backward(&pass, dy(1), gradients).expect("backward");
    assert_eq!((db, dm), (db_alone, dm_alone));
}

const SEED: Seed<'static, [u64]> = Seed::Value { seed: 1, offset: 2 };

#[test]
fn groups_that_are_none() {
    fn refused<const P: usize>(layers: [LoraLinear<Cpu, bf16>; P]) -> Error {
        let Rejected { error, value } = LoraProjections::new(layers).map(drop).expect_err("a refusal");
        assert_eq!(value.len(), P, "they came back");
        error
    }
    let layer = |k: usize| LoraLinear::upload(Cpu, &values(3, k), None, 3, k).expect("a layer");
    assert_eq!(refused::<0>([]), Error::Projections { got: 0, limit: 4 });
    assert_eq!(refused([4; 5].map(layer)), Error::Projections { got: 5, limit: 4 });
    let columns = |arg, got| Error::Dimension { arg, axis: "columns", got, expected: 4 };
    assert_eq!(refused([4, 5].map(layer)), columns("w of projection 1", 5));
    assert_eq!(refused([4, 4, 4, 3].map(layer)), columns("w of projection 3", 3));
}

/// Every matrix that is wrong is named with the layer's number, and nothing is written.
#[test]
fn matrices_that_are_wrong() {
    let group = small();
    let dimension = |arg, axis, got, expected| Error::Dimension { arg, axis, got, expected };
    let (x, nine) = (host(M, K, bf16::ONE), bf16::from_f32(9.0));
    let outputs = || SHAPES.map(|(n, _)| host(M, n, nine));
    type Spoil = (fn(&mut [Host<bf16>; 3]), Error);
    let rows: [Spoil; 5] = [
        (|ys| ys[0].rows = 1, dimension("y of projection 0", "rows", 1, M)),
        (|ys| ys[1].cols = 4, dimension("y of projection 1", "columns", 4, 5)),
        (|ys| ys[1].row_stride = 4, Error::Stride { arg: "y of projection 1", got: 4, min: 5 }),
        (|ys| ys[2].rows = 3, dimension("y of projection 2", "rows", 3, M)),
        (
            |ys| ys[1].data.truncate(14),
            Error::BufferTooShort { arg: "y of projection 1", got: 14, needed: 2 + (M - 1) * 8 + 5 },
        ),
    ];
    for (spoil, error) in rows {
        let mut ys = outputs();
        spoil(&mut ys);
        let before = ys.each_ref().map(|y| y.data.clone());
        let inference = group.forward_into(x.view(), ys.each_mut().map(Host::view_mut));
        assert_eq!(inference, Err(error.clone()));
        let training = group.forward_train_with_into(x.view(), ys.each_mut().map(Host::view_mut), Training::default());
        assert_eq!(training.map(drop), Err(error));
        assert!(ys.each_ref().map(|y| y.data.clone()) == before, "something was written");
    }
    let wide = host(M, K + 1, bf16::ONE);
    assert_eq!(group.forward(wide.view()).map(drop), Err(dimension("x", "columns", 5, 4)));
    assert_eq!(group.forward_train(wide.view()).map(drop), Err(dimension("x", "columns", 5, 4)));

    let (_, pass) = group.forward_train(x.view()).expect("forward");
    let rank = group.rank();
    type Change = (fn(&mut [Host<bf16>; 3], &mut Host<f32>, &mut [Host<f32>; 3]), Error);
    let rows: [Change; 6] = [
        (|dys, _, _| dys[1].rows = 1, dimension("dy of projection 1", "rows", 1, M)),
        (|dys, _, _| dys[2].cols = 2, dimension("dy of projection 2", "columns", 2, 1)),
        (|_, da, _| da.rows = 5, dimension("da", "rows", 5, 6)),
        (|_, da, _| da.cols = 3, dimension("da", "columns", 3, 4)),
        (|_, _, dbs| dbs[1].cols = 2, dimension("db of projection 1", "columns", 2, 3)),
        (|_, _, dbs| dbs[0].rows = 2, dimension("db of projection 0", "rows", 2, 3)),
    ];
    for (spoil, error) in rows {
        let mut dys = SHAPES.map(|(n, _)| host(M, n + 1, bf16::ONE));
        dys.iter_mut().for_each(|dy| dy.cols -= 1);
        let (mut da, mut dbs) = (host(rank, K, 9.0), SHAPES.map(|(n, r)| host(n, r, 9.0)));
        spoil(&mut dys, &mut da, &mut dbs);
        let mut gradients =
            ProjectionGradients { da: Some(da.view_mut()), ..ProjectionGradients::<'_, Cpu, bf16, 3>::default() };
        for (of, db) in gradients.layers.iter_mut().zip(&mut dbs) {
            of.db = Some(db.view_mut());
        }
        assert_eq!(group.backward(&pass, dys.each_ref().map(Host::view), gradients), Err(error));
        let untouched = da.data.iter().chain(dbs.iter().flat_map(|db| &db.data)).all(|&value| value == 9.0);
        assert!(untouched, "something was written");
    }
}

/// What the state of a layer rules out, which is named; the pass stays good.
#[test]
fn states_that_are_wrong() {
    let x = host(M, K, bf16::ONE);
    let dys = SHAPES.map(|(n, _)| host(M, n, bf16::ONE));
    let state = |operation, got: &str, expected| Error::State { operation, got: got.to_owned(), expected };
    let dropout = Training { dropout: Some(Dropout { p: 0.25, seed: SEED }), recompute: false };
    let mut group = small();
    let train = |group: &Group<Cpu, bf16, 3>| group.forward_train(x.view()).map(drop);
    let mut layer = |at: usize, change: &dyn Fn(&mut LoraLinear<Cpu, bf16>) -> Result<()>| {
        change(&mut group.layers_mut()[at]).expect("a change");
        group.refresh().expect("copies");
        train(&group)
    };
    let merged = state("forward_train", "in layer 2 `one` is merged", "`unmerge` first");
    assert_eq!(layer(2, &LoraLinear::merge), Err(merged));
    assert_eq!(layer(2, &LoraLinear::unmerge), Ok(()));
    let several = state("forward_train", "in layer 1 `one`, `other` are active", "`activate` of one adapter first");
    assert_eq!(layer(1, &|layer| layer.activate_all(&["one", "other"])), Err(several));
    assert_eq!(layer(1, &|layer| layer.activate("dora")), Ok(()));
    let dropped = state(
        "forward_train",
        "in layer 1 adapter `dora` has a magnitude (DoRA) and dropout is 0.25",
        "dropout of 0: together they are not computed",
    );
    assert_eq!(group.forward_train_with(x.view(), dropout).map(drop), Err(dropped));
    group.layers_mut()[1].activate("one").expect("an adapter");
    group.refresh().expect("copies");
    let (_, pass) = group.forward_train_with(x.view(), dropout).expect("forward");

    let backward = |group: &Group<Cpu, bf16, 3>, pass: &_| {
        let mut dx = host(M, K, bf16::ONE);
        let gradients = ProjectionGradients { dx: Some(dx.view_mut()), ..Default::default() };
        let outcome = group.backward(pass, dys.each_ref().map(Host::view), gradients);
        assert!(outcome.is_ok() || dx.data == host(M, K, bf16::ONE).data, "something was written");
        outcome
    };
    assert_eq!(backward(&group, &pass), Ok(()));
    let kept = pass.into_kept();
    group.layers_mut()[0].activate("other").expect("an adapter");
    let pass = kept.with(x.view()).expect("the same x");
    assert_eq!(backward(&group, &pass), Ok(()), "of what was copied");
    group.refresh().expect("copies");
    let copied = state(
        "backward",
        "in layer 0 another adapter takes part than was copied, or it has changed",
        "`refresh` first, and a pass of the adapters that it copied",
    );
    assert_eq!(backward(&group, &pass), Err(copied));
    group.layers_mut()[2].refresh("one").expect("copies");
    let changed = state(
        "backward",
        "in layer 2 the pass is of an adapter that was changed or removed since",
        "a pass of this layer as it is",
    );
    assert_eq!(backward(&group, &pass), Err(changed));
    let alone = group.layers()[0].forward_train(x.view()).expect("forward").1;
    let count = state("backward", "the pass is of 1 layers that share x, not of 3", "a pass of as many");
    assert_eq!(backward(&group, &alone), Err(count));
    let mut magnitude = ProjectionGradients::default();
    let (y, mut dm) = (host(M, 3, bf16::ONE), host(1, 3, 9.0f32));
    magnitude.layers[0].dm = Some(Magnitude { y: y.view(), dm: dm.view_mut() });
    group.refresh().expect("copies");
    let (_, pass) = group.forward_train(x.view()).expect("forward");
    let without = state("backward", "in layer 0 dm is asked for", "a pass of an adapter with a magnitude (DoRA)");
    assert_eq!(group.backward(&pass, dys.each_ref().map(Host::view), magnitude), Err(without));
}

/// Rows of one weight, which several layers share: all that layers do is what it is for a weight of their own.
#[test]
fn rows_of_one_weight() {
    let spec = SharedSpec::new(M, K, &SHAPES);
    let op = spec.forward::<bf16>();
    let rows = SHAPES.iter().map(|(n, _)| n).sum::<usize>();
    let w: Vec<bf16> = op.own.iter().flat_map(|op| compact(&op.w).data).collect();
    let w = Arc::new(w);
    let mut first = [0; 3];
    (first[1], first[2]) = (SHAPES[0].0, SHAPES[0].0 + SHAPES[1].0);
    let of_rows = |at: usize| -> LoraLinear<Cpu, bf16> {
        let bias = op.own[at].bias.as_ref().map(|bias| compact(bias).data);
        let mut of_rows = LoraLinear::of_rows(Cpu, &w, first[at], bias, SHAPES[at].0, K).expect("a layer");
        with_adapter(&Cpu, &mut of_rows, &op.own[at], at == 1);
        assert_eq!(of_rows.weight_offset(), first[at] * K);
        of_rows
    };
    let own: [_; 3] = array::from_fn(|at| layer(&Cpu, &op.own[at], at == 1));
    let (mut shared, mut own) = (
        LoraProjections::new(array::from_fn(of_rows)).expect("layers that share x"),
        LoraProjections::new(own).expect("layers that share x"),
    );
    let x = values(M, K);
    let x = Matrix::new(&x[..], M, K);
    let same = |shared: &Group<Cpu, bf16, 3>, own: &Group<Cpu, bf16, 3>, what: &str| {
        assert_eq!(shared.forward(x), own.forward(x), "{what}");
        same_as_alone(shared, what);
    };
    same(&shared, &own, "at first");
    type Change = fn(&mut LoraLinear<Cpu, bf16>) -> Result<()>;
    let changes: [(&str, Change); 5] = [
        ("DoRA", |layer| {
            let rank = layer.adapter("one").map_or(0, Adapter::rank);
            let (n, k) = (layer.out_features(), layer.in_features());
            let adapter = Adapter::upload(&Cpu, rank, Scaling::Fixed(0.5), &values(rank, k), &values(n, rank))?;
            layer.add_dora("dora", adapter)?;
            layer.activate("dora")
        }),
        ("merged", LoraLinear::merge),
        ("unmerged", LoraLinear::unmerge),
        ("merged for good", |layer| layer.merge_for_good().map(drop)),
        ("another adapter", |layer| layer.activate("one")),
    ];
    for (what, change) in changes {
        for group in [&mut shared, &mut own] {
            group.layers_mut().iter_mut().try_for_each(change).expect(what);
            group.refresh().expect(what);
        }
        same(&shared, &own, what);
    }
    assert_eq!(w[..], op.own.iter().flat_map(|op| compact(&op.w).data).collect::<Vec<_>>(), "the shared weight");
    assert_eq!(shared.layers().each_ref().map(LoraLinear::weight_offset), [0; 3]);

    let refused = |first, bias: Option<usize>, n, k| {
        let bias = bias.map(|bias| vec![bf16::ONE; bias]);
        LoraLinear::of_rows(Cpu, &w, first, bias, n, k).map(drop).expect_err("a refusal")
    };
    let short = |needed| Error::BufferTooShort { arg: "w", got: rows * K, needed };
    assert_eq!(refused(rows, None, 1, K), short((rows + 1) * K));
    assert_eq!(refused(0, None, rows + 1, K), short((rows + 1) * K));
    assert_eq!(refused(1, None, 0, K), Error::ZeroDimension { arg: "w", axis: "rows" });
    assert_eq!(refused(1, None, 1, 0), Error::ZeroDimension { arg: "w", axis: "columns" });
    let elements = Error::Dimension { arg: "bias", axis: "elements", got: 2, expected: 3 };
    assert_eq!(refused(0, Some(2), 3, K), elements);
    let (what, limit) = ("the number of elements of w", isize::MAX as u64 / 8);
    assert_eq!(refused(usize::MAX, None, 1, K), Error::TooLarge { what, got: u64::MAX, limit });
}
