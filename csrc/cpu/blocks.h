// The inner loops of the CPU scheduler: contiguous runs of elements, compiled once per instruction set.
#pragma once

#include "gradprom/dtype.h"
#include "gradprom/update.h"

namespace gradprom::cpu {

// Which update an entry gets: the rule and the state tensors it carries.
enum class Kernel : int { kSgd, kSgdMomentum, kAdam, kAmsgrad };
inline constexpr int kKernels = 4;

template <class T>
struct UpdateRun {
  T* param;
  T* states[kMaxStates];
  const T* grads[kMaxGrads];  // only those whose weight is not zero
  T weights[kMaxGrads];
  Sgd<T> sgd;
  Adam<T> adam;
};

template <class T>
struct Blocks {
  // gram[m - 1](g, n, out): adds the upper triangle of the m x m Gram matrix of g[0..m) to `out`.
  void (*gram[kMaxGrads])(const T* const* g, int64_t n, double* out);
  // update[kernel][m](run, n): one optimizer step with the combination of m gradients.
  void (*update[kKernels][kMaxGrads + 1])(const UpdateRun<T>& run, int64_t n);
  // load[dtype](src, stride, n, dst), store[dtype](src, n, dst, stride): to and from the arithmetic type.
  void (*load[4])(const void* src, int64_t stride, int64_t n, T* dst);
  void (*store[4])(const T* src, int64_t n, void* dst, int64_t stride);
};

// The widest instruction set this processor has, or the one that GRADPROM_CPU_ISA names (baseline, avx2, avx512).
template <class T>
const Blocks<T>& blocks();

const char* isa_name();

}  // namespace gradprom::cpu
