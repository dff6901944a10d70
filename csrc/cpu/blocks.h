// The inner loops of the CPU scheduler: contiguous runs of elements, compiled once per instruction set.
#pragma once

#include "gradprom/dtype.h"
#include "gradprom/update.h"

namespace gradprom::cpu {

template <class T>
struct UpdateRun {
  T* param;
  T* states[kMaxStates];
  const T* grads[kMaxGrads];  // only those whose weight is not zero
  T weights[kMaxGrads];
  const void* rule;  // prepared, of the rule's type
};

template <class T>
struct Blocks {
  // gram[m - 1](g, n, out): adds the upper triangle of the m x m Gram matrix of g[0..m) to `out`.
  void (*gram[kMaxGrads])(const T* const* g, int64_t n, double* out);
  // update[rule][s][m](run, n): one optimizer step with s state tensors and the combination of m gradients; null where
  // the rule never has s.
  void (*update[kRules][kMaxStates + 1][kMaxGrads + 1])(const UpdateRun<T>& run, int64_t n);
  // load[dtype](src, stride, n, dst), store[dtype](src, n, dst, stride): to and from the arithmetic type.
  void (*load[4])(const void* src, int64_t stride, int64_t n, T* dst);
  void (*store[4])(const T* src, int64_t n, void* dst, int64_t stride);
  // follow[dtype](src, stride, n, dst): masters at dst follow 16-bit parameters at src (see `followed`).
  void (*follow[4])(const void* src, int64_t stride, int64_t n, T* dst);
};

// The widest instruction set this processor has, or the one that GRADPROM_CPU_ISA names (baseline, avx2, avx512).
template <class T>
const Blocks<T>& blocks();

const char* isa_name();

}  // namespace gradprom::cpu
