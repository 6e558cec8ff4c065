// Writes down where CuTe puts elements: fragments, ldmatrix and stmatrix, swizzles, shared-memory layouts of wgmma with
// the descriptors CuTe makes for them. One fact to a line; tests/cute.rs holds the emulator's own formulas against
// them.
//
//     table FILE          (what CuTe itself prints goes to stdout)
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

using namespace cute;
namespace gmma = SM90::GMMA;

static FILE* out;

// A layout of (thread, value) -> row + rows * column.
template <class Layout>
void fragment(char const* name, Layout const& layout, int threads, int values, int rows) {
  for (int thread = 0; thread < threads; thread++) {
    for (int value = 0; value < values; value++) {
      int at = layout(thread, value);
      std::fprintf(out, "fragment %s %d %d %d %d\n", name, thread, value, at % rows, at / rows);
    }
  }
}

// Bits of 8 x 8 matrices of 16-bit elements, one below the other: (lane, bit of its registers) -> bit of the matrices.
template <class Layout>
void matrices(char const* name, Layout const& layout, int count) {
  for (int lane = 0; lane < 32; lane++) {
    for (int half = 0; half < 2 * count; half++) {
      int element = int(layout(lane, 16 * half)) / 16;
      std::fprintf(out, "matrix %s %d %d %d %d\n", name, lane, half, element / 8, element % 8);
    }
  }
}

template <int Bits>
void swizzle() {
  for (uint32_t address = 0; address < 4096; address += 16) {
    std::fprintf(out, "swizzle %d %u %u\n", 16 << Bits, address, uint32_t(Swizzle<Bits, 4, 3>::apply(address)));
  }
}

// A tile of Rows x 64 elements; a descriptor for each step of sixteen along K, and every element's address.
template <class Atom, gmma::Major Major, int Rows, class Order>
void shared(Order order) {
  auto layout = tile_to_shape(Atom{}, Shape<Int<Rows>, _64>{}, order);
  auto plain = layout.layout_b();
  auto swizzled = as_position_independent_swizzle_layout(layout);
  auto tile = make_tensor(make_smem_ptr((half_t*)nullptr), layout);
  auto first = local_tile(tile, Shape<Int<Rows>, _16>{}, make_coord(0, 0));
  uint64_t descriptor = gmma::make_gmma_desc<Major>(first);
  for (int step = 0; step < 4; step++) {
    // As gmma::DescriptorIterator advances: by the distance before swizzling, in units of 16 bytes.
    uint64_t advanced = descriptor + plain(0, 16 * step) * sizeof(half_t) / 16;
    for (int mn = 0; mn < Rows; mn++) {
      for (int k = 0; k < 16; k++) {
        unsigned address = swizzled(mn, 16 * step + k) * sizeof(half_t);
        std::fprintf(out, "shared %s %d %llx %d %d %u\n", Major == gmma::Major::K ? "K" : "MN", Rows,
                     (unsigned long long)advanced, mn, k, address);
      }
    }
  }
}

// Atoms that follow each other in memory along the rows, and along K.
template <class Atom, gmma::Major Major, int Rows>
void both_orders() {
  shared<Atom, Major, Rows>(Step<_1, _2>{});
  shared<Atom, Major, Rows>(Step<_2, _1>{});
}

template <int Rows>
void all_layouts() {
  both_orders<gmma::Layout_K_INTER_Atom<half_t>, gmma::Major::K, Rows>();
  both_orders<gmma::Layout_K_SW32_Atom<half_t>, gmma::Major::K, Rows>();
  both_orders<gmma::Layout_K_SW64_Atom<half_t>, gmma::Major::K, Rows>();
  both_orders<gmma::Layout_K_SW128_Atom<half_t>, gmma::Major::K, Rows>();
  both_orders<gmma::Layout_MN_INTER_Atom<half_t>, gmma::Major::MN, Rows>();
  both_orders<gmma::Layout_MN_SW32_Atom<half_t>, gmma::Major::MN, Rows>();
  both_orders<gmma::Layout_MN_SW64_Atom<half_t>, gmma::Major::MN, Rows>();
  both_orders<gmma::Layout_MN_SW128_Atom<half_t>, gmma::Major::MN, Rows>();
}

int main(int count, char** arguments) {
  out = count == 2 ? std::fopen(arguments[1], "w") : nullptr;
  if (!out) {
    std::fprintf(stderr, "usage: table FILE\n");
    return 1;
  }
  using Mma = MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>;
  fragment("mma_a", Mma::ALayout{}, 32, 8, 16);
  fragment("mma_b", Mma::BLayout{}, 32, 4, 8);
  fragment("mma_c", Mma::CLayout{}, 32, 4, 16);
  fragment("wgmma_a", gmma::ALayout_64x16{}, 128, 8, 64);
  fragment("wgmma_d", gmma::CLayout_64xN<8>{}, 128, 4, 64);
  fragment("wgmma_d", gmma::CLayout_64xN<24>{}, 128, 12, 64);
  fragment("wgmma_d", gmma::CLayout_64xN<128>{}, 128, 64, 64);
  fragment("wgmma_d", gmma::CLayout_64xN<256>{}, 128, 128, 64);

  matrices("plain", Copy_Traits<SM75_U32x1_LDSM_N>::DstLayout{}, 1);
  matrices("plain", Copy_Traits<SM75_U32x2_LDSM_N>::DstLayout{}, 2);
  matrices("plain", Copy_Traits<SM75_U32x4_LDSM_N>::DstLayout{}, 4);
  matrices("trans", Copy_Traits<SM75_U16x2_LDSM_T>::DstLayout{}, 1);
  matrices("trans", Copy_Traits<SM75_U16x4_LDSM_T>::DstLayout{}, 2);
  matrices("trans", Copy_Traits<SM75_U16x8_LDSM_T>::DstLayout{}, 4);
  matrices("plain", Copy_Traits<SM90_U32x1_STSM_N>::SrcLayout{}, 1);
  matrices("plain", Copy_Traits<SM90_U32x2_STSM_N>::SrcLayout{}, 2);
  matrices("plain", Copy_Traits<SM90_U32x4_STSM_N>::SrcLayout{}, 4);
  matrices("trans", Copy_Traits<SM90_U16x2_STSM_T>::SrcLayout{}, 1);
  matrices("trans", Copy_Traits<SM90_U16x4_STSM_T>::SrcLayout{}, 2);
  matrices("trans", Copy_Traits<SM90_U16x8_STSM_T>::SrcLayout{}, 4);

  swizzle<0>();
  swizzle<1>();
  swizzle<2>();
  swizzle<3>();

  all_layouts<64>();
  all_layouts<128>();
  return std::fclose(out) == 0 ? 0 : 1;
}
