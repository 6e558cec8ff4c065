//! The workspace that suffices for a shape, before there are any buffers.

use crate::error::{Error, Result};
use crate::plan::{Device, Family, Options, Plan, split_workspace_up_to, workspace_up_to};
use crate::{Accumulate, Dtype, LoraShape, MAX_ROUTED_RANK, Routing, raw, split_columns};

/// Hands out disjoint stretches of an address space that no one looks into: what a plan needs depends on shapes alone.
struct Addresses(u64);

impl Addresses {
    fn matrix(&mut self, rows: usize, cols: usize) -> Result<raw::Matrix> {
        let too_large = Error::TooLarge { what: "the size of all matrices", got: u64::MAX, limit: i64::MAX as u64 };
        let ptr = self.0;
        // Room for f32 elements.
        let bytes = (rows as u64).checked_mul(cols as u64).and_then(|elements| elements.checked_mul(4));
        let end = bytes.and_then(|bytes| ptr.checked_add(bytes)).and_then(|end| end.checked_next_multiple_of(256));
        self.0 = end.filter(|&end| end <= i64::MAX as u64).ok_or(too_large)?;
        Ok(raw::Matrix::new(ptr, rows, cols))
    }

    /// A row of words of 64 bits.
    fn words(&mut self, words: usize) -> Result<raw::Matrix> {
        self.matrix(2, words).map(|room| raw::Matrix::new(room.ptr, 1, words))
    }
}

/// The options under which to plan for a call whose strides and addresses are not known yet: they decide between families,
/// unless the caller did.
fn possibilities(options: Options) -> Vec<Options> {
    match options.decided() {
        Some(_) => vec![options],
        None => vec![options, options.with_family(Family::Portable)],
    }
}

/// What a call may ask for beside the plain formula: it decides, too.
fn variants(r: usize, at: &mut Addresses, m: usize) -> Result<Vec<raw::Variant>> {
    let dropout = Some(raw::Dropout { p: 0.5, seed: raw::Seed::Value { seed: 0, offset: 0 } });
    let routes = if r == 0 || r > MAX_ROUTED_RANK { None } else { Some(at.words(Routing::words_for(m))?) };
    let plain = raw::Variant::default();
    let mut all = vec![plain, raw::Variant { dropout, ..plain }];
    if routes.is_some() {
        all.extend([raw::Variant { routes, ..plain }, raw::Variant { dropout, routes, ..plain }]);
    }
    Ok(all)
}

/// The types of A and B: the storage type, and f32.
fn factors(r: usize) -> &'static [bool] {
    if r == 0 { &[false] } else { &[false, true] }
}

/// The most that any of the plans needs. A family that the caller decided on may be able to do some of the calls only; the error is
/// that of the plainest when it can do none.
fn most(plans: impl IntoIterator<Item = Result<Plan>>) -> Result<usize> {
    let needs = plans.into_iter().map(|plan| plan.map(|plan| plan.workspace_bytes()));
    needs
        .reduce(|most, need| match (most, need) {
            (Ok(most), Ok(need)) => Ok(most.max(need)),
            (Ok(most), Err(_)) => Ok(most),
            (Err(_), Ok(need)) => Ok(need),
            (Err(first), Err(_)) => Err(first),
        })
        .unwrap_or(Ok(0))
}

/// What suffices for forward, whether h is kept or not.
pub(super) fn forward(dtype: Dtype, shape: LoraShape, device: &Device, options: Options) -> Result<usize> {
    let LoraShape { m, n, k, r } = shape;
    let mut at = Addresses(256);
    let op = raw::Forward {
        dtype,
        x: at.matrix(m, k)?,
        w: at.matrix(n, k)?,
        f32_factors: false,
        a: at.matrix(r, k)?,
        b: at.matrix(n, r)?,
        scale: 1.0,
        bias: None,
        h: None,
        y: at.matrix(m, n)?,
        variant: raw::Variant::default(),
    };
    let variants = variants(r, &mut at, m)?;
    let mut plans = Vec::new();
    for variant in variants {
        for &f32_factors in factors(r) {
            let op = raw::Forward { f32_factors, variant, ..op };
            plans.extend(possibilities(options).into_iter().map(|way| Plan::forward_with(&op, device, way)));
        }
    }
    most(plans)
}

/// What suffices for backward with any choice of outputs. All outputs together need not be the worst: with fewer tiles the
/// tokens are cut into more chunks.
pub(super) fn backward(dtype: Dtype, shape: LoraShape, device: &Device, options: Options) -> Result<usize> {
    let LoraShape { m, n, k, r } = shape;
    let mut at = Addresses(256);
    let (dy, w, a, b) = (at.matrix(m, n)?, at.matrix(n, k)?, at.matrix(r, k)?, at.matrix(n, r)?);
    let (x, h, dx) = (at.matrix(m, k)?, at.matrix(m, r)?, at.matrix(m, k)?);
    let (da, db, dbias, dm) = (at.matrix(r, k)?, at.matrix(n, r)?, at.matrix(1, n)?, at.matrix(1, n)?);
    let gradient = |wanted: bool, matrix| wanted.then_some(raw::Gradient { matrix, f32: true });
    let mut plans = Vec::new();
    let variants = variants(r, &mut at, m)?;
    let (y, vector, pairs) = (at.matrix(m, n)?, at.matrix(1, n)?, at.matrix(m, split_columns(r))?);
    for outputs in 1..32u32 {
        let wants = |bit: u32| outputs >> bit & 1 == 1;
        let op = raw::Backward {
            dtype,
            dy,
            w,
            f32_factors: false,
            a,
            b,
            scale: 1.0,
            x: Some(x),
            h: Some(h),
            dx: wants(0).then_some(dx),
            da: gradient(wants(1), da),
            db: gradient(wants(2), db),
            dbias: gradient(wants(3), dbias),
            dm: wants(4).then_some(raw::MagnitudeGradient { y, bias: None, magnitude: vector, dm }),
            accumulate: Accumulate::default(),
            variant: raw::Variant::default(),
        };
        // The gradient of the magnitude asks for a gain, with which there is neither dropout nor routes.
        let gained = raw::Variant { gain: Some(vector), ..raw::Variant::default() };
        let others = if wants(4) { &[][..] } else { &variants[..] };
        for &variant in others.iter().chain([&gained]) {
            for &f32_factors in factors(r) {
                let h = if f32_factors { Some(pairs) } else { op.h };
                let op = raw::Backward { f32_factors, h, variant, ..op };
                plans.extend(possibilities(options).into_iter().map(|way| Plan::backward_with(&op, device, way)));
            }
        }
    }
    most(plans)
}

/// What suffices for forward and backward of `shape`, and of every shape with fewer tokens or a lower rank.
pub(super) fn up_to(dtype: Dtype, shape: LoraShape, device: &Device, options: Options) -> Result<usize> {
    let exactly = forward(dtype, shape, device, options)?.max(backward(dtype, shape, device, options)?);
    let split = shared_f32(dtype, shape, device, options);
    Ok(exactly.max(split).max(shared(dtype, shape.m, shape.r, device, options)))
}

/// What suffices for projections that share x, of up to `m` tokens and `r` ranks of all together.
pub(super) fn shared(dtype: Dtype, m: usize, r: usize, device: &Device, options: Options) -> usize {
    // Plans refuse what is larger.
    let [m, r] = [m, r].map(|extent| extent.min(crate::MAX_DIMENSION));
    usize::try_from(workspace_up_to(m, r, dtype, device, &options)).unwrap_or(usize::MAX)
}

/// The same of those with f32 factors: N of all together, and ranks in multiples of 8.
pub(super) fn shared_f32(dtype: Dtype, shape: LoraShape, device: &Device, options: Options) -> usize {
    let [m, n, k, r] = [shape.m, shape.n, shape.k, shape.r].map(|extent| extent as u128);
    // Halves of that many are beyond any memory, and could be beyond 64 bits.
    if (2 * m + n + k + 1).saturating_mul(r + 8) > 1 << 56 {
        return usize::MAX;
    }
    usize::try_from(split_workspace_up_to(shape, dtype, device, &options)).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::{Addresses, backward, forward, shared, shared_f32, up_to};
    use crate::error::Error;
    use crate::plan::{Device, Options, Plan, SYNC_BYTES};
    use crate::{Accumulate, Dtype, LoraShape, Routing, raw, split_columns};

    #[test]
    fn a_workspace_holds_the_middle() {
        let device = Device::of_arch("test", 90, 132);
        let shape = LoraShape { m: 1000, n: 300, k: 200, r: 16 };
        assert!(
            forward(Dtype::Bf16, shape, &device, Options::default()).expect("a plan") >= SYNC_BYTES + 1000 * 16 * 2
        );
        assert!(
            backward(Dtype::F16, shape, &device, Options::default()).expect("a plan") >= SYNC_BYTES + 1000 * 16 * 2
        );
    }

    /// Whatever is asked of a shape, wherever its matrices lie.
    #[test]
    fn no_call_needs_more() {
        let device = Device::of_arch("test", 90, 132);
        let gradient =
            |index: u64, rows, cols| raw::Gradient { matrix: raw::Matrix::new(index << 40, rows, cols), f32: false };
        for (m, n, k, r) in [
            (8192, 4096, 4096, 16),
            (8192, 512, 256, 128),
            (20000, 64, 8, 256),
            (512, 4096, 4096, 512),
            (1, 64, 64, 8),
            (4096, 8192, 512, 64),
            (16384, 11008, 2048, 16),
        ] {
            let shape = LoraShape { m, n, k, r };
            let forward_bound = forward(Dtype::F16, shape, &device, Options::default()).expect("a bound");
            let backward_bound = backward(Dtype::F16, shape, &device, Options::default()).expect("a bound");
            let dropout = Some(raw::Dropout { p: 0.1, seed: raw::Seed::Value { seed: 1, offset: 2 } });
            let routes = Some(raw::Matrix::new(1 << 45, 1, Routing::words_for(m)));
            for case in 0..256_u64 {
                // An address that the Hopper kernels take, or one that they do not; and every choice of outputs.
                let at = |index: u64, rows, cols| raw::Matrix::new((index << 40) + case % 2 * 2, rows, cols);
                let (x, w, a, b) = (at(1, m, k), at(2, n, k), at(3, r, k), at(4, n, r));
                let h = (case & 2 != 0).then_some(at(5, m, r));
                let variant = raw::Variant {
                    dropout: dropout.filter(|_| case & 64 != 0),
                    routes: routes.filter(|_| case & 128 != 0),
                    gain: None,
                };
                let y = at(6, m, n);
                let f32_factors = false;
                let op =
                    raw::Forward { dtype: Dtype::F16, x, w, f32_factors, a, b, scale: 1.0, bias: None, h, y, variant };
                let plan = Plan::forward(&op, &device).expect("a plan");
                assert!(plan.workspace_bytes() <= forward_bound, "{}", plan.explain());
                // f32 factors, and h in their halves.
                let wide = |index: u64, rows, cols| raw::Matrix::new(index << 40, rows, cols);
                let (wide_a, wide_b, pairs) = (wide(3, r, k), wide(4, n, r), at(5, m, split_columns(r)));
                let op = raw::Forward { f32_factors: true, a: wide_a, b: wide_b, h: op.h.map(|_| pairs), ..op };
                let plan = Plan::forward(&op, &device).expect("a plan");
                assert!(plan.workspace_bytes() <= forward_bound, "{}", plan.explain());
                if case / 2 % 16 == 0 {
                    continue;
                }
                let wants = |bit: u32| ((case / 2) >> bit) & 1 == 1;
                let op = raw::Backward {
                    dtype: Dtype::F16,
                    dy: at(7, m, n),
                    w,
                    f32_factors,
                    a,
                    b,
                    scale: 1.0,
                    x: Some(x),
                    h: Some(at(5, m, r)),
                    dx: wants(0).then_some(at(8, m, k)),
                    da: wants(1).then_some(gradient(9, r, k)),
                    db: wants(2).then_some(gradient(10, n, r)),
                    dbias: wants(3).then_some(gradient(11, 1, n)),
                    dm: None,
                    accumulate: Accumulate { da: case & 32 != 0, ..Accumulate::default() },
                    variant,
                };
                let plan = Plan::backward(&op, &device).expect("a plan");
                assert!(plan.workspace_bytes() <= backward_bound, "{}", plan.explain());
                let split = raw::Backward { f32_factors: true, a: wide_a, b: wide_b, h: Some(pairs), ..op };
                let plan = Plan::backward(&split, &device).expect("a plan");
                assert!(plan.workspace_bytes() <= backward_bound, "{}", plan.explain());
                // Vectors of f32 lie at multiples of their element.
                let vector = |index: u64| raw::Matrix::new((index << 40) + case % 2 * 4, 1, n);
                let gain = Some(vector(12));
                let (y, magnitude, dm) = (at(6, m, n), vector(13), vector(14));
                let dm = Some(raw::MagnitudeGradient { y, bias: None, magnitude, dm });
                for dm in [None, dm] {
                    let op = raw::Backward { dm, variant: raw::Variant { gain, ..raw::Variant::default() }, ..op };
                    let plan = Plan::backward(&op, &device).expect("a plan");
                    assert!(plan.workspace_bytes() <= backward_bound, "{}", plan.explain());
                }
            }
        }
    }

    /// More tokens may need less: they are cut into fewer chunks.
    #[test]
    fn what_is_reserved_holds_every_smaller_call() {
        let options = Options::default();
        let mut grew = 0;
        for (arch, sms) in [(80, 108), (90, 132), (75, 40)] {
            let device = Device::of_arch("test", arch, sms);
            for (n, k, most_r) in [(4096, 4096, 16), (256, 512, 128), (64, 64, 8), (11008, 4096, 256)] {
                for most in [1, 700, 1100, 3600, 5000, 8200] {
                    let shape = LoraShape { m: most, n, k, r: most_r };
                    let reserved = up_to(Dtype::F16, shape, &device, options).expect("a bound");
                    let exactly = backward(Dtype::F16, shape, &device, options).expect("a bound");
                    for m in [most, most.div_ceil(2), most / 512 * 512, most.saturating_sub(100), 1024, 1] {
                        for r in [most_r, most_r - 1, most_r / 2, 1, 0] {
                            let smaller = LoraShape { m: m.clamp(1, most), r, ..shape };
                            let forward = forward(Dtype::F16, smaller, &device, options).expect("a bound");
                            let backward = backward(Dtype::F16, smaller, &device, options).expect("a bound");
                            assert!(forward.max(backward) <= reserved, "{smaller:?} needs more than {shape:?}");
                            grew += usize::from(backward > exactly);
                        }
                    }
                }
            }
        }
        assert!(grew > 0, "no smaller call needs more than a larger one: the bound is needless");
    }

    /// Projections that share x, with every choice of outputs.
    #[test]
    fn what_is_reserved_holds_projections_that_share_x() {
        let layers: [&[(usize, usize)]; 4] = [
            &[(4096, 16), (1024, 16), (1024, 16)],
            &[(512, 256), (72, 0)],
            &[(64, 0); 4],
            &[(130, 9), (24, 200), (8, 1)],
        ];
        for (arch, sms) in [(80, 108), (90, 132), (75, 40)] {
            let device = Device::of_arch("test", arch, sms);
            for (parts, m) in layers.iter().flat_map(|&parts| [1, 700, 1100, 5000, 20_000].map(|m| (parts, m))) {
                let (k, r) = (512, parts.iter().map(|part| part.1).sum());
                let (n, padded) =
                    (parts.iter().map(|part| part.0).sum(), parts.iter().map(|part| part.1.next_multiple_of(8)).sum());
                let in_storage = shared(Dtype::F16, m, r, &device, Options::default());
                let in_f32 = shared_f32(Dtype::F16, LoraShape { m, n, k, r: padded }, &device, Options::default());
                for (outputs, f32_factors) in (0..32_u32).map(|case| (case / 2, case % 2 == 1)) {
                    let reserved = if f32_factors { in_f32 } else { in_storage };
                    let columns_of = |r| if f32_factors { split_columns(r) } else { r };
                    let mut at = Addresses(256);
                    let mut matrix = |rows, cols| at.matrix(rows, cols).expect("room");
                    let columns = parts.iter().map(|part| columns_of(part.1)).sum();
                    let (x, a, h) = (matrix(m, k), matrix(r, k), matrix(m, columns));
                    let wants = |bit: u32| outputs >> bit & 1 == 1;
                    let gradient = |wanted: bool, matrix| wanted.then_some(raw::Gradient { matrix, f32: true });
                    let own = |&(n, r): &(usize, usize)| {
                        let [w, b, y, db, dbias] =
                            [(n, k), (n, r), (m, n), (n, r), (1, n)].map(|(rows, cols)| matrix(rows, cols));
                        let forward = raw::ForwardProjection { w, b, scale: 1.0, bias: None, gain: None, y };
                        let (db, dbias) = (gradient(wants(2), db), gradient(wants(3), dbias));
                        let backward =
                            raw::BackwardProjection { dy: y, w, b, scale: 1.0, db, dbias, dm: None, gain: None };
                        (forward, backward)
                    };
                    let (forwards, backwards): (Vec<_>, Vec<_>) = parts.iter().map(own).unzip();
                    let (dtype, dropout, routes) = (Dtype::F16, None, None);
                    let projections = raw::Projections::new(&forwards).expect("one to four");
                    let op = raw::ForwardShared { dtype, x, f32_factors, a, h: None, projections, dropout, routes };
                    let plan = Plan::forward_shared(&op, &device).expect("a plan");
                    assert!(plan.workspace_bytes() <= reserved, "{}", plan.explain());
                    let projections = raw::Projections::new(&backwards).expect("one to four");
                    let (dx, da) = (wants(0).then(|| matrix(m, k)), gradient(wants(1), matrix(r, k)));
                    let (x, h, accumulate) = (Some(x), Some(h), Accumulate::default());
                    let op = raw::BackwardShared {
                        dtype,
                        f32_factors,
                        a,
                        x,
                        h,
                        dx,
                        da,
                        projections,
                        accumulate,
                        dropout,
                        routes,
                    };
                    if outputs != 0 {
                        let plan = Plan::backward_shared(&op, &device).expect("a plan");
                        assert!(plan.workspace_bytes() <= reserved, "{}", plan.explain());
                    }
                }
            }
        }
    }

    #[test]
    fn a_shape_no_memory_holds_is_refused() {
        let device = Device::of_arch("test", 90, 132);
        for (m, n) in [(1 << 31, 1), (1 << 30, 1 << 30), (usize::MAX, 2), (1, 1 << 40)] {
            let shape = LoraShape { m, n, k: 1 << 30, r: 1 };
            assert!(
                matches!(forward(Dtype::F16, shape, &device, Options::default()), Err(Error::TooLarge { .. })),
                "{shape:?}"
            );
            assert!(
                matches!(backward(Dtype::F16, shape, &device, Options::default()), Err(Error::TooLarge { .. })),
                "{shape:?}"
            );
        }
        let shape = LoraShape { m: 0, n: 1, k: 1, r: 1 };
        assert!(matches!(forward(Dtype::F16, shape, &device, Options::default()), Err(Error::ZeroDimension { .. })));
        let shape = LoraShape { m: 1, n: 1, k: 1, r: 1 };
        assert!(matches!(backward(Dtype::F32, shape, &device, Options::default()), Err(Error::Dtype { .. })));
    }
}
