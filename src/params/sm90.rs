//! Parameters of the Hopper kernels, after their tensor maps.

use super::{LORA_MAX_PROJECTIONS, LoraDropout, LoraMagnitude, LoraMatrix, LoraSplit};

/// A projection of forward in the Hopper family, as [`LoraForwardProjection`](super::LoraForwardProjection).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoraSm90ForwardProjection {
    /// Device address of N elements of the storage type; 0 when absent.
    pub bias: u64,
    /// Device address of N elements of f32, DoRA's factors of the columns; 0 when absent.
    pub gain: u64,
    /// Output features.
    pub n: u32,
    /// Rank.
    pub r: u32,
    /// Ranks of the projections before.
    pub first_rank: u32,
    /// Blocks of the tile's columns of the projections before.
    pub first_block: u32,
    /// Factor of its ranks of h: α/r or α/√r.
    pub scale: f32,
    /// Zero: the struct ends at a multiple of 8 bytes.
    pub padding: u32,
}

/// The parameter of a forward kernel of the Hopper family, after its tensor maps. Tickets hand out units that split f32 factors
/// first, then bundles of h units, then single y units; a unit belongs to a cluster, whose CTAs take neighbouring blocks of rows.
/// Of factors that are split `h` and `r` are as in [`LoraForwardParams`](super::LoraForwardParams).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoraSm90ForwardParams {
    /// M × R, as the h units write it: the caller's, or in the workspace.
    pub h: LoraMatrix,
    /// Device address of the synchronisation words ([`SYNC_BYTES`](crate::plan::SYNC_BYTES)).
    pub sync: u64,
    /// Tokens.
    pub m: u32,
    /// Input features.
    pub k: u32,
    /// Ranks of all projections.
    pub r: u32,
    /// Projections that are there, at least 1.
    pub projection_count: u32,
    /// Blocks of rows over CTAs per cluster.
    pub m_groups: u32,
    /// Blocks of the tile's columns along the N of all projections.
    pub n_blocks: u32,
    /// Narrow tiles along R.
    pub r_blocks: u32,
    /// Units of h: `m_groups` × `r_blocks`.
    pub h_units: u32,
    /// Tickets of h: ticket t hands out units t, t + `h_tickets` and so on.
    pub h_tickets: u32,
    /// All tickets: those of `split` + `h_tickets` + `m_groups` × `n_blocks`.
    pub tickets: u32,
    /// Groups of M-blocks that pass over w together, for reuse in L2.
    pub group_m: u32,
    /// 2^`flag_shift` M-blocks share one flag.
    pub flag_shift: u32,
    /// Words from `sync` on that the last CTA clears.
    pub sync_words: u32,
    /// Zero.
    pub padding: u32,
    /// Dropout; all zero when there is none.
    pub dropout: LoraDropout,
    /// Device address of the words of a [`Routing`](crate::Routing); 0 when absent, and with more than one projection.
    pub routes: u64,
    /// f32 factors to be split; all zero when they are of the storage type.
    pub split: LoraSplit,
    /// Those that are there first.
    pub projections: [LoraSm90ForwardProjection; LORA_MAX_PROJECTIONS as usize],
}

/// A projection of backward in the Hopper family, as [`LoraBackwardProjection`](super::LoraBackwardProjection).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoraSm90BackwardProjection {
    /// N × R, output; absent when not asked for.
    pub db: LoraMatrix,
    /// DoRA's gradient of the magnitude.
    pub magnitude: LoraMagnitude,
    /// Device address of N elements, output; 0 when not asked for.
    pub dbias: u64,
    /// Device address of N elements of f32, DoRA's factors of the columns; 0 when absent.
    pub gain: u64,
    /// Output features.
    pub n: u32,
    /// Rank.
    pub r: u32,
    /// Ranks of the projections before.
    pub first_rank: u32,
    /// Blocks of rows of db over CTAs per cluster.
    pub n_groups: u32,
    /// Narrow tiles of dh in a block of rows, of the projections before.
    pub first_narrow: u32,
    /// Tiles of db (with dbias) of the projections before.
    pub first_db_tile: u32,
    /// `LORA_DB_F32` and `LORA_DBIAS_F32`, or-ed.
    pub flags: u32,
    /// Factor of its ranks of dh: α/r or α/√r.
    pub scale: f32,
}

/// The parameter of a backward kernel of the Hopper family, after its tensor maps. Tickets hand out units that split f32 factors,
/// which are not counted but in `tickets`, then bundles of dh units, then dx, db (with dbias) and da units. Of factors that are
/// split `dh` and `r` are as in [`LoraBackwardParams`](super::LoraBackwardParams).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoraSm90BackwardParams {
    /// M × R, in the workspace, as the dh units write it.
    pub dh: LoraMatrix,
    /// M × K, as it is read to accumulate; absent when not asked for.
    pub dx: LoraMatrix,
    /// R × K, output; absent when not asked for.
    pub da: LoraMatrix,
    /// Device address of f32 partial sums: one block of `partial_stride` per slab and chunk of db, then of da.
    pub partials: u64,
    /// Device address of the synchronisation words ([`SYNC_BYTES`](crate::plan::SYNC_BYTES)).
    pub sync: u64,
    /// Tokens.
    pub m: u32,
    /// Input features.
    pub k: u32,
    /// Ranks of all projections.
    pub r: u32,
    /// The largest rank of a projection, which the narrow tiles of dh and db are as wide as; of factors that are split its pairs.
    pub most_r: u32,
    /// Projections that are there, at least 1.
    pub projection_count: u32,
    /// Steps of the reduction of dx over the N of all projections.
    pub n_steps: u32,
    /// Blocks of rows of dy over CTAs per cluster.
    pub m_groups: u32,
    /// Blocks of rows of da transposed over CTAs per cluster.
    pub k_groups: u32,
    /// Blocks of the tile's columns of dx.
    pub k_blocks: u32,
    /// Narrow tiles of dh along the ranks of each projection.
    pub dh_blocks: u32,
    /// Units of dh: `m_groups` × `dh_blocks`.
    pub dh_units: u32,
    /// Tickets of dh: ticket t hands out units t, t + `dh_tickets` and so on.
    pub dh_tickets: u32,
    /// First ticket past dx: `dh_tickets` + `m_groups` × `k_blocks`.
    pub dx_end: u32,
    /// First ticket past db: `dx_end` + tiles of db × `chunks`.
    pub db_end: u32,
    /// All tickets: those of `split` + `db_end` + tiles of da × `chunks`.
    pub tickets: u32,
    /// Chunks in which db and da reduce over tokens.
    pub chunks: u32,
    /// Tokens per chunk, a multiple of the block of rows.
    pub chunk_rows: u32,
    /// Distance between two blocks of partial sums, in f32 elements.
    pub partial_stride: u32,
    /// First counter of finished chunks (one per slab of db and da), in words from `sync`.
    pub counters: u32,
    /// Groups of M-blocks that pass over w together, for reuse in L2.
    pub group_m: u32,
    /// 2^`flag_shift` M-blocks share one flag.
    pub flag_shift: u32,
    /// Words from `sync` on that the last CTA clears.
    pub sync_words: u32,
    /// `LORA_ACCUMULATE_*` (which outputs add), `LORA_DA_F32` and `LORA_GAINED` (some projection has a gain), or-ed.
    pub flags: u32,
    /// Zero: the struct ends at a multiple of 8 bytes.
    pub padding: u32,
    /// Dropout; all zero when there is none.
    pub dropout: LoraDropout,
    /// Device address of the words of a [`Routing`](crate::Routing); 0 when absent, and with more than one projection.
    pub routes: u64,
    /// f32 factors to be split; all zero when they are of the storage type.
    pub split: LoraSplit,
    /// Those that are there first.
    pub projections: [LoraSm90BackwardProjection; LORA_MAX_PROJECTIONS as usize],
}
