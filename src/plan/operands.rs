//! Which matrices a call reads and writes, the same for every family.

use crate::params::{LoraMagnitude, LoraMatrix};
use crate::raw;

/// What a call of backward computes.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    pub dh: bool,
    pub dx: bool,
    pub da: bool,
    pub db: bool,
    pub dbias: bool,
    pub dm: bool,
}

impl Wanted {
    pub(super) fn of(op: &raw::Backward) -> Wanted {
        let has_adapter = op.a.rows != 0;
        let (dx, da, db) = (op.dx.is_some(), op.da.is_some() && has_adapter, op.db.is_some() && has_adapter);
        Wanted { dh: has_adapter && (dx || da), dx, da, db, dbias: op.dbias.is_some(), dm: op.dm.is_some() }
    }
}

/// What forward reads; h too, which it writes before.
pub(super) fn read_by_forward(op: &raw::Forward) -> [(&'static str, Option<raw::Matrix>); 5] {
    let [x, w, a, b] = [op.x, op.w, op.a, op.b].map(Some);
    [("x", x), ("w", w), ("a", a), ("b", b), ("h", op.h)]
}

/// What backward reads for the outputs that are asked for.
pub(super) fn read_by_backward(op: &raw::Backward) -> [(&'static str, Option<raw::Matrix>); 6] {
    let wanted = Wanted::of(op);
    [
        ("dy", Some(op.dy)),
        ("w", op.dx.map(|_| op.w)),
        ("a", op.dx.map(|_| op.a)),
        ("b", Some(op.b).filter(|_| wanted.dh)),
        ("x", op.x.filter(|_| wanted.da)),
        ("h", op.h.filter(|_| wanted.db)),
    ]
}

/// A matrix as kernels take it.
pub(super) fn matrix(matrix: raw::Matrix) -> LoraMatrix {
    LoraMatrix { ptr: matrix.ptr, row_stride: matrix.row_stride as i64 }
}

/// One that a call may not have: absent as null.
pub(super) fn optional(argument: Option<raw::Matrix>) -> LoraMatrix {
    argument.map(matrix).unwrap_or_default()
}

/// A gradient that a call may have and yet not want, where there is no adapter.
pub(super) fn gradient(wanted: bool, argument: Option<raw::Gradient>) -> LoraMatrix {
    optional(argument.filter(|_| wanted).map(|gradient| gradient.matrix))
}

/// The gradient of DoRA's magnitude that a call may not want.
pub(super) fn magnitude(argument: Option<raw::MagnitudeGradient>) -> LoraMagnitude {
    argument.map_or(LoraMagnitude::default(), |argument| LoraMagnitude {
        y: matrix(argument.y),
        bias: argument.bias.map_or(0, |bias| bias.ptr),
        magnitude: argument.magnitude.ptr,
        dm: argument.dm.ptr,
    })
}
