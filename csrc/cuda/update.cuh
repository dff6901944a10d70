// Phase 2: the update of a block's share, walked backwards.
#pragma once

#include "cuda/pack.cuh"

namespace gradprom::cuda {
namespace {

template <Rule R>
constexpr int kStatesOf = RuleOf<R, float>::kStates;

template <Rule R>
GP_DEVICE PreparedOf<R>* prepared(const Job& job) {
  return static_cast<PreparedOf<R>*>(job.prepared);
}

GP_DEVICE const Hyper& hyper_of(const Job& job, const Item& item) {
  return item.group < kInlineGroups ? job.groups[item.group] : job.further_groups[item.group - kInlineGroups];
}

// Reads the step counters. All other code reads what this leaves, so a counter can be raised by its owner at any time
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
    Pack rounded{};
    if (item.rounded != nullptr) rounded = load_pack(item.rounded, item.rounded_dtype, place);
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
    if (item.rounded != nullptr) param.follow_all(rounded, item.rounded_dtype);
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
      rule.apply(item.num_states, combined[j], x, y);
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
    const int64_t rounded_at = item.rounded != nullptr ? offset_of(job, item, kRoundedOperand, i) : 0;
    if (item.rounded != nullptr) x = follow_element(x, item.rounded, item.rounded_dtype, rounded_at);
    T y[kStates] = {};
    int64_t state_at[kStates] = {};
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      if (s >= item.num_states) continue;
      state_at[s] = offset_of(job, item, kStateOperand + s, i);
      y[s] = load_element<T>(item.states[s], item.state_dtypes[s], state_at[s]);
    }
    rule.apply(item.num_states, combined, x, y);
    store_element(x, item.param, item.param_dtype, at);
    if (item.rounded != nullptr) store_element(x, item.rounded, item.rounded_dtype, rounded_at);
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

}  // namespace
}  // namespace gradprom::cuda
