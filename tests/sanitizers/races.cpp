// Steps with several threads, for ThreadSanitizer: no Python and no PyTorch, neither of which was built for it. Built
// and run by .ci/sanitize.
//
// Every gradient and parameter goes through the kernels that the type and the layout choose: flat, strided, 16-bit,
// masters, fp64. Two plans are stepped by two threads at once, as two optimizers may be. A step of the CPU kernels with
// four threads must leave the bits of a step with one. Of the CUDA kernels on the host (tests/cuda_host) the blocks are
// threads.
//
// `races cpu` and `races cuda` step one plan by two threads at once, which the library refuses: a race that
// ThreadSanitizer must report.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/step.h"
#include "cuda/step.h"

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

  void train(Scheduler& scheduler) {
    const int rows = plan.rows();
    std::vector<double> stats(kStatsHeader + static_cast<size_t>(rows) * stats_row_size(1));
    std::vector<double> gram(static_cast<size_t>(rows) * gram_size(2));
    std::vector<double> weights(static_cast<size_t>(rows) * 2, 0.25);
    double skipped = 0.0;
    scheduler.step(plan, stats.data(), &skipped, nullptr);
    scheduler.gram(plan, gram.data(), nullptr);
    const double skip = 0.0;
    scheduler.update(plan, weights.data(), &skip, nullptr);
    if (skipped != 0.0) {
      std::puts("a step was skipped");
      std::exit(1);
    }
  }
};

void require_same(const Model& one, const Model& other, const char* who) {
  if (one.memory == other.memory && one.steps == other.steps) return;
  std::printf("%s did not leave the same bits\n", who);
  std::exit(1);
}

void use_threads(const char* threads) { setenv("OMP_NUM_THREADS", threads, 1); }

std::unique_ptr<Scheduler> cuda_scheduler() {
  return cuda::make_scheduler(0, [](size_t bytes) { return Memory(std::malloc(bytes), &std::free); }, {});
}

// Of two plans, or of one that is given twice.
void train_at_once(Model& first, Scheduler& of_first, Model& second, Scheduler& of_second) {
  std::thread other([&] { second.train(of_second); });
  first.train(of_first);
  other.join();
}

void race(const char* kernels) {
  Model model(Rule::kSgd, false);
  use_threads("1");
  const bool on_cpu = std::strcmp(kernels, "cpu") == 0;
  const auto first = on_cpu ? cpu::make_scheduler() : cuda_scheduler();
  const auto second = on_cpu ? cpu::make_scheduler() : cuda_scheduler();
  train_at_once(model, *first, model, *second);
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) return race(arguments[1]), 0;
  for (const Rule rule : {Rule::kSgd, Rule::kAdam}) {
    for (const bool per_tensor : {false, true}) {
      use_threads("1");
      Model alone(rule, per_tensor);
      alone.train(*cpu::make_scheduler());
      use_threads("4");
      Model first(rule, per_tensor);
      Model second(rule, per_tensor);
      train_at_once(first, *cpu::make_scheduler(), second, *cpu::make_scheduler());
      require_same(first, alone, "four threads");
      require_same(second, alone, "four threads");
    }
  }
  // A rule reads and writes what is its own, so one is enough; with a row for each tensor there are more barriers.
  Model first(Rule::kAdam, true);
  Model second(Rule::kAdam, true);
  train_at_once(first, *cuda_scheduler(), second, *cuda_scheduler());
  require_same(first, second, "the CUDA kernels");
  Model third(Rule::kAdam, false);
  third.train(*cuda_scheduler());
  std::puts("no race was reported, and four threads leave the bits of one");
  return 0;
}
