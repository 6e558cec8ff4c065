/* What crosses from Rust to the kernels: parameter structs and the numbers both sides must agree on.
 * Plain C, fixed-width fields, device addresses as uint64_t, padding spelled out. Rust's mirror is src/params.rs;
 * a build with the `cuda` feature compares the two field by field. Letters as everywhere: x is M x K, w is N x K,
 * a is R x K, b is N x R, h and dh are M x R and already multiplied by the scale. */
#ifndef LORA_PARAMS_H
#define LORA_PARAMS_H

#include <stdint.h>

/* Elements of the reduction dimension per pipeline step. */
#define LORA_BLOCK_K 32
/* Columns of a narrow tile (h, dh, db, da): ranks above it take several tiles. */
#define LORA_NARROW_N 64
/* The two tile shapes of the portable family: block of rows = block of columns, threads, pipeline stages. */
#define LORA_LARGE_BLOCK 128
#define LORA_LARGE_THREADS 256
#define LORA_LARGE_STAGES 3
#define LORA_SMALL_BLOCK 64
#define LORA_SMALL_THREADS 128
#define LORA_SMALL_STAGES 4

/* The Hopper family. A CTA is a producer warpgroup and two consumer warpgroups with a slab of rows each. */
#define LORA_SM90_BLOCK_M 128
#define LORA_SM90_BLOCK_K 64
#define LORA_SM90_SLAB_M 64
#define LORA_SM90_SLABS 2
#define LORA_SM90_THREADS 384
/* Most columns of a narrow tile; its width is 16, 32, 64 or this, whichever first holds R. */
#define LORA_SM90_NARROW_N 128
/* Columns of a box of y or dx on its way out, and the boxes that wait in shared memory per slab. */
#define LORA_SM90_STORE_N 64
#define LORA_SM90_STORE_BOXES 2
/* Columns of a main tile are the tile's name; stages of its ring. */
#define LORA_SM90_STAGES_256 4
#define LORA_SM90_STAGES_192 4
#define LORA_SM90_STAGES_128 6
/* Bytes after the ring and the outgoing boxes: barriers, tickets and a few constants. */
#define LORA_SM90_TAIL_BYTES 1024

/* The synchronisation words at the start of a workspace: all zero before a launch and after it. */
#define LORA_SYNC_BYTES 65536
#define LORA_SYNC_TICKET 0 /* next unit of work */
#define LORA_SYNC_EXITED 1 /* CTAs that have finished */
#define LORA_SYNC_SPLIT 2  /* units of f32 factors that have been split */
#define LORA_SYNC_FLAGS 3  /* first h / dh flag; the tile counters of db and da follow the flags */

/* LoraBackwardParams::flags, those of db and dbias for all projections but LORA_DB_F32 and LORA_DBIAS_F32, which each
 * has */
#define LORA_ACCUMULATE_DX 1u
#define LORA_ACCUMULATE_DA 2u
#define LORA_ACCUMULATE_DB 4u
#define LORA_ACCUMULATE_DBIAS 8u
#define LORA_DA_F32 16u
#define LORA_DB_F32 32u
#define LORA_DBIAS_F32 64u
#define LORA_ACCUMULATE_DM 128u
#define LORA_GAINED 256u /* some projection has a gain */

/* merge: rows and columns of a tile, threads, and ranks per step. */
#define LORA_MERGE_BLOCK 64
#define LORA_MERGE_THREADS 256
#define LORA_MERGE_RANKS 32
/* round: rows and columns of a tile, threads. */
#define LORA_ROUND_ROWS 8
#define LORA_ROUND_COLS 256
#define LORA_ROUND_THREADS 256
/* gain: rows of w per CTA, threads. */
#define LORA_GAIN_ROWS 16
#define LORA_GAIN_THREADS 256
/* LoraMergeParams::flags, LoraRoundParams::flags, LoraGainParams::flags: a and b are f32. */
#define LORA_FACTORS_F32 1u
/* LoraRoundParams::flags: rounded_a and rounded_b are f32. */
#define LORA_ROUNDED_F32 2u

/* A row-major matrix: address of element (0, 0), 0 when absent, and elements between row starts. */
typedef struct LoraMatrix {
  uint64_t ptr;
  int64_t row_stride;
} LoraMatrix;

/* Projections: products of one x, each with a weight, an adapter and an output of its own. The A of all lie below each
 * other in a, and their ranks side by side in h and dh. */
#define LORA_MAX_PROJECTIONS 4

/* Routes (src/routing.rs): a word per row of x, scale and first and one past the last rank that it keeps; then a word
 * per LORA_ROUTE_ROWS rows, whose bit i says that one of them keeps ranks from LORA_ROUTE_RANKS i on. */
#define LORA_ROUTE_ROWS 64
#define LORA_ROUTE_RANKS 64

/* Dropout on the adapter branch: src/ops.rs says which elements of x are dropped. The factor 1 / (1 - p) is in `scale`.
 */
typedef struct LoraDropout {
  uint64_t seed;
  uint64_t offset;
  uint64_t state;     /* address of seed and offset, read instead; 0 when absent */
  uint32_t threshold; /* an element is dropped when its 16 bits are less; 0: no dropout, 65536: all are dropped */
  uint32_t padding;
} LoraDropout;

/* DoRA in backward: what its gradient of the magnitude is computed from and where it goes; dm is 0 when not wanted. */
typedef struct LoraMagnitude {
  LoraMatrix y;
  uint64_t bias;      /* N elements of the storage type, 0 when absent */
  uint64_t magnitude; /* N elements of f32 */
  uint64_t dm;        /* N elements of f32, output */
} LoraMagnitude;

/* f32 factors over a 16-bit layer. A number is two of the storage type: the nearest, its high half, and the nearest to
 * what is left of it times a power of two, its low half. They lie in groups of LORA_SPLIT_RANKS ranks, of which the
 * last is filled up with zeros: as pairs [high | low] where they are multiplied by x or dy, and as triples, for which a
 * product over ranks needs to know nothing of halves: [high | high / 2^s | low] of h and dh, [high | low, times 2^s |
 * high] of a and b. In forward a is split into pairs and b into triples, in backward b into pairs and a into triples; h
 * as arguments have it is pairs. */
#define LORA_SPLIT_RANKS 8
#define LORA_SPLIT_LENGTH 256 /* columns of a, or rows of b, that a unit splits, of LORA_SPLIT_RANKS ranks */
typedef struct LoraSplit {
  LoraMatrix a;                       /* R x K, f32, of all projections */
  LoraMatrix b[LORA_MAX_PROJECTIONS]; /* N x R, f32, of each */
  LoraMatrix pairs;                   /* h or dh for the products over tokens; absent when there are none */
  uint64_t split_a;                   /* halves of a */
  uint64_t split_b;                   /* halves of b, those of all projections below each other */
  uint32_t split_a_stride;            /* elements between row starts */
  uint32_t split_b_stride;
  uint32_t ranks[LORA_MAX_PROJECTIONS]; /* of each projection, whose halves begin with a group of their own */
  uint32_t r;                           /* of all; 0: a and b are of the storage type, and are not split */
  uint32_t a_units;                     /* of a, numbered along K first */
  uint32_t units;   /* a_units, then those of b, numbered along N first, of one projection after the other */
  uint32_t tickets; /* of those units: one each, or one for each CTA of a cluster */
} LoraSplit;

/* A projection of forward. Blocks of columns are numbered over all projections, and so are ranks. */
typedef struct LoraForwardProjection {
  LoraMatrix w;
  LoraMatrix b;
  LoraMatrix y;
  uint64_t bias; /* N elements, 0 when absent */
  uint64_t gain; /* N elements of f32; 0 when absent */
  uint32_t n;
  uint32_t r; /* its ranks are columns [first_rank, first_rank + r) of h */
  uint32_t first_rank;
  uint32_t first_block; /* first of its blocks of columns of y */
  float scale;
  uint32_t padding;
} LoraForwardProjection;

/* Units of work are numbered h first, then y; those that split factors come before them and are not counted in `units`.
 * Of factors that are split a, b and h are what h and y units read: a in pairs, b and h in triples. r is the columns of
 * the former, r and first_rank of a projection are those of the latter. */
typedef struct LoraForwardParams {
  LoraMatrix x;
  LoraMatrix a;
  LoraMatrix h;
  uint64_t sync;
  uint32_t m;
  uint32_t k;
  uint32_t r; /* of all projections */
  uint32_t projection_count;
  uint32_t m_blocks;
  uint32_t n_blocks;   /* of all projections */
  uint32_t h_units;    /* m_blocks x blocks of R */
  uint32_t units;      /* h_units + m_blocks x n_blocks */
  uint32_t group_m;    /* M-blocks that share a pass over w, for reuse in L2 */
  uint32_t flag_shift; /* 2^flag_shift M-blocks share a flag */
  uint32_t sync_words; /* words the last CTA clears */
  uint32_t padding;
  LoraDropout dropout;
  uint64_t routes; /* address of the table; 0 when absent, and with more than one projection */
  LoraSplit split;
  LoraForwardProjection projections[LORA_MAX_PROJECTIONS];
} LoraForwardParams;

/* A projection of backward. Steps of the reduction of dx over N, narrow tiles of dh along its ranks and tiles of db are
 * numbered over all projections. */
typedef struct LoraBackwardProjection {
  LoraMatrix dy;
  LoraMatrix w;
  LoraMatrix b;
  LoraMatrix db;
  LoraMagnitude magnitude;
  uint64_t dbias; /* N elements, 0 when absent */
  uint64_t gain;  /* N elements of f32; 0 when absent */
  uint32_t n;
  uint32_t r; /* its ranks are columns [first_rank, first_rank + r) of h and dh */
  uint32_t first_rank;
  uint32_t n_blocks;
  uint32_t first_step;    /* first of its steps of dx */
  uint32_t first_narrow;  /* first of its narrow tiles of dh, of those of one block of rows */
  uint32_t first_db_tile; /* first of its tiles of db */
  uint32_t flags;         /* LORA_DB_F32, LORA_DBIAS_F32 */
  float scale;
  uint32_t padding;
} LoraBackwardProjection;

/* Units of work are numbered dh, dx, db (with dbias), da, after those that split factors, as in forward. Of factors
 * that are split b, read by dh, and h, read by db, are in pairs, a and dh, read by dx, in triples. r is the columns of
 * the latter, r and first_rank of a projection are those of the former. */
typedef struct LoraBackwardParams {
  LoraMatrix a;
  LoraMatrix x;
  LoraMatrix h;
  LoraMatrix dh;
  LoraMatrix dx;
  LoraMatrix da;
  uint64_t partials; /* f32, one block of partial_stride per (tile, chunk) of db and da */
  uint64_t sync;
  uint32_t m;
  uint32_t k;
  uint32_t r; /* of all projections */
  uint32_t projection_count;
  uint32_t n_steps; /* of the reduction of dx over the N of all projections */
  uint32_t m_blocks;
  uint32_t k_blocks;
  uint32_t dh_units;       /* m_blocks x narrow tiles of all projections */
  uint32_t dx_end;         /* first unit past dx: dh_units + m_blocks x k_blocks */
  uint32_t db_end;         /* first unit past db: dx_end + db_tiles x chunks */
  uint32_t units;          /* first unit past da: db_end + da_tiles x chunks */
  uint32_t chunks;         /* tokens are reduced in this many chunks */
  uint32_t chunk_rows;     /* tokens per chunk, a multiple of the block of rows */
  uint32_t partial_stride; /* f32 elements */
  uint32_t counters;       /* first tile counter, in words from sync */
  uint32_t group_m;
  uint32_t flag_shift;
  uint32_t sync_words;
  uint32_t flags;
  uint32_t padding;
  LoraDropout dropout;
  uint64_t routes; /* address of the table; 0 when absent, and with more than one projection */
  LoraSplit split;
  LoraBackwardProjection projections[LORA_MAX_PROJECTIONS];
} LoraBackwardParams;

/* merged = w + scale b a, or gain times that. A CTA computes one tile; tiles are numbered along k first. */
typedef struct LoraMergeParams {
  LoraMatrix w; /* may be merged itself */
  LoraMatrix a;
  LoraMatrix b;
  LoraMatrix merged;
  uint64_t gain; /* N elements of f32; 0 when absent */
  uint32_t n;
  uint32_t k;
  uint32_t r;
  float scale;
  uint32_t k_blocks;
  uint32_t flags;
} LoraMergeParams;

/* rounded_a = a, rounded_b = scale b, or scale b / divisor, in the storage type or in f32. A CTA does one tile, of a
 * first, then of b. */
typedef struct LoraRoundParams {
  LoraMatrix a;
  LoraMatrix b;
  LoraMatrix rounded_a;
  LoraMatrix rounded_b;
  uint64_t divisor; /* N elements of f32; 0 when absent */
  uint32_t n;
  uint32_t k;
  uint32_t r;
  float scale;
  uint32_t a_units;  /* blocks of r x k_blocks */
  uint32_t k_blocks; /* tiles along the columns of a */
  uint32_t r_blocks; /* tiles along the columns of b */
  uint32_t flags;
} LoraRoundParams;

/* norm = ||w + scale b a|| of each row, gain = magnitude / norm (times earlier). A CTA has LORA_GAIN_ROWS rows. */
typedef struct LoraGainParams {
  LoraMatrix w;
  LoraMatrix a;
  LoraMatrix b;
  uint64_t magnitude; /* N elements of f32, as the next three; 0 when absent */
  uint64_t earlier;
  uint64_t norm;
  uint64_t gain;
  uint32_t n;
  uint32_t k;
  uint32_t r;
  float scale;
  uint32_t flags;
  uint32_t padding;
} LoraGainParams;

/* What cuTensorMapEncodeTiled writes. CUDA 13 declares it with this alignment; CUDA 12 asked for half of it. */
typedef struct LoraTensorMap {
  uint64_t words[16];
} __attribute__((aligned(128))) LoraTensorMap;

/* Tensor maps of the Hopper kernels, inner x outer dimension of a box in elements. BN is the tile's columns, RN the
 * width of a narrow tile and RB the smaller of RN and 64. Swizzling spans 128 bytes, or RB elements where RB is the
 * inner dimension. What a box reaches beyond its matrix reads as zero and is not written. */
#define LORA_SM90_FORWARD_X 0 /* 64 x 128 */
#define LORA_SM90_FORWARD_A 1 /* 64 x RN */
/* Of projection j, at FIRST + j x EACH +: */
#define LORA_SM90_FORWARD_FIRST 2
#define LORA_SM90_FORWARD_W 0 /* 64 x BN / 2 */
#define LORA_SM90_FORWARD_H 1 /* 64 x 128: its ranks */
#define LORA_SM90_FORWARD_B 2 /* 64 x BN / 2 */
#define LORA_SM90_FORWARD_Y 3 /* 64 x 64, stored */
#define LORA_SM90_FORWARD_EACH 4
#define LORA_SM90_FORWARD_MAPS 18

#define LORA_SM90_BACKWARD_DH 0        /* 64 x 128 */
#define LORA_SM90_BACKWARD_A 1         /* 64 x 64 */
#define LORA_SM90_BACKWARD_DX 2        /* 64 x 64, stored */
#define LORA_SM90_BACKWARD_H_TOKENS 3  /* RB x 64: the reduction over tokens */
#define LORA_SM90_BACKWARD_X_TOKENS 4  /* 64 x 64 */
#define LORA_SM90_BACKWARD_DH_TOKENS 5 /* RB x 64, RB of da */
/* Of projection j, at FIRST + j x EACH +: */
#define LORA_SM90_BACKWARD_FIRST 6
#define LORA_SM90_BACKWARD_DY 0        /* 64 x 128: rows of dh and dx */
#define LORA_SM90_BACKWARD_W 1         /* 64 x 64 */
#define LORA_SM90_BACKWARD_B 2         /* RB x 64 */
#define LORA_SM90_BACKWARD_DY_TOKENS 3 /* 64 x 64 */
#define LORA_SM90_BACKWARD_Y_TOKENS 4  /* 64 x 64: of the gradient of the magnitude */
#define LORA_SM90_BACKWARD_EACH 5
#define LORA_SM90_BACKWARD_MAPS 26

/* As LoraForwardProjection. */
typedef struct LoraSm90ForwardProjection {
  uint64_t bias;
  uint64_t gain;
  uint32_t n;
  uint32_t r;
  uint32_t first_rank;
  uint32_t first_block;
  float scale;
  uint32_t padding;
} LoraSm90ForwardProjection;

/* A unit of work belongs to a cluster: its CTAs take neighbouring blocks of rows, or neighbouring units that split
 * factors. Tickets hand out the latter first, then bundles of h units, then single y units. Numbers of blocks are
 * multiples of the cluster's size; blocks past the matrix are empty. Of factors that are split r and h are as in
 * LoraForwardParams. */
typedef struct LoraSm90ForwardParams {
  LoraMatrix h; /* as it is written */
  uint64_t sync;
  uint32_t m;
  uint32_t k;
  uint32_t r; /* of all projections */
  uint32_t projection_count;
  uint32_t m_groups;   /* blocks of rows / CTAs per cluster */
  uint32_t n_blocks;   /* blocks of BN columns of all projections */
  uint32_t r_blocks;   /* narrow tiles along R */
  uint32_t h_units;    /* m_groups x r_blocks */
  uint32_t h_tickets;  /* ticket t hands out h units t, t + h_tickets, ... */
  uint32_t tickets;    /* those of split + h_tickets + m_groups x n_blocks */
  uint32_t group_m;    /* m_groups that share a pass over w */
  uint32_t flag_shift; /* 2^flag_shift M-blocks share a flag */
  uint32_t sync_words;
  uint32_t padding;
  LoraDropout dropout;
  uint64_t routes; /* address of the table; 0 when absent, and with more than one projection */
  LoraSplit split;
  LoraSm90ForwardProjection projections[LORA_MAX_PROJECTIONS];
} LoraSm90ForwardParams;

typedef struct LoraSm90Forward {
  LoraTensorMap maps[LORA_SM90_FORWARD_MAPS];
  LoraSm90ForwardParams params;
} LoraSm90Forward;

/* As LoraBackwardProjection. */
typedef struct LoraSm90BackwardProjection {
  LoraMatrix db;
  LoraMagnitude magnitude;
  uint64_t dbias;
  uint64_t gain;
  uint32_t n;
  uint32_t r;
  uint32_t first_rank;
  uint32_t n_groups; /* groups of 128-row blocks of db, as m_groups */
  uint32_t first_narrow;
  uint32_t first_db_tile;
  uint32_t flags;
  float scale;
} LoraSm90BackwardProjection;

/* Tickets hand out units that split factors, which are not counted but in `tickets`, then bundles of dh units, then dx,
 * db (with dbias) and da units. RN and RB are those of most_r for dh and db, of r for da, or of its pairs where factors
 * are split: r and dh are as in LoraBackwardParams, most_r counts pairs. */
typedef struct LoraSm90BackwardParams {
  LoraMatrix dh; /* as it is written */
  LoraMatrix dx; /* as it is read to accumulate */
  LoraMatrix da;
  uint64_t partials; /* f32, one block of partial_stride per (slab, chunk) of db and da */
  uint64_t sync;
  uint32_t m;
  uint32_t k;
  uint32_t r;      /* of all projections */
  uint32_t most_r; /* of any projection */
  uint32_t projection_count;
  uint32_t n_steps; /* of the reduction of dx over the N of all projections */
  uint32_t m_groups;
  uint32_t k_groups;   /* groups of 128-row blocks of da transposed */
  uint32_t k_blocks;   /* blocks of BN columns of dx */
  uint32_t dh_blocks;  /* narrow tiles of dh along the ranks of all projections */
  uint32_t dh_units;   /* m_groups x dh_blocks */
  uint32_t dh_tickets; /* ticket t hands out dh units t, t + dh_tickets, ... */
  uint32_t dx_end;     /* first ticket past dx: dh_tickets + m_groups x k_blocks */
  uint32_t db_end;     /* first ticket past db: dx_end + tiles of all projections x chunks */
  uint32_t tickets;    /* those of split + db_end + k_groups x blocks of R x chunks */
  uint32_t chunks;
  uint32_t chunk_rows; /* tokens per chunk, a multiple of the block of rows */
  uint32_t partial_stride;
  uint32_t counters; /* first slab counter, in words from sync */
  uint32_t group_m;
  uint32_t flag_shift;
  uint32_t sync_words;
  uint32_t flags;
  uint32_t padding;
  LoraDropout dropout;
  uint64_t routes; /* address of the table; 0 when absent, and with more than one projection */
  LoraSplit split;
  LoraSm90BackwardProjection projections[LORA_MAX_PROJECTIONS];
} LoraSm90BackwardParams;

typedef struct LoraSm90Backward {
  LoraTensorMap maps[LORA_SM90_BACKWARD_MAPS];
  LoraSm90BackwardParams params;
} LoraSm90Backward;

#endif
