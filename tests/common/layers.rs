//! What a layer must do on every backend.

use fused_lora::linear::{Adapter, Backend, Buffers, BuffersMut, Gradients, LoraLinear, Magnitude, Scaling};
use fused_lora::{Element, Error, Factors, Matrix, MatrixMut, Merge, Round};

use super::data::{Placement, Rng, Spec};
use super::{Host, HostBackward, HostForward, HostGradient, check};

/// The matrix without what surrounds it.
pub fn compact<T: Element>(host: &Host<T>) -> Host<T> {
    let elements = host.data.iter().enumerate().filter(|(at, _)| host.is_element(*at)).map(|(_, value)| *value);
    Host { data: elements.collect(), offset: 0, row_stride: host.cols, ..*host }
}

/// A host buffer in the backend's memory, whole.
pub struct Device<B: Backend, T: Element> {
    buffer: B::Buffer<T>,
    host: Host<T>,
}

impl<B: Backend, T: Element> Device<B, T> {
    pub fn new(backend: &B, host: &Host<T>) -> Self {
        Self { buffer: backend.upload(&host.data).expect("an upload"), host: host.clone() }
    }

    pub fn view(&self) -> Matrix<'_, B::Read<T>> {
        let Host { rows, cols, offset, row_stride, .. } = self.host;
        Matrix::new(B::read(&self.buffer), rows, cols).with_offset(offset).with_row_stride(row_stride)
    }

    pub fn view_mut(&mut self) -> MatrixMut<'_, B::Write<T>> {
        let Host { rows, cols, offset, row_stride, .. } = self.host;
        MatrixMut::new(B::write(&mut self.buffer), rows, cols).with_offset(offset).with_row_stride(row_stride)
    }

    pub fn download(&self, backend: &B) -> Host<T> {
        Host { data: download(backend, &self.buffer, self.host.data.len()), ..self.host.clone() }
    }
}

pub fn download<B: Backend, T: Element>(backend: &B, buffer: &B::Buffer<T>, elements: usize) -> Vec<T> {
    let mut data = backend.download(B::read(buffer)).expect("a download");
    data.truncate(elements);
    data
}

/// The bits of every element, in f32.
pub fn bits<T: Element>(data: &[T]) -> Vec<u32> {
    data.iter().map(|value| value.to_f32().to_bits()).collect()
}

/// The same elements, or the first that differs.
#[track_caller]
pub fn assert_same(got: &[u32], expected: &[u32], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    if let Some(at) = (0..got.len()).find(|&at| got[at] != expected[at]) {
        let [got, expected] = [got[at], expected[at]].map(f32::from_bits);
        unreachable!("{what}: element {at} is {got:e}, expected {expected:e}");
    }
}

/// A layer of a spec's data, and what it was made of.
pub struct Made<B: Backend, T: Element> {
    pub layer: LoraLinear<B, T>,
    /// x and y as the spec places them; w, a and b contiguous and as forward reads them.
    pub forward: HostForward<T>,
    /// The factors in f32, where the adapter has them.
    pub a32: Vec<f32>,
    pub b32: Vec<f32>,
}

/// f32 values that round to others than themselves.
pub fn widened<T: Element>(values: &[T], rng: &mut Rng) -> Vec<f32> {
    values.iter().map(|value| value.to_f32() * (1.0 + rng.unit() as f32 / 1024.0)).collect()
}

pub fn rounded<T: Element>(values: &[f32]) -> Vec<T> {
    values.iter().map(|&value| T::from_f64(f64::from(value))).collect()
}

/// A layer with the adapter "one" of the spec, and another one that takes no part.
pub fn make<B: Backend, T: Element>(backend: &B, spec: &Spec, f32_factors: bool) -> Made<B, T> {
    let mut forward = spec.forward::<T>();
    let compacted = [compact(&forward.w), compact(&forward.a), compact(&forward.b)];
    [forward.w, forward.a, forward.b] = compacted;
    forward.bias = forward.bias.as_ref().map(compact);
    let mut rng = Rng(spec.seed ^ 7);
    let (a32, b32) = (widened(&forward.a.data, &mut rng), widened(&forward.b.data, &mut rng));
    let bias = forward.bias.as_ref().map(|bias| &bias.data[..]);
    let mut layer = LoraLinear::upload(backend.clone(), &forward.w.data, bias, spec.n, spec.k).expect("a layer");
    let scaling = Scaling::Fixed(f64::from(spec.scale));
    let adapter = if f32_factors {
        (forward.a.data, forward.b.data) = (rounded(&a32), rounded(&b32));
        Adapter::upload_f32(backend, spec.r, scaling, &a32, &b32)
    } else {
        Adapter::upload(backend, spec.r, scaling, &forward.a.data, &forward.b.data)
    };
    layer.add("one", adapter.expect("an adapter")).expect("an added adapter");
    let other = Spec { seed: !spec.seed, r: 3, placement: Placement::Contiguous, ..*spec }.forward::<T>();
    let other = Adapter::upload(backend, 3, Scaling::Lora { alpha: 6.0 }, &other.a.data, &other.b.data);
    layer.add("other", other.expect("an adapter")).expect("an added adapter");
    Made { layer, forward, a32, b32 }
}

/// Forward without and with the adapter, forward that keeps h, and backward, each held to the oracle.
pub fn computes<B: Backend, T: Element>(backend: &B, spec: &Spec, f32_factors: bool) {
    let Made { mut layer, forward: before, .. } = make::<B, T>(backend, spec, f32_factors);
    let x = Device::new(backend, &before.x);
    let judge = |after: &HostForward<T>| check::judge_forward(&before, after, spec.values).expect("forward");

    let mut y = Device::new(backend, &before.y);
    layer.forward_into(x.view(), y.view_mut()).expect("forward without an adapter");
    let empty = |rows, cols| Host { rows, cols, offset: 0, row_stride: cols, data: Vec::new() };
    let (a, b) = (empty(0, spec.k), empty(spec.n, 0));
    let plain = HostForward { a, b, h: None, ..before.clone() };
    let after = HostForward { y: y.download(backend), ..plain.clone() };
    check::judge_forward(&plain, &after, spec.values).expect("forward without an adapter");

    layer.activate("one").expect("an adapter");
    layer.reserve(spec.m).expect("a workspace");
    let mut y = Device::new(backend, &before.y);
    layer.forward_into(x.view(), y.view_mut()).expect("forward");
    let with_adapter = HostForward { h: None, y: y.download(backend), ..before.clone() };
    judge(&with_adapter);
    let contiguous = layer.forward(x.view()).expect("forward");
    let contiguous = download(backend, &contiguous, spec.m * spec.n);
    assert_same(&bits(&contiguous), &bits(&compact(&with_adapter.y).data), "forward and forward_into");

    let (trained, pass) = layer.forward_train(x.view()).expect("forward_train");
    let trained = download(backend, &trained, spec.m * spec.n);
    assert_same(&bits(&trained), &bits(&contiguous), "forward and forward_train");
    let h = pass.h().map(|h| download(backend, h, spec.m * spec.r)).unwrap_or_default();
    let h = Host { data: h, ..empty(spec.m, spec.r) };
    let poisoned = HostForward { h: Some(h.clone()), ..before.clone() };
    let kept = HostForward { h: Some(h.clone()), y: with_adapter.y, ..before.clone() };
    check::judge_forward(&poisoned, &kept, spec.values).expect("h");

    // x taken away and brought back; another adapter active meanwhile.
    let pass = pass.into_kept().with(x.view()).expect("the same x");
    layer.activate("other").expect("an adapter");
    let start = HostBackward {
        w: before.w.clone(),
        a: before.a.clone(),
        b: before.b.clone(),
        scale: spec.scale,
        x: Some(before.x.clone()),
        h: Some(h),
        ..spec.backward::<T>()
    };
    let end = backward(backend, &layer, &pass, &start);
    check::judge_backward(&start, &end, spec.values).expect("backward");
    let again = backward(backend, &layer, &pass, &start);
    let outputs = |op: &HostBackward<T>| format!("{:?}", (&op.dx, &op.da, &op.db, &op.dbias));
    assert_eq!(outputs(&end), outputs(&again), "a pass used twice");
}

/// Runs a layer's backward on the host's outputs, which are f32 gradients.
pub fn backward<B: Backend, T: Element, A: Element>(
    backend: &B,
    layer: &LoraLinear<B, T>,
    pass: &fused_lora::linear::Pass<'_, B, T>,
    start: &HostBackward<T, A>,
) -> HostBackward<T, A> {
    fn in_f32<T>(gradient: &Option<HostGradient<T>>) -> Option<&Host<f32>> {
        match gradient {
            Some(HostGradient::F32(host)) => Some(host),
            _ => None,
        }
    }
    let dy = Device::new(backend, &start.dy);
    let mut dx = start.dx.as_ref().map(|dx| Device::new(backend, dx));
    let [mut da, mut db, mut dbias] =
        [&start.da, &start.db, &start.dbias].map(|out| in_f32(out).map(|out| Device::new(backend, out)));
    let magnitude = start.magnitude.as_ref();
    let y = magnitude.map(|of| Device::new(backend, &of.y));
    let mut dm = magnitude.map(|of| Device::new(backend, &of.dm));
    let of_magnitude = y.as_ref().zip(dm.as_mut());
    let gradients = Gradients {
        dx: dx.as_mut().map(Device::view_mut),
        da: da.as_mut().map(Device::view_mut),
        db: db.as_mut().map(Device::view_mut),
        dbias: dbias.as_mut().map(Device::view_mut),
        dm: of_magnitude.map(|(y, dm)| Magnitude { y: y.view(), dm: dm.view_mut() }),
        accumulate: start.accumulate,
    };
    layer.backward(pass, dy.view(), gradients).expect("backward");
    let f32 = |out: Option<Device<B, f32>>| out.map(|out| HostGradient::F32(out.download(backend)));
    let mut end = start.clone();
    if let (Some(of), Some(dm)) = (&mut end.magnitude, dm) {
        of.dm = dm.download(backend);
    }
    HostBackward { dx: dx.map(|dx| dx.download(backend)), da: f32(da), db: f32(db), dbias: f32(dbias), ..end }
}

/// w + scale · B A in f32, rank by rank, rounded once: what merge must give bit for bit.
pub fn merged<T: Element>(w: &[T], a: &[f32], b: &[f32], scale: f32, (n, k, r): (usize, usize, usize)) -> Vec<T> {
    let element = |at: usize| {
        let (row, col) = (at / k, at % k);
        let sum = (0..r).fold(0.0f32, |sum, rank| sum + b[row * r + rank] * a[rank * k + col]);
        T::from_f64(f64::from(w[at].to_f32() + scale * sum))
    };
    (0..n * k).map(element).collect()
}

/// Merge of a layer's adapter, and back.
pub fn merges<B: Backend, T: Element>(backend: &B, spec: &Spec, f32_factors: bool) {
    let Made { mut layer, forward, a32, b32 } = make::<B, T>(backend, spec, f32_factors);
    let Spec { m, n, k, r, scale, .. } = *spec;
    let (w, x) = (&forward.w.data, Device::new(backend, &forward.x));
    let (a, b) = if f32_factors { (a32, b32) } else { (widest(&forward.a.data), widest(&forward.b.data)) };
    let expected = merged(w, &a, &b, scale, (n, k, r));
    let weight = |layer: &LoraLinear<B, T>| bits(&download(backend, layer.weight(), n * k));
    let y = |layer: &LoraLinear<B, T>| bits(&download(backend, &layer.forward(x.view()).expect("forward"), m * n));

    layer.activate("one").expect("an adapter");
    let beside = y(&layer);
    layer.merge().expect("a merge");
    assert_same(&weight(&layer), &bits(&expected), &format!("merged {spec:?}"));
    let plain = LoraLinear::upload(backend.clone(), &expected, forward.bias.as_ref().map(|b| &b.data[..]), n, k);
    assert_same(&y(&layer), &y(&plain.expect("a layer")), "forward while merged");
    layer.unmerge().expect("an unmerge");
    assert_same(&weight(&layer), &bits(w), "unmerged");
    assert_same(&y(&layer), &beside, "forward after unmerge");

    let folded = layer.merge_for_good().expect("a merge");
    assert_eq!(folded.iter().map(|(name, adapter)| (&**name, adapter.rank())).collect::<Vec<_>>(), [("one", r)]);
    assert_same(&weight(&layer), &bits(&expected), &format!("merged for good {spec:?}"));
    assert_eq!((layer.names(), layer.active(), layer.is_merged()), (vec!["other"], vec![], false));
}

pub fn widest<T: Element>(values: &[T]) -> Vec<f32> {
    values.iter().map(|value| value.to_f32()).collect()
}

/// Merge over matrices anywhere in their buffers, into a second buffer and in place; nothing around them is touched.
pub fn merges_views<B: Backend, T: Element>(backend: &B, spec: &Spec) {
    let HostForward { w, a, b, scale, .. } = spec.forward::<T>();
    let expected = merged(
        &compact(&w).data,
        &widest(&compact(&a).data),
        &widest(&compact(&b).data),
        scale,
        (w.rows, w.cols, a.rows),
    );
    let [dw, da, db] = [&w, &a, &b].map(|host| Device::new(backend, host));
    for in_place in [false, true] {
        let row_stride = w.cols + 11;
        let data = vec![T::from_f32(7.5); 5 + w.rows * row_stride];
        let elsewhere = Host { offset: 5, row_stride, data, ..w };
        let before = if in_place { w.clone() } else { elsewhere };
        let mut out = Device::new(backend, &before);
        let factors = Factors::Storage { a: da.view(), b: db.view() };
        let merge = Merge { w: (!in_place).then(|| dw.view()), factors, scale, gain: None, merged: out.view_mut() };
        backend.merge(merge).expect("a merge");
        let after = out.download(backend);
        let what = format!("merged, in place: {in_place}, {spec:?}");
        assert_same(&bits(&compact(&after).data), &bits(&expected), &what);
        untouched(&before, &after);
    }
}

fn untouched<T: Element>(before: &Host<T>, after: &Host<T>) {
    let outside = |host: &Host<T>| -> Vec<u32> {
        let bits = host.data.iter().enumerate().filter(|(at, _)| !host.is_element(*at));
        bits.map(|(_, value)| value.to_f32().to_bits()).collect()
    };
    assert_same(&outside(after), &outside(before), "what lies beside the matrix");
}

/// The values of `T` (16 bits) and what lies next to and halfway between them, through both factors.
pub fn rounds_every_neighbour<B: Backend, T: Element>(backend: &B, from_bits: fn(u16) -> T) {
    let mut values = Vec::new();
    for pattern in 0..=u16::MAX {
        let (value, next) = (from_bits(pattern).to_f32(), from_bits(pattern.wrapping_add(1)).to_f32());
        let tie = ((f64::from(value) + f64::from(next)) / 2.0) as f32;
        let random = f32::from_bits(Rng(u64::from(pattern)).bits() as u32);
        values.extend([value, tie, tie.next_up(), tie.next_down(), random]);
    }
    values.extend([f32::MAX, f32::MIN, f32::MIN_POSITIVE, 1e-45, -1e-45, f32::INFINITY, f32::NEG_INFINITY, -0.0]);
    values.extend([f32::NAN, f32::from_bits(0x7f80_0001), f32::from_bits(0xffff_ffff), f32::from_bits(0xff80_0001)]);
    let (r, k) = (67, 2501); // ragged in both directions
    values.resize(r * k * 2, 1.0);
    let (a, b) = values.split_at(r * k);
    let factors = [matrix_of(a, r, k), matrix_of(b, k, r)];
    rounds::<_, T, T>(backend, &factors, 1.0, |value| T::from_f64(f64::from(value)));
    rounds::<_, T, f32>(backend, &factors, 1.0, |value| value);
}

pub fn matrix_of(values: &[f32], rows: usize, cols: usize) -> Host<f32> {
    Host { rows, cols, offset: 0, row_stride: cols, data: values.to_vec() }
}

/// Round of f32 factors to `A`, into contiguous matrices and into windows of others.
pub fn rounds<B: Backend, T: Element, A: Element>(
    backend: &B,
    factors: &[Host<f32>; 2],
    scale: f32,
    expected: impl Fn(f32) -> A,
) {
    let sources = factors.clone().map(|host| Device::<B, f32>::new(backend, &host));
    for (offset, gap) in [(0, 0), (3, 5)] {
        let target = |from: &Host<f32>| {
            let row_stride = from.cols + gap;
            let data = vec![A::from_f32(7.5); offset + from.rows * row_stride + gap];
            Host { rows: from.rows, cols: from.cols, offset, row_stride, data }
        };
        let before = [target(&factors[0]), target(&factors[1])];
        let [mut a, mut b] = [&before[0], &before[1]].map(|host| Device::new(backend, host));
        let from = Factors::F32 { a: sources[0].view(), b: sources[1].view() };
        let round = Round { factors: from, scale, divisor: None, rounded_a: a.view_mut(), rounded_b: b.view_mut() };
        backend.round::<T, A>(round).expect("a rounding");
        for ((from, before), (to, scale)) in
            factors.iter().zip(&before).zip([(a.download(backend), 1.0), (b.download(backend), scale)])
        {
            untouched(before, &to);
            for (at, (from, to)) in compact(from).data.iter().zip(&compact(&to).data).enumerate() {
                let expected = expected(from * scale).to_f32();
                let same = to.to_f32().to_bits() == expected.to_bits() || (to.to_f32().is_nan() && expected.is_nan());
                assert!(same, "element {at}: {from:e} became {to:?}, expected {expected:e}");
            }
        }
    }
}

/// Every `step`-th value of `T` plus half a unit in its last place, and one f32 to either side of that.
pub fn merges_near_ties<B: Backend, T: Element>(backend: &B, from_bits: fn(u16) -> T, infinity: u16, step: usize) {
    let (n, k) = (4096 / step, 16);
    let w: Vec<T> = (0..n * k).map(|at| from_bits((at * step) as u16)).collect();
    // A is the identity: every element of the product is one of B, and zeros.
    let identity: Vec<f32> = (0..k * k).map(|at| if at / k == at % k { 1.0 } else { 0.0 }).collect();
    for side in [-1i32, 0, 1] {
        let b: Vec<f32> = (0..n * k)
            .map(|at| {
                let pattern = (at * step) as u16;
                let magnitude = pattern & 0x7fff;
                if magnitude + 1 >= infinity {
                    return 0.0; // infinities, NaN, and what is next to them
                }
                let (value, next) = (w[at].to_f32(), from_bits(pattern + 1).to_f32());
                let tie = value + (next - value) / 2.0; // exact: one bit more than T has
                let target = f32::from_bits(tie.to_bits().wrapping_add_signed(side));
                let delta = target - value;
                // Where the difference is not exact there is nothing to be held to.
                if f64::from(delta) == f64::from(target) - f64::from(value) { delta } else { 0.0 }
            })
            .collect();
        let exact = |at: usize| T::from_f64(w[at].to_f64() + f64::from(b[at]));
        let adapter = Adapter::upload_f32(backend, k, Scaling::Fixed(1.0), &identity, &b).expect("an adapter");
        let mut layer = LoraLinear::upload(backend.clone(), &w, None, n, k).expect("a layer");
        layer.add("ties", adapter).expect("an added adapter");
        layer.activate("ties").expect("an adapter");
        layer.merge().expect("a merge");
        let moved = b.iter().filter(|&&delta| delta != 0.0).count();
        assert!(moved > n * k * 9 / 10, "only {moved} of {} elements are moved", n * k);
        for (at, got) in download(backend, layer.weight(), n * k).iter().enumerate() {
            let (got, expected) = (got.to_f32(), exact(at).to_f32());
            assert!(got == expected || (got.is_nan() && expected.is_nan()), "{:?} + {:e}: {got:e}", w[at], b[at]);
        }
    }
}

/// Several adapters at once: the sum, each trained alone, merged in turn.
pub fn sums_several<B: Backend, T: Element>(backend: &B, f32_factors: bool) {
    let (m, n, k) = (19, 37, 41);
    let base = Spec::new(m, n, k, 0).forward::<T>();
    let bias = base.bias.as_ref().map(|bias| &bias.data[..]);
    let mut layer = LoraLinear::upload(backend.clone(), &base.w.data, bias, n, k).expect("a layer");
    // Ranks and scales that differ; one of rank 0.
    let adapters = [("a", 4, 2.0f32), ("none", 0, 1.0), ("b", 7, 0.375), ("c", 2, 1.7)];
    let (mut a, mut b, mut scales) = (Vec::new(), vec![Vec::new(); n], Vec::new());
    let mut expected = base.w.data.clone();
    for (name, r, scale) in adapters {
        let Host { data: a16, .. } = Spec { seed: r as u64, ..Spec::new(m, n, k, r) }.forward::<T>().a;
        let Host { data: b16, .. } = Spec { seed: r as u64, ..Spec::new(m, n, k, r) }.forward::<T>().b;
        let mut rng = Rng(r as u64);
        let (a32, b32) = (widened(&a16, &mut rng), widened(&b16, &mut rng));
        let scaling = Scaling::Fixed(f64::from(scale));
        let (adapter, a32, b32) = if f32_factors {
            (Adapter::upload_f32(backend, r, scaling, &a32, &b32), a32, b32)
        } else {
            (Adapter::upload(backend, r, scaling, &a16, &b16), widest(&a16), widest(&b16))
        };
        layer.add(name, adapter.expect("an adapter")).expect("an added adapter");
        expected = merged(&expected, &a32, &b32, scale, (n, k, r));
        // The oracle gets what forward reads: A in the storage type; of B with the scale as exact as f32 is.
        a.extend(a32.iter().map(|&v| T::from_f32(v)));
        (0..n).for_each(|row| b[row].extend(b32[row * r..][..r].iter().map(|&v| scale * v)));
        scales.extend(vec![scale; r]);
    }
    let r = scales.len();
    layer.activate_all(&["a", "none", "b", "c"]).expect("adapters");
    assert_eq!(layer.active(), ["a", "none", "b", "c"]);
    let x = Device::new(backend, &base.x);
    let y = layer.forward(x.view()).expect("forward");
    let y = Host { rows: m, cols: n, offset: 0, row_stride: n, data: download(backend, &y, m * n) };

    use fused_lora::reference::{self, Expected, Inputs, Mat};
    let inputs = |scale: f64, b: Mat| Inputs {
        x: base.x.to_mat(),
        w: base.w.to_mat(),
        a: Mat { rows: r, cols: k, data: a.iter().map(|v| v.to_f64()).collect() },
        b,
        bias: base.bias.as_ref().map(Host::to_mat),
        dy: Mat::from_fn(m, n, |_, _| 0.0),
        scale,
        keep: None,
        gate: None,
        gain: None,
    };
    let scaled = Mat::from_fn(n, r, |i, j| f64::from(b[i][j]));
    let exact = inputs(1.0, scaled.clone());
    let naive = inputs(1.0, scaled.map(|v| T::from_f64(v).to_f64()));
    let expected_y = Expected {
        truth: reference::forward(&exact).1,
        naive: reference::naive_forward::<T>(&naive).1,
        magnitude: reference::forward(&exact.magnitudes()).1,
        depth: 2 * k + r + 3,
        storage: T::DTYPE,
        output: T::DTYPE,
    };
    reference::check(&y.to_mat(), &expected_y).expect("the sum of several adapters");

    let refused = layer.forward_train(x.view()).map(drop);
    assert!(matches!(&refused, Err(Error::State { operation: "forward_train", .. })), "{refused:?}");
    layer.merge().expect("a merge");
    assert_same(&bits(&download(backend, layer.weight(), n * k)), &bits(&expected), "merged in turn");
    let names: Vec<String> = layer.merge_for_good().expect("a merge").into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["a", "none", "b", "c"]);
    assert_same(&bits(&download(backend, layer.weight(), n * k)), &bits(&expected), "merged for good");
}

/// f32 factors that change: forward reads them as they are now, one adapter or several.
pub fn follows_updates<B: Backend, T: Element>(backend: &B) {
    let spec = Spec::new(9, 21, 18, 5);
    let Made { mut layer, forward, a32, b32 } = make::<B, T>(backend, &spec, true);
    let x = Device::new(backend, &forward.x);
    let y = |layer: &LoraLinear<B, T>| bits(&download(backend, &layer.forward(x.view()).expect("forward"), 9 * 21));
    let (a, b): (Vec<f32>, Vec<f32>) = (a32.iter().map(|v| -2.0 * v).collect(), b32.iter().map(|v| 0.5 * v).collect());
    let fresh = |several: bool| {
        let bias = forward.bias.as_ref().map(|bias| &bias.data[..]);
        let mut fresh = LoraLinear::upload(backend.clone(), &forward.w.data, bias, 21, 18).expect("a layer");
        let scaling = Scaling::Fixed(f64::from(spec.scale));
        fresh.add("one", Adapter::upload_f32(backend, 5, scaling, &a, &b).expect("an adapter")).expect("added");
        if several {
            let Some(Buffers::Storage { a, b, .. }) = layer.adapter("other").map(Adapter::buffers) else {
                unreachable!("the other adapter is in the storage type")
            };
            let (a, b) = (download(backend, a, 3 * 18), download(backend, b, 21 * 3));
            let other = Adapter::upload(backend, 3, Scaling::Lora { alpha: 6.0 }, &a, &b).expect("an adapter");
            fresh.add("other", other).expect("added");
            fresh.activate_all(&["one", "other"]).expect("adapters");
        } else {
            fresh.activate("one").expect("an adapter");
        }
        y(&fresh)
    };
    let (alone, together) = (fresh(false), fresh(true));
    layer.activate_all(&["one", "other"]).expect("adapters");
    assert_ne!(y(&layer), together);
    let change = |factors: BuffersMut<'_, B, T>| match factors {
        BuffersMut::F32 { a: to_a, b: to_b, .. } => {
            backend.overwrite(&a, to_a)?;
            backend.overwrite(&b, to_b)
        }
        BuffersMut::Storage { .. } => unreachable!("the factors are f32"),
    };
    layer.update("one", change).expect("an update");
    assert_eq!(y(&layer), together, "several adapters after an update");
    layer.activate("one").expect("an adapter");
    assert_eq!(y(&layer), alone, "one adapter after an update");
    let Some(Buffers::F32 { a: now, .. }) = layer.adapter("one").map(Adapter::buffers) else {
        unreachable!("the factors are f32")
    };
    assert_eq!(bits(&download(backend, now, a.len())), bits(&a));
}

/// Shapes for layers: ragged, at the edges of tiles, R = 0 and above both dimensions.
pub fn layer_table() -> Vec<Spec> {
    let spec = |placement, m, n, k, r| Spec { placement, ..Spec::new(m, n, k, r) };
    vec![
        Spec { accumulate: true, ..spec(Placement::Strided, 5, 33, 70, 4) },
        Spec { bias: false, ..spec(Placement::Unaligned, 17, 65, 24, 9) },
        spec(Placement::Contiguous, 1, 40, 31, 1),
        Spec { accumulate: true, ..spec(Placement::Contiguous, 30, 64, 64, 16) },
        spec(Placement::Contiguous, 7, 12, 10, 40),
        Spec { outputs: [true, false, false, true], ..spec(Placement::Contiguous, 6, 20, 16, 0) },
        Spec { outputs: [false, true, false, false], ..spec(Placement::Contiguous, 6, 20, 16, 2) },
    ]
}

/// Shapes for merge: at the edges of its tiles and of its steps along the rank.
pub fn merge_table() -> Vec<Spec> {
    let shapes = [(64, 64, 32), (65, 130, 33), (1, 1, 1), (63, 70, 31), (128, 65, 64), (3, 257, 5), (70, 3, 0)];
    let spec = |(at, (n, k, r)): (usize, (usize, usize, usize))| Spec {
        placement: Placement::ALL[at % 4],
        ..Spec::new(2, n, k, r)
    };
    shapes.into_iter().enumerate().map(spec).collect()
}
