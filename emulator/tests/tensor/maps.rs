//! What a tensor map may hold, and when a kernel may use one.

use ptx_emulator::{Interleave, L2Promotion, OobFill, Rule, Swizzle, TensorMap, TensorMapError, TensorType};

use crate::support::{Run, one_warp};
use crate::{load, plain};

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
