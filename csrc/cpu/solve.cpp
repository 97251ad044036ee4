// The CPU bodies of the solvers: one problem of the batch a time, one thread a problem.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <tuple>
#include <vector>

#include "../common/methods.h"
#include "../solvers/normal.h"
#include "../solvers/order.h"

namespace flatmtl::cpu {
namespace {

namespace stable = torch::stable;

// f(b, work) for every problem. Problems of a size worth a thread are shared out.
template <class F>
void each_problem(int64_t batch, int64_t tasks, int64_t work_size, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 20000 / (tasks * tasks * tasks + 1));
  const auto share = [&](int64_t first, int64_t last) {
    std::vector<double> work(static_cast<size_t>(work_size));
    for (int64_t b = first; b < last; ++b) f(b, work.data());
  };
  if (batch <= grain) {
    if (batch > 0) share(0, batch);
  } else {
    stable::parallel_for(0, batch, grain, share);
  }
}

struct Backend {
  template <class Method>
  static Solved solve(const Tensor& gram, const Method& method, bool certified) {
    const int64_t tasks = check_square("gram", gram);
    const int64_t batch = batch_of(gram);
    Solved s;
    s.weights = fresh(gram, batch_shape(gram, {tasks}), ScalarType::Double);
    s.status = fresh(gram, batch_shape(gram, {}), ScalarType::Long);
    if (certified) s.residual = fresh(gram, batch_shape(gram, {}), ScalarType::Double);
    const double* from = data<double>(gram);
    double* weights = data<double>(s.weights);
    int64_t* status = data<int64_t>(s.status);
    double* residual = certified ? data<double>(s.residual) : nullptr;
    std::atomic<bool> invalid{false};
    each_problem(batch, tasks, Method::work(tasks), [&](int64_t b, double* work) {
      SerialTeam team;
      double unasked;
      const Problem p{from + b * tasks * tasks,           tasks, weights + b * tasks, status + b,
                      residual ? residual + b : &unasked, b};
      method(team, p, work);
      if (status[b] & kInvalidGram) invalid.store(true, std::memory_order_relaxed);
    });
    STD_TORCH_CHECK(!invalid.load(),
                    "gram must be symmetric and positive semi-definite, got a matrix that is not, "
                    "by far more than rounding");
    return s;
  }

  static void draw_orders(const Tensor& rng, int64_t batch, int64_t tasks, const Tensor& order) {
    int64_t* to = data<int64_t>(order);
    draw(rng, batch, tasks, [&](SerialTeam& team, uint64_t seed, uint64_t step, int64_t b) {
      draw_order(team, seed, step, b, tasks, to + b * tasks * tasks);
    });
  }
  static void draw_normals(const Tensor& rng, int64_t batch, int64_t tasks, const Tensor& out) {
    double* to = data<double>(out);
    draw(rng, batch, tasks, [&](SerialTeam& team, uint64_t seed, uint64_t step, int64_t b) {
      draw_normal(team, seed, step, b, tasks, to + b * tasks);
    });
  }

  static void check_order(const Tensor& order, int64_t tasks) {
    const int64_t* visits = data<int64_t>(order);
    for (int64_t k = 0; k < order.numel(); ++k)
      STD_TORCH_CHECK(visits[k] >= 0 && visits[k] < tasks, "order must hold task numbers below ",
                      tasks, ", got ", visits[k]);
  }

 private:
  // f(team, seed, step, b) for every problem; then the step is counted.
  template <class F>
  static void draw(const Tensor& rng, int64_t batch, int64_t tasks, const F& f) {
    int64_t* state = data<int64_t>(rng);
    const uint64_t seed = static_cast<uint64_t>(state[0]), step = static_cast<uint64_t>(state[1]);
    each_problem(batch, tasks, 0, [&](int64_t b, double*) {
      SerialTeam team;
      f(team, seed, step, b);
    });
    state[1] = static_cast<int64_t>(step + 1);
  }
};

}  // namespace
}  // namespace flatmtl::cpu

STABLE_TORCH_LIBRARY_IMPL(flatmtl, CPU, m) {
  using namespace flatmtl::cpu;
  flatmtl::Methods<Backend>::register_in(m);
}
