// What every scheduler can do: walk over the memory of a plan. The maths is the same for all of them.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

#include "gradprom/tensor_list.h"

namespace gradprom {

// Pointers are to the memory that the plan's tensors lie in. Where that is a GPU's, the calls only enqueue work on
// `stream` and return; in host memory there is no stream, and the work is done when a call returns.
class Scheduler {
 public:
  Scheduler() = default;
  virtual ~Scheduler() = default;
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // The whole step: Gram matrix, gate, update. `stats` receives kStatsHeader + rows * stats_row_size(num_aux) doubles.
  // Where a gradient is not finite, nothing is written but `stats`, and `skipped_steps`, unless it is null, is raised
  // by 1.
  virtual void step(const StepPlan& plan, double* stats, double* skipped_steps, void* stream) = 0;

  // Gram matrix and gate: the statistics that a step would have, without one. Returns false where it cannot.
  virtual bool measure(const StepPlan&, double* /*stats*/) { return false; }

  // Phase 1 alone: `out` receives rows * gram_size(num_grads) doubles.
  virtual void gram(const StepPlan& plan, double* out, void* stream) = 0;

  // Phase 2 alone, with weights [rows][num_grads] that were decided elsewhere (clipping included). Where `*skip` is not
  // 0, everything stays as it is.
  virtual void update(const StepPlan& plan, const double* weights, const double* skip, void* stream) = 0;
};

// Memory from the caller's allocator, on the current stream's terms: when its last owner lets go of it, it may be used
// again by later work on that stream.
using Memory = std::shared_ptr<void>;
using Allocate = std::function<Memory(size_t bytes)>;

}  // namespace gradprom
