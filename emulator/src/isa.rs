//! Decoded instructions: what the executor sees. Names follow the PTX ISA.

mod hopper;
mod math;
mod operand;
mod warp;
mod warpgroup;

pub(crate) use hopper::*;
pub(crate) use math::*;
pub(crate) use operand::*;
pub(crate) use warp::*;
pub(crate) use warpgroup::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Binary {
    Add,
    Sub,
    MulLo,
    MulHi,
    MulWide,
    Div,
    Rem,
    Min,
    Max,
    MinNan,
    MaxNan,
    And,
    Or,
    Xor,
    Shl,
    Shr,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unary {
    Mov,
    Not,
    Cnot,
    Neg,
    Abs,
    Popc,
    Clz,
    Brev,
    Bfind,
    Rcp,
    Sqrt,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ternary {
    MadLo,
    MadHi,
    MadWide,
    Fma,
    Bfe,
    Prmt,
    ShfL { wrap: bool },
    ShfR { wrap: bool },
    Lop3(u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compare {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    /// Float comparisons that are true when an operand is NaN.
    Equ,
    Neu,
    Ltu,
    Leu,
    Gtu,
    Geu,
    Num,
    Nan,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Logic {
    And,
    Or,
    Xor,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Atomic {
    Add,
    Min,
    Max,
    Inc,
    Dec,
    And,
    Or,
    Xor,
    Exch,
    Cas,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Round {
    /// Nearest even.
    Rn,
    Rz,
    Rm,
    Rp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shuffle {
    Idx,
    Up,
    Down,
    Bfly,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vote {
    All,
    Any,
    Uni,
    Ballot,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Op {
    Unary {
        op: Unary,
        ty: Ty,
        d: Dst,
        a: Src,
    },
    Binary {
        op: Binary,
        ty: Ty,
        d: Dst,
        a: Src,
        b: Src,
    },
    Ternary {
        op: Ternary,
        ty: Ty,
        d: Dst,
        a: Src,
        b: Src,
        c: Src,
    },
    Bfi {
        ty: Ty,
        d: Dst,
        a: Src,
        b: Src,
        pos: Src,
        len: Src,
    },
    Cvt {
        to: Ty,
        from: Ty,
        round: Round,
        integer: bool,
        sat: bool,
        relu: bool,
        d: Dst,
        a: Src,
    },
    /// Two f32 to f16x2 or bf16x2: `a` to the upper half.
    CvtPack {
        to: Ty,
        relu: bool,
        d: Dst,
        a: Src,
        b: Src,
    },
    /// `mov d, {a, b, …}`: `part` bits each, first one lowest.
    Pack {
        part: u8,
        d: Dst,
        parts: Vec<Src>,
    },
    Unpack {
        part: u8,
        parts: Vec<Dst>,
        a: Src,
    },
    Setp {
        cmp: Compare,
        ty: Ty,
        p: u16,
        q: Option<u16>,
        a: Src,
        b: Src,
        combine: Option<(Logic, Pred)>,
    },
    Selp {
        d: Dst,
        a: Src,
        b: Src,
        p: Pred,
    },
    PredLogic {
        op: Logic,
        p: u16,
        a: Pred,
        b: Pred,
    },
    PredMov {
        p: u16,
        a: Pred,
    },
    PredConst {
        p: u16,
        value: bool,
    },
    /// `to`: bits of the destination registers, to which signed types extend.
    Ld {
        space: Space,
        ty: Ty,
        to: u8,
        d: Vec<Dst>,
        addr: Address,
        sem: Semantics,
    },
    St {
        space: Space,
        ty: Ty,
        addr: Address,
        a: Vec<Src>,
        sem: Semantics,
    },
    Atom {
        space: Space,
        op: Atomic,
        ty: Ty,
        d: Dst,
        addr: Address,
        b: Src,
        c: Src,
        sem: Semantics,
        /// `red`: what it reads begins no acquire pattern.
        reduces: bool,
    },
    Fence {
        scope: Scope,
        order: Order,
        /// `fence.sc`
        sc: bool,
    },
    /// Converts between a generic address and one of `space`.
    Cvta {
        space: Space,
        to_space: bool,
        d: Dst,
        a: Src,
    },
    CpAsync {
        bytes: u8,
        dst: Address,
        src: Address,
        valid: Option<Src>,
    },
    CpAsyncCommit,
    CpAsyncWait {
        pending: Option<u32>,
    },
    Ldmatrix {
        trans: bool,
        space: Space,
        d: Vec<Dst>,
        addr: Address,
    },
    Mma {
        k: u8,
        ab: Ty,
        d: [Dst; 4],
        a: Vec<Src>,
        b: Vec<Src>,
        c: [Src; 4],
    },
    Bar(Bar),
    Warp(WarpOp),
    Cache(Cache),
    WarpSync {
        mask: Src,
    },
    Shfl {
        mode: Shuffle,
        d: Dst,
        p: Option<u16>,
        a: Src,
        b: Src,
        c: Src,
        mask: Src,
    },
    VoteSync {
        mode: Vote,
        d: Dst,
        p: Option<u16>,
        a: Pred,
        mask: Src,
    },
    ActiveMask {
        d: Dst,
    },
    /// One of the functions of `alu::math`.
    Math {
        op: Math,
        d: Dst,
        a: Vec<Src>,
    },
    /// `setp` with `.ftz` or of a packed type, `testp`.
    Test {
        test: Test,
        p: u16,
        q: Option<u16>,
        a: [Src; 2],
        combine: Option<(Logic, Pred)>,
    },
    /// `set`: as `setp`, but all ones, or 1.0, to a register; of packed types a truth per half.
    Set {
        test: Test,
        to: Ty,
        d: Dst,
        a: [Src; 2],
        combine: Option<(Logic, Pred)>,
    },
    /// With the carry in and the carry out as predicates.
    Carry {
        op: Carry,
        ty: Ty,
        d: Dst,
        a: [Src; 3],
        carry: [Option<u16>; 2],
    },
    /// Copies the arguments and goes to a function; `link` is the register that holds where each lane returns to.
    Call {
        target: u32,
        link: u16,
        copies: Vec<Moved>,
    },
    /// The returned values of a call.
    CopyResults {
        copies: Vec<Moved>,
    },
    Return {
        link: u16,
    },
    BraIndexed {
        index: Src,
        targets: Vec<u32>,
    },
    /// `__assertfail(message, file, line, function, size)`: addresses of strings in `.param` memory.
    AssertFail {
        args: Vec<u32>,
    },
    /// Prefetches and the like: nothing that a program can see.
    Hint {
        a: Vec<Src>,
    },
    Warpgroup(Warpgroup),
    Bra {
        target: u32,
    },
    Exit,
    Trap,
    Nanosleep,
    Hopper(Box<Hopper>),
}

impl Op {
    /// All lanes of the warp must execute these together (`.sync.aligned`, or a barrier in the same phase).
    pub fn is_collective(&self) -> bool {
        matches!(
            self,
            Op::Ldmatrix { .. }
                | Op::Mma { .. }
                | Op::Bar(Bar { aligned: true, .. })
                | Op::Warp(_)
                | Op::WarpSync { .. }
                | Op::Shfl { .. }
                | Op::VoteSync { .. }
                | Op::Warpgroup(_)
        ) || matches!(self, Op::Hopper(op) if op.is_collective())
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Instruction {
    pub op: Op,
    pub guard: Option<Pred>,
    pub line: u32,
    pub location: u32,
    pub text: Box<str>,
}
