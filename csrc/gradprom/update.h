// The update rules of torch.optim, one element at a time. `T` is the type the arithmetic runs in: float for
// parameters of 32 and 16 bits, double for 64. Schedulers call `prepare` once per tensor, `apply` per element.
#pragma once

#include <cmath>

#include "gradprom/scalar.h"

namespace gradprom {

enum class Rule : int32_t { kSgd, kAdam };

// Hyper-parameters of one parameter group, named as in torch.optim.
struct Hyper {
  Scalar lr;
  double weight_decay = 0.0;
  // SGD
  double momentum = 0.0;
  double dampening = 0.0;
  // Adam, AdamW
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  bool nesterov = false;   // SGD
  bool decoupled = false;  // AdamW: the decay acts on the parameter, not on the gradient
  bool amsgrad = false;
  bool maximize = false;
  uint32_t unused = 0;  // no padding: equal hyper-parameters are equal bytes
};

template <class T>
struct Sgd {
  T lr, weight_decay, momentum, keep;  // keep: 1 - dampening, but 1 on the first step
  bool decay, nesterov;

  GP_HD static Sgd prepare(const Hyper& h, double steps_before) {
    const bool first = steps_before == 0.0;  // torch.optim starts the buffer as a copy of the gradient
    Sgd s;
    s.lr = static_cast<T>(h.lr.get());
    s.weight_decay = static_cast<T>(h.weight_decay);
    s.momentum = static_cast<T>(h.momentum);
    s.keep = static_cast<T>(first ? 1.0 : 1.0 - h.dampening);
    s.decay = h.weight_decay != 0.0;
    s.nesterov = h.nesterov;
    return s;
  }

  GP_HD T decayed(T gradient, T parameter) const { return decay ? gradient + weight_decay * parameter : gradient; }

  GP_HD void apply(T gradient, T& parameter) const { parameter -= lr * decayed(gradient, parameter); }

  GP_HD void apply(T gradient, T& parameter, T& buffer) const {
    const T g = decayed(gradient, parameter);
    buffer = momentum * buffer + keep * g;
    parameter -= lr * (nesterov ? g + momentum * buffer : buffer);
  }
};

template <class T>
struct Adam {
  T step_size, shrink, weight_decay, one_minus_beta1, beta2, one_minus_beta2, inverse_sqrt_correction2, eps;
  bool decay_gradient;

  GP_HD static Adam prepare(const Hyper& h, double steps_before) {
    const double step = steps_before + 1.0;
    const double lr = h.lr.get();
    const double correction1 = 1.0 - std::pow(h.beta1, step);
    const double correction2 = 1.0 - std::pow(h.beta2, step);
    Adam a;
    a.step_size = static_cast<T>(lr / correction1);
    a.shrink = static_cast<T>(h.decoupled ? 1.0 - lr * h.weight_decay : 1.0);
    a.weight_decay = static_cast<T>(h.weight_decay);
    a.one_minus_beta1 = static_cast<T>(1.0 - h.beta1);
    a.beta2 = static_cast<T>(h.beta2);
    a.one_minus_beta2 = static_cast<T>(1.0 - h.beta2);
    a.inverse_sqrt_correction2 = static_cast<T>(1.0 / std::sqrt(correction2));
    a.eps = static_cast<T>(h.eps);
    a.decay_gradient = h.weight_decay != 0.0 && !h.decoupled;
    return a;
  }

  GP_HD T moments(T gradient, T& parameter, T& mean, T& variance) const {
    const T g = decay_gradient ? gradient + weight_decay * parameter : gradient;
    parameter *= shrink;
    mean += one_minus_beta1 * (g - mean);
    variance = beta2 * variance + one_minus_beta2 * g * g;
    return variance;
  }

  GP_HD void step(T& parameter, T mean, T variance) const {
    parameter -= step_size * (mean / (std::sqrt(variance) * inverse_sqrt_correction2 + eps));
  }

  GP_HD void apply(T gradient, T& parameter, T& mean, T& variance) const {
    const T v = moments(gradient, parameter, mean, variance);
    step(parameter, mean, v);
  }

  GP_HD void apply(T gradient, T& parameter, T& mean, T& variance, T& largest) const {
    const T v = moments(gradient, parameter, mean, variance);
    largest = largest > v ? largest : v;
    step(parameter, mean, largest);
  }
};

}  // namespace gradprom
