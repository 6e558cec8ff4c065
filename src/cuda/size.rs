//! The workspace that suffices for a shape, before there are any buffers.

use crate::error::{Error, Result};
use crate::plan::{Device, Options, Plan};
use crate::{Accumulate, Dtype, LoraShape, raw};

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
}

/// What suffices for forward, whether h is kept or not.
pub(super) fn forward(dtype: Dtype, shape: LoraShape, device: &Device, options: Options) -> Result<usize> {
    let LoraShape { m, n, k, r } = shape;
    let mut at = Addresses(256);
    let op = raw::Forward {
        dtype,
        x: at.matrix(m, k)?,
        w: at.matrix(n, k)?,
        a: at.matrix(r, k)?,
        b: at.matrix(n, r)?,
        scale: 1.0,
        bias: None,
        h: None,
        y: at.matrix(m, n)?,
    };
    Ok(Plan::forward_with(&op, device, options)?.workspace_bytes())
}

/// What suffices for backward with any choice of outputs. All outputs together need not be the worst: with fewer tiles the
/// tokens are cut into more chunks.
pub(super) fn backward(dtype: Dtype, shape: LoraShape, device: &Device, options: Options) -> Result<usize> {
    let LoraShape { m, n, k, r } = shape;
    let mut at = Addresses(256);
    let (dy, w, a, b) = (at.matrix(m, n)?, at.matrix(n, k)?, at.matrix(r, k)?, at.matrix(n, r)?);
    let (x, h, dx) = (at.matrix(m, k)?, at.matrix(m, r)?, at.matrix(m, k)?);
    let (da, db, dbias) = (at.matrix(r, k)?, at.matrix(n, r)?, at.matrix(1, n)?);
    let gradient = |wanted: bool, matrix| wanted.then_some(raw::Gradient { matrix, f32: true });
    let mut most = 0;
    for outputs in 1..16u32 {
        let wants = |bit: u32| outputs >> bit & 1 == 1;
        let op = raw::Backward {
            dtype,
            dy,
            w,
            a,
            b,
            scale: 1.0,
            x: Some(x),
            h: Some(h),
            dx: wants(0).then_some(dx),
            da: gradient(wants(1), da),
            db: gradient(wants(2), db),
            dbias: gradient(wants(3), dbias),
            accumulate: Accumulate::default(),
        };
        most = most.max(Plan::backward_with(&op, device, options)?.workspace_bytes());
    }
    Ok(most)
}

#[cfg(test)]
mod tests {
    use super::{backward, forward};
    use crate::error::Error;
    use crate::plan::{Device, Options, SYNC_BYTES};
    use crate::{Dtype, LoraShape};

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
