//! The error matrix on everything that takes these arguments: each entry gives its error, launches nothing and writes nothing.

use std::collections::BTreeSet;

use fused_lora::linear::{Adapter, Gradients, LoraLinear, Scaling};
use fused_lora::plan::{Device, Plan};
use fused_lora::{Dtype, Element, Error, MAX_DIMENSION, MAX_ROUTED_RANK, Result, bf16, cpu, f16, raw};

use super::call::{OnAddresses, OnBuffers, same, table};
use super::common::layers::compact;
use super::common::{Host, HostBackward, HostGradient, raw as ops};
use super::table::{Fault, OPS, Op, SHAPE};

#[test]
fn addresses_are_refused_by_the_checks_and_by_every_planner() {
    let devices = [75, 80, 90].map(|arch| Device::of_arch("a device", arch, 132));
    for (op, wide) in OPS.into_iter().flat_map(|op| [(op, false), (op, true)]) {
        assert_eq!(OnAddresses::new(op, wide).check(), Ok(()), "{op:?} without a fault");
        for row in table(op, wide).iter().filter(|row| row.fault.is_of_addresses()) {
            let mut call = OnAddresses::new(op, wide);
            let error = call.spoil(row, wide);
            let results = devices.iter().map(|device| call.plan(device)).chain([call.check()]);
            results.for_each(|got| assert!(same(&got, &error), "{row:?}: {got:?}"));
        }
        let mut call = OnAddresses::new(op, false);
        *call.dtype() = Dtype::F32;
        let dtype = Error::Dtype { got: Dtype::F32, backend: "the CUDA kernels", expected: "F16, Bf16" };
        // Alignment is that of f32 by then.
        assert_eq!(call.plan(&devices[1]), Err(dtype), "{op:?}");
    }
}

/// Every entry on a backend over slices: its error, and everything as it was.
fn refuses<T: Element>(name: &str, run: impl Fn(&mut OnBuffers<T>) -> Result<()>) {
    for (op, wide) in OPS.into_iter().flat_map(|op| [(op, false), (op, true)]) {
        let mut legal = OnBuffers::<T>::new(op, wide);
        assert_eq!(run(&mut legal), Ok(()), "{op:?} without a fault on {name}");
        for row in table(op, wide).iter().filter(|row| row.is_of_buffers()) {
            let mut call = OnBuffers::<T>::new(op, wide);
            call.spoil(row);
            let before = format!("{call:?}");
            let got = run(&mut call);
            assert!(same(&got, &row.error), "{row:?} on {name}, {:?}: {got:?}", T::DTYPE);
            assert!(format!("{call:?}") == before, "{row:?} on {name}, {:?}: something was written", T::DTYPE);
        }
    }
}

#[test]
fn the_cpu_refuses_every_entry_and_writes_nothing() {
    fn run<T: Element>(call: &mut OnBuffers<T>) -> Result<()> {
        match call {
            OnBuffers::Forward(op) => cpu::forward(op.views()),
            OnBuffers::Backward(op) => cpu::backward(op.views()),
            OnBuffers::Merge(op) => cpu::merge(op.views()),
            OnBuffers::Round(op) => cpu::round(op.views()),
            OnBuffers::Gain(op) => cpu::gain(op.views()),
        }
    }
    refuses::<f16>("the CPU", run);
    refuses::<bf16>("the CPU", run);
    refuses::<f32>("the CPU", run);
}

#[cfg(all(feature = "emulator", feature = "cuda"))]
fn emulate<T: Element>(emulator: &fused_lora::emulator::Emulator, call: &mut OnBuffers<T>) -> Result<()> {
    match call {
        OnBuffers::Forward(op) => emulator.forward(op.views()).map(drop),
        OnBuffers::Backward(op) => emulator.backward(op.views()).map(drop),
        OnBuffers::Merge(op) => emulator.merge(op.views()).map(drop),
        OnBuffers::Round(op) => emulator.round(op.views()).map(drop),
        OnBuffers::Gain(op) => emulator.gain(op.views()).map(drop),
    }
}

#[test]
#[cfg(all(feature = "emulator", feature = "cuda"))]
fn the_emulator_refuses_every_entry_and_launches_nothing() {
    use super::common::emulated::Emulated;
    for arch in [80, 90] {
        let Emulated(emulator) = Emulated::new(arch, 2);
        refuses::<f16>("the emulator", |call| emulate(&emulator, call));
        // A launch would stop at its first instruction and say so.
        let stopped = emulator.clone().with_limit(0);
        let mut legal = OnBuffers::<bf16>::new(Op::Forward, false);
        assert!(matches!(emulate(&stopped, &mut legal), Err(Error::Emulator { .. })), "the limit stops nothing");
        for (op, wide) in OPS.into_iter().flat_map(|op| [(op, false), (op, true)]) {
            for row in table(op, wide).iter().filter(|row| row.is_of_buffers()) {
                let mut call = OnBuffers::<bf16>::new(op, wide);
                call.spoil(row);
                let got = emulate(&stopped, &mut call);
                assert!(same(&got, &row.error), "{row:?}: {got:?}");
            }
            let got = emulate(&emulator, &mut OnBuffers::<f32>::new(op, wide));
            let dtype = Error::Dtype { got: Dtype::F32, backend: "the CUDA kernels", expected: "F16, Bf16" };
            assert_eq!(got, Err(dtype), "{op:?}");
        }
    }
}

/// The arguments that a layer passes on: x and y of forward; dy and the outputs of backward.
#[test]
fn a_layer_refuses_what_it_passes_on() {
    for row in table(Op::Forward, true).iter().filter(|row| matches!(row.arg, "x" | "y") && row.is_of_buffers()) {
        let mut call = OnBuffers::<f16>::new(Op::Forward, true);
        call.spoil(row);
        let OnBuffers::Forward(mut op) = call else { unreachable!("it was made so") };
        let before = format!("{op:?}");
        let layer = layer(&op.w, &op.a, &op.b);
        let got = layer.forward_into(op.x.view(), op.y.view_mut());
        // A layer has no routes that another number of tokens disagrees with.
        let error = match (row.fault, &row.error) {
            (Fault::Rows(expected), Error::Dimension { arg: "routes", .. }) => {
                Error::Dimension { arg: "y", axis: "rows", got: SHAPE.m, expected }
            }
            _ => row.error.clone(),
        };
        assert!(same(&got, &error), "{row:?}: {got:?}");
        // Without a y it is x alone that can be wrong, and whoever has to match it follows.
        let follows = matches!(error, Error::Dimension { arg: "y", .. });
        if row.arg == "x" && !follows {
            let got = layer.forward(op.x.view()).map(drop);
            assert!(same(&got, &row.error), "{row:?}: {got:?}");
            let got = layer.forward_train(op.x.view()).map(drop);
            assert!(same(&got, &row.error), "{row:?}: {got:?}");
        }
        assert!(format!("{op:?}") == before, "{row:?}: something was written");
    }
    let passed = ["dy", "dx", "da", "db", "dbias"];
    for row in table(Op::Backward, true).iter().filter(|row| passed.contains(&row.arg) && row.is_of_buffers()) {
        let mut call = OnBuffers::<f16>::new(Op::Backward, true);
        let OnBuffers::Backward(legal) = call.clone() else { unreachable!("it was made so") };
        call.spoil(row);
        let OnBuffers::Backward(mut op) = call else { unreachable!("it was made so") };
        let layer = layer(&legal.w, &legal.a, &legal.b);
        let x = legal.x.as_ref().expect("x");
        let (_, pass) = layer.forward_train(x.view()).expect("forward_train");
        let before = format!("{op:?}");
        let HostBackward { dy, dx, da, db, dbias, accumulate, .. } = &mut op;
        let gradients = Gradients {
            dx: dx.as_mut().map(Host::view_mut),
            da: da.as_mut().map(f32_view),
            db: db.as_mut().map(f32_view),
            dbias: dbias.as_mut().map(f32_view),
            dm: None,
            accumulate: *accumulate,
        };
        let got = layer.backward(&pass, dy.view(), gradients);
        // The tokens are those of the pass.
        let tokens = |rows| Error::Dimension { arg: "dy", axis: "rows", got: rows, expected: SHAPE.m };
        let error = match row.fault {
            Fault::Rows(rows) if row.arg == "dy" => tokens(rows),
            _ => row.error.clone(),
        };
        assert!(same(&got, &error), "{row:?}: {got:?}");
        assert!(format!("{op:?}") == before, "{row:?}: something was written");
    }
}

fn layer(w: &Host<f16>, a: &Host<f16>, b: &Host<f16>) -> LoraLinear<cpu::Cpu, f16> {
    let [w, a, b] = [w, a, b].map(|host| compact(host).data);
    let mut layer = LoraLinear::upload(cpu::Cpu, &w, None, SHAPE.n, SHAPE.k).expect("a layer");
    let adapter = Adapter::upload(&cpu::Cpu, SHAPE.r, Scaling::Fixed(1.0), &a, &b).expect("an adapter");
    layer.add("one", adapter).expect("an added adapter");
    layer.activate("one").expect("an adapter");
    layer
}

fn f32_view(gradient: &mut HostGradient<f16>) -> fused_lora::MatrixMut<'_, [f32]> {
    match gradient {
        HostGradient::F32(host) => host.view_mut(),
        HostGradient::Storage(_) => unreachable!("the gradients of a layer are f32"),
    }
}

/// Dimensions that agree with one another and overflow something.
#[test]
fn products_of_dimensions_overflow_nothing() {
    let limit = MAX_DIMENSION as u64;
    let max = MAX_DIMENSION;
    let extent = |got| Error::TooLarge { what: "a matrix extent in elements", got, limit: i64::MAX as u64 / 4 };
    let square = (max as u64).pow(2);
    for size in [max + 1, 1 << 32, 1 << 61, usize::MAX] {
        let too_large = |what| Error::TooLarge { what, got: size as u64, limit };
        let dims = |m, n, k, r| fused_lora::LoraShape { m, n, k, r };
        for (shape, what) in [
            (dims(size, 7, 11, 3), "M (rows of x)"),
            (dims(5, size, 11, 3), "N (rows of w)"),
            (dims(5, 7, size, 3), "K (columns of w)"),
            (dims(5, 7, 11, size), "R (rows of a)"),
            (dims(size, size, size, size), "M (rows of x)"),
        ] {
            assert_eq!(ops::forward(Dtype::F16, shape).check(), Err(too_large(what)), "{shape:?}");
            assert_eq!(ops::backward(Dtype::F16, shape).check(), Err(too_large(what)), "{shape:?}");
            if shape.m == 5 {
                assert_eq!(ops::merge(Dtype::F16, shape, true).check(), Err(too_large(what)), "{shape:?}");
                assert_eq!(ops::round(Dtype::F16, shape, true).check(), Err(too_large(what)), "{shape:?}");
            }
        }
    }
    let (r, limit) = (MAX_ROUTED_RANK + 1, MAX_ROUTED_RANK as u64);
    let shape = fused_lora::LoraShape { m: 5, n: 7, k: 11, r };
    let routes = Some(raw::Matrix::new(1 << 50, 1, 6));
    let routed =
        raw::Forward { variant: raw::Variant { routes, ..Default::default() }, ..ops::forward(Dtype::F16, shape) };
    let what = "R (rows of a) of a batch with routes";
    assert_eq!(routed.check(), Err(Error::TooLarge { what, got: r as u64, limit }));
    let largest = fused_lora::LoraShape { m: max, n: max, k: max, r: max };
    for dtype in [Dtype::F16, Dtype::F32] {
        assert_eq!(ops::forward(dtype, largest).check(), Err(extent(square)));
        assert_eq!(ops::backward(dtype, largest).check(), Err(extent(square)));
        assert_eq!(ops::merge(dtype, largest, true).check(), Err(extent(square)));
        assert_eq!(ops::round(dtype, largest, true).check(), Err(extent(square)));
    }
}

/// On slices the same dimensions leave their buffers.
#[test]
fn no_product_of_dimensions_gets_past_a_buffer() {
    for size in [MAX_DIMENSION, MAX_DIMENSION + 1, 1 << 61, usize::MAX] {
        let mut call = OnBuffers::<f16>::new(Op::Forward, false);
        ["x", "y", "h"].into_iter().for_each(|arg| *call.argument(arg).place()[0] = size);
        if let OnBuffers::Forward(op) = &mut call {
            op.routes = None; // a table of that many words is none that a test can make
        }
        let before = format!("{call:?}");
        let OnBuffers::Forward(op) = &mut call else { unreachable!("it was made so") };
        let got = cpu::forward(op.views());
        assert!(matches!(got, Err(Error::BufferTooShort { arg: "x", .. } | Error::TooLarge { .. })), "{got:?}");
        assert!(format!("{call:?}") == before);
    }
}

/// What a workspace can be that is not one.
#[test]
fn workspaces_are_refused() {
    for arch in [80, 90] {
        let device = Device::of_arch("a device", arch, 132);
        let shape = fused_lora::LoraShape { m: 200, n: 64, k: 72, r: 8 };
        let (forward, backward) = (ops::forward(Dtype::F16, shape), ops::backward(Dtype::F16, shape));
        let plans = [
            (Plan::forward(&forward, &device).expect("a plan"), Op::Forward),
            (Plan::backward(&backward, &device).expect("a plan"), Op::Backward),
        ];
        for (plan, op) in plans {
            let (at, needed) = (1 << 50, plan.workspace_bytes());
            assert!(plan.launch(at, needed).is_ok());
            for got in [needed - 1, 1, 0] {
                assert_eq!(plan.launch(at, got), Err(Error::Workspace { got, needed }));
            }
            assert_eq!(plan.launch(0, needed), Err(Error::NullPointer { arg: "workspace" }));
            for address in [at + 1, at + 128] {
                assert_eq!(
                    plan.launch(address, needed),
                    Err(Error::Misaligned { arg: "workspace", address, align: 256 })
                );
            }
            let (got, limit) = (u64::MAX - 255, u64::MAX - needed as u64);
            let end = Error::TooLarge { what: "the address of the workspace", got, limit };
            assert_eq!(plan.launch(got, usize::MAX), Err(end));
            for other in op.arguments().filter(|&arg| is_there(op, arg)) {
                let mut call = match op {
                    Op::Forward => OnAddresses::Forward(forward),
                    _ => OnAddresses::Backward(backward),
                };
                let matrix = *call.argument(other);
                // On its first element, and from below on its last.
                for address in [matrix.ptr, (matrix.ptr + 2 * (matrix.rows * matrix.cols) as u64 - 2) & !255] {
                    let got = plan.launch(address, needed);
                    let Err(Error::Overlap { output: "workspace", other: named }) = got else {
                        unreachable!("{op:?}, {other}: {got:?}")
                    };
                    // Later arguments lie within reach of a large workspace, but none before.
                    assert_eq!(named, first_within(op, &mut call, address, needed), "{op:?}, {other}");
                }
            }
        }
    }
}

/// What the calls of `workspaces_are_refused` have.
fn is_there(op: Op, arg: &str) -> bool {
    !(matches!(arg, "routes" | "seed") || (op == Op::Forward && arg == "h"))
}

/// The first argument that lies in the workspace, in the order of the checks.
fn first_within(op: Op, call: &mut OnAddresses, address: u64, bytes: usize) -> &'static str {
    let within = |arg: &&'static str| {
        let matrix = *call.argument(arg);
        matrix.ptr < address + bytes as u64
            && matrix.ptr + (matrix.rows * matrix.cols) as u64 * op.element_bytes(arg, true) > address
    };
    let arguments = op.arguments().filter(|&arg| is_there(op, arg));
    let mut within = arguments.filter(within);
    within.next().expect("one lies there")
}

/// `Error::…` in the section `# Errors` of a function: from the line that holds `start`, of the first `function` after it.
fn documented(source: &str, start: &str, function: &str) -> BTreeSet<String> {
    let from = source.find(start).expect("the implementation");
    let to = from + source[from..].find(function).expect("the function");
    let doc = &source[from..to];
    let errors = &doc[doc.rfind("# Errors").expect("a section on errors")..];
    let names = errors.split("Error::").skip(1);
    names.map(|rest| rest.chars().take_while(char::is_ascii_alphanumeric).collect()).collect()
}

fn shown(op: Op) -> BTreeSet<String> {
    let name = |error: &Error| format!("{error:?}").chars().take_while(char::is_ascii_alphanumeric).collect();
    let table = table(op, true);
    table.iter().filter(|row| row.fault.is_of_addresses()).map(|row| name(&row.error)).collect()
}

/// What `# Errors` of each check lists is what the matrix shows.
#[test]
fn the_documentation_lists_what_the_matrix_shows() {
    let source = concat!(include_str!("../../src/shape.rs"), include_str!("../../src/shape/adapter.rs"));
    for (op, start) in [
        (Op::Forward, "impl Forward {"),
        (Op::Backward, "impl Backward {"),
        (Op::Merge, "impl Merge {"),
        (Op::Round, "impl Round {"),
        (Op::Gain, "impl Gain {"),
    ] {
        let mut all = shown(op);
        match op {
            Op::Forward => all.extend(shown(Op::DoraForward)),
            Op::Backward => all.extend(shown(Op::DoraBackward)),
            _ => {}
        }
        assert_eq!(documented(source, start, "pub fn check("), all, "{op:?}");
    }
}
