// The CPU scheduler: how the maths of csrc/gradprom walks over host memory.
#pragma once

#include "gradprom/scheduler.h"

namespace gradprom::cpu {

std::unique_ptr<Scheduler> make_scheduler();

}  // namespace gradprom::cpu
