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

/* The synchronisation words at the start of a workspace: all zero before a launch and after it. */
#define LORA_SYNC_BYTES 65536
#define LORA_SYNC_TICKET 0 /* next unit of work */
#define LORA_SYNC_EXITED 1 /* CTAs that have finished */
#define LORA_SYNC_FLAGS 2  /* first h / dh flag; the tile counters of db and da follow the flags */

/* LoraBackwardParams::flags */
#define LORA_ACCUMULATE_DX 1u
#define LORA_ACCUMULATE_DA 2u
#define LORA_ACCUMULATE_DB 4u
#define LORA_ACCUMULATE_DBIAS 8u
#define LORA_DA_F32 16u
#define LORA_DB_F32 32u
#define LORA_DBIAS_F32 64u

/* A row-major matrix: address of element (0, 0), 0 when absent, and elements between row starts. */
typedef struct LoraMatrix {
  uint64_t ptr;
  int64_t row_stride;
} LoraMatrix;

/* Units of work are numbered h first, then y. */
typedef struct LoraForwardParams {
  LoraMatrix x;
  LoraMatrix w;
  LoraMatrix a;
  LoraMatrix b;
  LoraMatrix h;
  LoraMatrix y;
  uint64_t bias; /* N elements, 0 when absent */
  uint64_t sync;
  uint32_t m;
  uint32_t n;
  uint32_t k;
  uint32_t r;
  float scale;
  uint32_t m_blocks;
  uint32_t n_blocks;
  uint32_t h_units;    /* m_blocks x blocks of R */
  uint32_t units;      /* h_units + m_blocks x n_blocks */
  uint32_t group_m;    /* M-blocks that share a pass over w, for reuse in L2 */
  uint32_t flag_shift; /* 2^flag_shift M-blocks share a flag */
  uint32_t sync_words; /* words the last CTA clears */
} LoraForwardParams;

/* Units of work are numbered dh, dx, db (with dbias), da. */
typedef struct LoraBackwardParams {
  LoraMatrix dy;
  LoraMatrix w;
  LoraMatrix a;
  LoraMatrix b;
  LoraMatrix x;
  LoraMatrix h;
  LoraMatrix dh;
  LoraMatrix dx;
  LoraMatrix da;
  LoraMatrix db;
  uint64_t dbias;    /* N elements, 0 when absent */
  uint64_t partials; /* f32, one block of partial_stride per (tile, chunk) of db and da */
  uint64_t sync;
  uint32_t m;
  uint32_t n;
  uint32_t k;
  uint32_t r;
  float scale;
  uint32_t m_blocks;
  uint32_t n_blocks;
  uint32_t k_blocks;
  uint32_t dh_units;       /* m_blocks x blocks of R */
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
} LoraBackwardParams;

#endif
