//! Raw operations over invented addresses, for what is judged without memory: argument rules and plans.
#![allow(clippy::panic)] // for names that a test misspells

use fused_lora::{Accumulate, Dtype, LoraShape, raw};

/// Hands out disjoint ranges of addresses; nothing is behind them.
pub struct Addresses(u64);

impl Addresses {
    pub fn new() -> Self {
        Self(1 << 20)
    }

    /// A contiguous matrix of elements of `bytes` bytes. Past the end of the address space, addresses wrap: the checks
    /// must notice.
    pub fn matrix(&mut self, rows: usize, cols: usize, bytes: usize) -> raw::Matrix {
        let matrix = raw::Matrix::new(self.0, rows, cols);
        let size = (rows as u64).wrapping_mul(cols as u64).wrapping_mul(bytes as u64);
        self.0 = self.0.wrapping_add(size).wrapping_add(511) & !255;
        matrix
    }
}

/// Everything present but h, which goes into the workspace.
pub fn forward(dtype: Dtype, LoraShape { m, n, k, r }: LoraShape) -> raw::Forward {
    let mut at = Addresses::new();
    let mut matrix = |rows, cols| at.matrix(rows, cols, dtype.size());
    raw::Forward {
        dtype,
        x: matrix(m, k),
        w: matrix(n, k),
        f32_factors: false,
        a: matrix(r, k),
        b: matrix(n, r),
        scale: 2.0,
        bias: Some(matrix(1, n)),
        h: None,
        y: matrix(m, n),
        variant: raw::Variant::default(),
    }
}

/// Every input and every output, the gradients of the adapter in f32.
pub fn backward(dtype: Dtype, LoraShape { m, n, k, r }: LoraShape) -> raw::Backward {
    let mut at = Addresses::new();
    let mut matrix = |rows, cols| at.matrix(rows, cols, dtype.size());
    let mut op = raw::Backward {
        dtype,
        dy: matrix(m, n),
        w: matrix(n, k),
        f32_factors: false,
        a: matrix(r, k),
        b: matrix(n, r),
        scale: 2.0,
        x: Some(matrix(m, k)),
        h: Some(matrix(m, r)),
        dx: Some(matrix(m, k)),
        da: None,
        db: None,
        dbias: None,
        dm: None,
        accumulate: Accumulate::default(),
        variant: raw::Variant::default(),
    };
    let mut gradient = |rows, cols| Some(raw::Gradient { matrix: at.matrix(rows, cols, 4), f32: true });
    op.da = gradient(r, k);
    op.db = gradient(n, r);
    op.dbias = gradient(1, n);
    op
}

/// The same with f32 factors, and h as halves.
pub fn with_f32_factors(forward: &raw::Forward, backward: &raw::Backward) -> (raw::Forward, raw::Backward) {
    let mut at = Addresses(1 << 46);
    let (LoraShape { m, n, k, r }, columns) =
        (forward.check().expect("a shape"), fused_lora::split_columns(forward.a.rows));
    let (a, b) = (at.matrix(r, k, 4), at.matrix(n, r, 4));
    let h = Some(at.matrix(m, if r == 0 { 0 } else { columns }, 2));
    (
        raw::Forward { f32_factors: true, a, b, h: forward.h.and(h), ..*forward },
        raw::Backward { f32_factors: true, a, b, h: backward.h.and(h), ..*backward },
    )
}

/// Of projections with these N and R everything present but h, which goes into the workspace.
pub fn forward_shared(dtype: Dtype, m: usize, k: usize, parts: &[(usize, usize)]) -> raw::ForwardShared {
    let mut at = Addresses::new();
    let mut matrix = |rows, cols| at.matrix(rows, cols, dtype.size());
    let r = parts.iter().map(|part| part.1).sum();
    let (x, a) = (matrix(m, k), matrix(r, k));
    let projection = |&(n, r): &(usize, usize)| raw::ForwardProjection {
        w: matrix(n, k),
        b: matrix(n, r),
        scale: 2.0,
        bias: Some(matrix(1, n)),
        gain: None,
        y: matrix(m, n),
    };
    let projections: Vec<_> = parts.iter().map(projection).collect();
    let projections = raw::Projections::new(&projections).expect("one to four");
    raw::ForwardShared { dtype, x, f32_factors: false, a, h: None, projections, dropout: None, routes: None }
}

/// Of projections with these N and R every input and every output, the gradients of the adapters in f32.
pub fn backward_shared(dtype: Dtype, m: usize, k: usize, parts: &[(usize, usize)]) -> raw::BackwardShared {
    let mut at = Addresses::new();
    let bytes = dtype.size();
    let r = parts.iter().map(|part| part.1).sum();
    let a = at.matrix(r, k, bytes);
    let [x, h, dx] = [(m, k), (m, r), (m, k)].map(|(rows, cols)| Some(at.matrix(rows, cols, bytes)));
    let gradient = |at: &mut Addresses, rows, cols| Some(raw::Gradient { matrix: at.matrix(rows, cols, 4), f32: true });
    let da = gradient(&mut at, r, k);
    let projection = |&(n, r): &(usize, usize)| raw::BackwardProjection {
        dy: at.matrix(m, n, bytes),
        w: at.matrix(n, k, bytes),
        b: at.matrix(n, r, bytes),
        scale: 2.0,
        db: gradient(&mut at, n, r),
        dbias: gradient(&mut at, 1, n),
        dm: None,
        gain: None,
    };
    let projections: Vec<_> = parts.iter().map(projection).collect();
    let projections = raw::Projections::new(&projections).expect("one to four");
    let accumulate = Accumulate::default();
    raw::BackwardShared {
        dtype,
        f32_factors: false,
        a,
        x,
        h,
        dx,
        da,
        projections,
        accumulate,
        dropout: None,
        routes: None,
    }
}

/// With W elsewhere, and factors in f32 or the storage type.
pub fn merge(dtype: Dtype, LoraShape { n, k, r, .. }: LoraShape, f32_factors: bool) -> raw::Merge {
    let mut at = Addresses::new();
    let factor = if f32_factors { 4 } else { dtype.size() };
    raw::Merge {
        dtype,
        w: Some(at.matrix(n, k, dtype.size())),
        f32_factors,
        a: at.matrix(r, k, factor),
        b: at.matrix(n, r, factor),
        scale: 2.0,
        gain: Some(at.matrix(1, n, 4)),
        merged: at.matrix(n, k, dtype.size()),
    }
}

/// Factors in f32 or the storage type.
pub fn round(dtype: Dtype, LoraShape { n, k, r, .. }: LoraShape, f32_factors: bool) -> raw::Round {
    let mut at = Addresses::new();
    let factor = if f32_factors { 4 } else { dtype.size() };
    raw::Round {
        dtype,
        f32_factors,
        f32_rounded: false,
        a: at.matrix(r, k, factor),
        b: at.matrix(n, r, factor),
        scale: 2.0,
        divisor: Some(at.matrix(1, n, 4)),
        rounded_a: at.matrix(r, k, dtype.size()),
        rounded_b: at.matrix(n, r, dtype.size()),
    }
}

/// Factors in f32 or the storage type; both outputs.
pub fn gain(dtype: Dtype, LoraShape { n, k, r, .. }: LoraShape, f32_factors: bool) -> raw::Gain {
    let mut at = Addresses::new();
    let factor = if f32_factors { 4 } else { dtype.size() };
    raw::Gain {
        dtype,
        w: at.matrix(n, k, dtype.size()),
        f32_factors,
        a: at.matrix(r, k, factor),
        b: at.matrix(n, r, factor),
        scale: 2.0,
        magnitude: Some(at.matrix(1, n, 4)),
        earlier: Some(at.matrix(1, n, 4)),
        norm: Some(at.matrix(1, n, 4)),
        gain: Some(at.matrix(1, n, 4)),
    }
}

/// The argument of a name. Panics for one that is absent.
pub fn gain_argument<'a>(op: &'a mut raw::Gain, name: &str) -> &'a mut raw::Matrix {
    match name {
        "w" => &mut op.w,
        "a" => &mut op.a,
        "b" => &mut op.b,
        "magnitude" => op.magnitude.as_mut().expect("a magnitude"),
        "earlier" => op.earlier.as_mut().expect("an earlier gain"),
        "norm" => op.norm.as_mut().expect("norms"),
        "gain" => op.gain.as_mut().expect("a gain"),
        _ => panic!("gain has no argument {name}"),
    }
}

/// The argument of a name. Panics for one that is absent.
pub fn merge_argument<'a>(op: &'a mut raw::Merge, name: &str) -> &'a mut raw::Matrix {
    match name {
        "w" => op.w.as_mut().expect("w"),
        "a" => &mut op.a,
        "b" => &mut op.b,
        "gain" => op.gain.as_mut().expect("a gain"),
        "merged" => &mut op.merged,
        _ => panic!("merge has no argument {name}"),
    }
}

/// The argument of a name. Panics for one that is absent.
pub fn round_argument<'a>(op: &'a mut raw::Round, name: &str) -> &'a mut raw::Matrix {
    match name {
        "a" => &mut op.a,
        "b" => &mut op.b,
        "divisor" => op.divisor.as_mut().expect("a divisor"),
        "rounded_a" => &mut op.rounded_a,
        "rounded_b" => &mut op.rounded_b,
        _ => panic!("round has no argument {name}"),
    }
}

/// The argument of a name. Panics for one that is absent.
pub fn forward_argument<'a>(op: &'a mut raw::Forward, name: &str) -> &'a mut raw::Matrix {
    match name {
        "x" => &mut op.x,
        "w" => &mut op.w,
        "a" => &mut op.a,
        "b" => &mut op.b,
        "y" => &mut op.y,
        "h" => op.h.as_mut().expect("h"),
        "bias" => op.bias.as_mut().expect("bias"),
        _ => panic!("forward has no argument {name}"),
    }
}

/// The argument of a name. Panics for one that is absent.
pub fn backward_argument<'a>(op: &'a mut raw::Backward, name: &str) -> &'a mut raw::Matrix {
    match name {
        "dy" => &mut op.dy,
        "w" => &mut op.w,
        "a" => &mut op.a,
        "b" => &mut op.b,
        "x" => op.x.as_mut().expect("x"),
        "h" => op.h.as_mut().expect("h"),
        "dx" => op.dx.as_mut().expect("dx"),
        "da" => &mut op.da.as_mut().expect("da").matrix,
        "db" => &mut op.db.as_mut().expect("db").matrix,
        "dbias" => &mut op.dbias.as_mut().expect("dbias").matrix,
        "y" => &mut op.dm.as_mut().expect("dm").y,
        "bias" => op.dm.as_mut().and_then(|dm| dm.bias.as_mut()).expect("bias"),
        "magnitude" => &mut op.dm.as_mut().expect("dm").magnitude,
        "dm" => &mut op.dm.as_mut().expect("dm").dm,
        _ => panic!("backward has no argument {name}"),
    }
}
