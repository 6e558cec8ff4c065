// CTAs that synchronise through global memory, as others write it; BROKEN leaves out or weakens one thing.
// Parameters of all: `in` of 16384 words, `out`, `work` of zeros, `rounds`.

#include <cstdint>

using Word = uint32_t;

__device__ Word load_acquire(const Word* p) {
  Word value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

__device__ Word load_relaxed(const Word* p) {
  Word value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

__device__ void store_release(Word* p, Word value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

// A barrier of the grid that turns its sense; the last CTA sets the counter back with a plain store.
template <int BROKEN>
__device__ void grid_barrier(Word* count, volatile Word* sense, Word& mine) {
  if (BROKEN != 3) __syncthreads();
  if (threadIdx.x == 0) {
    mine ^= 1;
    if (BROKEN != 1) __threadfence();
    if (atomicAdd(count, 1u) == gridDim.x - 1) {
      if (BROKEN == 4) *sense = mine;
      *count = 0;
      __threadfence();
      if (BROKEN != 4) *sense = mine;
    } else {
      while (*sense != mine) {}
    }
    if (BROKEN != 2) __threadfence();
  }
  __syncthreads();
}

template <int BROKEN>
__device__ void barrier(const Word*, Word* out, Word* work, int rounds) {
  Word mine = 0, sum = 0, *data = work + 64;
  for (int round = 0; round < rounds; round++) {
    data[blockIdx.x * 64 + threadIdx.x] = round * 1000 + blockIdx.x + threadIdx.x;
    grid_barrier<BROKEN>(work, work + 32, mine);
    sum += data[(blockIdx.x + 1) % gridDim.x * 64 + (threadIdx.x ^ 33)];
    grid_barrier<BROKEN>(work, work + 32, mine);
  }
  out[blockIdx.x * 64 + threadIdx.x] = sum;
}

// The last CTA to take a ticket adds up what all have left, sets the tickets back and starts the next round.
template <int BROKEN>
__device__ void last_block(const Word* in, Word* out, Word* work, int rounds) {
  __shared__ bool last;
  const Word t = threadIdx.x;
  Word* partial = work + 64;
  for (int round = 0; round < rounds; round++) {
    partial[blockIdx.x * 64 + t] = in[blockIdx.x * 64 + t] * (round + 1);
    if (BROKEN != 1) __threadfence();
    if (BROKEN != 2) __syncthreads();
    if (t == 0) last = atomicAdd(work, 1u) == gridDim.x - 1;
    __syncthreads();
    if (last) {
      if (BROKEN != 3) __threadfence();
      Word sum = 0;
      for (int cta = 0; cta < gridDim.x; cta++) sum += partial[cta * 64 + (t ^ 33)];
      out[round * 64 + t] = sum;
      __syncthreads();
      if (t == 0) {
        if (BROKEN == 4) store_release(work + 1, round + 1);
        work[0] = 0;
        if (BROKEN == 5) *(volatile Word*)(work + 1) = round + 1;
        else if (BROKEN != 4) store_release(work + 1, round + 1);
      }
    } else if (t == 0) {
      while (load_acquire(work + 1) != round + 1) {}
    }
    __syncthreads();
  }
}

// Stream-K: every second CTA leaves its part of a tile to the one before it, which takes the flag down again.
template <int BROKEN>
__device__ void fix_up(const Word* in, Word* out, Word* work, int rounds) {
  const Word pair = blockIdx.x / 2, second = blockIdx.x & 1, t = threadIdx.x;
  Word *flag = work + pair, *part = work + 64 + pair * 64;
  for (int round = 0; round < rounds; round++) {
    const Word sum = in[blockIdx.x * 64 + t] + round;
    if (second) {
      if (t == 0) while (load_acquire(flag) != 0) {}
      __syncthreads();
      part[t] = sum;
      if (BROKEN != 1) __syncthreads();
      if (t == 0) {
        if (BROKEN != 2) __threadfence();
        atomicAdd(flag, 1u);
      }
    } else {
      if (t == 0) while ((BROKEN == 3 ? load_relaxed(flag) : load_acquire(flag)) != 1) {}
      if (BROKEN != 4) __syncthreads();
      out[(round * gridDim.x / 2 + pair) * 64 + t] = sum + part[t];
      if (BROKEN != 5) __syncthreads();
      if (t == 0) {
        if (BROKEN == 6) *flag = 0;
        else store_release(flag, 0);
      }
    }
  }
}

// Bins are counted with atomics whose results nobody looks at; the last CTA reads them and clears them with plain stores.
template <int BROKEN>
__device__ void histogram(const Word* in, Word* out, Word* work, int) {
  __shared__ bool last;
  const Word t = threadIdx.x;
  for (int i = 0; i < 4; i++) atomicAdd(work + 64 + in[(blockIdx.x * 4 + i) * 64 + t] % 64, 1u);
  if (BROKEN != 1) __threadfence();
  if (BROKEN != 2) __syncthreads();
  if (t == 0) last = atomicAdd(work, 1u) == gridDim.x - 1;
  __syncthreads();
  if (last) {
    if (BROKEN != 3) __threadfence();
    out[t] = work[64 + t];
    work[64 + t] = 0;
    if (t == 0) work[0] = 0;
  }
}

#define ENTRY(name, broken)                                                                          \
  extern "C" __global__ void name##_##broken(const Word* in, Word* out, Word* work, int rounds) {    \
    name<broken>(in, out, work, rounds);                                                             \
  }
ENTRY(barrier, 0) ENTRY(barrier, 1) ENTRY(barrier, 2) ENTRY(barrier, 3) ENTRY(barrier, 4)
ENTRY(last_block, 0) ENTRY(last_block, 1) ENTRY(last_block, 2) ENTRY(last_block, 3) ENTRY(last_block, 4) ENTRY(last_block, 5)
ENTRY(fix_up, 0) ENTRY(fix_up, 1) ENTRY(fix_up, 2) ENTRY(fix_up, 3) ENTRY(fix_up, 4) ENTRY(fix_up, 5) ENTRY(fix_up, 6)
ENTRY(histogram, 0) ENTRY(histogram, 1) ENTRY(histogram, 2) ENTRY(histogram, 3)
