//! Tensor copies: what a box of a tensor is made of. PTX ISA, "Tensors: tiled mode, out of bounds, swizzling".

use super::bulk::{Chunk, Plan};
use super::cluster::OFFSET;
use super::space::space_of;
use super::{Context, Cta, Fault, Outcome};
use crate::clock::Proxy;
use crate::decode::reducible;
use crate::isa::{Atomic, Bulk, Space, Ty};
use crate::report::Rule;
use crate::shadow::ASYNC;
use crate::tensormap::{Interleave, OobFill, Swizzle, TensorType, Tiled};

pub(super) fn wrong_rank(map: &Tiled, rank: usize) -> Fault {
    Fault::new(Rule::Trap, format!("{rank} coordinates for a tensor map of rank {}", map.dims.len()))
}

impl Cta {
    /// Reads a tensor map through its generic address.
    pub(super) fn tensor_map(
        &self,
        context: &mut Context<'_>,
        (warp, lane, pc): (usize, u32, u32),
        at: u64,
    ) -> Outcome<Tiled> {
        if !at.is_multiple_of(64) {
            return Err(Fault::new(Rule::Misaligned, format!("a tensor map at {at:#x}, expected a multiple of 64")));
        }
        let mut map = [0; 128];
        match space_of(at) {
            (Space::Param, offset) => {
                let found = context.launch.params.get(offset as usize..(offset as usize).saturating_add(128));
                let Some(found) = found else {
                    let message = format!("a tensor map of 128 bytes at offset {offset} of the parameters");
                    return Err(Fault::new(Rule::OutOfBounds, message));
                };
                map.copy_from_slice(found);
            }
            (Space::Global, _) => {
                // Through a proxy of its own: an access of the lane, but one that its own steps are not ordered before.
                let views = &self.warps[warp].views;
                let view = views.in_proxy(lane, Proxy::TensorMap, context.options.fence_reads);
                let access = views.access(self.serial, pc, ASYNC).of_lane(lane);
                for i in 0..8 {
                    let part = context.read_global(at.wrapping_add(16 * i as u64), 16, access, &view)?;
                    map[16 * i..16 * i + 16].copy_from_slice(&part);
                }
            }
            (space, _) => {
                let message = format!("a tensor map in {space:?} memory, expected parameters or global memory");
                return Err(Fault::new(Rule::Trap, message));
            }
        }
        match Tiled::decode(&map) {
            Some(tiled) => Ok(tiled),
            None => Err(Fault::new(Rule::Trap, format!("the 128 bytes at {at:#x} are not a tensor map"))),
        }
    }

    /// The pieces of a tensor copy: the box at `coords`, and its place in shared memory.
    pub(super) fn tensor_plan(
        &self,
        context: &mut Context<'_>,
        at: (usize, u32, u32),
        op: &Bulk,
        map: u64,
        (shared, coords): (u64, &[i64]),
    ) -> Outcome<Plan> {
        let map = self.tensor_map(context, at, map)?;
        if map.dims.len() != coords.len() {
            return Err(wrong_rank(&map, coords.len()));
        }
        let row_bytes = map.boxes[0] * map.dtype.bytes();
        if map.interleave != Interleave::None {
            return Err(Fault::new(Rule::Trap, format!("interleave {:?} is not implemented", map.interleave)));
        }
        if map.swizzle != Swizzle::None && row_bytes != map.swizzle.span() {
            // The documentation leaves open how such rows lie.
            let message = format!("rows of {row_bytes} bytes with swizzle {:?} are not implemented", map.swizzle);
            return Err(Fault::new(Rule::Trap, message));
        }
        let multiple = map.swizzle.alignment();
        if !shared.is_multiple_of(u64::from(multiple)) {
            let message = format!(
                "a tile at shared address {shared:#x}, expected a multiple of {multiple} for {:?}",
                map.swizzle
            );
            return Err(Fault::new(Rule::Misaligned, message));
        }
        let reduce = match op.reduce {
            Some((op, _)) => Some((op, element(op, map.dtype)?)),
            None => None,
        };
        let bytes = rows(&map).iter().map(|rows| u64::from(*rows)).product::<u64>() * u64::from(row_bytes);
        if bytes > OFFSET {
            return Err(Fault::new(
                Rule::OutOfBounds,
                format!("a box of {bytes} bytes, more than shared memory can hold"),
            ));
        }
        let chunks = chunks(&map, coords, shared as u32, op.to == Space::Global);
        Ok(Plan { chunks, fill: fill(&map), bytes: bytes as u32, reduce })
    }
}

/// The type that a reduction sees, for the types it exists for.
fn element(op: Atomic, dtype: TensorType) -> Outcome<Ty> {
    let bitwise = matches!(op, Atomic::And | Atomic::Or | Atomic::Xor);
    let ty = match dtype {
        TensorType::U32 | TensorType::I32 if bitwise => Ty::B(32),
        TensorType::U64 | TensorType::I64 if bitwise => Ty::B(64),
        TensorType::U32 => Ty::U(32),
        TensorType::I32 => Ty::S(32),
        TensorType::U64 => Ty::U(64),
        TensorType::I64 => Ty::S(64),
        TensorType::F16 => Ty::F16,
        TensorType::Bf16 => Ty::Bf16,
        TensorType::F32 => Ty::F32,
        TensorType::F64 => Ty::F64,
        _ => Ty::B(8),
    };
    if reducible(op, ty, op == Atomic::Add && matches!(ty, Ty::F16 | Ty::Bf16), false) {
        return Ok(ty);
    }
    Err(Fault::new(Rule::Trap, format!("there is no reduction {op:?} of {dtype:?}")))
}

fn fill(map: &Tiled) -> [u8; 16] {
    if map.fill == OobFill::Zeros {
        return [0; 16];
    }
    let each = map.dtype.bytes() as usize;
    std::array::from_fn(|i| if i % each == each - 1 { 0x7f } else { 0xff })
}

/// Elements that are copied along each dimension but the first.
fn rows(map: &Tiled) -> Vec<u32> {
    map.boxes.iter().zip(&map.element_strides).skip(1).map(|(size, stride)| size.div_ceil(*stride)).collect()
}

fn chunks(map: &Tiled, coords: &[i64], shared: u32, store: bool) -> Vec<Chunk> {
    let each = i64::from(map.dtype.bytes());
    let counts = rows(map);
    let row_bytes = i64::from(map.boxes[0]) * each;
    // The bytes of a row that lie inside the tensor, from the first of the box.
    let inside_from = (-coords[0]).clamp(0, i64::from(map.boxes[0])) * each;
    let inside_to = (map.dims[0] as i64 - coords[0]).clamp(0, i64::from(map.boxes[0])) * each;
    let mut out = Vec::new();
    for row in 0..counts.iter().product::<u32>() {
        let (mut rest, mut inside) = (row, true);
        let mut start = (map.address as i64).wrapping_add(coords[0] * each);
        for (i, count) in counts.iter().enumerate() {
            let at = coords[i + 1] + i64::from(rest % count * map.element_strides[i + 1]);
            rest /= count;
            inside &= at >= 0 && at < map.dims[i + 1] as i64;
            start = start.wrapping_add(at.wrapping_mul(map.strides[i + 1] as i64));
        }
        let (from, to) = if inside { (inside_from, inside_to) } else { (0, 0) };
        for unit in (0..row_bytes).step_by(16) {
            let place = u64::from(map.swizzle.apply(shared + row * row_bytes as u32 + unit as u32));
            // What lies before, in and behind the tensor.
            let bounds = [
                unit,
                from.clamp(unit, unit + 16),
                to.clamp(unit, unit + 16).max(from.clamp(unit, unit + 16)),
                unit + 16,
            ];
            for part in 0..3 {
                let (first, end) = (bounds[part], bounds[part + 1]);
                if first == end || (store && part != 1) {
                    continue;
                }
                let (global, local) = (start.wrapping_add(first) as u64, place + (first - unit) as u64);
                let bytes = (end - first) as u8;
                out.push(match (store, part) {
                    (true, _) => Chunk { from: Some(local), to: global, bytes },
                    (false, 1) => Chunk { from: Some(global), to: local, bytes },
                    _ => Chunk { from: None, to: local, bytes },
                });
            }
        }
    }
    out
}
