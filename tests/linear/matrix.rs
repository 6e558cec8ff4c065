//! The error matrix of layers: every argument of every method, every way in which it can be wrong, and the error it gives. The layer
//! and what a method was to write stay as they were.

use fused_lora::cpu::Cpu;
use fused_lora::linear::{Gradients, Pass, Routes, Training};
use fused_lora::{Dropout, Error, MAX_DIMENSION, Matrix, Result, Routing, Seed, bf16};

use crate::common::Host;
use crate::{Layer, small, snapshot};

pub const M: usize = 2;
pub const N: usize = 3;
pub const K: usize = 4;
const R: usize = 2;

#[derive(Clone, Copy, Debug)]
enum Fault {
    /// Another number of rows.
    Rows(usize),
    /// Another number of columns.
    Cols(usize),
    /// Another distance between rows.
    Stride(usize),
    /// The matrix starts so many elements later in its buffer.
    Later(usize),
    /// The buffer ends one element before the matrix does.
    Short,
}

/// A matrix with gaps, in a buffer that ends where it does.
pub fn host<T: Copy>(rows: usize, cols: usize, value: T) -> Host<T> {
    let (offset, row_stride) = (2, cols + 3);
    Host { rows, cols, offset, row_stride, data: vec![value; offset + (rows - 1) * row_stride + cols] }
}

/// Makes a matrix wrong, and says what is complained of; `Rows` and `Cols` for a matrix that must have those it has.
fn spoil<T>(host: &mut Host<T>, arg: &'static str, fault: Fault) -> Error {
    let len = host.data.len();
    match fault {
        Fault::Rows(rows) => {
            let (got, expected) = (std::mem::replace(&mut host.rows, rows), rows);
            Error::Dimension { arg, axis: "rows", got: expected, expected: got }
        }
        Fault::Cols(cols) => {
            let expected = std::mem::replace(&mut host.cols, cols);
            host.row_stride = host.row_stride.max(cols);
            Error::Dimension { arg, axis: "columns", got: cols, expected }
        }
        Fault::Stride(stride) => {
            host.row_stride = stride;
            let limit = i64::MAX as u64 / 4;
            let extent = ((host.rows as u64 - 1).saturating_mul(stride as u64)).saturating_add(host.cols as u64);
            match stride < host.cols {
                true => Error::Stride { arg, got: stride, min: host.cols },
                false => {
                    let got = if stride == usize::MAX { u64::MAX } else { extent };
                    Error::TooLarge { what: "a matrix extent in elements", got, limit }
                }
            }
        }
        Fault::Later(by) => {
            host.offset = host.offset.saturating_add(by);
            Error::BufferTooShort { arg, got: len, needed: len.saturating_add(by) }
        }
        Fault::Short => {
            host.data.pop();
            Error::BufferTooShort { arg, got: len - 1, needed: len }
        }
    }
}

/// What can be wrong with any matrix of more than one row.
fn faults(rows: usize, cols: usize) -> Vec<Fault> {
    let others =
        |size: usize| [size + 1, size - 1, 0, MAX_DIMENSION + 1, usize::MAX].into_iter().filter(move |&s| s != size);
    let limit = i64::MAX as usize / 4;
    let strides = [cols - 1, 0].into_iter().chain(if rows > 1 { vec![limit, usize::MAX] } else { vec![] });
    let mut faults: Vec<Fault> = others(rows).map(Fault::Rows).chain(others(cols).map(Fault::Cols)).collect();
    faults.extend(strides.map(Fault::Stride));
    faults.extend([Fault::Later(1), Fault::Later(usize::MAX), Fault::Short]);
    faults
}

/// The arguments of the methods that compute.
struct Call {
    x: Host<bf16>,
    y: Host<bf16>,
    dy: Host<bf16>,
    dx: Host<bf16>,
    da: Host<f32>,
    db: Host<f32>,
    dbias: Host<f32>,
}

impl Call {
    fn new() -> Self {
        let (one, nine) = (bf16::ONE, bf16::from_f32(9.0));
        Self {
            x: host(M, K, one),
            y: host(M, N, nine),
            dy: host(M, N, one),
            dx: host(M, K, nine),
            da: host(R, K, 9.0),
            db: host(N, R, 9.0),
            dbias: host(1, N, 9.0),
        }
    }

    fn outputs(&self) -> String {
        let Self { y, dx, da, db, dbias, .. } = self;
        format!("{:?}", (&y.data, &dx.data, &da.data, &db.data, &dbias.data))
    }

    fn spoil(&mut self, arg: &'static str, fault: Fault) -> Error {
        match arg {
            "x" => spoil(&mut self.x, arg, fault),
            "y" => spoil(&mut self.y, arg, fault),
            "dy" => spoil(&mut self.dy, arg, fault),
            "dx" => spoil(&mut self.dx, arg, fault),
            "da" => spoil(&mut self.da, arg, fault),
            "db" => spoil(&mut self.db, arg, fault),
            _ => spoil(&mut self.dbias, arg, fault),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Method {
    Forward,
    ForwardInto,
    ForwardTrain,
    ForwardTrainInto,
    ForwardRouted,
    ForwardRoutedInto,
    Backward,
}

const METHODS: [Method; 7] = [
    Method::Forward,
    Method::ForwardInto,
    Method::ForwardTrain,
    Method::ForwardTrainInto,
    Method::ForwardRouted,
    Method::ForwardRoutedInto,
    Method::Backward,
];

impl Method {
    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Forward | Self::ForwardTrain | Self::ForwardRouted => &["x"],
            Self::ForwardInto | Self::ForwardTrainInto | Self::ForwardRoutedInto => &["x", "y"],
            Self::Backward => &["dy", "dx", "da", "db", "dbias"],
        }
    }

    fn run(self, layer: &Layer, call: &mut Call) -> Result<()> {
        let x = call.x.view();
        let routed = || -> Result<_> {
            let bank = layer.bank(&["one", "other"])?;
            let routes = Routes::upload(&Cpu, &Routing::new(bank.slots(), &[Some(1), None])?)?;
            Ok((bank, routes))
        };
        match self {
            Self::Forward => layer.forward(x).map(drop),
            Self::ForwardInto => layer.forward_into(x, call.y.view_mut()),
            Self::ForwardTrain => layer.forward_train(x).map(drop),
            Self::ForwardTrainInto => layer.forward_train_into(x, call.y.view_mut()).map(drop),
            Self::ForwardRouted => {
                routed().and_then(|(bank, routes)| layer.forward_routed(x, &bank, &routes)).map(drop)
            }
            Self::ForwardRoutedInto => {
                let (bank, routes) = routed()?;
                layer.forward_routed_into(x, &bank, &routes, call.y.view_mut())
            }
            Self::Backward => {
                let (_, pass) = layer.forward_train(x)?;
                let (dx, da) = (Some(call.dx.view_mut()), Some(call.da.view_mut()));
                let (db, dbias) = (Some(call.db.view_mut()), Some(call.dbias.view_mut()));
                let gradients = Gradients { dx, da, db, dbias, ..Gradients::default() };
                layer.backward(&pass, call.dy.view(), gradients)
            }
        }
    }

    /// The error, where it is not that of the argument alone: the number of tokens is that of x.
    fn error(self, arg: &'static str, fault: Fault, own: Error) -> Error {
        let routed = matches!(self, Self::ForwardRouted | Self::ForwardRoutedInto);
        match (arg, fault) {
            ("x", Fault::Rows(0)) if !routed || self == Self::ForwardRouted => {
                Error::ZeroDimension { arg, axis: "rows" }
            }
            ("x", Fault::Rows(rows)) if routed && self != Self::ForwardRouted => {
                Error::Dimension { arg: "routes", axis: "rows", got: M, expected: rows }
            }
            ("x", Fault::Rows(rows)) if self == Self::ForwardInto => {
                Error::Dimension { arg: "y", axis: "rows", got: M, expected: rows }
            }
            // The buffers that are allocated depend on the rows: they are held to the buffer of x first.
            ("x", Fault::Rows(rows)) => {
                let len = host(M, K, 0).data.len();
                match rows {
                    usize::MAX => {
                        let limit = i64::MAX as u64 / 4;
                        Error::TooLarge { what: "a matrix extent in elements", got: u64::MAX, limit }
                    }
                    _ => Error::BufferTooShort { arg, got: len, needed: 2 + (rows - 1) * (K + 3) + K },
                }
            }
            ("x" | "dy", Fault::Cols(0)) => Error::ZeroDimension { arg, axis: "columns" },
            _ => own,
        }
    }
}

/// A number of rows that the buffer of x holds is no fault where nothing else depends on it.
fn is_legal(method: Method, arg: &str, fault: Fault) -> bool {
    matches!(method, Method::Forward | Method::ForwardTrain) && arg == "x" && matches!(fault, Fault::Rows(1))
}

fn error_of(method: Method, arg: &'static str, fault: Fault, own: Error) -> Error {
    match (method, arg, fault) {
        // Fewer rows of x are in its buffer: what depends on them is to be named.
        (Method::ForwardTrainInto, "x", Fault::Rows(1)) => {
            Error::Dimension { arg: "y", axis: "rows", got: M, expected: 1 }
        }
        (Method::ForwardRouted, "x", Fault::Rows(1)) => {
            Error::Dimension { arg: "routes", axis: "rows", got: M, expected: 1 }
        }
        _ => method.error(arg, fault, own),
    }
}

#[test]
fn every_matrix_that_is_wrong_is_named_and_nothing_is_written() {
    let mut layer = small();
    layer.activate("one").expect("an adapter");
    let before = snapshot(&layer);
    for method in METHODS {
        let mut legal = Call::new();
        assert_eq!(method.run(&layer, &mut legal), Ok(()), "{method:?} without a fault");
        assert_eq!(
            legal.outputs() == Call::new().outputs(),
            !method.arguments().iter().any(|arg| *arg != "x"),
            "{method:?}"
        );
        for &arg in method.arguments() {
            let dims = match arg {
                "x" | "dx" => (M, K),
                "y" | "dy" => (M, N),
                "da" => (R, K),
                "db" => (N, R),
                _ => (1, N),
            };
            for fault in faults(dims.0, dims.1).into_iter().filter(|&fault| !is_legal(method, arg, fault)) {
                let mut call = Call::new();
                let own = call.spoil(arg, fault);
                let (error, outputs) = (error_of(method, arg, fault, own), call.outputs());
                let got = method.run(&layer, &mut call);
                assert_eq!(got, Err(error), "{method:?}, {arg}: {fault:?}");
                assert!(call.outputs() == outputs, "{method:?}, {arg}: {fault:?}: something was written");
            }
        }
    }
    assert!(snapshot(&layer) == before, "the layer has changed");
}

/// p and the seed, in forward that keeps something for backward; and a pass that is put together again.
#[test]
fn dropout_that_is_wrong_is_named() {
    let mut layer = small();
    layer.activate("one").expect("an adapter");
    let before = snapshot(&layer);
    let x = host(M, K, bf16::ONE);
    let words = [7u64, 9, 11];
    let seed = |rows, cols| Seed::Memory(Matrix::new(&words[..], rows, cols));
    let train = |p, seed| {
        let training = Training { dropout: Some(Dropout { p, seed }), ..Training::default() };
        layer.forward_train_with(x.view(), training).map(|(_, pass)| pass)
    };
    let value = Seed::Value { seed: 1, offset: 2 };
    for got in [f32::INFINITY, f32::NEG_INFINITY, -1e-9, 1f32.next_up()] {
        assert_eq!(train(got, value).map(drop), Err(Error::Probability { got }));
    }
    assert!(matches!(train(f32::NAN, value).map(drop), Err(Error::Probability { got }) if got.is_nan()));
    let dimension = |axis, got, expected| Err(Error::Dimension { arg: "seed", axis, got, expected });
    assert_eq!(train(0.5, seed(2, 1)).map(drop), dimension("rows", 2, 1));
    assert_eq!(train(0.5, seed(1, 3)).map(drop), dimension("columns", 3, 2));
    let late = Seed::Memory(Matrix::new(&words[..], 1, 2).with_offset(2));
    assert_eq!(train(0.5, late).map(drop), Err(Error::BufferTooShort { arg: "seed", got: 3, needed: 4 }));

    let kept = |pass: Result<Pass<'_, Cpu, bf16>>| pass.expect("a pass").into_kept();
    let rejected = kept(train(0.5, seed(1, 2))).with(x.view()).expect_err("a seed in memory");
    assert_eq!(rejected.error, Error::Missing { arg: "seed", output: "dropout" });
    let one_row = Matrix::new(&x.data[..], 1, K);
    let rows = Error::Dimension { arg: "x", axis: "rows", got: 1, expected: M };
    let memory = Matrix::new(&words[..], 1, 2);
    let rejected = rejected.value.with_seed(one_row, memory).expect_err("another number of rows");
    assert_eq!(rejected.error, rows);
    assert!(rejected.value.with_seed(x.view(), memory).is_ok());
    for training in [train(0.5, value), layer.forward_train(x.view()).map(|(_, pass)| pass)] {
        let rejected = kept(training).with_seed(x.view(), memory).expect_err("no seed in memory");
        assert!(crate::state(&rejected.error, "with_seed"), "{}", rejected.error);
        let rejected = rejected.value.with(one_row).expect_err("another number of rows");
        assert_eq!(rejected.error, rows);
        assert!(rejected.value.with(x.view()).is_ok());
    }
    assert!(snapshot(&layer) == before, "the layer has changed");
}
