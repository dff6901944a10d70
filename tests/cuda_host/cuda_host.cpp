// The scheduler behind cuda_runtime.h, and the CUDA sources themselves, compiled as host C++.
#include <ucontext.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "barrier.h"
#include "cuda_runtime.h"

#if defined(__has_feature)  // Clang's way to say it
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#elif defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace cuda_host {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned kWarp = 32;

// Functions that leave on one stack and return on another must be neither merged nor watched.
#define GP_RAW_JUMP __attribute__((noinline, no_sanitize("thread"), no_sanitize("address")))

// Switching with swapcontext asks the kernel for the signal mask every time; the compiler's own jumps do not.
struct Context {
  ucontext_t start;
  void* jump[5];
  bool started = false;
  // What sanitizers want to know of a stack: ThreadSanitizer's name for it; for AddressSanitizer where it lies, and
  // where the frames are that it keeps elsewhere (detect_stack_use_after_return).
  void* fiber = nullptr;
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* frames = nullptr;
};

[[noreturn]] GP_RAW_JUMP void jump_to(Context& to) {
  if (to.started) __builtin_longjmp(to.jump, 1);
  to.started = true;
  setcontext(&to.start);
  std::abort();
}

GP_RAW_JUMP void switch_to(Context& from, Context& to) {
  from.started = true;
  if (__builtin_setjmp(from.jump) == 0) jump_to(to);
}

// Stacks are used again: touching new memory takes longer than most kernels here.
class Stack {
 public:
  Stack() {
    const std::lock_guard<std::mutex> lock(mutex());
    if (!spare().empty()) {
      memory_ = std::move(spare().back());
      spare().pop_back();
#if defined(__SANITIZE_ADDRESS__)
      // The frames that were left without a return are marked there still.
      ASAN_UNPOISON_MEMORY_REGION(memory_.get(), kStackBytes);
#endif
    } else {
      memory_.reset(new char[kStackBytes]);
    }
  }
  ~Stack() {
    if (memory_ == nullptr) return;
    const std::lock_guard<std::mutex> lock(mutex());
    spare().push_back(std::move(memory_));
  }
  Stack(Stack&&) = default;
  char* get() const { return memory_.get(); }

 private:
  static std::mutex& mutex() {
    static std::mutex instance;
    return instance;
  }
  static std::vector<std::unique_ptr<char[]>>& spare() {
    static std::vector<std::unique_ptr<char[]>> instance;
    return instance;
  }
  std::unique_ptr<char[]> memory_;
};

// Where a fiber stands. All that wait at the same kind of point go on together; if the members of a group wait at
// different kinds of points, or some have returned, a real GPU would hang or worse, and so does the program end here.
enum class State { kRunning, kWarp, kBlock, kGrid, kDone };

struct Fiber {
  Context context;
  Stack stack;
  State state = State::kRunning;
  double shuffled[2] = {};  // in turn, so that nobody overwrites a value that others have yet to read
  int shuffles = 0;
#if defined(__SANITIZE_THREAD__)
  Fiber() { context.fiber = __tsan_create_fiber(0); }
  ~Fiber() { __tsan_destroy_fiber(context.fiber); }
#endif
};

// Shared memory of a block, of exactly the bytes that were asked for, so that a sanitizer sees what is beside it. Not
// zeros: whoever reads what was never written gets NaN.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : memory_(std::malloc(bytes), &std::free) {  // aligned for uint4
    if (memory_ == nullptr) throw std::bad_alloc();
    std::memset(memory_.get(), 0xff, bytes);
  }
  void* get() const { return memory_.get(); }

 private:
  std::unique_ptr<void, decltype(&std::free)> memory_;
};

struct Block {
  Index index;
  std::vector<Fiber> fibers;
  SharedMemory dynamic_shared;
  std::unique_ptr<SharedMemory> static_shared = nullptr;  // of the size that the first thread says
  Context scheduler = {};
  const std::function<void()>* kernel = nullptr;
  Barrier* grid = nullptr;  // null: not cooperative
};

thread_local Block* block = nullptr;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "cuda_host: %s (block %u, thread %u)\n", what, block->index.block, block->index.thread);
  std::abort();
}

// Hands the turn over; sanitizers must know, to follow the stacks. The threads of a block are one thread to
// ThreadSanitizer, so it finds what blocks do to each other without a barrier. Who does not come back `leaves`.
GP_RAW_JUMP void switch_from(Context& from, Context& to, [[maybe_unused]] bool leaves = false) {
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.fiber, 0);
#elif defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(leaves ? nullptr : &from.frames, to.bottom, to.bytes);
#endif
  switch_to(from, to);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.frames, nullptr, nullptr);
#endif
}

void wait_at(State state) {
  Fiber& fiber = block->fibers[block->index.thread];
  fiber.state = state;
  switch_from(fiber.context, block->scheduler, state == State::kDone);
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler.bottom, &block->scheduler.bytes);
#endif
  (*block->kernel)();
  wait_at(State::kDone);
}

// Gives every fiber that can run its turn, until it waits. Every other block takes its threads in reverse: who reads
// before a barrier what another thread writes is too early in one of the two orders.
void run_ready() {
  const unsigned threads = static_cast<unsigned>(block->fibers.size());
  for (unsigned i = 0; i < threads; ++i) {
    const unsigned t = block->index.block % 2 == 0 ? i : threads - 1 - i;
    Fiber& fiber = block->fibers[t];
    if (fiber.state != State::kRunning) continue;
    block->index.thread = t;
    switch_from(block->scheduler, fiber.context);
  }
}

bool all(unsigned first, unsigned count, State state) {
  for (unsigned t = first; t < first + count; ++t) {
    if (block->fibers[t].state != state) return false;
  }
  return true;
}

void resume(unsigned first, unsigned count) {
  for (unsigned t = first; t < first + count; ++t) block->fibers[t].state = State::kRunning;
}

void run_block() {
  const unsigned threads = static_cast<unsigned>(block->fibers.size());
  for (;;) {
    run_ready();
    bool moved = false;
    for (unsigned first = 0; first < threads; first += kWarp) {
      if (all(first, kWarp, State::kWarp)) {
        resume(first, kWarp);
        moved = true;
      }
    }
    if (moved) continue;
    if (all(0, threads, State::kDone)) return;
    if (all(0, threads, State::kGrid)) {
      block->grid->wait();
    } else if (!all(0, threads, State::kBlock)) {
      fail("the threads of a block wait for each other at different places");
    }
    resume(0, threads);
  }
}

}  // namespace

Index& here() { return block->index; }
void* dynamic_shared() { return block->dynamic_shared.get(); }
void* static_shared(size_t bytes) {
  if (block->static_shared == nullptr) block->static_shared = std::make_unique<SharedMemory>(bytes);
  return block->static_shared->get();
}
Fault fault = Fault::kNone;

void block_barrier() {
  if (fault != Fault::kNoBlock) wait_at(State::kBlock);
}

void grid_barrier() {
  if (fault == Fault::kNoGrid) return;
  while (fault == Fault::kEndless) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  if (block->grid == nullptr) fail("a grid barrier outside a cooperative launch");
  wait_at(State::kGrid);
}

double shuffle_down(double value, unsigned distance) {
  if (fault == Fault::kWrongSum && distance == kWarp / 2) return 0.0;
  const unsigned thread = block->index.thread;
  const unsigned first = thread / kWarp * kWarp;
  const int turn = block->fibers[thread].shuffles++ % 2;
  block->fibers[thread].shuffled[turn] = value;
  wait_at(State::kWarp);
  const unsigned source = thread + distance;
  return source < first + kWarp ? block->fibers[source].shuffled[turn] : value;
}

void run(dim3 grid, dim3 block_size, size_t shared_bytes, bool cooperative, const std::function<void()>& kernel) {
  Barrier barrier(grid.x);
  const auto run_one = [&](unsigned b) {
    Block mine{{grid.x, block_size.x, b, 0}, std::vector<Fiber>(block_size.x), SharedMemory(shared_bytes)};
    mine.kernel = &kernel;
    mine.grid = cooperative ? &barrier : nullptr;
#if defined(__SANITIZE_THREAD__)
    mine.scheduler.fiber = __tsan_get_current_fiber();
#endif
    block = &mine;
    for (Fiber& fiber : mine.fibers) {
      ucontext_t& start = fiber.context.start;
      getcontext(&start);
      start.uc_stack.ss_sp = fiber.stack.get();
      start.uc_stack.ss_size = kStackBytes;
      start.uc_link = nullptr;
      fiber.context.bottom = fiber.stack.get();
      fiber.context.bytes = kStackBytes;
      makecontext(&start, fiber_main, 0);
    }
    run_block();
    block = nullptr;
  };
  if (!cooperative) {
    for (unsigned b = 0; b < grid.x; ++b) run_one(b);
    return;
  }
  std::vector<std::thread> threads;
  for (unsigned b = 0; b < grid.x; ++b) {
    threads.emplace_back(run_one, b);
    if (fault == Fault::kNoGrid) threads.back().join();
  }
  for (std::thread& thread : threads) {
    if (thread.joinable()) thread.join();
  }
}

namespace {
bool graph_open = false;
std::vector<std::function<void()>> graph;
}  // namespace

bool capturing() { return graph_open; }
void remember(std::function<void()> launch) { graph.push_back(std::move(launch)); }

}  // namespace cuda_host

// For ctypes.
#define GP_EXPORT extern "C" __attribute__((visibility("default")))
GP_EXPORT void cuda_host_begin_capture() {
  cuda_host::graph.clear();
  cuda_host::graph_open = true;
}
GP_EXPORT int cuda_host_end_capture() {
  cuda_host::graph_open = false;
  return static_cast<int>(cuda_host::graph.size());
}
GP_EXPORT void cuda_host_break(int fault) { cuda_host::fault = static_cast<cuda_host::Fault>(fault); }
// Writes one byte of a block's shared memory: what lies beyond it is for tests/sanitizers/planted.py.
GP_EXPORT void cuda_host_write_shared(size_t bytes, size_t at) {
  cuda_host::run(dim3(1), dim3(32), bytes, false, [&] {
    if (threadIdx.x == 31) static_cast<volatile char*>(cuda_host::dynamic_shared())[at] = 1;
  });
}
GP_EXPORT void cuda_host_replay() {
  for (const auto& launch : cuda_host::graph) launch();
}

#include "cuda/kernel_adam.cu"
#include "cuda/kernel_sgd.cu"
#include "cuda/step.cu"
