// The CUDA scheduler: how the maths of csrc/gradprom walks over device memory. Nothing here waits for the device.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

#include "gradprom/tensor_list.h"

namespace gradprom::cuda {

// Device memory from the caller's allocator, on the current stream's terms: when the last owner lets go of it, it may
// be used again by later work on that stream.
using Memory = std::shared_ptr<void>;
using Allocate = std::function<Memory(size_t bytes)>;

// For tests and measurements; every value gives correct results.
struct Options {
  bool cooperative = true;    // false: one launch per stage instead of one for all
  int max_blocks = 0;         // 0: what the device holds at once
  int max_shared_bytes = -1;  // of gradients kept on chip by each block; -1: what there is

  bool operator==(const Options& other) const {
    return cooperative == other.cooperative && max_blocks == other.max_blocks &&
           max_shared_bytes == other.max_shared_bytes;
  }
};
void configure(const Options& options);

// Steps one plan's tensors, all of them on one device.
class Scheduler {
 public:
  Scheduler(int device, Allocate allocate);
  ~Scheduler();

  // As cpu::step, gram and update, but the pointers are to device memory and the work is only enqueued on `stream` (a
  // cudaStream_t). `skip` points to a number that is not 0 where the update is to leave everything as it is.
  void step(const StepPlan& plan, double* stats, double* skipped_steps, void* stream);
  void gram(const StepPlan& plan, double* out, void* stream);
  void update(const StepPlan& plan, const double* weights, const double* skip, void* stream);

 private:
  struct Request;
  struct Resident;
  void run(const StepPlan& plan, const Request& request, void* stream);
  // What the device holds about the plan, brought up to date.
  Resident& resident(const StepPlan& plan, bool with_states, void* stream);

  int device_;
  Allocate allocate_;
  std::unique_ptr<Resident> residents_[2];  // without and with the parameters and states
};

// Why the kernels cannot run on this device, or an empty string.
std::string unusable(int device);

}  // namespace gradprom::cuda
