// Warpgroups fed by a producer: consumers that take turns, attention with its probabilities in shared memory, copies that arrive
// by themselves; BROKEN leaves out or weakens one thing. Parameters of all: `in`, `out`, `count` of tiles.
//
// An operand of 64 x 64 lies as [k / 8][row][k % 8], without swizzle, in global memory already.

#include <cuda_bf16.h>
#include <cstdint>

constexpr int BYTES = 64 * 64 * 2;

__device__ uint32_t shared(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ void init(uint64_t* bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared(bar)), "r"(count));
}

__device__ void publish_inits() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ void wait(uint64_t* bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra OVER;\nbra AGAIN;\nOVER:\n}" ::"r"(shared(bar)),
      "r"(parity)
      : "memory");
}

__device__ void arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared(bar)) : "memory");
}

__device__ void load(void* to, const void* from, int bytes, int expected, uint64_t* bar) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared(bar)), "r"(expected) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared(to)),
               "l"(from), "r"(bytes), "r"(shared(bar))
               : "memory");
}

__device__ void sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

__device__ uint64_t descriptor(const void* start, uint32_t leading, uint32_t stride) {
  return uint64_t((shared(start) & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32;
}

template <int TRANS_B>
__device__ void mma(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, p, 1, 1, 0, %35;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b), "r"(accumulate), "n"(TRANS_B));
}

// Nothing may move across, as far as these registers go.
__device__ void pin(float (&d)[32]) {
  for (int i = 0; i < 32; i++) asm volatile("" : "+f"(d[i])::"memory");
}

__device__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ void wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

__device__ int row_of(int i) { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + (i >> 1 & 1) * 8; }
__device__ int column_of(int i) { return 8 * (i >> 2) + threadIdx.x % 4 * 2 + (i & 1); }

// Two consumers take turns at the tensor cores; each tile is 64 x 64 over three stages of 64 along K.
template <int BROKEN>
__device__ void ping_pong(const uint8_t* in, float* out, int count) {
  constexpr int STAGES = 4, STEPS = 3;
  extern __shared__ __align__(1024) uint8_t ring[];  // STAGES x (A, B)
  __shared__ uint64_t full[STAGES], empty[STAGES];
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) init(&full[i], 1), init(&empty[i], 4);
    publish_inits();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    for (int i = 0; threadIdx.x == 0 && i < count * STEPS; i++) {
      const int stage = i % STAGES;
      if (BROKEN != 5) wait(&empty[stage], (i / STAGES & 1) ^ (BROKEN != 4));
      load(ring + stage * 2 * BYTES, in + i * 2 * BYTES, 2 * BYTES, BROKEN == 3 ? 2 * BYTES - 16 : 2 * BYTES, &full[stage]);
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
  const int mine = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
  if (mine == 1) asm volatile("bar.arrive 1, 256;" ::: "memory");
  for (int tile = mine; tile < count; tile += 2) {
    sync(1 + mine, 256);
    float d[32];
    for (int step = 0; step < STEPS; step++) {
      const int i = tile * STEPS + step, stage = i % STAGES;
      if (BROKEN != 7) wait(&full[stage], i / STAGES & 1);
      const uint8_t *a = ring + stage * 2 * BYTES, *b = a + BYTES;
      pin(d);
      if (BROKEN != 6) fence();
      for (int k = 0; k < 4; k++) {
        const uint64_t swapped = descriptor(a + k * 2048, 128, 1024), right = descriptor(a + k * 2048, 1024, 128);
        mma<0>(d, BROKEN == 2 ? swapped : right, descriptor(b + k * 2048, 1024, 128), step || k);
      }
      commit();
      wait_group<1>();
      if (BROKEN == 1 && lane == 0) arrive(&empty[stage]);
      if (BROKEN != 1 && lane == 0 && step) arrive(&empty[(i - 1) % STAGES]);
    }
    if (tile + 1 < count) asm volatile("bar.arrive %0, 256;" ::"r"(2 - mine) : "memory");
    if (BROKEN != 8) wait_group<0>();
    pin(d);
    if (BROKEN != 1 && lane == 0) arrive(&empty[(tile * STEPS + STEPS - 1) % STAGES]);
    for (int i = 0; i < 32; i++) out[tile * 4096 + row_of(i) * 64 + column_of(i)] = d[i];
  }
}

// out = sum of relu(Q Kt) V over the blocks: the probabilities go through shared memory as bf16. `in`: Q of both warpgroups, then K and V
// of each block, V as [k / 8][column / 8][k % 8][column % 8].
template <int BROKEN>
__device__ void attention(const uint8_t* in, float* out, int count) {
  extern __shared__ __align__(1024) uint8_t tiles[];  // Q, Q, P, P, 2 x (K, V)
  __shared__ uint64_t full[2], empty[2], start;
  if (threadIdx.x == 0) {
    init(&start, 1);
    for (int i = 0; i < 2; i++) init(&full[i], 1), init(&empty[i], 2);
    publish_inits();
  }
  __syncthreads();
  const int group = threadIdx.x / 128;
  uint8_t *q = tiles + group * BYTES, *p = tiles + (2 + group) * BYTES, *pairs = tiles + 4 * BYTES;
  auto next = [&](int i) { load(pairs + i % 2 * 2 * BYTES, in + (2 + 2 * i) * BYTES, 2 * BYTES, 2 * BYTES, &full[i % 2]); };
  if (threadIdx.x == 0) {
    load(tiles, in, 2 * BYTES, 2 * BYTES, &start);
    for (int i = 0; i < 2 && i < count; i++) next(i);
  }
  wait(&start, 0);
  float o[32] = {};
  for (int i = 0; i < count; i++) {
    float s[32];
    const uint8_t *k = pairs + i % 2 * 2 * BYTES, *v = k + BYTES;
    wait(&full[i % 2], i / 2 & 1);
    pin(s);
    fence();
    for (int j = 0; j < 4; j++) mma<0>(s, descriptor(q + j * 2048, 1024, 128), descriptor(k + j * 2048, 1024, 128), j);
    commit();
    wait_group<0>();
    pin(s);
    pin(o);
    if (BROKEN == 2) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    for (int j = 0; j < 32; j += 2) {
      const int column = column_of(j);
      auto* to = reinterpret_cast<__nv_bfloat162*>(p + column / 8 * 1024 + row_of(j) * 16 + column % 8 * 2);
      *to = __floats2bfloat162_rn(fmaxf(s[j], 0), fmaxf(s[j + 1], 0));
    }
    if (BROKEN != 1 && BROKEN != 2) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    if (BROKEN != 3) sync(1 + group, 128);
    pin(o);
    fence();
    for (int j = 0; j < 4; j++) {
      const uint64_t swapped = descriptor(v + j * 2048, 128, 1024), right = descriptor(v + j * 2048, 1024, 128);
      mma<1>(o, descriptor(p + j * 2048, 1024, 128), BROKEN == 4 ? swapped : right, 1);
    }
    commit();
    if (BROKEN == 5 && threadIdx.x % 128 == 0) arrive(&empty[i % 2]);
    wait_group<0>();
    if (BROKEN != 5 && threadIdx.x % 128 == 0) arrive(&empty[i % 2]);
    if (threadIdx.x == 0 && i + 2 < count) wait(&empty[i % 2], i / 2 & 1), next(i + 2);
  }
  for (int i = 0; i < 32; i++) out[group * 4096 + row_of(i) * 64 + column_of(i)] = o[i];
}

// Two warps copy, have the mbarrier told and exit; two others read.
template <int BROKEN>
__device__ void copies(const uint8_t* in, float* out, int count) {
  constexpr int STAGES = 3;
  __shared__ __align__(16) float ring[STAGES][256];
  __shared__ uint64_t full[STAGES], empty[STAGES];
  if (threadIdx.x == 0)
    for (int i = 0; i < STAGES; i++) init(&full[i], 64), init(&empty[i], 64);
  __syncthreads();
  const int t = threadIdx.x % 64;
  if (threadIdx.x < 64) {
    for (int i = 0; i < count; i++) {
      const int stage = i % STAGES;
      if (BROKEN != 1) wait(&empty[stage], (i / STAGES & 1) ^ 1);
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared(&ring[stage][4 * t])), "l"(in + i * 1024 + 16 * t)
                   : "memory");
      if (BROKEN == 2) arrive(&full[stage]);
      else if (BROKEN == 3) asm volatile("cp.async.mbarrier.arrive.shared::cta.b64 [%0];" ::"r"(shared(&full[stage])) : "memory");
      else asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared(&full[stage])) : "memory");
    }
    return;
  }
  float sum = 0;
  for (int i = 0; i < count; i++) {
    const int stage = i % STAGES;
    wait(&full[stage], (i / STAGES & 1) ^ (BROKEN == 4));
    for (int j = 0; j < 4; j++) sum += ring[stage][(t * 5 + j * 64) % 256];
    arrive(&empty[stage]);
  }
  out[t] = sum;
}

#define ENTRY(name, broken, threads)                                                           \
  extern "C" __global__ void __launch_bounds__(threads)                                        \
      name##_##broken(const uint8_t* in, float* out, int count) {                              \
    name<broken>(in, out, count);                                                              \
  }
ENTRY(ping_pong, 0, 384) ENTRY(ping_pong, 1, 384) ENTRY(ping_pong, 2, 384) ENTRY(ping_pong, 3, 384) ENTRY(ping_pong, 4, 384)
ENTRY(ping_pong, 5, 384) ENTRY(ping_pong, 6, 384) ENTRY(ping_pong, 7, 384) ENTRY(ping_pong, 8, 384)
ENTRY(attention, 0, 256) ENTRY(attention, 1, 256) ENTRY(attention, 2, 256) ENTRY(attention, 3, 256) ENTRY(attention, 4, 256)
ENTRY(attention, 5, 256)
ENTRY(copies, 0, 128) ENTRY(copies, 1, 128) ENTRY(copies, 2, 128) ENTRY(copies, 3, 128) ENTRY(copies, 4, 128)
