// Runs the CUDA kernels on the CPU (cuda_on_cpu.h) over a fixed sweep of problems, without
// torch: what the sanitizers watch, and a test by itself. The cases, and the plain loops in
// double that judge the results, are those of cases.h.
//
// Usage: cuda_kernels [every n-th case [from this one on]]
#include <utility>

#include "../../csrc/cuda/consistency.h"
#include "../../csrc/cuda/dependence.h"
#include "../../csrc/cuda/pairwise.h"
#include "cases.h"

namespace {

// Working memory of a call: numbers and tickets, each an allocation of its own.
struct Workspace {
  Buffer numbers;
  std::size_t tickets;
  std::unique_ptr<unsigned[]> ticket;

  explicit Workspace(int64_t doubles, std::size_t count = 1)
      : numbers(DType::kFloat64, doubles), tickets(count), ticket(new unsigned[count]()) {}
  double* doubles() const { return static_cast<double*>(numbers.data()); }
};

// Blocks one after the other, or on several threads at once; a block of each launch starts at
// another end than in the last.
void set_threads(int way) { setenv("IMCL_EMULATED_THREADS", way ? "3" : "1", 1); }

void check(cudaError_t error) {
  if (error != cudaSuccess) fail("%s", cudaGetErrorString(error));
}

template <class Body>
void expect_launches(uint64_t expected, const Body& body) {
  const uint64_t before = emulated::launches;
  body();
  const uint64_t launched = emulated::launches - before;
  if (launched != expected)
    fail("%llu launches, where %llu are enough", static_cast<unsigned long long>(launched),
         static_cast<unsigned long long>(expected));
}

// Calls launch(stream), which must launch so many kernels, or has it captured and replayed.
// What launch() passes on by pointers to the host's memory must be gone by its end.
template <class Launch>
void run_launches(bool captured, uint64_t expected, const Workspace& workspace,
                  const Launch& launch) {
  if (!captured) return expect_launches(expected, [&] { check(launch(nullptr)); });
  const auto stream = reinterpret_cast<cudaStream_t>(std::uintptr_t{16});
  unsigned* const tickets = workspace.ticket.get();
  std::fill_n(tickets, workspace.tickets, 7);  // as they were left: a replay must set them anew
  std::unique_ptr<emulated::Graph> graph;
  expect_launches(0, [&] {
    graph = std::make_unique<emulated::Graph>(stream, [&] {
      check(cudaMemsetAsync(tickets, 0, workspace.tickets * sizeof *tickets, stream));
      check(launch(stream));
    });
  });
  expect_launches(expected, [&] { graph->replay(); });
}

void run_consistency(const imcl::Consistency& problem, Reduction reduction, Buffer& losses,
                     Buffer& terms, int way) {
  constexpr int kProcessors = 3;  // few, so that every team has several samples
  const auto heads = static_cast<int64_t>(problem.heads.size());
  imcl::ConsistencyArguments arguments = imcl::consistency_arguments(problem, reduction);
  const imcl::ConsistencyPlan plan = imcl::consistency_plan(problem.dtype, arguments, kProcessors);
  losses = Buffer(acc_of(problem.dtype), reduction == Reduction::kNone ? problem.batch : 1);
  terms = Buffer(acc_of(problem.dtype), 2 * heads);
  const Workspace workspace(2 * heads * plan.blocks);
  arguments.loss = losses.data();
  arguments.terms = terms.data();
  arguments.partials = workspace.doubles();
  arguments.ticket = workspace.ticket.get();
  set_threads(way);
  run_launches(way != 0, 1, workspace, [&](cudaStream_t stream) {
    const auto passed = std::make_unique<imcl::ConsistencyArguments>(arguments);
    const auto planned = std::make_unique<imcl::ConsistencyPlan>(plan);
    return imcl_cuda_consistency(problem.dtype, passed.get(), planned.get(), stream);
  });
}

// What only these kernels tell apart: rows on 16 bytes, of one tile and of several; as many
// heads as there may be.
template <class One>
void more_consistency(const One& one) {
  const Teacher teachers[] = {Teacher::kOthers, Teacher::kMean, Teacher::kFinal,
                              Teacher::kPairwise};
  for (const DType dtype : kDTypes)
    for (const Teacher teacher : teachers)
      for (const bool detach : {false, true}) {
        for (const int64_t classes : {8, 264, 6408})
          one(ConsistencySpec{dtype,
                              classes > 1000 ? 2 : 19,
                              classes,
                              {{4, 1.5, teacher, detach}},
                              true,
                              true,
                              false,
                              detach ? 0.1 : 0.0,
                              1,
                              1,
                              Reduction::kMean});
        one(ConsistencySpec{dtype,
                            2,
                            100,
                            {{imcl::kMostHeads, 2.0, teacher, detach}},
                            true,
                            false,
                            false,
                            0.0,
                            1,
                            1,
                            Reduction::kNone});
      }
  // The other divergences, of one tile and of several.
  int64_t turn = 0;
  for (const Divergence divergence :
       {Divergence::kReverseKl, Divergence::kJsd, Divergence::kMixture, Divergence::kKl})
    for (const Teacher teacher : teachers)
      for (const bool detach : {false, true}) {
        const bool mixture = divergence == Divergence::kMixture;
        const bool binary = divergence == Divergence::kKl, many = turn % 3 == 2 && !binary;
        const int64_t classes = binary ? 2 : many ? 6408 : turn % 3 ? 264 : 9;
        ConsistencySpec spec{kDTypes[turn % 4],
                             many ? 2 : 19,
                             classes,
                             {{3, mixture ? 1.0 : 1.5, teacher, detach, divergence}},
                             true,
                             !binary,
                             false,
                             turn % 2 ? 0.1 : 0.0,
                             1,
                             1,
                             turn % 5 ? Reduction::kMean : Reduction::kNone};
        spec.probabilities = binary || turn % 4 == 3;
        spec.binary = binary;
        if (mixture) spec.groups.push_back({1, 1.0, teacher, detach, divergence});
        one(spec);
        ++turn;
      }
}

// ---- The pairwise penalty --------------------------------------------------------------

// How an input and its gradient lie. The first two are read 16 bytes at a time where the sizes
// allow; in blocks, the columns are of two dimensions that don't collapse.
enum Lie { kColumnsUnit, kRowsUnit, kColumnsApart, kRowsApart, kInBlocks, kRepeated, kLies };
const char* const kLieNames[] = {"NCHW",           "channels last", "NCHW with gaps",
                                 "rows with gaps", "in blocks",     "repeated"};

Strides strides_of(Lie lie, const Shape& s) {
  const int64_t n = s.rows, d = s.columns;
  switch (lie) {
    case kColumnsUnit: return {n * d, d, {{d, 1}}};
    case kRowsUnit: return {n * d, 1, {{d, n}}};
    case kColumnsApart: return {n * (2 * d + 3) + 6, 2 * d + 3, {{d, 2}}};
    case kRowsApart: return {d * (2 * n + 1) + 5, 2, {{d, 2 * n + 1}}};
    case kInBlocks:
      if (d % 5 == 0) return {n * (d / 5) * 7, d / 5 * 7, {{d / 5, 7}, {5, 1}}};
      return {n * d + 3, d, {{d, 1}}};  // rows that 16 bytes don't divide
    default: return {1, 0, {{d, 1}}};   // one row stands for all: inputs only
  }
}

// The matrices of a tensor and of its gradient.
imcl::Layer layer_of(DType dtype, const Tensor& t, const Strides& in, const Strides& out,
                     const Buffer& dx, std::vector<imcl::Dimension>& dimensions) {
  const Shape& s = t.shape;
  const Strides* const sides[] = {&in, &out};
  imcl::Layer layer{};
  layer.x = t.x.data();
  layer.dx = dx.data();
  layer.batch = static_cast<int32_t>(s.batch);
  layer.rows = static_cast<int32_t>(s.rows);
  layer.columns = static_cast<int32_t>(s.columns);
  // Both sides must be cut into the same dimensions.
  const bool collapsed = in.columns.size() == 1 && out.columns.size() == 1;
  for (int side = 0; side < 2; ++side) {
    layer.batch_stride[side] = sides[side]->batch;
    layer.row_stride[side] = sides[side]->row;
    layer.column_stride[side] = sides[side]->columns.back().stride;
    const void* data = side ? layer.dx : layer.x;
    layer.access[side] = imcl::access_of(data, bytes_of(dtype), layer, side, collapsed);
  }
  if (!collapsed) {
    layer.first_dimension = static_cast<int32_t>(dimensions.size());
    layer.dimensions = 2;
    for (std::size_t d = 0; d < 2; ++d) {
      const auto stride = [&](const Strides& side) {
        if (side.columns.size() == 2) return side.columns[d].stride;
        return side.columns[0].stride * (d ? 1 : s.columns / (s.columns / 5));
      };
      const int64_t size = d ? 5 : s.columns / 5;
      dimensions.push_back({static_cast<int32_t>(size), {stride(in), stride(out)}});
    }
  }
  return layer;
}

// One run over the tensors of a case, forward and backward.
struct Run {
  std::vector<imcl::Layer> layers;
  std::vector<imcl::Dimension> dimensions;
  std::vector<Buffer> dx;
  Buffer state, kept, loss;

  Run(DType dtype, const std::vector<std::unique_ptr<Tensor> >& tensors,
      const std::vector<std::pair<Strides, Strides> >& strides,
      const imcl::PairwiseSettings& settings, double grad, bool keep, bool captured) {
    imcl::PairwiseCall call{};
    call.dtype = dtype;
    call.settings = settings;
    call.layers = static_cast<int64_t>(tensors.size());
    call.is_double = dtype == DType::kFloat64;
    int64_t states = 0;
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const Tensor& t = *tensors[i];
      dx.emplace_back(dtype, t.out.reach);
      imcl::Layer& layer = layers.emplace_back(
          layer_of(dtype, t, strides[i].first, strides[i].second, dx.back(), dimensions));
      layer.form = imcl::form_of(settings.penalty, layer.rows, layer.columns);
      layer.state = states;
      states +=
          layer.batch * imcl::state_size(layer.form, settings.center, layer.rows, layer.columns);
      call.programs += layer.batch * imcl::forward_programs(layer);
    }
    state = Buffer(acc_of(dtype), keep ? states : 0);
    loss = Buffer(acc_of(dtype), 1);
    if (call.programs == 0) loss.set(0, 0);  // whoever launches nothing does that
    const Workspace workspace(call.programs);
    call.state = keep ? state.data() : nullptr;
    call.loss = loss.data();
    call.partials = workspace.doubles();
    call.ticket = workspace.ticket.get();
    const auto run = [&](auto* launcher) {
      run_launches(captured, call.programs > 0, workspace, [&](cudaStream_t stream) {
        const auto passed = std::make_unique<imcl::PairwiseCall>(call);
        const std::vector<imcl::Layer> of = layers;
        const std::vector<imcl::Dimension> sizes = dimensions;
        return launcher(passed.get(), of.data(), static_cast<int64_t>(of.size()), sizes.data(),
                        stream);
      });
    };
    run(&imcl_cuda_pairwise_forward);
    if (!keep) return;
    kept = state.copy();
    Buffer incoming(acc_of(dtype), 1);
    incoming.set(0, grad);
    call.grad = incoming.data();
    run(&imcl_cuda_pairwise_backward);
  }
};

struct PairwiseSweep {
  int64_t every, first;
  Tally tally;
  int64_t number = 0;

  void all(DType dtype, Precision precision, const std::vector<Shape>& shapes, Lie in, Lie out) {
    for (const Penalty penalty : {Penalty::kSquare, Penalty::kAbs, Penalty::kSigned})
      for (const bool center : {false, true})
        if (number++ % every == first) one(dtype, precision, shapes, in, out, penalty, center);
  }

 private:
  void one(DType dtype, Precision precision, const std::vector<Shape>& shapes, Lie in, Lie out,
           Penalty penalty, bool center) {
    constexpr double eps = 1e-12, grad = 0.75;
    doing = std::string("pairwise ") + name_of(dtype) + " precision " +
            std::to_string(static_cast<int>(precision)) + " penalty " +
            std::to_string(static_cast<int>(penalty)) + (center ? " centred" : "");
    // What rounds its factors may err that much more, in gradients and in losses.
    double unit = unit_of(acc_of(dtype));
    if (dtype == DType::kFloat16 || precision == Precision::kHigh) unit = 0x1p-11;
    if (dtype == DType::kBFloat16 || precision == Precision::kMedium) unit = 0x1p-8;
    const double sign_unsure = dtype == DType::kFloat64 ? 1e-13 : unit > 1e-5 ? 0x1p-8 : 1e-5;
    Random random{static_cast<uint64_t>(number)};
    std::vector<std::unique_ptr<Tensor> > tensors;
    std::vector<std::pair<Strides, Strides> > strides;
    for (const Shape& s : shapes) {
      const double pairs = static_cast<double>(s.rows * (s.rows - 1));
      const double scale = 1 / (static_cast<double>(shapes.size()) *
                                static_cast<double>(std::max<int64_t>(s.batch, 1)) * pairs);
      strides.emplace_back(strides_of(in, s), strides_of(out, s));
      tensors.push_back(std::make_unique<Tensor>(dtype, s, strides.back().first,
                                                 strides.back().second, scale, random));
      tensors.back()->expect(penalty, center, eps, grad, sign_unsure);
      doing += " (" + std::to_string(s.batch) + ", " + std::to_string(s.rows) + ", " +
               std::to_string(s.columns) + ")";
    }
    doing += std::string(" ") + kLieNames[in] + " to " + kLieNames[out];

    const imcl::PairwiseSettings settings{penalty, center, eps, precision};
    set_threads(0);
    const Run serial(dtype, tensors, strides, settings, grad, true, false);
    double loss = 0, bound = 0;
    if (!serial.state.same_bits(serial.kept)) fail("the backward wrote the state");
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      loss += tensors[i]->loss;
      bound += tensors[i]->loss_bound;
      tensors[i]->check(tally, serial.dx[i], dtype, unit);
    }
    compare(tally, "loss", 0, serial.loss.get(0), loss, 16 * unit * bound);
    set_threads(1);
    const Run other(dtype, tensors, strides, settings, grad, true, true);
    const Run stateless(dtype, tensors, strides, settings, grad, false, false);
    if (!other.loss.same_bits(serial.loss) || !stateless.loss.same_bits(serial.loss))
      fail("the loss depends on the order of the blocks, or on what is kept");
    for (std::size_t i = 0; i < tensors.size(); ++i)
      if (!other.dx[i].same_bits(serial.dx[i])) fail("a gradient depends on the order of blocks");
    ++tally.cases;
  }
};

void pairwise_sweep(PairwiseSweep& sweep) {
  // Beside a tile's edge (64), the depth of a block (16 to 64) and the rows that shared memory
  // holds (64 to 256): primal and dual; with sizes that 16 bytes divide, and others. The layouts
  // take turns. In this order some nineteenth case misses each barrier (test_cuda_sanitizers.py).
  const Shape shapes[] = {{3, 2, 1},    {1, 8, 16},   {1, 264, 20}, {1, 65, 40},
                          {1, 64, 128}, {2, 9, 33},   {1, 34, 15},  {1, 136, 64},
                          {1, 130, 65}, {1, 264, 72}, {1, 264, 40}, {1, 131, 65}};
  struct Kind {
    DType dtype;
    Precision precision;
  };
  const Kind kinds[] = {
      {DType::kFloat32, Precision::kHighest}, {DType::kBFloat16, Precision::kHighest},
      {DType::kFloat16, Precision::kHighest}, {DType::kFloat64, Precision::kHighest},
      {DType::kFloat32, Precision::kHigh},    {DType::kFloat32, Precision::kMedium}};
  int64_t turn = 0;
  for (const Kind& kind : kinds) {
    for (const Shape& s : shapes) {
      const auto in = static_cast<Lie>(turn % kLies);
      // The gradient lies as the input does, or otherwise, each in turn.
      const bool same = in != kRepeated && turn % 2;
      sweep.all(kind.dtype, kind.precision, {s}, in,
                same ? in : static_cast<Lie>(turn / kLies % kRepeated));
      ++turn;
    }
    sweep.all(kind.dtype, kind.precision, {{2, 12, 9}, {3, 7, 30}, {1, 70, 5}, {1, 66, 8}},
              kInBlocks, kInBlocks);
    sweep.all(kind.dtype, kind.precision, {{0, 4, 4}, {2, 37, 0}}, kColumnsUnit, kColumnsUnit);
  }
  std::vector<Shape> twenty;  // as many convolutions as a ResNet-18 has, in one launch each way
  for (int64_t i = 0; i < 20; ++i) twenty.push_back({1, 8 + i, 3 * (3 + i % 4)});
  sweep.all(DType::kFloat32, Precision::kHighest, twenty, kColumnsUnit, kColumnsUnit);
}

// ---- Grams of samples ------------------------------------------------------------------

// One run over the representations of a case, forward and backward for S (n, B, B).
struct GramRun {
  Buffer grams, means;
  std::vector<Buffer> dx;

  GramRun(DType dtype, const std::vector<std::unique_ptr<Tensor> >& tensors,
          const std::vector<std::pair<Strides, Strides> >& strides, const Buffer& s,
          int64_t at_once, uint64_t launches, bool captured) {
    const int64_t n = tensors[0]->shape.rows, count = static_cast<int64_t>(tensors.size());
    std::vector<imcl::GramLayer> layers;
    std::vector<imcl::Dimension> dimensions;
    int64_t states = 0;
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const Tensor& t = *tensors[i];
      dx.emplace_back(dtype, t.out.reach);
      imcl::GramLayer layer{};
      static_cast<imcl::Layer&>(layer) =
          layer_of(dtype, t, strides[i].first, strides[i].second, dx.back(), dimensions);
      layer.scale = t.scale;
      layer.place = static_cast<int32_t>(i);
      layer.state = states;
      states += imcl::padded(layer.columns);
      layers.push_back(layer);
    }
    grams = Buffer(acc_of(dtype), count * n * n);
    means = Buffer(acc_of(dtype), states);
    imcl::DependenceCall call{};
    call.dtype = dtype;
    call.means = means.data();
    call.grams.batch = static_cast<int32_t>(count);
    call.grams.rows = call.grams.columns = static_cast<int32_t>(n);
    call.grams.x = s.data();
    call.grams.dx = grams.data();
    for (int side = 0; side < 2; ++side) {
      call.grams.batch_stride[side] = n * n;
      call.grams.row_stride[side] = n;
      call.grams.column_stride[side] = 1;
      call.grams.access[side] = imcl::access_of(side ? call.grams.dx : call.grams.x,
                                                bytes_of(acc_of(dtype)), call.grams, side, true);
    }
    call.span = imcl::span_of(layers, imcl::gram_tiles(n), at_once);
    int64_t programs = 0;
    for (const imcl::Layer& layer : layers) programs += imcl::gram_programs(layer, call.span);
    const auto of_tile = imcl::kTile * imcl::kTile * bytes_of(acc_of(dtype)) / sizeof(double);
    const Workspace workspace(programs * static_cast<int64_t>(of_tile),
                              static_cast<std::size_t>(programs));
    call.partials = workspace.doubles();
    call.tickets = workspace.ticket.get();
    const auto run = [&](auto* launcher, uint64_t expected) {
      run_launches(captured, expected, workspace, [&](cudaStream_t stream) {
        const auto passed = std::make_unique<imcl::DependenceCall>(call);
        const std::vector<imcl::GramLayer> of = layers;
        const std::vector<imcl::Dimension> sizes = dimensions;
        return launcher(passed.get(), of.data(), count, sizes.data(), stream);
      });
    };
    run(&imcl_cuda_gram_forward, programs ? launches : 0);
    call.span = imcl::span_of(layers, imcl::divide_up(n, imcl::kTile), at_once);
    bool any = false;
    for (const imcl::Layer& layer : layers)
      any = any || imcl::product_programs(layer, call.span) > 0;
    run(&imcl_cuda_gram_backward, any ? launches : 0);
  }
};

struct GramSweep {
  int64_t every, first;
  Tally tally;
  int64_t number = 0;

  // `at_once` blocks run at a time.
  void one(DType dtype, const std::vector<Shape>& shapes, Lie in, Lie out, int64_t at_once,
           uint64_t launches = 1) {
    if (number++ % every != first) return;
    Random random{static_cast<uint64_t>(number)};
    doing = std::string("grams ") + name_of(dtype) + ", " + std::to_string(at_once) + " at once";
    std::vector<std::unique_ptr<Tensor> > tensors;
    std::vector<std::pair<Strides, Strides> > strides;
    for (const Shape& s : shapes) {
      strides.emplace_back(strides_of(in, s), strides_of(out, s));
      tensors.push_back(std::make_unique<Tensor>(dtype, s, strides.back().first,
                                                 strides.back().second, 1.25 + random(), random));
      doing += " (" + std::to_string(s.rows) + ", " + std::to_string(s.columns) + ")";
    }
    doing += std::string(" ") + kLieNames[in] + " to " + kLieNames[out];
    const int64_t n = shapes[0].rows, count = static_cast<int64_t>(shapes.size());
    Buffer s(acc_of(dtype), count * n * n);
    for (int64_t i = 0; i < count; ++i) fill_symmetric(s, i * n * n, n, random);
    const Buffer before = s.copy();

    set_threads(0);
    const GramRun serial(dtype, tensors, strides, s, at_once, launches, false);
    for (int64_t i = 0; i < count; ++i) {
      const auto index = static_cast<std::size_t>(i);
      check_gram(tally, *tensors[index], dtype, imcl::kTile, serial.grams, s, i * n * n,
                 serial.dx[index]);
      for (int64_t a = i * n * n, r = 0; r < n; ++r)  // to the bit
        for (int64_t c = 0; c < r; ++c)
          if (serial.grams.get(a + r * n + c) != serial.grams.get(a + c * n + r))
            fail("Gram %lld is not symmetric", static_cast<long long>(i));
    }
    set_threads(1);
    const GramRun other(dtype, tensors, strides, s, at_once, launches, true);
    if (!s.same_bits(before)) fail("the backward wrote what came back to the Grams");
    if (!other.grams.same_bits(serial.grams) || !other.means.same_bits(serial.means))
      fail("the Grams depend on the order of the blocks");
    for (std::size_t i = 0; i < tensors.size(); ++i)
      if (!other.dx[i].same_bits(serial.dx[i])) fail("a gradient depends on the order of blocks");
    ++tally.cases;
  }
};

void gram_sweep(GramSweep& sweep) {
  // Beside a tile's edge, and the depth of a block; of one part, of several, of sums of sums. The
  // layouts take turns.
  const Shape shapes[] = {{1, 2, 1},     {1, 5, 16},  {1, 8, 40},   {1, 64, 128}, {1, 63, 65},
                          {1, 33, 1000}, {1, 65, 40}, {1, 129, 70}, {1, 132, 64}, {1, 130, 200}};
  int64_t turn = 0;
  for (const DType dtype : kDTypes) {
    for (const Shape& s : shapes) {
      const auto in = static_cast<Lie>(turn % kLies);
      const bool same = in != kRepeated && turn % 2;
      sweep.one(dtype, {s}, in, same ? in : static_cast<Lie>(turn / kLies % kRepeated),
                turn % 3 * 7 + 4);
      ++turn;
    }
    sweep.one(dtype, {{1, 9, 300}, {1, 9, 2}, {1, 9, 70}}, kColumnsUnit, kInBlocks, 6);
    sweep.one(dtype, {{1, 70, 0}, {1, 70, 3}}, kRowsUnit, kRowsUnit, 6);
    sweep.one(dtype, {{1, 0, 5}, {1, 0, 1}}, kColumnsUnit, kColumnsUnit, 6);
  }
  // Of more dimensions than a launch takes: two of them.
  sweep.one(DType::kFloat32, std::vector<Shape>(40, {1, 5, 70}), kInBlocks, kInBlocks, 60, 2);
}

}  // namespace

int main(int argc, char** argv) {
  const int every = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
  const int first = argc > 2 ? std::max(0, std::atoi(argv[2])) % every : 0;
  Tally consistency;
  int64_t number = 0;
  const auto one = [&](const ConsistencySpec& spec) {
    if (number++ % every != first) return;
    Random random{static_cast<uint64_t>(number)};
    const ConsistencyCase one(spec, random);
    doing = name_of(spec);
    one.run(consistency, 2, run_consistency);
  };
  PairwiseSweep pairwise{every, first, {}};
  GramSweep grams{every, first, {}};
  try {
    pairwise_sweep(pairwise);
    gram_sweep(grams);
    consistency_sweep(one);
    more_consistency(one);
  } catch (const std::exception& error) {
    fail("%s", error.what());
  }
  const std::pair<const char*, const Tally*> tallies[] = {
      {"pairwise", &pairwise.tally}, {"grams", &grams.tally}, {"consistency", &consistency}};
  for (const auto& [name, tally] : tallies)
    std::printf("%s %lld cases; errors up to %.2g of what is allowed\n", name,
                static_cast<long long>(tally->cases), tally->worst);
  return 0;
}
