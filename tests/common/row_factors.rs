//! Merge with a gain and round with a divisor, which every backend must give bit for bit.

use fused_lora::linear::Backend;
use fused_lora::{Element, Factors, Merge, Round};

use super::data::Spec;
use super::layers::{Device, assert_same, bits, compact};
use super::{Host, HostForward};

/// The f32 value of an element.
fn wide<T: Element>(host: &Host<T>, row: usize, col: usize) -> f32 {
    host.data[host.index(row, col)].to_f32()
}

/// gain ∘ (w + scale · B A) and scale · B / gain, each operation rounded to f32 and the result once, into matrices anywhere.
pub fn rows_times_and_over<B: Backend, T: Element>(backend: &B, spec: &Spec) {
    let (HostForward { w, a, b, scale, .. }, gain) = (spec.forward::<T>(), spec.row_factors());
    let [dw, da, db] = [&w, &a, &b].map(|host| Device::<B, T>::new(backend, host));
    let by_row = Device::<B, f32>::new(backend, &gain);
    let (n, k, r) = (w.rows, w.cols, a.rows);
    let narrow = |value: f32| T::from_f64(f64::from(value));
    let factors = || Factors::Storage { a: da.view(), b: db.view() };

    let mut merged = Device::<B, T>::new(backend, &w);
    let in_place = Merge { w: None, factors: factors(), scale, gain: Some(by_row.view()), merged: merged.view_mut() };
    backend.merge::<T>(in_place).expect("a merge");
    let mut elsewhere = Device::<B, T>::new(backend, &Host { data: vec![T::default(); w.data.len()], ..w.clone() });
    let w_view = Some(dw.view());
    let merge = Merge { w: w_view, factors: factors(), scale, gain: Some(by_row.view()), merged: elsewhere.view_mut() };
    backend.merge::<T>(merge).expect("a merge");
    let sum = |row: usize, col: usize| (0..r).fold(0.0f32, |sum, rank| sum + wide(&b, row, rank) * wide(&a, rank, col));
    let element = |at: usize| narrow(wide(&gain, 0, at / k) * (wide(&w, at / k, at % k) + scale * sum(at / k, at % k)));
    let expected: Vec<T> = (0..n * k).map(element).collect();
    for out in [merged, elsewhere] {
        let got = compact(&out.download(backend));
        assert_same(&bits(&got.data), &bits(&expected), &format!("merged with a gain, {spec:?}"));
    }

    let [mut to_a, mut to_b] = [&a, &b]
        .map(|host| Device::<B, T>::new(backend, &Host { data: vec![T::default(); host.data.len()], ..host.clone() }));
    let divisor = Some(by_row.view());
    let (rounded_a, rounded_b) = (to_a.view_mut(), to_b.view_mut());
    backend.round::<T, T>(Round { factors: factors(), scale, divisor, rounded_a, rounded_b }).expect("a rounding");
    let expected: Vec<T> =
        (0..n * r).map(|at| narrow(scale * wide(&b, at / r, at % r) / wide(&gain, 0, at / r))).collect();
    assert_same(&bits(&compact(&to_b.download(backend)).data), &bits(&expected), "B over a divisor");
    assert_same(&bits(&compact(&to_a.download(backend)).data), &bits(&compact(&a).data), "A as it is");
}
