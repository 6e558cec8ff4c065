//! Where the elements of a box go, and what is outside the tensor.

use half::{bf16, f16};
use ptx_emulator::{Interleave, L2Promotion, OobFill, Rule, Swizzle, TensorMap, TensorType};

use crate::support::{Run, one_warp};
use crate::{halves, load, plain};

/// PTX ISA, "Swizzling Modes": the tables for 32, 64 and 128 bytes give, for each row of 128 bytes of the pattern, the order of
/// its 16-byte units. Written out here as those tables have them.
#[test]
fn swizzles_follow_their_tables() {
    const B32: [[usize; 8]; 8] = [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [1, 0, 3, 2, 5, 4, 7, 6],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [1, 0, 3, 2, 5, 4, 7, 6],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [1, 0, 3, 2, 5, 4, 7, 6],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [1, 0, 3, 2, 5, 4, 7, 6],
    ];
    const B64: [[usize; 8]; 8] = [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [1, 0, 3, 2, 5, 4, 7, 6],
        [2, 3, 0, 1, 6, 7, 4, 5],
        [3, 2, 1, 0, 7, 6, 5, 4],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [1, 0, 3, 2, 5, 4, 7, 6],
        [2, 3, 0, 1, 6, 7, 4, 5],
        [3, 2, 1, 0, 7, 6, 5, 4],
    ];
    const B128: [[usize; 8]; 8] = [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [1, 0, 3, 2, 5, 4, 7, 6],
        [2, 3, 0, 1, 6, 7, 4, 5],
        [3, 2, 1, 0, 7, 6, 5, 4],
        [4, 5, 6, 7, 0, 1, 2, 3],
        [5, 4, 7, 6, 1, 0, 3, 2],
        [6, 7, 4, 5, 2, 3, 0, 1],
        [7, 6, 5, 4, 3, 2, 1, 0],
    ];
    const PLAIN: [[usize; 8]; 8] = [[0, 1, 2, 3, 4, 5, 6, 7]; 8];
    type Map = fn(u64, u64) -> Option<TensorMap>;
    // Rows of 16, 32, 64 and 128 bytes: 2 KiB each, two patterns of eight 128-byte rows.
    let cases: [(Map, u32, &[[usize; 8]; 8]); 5] = [
        (
            |at, _| plain(TensorType::U16, at, &[8, 512], &[16], &[8, 128], Swizzle::None, OobFill::Zeros).ok(),
            16,
            &PLAIN,
        ),
        (
            |at, _| plain(TensorType::U16, at, &[64, 64], &[128], &[64, 16], Swizzle::None, OobFill::Zeros).ok(),
            128,
            &PLAIN,
        ),
        (
            |at, _| plain(TensorType::U16, at, &[16, 256], &[32], &[16, 64], Swizzle::Bytes32, OobFill::Zeros).ok(),
            32,
            &B32,
        ),
        (
            |at, _| plain(TensorType::U16, at, &[32, 128], &[64], &[32, 32], Swizzle::Bytes64, OobFill::Zeros).ok(),
            64,
            &B64,
        ),
        (
            |at, _| plain(TensorType::U16, at, &[64, 64], &[128], &[64, 16], Swizzle::Bytes128, OobFill::Zeros).ok(),
            128,
            &B128,
        ),
    ];
    for (map, row_bytes, table) in cases {
        let out = Run { map, ..one_warp() }.passes(&load(2, "0, 0", 2048));
        // The tensor's rows are as long as the box's: linear data, of which unit u of 128-byte row r was put to table[r][u].
        for unit in 0..128 {
            let (row, place) = (unit / 8, unit % 8);
            let moved = (row * 8 + table[row % 8][place]) * 16;
            assert_eq!(out[moved..moved + 16], one_warp().input[unit * 16..unit * 16 + 16], "{row_bytes}: unit {unit}");
        }
        // A tile that does not begin where the pattern does.
        let shifted = load(2, "0, 0", 2048).replace("bytes [%tile]", "bytes [%tile+64]");
        Run { map, ..one_warp() }.reports(&shifted, &[Rule::Misaligned], "a tile at shared address");
    }
}

/// Every rank, with boxes that reach over each edge, negative coordinates and holes between rows.
#[test]
fn boxes_of_every_rank_end_at_the_tensor() {
    // 8-byte inner size in elements of 16 bits, strides with padding; input counts in 16-bit words.
    let map: [fn(u64, u64) -> Option<TensorMap>; 5] = [
        |at, _| plain(TensorType::U16, at, &[100], &[], &[32], Swizzle::None, OobFill::Zeros).ok(),
        |at, _| plain(TensorType::U16, at, &[20, 5], &[48], &[16, 4], Swizzle::None, OobFill::Zeros).ok(),
        |at, _| plain(TensorType::U16, at, &[20, 5, 3], &[48, 256], &[16, 2, 2], Swizzle::None, OobFill::Zeros).ok(),
        |at, _| {
            plain(TensorType::U16, at, &[20, 5, 3, 2], &[48, 256, 768], &[8, 2, 3, 2], Swizzle::None, OobFill::Zeros)
                .ok()
        },
        |at, _| {
            let dims = [20, 5, 3, 2, 3];
            plain(TensorType::U16, at, &dims, &[48, 256, 768, 1536], &[8, 2, 1, 2, 3], Swizzle::None, OobFill::Zeros)
                .ok()
        },
    ];
    let dims = [vec![100], vec![20, 5], vec![20, 5, 3], vec![20, 5, 3, 2], vec![20, 5, 3, 2, 3]];
    let strides = [0i64, 24, 128, 384, 768];
    let boxes: [&[i64]; 5] = [&[32], &[16, 4], &[16, 2, 2], &[8, 2, 3, 2], &[8, 2, 1, 2, 3]];
    for rank in 1..=5usize {
        for start in
            [[0i64; 5], [3, 1, 1, 0, 1], [-5, -1, -1, -1, -1], [17, 4, 2, 1, 2], [-32, 0, 0, 0, 0], [2000, 9, 9, 9, 9]]
        {
            let start = &start[..rank];
            let size = boxes[rank - 1];
            let elements: i64 = size.iter().product();
            let coords: Vec<String> = start.iter().map(i64::to_string).collect();
            let run = Run { map: map[rank - 1], ..one_warp() };
            let found = halves(&run.passes(&load(rank, &coords.join(", "), 2 * elements as u32)));
            for i in 0..elements {
                let (mut rest, mut at, mut inside) = (i, 0, true);
                for axis in 0..rank {
                    let index = start[axis] + rest % size[axis];
                    rest /= size[axis];
                    inside &= index >= 0 && index < dims[rank - 1][axis];
                    at += index * if axis == 0 { 1 } else { strides[axis] };
                }
                let expected = if inside { at as u16 } else { 0 };
                assert_eq!(found[i as usize], expected, "rank {rank} at {start:?}, element {i}");
            }
        }
    }
}

#[test]
fn elements_outside_are_nan_where_asked() {
    let run = |dtype, bits: u64| {
        let map: fn(u64, u64) -> Option<TensorMap> = match dtype {
            TensorType::F16 => {
                |at, _| plain(TensorType::F16, at, &[8, 2], &[16], &[16, 4], Swizzle::None, OobFill::Nans).ok()
            }
            TensorType::Bf16 => {
                |at, _| plain(TensorType::Bf16, at, &[8, 2], &[16], &[16, 4], Swizzle::None, OobFill::Nans).ok()
            }
            _ => |at, _| plain(TensorType::F32, at, &[4, 2], &[16], &[8, 4], Swizzle::None, OobFill::Nans).ok(),
        };
        let out = Run { map, ..one_warp() }.passes(&load(2, "0, 0", 128));
        // Two rows of 32 bytes: 16 inside, 16 outside; then two rows outside.
        let input = &one_warp().input;
        assert_eq!((&out[..16], &out[32..48]), (&input[..16], &input[16..32]));
        let filled = bits.to_le_bytes();
        for part in [&out[16..32], &out[48..64], &out[64..128]] {
            assert!(part.as_chunks::<8>().0.iter().all(|eight| *eight == filled), "{part:x?}");
        }
    };
    run(TensorType::F16, 0x7fff_7fff_7fff_7fff);
    run(TensorType::Bf16, 0x7fff_7fff_7fff_7fff);
    run(TensorType::F32, 0x7fff_ffff_7fff_ffff);
    assert!(
        f16::from_bits(0x7fff).is_nan() && bf16::from_bits(0x7fff).is_nan() && f32::from_bits(0x7fff_ffff).is_nan()
    );
}

/// ceil(box / stride) elements along a dimension with an element stride; the innermost has none.
#[test]
fn element_strides_skip() {
    let map: fn(u64, u64) -> Option<TensorMap> = |at, _| {
        let (dims, strides, boxes) = ([16, 32], [32], [8, 7]);
        let (interleave, swizzle) = (Interleave::None, Swizzle::None);
        let (l2, fill) = (L2Promotion::None, OobFill::Zeros);
        TensorMap::encode_tiled(TensorType::U16, 2, at, &dims, &strides, &boxes, &[5, 3], interleave, swizzle, l2, fill)
            .ok()
    };
    let found = halves(&Run { map, ..one_warp() }.passes(&load(2, "8, 2", 48)));
    let expected: Vec<u16> = [2u16, 5, 8].iter().flat_map(|row| (8..16).map(move |column| row * 16 + column)).collect();
    assert_eq!(found[..24], expected);
}

/// What is loaded with a swizzle and stored with the same one is where it was, except outside the tensor.
#[test]
fn stores_undo_the_swizzle_and_stop_at_the_edges() {
    let map: fn(u64, u64) -> Option<TensorMap> =
        |_, at| plain(TensorType::U16, at, &[60, 10], &[128], &[32, 16], Swizzle::Bytes64, OobFill::Zeros).ok();
    let body = "
    shl.b32 %r1, %t, 5;
    add.u32 %r2, %tile, %r1;
    mov.u32 %r3, 0;
FILL:
    shl.b32 %r4, %t, 4;
    add.u32 %r4, %r4, %r3;
    st.shared.u16 [%r2], %r4;
    add.u32 %r2, %r2, 2;
    add.u32 %r3, %r3, 1;
    setp.lt.u32 %p1, %r3, 16;
    @%p1 bra FILL;
    fence.proxy.async.shared::cta;
    bar.warp.sync -1;
    setp.ne.u32 %p1, %t, 0;
    @%p1 bra DONE;
    cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%map, {32, -4}], [%tile];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
DONE:
    ret;";
    let run = Run { map, out_bytes: 1280, ..one_warp() };
    let out = run.twins(
        body,
        &[
            ("fence.proxy.async.shared::cta;", "", &[Rule::Race], "generic proxy only"),
            ("[%tile];", "[%tile+256];", &[Rule::Misaligned], "expected a multiple of 512"),
        ],
    );
    for row in 0..10usize {
        for column in 0..64usize {
            let at = row * 128 + column * 2;
            let found = u16::from_le_bytes([out[at], out[at + 1]]);
            // Row r of the box, element c, lies at byte b of the tile before the swizzle; words count in bytes' order.
            let expected = if (32..60).contains(&column) {
                let linear = (row + 4) * 64 + (column - 32) * 2;
                let stored = linear ^ ((linear >> 7 & 3) << 4);
                (stored / 2) as u16
            } else {
                0xeeee
            };
            assert_eq!(if row < 10 { found } else { 0xeeee }, expected, "row {row} column {column}");
        }
    }
    // A tensor that is larger than its allocation.
    Run { out_bytes: 1024, ..run }.reports(body, &[Rule::OutOfBounds], "cp.async.bulk.tensor.2d.global");
}
