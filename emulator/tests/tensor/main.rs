//! Tensor maps and tensor copies: layouts against formulas written for these tests, the edges of a tensor, reductions.

mod copies;
mod maps;
mod reductions;
#[path = "../support/mod.rs"]
mod support;

use ptx_emulator::{Interleave, L2Promotion, OobFill, Swizzle, TensorMap, TensorMapError, TensorType};

type Encoded = Result<TensorMap, TensorMapError>;

/// Without interleave and with all element strides 1.
fn plain(
    dtype: TensorType,
    address: u64,
    dims: &[u64],
    strides: &[u64],
    boxes: &[u32],
    swizzle: Swizzle,
    fill: OobFill,
) -> Encoded {
    let ones = vec![1; dims.len()];
    let rank = dims.len() as u32;
    let (interleave, l2) = (Interleave::None, L2Promotion::Bytes128);
    TensorMap::encode_tiled(dtype, rank, address, dims, strides, boxes, &ones, interleave, swizzle, l2, fill)
}

/// Thread 0 loads the box at `coords` and the warp writes `bytes` of the tile to `out`.
fn load(rank: usize, coords: &str, bytes: u32) -> String {
    let dims = ["1d", "2d", "3d", "4d", "5d"][rank - 1];
    format!(
        "
    setp.ne.u32 %p1, %t, 0;
    @%p1 bra READY;
    mbarrier.init.shared::cta.b64 [%bar], 1;
    fence.proxy.async;
    cp.async.bulk.prefetch.tensor.{dims}.L2.global.tile [%map, {{{coords}}}];
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], {bytes};
    cp.async.bulk.tensor.{dims}.shared::cta.global.tile.mbarrier::complete_tx::bytes [%tile], [%map, {{{coords}}}], [%bar];
READY:
    bar.warp.sync -1;
WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%bar], 0;
    @!%p2 bra WAIT;
    shl.b32 %r1, %t, 2;
NEXT:
    setp.ge.u32 %p3, %r1, {bytes};
    @%p3 bra DONE;
    add.u32 %r2, %tile, %r1;
    ld.shared.u32 %r3, [%r2];
    cvt.u64.u32 %rd1, %r1;
    add.s64 %rd2, %out, %rd1;
    st.global.u32 [%rd2], %r3;
    add.u32 %r1, %r1, 128;
    bra NEXT;
DONE:
    ret;"
    )
}

fn halves(bytes: &[u8]) -> Vec<u16> {
    bytes.as_chunks::<2>().0.iter().map(|half| u16::from_le_bytes(*half)).collect()
}
