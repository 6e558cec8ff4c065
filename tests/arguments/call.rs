//! A legal call of each operation, over addresses and over buffers, and how an entry of the matrix makes it wrong.
#![allow(dead_code)] // each test binary uses its part

use fused_lora::plan::{Device, Launch, Plan};
use fused_lora::{Dtype, Element, Error, Result, f16, raw};

use super::common::data::{Placement, Routes, Spec};
use super::common::factors::{HostGain, HostMerge, HostRound};
use super::common::{Host, HostBackward, HostDropout, HostForward, HostGradient, raw as ops};
use super::table::{Fault, Op, Row, SHAPE, rows};

/// An operation over addresses.
#[allow(clippy::large_enum_variant, reason = "there is one at a time")]
pub enum OnAddresses {
    Forward(raw::Forward),
    Backward(raw::Backward),
    Merge(raw::Merge),
    Round(raw::Round),
    Gain(raw::Gain),
}

impl OnAddresses {
    pub fn new(op: Op, wide: bool) -> Self {
        let dtype = Dtype::F16;
        match op {
            Op::Forward => {
                let h = Some(raw::Matrix::new(1 << 40, SHAPE.m, SHAPE.r));
                Self::Forward(raw::Forward { h, variant: variant(op), ..ops::forward(dtype, SHAPE) })
            }
            Op::Backward => {
                let mut op = raw::Backward { variant: variant(op), ..ops::backward(dtype, SHAPE) };
                [&mut op.da, &mut op.db, &mut op.dbias].into_iter().flatten().for_each(|gradient| gradient.f32 = wide);
                Self::Backward(op)
            }
            Op::DoraForward => {
                let h = Some(raw::Matrix::new(1 << 40, SHAPE.m, SHAPE.r));
                Self::Forward(raw::Forward { h, variant: of_dora(op), ..ops::forward(dtype, SHAPE) })
            }
            Op::DoraBackward => {
                let at = |index: u64, arg| raw::Matrix::new(index << 42, op.dims(arg).0, op.dims(arg).1);
                let (y, bias) = (at(2, "y"), Some(at(3, "bias")));
                let dm = Some(raw::MagnitudeGradient { y, bias, magnitude: at(4, "magnitude"), dm: at(5, "dm") });
                let mut op = raw::Backward { variant: of_dora(op), dm, ..ops::backward(dtype, SHAPE) };
                [&mut op.da, &mut op.db, &mut op.dbias].into_iter().flatten().for_each(|gradient| gradient.f32 = wide);
                Self::Backward(op)
            }
            Op::Merge => Self::Merge(ops::merge(dtype, SHAPE, wide)),
            Op::Round => Self::Round(ops::round(dtype, SHAPE, wide)),
            Op::Gain => Self::Gain(ops::gain(dtype, SHAPE, wide)),
        }
    }

    fn variant(&mut self) -> Option<&mut raw::Variant> {
        match self {
            Self::Forward(op) => Some(&mut op.variant),
            Self::Backward(op) => Some(&mut op.variant),
            _ => None,
        }
    }

    pub fn argument(&mut self, arg: &str) -> &mut raw::Matrix {
        if matches!(arg, "routes" | "seed") {
            return match self.variant() {
                Some(raw::Variant { routes: Some(routes), .. }) if arg == "routes" => routes,
                Some(raw::Variant { dropout: Some(raw::Dropout { seed: raw::Seed::Memory(seed), .. }), .. }) => seed,
                _ => unreachable!("the operation has no {arg}"),
            };
        }
        if let ("gain", true) = (arg, matches!(self, Self::Forward(_) | Self::Backward(_))) {
            return self.variant().and_then(|variant| variant.gain.as_mut()).expect("a gain");
        }
        match self {
            Self::Forward(op) => ops::forward_argument(op, arg),
            Self::Backward(op) => ops::backward_argument(op, arg),
            Self::Merge(op) => ops::merge_argument(op, arg),
            Self::Round(op) => ops::round_argument(op, arg),
            Self::Gain(op) => ops::gain_argument(op, arg),
        }
    }

    pub fn scale(&mut self) -> &mut f32 {
        match self {
            Self::Forward(op) => &mut op.scale,
            Self::Backward(op) => &mut op.scale,
            Self::Merge(op) => &mut op.scale,
            Self::Round(op) => &mut op.scale,
            Self::Gain(op) => &mut op.scale,
        }
    }

    pub fn dtype(&mut self) -> &mut Dtype {
        match self {
            Self::Forward(op) => &mut op.dtype,
            Self::Backward(op) => &mut op.dtype,
            Self::Merge(op) => &mut op.dtype,
            Self::Round(op) => &mut op.dtype,
            Self::Gain(op) => &mut op.dtype,
        }
    }

    pub fn check(&self) -> Result<()> {
        match self {
            Self::Forward(op) => op.check().map(drop),
            Self::Backward(op) => op.check().map(drop),
            Self::Merge(op) => op.check().map(drop),
            Self::Round(op) => op.check().map(drop),
            Self::Gain(op) => op.check().map(drop),
        }
    }

    pub fn plan(&self, device: &Device) -> Result<()> {
        match self {
            Self::Forward(op) => Plan::forward(op, device).map(drop),
            Self::Backward(op) => Plan::backward(op, device).map(drop),
            Self::Merge(op) => Launch::merge(op).map(drop),
            Self::Round(op) => Launch::round(op).map(drop),
            Self::Gain(op) => Launch::gain(op).map(drop),
        }
    }

    /// Makes it as wrong as `row` says, and returns the error that this gives.
    pub fn spoil(&mut self, row: &Row, wide: bool) -> Error {
        let element = |arg: &str| row.op.element_bytes(arg, wide);
        match row.fault {
            Fault::Rows(rows) => self.argument(row.arg).rows = rows,
            Fault::Cols(cols) => {
                let matrix = self.argument(row.arg);
                (matrix.cols, matrix.row_stride) = (cols, matrix.row_stride.max(cols));
            }
            Fault::Stride(row_stride) => self.argument(row.arg).row_stride = row_stride,
            Fault::Absent | Fault::NoOutput => self.remove(row.arg),
            Fault::Beside(other) => {
                let all = variant(Op::Forward);
                self.variant().into_iter().for_each(|variant| match other {
                    "routes" => variant.routes = all.routes,
                    _ => variant.dropout = all.dropout,
                });
            }
            Fault::Scale(scale) => *self.scale() = scale,
            Fault::Probability(p) => self.variant().iter_mut().flat_map(|v| &mut v.dropout).for_each(|to| to.p = p),
            Fault::Null => self.argument(row.arg).ptr = 0,
            Fault::Past(past) => {
                let matrix = self.argument(row.arg);
                matrix.ptr += past;
                if let Error::Misaligned { arg, align, .. } = row.error {
                    return Error::Misaligned { arg, address: matrix.ptr, align };
                }
            }
            Fault::AtTheEnd => self.argument(row.arg).ptr = u64::MAX - 7,
            Fault::OnFirst(other) => self.argument(row.arg).ptr = self.argument(other).ptr,
            Fault::OnLast(other) => {
                let victim = *self.argument(other);
                let last = victim.ptr + (victim.rows * victim.cols - 1) as u64 * element(other);
                self.argument(row.arg).ptr = last & !(element(row.arg) - 1);
            }
            Fault::Later(_) | Fault::Short => unreachable!("addresses have no buffers"),
        }
        row.error.clone()
    }

    fn remove(&mut self, arg: &str) {
        match (self, arg) {
            (Self::Backward(op), "x") => op.x = None,
            (Self::Backward(op), "h") => op.h = None,
            (Self::Backward(op), "gain") => op.variant.gain = None,
            (Self::Backward(op), _) => (op.dx, op.da, op.db, op.dbias, op.dm) = (None, None, None, None, None),
            (Self::Gain(op), "magnitude") => op.magnitude = None,
            (Self::Gain(op), _) => (op.norm, op.gain) = (None, None),
            _ => unreachable!("nothing asks for {arg}"),
        }
    }
}

/// Everything that a variant can have, far from what tests place elsewhere.
fn variant(op: Op) -> raw::Variant {
    let at = |index: u64, arg| raw::Matrix::new(index << 41, op.dims(arg).0, op.dims(arg).1);
    let dropout = raw::Dropout { p: 0.25, seed: raw::Seed::Memory(at(2, "seed")) };
    raw::Variant { dropout: Some(dropout), routes: Some(at(1, "routes")), gain: None }
}

fn of_dora(op: Op) -> raw::Variant {
    let (rows, cols) = op.dims("gain");
    raw::Variant { gain: Some(raw::Matrix::new(1 << 42, rows, cols)), ..raw::Variant::default() }
}

/// An operation over host buffers.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one at a time")]
pub enum OnBuffers<T> {
    Forward(HostForward<T>),
    Backward(HostBackward<T>),
    Merge(HostMerge<T>),
    Round(HostRound<T>),
    Gain(HostGain<T>),
}

/// A matrix of either type.
pub trait Placed {
    fn place(&mut self) -> [&mut usize; 4];
    fn truncate(&mut self, len: usize);
    fn len(&self) -> usize;
}

impl<T> Placed for Host<T> {
    fn place(&mut self) -> [&mut usize; 4] {
        [&mut self.rows, &mut self.cols, &mut self.row_stride, &mut self.offset]
    }
    fn truncate(&mut self, len: usize) {
        self.data.truncate(len);
    }
    fn len(&self) -> usize {
        self.data.len()
    }
}

fn placed<T: 'static>(gradient: &mut HostGradient<T>) -> &mut dyn Placed {
    match gradient {
        HostGradient::Storage(host) => host,
        HostGradient::F32(host) => host,
    }
}

impl<T: Element> OnBuffers<T> {
    pub fn new(op: Op, wide: bool) -> Self {
        let dropout = Some(HostDropout { p: 0.25, seed: [7, 9], in_memory: true });
        let spec = Spec {
            placement: Placement::Strided,
            f32_gradients: wide,
            dropout,
            routes: Some(Routes::Sorted(2)),
            ..Spec::new(SHAPE.m, SHAPE.n, SHAPE.k, SHAPE.r)
        };
        let dora = Spec { dora: true, dropout: None, routes: None, ..spec };
        match op {
            Op::Forward => Self::Forward(spec.forward()),
            Op::Backward => Self::Backward(spec.backward()),
            Op::DoraForward => Self::Forward(dora.forward()),
            Op::DoraBackward => Self::Backward(dora.backward()),
            Op::Gain => Self::Gain(HostGain::new(&spec)),
            Op::Merge => Self::Merge(HostMerge::new(&spec)),
            Op::Round => Self::Round(HostRound::new(&spec)),
        }
    }

    pub fn argument(&mut self, arg: &str) -> &mut dyn Placed {
        const THERE: &str = "an argument that is there";
        match self {
            Self::Forward(op) => match arg {
                "x" => &mut op.x,
                "w" => &mut op.w,
                "a" => &mut op.a,
                "b" => &mut op.b,
                "bias" => op.bias.as_mut().expect(THERE),
                "gain" => op.gain.as_mut().expect(THERE),
                "h" => op.h.as_mut().expect(THERE),
                _ => &mut op.y,
            },
            Self::Backward(op) => match arg {
                "dy" => &mut op.dy,
                "w" => &mut op.w,
                "a" => &mut op.a,
                "b" => &mut op.b,
                "x" => op.x.as_mut().expect(THERE),
                "h" => op.h.as_mut().expect(THERE),
                "dx" => op.dx.as_mut().expect(THERE),
                "da" => placed(op.da.as_mut().expect(THERE)),
                "db" => placed(op.db.as_mut().expect(THERE)),
                "gain" => op.gain.as_mut().expect(THERE),
                "y" => &mut op.magnitude.as_mut().expect(THERE).y,
                "bias" => op.magnitude.as_mut().and_then(|of| of.bias.as_mut()).expect(THERE),
                "magnitude" => &mut op.magnitude.as_mut().expect(THERE).magnitude,
                "dm" => &mut op.magnitude.as_mut().expect(THERE).dm,
                _ => placed(op.dbias.as_mut().expect(THERE)),
            },
            Self::Merge(op) => match arg {
                "w" => op.w.as_mut().expect(THERE),
                "a" => placed(&mut op.a),
                "b" => placed(&mut op.b),
                "gain" => op.gain.as_mut().expect(THERE),
                _ => &mut op.merged,
            },
            Self::Round(op) => match arg {
                "a" => placed(&mut op.a),
                "b" => placed(&mut op.b),
                "divisor" => op.divisor.as_mut().expect(THERE),
                "rounded_a" => &mut op.rounded_a,
                _ => &mut op.rounded_b,
            },
            Self::Gain(op) => match arg {
                "w" => &mut op.w,
                "a" => placed(&mut op.a),
                "b" => placed(&mut op.b),
                "magnitude" => op.magnitude.as_mut().expect(THERE),
                "earlier" => op.earlier.as_mut().expect(THERE),
                "norm" => op.norm.as_mut().expect(THERE),
                _ => op.gain.as_mut().expect(THERE),
            },
        }
    }

    pub fn scale(&mut self) -> &mut f32 {
        match self {
            Self::Forward(op) => &mut op.scale,
            Self::Backward(op) => &mut op.scale,
            Self::Merge(op) => &mut op.scale,
            Self::Round(op) => &mut op.scale,
            Self::Gain(op) => &mut op.scale,
        }
    }

    pub fn spoil(&mut self, row: &Row) {
        match (row.fault, &mut *self) {
            (Fault::Absent, Self::Backward(op)) if row.arg == "x" => op.x = None,
            (Fault::Absent, Self::Backward(op)) if row.arg == "gain" => op.gain = None,
            (Fault::Absent, Self::Backward(op)) => op.h = None,
            (Fault::NoOutput, Self::Backward(op)) => {
                (op.dx, op.da, op.db, op.dbias, op.magnitude) = (None, None, None, None, None);
            }
            (Fault::Absent, Self::Gain(op)) => op.magnitude = None,
            (Fault::NoOutput, Self::Gain(op)) => (op.norm, op.gain) = (None, None),
            (Fault::Beside("routes"), _) => {
                let words = vec![0; row.op.dims("routes").1];
                self.routes().into_iter().for_each(|routes| *routes = Some(words.clone()));
            }
            (Fault::Beside(_), _) => {
                let given = HostDropout { p: 0.25, seed: [7, 9], in_memory: false };
                self.dropout().into_iter().for_each(|dropout| *dropout = Some(given));
            }
            (Fault::Scale(scale), _) => *self.scale() = scale,
            (Fault::Probability(p), _) => self.dropout().into_iter().flatten().for_each(|dropout| dropout.p = p),
            (Fault::Cols(words), _) if row.arg == "routes" => {
                self.routes().into_iter().flatten().for_each(|routes| routes.resize(words, 0));
            }
            (fault, _) => {
                let matrix = self.argument(row.arg);
                let [rows, cols, row_stride, offset] = matrix.place();
                match fault {
                    Fault::Rows(size) => *rows = size,
                    Fault::Cols(size) => (*cols, *row_stride) = (size, (*row_stride).max(size)),
                    Fault::Stride(size) => *row_stride = size,
                    Fault::Later(by) => *offset += by,
                    Fault::Short => {
                        let len = *offset + (*rows - 1) * *row_stride + *cols - 1;
                        matrix.truncate(len);
                    }
                    _ => unreachable!("buffers have no addresses"),
                }
            }
        }
    }

    fn dropout(&mut self) -> Option<&mut Option<HostDropout>> {
        match self {
            Self::Forward(op) => Some(&mut op.dropout),
            Self::Backward(op) => Some(&mut op.dropout),
            _ => None,
        }
    }

    fn routes(&mut self) -> Option<&mut Option<Vec<u64>>> {
        match self {
            Self::Forward(op) => Some(&mut op.routes),
            Self::Backward(op) => Some(&mut op.routes),
            _ => None,
        }
    }

    fn place(&mut self, arg: &str) -> (usize, usize, usize) {
        let matrix = self.argument(arg);
        let len = matrix.len();
        let [_, _, row_stride, offset] = matrix.place();
        (*offset, *row_stride, len)
    }
}

pub fn table(op: Op, wide: bool) -> Vec<Row> {
    let mut buffers = OnBuffers::<f16>::new(op, wide);
    let in_buffers = op.arguments().filter(|arg| !matches!(*arg, "routes" | "seed"));
    let places: Vec<_> = in_buffers.map(|arg| (arg, buffers.place(arg))).collect();
    rows(op, wide, |arg| places.iter().find(|(name, _)| *name == arg).map(|(_, place)| *place))
}

/// NaN is not equal to itself; its name is.
pub fn same(got: &Result<()>, expected: &Error) -> bool {
    got.as_ref().is_err_and(|got| format!("{got:?}") == format!("{expected:?}"))
}
