//! What a launch has in the workspace, after the synchronisation words.

use super::split;
use super::{Launch, SYNC_BYTES, WORKSPACE_ALIGN};
use crate::params::*;
use crate::{Dtype, raw};

/// Byte offsets into the workspace of what the call did not bring along.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Scratch {
    h: Option<u64>,
    pub partials: Option<u64>,
    pub split: Option<split::Places>,
    /// Bytes of all.
    pub end: u64,
}

impl Scratch {
    /// Nothing but the synchronisation words.
    pub(super) fn new() -> Scratch {
        Scratch { end: SYNC_BYTES as u64, ..Scratch::default() }
    }

    /// h or dh, whose address only a launch knows. Its rows start on 16 bytes, so that the fast loads apply.
    pub(super) fn reserve_middle(&mut self, m: usize, r: usize, dtype: Dtype) -> raw::Matrix {
        let row_stride = r.next_multiple_of(8);
        self.h = Some(self.reserve((m * row_stride * dtype.size()) as u64));
        raw::Matrix { ptr: 0, rows: m, cols: r, row_stride }
    }

    pub(super) fn reserve(&mut self, bytes: u64) -> u64 {
        let offset = self.end;
        self.end = (offset + bytes).next_multiple_of(WORKSPACE_ALIGN);
        offset
    }

    /// Tells a launch where it all lies.
    pub(super) fn place(&self, launch: &mut Launch, workspace: u64) {
        let place = |ptr: &mut u64, offset: Option<u64>| *ptr += offset.map_or(0, |offset| workspace + offset);
        let split = self.split.unwrap_or_default();
        let maps: Vec<(u32, Option<u64>)> = match &mut launch.params {
            Params::Forward(params) => {
                params.sync = workspace;
                place(&mut params.h.ptr, self.h);
                split.fill(workspace, &mut params.split);
                let factors = params.projections.iter_mut().map(|of| (&mut of.b, of.n));
                read_halves(&params.split, &mut params.a, factors);
                Vec::new()
            }
            Params::Backward(params) => {
                params.sync = workspace;
                place(&mut params.dh.ptr, self.h);
                place(&mut params.partials, self.partials);
                split.fill(workspace, &mut params.split);
                let factors = params.projections.iter_mut().map(|of| (&mut of.b, of.n));
                read_halves(&params.split, &mut params.a, factors);
                Vec::new()
            }
            Params::Sm90Forward(params) => {
                params.sync = workspace;
                place(&mut params.h.ptr, self.h);
                split.fill(workspace, &mut params.split);
                let first = |at: usize| LORA_SM90_FORWARD_FIRST + at as u32 * LORA_SM90_FORWARD_EACH;
                let own = (0..raw::MAX_PROJECTIONS).flat_map(|at| {
                    [(first(at) + LORA_SM90_FORWARD_H, self.h), (first(at) + LORA_SM90_FORWARD_B, split.b)]
                });
                own.chain([(LORA_SM90_FORWARD_A, split.a)]).collect()
            }
            Params::Sm90Backward(params) => {
                params.sync = workspace;
                place(&mut params.dh.ptr, self.h);
                place(&mut params.partials, self.partials);
                split.fill(workspace, &mut params.split);
                let first = |at: usize| LORA_SM90_BACKWARD_FIRST + at as u32 * LORA_SM90_BACKWARD_EACH;
                let b = (0..raw::MAX_PROJECTIONS).map(|at| (first(at) + LORA_SM90_BACKWARD_B, split.b));
                let of_all = [
                    (LORA_SM90_BACKWARD_DH, self.h),
                    (LORA_SM90_BACKWARD_DH_TOKENS, split.pairs.or(self.h)),
                    (LORA_SM90_BACKWARD_A, split.a),
                ];
                b.chain(of_all).collect()
            }
            // Launches of these need no workspace, and no plan.
            Params::Merge(_) | Params::Round(_) | Params::Gain(_) => Vec::new(),
        };
        for (index, offset) in maps {
            if let Some(Some(map)) = launch.maps.get_mut(index as usize) {
                place(&mut map.address, offset);
            }
        }
    }
}

/// Makes the products of the portable family read halves, where there are any; each B with its number of rows.
fn read_halves<'a>(split: &LoraSplit, a: &mut LoraMatrix, factors: impl Iterator<Item = (&'a mut LoraMatrix, u32)>) {
    if split.r == 0 {
        return;
    }
    *a = LoraMatrix { ptr: split.split_a, row_stride: split.split_a_stride.into() };
    let mut ptr = split.split_b;
    for (b, rows) in factors {
        *b = LoraMatrix { ptr, row_stride: split.split_b_stride.into() };
        ptr += 2 * u64::from(rows) * u64::from(split.split_b_stride);
    }
}
