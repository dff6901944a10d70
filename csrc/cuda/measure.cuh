// Phase 1: partial Gram matrices of a block's share.
#pragma once

#include "cuda/pack.cuh"

namespace gradprom::cuda {
namespace {

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
GP_DEVICE void measure(const Job& job, const Walk& walk, OnChip& on_chip, char* chip, double* scratch) {
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
      block_sum(sums, scratch, job.partials + slot++ * kSize);
#pragma unroll
      for (int e = 0; e < kSize; ++e) sums[e] = 0.0;
    }
  }
  if (job.rows == 1) block_sum(sums, scratch, job.partials + slot * kSize);
}

}  // namespace
}  // namespace gradprom::cuda
