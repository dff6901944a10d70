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
//   gradients on chip       SGD  4 + 4 + 6 = 14                              Adam  4 + 12 + 14 = 30
//   gradients read twice    SGD  8 + 4 + 6 = 18                              Adam  8 + 12 + 14 = 34
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

#include <type_traits>

#include "cuda/job.h"

#if !defined(GP_DYNAMIC_SHARED)  // tests/cuda_host has another
#define GP_DYNAMIC_SHARED(name) extern __shared__ uint4 name[]
#endif
#define GP_DEVICE __device__ __forceinline__

namespace gradprom::cuda {
namespace {

constexpr int kWarps = kThreads / 32;
static_assert(kThreads >= 32 && (kThreads & (kThreads - 1)) == 0);

struct Shared {
  double scratch[kWarps * kMaxGram];
  double sums[kMaxGram];
  double weights[kMaxGrads];
  double clip;
  bool finite;
};

// ---------------------------------------------------------------------------------------------------------------------
// Reduction: a fixed tree, so that the same numbers always give the same sum

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

// The Gram matrix of a row, from the blocks' partial ones, to `shared.sums`.
template <int N>
GP_DEVICE void row_gram(const Job& job, int row, Shared& shared) {
  constexpr int kSize = gram_size(N);
  double values[kSize] = {};
#pragma unroll 1
  for (int slot = job.row_slots[row] + threadIdx.x; slot < job.row_slots[row + 1]; slot += kThreads) {
#pragma unroll
    for (int e = 0; e < kSize; ++e) values[e] += job.partials[static_cast<int64_t>(slot) * kSize + e];
  }
  block_sum(values, shared.scratch, shared.sums);
}

// ---------------------------------------------------------------------------------------------------------------------
// Walking over memory

// A block's run of items, cut into one segment per item.
struct Walk {
  Share first, last;

  GP_DEVICE explicit Walk(const Job& job) : first(job.shares[blockIdx.x]), last(job.shares[blockIdx.x + 1]) {}

  GP_DEVICE int count() const {
    return last.item - first.item + (last.begin > (last.item == first.item ? first.begin : 0) ? 1 : 0);
  }
  GP_DEVICE int item(int segment) const { return first.item + segment; }
  GP_DEVICE int64_t begin(int segment) const { return segment == 0 ? first.begin : 0; }
  GP_DEVICE int64_t end(int segment, const Item& item) const {
    return first.item + segment == last.item ? last.begin : item.numel;
  }
  // Exactly one block begins an item: it looks after what exists once per item.
  GP_DEVICE bool owns(int segment) const { return begin(segment) == 0; }
};

// Gives small tensors different warps of the block, so that they are waited for side by side and not in turn.
class Rotation {
 public:
  // This thread's number among those that work on the segment.
  GP_DEVICE int next(int64_t elements, Access access) {
    const int thread = (threadIdx.x + kThreads - shift_) % kThreads;
    const int64_t each = access == Access::kQuads ? 4 : access == Access::kOctets ? 8 : 1;
    const int64_t threads = (elements + each - 1) / each;
    const int warps = threads < kThreads ? static_cast<int>((threads + 31) / 32) : 0;  // 0: all of them, a full turn
    shift_ = (shift_ + 32 * warps) % kThreads;
    return thread;
  }

 private:
  int shift_ = 0;
};

// Which gradients lie in shared memory: the first of the block's share, up to its capacity. A segment's gradients
// follow each other there, each in the order of its elements. Phase 1 pushes segments, phase 2 pops them backwards.
class OnChip {
 public:
  struct Span {
    int offset;    // bytes
    int64_t kept;  // elements, counted from the segment's first
  };

  GP_DEVICE explicit OnChip(int capacity) : capacity_(capacity) {}

  GP_DEVICE Span push(int segment, int64_t elements, int bytes) {
    if (segment == whole_) {
      const int room = (capacity_ - used_) / bytes;
      if (elements <= room) {
        ++whole_;
      } else {
        cut_ = room - room % 8;
      }
    }
    const Span span{used_, kept(segment, elements)};
    used_ += static_cast<int>(span.kept) * bytes;
    return span;
  }

  GP_DEVICE Span pop(int segment, int64_t elements, int bytes) {
    const int64_t n = kept(segment, elements);
    used_ -= static_cast<int>(n) * bytes;
    return {used_, n};
  }

 private:
  GP_DEVICE int64_t kept(int segment, int64_t elements) const {
    return segment < whole_ ? elements : segment == whole_ ? cut_ : 0;
  }

  int capacity_;
  int used_ = 0;
  int whole_ = 0;  // so many segments are kept whole,
  int cut_ = 0;    // and so many elements of the next one
};

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

// ---------------------------------------------------------------------------------------------------------------------
// Measure

template <int N>
GP_DEVICE void accumulate(const double (&x)[N], double (&sums)[gram_size(N)]) {
#pragma unroll
  for (int i = 0, e = 0; i < N; ++i) {
#pragma unroll
    for (int j = i; j < N; ++j, ++e) sums[e] += x[i] * x[j];
  }
}

template <int N>
GP_DEVICE void measure_vectors(const Item& item, int64_t begin, int64_t end, int thread, const OnChip::Span& span,
                               char* chip, double (&sums)[gram_size(N)]) {
  constexpr int kDepth = N <= 2 ? 2 : 1;  // packs in flight per gradient: 64 KB per multiprocessor for two of fp32
  const bool octets = item.access == Access::kOctets;
#pragma unroll 1
  for (int64_t tile = begin; tile < end; tile += kDepth * kTile) {
    if (!Place(tile, thread, end, octets).has[0]) break;
    Pack packs[kDepth][N];
#pragma unroll
    for (int u = 0; u < kDepth; ++u) {
      const Place place(tile + u * kTile, thread, end, octets);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        packs[u][k] = item.grads[k] != nullptr ? load_pack(item.grads[k], item.grad_dtypes[k], place) : Pack{};
      }
    }
#pragma unroll
    for (int u = 0; u < kDepth; ++u) {
      const Place place(tile + u * kTile, thread, end, octets);
      if (!place.has[0]) break;
      char* gradient = chip + span.offset;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        if (item.grads[k] == nullptr) continue;
        keep_pack(packs[u][k], item.grad_dtypes[k], place, gradient, begin, span.kept);
        gradient += span.kept * (is_half(item.grad_dtypes[k]) ? 2 : 4);
        packs[u][k].widen_all(item.grad_dtypes[k]);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        double x[N];
#pragma unroll
        for (int k = 0; k < N; ++k) x[k] = static_cast<double>(packs[u][k].value(j));
        accumulate<N>(x, sums);
      }
    }
  }
}

template <int N>
GP_DEVICE void measure_elements(const Job& job, const Item& item, int64_t begin, int64_t end, int thread,
                                double (&sums)[gram_size(N)]) {
#pragma unroll 1
  for (int64_t i = begin + thread; i < end; i += kThreads) {
    double x[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      x[k] = item.grads[k] == nullptr
                 ? 0.0
                 : load_element<double>(item.grads[k], item.grad_dtypes[k], offset_of(job, item, kGradOperand + k, i));
    }
    accumulate<N>(x, sums);
  }
}

// Partial Gram matrices of this block's share: one, or one per row where there are several.
template <int N>
GP_DEVICE void measure(const Job& job, const Walk& walk, OnChip& on_chip, char* chip, Shared& shared) {
  constexpr int kSize = gram_size(N);
  double sums[kSize] = {};
  int64_t slot = walk.first.slot;
  Rotation rotation;
  for (int s = 0; s < walk.count(); ++s) {
    const Item& item = job.items[walk.item(s)];
    const int64_t begin = walk.begin(s);
    const int64_t end = walk.end(s, item);
    const int64_t body = vector_part(end - begin, item.access);
    const int thread = rotation.next(end - begin, item.access);
    const OnChip::Span span = on_chip.push(s, body, item.gradient_bytes);
    measure_vectors<N>(item, begin, begin + body, thread, span, chip, sums);
    measure_elements<N>(job, item, begin + body, end, thread, sums);
    if (job.rows > 1) {
      block_sum(sums, shared.scratch, job.partials + slot++ * kSize);
#pragma unroll
      for (int e = 0; e < kSize; ++e) sums[e] = 0.0;
    }
  }
  if (job.rows == 1) block_sum(sums, shared.scratch, job.partials + slot * kSize);
}

// ---------------------------------------------------------------------------------------------------------------------
// Decide

// One thread decides on a row, whose Gram matrix is in `shared.sums`.
template <int N>
GP_DEVICE void decide_row(const Job& job, const Shared& shared, double* weights, double* stats, double* squared,
                          bool* finite) {
  const Decision decision = decide(shared.sums, N, job.gate);
  weights_of(decision, job.gate, N, weights);
  *squared = squared_norm(shared.sums, weights, N);
  *finite = all_finite(shared.sums, N);
  if (stats != nullptr) write_stats_row(decision, N - 1, stats);
}

GP_DEVICE void finish_decision(const Job& job, Shared& shared, double squared, bool finite) {
  const double norm = std::sqrt(squared);
  shared.clip = clip_coefficient(norm, job.gate.max_grad_norm);
  shared.finite = finite;
  if (blockIdx.x == 0) {
    job.stats[0] = finite ? 0.0 : 1.0;
    job.stats[1] = norm;
    job.stats[2] = shared.clip;
    if (!finite && job.skipped_steps != nullptr) *job.skipped_steps += 1.0;
  }
}

// Whole rows, dealt out over the blocks: for the caller, or to be decided on.
template <int N>
GP_DEVICE void work_on_rows(const Job& job, Shared& shared) {
  constexpr int kSize = gram_size(N);
  for (int row = blockIdx.x; row < job.rows; row += gridDim.x) {
    row_gram<N>(job, row, shared);
    if (job.gram != nullptr) {
      if (threadIdx.x < kSize) job.gram[static_cast<int64_t>(row) * kSize + threadIdx.x] = shared.sums[threadIdx.x];
    } else if (threadIdx.x == 0) {
      double squared;
      bool finite;
      decide_row<N>(job, shared, job.weights + static_cast<int64_t>(row) * N,
                    job.stats + kStatsHeader + static_cast<int64_t>(row) * stats_row_size(N - 1), &squared, &finite);
      job.outcomes[2 * row] = squared;
      job.outcomes[2 * row + 1] = finite ? 0.0 : 1.0;
    }
    __syncthreads();  // shared.sums is free again
  }
}

// The weights of every row, clipping left to shared.clip; shared.finite says whether to update at all.
template <int N>
GP_DEVICE const double* conclude(const Job& job, Shared& shared) {
  const double* weights = shared.weights;
  if (job.given_weights != nullptr) {
    weights = job.given_weights;
    if (threadIdx.x == 0) {
      shared.clip = 1.0;
      shared.finite = *job.skip == 0.0;
    }
  } else if (job.rows == 1) {
    row_gram<N>(job, 0, shared);
    if (threadIdx.x == 0) {
      double squared;
      bool finite;
      decide_row<N>(job, shared, shared.weights, blockIdx.x == 0 ? job.stats + kStatsHeader : nullptr, &squared,
                    &finite);
      finish_decision(job, shared, squared, finite);
    }
  } else {
    weights = job.weights;
    double values[2] = {};
    for (int row = threadIdx.x; row < job.rows; row += kThreads) {
      values[0] += job.outcomes[2 * row];
      values[1] += job.outcomes[2 * row + 1];
    }
    block_sum(values, shared.scratch, shared.sums);
    if (threadIdx.x == 0) finish_decision(job, shared, shared.sums[0], shared.sums[1] == 0.0);
  }
  __syncthreads();
  return weights;
}

// ---------------------------------------------------------------------------------------------------------------------
// Update

template <Rule R, class T>
using RuleOf = std::conditional_t<R == Rule::kSgd, Sgd<T>, Adam<T>>;
template <Rule R>
using PreparedOf = Prepared<RuleOf<R, float>, RuleOf<R, double>>;
template <Rule R>
constexpr int kStatesOf = R == Rule::kSgd ? 1 : 3;

template <Rule R>
GP_DEVICE PreparedOf<R>* prepared(const Job& job) {
  return static_cast<PreparedOf<R>*>(job.prepared);
}

GP_DEVICE const Hyper& hyper_of(const Job& job, const Item& item) {
  return item.group < kInlineGroups ? job.groups[item.group] : job.further_groups[item.group - kInlineGroups];
}

// Reads the step counters. Everybody else reads what this leaves, so a counter can be raised by its owner at any time
// after the barrier.
template <Rule R>
GP_DEVICE void prepare_rules(const Job& job, const Walk& walk) {
  for (int s = threadIdx.x; s < walk.count(); s += kThreads) {
    if (!walk.owns(s)) continue;
    const Item& item = job.items[walk.item(s)];
    const Hyper& hyper = hyper_of(job, item);
    const double steps = item.step != nullptr ? static_cast<double>(*item.step) : 0.0;
    PreparedOf<R>& out = prepared<R>(job)[walk.item(s)];
    if (item.wide) {
      out.wide = RuleOf<R, double>::prepare(hyper, steps);
    } else {
      out.single = RuleOf<R, float>::prepare(hyper, steps);
    }
  }
}

GP_DEVICE void count_steps(const Job& job, const Walk& walk) {
  for (int s = threadIdx.x; s < walk.count(); s += kThreads) {
    float* const step = job.items[walk.item(s)].step;
    if (walk.owns(s) && step != nullptr) *step += 1.0f;
  }
}

template <Rule R, class T>
GP_DEVICE void apply(const RuleOf<R, T>& rule, int num_states, T gradient, T& param, T (&states)[kStatesOf<R>]) {
  if constexpr (R == Rule::kSgd) {
    if (num_states == 0) {
      rule.apply(gradient, param);
    } else {
      rule.apply(gradient, param, states[0]);
    }
  } else {
    if (num_states == 2) {
      rule.apply(gradient, param, states[0], states[1]);
    } else {
      rule.apply(gradient, param, states[0], states[1], states[2]);
    }
  }
}

// A weight of 0 deselects its gradient: it is neither read nor multiplied.
template <class T, int N>
struct Weights {
  T of[N];

  GP_DEVICE Weights(const double* weights, double clip, bool maximize) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const double w = weights[k] * clip;
      of[k] = static_cast<T>(maximize ? -w : w);
    }
  }
};

template <Rule R, int N>
GP_DEVICE void update_vectors(const Item& item, const RuleOf<R, float>& rule, const Weights<float, N>& weights,
                              int64_t begin, int64_t end, int thread, const OnChip::Span& span, const char* chip) {
  constexpr int kStates = kStatesOf<R>;
  const bool octets = item.access == Access::kOctets;
  if (begin == end) return;
#pragma unroll 1
  for (int64_t tile = begin + (end - begin - 1) / kTile * kTile; tile >= begin; tile -= kTile) {
    const Place place(tile, thread, end, octets);
    if (!place.has[0]) continue;
    Pack param = load_pack(item.param, item.param_dtype, place);
    Pack states[kStates] = {};
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      if (s < item.num_states) states[s] = load_pack(item.states[s], item.state_dtypes[s], place);
    }
    float combined[8] = {};
    const char* gradient = chip + span.offset;
#pragma unroll
    for (int first = 0; first < N; first += 2) {  // two at a time: more would not fit into the registers
      Pack grads[2] = {};
#pragma unroll
      for (int k = first; k < N && k < first + 2; ++k) {
        if (item.grads[k] == nullptr) continue;
        if (weights.of[k] != 0.0f) {
          grads[k - first] = load_kept(item.grads[k], item.grad_dtypes[k], place, gradient, begin, span.kept);
        }
        gradient += span.kept * (is_half(item.grad_dtypes[k]) ? 2 : 4);
      }
#pragma unroll
      for (int k = first; k < N && k < first + 2; ++k) {
        if (item.grads[k] == nullptr || weights.of[k] == 0.0f) continue;
        grads[k - first].widen_all(item.grad_dtypes[k]);
#pragma unroll
        for (int j = 0; j < 8; ++j) combined[j] += weights.of[k] * grads[k - first].value(j);
      }
    }
    param.widen_all(item.param_dtype);
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      if (s < item.num_states) states[s].widen_all(item.state_dtypes[s]);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float x = param.value(j);
      float y[kStates];
#pragma unroll
      for (int s = 0; s < kStates; ++s) y[s] = states[s].value(j);
      apply<R, float>(rule, item.num_states, combined[j], x, y);
      param.set(j, x);
#pragma unroll
      for (int s = 0; s < kStates; ++s) states[s].set(j, y[s]);
    }
    store_pack(param, item.param, item.param_dtype, place);
    if (item.rounded != nullptr) store_pack(param, item.rounded, item.rounded_dtype, place);
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      if (s < item.num_states) store_pack(states[s], item.states[s], item.state_dtypes[s], place);
    }
  }
}

template <Rule R, int N, class T>
GP_DEVICE void update_elements(const Job& job, const Item& item, const RuleOf<R, T>& rule, const Weights<T, N>& weights,
                               int64_t begin, int64_t end, int thread) {
  constexpr int kStates = kStatesOf<R>;
#pragma unroll 1
  for (int64_t i = begin + thread; i < end; i += kThreads) {
    T combined = T(0);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (item.grads[k] == nullptr || weights.of[k] == T(0)) continue;
      combined += weights.of[k] *
                  load_element<T>(item.grads[k], item.grad_dtypes[k], offset_of(job, item, kGradOperand + k, i));
    }
    const int64_t at = offset_of(job, item, kParamOperand, i);
    T x = load_element<T>(item.param, item.param_dtype, at);
    T y[kStates] = {};
    int64_t state_at[kStates] = {};
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      if (s >= item.num_states) continue;
      state_at[s] = offset_of(job, item, kStateOperand + s, i);
      y[s] = load_element<T>(item.states[s], item.state_dtypes[s], state_at[s]);
    }
    apply<R, T>(rule, item.num_states, combined, x, y);
    store_element(x, item.param, item.param_dtype, at);
    if (item.rounded != nullptr) {
      store_element(x, item.rounded, item.rounded_dtype, offset_of(job, item, kRoundedOperand, i));
    }
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      if (s < item.num_states) store_element(y[s], item.states[s], item.state_dtypes[s], state_at[s]);
    }
  }
}

template <Rule R, int N>
GP_DEVICE void update(const Job& job, const Walk& walk, OnChip& on_chip, const char* chip, const double* weights,
                      double clip) {
  Rotation rotation;
  for (int s = walk.count(); s-- > 0;) {
    const Item& item = job.items[walk.item(s)];
    const double* const row = weights + static_cast<int64_t>(item.row) * N;
    const bool maximize = hyper_of(job, item).maximize;
    const int64_t begin = walk.begin(s);
    const int64_t end = walk.end(s, item);
    const int64_t body = vector_part(end - begin, item.access);
    const int thread = rotation.next(end - begin, item.access);
    const OnChip::Span span = on_chip.pop(s, body, item.gradient_bytes);
    if (item.wide) {
      const Weights<double, N> w(row, clip, maximize);
      const RuleOf<R, double> rule = prepared<R>(job)[walk.item(s)].wide;
      update_elements<R, N, double>(job, item, rule, w, begin, end, thread);
    } else {
      const Weights<float, N> w(row, clip, maximize);
      const RuleOf<R, float> rule = prepared<R>(job)[walk.item(s)].single;
      update_elements<R, N, float>(job, item, rule, w, begin + body, end, thread);
      update_vectors<R, N>(item, rule, w, begin, begin + body, thread, span, chip);
    }
  }
  count_steps(job, walk);
}

// ---------------------------------------------------------------------------------------------------------------------
// The kernel

template <Rule R, int N>
__global__ void __launch_bounds__(kThreads, 1) step_kernel(const __grid_constant__ Job job) {
  GP_DYNAMIC_SHARED(dynamic);
  __shared__ Shared shared;
  char* const chip = reinterpret_cast<char*>(dynamic);
  const Walk walk(job);
  OnChip on_chip(job.on_chip_bytes);

  if ((job.stages & kMeasure) != 0) {
    if (job.gram == nullptr) prepare_rules<R>(job, walk);
    if (job.given_weights == nullptr) measure<N>(job, walk, on_chip, chip, shared);
    if ((job.stages & (kRows | kUpdate)) != 0) cooperative_groups::this_grid().sync();
  }
  if ((job.stages & kRows) != 0) {
    work_on_rows<N>(job, shared);
    if ((job.stages & kUpdate) != 0) cooperative_groups::this_grid().sync();
  }
  if ((job.stages & kUpdate) != 0) {
    const double* const weights = conclude<N>(job, shared);
    if (shared.finite) update<R, N>(job, walk, on_chip, chip, weights, shared.clip);
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
