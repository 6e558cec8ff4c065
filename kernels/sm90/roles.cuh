// A CTA's warpgroups in their roles, the same for every operation.
#pragma once

#include "../blocks.cuh"
#include "../projections.cuh"
#include "epilogue.cuh"
#include "producer.cuh"

namespace lora::sm90 {

// Registers per thread after the warpgroups have traded theirs: 128 · 56 + 256 · 224 of 65536.
constexpr int kProducerRegs = 56;
constexpr int kConsumerRegs = 224;

// Columns of a narrow tile: the narrowest that holds R, kNarrowN at most.
__device__ __forceinline__ uint32_t narrow_width(uint32_t r) {
  return r <= 16 ? 16 : r <= 32 ? 32 : r <= 64 ? 64 : kNarrowN;
}

template <int kN_>
struct Width {
  static constexpr int kN = kN_;
};

// Calls `visit` with the Width that is `width`.
template <class Visit>
__device__ __forceinline__ void for_narrow_width(uint32_t width, const Visit& visit) {
  switch (width) {
    case 16:
      return visit(Width<16>{});
    case 32:
      return visit(Width<32>{});
    case 64:
      return visit(Width<64>{});
    default:
      return visit(Width<kNarrowN>{});
  }
}

// What forward and backward have in common: a launch's maps and parameters, and which blocks are this CTA's.
template <class Launch>
class Operation {
 protected:
  using Params = decltype(Launch::params);

  __device__ __forceinline__ Operation(const Launch& launch, const Place& place)
      : p_(launch.params), place_(place), maps_(launch.maps) {}

  __device__ __forceinline__ const LoraTensorMap& map(uint32_t index) const { return maps_[index]; }

  __device__ __forceinline__ bool drops() const { return p_.dropout.threshold != 0; }
  template <class Shape>
  __device__ __forceinline__ Dropout dropout() const {
    return load_dropout(place_.smem + Shape::kSeed, p_.dropout.threshold);
  }

  // First row of this CTA's block in a group.
  __device__ __forceinline__ uint32_t row_of(uint32_t group) const {
    return (group * place_.size + place_.rank) * kBlockM;
  }

  __device__ __forceinline__ Routes routes() const { return Routes(p_.routes, p_.m); }

  // Of `r` columns of ranks those that main tiles of rows from m on read. All CTAs of a cluster take the same steps, so
  // they read what any of them needs.
  __device__ __forceinline__ Picks ranks_read(uint32_t m, uint32_t r) const {
    if (!routes().is_on()) return everything(r);
    const uint32_t rows = place_.size * kBlockM;
    return routes().ranks_of(m / rows * rows, rows, is_split() ? p_.split.r : r, is_split() ? 3 : 1);
  }

  // Columns that a rank has in narrow tiles.
  __device__ __forceinline__ uint32_t per_rank() const { return is_split() ? 2 : 1; }

  // Whether any row of the cluster goes through the ranks of a narrow unit at (m, n), of `width` columns.
  __device__ __forceinline__ bool goes_through(uint32_t m, uint32_t n, uint32_t width) const {
    if (!routes().is_on()) return true;
    const uint32_t block = per_rank() * LORA_ROUTE_RANKS;
    const uint64_t blocks = (1u << (width + block - 1) / block) - 1;
    return (ranks_read(m, p_.r).mask >> n / block & blocks) != 0;
  }

  // Main tile `index`: `columns` blocks side by side.
  __device__ __forceinline__ BlockIndex wide_block(uint32_t index, uint32_t columns) const {
    return grouped(index, p_.m_groups, columns, p_.group_m);
  }

  // Calls `visit` with the first row and the block of ranks of each of the narrow units of a ticket. Not neighbours:
  // what the first main tiles read is the first unit of somebody's ticket.
  template <class Visit>
  __device__ __forceinline__ void for_each_narrow(uint32_t ticket, uint32_t tickets, uint32_t units,
                                                  const Visit& visit) const {
#pragma unroll 1
    for (uint32_t unit = ticket; unit < units; unit += tickets) {
      visit(row_of(unit % p_.m_groups), unit / p_.m_groups);
    }
  }

  // For the producer, before it reads h or dh, of which a block of rows has `narrow` tiles.
  __device__ __forceinline__ Flags flags(uint32_t narrow) const {
    return {p_.sync, p_.flag_shift, p_.m_groups * place_.size, kSlabs * narrow};
  }

  // A consumer, when it has stored its slab of h or dh.
  template <class Shape>
  __device__ __forceinline__ void publish_narrow(const Consumer<Shape>& consumer, uint32_t m) const {
    publish(consumer, p_.sync, LORA_SYNC_FLAGS + (m / kBlockM >> p_.flag_shift));
  }

  __device__ __forceinline__ bool is_split() const { return p_.split.r != 0; }

  // The consumers of a ticket of units that split factors: each CTA of the cluster has one.
  template <bool kForward, class Shape>
  __device__ __forceinline__ void split_unit(const Consumer<Shape>& consumer, uint32_t ticket) const {
    const uint32_t unit = ticket * place_.size + place_.rank;
    if (unit >= p_.split.units) return;
    split_factors<typename Shape::T, kForward>(p_, unit, threadIdx.x - kWarpgroup, kSlabs * kWarpgroup);
    publish(consumer, p_.sync, LORA_SYNC_SPLIT);
  }

  // For the producer, before it reads the factor of a narrow unit. Whoever reads h or dh has the other factor with it:
  // they were published after this.
  __device__ __forceinline__ void wait_for_factors() const {
    if (p_.split.units != 0) wait_for(sync_word(p_.sync, LORA_SYNC_SPLIT), kSlabs * p_.split.units);
  }

  const Params& p_;
  Place place_;

 private:
  const LoraTensorMap* maps_;
};

template <typename T>
constexpr uint32_t kOnes = 0;  // two times 1.0
template <>
constexpr uint32_t kOnes<__half> = 0x3c003c00u;
template <>
constexpr uint32_t kOnes<__nv_bfloat16> = 0x3f803f80u;

// `Op` has `produce(producer, ticket)` and `consume(consumer, ticket)`, which both go through the same steps, and
// `split(consumer, ticket)` for the tickets that come first, in which nothing is copied.
template <class Shape, class Op, class Launch>
__device__ __forceinline__ void run(const Launch& launch) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const Place place = {ptx::shared_address(shared), ptx::cluster_rank(), ptx::cluster_size()};
  const auto& p = launch.params;
  prepare<Shape>(place.smem, place.size, kOnes<typename Shape::T>, p.dropout);
  const Op operation(launch, place);
  if (threadIdx.x < kWarpgroup) {
    ptx::give_registers<kProducerRegs>();
    if (threadIdx.x == 0) {
      Producer<Shape> producer(place);
      for_each_ticket_produced<Shape>(place, p.sync, p.tickets, [&](uint32_t ticket) LORA_INLINE {
        if (ticket >= p.split.tickets) operation.produce(producer, ticket - p.split.tickets);
      });
    }
  } else {
    ptx::take_registers<kConsumerRegs>();
    Consumer<Shape> consumer(place);
    for_each_ticket_consumed<Shape>(place, p.tickets, [&](uint32_t ticket) LORA_INLINE {
      if (ticket < p.split.tickets) {
        operation.split(consumer, ticket);
      } else {
        operation.consume(consumer, ticket - p.split.tickets);
      }
    });
    if (consumer.is_first_thread()) ptx::store_wait_read<0>();  // shared memory must outlive what reads it
  }
  finish(p.sync, p.sync_words);
}

}  // namespace lora::sm90

#define LORA_SM90_KERNEL(operation, Launch, type, T, n)                             \
  extern "C" __global__ void __launch_bounds__(LORA_SM90_THREADS, 1)                \
      lora_sm90_##operation##_##type##_##n(const __grid_constant__ Launch launch) { \
    lora::sm90::operation<lora::sm90::Shape<T, n, LORA_SM90_STAGES_##n>>(launch);   \
  }

#define LORA_SM90_KERNELS(operation, Launch)                    \
  LORA_SM90_KERNEL(operation, Launch, f16, __half, 256)         \
  LORA_SM90_KERNEL(operation, Launch, f16, __half, 192)         \
  LORA_SM90_KERNEL(operation, Launch, f16, __half, 128)         \
  LORA_SM90_KERNEL(operation, Launch, bf16, __nv_bfloat16, 256) \
  LORA_SM90_KERNEL(operation, Launch, bf16, __nv_bfloat16, 192) \
  LORA_SM90_KERNEL(operation, Launch, bf16, __nv_bfloat16, 128)
