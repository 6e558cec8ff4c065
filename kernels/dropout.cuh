// Dropout on the adapter branch: which elements of x it keeps, by Philox-4x32-10 (src/ops.rs has the definition).
//
// One result serves eight elements of a 16 x 16 block: rows g, g + 8 and columns 2t, 2t + 1, 2t + 8, 2t + 9. These are
// the elements that lane 4 g + t holds of an A fragment of mma.m16n8k16, word i of the result those of register i; and
// of the accumulators of two neighbouring fragments of 8 columns, words 0, 1 those of the first.
#pragma once

#include <stdint.h>

#include "params.h"
#include "ptx/scalar.cuh"

namespace lora {

struct PhiloxWords {
  uint32_t of[4];
};

__device__ __forceinline__ PhiloxWords philox(PhiloxWords counter, uint32_t key0, uint32_t key1) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = ptx::multiply_wide(counter.of[0], 0xd2511f53u);
    const uint64_t second = ptx::multiply_wide(counter.of[2], 0xcd9e8d57u);
    counter = {{static_cast<uint32_t>(second >> 32) ^ counter.of[1] ^ key0, static_cast<uint32_t>(second),
                static_cast<uint32_t>(first >> 32) ^ counter.of[3] ^ key1, static_cast<uint32_t>(first)}};
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  return counter;
}

class Dropout {
 public:
  // Reads seed and offset where they are in memory.
  __device__ __forceinline__ explicit Dropout(const LoraDropout& from)
      : seed_(from.seed), offset_(from.offset), on_(from.threshold != 0), limit_((from.threshold << 16) - 1) {
    if (on_ && from.state != 0) {
      const uint64_t* const state = reinterpret_cast<const uint64_t*>(from.state);
      seed_ = state[0];
      offset_ = state[1];
    }
  }

  // The same in every thread of a launch. When false, nothing else may be asked.
  __device__ __forceinline__ bool is_on() const { return on_; }

  // Random bits of (g, t) in the block of 16 x 16 elements `row`, `col`.
  __device__ __forceinline__ PhiloxWords words(uint32_t row, uint32_t col, uint32_t g, uint32_t t) const {
    const PhiloxWords counter = {
        {row * 8 + g, col * 4 + t, static_cast<uint32_t>(offset_), static_cast<uint32_t>(offset_ >> 32)}};
    return philox(counter, static_cast<uint32_t>(seed_), static_cast<uint32_t>(seed_ >> 32));
  }

  // Whether the element whose bits are the lower (upper) half of `word` is kept. A threshold of 65536 keeps none: the
  // limit is then the largest word.
  __device__ __forceinline__ bool keeps_low(uint32_t word) const { return word << 16 > limit_; }
  __device__ __forceinline__ bool keeps_high(uint32_t word) const { return word > limit_; }

  // Two neighbours in one register, zero where dropped.
  __device__ __forceinline__ uint32_t kept(uint32_t pair, uint32_t word) const {
    if (!keeps_low(word)) pair &= 0xffff0000u;
    if (!keeps_high(word)) pair &= 0x0000ffffu;
    return pair;
  }

  // Drops from a fragment of x, 16 rows and columns from (row, col) on, both multiples of 16.
  __device__ __forceinline__ void drop_fragment(uint32_t (&x)[4], uint32_t row, uint32_t col, uint32_t lane) const {
    const PhiloxWords random = words(row / 16, col / 16, lane / 4, lane % 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = kept(x[i], random.of[i]);
  }

  // Drops from a fragment of x transposed: register 0 holds rows 2t, 2t + 1 of column g of x, register 1 those of
  // column g + 8, registers 2 and 3 the rows 8 on. These are halves of two results, for rows 2t and 2t + 1 of columns g
  // and g ^ 1; the lane that holds g ^ 1 needs the other halves. So each computes one, and they swap halves.
  __device__ __forceinline__ void drop_transposed(uint32_t (&x)[4], uint32_t row, uint32_t col, uint32_t lane) const {
    const bool odd = lane / 4 % 2 != 0;
    const PhiloxWords random = words(row / 16, col / 16, lane % 4 * 2 + (odd ? 1 : 0), lane / 8);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      // Words i and i + 1: rows 8 apart, of column g (i = 0) or g + 8.
      const uint32_t given = __byte_perm(random.of[i], random.of[i + 1], odd ? 0x5410 : 0x7632);
      const uint32_t taken = __shfl_xor_sync(0xffffffffu, given, 4);
      const uint32_t top = __byte_perm(random.of[i], taken, odd ? 0x3254 : 0x5410);
      const uint32_t bottom = __byte_perm(random.of[i + 1], taken, odd ? 0x3276 : 0x7610);
      x[i / 2] = kept(x[i / 2], top);
      x[i / 2 + 2] = kept(x[i / 2 + 2], bottom);
    }
  }

 private:
  uint64_t seed_;
  uint64_t offset_;
  bool on_;
  uint32_t limit_;  // kept: 16 bits, as the upper half of a word, above this
};

}  // namespace lora
