// Which unit of work a cluster does next, and how units wait for one another.
//
// Units are numbered so that one depends only on lower numbers, and are handed out in that order by tickets: whoever
// waits, waits for clusters that are already running, so no launch order and no co-residency is assumed. The producer
// of a cluster's first CTA draws the ticket of the next unit while it issues the copies of this one, and passes it to
// every role of the cluster through two slots in shared memory. The last CTA to leave clears the words, so that the
// next launch, or a replay of a CUDA graph, finds them zero.
#pragma once

#include "../ptx/sync.cuh"
#include "ring.cuh"

namespace lora::sm90 {

// Flags that are looked at together: each look is a trip to L2, and a chunk of tokens waits for many.
constexpr uint32_t kPolled = 8;

// The CTA's place in its cluster.
struct Place {
  uint32_t smem;  // start of shared memory
  uint32_t rank;
  uint32_t size;  // CTAs of the cluster
};

__device__ __forceinline__ uint32_t* sync_word(uint64_t sync, uint32_t index) {
  return reinterpret_cast<uint32_t*>(sync) + index;
}

// The two slots. Every role of the cluster counts the tickets that went through them.
template <class Shape>
class Tickets {
 public:
  __device__ __forceinline__ explicit Tickets(const Place& place) : place_(place) {}

  // The producer of each CTA, when all have the slot's ticket of the time before: one is about to come in.
  __device__ __forceinline__ void expect() { ptx::mbarrier_expect(barrier(Shape::kTicketFull), 4); }

  // The first CTA's producer: waits until all have the slot's ticket of the time before, and fills it in every CTA.
  __device__ __forceinline__ void send(uint32_t ticket) {
    ptx::mbarrier_wait(barrier(Shape::kTicketEmpty), parity() ^ 1);
    expect();
#pragma unroll 1
    for (uint32_t rank = 0; rank < place_.size; ++rank) {
      ptx::store_async(ptx::map_shared(place_.smem + Shape::kTicket + slot() * 4, rank), ticket,
                       ptx::map_shared(barrier(Shape::kTicketFull), rank));
    }
  }

  __device__ __forceinline__ uint32_t receive() {
    ptx::mbarrier_wait(barrier(Shape::kTicketFull), parity());
    return ptx::load_shared_4(place_.smem + Shape::kTicket + slot() * 4);
  }
  // By one thread, for all who share its ticket and have it.
  __device__ __forceinline__ void release() { ptx::mbarrier_arrive(ptx::map_shared(barrier(Shape::kTicketEmpty), 0)); }
  __device__ __forceinline__ void next() { ++count_; }

 private:
  __device__ __forceinline__ uint32_t slot() const { return count_ & 1; }
  __device__ __forceinline__ uint32_t parity() const { return count_ >> 1 & 1; }
  __device__ __forceinline__ uint32_t barrier(uint32_t first) const { return place_.smem + first + slot() * 8; }

  Place place_;
  uint32_t count_ = 0;
};

// One thread per CTA: `work(ticket)` for every ticket below `end` that the cluster draws.
template <class Shape, class Work>
__device__ __forceinline__ void for_each_ticket_produced(const Place& place, uint64_t sync, uint32_t end,
                                                         const Work& work) {
  const auto draw = [&] { return ptx::atomic_add_relaxed(sync_word(sync, LORA_SYNC_TICKET), 1); };
  Tickets<Shape> tickets(place);
  const bool first = place.rank == 0;
  uint32_t drawn = first ? draw() : 0;
#pragma unroll 1
  for (;; tickets.next()) {
    uint32_t ticket = drawn;
    if (first) {
      tickets.send(ticket);
    } else {
      tickets.expect();
      ticket = tickets.receive();
      tickets.release();
    }
    if (ticket >= end) return;
    if (first) drawn = draw();  // its latency hides behind the copies
    work(ticket);
  }
}

// A consumer warp: the same tickets.
template <class Shape, class Work>
__device__ __forceinline__ void for_each_ticket_consumed(const Place& place, uint32_t end, const Work& work) {
  Tickets<Shape> tickets(place);
#pragma unroll 1
  for (;; tickets.next()) {
    // The same in every lane; said so, it can steer uniform branches.
    const uint32_t ticket = __shfl_sync(0xffffffffu, tickets.receive(), 0);
    __syncwarp();
    if (threadIdx.x % 32 == 0) tickets.release();
    if (ticket >= end) return;
    work(ticket);
  }
}

// What says which of `blocks` M-blocks are published, each by `parts` slabs: 2^shift of them share a word.
struct Flags {
  uint64_t sync;
  uint32_t shift;
  uint32_t blocks;
  uint32_t parts;

  __device__ __forceinline__ const uint32_t* word(uint32_t flag) const {
    return sync_word(sync, LORA_SYNC_FLAGS + flag);
  }
  // Arrivals that complete a flag; the last may guard fewer blocks.
  __device__ __forceinline__ uint32_t target(uint32_t flag) const {
    return parts * min(1u << shift, blocks - (flag << shift));
  }
};

// The producer waits until `word` has counted so many arrivals, and copies that follow may read what they published.
__device__ __forceinline__ void wait_for(const uint32_t* word, uint32_t arrivals) {
  while (ptx::load_acquire(word) < arrivals) __nanosleep(64);
  ptx::fence_async_global();
}

// The same until M-block `block` is published.
__device__ __forceinline__ void wait_for_block(const Flags& flags, uint32_t block) {
  const uint32_t flag = block >> flags.shift;
  wait_for(flags.word(flag), flags.target(flag));
}

// The same for M-blocks [first, first + count).
__device__ __forceinline__ void wait_for_blocks(const Flags& flags, uint32_t first, uint32_t count) {
  const uint32_t last = (first + count - 1) >> flags.shift;
#pragma unroll 1
  for (uint32_t flag = first >> flags.shift; flag <= last; flag += kPolled) {
    const auto are_published = [&] {
      uint32_t arrived[kPolled];
#pragma unroll
      for (uint32_t i = 0; i < kPolled; ++i) arrived[i] = ptx::load_relaxed(flags.word(min(flag + i, last)));
      bool all = true;
#pragma unroll
      for (uint32_t i = 0; i < kPolled; ++i) all = all && arrived[i] >= flags.target(min(flag + i, last));
      return all;
    };
    while (!are_published()) __nanosleep(64);
  }
  ptx::fence_acquire();
  ptx::fence_async_global();
}

// Leaves the launch, with all threads; the last CTA to do so clears the first `words` words.
__device__ __forceinline__ void finish(uint64_t sync, uint32_t words) {
  __syncwarp();
  ptx::cluster_barrier();  // nobody arrives at a barrier of a CTA that is gone
  if (threadIdx.x >= 32) return;
  uint32_t before = threadIdx.x == 0 ? ptx::atomic_add_acq_rel(sync_word(sync, LORA_SYNC_EXITED), 1) : 0;
  before = __shfl_sync(0xffffffffu, before, 0);
  __syncwarp();
  if (before != gridDim.x - 1) return;
  for (uint32_t i = threadIdx.x; i < words; i += 32) *sync_word(sync, i) = 0;
}

}  // namespace lora::sm90
