// What the operators are asked to compute, for every device: no torch, no ISA.
#pragma once

#include <cstdint>
#include <vector>

// Inline code that per-ISA files share must never be emitted out of line: the linker
// would keep one copy, perhaps the one for an ISA that this machine lacks.
#define IMCL_INLINE inline __attribute__((always_inline))

namespace imcl {

enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16 };

// ---- the pairwise cosine penalty ----

enum class Penalty { kSquare, kAbs, kSigned };

// torch.set_float32_matmul_precision; kMedium lets float32 be rounded to bfloat16.
enum class Precision { kHighest, kHigh, kMedium };

struct PairwiseSettings {
  Penalty penalty;
  bool center;
  double eps;
  Precision precision;
};

// Which form of the algebra a matrix takes; see csrc/cpu/pairwise_kernels.cpp.
enum class Form { kPrimal, kDual, kSigned };

IMCL_INLINE Form form_of(Penalty penalty, int64_t rows, int64_t columns) {
  if (penalty == Penalty::kSigned) return Form::kSigned;
  return penalty == Penalty::kSquare && 2 * columns <= rows ? Form::kDual : Form::kPrimal;
}

// ---- collaborative consistency ----

enum class Teacher { kOthers, kMean, kFinal, kPairwise };
enum class Reduction { kMean, kSum, kNone };

// One head: its logits (batch, classes), and where the gradient goes (null: nowhere).
struct Head {
  const void* z;
  int64_t z_row, z_class;  // strides
  void* dz;                // in the accumulation type
  int64_t dz_row, dz_class;
  double ce_weight, kl_weight;
};

// Consecutive heads that teach one another.
struct Group {
  int64_t first, size;
  double temperature;
  Teacher teacher;
  bool detach;
};

struct Consistency {
  DType dtype;
  int64_t batch, classes;
  std::vector<Head> heads;
  std::vector<Group> groups;
  const int64_t* target;  // (batch,), or null: no cross entropy
  int64_t target_stride;
  double label_smoothing;
  int64_t ignore_index;
};

}  // namespace imcl
