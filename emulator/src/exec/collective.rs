//! Instructions that all lanes of a warp execute together.

use std::borrow::Cow;

use super::{Context, Cta, Fault, Outcome};
use crate::alu;
use crate::clock::View;
use crate::isa::{Address, Dst, Pred, Shuffle, Space, Src, Ty, Vote};
use crate::report::Rule;
use crate::shadow::{Access, TOGETHER};

impl Cta {
    /// PTX ISA, "ldmatrix": lane 8 j + i gives the address of row i of matrix j; of each row, lane 4 i + t receives the
    /// elements 2t and 2t + 1, or with `.trans` those of column i.
    pub(super) fn ldmatrix(
        &mut self,
        context: &mut Context<'_>,
        warp: usize,
        pc: u32,
        (trans, space): (bool, Space),
        (d, address): (&[Dst], Address),
    ) -> Outcome<()> {
        let addresses = self.warps[warp].addresses(context, self, address);
        context.count_rows(pc, &addresses[..8 * d.len()]);
        let views = &self.warps[warp].views;
        // "… causes the executing thread to wait until all threads in the warp execute the same ldmatrix instruction before
        // resuming execution": what a lane writes next comes after what was read for the others.
        let (access, common) = (views.access(self.serial, pc, TOGETHER), views.common());
        for (matrix, d) in d.iter().enumerate() {
            let mut rows = [[0u16; 8]; 8];
            for (row, elements) in rows.iter_mut().enumerate() {
                let lane = matrix * 8 + row;
                let at = self.row_address("ldmatrix", space, addresses[lane], lane)?;
                let data = self.read_row(context, warp, (row, at), access, common.as_ref());
                let data = data.map_err(|fault| fault.lane(lane as u32))?;
                for (element, bytes) in elements.iter_mut().zip(data.as_chunks::<2>().0) {
                    *element = u16::from_le_bytes(*bytes);
                }
            }
            context.counters.shared_loaded += 128;
            let Some(d) = d else { continue };
            self.warps[warp].registers[*d as usize] = super::matrix::registers(&rows, trans);
        }
        Ok(())
    }

    /// The lanes that receive elements of a row (without `.trans`) count as those that read it, whoever named its address.
    #[inline]
    fn read_row(
        &mut self,
        context: &mut Context<'_>,
        warp: usize,
        (row, at): (usize, u64),
        access: Access,
        common: Option<&View>,
    ) -> Outcome<[u8; 16]> {
        let lanes = 0xf << (4 * row);
        if let Some(view) = common {
            return self.read_shared(context, at, 16, Access { lanes, ..access }, view);
        }
        let mut data = [0; 16];
        for lane in (0..32).filter(|lane| lanes >> lane & 1 != 0) {
            let view = self.warps[warp].views.view(lane);
            data = self.read_shared(context, at, 16, access.of_lane(lane), &view)?;
        }
        Ok(data)
    }

    pub(super) fn mma(
        &mut self,
        context: &mut Context<'_>,
        warp: usize,
        (k, ab): (u8, Ty),
        (d, a, b, c): (&[Dst; 4], &[Src], &[Src], &[Src; 4]),
    ) {
        context.counters.mma += 1;
        let state = &self.warps[warp];
        let read = |source: &Src| state.operand(context, self, *source);
        let (mut a_lanes, mut b_lanes) =
            ([const { Cow::Borrowed(&[0; 32]) }; 4], [const { Cow::Borrowed(&[0; 32]) }; 2]);
        a_lanes.iter_mut().zip(a).for_each(|(lanes, source)| *lanes = read(source));
        b_lanes.iter_mut().zip(b).for_each(|(lanes, source)| *lanes = read(source));
        let c = c.each_ref().map(read);
        let (a, b) = (a_lanes.each_ref().map(|a| &**a), b_lanes.each_ref().map(|b| &**b));
        let sums = alu::mma(k, ab, &a, &b, c.each_ref().map(|c| &**c));
        for (d, sum) in d.iter().zip(&sums) {
            self.warps[warp].put(*d, u32::MAX, sum);
        }
    }

    /// PTX ISA, "shfl.sync". Reading a lane that does not take part is undefined: an error here.
    pub(super) fn shuffle(
        &mut self,
        context: &Context<'_>,
        warp: usize,
        mask: u32,
        mode: Shuffle,
        (d, p, a, b, c): (Dst, Option<u16>, Src, Src, Src),
    ) -> Outcome<()> {
        let state = &self.warps[warp];
        let [a, b, c] = [a, b, c].map(|source| state.read(context, self, source));
        let (mut out, mut inside) = ([0; 32], 0u32);
        for lane in 0..32u64 {
            if mask >> lane & 1 == 0 {
                continue;
            }
            let (by, clamp, segment) = (b[lane as usize] & 31, c[lane as usize] & 31, c[lane as usize] >> 8 & 31);
            let first = lane & segment;
            let last = first | (clamp & !segment);
            let (from, valid) = match mode {
                Shuffle::Up => (lane.wrapping_sub(by), lane as i64 - by as i64 >= last as i64),
                Shuffle::Down => (lane + by, lane + by <= last),
                Shuffle::Bfly => (lane ^ by, lane ^ by <= last),
                Shuffle::Idx => (first | (by & !segment), first | (by & !segment) <= last),
            };
            let from = if valid { from } else { lane };
            if mask >> from & 1 == 0 {
                let message = format!("shfl reads lane {from}, which does not take part");
                return Err(Fault::new(Rule::Diverged, message).lane(lane as u32));
            }
            out[lane as usize] = a[from as usize];
            inside |= u32::from(valid) << lane;
        }
        let state = &mut self.warps[warp];
        state.put(d, mask, &out);
        if let Some(p) = p {
            state.put_predicate(p, mask, inside);
        }
        Ok(())
    }

    /// PTX ISA, "vote.sync": over the lanes that take part.
    pub(super) fn vote(&mut self, warp: usize, mask: u32, mode: Vote, (d, p, a): (Dst, Option<u16>, Pred)) {
        let state = &mut self.warps[warp];
        let votes = state.predicate(a) & mask;
        state.put(d, mask, &[u64::from(votes); 32]);
        let holds = match mode {
            Vote::All => votes == mask,
            Vote::Any => votes != 0,
            Vote::Uni => votes == mask || votes == 0,
            Vote::Ballot => false,
        };
        if let Some(p) = p {
            state.put_predicate(p, mask, if holds { u32::MAX } else { 0 });
        }
    }
}
