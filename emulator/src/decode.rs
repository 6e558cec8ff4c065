//! Statements to instructions. Every opcode and every modifier is listed here; what is not listed is an error.

mod arithmetic;
mod bulk;
mod call;
mod control;
mod convert;
mod float;
mod hopper;
mod math;
mod memory;
mod operands;
mod warp;
mod warpgroup;

use crate::isa::*;
use crate::parse::{Function, Statement};
use crate::report::ParseError;
pub(crate) use bulk::reducible;
pub(crate) use call::CallGraph;
pub(crate) use operands::{Frame, LOCAL_BASE, Layout, Names, SHARED_BASE};

type Result<T> = std::result::Result<T, ParseError>;

/// Decodes the body of a kernel or a function. Targets of branches are instructions of it, those of calls are not. All that
/// cannot be decoded is returned, in the order of the text.
pub(crate) fn decode(function: &Function, names: &mut Names) -> std::result::Result<Vec<Instruction>, Vec<ParseError>> {
    let mut errors = Vec::new();
    let starts = starts(function);
    names.set_labels(function, &starts);
    let names = &*names;
    let mut code = Vec::with_capacity(function.body.len() + 1);
    for statement in &function.body {
        match instructions(names, statement) {
            Ok(decoded) => code.extend(decoded),
            Err(error) => errors.push(error),
        }
    }
    if !errors.is_empty() {
        return Err(errors);
    }
    // Falling off the end returns.
    let line = function.body.last().map_or(function.line, |statement| statement.line);
    let op = names.link.map_or(Op::Exit, |link| Op::Return { link });
    code.push(Instruction { op, guard: None, line, location: 0, text: "ret".into() });
    Ok(code)
}

/// One instruction, or two for a call.
fn instructions(names: &Names, statement: &Statement) -> Result<impl Iterator<Item = Instruction>> {
    let decoder = Decoder { names, statement };
    let guard = match &statement.guard {
        Some((name, negated)) => Some(Pred { slot: decoder.predicate(name)?, negated: *negated }),
        None => None,
    };
    let first = decoder.op()?;
    let second = if is_call(statement) { Some(decoder.results_of_call()?) } else { None };
    let Statement { line, location, ref text, .. } = *statement;
    let instruction = move |op| Instruction { op, guard, line, location, text: text.clone().into() };
    Ok([Some(first), second].into_iter().flatten().map(instruction))
}

fn is_call(statement: &Statement) -> bool {
    matches!(statement.opcode.as_str(), "call" | "call.uni")
}

/// The first instruction of each statement, and how many there are: a call has two, all others one.
pub(crate) fn starts(function: &Function) -> Vec<u32> {
    let mut at = 0;
    let mut starts = Vec::with_capacity(function.body.len() + 1);
    for statement in &function.body {
        starts.push(at);
        at += if is_call(statement) { 2 } else { 1 };
    }
    starts.push(at);
    starts
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

/// `lo`, `ls`, `hi` and `hs` are for unsigned integers alone.
fn compare(word: &str, ty: &str) -> Option<Compare> {
    if matches!(word, "lo" | "ls" | "hi" | "hs") && !matches!(ty, "u16" | "u32" | "u64") {
        return None;
    }
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
        "shared::cluster" => Space::SharedCluster,
        "local" => Space::Local,
        "param" | "param::entry" | "param::func" => Space::Param,
        "const" => Space::Const,
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
        type Family<'a> = fn(&Decoder<'a>, &[&str]) -> Result<Option<Op>>;
        let families: [Family<'_>; 9] = [
            |decoder, words| decoder.call(words),
            |decoder, words| decoder.hopper(words),
            |decoder, words| decoder.math(words),
            |decoder, words| decoder.arithmetic(words),
            |decoder, words| decoder.float_arithmetic(words),
            |decoder, words| decoder.memory(words),
            |decoder, words| decoder.control(words),
            |decoder, words| decoder.warp(words),
            |decoder, words| decoder.warpgroup(words),
        ];
        for decode in families {
            if let Some(op) = decode(self, &words)? {
                return if crate::alu::implemented(&op) { Ok(op) } else { self.unsupported() };
            }
        }
        self.unsupported()
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
}
