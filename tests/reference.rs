//! The oracle itself: by hand, by finite differences, and its tolerance rule in both directions.

mod common;

use approx::abs_diff_eq;
use common::data::Rng;
use fused_lora::reference::{self, Expected, Inputs, Mat, check, unit_roundoff};
use fused_lora::{Dtype, Element, Routing, Slot, bf16, f16};

fn mat(rows: usize, cols: usize, data: &[f64]) -> Mat {
    assert_eq!(rows * cols, data.len());
    Mat { rows, cols, data: data.to_vec() }
}

fn random(m: usize, n: usize, k: usize, r: usize) -> Inputs {
    let mut rng = Rng(11);
    let mut random =
        |rows, cols| Mat { rows, cols, data: (0..rows * cols).map(|_| bf16::from_f64(rng.unit()).to_f64()).collect() };
    let (x, w, a, b) = (random(m, k), random(n, k), random(r, k), random(n, r));
    Inputs { x, w, a, b, bias: Some(random(1, n)), dy: random(m, n), scale: 0.75, keep: None, gate: None, gain: None }
}

/// One token, two inputs, two outputs, rank one, on paper.
#[test]
fn a_layer_by_hand() {
    let inputs = Inputs {
        x: mat(1, 2, &[1.0, 2.0]),
        w: mat(2, 2, &[1.0, 3.0, 0.0, -1.0]),
        a: mat(1, 2, &[2.0, 1.0]),
        b: mat(2, 1, &[1.0, -2.0]),
        bias: Some(mat(1, 2, &[10.0, 20.0])),
        dy: mat(1, 2, &[1.0, 3.0]),
        scale: 0.5,
        keep: None,
        gate: None,
        gain: None,
    };
    let (h, y) = reference::forward(&inputs);
    assert_eq!(h, mat(1, 1, &[2.0])); // 0.5 · (1·2 + 2·1)
    assert_eq!(y, mat(1, 2, &[19.0, 14.0])); // 7 + 2 + 10, −2 − 4 + 20
    let gradients = reference::backward(&inputs, &h);
    // dh = 0.5 · (1·1 − 3·2) = −2.5
    assert_eq!(gradients.dx, mat(1, 2, &[-4.0, -2.5])); // 1 − 5, 3 − 3 − 2.5
    assert_eq!(gradients.da, mat(1, 2, &[-2.5, -5.0]));
    assert_eq!(gradients.db, mat(2, 1, &[2.0, 6.0]));
    assert_eq!(gradients.dbias, mat(1, 2, &[1.0, 3.0]));
}

/// Each gradient is the slope of ⟨dy, y⟩ along its parameter. The sum is linear in x, A, B and the bias, so that the
/// difference of two values is the slope up to rounding.
#[test]
fn gradients_are_slopes() {
    let inputs = random(4, 5, 6, 3);
    let loss = |inputs: &Inputs| -> f64 {
        reference::forward(inputs).1.data.iter().zip(&inputs.dy.data).map(|(y, dy)| y * dy).sum()
    };
    let gradients = reference::backward(&inputs, &reference::forward(&inputs).0);
    type Parameter = fn(&mut Inputs) -> &mut Mat;
    let parameters: [(&str, Parameter, &Mat); 4] = [
        ("x", |i| &mut i.x, &gradients.dx),
        ("a", |i| &mut i.a, &gradients.da),
        ("b", |i| &mut i.b, &gradients.db),
        ("bias", |i| i.bias.as_mut().expect("a bias"), &gradients.dbias),
    ];
    for (name, parameter, gradient) in parameters {
        for at in 0..gradient.data.len() {
            let mut moved = inputs.clone();
            parameter(&mut moved).data[at] += 1.0;
            let slope = loss(&moved) - loss(&inputs);
            assert!(
                abs_diff_eq!(slope, gradient.data[at], epsilon = 1e-12),
                "{name}[{at}]: {slope}, {}",
                gradient.data[at]
            );
        }
    }
}

/// The naive composition has errors of the size of its type: not zero, and not more than a few roundings.
#[test]
fn naive_errors_have_the_size_of_the_type() {
    fn relative<T: Element>() -> f64 {
        let inputs = random(20, 30, 40, 8);
        let (truth, naive) = (reference::forward(&inputs).1, reference::naive_forward::<T>(&inputs).1);
        naive.plus(&truth.map(|v| -v)).norm() / truth.norm() / unit_roundoff(T::DTYPE)
    }
    for roundings in [relative::<f16>(), relative::<bf16>(), relative::<f32>()] {
        assert!((0.1..4.0).contains(&roundings), "{roundings}");
    }
}

fn expected(inputs: &Inputs) -> Expected {
    Expected {
        truth: reference::forward(inputs).1,
        naive: reference::naive_forward::<bf16>(inputs).1,
        magnitude: reference::forward(&inputs.magnitudes()).1,
        depth: 2 * inputs.x.cols + inputs.a.rows + 2,
        storage: Dtype::Bf16,
        output: Dtype::Bf16,
    }
}

#[test]
fn the_rule_accepts_what_is_as_good_as_naive() {
    let expected = expected(&random(20, 30, 40, 8));
    assert_eq!(check(&expected.truth, &expected), Ok(()));
    assert_eq!(check(&expected.naive, &expected), Ok(()));
    assert_eq!(check(&expected.truth.map(|v| bf16::from_f64(v).to_f64()), &expected), Ok(()));
}

#[test]
fn the_rule_refuses_what_is_worse() {
    let inputs = random(20, 30, 40, 8);
    let expected = expected(&inputs);
    let spoiled = |change: &dyn Fn(&mut Mat)| {
        let mut out = expected.truth.clone();
        change(&mut out);
        check(&out, &expected)
    };
    assert!(spoiled(&|out| out.data[77] = f64::NAN).is_err());
    assert!(spoiled(&|out| out.data[77] = f64::INFINITY).is_err());
    assert!(spoiled(&|out| out.data[77] += 0.5).is_err());
    // Too small for any single element to show, but everywhere.
    assert!(
        spoiled(&|out| out.data.iter_mut().for_each(|v| *v *= 1.0 + 6.0 / 256.0)).is_err_and(|e| e.contains("norm"))
    );
    // One term of one sum left out, the last of the adapter, everywhere.
    let mut without = inputs.clone();
    (0..without.b.rows).for_each(|row| without.b.data[row * 8 + 7] = 0.0);
    assert!(check(&reference::forward(&without).1, &expected).is_err());
    let transposed = expected.truth.transposed();
    assert_eq!(check(&transposed, &expected), Err("shape 30×20, expected 20×30".into()));
}

#[test]
fn luck_of_separate_products_is_no_rule() {
    // Naive is exact, and the result is off by what elements may be, in one direction: nothing that roundings do often.
    let off = |elements: usize, roundoffs: f64| {
        let truth = Mat::from_fn(1, elements, |_, _| 1.0);
        let (naive, magnitude) = (truth.clone(), truth.map(|_| 2.0));
        let expected = Expected { truth, naive, magnitude, depth: 1, storage: Dtype::Bf16, output: Dtype::Bf16 };
        check(&expected.truth.map(|v| v + roundoffs / 256.0), &expected)
    };
    assert_eq!(off(15, 3.9), Ok(()));
    assert!(off(15, 4.1).is_err_and(|e| e.contains("element")));
    assert!(off(16, 3.9).is_err_and(|e| e.contains("norm")));
}

/// A batch with routes is each row with its own adapter alone.
#[test]
fn routes_are_adapters_alone() {
    let (m, r) = (23, 12);
    let slots = [(0, 3, 2.0), (3, 8, -0.5), (11, 1, 1.5)];
    let slots = slots.map(|(first_rank, ranks, scale)| Slot { first_rank, ranks, scale });
    let ids: Vec<Option<usize>> = (0..m).map(|row| Some(row * 5 % 4).filter(|&id| id < 3)).collect();
    let routing = Routing::new(&slots, &ids).expect("a routing");
    let all = Inputs { gate: Some(reference::gate(routing.words(), m, r)), ..random(m, 7, 9, r) };
    let (h, y) = reference::forward(&all);
    let backward = reference::backward(&all, &h);
    for (row, id) in ids.iter().enumerate() {
        let Slot { first_rank, ranks, scale } = id.map_or(Slot { first_rank: 0, ranks: 0, scale: 1.0 }, |id| slots[id]);
        let one = |matrix: &Mat| Mat::from_fn(1, matrix.cols, |_, j| matrix.at(row, j));
        let alone = Inputs {
            x: one(&all.x),
            dy: one(&all.dy),
            a: Mat::from_fn(ranks, all.a.cols, |i, j| all.a.at(first_rank + i, j)),
            b: Mat::from_fn(all.b.rows, ranks, |i, j| all.b.at(i, first_rank + j)),
            scale: all.scale * f64::from(scale),
            gate: None,
            gain: None,
            ..all.clone()
        };
        let (h_alone, y_alone) = reference::forward(&alone);
        let close = |got: &Mat, expected: &Mat| got.data.iter().zip(&expected.data).all(|(a, b)| (a - b).abs() < 1e-12);
        assert!(close(&one(&y), &y_alone), "row {row}");
        assert!(close(&one(&backward.dx), &reference::backward(&alone, &h_alone).dx), "row {row}");
    }
    // db of an adapter is the sum over its own rows.
    for slot in slots {
        let own = |row: usize| ids[row].is_some_and(|id| slots[id] == slot);
        let masked = |matrix: &Mat| Mat::from_fn(m, matrix.cols, |i, j| if own(i) { matrix.at(i, j) } else { 0.0 });
        let alone = Inputs { dy: masked(&all.dy), ..all.clone() };
        let (full, alone) = (&backward, reference::backward(&alone, &h));
        for rank in slot.first_rank..slot.first_rank + slot.ranks {
            let same = |a: f64, b: f64| (a - b).abs() < 1e-12;
            assert!((0..full.db.rows).all(|n| same(full.db.at(n, rank), alone.db.at(n, rank))));
            assert!((0..full.da.cols).all(|k| same(full.da.at(rank, k), alone.da.at(rank, k))));
        }
    }
}
