// Sums over the threads of a block: a fixed tree, so that the same numbers always give the same sum.
#pragma once

#include "cuda/job.h"

#define GP_DEVICE __device__ __forceinline__

namespace gradprom::cuda {
namespace {

constexpr int kWarps = kThreads / 32;
static_assert(kThreads >= 32 && (kThreads & (kThreads - 1)) == 0);

// Adds `values` over the threads of the block; every thread may read `sums` afterwards.
template <int M>
GP_DEVICE void block_sum(const double (&values)[M], double* scratch, double* sums) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int e = 0; e < M; ++e) {
    double v = values[e];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) v += __shfl_down_sync(0xffffffffu, v, distance);
    if (lane == 0) scratch[warp * M + e] = v;
  }
  __syncthreads();
  if (threadIdx.x < M) {
    double sum = 0.0;
    for (int w = 0; w < kWarps; ++w) sum += scratch[w * M + threadIdx.x];
    sums[threadIdx.x] = sum;
  }
  __syncthreads();
}

}  // namespace
}  // namespace gradprom::cuda
