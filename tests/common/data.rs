//! Seeded test data: which shapes, how they lie in memory, what they hold.

use fused_lora::{Accumulate, Element, Routing, Slot, split_columns};

use super::{Host, HostBackward, HostDropout, HostForward, HostGradient, HostMagnitude, full};

/// SplitMix64: every test names its seed and repeats exactly.
pub struct Rng(pub u64);

impl Rng {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [−1, 1).
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    /// Uniform among −limit … limit.
    pub fn integer(&mut self, limit: i64) -> f64 {
        (self.bits() % (2 * limit as u64 + 1)) as f64 - limit as f64
    }
}

/// How every matrix of an operation lies in its buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// Rows start at multiples of 16 bytes: the fast path of every kernel.
    Aligned,
    /// Rows follow each other directly, whatever their length.
    Contiguous,
    /// An aligned window of a wider matrix.
    Strided,
    /// Nothing is aligned beyond the element.
    Unaligned,
}

impl Placement {
    pub const ALL: [Self; 4] = [Self::Aligned, Self::Contiguous, Self::Strided, Self::Unaligned];

    fn offset_and_stride(self, cols: usize) -> (usize, usize) {
        match self {
            Self::Aligned => (0, cols.next_multiple_of(8)),
            Self::Contiguous => (0, cols),
            Self::Strided => (64, cols.next_multiple_of(8) + 24),
            Self::Unaligned => (3, cols + 5),
        }
    }
}

/// What the matrices hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values {
    /// Random reals of a layer's usual sizes.
    Random,
    /// Small integers: every sum is exact, so every result must be the rounded exact one.
    Integers,
}

/// Which adapter each row of a test goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routes {
    /// Runs of rows of one adapter, of which the second is none; sorted, at any row.
    Sorted(usize),
    /// Another adapter from row to row.
    Mixed(usize),
    /// One adapter after the other, from multiples of so many rows on.
    Tiles(usize),
    /// No row has any.
    Nobody,
}

impl Routes {
    /// Adapters of different ranks that fill `r`.
    pub fn slots(self, r: usize) -> Vec<Slot> {
        let count = match self {
            Routes::Sorted(count) | Routes::Mixed(count) => count,
            Routes::Tiles(_) => 3,
            Routes::Nobody => 1,
        };
        let bounds = |at: usize| r * at * (at + 1) / (count * (count + 1));
        let scale = |at: usize| [2.0, 0.5, -1.0, 4.0][at % 4];
        let slot = |at: usize| Slot { first_rank: bounds(at), ranks: bounds(at + 1) - bounds(at), scale: scale(at) };
        (0..count).map(slot).collect()
    }

    /// The adapter of each of `m` rows.
    pub fn ids(self, m: usize) -> Vec<Option<usize>> {
        let id = |row: usize| match self {
            Routes::Sorted(count) => Some(row * (count + 1) / m).filter(|&at| at != 1).map(|at| at.saturating_sub(1)),
            Routes::Mixed(count) => Some(row * 7 % (count + 1)).filter(|&at| at < count),
            Routes::Tiles(rows) => Some(row / rows % 3),
            Routes::Nobody => None,
        };
        (0..m).map(id).collect()
    }

    fn words(self, m: usize, r: usize) -> Vec<u64> {
        Routing::new(&self.slots(r), &self.ids(m)).expect("a routing").words().to_vec()
    }
}

/// One case of a test.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spec {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub r: usize,
    pub placement: Placement,
    pub values: Values,
    pub scale: f32,
    pub bias: bool,
    /// Forward writes h to a buffer of the caller.
    pub keep_h: bool,
    /// Backward adds to what its outputs hold.
    pub accumulate: bool,
    /// da, db and dbias are f32, not the storage type.
    pub f32_gradients: bool,
    /// Which of dx, da, db, dbias backward computes.
    pub outputs: [bool; 4],
    pub dropout: Option<HostDropout>,
    pub routes: Option<Routes>,
    /// A gain, and in backward the gradient of the magnitude.
    pub dora: bool,
    pub seed: u64,
}

impl Spec {
    /// Every output, random values, contiguous.
    pub fn new(m: usize, n: usize, k: usize, r: usize) -> Self {
        Self {
            m,
            n,
            k,
            r,
            placement: Placement::Contiguous,
            values: Values::Random,
            scale: 1.75,
            bias: true,
            keep_h: true,
            accumulate: false,
            f32_gradients: true,
            outputs: [true; 4],
            dropout: None,
            routes: None,
            dora: false,
            seed: (m * 31 + n * 37 + k * 41 + r * 43) as u64,
        }
    }

    /// Small integers and a scale that keeps them exact.
    #[must_use]
    pub fn integers(self) -> Self {
        Self { values: Values::Integers, scale: 2.0, ..self }
    }

    /// A matrix as they lie here, every element and everything around it `around`.
    pub fn place<T: Element>(&self, rows: usize, cols: usize, around: T) -> Host<T> {
        let (offset, row_stride) = self.placement.offset_and_stride(cols);
        let end = if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row_stride + cols };
        let tail = if self.placement == Placement::Contiguous { 0 } else { 9 };
        Host { rows, cols, offset, row_stride, data: vec![around; offset + end + tail] }
    }

    /// The inputs of forward, with h and y poisoned.
    pub fn forward<T: Element>(&self) -> HostForward<T> {
        self.forward_of::<T, T>()
    }

    /// The same with factors of `A`.
    pub fn forward_of<T: Element, A: Element>(&self) -> HostForward<T, A> {
        let Self { m, n, k, r, .. } = *self;
        let mut fill = Fill { spec: self, rng: Rng(self.seed) };
        HostForward {
            x: fill.input(m, k, 1.0, 2),
            w: fill.input(n, k, 1.7 / (k as f64).sqrt(), 2),
            a: fill.input(r, k, 1.7 / (k as f64).sqrt(), 1),
            b: fill.input(n, r, 0.8 / (r.max(1) as f64).sqrt(), 1),
            scale: self.scale,
            bias: self.bias.then(|| fill.input(1, n, 0.5, 9)),
            h: self.keep_h.then(|| fill.output(m, if full::is_split::<T, A>() { split_columns(r) } else { r })),
            y: fill.output(m, n),
            dropout: self.dropout,
            routes: self.routes.map(|routes| routes.words(m, r)),
            gain: self.dora.then(|| fill.gain(n)),
        }
    }

    /// A factor for each row of W.
    pub fn row_factors(&self) -> Host<f32> {
        Fill { spec: self, rng: Rng(self.seed ^ 0x5a5a) }.gain(self.n)
    }

    /// The inputs of backward, with its outputs poisoned, or holding values where they accumulate.
    pub fn backward<T: Element>(&self) -> HostBackward<T> {
        self.backward_of::<T, T>()
    }

    /// The same with factors of `A`.
    pub fn backward_of<T: Element, A: Element>(&self) -> HostBackward<T, A> {
        let Self { m, n, k, r, outputs: [dx, da, db, dbias], .. } = *self;
        let mut fill = Fill { spec: self, rng: Rng(!self.seed) };
        HostBackward {
            dy: fill.input(m, n, 1.0, 2),
            w: fill.input(n, k, 1.7 / (k as f64).sqrt(), 2),
            a: fill.input(r, k, 1.7 / (k as f64).sqrt(), 1),
            b: fill.input(n, r, 0.8 / (r.max(1) as f64).sqrt(), 1),
            scale: self.scale,
            x: da.then(|| fill.input(m, k, 1.0, 2)),
            h: db.then(|| if full::is_split::<T, A>() { fill.halves(m, r) } else { fill.middle(m, r) }),
            dx: dx.then(|| fill.output(m, k)),
            da: da.then(|| fill.gradient(r, k)),
            db: db.then(|| fill.gradient(n, r)),
            dbias: dbias.then(|| fill.gradient(1, n)),
            accumulate: Accumulate {
                dx: self.accumulate && dx,
                da: self.accumulate && da,
                db: self.accumulate && db,
                dbias: self.accumulate && dbias,
                dm: self.accumulate && self.dora,
            },
            dropout: self.dropout,
            routes: self.routes.map(|routes| routes.words(m, r)),
            gain: self.dora.then(|| fill.gain(n)),
            magnitude: self.dora.then(|| HostMagnitude {
                y: fill.input(m, n, 1.0, 3),
                bias: self.bias.then(|| fill.input(1, n, 0.5, 3)),
                magnitude: fill.gain(n),
                dm: fill.output(1, n),
            }),
        }
    }
}

struct Fill<'a> {
    spec: &'a Spec,
    rng: Rng,
}

impl Fill<'_> {
    fn values<T: Element>(&mut self, mut host: Host<T>, size: f64, limit: i64) -> Host<T> {
        for row in 0..host.rows {
            for col in 0..host.cols {
                let at = host.index(row, col);
                host.data[at] = T::from_f64(match self.spec.values {
                    Values::Random => self.rng.unit() * size,
                    Values::Integers => self.rng.integer(limit),
                });
            }
        }
        host
    }

    /// NaN around the matrix: a read outside it shows in the result.
    fn input<T: Element>(&mut self, rows: usize, cols: usize, size: f64, limit: i64) -> Host<T> {
        let host = self.spec.place(rows, cols, T::from_f32(f32::NAN));
        self.values(host, size, limit)
    }

    /// h as forward writes it: zeros where the row does not go through the rank.
    fn middle<T: Element>(&mut self, m: usize, r: usize) -> Host<T> {
        let mut host = self.input(m, r, 1.0, 8);
        let Some(routes) = self.spec.routes else { return host };
        let gate = fused_lora::reference::gate(&routes.words(m, r), m, r);
        for at in (0..m * r).filter(|&at| gate.data[at] == 0.0) {
            let index = host.index(at / r, at % r);
            host.data[index] = T::from_f32(0.0);
        }
        host
    }

    /// h of f32 factors as forward writes it: high and low halves.
    fn halves<T: Element>(&mut self, m: usize, r: usize) -> Host<T> {
        let wide = self.middle::<f32>(m, r);
        let mut host = self.spec.place(m, split_columns(r), T::from_f32(f32::NAN));
        host.fill(|_, _| 0.0);
        for (row, rank) in (0..m * r).map(|at| (at / r, at % r)) {
            full::set::<T>(&mut host, row, rank, wide.data[wide.index(row, rank)]);
        }
        host
    }

    /// Factors around one, either sign; powers of two where results are to be exact.
    fn gain(&mut self, n: usize) -> Host<f32> {
        let mut host = self.input(1, n, 1.0, 1);
        for col in 0..n {
            let at = host.index(0, col);
            let value = host.data[at];
            host.data[at] = match self.spec.values {
                Values::Random => value + 1.25f32.copysign(value),
                Values::Integers => 2f32.powf(value),
            };
        }
        host
    }

    /// A number no result has, everywhere: what is not written shows, and so does a write outside.
    fn output<T: Element>(&mut self, rows: usize, cols: usize) -> Host<T> {
        let host = self.spec.place(rows, cols, T::from_f32(POISON));
        if self.spec.accumulate { self.values(host, 1.0, 9) } else { host }
    }

    fn gradient<T: Element>(&mut self, rows: usize, cols: usize) -> HostGradient<T> {
        if self.spec.f32_gradients {
            HostGradient::F32(self.output(rows, cols))
        } else {
            HostGradient::Storage(self.output(rows, cols))
        }
    }
}

/// Exact in every type, and far from every result.
pub const POISON: f32 = -31744.0;

/// Sizes at and around the edges of tiles.
pub const EDGES: [usize; 9] = [1, 7, 63, 64, 65, 127, 128, 129, 200];
/// Ranks: none, one, odd, tile and beyond.
pub const RANKS: [usize; 8] = [0, 1, 4, 8, 13, 16, 64, 200];

/// Nine (M, N, K) in which every edge appears once in each place, times every rank; placement, bias, accumulation and
/// the types of the gradients take turns so that every pair of them occurs.
pub fn shape_table() -> Vec<Spec> {
    let mut table = Vec::new();
    for (i, &m) in EDGES.iter().enumerate() {
        for (j, &r) in RANKS.iter().enumerate() {
            let turn = i * RANKS.len() + i + j;
            table.push(Spec {
                placement: Placement::ALL[turn % 4],
                bias: (turn / 4).is_multiple_of(2),
                accumulate: (turn / 8).is_multiple_of(2),
                f32_gradients: !turn.is_multiple_of(3),
                keep_h: !turn.is_multiple_of(5),
                ..Spec::new(m, EDGES[(i * 2 + 1) % 9], EDGES[(i * 5 + 3) % 9], r)
            });
        }
    }
    table
}

/// Every choice of outputs of backward, with and without accumulation, with gradients of either type, at one ragged shape.
pub fn subset_table(m: usize, n: usize, k: usize, r: usize) -> Vec<Spec> {
    let mut table = Vec::new();
    for bits in 1..16u32 {
        for (accumulate, f32_gradients) in [(false, false), (false, true), (true, false), (true, true)] {
            let outputs = std::array::from_fn(|i| bits >> i & 1 == 1);
            let placement = Placement::ALL[bits as usize % 4];
            table.push(Spec { outputs, accumulate, f32_gradients, placement, ..Spec::new(m, n, k, r) });
        }
    }
    table
}

/// Dropout at the edges of tiles: as in [`shape_table`], with p from hardly any to all, passed and in memory.
pub fn dropout_table() -> Vec<Spec> {
    let spec = |(i, &m): (usize, &usize)| {
        let (n, k, r) = (EDGES[(i * 2 + 1) % 9], EDGES[(i * 5 + 3) % 9], RANKS[(i + 1) % 8]);
        let p = [0.1, 0.5, 0.9, 1.0 / 65536.0, 1.0][i % 5];
        let dropout = Some(HostDropout { p, seed: [i as u64 * 0x1234_5678_9abc, 3 + i as u64], in_memory: i % 2 == 0 });
        let (f32_gradients, placement) = (i % 3 != 0, Placement::ALL[i % 4]);
        Spec { placement, accumulate: i % 2 == 1, f32_gradients, keep_h: i % 4 != 1, dropout, ..Spec::new(m, n, k, r) }
    };
    EDGES.iter().enumerate().map(spec).collect()
}

/// Many adapters in a batch, at the edges of tiles.
pub fn routes_table() -> Vec<Spec> {
    let spec = |(i, &m): (usize, &usize)| {
        let (n, k, r) = (EDGES[(i * 2 + 1) % 9], EDGES[(i * 5 + 3) % 9], [24, 64, 200, 130, 16, 8][i % 6]);
        let routes = [Routes::Sorted(3), Routes::Mixed(4), Routes::Tiles(64), Routes::Nobody][i % 4];
        let (f32_gradients, placement) = (i % 3 != 0, Placement::ALL[(i + 1) % 4]);
        let routes = Some(routes);
        Spec { placement, accumulate: i % 2 == 1, f32_gradients, keep_h: i % 4 != 1, routes, ..Spec::new(m, n, k, r) }
    };
    EDGES.iter().enumerate().map(spec).collect()
}

/// DoRA at the edges of tiles, with and without what else backward computes.
pub fn dora_table() -> Vec<Spec> {
    let spec = |(i, &m): (usize, &usize)| {
        let (n, k, r) = (EDGES[(i * 2 + 1) % 9], EDGES[(i * 5 + 3) % 9], RANKS[(i + 2) % 8]);
        let outputs = std::array::from_fn(|at| i == 0 || (i + at) % 4 != 0);
        let (f32_gradients, placement) = (i % 3 != 0, Placement::ALL[i % 4]);
        let spec = Spec { placement, accumulate: i % 2 == 1, f32_gradients, outputs, ..Spec::new(m, n, k, r) };
        Spec { bias: i % 3 != 1, keep_h: i % 4 != 1, dora: true, ..spec }
    };
    let alone = Spec { dora: true, outputs: [false; 4], ..Spec::new(130, 70, 40, 16) };
    let integers = |spec: &Spec| Spec { dora: true, ..spec.integers() };
    let table = EDGES.iter().enumerate().map(spec).chain([alone]).collect::<Vec<_>>();
    table.iter().cloned().chain(table.iter().take(4).map(integers)).collect()
}

/// Small integers at the edges of tiles: every result must be the exact one, rounded once.
pub fn integer_table() -> Vec<Spec> {
    let spec = |(i, &m): (usize, &usize)| {
        let (n, k, r) = (EDGES[(i + 4) % 9], EDGES[(i * 2) % 9], RANKS[i % 8]);
        Spec { placement: Placement::ALL[i % 4], accumulate: i % 2 == 0, ..Spec::new(m, n, k, r) }.integers()
    };
    EDGES.iter().enumerate().map(spec).collect()
}
