// y = x Wᵀ + h Bᵀ (+ bias), h = scale · x Aᵀ, in one launch on Hopper.
//
// x [M][K], w [N][K], a [R][K], b [N][R], h [M][R], y [M][N], row-major, fp16 or bf16, f32 accumulation. Tickets:
// bundles of h units (128 rows x up to 128 ranks per CTA, full K), then y units, whose last steps read h.
#include "../blocks.cuh"
#include "roles.cuh"

namespace lora::sm90 {

template <class Shape>
class Forward {
 public:
  using T = typename Shape::T;

  __device__ __forceinline__ Forward(const LoraSm90Forward& launch, const Place& place)
      : launch_(launch), p_(launch.params), place_(place) {}

  __device__ __forceinline__ void produce(Producer<Shape>& producer, uint32_t ticket) const {
    if (ticket < p_.h_tickets) {
      for_each_h(ticket, [&](uint32_t m, uint32_t n) LORA_INLINE {
        producer.template narrow<Major::kK>(map(LORA_SM90_FORWARD_X), map(LORA_SM90_FORWARD_A), m, n, width(),
                                            k_steps());
      });
      return;
    }
    const BlockIndex block = y_block(ticket);
    const uint32_t m = row_of(block.row);
    const uint32_t n = block.col * Shape::kBlockN;
    producer.template wide<Major::kK>(map(LORA_SM90_FORWARD_X), map(LORA_SM90_FORWARD_W), m, n, k_steps());
    if (p_.r == 0) return;
    wait_for_blocks(p_.sync, p_.flag_shift, p_.m_groups * place_.size, kSlabs * p_.r_blocks, m / kBlockM, 1);
    producer.template wide<Major::kK>(map(LORA_SM90_FORWARD_H), map(LORA_SM90_FORWARD_B), m, n,
                                      (p_.r + kBlockK - 1) / kBlockK);
  }

  __device__ __forceinline__ void consume(Consumer<Shape>& consumer, uint32_t ticket) const {
    if (ticket < p_.h_tickets) {
      for_each_h(ticket, [&](uint32_t m, uint32_t n) LORA_INLINE {
        for_narrow_width(width(), [&](auto width) LORA_INLINE { h<decltype(width)::kN>(consumer, m, n); });
      });
      return;
    }
    const BlockIndex block = y_block(ticket);
    const uint32_t m = row_of(block.row) + consumer.slab() * kSlabM;
    const uint32_t n = block.col * Shape::kBlockN;
    float acc[Shape::kBlockN / 2];
    const uint32_t tail = (p_.r + 15) / 16;
    consumer.template wide<0>(acc, k_steps() + tail / 4, tail % 4);
    const T* const bias = reinterpret_cast<const T*>(p_.bias);
    store_wide<Shape>(consumer, acc, map(LORA_SM90_FORWARD_Y), m, n, p_.m, p_.n,
                      [&](float low, float high, uint32_t, uint32_t col) {
                        if (bias == nullptr || col >= p_.n) return make_float2(low, high);
                        return make_float2(low + widen(bias[col]), high + widen(bias[col + 1]));
                      });
  }

 private:
  __device__ __forceinline__ const LoraTensorMap& map(uint32_t index) const { return launch_.maps[index]; }
  __device__ __forceinline__ uint32_t k_steps() const { return (p_.k + kBlockK - 1) / kBlockK; }
  __device__ __forceinline__ uint32_t width() const { return narrow_width(p_.r); }
  // First row of this CTA's block in a group.
  __device__ __forceinline__ uint32_t row_of(uint32_t group) const {
    return (group * place_.size + place_.rank) * kBlockM;
  }
  __device__ __forceinline__ BlockIndex y_block(uint32_t ticket) const {
    return grouped(ticket - p_.h_tickets, p_.m_groups, p_.n_blocks, p_.group_m);
  }

  template <class Visit>
  __device__ __forceinline__ void for_each_h(uint32_t ticket, const Visit& visit) const {
    // Not neighbours: what the first main tiles read is the first unit of somebody's bundle.
#pragma unroll 1
    for (uint32_t unit = ticket; unit < p_.h_units; unit += p_.h_tickets) {
      visit(row_of(unit % p_.m_groups), unit / p_.m_groups * kNarrowN);
    }
  }

  template <int kN>
  __device__ __forceinline__ void h(Consumer<Shape>& consumer, uint32_t m, uint32_t n) const {
    float acc[kN / 2];
    float no_sums[4];
    consumer.template narrow<Narrow<kN, 0, 0, true, false>>(acc, no_sums, k_steps());
    store_narrow<Shape, kN>(acc, p_.h, m + consumer.slab() * kSlabM, n, p_.m, p_.r, p_.scale);
    publish(consumer, p_.sync, m / kBlockM >> p_.flag_shift);
  }

  const LoraSm90Forward& launch_;
  const LoraSm90ForwardParams& p_;
  Place place_;
};

template <class Shape>
__device__ __forceinline__ void forward(const LoraSm90Forward& launch) {
  run<Shape, Forward<Shape>>(launch);
}

}  // namespace lora::sm90

LORA_SM90_KERNELS(forward, LoraSm90Forward)
