//! Tensor maps and tensor copies: layouts against formulas written for these tests, the edges of a tensor, reductions.

mod support;

use half::{bf16, f16};
use ptx_emulator::{Interleave, L2Promotion, OobFill, Rule, Swizzle, TensorMap, TensorMapError, TensorType};
use support::{Run, one_warp, words};

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

/// A map that the kernel itself puts into global memory is seen through a proxy of its own (PTX ISA, "fence.proxy.tensormap").
#[test]
fn maps_in_global_memory_are_fenced() {
    let map: fn(u64, u64) -> Option<TensorMap> =
        |at, _| plain(TensorType::U16, at, &[64], &[], &[64], Swizzle::None, OobFill::Zeros).ok();
    let copy: String = (0..16)
        .map(|i| {
            format!("    ld.u64 %rd9, [%map+{at}];\n    st.global.u64 [%out+{}], %rd9;\n", 1024 + 8 * i, at = 8 * i)
        })
        .collect();
    let fences = "
    fence.proxy.tensormap::generic.release.gpu;
    fence.proxy.tensormap::generic.acquire.gpu [%rd10], 128;";
    let body = load(1, "0", 128).replace("[%map, {0}]", "[%rd10, {0}]").replacen(
        "@%p1 bra READY;",
        &format!("add.s64 %rd10, %out, 1024;\n    @%p1 bra READY;\n{copy}{fences}"),
        1,
    );
    let run = Run { map, ..one_warp() };
    let out = run.twins(&body, &[(fences, "", &[Rule::Race], "is ordered in the generic proxy only after write")]);
    assert_eq!(out[..128], run.input[..128]);
    run.reports(&body.replace("%out, 1024;", "%out, 1088;"), &[Rule::Uninitialised, Rule::Trap], "%rd10");
    run.reports(&body.replace("%out, 1024;", "%out, 1056;"), &[Rule::Misaligned], "a tensor map at");
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

/// Adds, and so on, `tile` (words 1, 2, 3, …) to `out`, which holds 1000 everywhere.
#[test]
fn reductions_combine_element_by_element() {
    let body = |reduce: &str| {
        format!(
            "
    shl.b32 %r1, %t, 2;
    add.u32 %r2, %tile, %r1;
    cvt.u64.u32 %rd1, %r1;
    add.s64 %rd2, %out, %rd1;
    add.u32 %r3, %t, 1;
    st.shared.u32 [%r2], %r3;
    st.global.u32 [%rd2], 10;
    fence.proxy.async;
    bar.warp.sync -1;
    setp.ne.u32 %p1, %t, 0;
    @%p1 bra DONE;
    {reduce}
    {reduce}
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
DONE:
    ret;"
        )
    };
    let plain_form =
        |op: &str| body(&format!("cp.reduce.async.bulk.global.shared::cta.bulk_group.{op} [%out], [%tile], 128;"));
    let map: fn(u64, u64) -> Option<TensorMap> =
        |_, at| plain(TensorType::U32, at, &[32], &[], &[32], Swizzle::None, OobFill::Zeros).ok();
    type Twice = fn(u32) -> u32;
    let cases: [(&str, &str, Twice); 8] = [
        ("add.u32", "add", |x| 10 + 2 * x),
        ("min.s32", "min", |x| x.min(10)),
        ("max.u32", "max", |x| x.max(10)),
        ("and.b32", "and", |x| x & 10),
        ("or.b32", "or", |x| x | 10),
        ("xor.b32", "xor", |_| 10),
        ("inc.u32", "inc", |x| (0..2).fold(10, |old, _| if old >= x { 0 } else { old + 1 })),
        ("dec.u32", "dec", |x| (0..2).fold(10, |old, _| if old == 0 || old > x { x } else { old - 1 })),
    ];
    for (op, word, twice) in cases {
        let expected: Vec<u32> = (1..=32).map(twice).collect();
        let run = Run { map, out_bytes: 128, ..one_warp() };
        assert_eq!(run.words(&plain_form(op)), expected, "{op}");
        let form =
            format!("cp.reduce.async.bulk.tensor.1d.global.shared::cta.{word}.tile.bulk_group [%map, {{0}}], [%tile];");
        assert_eq!(run.words(&body(&form)), expected, "tensor {word}");
    }
    // The same twice is no race, a plain store beside it is one.
    let run = Run { map, out_bytes: 128, ..one_warp() };
    let mixed = plain_form("add.u32").replacen(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32",
        "cp.async.bulk.global.shared::cta.bulk_group",
        1,
    );
    run.reports(&mixed, &[Rule::Race], "bulk operation");
    let float: fn(u64, u64) -> Option<TensorMap> =
        |_, at| plain(TensorType::F32, at, &[32], &[], &[32], Swizzle::None, OobFill::Zeros).ok();
    let form = "cp.reduce.async.bulk.tensor.1d.global.shared::cta.xor.tile.bulk_group [%map, {0}], [%tile];";
    Run { map: float, ..run }.reports(&body(form), &[Rule::Trap], "no reduction Xor of F32");
}

/// PTX ISA, "cp.reduce.async.bulk": f16 and bf16 add with `.noftz`, f32 add, and half minima.
#[test]
fn reductions_of_floats_round() {
    let body = |op: &str, old: u32, new: u32| {
        format!(
            "
    setp.ne.u32 %p1, %t, 0;
    @%p1 bra DONE;
    mov.u32 %r1, {new};
    mov.u32 %r2, {old};
    st.shared.v4.u32 [%tile], {{%r1, %r1, %r1, %r1}};
    st.global.v4.u32 [%out], {{%r2, %r2, %r2, %r2}};
    fence.proxy.async;
    cp.reduce.async.bulk.global.shared::cta.bulk_group.{op} [%out], [%tile], 16;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
DONE:
    ret;"
        )
    };
    let run = Run { out_bytes: 16, ..one_warp() };
    let pair = |low: u16, high: u16| u32::from(high) << 16 | u32::from(low);
    let (a, b) = (f16::from_f32(1.0), f16::from_f32(0.0004));
    let (sum, tiny) = (f16::from_f64(1.0 + b.to_f64()), f16::from_bits(3));
    let twice = f16::from_bits(6);
    assert_eq!(
        run.words(&body("add.noftz.f16", pair(a.to_bits(), tiny.to_bits()), pair(b.to_bits(), tiny.to_bits()))),
        [pair(sum.to_bits(), twice.to_bits()); 4]
    );
    let (a, b) = (bf16::from_f32(3.0), bf16::from_f32(0.01));
    let sum = bf16::from_f64(3.0 + b.to_f64()).to_bits();
    assert_eq!(
        run.words(&body("add.noftz.bf16", pair(a.to_bits(), b.to_bits()), pair(b.to_bits(), a.to_bits()))),
        [pair(sum, sum); 4]
    );
    assert_eq!(
        run.words(&body("min.bf16", pair(a.to_bits(), b.to_bits()), pair(b.to_bits(), a.to_bits()))),
        [pair(b.to_bits(), b.to_bits()); 4]
    );
    assert_eq!(run.words(&body("max.f16", pair(1, 0x8001), pair(0x3c00, 0)))[0], pair(0x3c00, 0));
    assert_eq!(run.words(&body("add.f32", 1.5f32.to_bits(), 2.25f32.to_bits())), [3.75f32.to_bits(); 4]);
    let seven = words(&7u32.to_le_bytes());
    assert_eq!(run.words(&body("or.b32", 3, 4))[..1], seven[..]);
}

/// CUDA driver API, "cuTensorMapEncodeTiled": each rule with the least change that breaks it.
#[test]
fn the_drivers_rules_are_enforced() {
    #[derive(Clone)]
    struct Args {
        dtype: TensorType,
        rank: u32,
        address: u64,
        dims: Vec<u64>,
        strides: Vec<u64>,
        boxes: Vec<u32>,
        element_strides: Vec<u32>,
        interleave: Interleave,
        swizzle: Swizzle,
        fill: OobFill,
    }
    let good = Args {
        dtype: TensorType::Bf16,
        rank: 3,
        address: 0x7f00_0000_0010,
        dims: vec![64, 1 << 32, 4],
        strides: vec![128, (1 << 40) - 16],
        boxes: vec![64, 256, 1],
        element_strides: vec![1, 8, 1],
        interleave: Interleave::None,
        swizzle: Swizzle::Bytes128,
        fill: OobFill::Nans,
    };
    let encode = |args: &Args| {
        let Args { dtype, rank, address, dims, strides, boxes, element_strides, interleave, swizzle, fill } = args;
        let l2 = L2Promotion::None;
        TensorMap::encode_tiled(
            *dtype,
            *rank,
            *address,
            dims,
            strides,
            boxes,
            element_strides,
            *interleave,
            *swizzle,
            l2,
            *fill,
        )
    };
    assert!(encode(&good).is_ok());
    type Change = fn(&mut Args);
    let cases: &[(Change, TensorMapError)] = &[
        (|a| a.rank = 0, TensorMapError::Rank { rank: 0, least: 1 }),
        (|a| a.rank = 6, TensorMapError::Rank { rank: 6, least: 1 }),
        (|a| (a.rank, a.interleave) = (2, Interleave::Bytes16), TensorMapError::Rank { rank: 2, least: 3 }),
        (|a| a.dims.truncate(2), TensorMapError::Length { argument: "sizes", got: 2, expected: 3 }),
        (|a| a.strides.push(16), TensorMapError::Length { argument: "strides", got: 3, expected: 2 }),
        (|a| a.address += 8, TensorMapError::Address { address: 0x7f00_0000_0018, multiple: 16 }),
        (
            |a| (a.interleave, a.swizzle) = (Interleave::Bytes32, Swizzle::Bytes32),
            TensorMapError::Address { address: 0x7f00_0000_0010, multiple: 32 },
        ),
        (|a| a.dims[1] = 0, TensorMapError::Size { dimension: 1, size: 0 }),
        (|a| a.dims[1] += 1, TensorMapError::Size { dimension: 1, size: (1 << 32) + 1 }),
        (|a| a.strides[0] = 136, TensorMapError::StrideMultiple { dimension: 1, stride: 136, multiple: 16 }),
        (|a| a.strides[1] = 1 << 40, TensorMapError::StrideTooLarge { dimension: 2, stride: 1 << 40 }),
        (|a| a.boxes[1] = 257, TensorMapError::Box { dimension: 1, size: 257 }),
        (|a| a.boxes[2] = 0, TensorMapError::Box { dimension: 2, size: 0 }),
        (|a| a.boxes[0] = 63, TensorMapError::InnerBoxMultiple { bytes: 126 }),
        (|a| a.boxes[0] = 72, TensorMapError::InnerBoxSpan { bytes: 144, span: 128 }),
        (|a| a.swizzle = Swizzle::Bytes64, TensorMapError::InnerBoxSpan { bytes: 128, span: 64 }),
        (|a| a.element_strides[1] = 9, TensorMapError::ElementStride { dimension: 1, stride: 9 }),
        (|a| a.element_strides[2] = 0, TensorMapError::ElementStride { dimension: 2, stride: 0 }),
        (
            |a| {
                (a.interleave, a.address) = (Interleave::Bytes32, 0x7f00_0000_0000);
                a.strides[1] -= 16;
            },
            TensorMapError::InterleaveSwizzle { swizzle: Swizzle::Bytes128 },
        ),
        (|a| a.dtype = TensorType::U16, TensorMapError::Fill { dtype: TensorType::U16 }),
    ];
    for (change, error) in cases {
        let mut args = good.clone();
        change(&mut args);
        assert_eq!(encode(&args).expect_err("refused"), *error);
        assert!(error.to_string().len() > 10);
    }
    // The first element stride is ignored, as the driver has it.
    assert!(encode(&Args { element_strides: vec![0, 1, 1], ..good.clone() }).is_ok());
    assert!(encode(&Args { swizzle: Swizzle::None, boxes: vec![256, 1, 1], ..good }).is_ok());
}

#[test]
fn boxes_that_no_shared_memory_holds_are_refused() {
    let map: fn(u64, u64) -> Option<TensorMap> = |address, _| {
        let (dims, boxes) = ([16, 256, 256, 256, 256], [16, 256, 256, 256, 256]);
        plain(TensorType::Bf16, address, &dims, &[32; 4], &boxes, Swizzle::None, OobFill::Zeros).ok()
    };
    let run = Run { map, ..one_warp() };
    run.reports(&load(5, "0, 0, 0, 0, 0", 16), &[Rule::OutOfBounds], "137438953472 bytes");
}
