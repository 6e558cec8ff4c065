//! Warp instructions on matrices in registers and shared memory, and those that combine the lanes' values.

use super::{Context, Cta, Fault, Outcome};
use crate::alu::{self, Lanes};
use crate::isa::{Address, Redux, Space, Src, Ty, WarpOp};
use crate::report::Rule;
use crate::shadow::WRITE;

impl Cta {
    pub(super) fn warp_op(
        &mut self,
        context: &mut Context<'_>,
        warp: usize,
        (pc, mask): (u32, u32),
        op: &WarpOp,
    ) -> Outcome<()> {
        let state = &self.warps[warp];
        let read = |source: &Src| state.read(context, self, *source);
        match op {
            WarpOp::Stmatrix { trans, space, addr, a } => {
                let a: Vec<Lanes> = a.iter().map(read).collect();
                return self.stmatrix(context, warp, pc, *trans, (&a, *space, *addr));
            }
            WarpOp::Movmatrix { d, a } => {
                let tile = tile(&read(a), false);
                self.warps[warp].put(*d, mask, &registers(&tile, true));
            }
            WarpOp::Elect { d, p, .. } => {
                // The ISA leaves the choice open, but the same mask must elect the same lane.
                let leader = mask.trailing_zeros();
                let state = &mut self.warps[warp];
                state.put(*d, mask, &[u64::from(leader); 32]);
                state.put_predicate(*p, mask, 1 << leader);
            }
            WarpOp::Match { all, d, p, a, .. } => {
                let (found, equal) = matches(&read(a), mask, *all);
                let state = &mut self.warps[warp];
                state.put(*d, mask, &found);
                if let Some(p) = p {
                    state.put_predicate(*p, mask, if equal { u32::MAX } else { 0 });
                }
            }
            WarpOp::Redux { op, ty, d, a, .. } => {
                let value = redux(*op, *ty, &read(a), mask);
                self.warps[warp].put(*d, mask, &[value; 32]);
            }
            WarpOp::MmaF16 { k, d, a, b, c } => {
                let (a, b): (Vec<Lanes>, Vec<Lanes>) = (a.iter().map(read).collect(), b.iter().map(read).collect());
                let (a, b): (Vec<&Lanes>, Vec<&Lanes>) = (a.iter().collect(), b.iter().collect());
                let sums = alu::mma_f16(*k, &a, &b, [&read(&c[0]), &read(&c[1])]);
                context.counters.mma += 1;
                for (d, sum) in d.iter().zip(&sums) {
                    self.warps[warp].put(*d, mask, sum);
                }
            }
        }
        Ok(())
    }

    /// The shared address of a matrix's row.
    pub(super) fn row_address(&self, what: &str, space: Space, address: u64, lane: usize) -> Outcome<u64> {
        let (space, at) = self.resolve(space, address).map_err(|fault| fault.lane(lane as u32))?;
        if space != Space::Shared {
            let message = format!("row of {what} at {address:#x}, which is not in shared memory");
            return Err(Fault::new(Rule::OutOfBounds, message).lane(lane as u32));
        }
        let at = self.own_shared(at).map_err(|fault| fault.lane(lane as u32))?;
        if !at.is_multiple_of(16) {
            let message = format!("row of {what} at {at:#x}, expected a multiple of 16");
            return Err(Fault::new(Rule::Misaligned, message).lane(lane as u32));
        }
        Ok(at)
    }

    /// PTX ISA, "stmatrix": `ldmatrix` in the other direction.
    fn stmatrix(
        &mut self,
        context: &mut Context<'_>,
        warp: usize,
        pc: u32,
        trans: bool,
        (a, space, address): (&[Lanes], Space, Address),
    ) -> Outcome<()> {
        let addresses = self.warps[warp].addresses(context, self, address);
        let access = self.warps[warp].views.access(self.serial, pc, WRITE);
        let mut rows = Vec::with_capacity(32);
        for (matrix, register) in a.iter().enumerate() {
            for (row, elements) in tile(register, trans).iter().enumerate() {
                let lane = matrix * 8 + row;
                let at = self.row_address("stmatrix", space, addresses[lane], lane)?;
                rows.push(at);
                let mut data = [0; 16];
                for (place, element) in data.as_chunks_mut::<2>().0.iter_mut().zip(elements) {
                    *place = element.to_le_bytes();
                }
                let view = self.warps[warp].views.view(lane as u32);
                let access = access.of_lane(lane as u32);
                self.write_shared(context, at, &data, access, &view).map_err(|fault| fault.lane(lane as u32))?;
            }
            context.counters.shared_stored += 128;
        }
        context.count_rows(pc, &rows);
        context.idle = 0;
        Ok(())
    }
}

/// The 8 x 8 matrix that a register's halves hold.
fn tile(register: &Lanes, trans: bool) -> [[u16; 8]; 8] {
    let mut tile = [[0; 8]; 8];
    for (lane, value) in register.iter().enumerate() {
        for half in 0..2 {
            let (row, column) = crate::layout::matrix(lane as u32, half, trans);
            tile[row as usize][column as usize] = (value >> (16 * half)) as u16;
        }
    }
    tile
}

/// The register that holds an 8 x 8 matrix.
pub(super) fn registers(tile: &[[u16; 8]; 8], trans: bool) -> Lanes {
    std::array::from_fn(|lane| {
        let half = |half: u32| {
            let (row, column) = crate::layout::matrix(lane as u32, half, trans);
            u64::from(tile[row as usize][column as usize])
        };
        half(0) | half(1) << 16
    })
}

/// PTX ISA, "match.sync": for each lane the lanes that hold the same value; with `all` every lane or none.
fn matches(a: &Lanes, mask: u32, all: bool) -> (Lanes, bool) {
    let same = |lane: usize| {
        let equal = (0..32).filter(|other| mask >> other & 1 != 0 && a[*other] == a[lane]);
        equal.fold(0u32, |found, other| found | 1 << other)
    };
    if all {
        let equal = same(mask.trailing_zeros() as usize) == mask;
        return ([if equal { u64::from(mask) } else { 0 }; 32], equal);
    }
    (std::array::from_fn(|lane| u64::from(same(lane))), false)
}

/// PTX ISA, "redux.sync"; a sum keeps its lower 32 bits.
fn redux(op: Redux, ty: Ty, a: &Lanes, mask: u32) -> u64 {
    let values = a.iter().enumerate().filter(|(lane, _)| mask >> lane & 1 != 0).map(|(_, value)| *value as u32);
    let signed = ty == Ty::S(32);
    let result = values.reduce(|x, y| match op {
        Redux::Add => x.wrapping_add(y),
        Redux::Min if signed => x.cast_signed().min(y.cast_signed()).cast_unsigned(),
        Redux::Max if signed => x.cast_signed().max(y.cast_signed()).cast_unsigned(),
        Redux::Min => x.min(y),
        Redux::Max => x.max(y),
        Redux::And => x & y,
        Redux::Or => x | y,
        Redux::Xor => x ^ y,
    });
    u64::from(result.unwrap_or_default())
}
