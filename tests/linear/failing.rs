//! Operations that fail in the middle of a change.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use fused_lora::cpu::{self, Cpu};
use fused_lora::linear::{Adapter, Backend, Buffers, BuffersMut, LoraLinear, LoraProjections, Scaling};
use fused_lora::{Dtype, Element, Error, LoraShape, Matrix, Result, bf16};

use crate::common::data::Spec;
use crate::common::layers;
use crate::state;

/// The CPU, with operations that fail from some point on.
#[derive(Clone)]
struct Failing {
    /// Roundings until one fails.
    rounds: Rc<Cell<u32>>,
}

impl Failing {
    fn new() -> Self {
        Self { rounds: Rc::new(Cell::new(u32::MAX)) }
    }
}

impl Backend for Failing {
    type Buffer<T: Element> = Vec<T>;
    type Read<T: Element> = [T];
    type Write<T: Element> = [T];
    type Words = [u64];
    type WordBuffer = Vec<u64>;

    fn is_same(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.rounds, &other.rounds)
    }
    fn upload_words(&self, from: &[u64]) -> Result<Vec<u64>> {
        Cpu.upload_words(from)
    }
    fn words(buffer: &Vec<u64>) -> &[u64] {
        buffer
    }
    fn read<T: Element>(buffer: &Vec<T>) -> &[T] {
        buffer
    }
    fn write<T: Element>(buffer: &mut Vec<T>) -> &mut [T] {
        buffer
    }
    fn read_len<T: Element>(operand: &[T]) -> usize {
        operand.len()
    }
    fn alloc<T: Element>(&self, len: usize) -> Result<Vec<T>> {
        Cpu.alloc(len)
    }
    fn upload<T: Element>(&self, from: &[T]) -> Result<Vec<T>> {
        Cpu.upload(from)
    }
    fn overwrite<T: Element>(&self, from: &[T], to: &mut [T]) -> Result<()> {
        Cpu.overwrite(from, to)
    }
    fn download<T: Element>(&self, from: &[T]) -> Result<Vec<T>> {
        Cpu.download(from)
    }
    fn check_dtype(&self, dtype: Dtype) -> Result<()> {
        Cpu.check_dtype(dtype)
    }
    fn reserve(&self, dtype: Dtype, shape: LoraShape) -> Result<()> {
        Cpu.reserve(dtype, shape)
    }
    fn forward_shared<T: Element, A: Element>(&self, op: cpu::ForwardShared<'_, T, A>) -> Result<()> {
        Cpu.forward_shared(op)
    }
    fn backward_shared<T: Element, A: Element>(&self, op: cpu::BackwardShared<'_, T, A>) -> Result<()> {
        Cpu.backward_shared(op)
    }
    fn merge<T: Element>(&self, op: cpu::Merge<'_, T>) -> Result<()> {
        Cpu.merge(op)
    }
    fn round<T: Element, A: Element>(&self, op: cpu::Round<'_, T, A>) -> Result<()> {
        let left = self.rounds.get().checked_sub(1).ok_or(Error::OutOfMemory { bytes: 1 })?;
        self.rounds.set(left);
        Cpu.round(op)
    }
    fn gain<T: Element>(&self, op: cpu::Gain<'_, T>) -> Result<()> {
        Cpu.gain(op)
    }
}

fn failing() -> (Failing, LoraLinear<Failing, bf16>) {
    let backend = Failing::new();
    let spec = Spec { bias: false, ..Spec::new(5, 3, 4, 2) };
    let layer = layers::make::<_, bf16>(&backend, &spec, true).layer;
    (backend, layer)
}

fn halve<B: Backend<Write<f32> = [f32]>>(factors: BuffersMut<'_, B, bf16>) -> Result<()> {
    if let BuffersMut::F32 { a, .. } = factors {
        a.iter_mut().for_each(|a| *a *= 0.5);
    }
    Ok(())
}

/// Copies older than the factors are never read.
#[test]
fn stale_copies_are_refused_until_they_are_made_anew() {
    let (backend, mut layer) = failing();
    let x = vec![bf16::ONE; 4];
    let x = Matrix::new(&x[..], 1, 4);
    for several in [false, true] {
        let names: &[&str] = if several { &["one", "other"] } else { &["one"] };
        layer.activate_all(names).expect("adapters");
        let before = layer.forward(x).expect("forward");
        // The first failure is that of the adapter's own copies, the second that of the copies side by side.
        for rounds in 0..=u32::from(several) {
            backend.rounds.set(rounds);
            assert_eq!(layer.update("one", halve), Err(Error::OutOfMemory { bytes: 1 }));
            backend.rounds.set(u32::MAX);
            let refused = layer.forward(x).expect_err("a refusal");
            assert!(state(&refused, "forward") && refused.to_string().contains("`one"), "{refused}");
            if !several {
                assert!(state(&layer.forward_train(x).map(drop).expect_err("a refusal"), "forward_train"));
            }
            layer.refresh("one").expect("copies");
            assert_ne!(layer.forward(x).expect("forward"), before);
        }
    }
    // An adapter whose copies fail does not get in.
    let Buffers::F32 { a, b, .. } = layer.adapter("one").expect("an adapter").buffers() else {
        unreachable!("its factors are f32")
    };
    let another = Adapter::upload_f32(&backend, 2, Scaling::Fixed(1.0), a, b).expect("an adapter");
    backend.rounds.set(0);
    let rejected = layer.add("new", another).expect_err("a refusal");
    assert_eq!((rejected.error, layer.names()), (Error::OutOfMemory { bytes: 1 }, vec!["one", "other"]));
    // Nor do several whose joint copies fail; those active before stay.
    layer.activate("other").expect("an adapter");
    assert!(layer.activate_all(&["one", "other"]).is_err());
    assert_eq!(layer.active(), ["other"]);
}

#[test]
fn an_update_that_fails_or_panics_leaves_no_stale_copies() {
    let (_, mut layer) = failing();
    let x = vec![bf16::ONE; 4];
    let x = Matrix::new(&x[..], 1, 4);
    layer.activate("one").expect("an adapter");
    let before = layer.forward(x).expect("forward");
    let failed =
        layer.update("one", |factors| halve(factors).and(Err(Error::NoOutput { expected: "dx, da, db, dbias, dm" })));
    assert_eq!(failed, Err(Error::NoOutput { expected: "dx, da, db, dbias, dm" }));
    let after = layer.forward(x).expect("forward with what the update wrote");
    assert_ne!(after, before);
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        layer.update("one", |factors| -> Result<()> {
            halve(factors)?;
            std::panic::resume_unwind(Box::new("in the middle of an update"));
        })
    }));
    assert!(panicked.is_err());
    assert!(state(&layer.forward(x).expect_err("a refusal"), "forward"));
    layer.refresh("one").expect("copies");
    assert_ne!(layer.forward(x).expect("forward"), after);
}

#[test]
fn layers_of_one_x_are_on_one_backend() {
    let layer = |backend: &Failing| LoraLinear::upload(backend.clone(), &[bf16::ONE; 6], None, 2, 3).expect("a layer");
    let (one, other) = (Failing::new(), Failing::new());
    let state = |operation| Error::State {
        operation,
        got: "layer 1 is on another backend than the group".to_owned(),
        expected: "layers on clones of one",
    };
    let rejected = LoraProjections::new([layer(&one), layer(&other)]).err().expect("a refusal");
    assert_eq!(rejected.error, state("refresh"));
    let mut group = LoraProjections::new([layer(&one), layer(&one)]).expect("a group");
    group.layers_mut()[1] = layer(&other);
    let x = [bf16::ONE; 3];
    assert_eq!(group.forward(Matrix::new(&x[..], 1, 3)).map(drop), Err(state("forward")));
    assert_eq!(group.refresh(), Err(state("refresh")));
}
