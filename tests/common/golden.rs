//! Layers that PEFT recorded, through `LoraLinear`.

pub mod full;

use fused_lora::linear::{Adapter, Backend, Gradients, LoraLinear, Magnitude, Routes, Scaling};
use fused_lora::reference::{self, Expected, Inputs, Mat, unit_roundoff};
use fused_lora::{Dtype, Element, Matrix, MatrixMut, Routing, bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::Value;

use super::layers::download;

/// A case directory.
pub struct Golden {
    case: Value,
    bytes: Vec<u8>,
}

/// A recorded tensor, widened.
struct Tensor {
    shape: Vec<usize>,
    data: Vec<f64>,
}

impl Tensor {
    /// All leading dimensions as rows.
    fn mat(&self) -> Mat {
        let cols = self.shape.last().copied().unwrap_or(1);
        Mat { rows: self.data.len() / cols, cols, data: self.data.clone() }
    }

    fn round<T: Element>(&self) -> Vec<T> {
        self.data.iter().map(|&value| T::from_f64(value)).collect()
    }
}

fn values(view: &TensorView<'_>) -> Vec<f64> {
    let bytes = view.data();
    match view.dtype() {
        safetensors::Dtype::BF16 => bytes.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f64()).collect(),
        safetensors::Dtype::F16 => bytes.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f64()).collect(),
        safetensors::Dtype::F32 => bytes.as_chunks().0.iter().map(|&b| f64::from(f32::from_le_bytes(b))).collect(),
        safetensors::Dtype::U8 => bytes.iter().map(|&b| f64::from(b)).collect(),
        safetensors::Dtype::F64 => bytes.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect(),
        other => unreachable!("a tensor of {other:?}"),
    }
}

/// How a mode stores the layer.
#[derive(Clone, Copy, PartialEq)]
pub struct Mode {
    pub name: &'static str,
    /// The mode that holds its truth.
    pub truth: &'static str,
    pub f32_factors: bool,
}

pub const F32: Mode = Mode { name: "f32", truth: "f64", f32_factors: false };
pub const BF16: Mode = Mode { name: "bf16", truth: "f64", f32_factors: false };
pub const F16: Mode = Mode { name: "f16", truth: "f64", f32_factors: false };
/// f32 factors whose products are done in bf16, as ours are.
pub const BF16_AMP: Mode = Mode { name: "bf16_amp", truth: "f64_a32", f32_factors: true };

impl Golden {
    pub fn load(name: &str) -> Self {
        let folder = super::project().join("tests/golden").join(name);
        let text = std::fs::read_to_string(folder.join("case.json")).expect("case.json");
        let bytes = std::fs::read(folder.join("tensors.safetensors")).expect("tensors.safetensors");
        Self { case: serde_json::from_str(&text).expect("JSON"), bytes }
    }

    fn find(&self, name: &str) -> Option<Tensor> {
        let tensors = SafeTensors::deserialize(&self.bytes).expect("safetensors");
        let view = tensors.tensor(name).ok()?;
        Some(Tensor { shape: view.shape().to_vec(), data: values(&view) })
    }

    fn tensor(&self, name: &str) -> Tensor {
        self.find(name).unwrap_or_else(|| unreachable!("no tensor {name}"))
    }

    fn size(&self, key: &str) -> usize {
        self.case[key].as_u64().expect("a size") as usize
    }

    fn active(&self) -> Vec<&str> {
        self.case["active"].as_array().expect("a list").iter().map(|name| name.as_str().expect("a name")).collect()
    }

    /// As case.json describes it: α and whether √r, not the factor that PEFT made of them.
    fn scaling(&self, name: &str) -> (usize, Scaling) {
        let adapter = &self.case["adapters"][name];
        let (r, alpha) = (adapter["r"].as_u64().expect("r") as usize, adapter["lora_alpha"].as_f64().expect("alpha"));
        let stabilised = adapter["config"]["use_rslora"].as_bool().unwrap_or(false);
        let scaling = if stabilised { Scaling::RsLora { alpha } } else { Scaling::Lora { alpha } };
        let recorded = adapter["scaling"].as_f64().expect("a scaling") as f32;
        assert_eq!(scaling.scale(r), recorded, "{name}");
        (r, scaling)
    }

    fn factors(&self, name: &str, mode: Mode) -> [Tensor; 2] {
        let suffix = if mode.f32_factors { "_f32" } else { "" };
        ["A", "B"].map(|factor| self.tensor(&format!("{name}.{factor}{suffix}")))
    }

    /// The bias on B.
    fn b_bias(&self, name: &str, mode: Mode) -> Option<Tensor> {
        let suffix = if mode.f32_factors { "_f32" } else { "" };
        self.find(&format!("{name}.Bbias{suffix}"))
    }

    /// DoRA's magnitude.
    fn magnitude(&self, name: &str, mode: Mode) -> Option<Tensor> {
        let suffix = if mode.f32_factors { "_f32" } else { "" };
        self.find(&format!("{name}.m{suffix}"))
    }

    /// The layer's bias: that of the base, or what an adapter brings in its place.
    fn bias(&self) -> Option<Tensor> {
        let trained = self.active().into_iter().find_map(|name| self.find(&format!("{name}.b_trained")));
        trained.or_else(|| self.find("b"))
    }

    fn layer<B: Backend, T: Element>(&self, backend: &B, mode: Mode, names: &[&str]) -> LoraLinear<B, T> {
        let (n, k) = (self.size("out_features"), self.size("in_features"));
        let (w, bias) = (self.tensor("W").round::<T>(), self.bias().map(|bias| bias.round::<T>()));
        let mut layer = LoraLinear::upload(backend.clone(), &w, bias.as_deref(), n, k).expect("a layer");
        for &name in names {
            let ((r, scaling), [a, b]) = (self.scaling(name), self.factors(name, mode));
            let adapter = if mode.f32_factors {
                Adapter::upload_f32(backend, r, scaling, &a.round::<f32>(), &b.round::<f32>())
            } else {
                Adapter::upload(backend, r, scaling, &a.round::<T>(), &b.round::<T>())
            };
            let mut adapter = adapter.expect("an adapter");
            if mode == full::BF16_A32 || mode == full::F16_A32 {
                adapter = adapter.at_full_precision();
            }
            if let Some(b_bias) = self.b_bias(name, mode) {
                adapter = adapter.with_b_bias(backend, &b_bias.round::<f32>()).expect("a bias");
            }
            if let Some(magnitude) = self.magnitude(name, mode) {
                adapter = adapter.with_magnitude(backend, &magnitude.round::<f32>()).expect("a magnitude");
            }
            layer.add(name, adapter).expect("an added adapter");
        }
        layer
    }

    /// What the oracle takes; B and its bias scaled, so that adapters of different scales are one. Behind DoRA B is divided by its
    /// gain, which multiplies everything.
    fn inputs(&self, names: &[&str], mode: Mode) -> Inputs {
        let (n, k) = (self.size("out_features"), self.size("in_features"));
        let (mut a, mut b, mut r) = (Vec::new(), vec![Vec::new(); n], 0);
        let mut bias = self.bias().map(|bias| bias.data);
        let (w, mut gain) = (self.tensor("W").mat(), None::<Mat>);
        for name in names {
            let ((rank, scaling), [a32, b32]) = (self.scaling(name), self.factors(name, mode));
            let scale = f64::from(scaling.scale(rank));
            let earlier = gain.clone();
            if let Some(magnitude) = self.magnitude(name, mode) {
                let norm = reference::norm(&w, &a32.mat(), &b32.mat(), scale);
                let before = |at| earlier.as_ref().map_or(1.0, |gain| gain.at(0, at));
                gain = Some(Mat::from_fn(1, n, |_, at| magnitude.data[at] / norm.at(0, at) * before(at)));
            }
            let part = |row: usize| scale / earlier.as_ref().map_or(1.0, |gain| gain.at(0, row));
            a.extend(a32.data);
            (0..n).for_each(|row| b[row].extend(b32.data[row * rank..][..rank].iter().map(|v| v * part(row))));
            r += rank;
            if let Some(b_bias) = self.b_bias(name, mode) {
                let bias = bias.get_or_insert_with(|| vec![0.0; n]);
                bias.iter_mut().zip(&b_bias.data).for_each(|(bias, own)| *bias += scale * own);
            }
        }
        Inputs {
            x: self.tensor("x").mat(),
            w,
            a: Mat { rows: r, cols: k, data: a },
            b: Mat { rows: n, cols: r, data: b.concat() },
            bias: bias.map(|data| Mat { rows: 1, cols: n, data }),
            dy: self.tensor("dY").mat(),
            scale: 1.0,
            keep: self.mask(names),
            gate: None,
            gain,
        }
    }

    /// What dropout multiplied x by, where it was recorded.
    fn mask(&self, names: &[&str]) -> Option<Mat> {
        let [name] = names else { return None };
        let p = self.case["adapters"][name]["config"]["lora_dropout"].as_f64()?;
        Some(self.find(&format!("{name}.mask"))?.mat().map(|kept| kept / (1.0 - p)))
    }

    /// The oracle with the recorded mask against what PEFT computed in f64: dropout means the same to both.
    pub fn check_oracle(&self) {
        let mode = F32; // whose truth is that of A and B
        let [name] = self.active()[..] else { unreachable!("several adapters") };
        let inputs = self.inputs(&[name], mode);
        let scale = f64::from(self.scaling(name).1.scale(inputs.a.rows));
        let (h, y) = reference::forward(&inputs);
        let gradients = reference::backward(&inputs, &h);
        // B carries the scale here, and h does not.
        let (da, db) = (format!("{name}.dA"), format!("{name}.dB"));
        let results = [("y", y), ("dX", gradients.dx), (&da, gradients.da), (&db, gradients.db.map(|v| scale * v))];
        for (what, got) in results {
            let recorded = self.tensor(&format!("f64/{what}")).mat();
            let error = got.plus(&recorded.map(|v| -v)).norm() / recorded.norm();
            assert!(error <= 1e-14, "{}: {what} is off by {error:e}", self.case["name"]);
        }
    }

    /// `got` against the recorded truth, with what PEFT computed in this mode as the naive composition. `scale` widens the
    /// magnitudes by what the adapters' scale is not part of.
    fn judge<T: Element>(&self, mode: Mode, what: &str, got: Mat, magnitude: Mat, depth: usize, output: Dtype) {
        let recorded = |mode: &str| self.tensor(&format!("{mode}/{what}")).mat();
        let (truth, naive) = (recorded(mode.truth), recorded(mode.name));
        let expected = Expected { truth, naive, magnitude, depth, storage: T::DTYPE, output };
        if let Err(complaint) = reference::check(&got, &expected) {
            unreachable!("{} {}/{what}: {complaint}", self.case["name"], mode.name);
        }
    }

    /// Forward with all active adapters, backward with each alone, merge: as far from the recorded truth as PEFT is.
    pub fn check<B: Backend, T: Element>(&self, backend: &B, mode: Mode) {
        let (n, k) = (self.size("out_features"), self.size("in_features"));
        let names = self.active();
        let mut layer = self.layer::<B, T>(backend, mode, &names);
        layer.activate_all(&names).expect("the adapters");
        let (x, dy) = (self.tensor("x"), self.tensor("dY"));
        let m = x.data.len() / k;
        let [dx_buffer, dy_buffer] = [&x, &dy].map(|t| backend.upload(&t.round::<T>()).expect("an upload"));
        let (x, dy) = (Matrix::new(B::read(&dx_buffer), m, k), Matrix::new(B::read(&dy_buffer), m, n));
        let y = layer.forward(x).expect("forward");
        let all = self.inputs(&names, mode);
        let r = all.a.rows;
        let y = mat(m, n, &download(backend, &y, m * n));
        self.judge::<T>(mode, "y", y, reference::forward(&all.magnitudes()).1, 2 * k + r + 3, T::DTYPE);

        for name in &names {
            layer.activate(name).expect("an adapter");
            let (y, pass) = layer.forward_train(x).expect("forward_train");
            let (r, scaling) = self.scaling(name);
            let mut dx = backend.alloc::<T>(m * k).expect("memory");
            let (mut da, mut db) =
                (backend.alloc::<f32>(r * k).expect("memory"), backend.alloc::<f32>(n * r).expect("memory"));
            let mut dbias = backend.alloc::<f32>(n).expect("memory");
            let mut dm = self.magnitude(name, mode).map(|_| backend.alloc::<f32>(n).expect("memory"));
            let gradients = Gradients {
                dx: Some(MatrixMut::new(B::write(&mut dx), m, k)),
                da: Some(MatrixMut::new(B::write(&mut da), r, k)),
                db: Some(MatrixMut::new(B::write(&mut db), n, r)),
                dbias: Some(MatrixMut::new(B::write(&mut dbias), 1, n)),
                dm: dm.as_mut().map(|dm| {
                    let dm = MatrixMut::new(B::write(dm), 1, n);
                    Magnitude { y: Matrix::new(B::read(&y), m, n), dm }
                }),
                ..Gradients::default()
            };
            layer.backward(&pass, dy, gradients).expect("backward");
            // B carries the scale here, and h does not.
            let one = self.inputs(&[name], mode).magnitudes();
            let scale = f64::from(scaling.scale(r));
            let h = one.x.times(&one.a.transposed()).map(|v| v * scale);
            let magnitude = reference::backward(&one, &h);
            let da = mat(r, k, &download(backend, &da, r * k));
            let db = mat(n, r, &download(backend, &db, n * r));
            // PEFT keeps gradients in the type of the factors.
            let output = if mode.f32_factors { Dtype::F32 } else { T::DTYPE };
            self.judge::<T>(mode, &format!("{name}.dA"), da, magnitude.da, n + m, output);
            self.judge::<T>(mode, &format!("{name}.dB"), db, magnitude.db, k + m, output);
            if let (Some(dm), Some(recorded)) = (dm, self.magnitude(name, mode)) {
                let minus = one.bias.as_ref().map(|bias| bias.map(|v| -v.abs()));
                let y = reference::forward(&one).1;
                let size = reference::magnitude_gradient(&one.dy, &y, minus.as_ref(), &recorded.mat().map(f64::abs));
                let dm = mat(1, n, &download(backend, &dm, n));
                self.judge::<T>(mode, &format!("{name}.dm"), dm, size, 2 * k + r + m + 5, output);
            }
            let dbias = mat(1, n, &download(backend, &dbias, n));
            for (what, factor) in [("db".to_owned(), 1.0), (format!("{name}.dBbias"), scale)] {
                if self.find(&format!("{}/{what}", mode.name)).is_some() {
                    let times = |sums: &Mat| sums.map(|v| factor * v);
                    self.judge::<T>(mode, &what, times(&dbias), times(&magnitude.dbias), m + 1, output);
                }
            }
            if let [_] = names[..] {
                let dx = mat(m, k, &download(backend, &dx, m * k));
                self.judge::<T>(mode, "dX", dx, magnitude.dx, 2 * n + r + 2, T::DTYPE);
            }
        }

        layer.activate_all(&names).expect("the adapters");
        layer.merge().expect("a merge");
        let merged = mat(n, k, &download(backend, layer.weight(), n * k));
        let folded = |of: &Inputs| {
            let sum = of.w.plus(&of.b.times(&of.a));
            let gain = |row| of.gain.as_ref().map_or(1.0, |gain| gain.at(0, row));
            Mat::from_fn(n, k, |row, col| gain(row) * sum.at(row, col))
        };
        let (truth, limit) = (folded(&all), folded(&all.magnitudes()));
        if let Some(recorded) = self.find(&format!("{}/W_merged", mode.truth)) {
            let off = truth.plus(&recorded.mat().map(|v| -v)).norm() / recorded.mat().norm();
            // The scale is that of f32 here.
            assert!(off <= unit_roundoff(Dtype::F32), "{}: the oracle's merge is off by {off:e}", self.case["name"]);
        }
        // One rounding per adapter, and the f32 sum with the gain of each.
        let each =
            unit_roundoff(T::DTYPE) * names.len() as f64 + (r + 3 + 4 * names.len()) as f64 * unit_roundoff(Dtype::F32);
        for (at, (got, truth)) in merged.data.iter().zip(&truth.data).enumerate() {
            let bound = each * limit.data[at] + 1e-8;
            assert!((got - truth).abs() <= bound, "{} {}: merged {at}", self.case["name"], mode.name);
        }
        if let Some(exact) = self.find(&format!("{}/b_merged", mode.truth)) {
            let got = mat(1, n, &download(backend, layer.bias().expect("a bias"), n));
            let limit = all.magnitudes().bias.expect("a bias");
            for (at, (got, truth)) in got.data.iter().zip(&exact.data).enumerate() {
                let bound = (unit_roundoff(T::DTYPE) + 2.0 * unit_roundoff(Dtype::F32)) * limit.data[at];
                assert!((got - truth).abs() <= bound, "{} {}: merged bias {at}", self.case["name"], mode.name);
            }
        }
        layer.unmerge().expect("an unmerge");
        let w = mat(n, k, &download(backend, layer.weight(), n * k));
        assert_eq!(w, all.w, "unmerged");
    }
}

impl Golden {
    /// A batch whose rows go through different adapters: y as far from the recorded truth as PEFT is.
    pub fn check_mixed<B: Backend, T: Element>(&self, backend: &B, mode: Mode) {
        let (n, k) = (self.size("out_features"), self.size("in_features"));
        let names: Vec<&str> =
            self.case["adapters"].as_object().expect("adapters").keys().map(|name| &**name).collect();
        let layer = self.layer::<B, T>(backend, mode, &names);
        let bank = layer.bank(&names).expect("a bank");
        let x = self.tensor("x");
        let m = x.data.len() / k;
        // One name per entry of the first dimension of x.
        let entries = self.case["adapter_names"].as_array().expect("a list");
        let per_entry = m / entries.len();
        let id = |row: usize| names.iter().position(|name| entries[row / per_entry] == *name);
        let ids: Vec<Option<usize>> = (0..m).map(id).collect();
        let routing = Routing::new(bank.slots(), &ids).expect("a routing");
        let routes = Routes::upload(backend, &routing).expect("an upload");
        let x_buffer = backend.upload(&x.round::<T>()).expect("an upload");
        let y = layer.forward_routed(Matrix::new(B::read(&x_buffer), m, k), &bank, &routes).expect("forward");
        let y = mat(m, n, &download(backend, &y, m * n));
        // B carries the scales: every row goes through its own ranks of all adapters.
        let all = self.inputs(&names, mode);
        let r = all.a.rows;
        let ranks: Vec<usize> = names.iter().map(|name| self.scaling(name).0).collect();
        let first = |id: usize| ranks[..id].iter().sum::<usize>();
        let goes = |row: usize, rank: usize| ids[row].is_some_and(|id| (first(id)..first(id + 1)).contains(&rank));
        let gate = Some(Mat::from_fn(m, r, |row, rank| f64::from(u8::from(goes(row, rank)))));
        let magnitude = reference::forward(&Inputs { gate, ..all.magnitudes() }).1;
        self.judge::<T>(mode, "y", y, magnitude, 2 * k + r + 3, T::DTYPE);
    }
}

fn mat<T: Element>(rows: usize, cols: usize, data: &[T]) -> Mat {
    Mat { rows, cols, data: data.iter().map(|value| value.to_f64()).collect() }
}
