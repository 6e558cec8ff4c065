//! Cases for the Hopper family: every tile and cluster, and shapes that its tensor maps can describe.

use fused_lora::plan::{Options, TileSize};

use super::data::{Placement, Spec};

pub const TILES: [TileSize; 3] = [TileSize::Sm90N256, TileSize::Sm90N192, TileSize::Sm90N128];

/// Rows at and around the edges of slabs, blocks, and groups of blocks.
pub const ROWS: [usize; 12] = [1, 63, 64, 65, 127, 128, 129, 200, 256, 257, 385, 530];
/// N and K: a chunk of 16 bytes, steps of the reduction, tiles, and what is beside them.
pub const COLUMNS: [usize; 12] = [8, 56, 64, 72, 120, 128, 136, 192, 200, 256, 264, 400];
/// Ranks at and around the widths of narrow tiles, and every length of the last step that reads h.
pub const RANKS: [usize; 12] = [0, 8, 16, 24, 32, 40, 64, 72, 128, 136, 200, 256];
/// What lies as tensor maps need it.
pub const PLACEMENTS: [Placement; 3] = [Placement::Aligned, Placement::Strided, Placement::Contiguous];

/// Every tile with clusters of one and of two.
pub fn variants() -> Vec<Options> {
    let of = |tile| [1, 2].map(|cluster| Options::default().with_tile(tile).with_cluster(cluster));
    TILES.into_iter().flat_map(of).collect()
}

/// One case, and what is chosen for it.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub spec: Spec,
    pub options: Options,
    /// Its number in the table, for what is to take turns beside.
    pub turn: usize,
}

/// Every variant with every rank. In each variant every number of rows and every number of columns has its turn; so have
/// the placements, bundles, chunks and everything that can be present or not.
pub fn table() -> Vec<Case> {
    let mut table = Vec::new();
    for (v, options) in variants().into_iter().enumerate() {
        for (i, r) in RANKS.into_iter().enumerate() {
            let turn = v * RANKS.len() + i;
            let (m, n, k) = (ROWS[(5 * i + v) % 12], COLUMNS[(7 * i + 2 * v + 3) % 12], COLUMNS[(11 * i + 5 * v) % 12]);
            let spec = Spec {
                placement: PLACEMENTS[turn % 3],
                bias: !(turn / 2).is_multiple_of(3),
                keep_h: !turn.is_multiple_of(5),
                accumulate: (turn / 3).is_multiple_of(2),
                f32_gradients: (turn / 2).is_multiple_of(2),
                ..Spec::new(m, n, k, r)
            };
            let options = [options, options.with_bundle(2), options.with_bundle(100)][(turn / 2) % 3];
            let options = [options, options.with_chunks(1), options.with_chunks(2), options.with_chunks(9)][turn % 4];
            table.push(Case { spec, options, turn });
        }
    }
    table
}
