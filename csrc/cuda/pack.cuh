// Elements of tensors in registers: eight at a time in vectors of 16 bytes, or one by one.
#pragma once

#include "cuda/walk.cuh"

namespace gradprom::cuda {
namespace {

// The part of a segment that is read in whole vectors, in elements; the rest, if any, is shorter than a vector.
GP_DEVICE int64_t vector_part(int64_t elements, Access access) {
  if (access == Access::kElements) return 0;
  return elements - elements % (access == Access::kQuads ? 4 : 8);
}

// Eight elements that one thread works on: two quads, side by side (octets) or kThreads quads apart.
struct Place {
  int64_t at[2];
  bool has[2];

  GP_DEVICE Place(int64_t tile, int thread, int64_t end, bool octets) {
    at[0] = tile + (octets ? 8 : 4) * thread;
    at[1] = at[0] + (octets ? 4 : 4 * kThreads);
    has[0] = at[0] < end;
    has[1] = at[1] < end;
  }
};
constexpr int64_t kTile = 8 * kThreads;

// A pointer that was itself loaded from memory could point anywhere; knowing better, the compiler need not ask at every
// access.
template <class T>
GP_DEVICE T* global(T* pointer) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

GP_DEVICE bool is_half(DType dtype) { return dtype == DType::kF16 || dtype == DType::kBF16; }

// Eight elements of one tensor, as loaded (16-bit ones fill the first half) or widened to fp32.
struct Pack {
  uint32_t words[8];

  GP_DEVICE void load(int half, const char* address) {
    const uint4 v = *reinterpret_cast<const uint4*>(address);
    words[4 * half + 0] = v.x;
    words[4 * half + 1] = v.y;
    words[4 * half + 2] = v.z;
    words[4 * half + 3] = v.w;
  }

  GP_DEVICE void store(int half, char* address) const {
    *reinterpret_cast<uint4*>(address) =
        make_uint4(words[4 * half + 0], words[4 * half + 1], words[4 * half + 2], words[4 * half + 3]);
  }

  template <class Storage>
  GP_DEVICE void widen_from() {
#pragma unroll
    for (int j = 7; j >= 0; --j) {
      const Storage x{static_cast<uint16_t>(words[j / 2] >> (16 * (j % 2)))};
      words[j] = detail::bits_of(widen(x));
    }
  }

  template <class Storage>
  GP_DEVICE void narrow_to() {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t low = narrow<Storage>(value(2 * j)).bits;
      const uint32_t high = narrow<Storage>(value(2 * j + 1)).bits;
      words[j] = low | high << 16;
    }
  }

  GP_DEVICE void widen_all(DType dtype) {
    if (dtype == DType::kBF16) {
      widen_from<bf16>();
    } else if (dtype == DType::kF16) {
      widen_from<f16>();
    }
  }

  GP_DEVICE void narrow_all(DType dtype) {
    if (dtype == DType::kBF16) {
      narrow_to<bf16>();
    } else if (dtype == DType::kF16) {
      narrow_to<f16>();
    }
  }

  // Masters follow the 16-bit parameters in `rounded`, as loaded (see `followed`).
  template <class Storage>
  GP_DEVICE void follow(const Pack& rounded) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      set(j, followed(value(j), Storage{static_cast<uint16_t>(rounded.words[j / 2] >> (16 * (j % 2)))}));
    }
  }

  GP_DEVICE void follow_all(const Pack& rounded, DType dtype) {
    if (dtype == DType::kBF16) {
      follow<bf16>(rounded);
    } else {
      follow<f16>(rounded);
    }
  }

  GP_DEVICE float value(int j) const { return detail::float_of(words[j]); }
  GP_DEVICE void set(int j, float x) { words[j] = detail::bits_of(x); }
};

// Loads come first and conversions later, so that many loads are in flight; what lies outside the tensor reads as 0.
GP_DEVICE Pack load_pack(const void* data, DType dtype, const Place& place) {
  const bool half = is_half(dtype);
  const int64_t bytes = half ? 2 : 4;
  const char* const base = static_cast<const char*>(global(data));
  Pack pack{};
  if (place.has[0]) pack.load(0, base + place.at[0] * bytes);
  if (place.has[1] && !half) pack.load(1, base + place.at[1] * bytes);
  return pack;
}

GP_DEVICE void store_pack(Pack pack, void* data, DType dtype, const Place& place) {
  const bool half = is_half(dtype);
  const int64_t bytes = half ? 2 : 4;
  char* const base = static_cast<char*>(global(data));
  pack.narrow_all(dtype);
  if (place.has[0]) pack.store(0, base + place.at[0] * bytes);
  if (place.has[1] && !half) pack.store(1, base + place.at[1] * bytes);
}

// A gradient whose elements from `begin` on, `kept` of them, lie at `chip`.
GP_DEVICE Pack load_kept(const void* data, DType dtype, const Place& place, const char* chip, int64_t begin,
                         int64_t kept) {
  const bool half = is_half(dtype);
  const int64_t bytes = half ? 2 : 4;
  const char* const base = static_cast<const char*>(global(data));
  Pack pack{};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (!place.has[h] || (h == 1 && half)) continue;
    const int64_t i = place.at[h] - begin;
    if (i < kept) {
      pack.load(h, chip + i * bytes);
    } else {
      pack.load(h, base + place.at[h] * bytes);
    }
  }
  return pack;
}

GP_DEVICE void keep_pack(const Pack& pack, DType dtype, const Place& place, char* chip, int64_t begin, int64_t kept) {
  const bool half = is_half(dtype);
  const int64_t bytes = half ? 2 : 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t i = place.at[h] - begin;
    if (place.has[h] && i < kept && !(h == 1 && half)) pack.store(h, chip + i * bytes);
  }
}

// Element i of an item's index space, as an index into the memory of one of its tensors.
GP_DEVICE int64_t offset_of(const Job& job, const Item& item, int operand, int64_t i) {
  if (item.geometry < 0) return i;
  const int64_t* const geometry = job.geometry + item.geometry;
  const int ndim = static_cast<int>(geometry[0]);
  const int64_t* const sizes = geometry + 1;
  const int64_t* const strides = sizes + ndim + operand * ndim;
  int64_t offset = 0;
#pragma unroll 1
  for (int d = ndim - 1; d >= 0; --d) {
    offset += (i % sizes[d]) * strides[d];
    i /= sizes[d];
  }
  return offset;
}

template <class T>
GP_DEVICE T load_element(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kF64:
      return static_cast<T>(static_cast<const double*>(global(data))[i]);
    case DType::kF16:
      return static_cast<T>(widen(static_cast<const f16*>(global(data))[i]));
    case DType::kBF16:
      return static_cast<T>(widen(static_cast<const bf16*>(global(data))[i]));
    default:
      return static_cast<T>(static_cast<const float*>(global(data))[i]);
  }
}

template <class T>
GP_DEVICE T follow_element(T master, const void* rounded, DType dtype, int64_t i) {
  return dtype == DType::kBF16 ? followed(master, static_cast<const bf16*>(global(rounded))[i])
                               : followed(master, static_cast<const f16*>(global(rounded))[i]);
}

template <class T>
GP_DEVICE void store_element(T x, void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kF64:
      static_cast<double*>(global(data))[i] = x;
      break;
    case DType::kF16:
      static_cast<f16*>(global(data))[i] = narrow<f16>(x);
      break;
    case DType::kBF16:
      static_cast<bf16*>(global(data))[i] = narrow<bf16>(x);
      break;
    default:
      static_cast<float*>(global(data))[i] = static_cast<float>(x);
  }
}

}  // namespace
}  // namespace gradprom::cuda
