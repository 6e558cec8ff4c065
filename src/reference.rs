//! The oracle of the tests: the formulas of the crate in f64, without blocking, and the tolerance derived from them.
//!
//! [`forward`] and [`backward`] are the truth. [`naive_forward`] and [`naive_backward`] are what a user gets from
//! separate matrix products in the storage type `T`, each accumulated in f32 and rounded to `T`. [`check`] asks that an
//! implementation is at most twice as far from the truth as they are. Slow on purpose; nothing here is tuned.

mod tolerance;

use crate::Element;
use crate::dropout::Keep;
use crate::routing::Route;
pub use tolerance::{Expected, check, element_bound, unit_roundoff};

/// A row-major, contiguous f64 matrix; a vector is a matrix of one row.
#[derive(Clone, Debug, PartialEq)]
pub struct Mat {
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// `rows · cols` elements, row by row.
    pub data: Vec<f64>,
}

impl Mat {
    /// The matrix with element (i, j) = `element(i, j)`.
    pub fn from_fn(rows: usize, cols: usize, element: impl Fn(usize, usize) -> f64) -> Self {
        let data = (0..rows * cols).map(|at| element(at / cols, at % cols)).collect();
        Self { rows, cols, data }
    }

    /// Element (row, col).
    ///
    /// # Panics
    /// Outside the matrix.
    pub fn at(&self, row: usize, col: usize) -> f64 {
        self.data[row * self.cols + col]
    }

    /// Every element mapped by `f`.
    pub fn map(&self, f: impl Fn(f64) -> f64) -> Self {
        Self { data: self.data.iter().map(|&v| f(v)).collect(), ..*self }
    }

    /// The sum.
    ///
    /// # Panics
    /// When `other` has fewer rows or columns.
    pub fn plus(&self, other: &Self) -> Self {
        Self::from_fn(self.rows, self.cols, |i, j| self.at(i, j) + other.at(i, j))
    }

    /// The transpose.
    pub fn transposed(&self) -> Self {
        Self::from_fn(self.cols, self.rows, |i, j| self.at(j, i))
    }

    /// `self · other`, summed in f64.
    ///
    /// # Panics
    /// When `other` has fewer rows than `self` has columns.
    pub fn times(&self, other: &Self) -> Self {
        Self::from_fn(self.rows, other.cols, |i, j| (0..self.cols).map(|p| self.at(i, p) * other.at(p, j)).sum())
    }

    /// `self · other`, summed in f32 in ascending order, as a simple kernel does.
    fn times_f32(&self, other: &Self) -> Self {
        let dot = |i, j| (0..self.cols).fold(0f32, |sum, p| sum + self.at(i, p) as f32 * other.at(p, j) as f32);
        Self::from_fn(self.rows, other.cols, |i, j| f64::from(dot(i, j)))
    }

    fn column_sums(&self) -> Self {
        Self::from_fn(1, self.cols, |_, j| (0..self.rows).map(|i| self.at(i, j)).sum())
    }

    /// Euclidean (Frobenius) norm.
    pub fn norm(&self) -> f64 {
        self.data.iter().map(|v| v * v).sum::<f64>().sqrt()
    }
}

/// What the operations read; which fields matter is in the formulas of the crate.
#[derive(Clone, Debug)]
#[allow(missing_docs)] // the letters of the crate
pub struct Inputs {
    pub x: Mat,
    pub w: Mat,
    pub a: Mat,
    pub b: Mat,
    pub bias: Option<Mat>,
    pub dy: Mat,
    pub scale: f64,
    /// Of dropout: M × K, 1 / (1 − p) for what the adapter branch sees of x and 0 for what it does not.
    pub keep: Option<Mat>,
    /// DoRA's factors of the columns of y.
    pub gain: Option<Mat>,
    /// Of routes: M × R, the scale of its adapter for what a row keeps of h and dh, 0 for what it does not.
    pub gate: Option<Mat>,
}

impl Inputs {
    /// The same with absolute values: its results bound the size of every intermediate sum.
    pub fn magnitudes(&self) -> Self {
        let abs = |m: &Mat| m.map(f64::abs);
        let (x, w, a, b, dy) = (abs(&self.x), abs(&self.w), abs(&self.a), abs(&self.b), abs(&self.dy));
        Self {
            x,
            w,
            a,
            b,
            bias: self.bias.as_ref().map(abs),
            dy,
            scale: self.scale.abs(),
            keep: self.keep.clone(),
            gain: self.gain.as_ref().map(abs),
            gate: self.gate.as_ref().map(abs),
        }
    }

    /// h or dh from a product with A or B: scaled, and what its row keeps.
    fn routed(&self, product: &Mat) -> Mat {
        let gate = |i, j| self.gate.as_ref().map_or(1.0, |gate| gate.at(i, j));
        Mat::from_fn(product.rows, product.cols, |i, j| self.scale * gate(i, j) * product.at(i, j))
    }

    /// The columns of an M × N matrix times the gain.
    fn gained(&self, m: &Mat) -> Mat {
        match &self.gain {
            Some(gain) => Mat::from_fn(m.rows, m.cols, |i, j| gain.at(0, j) * m.at(i, j)),
            None => m.clone(),
        }
    }

    /// The bias, where there is one, added to every row.
    fn biased(&self, m: &Mat) -> Mat {
        match &self.bias {
            Some(bias) => Mat::from_fn(m.rows, m.cols, |i, j| m.at(i, j) + bias.at(0, j)),
            None => m.clone(),
        }
    }

    /// What of an M × K matrix passes through dropout.
    fn kept(&self, m: &Mat) -> Mat {
        match &self.keep {
            Some(keep) => {
                Mat::from_fn(m.rows, m.cols, |i, j| if keep.at(i, j) == 0.0 { 0.0 } else { keep.at(i, j) * m.at(i, j) })
            }
            None => m.clone(),
        }
    }
}

/// What routes multiply each element of h and dh by, from the words of a [`Routing`](crate::Routing) of m rows.
///
/// # Panics
/// When there are fewer words than rows.
pub fn gate(words: &[u64], m: usize, r: usize) -> Mat {
    let route = |row: usize| Route::from_word(words[row]);
    let keeps = |row: usize, rank: usize| (route(row).begin..route(row).end).contains(&rank);
    Mat::from_fn(m, r, |row, rank| if keeps(row, rank) { f64::from(route(row).scale) } else { 0.0 })
}

/// What dropout multiplies each element of an m × k matrix by: 0, or 1 / (1 − p) with p rounded as [`Dropout::p`](crate::Dropout::p)
/// says; `seed` holds the seed and the offset.
pub fn keep(p: f32, [seed, offset]: [u64; 2], m: usize, k: usize) -> Mat {
    let p = (f64::from(p) * 65536.0).round() / 65536.0;
    let mut kept = Mat::from_fn(m, k, |_, _| 1.0 / (1.0 - p));
    if let Some(keep) = Keep::new(p as f32, seed, offset) {
        keep.for_each_dropped((0, 0), (m, k), |i, j| kept.data[i * k + j] = 0.0);
    }
    kept
}

/// (h, y): h = scale · (x ∘ keep) Aᵀ ∘ gate, y = gain ∘ (x Wᵀ + h Bᵀ) (+ bias).
pub fn forward(i: &Inputs) -> (Mat, Mat) {
    let h = i.routed(&i.kept(&i.x).times(&i.a.transposed()));
    let y = i.biased(&i.gained(&i.x.times(&i.w.transposed()).plus(&h.times(&i.b.transposed()))));
    (h, y)
}

/// DoRA's norm: ‖W + scale · B A‖ of each row of W.
pub fn norm(w: &Mat, a: &Mat, b: &Mat, scale: f64) -> Mat {
    let folded = w.plus(&b.times(a).map(|v| scale * v));
    Mat::from_fn(1, w.rows, |_, n| (0..w.cols).map(|k| folded.at(n, k).powi(2)).sum::<f64>().sqrt())
}

/// DoRA's gradient of the magnitude: dm = Σ dy ∘ (y − bias) / magnitude; `y` as forward stored it.
pub fn magnitude_gradient(dy: &Mat, y: &Mat, bias: Option<&Mat>, magnitude: &Mat) -> Mat {
    let bias = |j| bias.map_or(0.0, |bias| bias.at(0, j));
    let sum = |j| (0..y.rows).map(|i| dy.at(i, j) * (y.at(i, j) - bias(j))).sum::<f64>();
    Mat::from_fn(1, y.cols, |_, j| sum(j) / magnitude.at(0, j))
}

/// What backward writes.
#[derive(Clone, Debug)]
#[allow(missing_docs)] // the letters of the crate
pub struct Gradients {
    pub dx: Mat,
    pub da: Mat,
    pub db: Mat,
    pub dbias: Mat,
}

/// dh = scale · dz B ∘ gate, dx = dz W + (dh A) ∘ keep, da = dhᵀ (x ∘ keep), db = dzᵀ h, dbias = Σ dy, with dz = gain ∘ dy; `h` as
/// forward stored it.
pub fn backward(i: &Inputs, h: &Mat) -> Gradients {
    let dz = i.gained(&i.dy);
    let dh = i.routed(&dz.times(&i.b));
    Gradients {
        dx: dz.times(&i.w).plus(&i.kept(&dh.times(&i.a))),
        da: dh.transposed().times(&i.kept(&i.x)),
        db: dz.transposed().times(h),
        dbias: i.dy.column_sums(),
    }
}

fn rounded<T: Element>(m: &Mat) -> Mat {
    m.map(|v| T::from_f64(v).to_f64())
}

/// [`forward`] as separate products in `T`: round(round(x Wᵀ + bias) + round(h Bᵀ)), h = round(scale · round(x Aᵀ)). With a gain the
/// bias comes last: round(round(gain ∘ round(round(x Wᵀ) + round(h Bᵀ))) + bias).
pub fn naive_forward<T: Element>(i: &Inputs) -> (Mat, Mat) {
    let x = rounded::<T>(&i.kept(&i.x));
    let narrow = rounded::<T>(&x.times_f32(&i.a.transposed()));
    let h = rounded::<T>(&i.routed(&narrow));
    let base = i.x.times_f32(&i.w.transposed());
    let base = rounded::<T>(&if i.gain.is_some() { base } else { i.biased(&base) });
    let y = rounded::<T>(&base.plus(&rounded::<T>(&h.times_f32(&i.b.transposed()))));
    if i.gain.is_none() {
        return (h, y);
    }
    (h, rounded::<T>(&i.biased(&rounded::<T>(&i.gained(&y)))))
}

/// [`backward`] as separate products in `T`; da, db and dbias stay in f32, the stricter of the two choices.
pub fn naive_backward<T: Element>(i: &Inputs, h: &Mat) -> Gradients {
    let dz = if i.gain.is_some() { rounded::<T>(&i.gained(&i.dy)) } else { i.dy.clone() };
    let dh = rounded::<T>(&i.routed(&rounded::<T>(&dz.times_f32(&i.b))));
    let (base, adapter) = (rounded::<T>(&dz.times_f32(&i.w)), rounded::<T>(&dh.times_f32(&i.a)));
    let (x, adapter) = (rounded::<T>(&i.kept(&i.x)), rounded::<T>(&i.kept(&adapter)));
    Gradients {
        dx: rounded::<T>(&base.plus(&adapter)),
        da: dh.transposed().times_f32(&x),
        db: dz.transposed().times_f32(h),
        dbias: Mat::from_fn(1, i.dy.rows, |_, _| 1.0).times_f32(&i.dy),
    }
}
