// A number that a step needs and that may live on the device: a learning rate, a lambda.
#pragma once

#include "gradprom/platform.h"

namespace gradprom {

// Either known to the host when the step is enqueued, or in the memory that the step works on and read when it runs: a
// CUDA graph that is replayed sees what has been written there since it was captured.
struct Scalar {
  double value = 0.0;
  const float* f32 = nullptr;
  const double* f64 = nullptr;

  GP_HD double get() const { return f64 != nullptr ? *f64 : f32 != nullptr ? static_cast<double>(*f32) : value; }
};

}  // namespace gradprom
