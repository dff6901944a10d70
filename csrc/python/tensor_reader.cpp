#include "python/tensor_reader.h"

#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>
#include <optional>

namespace gradprom {
namespace {

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

bool is_empty(int ndim, const int64_t* shape) {
  for (int d = 0; d < ndim; ++d) {
    if (shape[d] == 0) return true;
  }
  return false;
}

// An empty tensor has no memory, but it is there: a null pointer would say that it is missing.
void* address(void* data) {
  static char nothing;
  return data != nullptr ? data : &nothing;
}

std::string class_name(PyObject* object) { return py::str(py::type::handle_of(object).attr("__name__")); }

}  // namespace

std::string device_string(DLDevice device) {
  return device.device_type == kDLCPU ? "cpu" : "cuda:" + std::to_string(device.device_id);
}

TensorReader& TensorReader::instance() {
  static TensorReader reader;
  return reader;
}

const TensorReader::Class& TensorReader::meet(PyObject* object) {
  PyTypeObject* const type = Py_TYPE(object);
  const py::handle handle(reinterpret_cast<PyObject*>(type));
  const py::object base = py::module_::import("torch").attr("Tensor");
  Class c{type, nullptr, PyType_IsSubtype(type, reinterpret_cast<PyTypeObject*>(base.ptr())) != 0, false, false};
  c.plain_grad = c.tensor && handle.attr("grad").is(base.attr("grad"));
  const py::object capsule = py::getattr(handle, "__dlpack_c_exchange_api__", py::none());
  // Arrays of other libraries offer the interface too.
  if (c.tensor && exchange_allowed_ && PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api") != 0) {
    const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api->header.version.major == DLPACK_MAJOR_VERSION && api->dltensor_from_py_object_no_sync != nullptr) {
      c.api = api;
    }
  }
  // PyTorch gives every class that does not intercept operations this very function.
  const py::object dispatch = py::getattr(handle, "__torch_dispatch__", py::none());
  c.intercepts = c.tensor && !dispatch.is(base.attr("__torch_dispatch__"));
  Py_INCREF(type);  // kept for the life of the process, so that the address stays this type's
  classes_.push_back(c);
  return classes_.back();
}

bool TensorReader::exchange_allowed() {
  const char* const wanted = std::getenv("GRADPROM_TENSORS");
  return wanted == nullptr || std::strcmp(wanted, "attributes") != 0;
}

TensorReader::Problem TensorReader::read_exchange(const DLPackExchangeAPI& api, PyObject* object, Tensor& out) {
  DLTensor t;
  if (api.dltensor_from_py_object_no_sync(object, &t) != 0) throw py::error_already_set();
  const std::optional<DType> dtype = dtype_of(t.dtype);
  if (!dtype) return Problem::kDtype;
  if (t.data == nullptr && !is_empty(t.ndim, t.shape)) return Problem::kNoMemory;
  out.view = {address(static_cast<char*>(t.data) + t.byte_offset), *dtype, t.ndim, t.shape, t.strides};
  out.device = t.device;
  return Problem::kNone;
}

TensorReader::Problem TensorReader::read_attributes(PyObject* object, Tensor& out) {
  const py::handle tensor(object);
  const std::optional<DType> dtype = dtype_named(py::str(tensor.attr("dtype")));
  if (!dtype) return Problem::kDtype;
  shape_ = tensor.attr("shape").cast<std::vector<int64_t>>();
  strides_ = tensor.attr("stride")().cast<std::vector<int64_t>>();
  const auto data = tensor.attr("data_ptr")().cast<uintptr_t>();
  const int ndim = static_cast<int>(shape_.size());
  if (data == 0 && !is_empty(ndim, shape_.data())) return Problem::kNoMemory;
  out.view = {address(reinterpret_cast<void*>(data)), *dtype, ndim, shape_.data(), strides_.data()};
  const py::object device = tensor.attr("device");
  const bool cpu = py::str(device.attr("type")).equal(py::str("cpu"));
  out.device = {cpu ? kDLCPU : kDLCUDA, cpu ? 0 : device.attr("index").cast<int>()};
  return Problem::kNone;
}

// Descriptors live as long as torch does. Where one is no C function, it is called through Python.
void TensorReader::look_for_methods() {
  looked_for_methods_ = true;
  const py::object tensor = py::module_::import("torch").attr("Tensor");
  const py::object method = tensor.attr("is_neg");
  if (Py_TYPE(method.ptr()) == &PyMethodDescr_Type) {
    PyMethodDef* const definition = reinterpret_cast<PyMethodDescrObject*>(method.ptr())->d_method;
    if (definition->ml_flags == METH_NOARGS) is_neg_ = definition;
  }
  const py::object property = tensor.attr("grad");
  if (Py_TYPE(property.ptr()) == &PyGetSetDescr_Type) {
    grad_ = reinterpret_cast<PyGetSetDescrObject*>(property.ptr())->d_getset;
  }
}

py::object TensorReader::gradient(PyObject* tensor) {
  if (!looked_for_methods_) look_for_methods();
  if (grad_ == nullptr || !class_of(tensor).plain_grad) return py::handle(tensor).attr("grad");
  PyObject* const gradient = grad_->get(tensor, grad_->closure);
  if (gradient == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(gradient);
}

bool TensorReader::is_negated(PyObject* object) {
  if (!looked_for_methods_) look_for_methods();
  const Class c = class_of(object);
  if (!c.tensor || c.intercepts) return false;
  if (is_neg_ == nullptr || c.api == nullptr) return py::handle(object).attr("is_neg")().cast<bool>();
  PyObject* const answer = is_neg_->ml_meth(object, nullptr);
  if (answer == nullptr) throw py::error_already_set();
  const bool negated = answer == Py_True;
  Py_DECREF(answer);
  return negated;
}

bool TensorReader::has_room(PyObject* object, const TensorView& view) {
  if (is_empty(view.ndim, view.shape)) return true;
  int64_t elements = 1;
  for (int64_t d = view.ndim, dense = 1; d-- > 0; dense *= view.shape[d]) {
    elements += (view.shape[d] - 1) * (view.strides != nullptr ? view.strides[d] : dense);
  }
  const auto call = [](py::handle self, const py::str& method) {
    PyObject* const result = PyObject_CallMethodNoArgs(self.ptr(), method.ptr());
    if (result == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
  };
  const py::object storage = call(object, untyped_storage_);
  const auto begin = call(storage, data_ptr_).cast<uintptr_t>();
  const auto end = begin + call(storage, nbytes_).cast<uintptr_t>();
  const auto data = reinterpret_cast<uintptr_t>(view.data);
  return begin <= data && data + static_cast<uintptr_t>(elements * size_of(view.dtype)) <= end;
}

void* TensorReader::current_stream(PyObject* object, DLDevice device) {
  const DLPackExchangeAPI* const api = class_of(object).api;
  void* stream = nullptr;
  if (api != nullptr) {
    if (api->current_work_stream(device.device_type, device.device_id, &stream) != 0) throw py::error_already_set();
    return stream;
  }
  const py::object cuda = py::module_::import("torch.cuda");
  return reinterpret_cast<void*>(cuda.attr("current_stream")(device.device_id).attr("cuda_stream").cast<uintptr_t>());
}

void TensorReader::throw_problem(PyObject* object, const std::string& name, Problem problem) {
  if (problem == Problem::kNoMemory) {
    throw py::type_error(name +
                         " has no memory that could be read: its storage was freed or shrunk, or it never had one");
  }
  throw py::type_error(name + " has dtype " + std::string(py::str(py::getattr(object, "dtype", py::none()))) +
                       "; gradprom_ext works on float32, float64, float16 and bfloat16");
}

void TensorReader::throw_class(PyObject* object, const std::string& name) {
  const Class& c = instance().class_of(object);
  if (!c.tensor) throw py::type_error(name + " is a " + class_name(object) + ", not a tensor");
  throw py::type_error(
      name + " is a " + class_name(object) +
      ", which intercepts every operation and has no memory of its own; the kernels need plain tensors");
}

void TensorReader::throw_negated(const std::string& name) {
  throw py::type_error(name +
                       " is a lazily negated view (is_neg()); what its memory holds are not its values, so give "
                       "it memory of its own: resolve_neg()");
}

}  // namespace gradprom
