// Turns a plan into a Job and launches it.
//
// What a kernel needs to know about the tensors is laid out as one image of bytes in device memory. It travels in the
// arguments of a small kernel, 32 KB at a time, and only when it differs from what is there already: gradients mostly
// come back at the same addresses, so a step in full swing is one launch. Arguments are copied when a kernel is
// enqueued, so there is no pinned memory, no event and no lifetime to look after, and a CUDA graph carries its own
// copy. What changes at every step, as learning rates do, is in the arguments of the step itself.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cuda/job.h"
#include "cuda/step.h"

namespace gradprom::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error that has been reported must not surface again elsewhere
  throw std::runtime_error(std::string("gradprom_ext, ") + what + ": " + cudaGetErrorString(error));
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device) {
      check(cudaSetDevice(device), "cudaSetDevice");
      changed_ = true;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

Options& options() {
  static Options instance;
  return instance;
}

// ---------------------------------------------------------------------------------------------------------------------
// The image

constexpr size_t kAlignment = 16;

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Kernel arguments may be 32,764 bytes since CUDA 12.1 (compute capability 7.0 and later).
constexpr int kPayloadWords = 2046;
struct Payload {
  uint4 words[kPayloadWords];
};

__global__ void upload_kernel(uint4* out, int count, const __grid_constant__ Payload payload) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    out[i] = payload.words[i];
  }
}

// Arrays one after the other, each at its offset.
class Image {
 public:
  template <class T>
  size_t append(const std::vector<T>& values) {
    const size_t offset = bytes_.size();
    bytes_.resize(aligned(offset + values.size() * sizeof(T)));
    if (!values.empty()) std::memcpy(bytes_.data() + offset, values.data(), values.size() * sizeof(T));
    return offset;
  }
  std::vector<unsigned char>& bytes() { return bytes_; }

 private:
  std::vector<unsigned char> bytes_;
};

bool is_vectorisable(const Operand& operand) {
  return operand.strides == nullptr && operand.dtype != DType::kF64 &&
         reinterpret_cast<uintptr_t>(operand.data) % 16 == 0;
}

// The entries of a plan that have gradients, as the kernel sees them.
struct Items {
  std::vector<Item> items;
  std::vector<int64_t> geometry;

  Items(const StepPlan& plan, bool with_states) {
    items.reserve(plan.entries.size());
    for (size_t e = 0; e < plan.entries.size(); ++e) {
      const Entry& entry = plan.entries[e];
      if (entry.active(plan.num_grads)) add(plan, entry, static_cast<int64_t>(e), with_states);
    }
  }

 private:
  void add(const StepPlan& plan, const Entry& entry, int64_t index, bool with_states) {
    Item item;
    std::memset(static_cast<void*>(&item), 0, sizeof item);  // padding too: images are compared byte by byte
    item.numel = entry.numel;
    item.row = static_cast<int32_t>(plan.row_of(index));
    item.group = entry.group;
    item.wide = entry.needs_fp64();
    bool vectors = true;
    bool halves = false;
    bool flat = true;
    const auto see = [&](const Operand& operand) {
      vectors = vectors && is_vectorisable(operand);
      halves = halves || size_of(operand.dtype) == 2;
      flat = flat && operand.strides == nullptr;
    };
    for (int k = 0; k < plan.num_grads; ++k) {
      const Operand& grad = entry.grads[k];
      if (grad.data == nullptr) continue;
      item.grads[k] = grad.data;
      item.grad_dtypes[k] = grad.dtype;
      item.gradient_bytes += static_cast<uint8_t>(size_of(grad.dtype));
      see(grad);
    }
    if (with_states) {
      item.param = entry.updated().data;
      item.param_dtype = entry.updated().dtype;
      see(entry.updated());
      if (entry.master.data != nullptr) {
        item.rounded = entry.param.data;
        item.rounded_dtype = entry.param.dtype;
        see(entry.param);
      }
      item.num_states = static_cast<uint8_t>(plan.num_states(plan.groups[entry.group]));
      if (item.num_states > 0) item.step = entry.step;
      for (int s = 0; s < item.num_states; ++s) {
        item.states[s] = entry.states[s].data;
        item.state_dtypes[s] = entry.states[s].dtype;
        see(entry.states[s]);
      }
    }
    item.access = !vectors || item.wide ? Access::kElements : halves ? Access::kOctets : Access::kQuads;
    item.geometry = flat ? -1 : add_geometry(entry);
    items.push_back(item);
  }

  int64_t add_geometry(const Entry& entry) {
    const auto start = static_cast<int64_t>(geometry.size());
    geometry.push_back(entry.ndim);
    geometry.insert(geometry.end(), entry.sizes, entry.sizes + entry.ndim);
    add_strides(entry, entry.updated());
    add_strides(entry, entry.param);
    for (const Operand& grad : entry.grads) add_strides(entry, grad);
    for (const Operand& state : entry.states) add_strides(entry, state);
    return start;
  }

  void add_strides(const Entry& entry, const Operand& operand) {
    const size_t start = geometry.size();
    geometry.resize(start + entry.ndim);
    int64_t dense = 1;
    for (int d = entry.ndim - 1; d >= 0; --d) {
      geometry[start + d] = operand.strides != nullptr ? operand.strides[d] : dense;
      dense *= entry.sizes[d];
    }
  }
};

// Hyper-parameters that do not fit into the arguments of the kernel.
std::vector<Hyper> further_groups(const StepPlan& plan, bool with_states) {
  if (!with_states || plan.groups.size() <= kInlineGroups) return {};
  return {plan.groups.begin() + kInlineGroups, plan.groups.end()};
}

// Hyper-parameters have no padding.
bool same_bytes(const std::vector<Hyper>& a, const std::vector<Hyper>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(Hyper)) == 0);
}

// Gives every block a share of about the same cost, and every partial Gram matrix a slot. In the order of the slots
// come the rows, and within a row the blocks.
struct Partition {
  std::vector<Share> shares;
  std::vector<int32_t> row_slots;
  int slots = 0;

  // What an item costs beside its elements, in elements: a small tensor is waited for, not streamed.
  static constexpr int64_t kItemCost = 256;

  static int64_t cost(const std::vector<Item>& items) {
    int64_t total = 0;
    for (const Item& item : items) total += item.numel + kItemCost;
    return total;
  }

  Partition(const std::vector<Item>& items, int rows, int blocks) {
    const int64_t total = cost(items);
    shares.reserve(blocks + 1);
    shares.push_back({0, 0, 0});
    int64_t before = 0;  // cost of the items already passed
    for (size_t i = 0; i < items.size(); ++i) {
      while (static_cast<int>(shares.size()) < blocks) {
        const int64_t wanted = total * static_cast<int64_t>(shares.size()) / blocks - before;
        const int64_t begin = wanted > 0 ? (wanted + kGrain - 1) / kGrain * kGrain : 0;
        if (begin >= items[i].numel) break;
        shares.push_back({begin, static_cast<int32_t>(i), 0});
      }
      before += items[i].numel + kItemCost;
    }
    while (static_cast<int>(shares.size()) <= blocks) shares.push_back({0, static_cast<int32_t>(items.size()), 0});
    number_slots(items, rows);
  }

 private:
  void number_slots(const std::vector<Item>& items, int rows) {
    const int blocks = static_cast<int>(shares.size()) - 1;
    row_slots.assign(rows + 1, 0);
    if (rows == 1) {
      for (int b = 0; b < blocks; ++b) shares[b].slot = b;
      row_slots[1] = slots = blocks;
      return;
    }
    for (int b = 0; b < blocks; ++b) {
      shares[b].slot = slots;
      const Share& last = shares[b + 1];
      for (int32_t i = shares[b].item; i < last.item || (i == last.item && last.begin > begin_of(b, i)); ++i) {
        ++row_slots[items[i].row + 1];
        ++slots;
      }
    }
    for (int r = 0; r < rows; ++r) row_slots[r + 1] += row_slots[r];
  }

  int64_t begin_of(int block, int32_t item) const { return item == shares[block].item ? shares[block].begin : 0; }
};

// ---------------------------------------------------------------------------------------------------------------------
// Devices and launches

const char* name_of(Rule rule) { return rule == Rule::kSgd ? "SGD step kernel" : "Adam step kernel"; }

Kernel kernel_of(Rule rule, int num_grads) {
  return rule == Rule::kSgd ? sgd_kernel(num_grads) : adam_kernel(num_grads);
}

// What a kernel can have on a device: asked once, because it takes longer than a launch.
struct Limits {
  int blocks = 0;        // at once
  int shared_bytes = 0;  // for gradients, in each block
  bool cooperative = false;
};

int attribute(cudaDeviceAttr which, int device, const char* name) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), name);
  return value;
}

Limits ask_limits(Rule rule, int num_grads, int device) {
  const Kernel kernel = kernel_of(rule, num_grads);
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), name_of(rule));
  Limits limits;
  limits.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, "shared memory per block") -
                        static_cast<int>(attributes.sharedSizeBytes);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_bytes), name_of(rule));
  int per_multiprocessor = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, kThreads, limits.shared_bytes),
        name_of(rule));
  limits.blocks = per_multiprocessor * attribute(cudaDevAttrMultiProcessorCount, device, "multiprocessor count");
  if (limits.blocks == 0)
    throw std::runtime_error(std::string("gradprom_ext, ") + name_of(rule) + ": does not fit on a multiprocessor");
  limits.cooperative = attribute(cudaDevAttrCooperativeLaunch, device, "cooperative launch") != 0;
  return limits;
}

Limits& limits_of(Rule rule, int num_grads, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<Rule, int, int>, Limits> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(rule, num_grads, device);
  const auto found = known.find(key);
  return found != known.end() ? found->second : known.emplace(key, ask_limits(rule, num_grads, device)).first->second;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int blocks, int threads, size_t shared_bytes, cudaStream_t stream,
                   bool cooperative, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  config.attrs = &together;
  config.numAttrs = cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

void upload(const std::vector<unsigned char>& bytes, void* to, cudaStream_t stream) {
  constexpr int kUploadThreads = 256;
  static thread_local Payload payload;
  for (size_t done = 0; done < bytes.size(); done += sizeof payload) {
    const size_t size = std::min(sizeof payload, bytes.size() - done);
    std::memcpy(&payload, bytes.data() + done, size);
    const int words = static_cast<int>(size / sizeof(uint4));  // images are a multiple of 16 bytes long
    check(launch(upload_kernel, (words + kUploadThreads - 1) / kUploadThreads, kUploadThreads, 0, stream, false,
                 reinterpret_cast<uint4*>(static_cast<char*>(to) + done), words, payload),
          "upload kernel");
  }
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------

struct Scheduler::Request {
  uint32_t stages = 0;
  double* stats = nullptr;
  double* skipped_steps = nullptr;
  double* gram = nullptr;
  const double* given_weights = nullptr;
  const double* skip = nullptr;
};

struct Scheduler::Resident {
  Memory memory;  // lives from step to step, and belongs to
  void* stream = nullptr;
  size_t capacity = 0;
  std::vector<unsigned char> image;  // what its first bytes hold
  // Made from:
  uint64_t revision = 0;
  std::vector<Hyper> further;
  Options options;
  // Everything about the plan that stays the same from step to step.
  Job job{};
  int blocks = 0;
};

Scheduler::Scheduler(int device, Allocate allocate) : device_(device), allocate_(std::move(allocate)) {}
Scheduler::~Scheduler() = default;

void configure(const Options& wanted) { options() = wanted; }

void Scheduler::step(const StepPlan& plan, double* stats, double* skipped_steps, void* stream) {
  Request request;
  request.stages = kMeasure | kUpdate | (plan.rows() == 1 ? 0u : static_cast<uint32_t>(kRows));
  request.stats = stats;
  request.skipped_steps = skipped_steps;
  run(plan, request, stream);
}

void Scheduler::gram(const StepPlan& plan, double* out, void* stream) {
  Request request;
  request.stages = kMeasure | kRows;
  request.gram = out;
  run(plan, request, stream);
}

void Scheduler::update(const StepPlan& plan, const double* weights, const double* skip, void* stream) {
  Request request;
  request.stages = kMeasure | kUpdate;
  request.given_weights = weights;
  request.skip = skip;
  run(plan, request, stream);
}

Scheduler::Resident& Scheduler::resident(const StepPlan& plan, bool with_states, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const Options& opts = options();
  std::unique_ptr<Resident>& slot = residents_[with_states ? 1 : 0];
  if (slot == nullptr) slot = std::make_unique<Resident>();
  Resident& r = *slot;
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &capture), "cudaStreamIsCapturing");
  const bool captured = capture != cudaStreamCaptureStatusNone;
  std::vector<Hyper> further = further_groups(plan, with_states);
  if (r.revision == plan.revision && same_bytes(r.further, further) && r.options == opts && r.stream == stream_handle &&
      !captured) {
    return r;
  }

  const int n = plan.num_grads;
  const int rows = plan.rows();
  const Limits& limits = limits_of(plan.rule, n, device_);
  const Items entries(plan, with_states);
  const int64_t most = std::max<int64_t>(1, Partition::cost(entries.items) / kGrain);
  r.blocks = static_cast<int>(
      std::min<int64_t>(most, opts.max_blocks > 0 ? std::min(opts.max_blocks, limits.blocks) : limits.blocks));
  const Partition partition(entries.items, rows, r.blocks);

  Image image;
  const size_t items_at = image.append(entries.items);
  const size_t shares_at = image.append(partition.shares);
  const size_t row_slots_at = image.append(partition.row_slots);
  const size_t further_at = image.append(further);
  const size_t geometry_at = image.append(entries.geometry);
  const size_t partials_at = image.bytes().size();
  const size_t weights_at = partials_at + aligned(sizeof(double) * partition.slots * gram_size(n));
  const size_t outcomes_at = weights_at + aligned(sizeof(double) * rows * n);
  const size_t prepared_at = outcomes_at + aligned(sizeof(double) * rows * 2);
  const size_t bytes = prepared_at + aligned(kPreparedBytes * entries.items.size());

  // A graph that is being captured gets memory of its own, from the graph's pool: what other steps leave in theirs is
  // not there when the graph is replayed.
  Memory memory;
  if (captured) {
    memory = allocate_(bytes);
    upload(image.bytes(), memory.get(), stream);
    r.revision = 0;
  } else {
    if (r.memory == nullptr || bytes > r.capacity || stream_handle != r.stream) {
      r.memory.reset();
      r.image.clear();
      r.memory = allocate_(bytes);
      r.capacity = bytes;
      r.stream = stream_handle;
    }
    memory = r.memory;
    if (r.image != image.bytes()) {
      r.image.clear();  // unknown, should the upload fail half way
      r.revision = 0;
      upload(image.bytes(), memory.get(), stream);
      r.image.swap(image.bytes());
    }
    r.revision = plan.revision;
    r.further.swap(further);
    r.options = opts;
  }

  char* const base = static_cast<char*>(memory.get());
  r.job = Job{};
  r.job.items = reinterpret_cast<const Item*>(base + items_at);
  r.job.shares = reinterpret_cast<const Share*>(base + shares_at);
  r.job.row_slots = reinterpret_cast<const int32_t*>(base + row_slots_at);
  r.job.further_groups = reinterpret_cast<const Hyper*>(base + further_at);
  r.job.geometry = reinterpret_cast<const int64_t*>(base + geometry_at);
  r.job.partials = reinterpret_cast<double*>(base + partials_at);
  r.job.weights = reinterpret_cast<double*>(base + weights_at);
  r.job.outcomes = reinterpret_cast<double*>(base + outcomes_at);
  r.job.prepared = base + prepared_at;
  r.job.rows = rows;
  return r;
}

void Scheduler::run(const StepPlan& plan, const Request& request, void* stream_handle) {
  const DeviceGuard guard(device_);
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const bool updates = (request.stages & kUpdate) != 0;
  const Options& opts = options();
  Limits& limits = limits_of(plan.rule, plan.num_grads, device_);
  Resident& r = resident(plan, updates, stream_handle);

  Job& job = r.job;
  job.stats = request.stats;
  job.skipped_steps = request.skipped_steps;
  job.gram = request.gram;
  job.given_weights = request.given_weights;
  job.skip = request.skip;
  job.gate = plan.gate;
  if (updates) {
    std::copy_n(plan.groups.begin(), std::min<size_t>(plan.groups.size(), kInlineGroups), job.groups);
  }

  const Kernel kernel = kernel_of(plan.rule, plan.num_grads);
  if (opts.cooperative && limits.cooperative) {
    const int wanted =
        opts.max_shared_bytes >= 0 ? std::min(opts.max_shared_bytes, limits.shared_bytes) : limits.shared_bytes;
    job.stages = request.stages;
    job.on_chip_bytes = updates && request.given_weights == nullptr ? wanted : 0;
    const cudaError_t error = launch(kernel, r.blocks, kThreads, job.on_chip_bytes, stream, true, job);
    if (error != cudaErrorCooperativeLaunchTooLarge) {
      check(error, name_of(plan.rule));
      return;
    }
    cudaGetLastError();
    limits.cooperative = false;  // the process may use only a part of the device (MPS, green contexts)
  }
  job.on_chip_bytes = 0;
  for (const uint32_t stage : {kMeasure, kRows, kUpdate}) {
    job.stages = request.stages & stage;
    if (job.stages != 0) check(launch(kernel, r.blocks, kThreads, 0, stream, false, job), name_of(plan.rule));
  }
}

std::string unusable(int device) {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "there is no NVIDIA driver";
  if (driver < 12010) return "the NVIDIA driver is older than CUDA 12.1 (driver 530)";
  try {
    const DeviceGuard guard(device);
    limits_of(Rule::kSgd, 1, device);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

}  // namespace gradprom::cuda
