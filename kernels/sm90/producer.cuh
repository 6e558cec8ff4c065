// The copies of each kind of unit, by one thread. Steps and their order are those of consumer.cuh.
#pragma once

#include "../routes.cuh"
#include "schedule.cuh"

namespace lora::sm90 {

enum class Major { kK, kMn };

template <class Shape>
class Producer {
 public:
  __device__ __forceinline__ explicit Producer(const Place& place) : place_(place), ring_(place.smem) {}

  // Steps of a main tile at (m, n), over the blocks of `extent` that take part: kBlockM rows of `a`, and kBlockN of `b`
  // that the cluster shares: each CTA copies its part to all.
  template <Major kMajorB>
  __device__ __forceinline__ void wide(const LoraTensorMap& a, const LoraTensorMap& b, uint32_t m, uint32_t n,
                                       const Picks& picks, uint32_t extent) {
    const uint32_t steps = picks.steps(kBlockK, extent);
#pragma unroll 1
    for (uint32_t step = 0; step < steps; ++step) {
      const uint32_t k = picks.start(step, kBlockK);
      const uint32_t stage = begin(Shape::kStageBytes);
      ptx::load_box(stage, a, ring_.full(), k, m);
      if (kMajorB == Major::kK) {
        constexpr uint32_t kHalf = Shape::kBlockN / 2;
        for (uint32_t half = place_.rank; half < 2; half += place_.size) {
          load_shared(stage + kBytesA + half * kHalf * kRowBytes, b, k, n + half * kHalf);
        }
      } else {
        for (uint32_t box = place_.rank; box < Shape::kBlockN / 64; box += place_.size) {
          load_shared(stage + kBytesA + box * kSlabBytes, b, n + box * 64, k);
        }
      }
      ring_.advance();
    }
  }

  // A narrow tile of h or dh: kBlockM rows of `a` from m on, `width` rows or columns of `b` from n on, over `blocks`
  // blocks of 64.
  template <Major kMajorB>
  __device__ __forceinline__ void narrow(const LoraTensorMap& a, const LoraTensorMap& b, uint32_t m, uint32_t n,
                                         uint32_t width, uint32_t blocks) {
    for_each_block(
        blocks, kBytesA + width * kRowBytes,
        [&](uint32_t smem, uint32_t k) {
          ptx::load_box(smem, a, ring_.full(), k, m);
          if (kMajorB == Major::kK) {
            ptx::load_box(smem + kBytesA, b, ring_.full(), k, n);
          } else {
            load_columns(smem + kBytesA, b, n, width, k);
          }
        },
        width, everything(0), [](uint32_t, uint32_t) {});
  }

  // A tile of db or daᵀ: kBlockM columns of `a` from m on, `width` columns of `b` from n on (room for them
  // without `with_b`), over `blocks` blocks of 64 tokens, of those that take part from `token` on. `beside`, unless
  // null: the same columns and tokens of it follow, in a stage of their own.
  __device__ __forceinline__ void gradient(const LoraTensorMap& a, const LoraTensorMap& b, uint32_t m, uint32_t n,
                                           uint32_t width, bool with_b, uint32_t token, const Picks& picks,
                                           uint32_t blocks, const LoraTensorMap* beside) {
    for_each_block(
        blocks, kBytesA + (with_b ? width * kRowBytes : 0),
        [&](uint32_t smem, uint32_t start) {
          const uint32_t k = token + start;
          load_columns(smem, a, m, kBlockM, k);
          if (with_b) load_columns(smem + kBytesA, b, n, width, k);
        },
        width, picks,
        [&](uint32_t done, uint32_t count) {
          if (beside == nullptr) return;
          const uint32_t stage = begin(count * kBytesA);
          for (uint32_t i = 0; i < count; ++i) {
            load_columns(stage + i * kBytesA, *beside, m, kBlockM, token + picks.start(done + i, kBlockK));
          }
          ring_.advance();
        });
  }

 private:
  // Waits until the stage at hand is free and says how much it will receive; its address.
  __device__ __forceinline__ uint32_t begin(uint32_t bytes) {
    ptx::mbarrier_wait(ring_.empty(), ring_.parity ^ 1);
    ptx::mbarrier_expect(ring_.full(), bytes);
    return ring_.data();
  }

  __device__ __forceinline__ void load_shared(uint32_t smem, const LoraTensorMap& map, uint32_t col, uint32_t row) {
    if (place_.size == 1) {
      ptx::load_box(smem, map, ring_.full(), col, row);
    } else {
      ptx::load_box_multicast(smem, map, ring_.full(), col, row, static_cast<uint16_t>((1u << place_.size) - 1));
    }
  }

  // `width` columns of an MN-major operand, 64 to a box.
  __device__ __forceinline__ void load_columns(uint32_t smem, const LoraTensorMap& map, uint32_t col, uint32_t width,
                                               uint32_t row) {
    for (uint32_t done = 0; done < width; done += 64) {
      ptx::load_box(smem + done * kRowBytes, map, ring_.full(), col + done, row);
    }
  }

  // A stage for every few blocks: `load` copies one, `then` does what follows a stage.
  template <class Load, class Then>
  __device__ __forceinline__ void for_each_block(uint32_t blocks, uint32_t block_bytes, const Load& load,
                                                 uint32_t width, const Picks& picks, const Then& then) {
    const uint32_t per_stage = narrow_blocks<Shape>(width);
#pragma unroll 1
    for (uint32_t done = 0; done < blocks; done += per_stage) {
      const uint32_t count = min(per_stage, blocks - done);
      const uint32_t stage = begin(count * block_bytes);
      for (uint32_t i = 0; i < count; ++i) {
        load(stage + i * (kBytesA + width * kRowBytes), picks.start(done + i, kBlockK));
      }
      ring_.advance();
      then(done, count);
    }
  }

  Place place_;
  Ring<Shape> ring_;
};

}  // namespace lora::sm90
