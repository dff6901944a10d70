// The CPU scheduler: how the maths of csrc/gradprom walks over host memory.
#pragma once

#include "gradprom/tensor_list.h"

namespace gradprom::cpu {

// The whole step in one parallel region: Gram matrix, gate, update. `stats` receives kStatsHeader +
// rows * stats_row_size(num_aux) doubles. Where a gradient was not finite, nothing is written but `stats`, and
// `skipped_steps`, unless it is null, counts one more.
void step(const StepPlan& plan, double* stats, double* skipped_steps);

// Phase 1 alone: `gram` receives rows * gram_size(num_grads) doubles.
void gram(const StepPlan& plan, double* gram);

// Phase 2 alone, with weights [rows][num_grads] that somebody else decided on (clipping included).
void update(const StepPlan& plan, const double* weights);

}  // namespace gradprom::cpu
