// Takes the place of csrc/cuda/step.cu where the CUDA kernels are not built.
#include <stdexcept>

#include "cuda/step.h"

namespace gradprom::cuda {

int device_type() { return 0; }
const char* architectures() { return ""; }
std::string unusable(int) { return "the CUDA kernels were not built"; }
std::unique_ptr<Scheduler> make_scheduler(int device, Allocate, const Options&) {
  throw std::runtime_error(unusable(device));
}

}  // namespace gradprom::cuda
