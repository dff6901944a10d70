// gradprom_ext._C: takes tensors through DLPack, checks them, calls a scheduler. No PyTorch headers: a tensor is read
// through the exchange API that its class offers (pointer, dtype, shape and strides without a copy, tens of
// nanoseconds), or, where a torch lacks it, through its Python attributes.
#include <dlpack/dlpack.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <deque>
#include <memory>
#include <optional>

#include "cpu/blocks.h"
#include "cpu/step.h"
#include "gradprom/tensor_list.h"
#if defined(GRADPROM_CUDA)
#include "cuda/step.h"
#endif

namespace py = pybind11;

namespace gradprom {
namespace {

#if defined(GRADPROM_CUDA)
// Where the CUDA scheduler finds its tensors; tests/cuda_host runs it on the host.
#if !defined(GRADPROM_CUDA_DEVICE)
#define GRADPROM_CUDA_DEVICE kDLCUDA
#endif
constexpr DLDeviceType kGpu = GRADPROM_CUDA_DEVICE;
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Reading tensors

struct Tensor {
  TensorView view;
  DLDevice device{kDLCPU, 0};
  std::array<std::vector<int64_t>, 2> owned;  // shape and strides where the producer does not lend them
};

std::optional<DType> dtype_of(DLDataType dtype) {
  if (dtype.lanes != 1) return std::nullopt;
  if (dtype.code == kDLFloat && dtype.bits == 32) return DType::kF32;
  if (dtype.code == kDLFloat && dtype.bits == 64) return DType::kF64;
  if (dtype.code == kDLFloat && dtype.bits == 16) return DType::kF16;
  if (dtype.code == kDLBfloat && dtype.bits == 16) return DType::kBF16;
  return std::nullopt;
}

std::optional<DType> dtype_named(const std::string& name) {
  if (name == "torch.float32") return DType::kF32;
  if (name == "torch.float64") return DType::kF64;
  if (name == "torch.float16") return DType::kF16;
  if (name == "torch.bfloat16") return DType::kBF16;
  return std::nullopt;
}

class TensorReader {
 public:
  static TensorReader& instance() {
    static TensorReader reader;
    return reader;
  }

  // `name` is called for the tensor's name only where something is wrong with it.
  template <class Name>
  void read(PyObject* object, Tensor& out, Name&& name) {
    const DLPackExchangeAPI* api = exchange(object);
    if (api == nullptr) return read_attributes(object, out, name);
    DLTensor t;
    if (api->dltensor_from_py_object_no_sync(object, &t) != 0) throw py::error_already_set();
    const auto dtype = dtype_of(t.dtype);
    if (!dtype) throw py::type_error(unsupported(object, name()));
    out.view = {address(static_cast<char*>(t.data) + t.byte_offset), *dtype, t.ndim, t.shape, t.strides};
    out.device = t.device;
  }

  std::string current_path(PyObject* object) { return exchange(object) != nullptr ? "exchange" : "attributes"; }
  void allow_exchange(bool allowed) { allowed_ = allowed; }

  void* current_stream(PyObject* object, DLDevice device) {
    const DLPackExchangeAPI* api = exchange(object);
    void* stream = nullptr;
    if (api != nullptr) {
      if (api->current_work_stream(device.device_type, device.device_id, &stream) != 0) throw py::error_already_set();
      return stream;
    }
    const py::object cuda = py::module_::import("torch.cuda");
    return reinterpret_cast<void*>(cuda.attr("current_stream")(device.device_id).attr("cuda_stream").cast<uintptr_t>());
  }

 private:
  // Cached per Python type: torch.Tensor, torch.nn.Parameter and a user's subclass each carry the attribute.
  const DLPackExchangeAPI* exchange(PyObject* object) {
    if (!allowed_) return nullptr;
    PyTypeObject* const type = Py_TYPE(object);
    for (const auto& [known, api] : types_) {
      if (known == type) return api;
    }
    const DLPackExchangeAPI* api = nullptr;
    const py::object capsule = py::getattr(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__", py::none());
    if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api") != 0) {
      api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
      if (api->header.version.major != DLPACK_MAJOR_VERSION || api->dltensor_from_py_object_no_sync == nullptr) {
        api = nullptr;
      }
    }
    Py_INCREF(type);  // kept for the life of the process, so that the address stays this type's
    types_.emplace_back(type, api);
    return api;
  }

  template <class Name>
  void read_attributes(PyObject* object, Tensor& out, Name&& name) {
    const py::handle tensor(object);
    const auto dtype = dtype_named(py::str(tensor.attr("dtype")));
    if (!dtype) throw py::type_error(unsupported(object, name()));
    out.owned[0] = tensor.attr("shape").cast<std::vector<int64_t>>();
    out.owned[1] = tensor.attr("stride")().cast<std::vector<int64_t>>();
    out.view = {address(reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>())), *dtype,
                static_cast<int>(out.owned[0].size()), out.owned[0].data(), out.owned[1].data()};
    const py::object device = tensor.attr("device");
    const bool cpu = py::str(device.attr("type")).equal(py::str("cpu"));
    out.device = {cpu ? kDLCPU : kDLCUDA, cpu ? 0 : device.attr("index").cast<int>()};
  }

  // An empty tensor has no memory, but it is there: a null pointer would say that it is missing.
  static void* address(void* data) {
    static char nothing;
    return data != nullptr ? data : &nothing;
  }

  static std::string unsupported(PyObject* object, const std::string& name) {
    return name + " has dtype " + std::string(py::str(py::getattr(object, "dtype", py::none()))) +
           "; gradprom_ext works on float32, float64, float16 and bfloat16";
  }

  std::vector<std::pair<PyTypeObject*, const DLPackExchangeAPI*>> types_;
  bool allowed_ = true;
};

bool same_layout(const TensorView& a, const TensorView& b) {
  if (a.ndim != b.ndim) return false;
  const size_t bytes = sizeof(int64_t) * a.ndim;
  return a.strides != nullptr && b.strides != nullptr && std::memcmp(a.shape, b.shape, bytes) == 0 &&
         std::memcmp(a.strides, b.strides, bytes) == 0;
}

bool same_shape(const TensorView& a, const TensorView& b) {
  return a.ndim == b.ndim && std::memcmp(a.shape, b.shape, sizeof(int64_t) * a.ndim) == 0;
}

std::string device_string(DLDevice device) {
  return device.device_type == kDLCPU ? "cpu" : "cuda:" + std::to_string(device.device_id);
}

// ---------------------------------------------------------------------------------------------------------------------
// Settings, with numbers that may be tensors: those are looked at when a plan uses them

struct Group {
  Hyper hyper;
  py::object lr = py::none();  // None: hyper.lr has the number
};

struct GateSettings {
  GateConfig config;
  py::object aux_weight =
      py::none();  // a tensor of one element, or of one for each auxiliary; None: config.aux_weight has them
};

// ---------------------------------------------------------------------------------------------------------------------
// The plan: parameters and optimizer states of one device, read once; gradients, read at every step

class Plan {
 public:
  // `states[i]` is the optimizer's state dict of params[i] (state tensors are looked up in it by name at every step,
  // so that whoever moves or replaces one is noticed), or None for a stateless rule.
  Plan(Rule rule, py::list params, const std::vector<int>& groups, py::list states, int num_aux, bool per_tensor,
       bool master_weights) {
    if (num_aux > kMaxAux) {
      throw py::value_error(std::to_string(num_aux) + " auxiliary gradients; the kernels take up to " +
                            std::to_string(kMaxAux) + " (backend=\"reference\" takes any number)");
    }
    plan_.rule = rule;
    plan_.num_grads = 1 + num_aux;
    plan_.per_tensor = per_tensor;
    plan_.master_weights = master_weights;
    plan_.entries.resize(params.size());
    if (rule == Rule::kSgd) {
      state_names_ = {py::str("momentum_buffer")};
    } else {
      state_names_ = {py::str("exp_avg"), py::str("exp_avg_sq"), py::str("max_exp_avg_sq")};
    }
    for (size_t i = 0; i < params.size(); ++i) {
      members_.emplace_back();
      members_[i].param = params[i];
      if (!states[i].is_none()) members_[i].state = states[i];
      plan_.entries[i].group = groups[i];
    }
    for (size_t i = 0; i < params.size(); ++i) {
      if (!bind_param(i)) throw py::value_error("the parameters of a plan must be on one device");
    }
  }

  // Whether the plan was made for exactly these parameter objects and they are still on its device. Their memory may
  // have moved since (`p.data = ...`, `module.half()`): pointers and layouts are read again here.
  bool matches(const py::list& params) {
    if (params.size() != members_.size()) return false;
    for (size_t i = 0; i < members_.size(); ++i) {
      if (PyList_GET_ITEM(params.ptr(), static_cast<Py_ssize_t>(i)) != members_[i].param.ptr()) return false;
    }
    for (size_t i = 0; i < members_.size(); ++i) {
      if (!bind_param(i)) return false;
    }
    return true;
  }

  // Reads the gradients of this step. Nothing is written before every tensor has been checked.
  void bind_gradients(const py::sequence& main, const py::sequence& aux) {
    bind_gradient_list(main, 0, [](size_t i) { return "main_grads[" + std::to_string(i) + "]"; });
    for (int k = 1; k < plan_.num_grads; ++k) {
      bind_gradient_list(py::reinterpret_borrow<py::sequence>(aux[k - 1]), k, [k](size_t i) {
        return "aux_grads[" + std::to_string(k - 1) + "][" + std::to_string(i) + "]";
      });
    }
  }

  // Looks at everything that is about to be written. Returns the indices of parameters that have a gradient but lack a
  // state tensor their group's rule needs; when those have been made, this is to be called again.
  std::vector<size_t> bind_states(const std::vector<Group>& groups) {
    bind_groups(groups);
    std::vector<size_t> missing;
    for (size_t i = 0; i < members_.size(); ++i) {
      if (!members_[i].space->injective()) {
        throw py::value_error("params[" + std::to_string(i) +
                              "] is a view in which several elements share one memory "
                              "address (an expanded tensor?); it cannot be updated in place, clone it first");
      }
      if (plan_.entries[i].active(plan_.num_grads) && !bind_member_states(i)) missing.push_back(i);
    }
    states_bound_ = missing.empty();
    return missing;
  }

  // Before every use: what may have happened to the states since the last step is not known.
  void require_states(const std::vector<Group>& groups) {
    if (!states_bound_ && !bind_states(groups).empty()) {
      throw std::runtime_error("state tensors are missing; call bind_states first");
    }
    states_bound_ = false;
  }

  void bind_gate(const GateSettings& gate) {
    plan_.gate = gate.config;
    if (gate.aux_weight.is_none()) return;
    const std::vector<Scalar> weights = scalar(gate.aux_weight, plan_.num_grads - 1, "aux_weight");
    std::copy(weights.begin(), weights.end(), plan_.gate.aux_weight);
  }

  StepPlan& step_plan() { return plan_; }

#if defined(GRADPROM_CUDA)
  // The scheduler of the plan's device where that is a GPU, else null.
  cuda::Scheduler* gpu() {
    if (device_->device_type != kGpu) return nullptr;
    if (!gpu_) gpu_ = std::make_unique<cuda::Scheduler>(device_->device_id, allocator());
    return gpu_.get();
  }

  void* stream() const { return reader().current_stream(members_.front().param.ptr(), *device_); }
#endif

  // `tensor` as `count` doubles in the memory of this plan's device.
  double* doubles(const py::object& tensor, int64_t count, const char* name) const {
    Tensor t;
    reader().read(tensor.ptr(), t, [name] { return std::string(name); });
    check_device(t, [name] { return std::string(name); });
    int64_t numel = 1;
    for (int d = 0; d < t.view.ndim; ++d) numel *= t.view.shape[d];
    if (t.view.dtype != DType::kF64 || numel < count) {
      throw py::value_error(std::string(name) + " must hold " + std::to_string(count) + " float64 values");
    }
    return static_cast<double*>(t.view.data);
  }

 private:
  static constexpr int kMasterState = kMaxStates;  // of a Member's state tensors, behind the moments

  struct Member {
    py::object param;
    py::object state;
    py::object step;
    std::array<py::object, kMaxStates + 1> state_tensors;
    // The parameter's layout as last seen, and the index space made from it.
    std::vector<int64_t> shape, strides;
    std::unique_ptr<IndexSpace> space;
    std::vector<int64_t> param_strides;
    std::array<std::vector<int64_t>, kMaxGrads> grad_strides;
    std::array<std::vector<int64_t>, kMaxStates + 1> state_strides;

    // What the state dict held when its tensors were last looked up, key and value in turn, and under which rule.
    std::vector<PyObject*> seen;
    int seen_states = -1;

    PyObject* find(const py::str& name) const { return PyDict_GetItem(state.ptr(), name.ptr()); }

    // Cheaper than looking every name up. The tensors that matter are kept alive, so their addresses are theirs.
    bool same_state(int num_states) const {
      if (num_states != seen_states) return false;
      PyObject *key, *value;
      Py_ssize_t position = 0;
      size_t i = 0;
      for (; PyDict_Next(state.ptr(), &position, &key, &value) != 0; i += 2) {
        if (i >= seen.size() || seen[i] != key || seen[i + 1] != value) return false;
      }
      return i == seen.size();
    }

    void remember_state(int num_states) {
      seen_states = num_states;
      seen.clear();
      PyObject *key, *value;
      for (Py_ssize_t position = 0; PyDict_Next(state.ptr(), &position, &key, &value) != 0;) {
        seen.push_back(key);
        seen.push_back(value);
      }
    }

    TensorView view(const Entry& entry) const {
      return {entry.param.data, entry.param.dtype, static_cast<int>(shape.size()), shape.data(), strides.data()};
    }
  };

  void bind_groups(const std::vector<Group>& groups) {
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

  // Puts an operand in its place. Strides are behind a pointer and may have changed without it.
  void place(Operand& slot, const Operand& operand) {
    if (slot.data != operand.data || slot.dtype != operand.dtype || slot.strides != nullptr ||
        operand.strides != nullptr) {
      ++plan_.revision;
    }
    slot = operand;
  }

  static TensorReader& reader() { return TensorReader::instance(); }

#if defined(GRADPROM_CUDA)
  // Memory from PyTorch: its allocator knows streams and graph captures, and asking it does not wait for the device.
  cuda::Allocate allocator() const {
    return [device = members_.front().param.attr("device")](size_t bytes) {
      const py::gil_scoped_acquire gil;
      const py::module_ torch = py::module_::import("torch");
      py::object tensor =
          torch.attr("empty")(bytes, py::arg("dtype") = torch.attr("uint8"), py::arg("device") = device);
      void* const data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
      return cuda::Memory(data, [tensor = std::move(tensor)](void*) mutable {
        const py::gil_scoped_acquire gil;
        tensor = py::object();
      });
    };
  }

  std::unique_ptr<cuda::Scheduler> gpu_;
#endif

  template <class Name>
  void check_device(const Tensor& t, Name&& name) const {
    if (on_device(t)) return;
    throw py::value_error(name() + " is on " + device_string(t.device) + ", but its parameter is on " +
                          device_string(*device_));
  }

  bool on_device(const Tensor& t) const {
    return t.device.device_type == device_->device_type && t.device.device_id == device_->device_id;
  }

  bool bind_param(size_t i) {
    const auto name = [i] { return "params[" + std::to_string(i) + "]"; };
    Member& m = members_[i];
    Entry& entry = plan_.entries[i];
    Tensor t;
    reader().read(m.param.ptr(), t, name);
    if (!device_) device_ = t.device;
    if (!on_device(t)) return false;
    const bool known = m.space != nullptr && entry.param.dtype == t.view.dtype && same_layout(m.view(entry), t.view);
    if (known) {
      place(entry.param, Operand{t.view.data, t.view.dtype, entry.param.strides});
      return true;
    }
    m.space = std::make_unique<IndexSpace>(t.view);
    m.shape.assign(t.view.shape, t.view.shape + t.view.ndim);
    m.strides.assign(t.view.strides, t.view.strides + (t.view.strides != nullptr ? t.view.ndim : 0));
    if (t.view.strides == nullptr) {
      m.strides.resize(t.view.ndim);
      for (int64_t d = t.view.ndim, s = 1; d-- > 0; s *= t.view.shape[d]) m.strides[d] = s;
    }
    place(entry.param, m.space->operand(t.view, m.param_strides));
    ++plan_.revision;
    entry.numel = m.space->numel();
    entry.ndim = m.space->ndim();
    entry.sizes = m.space->sizes();
    for (auto& state : m.state_tensors) state = py::object();  // their operands belong to the old index space
    entry.master = Operand{};
    m.seen.clear();
    return true;
  }

  template <class Name>
  Operand bind(const Member& m, const Entry& entry, PyObject* object, std::vector<int64_t>& strides, Name&& name) {
    Tensor t;
    reader().read(object, t, name);
    const TensorView param = m.view(entry);
    check_device(t, name);
    if (entry.param.strides == nullptr && same_layout(param, t.view)) return {t.view.data, t.view.dtype, nullptr};
    if (!same_shape(param, t.view)) {
      throw py::value_error(name() + " has shape " + shape_string(t.view) + ", but its parameter has shape " +
                            shape_string(param));
    }
    return m.space->operand(t.view, strides);
  }

  template <class Name>
  void bind_gradient_list(const py::sequence& grads, int k, Name&& name) {
    if (grads.size() != members_.size()) {
      throw py::value_error((k == 0 ? std::string("main_grads") : "aux_grads[" + std::to_string(k - 1) + "]") +
                            " holds " + std::to_string(grads.size()) + " gradients for " +
                            std::to_string(members_.size()) + " parameters");
    }
    for (size_t i = 0; i < members_.size(); ++i) {
      Entry& entry = plan_.entries[i];
      const py::object gradient = grads[i];
      Operand operand;
      if (!gradient.is_none()) {
        operand = bind(members_[i], entry, gradient.ptr(), members_[i].grad_strides[k], [&] { return name(i); });
      }
      place(entry.grads[k], operand);
    }
  }

  // Whether all state tensors of a parameter are there.
  bool bind_member_states(size_t i) {
    Member& m = members_[i];
    Entry& entry = plan_.entries[i];
    const int wanted = plan_.num_states(plan_.groups.at(entry.group));
    if (wanted == 0 && !plan_.has_master(entry)) return true;
    if (m.same_state(wanted)) return true;
    if (plan_.has_master(entry)) {
      if (!bind_state(i, kMasterState, master_name_, entry.master)) return false;
      if (entry.master.dtype != DType::kF32) {
        throw py::type_error("state of params[" + std::to_string(i) + "]['master'] must be a float32 tensor");
      }
    }
    for (int s = 0; s < wanted; ++s) {
      if (!bind_state(i, s, state_names_[s], entry.states[s])) return false;
    }
    if (wanted > 0 && !bind_step(i)) return false;
    m.remember_state(wanted);
    return true;
  }

  bool bind_step(size_t i) {
    Member& m = members_[i];
    PyObject* const step = m.find(step_name_);
    if (step == nullptr) return false;
    if (step == m.step.ptr()) return true;
    Tensor t;
    const auto name = [i] { return "state of params[" + std::to_string(i) + "]['step']"; };
    reader().read(step, t, name);
    if (t.view.dtype != DType::kF32 || t.view.ndim != 0) {
      throw py::type_error(name() + " must be a float32 tensor of no dimensions");
    }
    check_device(t, name);
    m.step = py::reinterpret_borrow<py::object>(step);
    plan_.entries[i].step = static_cast<float*>(t.view.data);
    ++plan_.revision;
    return true;
  }

  bool bind_state(size_t i, int s, const py::str& name, Operand& out) {
    Member& m = members_[i];
    PyObject* const tensor = m.find(name);
    if (tensor == nullptr) return false;
    if (tensor == m.state_tensors[s].ptr()) return true;
    const Operand operand = bind(m, plan_.entries[i], tensor, m.state_strides[s], [&] {
      return "state of params[" + std::to_string(i) + "][" + std::string(py::repr(name)) + "]";
    });
    place(out, operand);
    m.state_tensors[s] = py::reinterpret_borrow<py::object>(tensor);
    return true;
  }

  // `count` numbers from a tensor of so many elements, or of one for all: on this plan's device they are read when the
  // step runs, in host memory they are read now.
  std::vector<Scalar> scalar(const py::object& tensor, int count, const char* name) const {
    Tensor t;
    const auto name_of = [name] { return std::string(name); };
    reader().read(tensor.ptr(), t, name_of);
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

  StepPlan plan_;
  std::deque<Member> members_;
  std::vector<py::str> state_names_;
  bool states_bound_ = false;
  py::str step_name_{"step"};
  py::str master_name_{"master"};
  std::optional<DLDevice> device_;
};

// ---------------------------------------------------------------------------------------------------------------------
// The three calls

// Where the plan's tensors are on a GPU, enqueues the call there and returns. Other Python threads may run meanwhile: a
// launch waits where more work is enqueued already than the driver holds.
#if defined(GRADPROM_CUDA)
#define GP_RETURN_IF_ON_GPU(plan, call)          \
  if (cuda::Scheduler* const gpu = plan.gpu()) { \
    void* const stream = plan.stream();          \
    py::gil_scoped_release release;              \
    return gpu->call;                            \
  }
#else
#define GP_RETURN_IF_ON_GPU(plan, call)
#endif

void step(Plan& plan, const std::vector<Group>& groups, const GateSettings& gate, const py::object& stats,
          const py::object& skipped_steps) {
  plan.require_states(groups);
  plan.bind_gate(gate);
  StepPlan& p = plan.step_plan();
  double* const out = plan.doubles(stats, kStatsHeader + p.rows() * stats_row_size(p.num_grads - 1), "stats");
  double* const skipped = skipped_steps.is_none() ? nullptr : plan.doubles(skipped_steps, 1, "skipped_steps");
  GP_RETURN_IF_ON_GPU(plan, step(p, out, skipped, stream));
  py::gil_scoped_release release;
  cpu::step(p, out, skipped);
}

void gram(Plan& plan, const py::object& out) {
  StepPlan& p = plan.step_plan();
  double* const values = plan.doubles(out, p.rows() * gram_size(p.num_grads), "gram");
  GP_RETURN_IF_ON_GPU(plan, gram(p, values, stream));
  py::gil_scoped_release release;
  cpu::gram(p, values);
}

void update(Plan& plan, const std::vector<Group>& groups, const py::object& weights, const py::object& skip) {
  plan.require_states(groups);
  StepPlan& p = plan.step_plan();
  const double* const values = plan.doubles(weights, p.rows() * p.num_grads, "weights");
  const double* const flag = plan.doubles(skip, 1, "skip");
  GP_RETURN_IF_ON_GPU(plan, update(p, values, flag, stream));
  if (*flag != 0.0) return;
  py::gil_scoped_release release;
  cpu::update(p, values);
}

GateSettings make_gate(Gate gate, double threshold, double max_grad_norm, const py::object& aux_weight) {
  GateSettings settings;
  settings.config.gate = gate;
  settings.config.threshold = threshold;
  settings.config.max_grad_norm = max_grad_norm;
  if (py::isinstance<py::tuple>(aux_weight)) {
    const auto numbers = aux_weight.cast<std::vector<double>>();
    for (size_t k = 0; k < numbers.size() && k < kMaxAux; ++k) settings.config.aux_weight[k].value = numbers[k];
  } else {
    settings.aux_weight = aux_weight;
  }
  return settings;
}

Group make_group(const py::object& lr, double weight_decay, double momentum, double dampening, bool nesterov,
                 double beta1, double beta2, double eps, bool decoupled, bool amsgrad, bool maximize) {
  Group group;
  if (PyFloat_Check(lr.ptr()) != 0) {
    group.hyper.lr.value = PyFloat_AS_DOUBLE(lr.ptr());
  } else {
    group.lr = lr;
  }
  Hyper& h = group.hyper;
  h.weight_decay = weight_decay;
  h.momentum = momentum;
  h.dampening = dampening;
  h.nesterov = nesterov;
  h.beta1 = beta1;
  h.beta2 = beta2;
  h.eps = eps;
  h.decoupled = decoupled;
  h.amsgrad = amsgrad;
  h.maximize = maximize;
  return group;
}

}  // namespace
}  // namespace gradprom

PYBIND11_MODULE(_C, m) {
  using namespace gradprom;
  m.doc() = "Fused GradProm kernels; the Python package gradprom_ext is the interface.";
  m.attr("MAX_AUX") = kMaxAux;
  m.attr("STATS_HEADER") = kStatsHeader;
#if defined(GRADPROM_CUDA)
  m.attr("CUDA_ARCHITECTURES") = GRADPROM_CUDA_ARCHITECTURES;
#else
  m.attr("CUDA_ARCHITECTURES") = "";
#endif
#if defined(GRADPROM_CUDA)
  m.def("cuda_unusable", &cuda::unusable, py::arg("device"),
        "Why the CUDA kernels cannot run on this device; empty where they can.");
  m.def(
      "cuda_configure",
      [](bool cooperative, int max_blocks, int max_shared_bytes) {
        cuda::configure({cooperative, max_blocks, max_shared_bytes});
      },
      py::arg("cooperative") = true, py::arg("max_blocks") = 0, py::arg("max_shared_bytes") = -1,
      "For tests and measurements: one launch per stage, fewer blocks, less shared memory.");
#endif
  m.attr("COMPILER") = GRADPROM_COMPILER;
#if defined(_OPENMP)
  m.attr("OPENMP") = true;
#else
  m.attr("OPENMP") = false;
#endif
  m.def("cpu_isa", [] { return std::string(cpu::isa_name()); });
  m.def(
      "tensor_path", [](py::handle tensor) { return TensorReader::instance().current_path(tensor.ptr()); },
      "How a tensor of this class is read: 'exchange' (DLPack C API) or 'attributes'.");
  m.def(
      "allow_exchange", [](bool allowed) { TensorReader::instance().allow_exchange(allowed); },
      "For tests: False makes every read go through Python attributes.");

  py::enum_<Rule>(m, "Rule").value("sgd", Rule::kSgd).value("adam", Rule::kAdam);
  py::enum_<Gate>(m, "Gate")
      .value("hard", Gate::kHard)
      .value("soft", Gate::kSoft)
      .value("always", Gate::kAlways)
      .value("never", Gate::kNever)
      .value("project", Gate::kProject);

  py::class_<Group>(m, "Group")
      .def(py::init(&make_group), py::kw_only(), py::arg("lr"), py::arg("weight_decay") = 0.0,
           py::arg("momentum") = 0.0, py::arg("dampening") = 0.0, py::arg("nesterov") = false, py::arg("beta1") = 0.9,
           py::arg("beta2") = 0.999, py::arg("eps") = 1e-8, py::arg("decoupled") = false, py::arg("amsgrad") = false,
           py::arg("maximize") = false);
  py::class_<GateSettings>(m, "GateSettings")
      .def(py::init(&make_gate), py::kw_only(), py::arg("gate"), py::arg("threshold"), py::arg("max_grad_norm"),
           py::arg("aux_weight"));
  py::class_<Plan>(m, "Plan")
      .def(py::init<Rule, py::list, const std::vector<int>&, py::list, int, bool, bool>(), py::kw_only(),
           py::arg("rule"), py::arg("params"), py::arg("groups"), py::arg("states"), py::arg("num_aux"),
           py::arg("per_tensor"), py::arg("master_weights"))
      .def("matches", &Plan::matches)
      .def("bind_gradients", &Plan::bind_gradients, py::arg("main"), py::arg("aux"))
      .def("bind_states", &Plan::bind_states, py::arg("groups"))
      .def("step", &step, py::arg("groups"), py::arg("gate"), py::arg("stats"), py::arg("skipped_steps"))
      .def("gram", &gram, py::arg("out"))
      .def("update", &update, py::arg("groups"), py::arg("weights"), py::arg("skip"));
}
