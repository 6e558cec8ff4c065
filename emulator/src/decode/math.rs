//! Arithmetic with modifiers: rounding, flushing, saturation, carries, approximations, video and packed forms.

use super::{Decoder, Result, compare, float, int, logic, scalar};
use crate::alu::float_mode_exists;
use crate::isa::*;
use crate::parse::Operand;

/// Whether an instruction reads or writes the carry flag.
pub(super) fn uses_carry(opcode: &str) -> bool {
    let mut words = opcode.split('.');
    matches!(words.next(), Some("addc" | "subc" | "madc")) || words.any(|word| word == "cc")
}

pub(super) fn round(word: &str) -> Option<Round> {
    Some(match word {
        "rn" => Round::Rn,
        "rz" => Round::Rz,
        "rm" => Round::Rm,
        "rp" => Round::Rp,
        _ => return None,
    })
}

/// Takes `word` from the front of `words` if it stands there.
pub(super) fn take(words: &mut &[&str], word: &str) -> bool {
    match words.split_first() {
        Some((first, rest)) if *first == word => {
            *words = rest;
            true
        }
        _ => false,
    }
}

/// Takes the first word if `f` knows it.
pub(super) fn take_with<T>(words: &mut &[&str], f: impl Fn(&str) -> Option<T>) -> Option<T> {
    let (first, rest) = words.split_first()?;
    let found = f(first)?;
    *words = rest;
    Some(found)
}

impl Decoder<'_> {
    pub(super) fn math(&self, words: &[&str]) -> Result<Option<Op>> {
        let Some((name, rest)) = words.split_first() else { return Ok(None) };
        if uses_carry(&self.statement.opcode) {
            return self.carry(words).map(Some);
        }
        match *name {
            "add" | "sub" | "mul" | "fma" | "mad" | "div" | "rcp" | "sqrt" => {
                let found = [self.rounded(name, rest)?, self.approximate(name, rest)?];
                found.into_iter().flatten().next().map_or_else(|| self.other(words), |op| Ok(Some(op)))
            }
            "rsqrt" | "sin" | "cos" | "lg2" | "ex2" | "tanh" => self.approximate(name, rest),
            "min" | "max" => self.min_max(*name == "max", rest),
            "cvt" => self.convert(rest),
            "setp" | "set" | "testp" => self.tests(name, rest),
            "prefetch" | "prefetchu" | "pmevent" | "createpolicy" => self.hints(words),
            _ => self.other(words),
        }
    }

    fn function(&self, op: Math, types: &[Ty]) -> Result<Op> {
        let operands = &self.statement.operands;
        if operands.len() != types.len() + 1 {
            let (found, expected) = (operands.len(), types.len() + 1);
            return self.fail(format!("`{}` has {found} operands, expected {expected}", self.statement.text));
        }
        let a = operands[1..].iter().zip(types).map(|(operand, ty)| self.src(operand, *ty)).collect::<Result<_>>()?;
        Ok(Op::Math { op, d: self.dst(&operands[0])?, a })
    }

    pub(super) fn same(&self, op: Math, ty: Ty, count: usize) -> Result<Option<Op>> {
        self.function(op, &vec![ty; count]).map(Some)
    }

    /// PTX ISA, "Floating Point Instructions", "Half Precision Floating Point Instructions", with modifiers. The plain forms
    /// (to nearest, nothing flushed or clamped) are left to `float_arithmetic`.
    fn rounded(&self, name: &str, mut rest: &[&str]) -> Result<Option<Op>> {
        let rounding = take_with(&mut rest, round);
        let ftz = take(&mut rest, "ftz");
        let sat = take(&mut rest, "sat");
        let relu = take(&mut rest, "relu");
        let [ty] = *rest else { return Ok(None) };
        let Some(ty) = float(ty) else { return Ok(None) };
        let mode = Mode { round: rounding.unwrap_or(Round::Rn), ftz, sat, relu };
        let needs_rounding = matches!(name, "fma" | "mad" | "div" | "rcp" | "sqrt");
        let op = match name {
            "add" => FloatOp::Add,
            "sub" => FloatOp::Sub,
            "mul" => FloatOp::Mul,
            "div" => FloatOp::Div,
            "rcp" => FloatOp::Rcp,
            "sqrt" => FloatOp::Sqrt,
            _ => FloatOp::Fma,
        };
        let plain = mode.round == Round::Rn && !ftz && !sat && !relu;
        if (needs_rounding && rounding.is_none()) || (plain && name != "mad") {
            return Ok(None);
        }
        // "mad.f32" and "mad.f64" are fma; there is none for the shorter types.
        if name == "mad" && !matches!(ty, Ty::F32 | Ty::F64) {
            return Ok(None);
        }
        if !float_mode_exists(op, ty, mode) {
            return Ok(None);
        }
        let count = match op {
            FloatOp::Fma => 3,
            FloatOp::Rcp | FloatOp::Sqrt => 1,
            _ => 2,
        };
        self.same(Math::Float(op, ty, mode), ty, count)
    }

    fn approximate(&self, name: &str, mut rest: &[&str]) -> Result<Option<Op>> {
        let full = name == "div" && take(&mut rest, "full");
        if !full && !take(&mut rest, "approx") {
            return Ok(None);
        }
        let ftz = take(&mut rest, "ftz");
        let [ty] = *rest else { return Ok(None) };
        let op = match name {
            "div" if full => Approx::DivFull,
            "div" => Approx::Div,
            "rcp" => Approx::Rcp,
            "sqrt" => Approx::Sqrt,
            "rsqrt" => Approx::Rsqrt,
            "sin" => Approx::Sin,
            "cos" => Approx::Cos,
            "lg2" => Approx::Lg2,
            "ex2" => Approx::Ex2,
            "tanh" => Approx::Tanh,
            _ => return Ok(None),
        };
        let ty = match (op, ty, ftz) {
            (Approx::Tanh, "f32" | "f16" | "f16x2" | "bf16" | "bf16x2", false)
            | (Approx::Ex2, "f16" | "f16x2", false)
            | (Approx::Ex2, "bf16" | "bf16x2", true)
            | (Approx::Rcp | Approx::Rsqrt, "f64", true) => self.float(ty)?,
            (Approx::Tanh, ..) => return Ok(None),
            (_, "f32", _) => Ty::F32,
            _ => return Ok(None),
        };
        let count = if matches!(op, Approx::Div | Approx::DivFull) { 2 } else { 1 };
        self.same(Math::Approx(op, ty, ftz), ty, count)
    }

    fn min_max(&self, max: bool, mut rest: &[&str]) -> Result<Option<Op>> {
        match *rest {
            ["relu", "s32"] => return self.same(Math::MinMaxRelu { max }, Ty::S(32), 2),
            ["u16x2" | "s16x2"] | ["relu", "s16x2"] => {
                let op = if max { Packed::Max } else { Packed::Min };
                let (signed, relu) = (rest[rest.len() - 1] == "s16x2", rest.len() == 2);
                return self.same(Math::Packed16 { op, signed, relu }, Ty::B(32), 2);
            }
            _ => {}
        }
        let ftz = take(&mut rest, "ftz");
        let nan = take(&mut rest, "NaN");
        let xorsign = take(&mut rest, "xorsign");
        if (xorsign && !take(&mut rest, "abs")) || !(ftz || xorsign) {
            return Ok(None);
        }
        let [ty] = *rest else { return Ok(None) };
        let Some(ty) = float(ty).filter(|ty| *ty != Ty::F64) else { return Ok(None) };
        if ftz && matches!(ty, Ty::Bf16 | Ty::Bf16x2) {
            return Ok(None);
        }
        self.same(Math::MinMax { max, ty, ftz, nan, xorsign }, ty, 2)
    }

    /// PTX ISA, "Extended-Precision Integer Arithmetic Instructions".
    fn carry(&self, words: &[&str]) -> Result<Op> {
        let (name, mut rest) = (words[0], &words[1..]);
        let high = match name {
            "mad" | "madc" if take(&mut rest, "hi") => true,
            "mad" | "madc" if take(&mut rest, "lo") => false,
            "mad" | "madc" => return self.unsupported(),
            _ => false,
        };
        let out = take(&mut rest, "cc");
        let (op, takes) = match name {
            "add" => (Carry::Add, false),
            "addc" => (Carry::Add, true),
            "sub" => (Carry::Sub, false),
            "subc" => (Carry::Sub, true),
            "mad" if high => (Carry::MadHi, false),
            "mad" => (Carry::MadLo, false),
            "madc" if high => (Carry::MadHi, true),
            "madc" => (Carry::MadLo, true),
            _ => return self.unsupported(),
        };
        let [ty @ ("u32" | "s32" | "u64" | "s64")] = *rest else { return self.unsupported() };
        let ty = self.int(ty)?;
        let sources = match op {
            Carry::Add | Carry::Sub => {
                let [_, a, b] = self.operands()?;
                [self.src(a, ty)?, self.src(b, ty)?, Src::Imm(0)]
            }
            _ => {
                let [_, a, b, c] = self.operands()?;
                [self.src(a, ty)?, self.src(b, ty)?, self.src(c, ty)?]
            }
        };
        let flag = self.names.carry;
        let carry = [flag.filter(|_| takes), flag.filter(|_| out)];
        Ok(Op::Carry { op, ty, d: self.dst(&self.statement.operands[0])?, a: sources, carry })
    }

    /// PTX ISA, "Comparison and Selection Instructions", "Half Precision Comparison Instructions", "testp".
    fn tests(&self, name: &str, mut rest: &[&str]) -> Result<Option<Op>> {
        if name == "testp" {
            let class = take_with(&mut rest, |word| {
                Some(match word {
                    "finite" => Class::Finite,
                    "infinite" => Class::Infinite,
                    "number" => Class::Number,
                    "notanumber" => Class::NotANumber,
                    "normal" => Class::Normal,
                    "subnormal" => Class::Subnormal,
                    _ => return None,
                })
            });
            let (Some(class), [ty @ ("f32" | "f64")]) = (class, rest) else { return self.unsupported() };
            let [p, a] = self.operands()?;
            let ty = self.float(ty)?;
            let a = [self.src(a, ty)?, Src::Imm(0)];
            return Ok(Some(Op::Test {
                test: Test::Class { class, ty },
                p: self.pred(p)?.slot,
                q: None,
                a,
                combine: None,
            }));
        }
        let rest_type = rest.last().copied().unwrap_or_default();
        let Some(cmp) = take_with(&mut rest, |word| compare(word, rest_type)) else { return Ok(None) };
        let combine = take_with(&mut rest, logic);
        let ftz = take(&mut rest, "ftz");
        let (to, ty) = match (name, rest) {
            ("setp", [ty]) => (None, *ty),
            ("set", [to, ty]) => (Some(*to), *ty),
            _ => return Ok(None),
        };
        let Some(ty) = scalar(ty).filter(|ty| ty.bits() >= 16) else { return Ok(None) };
        let packed = matches!(ty, Ty::F16x2 | Ty::Bf16x2);
        if (ftz && !matches!(ty, Ty::F32 | Ty::F16 | Ty::F16x2)) || (to.is_none() && !ftz && !packed) {
            return Ok(None);
        }
        // What `setp` lacks for a type, `.ftz` does not bring.
        let plain = match ty {
            Ty::F16x2 => Ty::F16,
            Ty::Bf16x2 => Ty::Bf16,
            other => other,
        };
        let setp = Op::Setp { cmp, ty: plain, p: 0, q: None, a: Src::Imm(0), b: Src::Imm(0), combine: None };
        let operands = &self.statement.operands;
        if !crate::alu::implemented(&setp) || operands.len() != 3 + usize::from(combine.is_some()) {
            return self.unsupported();
        }
        let combine = match combine {
            Some(logic) => Some((logic, self.pred(&operands[3])?)),
            None => None,
        };
        let a = [self.src(&operands[1], ty)?, self.src(&operands[2], ty)?];
        let test = Test::Compare { cmp, ty, ftz };
        let Some(to) = to else {
            let (p, q) = match &operands[0] {
                Operand::Pair(p, q) => (self.predicate(p)?, Some(self.predicate(q)?)),
                other if !packed => (self.pred(other)?.slot, None),
                // Two comparisons have two results.
                _ => return self.unsupported(),
            };
            return Ok(Some(Op::Test { test, p, q, a, combine }));
        };
        let to = match (to, ty) {
            ("u32" | "s32", _) => Ty::U(32),
            ("f32", ty) if !packed && !matches!(ty, Ty::F16 | Ty::Bf16) => Ty::F32,
            ("f16", Ty::F16) | ("bf16", Ty::Bf16) | ("f16x2", Ty::F16x2) | ("bf16x2", Ty::Bf16x2) => ty,
            ("u16" | "s16", Ty::F16 | Ty::Bf16) => Ty::U(16),
            _ => return self.unsupported(),
        };
        Ok(Some(Op::Set { test, to, d: self.dst(&operands[0])?, a, combine }))
    }

    /// Prefetches, performance events and cache policies: nothing that a program can see, but their operands must exist.
    fn hints(&self, words: &[&str]) -> Result<Option<Op>> {
        let operands = &self.statement.operands;
        match *words {
            ["prefetch", "L1" | "L2"]
            | ["prefetch", "global" | "local", "L1" | "L2"]
            | ["prefetchu", "L1"]
            | ["prefetch", "global", "L2::evict_last" | "L2::evict_normal"] => {
                let [address] = self.operands()?;
                Ok(Some(Op::Hint { a: vec![self.address(address)?.base] }))
            }
            ["pmevent"] | ["pmevent", "mask"] => match operands[..] {
                [Operand::Literal(_)] => Ok(Some(Op::Hint { a: Vec::new() })),
                _ => self.unsupported(),
            },
            // An opaque value: the fraction, or 0.
            ["createpolicy", "fractional", ref hints @ .., "b64"]
                if hints.iter().all(|hint| {
                    matches!(*hint, "L2::evict_last" | "L2::evict_normal" | "L2::evict_first" | "L2::evict_unchanged")
                }) && (1..=2).contains(&hints.len()) =>
            {
                let (Some(d), 1 | 2) = (operands.first(), operands.len()) else { return self.unsupported() };
                let a = operands.get(1).map_or(Ok(Src::Imm(0)), |fraction| self.src(fraction, Ty::F32))?;
                Ok(Some(Op::Unary { op: Unary::Mov, ty: Ty::B(64), d: self.dst(d)?, a }))
            }
            _ => Ok(None),
        }
    }

    /// PTX ISA, "Integer Arithmetic Instructions", "Logic and Shift", "copysign", "slct", "Video Instructions".
    fn other(&self, words: &[&str]) -> Result<Option<Op>> {
        let signed = |ty: &str| ty.starts_with('s');
        let high = |word: &str| word == "hi";
        let op = match *words {
            ["neg" | "abs", "ftz", ty @ ("f32" | "f16" | "f16x2")] => {
                let ty = self.float(ty)?;
                let op = if words[0] == "neg" { Math::Neg(ty) } else { Math::Abs(ty) };
                return self.same(op, ty, 1);
            }
            ["copysign", ty @ ("f32" | "f64")] => {
                let ty = self.float(ty)?;
                return self.same(Math::Copysign(ty), ty, 2);
            }
            ["slct", ty, "s32"] => return self.select(ty, false, false),
            ["slct", ty, "f32"] => return self.select(ty, true, false),
            ["slct", "ftz", ty, "f32"] => return self.select(ty, true, true),
            ["add", "sat", "s32"] => return self.same(Math::AddSat, Ty::S(32), 2),
            ["sub", "sat", "s32"] => return self.same(Math::SubSat, Ty::S(32), 2),
            ["mad", "hi", "sat", "s32"] => Math::MadHiSat,
            ["add", "u16x2" | "s16x2"] => {
                let op = Math::Packed16 { op: Packed::Add, signed: false, relu: false };
                return self.same(op, Ty::B(32), 2);
            }
            ["mul24", half @ ("hi" | "lo"), ty @ ("u32" | "s32")] => {
                return self.same(Math::Mul24 { high: high(half), signed: signed(ty) }, self.int(ty)?, 2);
            }
            ["mad24", half @ ("hi" | "lo"), ty @ ("u32" | "s32")] => {
                Math::Mad24 { high: high(half), signed: signed(ty), sat: false }
            }
            ["mad24", "hi", "sat", "s32"] => Math::Mad24 { high: true, signed: true, sat: true },
            ["sad", ty] if int(ty).is_some() => {
                let ty = self.int(ty)?;
                return self.same(Math::Sad(ty), ty, 3);
            }
            ["dp4a", a @ ("u32" | "s32"), b @ ("u32" | "s32")] => Math::Dp4a { signed: [signed(a), signed(b)] },
            ["dp2a", half @ ("hi" | "lo"), a @ ("u32" | "s32"), b @ ("u32" | "s32")] => {
                Math::Dp2a { high: high(half), signed: [signed(a), signed(b)] }
            }
            ["bfind", ty] => return self.bfind(ty, false),
            ["bfind", "shiftamt", ty] => return self.bfind(ty, true),
            ["fns", "b32"] => Math::Fns,
            ["bmsk", mode @ ("clamp" | "wrap"), "b32"] => {
                return self.same(Math::Bmsk { wrap: mode == "wrap" }, Ty::U(32), 2);
            }
            ["szext", mode @ ("clamp" | "wrap"), ty @ ("u32" | "s32")] => {
                return self.same(Math::Szext { wrap: mode == "wrap", signed: signed(ty) }, Ty::U(32), 2);
            }
            ["vabsdiff4", "u32", "u32", "u32"] => Math::AbsDiff4 { sum: false },
            ["vabsdiff4", "u32", "u32", "u32", "add"] => Math::AbsDiff4 { sum: true },
            ["prmt", "b32", mode] => {
                let mode = match mode {
                    "f4e" => PrmtMode::F4e,
                    "b4e" => PrmtMode::B4e,
                    "rc8" => PrmtMode::Rc8,
                    "ecl" => PrmtMode::Ecl,
                    "ecr" => PrmtMode::Ecr,
                    "rc16" => PrmtMode::Rc16,
                    _ => return self.unsupported(),
                };
                Math::Prmt(mode)
            }
            _ => return Ok(None),
        };
        self.same(op, Ty::U(32), 3)
    }

    fn select(&self, ty: &str, float: bool, ftz: bool) -> Result<Option<Op>> {
        let Some(ty) = scalar(ty).filter(|ty| ty.bits() >= 16) else { return self.unsupported() };
        if matches!(ty, Ty::F16 | Ty::Bf16 | Ty::F16x2 | Ty::Bf16x2) {
            return self.unsupported();
        }
        self.function(Math::Select { float, ftz }, &[ty, ty, Ty::U(32)]).map(Some)
    }

    fn bfind(&self, ty: &str, shift: bool) -> Result<Option<Op>> {
        let ty = self.int(ty)?;
        if ty.bits() < 32 {
            return self.unsupported();
        }
        self.same(Math::Bfind { ty, shift }, ty, 1)
    }
}
