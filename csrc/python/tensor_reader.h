// From a Python tensor to plain memory, without PyTorch's headers: through the exchange API that its class offers
// (DLPack: pointer, dtype, shape and strides without a copy, about 50 ns), or, where a torch lacks it, through its
// Python attributes.
#pragma once

#include <dlpack/dlpack.h>
#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "gradprom/tensor_list.h"

namespace gradprom {

namespace py = pybind11;

// Shape and strides are lent: by the tensor, or by the reader until it reads the next one.
struct Tensor {
  TensorView view;
  DLDevice device{kDLCPU, 0};
};

std::string device_string(DLDevice device);

class TensorReader {
 public:
  static TensorReader& instance();

  // `name` is called for the tensor's name only where something is wrong with it.
  //
  // What the memory of a tensor says is not what the tensor says where its negative bit is set (`is_negated`): asking
  // for that takes as long again, so it is a question of its own. Tensors of classes that intercept every operation
  // (fake tensors, DTensor) have no memory that could be read and are refused, and so are those whose memory is gone.
  template <class Name>
  Tensor read(PyObject* object, Name&& name) {
    const Class& c = class_of(object);
    if (!c.tensor || c.intercepts) throw_class(object, name());
    Tensor t;
    const Problem problem = c.api != nullptr ? read_exchange(*c.api, object, t) : read_attributes(object, t);
    if (problem != Problem::kNone) throw_problem(object, name(), problem);
    return t;
  }

  // Whether a tensor is a lazy view of the values opposite to those in its memory (torch.Tensor.is_neg). False for what
  // `read` refuses. PyTorch lets other threads run while it answers.
  bool is_negated(PyObject* object);

  // Refuses a tensor that says it reaches beyond its storage, which has been shrunk under it. It takes as long as
  // reading the tensor twice, and what shrinks a storage also moves it, so that only tensors whose address is new are
  // asked.
  template <class Name>
  void require_room(PyObject* object, const TensorView& view, Name&& name) {
    if (!has_room(object, view)) throw_problem(object, name(), Problem::kNoMemory);
  }

  // `tensor.grad`, as a new reference.
  py::object gradient(PyObject* tensor);

  // Refuses such a tensor, by name.
  template <class Name>
  void require_plain(PyObject* object, Name&& name) {
    if (is_negated(object)) throw_negated(name());
  }

  void* current_stream(PyObject* object, DLDevice device);

  // How tensors of this class are read: "exchange" or "attributes".
  const char* path(PyObject* object) { return class_of(object).api != nullptr ? "exchange" : "attributes"; }

 private:
  // What is known of a Python class: torch.Tensor, torch.nn.Parameter and a user's subclass are asked once each.
  struct Class {
    PyTypeObject* type;
    const DLPackExchangeAPI* api;
    bool tensor;      // of PyTorch
    bool intercepts;  // has a __torch_dispatch__ of its own
    bool plain_grad;  // `grad` is torch.Tensor's
  };
  enum class Problem { kNone, kDtype, kNoMemory };

  const Class& class_of(PyObject* object) {
    PyTypeObject* const type = Py_TYPE(object);
    for (const Class& known : classes_) {
      if (known.type == type) return known;
    }
    return meet(object);
  }
  const Class& meet(PyObject* object);
  static bool exchange_allowed();
  void look_for_methods();
  bool has_room(PyObject* object, const TensorView& view);
  static Problem read_exchange(const DLPackExchangeAPI& api, PyObject* object, Tensor& out);
  Problem read_attributes(PyObject* object, Tensor& out);
  [[noreturn]] static void throw_problem(PyObject* object, const std::string& name, Problem problem);
  [[noreturn]] static void throw_class(PyObject* object, const std::string& name);
  [[noreturn]] static void throw_negated(const std::string& name);

  std::vector<Class> classes_;
  const bool exchange_allowed_ = exchange_allowed();  // GRADPROM_TENSORS=attributes forbids it, for tests
  PyMethodDef* is_neg_ = nullptr;                     // torch.Tensor.is_neg as the C function that it is
  PyGetSetDef* grad_ = nullptr;                       // torch.Tensor.grad, likewise
  py::str untyped_storage_{"untyped_storage"}, data_ptr_{"data_ptr"}, nbytes_{"nbytes"};
  bool looked_for_methods_ = false;
  std::vector<int64_t> shape_, strides_;  // of the last tensor that was read through its attributes
};

}  // namespace gradprom
