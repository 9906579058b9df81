// Runs every CPU kernel, at every ISA level this CPU has, over a fixed sweep of shapes,
// strides and dtypes: what the sanitizers watch, and a test by itself.
//
// The cases, and the plain loops in double that judge the results, are those of cases.h.
//
// Compiled with -DONLY_SCRATCH this file stands in for csrc/cpu/scratch.cpp: each piece of
// working memory becomes an allocation of its own, filled with a NaN. There the pieces lie side
// by side in chunks, where nothing notices one running into the next, or yesterday's values.
//
// Usage: kernels [every n-th case [an ISA level]]
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "scratch.h"

#if defined(ONLY_SCRATCH)

namespace imcl {
namespace {

std::vector<void*>& pieces() {
  thread_local std::vector<void*> mine;
  return mine;
}

}  // namespace

Scratch::Scratch() : slab_(pieces().size()), used_(0) {}

Scratch::~Scratch() {
  while (pieces().size() > slab_) {
    std::free(pieces().back());
    pieces().pop_back();
  }
}

void* Scratch::take(std::size_t bytes) {
  void* piece = nullptr;
  if (posix_memalign(&piece, 64, bytes)) std::abort();
  std::memset(piece, 0xff, bytes);  // a NaN in each dtype, and no index or pointer either
  pieces().push_back(piece);
  used_ += bytes;
  return piece;
}

}  // namespace imcl

#else

#include "cases.h"
#include "dispatch.h"
#include "isa.h"

using imcl::Parallel;

namespace {

struct Level {
  const char* name;
  imcl::Kernels kernels;
};

void run_serial(int64_t count, void (*body)(int64_t, void*), void* context) {
  for (int64_t i = 0; i < count; ++i) body(i, context);
}

void run_on_two_threads(int64_t count, void (*body)(int64_t, void*), void* context) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i; (i = next.fetch_add(1)) < count;) body(i, context);
  };
  std::thread other(work);
  work();
  other.join();
}

const Parallel kSerial{1, run_serial}, kThreads{2, run_on_two_threads};

// ---- The pairwise penalty --------------------------------------------------------------

// One run over the tensors of a case.
struct Run {
  std::vector<imcl::Matrices> matrices;
  std::vector<Buffer> state, dx;
  double loss = 0;

  Run(DType dtype, const std::vector<std::unique_ptr<Tensor> >& tensors,
      const imcl::PairwiseSettings& settings) {
    for (const auto& t : tensors) {
      const Shape& s = t->shape;
      state.emplace_back(acc_of(dtype), s.batch * imcl::state_size(settings, s.rows, s.columns));
      dx.emplace_back(dtype, t->out.reach);
      matrices.push_back({dtype, s.batch, s.rows, s.columns, t->x.data(), t->in.batch, t->in.row,
                          t->in.column, dx.back().data(), t->out.batch, t->out.row, t->out.column,
                          state.back().data(), t->scale});
    }
  }
};

void pairwise_case(Tally& tally, const Level& level, DType dtype,
                   const std::vector<std::unique_ptr<Tensor> >& tensors,
                   const imcl::PairwiseSettings& settings, double grad) {
  const imcl::PairwiseKernels& kernels = *level.kernels.pairwise;
  Run serial(dtype, tensors, settings);
  serial.loss = imcl::pairwise_forward(kernels, serial.matrices, settings, kSerial);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const int64_t size = serial.state[i].bytes() / bytes_of(acc_of(dtype));
    check_written("state", serial.state[i], size, [&](auto cover) {
      for (int64_t at = 0; at < size; ++at) cover(at);
    });
  }
  const auto kept = [&] {
    std::vector<Buffer> copies;
    for (const Buffer& s : serial.state) copies.push_back(s.copy());
    return copies;
  }();
  imcl::pairwise_backward(kernels, serial.matrices, settings, grad, kSerial);

  // What rounds its factors to bfloat16 may err that much more, in gradients and in losses.
  const bool rounds = dtype == DType::kBFloat16 || settings.precision == Precision::kMedium;
  const double unit = rounds ? 0x1p-8 : unit_of(acc_of(dtype));
  double loss = 0, bound = 0;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = *tensors[i];
    loss += t.loss;
    bound += t.loss_bound;
    if (!serial.state[i].same_bits(kept[i])) fail("backward wrote the state of tensor %zu", i);
    t.check(tally, serial.dx[i], dtype, unit);
  }
  compare(tally, "loss", 0, serial.loss, loss, 16 * unit * bound);
  tally.hash(&serial.loss, sizeof serial.loss);
  for (const Buffer& dx : serial.dx) tally.hash(dx.data(), dx.bytes());

  // However the work is shared out, the bits are the same: by schedule(), and by the kernels
  // themselves, which schedule() leaves to one thread where a matrix is small.
  for (const bool by_schedule : {true, false}) {
    Run other(dtype, tensors, settings);
    if (by_schedule) {
      other.loss = imcl::pairwise_forward(kernels, other.matrices, settings, kThreads);
      imcl::pairwise_backward(kernels, other.matrices, settings, grad, kThreads);
    } else {
      for (const imcl::Matrices& m : other.matrices)
        for (int64_t b = 0; b < m.batch; ++b) {
          other.loss += kernels.forward(m, b, settings, kThreads);
          kernels.backward(m, b, settings, grad, kThreads);
        }
    }
    if (other.loss != serial.loss) fail("the loss depends on the threads");
    for (std::size_t i = 0; i < tensors.size(); ++i)
      if (!other.state[i].same_bits(serial.state[i]) || !other.dx[i].same_bits(serial.dx[i]))
        fail("tensor %zu: state or gradient depend on the threads", i);
  }
  std::vector<imcl::Matrices> stateless = serial.matrices;
  for (imcl::Matrices& m : stateless) m.state = m.dx = nullptr;
  // The compiler may have contracted other products into additions here: no equal bits.
  compare(tally, "loss without state", 0,
          imcl::pairwise_forward(kernels, stateless, settings, kThreads), loss, 16 * unit * bound);
  ++tally.cases;
}

// ---- Grams of samples ------------------------------------------------------------------

// One run over the tensors of a case, whose rows are the samples.
struct GramRun {
  std::vector<imcl::Representation> samples;
  std::vector<Buffer> means, grams, dx;

  GramRun(DType dtype, const std::vector<std::unique_ptr<Tensor> >& tensors) {
    for (const auto& t : tensors) {
      const Shape& s = t->shape;
      means.emplace_back(acc_of(dtype), s.columns);
      grams.emplace_back(acc_of(dtype), s.rows * s.rows);
      dx.emplace_back(dtype, t->out.reach);
      samples.push_back(
          {{dtype, 1, s.rows, s.columns, t->x.data(), t->in.batch, t->in.row, t->in.column,
            dx.back().data(), t->out.batch, t->out.row, t->out.column, nullptr, t->scale},
           means.back().data(),
           grams.back().data()});
    }
  }

  // Puts S where the Grams were.
  void replace(const std::vector<Buffer>& symmetric) {
    for (std::size_t i = 0; i < samples.size(); ++i) samples[i].gram = symmetric[i].data();
  }
};

void gram_case(Tally& tally, const Level& level, DType dtype,
               const std::vector<std::unique_ptr<Tensor> >& tensors, Random& random) {
  const imcl::DependenceKernels& kernels = *level.kernels.dependence;
  GramRun serial(dtype, tensors);
  imcl::gram_forward(kernels, serial.samples, kSerial);
  std::vector<Buffer> symmetric;
  for (const auto& t : tensors) {
    const int64_t n = t->shape.rows;
    fill_symmetric(symmetric.emplace_back(acc_of(dtype), n * n), 0, n, random);
  }
  serial.replace(symmetric);
  imcl::gram_backward(kernels, serial.samples, kSerial);

  for (std::size_t index = 0; index < tensors.size(); ++index) {
    const Tensor& t = *tensors[index];
    check_written("means", serial.means[index], t.shape.columns, [&](auto cover) {
      for (int64_t k = 0; k < t.shape.columns; ++k) cover(k);
    });
    check_gram(tally, t, dtype, t.shape.rows, serial.grams[index], symmetric[index], 0,
               serial.dx[index]);
  }
  GramRun other(dtype, tensors);
  imcl::gram_forward(kernels, other.samples, kThreads);
  other.replace(symmetric);
  imcl::gram_backward(kernels, other.samples, kThreads);
  for (std::size_t i = 0; i < tensors.size(); ++i)
    if (!other.grams[i].same_bits(serial.grams[i]) || !other.dx[i].same_bits(serial.dx[i]))
      fail("tensor %zu: Gram or gradient depend on the threads", i);
  ++tally.cases;
}

// ---- The sweep -------------------------------------------------------------------------

struct Sweep {
  int64_t every;
  std::vector<Level> levels;
  std::vector<Tally> pairwise, consistency, gram;
  int64_t number = 0;

  bool skip() { return number++ % every != 0; }

  void pairwise_lists(DType dtype, Precision precision, const std::vector<Shape>& shapes, Layout in,
                      Layout out) {
    for (const Penalty penalty : {Penalty::kSquare, Penalty::kAbs, Penalty::kSigned})
      for (const bool center : {false, true})
        pairwise_one(dtype, precision, shapes, in, out, penalty, center);
  }

  void pairwise_one(DType dtype, Precision precision, const std::vector<Shape>& shapes, Layout in,
                    Layout out, Penalty penalty, bool center) {
    if (skip()) return;
    constexpr double eps = 1e-12, grad = 0.75;
    const imcl::PairwiseSettings settings{penalty, center, eps, precision};
    const bool rounds = dtype == DType::kBFloat16 || precision == Precision::kMedium;
    const double sign_unsure = dtype == DType::kFloat64 ? 1e-13 : rounds ? 0x1p-8 : 1e-5;
    Random random{static_cast<uint64_t>(number)};
    std::vector<std::unique_ptr<Tensor> > tensors;
    std::string name = std::string("pairwise ") + name_of(dtype);
    if (precision == Precision::kMedium) name += " medium";
    name += penalty == Penalty::kSquare ? " square" : penalty == Penalty::kAbs ? " abs" : " signed";
    if (center) name += " centred";
    for (const Shape& s : shapes) {
      tensors.push_back(std::make_unique<Tensor>(dtype, s, in, out, random));
      tensors.back()->expect(penalty, center, eps, grad, sign_unsure);
      name += " (" + std::to_string(s.batch) + ", " + std::to_string(s.rows) + ", " +
              std::to_string(s.columns) + ")";
    }
    name += std::string(" ") + kLayoutNames[in] + " to " + kLayoutNames[out];
    for (std::size_t i = 0; i < levels.size(); ++i) {
      doing = std::string(levels[i].name) + ": " + name;
      pairwise_case(pairwise[i], levels[i], dtype, tensors, settings, grad);
    }
  }

  void gram_one(DType dtype, const std::vector<Shape>& shapes, Layout in, Layout out) {
    if (skip()) return;
    Random random{static_cast<uint64_t>(number)};
    std::vector<std::unique_ptr<Tensor> > tensors;
    std::string name = std::string("grams ") + name_of(dtype);
    for (const Shape& s : shapes) {
      tensors.push_back(std::make_unique<Tensor>(dtype, s, in, out, random));
      name += " (" + std::to_string(s.rows) + ", " + std::to_string(s.columns) + ")";
    }
    name += std::string(" ") + kLayoutNames[in] + " to " + kLayoutNames[out];
    for (std::size_t i = 0; i < levels.size(); ++i) {
      doing = std::string(levels[i].name) + ": " + name;
      gram_case(gram[i], levels[i], dtype, tensors, random);
    }
  }

  void consistency_one(const ConsistencySpec& spec) {
    if (skip()) return;
    Random random{static_cast<uint64_t>(number)};
    const ConsistencyCase one(spec, random);
    for (std::size_t i = 0; i < levels.size(); ++i) {
      doing = std::string(levels[i].name) + ": " + name_of(spec);
      one.run(consistency[i], 2,
              [&](const imcl::Consistency& problem, Reduction reduction, Buffer& losses,
                  Buffer& terms, int way) {
                const bool each = reduction == Reduction::kNone;
                losses = Buffer(DType::kFloat64, each ? problem.batch : 1);
                terms = Buffer(DType::kFloat64, 2 * static_cast<int64_t>(problem.heads.size()));
                auto* values = static_cast<double*>(losses.data());
                const double loss = imcl::consistency(
                    *levels[i].kernels.consistency, problem, reduction, each ? values : nullptr,
                    static_cast<double*>(terms.data()), way ? kThreads : kSerial);
                if (!each) values[0] = loss;
              });
    }
  }
};

void sweep_pairwise(Sweep& sweep) {
  // Beside each width of a vector, a strip and a panel; primal and dual; more than one block
  // of depth (256) on either axis. The layouts take turns over all of them, so that a shape
  // meets other layouts in other dtypes.
  const Shape shapes[] = {{3, 2, 1},   {2, 2, 2},   {2, 5, 3},    {1, 8, 4},   {2, 9, 16},
                          {2, 16, 49}, {1, 17, 33}, {2, 33, 17},  {1, 34, 15}, {1, 31, 64},
                          {1, 64, 32}, {1, 65, 31}, {1, 18, 257}, {1, 9, 513}, {1, 263, 7},
                          {1, 67, 40}, {1, 280, 33}};
  int64_t turn = 0;
  for (const DType dtype : kDTypes)
    for (const bool medium : {false, true}) {
      if (medium && dtype != DType::kFloat32) continue;
      const Precision precision = medium ? Precision::kMedium : Precision::kHighest;
      for (const Shape& s : shapes) {
        const int64_t pairs = s.rows * s.rows * s.columns > 100000 ? 1 : 2;
        for (int64_t i = 0; i < pairs; ++i) {
          const auto in = static_cast<Layout>(turn % kLayouts);
          // The gradient lies as the input does, or in another layout, each in turn.
          const bool same = in != kExpanded && turn % 2;
          const auto out = same ? in : static_cast<Layout>((turn / kLayouts + i) % kExpanded);
          sweep.pairwise_lists(dtype, precision, {s}, in, out);
          ++turn;
        }
      }
      // A ragged list; without a matrix, or columns; many small matrices to a task.
      sweep.pairwise_lists(dtype, precision, {{2, 12, 9}, {3, 7, 30}, {1, 40, 5}}, kRows, kRows);
      sweep.pairwise_lists(dtype, precision, {{0, 4, 4}, {2, 37, 0}}, kRows, kRows);
      sweep.pairwise_lists(dtype, precision, {{70, 3, 5}, {0, 3, 2}}, kColumns, kColumns);
      // So large that schedule() has all threads work on one: primal and dual.
      if (medium || (dtype != DType::kFloat32 && dtype != DType::kBFloat16)) continue;
      sweep.pairwise_one(dtype, precision, {{1, 402, 190}}, kRows, kRows, Penalty::kAbs, true);
      sweep.pairwise_one(dtype, precision, {{1, 570, 233}, {1, 4, 6}}, kColumns, kColumns,
                         Penalty::kSquare, false);
    }
}

void sweep_grams(Sweep& sweep) {
  // Beside each width of a vector, a strip and a panel; more columns than a task takes.
  const Shape shapes[] = {{1, 2, 1},   {1, 4, 3},    {1, 5, 16},   {1, 8, 17},    {1, 16, 40},
                          {1, 17, 33}, {1, 33, 300}, {1, 4, 2100}, {1, 34, 1025}, {1, 300, 7}};
  int64_t turn = 0;
  for (const DType dtype : kDTypes) {
    for (const Shape& s : shapes)
      for (int64_t i = 0; i < 3; ++i, ++turn)
        sweep.gram_one(dtype, {s}, static_cast<Layout>(turn % kLayouts),
                       static_cast<Layout>(turn / kLayouts % kExpanded));
    sweep.gram_one(dtype, {{1, 9, 1500}, {1, 9, 2}, {1, 9, 0}, {1, 9, 70}}, kRows, kRows);
    sweep.gram_one(dtype, {{1, 0, 5}, {1, 0, 1}}, kRows, kRows);
  }
}

}  // namespace

int main(int argc, char** argv) {
  Sweep sweep{};
  sweep.every = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
  const std::vector<imcl::IsaLevel>& levels = imcl::isa_levels();
  for (std::size_t i = 0; i < levels.size(); ++i)
    if (levels[i].supported && (argc < 3 || std::string(argv[2]) == levels[i].name))
      sweep.levels.push_back({levels[i].name, imcl::kernels_of(i)});
  doing = "the levels";
  if (sweep.levels.empty()) fail("this CPU has none of those asked for");
  sweep.pairwise.resize(sweep.levels.size());
  sweep.consistency.resize(sweep.levels.size());
  sweep.gram.resize(sweep.levels.size());
  sweep_pairwise(sweep);
  consistency_sweep([&](const ConsistencySpec& spec) { sweep.consistency_one(spec); });
  sweep_grams(sweep);
  for (std::size_t i = 0; i < sweep.levels.size(); ++i) {
    const Tally &pairwise = sweep.pairwise[i], &consistency = sweep.consistency[i];
    const Tally& gram = sweep.gram[i];
    std::printf(
        "%-10s pairwise %5lld cases, consistency %4lld, grams %3lld; errors up to %.2g, %.2g and "
        "%.2g of what is allowed; pairwise's bits %016llx\n",
        sweep.levels[i].name, static_cast<long long>(pairwise.cases),
        static_cast<long long>(consistency.cases), static_cast<long long>(gram.cases),
        pairwise.worst, consistency.worst, gram.worst,
        static_cast<unsigned long long>(pairwise.bits));
  }
  return 0;
}

#endif
