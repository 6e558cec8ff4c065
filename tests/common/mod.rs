//! What the tests of every backend share: operations over host buffers, the backends, seeded data and the checks.
//!
//! A test body is written once against [`Backend`] and run with [`Cpu`] or any other implementation:
//! `check::forward(&backend, &Spec { … })` makes the data, runs it and holds every output to the oracle.
#![allow(dead_code)] // each test binary uses its part

#[cfg(feature = "cuda")]
pub mod altered;
pub mod check;
pub mod clock;
pub mod data;
#[cfg(all(feature = "emulator", feature = "cuda"))]
pub mod emulated;
pub mod every;
pub mod factors;
pub mod full;
#[cfg(feature = "peft")]
pub mod fuzz_peft;
pub mod fuzz_plan;
pub mod golden;
#[cfg(feature = "cuda")]
pub mod gpu;
pub mod hopper;
#[cfg(feature = "cuda")]
pub mod hopper_defects;
pub mod layers;
pub mod legal;
#[cfg(feature = "peft")]
pub mod peft;
#[cfg(feature = "cuda")]
pub mod portable_defects;
pub mod raw;
pub mod row_factors;
pub mod shared;

use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::{env, fs};

use shared::{SharedBackward, SharedForward};

use fused_lora::{
    Accumulate, Dropout, Element, Gradient, MagnitudeGradient, Matrix, MatrixMut, Result, Seed, Variant, cpu,
};

/// The project's folder. Asked at run time first, because a bundle runs the tests where they were not compiled.
pub fn project() -> PathBuf {
    env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into()).into()
}

/// A folder for files that tests write; in a bundle as `project`.
pub fn scratch() -> PathBuf {
    env::var_os("CARGO_TARGET_TMPDIR").unwrap_or_else(|| env!("CARGO_TARGET_TMPDIR").into()).into()
}

/// Says that `test` does not run, past the test harness, which captures only what is printed by macros.
pub fn skipped(test: &str, why: &str) {
    // One write, so that lines of several tests do not mix; it starts a line because the harness, on one thread, has written
    // the name of the test without ending its line.
    let line = format!("\nSKIPPED: {why}: {test}\n");
    std::io::stderr().write_all(line.as_bytes()).expect("stderr is writable");
}

/// A fresh copy of a folder with all it holds.
pub fn copy_folder(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a readable folder") {
        let path = entry.expect("an entry").path();
        let target = to.join(path.file_name().expect("a name"));
        if path.is_dir() {
            copy_folder(&path, &target);
        } else {
            fs::copy(&path, &target).expect("a copy");
        }
    }
}

/// A strided matrix in a buffer of its own, with something before it, between its rows and after it.
#[derive(Clone, Debug, PartialEq)]
pub struct Host<T> {
    pub rows: usize,
    pub cols: usize,
    pub offset: usize,
    pub row_stride: usize,
    pub data: Vec<T>,
}

impl<T: Element> Host<T> {
    pub fn view(&self) -> Matrix<'_, [T]> {
        Matrix::new(&self.data[..], self.rows, self.cols).with_offset(self.offset).with_row_stride(self.row_stride)
    }

    pub fn view_mut(&mut self) -> MatrixMut<'_, [T]> {
        let Self { rows, cols, offset, row_stride, .. } = *self;
        MatrixMut::new(&mut self.data[..], rows, cols).with_offset(offset).with_row_stride(row_stride)
    }

    /// Position of element (row, col) in `data`.
    pub fn index(&self, row: usize, col: usize) -> usize {
        self.offset + row * self.row_stride + col
    }

    pub fn set(&mut self, row: usize, col: usize, value: f64) {
        let at = self.index(row, col);
        self.data[at] = T::from_f64(value);
    }

    /// Every element of the matrix, and nothing around it.
    pub fn fill(&mut self, element: impl Fn(usize, usize) -> f64) {
        for row in 0..self.rows {
            (0..self.cols).for_each(|col| self.set(row, col, element(row, col)));
        }
    }

    /// A copy of some rows, contiguous.
    pub fn rows(&self, rows: Range<usize>) -> Self {
        self.part(rows, 0..self.cols)
    }

    /// A copy of some columns, contiguous.
    pub fn columns(&self, columns: Range<usize>) -> Self {
        self.part(0..self.rows, columns)
    }

    fn part(&self, rows: Range<usize>, columns: Range<usize>) -> Self {
        let (row_stride, from) = (columns.len(), columns.clone());
        let data = rows.clone().flat_map(|row| from.clone().map(move |col| self.data[self.index(row, col)])).collect();
        Self { rows: rows.len(), cols: columns.len(), offset: 0, row_stride, data }
    }

    /// The same in another type.
    pub fn to<O: Element>(&self) -> Host<O> {
        let Self { rows, cols, offset, row_stride, .. } = *self;
        Host {
            rows,
            cols,
            offset,
            row_stride,
            data: self.data.iter().map(|value| O::from_f32(value.to_f32())).collect(),
        }
    }

    /// Whether `data[at]` belongs to the matrix (and not to what surrounds it).
    pub fn is_element(&self, at: usize) -> bool {
        let from = at.wrapping_sub(self.offset);
        at >= self.offset && from / self.row_stride.max(1) < self.rows && from % self.row_stride.max(1) < self.cols
    }

    pub fn to_mat(&self) -> fused_lora::reference::Mat {
        fused_lora::reference::Mat::from_fn(self.rows, self.cols, |i, j| self.data[self.index(i, j)].to_f64())
    }
}

/// The same bits, also of NaN.
pub fn is_same<T: Element>(one: T, other: T) -> bool {
    one.to_f32().to_bits() == other.to_f32().to_bits()
}

/// da, db or dbias in host memory.
#[derive(Clone, Debug, PartialEq)]
pub enum HostGradient<T> {
    Storage(Host<T>),
    F32(Host<f32>),
}

impl<T: Element> HostGradient<T> {
    pub fn to_f32(&self) -> Host<f32> {
        match self {
            Self::Storage(host) => host.to(),
            Self::F32(host) => host.clone(),
        }
    }

    /// A copy of some rows, contiguous.
    pub fn rows(&self, rows: Range<usize>) -> Self {
        match self {
            Self::Storage(host) => Self::Storage(host.rows(rows)),
            Self::F32(host) => Self::F32(host.rows(rows)),
        }
    }

    fn view_mut(&mut self) -> Gradient<'_, [T], [f32]> {
        match self {
            Self::Storage(host) => Gradient::Storage(host.view_mut()),
            Self::F32(host) => Gradient::F32(host.view_mut()),
        }
    }
}

/// DoRA's gradient of the magnitude, and what it is computed from.
#[derive(Clone, Debug, PartialEq)]
pub struct HostMagnitude<T> {
    pub y: Host<T>,
    pub bias: Option<Host<T>>,
    pub magnitude: Host<f32>,
    pub dm: Host<f32>,
}

impl<T: Element> HostMagnitude<T> {
    fn view_mut(&mut self) -> MagnitudeGradient<'_, [T], [f32], [f32]> {
        let Self { y, bias, magnitude, dm } = self;
        let bias = bias.as_ref().map(Host::view);
        MagnitudeGradient { y: y.view(), bias, magnitude: magnitude.view(), dm: dm.view_mut() }
    }
}

/// Dropout with seed and offset, passed or in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HostDropout {
    pub p: f32,
    pub seed: [u64; 2],
    pub in_memory: bool,
}

impl HostDropout {
    pub fn view(&self) -> Dropout<'_, [u64]> {
        let [seed, offset] = self.seed;
        let passed = Seed::Value { seed, offset };
        Dropout {
            p: self.p,
            seed: if self.in_memory { Seed::Memory(Matrix::new(&self.seed[..], 1, 2)) } else { passed },
        }
    }

    /// What multiplies each element of an `m` × `k` matrix.
    pub fn keep(&self, m: usize, k: usize) -> fused_lora::reference::Mat {
        fused_lora::reference::keep(self.p, self.seed, m, k)
    }
}

fn variant<'a>(
    dropout: &'a Option<HostDropout>,
    routes: &'a Option<Vec<u64>>,
    gain: &'a Option<Host<f32>>,
) -> cpu::Variant<'a> {
    let routes = routes.as_ref().map(|words| Matrix::new(&words[..], 1, words.len()));
    Variant { dropout: dropout.as_ref().map(HostDropout::view), routes, gain: gain.as_ref().map(Host::view) }
}

/// Forward over host buffers; `h` and `y` are written in place.
#[derive(Clone, Debug, PartialEq)]
pub struct HostForward<T, A = T> {
    pub x: Host<T>,
    pub w: Host<T>,
    pub a: Host<A>,
    pub b: Host<A>,
    pub scale: f32,
    pub bias: Option<Host<T>>,
    pub h: Option<Host<T>>,
    pub y: Host<T>,
    pub dropout: Option<HostDropout>,
    /// Words of a routing.
    pub routes: Option<Vec<u64>>,
    /// DoRA's factors of the columns of y.
    pub gain: Option<Host<f32>>,
}

impl<T: Element, A: Element> HostForward<T, A> {
    /// As the backends that compute on slices take it.
    pub fn views(&mut self) -> cpu::Forward<'_, T, A> {
        let Self { x, w, a, b, scale, bias, h, y, dropout, routes, gain } = self;
        cpu::Forward {
            x: x.view(),
            w: w.view(),
            a: a.view(),
            b: b.view(),
            scale: *scale,
            bias: bias.as_ref().map(Host::view),
            h: h.as_mut().map(Host::view_mut),
            y: y.view_mut(),
            variant: variant(dropout, routes, gain),
        }
    }
}

/// Backward over host buffers; `dx`, `da`, `db` and `dbias` are written in place.
#[derive(Clone, Debug, PartialEq)]
pub struct HostBackward<T, A = T> {
    pub dy: Host<T>,
    pub w: Host<T>,
    pub a: Host<A>,
    pub b: Host<A>,
    pub scale: f32,
    pub x: Option<Host<T>>,
    pub h: Option<Host<T>>,
    pub dx: Option<Host<T>>,
    pub da: Option<HostGradient<T>>,
    pub db: Option<HostGradient<T>>,
    pub dbias: Option<HostGradient<T>>,
    pub magnitude: Option<HostMagnitude<T>>,
    pub accumulate: Accumulate,
    pub dropout: Option<HostDropout>,
    /// Words of a routing.
    pub routes: Option<Vec<u64>>,
    /// DoRA's factors of the columns of y.
    pub gain: Option<Host<f32>>,
}

impl<T: Element, A: Element> HostBackward<T, A> {
    /// As the backends that compute on slices take it.
    pub fn views(&mut self) -> cpu::Backward<'_, T, A> {
        let Self { dy, w, a, b, scale, x, h, dx, da, db, dbias, magnitude, accumulate, dropout, routes, gain } = self;
        cpu::Backward {
            dy: dy.view(),
            w: w.view(),
            a: a.view(),
            b: b.view(),
            scale: *scale,
            x: x.as_ref().map(Host::view),
            h: h.as_ref().map(Host::view),
            dx: dx.as_mut().map(Host::view_mut),
            da: da.as_mut().map(HostGradient::view_mut),
            db: db.as_mut().map(HostGradient::view_mut),
            dbias: dbias.as_mut().map(HostGradient::view_mut),
            dm: magnitude.as_mut().map(HostMagnitude::view_mut),
            accumulate: *accumulate,
            variant: variant(dropout, routes, gain),
        }
    }
}

/// Something that runs both operations on buffers it finds in host memory: uploads every buffer whole, runs, and brings
/// the written ones back whole, so that the checks see what happened around the matrices too.
pub trait Backend {
    fn name(&self) -> String;
    fn forward<T: Element, A: Element>(&self, op: &mut HostForward<T, A>) -> Result<()>;
    fn backward<T: Element, A: Element>(&self, op: &mut HostBackward<T, A>) -> Result<()>;
    fn forward_shared<T: Element, A: Element>(&self, op: &mut SharedForward<T, A>) -> Result<()>;
    fn backward_shared<T: Element, A: Element>(&self, op: &mut SharedBackward<T, A>) -> Result<()>;
}

/// The CPU backend.
pub struct Cpu;

impl Backend for Cpu {
    fn name(&self) -> String {
        "cpu".into()
    }

    fn forward<T: Element, A: Element>(&self, op: &mut HostForward<T, A>) -> Result<()> {
        cpu::forward(op.views())
    }

    fn backward<T: Element, A: Element>(&self, op: &mut HostBackward<T, A>) -> Result<()> {
        cpu::backward(op.views())
    }

    fn forward_shared<T: Element, A: Element>(&self, op: &mut SharedForward<T, A>) -> Result<()> {
        cpu::forward_shared(op.views())
    }

    fn backward_shared<T: Element, A: Element>(&self, op: &mut SharedBackward<T, A>) -> Result<()> {
        cpu::backward_shared(op.views())
    }
}
