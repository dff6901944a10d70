// A plan: the parameters and optimizer states of one device, bound to a scheduler. Everything whose memory may have
// moved since the last step is read again at every step: a Python object stays the same while `.data = ...` gives it
// other memory.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdlib>
#include <deque>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/step.h"
#include "gradprom/scheduler.h"
#include "python/tensor_reader.h"

namespace gradprom {

// Python can make an object of a bound class without its constructor (`Plan.__new__(Plan)`), and pybind11 then gives it
// memory in which anything may stand. Here it is zeros, by which such an object is known.
struct Zeroed {
  static void* operator new(size_t bytes) {
    void* const memory = std::calloc(1, bytes);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
  }
  static void operator delete(void* memory) { std::free(memory); }
};

// A parameter is no longer on the plan's device. Nothing has been written; another plan can take the same step.
struct ParametersMoved : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Settings, with numbers that may be tensors: those are looked at when a plan uses them.
struct Group : Zeroed {
  Hyper hyper;
  py::object lr = py::none();  // None: hyper.lr has the number
};

struct GateSettings : Zeroed {
  GateConfig config;
  int numbers = 0;  // so many are in config.aux_weight
  // A tensor of one element, or of one for each auxiliary; None: config.aux_weight has them.
  py::object aux_weight = py::none();
};

class Plan : public Zeroed {
 public:
  // `states[i]` is the optimizer's state dict of params[i]; state tensors are looked up in it by name.
  Plan(Rule rule, const py::list& params, const std::vector<int>& groups, const py::list& states, int num_aux,
       bool per_tensor, bool master_weights, const cuda::Options& cuda_options);

  // Whether the plan was made for exactly these parameter objects. Nothing of them is read: a step does that.
  bool matches(const py::list& params);

  // Takes these parameters in the place of those it has, or had. Returns false where they are more or fewer, or not on
  // the plan's device; the plan is then of no more use. Only for one without states: those belong to a parameter.
  bool rebind(const py::list& params);

  // Lets go of parameters and gradients, so that a plan which is kept for later keeps no tensor alive. Addresses and
  // layouts stay, and are compared with what the next tensors say. Returns whether this plan may be kept: one with
  // memory on a device would hold that from one stream or graph for another.
  bool release();

  // Takes the gradients of one step, which are kept alive until it is done. Nothing is written before every tensor has
  // been checked.
  void bind_gradients(const py::object& main, const py::sequence& aux);

  // Looks for the states. Returns the indices of parameters that have a gradient but lack a state tensor their group's
  // rule needs; when those have been made, this is to be called again.
  std::vector<size_t> bind_states(const std::vector<Group>& groups);

  // The calls of the scheduler. Each reads where all tensors are, immediately before: between that and the
  // scheduler's work no Python code runs, nor another thread that needs the interpreter. `step` and `update` let go of
  // the gradients; `measure` returns false where it cannot decide without a step.
  void step(const std::vector<Group>& groups, const GateSettings& gate, const py::object& stats,
            const py::object& skipped_steps);
  bool measure(const GateSettings& gate, const py::object& stats);
  void gram(const py::object& out);
  void update(const std::vector<Group>& groups, const py::object& weights, const py::object& skip);

 private:
  // A state tensor, and where in the state dict it comes from.
  struct State {
    py::object tensor;
    std::vector<int64_t> strides;
  };

  // What an entry of the plan is made from. Strides are kept here, behind the pointers of the entry's operands.
  struct Source {
    py::object param;
    py::object state;
    // The parameter's layout as last seen, and the index space made from it.
    std::vector<int64_t> shape, strides;
    std::unique_ptr<IndexSpace> space;
    bool negated = false;  // asked again when the parameter has moved; what is only measured need not be plain
    std::vector<int64_t> param_strides;
    std::array<std::vector<int64_t>, kMaxGrads> grad_strides;
    std::array<State, kMaxStates + 1> states;  // the moments, then the master
    py::object step;
    // Keys and values of the state dict when its tensors were last looked up, in turn, and what was looked for: where
    // they are the same objects, they need not be looked up again (but read again, all of them).
    std::vector<PyObject*> seen;
    int seen_for = -1;

    PyObject* find(const py::str& name) const { return PyDict_GetItem(state.ptr(), name.ptr()); }
    bool same_objects(int wanted) const;
    void remember_objects(int wanted);
    TensorView view(const Entry& entry) const {
      return {entry.param.data, entry.param.dtype, static_cast<int>(shape.size()), shape.data(), strides.data()};
    }
  };

  static constexpr int kMaster = kMaxStates;
  static TensorReader& reader() { return TensorReader::instance(); }

  // Every call has one. While it exists others are refused: the scheduler works without the interpreter's lock, which
  // is also let go of where PyTorch is asked something.
  class AtWork;

  bool bind_param(size_t i, bool same_object);
  py::tuple take_gradients(const py::object& grads, int k);
  void let_go_of_gradients();
  PyObject* gradient(size_t i, int k) const { return PyTuple_GET_ITEM(grads_[k].ptr(), static_cast<Py_ssize_t>(i)); }
  bool is_active(size_t i) const;
  void read_params();
  void read_gradients();
  void check_params();
  std::vector<size_t> look_up_all_states();
  bool look_up_states(size_t i, int moments);
  bool find_entry_states(size_t i, int moments);
  void read_states();
  void bind_state(size_t i, int s, Operand& slot);
  void bind_step(size_t i);
  void bind_groups(const std::vector<Group>& groups);
  void bind_gate(const GateSettings& gate);
  void read_all(const std::vector<Group>& groups);
  template <class Read>
  void until_it_stays(Read&& read);

  // Brings an operand up to date with a tensor of the entry's shape; returns whether anything about it was another.
  template <class Name>
  bool bind(size_t i, PyObject* tensor, Operand& slot, std::vector<int64_t>& strides, Name&& name);
  template <class Name>
  void check_device(const Tensor& t, Name&& name) const;
  bool on_device(const Tensor& t) const;

  std::string param_name(size_t i) const { return "params[" + std::to_string(i) + "]"; }
  std::string state_name(size_t i, int s) const;
  std::string step_name(size_t i) const { return "state of " + param_name(i) + "['step']"; }

  // `count` numbers from a tensor of so many elements, or of one for all: on this plan's device they are read when the
  // step runs, in host memory they are read now.
  std::vector<Scalar> scalar(const py::object& tensor, int count, const char* name) const;

  // `tensor` as `count` doubles in the memory of this plan's device.
  double* doubles(const py::object& tensor, int64_t count, const char* name) const;

  Scheduler& scheduler();
  void* stream() const;
  Allocate allocator() const;

  StepPlan plan_;
  std::deque<Source> sources_;
  std::vector<py::str> moment_names_;
  py::str step_key_{"step"};
  py::str master_key_{"master"};
  // The gradients of this step, lists of one tensor or None per parameter; those that were lazy views have been given
  // memory. Empty where there are none.
  std::vector<py::tuple> grads_;
  std::vector<int64_t> scratch_;
  size_t last_group_ = 0;
  bool states_found_ = false;
  bool read_again_ = false;
  bool at_work_ = false;
  bool made_ = false;  // the constructor has come to its end
  std::optional<DLDevice> device_;
  cuda::Options cuda_options_;
  std::unique_ptr<Scheduler> scheduler_;
};

}  // namespace gradprom
