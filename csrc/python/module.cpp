// gradprom_ext._C: the bindings, and nothing else.
#include <pybind11/stl.h>

#include <stdexcept>

#include "cpu/blocks.h"
#include "python/plan.h"

namespace gradprom {
namespace {

GateSettings make_gate(Gate gate, double threshold, double max_grad_norm, double aux_cap,
                       const py::object& aux_weight) {
  if (static_cast<int>(gate) < 0 || static_cast<int>(gate) >= kGates) throw py::value_error("there is no such gate");
  GateSettings settings;
  settings.config.gate = gate;
  settings.config.threshold = threshold;
  settings.config.max_grad_norm = max_grad_norm;
  settings.config.aux_cap = aux_cap;
  if (py::isinstance<py::tuple>(aux_weight)) {
    const auto numbers = aux_weight.cast<std::vector<double>>();
    settings.numbers = static_cast<int>(numbers.size());
    for (size_t k = 0; k < numbers.size() && k < kMaxAux; ++k) settings.config.aux_weight[k].value = numbers[k];
  } else {
    settings.aux_weight = aux_weight;
  }
  return settings;
}

Group make_group(const py::object& lr, const py::kwargs& rest) {
  Group group;
  if (PyFloat_Check(lr.ptr()) != 0) {
    group.hyper.lr.value = PyFloat_AS_DOUBLE(lr.ptr());
  } else {
    group.lr = lr;
  }
  for (const auto& [key, value] : rest) {
    const auto name = key.cast<std::string>();
#define GP_TAKE_NUMBER(field, initial)        \
  if (name == #field) {                       \
    group.hyper.field = value.cast<double>(); \
    continue;                                 \
  }
#define GP_TAKE_FLAG(field)                 \
  if (name == #field) {                     \
    group.hyper.field = value.cast<bool>(); \
    continue;                               \
  }
    GP_HYPER_NUMBERS(GP_TAKE_NUMBER)
    GP_HYPER_FLAGS(GP_TAKE_FLAG)
#undef GP_TAKE_NUMBER
#undef GP_TAKE_FLAG
    throw py::type_error("Group has no hyper-parameter '" + name + "'");
  }
  return group;
}

// The names of make_group's keyword arguments.
std::vector<std::string> hyper_names() {
  std::vector<std::string> names{"lr"};
#define GP_NAME_NUMBER(field, initial) names.emplace_back(#field);
#define GP_NAME_FLAG(field) names.emplace_back(#field);
  GP_HYPER_NUMBERS(GP_NAME_NUMBER)
  GP_HYPER_FLAGS(GP_NAME_FLAG)
#undef GP_NAME_NUMBER
#undef GP_NAME_FLAG
  return names;
}

// `[p.grad for p in params]`, without a step of the interpreter for each. `grad` may be a property that does anything,
// even to the list.
py::list grads_of(const py::list& params) {
  const py::tuple fixed(params);
  py::list grads(fixed.size());
  for (size_t i = 0; i < fixed.size(); ++i) {
    PyObject* const param = PyTuple_GET_ITEM(fixed.ptr(), static_cast<Py_ssize_t>(i));
    PyList_SET_ITEM(grads.ptr(), static_cast<Py_ssize_t>(i), TensorReader::instance().gradient(param).release().ptr());
  }
  return grads;
}

// Whether two lists hold the same objects.
bool same_objects(const py::list& a, const py::list& b) {
  const Py_ssize_t count = PyList_GET_SIZE(a.ptr());
  if (count != PyList_GET_SIZE(b.ptr())) return false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (PyList_GET_ITEM(a.ptr(), i) != PyList_GET_ITEM(b.ptr(), i)) return false;
  }
  return true;
}

}  // namespace
}  // namespace gradprom

PYBIND11_MODULE(_C, m) {
  using namespace gradprom;
  m.doc() = "Fused GradProm kernels; the Python package gradprom_ext is the interface.";
  m.attr("MAX_AUX") = kMaxAux;
  m.attr("STATS_HEADER") = kStatsHeader;
  m.attr("HYPER_NAMES") = py::tuple(py::cast(hyper_names()));
  m.attr("COMPILER") = GRADPROM_COMPILER;
  m.attr("CUDA_ARCHITECTURES") = cuda::architectures();
#if defined(_OPENMP)
  m.attr("OPENMP") = true;
#else
  m.attr("OPENMP") = false;
#endif
  m.def("cpu_isa", [] { return std::string(cpu::isa_name()); });
  m.def("cuda_unusable", &cuda::unusable, py::arg("device"),
        "Why the CUDA kernels cannot run on this device; empty where they can.");
  m.def(
      "tensor_path", [](py::handle tensor) { return TensorReader::instance().path(tensor.ptr()); }, py::arg("tensor"),
      "How a tensor of this class is read: 'exchange' (DLPack C API) or 'attributes'.");
  m.def("grads_of", &grads_of, py::arg("params"), "[p.grad for p in params]");
  m.def("same_objects", &same_objects, py::arg("a"), py::arg("b"), "Whether two lists hold the same objects.");
  m.def("stats_row_size", &stats_row_size, py::arg("num_aux"), "Numbers that describe the decision on one row.");
  m.def("moment_names", &moment_names, py::arg("rule"), "Names of the moments that a rule may have.");

  py::register_local_exception<ParametersMoved>(m, "ParametersMoved", PyExc_ValueError);
  // Each class is this module's own: the tests load another build of it into the same process.
  const py::module_local own;
  py::enum_<Rule>(m, "Rule", own)
#define GP_VALUE(enumerator, name, type) .value(name, Rule::enumerator)
      GP_RULES(GP_VALUE)
#undef GP_VALUE
          ;
  py::enum_<Gate>(m, "Gate", own)
#define GP_VALUE(name, text) .value(text, Gate::name)
      GP_GATES(GP_VALUE)
#undef GP_VALUE
          ;
  py::class_<cuda::Options>(m, "CudaOptions", own)
      .def(py::init([](bool cooperative, int max_blocks, int max_shared_bytes) {
             return cuda::Options{cooperative, max_blocks, max_shared_bytes};
           }),
           py::kw_only(), py::arg("cooperative") = true, py::arg("max_blocks") = 0, py::arg("max_shared_bytes") = -1,
           "For tests and measurements: one launch per stage, fewer blocks, less shared memory.");
  py::class_<Group>(m, "Group", own).def(py::init(&make_group), py::kw_only(), py::arg("lr"));
  py::class_<GateSettings>(m, "GateSettings", own)
      .def(py::init(&make_gate), py::kw_only(), py::arg("gate"), py::arg("threshold"), py::arg("max_grad_norm"),
           py::arg("aux_cap"), py::arg("aux_weight"));
  py::class_<Plan>(m, "Plan", own)
      .def(py::init<Rule, py::list, const std::vector<int>&, py::list, int, bool, bool, const cuda::Options&>(),
           py::kw_only(), py::arg("rule"), py::arg("params"), py::arg("groups"), py::arg("states"), py::arg("num_aux"),
           py::arg("per_tensor"), py::arg("master_weights"), py::arg("cuda") = cuda::Options{})
      .def("matches", &Plan::matches, py::arg("params"))
      .def("rebind", &Plan::rebind, py::arg("params"))
      .def("release", &Plan::release)
      .def("bind_gradients", &Plan::bind_gradients, py::arg("main"), py::arg("aux"))
      .def("bind_states", &Plan::bind_states, py::arg("groups"))
      .def("step", &Plan::step, py::arg("groups"), py::arg("gate"), py::arg("stats"), py::arg("skipped_steps"))
      .def("measure", &Plan::measure, py::arg("gate"), py::arg("stats"))
      .def("gram", &Plan::gram, py::arg("out"))
      .def("update", &Plan::update, py::arg("groups"), py::arg("weights"), py::arg("skip"));
}
