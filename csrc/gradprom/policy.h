// Gate policies: from the Gram matrix to the weights of the combined gradient
//
//     c = main_weight * g_0 + sum_k gate_k * lambda_k * g_k,
//
// where lambda_k is the capped one if there is a cap. The same few lines run on the CPU, in every CUDA block and, as
// their definition in PyTorch, in gradprom_ext/policy.py. A new gate is one line and one case here, one case in
// gradprom_ext/triton_kernels.py and one class there.
#pragma once

#include <cmath>

#include "gradprom/gram.h"
#include "gradprom/scalar.h"

namespace gradprom {

// The one list of gates; the binding's enum is made from it, and tests compare it with the classes and with Triton's.
#define GP_GATES(X)                                                                       \
  X(kHard, "hard")       /* GradProm (arXiv:2501.01114): 1 if cos >= threshold, else 0 */ \
  X(kSoft, "soft")       /* its Lemma 3.1: max(0, cos) if cos >= threshold, else 0 */     \
  X(kAlways, "always")   /* joint training: the plain sum */                              \
  X(kNever, "never")     /* the main gradient alone */                                    \
  X(kProject, "project") /* PCGrad (arXiv:2001.06782), one-sided: the part of g_k against g_0 is removed */

enum class Gate : int32_t {
#define GP_ENUMERATOR(name, text) name,
  GP_GATES(GP_ENUMERATOR)
#undef GP_ENUMERATOR
};
#define GP_ONE(name, text) +1
inline constexpr int kGates = GP_GATES(GP_ONE);
#undef GP_ONE

struct GateConfig {
  Gate gate = Gate::kHard;
  double threshold = 0.0;
  double max_grad_norm = 0.0;  // 0: no clipping
  double aux_cap = 0.0;        // kappa of cap_of; 0: no cap
  Scalar aux_weight[kMaxAux];
};

// The decision for one row: the whole model, or one tensor where granularity is "tensor".
struct Decision {
  double main_norm;
  double main_weight;
  double cosine[kMaxAux];
  double gate[kMaxAux];
  double aux_norm[kMaxAux];
  double cap[kMaxAux];
  double aux_weight[kMaxAux];  // the lambdas after the cap
};

// No epsilon anywhere: cos(a*x, b*y) == cos(x, y) for every a, b > 0; 0 where a gradient is zero.
GP_HD double cosine_of(double dot, double norm_a, double norm_b) {
  return norm_a == 0.0 || norm_b == 0.0 ? 0.0 : (dot / norm_a) / norm_b;
}

// The factor in [0, 1] that brings lambda down to |lambda * g_k| <= kappa * |g_0|. The norms are divided first, so that
// a common scale of the gradients cancels; the comparison decides where nothing is to be reduced, so that a cap that
// does not bind is exactly 1. A main gradient of zero leaves no room: the factor is 0 unless lambda or g_k is zero too.
GP_HD double cap_of(double lambda, double main_norm, double norm, double kappa) {
  if (kappa == 0.0 || norm == 0.0) return 1.0;
  const double limit = main_norm / norm * kappa;
  const double size = std::fabs(lambda);
  return size <= limit ? 1.0 : limit / size;
}

GP_HD Decision decide(const double* gram, int n, const GateConfig& config) {
  Decision d{};
  d.main_norm = std::sqrt(gram[0]);
  d.main_weight = 1.0;
  for (int k = 1; k < n; ++k) {
    const double dot = gram[gram_index(n, 0, k)];
    const double norm = std::sqrt(gram[gram_index(n, k, k)]);
    const double cosine = cosine_of(dot, d.main_norm, norm);
    const double lambda = config.aux_weight[k - 1].get();
    const double cap = cap_of(lambda, d.main_norm, norm, config.aux_cap);
    const double aux_weight = cap * lambda;
    double gate = 0.0;
    switch (config.gate) {
      case Gate::kHard:
        gate = cosine >= config.threshold ? 1.0 : 0.0;
        break;
      case Gate::kSoft:
        gate = cosine >= config.threshold && cosine > 0.0 ? cosine : 0.0;
        break;
      case Gate::kAlways:
        gate = 1.0;
        break;
      case Gate::kNever:
        break;
      case Gate::kProject:
        gate = 1.0;
        // g_k - (<g_0, g_k> / |g_0|^2) g_0, times lambda_k: the second term is a weight on g_0.
        if (cosine < 0.0) d.main_weight -= aux_weight * (dot / gram[0]);
        break;
    }
    d.cosine[k - 1] = cosine;
    d.gate[k - 1] = gate;
    d.aux_norm[k - 1] = norm;
    d.cap[k - 1] = cap;
    d.aux_weight[k - 1] = aux_weight;
  }
  return d;
}

// Weights of the sum, w_0 for the main gradient. A weight of exactly 0 deselects its gradient: it is not multiplied.
GP_HD void weights_of(const Decision& d, int n, double* weights) {
  weights[0] = d.main_weight;
  for (int k = 1; k < n; ++k) weights[k] = d.gate[k - 1] * d.aux_weight[k - 1];
}

// |sum_k w_k g_k|^2 = w' G w. Rounding may leave a tiny negative number where gradients cancel.
GP_HD double squared_norm(const double* gram, const double* weights, int n) {
  double sum = 0.0;
  for (int i = 0; i < n; ++i) {
    for (int j = i; j < n; ++j) {
      if (weights[i] == 0.0 || weights[j] == 0.0) continue;
      sum += (i == j ? 1.0 : 2.0) * weights[i] * weights[j] * gram[gram_index(n, i, j)];
    }
  }
  return sum > 0.0 ? sum : 0.0;
}

// torch.nn.utils.clip_grad_norm_, its 1e-6 included.
GP_HD double clip_coefficient(double norm, double max_norm) {
  if (!(max_norm > 0.0)) return 1.0;
  const double coefficient = max_norm / (norm + 1e-6);
  return coefficient < 1.0 ? coefficient : 1.0;
}

// Layout of the statistics of a step, fp64; gradprom_ext/stats.py and gradprom_ext/triton_kernels.py are asserted
// equal:
//   [skipped, norm of the combined gradient, clip coefficient]
//   then for each row [main norm, main weight, cosine x K, gate x K, auxiliary norm x K, cap x K].
inline constexpr int kStatsSkipped = 0;
inline constexpr int kStatsNorm = 1;
inline constexpr int kStatsClip = 2;
inline constexpr int kStatsHeader = 3;
GP_HD constexpr int stats_row_size(int num_aux) { return 2 + 4 * num_aux; }

GP_HD void write_stats_row(const Decision& d, int num_aux, double* row) {
  row[0] = d.main_norm;
  row[1] = d.main_weight;
  for (int k = 0; k < num_aux; ++k) {
    row[2 + k] = d.cosine[k];
    row[2 + num_aux + k] = d.gate[k];
    row[2 + 2 * num_aux + k] = d.aux_norm[k];
    row[2 + 3 * num_aux + k] = d.cap[k];
  }
}

// What one row contributes to the outcome of the step.
struct RowOutcome {
  double squared_norm;  // of its part of the combined gradient
  double bad;           // 1 where a gradient is not finite, else 0: rows are added up
};

// Decides on a row: from its Gram matrix to its weights and, unless `stats` is null, its statistics.
GP_HD RowOutcome decide_row(const double* gram, int n, const GateConfig& config, double* weights, double* stats) {
  const Decision decision = decide(gram, n, config);
  weights_of(decision, n, weights);
  if (stats != nullptr) write_stats_row(decision, n - 1, stats);
  return {squared_norm(gram, weights, n), all_finite(gram, n) ? 0.0 : 1.0};
}

// The outcome of the step, from the sum over its rows.
struct Outcome {
  double clip;  // the weights of every row are multiplied by this
  bool finite;  // else nothing is updated
};

// `stats` is null for all but one of those that conclude the same step; that one also counts a skipped step.
GP_HD Outcome conclude(const RowOutcome& sum, const GateConfig& config, double* stats, double* skipped_steps) {
  const double norm = std::sqrt(sum.squared_norm);
  const Outcome outcome{clip_coefficient(norm, config.max_grad_norm), sum.bad == 0.0};
  if (stats != nullptr) {
    stats[kStatsSkipped] = outcome.finite ? 0.0 : 1.0;
    stats[kStatsNorm] = norm;
    stats[kStatsClip] = outcome.clip;
    if (!outcome.finite && skipped_steps != nullptr) *skipped_steps += 1.0;
  }
  return outcome;
}

}  // namespace gradprom
