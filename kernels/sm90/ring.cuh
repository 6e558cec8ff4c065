// Shared memory of a Hopper CTA: a ring of stages that the producer fills and the consumers empty.
//
// A CTA has three warpgroups. One thread of the first, the producer, issues the copies of all units of work through the
// ring; the other two, the consumers, own a slab of 64 rows each. A full barrier completes when the bytes of its stage
// have landed; an empty barrier when every consumer warp of the cluster has let the stage go, because the operand that
// a cluster shares is copied to all its CTAs at once.
#pragma once

#include "../params.h"
#include "../ptx/copy.cuh"
#include "../ptx/mbarrier.cuh"
#include "../ptx/tensor.cuh"

// For lambdas: a wgmma in flight must not meet a call.
#define LORA_INLINE __attribute__((always_inline))

namespace lora::sm90 {

constexpr uint32_t kBlockM = LORA_SM90_BLOCK_M;
constexpr uint32_t kBlockK = LORA_SM90_BLOCK_K;
constexpr uint32_t kSlabM = LORA_SM90_SLAB_M;
constexpr uint32_t kSlabs = LORA_SM90_SLABS;
constexpr uint32_t kNarrowN = LORA_SM90_NARROW_N;
constexpr uint32_t kStoreN = LORA_SM90_STORE_N;
constexpr uint32_t kStoreBoxes = LORA_SM90_STORE_BOXES;
constexpr uint32_t kWarpgroup = 128;
constexpr uint32_t kConsumerWarps = kSlabs * 4;
constexpr uint32_t kRowBytes = kBlockK * 2;  // 128: a row of a K-major box, and of an MN-major one of 64 columns
constexpr uint32_t kSlabBytes = kSlabM * kRowBytes;     // 64 rows of 128 bytes, whichever dimension they run along
constexpr uint32_t kBytesA = kBlockM * kRowBytes;       // the rows operand of a stage
constexpr uint32_t kStoreBytes = kSlabM * kStoreN * 2;  // a box on its way out

static_assert(kBlockM == kSlabs * kSlabM && LORA_SM90_THREADS == (1 + kSlabs) * kWarpgroup, "a slab per consumer");

// A main tile: kBlockM x BN columns.
template <typename T_, int kBlockN_, int kStages_>
struct Shape {
  using T = T_;
  static constexpr uint32_t kBlockN = kBlockN_;
  static constexpr uint32_t kStages = kStages_;
  static constexpr uint32_t kStageBytes = kBytesA + kBlockN * kRowBytes;
  static constexpr uint32_t kBoxes = kStages * kStageBytes;  // offset of the boxes on their way out
  static constexpr uint32_t kTail = kBoxes + kSlabs * kStoreBoxes * kStoreBytes;
  // Offsets of what follows the boxes.
  static constexpr uint32_t kFull = kTail;
  static constexpr uint32_t kEmpty = kFull + kStages * 8;
  static constexpr uint32_t kTicketFull = kEmpty + kStages * 8;
  static constexpr uint32_t kTicketEmpty = kTicketFull + 2 * 8;
  static constexpr uint32_t kTicket = kTicketEmpty + 2 * 8;
  static constexpr uint32_t kArrival = kTicket + 2 * 4;                      // one word per slab
  static constexpr uint32_t kSeed = (kArrival + kSlabs * 4 + 15) / 16 * 16;  // of dropout, and the offset
  static constexpr uint32_t kOnes = (kSeed + 16 + 127) / 128 * 128;
  static_assert(kOnes + 256 <= kTail + LORA_SM90_TAIL_BYTES, "the tail holds it all");
};

// Blocks of 64 along the reduction that one stage of a narrow tile of `n` columns carries.
template <class Shape>
__host__ __device__ constexpr uint32_t narrow_blocks(uint32_t n) {
  return Shape::kStageBytes >= 2 * (kBytesA + n * kRowBytes) ? 2 : 1;
}

// A position in the ring, the same in every role and in both CTAs of a cluster.
template <class Shape>
struct Ring {
  uint32_t smem;  // start of shared memory
  uint32_t stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ explicit Ring(uint32_t smem) : smem(smem) {}
  __device__ __forceinline__ uint32_t data() const { return smem + stage * Shape::kStageBytes; }
  __device__ __forceinline__ uint32_t full() const { return smem + Shape::kFull + stage * 8; }
  __device__ __forceinline__ uint32_t empty() const { return smem + Shape::kEmpty + stage * 8; }
  __device__ __forceinline__ void advance() {
    if (++stage == Shape::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Seed and offset of dropout, once for all units of the CTA.
__device__ __forceinline__ void prepare_seed(uint32_t smem, const LoraDropout& dropout) {
  const uint64_t* const state = reinterpret_cast<const uint64_t*>(dropout.state);
  const uint64_t seed = state == nullptr ? dropout.seed : state[0];
  const uint64_t offset = state == nullptr ? dropout.offset : state[1];
  ptx::store_shared_16(smem, make_uint4(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
                                        static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32)));
}

// Barriers and constants before anything else; ends with a barrier of the cluster.
template <class Shape>
__device__ __forceinline__ void prepare(uint32_t smem, uint32_t cluster, uint32_t ones, const LoraDropout& dropout) {
  if (threadIdx.x == 0) {
    for (uint32_t i = 0; i < Shape::kStages; ++i) {
      ptx::mbarrier_init(smem + Shape::kFull + i * 8, 1);
      ptx::mbarrier_init(smem + Shape::kEmpty + i * 8, kConsumerWarps * cluster);
    }
    for (uint32_t i = 0; i < 2; ++i) {
      ptx::mbarrier_init(smem + Shape::kTicketFull + i * 8, 1);
      // Every consumer warp, and the producers of the other CTAs.
      ptx::mbarrier_init(smem + Shape::kTicketEmpty + i * 8, kConsumerWarps * cluster + cluster - 1);
    }
    ptx::fence_mbarrier_init();
  }
  if (threadIdx.x < 16) {
    ptx::store_shared_16(smem + Shape::kOnes + threadIdx.x * 16, make_uint4(ones, ones, ones, ones));
    ptx::fence_async_shared();
  }
  if (threadIdx.x == kWarpgroup && dropout.threshold != 0) prepare_seed(smem + Shape::kSeed, dropout);
  __syncthreads();
  ptx::cluster_barrier_relaxed();
}

}  // namespace lora::sm90
