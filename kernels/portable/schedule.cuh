// Which unit of work a CTA does next, and how units wait for one another.
//
// Units are numbered so that one depends only on lower numbers, and are handed out in that order by a ticket in global
// memory. A CTA that waits therefore waits for CTAs that are already running and that never wait themselves: no
// assumption about launch order or co-residency is needed. The last CTA to leave clears the words, so that the next
// launch (or a replay of a CUDA graph) finds them zero.
#pragma once

#include "../blocks.cuh"
#include "../params.h"
#include "../ptx/scalar.cuh"
#include "../ptx/sync.cuh"
#include "tile.cuh"

namespace lora {

class TicketSchedule {
 public:
  __device__ __forceinline__ explicit TicketSchedule(uint64_t sync) : sync_(reinterpret_cast<uint32_t*>(sync)) {}

  // The first unit of this CTA.
  __device__ __forceinline__ uint32_t first() {
    draw();
    return next();
  }

  // Draws the ticket of the following unit early, so that its latency hides behind the work on this one.
  __device__ __forceinline__ void draw() {
    if (ptx::thread_index() == 0) drawn_ = ptx::atomic_add_relaxed(sync_ + LORA_SYNC_TICKET, 1);
  }

  // The unit drawn before. Ends the use of shared memory by the unit at hand.
  __device__ __forceinline__ uint32_t next() { return broadcast<kTicket>(drawn_); }

  // Counts this CTA's arrival at a word, after everything it did before its last barrier; true in the CTA that
  // completes `total` arrivals, which then sees everything the others did.
  __device__ __forceinline__ bool arrive_last(uint32_t word, uint32_t total) {
    const uint32_t before = ptx::thread_index() == 0 ? ptx::atomic_add_acq_rel(sync_ + word, 1) : 0;
    return broadcast<kArrival>(before) == total - 1;
  }

  // Makes what the CTA wrote visible to those who wait for flag `index`.
  __device__ __forceinline__ void publish(uint32_t index) { publish_word(LORA_SYNC_FLAGS + index); }

  // The same to those who wait for factors that are split.
  __device__ __forceinline__ void publish_split() { publish_word(LORA_SYNC_SPLIT); }

  // Leaves the launch; the last CTA to do so clears the first `words` words.
  __device__ __forceinline__ void finish(uint32_t words) {
    if (!arrive_last(LORA_SYNC_EXITED, gridDim.x)) return;
    for (uint32_t i = ptx::thread_index(); i < words; i += blockDim.x) sync_[i] = 0;
  }

 private:
  __device__ __forceinline__ void publish_word(uint32_t word) {
    __syncthreads();
    if (ptx::thread_index() == 0) ptx::add_release(sync_ + word, 1);
  }

  enum Slot { kTicket, kArrival };

  // Thread 0's value to all threads. Each use has its own word and is followed by a barrier before the next: a unit's
  // steps, or what stands for them, after its ticket, the next ticket after an arrival. So no one overwrites what
  // others still have to read.
  template <Slot kSlot>
  static __device__ __forceinline__ uint32_t broadcast(uint32_t value) {
    __shared__ uint32_t slot;
    if (ptx::thread_index() == 0) slot = value;
    __syncthreads();
    return slot;
  }

  uint32_t* sync_;
  uint32_t drawn_ = 0;
};

// The flags that guard M-blocks [first, first + count); `parts` tiles publish each block.
__device__ __forceinline__ Dependency depends_on(uint64_t sync, uint32_t flag_shift, uint32_t m_blocks, uint32_t parts,
                                                 uint32_t first, uint32_t count) {
  const uint32_t first_flag = first >> flag_shift;
  const uint32_t last_flag = (m_blocks - 1) >> flag_shift;
  const uint32_t end_flag = ((first + count - 1) >> flag_shift) + 1;
  return {reinterpret_cast<const uint32_t*>(sync) + LORA_SYNC_FLAGS + first_flag, end_flag - first_flag,
          parts << flag_shift, parts * (m_blocks - (last_flag << flag_shift)), last_flag - first_flag};
}

// The word that guards the halves of factors, which so many units split.
__device__ __forceinline__ Dependency depends_on_split(uint64_t sync, uint32_t units) {
  return {reinterpret_cast<const uint32_t*>(sync) + LORA_SYNC_SPLIT, 1, units, units, 0};
}

}  // namespace lora
