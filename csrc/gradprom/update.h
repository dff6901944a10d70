// The update rules of torch.optim, one element at a time. `T` is the type the arithmetic runs in: float for
// parameters of 32 and 16 bits, double for 64. A rule says which state tensors it has, works out its coefficients once
// per tensor (`prepare`) and is applied to every element (`apply`).
#pragma once

#include <cmath>

#include "gradprom/scalar.h"

namespace gradprom {

// The one list of rules: enumerator, name, type. The enum, its binding and the tables of both schedulers are made from
// it.
#define GP_RULES(X)   \
  X(kSgd, "sgd", Sgd) \
  X(kAdam, "adam", Adam)

enum class Rule : int32_t {
#define GP_ENUMERATOR(enumerator, name, type) enumerator,
  GP_RULES(GP_ENUMERATOR)
#undef GP_ENUMERATOR
};
#define GP_ONE(enumerator, name, type) +1
inline constexpr int kRules = GP_RULES(GP_ONE);
#undef GP_ONE

// Hyper-parameters of one parameter group beside its learning rate, named as in torch.optim: the one list of them. The
// struct below, the binding's keyword arguments and the check of its size are made from it.
#define GP_HYPER_NUMBERS(X) \
  X(weight_decay, 0.0)      \
  X(momentum, 0.0)          \
  X(dampening, 0.0)         \
  X(beta1, 0.9)             \
  X(beta2, 0.999)           \
  X(eps, 1e-8)
#define GP_HYPER_FLAGS(X)                                                        \
  X(nesterov)                                                                    \
  X(decoupled) /* AdamW: the decay acts on the parameter, not on the gradient */ \
  X(amsgrad)                                                                     \
  X(maximize)

struct Hyper {
  Scalar lr;
#define GP_FIELD(name, value) double name = value;
  GP_HYPER_NUMBERS(GP_FIELD)
#undef GP_FIELD
#define GP_FIELD(name) bool name = false;
  GP_HYPER_FLAGS(GP_FIELD)
#undef GP_FIELD
  uint32_t unused = 0;  // no padding: equal hyper-parameters are equal bytes
};

template <class T>
struct Sgd {
  static constexpr int kFewestStates = 0;
  static constexpr int kStates = 1;
  static constexpr const char* kStateNames[kStates] = {"momentum_buffer"};
  static int num_states(const Hyper& h) { return h.momentum != 0.0 ? 1 : 0; }

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

  // With `num_states` of its states, of which there may be fewer than kStates.
  GP_HD void apply(int num_states, T gradient, T& parameter, T* states) const {
    const T g = decayed(gradient, parameter);
    if (num_states == 0) {
      parameter -= lr * g;
      return;
    }
    T& buffer = states[0];
    buffer = momentum * buffer + keep * g;
    parameter -= lr * (nesterov ? g + momentum * buffer : buffer);
  }
};

template <class T>
struct Adam {
  static constexpr int kFewestStates = 2;
  static constexpr int kStates = 3;
  static constexpr const char* kStateNames[kStates] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  static int num_states(const Hyper& h) { return h.amsgrad ? 3 : 2; }

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

  GP_HD void apply(int num_states, T gradient, T& parameter, T* states) const {
    T& mean = states[0];
    T& variance = states[1];
    const T g = decay_gradient ? gradient + weight_decay * parameter : gradient;
    parameter *= shrink;
    mean += one_minus_beta1 * (g - mean);
    variance = beta2 * variance + one_minus_beta2 * g * g;
    T second = variance;
    if (num_states == 3) {
      states[2] = states[2] > variance ? states[2] : variance;
      second = states[2];
    }
    parameter -= step_size * (mean / (std::sqrt(second) * inverse_sqrt_correction2 + eps));
  }
};

template <Rule R, class T>
struct RuleType;
#define GP_TYPE(enumerator, name, type)                               \
  template <class T>                                                  \
  struct RuleType<Rule::enumerator, T> {                              \
    static_assert(type<T>::kStates <= kMaxStates, "too many states"); \
    using Type = type<T>;                                             \
  };
GP_RULES(GP_TYPE)
#undef GP_TYPE
template <Rule R, class T>
using RuleOf = typename RuleType<R, T>::Type;

// Calls `body` with a value of the rule's type, for what does not depend on the numbers in it.
template <class T, class Body>
auto with_rule(Rule rule, Body&& body) {
  switch (rule) {
#define GP_CASE(enumerator, name, type) \
  case Rule::enumerator:                \
    return body(type<T>{});
    GP_RULES(GP_CASE)
#undef GP_CASE
  }
  return body(RuleOf<Rule{}, T>{});  // not reached
}

}  // namespace gradprom
