//! Adapters that come and go, and passes that outlive them.

use fused_lora::cpu::Cpu;
use fused_lora::linear::{Adapter, BuffersMut, Gradients, LoraLinear, Scaling};
use fused_lora::{Error, Matrix, MatrixMut, Result, bf16};

use crate::common::data::Spec;
use crate::common::layers::{self, Made};
use crate::{small, state};

#[test]
fn scales_follow_from_alpha_and_rank() {
    assert_eq!(Scaling::Lora { alpha: 3.0 }.scale(7), 3.0 / 7.0);
    assert_eq!(Scaling::RsLora { alpha: 4.0 }.scale(2), (4.0 / 2f64.sqrt()) as f32);
    assert_eq!((Scaling::Fixed(0.1).scale(9), Scaling::Lora { alpha: 3.0 }.scale(0)), (0.1, 1.0));
    let refused = Adapter::<Cpu, bf16>::upload(&Cpu, 2, Scaling::Fixed(f64::MAX), &[], &[]).map(drop);
    assert_eq!(refused, Err(Error::Scale { arg: "scale", got: f32::INFINITY }));
}

/// A swap, and what stays of an adapter that is taken out and put back.
#[test]
fn adapters_come_and_go() {
    let mut layer = small();
    let x = vec![bf16::ONE; 8];
    let y = |layer: &LoraLinear<Cpu, bf16>| layer.forward(Matrix::new(&x[..], 2, 4)).expect("forward");
    let plain = y(&layer);
    layer.activate("one").expect("an adapter");
    let one = y(&layer);
    layer.activate("other").expect("an adapter");
    let other = y(&layer);
    assert!(one != plain && other != plain && one != other);
    let taken = layer.remove("one").expect("an inactive adapter");
    assert_eq!((layer.names(), y(&layer)), (vec!["other"], other));
    layer.disable().expect("no adapter");
    assert_eq!((layer.active(), y(&layer)), (vec![], plain.clone()));
    layer.add("back", taken).expect("an added adapter");
    layer.activate("back").expect("an adapter");
    assert_eq!(y(&layer), one);
}

/// What `enable` brings back: what was active, with the factors that it has by then, unless something else was chosen or an
/// adapter has left.
#[test]
fn disabled_adapters_are_enabled_again() {
    let mut layer = small();
    let x = vec![bf16::ONE; 8];
    let y = |layer: &LoraLinear<Cpu, bf16>| layer.forward(Matrix::new(&x[..], 2, 4)).expect("forward");
    let plain = y(&layer);
    layer.enable().expect("nothing to do");
    assert_eq!((layer.active(), y(&layer)), (vec![], plain.clone()));
    for names in [&["one"][..], &["other", "one"]] {
        layer.activate_all(names).expect("adapters");
        let with = y(&layer);
        assert_ne!(with, plain);
        layer.disable().expect("no adapter");
        layer.disable().expect("still none");
        assert_eq!(y(&layer), plain);
        layer.enable().expect("adapters");
        layer.enable().expect("the same adapters");
        assert_eq!((layer.active(), y(&layer)), (names.to_vec(), with));
    }

    // Factors that change meanwhile: as if they had changed while active.
    let double = |factors: BuffersMut<'_, Cpu, bf16>| -> Result<()> {
        match factors {
            BuffersMut::Storage { b, .. } => b.iter_mut().for_each(|b| *b = bf16::from_f32(2.0 * b.to_f32())),
            BuffersMut::F32 { b, .. } => b.iter_mut().for_each(|b| *b *= 2.0),
        }
        Ok(())
    };
    layer.disable().expect("no adapter");
    layer.update("one", double).expect("factors");
    layer.enable().expect("adapters");
    let changed = y(&layer);
    layer.activate_all(&["other", "one"]).expect("adapters");
    assert_eq!(y(&layer), changed);

    layer.disable().expect("no adapter");
    layer.activate("one").expect("another choice");
    layer.disable().expect("no adapter");
    layer.remove("other").expect("an adapter");
    layer.enable().expect("the later choice");
    assert_eq!(layer.active(), ["one"]);
    layer.merge().expect("a merge");
    assert!(state(&layer.enable().expect_err("merged"), "enable"));
    layer.unmerge().expect("an unmerge");
    layer.disable().expect("no adapter");
    layer.remove("one").expect("an adapter");
    layer.enable().expect("nothing to do");
    assert_eq!((layer.active(), y(&layer)), (vec![], plain));
}

#[test]
fn a_pass_is_of_one_state_of_one_layer() {
    let Made { mut layer, forward, .. } = layers::make::<Cpu, bf16>(&Cpu, &Spec::new(2, 3, 4, 2), true);
    let x = Matrix::new(&forward.x.data[..], 2, 4);
    layer.activate("one").expect("an adapter");
    let (_, pass) = layer.forward_train(x).expect("forward_train");
    let dy = vec![bf16::ONE; 6];
    let backward = |layer: &LoraLinear<Cpu, bf16>| {
        let mut dx = vec![bf16::from_f32(9.0); 8];
        let gradients = Gradients { dx: Some(MatrixMut::new(&mut dx[..], 2, 4)), ..Gradients::default() };
        let result = layer.backward(&pass, Matrix::new(&dy[..], 2, 3), gradients);
        assert!(result.is_ok() || dx.iter().all(|&v| v == bf16::from_f32(9.0)), "written in spite of {result:?}");
        result
    };
    assert_eq!(backward(&layer), Ok(()));
    layer.disable().expect("no adapter");
    assert_eq!(backward(&layer), Ok(()), "the pass knows its adapter");
    let refused = |result: Result<()>| state(&result.expect_err("a refusal"), "backward");
    assert!(refused(backward(&small())), "another layer");
    layer.activate("one").expect("an adapter");
    layer.merge().expect("a merge");
    assert!(refused(backward(&layer)), "merged");
    layer.unmerge().expect("an unmerge");
    assert_eq!(backward(&layer), Ok(()));
    layer.refresh("other").expect("an adapter");
    assert_eq!(backward(&layer), Ok(()), "another adapter changed");
    layer.refresh("one").expect("an adapter");
    assert!(refused(backward(&layer)), "changed factors");
    layer.disable().expect("no adapter");
    layer.remove("one").expect("an adapter");
    assert!(refused(backward(&layer)), "no adapter any more");

    let (_, plain) = layer.forward_train(x).expect("forward_train without an adapter");
    assert!(plain.h().is_none());
    layer.activate("other").expect("an adapter");
    layer.merge_for_good().expect("a merge");
    let gradients = Gradients { dbias: None, ..Gradients::default() };
    let other_w = layer.backward(&plain, Matrix::new(&dy[..], 2, 3), gradients);
    assert!(refused(other_w), "another W");
}
