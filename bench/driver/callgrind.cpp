// One kernel call for callgrind, which counts the instructions inside measured(). Links the
// kernels of one ISA level and nothing of torch, so that the counts depend on the sources, the
// compiler and its flags only.
//
// Usage: callgrind --list | callgrind CASE
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "consistency.h"
#include "pairwise.h"

namespace imcl {
inline namespace IMCL_ISA {
extern const PairwiseKernels pairwise_kernels;
extern const ConsistencyKernels consistency_kernels;
}  // namespace IMCL_ISA
}  // namespace imcl

extern "C" __attribute__((noinline)) void measured(void (*body)(void*), void* context) {
  body(context);
  __asm__ volatile("");  // no tail call: the counting ends when this returns
}

namespace {

using imcl::DType;

template <class Body>
void count(Body body) {
  measured([](void* context) { (*static_cast<Body*>(context))(); }, &body);
}

void run_serial(int64_t count, void (*body)(int64_t, void*), void* context) {
  for (int64_t i = 0; i < count; ++i) body(i, context);
}
const imcl::Parallel kSerial{1, run_serial};

// Values in [-1, 1), the same everywhere.
class Values {
 public:
  Values(DType dtype, int64_t count) : bytes_(static_cast<std::size_t>(count * size_of(dtype))) {
    for (int64_t i = 0; i < count; ++i) {
      state_ = state_ * 6364136223846793005u + 1442695040888963407u;
      const float value = static_cast<float>(static_cast<int32_t>(state_ >> 32)) * 0x1p-31f;
      char bits[4];
      std::memcpy(bits, &value, 4);
      // A bfloat16 is the upper half of a float.
      if (dtype == DType::kBFloat16)
        std::memcpy(&bytes_[static_cast<std::size_t>(2 * i)], bits + 2, 2);
      else std::memcpy(&bytes_[static_cast<std::size_t>(4 * i)], bits, 4);
    }
  }
  static int64_t size_of(DType dtype) { return dtype == DType::kBFloat16 ? 2 : 4; }
  char* data() { return bytes_.data(); }

 private:
  uint64_t state_ = 1;
  std::vector<char> bytes_;
};

struct PairwiseCase {
  const char* name;
  DType dtype;
  int64_t batch, rows, columns;
  bool center, channels_last;
  imcl::Penalty penalty = imcl::Penalty::kSquare;
};
constexpr PairwiseCase kPairwise[] = {
    {"representation 64 x 1024 float32", DType::kFloat32, 2, 64, 1024, false, false},
    {"representation 64 x 1024 float32 centred", DType::kFloat32, 2, 64, 1024, true, false},
    {"representation 64 x 1024 float32 channels_last", DType::kFloat32, 2, 64, 1024, false, true},
    {"representation 64 x 1024 bfloat16", DType::kBFloat16, 2, 64, 1024, false, false},
    {"representation 512 x 16 float32", DType::kFloat32, 2, 512, 16, false, false},
    {"kernel 256 x 1152 float32", DType::kFloat32, 1, 256, 1152, false, false},
    {"kernel 512 x 64 float32 abs", DType::kFloat32, 1, 512, 64, false, false, imcl::Penalty::kAbs},
};

void run(const PairwiseCase& c, bool backward) {
  const int64_t matrix = c.rows * c.columns;
  const imcl::PairwiseSettings settings{c.penalty, c.center, 1e-12, imcl::Precision::kHighest};
  Values x(c.dtype, c.batch * matrix), dx(c.dtype, c.batch * matrix);
  Values state(DType::kFloat32, c.batch * imcl::state_size(settings, c.rows, c.columns));
  const imcl::Axis batch{matrix, nullptr};
  const imcl::Axis row{c.channels_last ? 1 : c.columns, nullptr};
  const imcl::Axis column{c.channels_last ? c.rows : 1, nullptr};
  const double pairs = static_cast<double>(c.batch * c.rows * (c.rows - 1));
  const std::vector<imcl::Matrices> layers{{c.dtype, c.batch, c.rows, c.columns, x.data(), batch,
                                            row, column, dx.data(), batch, row, column,
                                            state.data(), 1 / pairs}};
  const auto forward = [&] {
    imcl::pairwise_forward(imcl::pairwise_kernels, layers, settings, kSerial);
  };
  forward();  // what is kept from call to call is made now
  if (!backward) return count(forward);
  count([&] { imcl::pairwise_backward(imcl::pairwise_kernels, layers, settings, 1, kSerial); });
}

struct ConsistencyCase {
  const char* name;
  DType dtype;
  int64_t heads, batch, classes;
  imcl::Teacher teacher;
  int64_t pixels = 0;  // dense: images of so many, (images, classes, pixels)
};
constexpr ConsistencyCase kConsistency[] = {
    {"consistency 5 x 8 x 1000 float32", DType::kFloat32, 5, 8, 1000, imcl::Teacher::kOthers},
    {"consistency 5 x 8 x 1000 bfloat16", DType::kBFloat16, 5, 8, 1000, imcl::Teacher::kOthers},
    {"consistency 3 x 64 x 10 float32", DType::kFloat32, 3, 64, 10, imcl::Teacher::kOthers},
    {"consistency 2 x 2 x 32768 float32 pairwise", DType::kFloat32, 2, 2, 32768,
     imcl::Teacher::kPairwise},
    {"consistency 3 x 1024 x 21 float32 dense", DType::kFloat32, 3, 1024, 21,
     imcl::Teacher::kOthers, 512},
};

void run(const ConsistencyCase& c) {
  Values z(c.dtype, c.heads * c.batch * c.classes);
  const DType kept = imcl::kept_type(c.dtype);
  Values dz(kept, c.heads * c.batch * c.classes);
  std::vector<int64_t> target(static_cast<std::size_t>(c.batch));
  for (int64_t b = 0; b < c.batch; ++b) target[static_cast<std::size_t>(b)] = b % c.classes;
  imcl::Consistency problem{};
  problem.dtype = c.dtype;
  problem.batch = c.batch;
  problem.classes = c.classes;
  const int64_t pixels = c.pixels;
  problem.samples = {1, {c.batch}};
  if (pixels) problem.samples = {2, {c.batch / pixels, pixels}};
  problem.groups = {{0, c.heads, 2, c.teacher, true}};
  problem.labels.target = target.data();
  problem.labels.target_sample = pixels ? imcl::Strides{{pixels, 1}} : imcl::Strides{{1}};
  problem.labels.ignore_index = -100;
  for (int64_t h = 0; h < c.heads; ++h) {
    const int64_t first = h * c.batch * c.classes;
    const imcl::Strides strides =
        pixels ? imcl::Strides{{pixels * c.classes, 1}} : imcl::Strides{{c.classes}};
    const int64_t step = pixels ? pixels : 1;
    problem.heads.push_back({z.data() + first * Values::size_of(c.dtype), strides, step,
                             dz.data() + first * Values::size_of(kept), strides, step, 1, 1});
  }
  std::vector<double> terms(static_cast<std::size_t>(2 * c.heads));
  const auto step = [&] {
    imcl::consistency(imcl::consistency_kernels, problem, imcl::Reduction::kMean, nullptr,
                      terms.data(), kSerial);
  };
  step();
  count(step);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string wanted = argc > 1 ? argv[1] : "";
  bool found = wanted == "--list";
  const auto each = [&](const std::string& name, auto body) {
    if (wanted == "--list") std::puts(name.c_str());
    if (wanted != name) return;
    body();
    found = true;
  };
  for (const PairwiseCase& c : kPairwise)
    for (const bool backward : {false, true})
      each(std::string(c.name) + (backward ? ", backward" : ", forward"),
           [&] { run(c, backward); });
  for (const ConsistencyCase& c : kConsistency) each(c.name, [&] { run(c); });
  if (!found) std::fputs("callgrind: no such case; --list prints them\n", stderr);
  return found ? 0 : 2;
}
