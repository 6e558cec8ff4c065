//! Plans of the Hopper family: tensor maps, clusters, and tickets that clusters draw.

mod backward;
mod chunks;
mod forward;
mod maps;
mod middle;
mod model;
mod schedule;
#[cfg(test)]
mod tests;

pub(super) use backward::{backward, operands as backward_operands};
#[cfg(feature = "cuda")]
pub(super) use chunks::most_partial_bytes;
pub(super) use forward::{forward, operands as forward_operands};
pub(super) use maps::obstacles;

use super::{Device, Launch, MAX_CTAS, TensorMap, TileSize};
use crate::error::{Error, Result};
use crate::params::*;
use crate::plan::Options;

/// The one compute capability these kernels run on: their target is specific to it.
pub(super) const ARCH: u32 = 90;

/// SMs that a launch makes use of: more than any GPU of that capability has (144 in the full chip). The workspace keeps partial
/// sums for each.
const MAX_SMS: u32 = 256;

/// The images of the family, forward and backward.
pub(crate) const IMAGES: [&str; 2] = ["sm90_forward", "sm90_backward"];

/// One of the tile shapes compiled into the family: 128 rows and so many columns.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Tile {
    pub size: TileSize,
    /// Columns of a main tile.
    pub columns: u32,
    /// Stages of the ring.
    pub stages: u32,
    /// Entry points: forward in f16 and bf16, backward in f16 and bf16.
    kernels: [&'static str; 4],
}

pub(super) const TILES: [Tile; 3] = [
    Tile {
        size: TileSize::Sm90N256,
        columns: 256,
        stages: LORA_SM90_STAGES_256,
        kernels: [
            "lora_sm90_forward_f16_256",
            "lora_sm90_forward_bf16_256",
            "lora_sm90_backward_f16_256",
            "lora_sm90_backward_bf16_256",
        ],
    },
    Tile {
        size: TileSize::Sm90N192,
        columns: 192,
        stages: LORA_SM90_STAGES_192,
        kernels: [
            "lora_sm90_forward_f16_192",
            "lora_sm90_forward_bf16_192",
            "lora_sm90_backward_f16_192",
            "lora_sm90_backward_bf16_192",
        ],
    },
    Tile {
        size: TileSize::Sm90N128,
        columns: 128,
        stages: LORA_SM90_STAGES_128,
        kernels: [
            "lora_sm90_forward_f16_128",
            "lora_sm90_forward_bf16_128",
            "lora_sm90_backward_f16_128",
            "lora_sm90_backward_bf16_128",
        ],
    },
];

/// What was chosen for a call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Choice {
    pub tile: Tile,
    /// CTAs per cluster.
    pub cluster: u32,
}

/// Columns of a narrow tile: the first of the compiled widths that holds `r`, or the widest.
fn narrow_columns(r: usize) -> u32 {
    [16, 32, 64].into_iter().find(|&columns| r <= columns as usize).unwrap_or(LORA_SM90_NARROW_N)
}

/// Groups of blocks of 128 rows that a cluster takes at once.
fn groups(extent: usize, cluster: u32) -> u64 {
    super::blocks(extent, LORA_SM90_BLOCK_M).div_ceil(u64::from(cluster))
}

impl Tile {
    fn stage_bytes(&self) -> u32 {
        2 * LORA_SM90_BLOCK_K * (LORA_SM90_BLOCK_M + self.columns)
    }

    pub(super) fn shared_bytes(&self) -> u32 {
        let outgoing = 2 * LORA_SM90_SLABS * LORA_SM90_STORE_BOXES * LORA_SM90_SLAB_M * LORA_SM90_STORE_N;
        self.stages * self.stage_bytes() + outgoing + LORA_SM90_TAIL_BYTES
    }

    fn launch(
        &self,
        cluster: u32,
        tickets: u32,
        device: &Device,
        maps: Vec<Option<TensorMap>>,
        params: Params,
        is_bf16: bool,
    ) -> Launch {
        let is_backward = matches!(params, Params::Sm90Backward(_));
        Launch {
            image: IMAGES[usize::from(is_backward)],
            kernel: self.kernels[2 * usize::from(is_backward) + usize::from(is_bf16)],
            grid: [ctas(tickets, cluster, device), 1, 1],
            cluster: [cluster, 1, 1],
            block: [LORA_SM90_THREADS, 1, 1],
            shared_bytes: self.shared_bytes(),
            maps,
            params,
        }
    }
}

/// CTAs of a launch: as many clusters as are there at once, or fewer where there are fewer tickets.
fn ctas(tickets: u32, cluster: u32, device: &Device) -> u32 {
    tickets.clamp(1, (device.sms.min(MAX_SMS) / cluster).max(1)) * cluster
}

/// The tiles and cluster sizes that options, device and tokens leave; the first of those that take equally long is chosen.
fn candidates(options: &Options, device: &Device, m: usize) -> Result<Vec<(Tile, u32)>> {
    if let Some(cluster) = options.cluster.filter(|&cluster| cluster > device.sms) {
        return Err(Error::PlanOption {
            option: "cluster",
            got: cluster.to_string(),
            expected: format!("at most the {} SM(s) of the device", device.sms),
        });
    }
    let clusters = match options.cluster {
        Some(decided) => vec![decided],
        // With one block of rows the second CTA would have nothing to do.
        None if device.sms == 1 || groups(m, 1) == 1 => vec![1],
        None => vec![2, 1],
    };
    let tiles = TILES.into_iter().filter(|tile| options.tile.is_none_or(|size| size == tile.size));
    Ok(tiles.flat_map(|tile| clusters.iter().map(move |&cluster| (tile, cluster))).collect())
}

/// What `evaluate` makes of the candidate with the fewest clocks; its error when all have one.
fn shortest<S>(
    options: &Options,
    candidates: Vec<(Tile, u32)>,
    evaluate: impl Fn(Tile, u32) -> Result<S>,
    clocks: impl Fn(&S) -> f64,
) -> Result<S> {
    let mut best: Option<Result<S>> = None;
    for (tile, cluster) in candidates {
        match (&best, evaluate(tile, cluster)) {
            (Some(Ok(best)), Ok(found)) if clocks(&found) >= clocks(best) => {}
            (Some(Ok(_)), Err(_)) => {}
            (_, found) => best = Some(found),
        }
    }
    // Only a tile of another family leaves no candidate.
    best.unwrap_or_else(|| {
        Err(Error::PlanOption {
            option: "tile",
            got: format!("{:?}", options.tile),
            expected: "a tile shape of the Hopper family".to_owned(),
        })
    })
}

/// As [`super::check_units`], for tickets: a cluster draws one past the last.
fn check_tickets(count: u64) -> Result<u32> {
    let limit = u64::from(u32::MAX - MAX_CTAS);
    u32::try_from(count).ok().filter(|_| count <= limit).ok_or(Error::TooLarge {
        what: "the number of tickets",
        got: count,
        limit,
    })
}
