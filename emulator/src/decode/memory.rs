//! Loads, stores, atomics, fences, copies.

use super::{Decoder, Result, atomic, scalar, space};
use crate::isa::*;
use crate::parse::Operand;

impl Decoder<'_> {
    /// PTX ISA, "Data Movement", "Asynchronous copy", "Parallel Synchronization: atom, red, membar/fence".
    pub(super) fn memory(&self, words: &[&str]) -> Result<Option<Op>> {
        match *words {
            ["ld" | "ldu", ..] => self.load(&words[1..]),
            ["st", ..] => self.store(&words[1..]),
            ["atom", ..] => self.atom(&words[1..], true),
            ["red", ..] if !matches!(words.get(1), Some(&"async")) => self.atom(&words[1..], false),
            // "On sm_70 and higher membar is a synonym for fence.sc."
            ["membar", "cta"] => Ok(Some(Op::Fence { scope: Scope::Cta, order: Order::AcqRel, sc: true })),
            ["membar", "gl" | "sys"] => Ok(Some(Op::Fence { scope: Scope::Gpu, order: Order::AcqRel, sc: true })),
            ["fence", order @ ("acq_rel" | "sc" | "acquire" | "release"), scope] => {
                let scope = match scope {
                    "cta" => Scope::Cta,
                    "cluster" => Scope::Cluster,
                    "gpu" | "sys" => Scope::Gpu,
                    _ => return self.unsupported(),
                };
                let (order, sc) = match order {
                    "acquire" => (Order::Acquire, false),
                    "release" => (Order::Release, false),
                    order => (Order::AcqRel, order == "sc"),
                };
                Ok(Some(Op::Fence { scope, order, sc }))
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
            ["ldmatrix", "sync", "aligned", ref form @ ..] => {
                let (count, trans, space) = self.matrix_form(form)?;
                let [d, addr] = self.operands()?;
                let Operand::Vector(parts) = d else { return self.unsupported() };
                if parts.len() != count {
                    return self.unsupported();
                }
                let d = parts.iter().map(|part| self.dst(part)).collect::<Result<Vec<_>>>()?;
                Ok(Some(Op::Ldmatrix { trans, space, d, addr: self.address(addr)? }))
            }
            _ => Ok(None),
        }
    }

    fn cvta(&self, space: Option<Space>, to_space: bool) -> Result<Option<Op>> {
        let Some(space) = space.filter(|space| *space != Space::Param || !to_space) else { return self.unsupported() };
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
                "cluster" => sem.scope = Scope::Cluster,
                "gpu" | "sys" => sem.scope = Scope::Gpu,
                "nc" if load => {}
                "ca" | "cg" | "cs" | "lu" | "cv" if load => {}
                "wb" | "wt" | "cg" | "cs" if !load => {}
                "L1::evict_normal"
                | "L1::evict_unchanged"
                | "L1::evict_first"
                | "L1::evict_last"
                | "L1::no_allocate"
                | "L2::evict_normal"
                | "L2::evict_first"
                | "L2::evict_last"
                | "L2::64B"
                | "L2::128B"
                | "L2::256B"
                | "L2::cache_hint" => {}
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
        let (space, count, ty, sem, seen) = self.access(words, true)?;
        let [d, addr] = self.with_hint(&seen)?;
        let space = self.param_space(space, addr);
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
        let (space, count, ty, sem, seen) = self.access(words, false)?;
        let [addr, a] = self.with_hint(&seen)?;
        let space = self.param_space(space, addr);
        let a = match a {
            Operand::Vector(parts) if parts.len() == count => {
                parts.iter().map(|part| self.src(part, ty)).collect::<Result<Vec<_>>>()?
            }
            single if count == 1 => vec![self.src(single, ty)?],
            _ => return self.unsupported(),
        };
        if matches!(space, Space::Param | Space::Const) {
            return self.unsupported();
        }
        Ok(Some(Op::St { space, ty, addr: self.address(addr)?, a, sem }))
    }

    fn atom(&self, words: &[&str], returns: bool) -> Result<Option<Op>> {
        // PTX ISA, "atom": without a qualifier the order is relaxed and the scope is the GPU.
        let mut sem = Semantics { order: Order::Relaxed, scope: Scope::Gpu };
        let (mut in_space, mut op, mut ty, mut noftz) = (Space::Generic, None, None, false);
        for word in words {
            match *word {
                "relaxed" => {}
                "acquire" if returns => sem.order = Order::Acquire,
                "release" => sem.order = Order::Release,
                "acq_rel" if returns => sem.order = Order::AcqRel,
                "cta" => sem.scope = Scope::Cta,
                "cluster" => sem.scope = Scope::Cluster,
                "gpu" | "sys" => {}
                "noftz" => noftz = true,
                "L2::cache_hint" => {}
                other => match (space(other), atomic(other), scalar(other)) {
                    (Some(found @ (Space::Global | Space::Shared | Space::SharedCluster)), ..) => in_space = found,
                    (_, Some(found), _) if op.is_none() => op = Some(found),
                    (.., Some(found)) if ty.is_none() => ty = Some(found),
                    _ => return self.unsupported(),
                },
            }
        }
        let (Some(op), Some(ty)) = (op, ty) else { return self.unsupported() };
        let half = matches!(ty, Ty::F16 | Ty::F16x2 | Ty::Bf16 | Ty::Bf16x2);
        let legal = match op {
            Atomic::Add if half => noftz,
            _ if noftz => false,
            Atomic::Add => matches!(ty, Ty::U(32 | 64) | Ty::S(32) | Ty::F32 | Ty::F64),
            Atomic::Min | Atomic::Max => matches!(ty, Ty::U(32 | 64) | Ty::S(32 | 64)),
            Atomic::Inc | Atomic::Dec => ty == Ty::U(32),
            Atomic::And | Atomic::Or | Atomic::Xor => matches!(ty, Ty::B(32 | 64)),
            Atomic::Exch => matches!(ty, Ty::B(32 | 64)) && returns,
            Atomic::Cas => matches!(ty, Ty::B(16 | 32 | 64)) && returns,
        };
        let operands = self.without_hint(words)?;
        if !legal || operands.len() != usize::from(returns) + 2 + usize::from(op == Atomic::Cas) {
            return self.unsupported();
        }
        let (d, rest) = if returns { (self.dst(&operands[0])?, &operands[1..]) } else { (None, operands) };
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
            reduces: !returns,
        }))
    }

    /// The operands without the cache policy that `.L2::cache_hint` asks for: it changes nothing that a program can see.
    fn without_hint(&self, words: &[&str]) -> Result<&[Operand]> {
        match self.statement.operands.split_last() {
            Some((hint, rest)) if words.contains(&"L2::cache_hint") => {
                self.src(hint, Ty::U(64))?;
                Ok(rest)
            }
            _ => Ok(&self.statement.operands),
        }
    }

    fn with_hint(&self, words: &[&str]) -> Result<[&Operand; 2]> {
        match self.without_hint(words)? {
            [first, second] => Ok([first, second]),
            _ => self.unsupported(),
        }
    }

    /// `.param` memory of functions and calls is part of a thread's local memory here.
    fn param_space(&self, space: Space, address: &Operand) -> Space {
        match address {
            Operand::Address { base, .. } if space == Space::Param && self.names.in_frame(base.as_ref()) => {
                Space::Local
            }
            _ => space,
        }
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
}
