//! What the CPU backend allocates beside the caller's matrices, counted by the allocator of this test.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use fused_lora::{Accumulate, Element, Gradient, LoraShape, Matrix, MatrixMut, bf16, cpu};

/// The system's allocator, with the bytes that are out now and the most that ever were.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged; counting touches no memory of the caller.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
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

/// The most that `run` had allocated at once beside what was there before.
fn peak_of(run: impl FnOnce()) -> usize {
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    run();
    PEAK.load(Ordering::Relaxed) - before
}

fn scratch<T: Element>(LoraShape { m, n, k, r }: LoraShape) -> [usize; 2] {
    let filled = |count: usize| vec![T::from_f32(0.5); count];
    let (x, w, a, b, dy) = (filled(m * k), filled(n * k), filled(r * k), filled(n * r), filled(m * n));
    let (mut h, mut y, mut dx) = (filled(m * r), filled(m * n), filled(m * k));
    let (mut da, mut db) = (vec![0f32; r * k], vec![0f32; n * r]);
    let forward = peak_of(|| {
        cpu::forward(cpu::Forward {
            x: Matrix::new(&x[..], m, k),
            w: Matrix::new(&w[..], n, k),
            a: Matrix::new(&a[..], r, k),
            b: Matrix::new(&b[..], n, r),
            scale: 2.0,
            bias: None,
            h: Some(MatrixMut::new(&mut h[..], m, r)),
            y: MatrixMut::new(&mut y[..], m, n),
            variant: Default::default(),
        })
        .expect("forward runs");
    });
    let backward = peak_of(|| {
        cpu::backward(cpu::Backward {
            dy: Matrix::new(&dy[..], m, n),
            w: Matrix::new(&w[..], n, k),
            a: Matrix::new(&a[..], r, k),
            b: Matrix::new(&b[..], n, r),
            scale: 2.0,
            x: Some(Matrix::new(&x[..], m, k)),
            h: Some(Matrix::new(&h[..], m, r)),
            dx: Some(MatrixMut::new(&mut dx[..], m, k)),
            da: Some(Gradient::F32(MatrixMut::new(&mut da[..], r, k))),
            db: Some(Gradient::F32(MatrixMut::new(&mut db[..], n, r))),
            dbias: None,
            dm: None,
            accumulate: Accumulate::default(),
            variant: Default::default(),
        })
        .expect("backward runs");
    });
    [forward, backward]
}

/// One test, so that nothing else allocates meanwhile.
#[test]
fn scratch_is_bounded_by_the_threads() {
    let threads = rayon::current_num_threads();
    let shape = LoraShape { m: 512, n: 4096, k: 4096, r: 16 };
    // Documented: 2 MiB per thread and some bytes per row and tile. gemm packs what it multiplies: half as much again.
    let bound = threads * (3 << 20) + (2 << 20);
    for (name, scratch) in [("f32", scratch::<f32>(shape)), ("bf16", scratch::<bf16>(shape))] {
        println!("{name}: {scratch:?} bytes on {threads} threads, at most {bound}");
        assert!(scratch.iter().all(|&bytes| bytes > 0 && bytes <= bound), "{name}: {scratch:?}, at most {bound}");
    }
}
