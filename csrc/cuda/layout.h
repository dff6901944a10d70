// How a plan is laid out for the kernels: which tensors, in which shares, at which places of one image of bytes. Plain
// C++: nothing here needs a GPU or its compiler.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "cuda/job.h"
#include "gradprom/tensor_list.h"

namespace gradprom::cuda {

inline constexpr size_t kAlignment = 16;

inline size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Arrays one after the other, each at its offset.
class Image {
 public:
  template <class T>
  size_t append(const std::vector<T>& values) {
    const size_t offset = bytes_.size();
    bytes_.resize(aligned(offset + values.size() * sizeof(T)));
    if (!values.empty()) std::memcpy(bytes_.data() + offset, values.data(), values.size() * sizeof(T));
    return offset;
  }
  std::vector<unsigned char>& bytes() { return bytes_; }

 private:
  std::vector<unsigned char> bytes_;
};

inline bool is_vectorizable(const Operand& operand) {
  return operand.strides == nullptr && operand.dtype != DType::kF64 &&
         reinterpret_cast<uintptr_t>(operand.data) % 16 == 0;
}

// The entries of a plan that have gradients, as the kernel sees them.
struct Items {
  std::vector<Item> items;
  std::vector<int64_t> geometry;

  Items(const StepPlan& plan, bool with_states) {
    items.reserve(plan.entries.size());
    for (size_t e = 0; e < plan.entries.size(); ++e) {
      const Entry& entry = plan.entries[e];
      if (entry.active(plan.num_grads)) add(plan, entry, static_cast<int64_t>(e), with_states);
    }
  }

 private:
  void add(const StepPlan& plan, const Entry& entry, int64_t index, bool with_states) {
    Item item;
    std::memset(static_cast<void*>(&item), 0, sizeof item);  // padding too: images are compared byte by byte
    item.numel = entry.numel;
    item.row = static_cast<int32_t>(plan.row_of(index));
    item.group = entry.group;
    item.wide = entry.needs_fp64();
    bool vectors = true;
    bool halves = false;
    bool flat = true;
    const auto see = [&](const Operand& operand) {
      vectors = vectors && is_vectorizable(operand);
      halves = halves || size_of(operand.dtype) == 2;
      flat = flat && operand.strides == nullptr;
    };
    for (int k = 0; k < plan.num_grads; ++k) {
      const Operand& grad = entry.grads[k];
      if (grad.data == nullptr) continue;
      item.grads[k] = grad.data;
      item.grad_dtypes[k] = grad.dtype;
      item.gradient_bytes += static_cast<uint8_t>(size_of(grad.dtype));
      see(grad);
    }
    if (with_states) {
      item.param = entry.updated().data;
      item.param_dtype = entry.updated().dtype;
      see(entry.updated());
      if (entry.master.data != nullptr) {
        item.rounded = entry.param.data;
        item.rounded_dtype = entry.param.dtype;
        see(entry.param);
      }
      item.num_states = static_cast<uint8_t>(plan.num_states(plan.groups[entry.group]));
      if (item.num_states > 0) item.step = entry.step;
      for (int s = 0; s < item.num_states; ++s) {
        item.states[s] = entry.states[s].data;
        item.state_dtypes[s] = entry.states[s].dtype;
        see(entry.states[s]);
      }
    }
    item.access = !vectors || item.wide ? Access::kElements : halves ? Access::kOctets : Access::kQuads;
    item.geometry = flat ? -1 : add_geometry(entry);
    items.push_back(item);
  }

  int64_t add_geometry(const Entry& entry) {
    const auto start = static_cast<int64_t>(geometry.size());
    geometry.push_back(entry.ndim);
    geometry.insert(geometry.end(), entry.sizes, entry.sizes + entry.ndim);
    add_strides(entry, entry.updated());
    add_strides(entry, entry.param);
    for (const Operand& grad : entry.grads) add_strides(entry, grad);
    for (const Operand& state : entry.states) add_strides(entry, state);
    return start;
  }

  void add_strides(const Entry& entry, const Operand& operand) {
    const size_t start = geometry.size();
    geometry.resize(start + entry.ndim);
    int64_t dense = 1;
    for (int d = entry.ndim - 1; d >= 0; --d) {
      geometry[start + d] = operand.strides != nullptr ? operand.strides[d] : dense;
      dense *= entry.sizes[d];
    }
  }
};

// Hyper-parameters that do not fit into the arguments of the kernel.
inline std::vector<Hyper> further_groups(const StepPlan& plan, bool with_states) {
  if (!with_states || plan.groups.size() <= kInlineGroups) return {};
  return {plan.groups.begin() + kInlineGroups, plan.groups.end()};
}

// Hyper-parameters have no padding.
inline bool same_bytes(const std::vector<Hyper>& a, const std::vector<Hyper>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(Hyper)) == 0);
}

// Gives every block a share of about the same cost, and every partial Gram matrix a slot. In the order of the slots
// come the rows, and within a row the blocks.
struct Partition {
  std::vector<Share> shares;
  std::vector<int32_t> row_slots;
  int slots = 0;

  // What an item costs beside its elements, in elements: a small tensor is waited for, not streamed.
  static constexpr int64_t kItemCost = 256;

  static int64_t cost(const std::vector<Item>& items) {
    int64_t total = 0;
    for (const Item& item : items) total += item.numel + kItemCost;
    return total;
  }

  Partition(const std::vector<Item>& items, int rows, int blocks) {
    const int64_t total = cost(items);
    shares.reserve(blocks + 1);
    shares.push_back({0, 0, 0});
    int64_t before = 0;  // cost of the items already passed
    for (size_t i = 0; i < items.size(); ++i) {
      while (static_cast<int>(shares.size()) < blocks) {
        const int64_t wanted = total * static_cast<int64_t>(shares.size()) / blocks - before;
        const int64_t begin = wanted > 0 ? (wanted + kGrain - 1) / kGrain * kGrain : 0;
        if (begin >= items[i].numel) break;
        shares.push_back({begin, static_cast<int32_t>(i), 0});
      }
      before += items[i].numel + kItemCost;
    }
    while (static_cast<int>(shares.size()) <= blocks) shares.push_back({0, static_cast<int32_t>(items.size()), 0});
    number_slots(items, rows);
  }

 private:
  void number_slots(const std::vector<Item>& items, int rows) {
    const int blocks = static_cast<int>(shares.size()) - 1;
    row_slots.assign(rows + 1, 0);
    if (rows == 1) {
      for (int b = 0; b < blocks; ++b) shares[b].slot = b;
      row_slots[1] = slots = blocks;
      return;
    }
    for (int b = 0; b < blocks; ++b) {
      shares[b].slot = slots;
      const Share& last = shares[b + 1];
      for (int32_t i = shares[b].item; i < last.item || (i == last.item && last.begin > begin_of(b, i)); ++i) {
        ++row_slots[items[i].row + 1];
        ++slots;
      }
    }
    for (int r = 0; r < rows; ++r) row_slots[r + 1] += row_slots[r];
  }

  int64_t begin_of(int block, int32_t item) const { return item == shares[block].item ? shares[block].begin : 0; }
};

}  // namespace gradprom::cuda
