// The products of each kind of unit, by a warpgroup that owns a slab of 64 rows of the tile.
#pragma once

#include "../ptx/warpgroup.cuh"
#include "../ptx/wgmma.cuh"
#include "schedule.cuh"

namespace lora::sm90 {

// A K-major operand: rows of 128 bytes.
__device__ __forceinline__ uint64_t k_major(uint32_t smem) {
  return ptx::matrix_descriptor(smem, kSlabBytes, 8 * kRowBytes, ptx::Swizzle::k128);
}

// An MN-major operand of `kN` columns: boxes of 64 columns (fewer if there are fewer) and 64 steps of k.
template <int kN>
__device__ __forceinline__ uint64_t mn_major(uint32_t smem) {
  constexpr uint32_t kRow = (kN < 64 ? kN : 64) * 2;
  constexpr ptx::Swizzle kSwizzle = kRow == 128  ? ptx::Swizzle::k128
                                    : kRow == 64 ? ptx::Swizzle::k64
                                                 : ptx::Swizzle::k32;
  static_assert(kRow >= 32, "no narrower swizzle");
  return ptx::matrix_descriptor(smem, kSlabBytes, 8 * kRow, kSwizzle);
}

// Bytes from one k16 to the next.
constexpr uint32_t kStepK = 32;
template <int kN>
constexpr uint32_t kStepMn = 16 * (kN < 64 ? kN : 64) * 2;

// What a narrow tile of kN_ columns multiplies, and whether it computes the product, the sums of A's rows, or both.
template <int kN_, int kMnMajorA_, int kMnMajorB_, bool kProduct_, bool kSums_>
struct Narrow {
  static constexpr int kN = kN_;
  static constexpr int kMnMajorA = kMnMajorA_;
  static constexpr int kMnMajorB = kMnMajorB_;
  static constexpr bool kProduct = kProduct_;
  static constexpr bool kSums = kSums_;
};

template <class Shape>
class Consumer {
 public:
  using T = typename Shape::T;
  static constexpr int kWideN = Shape::kBlockN;

  __device__ __forceinline__ explicit Consumer(const Place& place)
      // The shuffle tells the compiler that a warp has one slab: descriptors can live in uniform registers.
      : place_(place), ring_(place.smem), slab_(__shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup - 1, 0)) {}

  // Which slab of the tile is this warpgroup's, 0 or 1.
  __device__ __forceinline__ uint32_t slab() const { return slab_; }

  // This thread's row of fragment half 0 or 1 within the slab, and its first column of each 8.
  static __device__ __forceinline__ uint32_t row_of(int half) {
    return threadIdx.x % kWarpgroup / 32 * 16 + half * 8 + threadIdx.x % 32 / 4;
  }
  static __device__ __forceinline__ uint32_t col_of(int j) { return j * 8 + threadIdx.x % 4 * 2; }

  // The boxes on their way out, in turn across tiles.
  __device__ __forceinline__ uint32_t next_box() {
    const uint32_t box = place_.smem + Shape::kBoxes + (slab_ * kStoreBoxes + box_) * kStoreBytes;
    box_ = (box_ + 1) % kStoreBoxes;
    return box;
  }

  // All threads of the warpgroup.
  __device__ __forceinline__ void barrier() const { ptx::named_barrier(1 + slab_, kWarpgroup); }
  __device__ __forceinline__ bool is_first_thread() const { return threadIdx.x % kWarpgroup == 0; }

  // A main tile: `steps` of kBlockK, those of the tail included, and a last one of `rest` (0..3) times 16. Straight
  // lines of wgmmas: with branches among them ptxas would wait for each.
  template <int kMnMajorB>
  __device__ __forceinline__ void wide(float (&acc)[kWideN / 2], uint32_t steps, uint32_t rest) {
    wide_step<kMnMajorB, 4, true>(acc);
#pragma unroll 1
    for (uint32_t i = 1; i < steps; ++i) wide_step<kMnMajorB, 4, false>(acc);
    if (rest == 1) wide_step<kMnMajorB, 1, false>(acc);
    if (rest == 2) wide_step<kMnMajorB, 2, false>(acc);
    if (rest == 3) wide_step<kMnMajorB, 3, false>(acc);
    drain();
    ptx::pin(acc);
  }

  // A narrow tile over `blocks` blocks of 64; in `sums` the sums of A's rows.
  template <class Kind>
  __device__ __forceinline__ void narrow(float (&acc)[Kind::kN / 2], float (&sums)[4], uint32_t blocks) {
    constexpr uint32_t kPerStage = narrow_blocks<Shape>(Kind::kN);
    // The first condition is known when compiling: where a stage holds one block, the branch is left out.
    if (kPerStage > 1 && blocks < kPerStage) {
      narrow_step<Kind, 1, true>(acc, sums);
    } else {
      narrow_step<Kind, kPerStage, true>(acc, sums);
#pragma unroll 1
      for (uint32_t i = 1; i < blocks / kPerStage; ++i) narrow_step<Kind, kPerStage, false>(acc, sums);
      if (blocks % kPerStage != 0) narrow_step<Kind, 1, false>(acc, sums);
    }
    drain();
    if (Kind::kProduct) ptx::pin(acc);
    if (Kind::kSums) ptx::pin(sums);
  }

 private:
  template <int kMnMajorB, uint32_t kCount, bool kFirst>
  __device__ __forceinline__ void wide_step(float (&acc)[kWideN / 2]) {
    using Mma = ptx::Wgmma<T, kWideN, 0, kMnMajorB>;
    constexpr uint32_t kStepB = kMnMajorB ? kStepMn<64> : kStepK;
    const uint32_t stage = begin();
    const uint64_t a = k_major(stage + slab_ * kSlabBytes);
    const uint64_t b = kMnMajorB ? mn_major<64>(stage + kBytesA) : k_major(stage + kBytesA);
    ptx::wgmma_fence();
    Mma::template mma<kFirst>(acc, a, b);
#pragma unroll
    for (uint32_t i = 1; i < kCount; ++i) {
      Mma::template mma<false>(acc, ptx::advance(a, i * kStepK), ptx::advance(b, i * kStepB));
    }
    end();
  }

  template <class Kind, uint32_t kCount, bool kFirst>
  __device__ __forceinline__ void narrow_step(float (&acc)[Kind::kN / 2], float (&sums)[4]) {
    static_assert(kCount <= 2, "the blocks of a stage are written out");
    const uint32_t stage = begin();
    ptx::wgmma_fence();
    narrow_block<Kind, kFirst>(acc, sums, stage);
    if (kCount == 2) narrow_block<Kind, false>(acc, sums, stage + kBytesA + Kind::kN * kRowBytes);
    end();
  }

  template <class Kind, bool kFirst>
  __device__ __forceinline__ void narrow_block(float (&acc)[Kind::kN / 2], float (&sums)[4], uint32_t smem) {
    using Mma = ptx::Wgmma<T, Kind::kN, Kind::kMnMajorA, Kind::kMnMajorB>;
    using Sum = ptx::Wgmma<T, 8, Kind::kMnMajorA, 0>;
    constexpr uint32_t kStepA = Kind::kMnMajorA ? kStepMn<64> : kStepK;
    constexpr uint32_t kStepB = Kind::kMnMajorB ? kStepMn<Kind::kN> : kStepK;
    const uint32_t smem_a = smem + slab_ * kSlabBytes;
    const uint64_t a = Kind::kMnMajorA ? mn_major<64>(smem_a) : k_major(smem_a);
    const uint64_t b = Kind::kMnMajorB ? mn_major<Kind::kN>(smem + kBytesA) : k_major(smem + kBytesA);
    const uint64_t ones = ptx::matrix_descriptor(place_.smem + Shape::kOnes, 128, 128, ptx::Swizzle::kNone);
    if (Kind::kProduct) Mma::template mma<kFirst>(acc, a, b);
    if (Kind::kSums) Sum::template mma<kFirst>(sums, a, ones);
#pragma unroll
    for (uint32_t i = 1; i < kBlockK / 16; ++i) {
      if (Kind::kProduct) Mma::template mma<false>(acc, ptx::advance(a, i * kStepA), ptx::advance(b, i * kStepB));
      if (Kind::kSums) Sum::template mma<false>(sums, ptx::advance(a, i * kStepA), ones);
    }
  }

  // Waits until the stage at hand has landed; its address.
  __device__ __forceinline__ uint32_t begin() {
    ptx::mbarrier_wait(ring_.full(), ring_.parity);
    return ring_.data();
  }

  // Commits the products of this stage and lets the one before go, whose products are done: the tensor cores always
  // have a group to work on.
  __device__ __forceinline__ void end() {
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    release();
    held_ = ring_.empty();
    ring_.advance();
  }

  __device__ __forceinline__ void drain() {
    ptx::wgmma_wait<0>();
    release();
    held_ = 0;
  }

  // Each warp tells every producer of the cluster: this CTA's operands and the shared one are no longer read.
  __device__ __forceinline__ void release() {
    const uint32_t lane = threadIdx.x % 32;
    if (held_ != 0 && lane < place_.size) ptx::mbarrier_arrive(ptx::map_shared(held_, lane));
  }

  Place place_;
  Ring<Shape> ring_;
  uint32_t slab_;
  uint32_t box_ = 0;
  uint32_t held_ = 0;  // empty barrier of the stage whose products may still be running
};

}  // namespace lora::sm90
