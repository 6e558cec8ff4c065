//! Arithmetic beyond the plain instructions: rounding modes, flushing, saturation, approximations, video and packed forms.

use super::{Compare, Round, Ty};

/// The modifiers of a floating-point instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mode {
    pub round: Round,
    /// Subnormal operands and results become zeros of their sign.
    pub ftz: bool,
    /// Clamped to [0, 1], NaN to +0.
    pub sat: bool,
    /// Negative results become 0, NaN stays.
    pub relu: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FloatOp {
    Add,
    Sub,
    Mul,
    Fma,
    Div,
    Rcp,
    Sqrt,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Approx {
    Div,
    DivFull,
    Rcp,
    Sqrt,
    Rsqrt,
    Sin,
    Cos,
    Lg2,
    Ex2,
    Tanh,
}

/// Formats that exist only as the result or the source of `cvt`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Small {
    E4m3,
    E5m2,
    Tf32,
    F16,
    Bf16,
}

/// What one instruction computes from its sources, lane by lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Math {
    Float(FloatOp, Ty, Mode),
    Approx(Approx, Ty, bool),
    MinMax {
        max: bool,
        ty: Ty,
        ftz: bool,
        nan: bool,
        xorsign: bool,
    },
    Neg(Ty),
    Abs(Ty),
    Copysign(Ty),
    /// `slct`: the third source is s32, or f32 (with `.ftz`).
    Select {
        float: bool,
        ftz: bool,
    },
    Mul24 {
        high: bool,
        signed: bool,
    },
    Mad24 {
        high: bool,
        signed: bool,
        sat: bool,
    },
    Sad(Ty),
    Dp4a {
        signed: [bool; 2],
    },
    Dp2a {
        high: bool,
        signed: [bool; 2],
    },
    Bfind {
        ty: Ty,
        shift: bool,
    },
    Fns,
    AddSat,
    SubSat,
    MadHiSat,
    /// `min`, `max` of s32 with `.relu`.
    MinMaxRelu {
        max: bool,
    },
    Packed16 {
        op: Packed,
        signed: bool,
        relu: bool,
    },
    Bmsk {
        wrap: bool,
    },
    Szext {
        wrap: bool,
        signed: bool,
    },
    /// Byte-wise |a - b|, unsigned; with `sum` their total added to c, else merged into the bytes.
    AbsDiff4 {
        sum: bool,
    },
    /// `prmt` with a mode.
    Prmt(PrmtMode),
    /// One value or two to a narrow format: `a` to the upper half.
    Narrow {
        to: Small,
        from: Ty,
        pair: bool,
        round: Round,
        away: bool,
        relu: bool,
        finite: bool,
        ftz: bool,
        sat: bool,
    },
    /// Two 8-bit numbers to f16x2.
    Widen {
        from: Small,
        relu: bool,
    },
    /// `cvt` with an f32 side that flushes.
    ConvertFlush {
        to: Ty,
        from: Ty,
        round: Round,
        integer: bool,
        sat: bool,
    },
    /// f64 to f32 with a direction.
    Demote {
        round: Round,
        ftz: bool,
        sat: bool,
    },
    /// An integer to a float with a direction.
    FromInt {
        to: Ty,
        from: Ty,
        round: Round,
        sat: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packed {
    Add,
    Min,
    Max,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PrmtMode {
    F4e,
    B4e,
    Rc8,
    Ecl,
    Ecr,
    Rc16,
}

/// What sets predicates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Test {
    /// With `.ftz`; of a packed type both halves, the lower one into the first predicate.
    Compare {
        cmp: Compare,
        ty: Ty,
        ftz: bool,
    },
    Class {
        class: Class,
        ty: Ty,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    Finite,
    Infinite,
    Number,
    NotANumber,
    Normal,
    Subnormal,
}

/// Additions, subtractions and multiply-adds that take or leave a carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Carry {
    Add,
    Sub,
    MadLo,
    MadHi,
}
