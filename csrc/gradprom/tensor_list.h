// The tensors of one step as plain memory: what a scheduler (CPU or CUDA) walks over.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gradprom/dtype.h"
#include "gradprom/policy.h"
#include "gradprom/update.h"

namespace gradprom {

// A tensor as it was handed over. Strides are in elements.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int ndim = 0;
  const int64_t* shape = nullptr;
  const int64_t* strides = nullptr;  // null: C-contiguous (DLPack)
};

// One tensor of an entry, seen through the entry's index space. `strides == nullptr` means flat: element i of the
// index space lies at data[i]. Otherwise it is found by the strides, one per dimension of the entry.
struct Operand {
  void* data = nullptr;  // null: absent; an absent gradient is zero
  DType dtype = DType::kF32;
  const int64_t* strides = nullptr;
};

// A parameter with everything that belongs to it. The index space runs over the parameter in the order of its memory:
// `sizes` are the parameter's dimensions other than 1, slowest stride first. So tensors of equal dense layout (also
// channels_last, transposed, ...) are flat, and any other layout is matched element by element, never permuted.
struct Entry {
  int64_t numel = 0;
  int32_t group = 0;
  int32_t ndim = 0;
  const int64_t* sizes = nullptr;
  Operand param;
  Operand master;  // fp32 twin of a 16-bit parameter, or absent
  Operand grads[kMaxGrads];
  Operand states[kMaxStates];
  float* step = nullptr;  // number of updates this parameter has had; null for stateless rules

  // Left alone where every gradient is absent.
  bool active(int num_grads) const {
    for (int k = 0; k < num_grads; ++k) {
      if (grads[k].data != nullptr) return true;
    }
    return false;
  }

  // What the update reads and writes. Where it is a master, the parameter only receives its rounded values.
  const Operand& updated() const { return master.data != nullptr ? master : param; }

  // Arithmetic is fp64 where the parameter or a gradient is, else fp32.
  bool needs_fp64() const {
    bool wide = param.dtype == DType::kF64;
    for (const Operand& g : grads) wide = wide || (g.data != nullptr && g.dtype == DType::kF64);
    return wide;
  }
};

// Names of the moments that a rule may have, as in torch.optim.
std::vector<const char*> moment_names(Rule rule);

struct StepPlan {
  // Raised with every change of the entries, or of how many states a group has; what a scheduler has made of them is
  // good until then.
  uint64_t revision = 1;
  std::vector<Entry> entries;
  std::vector<Hyper> groups;
  Rule rule = Rule::kSgd;
  GateConfig gate;
  int num_grads = 1;
  bool per_tensor = false;
  bool master_weights = false;  // 16-bit parameters have an fp32 master

  // Gram matrices: one for the model, or one per tensor.
  int rows() const { return per_tensor ? static_cast<int>(entries.size()) : 1; }
  int64_t row_of(int64_t entry) const { return per_tensor ? entry : 0; }

  bool has_master(const Entry& entry) const { return master_weights && size_of(entry.param.dtype) == 2; }

  // Moments; on top of them comes the master, where there is one.
  int num_states(const Hyper& hyper) const {
    return with_rule<float>(rule, [&](auto r) { return decltype(r)::num_states(hyper); });
  }
};

// Builds an entry's index space from the tensor that defines it (the parameter, or a gradient where there is none)
// and expresses other tensors of the same shape in it. Owns the sizes and strides that the operands point to.
class IndexSpace {
 public:
  explicit IndexSpace(const TensorView& leader);

  int64_t numel() const { return numel_; }
  int ndim() const { return static_cast<int>(sizes_.size()); }
  const int64_t* sizes() const { return sizes_.data(); }

  // Every address of the leader is reached once: it may be written element by element.
  bool injective() const { return injective_; }

  // `strides` receives what the operand points to; it must live as long as the operand.
  Operand operand(const TensorView& tensor, std::vector<int64_t>& strides) const;

 private:
  std::vector<int> order_;  // dimensions of the leader, slowest stride first, without those of size 1
  std::vector<int64_t> sizes_;
  int64_t numel_ = 1;
  bool injective_ = true;
};

// "(64, 3, 3, 3)"
std::string shape_string(const TensorView& tensor);

}  // namespace gradprom
