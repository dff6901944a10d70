// What the host side of the CUDA scheduler and its kernel agree upon: one step as plain data in device memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "gradprom/dtype.h"
#include "gradprom/policy.h"
#include "gradprom/update.h"

namespace gradprom::cuda {

// One block of 512 threads takes a whole multiprocessor: 128 registers per thread for the loads in flight, all of the
// shared memory for gradients, and the fewest blocks that the grid barrier has to wait for.
#if !defined(GRADPROM_CUDA_THREADS)
#define GRADPROM_CUDA_THREADS 512
#endif
inline constexpr int kThreads = GRADPROM_CUDA_THREADS;

// Blocks share a tensor at multiples of this many elements, so that a share of an aligned tensor is aligned too.
inline constexpr int64_t kGrain = 1024;

// How the elements of an entry are reached.
enum class Access : uint8_t {
  kQuads,     // flat, aligned, all of 32 bits: a thread takes 4 consecutive elements, 16 bytes of every tensor
  kOctets,    // flat, aligned, 16-bit tensors among them: 8 consecutive elements, 16 bytes of a 16-bit tensor
  kElements,  // anything else (fp64, misaligned views, strided tensors): one element at a time
};

// A parameter with everything that belongs to it; csrc/gradprom/tensor_list.h's Entry without pointers to the host.
struct Item {
  int64_t numel;
  void* param;                   // what the update reads and writes: the parameter, or its fp32 master;
  void* rounded;                 // then the parameter, which receives the master's rounded values; else null
  const void* grads[kMaxGrads];  // null: absent, a zero
  void* states[kMaxStates];
  float* step;       // null for stateless rules
  int64_t geometry;  // index into Job::geometry, or -1 where every tensor is flat
  int32_t row;       // of the Gram matrix it belongs to
  int32_t group;
  DType param_dtype;
  DType rounded_dtype;
  DType grad_dtypes[kMaxGrads];
  DType state_dtypes[kMaxStates];
  Access access;
  bool wide;  // arithmetic in fp64
  uint8_t num_states;
  uint8_t gradient_bytes;  // of one element in all its gradients
};

// Job::geometry holds, for an item that is not flat: ndim, the sizes, then the strides of every operand, flat ones too.
// Operands are numbered: what is updated, its rounded copy, the gradients, the states.
inline constexpr int kParamOperand = 0;
inline constexpr int kRoundedOperand = 1;
inline constexpr int kGradOperand = 2;
inline constexpr int kStateOperand = kGradOperand + kMaxGrads;
inline constexpr int kOperands = kStateOperand + kMaxStates;

// Block b works on the elements from shares[b] up to shares[b + 1]: a run of items, its ends inside a tensor or not.
struct Share {
  int64_t begin;  // first element within the item
  int32_t item;
  int32_t slot;  // where the block's first partial Gram matrix goes
};

// The rule of an item with its coefficients for this step. Made once per item, because fp64 powers are slow.
template <class F, class D>
union Prepared {
  F single;
  D wide;
};
template <Rule R>
using PreparedOf = Prepared<RuleOf<R, float>, RuleOf<R, double>>;
#define GP_BYTES(enumerator, name, type) sizeof(PreparedOf<Rule::enumerator>),
inline constexpr size_t kPreparedBytes = std::max({GP_RULES(GP_BYTES)});
#undef GP_BYTES

// Parts of a step. A cooperative launch runs several with a grid barrier in between; otherwise each is a launch.
enum Stage : uint32_t {
  kMeasure = 1,  // partial Gram matrices, and the coefficients of the rules
  kRows = 2,     // whole Gram matrices where there are several, or where the caller wants to see them
  kUpdate = 4,
};

// Hyper-parameters travel in the arguments of the kernel, because schedulers change them at every step; those of
// further groups lie in device memory.
inline constexpr int kInlineGroups = 16;

struct Job {
  // Written by the host.
  const Item* items;
  const Share* shares;       // [blocks + 1]
  const int32_t* row_slots;  // [rows + 1]: the slots of row r are row_slots[r] .. row_slots[r + 1]
  const Hyper* further_groups;
  const int64_t* geometry;
  // Written in one stage, read in a later one.
  double* partials;      // [slots][gram_size(N)]
  double* weights;       // [rows][N]
  RowOutcome* outcomes;  // [rows]
  void* prepared;        // one per item
  // Results, and decisions that were taken elsewhere.
  double* stats;
  double* skipped_steps;        // raised by 1 where nothing was updated; may be null
  double* gram;                 // [rows][gram_size(N)], or null: decide
  const double* given_weights;  // [rows][N], or null: decide
  const double* skip;           // with given_weights: not 0 where nothing may be written
  int32_t rows;
  uint32_t stages;
  int32_t on_chip_bytes;  // shared memory for gradients; 0 unless one launch measures and updates
  GateConfig gate;
  Hyper groups[kInlineGroups];
};

// Images of these are compared byte by byte.
#define GP_SIZE_NUMBER(name, value) +sizeof(double)
#define GP_SIZE_FLAG(name) +sizeof(bool)
static_assert(sizeof(Hyper) ==
              sizeof(Scalar) GP_HYPER_NUMBERS(GP_SIZE_NUMBER) GP_HYPER_FLAGS(GP_SIZE_FLAG) + sizeof(uint32_t));
#undef GP_SIZE_NUMBER
#undef GP_SIZE_FLAG
static_assert(sizeof(Share) == sizeof(int64_t) + 2 * sizeof(int32_t));

using Kernel = void (*)(Job);

// The kernel of a rule for `num_grads` gradients. Gram matrices are the same in all.
template <Rule R>
Kernel rule_kernel(int num_grads);
#define GP_DECLARE(enumerator, name, type) \
  template <>                              \
  Kernel rule_kernel<Rule::enumerator>(int num_grads);
GP_RULES(GP_DECLARE)
#undef GP_DECLARE

}  // namespace gradprom::cuda
