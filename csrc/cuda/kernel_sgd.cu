#include "cuda/kernel.cuh"

namespace gradprom::cuda {

Kernel sgd_kernel(int num_grads) { return kernel_for<Rule::kSgd>(num_grads); }

}  // namespace gradprom::cuda
