//! What a caller may decide instead of the planner.

use std::str::FromStr;

use crate::error::{Error, Result};

/// A set of kernels that one design covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// cp.async, ldmatrix and mma.sync: every GPU, shape, stride and address.
    Portable,
    /// Tensor memory accelerator, mbarriers and wgmma: compute capability 9.0, under conditions of shape and alignment.
    Sm90,
}

/// The tile shapes compiled into the families.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TileSize {
    /// 128 × 128, portable.
    Large,
    /// 64 × 64, portable.
    Small,
    /// 128 × 256 of the Hopper family.
    Sm90N256,
    /// 128 × 192 of the Hopper family.
    Sm90N192,
    /// 128 × 128 of the Hopper family.
    Sm90N128,
}

impl TileSize {
    /// The family the tile belongs to.
    pub fn family(self) -> Family {
        match self {
            TileSize::Large | TileSize::Small => Family::Portable,
            TileSize::Sm90N256 | TileSize::Sm90N192 | TileSize::Sm90N128 => Family::Sm90,
        }
    }
}

/// What programs call the families on their command lines.
impl FromStr for Family {
    type Err = Error;

    fn from_str(name: &str) -> Result<Family> {
        match name {
            "portable" => Ok(Family::Portable),
            "sm90" => Ok(Family::Sm90),
            _ => refuse("family", name.to_owned(), "portable or sm90"),
        }
    }
}

/// What programs call the tile shapes on their command lines: those of the Hopper family by their columns.
impl FromStr for TileSize {
    type Err = Error;

    fn from_str(name: &str) -> Result<TileSize> {
        match name {
            "large" => Ok(TileSize::Large),
            "small" => Ok(TileSize::Small),
            "256" => Ok(TileSize::Sm90N256),
            "192" => Ok(TileSize::Sm90N192),
            "128" => Ok(TileSize::Sm90N128),
            _ => refuse("tile", name.to_owned(), "large, small, 256, 192 or 128"),
        }
    }
}

fn refuse<T>(option: &'static str, got: String, expected: &str) -> Result<T> {
    Err(Error::PlanOption { option, got, expected: expected.to_owned() })
}

/// Blocks of rows that pass over w together, where nobody decides: w and the rows of x stay in L2 meanwhile.
const GROUP_M: u32 = 8;

/// What a caller may decide instead of the planner: for tests, and for measuring what the planner chooses between. A choice
/// that the call or the device rules out is an error, never ignored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Options {
    /// The family; the fastest of those that the call allows when absent.
    pub family: Option<Family>,
    /// The tile shape; the fastest by the planner's model when absent. It implies its family.
    pub tile: Option<TileSize>,
    /// CTAs per cluster: 1 or 2. Implies the Hopper family, as do `bundle` and `chunks`.
    pub cluster: Option<u32>,
    /// Units of h (of dh in backward) per ticket, at least 1.
    pub bundle: Option<u32>,
    /// Blocks of rows (groups of them in the Hopper family) that pass over w together, at least 1.
    pub group_m: Option<u32>,
    /// Most chunks in which da and db reduce over tokens, at least 1. The workspace has to hold their sums.
    pub chunks: Option<u32>,
    /// The Hopper kernels are not there to be launched, because the build left them out: plan without them.
    pub without_sm90: bool,
}

impl Options {
    /// These options with one family for every call.
    #[must_use]
    pub fn with_family(mut self, family: Family) -> Options {
        self.family = Some(family);
        self
    }

    /// These options with one tile shape for every call.
    #[must_use]
    pub fn with_tile(mut self, tile: TileSize) -> Options {
        self.tile = Some(tile);
        self
    }

    /// These options with so many CTAs per cluster: 1 or 2.
    #[must_use]
    pub fn with_cluster(mut self, ctas: u32) -> Options {
        self.cluster = Some(ctas);
        self
    }

    /// These options with so many units of h or dh per ticket.
    #[must_use]
    pub fn with_bundle(mut self, units: u32) -> Options {
        self.bundle = Some(units);
        self
    }

    /// These options with so many blocks of rows (groups of them in the Hopper family) that pass over w together.
    #[must_use]
    pub fn with_group_m(mut self, blocks: u32) -> Options {
        self.group_m = Some(blocks);
        self
    }

    /// These options with at most so many chunks of tokens for da and db.
    #[must_use]
    pub fn with_chunks(mut self, chunks: u32) -> Options {
        self.chunks = Some(chunks);
        self
    }

    /// These options for a build without the Hopper kernels.
    #[must_use]
    pub fn without_sm90(mut self) -> Options {
        self.without_sm90 = true;
        self
    }

    /// Of `blocks` blocks of rows those that pass over w together, at least 1.
    pub(super) fn group_m(&self, blocks: u64) -> u32 {
        u64::from(self.group_m.unwrap_or(GROUP_M)).clamp(1, blocks.max(1)) as u32
    }

    /// The option that decides the family, the family, and the option's value in words.
    pub(crate) fn decided(&self) -> Option<(&'static str, Family, String)> {
        let sm90 = |option, value: Option<u32>| value.map(|value| (option, Family::Sm90, value.to_string()));
        let family = self.family.map(|family| ("family", family, format!("{family:?}")));
        family
            .or_else(|| self.tile.map(|tile| ("tile", tile.family(), format!("{tile:?}"))))
            .or_else(|| sm90("cluster", self.cluster))
            .or_else(|| sm90("bundle", self.bundle))
            .or_else(|| sm90("chunks", self.chunks))
    }

    /// Values out of range, and options that contradict one another.
    pub(super) fn check(&self) -> Result<()> {
        if let Some(cluster) = self.cluster.filter(|cluster| !(1..=2).contains(cluster)) {
            return refuse("cluster", cluster.to_string(), "1 or 2");
        }
        for (option, value) in [("bundle", self.bundle), ("chunks", self.chunks), ("group_m", self.group_m)] {
            if value == Some(0) {
                return refuse(option, "0".to_owned(), "at least 1");
            }
        }
        let Some((by, family, value)) = self.decided() else { return Ok(()) };
        if let Some(tile) = self.tile.filter(|tile| tile.family() != family) {
            return refuse("tile", format!("{tile:?}"), &format!("one of the family that `{by}` = {value} implies"));
        }
        let others = [("cluster", self.cluster), ("bundle", self.bundle), ("chunks", self.chunks)];
        if let (Family::Portable, Some((option, Some(got)))) = (family, others.iter().find(|other| other.1.is_some())) {
            return refuse(
                option,
                got.to_string(),
                &format!("none with `{by}` = {value}, whose family has no such choice"),
            );
        }
        Ok(())
    }
}
