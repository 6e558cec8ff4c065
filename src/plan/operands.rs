//! Which matrices a call reads and writes, the same for every family.

use crate::params::{LoraMagnitude, LoraMatrix};
use crate::raw;

/// What a call of backward computes.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    pub dh: bool,
    pub dx: bool,
    pub da: bool,
    pub own: raw::Projections<Own>,
}

/// What it computes of one projection alone.
#[derive(Clone, Copy)]
pub(super) struct Own {
    pub db: bool,
    /// dbias or dm: they ride on the db tiles of the first block of ranks, which therefore exist even without db.
    pub sums: bool,
    pub dm: bool,
}

impl Own {
    /// Blocks of ranks with tiles of db, of `r_blocks`.
    pub(super) fn blocks(self, r_blocks: u64) -> u64 {
        if self.db { r_blocks } else { u64::from(self.sums) }
    }
}

impl Wanted {
    pub(super) fn of(op: &raw::BackwardShared) -> Wanted {
        let has_adapter = op.a.rows != 0;
        let (dx, da) = (op.dx.is_some(), op.da.is_some() && has_adapter);
        let own = op.projections.map(|of| Own {
            db: of.db.is_some() && of.b.cols != 0,
            sums: of.dbias.is_some() || of.dm.is_some(),
            dm: of.dm.is_some(),
        });
        Wanted { dh: has_adapter && (dx || da), dx, da, own }
    }

    pub(super) fn any_dm(&self) -> bool {
        self.own.iter().any(|own| own.dm)
    }

    pub(super) fn any_db(&self) -> bool {
        self.own.iter().any(|own| own.db)
    }
}

/// Matrices with their names.
pub(super) type Named = Vec<(&'static str, Option<raw::Matrix>)>;

/// One matrix of each projection.
fn each<P>(all: &[P], name: &'static str, matrix: impl Fn(&P) -> Option<raw::Matrix>) -> Named {
    all.iter().enumerate().map(|(at, of)| (raw::named(name, at, all.len()), matrix(of))).collect()
}

/// What forward reads in chunks of 16 bytes; h too, which it writes before. Factors that are split are not, nor is the h of their halves.
pub(super) fn read_by_forward(op: &raw::ForwardShared) -> Named {
    let all = &op.projections;
    let whole = !op.is_split();
    let (w, b) = (each(all, "w", |of| Some(of.w)), each(all, "b", |of| Some(of.b).filter(|_| whole)));
    let (a, h) = (Some(op.a).filter(|_| whole), op.h.filter(|_| whole));
    [("x", Some(op.x))].into_iter().chain(w).chain([("a", a)]).chain(b).chain([("h", h)]).collect()
}

/// What forward writes beside h.
pub(super) fn written_by_forward(op: &raw::ForwardShared) -> Named {
    each(&op.projections, "y", |of| Some(of.y))
}

/// What backward reads for the outputs that are asked for.
pub(super) fn read_by_backward(op: &raw::BackwardShared) -> Named {
    let wanted = Wanted::of(op);
    let all = &op.projections;
    let dy = each(all, "dy", |of| Some(of.dy));
    let w = each(all, "w", |of| op.dx.map(|_| of.w));
    let whole = !op.is_split();
    let b = each(all, "b", |of| Some(of.b).filter(|_| wanted.dh && whole));
    let (a, x, h) =
        (op.dx.map(|_| op.a).filter(|_| whole), op.x.filter(|_| wanted.da), op.h.filter(|_| wanted.any_db()));
    dy.into_iter().chain(w).chain([("a", a)]).chain(b).chain([("x", x), ("h", h)]).collect()
}

/// The y that DoRA's gradients of the magnitude are computed from.
pub(super) fn results_of_dora(op: &raw::BackwardShared) -> Named {
    each(&op.projections, "y", |of| of.dm.map(|dm| dm.y))
}

/// DoRA's gains of a call.
pub(super) fn gains<P>(all: &[P], gain: impl Fn(&P) -> Option<raw::Matrix>) -> Named {
    each(all, "gain", gain)
}

/// The columns of h or dh that are the ranks of one projection.
pub(super) fn ranks_of(middle: raw::Matrix, part: &super::Part) -> raw::Matrix {
    raw::Matrix { ptr: middle.ptr + 2 * part.first_rank as u64, cols: part.r, ..middle }
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
