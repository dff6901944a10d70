// The CUDA scheduler: how the maths of csrc/gradprom walks over device memory. Nothing here waits for the device.
// csrc/cuda/absent.cpp stands in for all of it where no nvcc was found.
#pragma once

#include <string>

#include "gradprom/scheduler.h"

namespace gradprom::cuda {

// Every value gives correct results; tests and measurements use others than these.
struct Options {
  bool cooperative = true;    // false: one launch per stage instead of one for all
  int max_blocks = 0;         // 0: what the device holds at once
  int max_shared_bytes = -1;  // of gradients kept on chip by each block; -1: what there is
};

// The DLPack device type of the tensors that this scheduler takes; 0 where it was not built.
int device_type();

// What the kernels were compiled for, "80-real, 90-real"; empty where they were not.
const char* architectures();

// Why the kernels cannot run on this device, or an empty string.
std::string unusable(int device);

std::unique_ptr<Scheduler> make_scheduler(int device, Allocate allocate, const Options& options);

}  // namespace gradprom::cuda
