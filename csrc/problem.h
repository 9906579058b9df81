// What the operators are asked to compute, for every device: no torch, no ISA.
#pragma once

#include <cstdint>
#include <vector>

// Inline code that per-ISA files share must never be emitted out of line: the linker
// would keep one copy, perhaps the one for an ISA that this machine lacks.
#define IMCL_INLINE inline __attribute__((always_inline))

#if defined(__CUDACC__)
#define IMCL_HOST_DEVICE __host__ __device__
#else
#define IMCL_HOST_DEVICE
#endif

namespace imcl {

enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16 };

// What the gradient of logits is kept in until its factor is known: their own type, but that of
// float16 would underflow where a scaled loss is all that keeps it from doing so.
IMCL_INLINE DType kept_type(DType logits) {
  return logits == DType::kFloat16 ? DType::kFloat32 : logits;
}

// ---- the pairwise cosine penalty ----

enum class Penalty { kSquare, kAbs, kSigned };

constexpr double kCentredDeadRatio = 1e-5;  // imcl_fast/reference.py

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
// kMixture: of a label and the heads, each to the mixture of all.
enum class Divergence { kKl, kReverseKl, kJsd, kMixture };
enum class Reduction { kMean, kSum, kNone };

// Logits beyond this are extreme: they may be masked, overflow when they are summed, or drown
// the other heads in a sum, so that these can't be had back by subtraction.
constexpr int kModerate = 1024;

// What the samples of dense logits are spread over: images, up to four dimensions of their pixels,
// and labels that are each a sample.
constexpr int kMostAxes = 6;

// Strides of the axes of samples.
struct Strides {
  int64_t of[kMostAxes];
};

// The axes of the samples, the last running fastest; one where all tensors' axes collapse.
struct SampleAxes {
  int axes;
  int64_t sizes[kMostAxes];

  IMCL_HOST_DEVICE IMCL_INLINE int64_t offset(int64_t sample, const Strides& strides) const {
    int64_t at = 0;
    for (int axis = axes - 1; axis > 0; --axis) {
      at += sample % sizes[axis] * strides.of[axis];
      sample /= sizes[axis];
    }
    return at + sample * strides.of[0];
  }
};

// One head: its logits (batch, classes), and where the gradient goes (null: nowhere).
struct Head {
  const void* z;
  Strides z_sample;
  int64_t z_class;
  void* dz;  // in its kept_type
  Strides dz_sample;
  int64_t dz_class;
  double ce_weight, kl_weight;
};

// Consecutive heads that teach one another; of a mixture the temperature is 1.
struct Group {
  int64_t first, size;
  double temperature;
  Teacher teacher;
  bool detach;
  Divergence divergence = Divergence::kKl;
  double beta = 0;  // the part of the teacher, or of the label, in what it is mixed to
};

// What the cross entropy is to: class indices, or probabilities, or neither where there is none;
// and weights, or null for 1. All but the indices are in the accumulation type.
struct Labels {
  const int64_t* target;  // (batch,)
  Strides target_sample;
  const void* probabilities;  // (batch, classes)
  Strides probability_sample;
  int64_t probability_class;
  const void* weight;  // (classes,)
  int64_t weight_stride;
  const void* sample_weight;  // (batch,)
  Strides weight_sample;
  double smoothing;
  int64_t ignore_index;

  IMCL_HOST_DEVICE IMCL_INLINE bool any() const { return target || probabilities; }
  // Whether a label is a sum over the classes that no index and smoothing tell.
  IMCL_HOST_DEVICE IMCL_INLINE bool soft() const {
    return probabilities || (target && weight && smoothing > 0);
  }
};

struct Consistency {
  DType dtype;
  int64_t batch, classes;  // batch: of all axes of samples
  bool binary = false;     // of two classes, the logit of the second is 0 and is nowhere
  SampleAxes samples;
  std::vector<Head> heads;
  std::vector<Group> groups;
  Labels labels;
};

}  // namespace imcl
