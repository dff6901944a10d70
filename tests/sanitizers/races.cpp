// Steps of the CPU kernels with several threads, for ThreadSanitizer: no Python and no PyTorch, neither of which was
// built for it. Built and run by .ci/sanitize.
//
// Every gradient and parameter goes through the kernels that the type and the layout choose: flat, strided, 16-bit,
// masters, fp64. Two plans are stepped by two threads at once, as two optimizers may be. A step with four threads must
// leave the bits of a step with one.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/step.h"

using namespace gradprom;

namespace {

constexpr int64_t kNumel = 50'000;  // four chunks each
const int64_t kSizes[] = {kNumel};
const int64_t kStrides[] = {3};
const DType kTypes[] = {DType::kF32, DType::kF32, DType::kF64, DType::kF16, DType::kBF16};

struct Model {
  StepPlan plan;
  std::vector<std::vector<unsigned char>> memory;
  std::vector<float> steps;

  Operand tensor(DType dtype, bool strided, unsigned seed) {
    const int64_t bytes = size_of(dtype);
    memory.emplace_back(static_cast<size_t>(kNumel * (strided ? 3 : 1) * bytes));
    unsigned char* const data = memory.back().data();
    for (int64_t i = 0; i < kNumel; ++i) {
      seed = seed * 1664525u + 1013904223u;
      const float x = static_cast<float>(seed >> 8) / 16777216.0f - 0.4f;
      dispatch(dtype, [&](auto sample) {
        using Storage = decltype(sample);
        const auto value = narrow<Storage>(x);
        std::memcpy(data + i * (strided ? 3 : 1) * bytes, &value, sizeof value);
      });
    }
    return {data, dtype, strided ? kStrides : nullptr};
  }

  Model(Rule rule, bool per_tensor) {
    plan.rule = rule;
    plan.num_grads = 2;
    plan.per_tensor = per_tensor;
    plan.master_weights = true;
    plan.groups.resize(2);
    plan.groups[1].lr.value = 0.01;
    plan.groups[1].momentum = 0.9;
    plan.groups[1].amsgrad = true;
    plan.groups[0].lr.value = 0.1;
    plan.gate.max_grad_norm = 1.0;
    plan.gate.aux_weight[0].value = 0.5;
    plan.entries.resize(10);
    steps.resize(plan.entries.size());
    for (size_t e = 0; e < plan.entries.size(); ++e) {
      Entry& entry = plan.entries[e];
      const DType dtype = kTypes[e % 5];
      const bool strided = e % 3 == 1;
      const auto seed = static_cast<unsigned>(7 * e);
      entry.numel = kNumel;
      entry.ndim = 1;
      entry.sizes = kSizes;
      entry.group = static_cast<int32_t>(e % 2);
      entry.param = tensor(dtype, strided, seed);
      if (plan.has_master(entry)) entry.master = tensor(DType::kF32, false, seed);
      entry.grads[0] = tensor(kTypes[(e + 1) % 5], false, seed + 1);
      if (e != 4) entry.grads[1] = tensor(kTypes[(e + 2) % 5], strided, seed + 2);
      const int states = plan.num_states(plan.groups[entry.group]);
      for (int s = 0; s < states; ++s) entry.states[s] = tensor(DType::kF32, s == 1, seed + 3);
      if (states > 0) entry.step = &steps[e];
      // Second moments are squares.
      if (rule == Rule::kAdam) {
        for (int s = 1; s < states; ++s) std::memset(entry.states[s].data, 0, memory.back().size());
      }
    }
  }

  void train() {
    const auto scheduler = cpu::make_scheduler();
    const int rows = plan.rows();
    std::vector<double> stats(kStatsHeader + static_cast<size_t>(rows) * stats_row_size(1));
    std::vector<double> gram(static_cast<size_t>(rows) * gram_size(2));
    std::vector<double> weights(static_cast<size_t>(rows) * 2, 0.25);
    double skipped = 0.0;
    scheduler->step(plan, stats.data(), &skipped, nullptr);
    scheduler->gram(plan, gram.data(), nullptr);
    const double skip = 0.0;
    scheduler->update(plan, weights.data(), &skip, nullptr);
    if (skipped != 0.0) {
      std::puts("a step was skipped");
      std::exit(1);
    }
  }
};

}  // namespace

int main() {
  for (const Rule rule : {Rule::kSgd, Rule::kAdam}) {
    for (const bool per_tensor : {false, true}) {
      setenv("OMP_NUM_THREADS", "1", 1);
      Model alone(rule, per_tensor);
      alone.train();
      setenv("OMP_NUM_THREADS", "4", 1);
      Model first(rule, per_tensor);
      Model second(rule, per_tensor);
      std::thread other([&] { second.train(); });
      first.train();
      other.join();
      if (first.memory != alone.memory || second.memory != alone.memory || first.steps != alone.steps) {
        std::puts("four threads leave other bits than one");
        return 1;
      }
    }
  }
  std::puts("no race was reported, and four threads leave the bits of one");
  return 0;
}
