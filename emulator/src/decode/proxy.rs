//! Fences between proxies.

use super::{Decoder, Result};
use crate::isa::*;

impl Decoder<'_> {
    /// PTX ISA, "membar, fence: fence.proxy".
    pub(super) fn proxy(&self, words: &[&str]) -> Result<Option<Op>> {
        match *words {
            ["fence", "proxy", "async"] | ["fence", "proxy", "async", "shared::cta"] => {
                let [] = self.operands()?;
                Ok(Some(Op::ProxyFence))
            }
            _ => Ok(None),
        }
    }
}
