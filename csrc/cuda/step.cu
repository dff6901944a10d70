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
#include <utility>

#include "cuda/job.h"
#include "cuda/layout.h"
#include "cuda/step.h"

// The DLPack device type of the memory that this works on: kDLCUDA. tests/cuda_host has another.
#if !defined(GRADPROM_CUDA_DEVICE)
#define GRADPROM_CUDA_DEVICE 2
#endif

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

// ---------------------------------------------------------------------------------------------------------------------
// Devices and launches

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

const char* name_of(Rule rule) {
  switch (rule) {
#define GP_CASE(enumerator, name, type) \
  case Rule::enumerator:                \
    return name " step kernel";
    GP_RULES(GP_CASE)
#undef GP_CASE
  }
  return "step kernel";
}

Kernel kernel_of(Rule rule, int num_grads) {
  switch (rule) {
#define GP_CASE(enumerator, name, type) \
  case Rule::enumerator:                \
    return rule_kernel<Rule::enumerator>(num_grads);
    GP_RULES(GP_CASE)
#undef GP_CASE
  }
  return nullptr;
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

struct Request {
  uint32_t stages = 0;
  double* stats = nullptr;
  double* skipped_steps = nullptr;
  double* gram = nullptr;
  const double* given_weights = nullptr;
  const double* skip = nullptr;
};

// What the device holds about a plan.
struct Resident {
  Memory memory;  // lives from step to step, and belongs to
  void* stream = nullptr;
  size_t capacity = 0;
  std::vector<unsigned char> image;  // what its first bytes hold
  // Made from:
  uint64_t revision = 0;
  std::vector<Hyper> further;
  // Everything about the plan that stays the same from step to step.
  Job job{};
  int blocks = 0;
};

class CudaScheduler final : public Scheduler {
 public:
  CudaScheduler(int device, Allocate allocate, const Options& options)
      : device_(device), allocate_(std::move(allocate)), options_(options) {}

  void step(const StepPlan& plan, double* stats, double* skipped_steps, void* stream) override {
    Request request;
    request.stages = kMeasure | kUpdate | (plan.rows() == 1 ? 0u : static_cast<uint32_t>(kRows));
    request.stats = stats;
    request.skipped_steps = skipped_steps;
    run(plan, request, stream);
  }

  void gram(const StepPlan& plan, double* out, void* stream) override {
    Request request;
    request.stages = kMeasure | kRows;
    request.gram = out;
    run(plan, request, stream);
  }

  void update(const StepPlan& plan, const double* weights, const double* skip, void* stream) override {
    Request request;
    request.stages = kMeasure | kUpdate;
    request.given_weights = weights;
    request.skip = skip;
    run(plan, request, stream);
  }

 private:
  void run(const StepPlan& plan, const Request& request, void* stream);
  // What the device holds about the plan, brought up to date.
  Resident& resident(const StepPlan& plan, bool with_states, void* stream);

  int device_;
  Allocate allocate_;
  Options options_;
  Resident residents_[2];  // without and with the parameters and states
};

Resident& CudaScheduler::resident(const StepPlan& plan, bool with_states, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  Resident& r = residents_[with_states ? 1 : 0];
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &capture), "cudaStreamIsCapturing");
  const bool captured = capture != cudaStreamCaptureStatusNone;
  std::vector<Hyper> further = further_groups(plan, with_states);
  if (r.revision == plan.revision && same_bytes(r.further, further) && r.stream == stream_handle && !captured) {
    return r;
  }

  const int n = plan.num_grads;
  const int rows = plan.rows();
  const Limits& limits = limits_of(plan.rule, n, device_);
  const Items entries(plan, with_states);
  const int64_t most = std::max<int64_t>(1, Partition::cost(entries.items) / kGrain);
  r.blocks = static_cast<int>(
      std::min<int64_t>(most, options_.max_blocks > 0 ? std::min(options_.max_blocks, limits.blocks) : limits.blocks));
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
  const size_t prepared_at = outcomes_at + aligned(sizeof(RowOutcome) * rows);
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
  r.job.outcomes = reinterpret_cast<RowOutcome*>(base + outcomes_at);
  r.job.prepared = base + prepared_at;
  r.job.rows = rows;
  return r;
}

void CudaScheduler::run(const StepPlan& plan, const Request& request, void* stream_handle) {
  const DeviceGuard guard(device_);
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const bool updates = (request.stages & kUpdate) != 0;
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
  if (options_.cooperative && limits.cooperative) {
    const int wanted =
        options_.max_shared_bytes >= 0 ? std::min(options_.max_shared_bytes, limits.shared_bytes) : limits.shared_bytes;
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

}  // namespace

int device_type() { return GRADPROM_CUDA_DEVICE; }

const char* architectures() { return GRADPROM_CUDA_ARCHITECTURES; }

std::unique_ptr<Scheduler> make_scheduler(int device, Allocate allocate, const Options& options) {
  return std::make_unique<CudaScheduler>(device, std::move(allocate), options);
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
