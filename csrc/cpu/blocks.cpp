#include "cpu/blocks.h"

#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "gradprom/gram.h"

#define GP_INLINE inline __attribute__((always_inline))

namespace gradprom::cpu {
namespace {

// Products and sums in fp64, exact products for 32- and 16-bit gradients: no overflow, no underflow, no rescue path.
// A processor core widens and multiplies as fast as memory delivers: beyond the caches a step takes what its reads
// alone take (benchmarks/README.md). Lanes are explicit because a compiler may not reorder a floating-point sum on its
// own; they also fix the order.
template <class T, int M>
GP_INLINE void gram_body(const T* const* g, int64_t n, double* out) {
  static constexpr int kLanes = M <= 2 ? 16 : 8;  // static: Clang would have the lambda capture it
  constexpr int kEntries = gram_size(M);
  double sums[kEntries][kLanes] = {};
  const auto accumulate = [&sums](const T* const* p, int64_t i) __attribute__((always_inline)) {
    double x[M][kLanes];
    for (int a = 0; a < M; ++a) {
      for (int l = 0; l < kLanes; ++l) x[a][l] = static_cast<double>(p[a][i + l]);
    }
    for (int a = 0, e = 0; a < M; ++a) {
      for (int b = a; b < M; ++b, ++e) {
        for (int l = 0; l < kLanes; ++l) sums[e][l] += x[a][l] * x[b][l];
      }
    }
  };

  const int64_t body = n - n % kLanes;
  for (int64_t i = 0; i < body; i += kLanes) accumulate(g, i);
  if (body < n) {
    T padded[M][kLanes] = {};
    const T* tail[M];
    for (int a = 0; a < M; ++a) {
      for (int64_t i = body; i < n; ++i) padded[a][i - body] = g[a][i];
      tail[a] = padded[a];
    }
    accumulate(tail, 0);
  }
  for (int e = 0; e < kEntries; ++e) {
    for (int l = 0; l < kLanes; ++l) out[e] += sums[e][l];
  }
}

template <class T, class R, int S, int M>
GP_INLINE void update_body(const UpdateRun<T>& run, int64_t n) {
  T* __restrict param = run.param;
  T* __restrict state0 = run.states[0];
  T* __restrict state1 = run.states[1];
  T* __restrict state2 = run.states[2];
  const T* __restrict grads[kMaxGrads];
  T weights[kMaxGrads];
  for (int k = 0; k < M; ++k) {
    grads[k] = run.grads[k];
    weights[k] = run.weights[k];
  }
  const R rule = *static_cast<const R*>(run.rule);
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    T gradient = M > 0 ? weights[0] * grads[0][i] : T(0);
    for (int k = 1; k < M; ++k) gradient += weights[k] * grads[k][i];
    T x = param[i];
    T states[kMaxStates];
    if (S > 0) states[0] = state0[i];
    if (S > 1) states[1] = state1[i];
    if (S > 2) states[2] = state2[i];
    rule.apply(S, gradient, x, states);
    param[i] = x;
    if (S > 0) state0[i] = states[0];
    if (S > 1) state1[i] = states[1];
    if (S > 2) state2[i] = states[2];
  }
}

template <class Storage, class T>
GP_INLINE void load_body(const void* src, int64_t stride, int64_t n, T* __restrict dst) {
  const Storage* s = static_cast<const Storage*>(src);
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<T>(widen(s[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<T>(widen(s[i * stride]));
  }
}

template <class Storage, class T>
GP_INLINE void store_body(const T* __restrict src, int64_t n, void* dst, int64_t stride) {
  Storage* d = static_cast<Storage*>(dst);
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) d[i] = narrow<Storage>(src[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) d[i * stride] = narrow<Storage>(src[i]);
  }
}

template <class Storage, class T>
GP_INLINE void follow_body(const void* src, int64_t stride, int64_t n, T* __restrict dst) {
  const Storage* s = static_cast<const Storage*>(src);
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) dst[i] = followed(dst[i], s[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) dst[i] = followed(dst[i], s[i * stride]);
  }
}

// One struct per instruction set: the same bodies, inlined into functions compiled for it.
#define GP_DEFINE_ISA(Name, ...)                                                         \
  struct Name {                                                                          \
    template <class T, int M>                                                            \
    __VA_ARGS__ static void gram(const T* const* g, int64_t n, double* out) {            \
      gram_body<T, M>(g, n, out);                                                        \
    }                                                                                    \
    template <class T, class R, int S, int M>                                            \
    __VA_ARGS__ static void update(const UpdateRun<T>& run, int64_t n) {                 \
      update_body<T, R, S, M>(run, n);                                                   \
    }                                                                                    \
    template <class Storage, class T>                                                    \
    __VA_ARGS__ static void load(const void* src, int64_t stride, int64_t n, T* dst) {   \
      load_body<Storage, T>(src, stride, n, dst);                                        \
    }                                                                                    \
    template <class Storage, class T>                                                    \
    __VA_ARGS__ static void store(const T* src, int64_t n, void* dst, int64_t stride) {  \
      store_body<Storage, T>(src, n, dst, stride);                                       \
    }                                                                                    \
    template <class Storage, class T>                                                    \
    __VA_ARGS__ static void follow(const void* src, int64_t stride, int64_t n, T* dst) { \
      follow_body<Storage, T>(src, stride, n, dst);                                      \
    }                                                                                    \
  }

GP_DEFINE_ISA(Baseline, __attribute__((flatten)));
#if defined(__x86_64__)
GP_DEFINE_ISA(Avx2, __attribute__((target("avx2,fma,f16c"), flatten)));
#if defined(__clang__)  // which ignores the whole attribute where it does not know a part of it
#define GP_WHOLE_VECTORS ""
#else
#define GP_WHOLE_VECTORS ",prefer-vector-width=512"
#endif
GP_DEFINE_ISA(Avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma" GP_WHOLE_VECTORS), flatten)));
#endif

template <class Isa, class T, class R, int S>
constexpr void fill_updates(Blocks<T>& b, Rule rule) {
  auto& row = b.update[static_cast<int>(rule)][S];
  row[0] = &Isa::template update<T, R, S, 0>;
  row[1] = &Isa::template update<T, R, S, 1>;
  row[2] = &Isa::template update<T, R, S, 2>;
  row[3] = &Isa::template update<T, R, S, 3>;
  row[4] = &Isa::template update<T, R, S, 4>;
  row[5] = &Isa::template update<T, R, S, 5>;
}

template <class Isa, class T, class R, int S = R::kFewestStates>
constexpr void fill_rule(Blocks<T>& b, Rule rule) {
  fill_updates<Isa, T, R, S>(b, rule);
  if constexpr (S < R::kStates) fill_rule<Isa, T, R, S + 1>(b, rule);
}

template <class Isa, class T, class Storage>
constexpr void fill_conversions(Blocks<T>& b, DType dtype) {
  b.load[static_cast<int>(dtype)] = &Isa::template load<Storage, T>;
  b.store[static_cast<int>(dtype)] = &Isa::template store<Storage, T>;
}

template <class Isa, class T>
constexpr Blocks<T> make_blocks() {
  Blocks<T> b{};
  b.gram[0] = &Isa::template gram<T, 1>;
  b.gram[1] = &Isa::template gram<T, 2>;
  b.gram[2] = &Isa::template gram<T, 3>;
  b.gram[3] = &Isa::template gram<T, 4>;
  b.gram[4] = &Isa::template gram<T, 5>;
#define GP_FILL(enumerator, name, type) fill_rule<Isa, T, type<T>>(b, Rule::enumerator);
  GP_RULES(GP_FILL)
#undef GP_FILL
  b.follow[static_cast<int>(DType::kF16)] = &Isa::template follow<f16, T>;
  b.follow[static_cast<int>(DType::kBF16)] = &Isa::template follow<bf16, T>;
  fill_conversions<Isa, T, float>(b, DType::kF32);
  fill_conversions<Isa, T, double>(b, DType::kF64);
  fill_conversions<Isa, T, f16>(b, DType::kF16);
  fill_conversions<Isa, T, bf16>(b, DType::kBF16);
  return b;
}

template <class Isa, class T>
constexpr Blocks<T> kBlocks = make_blocks<Isa, T>();

enum class IsaLevel { kBaseline, kAvx2, kAvx512 };

IsaLevel detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if !defined(__clang__)  // which could not ask for it in all of its versions; processors with FMA have it
  avx2 = avx2 && __builtin_cpu_supports("f16c");
#endif
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  IsaLevel level = avx512 ? IsaLevel::kAvx512 : avx2 ? IsaLevel::kAvx2 : IsaLevel::kBaseline;
  if (const char* wanted = std::getenv("GRADPROM_CPU_ISA")) {
    if (std::strcmp(wanted, "baseline") == 0) level = IsaLevel::kBaseline;
    if (std::strcmp(wanted, "avx2") == 0 && avx2) level = IsaLevel::kAvx2;
  }
  return level;
#else
  return IsaLevel::kBaseline;
#endif
}

IsaLevel level() {
  static const IsaLevel detected = detect();
  return detected;
}

}  // namespace

template <class T>
const Blocks<T>& blocks() {
  switch (level()) {
#if defined(__x86_64__)
    case IsaLevel::kAvx512:
      return kBlocks<Avx512, T>;
    case IsaLevel::kAvx2:
      return kBlocks<Avx2, T>;
#endif
    default:
      return kBlocks<Baseline, T>;
  }
}

template const Blocks<float>& blocks<float>();
template const Blocks<double>& blocks<double>();

const char* isa_name() {
  switch (level()) {
    case IsaLevel::kAvx512:
      return "avx512";
    case IsaLevel::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace gradprom::cpu
