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
  if (!same_shape(a, b)) return false;
  if (a.ndim == 0) return true;  // the strides of no dimensions may be anywhere
  return a.strides != nullptr && b.strides != nullptr && same_numbers(a.strides, b.strides, a.ndim);
}

[[noreturn]] void throw_shared(const std::string& name) {
  throw py::value_error(name +
                        " is a view in which several elements share one memory "
                        "address (an expanded tensor?); it cannot be updated in place, clone it first");
}

[[noreturn]] void throw_missing() { throw std::runtime_error("state tensors are missing; call bind_states first"); }

std::string gradients_name(int k) { return k == 0 ? "main_grads" : "aux_grads[" + std::to_string(k - 1) + "]"; }

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// State dicts

bool Plan::Source::same_objects(int wanted) const {
  if (wanted != seen_for) return false;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  size_t i = 0;
  for (; PyDict_Next(state.ptr(), &position, &key, &value) != 0; i += 2) {
    if (i >= seen.size() || seen[i] != key || seen[i + 1] != value) return false;
  }
  return i == seen.size();
}

void Plan::Source::remember_objects(int wanted) {
  seen_for = wanted;
  seen.clear();
  PyObject *key, *value;
  for (Py_ssize_t position = 0; PyDict_Next(state.ptr(), &position, &key, &value) != 0;) {
    seen.push_back(key);
    seen.push_back(value);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Binding

class Plan::AtWork {
 public:
  explicit AtWork(Plan& plan) : plan_(plan) {
    if (!plan_.made_) throw std::runtime_error("this plan was made without its constructor");
    if (plan_.at_work_) {
      throw std::runtime_error(
          "this optimizer is being stepped by another thread; give each thread its own, or a lock to wait for");
    }
    plan_.at_work_ = true;
  }
  ~AtWork() { plan_.at_work_ = false; }
  AtWork(const AtWork&) = delete;
  AtWork& operator=(const AtWork&) = delete;

 private:
  Plan& plan_;
};

Plan::Plan(Rule rule, const py::list& params, const std::vector<int>& groups, const py::list& states, int num_aux,
           bool per_tensor, bool master_weights, const cuda::Options& cuda_options)
    : cuda_options_(cuda_options) {
  if (num_aux < 0 || num_aux > kMaxAux) {
    throw py::value_error(std::to_string(num_aux) + " auxiliary gradients; the kernels take up to " +
                          std::to_string(kMaxAux) + " (backend=\"reference\" takes any number)");
  }
  if (static_cast<int>(rule) < 0 || static_cast<int>(rule) >= kRules) throw py::value_error("there is no such rule");
  if (params.empty() || groups.size() != params.size() || states.size() != params.size()) {
    throw py::value_error("a plan needs parameters, and one group and one state dict for each");
  }
  plan_.rule = rule;
  plan_.num_grads = 1 + num_aux;
  plan_.per_tensor = per_tensor;
  plan_.master_weights = master_weights;
  plan_.entries.resize(params.size());
  for (const char* name : moment_names(rule)) moment_names_.emplace_back(name);
  for (size_t i = 0; i < groups.size(); ++i) {
    sources_.emplace_back();
    sources_[i].param = params[i];
    sources_[i].state = states[i];
    if (!PyDict_Check(sources_[i].state.ptr())) throw py::type_error("the state of " + param_name(i) + " is no dict");
    if (groups[i] < 0) throw py::value_error(param_name(i) + " is of a group with a negative number");
    plan_.entries[i].group = groups[i];
    last_group_ = std::max(last_group_, static_cast<size_t>(groups[i]));
  }
  for (size_t i = 0; i < sources_.size(); ++i) {
    if (!bind_param(i, false)) throw py::value_error("the parameters of a plan must be on one device");
  }
  made_ = true;
}

bool Plan::matches(const py::list& params) {
  const AtWork at_work(*this);
  if (params.size() != sources_.size()) return false;
  for (size_t i = 0; i < sources_.size(); ++i) {
    if (PyList_GET_ITEM(params.ptr(), static_cast<Py_ssize_t>(i)) != sources_[i].param.ptr()) return false;
  }
  return true;
}

bool Plan::rebind(const py::list& params) {
  const AtWork at_work(*this);
  if (params.size() != sources_.size()) return false;
  for (size_t i = 0; i < sources_.size(); ++i) sources_[i].param = params[i];
  for (size_t i = 0; i < sources_.size(); ++i) {
    if (!bind_param(i, false)) return false;
  }
  return true;
}

bool Plan::release() {
  const AtWork at_work(*this);
  for (Source& source : sources_) source.param = py::none();
  let_go_of_gradients();
  return device_ && device_->device_type != cuda::device_type();
}

bool Plan::bind_param(size_t i, bool same_object) {
  const auto name = [&] { return param_name(i); };
  Source& source = sources_[i];
  Entry& entry = plan_.entries[i];
  Tensor t = reader().read(source.param.ptr(), name);
  if (!device_) device_ = t.device;
  if (!on_device(t)) return false;
  if (!same_object || source.space == nullptr || entry.param.data != t.view.data) {
    source.negated = reader().is_negated(source.param.ptr());
    t = reader().read(source.param.ptr(), name);  // other threads may have run while PyTorch answered,
    read_again_ = true;                           // and what was read before this may have moved
    if (!on_device(t)) return false;
  }
  if (source.space != nullptr && entry.param.dtype == t.view.dtype && same_layout(source.view(entry), t.view)) {
    if (entry.param.data != t.view.data) {
      reader().require_room(source.param.ptr(), t.view, name);
      entry.param.data = t.view.data;
      ++plan_.revision;
    }
    return true;
  }
  reader().require_room(source.param.ptr(), t.view, name);
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
bool Plan::bind(size_t i, PyObject* tensor, Operand& slot, std::vector<int64_t>& strides, Name&& name) {
  const Source& source = sources_[i];
  const Entry& entry = plan_.entries[i];
  const TensorView param = source.view(entry);
  const Tensor t = reader().read(tensor, name);
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
  reader().require_room(tensor, t.view, name);
  if (strided) {
    strides = scratch_;
    operand.strides = strides.data();
  }
  slot = operand;
  ++plan_.revision;
  return true;
}

void Plan::bind_gradients(const py::object& main, const py::sequence& aux) {
  const AtWork at_work(*this);
  let_go_of_gradients();
  if (aux.size() != static_cast<size_t>(plan_.num_grads - 1)) {
    throw py::value_error("aux_grads holds " + std::to_string(aux.size()) +
                          " sequences of gradients; this plan is for " + std::to_string(plan_.num_grads - 1));
  }
  std::vector<py::tuple> taken{take_gradients(main, 0)};
  for (int k = 1; k < plan_.num_grads; ++k) taken.push_back(take_gradients(aux[k - 1], k));
  grads_.swap(taken);
}

py::tuple Plan::take_gradients(const py::object& grads, int k) {
  auto taken = py::reinterpret_steal<py::tuple>(PySequence_Tuple(grads.ptr()));
  if (!taken) throw py::error_already_set();
  if (taken.size() != sources_.size()) {
    throw py::value_error(gradients_name(k) + " holds " + std::to_string(taken.size()) + " gradients for " +
                          std::to_string(sources_.size()) + " parameters");
  }
  py::list resolved;
  for (size_t i = 0; i < sources_.size(); ++i) {
    PyObject* const gradient = PyTuple_GET_ITEM(taken.ptr(), static_cast<Py_ssize_t>(i));
    if (gradient == Py_None || !reader().is_negated(gradient)) continue;
    if (resolved.empty()) resolved = py::list(taken);
    resolved[i] = py::handle(gradient).attr("resolve_neg")();
  }
  return resolved.empty() ? taken : py::tuple(resolved);
}

void Plan::let_go_of_gradients() {
  grads_.clear();
  states_found_ = false;
}

bool Plan::is_active(size_t i) const {
  for (int k = 0; k < plan_.num_grads; ++k) {
    if (gradient(i, k) != Py_None) return true;
  }
  return false;
}

void Plan::read_params() {
  for (size_t i = 0; i < sources_.size(); ++i) {
    if (!bind_param(i, true)) throw ParametersMoved(param_name(i) + " has been moved to another device");
  }
}

void Plan::read_gradients() {
  if (grads_.empty()) throw std::runtime_error("there are no gradients; call bind_gradients first");
  read_params();
  for (int k = 0; k < plan_.num_grads; ++k) {
    for (size_t i = 0; i < sources_.size(); ++i) {
      Operand& slot = plan_.entries[i].grads[k];
      if (gradient(i, k) == Py_None) {
        if (slot.data != nullptr) ++plan_.revision;
        slot = Operand{};
        continue;
      }
      bind(i, gradient(i, k), slot, sources_[i].grad_strides[k],
           [&] { return gradients_name(k) + "[" + std::to_string(i) + "]"; });
    }
  }
}

std::vector<size_t> Plan::bind_states(const std::vector<Group>& groups) {
  const AtWork at_work(*this);
  bind_groups(groups);
  return look_up_all_states();
}

std::vector<size_t> Plan::look_up_all_states() {
  if (grads_.empty()) throw std::runtime_error("there are no gradients; call bind_gradients first");
  if (plan_.master_weights) read_params();  // by whose types it is known which have a master
  std::vector<size_t> missing;
  for (size_t i = 0; i < sources_.size(); ++i) {
    if (is_active(i) && !look_up_states(i, plan_.num_states(plan_.groups[plan_.entries[i].group]))) {
      missing.push_back(i);
    }
  }
  states_found_ = missing.empty();
  if (!missing.empty()) {  // they are made only for a step that can be done
    read_gradients();
    check_params();
  }
  return missing;
}

void Plan::check_params() {
  for (size_t i = 0; i < sources_.size(); ++i) {
    if (sources_[i].negated) reader().require_plain(sources_[i].param.ptr(), [&] { return param_name(i); });
    if (!sources_[i].space->injective()) throw_shared(param_name(i));
  }
}

// Whether all state tensors of a parameter are there.
bool Plan::look_up_states(size_t i, int moments) {
  Source& source = sources_[i];
  const bool mastered = plan_.has_master(plan_.entries[i]);
  if (moments == 0 && !mastered) return true;
  const int wanted = 2 * moments + (mastered ? 1 : 0);
  if (!source.same_objects(wanted)) {
    if (!find_entry_states(i, moments)) return false;
    source.remember_objects(wanted);
  }
  return true;
}

// Looks the state tensors up by name.
bool Plan::find_entry_states(size_t i, int moments) {
  Source& source = sources_[i];
  source.seen_for = -1;
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

void Plan::read_states() {
  for (size_t i = 0; i < sources_.size(); ++i) {
    if (!is_active(i)) continue;
    Entry& entry = plan_.entries[i];
    const int moments = plan_.num_states(plan_.groups[entry.group]);
    for (int s = 0; s < moments; ++s) bind_state(i, s, entry.states[s]);
    if (plan_.has_master(entry)) bind_state(i, kMaster, entry.master);
    if (moments > 0) bind_step(i);
  }
}

void Plan::bind_state(size_t i, int s, Operand& slot) {
  const auto name = [&] { return state_name(i, s); };
  State& state = sources_[i].states[s];
  if (!state.tensor) throw_missing();
  if (!bind(i, state.tensor.ptr(), slot, state.strides, name)) return;
  // Until all is in order the slot is that of no tensor, so that the next step looks again.
  const Operand found = slot;
  slot = Operand{};
  read_again_ = true;
  reader().require_plain(state.tensor.ptr(), name);
  const Tensor t = reader().read(state.tensor.ptr(), name);
  if (s == kMaster && t.view.dtype != DType::kF32) throw py::type_error(name() + " must be a float32 tensor");
  if (!IndexSpace(t.view).injective()) throw_shared(name());
  slot = found;
}

void Plan::bind_step(size_t i) {
  const auto name = [&] { return step_name(i); };
  if (!sources_[i].step) throw_missing();
  const Tensor t = reader().read(sources_[i].step.ptr(), name);
  float*& slot = plan_.entries[i].step;
  if (t.view.dtype != DType::kF32 || t.view.ndim != 0) {
    throw py::type_error(name() + " must be a float32 tensor of no dimensions");
  }
  check_device(t, name);
  if (slot == t.view.data) return;
  reader().require_room(sources_[i].step.ptr(), t.view, name);
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
  if (last_group_ >= groups.size()) {
    throw py::value_error("a parameter is of group " + std::to_string(last_group_) + ", but there are " +
                          std::to_string(groups.size()) + " groups");
  }
  for (size_t g = 0; g < groups.size(); ++g) {
    Hyper hyper = groups[g].hyper;
    if (groups[g].lr && !groups[g].lr.is_none()) hyper.lr = scalar(groups[g].lr, 1, "lr")[0];
    if (plan_.num_states(hyper) != plan_.num_states(plan_.groups[g])) {
      ++plan_.revision;
      states_found_ = false;  // it was others that were looked for
    }
    plan_.groups[g] = hyper;
  }
}

void Plan::bind_gate(const GateSettings& gate) {
  plan_.gate = gate.config;
  if (!gate.aux_weight || gate.aux_weight.is_none()) {
    if (gate.numbers != plan_.num_grads - 1) {
      throw py::value_error("aux_weight has " + std::to_string(gate.numbers) + " entries for " +
                            std::to_string(plan_.num_grads - 1) + " auxiliary gradients");
    }
    return;
  }
  const std::vector<Scalar> weights = scalar(gate.aux_weight, plan_.num_grads - 1, "aux_weight");
  std::copy(weights.begin(), weights.end(), plan_.gate.aux_weight);
}

std::vector<Scalar> Plan::scalar(const py::object& tensor, int count, const char* name) const {
  const auto name_of = [name] { return std::string(name); };
  reader().require_plain(tensor.ptr(), name_of);
  const Tensor t = reader().read(tensor.ptr(), name_of);
  const bool here = on_device(t);
  if (!here && t.device.device_type != kDLCPU) check_device(t, name_of);
  reader().require_room(tensor.ptr(), t.view, name_of);
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
  const IndexSpace space(t.view);
  std::vector<int64_t> strides;
  if (t.view.dtype != DType::kF64 || space.numel() < count || space.operand(t.view, strides).strides != nullptr) {
    throw py::value_error(std::string(name) + " must hold " + std::to_string(count) +
                          " float64 values, one after another");
  }
  reader().require_room(tensor.ptr(), t.view, name_of);
  return static_cast<double*>(t.view.data);
}

// ---------------------------------------------------------------------------------------------------------------------
// Running

// Where PyTorch was asked something, other threads may have moved what was read before. The first step asks about
// everything, and reads once more.
template <class Read>
void Plan::until_it_stays(Read&& read) {
  for (int attempt = 0; attempt < 8; ++attempt) {
    read_again_ = false;
    read();
    if (!read_again_) return;
  }
  throw std::runtime_error("another thread keeps moving tensors of this optimizer while it is being stepped");
}

// Everything that a step reads and writes. What may have happened since the last step is not known, nor since the
// states were looked up: they are looked up for every step, and read here.
void Plan::read_all(const std::vector<Group>& groups) {
  bind_groups(groups);
  if (!states_found_ && !look_up_all_states().empty()) throw_missing();
  states_found_ = false;
  until_it_stays([&] {
    read_gradients();
    check_params();
    read_states();
  });
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
  const AtWork at_work(*this);
  Scheduler& on = scheduler();
  void* const queue = stream();
  bind_gate(gate);
  const int64_t size = kStatsHeader + plan_.rows() * stats_row_size(plan_.num_grads - 1);
  double* const out = doubles(stats, size, "stats");
  double* const skipped = skipped_steps.is_none() ? nullptr : doubles(skipped_steps, 1, "skipped_steps");
  read_all(groups);
  {
    const py::gil_scoped_release release;
    on.step(plan_, out, skipped, queue);
  }
  let_go_of_gradients();
}

bool Plan::measure(const GateSettings& gate, const py::object& stats) {
  const AtWork at_work(*this);
  Scheduler& on = scheduler();
  bind_gate(gate);
  const int64_t size = kStatsHeader + plan_.rows() * stats_row_size(plan_.num_grads - 1);
  double* const out = doubles(stats, size, "stats");
  until_it_stays([&] { read_gradients(); });
  const py::gil_scoped_release release;
  return on.measure(plan_, out);
}

void Plan::gram(const py::object& out) {
  const AtWork at_work(*this);
  Scheduler& on = scheduler();
  void* const queue = stream();
  double* const values = doubles(out, plan_.rows() * gram_size(plan_.num_grads), "gram");
  until_it_stays([&] { read_gradients(); });
  const py::gil_scoped_release release;
  on.gram(plan_, values, queue);
}

void Plan::update(const std::vector<Group>& groups, const py::object& weights, const py::object& skip) {
  const AtWork at_work(*this);
  Scheduler& on = scheduler();
  void* const queue = stream();
  const double* const values = doubles(weights, plan_.rows() * plan_.num_grads, "weights");
  const double* const flag = doubles(skip, 1, "skip");
  read_all(groups);
  {
    const py::gil_scoped_release release;
    on.update(plan_, values, flag, queue);
  }
  let_go_of_gradients();
}

}  // namespace gradprom
