#include "python/plan.h"

#include <algorithm>
#include <stdexcept>

#include "cpu/step.h"

namespace gradprom {
namespace {

// A loop, because a call of memcmp takes longer for the few numbers that there are.
bool same_numbers(const int64_t* a, const int64_t* b, int count) {
  for (int i = 0; i < count; ++i) {
    if (a[i] != b[i]) return false;
  }
  return true;
}

bool same_shape(const TensorView& a, const TensorView& b) {
  return a.ndim == b.ndim && same_numbers(a.shape, b.shape, a.ndim);
}

bool same_layout(const TensorView& a, const TensorView& b) {
  return same_shape(a, b) && a.strides != nullptr && b.strides != nullptr && same_numbers(a.strides, b.strides, a.ndim);
}

std::string gradients_name(int k) { return k == 0 ? "main_grads" : "aux_grads[" + std::to_string(k - 1) + "]"; }

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// State dicts

bool Plan::Source::same_objects(int moments) const {
  if (moments != seen_moments) return false;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  size_t i = 0;
  for (; PyDict_Next(state.ptr(), &position, &key, &value) != 0; i += 2) {
    if (i >= seen.size() || seen[i] != key || seen[i + 1] != value) return false;
  }
  return i == seen.size();
}

void Plan::Source::remember_objects(int moments) {
  seen_moments = moments;
  seen.clear();
  PyObject *key, *value;
  for (Py_ssize_t position = 0; PyDict_Next(state.ptr(), &position, &key, &value) != 0;) {
    seen.push_back(key);
    seen.push_back(value);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Binding

Plan::Plan(Rule rule, const py::list& params, const std::vector<int>& groups, const py::list& states, int num_aux,
           bool per_tensor, bool master_weights, const cuda::Options& cuda_options)
    : cuda_options_(cuda_options) {
  if (num_aux > kMaxAux) {
    throw py::value_error(std::to_string(num_aux) + " auxiliary gradients; the kernels take up to " +
                          std::to_string(kMaxAux) + " (backend=\"reference\" takes any number)");
  }
  plan_.rule = rule;
  plan_.num_grads = 1 + num_aux;
  plan_.per_tensor = per_tensor;
  plan_.master_weights = master_weights;
  plan_.entries.resize(params.size());
  for (const char* name : moment_names(rule)) moment_names_.emplace_back(name);
  for (size_t i = 0; i < params.size(); ++i) {
    sources_.emplace_back();
    sources_[i].param = params[i];
    sources_[i].state = states[i];
    plan_.entries[i].group = groups[i];
  }
  for (size_t i = 0; i < params.size(); ++i) {
    if (!bind_param(i, false)) throw py::value_error("the parameters of a plan must be on one device");
  }
}

bool Plan::matches(const py::list& params) {
  if (params.size() != sources_.size()) return false;
  for (size_t i = 0; i < sources_.size(); ++i) {
    if (PyList_GET_ITEM(params.ptr(), static_cast<Py_ssize_t>(i)) != sources_[i].param.ptr()) return false;
  }
  for (size_t i = 0; i < sources_.size(); ++i) {
    if (!bind_param(i, true)) return false;
  }
  return true;
}

bool Plan::rebind(const py::list& params) {
  if (params.size() != sources_.size()) return false;
  for (size_t i = 0; i < sources_.size(); ++i) sources_[i].param = params[i];
  for (size_t i = 0; i < sources_.size(); ++i) {
    if (!bind_param(i, false)) return false;
  }
  return true;
}

bool Plan::release() {
  for (Source& source : sources_) source.param = py::object();
  resolved_.clear();
  return device_ && device_->device_type != cuda::device_type();
}

bool Plan::bind_param(size_t i, bool same_object) {
  const auto name = [&] { return param_name(i); };
  Source& source = sources_[i];
  Entry& entry = plan_.entries[i];
  const Tensor t = reader().read(source.param.ptr(), name);
  if (!device_) device_ = t.device;
  if (!on_device(t)) return false;
  if (source.space != nullptr && entry.param.dtype == t.view.dtype && same_layout(source.view(entry), t.view)) {
    const bool moved = entry.param.data != t.view.data;
    if (moved || !same_object) source.negated = reader().is_negated(source.param.ptr());
    if (moved) {
      entry.param.data = t.view.data;
      ++plan_.revision;
    }
    return true;
  }
  source.negated = reader().is_negated(source.param.ptr());
  source.space = std::make_unique<IndexSpace>(t.view);
  source.shape.assign(t.view.shape, t.view.shape + t.view.ndim);
  source.strides.assign(t.view.strides, t.view.strides + (t.view.strides != nullptr ? t.view.ndim : 0));
  if (t.view.strides == nullptr) {
    source.strides.resize(t.view.ndim);
    for (int64_t d = t.view.ndim, s = 1; d-- > 0; s *= t.view.shape[d]) source.strides[d] = s;
  }
  entry.param = source.space->operand(t.view, source.param_strides);
  entry.numel = source.space->numel();
  entry.ndim = source.space->ndim();
  entry.sizes = source.space->sizes();
  // Operands of the old index space; every one of them is bound again before it is used.
  for (Operand& grad : entry.grads) grad = Operand{};
  for (Operand& state : entry.states) state = Operand{};
  entry.master = Operand{};
  ++plan_.revision;
  return true;
}

template <class Name>
bool Plan::bind(size_t i, const Tensor& t, Operand& slot, std::vector<int64_t>& strides, Name&& name) {
  const Source& source = sources_[i];
  const Entry& entry = plan_.entries[i];
  const TensorView param = source.view(entry);
  check_device(t, name);
  Operand operand{t.view.data, t.view.dtype, nullptr};
  if (entry.param.strides != nullptr || !same_layout(param, t.view)) {
    if (!same_shape(param, t.view)) {
      throw py::value_error(name() + " has shape " + shape_string(t.view) + ", but its parameter has shape " +
                            shape_string(param));
    }
    operand = source.space->operand(t.view, scratch_);
  }
  const bool strided = operand.strides != nullptr;
  const bool same = slot.data == operand.data && slot.dtype == operand.dtype && (slot.strides != nullptr) == strided &&
                    (!strided || scratch_ == strides);
  if (same) return false;
  if (strided) {
    strides = scratch_;
    operand.strides = strides.data();
  }
  slot = operand;
  ++plan_.revision;
  return true;
}

void Plan::bind_gradients(const py::sequence& main, const py::sequence& aux) {
  resolved_.clear();
  bind_gradient_list(main, 0);
  for (int k = 1; k < plan_.num_grads; ++k) bind_gradient_list(py::reinterpret_borrow<py::sequence>(aux[k - 1]), k);
}

void Plan::bind_gradient_list(const py::sequence& grads, int k) {
  const py::object items = py::reinterpret_steal<py::object>(PySequence_Fast(grads.ptr(), "gradients are no sequence"));
  if (!items) throw py::error_already_set();
  const auto count = static_cast<size_t>(PySequence_Fast_GET_SIZE(items.ptr()));
  if (count != sources_.size()) {
    throw py::value_error(gradients_name(k) + " holds " + std::to_string(count) + " gradients for " +
                          std::to_string(sources_.size()) + " parameters");
  }
  PyObject** const objects = PySequence_Fast_ITEMS(items.ptr());
  for (size_t i = 0; i < count; ++i) {
    Operand& slot = plan_.entries[i].grads[k];
    PyObject* gradient = objects[i];
    if (gradient == Py_None) {
      if (slot.data != nullptr) ++plan_.revision;
      slot = Operand{};
      continue;
    }
    const auto name = [&] { return gradients_name(k) + "[" + std::to_string(i) + "]"; };
    Tensor t = reader().read(gradient, name);
    if (reader().is_negated(gradient)) {
      resolved_.push_back(py::handle(gradient).attr("resolve_neg")());
      gradient = resolved_.back().ptr();
      t = reader().read(gradient, name);
    }
    bind(i, t, slot, sources_[i].grad_strides[k], name);
  }
}

std::vector<size_t> Plan::bind_states(const std::vector<Group>& groups) {
  bind_groups(groups);
  std::vector<size_t> missing;
  for (size_t i = 0; i < sources_.size(); ++i) {
    if (sources_[i].negated) reader().require_plain(sources_[i].param.ptr(), [&] { return param_name(i); });
    if (!sources_[i].space->injective()) {
      throw py::value_error(param_name(i) +
                            " is a view in which several elements share one memory "
                            "address (an expanded tensor?); it cannot be updated in place, clone it first");
    }
    if (plan_.entries[i].active(plan_.num_grads) && !bind_entry_states(i)) missing.push_back(i);
  }
  states_bound_ = missing.empty();
  return missing;
}

// Whether all state tensors of a parameter are there; those that are, are bound.
bool Plan::bind_entry_states(size_t i) {
  Source& source = sources_[i];
  Entry& entry = plan_.entries[i];
  const int moments = plan_.num_states(plan_.groups.at(entry.group));
  const bool mastered = plan_.has_master(entry);
  if (moments == 0 && !mastered) return true;
  if (!source.same_objects(moments)) {
    if (!find_entry_states(i, moments)) return false;
    source.remember_objects(moments);
  }
  for (int s = 0; s < moments; ++s) bind_state(i, s, entry.states[s]);
  if (mastered) bind_state(i, kMaster, entry.master);
  if (moments > 0) bind_step(i);
  return true;
}

// Looks the state tensors up by name.
bool Plan::find_entry_states(size_t i, int moments) {
  Source& source = sources_[i];
  source.seen_moments = -1;
  const auto find = [&](const py::str& key, py::object& out) {
    PyObject* const tensor = source.find(key);
    if (tensor != nullptr) out = py::reinterpret_borrow<py::object>(tensor);
    return tensor != nullptr;
  };
  for (int s = 0; s < moments; ++s) {
    if (!find(moment_names_[s], source.states[s].tensor)) return false;
  }
  if (plan_.has_master(plan_.entries[i]) && !find(master_key_, source.states[kMaster].tensor)) return false;
  return moments == 0 || find(step_key_, source.step);
}

void Plan::bind_state(size_t i, int s, Operand& slot) {
  const auto name = [&] { return state_name(i, s); };
  State& state = sources_[i].states[s];
  const Tensor t = reader().read(state.tensor.ptr(), name);
  if (!bind(i, t, slot, state.strides, name)) return;
  reader().require_plain(state.tensor.ptr(), name);
  if (s == kMaster && t.view.dtype != DType::kF32) throw py::type_error(name() + " must be a float32 tensor");
}

void Plan::bind_step(size_t i) {
  const auto name = [&] { return step_name(i); };
  const Tensor t = reader().read(sources_[i].step.ptr(), name);
  float*& slot = plan_.entries[i].step;
  if (t.view.dtype != DType::kF32 || t.view.ndim != 0) {
    throw py::type_error(name() + " must be a float32 tensor of no dimensions");
  }
  check_device(t, name);
  if (slot == t.view.data) return;
  slot = static_cast<float*>(t.view.data);
  ++plan_.revision;
}

std::string Plan::state_name(size_t i, int s) const {
  const py::str& key = s == kMaster ? master_key_ : moment_names_[s];
  return "state of " + param_name(i) + "[" + std::string(py::repr(key)) + "]";
}

template <class Name>
void Plan::check_device(const Tensor& t, Name&& name) const {
  if (on_device(t)) return;
  throw py::value_error(name() + " is on " + device_string(t.device) + ", but its parameter is on " +
                        device_string(*device_));
}

bool Plan::on_device(const Tensor& t) const {
  return t.device.device_type == device_->device_type && t.device.device_id == device_->device_id;
}

// ---------------------------------------------------------------------------------------------------------------------
// Numbers

void Plan::bind_groups(const std::vector<Group>& groups) {
  if (plan_.groups.size() != groups.size()) {
    plan_.groups.resize(groups.size());
    ++plan_.revision;
  }
  for (size_t g = 0; g < groups.size(); ++g) {
    Hyper hyper = groups[g].hyper;
    if (!groups[g].lr.is_none()) hyper.lr = scalar(groups[g].lr, 1, "lr")[0];
    if (plan_.num_states(hyper) != plan_.num_states(plan_.groups[g])) ++plan_.revision;
    plan_.groups[g] = hyper;
  }
}

void Plan::bind_gate(const GateSettings& gate) {
  plan_.gate = gate.config;
  if (gate.aux_weight.is_none()) return;
  const std::vector<Scalar> weights = scalar(gate.aux_weight, plan_.num_grads - 1, "aux_weight");
  std::copy(weights.begin(), weights.end(), plan_.gate.aux_weight);
}

std::vector<Scalar> Plan::scalar(const py::object& tensor, int count, const char* name) const {
  const auto name_of = [name] { return std::string(name); };
  const Tensor t = reader().read(tensor.ptr(), name_of);
  reader().require_plain(tensor.ptr(), name_of);
  const bool here = on_device(t);
  if (!here && t.device.device_type != kDLCPU) check_device(t, name_of);
  if (t.view.dtype != DType::kF32 && t.view.dtype != DType::kF64) {
    throw py::type_error(name_of() + " must be a number, or a float32 or float64 tensor");
  }
  const bool one = t.view.ndim == 0 || (t.view.ndim == 1 && t.view.shape[0] == 1);
  if (!one && !(t.view.ndim == 1 && t.view.shape[0] == count)) {
    throw py::value_error(name_of() + " has shape " + shape_string(t.view) + "; it must hold one number" +
                          (count > 1 ? ", or " + std::to_string(count) : ""));
  }
  const int64_t stride = one ? 0 : t.view.strides != nullptr ? t.view.strides[0] : 1;
  std::vector<Scalar> out(count);
  for (int k = 0; k < count; ++k) {
    if (t.view.dtype == DType::kF32) {
      out[k].f32 = static_cast<const float*>(t.view.data) + k * stride;
    } else {
      out[k].f64 = static_cast<const double*>(t.view.data) + k * stride;
    }
    if (!here) out[k] = Scalar{out[k].get()};
  }
  return out;
}

double* Plan::doubles(const py::object& tensor, int64_t count, const char* name) const {
  const auto name_of = [name] { return std::string(name); };
  const Tensor t = reader().read(tensor.ptr(), name_of);
  check_device(t, name_of);
  int64_t numel = 1;
  for (int d = 0; d < t.view.ndim; ++d) numel *= t.view.shape[d];
  if (t.view.dtype != DType::kF64 || numel < count) {
    throw py::value_error(std::string(name) + " must hold " + std::to_string(count) + " float64 values");
  }
  return static_cast<double*>(t.view.data);
}

// ---------------------------------------------------------------------------------------------------------------------
// Running

// Before every use: what may have happened to the states since the last step is not known.
void Plan::require_states(const std::vector<Group>& groups) {
  if (!states_bound_ && !bind_states(groups).empty()) {
    throw std::runtime_error("state tensors are missing; call bind_states first");
  }
  states_bound_ = false;
}

Scheduler& Plan::scheduler() {
  if (!scheduler_) {
    scheduler_ = device_->device_type == cuda::device_type()
                     ? cuda::make_scheduler(device_->device_id, allocator(), cuda_options_)
                     : cpu::make_scheduler();
  }
  return *scheduler_;
}

void* Plan::stream() const {
  return device_->device_type == cuda::device_type() ? reader().current_stream(sources_.front().param.ptr(), *device_)
                                                     : nullptr;
}

// Memory from PyTorch: its allocator knows streams and graph captures, and asking it does not wait for the device.
Allocate Plan::allocator() const {
  return [device = sources_.front().param.attr("device")](size_t bytes) {
    const py::gil_scoped_acquire gil;
    const py::module_ torch = py::module_::import("torch");
    py::object tensor = torch.attr("empty")(bytes, py::arg("dtype") = torch.attr("uint8"), py::arg("device") = device);
    void* const data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
    return Memory(data, [tensor = std::move(tensor)](void*) mutable {
      const py::gil_scoped_acquire gil;
      tensor = py::object();
    });
  };
}

// Other Python threads may run while the scheduler works or waits: a launch waits where more work is enqueued already
// than the driver holds.

void Plan::step(const std::vector<Group>& groups, const GateSettings& gate, const py::object& stats,
                const py::object& skipped_steps) {
  require_states(groups);
  bind_gate(gate);
  const int64_t size = kStatsHeader + plan_.rows() * stats_row_size(plan_.num_grads - 1);
  double* const out = doubles(stats, size, "stats");
  double* const skipped = skipped_steps.is_none() ? nullptr : doubles(skipped_steps, 1, "skipped_steps");
  Scheduler& on = scheduler();
  void* const queue = stream();
  const py::gil_scoped_release release;
  on.step(plan_, out, skipped, queue);
}

bool Plan::measure(const GateSettings& gate, const py::object& stats) {
  bind_gate(gate);
  const int64_t size = kStatsHeader + plan_.rows() * stats_row_size(plan_.num_grads - 1);
  double* const out = doubles(stats, size, "stats");
  Scheduler& on = scheduler();
  const py::gil_scoped_release release;
  return on.measure(plan_, out);
}

void Plan::gram(const py::object& out) {
  double* const values = doubles(out, plan_.rows() * gram_size(plan_.num_grads), "gram");
  Scheduler& on = scheduler();
  void* const queue = stream();
  const py::gil_scoped_release release;
  on.gram(plan_, values, queue);
}

void Plan::update(const std::vector<Group>& groups, const py::object& weights, const py::object& skip) {
  require_states(groups);
  const double* const values = doubles(weights, plan_.rows() * plan_.num_grads, "weights");
  const double* const flag = doubles(skip, 1, "skip");
  Scheduler& on = scheduler();
  void* const queue = stream();
  const py::gil_scoped_release release;
  on.update(plan_, values, flag, queue);
}

}  // namespace gradprom
