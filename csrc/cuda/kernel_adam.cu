#include "cuda/kernel.cuh"

namespace gradprom::cuda {

template <>
Kernel rule_kernel<Rule::kAdam>(int num_grads) {
  return kernel_for<Rule::kAdam>(num_grads);
}

}  // namespace gradprom::cuda
