// The kernel: one launch for the whole step of a model.
//
//   measure   every block reads the gradients of its share and adds up their products
//   barrier   (the whole grid)
//   decide    every block adds the blocks' partial matrices in the same order and applies the policy to them, so that
//             all come to the same decision without another barrier (with one matrix per tensor the rows are dealt
//             out over the blocks, and there is a second barrier)
//   update    every block steps its share, walking it backwards
//
// Memory traffic, fp32 with one auxiliary, in bytes per parameter:
//   gradients on chip       SGD  8 + 4 + 4 = 16     SGD with momentum 24     Adam  8 + 12 + 12 = 32     AMSGrad 40
//   gradients read twice    SGD 16 + 4 + 4 = 24     SGD with momentum 32     Adam 16 + 12 + 12 = 40     AMSGrad 48
// and for bf16 parameters and gradients with fp32 masters and moments
//   gradients on chip       SGD  4 + 6 + 6 = 16                              Adam  4 + 14 + 14 = 32
//   gradients read twice    SGD  8 + 6 + 6 = 20                              Adam  8 + 14 + 14 = 36
// (the parameter is read too: where it was written to since the last step, its master follows it).
// A block keeps the first gradients that it reads in its shared memory; at 227 KB in each of 132 multiprocessors that
// holds 3.7 million parameters. What it reads last, and needs first on the way back, is what the L2 cache still has; so
// shared memory and L2 add up instead of holding the same bytes. Between the two regimes the traffic grows linearly.
// Registers are for the loads in flight: a tile of gradients kept there across the barrier would be 32 KB more beside
// the 227, and is what L2 still has.
//
// Products are formed in fp64, where those of fp32 and 16-bit gradients are exact, and summed there: scale does not
// matter (fp32 squares would vanish below 1e-19 and overflow above 1e+19), the sign of a cosine near 0 is right, no
// rescue path is needed, and the numbers are those of the CPU kernels. The price for one auxiliary is 2 conversions and
// 3 multiply-adds per parameter. By the vendor's table (32 to 64 fp64 operations and 16 conversions per clock and
// multiprocessor) that is a third of the time that an A100 or H100 needs to read the 8 bytes. Where fp64 runs at 1/64
// of fp32 it is about as long as the read on consumer cards; only there would fp32 pay.
#pragma once

#include <cooperative_groups.h>

#include "cuda/decide.cuh"
#include "cuda/measure.cuh"
#include "cuda/update.cuh"

#if !defined(GP_DYNAMIC_SHARED)  // tests/cuda_host has others
#define GP_DYNAMIC_SHARED(name) extern __shared__ uint4 name[]
#define GP_STATIC_SHARED(type, name) __shared__ type name
#endif

namespace gradprom::cuda {
namespace {

template <Rule R, int N>
__global__ void __launch_bounds__(kThreads, 1) step_kernel(const __grid_constant__ Job job) {
  GP_DYNAMIC_SHARED(dynamic);
  GP_STATIC_SHARED(Shared, shared);
  char* const chip = reinterpret_cast<char*>(dynamic);
  const Walk walk(job);
  OnChip on_chip(job.on_chip_bytes);

  if ((job.stages & kMeasure) != 0) {
    if (job.gram == nullptr) prepare_rules<R>(job, walk);
    if (job.given_weights == nullptr) measure<N>(job, walk, on_chip, chip, shared.scratch);
    if ((job.stages & (kRows | kUpdate)) != 0) cooperative_groups::this_grid().sync();
  }
  if ((job.stages & kRows) != 0) {
    work_on_rows<N>(job, shared);
    if ((job.stages & kUpdate) != 0) cooperative_groups::this_grid().sync();
  }
  if ((job.stages & kUpdate) != 0) {
    const double* const weights = conclude_step<N>(job, shared);
    if (shared.outcome.finite) update<R, N>(job, walk, on_chip, chip, weights, shared.outcome.clip);
  }
}

template <Rule R>
Kernel kernel_for(int num_grads) {
  constexpr Kernel kernels[kMaxGrads] = {step_kernel<R, 1>, step_kernel<R, 2>, step_kernel<R, 3>, step_kernel<R, 4>,
                                         step_kernel<R, 5>};
  return kernels[num_grads - 1];
}

}  // namespace
}  // namespace gradprom::cuda
