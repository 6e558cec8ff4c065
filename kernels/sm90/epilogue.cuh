// From accumulators to memory.
#pragma once

#include "../element.cuh"
#include "../routes.cuh"
#include "../split.cuh"
#include "consumer.cuh"

namespace lora::sm90 {

// Multiplies the columns of a slab of y, from n on, by the gain.
template <class Shape>
__device__ __forceinline__ void gain_columns(float (&acc)[Shape::kBlockN / 2], const float* gain, uint32_t n,
                                             uint32_t cols) {
#pragma unroll
  for (uint32_t j = 0; j < Shape::kBlockN / 8; ++j) {
    const uint32_t col = n + Consumer<Shape>::col_of(j);
    if (col >= cols) return;
    const float2 factors = *reinterpret_cast<const float2*>(gain + col);
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      acc[4 * j + 2 * half] *= factors.x;
      acc[4 * j + 2 * half + 1] *= factors.y;
    }
  }
}

// A slab of y or dx at (m, n), through boxes of 64 columns in shared memory. The stores are left in flight: they
// overlap with the next tile, and a box is written again only when its store has read it.
template <class Shape, class Adjust>
__device__ __forceinline__ void store_wide(Consumer<Shape>& consumer, const float (&acc)[Shape::kBlockN / 2],
                                           const LoraTensorMap& map, uint32_t m, uint32_t n, uint32_t rows,
                                           uint32_t cols, const Adjust& adjust) {
  using T = typename Shape::T;
  const uint32_t lane = threadIdx.x % 32;
  // stmatrix: this lane's row of the box, and which of two chunks of 8 columns.
  const uint32_t box_row = threadIdx.x % kWarpgroup / 32 * 16 + lane % 16;
#pragma unroll
  for (uint32_t part = 0; part < Shape::kBlockN / kStoreN; ++part) {
    const uint32_t box = consumer.next_box();
    if (consumer.is_first_thread()) ptx::store_wait_read<kStoreBoxes - 1>();
    consumer.barrier();
#pragma unroll
    for (uint32_t j = 0; j < kStoreN / 16; ++j) {
      uint32_t packed[4];
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {  // (rows 0-7, 8-15) of 8 columns, then of the next 8
        const uint32_t fragment = part * (kStoreN / 8) + j * 2 + i / 2;
        const uint32_t row = m + Consumer<Shape>::row_of(i % 2);
        const uint32_t col = n + Consumer<Shape>::col_of(fragment);
        const float2 value = adjust(acc[fragment * 4 + i % 2 * 2], acc[fragment * 4 + i % 2 * 2 + 1], row, col);
        packed[i] = pack<T>(value.x, value.y);
      }
      const uint32_t chunk = j * 2 + lane / 16;
      ptx::stmatrix_x4(box + box_row * (kStoreN * 2) + (chunk ^ box_row % 8) * 16, packed);
    }
    ptx::fence_async_shared();
    consumer.barrier();
    if (consumer.is_first_thread()) {
      const uint32_t col = n + part * kStoreN;
      if (m < rows && col < cols) ptx::store_box(map, box, col, m);
      ptx::store_commit();  // an empty group keeps the count of boxes
    }
  }
}

// A slab of h or dh: out = scale(rank) · acc, and of that what its rows keep, from registers.
template <class Shape, int kN, class Scale>
__device__ __forceinline__ void store_narrow(const float (&acc)[kN / 2], const LoraMatrix& out, uint32_t m, uint32_t n,
                                             uint32_t rows, uint32_t cols, const Scale& scale, const Routes& routes) {
  using T = typename Shape::T;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t row = m + Consumer<Shape>::row_of(half);
    if (row >= rows) continue;
    T* const gmem = reinterpret_cast<T*>(out.ptr) + row * out.row_stride;
    const Routes::Row route = routes.is_on() ? routes.row(row) : Routes::Row(0);
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
      const uint32_t col = n + Consumer<Shape>::col_of(j);
      if (col >= cols) continue;  // R is a multiple of 8: pairs are whole, and rows of 16 bytes aligned
      // R of each projection is a multiple of 8, so that a pair has one scale.
      const float factor = scale(col);
      float low = acc[4 * j + 2 * half] * factor;
      float high = acc[4 * j + 2 * half + 1] * factor;
      if (routes.is_on()) {
        low = route.keep(low, col);
        high = route.keep(high, col + 1);
      }
      const uint32_t pair = pack<T>(low, high);
      *reinterpret_cast<uint32_t*>(gmem + col) = pair;
    }
  }
}

// The same of products with pairs, as pairs and triples: fragments of high and low halves take turns.
template <class Shape, int kN, class Groups>
__device__ __forceinline__ void store_narrow_halves(const float (&acc)[kN / 2], const LoraSplit& split,
                                                    const LoraMatrix& triples, uint32_t m, uint32_t n, uint32_t rows,
                                                    const Groups& groups, const Routes& routes) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t row = m + Consumer<Shape>::row_of(half);
    if (row >= rows) continue;
    const Routes::Row route = routes.is_on() ? routes.row(row) : Routes::Row(0);
#pragma unroll
    for (int j = 0; j < kN / 8; j += 2) {
      const int high = 4 * j + 2 * half, low = high + 4;
      store_halves<typename Shape::T>(split.pairs, triples, row, n + Consumer<Shape>::col_of(j), groups,
                                      make_float2(acc[high], acc[high + 1]), make_float2(acc[low], acc[low + 1]),
                                      [&](float value, uint32_t rank, float scale) {
                                        return routes.is_on() ? route.keep(value * scale, rank) : value * scale;
                                      });
    }
  }
}

// Makes what the warpgroup has stored visible to those who wait for `word`.
template <class Shape>
__device__ __forceinline__ void publish(const Consumer<Shape>& consumer, uint64_t sync, uint32_t word) {
  consumer.barrier();
  if (consumer.is_first_thread()) ptx::add_release(sync_word(sync, word), 1);
}

// Counts the warpgroup's arrival at a word, after all it has stored; true in the one that completes `total` arrivals,
// which then sees everything the others stored.
template <class Shape>
__device__ __forceinline__ bool arrive_last(const Consumer<Shape>& consumer, const Place& place, uint64_t sync,
                                            uint32_t word, uint32_t total) {
  const uint32_t slot = place.smem + Shape::kArrival + consumer.slab() * 4;
  consumer.barrier();  // and all have read the slot of the time before
  if (consumer.is_first_thread()) ptx::store_shared_4(slot, ptx::atomic_add_acq_rel(sync_word(sync, word), 1));
  consumer.barrier();
  return ptx::load_shared_4(slot) == total - 1;
}

// Leaves what a narrow product gave in `partial`, register by register: every access is coalesced, and the same thread
// of whichever warpgroup adds them up has the same elements. Product first, then the two sums.
template <class Kind>
__device__ __forceinline__ void store_partial(float* partial, const float (&acc)[Kind::kN / 2],
                                              const float (&sums)[4]) {
  float* const mine = partial + threadIdx.x % kWarpgroup;
  if constexpr (Kind::kProduct) {
#pragma unroll
    for (int i = 0; i < Kind::kN / 2; ++i) mine[i * kWarpgroup] = acc[i];
  }
  if constexpr (Kind::kSums) {
    mine[Kind::kN / 2 * kWarpgroup] = sums[0];
    mine[(Kind::kN / 2 + 1) * kWarpgroup] = sums[2];
  }
}

// The sum of registers [first, first + kCount) over `chunks` partial results, in their order: the bits do not depend on
// which warpgroup was last. Registers from `end` on are not there.
template <int kCount>
__device__ __forceinline__ void sum_partials(float (&sum)[kCount], const float* partial, uint32_t stride,
                                             uint32_t chunks, uint32_t first, uint32_t end) {
  const float* const mine = partial + first * kWarpgroup + threadIdx.x % kWarpgroup;
  const auto load = [&](const float* from, int i) { return first + i < end ? from[i * kWarpgroup] : 0.0f; };
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum[i] = load(mine, i);
#pragma unroll 2
  for (uint32_t chunk = 1; chunk < chunks; ++chunk) {
    const float* const other = mine + static_cast<uint64_t>(chunk) * stride;
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] += load(other, i);
  }
}

}  // namespace lora::sm90
