//! The error matrix of what changes a layer: every method in every state that rules it out, with every argument that is wrong.

use fused_lora::cpu::Cpu;
use fused_lora::linear::{Adapter, Buffers, BuffersMut, Gradients, LoraLinear, Pass, Routes, Scaling};
use fused_lora::{Error, MAX_ROUTED_RANK, Matrix, MatrixMut, Result, Routing, Slot, bf16};

use crate::matrix::{K, M, N};
use crate::{Layer, small, snapshot};

/// What is called, and the error that it gives.
type Row<'a> = (&'static str, Box<dyn Fn(&mut Layer) -> Result<()> + 'a>, Error);

fn row<'a>(name: &'static str, call: impl Fn(&mut Layer) -> Result<()> + 'a, error: Error) -> Row<'a> {
    (name, Box::new(call), error)
}

/// Each gives its error and leaves the layer as it is.
#[track_caller]
fn refuses(layer: &mut Layer, rows: Vec<Row<'_>>) {
    let before = snapshot(layer);
    for (name, call, error) in rows {
        let got = call(layer);
        assert_eq!(got, Err(error), "{name}");
        assert!(snapshot(layer) == before, "{name} has changed the layer");
    }
}

fn state(operation: &'static str, got: &str, expected: &'static str) -> Error {
    Error::State { operation, got: got.to_owned(), expected }
}

fn unknown(got: &str) -> Error {
    Error::AdapterName { got: got.into(), expected: "\"one\" or \"other\"".into() }
}

/// Changes that must not be made.
fn never(_: BuffersMut<'_, Cpu, bf16>) -> Result<()> {
    unreachable!("called in spite of the refusal")
}

fn never_bias(_: &mut [bf16]) -> Result<()> {
    unreachable!("called in spite of the refusal")
}

#[test]
fn names_that_are_not_there_or_taken() {
    let taken = Error::AdapterName { got: "one".into(), expected: "one that the layer does not have".into() };
    let twice = Error::AdapterName { got: "one".into(), expected: "each name once".into() };
    let mut layer = small();
    let rows = || {
        let (taken, twice) = (taken.clone(), twice.clone());
        vec![
            row("activate", |layer| layer.activate("two"), unknown("two")),
            row("activate ``", |layer| layer.activate(""), unknown("")),
            row("activate_all", |layer| layer.activate_all(&["one", "two"]), unknown("two")),
            row("activate_all twice", |layer| layer.activate_all(&["one", "other", "one"]), twice),
            row("remove", |layer| layer.remove("two").map(drop), unknown("two")),
            row("update", |layer| layer.update("One", never), unknown("One")),
            row("refresh", |layer| layer.refresh("two"), unknown("two")),
            row("bank", |layer| layer.bank(&["one", "two"]).map(drop), unknown("two")),
            row("add", |layer| Ok(layer.add("one", crate::adapter(8, 6))?), taken),
        ]
    };
    refuses(&mut layer, rows());
    layer.activate_all(&["other", "one"]).expect("adapters");
    refuses(&mut layer, rows());
    layer.activate("one").expect("an adapter");
    refuses(&mut layer, rows());
    layer.disable().expect("no adapter");
    refuses(&mut layer, rows());

    let mut empty = LoraLinear::upload(Cpu, &[bf16::ONE; N * K], None, N, K).expect("a layer");
    let none = Error::AdapterName { got: "one".into(), expected: "none: the layer has no adapter".into() };
    refuses(&mut empty, vec![row("activate", |layer| layer.activate("one"), none.clone())]);
    refuses(&mut empty, vec![row("bank", |layer| layer.bank(&["one"]).map(drop), none)]);
}

/// All lengths but the right ones, in both types; what was passed comes back.
#[test]
fn factors_of_other_lengths() {
    let elements = |arg, got, expected| Error::Dimension { arg, axis: "elements", got, expected };
    let mut layer = small();
    let before = snapshot(&layer);
    let cases = [
        ((0, 6, None), elements("a", 0, 8)),
        ((7, 6, None), elements("a", 7, 8)),
        ((9, 6, None), elements("a", 9, 8)),
        ((8, 0, None), elements("b", 0, 6)),
        ((8, 5, None), elements("b", 5, 6)),
        ((8, 7, None), elements("b", 7, 6)),
        ((8, 6, Some(0)), elements("b_bias", 0, 3)),
        ((8, 6, Some(2)), elements("b_bias", 2, 3)),
        ((8, 6, Some(4)), elements("b_bias", 4, 3)),
        ((6, 8, None), elements("a", 6, 8)), // exchanged
    ];
    for ((a, b, b_bias), error) in cases {
        let storage = |len| vec![bf16::ONE; len];
        let parts: [Buffers<Cpu, bf16>; 2] = [
            Buffers::Storage { a: storage(a), b: storage(b), b_bias: b_bias.map(storage), magnitude: None },
            Buffers::F32 {
                a: vec![1.0; a],
                b: vec![1.0; b],
                b_bias: b_bias.map(|len| vec![1.0; len]),
                magnitude: None,
            },
        ];
        for buffers in parts {
            let adapter = Adapter::new(2, Scaling::Fixed(1.0), buffers).expect("an adapter");
            let rejected = layer.add("new", adapter).expect_err("a refusal");
            assert_eq!(rejected.error, error);
            let lengths = match rejected.value.into_buffers() {
                Buffers::Storage { a, b, b_bias, .. } => (a.len(), b.len(), b_bias.map(|b_bias| b_bias.len())),
                Buffers::F32 { a, b, b_bias, .. } => (a.len(), b.len(), b_bias.map(|b_bias| b_bias.len())),
            };
            assert_eq!(lengths, (a, b, b_bias), "it came back");
        }
    }
    // A bias that is put to it afterwards.
    let biased = crate::adapter(8, 6).with_b_bias(&Cpu, &[1.0; 4]).expect("an adapter");
    assert_eq!(layer.add("new", biased).map_err(Error::from), Err(elements("b_bias", 4, 3)));
    for len in [0, 2, 4] {
        let of_dora = crate::adapter(8, 6).with_magnitude(&Cpu, &vec![1.0; len]).expect("an adapter");
        let rejected = layer.add("new", of_dora).expect_err("a refusal");
        assert_eq!(rejected.error, elements("magnitude", len, 3));
        assert_eq!(rejected.value.magnitude().map(Vec::len), Some(len), "it came back");
    }
    // Ranks whose products pass what memory holds.
    let limit = isize::MAX as u64 / 8;
    for (rank, got) in [(usize::MAX, u64::MAX), (1 << 60, 1 << 62)] {
        let adapter = Adapter::upload(&Cpu, rank, Scaling::Fixed(1.0), &[], &[]).expect("an adapter");
        let too_large = Error::TooLarge { what: "the number of elements of a", got, limit };
        assert_eq!(layer.add("new", adapter).map_err(Error::from), Err(too_large));
    }
    assert!(snapshot(&layer) == before, "the layer has changed");
}

#[test]
fn scales_that_are_not_finite() {
    let infinite = f64::INFINITY;
    for scaling in [
        Scaling::Fixed(infinite),
        Scaling::Fixed(-infinite),
        Scaling::Fixed(f64::MAX),
        Scaling::Lora { alpha: infinite },
        Scaling::Lora { alpha: 1e39 },
        Scaling::RsLora { alpha: -infinite },
        Scaling::RsLora { alpha: 1e40 },
    ] {
        let got = scaling.scale(2);
        let (a, b) = (vec![bf16::ONE; 8], vec![bf16::ONE; 6]);
        let buffers = || Buffers::<Cpu, bf16>::Storage { a: a.clone(), b: b.clone(), b_bias: None, magnitude: None };
        let rejected = Adapter::new(2, scaling, buffers()).expect_err("a refusal");
        assert_eq!(rejected.error, Error::Scale { arg: "scale", got }, "{scaling:?}");
        assert!(matches!(rejected.value, Buffers::Storage { a, .. } if a.len() == 8), "it came back");
        assert_eq!(
            Adapter::<Cpu, bf16>::upload_f32(&Cpu, 2, scaling, &[], &[]).map(drop),
            Err(Error::Scale { arg: "scale", got })
        );
    }
    for scaling in [Scaling::Fixed(f64::NAN), Scaling::Lora { alpha: f64::NAN }, Scaling::RsLora { alpha: f64::NAN }] {
        let refused = Adapter::<Cpu, bf16>::upload(&Cpu, 2, scaling, &[], &[]).map(drop);
        assert!(matches!(refused, Err(Error::Scale { arg: "scale", got }) if got.is_nan()), "{scaling:?}");
    }
}

fn x(data: &[bf16]) -> Matrix<'_, [bf16]> {
    Matrix::new(data, M, K)
}

/// Everything that a layer's state rules out, state by state.
#[test]
fn states_that_rule_a_method_out() {
    let mut layer = small();
    let data = vec![bf16::ONE; M * K];
    let none = |operation| state(operation, "no adapter is active", "`activate` first");
    let idle = || {
        vec![
            row("merge", Layer::merge, none("merge")),
            row("merge_for_good", |layer| layer.merge_for_good().map(drop), none("merge_for_good")),
            row("unmerge", Layer::unmerge, state("unmerge", "no adapter is merged", "`merge` first")),
            row(
                "update_bias",
                |layer| layer.update_bias(never_bias),
                state("update_bias", "the layer has no bias", "a layer made with one"),
            ),
        ]
    };
    refuses(&mut layer, idle());
    layer.activate("one").expect("an adapter");
    let active = |operation, name: &str| {
        state(operation, &format!("adapter `{name}` is active"), "`disable` or another `activate` first")
    };
    refuses(&mut layer, vec![row("remove", |layer| layer.remove("one").map(drop), active("remove", "one"))]);
    layer.disable().expect("no adapter");
    refuses(&mut layer, idle());

    layer.activate_all(&["one", "other"]).expect("adapters");
    let several = |operation| state(operation, "`one`, `other` are active", "`activate` of one adapter first");
    refuses(
        &mut layer,
        vec![
            row("forward_train", |layer| layer.forward_train(x(&data)).map(drop), several("forward_train")),
            row("remove", |layer| layer.remove("other").map(drop), active("remove", "other")),
        ],
    );
    layer.activate("one").expect("an adapter");
    let (_, pass) = layer.forward_train(x(&data)).expect("a pass");
    layer.merge().expect("a merge");
    let merged = |operation| state(operation, "`one` is merged", "`unmerge` first");
    refuses(&mut layer, while_merged(&data, &pass, merged));
}

fn while_merged<'a>(
    data: &'a [bf16],
    pass: &'a Pass<'a, Cpu, bf16>,
    merged: fn(&'static str) -> Error,
) -> Vec<Row<'a>> {
    let routed = move |layer: &Layer| {
        let bank = layer.bank(&["other"])?;
        let routes = Routes::upload(&Cpu, &Routing::new(bank.slots(), &[Some(0), None])?)?;
        layer.forward_routed(x(data), &bank, &routes).map(drop)
    };
    let backward = move |layer: &Layer| {
        let mut dx = vec![bf16::ONE; M * K];
        let gradients = Gradients { dx: Some(MatrixMut::new(&mut dx[..], M, K)), ..Gradients::default() };
        layer.backward(pass, Matrix::new(&[bf16::ONE; M * N][..], M, N), gradients)
    };
    vec![
        row("merge", Layer::merge, merged("merge")),
        row("activate", |layer| layer.activate("other"), merged("activate")),
        row("activate, unknown", |layer| layer.activate("two"), merged("activate")),
        row("activate_all", |layer| layer.activate_all(&["one", "other"]), merged("activate_all")),
        row("activate_all of none", |layer| layer.activate_all(&[]), merged("activate_all")),
        row("disable", Layer::disable, merged("disable")),
        row("enable", Layer::enable, merged("enable")),
        row("update", |layer| layer.update("one", never), merged("update")),
        row("update_bias", |layer| layer.update_bias(never_bias), merged("update_bias")),
        row(
            "remove",
            |layer| layer.remove("one").map(drop),
            state("remove", "adapter `one` is active", "`disable` or another `activate` first"),
        ),
        row("forward_train", move |layer| layer.forward_train(x(data)).map(drop), merged("forward_train")),
        row("backward", move |layer| backward(layer), merged("backward")),
        row("forward_routed", move |layer| routed(layer), merged("forward_routed")),
    ]
}

/// Banks and routes: each adapter that is wrong is named.
#[test]
fn banks_that_do_not_fit_name_the_adapter() {
    let data = vec![bf16::ONE; M * K];
    let fresh = || {
        let layer = small();
        let bank = layer.bank(&["one", "other"]).expect("a bank");
        let routing = Routing::new(bank.slots(), &[Some(1), None]).expect("a routing");
        (layer, bank, Routes::upload(&Cpu, &routing).expect("an upload"))
    };
    let refused = |operation, got: &str, expected| Err(state(operation, got, expected));
    let forward = |layer: &Layer, bank: &_, routes: &_| {
        let mut y = vec![bf16::from_f32(9.0); M * N];
        let allocated = layer.forward_routed(x(&data), bank, routes).map(drop);
        let got = layer.forward_routed_into(x(&data), bank, routes, MatrixMut::new(&mut y[..], M, N));
        assert_eq!(allocated, got);
        assert!(got.is_ok() || y.iter().all(|&y| y == bf16::from_f32(9.0)), "written in spite of {got:?}");
        got
    };
    let (mut layer, bank, routes) = fresh();
    assert_eq!(forward(&layer, &bank, &routes), Ok(()));
    assert_eq!(layer.bank(&["one", "one"]).map(|bank| bank.slots().len()), Ok(2), "twice is no fault");
    let foreign = small();
    let gone = "adapter `one` of the bank is not in the layer";
    assert_eq!(forward(&foreign, &bank, &routes), refused("forward_routed", gone, "`bank` anew first"));
    layer.refresh("other").expect("a change");
    let changed = "adapter `other` has changed since it was copied to the bank";
    assert_eq!(forward(&layer, &bank, &routes), refused("forward_routed", changed, "`refresh_bank` first"));
    layer.remove("one").expect("an adapter");
    assert_eq!(forward(&layer, &bank, &routes), refused("forward_routed", gone, "`bank` anew first"));

    let (layer, bank, _) = fresh();
    let upload = |slots: &[Slot], ids: &[Option<usize>]| {
        Routes::upload(&Cpu, &Routing::new(slots, ids).expect("a routing")).expect("an upload")
    };
    let slots = bank.slots();
    let anew = "routes of the bank's `slots`";
    for (at, change) in [
        (1, Slot { scale: -slots[1].scale, ..slots[1] }),
        (1, Slot { ranks: slots[1].ranks + 1, ..slots[1] }),
        (0, Slot { first_rank: 1, ..slots[0] }),
    ] {
        let mut other = slots.to_vec();
        other[at] = change;
        let got = format!(
            "the routes were made for another rank or scale of adapter `{}` than the bank's",
            ["one", "other"][at]
        );
        assert_eq!(forward(&layer, &bank, &upload(&other, &[None; M])), refused("forward_routed", &got, anew));
    }
    for count in [0, 1] {
        let got = format!("the routes were made for {count} adapters, the bank has 2");
        let fewer = upload(&slots[..count], &[None; M]);
        assert_eq!(forward(&layer, &bank, &fewer), refused("forward_routed", &got, anew));
    }
    for rows in [1, 3] {
        let dimension = Error::Dimension { arg: "routes", axis: "rows", got: rows, expected: M };
        assert_eq!(forward(&layer, &bank, &upload(slots, &vec![Some(0); rows])), Err(dimension));
    }
    let none = layer.bank(&[]).expect("a bank of none");
    assert_eq!(forward(&layer, &none, &upload(&[], &[None; M])), Ok(()));
}

#[test]
fn adapters_that_no_bank_takes() {
    let mut layer = small();
    let biased = crate::adapter(8, 6).with_b_bias(&Cpu, &[1.0; N]).expect("an adapter");
    layer.add("biased", biased).expect("an adapter");
    let ones = |len| vec![bf16::ONE; len];
    let wide = Adapter::upload(&Cpu, 4080, Scaling::Fixed(1.0), &ones(4080 * K), &ones(N * 4080));
    layer.add("wide", wide.expect("an adapter")).expect("an adapter");
    let expected = "adapters without one: forward adds the same bias to every row";
    let limit = MAX_ROUTED_RANK as u64;
    let too_large = Error::TooLarge { what: "the rank of a bank of adapters", got: 4112, limit };
    let rows = vec![
        row(
            "a bias on B",
            |layer| layer.bank(&["one", "biased"]).map(drop),
            state("bank", "adapter `biased` has a bias on B", expected),
        ),
        row("too many ranks", |layer| layer.bank(&["one", "wide", "other"]).map(drop), too_large),
    ];
    refuses(&mut layer, rows);
    assert_eq!(layer.bank(&["one", "wide"]).map(|bank| bank.rank()), Ok(MAX_ROUTED_RANK));
}
