// Dropout, where the Hopper family meets it: x as it lies in a stage of the ring, and the accumulators of dx.
#pragma once

#include "../dropout.cuh"
#include "ring.cuh"

namespace lora::sm90 {

// With seed and offset as `prepare_seed` has left them.
__device__ __forceinline__ Dropout load_dropout(uint32_t smem, uint32_t threshold) {
  const uint4 words = ptx::load_shared_16(smem);
  return Dropout({words.x | static_cast<uint64_t>(words.y) << 32, words.z | static_cast<uint64_t>(words.w) << 32, 0,
                  threshold, 0});
}

// Zeroes what is dropped of a slab of x, whose first element is (row, col): 64 rows of 64 columns, whichever the
// products reduce over. A thread has rows g and g + 8 of one block of 16 x 16, so four results of the generator; eight
// neighbours, with as many g, reach all banks.
__device__ __forceinline__ void drop_slab(const Dropout& dropout, uint32_t smem, uint32_t row, uint32_t col) {
  const uint32_t thread = threadIdx.x % kWarpgroup;
  const uint32_t g = thread % 8;
  const uint32_t block_row = thread / 32;
  const uint32_t block_col = thread / 8 % 4;
  // Chunk i has the elements of word i of each result: rows g, g + 8 of the first 8 columns, then of the others.
  const auto chunk = [&](uint32_t i) {
    return smem + (block_row * 16 + i % 2 * 8 + g) * kRowBytes + ((block_col * 2 + i / 2) ^ g) * 16;
  };
  uint4 x[4];
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) x[i] = ptx::load_shared_16(chunk(i));
#pragma unroll
  for (uint32_t t = 0; t < 4; ++t) {
    const PhiloxWords random = dropout.words(row / 16 + block_row, col / 16 + block_col, g, t);
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      uint32_t& pair = t == 0 ? x[i].x : t == 1 ? x[i].y : t == 2 ? x[i].z : x[i].w;
      pair = dropout.kept(pair, random.of[i]);
    }
  }
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) ptx::store_shared_16(chunk(i), x[i]);
}

// Which of a thread's accumulators are kept, of a slab of kN columns: bit i of word p is register i of columns 64 p on.
// They are drawn 16 columns at a time, from the first on.
template <int kN>
class KeptBits {
 public:
  static constexpr uint32_t kDraws = kN / 16;

  // Columns [16 i, 16 i + 16) of the slab at (row, col), in the order of i.
  __device__ __forceinline__ void draw(const Dropout& dropout, uint32_t row, uint32_t col, uint32_t i) {
    const uint32_t thread = threadIdx.x % kWarpgroup;
    const PhiloxWords random = dropout.words(row / 16 + thread / 32, col / 16 + i, thread % 32 / 4, thread % 4);
    uint32_t bits = 0;
#pragma unroll
    for (int word = 0; word < 4; ++word) {  // of registers 2 · word and the next
      if (dropout.keeps_low(random.of[word])) bits |= 1u << 2 * word;
      if (dropout.keeps_high(random.of[word])) bits |= 2u << 2 * word;
    }
    // In at the top; after the last draw the first is at the bottom.
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      words_[word] = __funnelshift_r(words_[word], word + 1 < kWords ? words_[word + 1] : bits, 8);
    }
  }

  __device__ __forceinline__ bool keeps(uint32_t part, uint32_t i) const { return (words_[part] >> i & 1) != 0; }

 private:
  static constexpr int kWords = kN / 64;
  uint32_t words_[kWords] = {};
};

}  // namespace lora::sm90
