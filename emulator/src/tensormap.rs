//! Tensor maps: what `cuTensorMapEncodeTiled` takes, with its argument rules, in an encoding of our own.
//!
//! The rules are those of the CUDA driver API, "Tensor Map Object Management". Sizes and strides are innermost first; the
//! stride of dimension 0 is the element.

/// Type of the elements (`CUtensorMapDataType`, the packed types aside).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "each names its type")]
pub enum TensorType {
    U8,
    U16,
    U32,
    I32,
    U64,
    I64,
    F16,
    F32,
    F64,
    Bf16,
    F32Ftz,
    Tf32,
    Tf32Ftz,
}

const TYPES: [TensorType; 13] = [
    TensorType::U8,
    TensorType::U16,
    TensorType::U32,
    TensorType::I32,
    TensorType::U64,
    TensorType::I64,
    TensorType::F16,
    TensorType::F32,
    TensorType::F64,
    TensorType::Bf16,
    TensorType::F32Ftz,
    TensorType::Tf32,
    TensorType::Tf32Ftz,
];

impl TensorType {
    /// Bytes of an element.
    pub fn bytes(self) -> u32 {
        match self {
            TensorType::U8 => 1,
            TensorType::U16 | TensorType::F16 | TensorType::Bf16 => 2,
            TensorType::U64 | TensorType::I64 | TensorType::F64 => 8,
            _ => 4,
        }
    }

    fn is_float(self) -> bool {
        !matches!(
            self,
            TensorType::U8 | TensorType::U16 | TensorType::U32 | TensorType::I32 | TensorType::U64 | TensorType::I64
        )
    }
}

/// `CUtensorMapInterleave`. A map with an interleaved layout can be encoded; a copy through it is reported as not
/// implemented.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Interleave {
    /// Plain rows.
    #[default]
    None,
    /// NC/8HWC8.
    Bytes16,
    /// NC/16HWC16.
    Bytes32,
}

/// How 16-byte units are permuted in shared memory (`CUtensorMapSwizzle`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Swizzle {
    /// As they come.
    #[default]
    None,
    /// Within spans of 32 bytes.
    Bytes32,
    /// Within spans of 64 bytes.
    Bytes64,
    /// Within spans of 128 bytes.
    Bytes128,
}

impl Swizzle {
    /// Bytes within which units move.
    pub(crate) fn span(self) -> u32 {
        match self {
            Swizzle::None => 16,
            Swizzle::Bytes32 => 32,
            Swizzle::Bytes64 => 64,
            Swizzle::Bytes128 => 128,
        }
    }

    /// The alignment from which on the pattern repeats, which a tile must have; 128 bytes without a pattern (PTX ISA,
    /// "cp.async.bulk.tensor").
    pub(crate) fn alignment(self) -> u32 {
        if self == Swizzle::None { 128 } else { 8 * self.span() }
    }

    /// Where the byte at `address` of shared memory goes: 128-byte rows number the pattern, which changes the place of
    /// 16-byte units (PTX ISA, "Swizzling Modes").
    pub(crate) fn apply(self, address: u32) -> u32 {
        let units = self.span() / 16 - 1;
        address ^ (((address >> 7) & units) << 4)
    }
}

/// `CUtensorMapL2promotion`: checked and kept, without effect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "each names its size")]
pub enum L2Promotion {
    #[default]
    None,
    Bytes64,
    Bytes128,
    Bytes256,
}

/// What elements outside the tensor read as (`CUtensorMapFloatOOBfill`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OobFill {
    /// Zero.
    #[default]
    Zeros,
    /// A NaN, of the bit pattern 0x7ff…f here.
    Nans,
}

/// An argument that `cuTensorMapEncodeTiled` refuses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum TensorMapError {
    #[error("rank {rank}, expected {least} to 5")]
    Rank { rank: u32, least: u32 },
    #[error("{got} {argument}, expected {expected}")]
    Length { argument: &'static str, got: usize, expected: usize },
    #[error("address {address:#x} is not a multiple of {multiple}")]
    Address { address: u64, multiple: u64 },
    #[error("size {size} of dimension {dimension}, expected 1 to 2^32")]
    Size { dimension: usize, size: u64 },
    #[error("stride {stride} of dimension {dimension} is not a multiple of {multiple} bytes")]
    StrideMultiple { dimension: usize, stride: u64, multiple: u64 },
    #[error("stride {stride} of dimension {dimension}, expected less than 2^40 bytes")]
    StrideTooLarge { dimension: usize, stride: u64 },
    #[error("box of {size} elements in dimension {dimension}, expected 1 to 256")]
    Box { dimension: usize, size: u32 },
    #[error("inner box of {bytes} bytes is not a multiple of 16")]
    InnerBoxMultiple { bytes: u32 },
    #[error("inner box of {bytes} bytes, expected at most the swizzle's {span}")]
    InnerBoxSpan { bytes: u32, span: u32 },
    #[error("element stride {stride} of dimension {dimension}, expected 1 to 8")]
    ElementStride { dimension: usize, stride: u32 },
    #[error("swizzle {swizzle:?} with 32-byte interleave, expected Bytes32")]
    InterleaveSwizzle { swizzle: Swizzle },
    #[error("NaN fill for {dtype:?}, which is not a floating-point type")]
    Fill { dtype: TensorType },
}

/// A 128-byte tensor map, to be passed by value as a kernel parameter of alignment 64 or stored in global memory.
///
/// The encoding is this crate's own: the hardware's is not documented, and kernels must not look inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(align(64))]
pub struct TensorMap([u8; 128]);

/// What a map says, as the executor uses it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tiled {
    pub dtype: TensorType,
    pub address: u64,
    pub interleave: Interleave,
    pub swizzle: Swizzle,
    pub fill: OobFill,
    pub dims: Vec<u64>,
    /// Of every dimension, the element's own included.
    pub strides: Vec<u64>,
    pub boxes: Vec<u32>,
    pub element_strides: Vec<u32>,
}

const MAGIC: &[u8; 8] = b"tiled\0\0\x01";

impl TensorMap {
    /// As `cuTensorMapEncodeTiled`. `strides` has one entry less than the others: dimension 0 is contiguous.
    ///
    /// # Errors
    /// [`TensorMapError`] for the first argument that the driver's documentation forbids.
    #[allow(clippy::too_many_arguments, reason = "the driver's own list")]
    pub fn encode_tiled(
        dtype: TensorType,
        rank: u32,
        address: u64,
        dims: &[u64],
        strides: &[u64],
        boxes: &[u32],
        element_strides: &[u32],
        interleave: Interleave,
        swizzle: Swizzle,
        l2_promotion: L2Promotion,
        oob_fill: OobFill,
    ) -> Result<TensorMap, TensorMapError> {
        let least = if interleave == Interleave::None { 1 } else { 3 };
        if !(least..=5).contains(&rank) {
            return Err(TensorMapError::Rank { rank, least });
        }
        let rank = rank as usize;
        for (argument, got, expected) in [
            ("sizes", dims.len(), rank),
            ("strides", strides.len(), rank - 1),
            ("box sizes", boxes.len(), rank),
            ("element strides", element_strides.len(), rank),
        ] {
            if got != expected {
                return Err(TensorMapError::Length { argument, got, expected });
            }
        }
        check_tensor(address, dims, strides, interleave)?;
        check_box(dtype, boxes, element_strides, interleave, swizzle)?;
        if oob_fill == OobFill::Nans && !dtype.is_float() {
            return Err(TensorMapError::Fill { dtype });
        }
        let mut map = [0; 128];
        map[..8].copy_from_slice(MAGIC);
        let index = TYPES.iter().position(|ty| *ty == dtype).unwrap_or(0);
        map[8..14].copy_from_slice(&[
            index as u8,
            rank as u8,
            interleave as u8,
            swizzle as u8,
            l2_promotion as u8,
            oob_fill as u8,
        ]);
        map[16..24].copy_from_slice(&address.to_le_bytes());
        for (i, size) in dims.iter().enumerate() {
            map[24 + 8 * i..32 + 8 * i].copy_from_slice(&size.to_le_bytes());
            map[96 + 2 * i..98 + 2 * i].copy_from_slice(&(boxes[i] as u16).to_le_bytes());
            // The first is ignored without interleave.
            let ignored = i == 0 && interleave == Interleave::None;
            map[106 + i] = if ignored { 1 } else { element_strides[i] as u8 };
        }
        for (i, stride) in strides.iter().enumerate() {
            map[64 + 8 * i..72 + 8 * i].copy_from_slice(&stride.to_le_bytes());
        }
        Ok(TensorMap(map))
    }

    /// The bytes to put among a kernel's parameters or in memory.
    pub fn as_bytes(&self) -> &[u8; 128] {
        &self.0
    }
}

/// Base, sizes and strides of the tensor in global memory.
fn check_tensor(address: u64, dims: &[u64], strides: &[u64], interleave: Interleave) -> Result<(), TensorMapError> {
    let multiple = if interleave == Interleave::Bytes32 { 32 } else { 16 };
    if !address.is_multiple_of(multiple) {
        return Err(TensorMapError::Address { address, multiple });
    }
    for (dimension, &size) in dims.iter().enumerate() {
        if size == 0 || size > 1 << 32 {
            return Err(TensorMapError::Size { dimension, size });
        }
    }
    for (i, &stride) in strides.iter().enumerate() {
        let dimension = i + 1;
        if !stride.is_multiple_of(multiple) {
            return Err(TensorMapError::StrideMultiple { dimension, stride, multiple });
        }
        if stride >= 1 << 40 {
            return Err(TensorMapError::StrideTooLarge { dimension, stride });
        }
    }
    Ok(())
}

fn check_box(
    dtype: TensorType,
    boxes: &[u32],
    element_strides: &[u32],
    interleave: Interleave,
    swizzle: Swizzle,
) -> Result<(), TensorMapError> {
    for (dimension, &size) in boxes.iter().enumerate() {
        if !(1..=256).contains(&size) {
            return Err(TensorMapError::Box { dimension, size });
        }
    }
    for (dimension, &stride) in element_strides.iter().enumerate() {
        let ignored = dimension == 0 && interleave == Interleave::None;
        if !ignored && !(1..=8).contains(&stride) {
            return Err(TensorMapError::ElementStride { dimension, stride });
        }
    }
    if interleave == Interleave::Bytes32 && swizzle != Swizzle::Bytes32 {
        return Err(TensorMapError::InterleaveSwizzle { swizzle });
    }
    if interleave == Interleave::None {
        let bytes = boxes[0] * dtype.bytes();
        if !bytes.is_multiple_of(16) {
            return Err(TensorMapError::InnerBoxMultiple { bytes });
        }
        if swizzle != Swizzle::None && bytes > swizzle.span() {
            return Err(TensorMapError::InnerBoxSpan { bytes, span: swizzle.span() });
        }
    }
    Ok(())
}

impl Tiled {
    /// Reads a map; `None` when the bytes are none.
    pub fn decode(map: &[u8; 128]) -> Option<Tiled> {
        let dtype = *TYPES.get(usize::from(map[8]))?;
        let rank = usize::from(map[9]);
        if &map[..8] != MAGIC || !(1..=5).contains(&rank) {
            return None;
        }
        let long = |at: usize| map[at..at + 8].iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
        let map = Tiled {
            dtype,
            address: long(16),
            interleave: [Interleave::None, Interleave::Bytes16, Interleave::Bytes32]
                .get(usize::from(map[10]))
                .copied()?,
            swizzle: *[Swizzle::None, Swizzle::Bytes32, Swizzle::Bytes64, Swizzle::Bytes128]
                .get(usize::from(map[11]))?,
            fill: if map[13] == 0 { OobFill::Zeros } else { OobFill::Nans },
            dims: (0..rank).map(|i| long(24 + 8 * i)).collect(),
            strides: (0..rank).map(|i| if i == 0 { u64::from(dtype.bytes()) } else { long(56 + 8 * i) }).collect(),
            boxes: (0..rank).map(|i| u32::from(map[96 + 2 * i]) | u32::from(map[97 + 2 * i]) << 8).collect(),
            element_strides: map[106..106 + rank].iter().map(|&stride| u32::from(stride).max(1)).collect(),
        };
        // A kernel can write any bytes.
        check_tensor(map.address, &map.dims, &map.strides[1..], map.interleave).ok()?;
        check_box(dtype, &map.boxes, &map.element_strides, map.interleave, map.swizzle).ok()?;
        Some(map)
    }
}
