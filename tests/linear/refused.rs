//! What layers refuse, and that nothing is lost then.

use fused_lora::cpu::Cpu;
use fused_lora::linear::{Gradients, LoraLinear, Rejected};
use fused_lora::{Error, Matrix, MatrixMut, Result, bf16};

use crate::{adapter, small, state};

#[test]
fn layers_of_wrong_buffers_are_refused_with_the_buffers() {
    let new = |w: usize, bias: Option<usize>, n, k| {
        let (w, bias) = (vec![bf16::ONE; w], bias.map(|bias| vec![bf16::ONE; bias]));
        LoraLinear::new(Cpu, w, bias, n, k)
            .map(drop)
            .map_err(|Rejected { error, value: (w, bias) }| (error, w.len(), bias.map(|bias| bias.len())))
    };
    let elements = |arg, got, expected| Error::Dimension { arg, axis: "elements", got, expected };
    assert_eq!(new(12, Some(3), 3, 4), Ok(()));
    assert_eq!(new(11, Some(3), 3, 4), Err((elements("w", 11, 12), 11, Some(3))));
    assert_eq!(new(12, Some(4), 3, 4), Err((elements("bias", 4, 3), 12, Some(4))));
    assert_eq!(new(0, None, 0, 4), Err((Error::ZeroDimension { arg: "w", axis: "rows" }, 0, None)));
    assert_eq!(new(0, None, 3, 0), Err((Error::ZeroDimension { arg: "w", axis: "columns" }, 0, None)));
    let limit = isize::MAX as u64 / 8;
    for (n, got) in [(1 << 60, 1 << 61), (usize::MAX, u64::MAX)] {
        let too_large = Error::TooLarge { what: "the number of elements of w", got, limit };
        assert_eq!(new(1, None, n, 2), Err((too_large, 1, None)));
    }
}

#[test]
fn adapters_that_do_not_fit_are_refused_and_come_back() {
    let mut layer = small();
    let elements = |arg, got, expected| Error::Dimension { arg, axis: "elements", got, expected };
    let rejected = layer.add("new", adapter(7, 6)).expect_err("a refusal");
    assert_eq!((rejected.error.clone(), rejected.value.rank()), (elements("a", 7, 8), 2));
    assert_eq!(Error::from(layer.add("new", adapter(8, 5)).expect_err("a refusal")), elements("b", 5, 6));
    let taken = layer.add("one", adapter(8, 6)).expect_err("a refusal");
    assert_eq!(taken.to_string(), "the adapter name is \"one\", expected one that the layer does not have");
    assert_eq!(layer.names(), ["one", "other"]);
    layer.add("one more", taken.value).expect("the same adapter under another name");
    assert_eq!(layer.names(), ["one", "other", "one more"]);
}

#[test]
fn unknown_names_are_named_with_those_that_are_there() {
    let mut layer = small();
    let expected = Error::AdapterName { got: "two".into(), expected: "\"one\" or \"other\"".into() };
    assert_eq!(layer.activate("two"), Err(expected.clone()));
    assert_eq!(layer.activate_all(&["one", "two"]), Err(expected.clone()));
    assert_eq!(layer.remove("two").map(drop), Err(expected.clone()));
    assert_eq!(layer.update("two", |_| Ok::<_, Error>(())), Err(expected));
    let twice = Error::AdapterName { got: "one".into(), expected: "each name once".into() };
    assert_eq!(layer.activate_all(&["one", "other", "one"]), Err(twice));
    assert_eq!(layer.active(), [""; 0]);
}

#[test]
fn what_the_state_rules_out_is_refused() {
    let mut layer = small();
    let x = vec![bf16::ONE; 8];
    let x = Matrix::new(&x[..], 2, 4);
    let error = |result: Result<()>| result.expect_err("a refusal");
    assert_eq!(
        error(layer.merge()).to_string(),
        "`merge` was called while no adapter is active, expected `activate` first"
    );
    assert!(state(&error(layer.merge_for_good().map(drop)), "merge_for_good"));
    assert!(state(&error(layer.unmerge()), "unmerge"));
    layer.activate("one").expect("an adapter");
    assert!(state(&error(layer.remove("one").map(drop)), "remove"));
    layer.merge().expect("a merge");
    let refused = [
        ("merge", layer.merge()),
        ("activate", layer.activate("other")),
        ("activate_all", layer.activate_all(&["one", "other"])),
        ("disable", layer.disable()),
        ("update", layer.refresh("one")),
        ("remove", layer.remove("one").map(drop)),
        ("forward_train", layer.forward_train(x).map(drop)),
    ];
    for (operation, result) in refused {
        assert!(state(&error(result), operation), "{operation}");
    }
    layer.refresh("other").expect("an adapter that is not merged");
    layer.remove("other").expect("an adapter that is not merged");
    assert!(layer.is_merged());
    layer.merge_for_good().expect("what was merged");
    assert!(!layer.is_merged() && layer.names().is_empty());
}

#[test]
fn wrong_arguments_are_named_and_nothing_is_lost() {
    let mut layer = small();
    layer.activate("one").expect("an adapter");
    let x = vec![bf16::ONE; 8];
    let forward = |x: Matrix<'_, [bf16]>| layer.forward(x).map(drop);
    let dimension = |arg, axis, got, expected| Err(Error::Dimension { arg, axis, got, expected });
    assert_eq!(forward(Matrix::new(&x[..], 2, 3)), dimension("x", "columns", 3, 4));
    assert_eq!(forward(Matrix::new(&x[..], 0, 4)), Err(Error::ZeroDimension { arg: "x", axis: "rows" }));
    assert_eq!(forward(Matrix::new(&x[..], 3, 4)), Err(Error::BufferTooShort { arg: "x", got: 8, needed: 12 }));
    let stride = Matrix::new(&x[..], 1 << 40, 4).with_row_stride(0);
    assert_eq!(forward(stride), Err(Error::Stride { arg: "x", got: 0, min: 4 }));
    assert!(forward(Matrix::new(&x[..], usize::MAX, 4)).is_err());

    let x = Matrix::new(&x[..], 2, 4);
    let mut y = vec![bf16::from_f32(9.0); 6];
    let into = layer.forward_into(x, MatrixMut::new(&mut y[..], 3, 2));
    assert_eq!((into, &y), (dimension("y", "rows", 3, 2), &vec![bf16::from_f32(9.0); 6]));
    let (_, pass) = layer.forward_train(x).expect("forward_train");
    let dy = vec![bf16::ONE; 9];
    let (dy, taller) = (Matrix::new(&dy[..6], 2, 3), Matrix::new(&dy[..], 3, 3));
    let mut da = vec![9.0; 8];
    let mut backward = |dy, rows| {
        let gradients = Gradients { da: Some(MatrixMut::new(&mut da[..], rows, 4)), ..Gradients::default() };
        layer.backward(&pass, dy, gradients)
    };
    assert_eq!(backward(taller, 2), dimension("dy", "rows", 3, 2));
    assert_eq!(backward(dy, 1), dimension("da", "rows", 1, 2));
    assert_eq!(backward(dy, 2), Ok(()));
    assert!(da.iter().all(|&v| v != 9.0));
    assert_eq!(
        layer.backward(&pass, dy, Gradients::default()),
        Err(Error::NoOutput { expected: "dx, da, db, dbias, dm" })
    );
    let kept = pass.into_kept().with(Matrix::new(&[bf16::ONE; 4][..], 1, 4)).expect_err("another number of rows");
    assert_eq!(kept.error, Error::Dimension { arg: "x", axis: "rows", got: 1, expected: 2 });
    assert!(kept.value.with(x).is_ok());
}
