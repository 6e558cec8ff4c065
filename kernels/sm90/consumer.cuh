// The products of each kind of unit, by a warpgroup that owns a slab of 64 rows of the tile.
#pragma once

#include "../ptx/warpgroup.cuh"
#include "../ptx/wgmma.cuh"
#include "drop.cuh"
#include "gain.cuh"
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
    wide_from<kMnMajorB>(acc, 1, steps, rest);
  }

  // The same for dx, where the first `altered` steps are altered, each while the products of the one before run;
  // `alter` as for a narrow tile.
  template <class Alter>
  __device__ __forceinline__ void wide_altered(float (&acc)[kWideN / 2], uint32_t altered, uint32_t steps,
                                               uint32_t rest, const Alter& alter) {
    if (altered == 0) {
      wide_step<1, 4, true>(acc);
    } else {
      wide_altered_step<true>(acc, 0, alter);
#pragma unroll 1
      for (uint32_t i = 1; i < altered; ++i) wide_altered_step<false>(acc, i, alter);
    }
    wide_from<1>(acc, max(altered, 1), steps, rest);
  }

  // A narrow tile over `blocks` blocks of 64; in `sums` the sums of A's rows.
  template <class Kind>
  __device__ __forceinline__ void narrow(float (&acc)[Kind::kN / 2], float (&sums)[4], uint32_t blocks) {
    constexpr uint32_t kPerStage = narrow_blocks<Shape>(Kind::kN);
    if (blocks == 0) {
#pragma unroll
      for (float& value : acc) value = 0.0f;
#pragma unroll
      for (float& value : sums) value = 0.0f;
      return;
    }
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

  // A tile of dx under dropout: `steps` of kBlockK, then a tail of `tail` times 16 to which dropout applies.
  // `draw(kept, i)` draws what is kept of 16 columns, behind the products of the first steps; the tail goes to
  // registers of its own, 64 columns at a time, of which kept elements are added.
  template <class Draw>
  __device__ __forceinline__ void wide_kept(float (&acc)[kWideN / 2], uint32_t steps, uint32_t tail, const Draw& draw) {
    KeptBits<kWideN> kept;
    uint32_t drawn = 0;
    wide_step<1, 4, true>(acc);
#pragma unroll 1
    for (; drawn < min(kept.kDraws, steps - 1); ++drawn) {
      wide_step<1, 4, false>(acc);
      draw(kept, drawn);
    }
#pragma unroll 1
    for (uint32_t i = drawn + 1; i < steps; ++i) wide_step<1, 4, false>(acc);
#pragma unroll 1
    for (; drawn < kept.kDraws; ++drawn) draw(kept, drawn);
    // Before the tail, not with its first products: ptxas waits for each wgmma when adding follows others on some path.
    drain();
    ptx::pin(acc);
#pragma unroll 1
    for (uint32_t done = 0; done < tail; done += 4) kept_step(acc, kept, tail - done);
  }

  // A narrow tile as above, the product alone. `alter(slab, i)` is called for this warpgroup's slab of A in block i
  // before it is multiplied, and may write to it.
  template <class Kind, class Alter>
  __device__ __forceinline__ void narrow_altered(float (&acc)[Kind::kN / 2], uint32_t blocks, const Alter& alter) {
    constexpr uint32_t kPerStage = narrow_blocks<Shape>(Kind::kN);
    static_assert(Kind::kProduct && !Kind::kSums, "the product alone");
    float no_sums[4];
    // One place in the code for `alter`, so no first step of its own.
#pragma unroll
    for (float& value : acc) value = 0.0f;
#pragma unroll 1
    for (uint32_t done = 0; done < blocks; done += kPerStage) {
      const uint32_t count = min(kPerStage, blocks - done);
      const uint32_t stage = begin();
#pragma unroll 1
      for (uint32_t i = 0; i < count; ++i) {
        alter(stage + i * (kBytesA + Kind::kN * kRowBytes) + slab_ * kSlabBytes, done + i);
      }
      // Products read what any thread wrote, and copies overwrite it later.
      ptx::fence_async_shared();
      barrier();
      narrow_counted<Kind>(acc, no_sums, stage, count);
    }
    drain();
    ptx::pin(acc);
  }

  // A narrow tile with sums whose stages come in pairs: operands, and then 128 columns that lie as A does.
  // `visit(slab, beside, i)` is called for this warpgroup's slabs of both in block i, while they are multiplied.
  template <class Kind, class Visit>
  __device__ __forceinline__ void narrow_beside(float (&acc)[Kind::kN / 2], float (&sums)[4], uint32_t blocks,
                                                const Visit& visit) {
    constexpr uint32_t kPerStage = narrow_blocks<Shape>(Kind::kN);
    static_assert(kPerStage * kBytesA <= Shape::kStageBytes, "a stage holds what is beside A");
    const uint32_t slab = slab_ * kSlabBytes;
#pragma unroll
    for (float& value : acc) value = 0.0f;
#pragma unroll
    for (float& value : sums) value = 0.0f;
#pragma unroll 1
    for (uint32_t done = 0; done < blocks; done += kPerStage) {
      const uint32_t count = min(kPerStage, blocks - done);
      const uint32_t stage = begin();
      held_ = ring_.empty();
      ring_.advance();
      const uint32_t beside = begin();
#pragma unroll 1
      for (uint32_t i = 0; i < count; ++i) {
        const uint32_t block = stage + i * (kBytesA + Kind::kN * kRowBytes);
        ptx::wgmma_fence();
        narrow_block<Kind, false>(acc, sums, block);
        ptx::wgmma_commit();
        visit(block + slab, beside + i * kBytesA + slab, done + i);
      }
      __syncwarp();  // every lane has read before one says so
      drain();
      held_ = ring_.empty();
      let_go();
      ring_.advance();
    }
    if (Kind::kProduct) ptx::pin(acc);
    ptx::pin(sums);
  }

 private:
  template <int kMnMajorB, uint32_t kCount, bool kFirst>
  __device__ __forceinline__ void wide_step(float (&acc)[kWideN / 2]) {
    wide_products<kMnMajorB, kCount, kFirst>(acc, begin());
  }

  template <bool kFirst, class Alter>
  __device__ __forceinline__ void wide_altered_step(float (&acc)[kWideN / 2], uint32_t i, const Alter& alter) {
    const uint32_t stage = begin();
    alter(stage + slab_ * kSlabBytes, i);
    // As in a narrow tile.
    ptx::fence_async_shared();
    barrier();
    wide_products<1, 4, kFirst>(acc, stage);
  }

  // A main tile from step `first` on.
  template <int kMnMajorB>
  __device__ __forceinline__ void wide_from(float (&acc)[kWideN / 2], uint32_t first, uint32_t steps, uint32_t rest) {
#pragma unroll 1
    for (uint32_t i = first; i < steps; ++i) wide_step<kMnMajorB, 4, false>(acc);
    if (rest == 1) wide_step<kMnMajorB, 1, false>(acc);
    if (rest == 2) wide_step<kMnMajorB, 2, false>(acc);
    if (rest == 3) wide_step<kMnMajorB, 3, false>(acc);
    drain();
    ptx::pin(acc);
  }

  template <int kMnMajorB, uint32_t kCount, bool kFirst>
  __device__ __forceinline__ void wide_products(float (&acc)[kWideN / 2], uint32_t stage) {
    using Mma = ptx::Wgmma<T, kWideN, 0, kMnMajorB>;
    constexpr uint32_t kStepB = kMnMajorB ? kStepMn<64> : kStepK;
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

  // A step of such a tail; `count` times 16 are left, of which it takes up to four.
  __device__ __forceinline__ void kept_step(float (&acc)[kWideN / 2], const KeptBits<kWideN>& kept, uint32_t count) {
    const uint32_t stage = begin();
#pragma unroll
    for (uint32_t part = 0; part < kWideN / 64; ++part) {
      float sum[32];
      if (count == 1) {
        kept_part<1>(sum, stage, part);
      } else if (count == 2) {
        kept_part<2>(sum, stage, part);
      } else if (count == 3) {
        kept_part<3>(sum, stage, part);
      } else {
        kept_part<4>(sum, stage, part);
      }
#pragma unroll
      for (uint32_t i = 0; i < 32; ++i) {
        if (kept.keeps(part, i)) acc[part * 32 + i] += sum[i];
      }
    }
    held_ = ring_.empty();
    let_go();
    ring_.advance();
  }

  // The products of 64 columns.
  template <uint32_t kCount>
  __device__ __forceinline__ void kept_part(float (&sum)[32], uint32_t stage, uint32_t part) {
    using Mma = ptx::Wgmma<T, 64, 0, 1>;
    const uint64_t a = k_major(stage + slab_ * kSlabBytes);
    const uint64_t b = mn_major<64>(stage + kBytesA + part * kSlabBytes);
    ptx::wgmma_fence();  // of the part before
    Mma::template mma<true>(sum, a, b);
#pragma unroll
    for (uint32_t i = 1; i < kCount; ++i) {
      Mma::template mma<false>(sum, ptx::advance(a, i * kStepK), ptx::advance(b, i * kStepMn<64>));
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::pin(sum);
  }

  template <class Kind, uint32_t kCount, bool kFirst>
  __device__ __forceinline__ void narrow_step(float (&acc)[Kind::kN / 2], float (&sums)[4]) {
    narrow_products<Kind, kCount, kFirst>(acc, sums, begin());
  }

  // The products of the `count` blocks of a stage, added to what there is.
  template <class Kind>
  __device__ __forceinline__ void narrow_counted(float (&acc)[Kind::kN / 2], float (&sums)[4], uint32_t stage,
                                                 uint32_t count) {
    constexpr uint32_t kPerStage = narrow_blocks<Shape>(Kind::kN);
    if (kPerStage > 1 && count < kPerStage) {
      narrow_products<Kind, 1, false>(acc, sums, stage);
    } else {
      narrow_products<Kind, kPerStage, false>(acc, sums, stage);
    }
  }

  template <class Kind, uint32_t kCount, bool kFirst>
  __device__ __forceinline__ void narrow_products(float (&acc)[Kind::kN / 2], float (&sums)[4], uint32_t stage) {
    static_assert(kCount <= 2, "the blocks of a stage are written out");
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
    let_go();
  }

  __device__ __forceinline__ void let_go() {
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
