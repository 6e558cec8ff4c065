//! Groups whose layers are exchanged for others, and passes that are not theirs.

use fused_lora::cpu::Cpu;
use fused_lora::linear::{
    Adapter, Gradients, LoraLinear, LoraProjections, Magnitude, ProjectionGradients, Routes, Scaling, Training,
};
use fused_lora::{Error, Matrix, Routing, bf16};

use crate::matrix::host;
use crate::projections::values;

const M: usize = 3;
const K: usize = 5;

/// A pass through a bank is its layer's, and not of the adapter that happens to be active.
#[test]
fn a_pass_through_a_bank_is_not_the_groups() {
    let mut layer = LoraLinear::upload(Cpu, &values(3, K), None, 3, K).expect("a layer");
    let adapter = || Adapter::upload(&Cpu, 2, Scaling::Fixed(0.5), &values(2, K), &values(3, 2)).expect("an adapter");
    layer.add("one", adapter()).expect("an added adapter");
    layer.add_dora("dora", adapter()).expect("an added adapter");
    layer.activate("dora").expect("an adapter");
    let group = LoraProjections::new([layer]).expect("a group");
    let layer = &group.layers()[0];
    let bank = layer.bank(&["one"]).expect("a bank");
    let routing = Routing::new(bank.slots(), &[Some(0); M]).expect("a table");
    let routes = Routes::upload(&Cpu, &routing).expect("an upload");
    let (x, dy) = (host(M, K, bf16::ONE), host(M, 3, bf16::ONE));
    let (y, pass) = layer.forward_routed_train(x.view(), &bank, &routes, Training::default()).expect("forward");

    let state = |got: &str, expected| Error::State { operation: "backward", got: got.to_owned(), expected };
    let mut dx = host(M, K, bf16::ONE);
    let gradients = ProjectionGradients { dx: Some(dx.view_mut()), ..Default::default() };
    let refused = state("the rows of the pass went through a bank", "`backward` of its layer");
    assert_eq!(group.backward(&pass, [dy.view()], gradients), Err(refused));
    assert_eq!(dx.data, host(M, K, bf16::ONE).data);

    let mut dm = host(1, 3, 9.0f32);
    let dm = Some(Magnitude { y: Matrix::new(&y[..], M, 3), dm: dm.view_mut() });
    let refused = state("dm is asked for", "a pass of an adapter with a magnitude (DoRA)");
    assert_eq!(layer.backward(&pass, dy.view(), Gradients { dm, ..Gradients::default() }), Err(refused));
}

#[test]
fn layers_may_be_exchanged_for_others() {
    let layer = |k: usize| {
        let mut layer = LoraLinear::upload(Cpu, &values(3, k), None, 3, k).expect("a layer");
        let adapter = Adapter::upload(&Cpu, 2, Scaling::Fixed(0.5), &values(2, k), &values(3, 2));
        layer.add("one", adapter.expect("an adapter")).expect("an added adapter");
        layer.activate("one").expect("an adapter");
        layer
    };
    let mut group = LoraProjections::new([layer(K), layer(K)]).expect("a group");
    group.layers_mut()[1] = layer(K + 1);
    let columns = |at: usize| {
        let arg = ["w of projection 0", "w of projection 1"][at];
        Error::Dimension { arg, axis: "columns", got: K + 1, expected: K }
    };
    assert_eq!(group.refresh(), Err(columns(1)));
    group.layers_mut()[0] = layer(K + 1);
    let x = host(M, K + 1, bf16::ONE);
    assert!(matches!(group.forward(x.view()).map(drop), Err(Error::State { .. })), "nothing was copied of them");
    group.refresh().expect("copies");
    let alone = layer(K + 1).forward(x.view()).expect("forward");
    assert_eq!(group.forward(x.view()), Ok([alone.clone(), alone]));
}
