//! Random calls for as long as it is told: within tolerance, the same bits again, no hang, no memory left behind.
//!
//! `FUSED_LORA_SOAK_SECONDS` (8 by default) is how long each of the two tests takes. The cases follow from
//! `PROPTEST_RNG_SEED`, as those of the property tests do, or from the clock; a failure names its seed.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use common::data::{Placement, Rng, Routes, Spec, Values};
use common::every::Any;
#[cfg(all(feature = "emulator", feature = "cuda"))]
use common::every::{self, Kind};
use common::{Backend, HostBackward, HostDropout, HostForward, check, full};
use fused_lora::{Element, bf16, f16};

/// The system's allocator, with the bytes that are out.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged; counting touches no memory of the caller.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        NOW.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Pages that the process holds, in bytes; 0 where the system does not say.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    statm.split_whitespace().nth(1).and_then(|pages| pages.parse::<usize>().ok()).unwrap_or(0) * 4096
}

fn seconds() -> u64 {
    std::env::var("FUSED_LORA_SOAK_SECONDS").map_or(8, |value| value.parse().expect("a number of seconds"))
}

fn seed() -> u64 {
    let clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_nanos() as u64);
    std::env::var("PROPTEST_RNG_SEED").map_or_else(|_| clock(), |value| value.parse().expect("a seed"))
}

/// One in `count`.
fn pick(rng: &mut Rng, count: usize) -> usize {
    (rng.bits() % count as u64) as usize
}

/// Often small or near the edge of a tile, sometimes anything up to `most`.
fn size(rng: &mut Rng, most: usize) -> usize {
    let edges = [1, 2, 7, 8, 16, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 200, 255, 256, 257];
    let edge = edges[pick(rng, edges.len())];
    if pick(rng, 3) > 0 && edge <= most { edge } else { 1 + pick(rng, most) }
}

/// Any shape, placement, values and options. `aligned`: what the Hopper kernels take.
fn spec(rng: &mut Rng, most: usize, aligned: bool) -> Spec {
    let [m, n, k] = [size(rng, most), size(rng, most), size(rng, most)];
    let r = if pick(rng, 8) == 0 { 0 } else { size(rng, most.min(80)) };
    let in_steps = |value: usize| if aligned { value.next_multiple_of(8) } else { value };
    let flag = |rng: &mut Rng| rng.bits() & 1 == 1;
    let mut outputs = [flag(rng), flag(rng), flag(rng), flag(rng)];
    outputs[pick(rng, 4)] = true;
    let placement = if aligned { common::hopper::PLACEMENTS[pick(rng, 3)] } else { Placement::ALL[pick(rng, 4)] };
    let spec = Spec {
        placement,
        scale: [1.75, -0.5, 0.0, 1.0][pick(rng, 4)],
        bias: flag(rng),
        keep_h: flag(rng),
        accumulate: flag(rng),
        f32_gradients: flag(rng),
        outputs,
        seed: rng.bits(),
        ..Spec::new(m, in_steps(n), in_steps(k), in_steps(r))
    };
    if pick(rng, 4) == 0 && r <= 16 && most <= 64 { spec.integers() } else { spec }
}

fn dropout(rng: &mut Rng) -> Option<HostDropout> {
    let (p, seed) = ([0.0, 0.1, 0.5, 1.0][pick(rng, 4)], [rng.bits(), rng.bits()]);
    (pick(rng, 3) == 0).then_some(HostDropout { p, seed, in_memory: pick(rng, 2) == 0 })
}

fn routes(rng: &mut Rng) -> Option<Routes> {
    let routes = [Routes::Sorted(3), Routes::Mixed(4), Routes::Tiles(64), Routes::Nobody][pick(rng, 4)];
    (pick(rng, 3) == 0).then_some(routes)
}

/// DoRA, which goes with neither dropout nor routes.
fn dora(rng: &mut Rng, spec: Spec) -> Spec {
    let may = spec.dropout.is_none() && spec.routes.is_none() && spec.values == Values::Random;
    Spec { dora: pick(rng, 3) == 0 && may, ..spec }
}

type Bits = (Vec<u32>, Vec<Vec<u32>>);

fn bits<T: Element, A: Element>(forward: &HostForward<T, A>, backward: &HostBackward<T, A>) -> Bits {
    let all = |data: &[T]| data.iter().map(|value| value.to_f32().to_bits()).collect::<Vec<_>>();
    let gradient = |gradient: &Option<common::HostGradient<T>>| match gradient {
        Some(common::HostGradient::Storage(host)) => all(&host.data),
        Some(common::HostGradient::F32(host)) => host.data.iter().map(|value| value.to_bits()).collect(),
        None => Vec::new(),
    };
    let h = forward.h.as_ref().map(|h| all(&h.data)).unwrap_or_default();
    let dx = backward.dx.as_ref().map(|dx| all(&dx.data)).unwrap_or_default();
    let gradients = [&backward.da, &backward.db, &backward.dbias].map(gradient);
    let dm = backward.magnitude.as_ref().map(|of| of.dm.data.iter().map(|value| value.to_bits()).collect());
    (all(&forward.y.data), [vec![h, dx, dm.unwrap_or_default()], gradients.into()].concat())
}

/// Both operations, held to the oracle, then once more for their bits.
fn case<T: Element, A: Element>(
    backend: &impl Backend,
    spec: &Spec,
    judge_forward: impl Fn(&HostForward<T, A>, &HostForward<T, A>) -> Result<(), String>,
    judge_backward: impl Fn(&HostBackward<T, A>, &HostBackward<T, A>) -> Result<(), String>,
) {
    let run = || {
        let (mut forward, mut backward) = (spec.forward_of::<T, A>(), spec.backward_of::<T, A>());
        backend.forward(&mut forward).unwrap_or_else(|error| unreachable!("forward: {error}"));
        backend.backward(&mut backward).unwrap_or_else(|error| unreachable!("backward: {error}"));
        (forward, backward)
    };
    let (forward, backward) = run();
    judge_forward(&spec.forward_of(), &forward).unwrap_or_else(|complaint| unreachable!("{complaint}"));
    judge_backward(&spec.backward_of(), &backward).unwrap_or_else(|complaint| unreachable!("{complaint}"));
    let first = bits(&forward, &backward);
    drop((forward, backward));
    let (forward, backward) = run();
    assert!(bits(&forward, &backward) == first, "other bits the second time");
}

/// With factors of the storage type.
fn plain<T: Element>(backend: &impl Backend, spec: &Spec) {
    let judge_forward = |before: &_, after: &_| check::judge_forward(before, after, spec.values);
    let judge_backward = |before: &_, after: &_| check::judge_backward(before, after, spec.values);
    case::<T, T>(backend, spec, judge_forward, judge_backward);
}

/// With f32 factors over a layer of 16 bits.
fn with_f32_factors<T: Element>(backend: &impl Backend, spec: &Spec) {
    case::<T, f32>(backend, spec, full::judge_forward, full::judge_backward);
}

/// Ends the process when a case takes longer than this: what hangs cannot be unwound.
const PATIENCE: Duration = Duration::from_secs(120);

/// Says which case it was, when that fails.
struct Named(Arc<Mutex<String>>);

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("fails: {}", self.0.lock().map(|name| name.clone()).unwrap_or_default());
        }
    }
}

/// Watches the case whose name it holds.
fn watched(run: impl FnOnce(&dyn Fn(&str))) {
    let current = Arc::new(Mutex::new(String::new()));
    let _named = Named(Arc::clone(&current));
    let (done, is_done) = mpsc::channel::<()>();
    let (begun, beginnings) = (Arc::clone(&current), Arc::new(AtomicUsize::new(0)));
    let seen = Arc::clone(&beginnings);
    let watchman = std::thread::spawn(move || {
        let mut last = usize::MAX;
        while is_done.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
            let now = seen.load(Ordering::Relaxed);
            if now == last {
                eprintln!("hangs: {}", begun.lock().map(|name| name.clone()).unwrap_or_default());
                std::process::abort();
            }
            last = now;
        }
    });
    run(&|name| {
        beginnings.fetch_add(1, Ordering::Relaxed);
        if let Ok(mut current) = current.lock() {
            name.clone_into(&mut current);
        }
    });
    drop(done);
    watchman.join().expect("the watchman only watches");
}

/// Runs cases until the time is up, prints how many there were, and holds memory to what it was after the first few.
fn soak(name: &str, free: impl Fn() -> usize, next: impl Fn(&mut Rng, &dyn Fn(&str))) {
    const WARM: usize = 20;
    // gemm keeps a buffer as large as L2 for each thread, from the first product on that the thread has a part in.
    let kept = (256 << 10) + rayon::current_num_threads() * (4 << 20);
    let (seed, end) = (seed(), Instant::now() + Duration::from_secs(seconds()));
    let mut rng = Rng(seed);
    let mut count = 0;
    let (mut live, mut peak, mut least) = (0, 0, 0);
    watched(|begins| {
        while Instant::now() < end || count <= WARM {
            next(&mut rng, &|case| begins(&format!("{name}, seed {seed}, case {count}: {case}")));
            count += 1;
            if count <= WARM {
                (live, peak, least) = (NOW.load(Ordering::Relaxed), peak.max(resident()), free());
                continue;
            }
            // Everything of a case is gone after it, but for what threads keep; pages may stay with the allocator.
            let (now, pages) = (NOW.load(Ordering::Relaxed), resident());
            assert!(now <= live + kept, "{name}, seed {seed}: {now} bytes are out after case {count}, {live} were");
            assert!(pages <= peak + (96 << 20), "{name}, seed {seed}: {pages} bytes are resident, {peak} were");
            assert!(
                free() + (64 << 20) >= least,
                "{name}, seed {seed}: {} bytes of the device are free, {least} were",
                free()
            );
        }
    });
    println!("{name}: {count} cases from seed {seed}, resident {} MiB, at first {} MiB", resident() >> 20, peak >> 20);
}

/// Any type of layer, f32 `with_f32`; over 16 bits f32 factors, too.
fn typed(rng: &mut Rng, backend: &impl Backend, spec: &Spec, with_f32: bool, begins: &dyn Fn(&str)) {
    let dtype = pick(rng, if with_f32 { 3 } else { 2 });
    let may = dtype < 2 && spec.r != 0 && spec.values == Values::Random;
    let f32_factors = may && pick(rng, 3) == 0;
    let over = if f32_factors { "f32 over " } else { "" };
    begins(&format!("{}, {over}{}, {spec:?}", backend.name(), ["f16", "bf16", "f32"][dtype]));
    match (dtype, f32_factors) {
        (0, false) => plain::<f16>(backend, spec),
        (1, false) => plain::<bf16>(backend, spec),
        (0, true) => with_f32_factors::<f16>(backend, spec),
        (1, true) => with_f32_factors::<bf16>(backend, spec),
        _ => plain::<f32>(backend, spec),
    }
}

/// Every kernel once: the emulator keeps what it has read of their PTX.
#[cfg(all(feature = "emulator", feature = "cuda"))]
fn warm() {
    for (kind, spec) in [(Kind::Ragged, Spec::new(3, 5, 7, 2)), (Kind::Hopper, Spec::new(3, 8, 16, 8))] {
        for backend in every::emulated(kind) {
            plain::<f16>(&backend, &spec);
            plain::<bf16>(&backend, &spec);
        }
    }
    let (emulated, large) = (common::emulated::Emulated::new(75, 2), fused_lora::plan::TileSize::Large);
    let backend = emulated.with_tile(large);
    plain::<f16>(&backend, &Spec::new(3, 5, 7, 2));
    plain::<bf16>(&backend, &Spec::new(3, 5, 7, 2));
}

/// A simulated GPU of any kind, with its own order of events.
#[cfg(all(feature = "emulator", feature = "cuda"))]
fn emulated(rng: &mut Rng) -> (common::emulated::Emulated, bool) {
    use common::emulated::Emulated;
    use fused_lora::emulator::Timing;
    use fused_lora::plan::{Options, TileSize};
    let arch = [75, 80, 90][pick(rng, 3)];
    let options = if arch == 90 {
        let variants = common::hopper::variants();
        let options = variants[pick(rng, variants.len())];
        [options, options.with_bundle(2), options.with_chunks(3)][pick(rng, 3)]
    } else {
        Options::default().with_tile([TileSize::Large, TileSize::Small][pick(rng, 2)])
    };
    let sms = if arch == 90 { [2, 3, 5, 33] } else { [1, 2, 5, 40] };
    let Emulated(emulator) = Emulated::new(arch, sms[pick(rng, 4)]).with_options(options);
    let timing = [Timing::Eager, Timing::Lazy, Timing::Mixed][pick(rng, 3)];
    (Emulated(emulator.with_seed(rng.bits()).with_copies(timing)), arch == 90)
}

/// One after the other, so that nothing else allocates meanwhile.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn soak_on_the_cpu_and_the_emulator() {
    let _alone = alone();
    #[cfg(all(feature = "emulator", feature = "cuda"))]
    warm();
    soak(
        "cpu and emulator",
        || 0,
        |rng, begins| {
            let most = if pick(rng, 12) == 0 { 300 } else { 96 };
            let large = Spec { dropout: dropout(rng), routes: routes(rng), ..spec(rng, most, false) };
            let large = dora(rng, large);
            typed(rng, &Any::Cpu, &large, true, begins);
            #[cfg(all(feature = "emulator", feature = "cuda"))]
            {
                let (backend, aligned) = emulated(rng);
                let small = Spec { dropout: dropout(rng), routes: routes(rng), ..spec(rng, 96, aligned) };
                let small = dora(rng, small);
                typed(rng, &backend, &small, false, begins);
            }
        },
    );
}

#[test]
#[cfg(feature = "cuda")]
fn soak_on_the_gpu() {
    let _alone = alone();
    let Some(kernels) = common::gpu::kernels("soak_on_the_gpu") else { return };
    let context = kernels.context().clone();
    let is_hopper = kernels.device().arch == 90 && !kernels.plan_options().without_sm90;
    let free = || context.mem_get_info().map_or(usize::MAX >> 1, |(free, _)| free);
    soak("cuda", free, |rng, begins| {
        let aligned = pick(rng, 2) == 0;
        let variants = common::hopper::variants();
        let options = match aligned && is_hopper {
            true => variants[pick(rng, variants.len())],
            false => fused_lora::plan::Options::default(),
        };
        let gpu = common::gpu::Gpu::new(kernels.with_plan_options(options));
        let most = if pick(rng, 20) == 0 { 1500 } else { 300 };
        let mut spec = spec(rng, most, aligned);
        if !aligned {
            spec = Spec { dropout: dropout(rng), ..spec };
        }
        let spec = dora(rng, spec);
        typed(rng, &gpu, &spec, false, begins);
    });
}
