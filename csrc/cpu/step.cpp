// Memory traffic, fp32 with one auxiliary: phase 1 reads both gradients (8 B/parameter); phase 2 reads them again and
// reads and writes the parameter (16 B, SGD) and both moments (32 B, Adam): 24 and 40 B/parameter. What phase 1 has
// left in the cache is not read again: phase 2 walks backwards, on the same thread, over what that thread read last.
#include "cpu/step.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/blocks.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace gradprom::cpu {
namespace {

// The unit of scheduling and of the reduction. Partial sums are kept per chunk and added in chunk order, so a result
// depends neither on the number of threads nor on their timing. 16,384 elements of two fp32 gradients fill an eighth
// of a 1 MiB second-level cache.
constexpr int64_t kChunk = 16384;

// What is not flat memory of the arithmetic type passes through buffers of this many elements, small enough for a
// first-level cache: no temporary grows with the model.
constexpr int64_t kStaging = 1024;

// Below this many elements per thread, waking another thread costs more than it saves (a few microseconds).
constexpr int64_t kElementsPerThread = 32768;

struct Chunk {
  int32_t entry;
  int64_t begin;
  int64_t size;
};

struct Range {
  size_t begin, end;
};

struct Schedule {
  std::vector<Chunk> chunks;
  std::vector<size_t> bounds;  // chunk range of thread t: [bounds[t], bounds[t + 1])

  explicit Schedule(const StepPlan& plan) {
    int64_t total = 0;
    for (size_t e = 0; e < plan.entries.size(); ++e) {
      const Entry& entry = plan.entries[e];
      if (!entry.active(plan.num_grads)) continue;
      for (int64_t begin = 0; begin < entry.numel; begin += kChunk) {
        chunks.push_back({static_cast<int32_t>(e), begin, std::min(kChunk, entry.numel - begin)});
      }
      total += entry.numel;
    }
    int threads = 1;
#if defined(_OPENMP)
    threads = omp_get_max_threads();  // torch.set_num_threads sets it: both use one OpenMP runtime
#endif
    threads = static_cast<int>(std::clamp<int64_t>(total / kElementsPerThread, 1, threads));
    bounds.push_back(0);
    int64_t seen = 0;
    for (size_t c = 0; c < chunks.size(); ++c) {
      seen += chunks[c].size;
      if (seen * threads >= total * static_cast<int64_t>(bounds.size()) && static_cast<int>(bounds.size()) < threads) {
        bounds.push_back(c + 1);
      }
    }
    while (static_cast<int>(bounds.size()) <= threads) bounds.push_back(chunks.size());
  }

  int threads() const { return static_cast<int>(bounds.size()) - 1; }
  Range range(int thread) const { return {bounds[thread], bounds[thread + 1]}; }
};

// Calls body(range) for this thread's share of the schedule. The runtime may grant fewer threads than asked for (inside
// another parallel region, say); then one thread takes several shares.
template <class Body>
void for_my_ranges(const Schedule& schedule, Body&& body) {
  int first = 0;
  int granted = 1;
#if defined(_OPENMP)
  first = omp_get_thread_num();
  granted = omp_get_num_threads();
#endif
  for (int t = first; t < schedule.threads(); t += granted) body(schedule.range(t));
}

template <class T>
constexpr DType kNative = std::is_same_v<T, double> ? DType::kF64 : DType::kF32;

template <class T>
bool is_direct(const Operand& operand) {
  return operand.strides == nullptr && operand.dtype == kNative<T>;
}

// Calls body(pointer, stride, count) for the pieces of [begin, begin + n) that lie evenly spaced in the operand.
template <class Body>
void for_each_piece(const Entry& entry, const Operand& operand, int64_t begin, int64_t n, Body&& body) {
  const int64_t bytes = size_of(operand.dtype);
  char* const data = static_cast<char*>(operand.data);
  if (operand.strides == nullptr) {
    body(data + begin * bytes, int64_t{1}, n);
    return;
  }
  const int inner = entry.ndim - 1;
  for (int64_t done = 0; done < n;) {
    int64_t rest = begin + done;
    int64_t column = rest % entry.sizes[inner];
    const int64_t count = std::min(n - done, entry.sizes[inner] - column);
    int64_t offset = column * operand.strides[inner];
    rest /= entry.sizes[inner];
    for (int d = inner - 1; d >= 0; --d) {
      offset += (rest % entry.sizes[d]) * operand.strides[d];
      rest /= entry.sizes[d];
    }
    body(data + offset * bytes, operand.strides[inner], count);
    done += count;
  }
}

template <class T>
T* stage(const Blocks<T>& b, const Entry& entry, const Operand& operand, int64_t begin, int64_t n, T* buffer) {
  if (is_direct<T>(operand)) return static_cast<T*>(operand.data) + begin;
  T* out = buffer;
  for_each_piece(entry, operand, begin, n, [&](const void* src, int64_t stride, int64_t count) {
    b.load[static_cast<int>(operand.dtype)](src, stride, count, out);
    out += count;
  });
  return buffer;
}

template <class T>
void unstage(const Blocks<T>& b, const Entry& entry, const Operand& operand, int64_t begin, int64_t n,
             const T* buffer) {
  if (is_direct<T>(operand)) return;
  for_each_piece(entry, operand, begin, n, [&](void* dst, int64_t stride, int64_t count) {
    b.store[static_cast<int>(operand.dtype)](buffer, count, dst, stride);
    buffer += count;
  });
}

template <class T>
void follow(const Blocks<T>& b, const Entry& entry, int64_t begin, int64_t n, T* masters) {
  for_each_piece(entry, entry.param, begin, n, [&](const void* src, int64_t stride, int64_t count) {
    b.follow[static_cast<int>(entry.param.dtype)](src, stride, count, masters);
    masters += count;
  });
}

template <class T>
void gram_chunk(const Entry& entry, const Chunk& chunk, int num_grads, double* out) {
  const Blocks<T>& b = blocks<T>();
  int present[kMaxGrads];
  int m = 0;
  bool direct = true;
  for (int k = 0; k < num_grads; ++k) {
    if (entry.grads[k].data == nullptr) continue;  // zero: its row of the matrix stays zero
    direct = direct && is_direct<T>(entry.grads[k]);
    present[m++] = k;
  }
  T buffers[kMaxGrads][kStaging];
  double partial[kMaxGram] = {};
  const int64_t run = direct ? chunk.size : kStaging;
  for (int64_t done = 0; done < chunk.size; done += run) {
    const int64_t n = std::min(run, chunk.size - done);
    const T* g[kMaxGrads];
    for (int a = 0; a < m; ++a) {
      g[a] = stage<T>(b, entry, entry.grads[present[a]], chunk.begin + done, n, buffers[a]);
    }
    b.gram[m - 1](g, n, partial);
  }
  for (int i = 0, e = 0; i < m; ++i) {
    for (int j = i; j < m; ++j, ++e) out[gram_index(num_grads, present[i], present[j])] = partial[e];
  }
}

// A rule with its coefficients. Most tensors of a model are of one group and have had as many updates as the last one.
template <class R>
struct Prepared {
  R rule{};
  const Hyper* hyper = nullptr;
  double steps_before = 0.0;

  const R& get(const Hyper& wanted, double steps) {
    if (hyper != &wanted || steps_before != steps) {
      rule = R::prepare(wanted, steps);
      hyper = &wanted;
      steps_before = steps;
    }
    return rule;
  }
};

template <class T>
struct PreparedRules {
#define GP_FIELD(enumerator, name, type) Prepared<type<T>> enumerator;
  GP_RULES(GP_FIELD)
#undef GP_FIELD
};

template <class T>
void update_chunk(const StepPlan& plan, const Entry& entry, const Chunk& chunk, const double* weights,
                  PreparedRules<T>& prepared) {
  const Blocks<T>& b = blocks<T>();
  const Hyper& hyper = plan.groups[entry.group];
  const int num_states = plan.num_states(hyper);
  const double steps_before = entry.step != nullptr ? static_cast<double>(*entry.step) : 0.0;

  UpdateRun<T> run{};
  switch (plan.rule) {
#define GP_CASE(enumerator, name, type)                       \
  case Rule::enumerator:                                      \
    run.rule = &prepared.enumerator.get(hyper, steps_before); \
    break;
    GP_RULES(GP_CASE)
#undef GP_CASE
  }

  const Operand* open[kMaxGrads];
  int m = 0;
  const Operand& updated = entry.updated();
  const bool mastered = entry.master.data != nullptr;
  bool direct = is_direct<T>(updated) && !mastered;
  for (int k = 0; k < plan.num_grads; ++k) {
    // A closed gate selects: the gradient behind it is not even read.
    if (entry.grads[k].data == nullptr || weights[k] == 0.0) continue;
    direct = direct && is_direct<T>(entry.grads[k]);
    run.weights[m] = static_cast<T>(hyper.maximize ? -weights[k] : weights[k]);
    open[m++] = &entry.grads[k];
  }
  for (int s = 0; s < num_states; ++s) direct = direct && is_direct<T>(entry.states[s]);

  T buffers[1 + kMaxStates + kMaxGrads][kStaging];
  const int64_t step = direct ? chunk.size : kStaging;
  for (int64_t done = 0; done < chunk.size; done += step) {
    const int64_t begin = chunk.begin + done;
    const int64_t n = std::min(step, chunk.size - done);
    run.param = stage<T>(b, entry, updated, begin, n, buffers[0]);
    if (mastered) follow<T>(b, entry, begin, n, run.param);
    for (int s = 0; s < num_states; ++s) run.states[s] = stage<T>(b, entry, entry.states[s], begin, n, buffers[1 + s]);
    for (int a = 0; a < m; ++a) run.grads[a] = stage<T>(b, entry, *open[a], begin, n, buffers[1 + kMaxStates + a]);
    b.update[static_cast<int>(plan.rule)][num_states][m](run, n);
    unstage<T>(b, entry, updated, begin, n, run.param);
    if (mastered) unstage<T>(b, entry, entry.param, begin, n, run.param);
    for (int s = 0; s < num_states; ++s) unstage<T>(b, entry, entry.states[s], begin, n, run.states[s]);
  }
}

void gram_phase(const StepPlan& plan, const Schedule& schedule, Range range, double* partials) {
  const int size = gram_size(plan.num_grads);
  for (size_t c = range.begin; c < range.end; ++c) {
    const Chunk& chunk = schedule.chunks[c];
    const Entry& entry = plan.entries[chunk.entry];
    if (entry.needs_fp64()) {
      gram_chunk<double>(entry, chunk, plan.num_grads, partials + c * size);
    } else {
      gram_chunk<float>(entry, chunk, plan.num_grads, partials + c * size);
    }
  }
}

void update_phase(const StepPlan& plan, const Schedule& schedule, Range range, const double* weights) {
  PreparedRules<double> wide;
  PreparedRules<float> single;
  for (size_t c = range.end; c-- > range.begin;) {
    const Chunk& chunk = schedule.chunks[c];
    const Entry& entry = plan.entries[chunk.entry];
    const double* row = weights + plan.row_of(chunk.entry) * plan.num_grads;
    if (entry.needs_fp64()) {
      update_chunk<double>(plan, entry, chunk, row, wide);
    } else {
      update_chunk<float>(plan, entry, chunk, row, single);
    }
  }
}

void reduce(const StepPlan& plan, const Schedule& schedule, const std::vector<double>& partials, double* gram) {
  const int size = gram_size(plan.num_grads);
  std::fill_n(gram, plan.rows() * size, 0.0);
  for (size_t c = 0; c < schedule.chunks.size(); ++c) {
    double* row = gram + plan.row_of(schedule.chunks[c].entry) * size;
    for (int e = 0; e < size; ++e) row[e] += partials[c * size + e];
  }
}

// From the Gram matrices to the weights, clipping included, and the statistics. Returns whether every gradient was
// finite.
bool decide_rows(const StepPlan& plan, const double* gram, double* weights, double* stats, double* skipped_steps) {
  const int n = plan.num_grads;
  RowOutcome sum{0.0, 0.0};
  for (int r = 0; r < plan.rows(); ++r) {
    const RowOutcome row = decide_row(gram + r * gram_size(n), n, plan.gate, weights + r * n,
                                      stats + kStatsHeader + r * stats_row_size(n - 1));
    sum.squared_norm += row.squared_norm;
    sum.bad += row.bad;
  }
  const Outcome outcome = conclude(sum, plan.gate, stats, skipped_steps);
  for (int i = 0; i < plan.rows() * n; ++i) weights[i] *= outcome.clip;
  return outcome.finite;
}

void count_step(const StepPlan& plan) {
  for (const Entry& entry : plan.entries) {
    const bool counted = entry.step != nullptr && plan.num_states(plan.groups[entry.group]) > 0;
    if (counted && entry.active(plan.num_grads)) *entry.step += 1.0f;
  }
}

class CpuScheduler final : public Scheduler {
 public:
  // The whole step is one parallel region.
  void step(const StepPlan& plan, double* stats, double* skipped_steps, void*) override {
    const Schedule schedule(plan);
    const int size = gram_size(plan.num_grads);
    std::vector<double> partials(schedule.chunks.size() * size, 0.0);
    std::vector<double> gram(static_cast<size_t>(plan.rows()) * size);
    std::vector<double> weights(static_cast<size_t>(plan.rows()) * plan.num_grads);
    bool finite = true;
#pragma omp parallel num_threads(schedule.threads())
    {
      for_my_ranges(schedule, [&](Range range) { gram_phase(plan, schedule, range, partials.data()); });
#pragma omp barrier
#pragma omp single
      {
        reduce(plan, schedule, partials, gram.data());
        finite = decide_rows(plan, gram.data(), weights.data(), stats, skipped_steps);
      }
      if (finite) for_my_ranges(schedule, [&](Range range) { update_phase(plan, schedule, range, weights.data()); });
    }
    if (finite) count_step(plan);
  }

  bool measure(const StepPlan& plan, double* stats) override {
    std::vector<double> gram_matrices(static_cast<size_t>(plan.rows()) * gram_size(plan.num_grads));
    std::vector<double> weights(static_cast<size_t>(plan.rows()) * plan.num_grads);
    gram(plan, gram_matrices.data(), nullptr);
    decide_rows(plan, gram_matrices.data(), weights.data(), stats, nullptr);
    return true;
  }

  void gram(const StepPlan& plan, double* out, void*) override {
    const Schedule schedule(plan);
    std::vector<double> partials(schedule.chunks.size() * gram_size(plan.num_grads), 0.0);
#pragma omp parallel num_threads(schedule.threads())
    for_my_ranges(schedule, [&](Range range) { gram_phase(plan, schedule, range, partials.data()); });
    reduce(plan, schedule, partials, out);
  }

  void update(const StepPlan& plan, const double* weights, const double* skip, void*) override {
    if (*skip != 0.0) return;
    const Schedule schedule(plan);
#pragma omp parallel num_threads(schedule.threads())
    for_my_ranges(schedule, [&](Range range) { update_phase(plan, schedule, range, weights); });
    count_step(plan);
  }
};

}  // namespace

std::unique_ptr<Scheduler> make_scheduler() { return std::make_unique<CpuScheduler>(); }

}  // namespace gradprom::cpu
