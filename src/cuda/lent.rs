//! A single layer's operation as one of projections that share x, without giving its buffers away.

use cudarc::driver::{DevicePtr, DevicePtrMut};

use super::{Backward, BackwardProjection, BackwardShared, Forward, ForwardProjection, ForwardShared};
use crate::{Gradient, MagnitudeGradient, MatrixMut, Variant};

type Lent<'b, T> = MatrixMut<'b, dyn DevicePtrMut<T> + 'b>;

fn matrix<'b, T>(matrix: &'b mut MatrixMut<'_, dyn DevicePtrMut<T> + '_>) -> Lent<'b, T> {
    let MatrixMut { ref mut data, offset, rows, cols, row_stride } = *matrix;
    MatrixMut { data: &mut **data, offset, rows, cols, row_stride }
}

fn gradient<'b, T>(
    gradient: &'b mut Gradient<'_, dyn DevicePtrMut<T> + '_, dyn DevicePtrMut<f32> + '_>,
) -> Gradient<'b, dyn DevicePtrMut<T> + 'b, dyn DevicePtrMut<f32> + 'b> {
    match gradient {
        Gradient::Storage(storage) => Gradient::Storage(matrix(storage)),
        Gradient::F32(f32) => Gradient::F32(matrix(f32)),
    }
}

type LentMagnitude<'b, T> =
    MagnitudeGradient<'b, dyn DevicePtr<T> + 'b, dyn DevicePtr<f32> + 'b, dyn DevicePtrMut<f32> + 'b>;

fn magnitude<'b, T>(
    from: &'b mut MagnitudeGradient<'_, dyn DevicePtr<T> + '_, dyn DevicePtr<f32> + '_, dyn DevicePtrMut<f32> + '_>,
) -> LentMagnitude<'b, T> {
    let MagnitudeGradient { y, bias, magnitude, ref mut dm } = *from;
    MagnitudeGradient { y, bias, magnitude, dm: matrix(dm) }
}

pub(super) fn forward<'b, T, A>(op: &'b mut Forward<'_, T, A>) -> ForwardShared<'b, T, A> {
    let Forward { x, w, a, b, scale, bias, h, y, variant } = op;
    let Variant { dropout, routes, gain } = *variant;
    let projection = ForwardProjection { w: *w, b: *b, scale: *scale, bias: *bias, gain, y: matrix(y) };
    ForwardShared { x: *x, a: *a, h: h.as_mut().map(matrix), projections: vec![projection], dropout, routes }
}

pub(super) fn backward<'b, T, A>(op: &'b mut Backward<'_, T, A>) -> BackwardShared<'b, T, A> {
    let Backward { dy, w, a, b, scale, x, h, dx, da, db, dbias, dm, accumulate, variant } = op;
    let Variant { dropout, routes, gain } = *variant;
    let (db, dbias) = (db.as_mut().map(gradient), dbias.as_mut().map(gradient));
    BackwardShared {
        a: *a,
        x: *x,
        h: *h,
        dx: dx.as_mut().map(matrix),
        da: da.as_mut().map(gradient),
        projections: vec![BackwardProjection {
            dy: *dy,
            w: *w,
            b: *b,
            scale: *scale,
            db,
            dbias,
            dm: dm.as_mut().map(magnitude),
            gain,
        }],
        accumulate: *accumulate,
        dropout,
        routes,
    }
}
