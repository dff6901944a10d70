// An OpenMP runtime of a few lines, for ThreadSanitizer.
//
// GCC's libgomp waits with futexes of its own, which ThreadSanitizer does not see: every barrier would be reported as a
// race, and suppressing those would suppress the races between kernels too. This one forks, joins and meets with the
// C++ library's threads, mutexes and condition variables, all of which it sees. The functions are those that GCC makes
// of `omp parallel`, `barrier` and `single` (https://gcc.gnu.org/onlinedocs/libgomp, "The libgomp ABI").
#include <omp.h>

#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#include "../cuda_host/barrier.h"

namespace {

class Team {
 public:
  explicit Team(unsigned size) : size_(size), barrier_(size) {}

  void meet() { barrier_.wait(); }

  // Whether the caller is the first to come to its `number`-th `single`.
  bool first_at(unsigned number) {
    const std::lock_guard lock(mutex_);
    if (number != singles_) return false;
    ++singles_;
    return true;
  }

  unsigned size() const { return size_; }

 private:
  const unsigned size_;
  Barrier barrier_;
  std::mutex mutex_;
  unsigned singles_ = 0;
};

struct Member {
  Team* team = nullptr;
  unsigned number = 0;
  unsigned singles = 0;
};

thread_local Member me;

}  // namespace

extern "C" {

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  Team team(threads == 0 ? static_cast<unsigned>(omp_get_max_threads()) : threads);
  const Member before = me;
  std::vector<std::thread> others;
  for (unsigned number = 1; number < team.size(); ++number) {
    others.emplace_back([&, number] {
      me = Member{&team, number, 0};
      body(data);
    });
  }
  me = Member{&team, 0, 0};
  body(data);
  for (std::thread& other : others) other.join();
  me = before;
}

void GOMP_barrier() { me.team->meet(); }

bool GOMP_single_start() { return me.team->first_at(me.singles++); }

int omp_get_thread_num() { return static_cast<int>(me.number); }

int omp_get_num_threads() { return me.team != nullptr ? static_cast<int>(me.team->size()) : 1; }

int omp_get_max_threads() {
  const char* const threads = std::getenv("OMP_NUM_THREADS");
  return threads != nullptr ? std::atoi(threads) : 1;
}
}
