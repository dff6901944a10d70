#include "cuda/kernel.cuh"

namespace gradprom::cuda {

template <>
Kernel rule_kernel<Rule::kSgd>(int num_grads) {
  return kernel_for<Rule::kSgd>(num_grads);
}

}  // namespace gradprom::cuda
