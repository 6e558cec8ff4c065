//! Statements to instructions. Every opcode and every modifier is listed here; what is not listed is an error.

mod operands;

use crate::isa::*;
use crate::parse::{Function, Operand, Source, Statement};
use crate::report::ParseError;
pub(crate) use operands::{LOCAL_BASE, Names, SHARED_BASE};

type Result<T> = std::result::Result<T, ParseError>;

/// Decodes the body of one kernel.
pub(crate) fn decode(function: &Function, source: &Source) -> Result<(Vec<Instruction>, Names)> {
    let names = Names::new(function, source)?;
    let mut code = Vec::with_capacity(function.body.len() + 1);
    for statement in &function.body {
        let decoder = Decoder { names: &names, statement };
        let guard = match &statement.guard {
            Some((name, negated)) => Some(Pred { slot: decoder.predicate(name)?, negated: *negated }),
            None => None,
        };
        let op = decoder.op()?;
        code.push(Instruction {
            op,
            guard,
            line: statement.line,
            location: statement.location,
            text: statement.text.clone().into(),
        });
    }
    // Falling off the end returns.
    let line = function.body.last().map_or(0, |statement| statement.line);
    code.push(Instruction { op: Op::Exit, guard: None, line, location: 0, text: "ret".into() });
    Ok((code, names))
}

pub(super) struct Decoder<'a> {
    names: &'a Names,
    statement: &'a Statement,
}

/// Types an integer instruction takes.
fn int(ty: &str) -> Option<Ty> {
    Some(match ty {
        "u16" => Ty::U(16),
        "u32" => Ty::U(32),
        "u64" => Ty::U(64),
        "s16" => Ty::S(16),
        "s32" => Ty::S(32),
        "s64" => Ty::S(64),
        _ => return None,
    })
}

fn bits(ty: &str) -> Option<Ty> {
    Some(match ty {
        "b8" => Ty::B(8),
        "b16" => Ty::B(16),
        "b32" => Ty::B(32),
        "b64" => Ty::B(64),
        _ => return None,
    })
}

fn float(ty: &str) -> Option<Ty> {
    Some(match ty {
        "f16" => Ty::F16,
        "bf16" => Ty::Bf16,
        "f16x2" => Ty::F16x2,
        "bf16x2" => Ty::Bf16x2,
        "f32" => Ty::F32,
        "f64" => Ty::F64,
        _ => return None,
    })
}

fn scalar(ty: &str) -> Option<Ty> {
    int(ty).or_else(|| bits(ty)).or_else(|| float(ty)).or(match ty {
        "u8" => Some(Ty::U(8)),
        "s8" => Some(Ty::S(8)),
        _ => None,
    })
}

fn compare(word: &str) -> Option<Compare> {
    Some(match word {
        "eq" => Compare::Eq,
        "ne" => Compare::Ne,
        "lt" | "lo" => Compare::Lt,
        "le" | "ls" => Compare::Le,
        "gt" | "hi" => Compare::Gt,
        "ge" | "hs" => Compare::Ge,
        "equ" => Compare::Equ,
        "neu" => Compare::Neu,
        "ltu" => Compare::Ltu,
        "leu" => Compare::Leu,
        "gtu" => Compare::Gtu,
        "geu" => Compare::Geu,
        "num" => Compare::Num,
        "nan" => Compare::Nan,
        _ => return None,
    })
}

fn logic(word: &str) -> Option<Logic> {
    Some(match word {
        "and" => Logic::And,
        "or" => Logic::Or,
        "xor" => Logic::Xor,
        _ => return None,
    })
}

fn atomic(word: &str) -> Option<Atomic> {
    Some(match word {
        "add" => Atomic::Add,
        "min" => Atomic::Min,
        "max" => Atomic::Max,
        "inc" => Atomic::Inc,
        "dec" => Atomic::Dec,
        "and" => Atomic::And,
        "or" => Atomic::Or,
        "xor" => Atomic::Xor,
        "exch" => Atomic::Exch,
        "cas" => Atomic::Cas,
        _ => return None,
    })
}

fn space(word: &str) -> Option<Space> {
    Some(match word {
        "global" => Space::Global,
        "shared" | "shared::cta" => Space::Shared,
        "local" => Space::Local,
        "param" => Space::Param,
        _ => return None,
    })
}

impl Decoder<'_> {
    pub(super) fn unsupported<T>(&self) -> Result<T> {
        self.fail(format!("`{}` is not implemented", self.statement.text))
    }

    pub(super) fn fail<T>(&self, message: String) -> Result<T> {
        Err(ParseError { line: self.statement.line, message })
    }

    fn op(&self) -> Result<Op> {
        let words: Vec<&str> = self.statement.opcode.split('.').collect();
        let op = match self.arithmetic(&words)? {
            Some(op) => Some(op),
            None => match self.float_arithmetic(&words)? {
                Some(op) => Some(op),
                None => match self.memory(&words)? {
                    Some(op) => Some(op),
                    None => self.control(&words)?,
                },
            },
        };
        op.filter(crate::alu::implemented).map_or_else(|| self.unsupported(), Ok)
    }

    fn unary(&self, op: Unary, ty: Ty) -> Result<Option<Op>> {
        let [d, a] = self.operands()?;
        Ok(Some(Op::Unary { op, ty, d: self.dst(d)?, a: self.src(a, ty)? }))
    }

    fn binary(&self, op: Binary, ty: Ty) -> Result<Option<Op>> {
        let [d, a, b] = self.operands()?;
        // Shift amounts are 32-bit whatever is shifted.
        let b_ty = if matches!(op, Binary::Shl | Binary::Shr) { Ty::U(32) } else { ty };
        Ok(Some(Op::Binary { op, ty, d: self.dst(d)?, a: self.src(a, ty)?, b: self.src(b, b_ty)? }))
    }

    fn ternary(&self, op: Ternary, ty: Ty) -> Result<Option<Op>> {
        let [d, a, b, c] = self.operands()?;
        let c_ty = match (op, ty) {
            (Ternary::MadWide, Ty::U(32)) => Ty::U(64),
            (Ternary::MadWide, Ty::S(32)) => Ty::S(64),
            (Ternary::MadWide, _) => Ty::U(32),
            _ => ty,
        };
        Ok(Some(Op::Ternary {
            op,
            ty,
            d: self.dst(d)?,
            a: self.src(a, ty)?,
            b: self.src(b, ty)?,
            c: self.src(c, c_ty)?,
        }))
    }

    /// PTX ISA, "Integer Arithmetic", "Logic and Shift", "Data Movement: mov", "Comparison and Selection".
    fn arithmetic(&self, words: &[&str]) -> Result<Option<Op>> {
        match *words {
            ["add", ty] if int(ty).is_some() => self.binary(Binary::Add, self.int(ty)?),
            ["sub", ty] if int(ty).is_some() => self.binary(Binary::Sub, self.int(ty)?),
            ["mul", "lo", ty] => self.binary(Binary::MulLo, self.int(ty)?),
            ["mul", "hi", ty] => self.binary(Binary::MulHi, self.int(ty)?),
            ["mul", "wide", ty @ ("u16" | "s16" | "u32" | "s32")] => self.binary(Binary::MulWide, self.int(ty)?),
            ["mad", "lo", ty] => self.ternary(Ternary::MadLo, self.int(ty)?),
            ["mad", "hi", ty] => self.ternary(Ternary::MadHi, self.int(ty)?),
            ["mad", "wide", ty @ ("u16" | "s16" | "u32" | "s32")] => self.ternary(Ternary::MadWide, self.int(ty)?),
            ["div", ty] => self.binary(Binary::Div, self.int(ty)?),
            ["rem", ty] => self.binary(Binary::Rem, self.int(ty)?),
            ["min", ty] if int(ty).is_some() => self.binary(Binary::Min, self.int(ty)?),
            ["max", ty] if int(ty).is_some() => self.binary(Binary::Max, self.int(ty)?),
            ["abs", ty @ ("s16" | "s32" | "s64")] => self.unary(Unary::Abs, self.int(ty)?),
            ["neg", ty @ ("s16" | "s32" | "s64")] => self.unary(Unary::Neg, self.int(ty)?),
            ["popc", ty @ ("b32" | "b64")] => self.unary(Unary::Popc, self.bits(ty)?),
            ["clz", ty @ ("b32" | "b64")] => self.unary(Unary::Clz, self.bits(ty)?),
            ["brev", ty @ ("b32" | "b64")] => self.unary(Unary::Brev, self.bits(ty)?),
            ["bfind", ty @ ("u32" | "u64")] => self.unary(Unary::Bfind, self.int(ty)?),
            ["bfe", ty @ ("u32" | "u64" | "s32" | "s64")] => {
                let [d, a, b, c] = self.operands()?;
                let ty = self.int(ty)?;
                let (b, c) = (self.src(b, Ty::U(32))?, self.src(c, Ty::U(32))?);
                Ok(Some(Op::Ternary { op: Ternary::Bfe, ty, d: self.dst(d)?, a: self.src(a, ty)?, b, c }))
            }
            ["bfi", ty @ ("b32" | "b64")] => {
                let [d, a, b, pos, len] = self.operands()?;
                let ty = self.bits(ty)?;
                let (pos, len) = (self.src(pos, Ty::U(32))?, self.src(len, Ty::U(32))?);
                Ok(Some(Op::Bfi { ty, d: self.dst(d)?, a: self.src(a, ty)?, b: self.src(b, ty)?, pos, len }))
            }
            ["prmt", "b32"] => self.ternary(Ternary::Prmt, Ty::B(32)),
            ["lop3", "b32"] => {
                let [d, a, b, c, table] = self.operands()?;
                let Operand::Literal(table) = table else { return self.unsupported() };
                let source = |operand| self.src(operand, Ty::B(32));
                let (a, b, c) = (source(a)?, source(b)?, source(c)?);
                Ok(Some(Op::Ternary { op: Ternary::Lop3(*table as u8), ty: Ty::B(32), d: self.dst(d)?, a, b, c }))
            }
            ["shf", direction @ ("l" | "r"), mode @ ("wrap" | "clamp"), "b32"] => {
                let wrap = mode == "wrap";
                let op = if direction == "l" { Ternary::ShfL { wrap } } else { Ternary::ShfR { wrap } };
                self.ternary(op, Ty::B(32))
            }
            ["and" | "or" | "xor" | "not", "pred"] => self.predicate_logic(words[0]),
            ["and", ty] => self.binary(Binary::And, self.bits(ty)?),
            ["or", ty] => self.binary(Binary::Or, self.bits(ty)?),
            ["xor", ty] => self.binary(Binary::Xor, self.bits(ty)?),
            ["not", ty] => self.unary(Unary::Not, self.bits(ty)?),
            ["cnot", ty] => self.unary(Unary::Cnot, self.bits(ty)?),
            ["shl", ty] => self.binary(Binary::Shl, self.bits(ty)?),
            ["shr", ty] => match int(ty).or_else(|| bits(ty)) {
                Some(ty) => self.binary(Binary::Shr, ty),
                None => self.unsupported(),
            },
            ["mov", ty] => self.mov(ty),
            ["setp", cmp, ty] => self.setp(cmp, None, ty),
            ["setp", cmp, combine, ty] if logic(combine).is_some() => self.setp(cmp, logic(combine), ty),
            ["selp", ty] if scalar(ty).is_some_and(|ty| ty.bits() >= 16) => {
                let [d, a, b, p] = self.operands()?;
                let Some(ty) = scalar(ty) else { return self.unsupported() };
                Ok(Some(Op::Selp { d: self.dst(d)?, a: self.src(a, ty)?, b: self.src(b, ty)?, p: self.pred(p)? }))
            }
            _ => Ok(None),
        }
    }

    fn predicate_logic(&self, word: &str) -> Result<Option<Op>> {
        Ok(Some(match logic(word) {
            Some(op) => {
                let [p, a, b] = self.operands()?;
                Op::PredLogic { op, p: self.pred(p)?.slot, a: self.pred(a)?, b: self.pred(b)? }
            }
            None => {
                let [p, a] = self.operands()?;
                let a = self.pred(a)?;
                Op::PredMov { p: self.pred(p)?.slot, a: Pred { negated: !a.negated, ..a } }
            }
        }))
    }

    fn mov(&self, ty: &str) -> Result<Option<Op>> {
        let [d, a] = self.operands()?;
        if ty == "pred" {
            let p = self.pred(d)?.slot;
            return Ok(Some(match a {
                Operand::Literal(value) => Op::PredConst { p, value: *value != 0 },
                _ => Op::PredMov { p, a: self.pred(a)? },
            }));
        }
        let Some(ty) = scalar(ty).filter(|ty| ty.bits() >= 16) else { return self.unsupported() };
        match (d, a) {
            (Operand::Vector(parts), a) => {
                let parts = parts.iter().map(|part| self.dst(part)).collect::<Result<Vec<_>>>()?;
                let Some(part) = self.part(ty, parts.len()) else { return self.unsupported() };
                Ok(Some(Op::Unpack { part, parts, a: self.src(a, ty)? }))
            }
            (d, Operand::Vector(parts)) => {
                let Some(part) = self.part(ty, parts.len()) else { return self.unsupported() };
                let parts = parts.iter().map(|p| self.src(p, Ty::B(part))).collect::<Result<Vec<_>>>()?;
                Ok(Some(Op::Pack { part, d: self.dst(d)?, parts }))
            }
            _ => self.unary(Unary::Mov, ty),
        }
    }

    fn part(&self, ty: Ty, count: usize) -> Option<u8> {
        let part = ty.bits() as usize / count.max(1);
        (matches!(count, 2 | 4) && part * count == ty.bits() as usize && part >= 8).then_some(part as u8)
    }

    fn setp(&self, cmp: &str, combine: Option<Logic>, ty: &str) -> Result<Option<Op>> {
        let (Some(cmp), Some(ty)) = (compare(cmp), scalar(ty).filter(|ty| ty.bits() >= 16)) else {
            return self.unsupported();
        };
        let operands = &self.statement.operands;
        if operands.len() != 3 + usize::from(combine.is_some()) {
            return self.unsupported();
        }
        let (p, q) = match &operands[0] {
            Operand::Pair(p, q) => (self.predicate(p)?, Some(self.predicate(q)?)),
            other => (self.pred(other)?.slot, None),
        };
        let combine = match combine {
            Some(logic) => Some((logic, self.pred(&operands[3])?)),
            None => None,
        };
        Ok(Some(Op::Setp { cmp, ty, p, q, a: self.src(&operands[1], ty)?, b: self.src(&operands[2], ty)?, combine }))
    }

    /// PTX ISA, "Floating Point", "Half Precision Floating-Point" and "Data Movement: cvt".
    fn float_arithmetic(&self, words: &[&str]) -> Result<Option<Op>> {
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

    /// PTX ISA, "Data Movement", "Asynchronous copy", "Parallel Synchronization: atom, red, membar/fence".
    fn memory(&self, words: &[&str]) -> Result<Option<Op>> {
        match *words {
            ["ld" | "ldu", ..] => self.load(&words[1..]),
            ["st", ..] => self.store(&words[1..]),
            ["atom", ..] => self.atom(&words[1..], true),
            ["red", ..] if !matches!(words.get(1), Some(&"async")) => self.atom(&words[1..], false),
            ["membar", "cta"] | ["fence", "acq_rel" | "sc", "cta"] => Ok(Some(Op::Fence { scope: Scope::Cta })),
            ["membar", "gl" | "sys"] | ["fence", "acq_rel" | "sc", "gpu" | "sys" | "cluster"] => {
                Ok(Some(Op::Fence { scope: Scope::Gpu }))
            }
            ["cvta", space_word, "u64"] => self.cvta(space(space_word), false),
            ["cvta", "to", space_word, "u64"] => self.cvta(space(space_word), true),
            ["cp", "async", "ca" | "cg", "shared" | "shared::cta", "global", ref hints @ ..]
                if hints.iter().all(|hint| matches!(*hint, "L2::64B" | "L2::128B" | "L2::256B")) =>
            {
                self.cp_async(words[2] == "cg")
            }
            ["cp", "async", "commit_group"] => Ok(Some(Op::CpAsyncCommit)),
            ["cp", "async", "wait_all"] => Ok(Some(Op::CpAsyncWait { pending: None })),
            ["cp", "async", "wait_group"] => {
                let [pending] = self.operands()?;
                let Operand::Literal(pending) = pending else { return self.unsupported() };
                Ok(Some(Op::CpAsyncWait { pending: Some(*pending as u32) }))
            }
            ["ldmatrix", "sync", "aligned", "m8n8", count @ ("x1" | "x2" | "x4"), ref rest @ ..] => {
                let trans = match *rest {
                    ["shared" | "shared::cta", "b16"] => false,
                    ["trans", "shared" | "shared::cta", "b16"] => true,
                    _ => return self.unsupported(),
                };
                let [d, addr] = self.operands()?;
                let Operand::Vector(parts) = d else { return self.unsupported() };
                if parts.len() != usize::from(count.as_bytes()[1] - b'0') {
                    return self.unsupported();
                }
                let d = parts.iter().map(|part| self.dst(part)).collect::<Result<Vec<_>>>()?;
                Ok(Some(Op::Ldmatrix { trans, d, addr: self.address(addr)? }))
            }
            _ => Ok(None),
        }
    }

    fn cvta(&self, space: Option<Space>, to_space: bool) -> Result<Option<Op>> {
        let Some(space) = space.filter(|space| *space != Space::Param) else { return self.unsupported() };
        let [d, a] = self.operands()?;
        Ok(Some(Op::Cvta { space, to_space, d: self.dst(d)?, a: self.src(a, Ty::U(64))? }))
    }

    /// `[.weak|.volatile|.relaxed.scope|.acquire.scope|…][.space][.cache][.level][.vec].type`, each at most once.
    fn access<'w>(&self, words: &[&'w str], load: bool) -> Result<(Space, usize, Ty, Semantics, Vec<&'w str>)> {
        let mut sem = Semantics { order: Order::Weak, scope: Scope::Gpu };
        let (mut in_space, mut count, mut ty, mut seen) = (Space::Generic, 1, None, Vec::new());
        for word in words {
            match *word {
                "weak" => {}
                // PTX ISA, "Memory Consistency Model": volatile is relaxed with system scope.
                "volatile" | "relaxed" => sem.order = Order::Relaxed,
                "acquire" if load => sem.order = Order::Acquire,
                "release" if !load => sem.order = Order::Release,
                "cta" => sem.scope = Scope::Cta,
                "gpu" | "sys" | "cluster" => sem.scope = Scope::Gpu,
                "nc" if load => {}
                "ca" | "cg" | "cs" | "lu" | "cv" if load => {}
                "wb" | "wt" | "cg" | "cs" if !load => {}
                "L1::evict_normal" | "L1::evict_first" | "L1::evict_last" | "L1::no_allocate" | "L2::64B"
                | "L2::128B" | "L2::256B" => {}
                "v2" => count = 2,
                "v4" => count = 4,
                other => match (space(other), scalar(other)) {
                    (Some(found), _) => in_space = found,
                    (_, Some(found)) if ty.is_none() => ty = Some(found),
                    _ => return self.unsupported(),
                },
            }
            if seen.contains(word) {
                return self.unsupported();
            }
            seen.push(*word);
        }
        match ty {
            Some(ty) if ty.bits() as usize * count <= 128 => Ok((in_space, count, ty, sem, seen)),
            _ => self.unsupported(),
        }
    }

    fn load(&self, words: &[&str]) -> Result<Option<Op>> {
        let (space, count, ty, sem, _) = self.access(words, true)?;
        let [d, addr] = self.operands()?;
        let d = match d {
            Operand::Vector(parts) if parts.len() == count => {
                parts.iter().map(|part| self.dst(part)).collect::<Result<Vec<_>>>()?
            }
            single if count == 1 => vec![self.dst(single)?],
            _ => return self.unsupported(),
        };
        let to = self.register_bits(&self.statement.operands[0]);
        Ok(Some(Op::Ld { space, ty, to, d, addr: self.address(addr)?, sem }))
    }

    fn store(&self, words: &[&str]) -> Result<Option<Op>> {
        let (space, count, ty, sem, _) = self.access(words, false)?;
        let [addr, a] = self.operands()?;
        let a = match a {
            Operand::Vector(parts) if parts.len() == count => {
                parts.iter().map(|part| self.src(part, ty)).collect::<Result<Vec<_>>>()?
            }
            single if count == 1 => vec![self.src(single, ty)?],
            _ => return self.unsupported(),
        };
        if space == Space::Param {
            return self.unsupported();
        }
        Ok(Some(Op::St { space, ty, addr: self.address(addr)?, a, sem }))
    }

    fn atom(&self, words: &[&str], returns: bool) -> Result<Option<Op>> {
        // PTX ISA, "atom": without a qualifier the order is relaxed and the scope is the GPU.
        let mut sem = Semantics { order: Order::Relaxed, scope: Scope::Gpu };
        let (mut in_space, mut op, mut ty) = (Space::Generic, None, None);
        for word in words {
            match *word {
                "relaxed" => {}
                "acquire" if returns => sem.order = Order::Acquire,
                "release" => sem.order = Order::Release,
                "acq_rel" if returns => sem.order = Order::AcqRel,
                "cta" => sem.scope = Scope::Cta,
                "gpu" | "sys" | "cluster" => {}
                other => match (space(other), atomic(other), scalar(other)) {
                    (Some(found @ (Space::Global | Space::Shared)), ..) => in_space = found,
                    (_, Some(found), _) if op.is_none() => op = Some(found),
                    (.., Some(found)) if ty.is_none() => ty = Some(found),
                    _ => return self.unsupported(),
                },
            }
        }
        let (Some(op), Some(ty)) = (op, ty) else { return self.unsupported() };
        let legal = match op {
            Atomic::Add => matches!(ty, Ty::U(32 | 64) | Ty::S(32) | Ty::F32 | Ty::F64),
            Atomic::Min | Atomic::Max => matches!(ty, Ty::U(32 | 64) | Ty::S(32 | 64)),
            Atomic::Inc | Atomic::Dec => ty == Ty::U(32),
            Atomic::And | Atomic::Or | Atomic::Xor => matches!(ty, Ty::B(32 | 64)),
            Atomic::Exch | Atomic::Cas => matches!(ty, Ty::B(32 | 64)) && returns,
        };
        let operands = &self.statement.operands;
        if !legal || operands.len() != usize::from(returns) + 2 + usize::from(op == Atomic::Cas) {
            return self.unsupported();
        }
        let (d, rest) = if returns { (self.dst(&operands[0])?, &operands[1..]) } else { (None, &operands[..]) };
        let c = if op == Atomic::Cas { self.src(&rest[2], ty)? } else { Src::Imm(0) };
        Ok(Some(Op::Atom {
            space: in_space,
            op,
            ty,
            d,
            addr: self.address(&rest[0])?,
            b: self.src(&rest[1], ty)?,
            c,
            sem,
        }))
    }

    fn cp_async(&self, cg: bool) -> Result<Option<Op>> {
        let operands = &self.statement.operands;
        let (Some(Operand::Literal(bytes)), 3 | 4) = (operands.get(2), operands.len()) else {
            return self.unsupported();
        };
        // `.cg` exists for 16 bytes only.
        if !matches!((bytes, cg), (16, _) | (4 | 8, false)) {
            return self.fail(format!("cp.async of {bytes} bytes does not exist in `{}`", self.statement.text));
        }
        let valid = operands.get(3).map(|operand| self.src(operand, Ty::U(32))).transpose()?;
        let (dst, src) = (self.address(&operands[0])?, self.address(&operands[1])?);
        Ok(Some(Op::CpAsync { bytes: *bytes as u8, dst, src, valid }))
    }

    /// PTX ISA, "Control Flow", "Parallel Synchronization", "Warp Level Matrix Instructions".
    fn control(&self, words: &[&str]) -> Result<Option<Op>> {
        Ok(Some(match *words {
            ["bra"] | ["bra", "uni"] => {
                let [target] = self.operands()?;
                let Operand::Name(target) = target else { return self.unsupported() };
                Op::Bra { target: self.label(target)? }
            }
            ["ret"] | ["exit"] | ["ret", "uni"] => Op::Exit,
            ["trap"] => Op::Trap,
            ["nanosleep", "u32"] => Op::Nanosleep,
            ["bar" | "barrier", "sync"]
            | ["bar", "cta", "sync"]
            | ["barrier", "sync", "aligned"]
            | ["barrier", "cta", "sync"]
            | ["barrier", "cta", "sync", "aligned"] => self.bar(false)?,
            ["bar" | "barrier", "arrive"] | ["barrier", "arrive", "aligned"] => self.bar(true)?,
            ["bar", "warp", "sync"] => {
                let [mask] = self.operands()?;
                Op::WarpSync { mask: self.src(mask, Ty::U(32))? }
            }
            ["shfl", "sync", mode, "b32"] => {
                let mode = match mode {
                    "idx" => Shuffle::Idx,
                    "up" => Shuffle::Up,
                    "down" => Shuffle::Down,
                    "bfly" => Shuffle::Bfly,
                    _ => return self.unsupported(),
                };
                let [d, a, b, c, mask] = self.operands()?;
                let (d, p) = match d {
                    Operand::Pair(d, p) => (self.dst(&Operand::Name(d.clone()))?, Some(self.predicate(p)?)),
                    other => (self.dst(other)?, None),
                };
                let source = |operand| self.src(operand, Ty::U(32));
                Op::Shfl { mode, d, p, a: source(a)?, b: source(b)?, c: source(c)?, mask: source(mask)? }
            }
            ["vote", "sync", mode, ty] => {
                let mode = match (mode, ty) {
                    ("all", "pred") => Vote::All,
                    ("any", "pred") => Vote::Any,
                    ("uni", "pred") => Vote::Uni,
                    ("ballot", "b32") => Vote::Ballot,
                    _ => return self.unsupported(),
                };
                let [d, a, mask] = self.operands()?;
                let (a, mask) = (self.pred(a)?, self.src(mask, Ty::U(32))?);
                if mode == Vote::Ballot {
                    Op::VoteSync { mode, d: self.dst(d)?, p: None, a, mask }
                } else {
                    Op::VoteSync { mode, d: None, p: Some(self.pred(d)?.slot), a, mask }
                }
            }
            ["activemask", "b32"] => {
                let [d] = self.operands()?;
                Op::ActiveMask { d: self.dst(d)? }
            }
            ["mma", "sync", "aligned", shape, "row", "col", "f32", a @ ("f16" | "bf16"), b, "f32"] if a == b => {
                let k = match shape {
                    "m16n8k16" => 16,
                    "m16n8k8" => 8,
                    _ => return self.unsupported(),
                };
                let ab = self.float(a)?;
                let [d, a, b, c] = self.operands()?;
                let list = |operand: &Operand, count: usize, ty| match operand {
                    Operand::Vector(parts) if parts.len() == count => {
                        parts.iter().map(|part| self.src(part, ty)).collect::<Result<Vec<_>>>()
                    }
                    _ => self.unsupported(),
                };
                let Operand::Vector(parts) = d else { return self.unsupported() };
                let d = parts.iter().map(|part| self.dst(part)).collect::<Result<Vec<_>>>()?;
                let c = list(c, 4, Ty::F32)?;
                let (Ok(d), Ok(c)) = (<[Dst; 4]>::try_from(d), <[Src; 4]>::try_from(c)) else {
                    return self.unsupported();
                };
                let pairs = usize::from(k) / 4;
                Op::Mma { k, ab, d, a: list(a, pairs, Ty::B(32))?, b: list(b, pairs / 2, Ty::B(32))?, c }
            }
            _ => return Ok(None),
        }))
    }

    fn bar(&self, arrive: bool) -> Result<Op> {
        let operands = &self.statement.operands;
        let id = match operands.first() {
            Some(id) => self.src(id, Ty::U(32))?,
            None => return self.unsupported(),
        };
        let count = operands.get(1).map(|count| self.src(count, Ty::U(32))).transpose()?;
        if operands.len() > 2 || (arrive && count.is_none()) {
            return self.unsupported();
        }
        Ok(Op::Bar { id, count, arrive })
    }
}
