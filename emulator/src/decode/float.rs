//! Floating point and conversions.

use super::{Decoder, Result, float, scalar};
use crate::isa::*;

impl Decoder<'_> {
    /// PTX ISA, "Floating Point", "Half Precision Floating-Point" and "Data Movement: cvt".
    pub(super) fn float_arithmetic(&self, words: &[&str]) -> Result<Option<Op>> {
        // Other roundings than `.rn`, and `.ftz` and `.sat`, are not implemented.
        let plain: Vec<&str> = words.iter().copied().filter(|word| *word != "rn").collect();
        let (name, ty) = match *plain.as_slice() {
            ["cvt", ..] => return self.cvt(words),
            [name, ty] if float(ty).is_some() => (name, ty),
            ["min" | "max", "NaN", ty] if float(ty).is_some() => {
                let op = if words[0] == "min" { Binary::MinNan } else { Binary::MaxNan };
                return self.binary(op, self.float(ty)?);
            }
            _ => return Ok(None),
        };
        let ty = self.float(ty)?;
        let rounded = words.len() > 2;
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

    fn cvt(&self, words: &[&str]) -> Result<Option<Op>> {
        let (mut round, mut integer, mut sat, mut relu) = (None, false, false, false);
        let mut types = Vec::new();
        for word in &words[1..] {
            match *word {
                "rn" | "rni" => round = Some(Round::Rn),
                "rz" | "rzi" => round = Some(Round::Rz),
                "rm" | "rmi" => round = Some(Round::Rm),
                "rp" | "rpi" => round = Some(Round::Rp),
                "sat" => sat = true,
                "relu" => relu = true,
                other => match scalar(other) {
                    Some(ty) if !matches!(ty, Ty::B(_)) => types.push(ty),
                    _ => return self.unsupported(),
                },
            }
            integer |= matches!(*word, "rni" | "rzi" | "rmi" | "rpi");
        }
        let [to, from] = types[..] else { return self.unsupported() };
        if matches!(to, Ty::F16x2 | Ty::Bf16x2) {
            let [d, a, b] = self.operands()?;
            if from != Ty::F32 || round != Some(Round::Rn) || sat {
                return self.unsupported();
            }
            let (a, b) = (self.src(a, from)?, self.src(b, from)?);
            return Ok(Some(Op::CvtPack { to, relu, d: self.dst(d)?, a, b }));
        }
        let [d, a] = self.operands()?;
        let is_float = |ty: Ty| matches!(ty, Ty::F16 | Ty::Bf16 | Ty::F32 | Ty::F64);
        let narrows = is_float(to) && (!is_float(from) || to.bits() < from.bits());
        if from.bits() == 0 || relu || (narrows && round.is_none()) || (narrows && !matches!(round, Some(Round::Rn))) {
            return self.unsupported();
        }
        let round = round.unwrap_or(Round::Rz);
        Ok(Some(Op::Cvt { to, from, round, integer, sat, relu, d: self.dst(d)?, a: self.src(a, from)? }))
    }
}
