// What every translation unit of the core agrees on: limits and the host/device marker.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GP_HD __host__ __device__ __forceinline__
#else
#define GP_HD inline
#endif

namespace gradprom {

// One main gradient and up to four auxiliaries. Everything that depends on their number is a template
// on `N` (the number of gradients), so raising the limit costs compile time, not run time.
inline constexpr int kMaxAux = 4;
inline constexpr int kMaxGrads = kMaxAux + 1;

// Optimizer state tensors of one parameter: SGD has a momentum buffer, Adam m and v, AMSGrad also max(v).
inline constexpr int kMaxStates = 3;

}  // namespace gradprom
