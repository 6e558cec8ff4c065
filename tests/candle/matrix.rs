//! The error matrix of the op and the layer: every argument, every way in which it can be wrong, and the error it gives. Tensors and
//! layers stay as they were.

use candle_core::{DType, Device, ModuleT, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use fused_lora::candle::{Dropout, LoraConfig, LoraLinear, Training, cause, lora, lora_train};
use fused_lora::{Error, MAX_DIMENSION};

const DTYPES: [DType; 7] = [DType::U8, DType::U32, DType::I64, DType::BF16, DType::F16, DType::F32, DType::F64];

/// No two dimensions are equal, so that an error shows what it speaks of.
const DIMS: [(&str, &[usize]); 6] =
    [("x", &[2, 2, 6]), ("w", &[5, 6]), ("a", &[3, 6]), ("b", &[5, 3]), ("bias", &[5]), ("magnitude", &[5])];

fn tensor(dims: &[usize], dtype: DType) -> Tensor {
    let count = dims.iter().product::<usize>();
    let data: Vec<f32> = (0..count).map(|at| (at % 7) as f32).collect();
    Tensor::from_vec(data, dims, &Device::Cpu).and_then(|tensor| tensor.to_dtype(dtype)).expect("a tensor")
}

/// The arguments of one application, by their names.
#[derive(Clone)]
struct Call {
    tensors: Vec<(&'static str, Tensor)>,
    scale: f64,
    training: Training<'static>,
}

impl Call {
    /// `with_bias`: the bias is the one that disagrees first with another W.
    fn new(dtype: DType, with_bias: bool) -> Self {
        let dims = DIMS.into_iter().filter(|(arg, _)| with_bias || *arg != "bias");
        let tensors = dims.map(|(arg, dims)| (arg, tensor(dims, dtype))).collect();
        Self { tensors, scale: 2.0, training: Training::default() }
    }

    fn get(&self, arg: &str) -> Option<&Tensor> {
        self.tensors.iter().find(|(name, _)| *name == arg).map(|(_, tensor)| tensor)
    }

    fn with(&self, arg: &str, change: impl FnOnce(&Tensor) -> Tensor) -> Self {
        let mut call = self.clone();
        let (_, tensor) = call.tensors.iter_mut().find(|(name, _)| *name == arg).expect("an argument");
        *tensor = change(tensor);
        call
    }

    fn run(&self) -> Result<Tensor> {
        let there = |arg| self.get(arg).expect("an argument");
        let [x, w, a, b] = ["x", "w", "a", "b"].map(there);
        let training = Training { magnitude: self.get("magnitude"), ..self.training };
        lora_train(x, w, a, b, self.scale, self.get("bias"), training)
    }

    /// What the tensors hold.
    fn bits(&self) -> String {
        let bits = |tensor: &Tensor| {
            let values = tensor.to_dtype(DType::F64).and_then(|tensor| tensor.flatten_all()?.to_vec1::<f64>());
            values.expect("elements").into_iter().map(f64::to_bits).collect::<Vec<_>>()
        };
        format!("{:?}", self.tensors.iter().map(|(arg, tensor)| (arg, bits(tensor))).collect::<Vec<_>>())
    }

    #[track_caller]
    fn is_refused(&self, what: &str, expected: &Error) {
        let before = self.bits();
        let error = self.run().map(drop).expect_err(what);
        // NaN is not equal to itself; its name is.
        assert_eq!(format!("{:?}", cause(&error)), format!("{:?}", Some(expected)), "{what}: {error}");
        assert!(self.bits() == before, "{what}: a tensor has changed");
    }
}

fn dims_of(arg: &str) -> &'static [usize] {
    DIMS.iter().find(|(name, _)| *name == arg).map(|(_, dims)| *dims).expect("an argument")
}

#[test]
fn dimensions() {
    for (dtype, with_bias) in [(DType::F32, true), (DType::BF16, true), (DType::F16, false)] {
        let legal = Call::new(dtype, with_bias);
        assert_eq!(legal.run().expect("without a fault").dims(), [2, 2, 5]);
        for (arg, dims) in legal.tensors.iter().map(|(arg, _)| (*arg, dims_of(arg))) {
            for (axis, change) in
                [("rows", 0), ("columns", 1)].into_iter().filter(|(_, axis)| *axis < dims_of(arg).len())
            {
                let at = if arg == "x" { [0, 2][change] } else { change };
                for size in [dims[at] + 1, dims[at] - 1, 0] {
                    let mut dims = dims.to_vec();
                    dims[at] = size;
                    let Some(error) = disagreement(arg, axis, size, with_bias) else { continue };
                    let call = legal.with(arg, |_| tensor(&dims, dtype));
                    call.is_refused(&format!("{arg} of {dims:?}, {dtype:?}"), &error);
                }
            }
        }
    }
}

/// The first argument to disagree is named; a number of tokens is what it is, but for 0.
fn disagreement(arg: &'static str, axis: &'static str, size: usize, with_bias: bool) -> Option<Error> {
    let dimension = |arg, axis, got, expected| Some(Error::Dimension { arg, axis, got, expected });
    match (arg, axis, size) {
        ("a", "rows", 0) => Some(Error::ZeroDimension { arg, axis }),
        ("x" | "w", _, 0) => Some(Error::ZeroDimension { arg, axis }),
        ("x", "rows", _) => None,
        ("x", ..) => dimension("x", "columns", size, 6),
        ("w", "rows", _) if with_bias => dimension("bias", "elements", 5, size),
        ("w", "rows", _) => dimension("b", "rows", 5, size),
        ("w", ..) => dimension("x", "columns", 6, size),
        ("a", "rows", _) => dimension("b", "columns", 3, size),
        ("a", ..) => dimension("a", "columns", size, 6),
        ("b", "rows", _) => dimension("b", "rows", size, 5),
        ("b", ..) => dimension("b", "columns", size, 3),
        _ => dimension(arg, "elements", size, 5),
    }
}

#[test]
fn ranks() {
    let legal = Call::new(DType::F32, true);
    for (arg, dims) in DIMS {
        let elements = dims.iter().product::<usize>();
        let (least, expected) = match arg {
            "x" => (2, "at least 2 (tokens, features)"),
            "bias" | "magnitude" => (1, "1"),
            _ => (2, "2"),
        };
        let others: [Vec<usize>; 4] = [vec![], vec![elements], vec![1, elements], [&[1], dims].concat()];
        for dims in others.into_iter().filter(|dims| if arg == "x" { dims.len() < 2 } else { dims.len() != least }) {
            let got = dims.len();
            let call = legal.with(arg, |_| tensor(&dims, DType::F32));
            call.is_refused(&format!("{arg} of {dims:?}"), &Error::Rank { arg, got, expected });
        }
    }
}

#[test]
fn dtypes() {
    for of_w in [DType::F32, DType::BF16, DType::F16] {
        let legal = Call::new(of_w, true);
        for (arg, _) in DIMS {
            let fits = |dtype| dtype == of_w || (dtype == DType::F32 && !matches!(arg, "x" | "w"));
            for dtype in DTYPES.into_iter().filter(|&dtype| !fits(dtype)) {
                let call = legal.with(arg, |tensor| tensor.to_dtype(dtype).expect("a cast"));
                let name = |dtype: DType| dtype.as_str().to_owned();
                let wrong = |arg, got, expected| Error::ArgumentDtype { arg, got: name(got), expected };
                let error = match (arg, dtype) {
                    // The others are no longer of its type: the first is named, unless it is f32, which all but x may be.
                    ("w", DType::F32 | DType::BF16 | DType::F16) => match of_w {
                        DType::F32 => wrong("x", of_w, format!("{}, that of w", name(dtype))),
                        _ => wrong("bias", of_w, format!("{}, that of w, or f32", name(dtype))),
                    },
                    ("w", _) => wrong("w", dtype, "f32, f16 or bf16".into()),
                    ("x", _) => wrong("x", dtype, format!("{}, that of w", name(of_w))),
                    _ => wrong(arg, dtype, format!("{}, that of w, or f32", name(of_w))),
                };
                call.is_refused(&format!("{arg} of {dtype:?} with w of {of_w:?}"), &error);
            }
        }
    }
}

#[test]
fn numbers() {
    let with_magnitude = Call::new(DType::F32, true);
    let mut legal = with_magnitude.clone();
    legal.tensors.retain(|(arg, _)| *arg != "magnitude");
    for (scale, got) in [
        (f64::NAN, f32::NAN),
        (f64::INFINITY, f32::INFINITY),
        (f64::NEG_INFINITY, f32::NEG_INFINITY),
        (1e39, f32::INFINITY),
        (f64::MIN, f32::NEG_INFINITY),
    ] {
        Call { scale, ..legal.clone() }.is_refused(&format!("a scale of {scale}"), &Error::Scale { arg: "scale", got });
    }
    let training =
        |p| Training { dropout: Some(Dropout { p, seed: 1, offset: 2 }), recompute: true, ..Training::default() };
    for got in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1e-9, 1f32.next_up()] {
        let call = Call { training: training(got), ..legal.clone() };
        call.is_refused(&format!("p = {got}"), &Error::Probability { got });
        let call = Call { training: training(got), ..with_magnitude.clone() };
        call.is_refused(&format!("p = {got} with a magnitude"), &Error::Probability { got });
    }
    let call = Call { training: training(0.5), ..with_magnitude };
    call.is_refused("both", &Error::Exclusive { arg: "magnitude", other: "dropout" });
    // Finite, until dropout divides it by 1 − p.
    let call = Call { training: training(0.9), scale: 3e38, ..legal };
    call.is_refused("a scale that overflows", &Error::Scale { arg: "scale", got: f32::INFINITY });
}

#[test]
fn tracked_weights() {
    let var = |tensor: &Tensor| Var::from_tensor(tensor).expect("a variable").as_tensor().clone();
    for dtype in [DType::F32, DType::BF16] {
        Call::new(dtype, true).with("w", var).is_refused("a tracked w", &Error::Tracked { arg: "w" });
    }
}

/// Layers over the tensors of the op: `one`, of rank 3, and `two`, of rank 1.
fn layer(with_bias: bool) -> LoraLinear {
    let f32 = |dims: &[usize]| tensor(dims, DType::F32);
    let mut layer = LoraLinear::frozen(f32(&[5, 6]), with_bias.then(|| f32(&[5]))).expect("a layer");
    layer.add_tensors("one", f32(&[3, 6]), f32(&[5, 3]), 0.5).expect("an adapter");
    layer.add_tensors("two", f32(&[1, 6]), f32(&[5, 1]), 2.0).expect("an adapter");
    layer
}

/// Everything of a layer that can be seen, and what it makes of an x.
fn snapshot(layer: &LoraLinear) -> String {
    let values = |tensor: &Tensor| tensor.flatten_all().and_then(|tensor| tensor.to_vec1::<f32>()).expect("elements");
    let adapters = layer.names().map(|name| {
        let (a, b, scale) = layer.adapter(name).expect("an adapter");
        (name, values(a), values(b), layer.b_bias(name).map(values), layer.magnitude(name).map(values), scale)
    });
    let adapters: Vec<_> = adapters.collect();
    let y = layer.forward(&tensor(&[2, 6], DType::F32)).expect("forward");
    let of_layer =
        (layer.active(), layer.is_merged(), layer.passes(), values(layer.weight()), layer.bias().map(values));
    format!("{of_layer:?} {adapters:?} {:?}", values(&y))
}

type Set = fn(&mut LoraLinear, &str, Tensor) -> Result<()>;

/// What an adapter can have of one row, and how it is given.
const VECTORS: [(&str, Set); 2] = [("b_bias", LoraLinear::set_b_bias), ("magnitude", LoraLinear::set_magnitude)];

type Row<'a> = (String, Box<dyn Fn(&mut LoraLinear) -> Result<()> + 'a>, Error);

fn row<'a>(name: &str, call: impl Fn(&mut LoraLinear) -> Result<()> + 'a, error: Error) -> Row<'a> {
    (name.to_owned(), Box::new(call), error)
}

#[track_caller]
fn refuses(layer: &mut LoraLinear, rows: Vec<Row<'_>>) {
    let before = snapshot(layer);
    for (name, call, error) in rows {
        let got = call(layer).expect_err(&name);
        assert_eq!(format!("{:?}", cause(&got)), format!("{:?}", Some(&error)), "{name}: {got}");
        assert!(snapshot(layer) == before, "{name} has changed the layer");
    }
}

/// What is wrong with factors is so for every method that takes them; the layer is as before.
#[test]
fn tensors_that_no_layer_takes() {
    let f32 = |dims: &[usize]| tensor(dims, DType::F32);
    let f16 = |dims: &[usize]| tensor(dims, DType::F16);
    let dimension = |arg, axis, got, expected| Error::Dimension { arg, axis, got, expected };
    let rank = |arg, got, expected| Error::Rank { arg, got, expected };
    let of_f16 = |arg| {
        let (got, expected) = ("f16".to_owned(), "f32, that of w, or f32".to_owned());
        Error::ArgumentDtype { arg, got, expected }
    };
    let factors = [
        (f32(&[3, 7]), f32(&[5, 3]), dimension("a", "columns", 7, 6)),
        (f32(&[3, 5]), f32(&[5, 3]), dimension("a", "columns", 5, 6)),
        (f32(&[3, 6]), f32(&[6, 3]), dimension("b", "rows", 6, 5)),
        (f32(&[3, 6]), f32(&[4, 3]), dimension("b", "rows", 4, 5)),
        (f32(&[3, 6]), f32(&[5, 4]), dimension("b", "columns", 4, 3)),
        (f32(&[3, 6]), f32(&[5, 0]), dimension("b", "columns", 0, 3)),
        (f32(&[0, 6]), f32(&[5, 0]), Error::ZeroDimension { arg: "a", axis: "rows" }),
        (f32(&[18]), f32(&[5, 3]), rank("a", 1, "2")),
        (f32(&[3, 6]), f32(&[5, 3, 1]), rank("b", 3, "2")),
        (f16(&[3, 6]), f32(&[5, 3]), of_f16("a")),
        (f32(&[3, 6]), f16(&[5, 3]), of_f16("b")),
    ];
    for (a, b, error) in &factors {
        let made = LoraLinear::from_tensors(f32(&[5, 6]), None, a.clone(), b.clone(), 1.0).map(drop);
        assert_eq!(cause(&made.expect_err("a refusal")), Some(error));
    }
    let add = |(a, b, error): (Tensor, Tensor, Error)| {
        row("add_tensors", move |layer| layer.add_tensors("new", a.clone(), b.clone(), 1.0), error)
    };
    let mut rows: Vec<_> = factors.into_iter().map(add).collect();
    for (scale, got) in [(f64::NAN, f32::NAN), (1e39, f32::INFINITY)] {
        let call = move |layer: &mut LoraLinear| {
            layer.add_tensors("new", tensor(&[3, 6], DType::F32), tensor(&[5, 3], DType::F32), scale)
        };
        rows.push(row("a scale", call, Error::Scale { arg: "scale", got }));
    }
    for (arg, set) in VECTORS {
        for (vector, error) in [
            (f32(&[6]), dimension(arg, "elements", 6, 5)),
            (f32(&[0]), dimension(arg, "elements", 0, 5)),
            (f32(&[1, 5]), rank(arg, 2, "1")),
            (f32(&[]), rank(arg, 0, "1")),
            (f16(&[5]), of_f16(arg)),
        ] {
            rows.push(row(arg, move |layer| set(layer, "one", vector.clone()), error));
        }
    }
    let mut layer = layer(true);
    layer.activate("one").expect("an adapter");
    refuses(&mut layer, rows);
    for got in [f32::NAN, -0.5, 1.5] {
        let refused = layer.clone().with_dropout(got, 1).map(drop).expect_err("a refusal");
        assert_eq!(format!("{:?}", cause(&refused)), format!("{:?}", Some(Error::Probability { got })));
    }
    for (weight, bias, error) in [
        (f32(&[30]), None, rank("w", 1, "2")),
        (f32(&[1, 5, 6]), None, rank("w", 3, "2")),
        (f32(&[5, 6]), Some(f32(&[6])), dimension("bias", "elements", 6, 5)),
        (f32(&[5, 6]), Some(f32(&[5, 1])), rank("bias", 2, "1")),
        (f32(&[5, 6]), Some(f16(&[5])), of_f16("bias")),
        (f32(&[0, 6]), None, Error::ZeroDimension { arg: "w", axis: "rows" }),
        (f32(&[5, 0]), None, Error::ZeroDimension { arg: "w", axis: "columns" }),
    ] {
        assert_eq!(cause(&LoraLinear::frozen(weight, bias).map(drop).expect_err("a refusal")), Some(&error));
    }
}

/// No variable is made for a configuration that cannot be.
#[test]
fn configurations_that_no_layer_takes() {
    let too_large = |got| Error::TooLarge { what: "R (rows of a)", got, limit: MAX_DIMENSION as u64 };
    for (r, alpha, error) in [
        (0, 1.0, Error::ZeroDimension { arg: "a", axis: "rows" }),
        (usize::MAX, 1.0, too_large(usize::MAX as u64)),
        (MAX_DIMENSION + 1, 1.0, too_large(MAX_DIMENSION as u64 + 1)),
        (2, f64::NAN, Error::Scale { arg: "scale", got: f32::NAN }),
        (2, f64::INFINITY, Error::Scale { arg: "scale", got: f32::INFINITY }),
        (2, -1e39, Error::Scale { arg: "scale", got: f32::NEG_INFINITY }),
    ] {
        for rslora in [false, true] {
            let vars = VarMap::new();
            let vb = || VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
            let config = LoraConfig { r, alpha, rslora };
            let made = LoraLinear::new(tensor(&[5, 6], DType::F32), None, config, vb()).map(drop);
            let made = made.expect_err("a refusal");
            assert_eq!(format!("{:?}", cause(&made)), format!("{:?}", Some(&error)), "{config:?}");
            refuses(&mut layer(true), vec![row("add", |layer| layer.add("new", config, vb()), error.clone())]);
            refuses(
                &mut layer(true),
                vec![row("add_dora", |layer| layer.add_dora("new", config, vb()), error.clone())],
            );
            assert!(vars.all_vars().is_empty(), "{config:?}");
        }
    }
    let vars = VarMap::new();
    let vb = || VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let config = LoraConfig { r: 2, alpha: 1.0, rslora: false };
    let taken = Error::AdapterName { got: "one".into(), expected: "one that the layer does not have".into() };
    refuses(&mut layer(true), vec![row("add", |layer| layer.add("one", config, vb()), taken)]);
    assert!(vars.all_vars().is_empty());
}

/// Views of one element that say they are larger than any memory, refused before anything is copied for them.
#[test]
fn broadcasts_that_nothing_holds() {
    let of = |dims: &[usize], dtype| tensor(&[1, 1], dtype).broadcast_as(dims).expect("a view");
    let f32 = |dims: &[usize]| of(dims, DType::F32);
    let too_large = |what, got| Error::TooLarge { what, got, limit: MAX_DIMENSION as u64 };
    let (wide, past) = (1usize << 20, MAX_DIMENSION + 1);
    let bytes = MAX_DIMENSION * wide * 4;
    let bf16 = |dims: &[usize]| of(dims, DType::BF16);
    let cases = [
        ([f32(&[past, 6]), f32(&[5, 6]), f32(&[3, 6]), f32(&[5, 3])], too_large("M (rows of x)", past as u64)),
        ([f32(&[past, past, past, 6]), f32(&[5, 6]), f32(&[3, 6]), f32(&[5, 3])], too_large("M (rows of x)", u64::MAX)),
        ([f32(&[2, 6]), f32(&[past, 6]), f32(&[3, 6]), f32(&[past, 3])], too_large("N (rows of w)", past as u64)),
        ([f32(&[2, past]), f32(&[5, past]), f32(&[3, past]), f32(&[5, 3])], too_large("K (columns of w)", past as u64)),
        ([f32(&[2, 6]), f32(&[5, 6]), f32(&[past, 6]), f32(&[5, past])], too_large("R (rows of a)", past as u64)),
        ([f32(&[MAX_DIMENSION, wide]), f32(&[1, wide]), f32(&[1, wide]), f32(&[1, 1])], Error::OutOfMemory { bytes }),
        (
            [f32(&[1, wide]), f32(&[MAX_DIMENSION, wide]), f32(&[1, wide]), f32(&[MAX_DIMENSION, 1])],
            Error::OutOfMemory { bytes },
        ),
        // Rounded to the type of w.
        (
            [bf16(&[1, wide]), bf16(&[1, wide]), f32(&[MAX_DIMENSION, wide]), f32(&[1, MAX_DIMENSION])],
            Error::OutOfMemory { bytes: bytes / 2 },
        ),
    ];
    for ([x, w, a, b], error) in cases {
        let got = lora(&x, &w, &a, &b, 1.0, None).map(drop).expect_err("a refusal");
        assert_eq!(cause(&got), Some(&error), "{:?} {:?} {:?} {:?}", x.dims(), w.dims(), a.dims(), b.dims());
    }
    let frozen = LoraLinear::frozen(f32(&[MAX_DIMENSION, wide]), None).map(drop).expect_err("a refusal");
    assert_eq!(cause(&frozen), Some(&Error::OutOfMemory { bytes }));
}

fn state(operation: &'static str, got: &str, expected: &'static str) -> Error {
    Error::State { operation, got: got.to_owned(), expected }
}

#[test]
fn names_and_states() {
    let unknown = |got: &str| Error::AdapterName { got: got.into(), expected: "\"one\" or \"two\"".into() };
    let b_bias = tensor(&[5], DType::F32);
    let names = || {
        vec![
            row("activate", |layer| layer.activate("three"), unknown("three")),
            row("activate ``", |layer| layer.activate(""), unknown("")),
            row("remove", |layer| layer.remove("One").map(drop), unknown("One")),
            row("set_b_bias", |layer| layer.set_b_bias("three", b_bias.clone()), unknown("three")),
            row("set_magnitude", |layer| layer.set_magnitude("three", b_bias.clone()), unknown("three")),
        ]
    };
    let idle = || {
        vec![
            row("merge", LoraLinear::merge, state("merge", "no adapter is active", "`activate` first")),
            row("unmerge", LoraLinear::unmerge, state("unmerge", "no adapter is merged", "`merge` first")),
        ]
    };
    let mut layer = layer(false);
    refuses(&mut layer, names());
    refuses(&mut layer, idle());
    layer.activate("one").expect("an adapter");
    refuses(&mut layer, names());
    let active = || state("remove", "adapter `one` is active", "another `activate` first");
    let removal = || row("remove", |layer| layer.remove("one").map(drop), active());
    refuses(&mut layer, vec![removal()]);
    layer.disable().expect("no adapter");
    refuses(&mut layer, idle());
    layer.enable();
    layer.merge().expect("a merge");
    let merged = |operation| state(operation, "`one` is merged", "`unmerge` first");
    refuses(
        &mut layer,
        vec![
            row("merge", LoraLinear::merge, merged("merge")),
            row("activate", |layer| layer.activate("two"), merged("activate")),
            row("disable", LoraLinear::disable, merged("disable")),
            row("set_b_bias", |layer| layer.set_b_bias("one", b_bias.clone()), merged("set_b_bias")),
            row("set_magnitude", |layer| layer.set_magnitude("one", b_bias.clone()), merged("set_magnitude")),
            removal(),
        ],
    );
}

/// Whatever takes part: what is no activation is refused, and no pass is counted.
#[test]
fn activations_that_no_layer_takes() {
    let xs: [&[usize]; 7] = [&[], &[6], &[2, 7], &[2, 5], &[2, 0], &[2, 2, 7], &[1, 1, 1, 2, 7]];
    let mut layer = layer(true).with_dropout(0.5, 1).expect("dropout");
    for state in ["none", "one", "merged"] {
        match state {
            "one" => layer.activate("one").expect("an adapter"),
            "merged" => layer.merge().expect("a merge"),
            _ => {}
        }
        let before = snapshot(&layer);
        let f16 = tensor(&[2, 6], DType::F16);
        for x in xs.iter().map(|dims| tensor(dims, DType::F32)).chain([f16]) {
            for train in [false, true] {
                assert!(layer.forward_t(&x, train).is_err(), "{state}: {x:?}");
            }
        }
        assert!(snapshot(&layer) == before, "{state}: the layer has changed");
    }
    // The op by itself as well.
    let [w, a, b] = [&[5, 6][..], &[3, 6], &[5, 3]].map(|dims| tensor(dims, DType::F32));
    assert!(xs.iter().all(|dims| lora(&tensor(dims, DType::F32), &w, &a, &b, 1.0, None).is_err()));
}
