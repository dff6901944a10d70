// How a block walks over its share of the model, and which gradients it keeps on chip.
#pragma once

#include "cuda/reduce.cuh"

namespace gradprom::cuda {
namespace {

// A block's run of items, cut into one segment per item.
struct Walk {
  Share first, last;

  GP_DEVICE explicit Walk(const Job& job) : first(job.shares[blockIdx.x]), last(job.shares[blockIdx.x + 1]) {}

  GP_DEVICE int count() const {
    return last.item - first.item + (last.begin > (last.item == first.item ? first.begin : 0) ? 1 : 0);
  }
  GP_DEVICE int item(int segment) const { return first.item + segment; }
  GP_DEVICE int64_t begin(int segment) const { return segment == 0 ? first.begin : 0; }
  GP_DEVICE int64_t end(int segment, const Item& item) const {
    return first.item + segment == last.item ? last.begin : item.numel;
  }
  // Exactly one block begins an item: it looks after what exists once per item.
  GP_DEVICE bool owns(int segment) const { return begin(segment) == 0; }
};

// Gives small tensors different warps of the block, so that they are waited for side by side and not in turn.
class Rotation {
 public:
  // This thread's number among those that work on the segment.
  GP_DEVICE int next(int64_t elements, Access access) {
    const int thread = (threadIdx.x + kThreads - shift_) % kThreads;
    const int64_t each = access == Access::kQuads ? 4 : access == Access::kOctets ? 8 : 1;
    const int64_t threads = (elements + each - 1) / each;
    const int warps = threads < kThreads ? static_cast<int>((threads + 31) / 32) : 0;  // 0: all of them, a full turn
    shift_ = (shift_ + 32 * warps) % kThreads;
    return thread;
  }

 private:
  int shift_ = 0;
};

// Which gradients lie in shared memory: the first of the block's share, up to its capacity. A segment's gradients
// follow each other there, each in the order of its elements. Phase 1 pushes segments, phase 2 pops them backwards.
class OnChip {
 public:
  struct Span {
    int offset;    // bytes
    int64_t kept;  // elements, counted from the segment's first
  };

  GP_DEVICE explicit OnChip(int capacity) : capacity_(capacity) {}

  GP_DEVICE Span push(int segment, int64_t elements, int bytes) {
    if (segment == whole_) {
      const int room = (capacity_ - used_) / bytes;
      if (elements <= room) {
        ++whole_;
      } else {
        cut_ = room - room % 8;
      }
    }
    const Span span{used_, kept(segment, elements)};
    used_ += static_cast<int>(span.kept) * bytes;
    return span;
  }

  GP_DEVICE Span pop(int segment, int64_t elements, int bytes) {
    const int64_t n = kept(segment, elements);
    used_ -= static_cast<int>(n) * bytes;
    return {used_, n};
  }

 private:
  GP_DEVICE int64_t kept(int segment, int64_t elements) const {
    return segment < whole_ ? elements : segment == whole_ ? cut_ : 0;
  }

  int capacity_;
  int used_ = 0;
  int whole_ = 0;  // so many segments are kept whole,
  int cut_ = 0;    // and so many elements of the next one
};

}  // namespace
}  // namespace gradprom::cuda
