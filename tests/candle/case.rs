//! One application of the op, and the same composed of candle's own operations.

use candle_core::{DType, Device, Result, Tensor, Var};
use fused_lora::Dtype;
use fused_lora::candle::lora;
use fused_lora::reference::{self, Expected, Inputs, Mat};

/// SplitMix64, uniform in [−1, 1): every test names its seed and repeats exactly.
pub struct Rng(pub u64);

impl Rng {
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    /// A tensor of that dtype with elements within ±`size`.
    pub fn tensor(&mut self, dims: &[usize], size: f64, dtype: DType) -> Result<Tensor> {
        let data = (0..dims.iter().product()).map(|_| size * self.unit()).collect::<Vec<_>>();
        Tensor::from_vec(data, dims, &Device::Cpu)?.to_dtype(dtype)
    }
}

/// x, w, a, b, scale and bias to y.
pub type Op = fn(&Tensor, &Tensor, &Tensor, &Tensor, f64, Option<&Tensor>) -> Result<Tensor>;

/// What goes into the op; `dy` is the gradient that arrives from above.
pub struct Case {
    pub x: Tensor,
    pub w: Tensor,
    pub a: Tensor,
    pub b: Tensor,
    pub bias: Option<Tensor>,
    pub scale: f64,
    pub dy: Tensor,
}

/// y, and the gradients of x, A and B where they are tracked.
pub struct Results {
    pub y: Tensor,
    pub gradients: [Option<Tensor>; 3],
    /// An input that is not tracked got a gradient all the same.
    pub stray: bool,
}

impl Case {
    /// Contiguous tensors: x of `tokens` × K, everything in `dtype` but A and B in `adapter`.
    pub fn new(tokens: &[usize], (n, k, r): (usize, usize, usize), dtype: DType, adapter: DType) -> Result<Self> {
        let mut rng = Rng((n * 31 + k * 7 + r) as u64);
        let dims = |last| [tokens, &[last]].concat();
        let fan = 1.0 / (k as f64).sqrt();
        Ok(Self {
            x: rng.tensor(&dims(k), 1.0, dtype)?,
            w: rng.tensor(&[n, k], fan, dtype)?,
            a: rng.tensor(&[r, k], fan, adapter)?,
            b: rng.tensor(&[n, r], 1.0 / (r as f64).sqrt(), adapter)?,
            bias: Some(rng.tensor(&[n], 1.0, dtype)?),
            scale: 1.7,
            dy: rng.tensor(&dims(n), 1.0, dtype)?,
        })
    }

    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let Self { x, w, a, b, bias, scale, dy } = self;
        let to = |tensor: &Tensor| tensor.to_device(device);
        let bias = bias.as_ref().map(to).transpose()?;
        Ok(Self { x: to(x)?, w: to(w)?, a: to(a)?, b: to(b)?, bias, scale: *scale, dy: to(dy)? })
    }

    pub fn fused(x: &Tensor, w: &Tensor, a: &Tensor, b: &Tensor, scale: f64, bias: Option<&Tensor>) -> Result<Tensor> {
        lora(x, w, a, b, scale, bias)
    }

    /// x Wᵀ + s · (x Aᵀ) Bᵀ (+ bias), as one writes it without the op.
    pub fn composed(
        x: &Tensor,
        w: &Tensor,
        a: &Tensor,
        b: &Tensor,
        scale: f64,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (a, b) = (a.to_dtype(x.dtype())?, b.to_dtype(x.dtype())?);
        let x = x.contiguous()?;
        let product = |x: &Tensor, w: &Tensor| x.contiguous()?.broadcast_matmul(&w.t()?);
        let y = (product(&x, w)? + product(&product(&x, &a)?, &b)?.affine(scale, 0.0)?)?;
        bias.map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))
    }

    /// Forward and backward of `op`, with those of x, A and B tracked that `tracked` says.
    pub fn run(
        &self,
        tracked: [bool; 3],
        op: impl Fn(&Tensor, &Tensor, &Tensor, &Tensor, f64, Option<&Tensor>) -> Result<Tensor>,
    ) -> Result<Results> {
        // A variable is contiguous; what is not tracked keeps its layout.
        let inputs = [&self.x, &self.a, &self.b];
        let vars: Vec<Option<Var>> = inputs
            .iter()
            .zip(tracked)
            .map(|(input, tracked)| tracked.then(|| Var::from_tensor(input)).transpose())
            .collect::<Result<_>>()?;
        let input = |at: usize| vars[at].as_ref().map_or(inputs[at], |var| var.as_tensor());
        let y = op(input(0), &self.w, input(1), input(2), self.scale, self.bias.as_ref())?;
        let store = (&y * &self.dy)?.sum_all()?.backward()?;
        let gradient = |at: usize| vars[at].as_ref().and_then(|var| store.get(var)).cloned();
        let stray = (0..3).any(|at| !tracked[at] && store.get(inputs[at]).is_some());
        Ok(Results { y: y.detach(), gradients: [gradient(0), gradient(1), gradient(2)], stray })
    }

    /// Runs the op with those inputs tracked and holds everything to the tolerance rule, with candle's own autograd of the
    /// composed expression as the result to be no more than twice as wrong as.
    #[track_caller]
    pub fn check(&self, tracked: [bool; 3], context: &str) {
        let ours = self.run(tracked, Self::fused).unwrap_or_else(|error| panic!("{context}: {error}"));
        self.judge(&ours, tracked, context);
    }

    #[track_caller]
    pub fn judge(&self, ours: &Results, tracked: [bool; 3], context: &str) {
        self.judge_by(&self.inputs(), ours, (tracked, Self::composed), context);
    }

    /// As [`judge`](Self::judge), with other inputs of the oracle and another expression than those of the plain layer.
    #[track_caller]
    pub fn judge_by(
        &self,
        inputs: &Inputs,
        ours: &Results,
        (tracked, composed): (
            [bool; 3],
            impl Fn(&Tensor, &Tensor, &Tensor, &Tensor, f64, Option<&Tensor>) -> Result<Tensor>,
        ),
        context: &str,
    ) {
        assert!(!ours.stray, "{context}: a gradient that nobody asked for");
        let composed = self.run(tracked, composed).expect("candle's own operations");
        let (h, y) = reference::forward(inputs);
        let truth = reference::backward(inputs, &h);
        let magnitudes = inputs.magnitudes();
        let (h_magnitude, y_magnitude) = reference::forward(&magnitudes);
        let magnitude = reference::backward(&magnitudes, &h_magnitude);
        let (m, n, k, r) = (inputs.x.rows, inputs.w.rows, inputs.w.cols, inputs.a.rows);
        assert_eq!((ours.y.dims(), ours.y.dtype()), (self.dy.dims(), self.dy.dtype()), "{context}: y");
        let hold = |name, ours: &Tensor, composed: &Tensor, truth, magnitude, depth| {
            assert_eq!((ours.dims(), ours.dtype()), (composed.dims(), composed.dtype()), "{context}: {name}");
            let storage = dtype(self.w.dtype());
            let expected =
                Expected { truth, naive: mat(composed), magnitude, depth, storage, output: dtype(ours.dtype()) };
            if let Err(complaint) = reference::check(&mat(ours), &expected) {
                panic!("{context}: {name}: {complaint}");
            }
        };
        hold("y", &ours.y, &composed.y, y, y_magnitude, 2 * k + r + 2);
        let gradients = [
            ("dx", truth.dx, magnitude.dx, 2 * n + r + 2),
            ("da", truth.da, magnitude.da, n + m),
            ("db", truth.db, magnitude.db, k + m),
        ];
        for (at, (name, truth, magnitude, depth)) in gradients.into_iter().enumerate() {
            match (&ours.gradients[at], &composed.gradients[at]) {
                (Some(ours), Some(composed)) => hold(name, ours, composed, truth, magnitude, depth),
                (None, None) => assert!(!tracked[at], "{context}: {name} is missing"),
                (ours, _) => panic!("{context}: {name} present: {}", ours.is_some()),
            }
        }
    }

    /// As the products take them: f32 adapters over 16 bits are rounded.
    pub fn inputs(&self) -> Inputs {
        let rounded = |tensor: &Tensor| mat(&tensor.to_dtype(self.w.dtype()).expect("a cast"));
        Inputs {
            x: mat(&self.x),
            w: mat(&self.w),
            a: rounded(&self.a),
            b: rounded(&self.b),
            bias: self.bias.as_ref().map(mat),
            dy: mat(&self.dy),
            scale: f64::from(self.scale as f32),
            keep: None,
            gate: None,
            gain: None,
        }
    }
}

pub fn dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::Bf16,
        _ => Dtype::F32,
    }
}

/// The matrix of all tokens, in f64.
pub fn mat(tensor: &Tensor) -> Mat {
    let cols = *tensor.dims().last().expect("a dimension");
    let data = tensor
        .to_device(&Device::Cpu)
        .and_then(|tensor| tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1())
        .expect("elements");
    Mat { rows: data.len() / cols, cols, data }
}

/// The bits of every element, for comparisons that allow no difference.
pub fn bits(tensor: &Tensor) -> Vec<u64> {
    mat(tensor).data.into_iter().map(f64::to_bits).collect()
}
