#include "cuda/kernel.cuh"

namespace gradprom::cuda {

Kernel adam_kernel(int num_grads) { return kernel_for<Rule::kAdam>(num_grads); }

}  // namespace gradprom::cuda
