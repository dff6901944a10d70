// The scheduler behind cuda_runtime.h, and the CUDA sources themselves, compiled as host C++.
#include "cuda_runtime.h"

#include <ucontext.h>

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace cuda_host {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr unsigned kWarp = 32;

// A barrier for operating system threads.
class Barrier {
 public:
  explicit Barrier(unsigned members) : members_(members) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const unsigned generation = generation_;
    if (++arrived_ == members_) {
      arrived_ = 0;
      ++generation_;
      changed_.notify_all();
    } else {
      changed_.wait(lock, [&] { return generation_ != generation; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  unsigned members_, arrived_ = 0, generation_ = 0;
};

// Where a fiber stands. All that wait at the same kind of point go on together; if the members of a group wait at
// different kinds of points, or some have returned, a real GPU would hang or worse, and so does the program end here.
enum class State { kRunning, kWarp, kBlock, kGrid, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state = State::kRunning;
  double shuffled = 0.0;
#if defined(__SANITIZE_THREAD__)
  void* tsan = __tsan_create_fiber(0);
  ~Fiber() { __tsan_destroy_fiber(tsan); }
#endif
};

struct Block {
  Index index;
  std::vector<Fiber> fibers;
  std::vector<uint4> shared;
  ucontext_t scheduler;
  const std::function<void()>* kernel = nullptr;
  Barrier* grid = nullptr;  // null: not cooperative
#if defined(__SANITIZE_THREAD__)
  void* tsan = nullptr;
#endif
};

thread_local Block* block = nullptr;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "cuda_host: %s (block %u, thread %u)\n", what, block->index.block, block->index.thread);
  std::abort();
}

// ThreadSanitizer sees each fiber as a thread and learns what orders them from these two, so that it finds a missing
// barrier within a block as well as between blocks.
void release([[maybe_unused]] void* what) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(what);
#endif
}
void acquire([[maybe_unused]] void* what) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(what);
#endif
}

void wait_at(State state, void* group) {
  Fiber& fiber = block->fibers[block->index.thread];
  fiber.state = state;
  release(group);
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(block->tsan, __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(&fiber.context, &block->scheduler);
  acquire(group);
}

void fiber_main() {
  (*block->kernel)();
  wait_at(State::kDone, block);
}

// Gives every fiber that can run its turn, until it waits.
void run_ready() {
  for (unsigned t = 0; t < block->fibers.size(); ++t) {
    Fiber& fiber = block->fibers[t];
    if (fiber.state != State::kRunning) continue;
    block->index.thread = t;
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
    swapcontext(&block->scheduler, &fiber.context);
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
void* dynamic_shared() { return block->shared.data(); }
void block_barrier() { wait_at(State::kBlock, block); }

void grid_barrier() {
  if (block->grid == nullptr) fail("a grid barrier outside a cooperative launch");
  release(block->grid);
  wait_at(State::kGrid, block);
  acquire(block->grid);
}

double shuffle_down(double value, unsigned distance) {
  const unsigned thread = block->index.thread;
  const unsigned first = thread / kWarp * kWarp;
  block->fibers[thread].shuffled = value;
  wait_at(State::kWarp, &block->fibers[first]);
  const unsigned source = thread + distance;
  const double result = source < first + kWarp ? block->fibers[source].shuffled : value;
  wait_at(State::kWarp, &block->fibers[first]);  // nobody writes the next value before all have read this one
  return result;
}

void run(dim3 grid, dim3 block_size, size_t shared_bytes, bool cooperative, const std::function<void()>& kernel) {
  Barrier barrier(grid.x);
  const auto run_one = [&](unsigned b) {
    Block mine;
    mine.index = {grid, block_size, b, 0};
    mine.fibers = std::vector<Fiber>(block_size.x);
    // Not zeros: whoever reads what was never written gets NaN.
    mine.shared.assign((shared_bytes + sizeof(uint4) - 1) / sizeof(uint4), {~0u, ~0u, ~0u, ~0u});
    mine.kernel = &kernel;
    mine.grid = cooperative ? &barrier : nullptr;
#if defined(__SANITIZE_THREAD__)
    mine.tsan = __tsan_get_current_fiber();
#endif
    block = &mine;
    for (Fiber& fiber : mine.fibers) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, fiber_main, 0);
    }
    run_block();
    acquire(block);
    block = nullptr;
  };
  if (!cooperative) {
    for (unsigned b = 0; b < grid.x; ++b) run_one(b);
    return;
  }
  std::vector<std::thread> threads;
  for (unsigned b = 0; b < grid.x; ++b) threads.emplace_back(run_one, b);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace cuda_host

#include "cuda/kernel_adam.cu"
#include "cuda/kernel_sgd.cu"
#include "cuda/step.cu"
