//! Clusters, mbarriers and proxy fences.

use super::{Decoder, Result, space};
use crate::isa::*;
use crate::parse::Operand;

impl Decoder<'_> {
    /// PTX ISA, "Data Movement: mapa, getctarank, isspacep", "Parallel Synchronization: barrier.cluster, mbarrier, fence".
    pub(super) fn hopper(&self, words: &[&str]) -> Result<Option<Op>> {
        let op = match *words {
            ["mapa", ref rest @ ..] => {
                let generic = self.cluster_address(rest)?;
                let [d, a, rank] = self.operands()?;
                let ty = if generic { Ty::U(64) } else { Ty::U(32) };
                Hopper::Mapa { generic, d: self.dst(d)?, a: self.src(a, ty)?, rank: self.src(rank, Ty::U(32))? }
            }
            ["getctarank", ref rest @ ..] => {
                let generic = self.cluster_address(rest)?;
                let [d, a] = self.operands()?;
                Hopper::CtaRank { generic, d: self.dst(d)?, a: self.src(a, Ty::U(64))? }
            }
            ["isspacep", word] => {
                let [p, a] = self.operands()?;
                let Some(space) = space(word) else { return self.unsupported() };
                Hopper::IsSpace { space, p: self.pred(p)?.slot, a: self.src(a, Ty::U(64))? }
            }
            ["mov", "pred"] if self.names_cluster_predicate() => {
                let [p, _] = self.operands()?;
                Hopper::IsExplicitCluster { p: self.pred(p)?.slot }
            }
            ["barrier", "cluster", "arrive", ref rest @ ..] => {
                let [] = self.operands()?;
                let (release, aligned) = match *rest {
                    [] | ["release"] => (true, false),
                    ["aligned"] | ["release", "aligned"] => (true, true),
                    ["relaxed"] => (false, false),
                    ["relaxed", "aligned"] => (false, true),
                    _ => return self.unsupported(),
                };
                Hopper::ClusterArrive { release, aligned }
            }
            ["barrier", "cluster", "wait", ref rest @ ..] => {
                let [] = self.operands()?;
                match *rest {
                    [] | ["acquire"] => Hopper::ClusterWait { aligned: false },
                    ["aligned"] | ["acquire", "aligned"] => Hopper::ClusterWait { aligned: true },
                    _ => return self.unsupported(),
                }
            }
            ["fence", "proxy" | "mbarrier_init", ref rest @ ..] => self.proxy_fence(rest)?,
            ["mbarrier", "pending_count", "b64"] => {
                let [d, a] = self.operands()?;
                Hopper::PendingCount { d: self.dst(d)?, a: self.src(a, Ty::B(64))? }
            }
            ["mbarrier", kind, ref rest @ ..] => self.mbarrier(kind, rest)?,
            ["cp", "async", "mbarrier", "arrive", ref rest @ ..] => self.copies_arrive(rest)?,
            ["cp", "async", "bulk", ref rest @ ..] => self.bulk(rest, false)?,
            ["cp", "reduce", "async", "bulk", ref rest @ ..] => self.bulk(rest, true)?,
            ["st", "async", ref rest @ ..] => self.store_async(rest)?,
            ["red", "async", ref rest @ ..] => self.reduce_async(rest)?,
            ["prefetch", "tensormap"] => {
                let [addr] = self.operands()?;
                let (what, addr) = (Prefetched::TensorMap, self.address(addr)?);
                Hopper::Prefetch { what, addr, coords: Vec::new(), bytes: Src::Imm(0) }
            }
            ["createpolicy", ref rest @ ..] => self.policy(rest)?,
            ["griddepcontrol", "wait" | "launch_dependents"] => {
                let [] = self.operands()?;
                Hopper::GridDependency
            }
            _ => return Ok(None),
        };
        Ok(Some(Op::Hopper(Box::new(op))))
    }

    fn names_cluster_predicate(&self) -> bool {
        matches!(self.statement.operands.get(1), Some(Operand::Name(name)) if name == "%is_explicit_cluster")
    }

    /// `{.shared::cluster}.u32|.u64`: whether the address is generic.
    fn cluster_address(&self, words: &[&str]) -> Result<bool> {
        match *words {
            ["shared::cluster", "u32" | "u64"] => Ok(false),
            ["u64"] => Ok(true),
            _ => self.unsupported(),
        }
    }

    fn proxy_fence(&self, words: &[&str]) -> Result<Hopper> {
        Ok(match *words {
            ["release", "cluster"] if self.statement.opcode.starts_with("fence.mbarrier_init") => {
                let [] = self.operands()?;
                Hopper::InitFence
            }
            ["async"] => Hopper::ProxyFence { shared: true, global: true },
            ["async", "global"] => Hopper::ProxyFence { shared: false, global: true },
            ["async", "shared::cta" | "shared::cluster"] => Hopper::ProxyFence { shared: true, global: false },
            ["tensormap::generic", order @ ("acquire" | "release"), scope] => {
                let scope = match scope {
                    "cta" => Scope::Cta,
                    "cluster" => Scope::Cluster,
                    "gpu" | "sys" => Scope::Gpu,
                    _ => return self.unsupported(),
                };
                let map = if order == "acquire" {
                    let [map, Operand::Literal(128)] = self.operands()? else { return self.unsupported() };
                    Some(self.address(map)?)
                } else {
                    let [] = self.operands()?;
                    None
                };
                Hopper::TensorMapFence { scope, map }
            }
            _ => return self.unsupported(),
        })
    }

    fn mbarrier(&self, kind: &str, words: &[&str]) -> Result<Hopper> {
        let mut words = words.iter().copied().peekable();
        let mut take = |word: &str| words.next_if(|next| *next == word).is_some();
        let kind = match kind {
            "init" => MbarrierKind::Init,
            "inval" => MbarrierKind::Inval,
            "arrive" | "arrive_drop" => {
                let (no_complete, expect) = (take("noComplete"), take("expect_tx"));
                if no_complete && expect {
                    return self.unsupported();
                }
                MbarrierKind::Arrive { drop: kind == "arrive_drop", no_complete, expect }
            }
            "expect_tx" => MbarrierKind::ExpectTx,
            "complete_tx" => MbarrierKind::CompleteTx,
            "test_wait" | "try_wait" => MbarrierKind::Test { parity: take("parity"), may_block: kind == "try_wait" },
            _ => return self.unsupported(),
        };
        // Arrivals release, tests acquire, unless they say otherwise; transactions are relaxed.
        let (strong, default) = match kind {
            MbarrierKind::Arrive { .. } => ("release", Order::Release),
            MbarrierKind::Test { .. } => ("acquire", Order::Acquire),
            _ => ("relaxed", Order::Relaxed),
        };
        let is_ordered = !matches!(kind, MbarrierKind::Init | MbarrierKind::Inval);
        let remote = matches!(kind, MbarrierKind::Arrive { no_complete: false, .. })
            || matches!(kind, MbarrierKind::ExpectTx | MbarrierKind::CompleteTx);
        // ptxas takes the space before the order as well.
        let (mut order, mut scope, mut space) = (None, None, None);
        while let Some(word) = words.next_if(|word| *word != "b64") {
            let once = match word {
                "relaxed" if is_ordered => order.replace(Order::Relaxed).is_none(),
                word if is_ordered && word == strong => order.replace(default).is_none(),
                "cta" if is_ordered => scope.replace(Scope::Cta).is_none(),
                "cluster" if is_ordered => scope.replace(Scope::Cluster).is_none(),
                "shared" | "shared::cta" => space.replace(Space::Shared).is_none(),
                "shared::cluster" if remote => space.replace(Space::SharedCluster).is_none(),
                _ => false,
            };
            if !once {
                return self.unsupported();
            }
        }
        // An order needs a scope.
        if words.next() != Some("b64") || words.next().is_some() || (order.is_some() && scope.is_none()) {
            return self.unsupported();
        }
        let (order, space) = (order.unwrap_or(default), space.unwrap_or(Space::Generic));
        self.mbarrier_operands(kind, space, order, scope)
    }

    fn mbarrier_operands(
        &self,
        kind: MbarrierKind,
        space: Space,
        order: Order,
        scope: Option<Scope>,
    ) -> Result<Hopper> {
        let operands: Vec<&Operand> = self.statement.operands.iter().collect();
        let count = |operand: &Operand| self.src(operand, Ty::U(32));
        let (mut d, mut p, mut a) = (None, None, Src::Imm(1));
        let addr = match (kind, &operands[..]) {
            (MbarrierKind::Inval, [addr]) => addr,
            (MbarrierKind::Init | MbarrierKind::ExpectTx | MbarrierKind::CompleteTx, [addr, value]) => {
                a = count(value)?;
                addr
            }
            (MbarrierKind::Arrive { expect, no_complete, .. }, [state, addr, rest @ ..]) if rest.len() < 2 => {
                d = self.dst(state)?;
                // A remote mbarrier has no state to return.
                if space == Space::SharedCluster && d.is_some() {
                    return self.unsupported();
                }
                match rest {
                    [value] => a = count(value)?,
                    _ if expect || no_complete => return self.unsupported(),
                    _ => {}
                }
                addr
            }
            (MbarrierKind::Test { parity, may_block }, [result, addr, state, rest @ ..])
                if rest.len() <= usize::from(may_block) =>
            {
                p = Some(self.pred(result)?.slot);
                a = self.src(state, if parity { Ty::U(32) } else { Ty::B(64) })?;
                // How long a thread may be suspended has no meaning here, but must be an operand.
                rest.iter().try_for_each(|hint| count(hint).map(|_| ()))?;
                addr
            }
            _ => return self.unsupported(),
        };
        Ok(Hopper::Mbarrier(Mbarrier { kind, space, addr: self.address(addr)?, d, p, a, order, scope }))
    }

    fn copies_arrive(&self, words: &[&str]) -> Result<Hopper> {
        let (no_inc, rest) = match words {
            ["noinc", rest @ ..] => (true, rest),
            rest => (false, rest),
        };
        let space = match *rest {
            ["shared" | "shared::cta", "b64"] => Space::Shared,
            ["b64"] => Space::Generic,
            _ => return self.unsupported(),
        };
        let [addr] = self.operands()?;
        Ok(Hopper::Mbarrier(Mbarrier {
            kind: MbarrierKind::Copies { no_inc },
            space,
            addr: self.address(addr)?,
            d: None,
            p: None,
            a: Src::Imm(1),
            order: Order::Relaxed,
            scope: None,
        }))
    }
}
