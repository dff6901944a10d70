#include "gradprom/tensor_list.h"

#include <algorithm>
#include <cstdlib>

namespace gradprom {
namespace {

int64_t contiguous_stride(const TensorView& tensor, int dim) {
  int64_t stride = 1;
  for (int d = tensor.ndim - 1; d > dim; --d) stride *= tensor.shape[d];
  return stride;
}

int64_t stride_of(const TensorView& tensor, int dim) {
  return tensor.strides != nullptr ? tensor.strides[dim] : contiguous_stride(tensor, dim);
}

}  // namespace

std::vector<const char*> moment_names(Rule rule) {
  return with_rule<float>(rule, [](auto r) {
    using R = decltype(r);
    return std::vector<const char*>(R::kStateNames, R::kStateNames + R::kStates);
  });
}

IndexSpace::IndexSpace(const TensorView& leader) {
  for (int d = 0; d < leader.ndim; ++d) {
    numel_ *= leader.shape[d];
    if (leader.shape[d] != 1) order_.push_back(d);
  }
  std::stable_sort(order_.begin(), order_.end(),
                   [&](int a, int b) { return std::llabs(stride_of(leader, a)) > std::llabs(stride_of(leader, b)); });
  for (int d : order_) sizes_.push_back(leader.shape[d]);

  // Sorted by stride, no two elements share an address if each stride steps over everything below it.
  int64_t reach = 0;
  for (size_t i = order_.size(); i-- > 0 && numel_ > 0;) {
    const int64_t stride = std::llabs(stride_of(leader, order_[i]));
    injective_ = injective_ && stride > reach;
    reach += stride * (sizes_[i] - 1);
  }
}

Operand IndexSpace::operand(const TensorView& tensor, std::vector<int64_t>& strides) const {
  Operand out;
  out.data = tensor.data;
  out.dtype = tensor.dtype;
  strides.clear();
  bool flat = true;
  int64_t dense = numel_;
  for (size_t i = 0; i < order_.size(); ++i) {
    strides.push_back(stride_of(tensor, order_[i]));
    dense = sizes_[i] != 0 ? dense / sizes_[i] : 0;
    flat = flat && strides.back() == dense;
  }
  out.strides = flat || numel_ == 0 ? nullptr : strides.data();
  return out;
}

std::string shape_string(const TensorView& tensor) {
  std::string text = "(";
  for (int d = 0; d < tensor.ndim; ++d) text += (d > 0 ? ", " : "") + std::to_string(tensor.shape[d]);
  return text + (tensor.ndim == 1 ? ",)" : ")");
}

}  // namespace gradprom
