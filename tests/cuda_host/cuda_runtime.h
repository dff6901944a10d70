// Stands in for the CUDA toolkit's header of this name, so that csrc/cuda compiles as host C++ and its kernels run on a
// machine without a GPU: blocks are operating system threads, the threads of a block are fibers that take turns, and a
// thread gives up its turn only where CUDA would make it wait. Nothing is asynchronous, and there is one device.
// What it shows is the logic of the kernels: who reads and writes what between which barriers. Not the memory model.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define GP_DYNAMIC_SHARED(name) uint4* const name = static_cast<uint4*>(cuda_host::dynamic_shared())
#define GP_STATIC_SHARED(type, name) type& name = *static_cast<type*>(cuda_host::static_shared(sizeof(type)))

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x_) : x(x_) {}
};
struct uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace cuda_host {

// The device.
inline constexpr int kMultiprocessors = 4;
inline constexpr int kSharedBytes = 24 * 1024;

struct Index {
  unsigned grid, block_size, block, thread;
};
Index& here();  // of the fiber whose turn it is
void* dynamic_shared();
void* static_shared(size_t bytes);  // the one variable of this kind that a kernel has
double shuffle_down(double value, unsigned distance);
void block_barrier();
void grid_barrier();

// Runs `kernel` once per thread of the grid and returns when all have finished. A launch that is not cooperative must
// not use the grid barrier, and its blocks run one after the other.
void run(dim3 grid, dim3 block, size_t shared_bytes, bool cooperative, const std::function<void()>& kernel);

// What a device may have that its kernels do not work on; tests/gradprom_ext/broken.py.
enum class Fault {
  kNone,
  kWrongSum,  // a warp's sums leave half of it out
  kNoGrid,    // blocks do not wait for each other, and run one after the other
  kNoBlock,   // the threads of a block do not wait for each other
  kEndless,   // a grid barrier that nobody leaves
};
extern Fault fault;

// A CUDA graph: while one is being captured, launches are not run but remembered, with copies of their arguments.
bool capturing();
void remember(std::function<void()> launch);

}  // namespace cuda_host

struct Coordinate {
  unsigned (*of_this_thread)();
  operator unsigned() const { return of_this_thread(); }
};
struct Coordinates {
  Coordinate x;
};
inline constexpr Coordinates gridDim{{[] { return cuda_host::here().grid; }}};
inline constexpr Coordinates blockDim{{[] { return cuda_host::here().block_size; }}};
inline constexpr Coordinates blockIdx{{[] { return cuda_host::here().block; }}};
inline constexpr Coordinates threadIdx{{[] { return cuda_host::here().thread; }}};
inline void __syncthreads() { cuda_host::block_barrier(); }
inline double __shfl_down_sync(unsigned, double value, unsigned distance) {
  return cuda_host::shuffle_down(value, distance);
}

// ---------------------------------------------------------------------------------------------------------------------
// The part of the runtime that csrc/cuda/step.cu uses

enum cudaError_t { cudaSuccess = 0, cudaErrorCooperativeLaunchTooLarge = 720 };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrCooperativeLaunch,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
using cudaStream_t = void*;
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cuda_host::capturing() ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount            ? cuda_host::kMultiprocessors
           : which == cudaDevAttrMaxSharedMemoryPerBlockOptin ? cuda_host::kSharedBytes
                                                              : 1;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  return attributes->sharedSizeBytes = 1024, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = 1, cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const bool cooperative = config->numAttrs > 0;
  if (cooperative && config->gridDim.x > cuda_host::kMultiprocessors) return cudaErrorCooperativeLaunchTooLarge;
  const auto launch = [kernel, config = *config, cooperative, arguments...] {
    cuda_host::run(config.gridDim, config.blockDim, config.dynamicSmemBytes, cooperative,
                   [&] { kernel(arguments...); });
  };
  if (cuda_host::capturing()) {
    cuda_host::remember(launch);
  } else {
    launch();
  }
  return cudaSuccess;
}
