//! `cvt` with directions, flushing, saturation to finite numbers, and the formats of 8 and 19 bits.

use super::math::{round, take, take_with};
use super::{Decoder, Result, scalar};
use crate::isa::*;

impl Decoder<'_> {
    /// `cvt` beyond what [`cvt`](Self::cvt) has: directions, flushing, `.satfinite`, formats of 8 and 19 bits.
    pub(super) fn convert(&self, mut rest: &[&str]) -> Result<Option<Op>> {
        let away = take(&mut rest, "rna");
        let rounding = if away { Some(Round::Rn) } else { take_with(&mut rest, round) };
        let integral =
            if rounding.is_none() { take_with(&mut rest, |word| word.strip_suffix('i').and_then(round)) } else { None };
        let ftz = take(&mut rest, "ftz");
        let sat = take(&mut rest, "sat");
        let relu_first = take(&mut rest, "relu");
        let finite = take(&mut rest, "satfinite");
        // With the 8-bit formats `.relu` stands behind `.satfinite`.
        let relu_last = finite && !relu_first && take(&mut rest, "relu");
        let relu = relu_first || relu_last;
        let eight_bits = rest.iter().any(|ty| matches!(*ty, "e4m3x2" | "e5m2x2"));
        if (relu_last && !eight_bits) || (relu_first && finite && eight_bits) {
            return Ok(None);
        }
        let [to, from] = *rest else { return Ok(None) };
        let direction = rounding.unwrap_or(Round::Rz);
        let narrow = |to, from, pair| Math::Narrow { to, from, pair, round: direction, away, relu, finite, ftz, sat };
        let none = integral.is_none() && !sat;
        match (to, from) {
            ("e4m3x2" | "e5m2x2", "f32" | "f16x2")
                if rounding == Some(Round::Rn) && finite && none && !away && !ftz =>
            {
                let to = if to == "e4m3x2" { Small::E4m3 } else { Small::E5m2 };
                if from == "f32" {
                    self.same(narrow(to, Ty::F32, true), Ty::F32, 2)
                } else {
                    self.same(narrow(to, Ty::F16x2, false), Ty::B(32), 1)
                }
            }
            ("f16x2", "e4m3x2" | "e5m2x2") if rounding == Some(Round::Rn) && none && !finite && !ftz && !away => {
                let from = if from == "e4m3x2" { Small::E4m3 } else { Small::E5m2 };
                self.same(Math::Widen { from, relu }, Ty::B(16), 1)
            }
            // "rna", or from sm_90 on "rn" and "rz" with ".relu".
            ("tf32", "f32") if matches!(rounding, Some(Round::Rn | Round::Rz)) && none && !ftz && !(away && relu) => {
                self.same(narrow(Small::Tf32, Ty::F32, false), Ty::F32, 1)
            }
            ("f16" | "bf16", "f32") if matches!(rounding, Some(Round::Rn | Round::Rz)) && none && !away && !ftz => {
                if rounding == Some(Round::Rn) && !finite && !relu {
                    return Ok(None);
                }
                let to = if to == "f16" { Small::F16 } else { Small::Bf16 };
                self.same(narrow(to, Ty::F32, false), Ty::F32, 1)
            }
            ("f16x2" | "bf16x2", "f32") if matches!(rounding, Some(Round::Rn | Round::Rz)) && none && !away && !ftz => {
                if rounding == Some(Round::Rn) && !finite {
                    return Ok(None);
                }
                let to = if to == "f16x2" { Small::F16 } else { Small::Bf16 };
                self.same(narrow(to, Ty::F32, true), Ty::F32, 2)
            }
            _ if relu || finite || away => Ok(None),
            _ => self.convert_scalar((to, from), rounding, integral, (ftz, sat)),
        }
    }

    fn convert_scalar(
        &self,
        (to, from): (&str, &str),
        rounding: Option<Round>,
        integral: Option<Round>,
        (ftz, sat): (bool, bool),
    ) -> Result<Option<Op>> {
        let (Some(to), Some(from)) = (scalar(to), scalar(from)) else { return Ok(None) };
        if matches!(to, Ty::B(_)) || matches!(from, Ty::B(_)) {
            return Ok(None);
        }
        if [to, from].iter().any(|ty| matches!(ty, Ty::F16x2 | Ty::Bf16x2)) {
            return Ok(None);
        }
        let is_float = |ty| matches!(ty, Ty::F16 | Ty::Bf16 | Ty::F32 | Ty::F64);
        match (to, from) {
            // To f16 and bf16 with a direction.
            (Ty::F16 | Ty::Bf16, Ty::F32 | Ty::F64) if rounding.is_some_and(|r| r != Round::Rn) || ftz => {
                if to == Ty::Bf16 || (ftz && from == Ty::F64) {
                    return Ok(None);
                }
                let Some(round) = rounding else { return Ok(None) };
                let op = Math::Narrow {
                    to: Small::F16,
                    from,
                    pair: false,
                    round,
                    away: false,
                    relu: false,
                    finite: false,
                    ftz,
                    sat,
                };
                self.same(op, from, 1)
            }
            (Ty::F32, Ty::F64) if ftz || rounding.is_some_and(|r| r != Round::Rn) => match rounding {
                Some(round) => self.same(Math::Demote { round, ftz, sat }, Ty::F64, 1),
                None => Ok(None),
            },
            (to, from) if is_float(to) && !is_float(from) => match rounding {
                Some(round) if round != Round::Rn && !ftz && to != Ty::Bf16 => {
                    self.same(Math::FromInt { to, from, round, sat }, from, 1)
                }
                _ => Ok(None),
            },
            _ if !ftz => Ok(None),
            // Flushing concerns the f32 side.
            (to, from) if to == Ty::F32 || from == Ty::F32 => {
                let widens = is_float(from) && is_float(to) && to != from;
                let legal = match (widens, is_float(to)) {
                    (true, _) => to.bits() > from.bits() && rounding.is_none() && integral.is_none(),
                    (_, true) => to == from && rounding.is_none(),
                    (_, false) => integral.is_some(),
                };
                if !legal {
                    return Ok(None);
                }
                let round = integral.unwrap_or(Round::Rz);
                self.same(Math::ConvertFlush { to, from, round, integer: integral.is_some(), sat }, from, 1)
            }
            _ => Ok(None),
        }
    }
}
