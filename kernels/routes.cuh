// Many adapters in one batch: which ranks a row of x goes through (src/routing.rs lays the table out).
#pragma once

#include <stdint.h>

#include "params.h"

namespace lora {

// Blocks of `size` along a reduction that take part in it: bit i of `mask` is the one from i · size on. A mask of 1 is
// for a single block that holds everything.
struct Picks {
  uint64_t mask;
  uint32_t size;

  // Number of steps of `step` indices up to `extent`, past which no block begins.
  __device__ __forceinline__ uint32_t steps(uint32_t step, uint32_t extent) const {
    if (mask == 0) return 0;
    const uint32_t last = 63 - __clzll(mask);
    return (__popcll(mask) - 1) * (size / step) + (min(extent - last * size, size) + step - 1) / step;
  }

  // Where step `index` starts.
  __device__ __forceinline__ uint32_t start(uint32_t index, uint32_t step) const {
    if (mask == 1) return index * step;
    const uint32_t per_block = size / step;
    uint32_t rank = index / per_block;  // of the block among those that take part
    uint32_t block = 0;
#pragma unroll
    for (uint32_t width = 32; width != 0; width /= 2) {
      const uint32_t below = __popcll(mask >> block & ((1ull << width) - 1));
      if (rank >= below) {
        rank -= below;
        block += width;
      }
    }
    return block * size + index % per_block * step;
  }
};

// All of a reduction over `extent` indices, of which steps of up to 64 are taken.
__device__ __forceinline__ Picks everything(uint32_t extent) { return {1, (extent + 63) / 64 * 64}; }

class Routes {
 public:
  __device__ __forceinline__ Routes(uint64_t table, uint32_t rows)
      : words_(reinterpret_cast<const uint64_t*>(table)), rows_(rows) {}

  // The same in every thread of a launch. When false, nothing else may be asked.
  __device__ __forceinline__ bool is_on() const { return words_ != nullptr; }

  // What a row keeps of `value` at rank `rank`.
  class Row {
   public:
    __device__ __forceinline__ explicit Row(uint64_t word) : word_(word) {}
    __device__ __forceinline__ float keep(float value, uint32_t rank) const {
      const uint32_t ranks = static_cast<uint32_t>(word_ >> 32);
      const bool kept = rank >= (ranks & 0xffff) && rank < ranks >> 16;
      return kept ? value * __uint_as_float(static_cast<uint32_t>(word_)) : 0.0f;
    }

   private:
    uint64_t word_;
  };
  __device__ __forceinline__ Row row(uint32_t row) const { return Row(words_[row]); }

  // Blocks of LORA_ROUTE_RANKS of `ranks` that rows [row, row + count) keep anything of, from a multiple of
  // LORA_ROUTE_ROWS on; of each rank the reduction has `columns`.
  __device__ __forceinline__ Picks ranks_of(uint32_t row, uint32_t count, uint32_t ranks, uint32_t columns) const {
    uint64_t mask = 0;
    const uint32_t end = min(row + count, rows_);
#pragma unroll 2
    for (uint32_t at = row; at < end; at += LORA_ROUTE_ROWS) mask |= block(at);
    return {mask & up_to(ranks), columns * LORA_ROUTE_RANKS};
  }

  // Blocks of [row, row + count), from a multiple of LORA_ROUTE_ROWS on, with a row that keeps anything of the blocks
  // of ranks that have some of [rank, rank + width); as many rows to a block as leave 64 blocks at most. By a whole
  // warp.
  __device__ __forceinline__ Picks rows_of(uint32_t row, uint32_t count, uint32_t rank, uint32_t width) const {
    const uint32_t blocks = (count + LORA_ROUTE_ROWS - 1) / LORA_ROUTE_ROWS;
    const uint32_t per_pick = (blocks + 63) / 64;
    const uint64_t wanted = blocks_of(rank, width);
    uint64_t mask = 0;
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t first = (half * 32 + threadIdx.x % 32) * per_pick;
      uint64_t found = 0;
      for (uint32_t at = first; at < min(first + per_pick, blocks); ++at) found |= block(row + at * LORA_ROUTE_ROWS);
      mask |= static_cast<uint64_t>(__ballot_sync(0xffffffffu, (found & wanted) != 0)) << half * 32;
    }
    return {mask, per_pick * LORA_ROUTE_ROWS};
  }

  // The same by one thread.
  __device__ __forceinline__ Picks rows_of_alone(uint32_t row, uint32_t count, uint32_t rank, uint32_t width) const {
    const uint32_t blocks = (count + LORA_ROUTE_ROWS - 1) / LORA_ROUTE_ROWS;
    const uint32_t per_pick = (blocks + 63) / 64;
    const uint64_t wanted = blocks_of(rank, width);
    uint64_t mask = 0;
    uint64_t bit = 1;
    uint32_t left = per_pick;
#pragma unroll 4  // that many loads at a time
    for (uint32_t at = 0; at < blocks; ++at) {
      if ((block(row + at * LORA_ROUTE_ROWS) & wanted) != 0) mask |= bit;
      if (--left == 0) {
        bit <<= 1;
        left = per_pick;
      }
    }
    return {mask, per_pick * LORA_ROUTE_ROWS};
  }

  // Whether any row keeps anything of the block of ranks that has `rank`. By a whole warp.
  __device__ __forceinline__ bool any_row_of(uint32_t rank) const {
    bool found = false;
    for (uint32_t first = 0; first < rows_ && !found; first += 32 * LORA_ROUTE_ROWS) {
      const uint32_t row = first + threadIdx.x % 32 * LORA_ROUTE_ROWS;
      const uint64_t mask = row < rows_ ? block(row) : 0;
      found = __any_sync(0xffffffffu, (mask >> rank / LORA_ROUTE_RANKS & 1) != 0);
    }
    return found;
  }

 private:
  __device__ __forceinline__ uint64_t block(uint32_t row) const { return words_[rows_ + row / LORA_ROUTE_ROWS]; }

  // Bits of the blocks that begin below `ranks`.
  static __device__ __forceinline__ uint64_t up_to(uint32_t ranks) {
    const uint32_t blocks = (ranks + LORA_ROUTE_RANKS - 1) / LORA_ROUTE_RANKS;
    return blocks >= 64 ? ~0ull : (1ull << blocks) - 1;
  }

  // Bits of the blocks that have any of [rank, rank + width).
  static __device__ __forceinline__ uint64_t blocks_of(uint32_t rank, uint32_t width) {
    return up_to(rank + width) & ~((1ull << rank / LORA_ROUTE_RANKS) - 1);
  }

  const uint64_t* words_;
  uint32_t rows_;
};

}  // namespace lora
