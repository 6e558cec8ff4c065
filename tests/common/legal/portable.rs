//! The portable family.

use fused_lora::plan::{LoraBackwardParams, LoraForwardParams, Params};
use fused_lora::{Dtype, LoraShape, raw};

use super::{Planned, Region, assert_covers, check_dimensions, check_flags, check_tickets, check_variant, pointer};

/// Columns of h, dh, da and db that one tile computes: LORA_NARROW_N.
const NARROW: usize = 64;
/// Static shared memory of a kernel and what the system reserves.
const SHARED_OVERHEAD: u64 = 1152;

/// Limits of the device; the block of rows that belongs to the launch.
fn check_launch(planned: &Planned<'_>, dtype: Dtype, operation: &str) -> u32 {
    let Planned { launch, device, .. } = planned;
    let (size, block, most) = match launch.block {
        [256, 1, 1] => ("large", 128, 2),
        [128, 1, 1] => ("small", 64, 4),
        other => panic!("no tile shape has {other:?} threads"),
    };
    assert_eq!(launch.image, format!("portable_{operation}"));
    assert_eq!(launch.kernel, format!("lora_{operation}_{}_{size}", dtype.name()));
    assert_eq!((launch.cluster[0], launch.maps.len()), (1, 0), "{launch:?}");
    let shared = u64::from(launch.shared_bytes) + SHARED_OVERHEAD;
    assert!(shared <= device.shared_per_block.into(), "{launch:?}");
    let ctas_per_sm = launch.grid[0].div_ceil(device.sms);
    assert!((1..=most).contains(&ctas_per_sm), "{launch:?}");
    assert!(ctas_per_sm == 1 || u64::from(ctas_per_sm) * shared <= device.shared_per_sm.into(), "{launch:?}");
    assert!(ctas_per_sm * launch.block[0] <= if device.arch == 75 { 1024 } else { 1536 }, "{launch:?}");
    block
}

fn forward_params(params: &Params) -> LoraForwardParams {
    match params {
        Params::Forward(params) => *params,
        other => panic!("the plan of a portable forward holds {other:?}"),
    }
}

fn backward_params(params: &Params) -> LoraBackwardParams {
    match params {
        Params::Backward(params) => *params,
        other => panic!("the plan of a portable backward holds {other:?}"),
    }
}

pub(super) fn forward(planned: &Planned<'_>, op: &raw::Forward, shape: LoraShape) {
    let block = check_launch(planned, op.dtype, "forward");
    let p = forward_params(&planned.launch.params);
    let LoraShape { m, n, r, .. } = shape;
    check_dimensions([p.m, p.n, p.k, p.r], shape);
    assert_eq!((p.x.ptr, p.w.ptr, p.a.ptr, p.b.ptr, p.y.ptr), (op.x.ptr, op.w.ptr, op.a.ptr, op.b.ptr, op.y.ptr));
    assert_eq!((p.sync, p.bias), (planned.workspace, op.bias.map_or(0, |bias| bias.ptr)));
    check_variant((p.scale, p.dropout, p.routes), op.scale, &op.variant);
    assert_covers("M", p.m_blocks, block, m);
    assert_covers("N", p.n_blocks, block, n);
    let [m_blocks, n_blocks] = [p.m_blocks, p.n_blocks].map(u128::from);
    let h_units = m_blocks * r.div_ceil(NARROW) as u128;
    assert_eq!(u128::from(p.h_units), h_units);
    check_tickets(p.units, h_units + m_blocks * n_blocks, &planned.launch);
    planned.check_order(p.group_m, p.m_blocks, p.n_blocks);
    check_flags(m_blocks, p.flag_shift, p.sync_words, p.sync_words);
    match op.h {
        Some(h) => {
            assert_eq!((p.h.ptr, p.h.row_stride), (h.ptr, h.row_stride as i64));
            planned.check_regions([]);
        }
        None if r == 0 => planned.check_regions([]),
        None => planned.check_regions([Region::of(planned.scratch(p.h, shape))]),
    }
}

/// The partial sums of `tiles` tiles of db and da, and their counters.
fn check_chunks(planned: &Planned<'_>, p: &LoraBackwardParams, block: u32, tiles: u128) -> Option<Region> {
    let chunks = u128::from(p.chunks);
    assert_covers("tokens", p.chunks, p.chunk_rows, p.m as usize);
    assert!(p.chunk_rows.is_multiple_of(block), "a chunk is whole blocks: its dh flags are");
    check_flags(p.m_blocks.into(), p.flag_shift, p.counters, p.sync_words);
    if chunks == 1 {
        assert_eq!((p.sync_words, p.partials), (p.counters, 0));
        return None;
    }
    assert_eq!(u128::from(p.sync_words), u128::from(p.counters) + tiles);
    // Per thread: two sums and four registers for each eight columns (reduce_chunks in backward.cu).
    let registers = 2 + 4 * (p.r as usize).min(NARROW).div_ceil(8) as u64;
    assert!(u64::from(p.partial_stride) >= registers * u64::from(planned.launch.block[0]));
    Some(Region { start: p.partials.into(), bytes: 4 * u128::from(p.partial_stride) * chunks * tiles })
}

pub(super) fn backward(planned: &Planned<'_>, op: &raw::Backward, shape: LoraShape) {
    let block = check_launch(planned, op.dtype, "backward");
    let p = backward_params(&planned.launch.params);
    let LoraShape { m, n, k, r } = shape;
    check_dimensions([p.m, p.n, p.k, p.r], shape);
    assert_eq!(p.sync, planned.workspace);
    check_variant((p.scale, p.dropout, p.routes), op.scale, &op.variant);
    for (what, blocks, extent) in [("M", p.m_blocks, m), ("N", p.n_blocks, n), ("K", p.k_blocks, k)] {
        assert_covers(what, blocks, block, extent);
    }
    let [m_blocks, n_blocks, k_blocks, chunks] = [p.m_blocks, p.n_blocks, p.k_blocks, p.chunks].map(u128::from);
    let r_blocks = r.div_ceil(NARROW) as u128;
    let (wants_da, wants_db) = (op.da.is_some() && r > 0, op.db.is_some() && r > 0);
    let wants_dh = r > 0 && (op.dx.is_some() || wants_da);
    let db_tiles = n_blocks * if wants_db { r_blocks } else { op.dbias.is_some().into() };
    let da_tiles = if wants_da { k_blocks * r_blocks } else { 0 };
    let mut end = if wants_dh { m_blocks * r_blocks } else { 0 };
    assert_eq!(u128::from(p.dh_units), end);
    end += if op.dx.is_some() { m_blocks * k_blocks } else { 0 };
    assert_eq!(u128::from(p.dx_end), end);
    end += db_tiles * chunks;
    assert_eq!(u128::from(p.db_end), end);
    end += da_tiles * chunks;
    if end == 0 {
        // Nothing is wanted but da or db without ranks: one CTA finds no unit.
        assert_eq!((p.units, planned.launch.grid[0]), (0, 1));
    } else {
        check_tickets(p.units, end, &planned.launch);
    }
    planned.check_order(p.group_m, p.m_blocks, if op.dx.is_some() { p.k_blocks } else { 1 });
    let sums = check_chunks(planned, &p, block, db_tiles + da_tiles);
    let dh = wants_dh.then(|| Region::of(planned.scratch(p.dh, shape)));
    planned.check_regions(dh.into_iter().chain(sums));
    assert_eq!((p.da.ptr, p.db.ptr), (pointer(wants_da, op.da), pointer(wants_db, op.db)));
    assert_eq!((p.dx.ptr, p.dbias), (op.dx.map_or(0, |dx| dx.ptr), pointer(true, op.dbias)));
}
