// Between the phases: from partial Gram matrices to weights, statistics and the decision to update.
#pragma once

#include "cuda/reduce.cuh"

namespace gradprom::cuda {
namespace {

struct Shared {
  double scratch[kWarps * kMaxGram];
  double sums[kMaxGram];
  double weights[kMaxGrads];
  Outcome outcome;
};

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

// Where the statistics go: the first block writes them, all others come to the same decision silently.
GP_DEVICE double* stats_of_first_block(const Job& job) { return blockIdx.x == 0 ? job.stats : nullptr; }

// Whole rows, dealt out over the blocks: for the caller, or to be decided on.
template <int N>
GP_DEVICE void work_on_rows(const Job& job, Shared& shared) {
  constexpr int kSize = gram_size(N);
  for (int row = blockIdx.x; row < job.rows; row += gridDim.x) {
    row_gram<N>(job, row, shared);
    if (job.gram != nullptr) {
      if (threadIdx.x < kSize) job.gram[static_cast<int64_t>(row) * kSize + threadIdx.x] = shared.sums[threadIdx.x];
    } else if (threadIdx.x == 0) {
      job.outcomes[row] = decide_row(shared.sums, N, job.gate, job.weights + static_cast<int64_t>(row) * N,
                                     job.stats + kStatsHeader + static_cast<int64_t>(row) * stats_row_size(N - 1));
    }
    __syncthreads();  // shared.sums is free again
  }
}

// The weights of every row, clipping left to shared.outcome, which also says whether to update at all.
template <int N>
GP_DEVICE const double* conclude_step(const Job& job, Shared& shared) {
  const double* weights = shared.weights;
  if (job.given_weights != nullptr) {
    weights = job.given_weights;
    if (threadIdx.x == 0) shared.outcome = Outcome{1.0, *job.skip == 0.0};
  } else if (job.rows == 1) {
    row_gram<N>(job, 0, shared);
    if (threadIdx.x == 0) {
      double* const stats = stats_of_first_block(job);
      const RowOutcome row =
          decide_row(shared.sums, N, job.gate, shared.weights, stats != nullptr ? stats + kStatsHeader : nullptr);
      shared.outcome = conclude(row, job.gate, stats, job.skipped_steps);
    }
  } else {
    weights = job.weights;
    double values[2] = {};
    for (int row = threadIdx.x; row < job.rows; row += kThreads) {
      values[0] += job.outcomes[row].squared_norm;
      values[1] += job.outcomes[row].bad;
    }
    block_sum(values, shared.scratch, shared.sums);
    if (threadIdx.x == 0) {
      shared.outcome =
          conclude(RowOutcome{shared.sums[0], shared.sums[1]}, job.gate, stats_of_first_block(job), job.skipped_steps);
    }
  }
  __syncthreads();
  return weights;
}

}  // namespace
}  // namespace gradprom::cuda
