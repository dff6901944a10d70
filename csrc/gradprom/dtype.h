// The floating-point types a tensor may have, and their conversion to the type the arithmetic runs in.
#pragma once

#include <cstring>

#include "gradprom/platform.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace gradprom {

enum class DType : uint8_t { kF32, kF64, kF16, kBF16 };

// Storage types: bits only. Arithmetic never happens in 16 bits (design: products in fp32 or wider).
struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

namespace detail {

GP_HD uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
#endif
}

GP_HD float float_of(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
#endif
}

}  // namespace detail

GP_HD float widen(float x) { return x; }
GP_HD double widen(double x) { return x; }
GP_HD float widen(bf16 x) { return detail::float_of(static_cast<uint32_t>(x.bits) << 16); }

GP_HD float widen(f16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  // Multiplying by 2^112 moves the exponent from fp16's bias to fp32's and normalises subnormals on the way.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const bool special = (x.bits & 0x7c00u) == 0x7c00u;
  const float scaled = detail::float_of(magnitude) * detail::float_of(0x77800000u);
  return detail::float_of(sign | (special ? (magnitude | 0x7f800000u) : detail::bits_of(scaled)));
#endif
}

// Rounds to the storage type, to nearest, ties to even: what a cast in PyTorch does.
template <class Storage, class T>
GP_HD Storage narrow(T x) {
  return static_cast<Storage>(x);
}

template <>
GP_HD bf16 narrow<bf16, float>(float x) {
  const uint32_t u = detail::bits_of(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  return bf16{static_cast<uint16_t>(nan ? 0x7fc0u : rounded)};
}

template <>
GP_HD f16 narrow<f16, float>(float x) {
#if defined(__CUDA_ARCH__)
  return f16{__half_as_ushort(__float2half_rn(x))};
#else
  // Selects instead of branches, so that a loop over elements vectorises.
  const uint32_t u = detail::bits_of(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  // Normal result: move the exponent to fp16's bias and round at bit 13.
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal result: 0.5 has fp16's last subnormal place as its own, so the fp32 adder does the rounding.
  const uint32_t subnormal = detail::bits_of(detail::float_of(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t out = magnitude < 0x38800000u ? subnormal : normal;
  out = magnitude >= 0x477ff000u ? 0x7c00u : out;  // rounds to infinity
  out = magnitude > 0x7f800000u ? 0x7e00u : out;   // NaN
  return f16{static_cast<uint16_t>(sign | out)};
#endif
}

// Via fp32, as PyTorch converts (a double rounding there too).
template <>
GP_HD bf16 narrow<bf16, double>(double x) {
  return narrow<bf16>(static_cast<float>(x));
}
template <>
GP_HD f16 narrow<f16, double>(double x) {
  return narrow<f16>(static_cast<float>(x));
}

// What the update of a parameter with an fp32 master starts from: the master, or, where the parameter is no longer the
// master's rounded value because it was written to since, the parameter.
template <class Storage, class T>
GP_HD T followed(T master, Storage parameter) {
  return narrow<Storage>(master).bits == parameter.bits ? master : static_cast<T>(widen(parameter));
}

// Calls `body` with a value of the storage type that `dtype` names.
template <class Body>
inline auto dispatch(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kF64:
      return body(double{});
    case DType::kF16:
      return body(f16{});
    case DType::kBF16:
      return body(bf16{});
    case DType::kF32:
      break;
  }
  return body(float{});
}

inline int64_t size_of(DType dtype) {
  return dispatch(dtype, [](auto sample) { return static_cast<int64_t>(sizeof sample); });
}

}  // namespace gradprom
