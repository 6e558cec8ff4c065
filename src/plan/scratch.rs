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
                if params.split.r != 0 {
                    (params.a, params.projections[0].b) = (params.split.split_a, params.split.split_b);
                }
                Vec::new()
            }
            Params::Backward(params) => {
                params.sync = workspace;
                place(&mut params.dh.ptr, self.h);
                place(&mut params.partials, self.partials);
                split.fill(workspace, &mut params.split);
                if params.split.r != 0 {
                    (params.a, params.projections[0].b) = (params.split.split_a, params.split.split_b);
                }
                Vec::new()
            }
            Params::Sm90Forward(params) => {
                params.sync = workspace;
                place(&mut params.h.ptr, self.h);
                split.fill(workspace, &mut params.split);
                let first = |at: usize| LORA_SM90_FORWARD_FIRST + at as u32 * LORA_SM90_FORWARD_EACH;
                let h = (0..raw::MAX_PROJECTIONS).map(|at| (first(at) + LORA_SM90_FORWARD_H, self.h));
                h.chain([(LORA_SM90_FORWARD_A, split.a), (first(0) + LORA_SM90_FORWARD_B, split.b)]).collect()
            }
            Params::Sm90Backward(params) => {
                params.sync = workspace;
                place(&mut params.dh.ptr, self.h);
                place(&mut params.partials, self.partials);
                split.fill(workspace, &mut params.split);
                vec![
                    (LORA_SM90_BACKWARD_DH, self.h),
                    (LORA_SM90_BACKWARD_DH_TOKENS, split.pairs.or(self.h)),
                    (LORA_SM90_BACKWARD_A, split.a),
                    (LORA_SM90_BACKWARD_FIRST + LORA_SM90_BACKWARD_B, split.b),
                ]
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
