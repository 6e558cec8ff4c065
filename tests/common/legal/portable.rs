//! The portable family.

use fused_lora::plan::{LoraBackwardParams, LoraForwardParams, LoraMatrix, LoraSplit, Params};
use fused_lora::{Dtype, LoraShape, raw};

use super::split::{self, Factors, Ranks};
use super::{
    Planned, Region, address, assert_covers, check_flags, check_tickets, check_variant, db_blocks, numbered, pointer,
    scaled,
};

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

/// What the products read: the factors, or their halves.
fn check_read(
    split: &LoraSplit,
    counted: Ranks,
    (a, b): (LoraMatrix, &[LoraMatrix]),
    (of_a, of_b): (&raw::Matrix, &[raw::Matrix]),
) {
    if !counted.is_split {
        assert_eq!(a.ptr, of_a.ptr);
        assert!(b.iter().zip(of_b).all(|(got, of)| got.ptr == of.ptr));
        return;
    }
    assert_eq!((a.ptr, a.row_stride), (split.split_a, split.split_a_stride.into()));
    let mut ptr = split.split_b;
    for (got, of) in b.iter().zip(of_b) {
        assert_eq!((got.ptr, got.row_stride), (ptr, split.split_b_stride.into()));
        ptr += 2 * of.rows as u64 * u64::from(split.split_b_stride);
    }
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

pub(super) fn forward(planned: &Planned<'_>, op: &raw::ForwardShared, shape: LoraShape) {
    let block = check_launch(planned, op.dtype, "forward");
    let p = forward_params(&planned.launch.params);
    let LoraShape { m, k, r, .. } = shape;
    let all_b: Vec<raw::Matrix> = op.projections.iter().map(|of| of.b).collect();
    let own_ranks: Vec<usize> = all_b.iter().map(|b| b.cols).collect();
    let counted = Ranks::of(op.f32_factors, op.dtype, &own_ranks);
    assert_eq!(
        [p.m, p.k, p.r, p.projection_count].map(|count| count as usize),
        [m, k, counted.pairs, op.projections.len()]
    );
    assert_eq!((p.x.ptr, p.sync), (op.x.ptr, planned.workspace));
    let split_units = Factors { a: &op.a, b: &all_b, wanted: [true; 2] }.check(&p.split, counted);
    let own_b: Vec<LoraMatrix> = p.projections.iter().map(|of| of.b).collect();
    check_read(&p.split, counted, (p.a, &own_b), (&op.a, &all_b));
    assert_eq!(p.split.tickets, p.split.units);
    check_variant((p.dropout, p.routes), op.dropout, op.routes);
    assert_covers("M", p.m_blocks, block, m);
    let (first_ranks, deep) = numbered(own_ranks.iter().map(|&r| counted.triples_of(r) as u128));
    let (first_blocks, n_blocks) = numbered(op.projections.iter().map(|of| of.w.rows.div_ceil(block as usize) as u128));
    assert_eq!((deep, n_blocks), (counted.triples as u128, p.n_blocks.into()));
    for (at, (of, got)) in op.projections.iter().zip(p.projections).enumerate() {
        assert_eq!((got.w.ptr, got.y.ptr), (of.w.ptr, of.y.ptr));
        assert_eq!((got.bias, got.gain), (address(of.bias), address(of.gain)));
        assert_eq!((got.n as usize, got.r as usize), (of.w.rows, counted.triples_of(of.b.cols)));
        assert_eq!([got.first_rank, got.first_block].map(u128::from), [first_ranks[at], first_blocks[at]]);
        assert_eq!(got.scale, scaled(of.scale, op.dropout));
    }
    let m_blocks = u128::from(p.m_blocks);
    let h_units = m_blocks * counted.pairs.div_ceil(NARROW) as u128;
    assert_eq!(u128::from(p.h_units), h_units);
    assert_eq!(u128::from(p.units), h_units + m_blocks * n_blocks);
    check_tickets(p.split.units + p.units, split_units + h_units + m_blocks * n_blocks, &planned.launch);
    planned.check_order(p.group_m, p.m_blocks, p.n_blocks);
    check_flags(m_blocks, p.flag_shift, p.sync_words, p.sync_words);
    if counted.is_split {
        split::check_kept(&p.split, op.h);
        let a = Region::of(split::halves_of_a(&p.split, counted.pairs, k));
        let b = Region::of(split::halves_of_b(&p.split, &all_b, |r| counted.triples_of(r)).0);
        let h = split::region(p.h, m, counted.triples);
        return split::check_regions(planned, &[Some(h), Some(a), Some(b)]);
    }
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
fn check_chunks(
    planned: &Planned<'_>,
    p: &LoraBackwardParams,
    block: u32,
    tiles: u128,
    ranks: usize,
) -> Option<Region> {
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
    let registers = 2 + 4 * ranks.min(NARROW).div_ceil(8) as u64;
    assert!(u64::from(p.partial_stride) >= registers * u64::from(planned.launch.block[0]));
    Some(Region { start: p.partials.into(), bytes: 4 * u128::from(p.partial_stride) * chunks * tiles })
}

pub(super) fn backward(planned: &Planned<'_>, op: &raw::BackwardShared, shape: LoraShape) {
    let block = check_launch(planned, op.dtype, "backward");
    let p = backward_params(&planned.launch.params);
    let LoraShape { m, k, r, .. } = shape;
    let all_b: Vec<raw::Matrix> = op.projections.iter().map(|of| of.b).collect();
    let own_ranks: Vec<usize> = all_b.iter().map(|b| b.cols).collect();
    let counted = Ranks::of(op.f32_factors, op.dtype, &own_ranks);
    assert_eq!(
        [p.m, p.k, p.r, p.projection_count].map(|count| count as usize),
        [m, k, counted.triples, op.projections.len()]
    );
    assert_eq!(p.sync, planned.workspace);
    check_variant((p.dropout, p.routes), op.dropout, op.routes);
    for (what, blocks, extent) in [("M", p.m_blocks, m), ("K", p.k_blocks, k)] {
        assert_covers(what, blocks, block, extent);
    }
    let [m_blocks, k_blocks, chunks] = [p.m_blocks, p.k_blocks, p.chunks].map(u128::from);
    let wants_da = op.da.is_some() && r > 0;
    let wants_dh = r > 0 && (op.dx.is_some() || wants_da);
    let (narrow, db_tiles) = check_projections(op, &p, block, counted);
    let da_tiles = if wants_da { k_blocks * counted.pairs.div_ceil(NARROW) as u128 } else { 0 };
    let wanted = [wants_dh && op.dx.is_some(), wants_dh];
    let split_units = Factors { a: &op.a, b: &all_b, wanted }.check(&p.split, counted);
    let own_b: Vec<LoraMatrix> = p.projections.iter().map(|of| of.b).collect();
    check_read(&p.split, counted, (p.a, &own_b), (&op.a, &all_b));
    assert_eq!(p.split.tickets, p.split.units);
    let mut end = if wants_dh { m_blocks * narrow } else { 0 };
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
        assert_eq!(u128::from(p.units), end);
        check_tickets(p.split.units + p.units, split_units + end, &planned.launch);
    }
    planned.check_order(p.group_m, p.m_blocks, if op.dx.is_some() { p.k_blocks } else { 1 });
    let sums = check_chunks(planned, &p, block, db_tiles + da_tiles, counted.pairs);
    assert_eq!((p.da.ptr, p.dx.ptr), (pointer(wants_da, op.da), address(op.dx)));
    if counted.is_split {
        let dh = wanted[0].then(|| split::region(p.dh, m, counted.triples));
        let of_tokens = wants_da.then(|| split::region(p.split.pairs, m, counted.pairs));
        let a = wanted[0].then(|| Region::of(split::halves_of_a(&p.split, counted.triples, k)));
        let b = wanted[1].then(|| Region::of(split::halves_of_b(&p.split, &all_b, |r| counted.pairs_of(r)).0));
        return split::check_regions(planned, &[dh, of_tokens, a, b, sums]);
    }
    let dh = wants_dh.then(|| Region::of(planned.scratch(p.dh, shape)));
    planned.check_regions(dh.into_iter().chain(sums));
}

/// What the kernel has for each projection; the narrow tiles of dh in a block of rows, and the tiles of db.
fn check_projections(op: &raw::BackwardShared, p: &LoraBackwardParams, block: u32, counted: Ranks) -> (u128, u128) {
    let pairs = |r: usize| counted.pairs_of(r);
    /// Steps of the reduction: LORA_BLOCK_K.
    const STEP: usize = 32;
    let all = op.projections.iter();
    let n_blocks = |of: &raw::BackwardProjection| of.w.rows.div_ceil(block as usize) as u128;
    let (first_ranks, ranks) = numbered(all.clone().map(|of| pairs(of.b.cols) as u128));
    let (first_steps, steps) = numbered(all.clone().map(|of| of.w.rows.div_ceil(STEP) as u128));
    let (first_narrow, narrow) = numbered(all.clone().map(|of| pairs(of.b.cols).div_ceil(NARROW) as u128));
    let (first_tiles, tiles) = numbered(all.clone().map(|of| n_blocks(of) * db_blocks(of, pairs(of.b.cols), NARROW)));
    assert_eq!((ranks, steps), (counted.pairs as u128, p.n_steps.into()));
    for (at, (of, got)) in all.zip(p.projections).enumerate() {
        let db = pointer(of.b.cols > 0, of.db);
        assert_eq!((got.dy.ptr, got.w.ptr, got.db.ptr), (of.dy.ptr, of.w.ptr, db));
        assert_eq!((got.dbias, got.gain), (pointer(true, of.dbias), address(of.gain)));
        assert_eq!((got.n as usize, got.r as usize), (of.w.rows, pairs(of.b.cols)));
        let firsts = [got.first_rank, got.first_step, got.first_narrow, got.first_db_tile].map(u128::from);
        assert_eq!(firsts, [first_ranks[at], first_steps[at], first_narrow[at], first_tiles[at]]);
        assert_eq!((u128::from(got.n_blocks), got.scale), (n_blocks(of), scaled(of.scale, op.dropout)));
    }
    (narrow, tiles)
}
