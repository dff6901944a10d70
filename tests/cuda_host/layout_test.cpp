// The layout of a job (csrc/cuda/layout.h) as plain C++: shares cover every element once, slots follow the rows, images
// are comparable byte by byte. Prints "ok", or what does not hold.
#include "cuda/layout.h"

#include <cstdio>
#include <cstdlib>

using namespace gradprom;
using namespace gradprom::cuda;

namespace {

void require(bool holds, const char* what, int line) {
  if (holds) return;
  std::printf("line %d: %s\n", line, what);
  std::exit(1);
}
#define REQUIRE(condition) require(condition, #condition, __LINE__)

alignas(16) char memory[1 << 16];

Operand flat(DType dtype, int offset = 0) { return {memory + offset, dtype, nullptr}; }

Entry entry(int64_t numel, DType dtype = DType::kF32, int offset = 0) {
  Entry e;
  e.numel = numel;
  e.param = flat(dtype, offset);
  e.grads[0] = e.grads[1] = flat(dtype, offset);
  return e;
}

StepPlan plan_of(const std::vector<int64_t>& sizes, bool per_tensor = false) {
  StepPlan plan;
  plan.num_grads = 2;
  plan.per_tensor = per_tensor;
  plan.groups.resize(1);
  for (const int64_t n : sizes) plan.entries.push_back(entry(n));
  return plan;
}

void shares_cover_every_element_once(const std::vector<int64_t>& sizes, int blocks, bool per_tensor) {
  const StepPlan plan = plan_of(sizes, per_tensor);
  const Items items(plan, true);
  const Partition p(items.items, plan.rows(), blocks);
  REQUIRE(static_cast<int>(p.shares.size()) == blocks + 1);
  REQUIRE(p.shares.front().item == 0 && p.shares.front().begin == 0);
  REQUIRE(p.shares.back().item == static_cast<int32_t>(sizes.size()) && p.shares.back().begin == 0);
  std::vector<int64_t> covered(sizes.size(), 0);
  std::vector<int> slots_of_row(plan.rows(), 0);
  for (int b = 0; b < blocks; ++b) {
    const Share& first = p.shares[b];
    const Share& last = p.shares[b + 1];
    REQUIRE(first.item < last.item || (first.item == last.item && first.begin <= last.begin));
    REQUIRE(first.begin % kGrain == 0);
    for (int32_t i = first.item; i <= last.item && i < static_cast<int32_t>(sizes.size()); ++i) {
      const int64_t begin = i == first.item ? first.begin : 0;
      const int64_t end = i == last.item ? last.begin : sizes[i];
      covered[i] += end - begin;
    }
  }
  for (size_t i = 0; i < sizes.size(); ++i) REQUIRE(covered[i] == sizes[i]);
  REQUIRE(static_cast<int>(p.row_slots.size()) == plan.rows() + 1);
  REQUIRE(p.row_slots.front() == 0 && p.row_slots.back() == p.slots);
  for (int r = 0; r < plan.rows(); ++r) {
    REQUIRE(p.row_slots[r] <= p.row_slots[r + 1]);
    if (per_tensor && sizes[r] > 0) REQUIRE(p.row_slots[r] < p.row_slots[r + 1]);
  }
}

void access_needs_flat_aligned_memory() {
  StepPlan plan = plan_of({64});
  const auto access = [&] { return Items(plan, true).items[0].access; };
  REQUIRE(access() == Access::kQuads);
  plan.entries[0] = entry(64, DType::kBF16);
  REQUIRE(access() == Access::kOctets);
  plan.entries[0] = entry(64, DType::kF64);
  REQUIRE(access() == Access::kElements && Items(plan, true).items[0].wide);
  plan.entries[0] = entry(64, DType::kF32, 4);
  REQUIRE(access() == Access::kElements);
  const int64_t sizes[] = {8, 8};
  const int64_t strides[] = {1, 8};
  plan.entries[0] = entry(64);
  plan.entries[0].ndim = 2;
  plan.entries[0].sizes = sizes;
  plan.entries[0].grads[1].strides = strides;
  const Items strided(plan, true);
  REQUIRE(strided.items[0].access == Access::kElements && strided.items[0].geometry == 0);
  REQUIRE(static_cast<int>(strided.geometry.size()) == 1 + 2 + 2 * kOperands);
  const int64_t* const of_second_gradient = strided.geometry.data() + 3 + 2 * (kGradOperand + 1);
  REQUIRE(of_second_gradient[0] == 1 && of_second_gradient[1] == 8);
  const int64_t* const of_param = strided.geometry.data() + 3 + 2 * kParamOperand;
  REQUIRE(of_param[0] == 8 && of_param[1] == 1);
}

void masters_come_with_their_parameters() {
  StepPlan plan = plan_of({64});
  plan.entries[0] = entry(64, DType::kBF16);
  plan.entries[0].master = flat(DType::kF32, 1024);
  const Item item = Items(plan, true).items[0];
  REQUIRE(item.param == memory + 1024 && item.param_dtype == DType::kF32);
  REQUIRE(item.rounded == memory && item.rounded_dtype == DType::kBF16);
  REQUIRE(item.gradient_bytes == 4);
}

void parameters_without_gradients_are_left_out() {
  StepPlan plan = plan_of({10, 20, 30}, true);
  plan.entries[1].grads[0] = plan.entries[1].grads[1] = Operand{};
  const Items items(plan, true);
  REQUIRE(items.items.size() == 2 && items.items[1].row == 2 && items.items[1].numel == 30);
}

void equal_plans_have_equal_images() {
  const auto image = [](const StepPlan& plan) {
    Image out;
    out.append(Items(plan, true).items);
    return out.bytes();
  };
  std::memset(memory, 0x5a, sizeof memory);
  StepPlan plan = plan_of({100, 7});
  const auto first = image(plan);
  REQUIRE(first == image(plan_of({100, 7})));
  REQUIRE(first.size() % kAlignment == 0);
  plan.entries[1].grads[0].data = memory + 64;
  REQUIRE(first != image(plan));
}

}  // namespace

int main(int count, char**) {
  if (count > 1) {  // overflows, for tests/sanitizers/planted.py
    Item huge{};
    huge.numel = INT64_MAX;
    return Partition::cost({huge}) > 0 ? 0 : 1;
  }
  for (const int blocks : {1, 2, 3, 7, 132}) {
    for (const bool per_tensor : {false, true}) {
      shares_cover_every_element_once({1}, blocks, per_tensor);
      shares_cover_every_element_once({0, 5, 0, 3}, blocks, per_tensor);
      shares_cover_every_element_once({1'000'003, 17, 64, 5'000, 1024, 1025, 0}, blocks, per_tensor);
      shares_cover_every_element_once(std::vector<int64_t>(3000, 11), blocks, per_tensor);
      shares_cover_every_element_once({5'000'000'000, 3}, blocks, per_tensor);
    }
  }
  access_needs_flat_aligned_memory();
  masters_come_with_their_parameters();
  parameters_without_gradients_are_left_out();
  equal_plans_have_equal_images();
  std::puts("ok");
  return 0;
}
