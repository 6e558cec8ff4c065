//! Floating point and conversions.

use super::math::{round, take, take_with};
use super::{Decoder, Result, float, scalar};
use crate::isa::*;

impl Decoder<'_> {
    /// PTX ISA, "Floating Point", "Half Precision Floating-Point" and "Data Movement: cvt".
    pub(super) fn float_arithmetic(&self, words: &[&str]) -> Result<Option<Op>> {
        // Other roundings than `.rn`, and `.ftz` and `.sat`, are in `math`.
        let mut rest = words.get(1..).unwrap_or_default();
        let rounded = take(&mut rest, "rn");
        let (name, ty) = match *rest {
            _ if words[0] == "cvt" => return self.cvt(words),
            [ty] if float(ty).is_some() => (words[0], ty),
            ["NaN", ty] if float(ty).is_some() && !rounded && matches!(words[0], "min" | "max") => {
                let op = if words[0] == "min" { Binary::MinNan } else { Binary::MaxNan };
                return self.binary(op, self.float(ty)?);
            }
            _ => return Ok(None),
        };
        let ty = self.float(ty)?;
        match name {
            "add" => self.binary(Binary::Add, ty),
            "sub" => self.binary(Binary::Sub, ty),
            "mul" => self.binary(Binary::MulLo, ty),
            "div" if rounded => self.binary(Binary::Div, ty),
            "fma" if rounded => self.ternary(Ternary::Fma, ty),
            "rcp" if rounded => self.unary(Unary::Rcp, ty),
            "sqrt" if rounded => self.unary(Unary::Sqrt, ty),
            "min" if !rounded => self.binary(Binary::Min, ty),
            "max" if !rounded => self.binary(Binary::Max, ty),
            "neg" if !rounded => self.unary(Unary::Neg, ty),
            "abs" if !rounded => self.unary(Unary::Abs, ty),
            _ => Ok(None),
        }
    }

    /// `cvt` of plain scalars, to nearest or to an integral value; `math` has the rest.
    fn cvt(&self, words: &[&str]) -> Result<Option<Op>> {
        let mut rest = words.get(1..).unwrap_or_default();
        let nearest = take(&mut rest, "rn");
        let integral = if nearest { None } else { take_with(&mut rest, |word| round(word.strip_suffix('i')?)) };
        let sat = take(&mut rest, "sat");
        let relu = take(&mut rest, "relu");
        let [to, from] = *rest else { return self.unsupported() };
        let (Some(to), Some(from)) = (scalar(to), scalar(from)) else { return self.unsupported() };
        if matches!(to, Ty::F16x2 | Ty::Bf16x2) {
            let [d, a, b] = self.operands()?;
            if from != Ty::F32 || !nearest || sat {
                return self.unsupported();
            }
            let (a, b) = (self.src(a, from)?, self.src(b, from)?);
            return Ok(Some(Op::CvtPack { to, relu, d: self.dst(d)?, a, b }));
        }
        let is_float = |ty: Ty| matches!(ty, Ty::F16 | Ty::Bf16 | Ty::F32 | Ty::F64);
        let narrows = to.bits() < from.bits() || (to != from && to.bits() == from.bits());
        let legal = match (is_float(to), is_float(from)) {
            (true, true) if narrows => nearest,
            // A number of the same type may become an integral one.
            (true, true) => !nearest && (integral.is_none() || to == from),
            (true, false) => nearest,
            (false, true) => integral.is_some(),
            (false, false) => !nearest && integral.is_none(),
        };
        if !legal || relu || matches!(to, Ty::B(_)) || matches!(from, Ty::B(_) | Ty::F16x2 | Ty::Bf16x2) {
            return self.unsupported();
        }
        let [d, a] = self.operands()?;
        let round = if nearest { Round::Rn } else { integral.unwrap_or(Round::Rz) };
        let (d, a) = (self.dst(d)?, self.src(a, from)?);
        Ok(Some(Op::Cvt { to, from, round, integer: integral.is_some(), sat, relu, d, a }))
    }
}
