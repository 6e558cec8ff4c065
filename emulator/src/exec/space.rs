//! State spaces and the addresses in them.

use super::{Cta, Outcome};
use crate::isa::Space;

/// Generic addresses of shared and local memory: far below every global allocation.
pub(super) const SHARED_WINDOW: u64 = 0x7000_0000_0000;
const LOCAL_WINDOW: u64 = 0x6000_0000_0000;
/// A kernel's parameters: "Generic Addressing" includes them.
const PARAM_WINDOW: u64 = 0x5000_0000_0000;
const WINDOW: u64 = 1 << 32;

/// The state space and the address in it that a generic address stands for.
pub(super) fn space_of(address: u64) -> (Space, u64) {
    let within = |window: u64| address.checked_sub(window).filter(|offset| *offset < WINDOW);
    match (within(SHARED_WINDOW), within(LOCAL_WINDOW), within(PARAM_WINDOW)) {
        (Some(offset), ..) => (Space::SharedCluster, offset),
        (_, Some(offset), _) => (Space::Local, offset),
        (.., Some(offset)) => (Space::Param, offset),
        _ => (Space::Global, address),
    }
}

/// As [`space_of`], for an instruction that may name the space. An address in `Space::Shared` may then be that of another CTA
/// of the cluster.
pub(super) fn resolve(space: Space, address: u64) -> (Space, u64) {
    let (space, address) = if space == Space::Generic { space_of(address) } else { (space, address) };
    match space {
        // Addresses of these windows are 32 bits wide.
        Space::Shared | Space::SharedCluster => (Space::Shared, address & (WINDOW - 1)),
        Space::Local => (space, address & (WINDOW - 1)),
        // Constants stand beside the other variables of the module.
        Space::Const => (Space::Global, address),
        _ => (space, address),
    }
}

impl Cta {
    /// As [`resolve`]; an address that is said to be of this CTA must be.
    pub(super) fn resolve(&self, space: Space, address: u64) -> Outcome<(Space, u64)> {
        let (found, at) = resolve(space, address);
        Ok((found, if space == Space::Shared { self.own_shared(at)? } else { at }))
    }
}

/// `cvta` in either direction.
pub(super) fn convert_address(space: Space, to_space: bool, address: u64) -> u64 {
    let window = match space {
        Space::Shared | Space::SharedCluster => SHARED_WINDOW,
        Space::Param => PARAM_WINDOW,
        Space::Local => LOCAL_WINDOW,
        _ => 0,
    };
    if to_space { address.wrapping_sub(window) } else { address.wrapping_add(window) }
}
