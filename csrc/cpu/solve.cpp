// The CPU bodies of the solvers: one problem of the batch a time, one thread a problem.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../common/check.h"
#include "../common/operands.h"
#include "../solvers/mgda.h"
#include "../solvers/order.h"
#include "../solvers/pcgrad.h"

namespace flatmtl::cpu {
namespace {

namespace stable = torch::stable;

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

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

Tensor draw_order_(const Tensor& rng, int64_t tasks, int64_t batch) {
  check_small("rng", rng, ScalarType::Long, rng, {2});
  STD_TORCH_CHECK(tasks >= 1 && batch >= 1, "tasks and batch must be at least 1, got ", tasks,
                  " and ", batch);
  Tensor order = fresh(rng, {batch, tasks, tasks}, ScalarType::Long);
  int64_t* state = data<int64_t>(rng);
  const uint64_t seed = static_cast<uint64_t>(state[0]), step = static_cast<uint64_t>(state[1]);
  int64_t* to = data<int64_t>(order);
  each_problem(batch, tasks, 0, [&](int64_t b, double*) {
    SerialTeam team;
    draw_order(team, seed, step, b, tasks, to + b * tasks * tasks);
  });
  state[1] += 1;
  return order;
}

std::tuple<Tensor, Tensor, Tensor> solve_pcgrad(const Tensor& gram, const Tensor& order) {
  check_batch(gram);
  const int64_t batch = gram.size(0), tasks = gram.size(1), square = tasks * tasks;
  check_small("order", order, ScalarType::Long, gram, {batch, tasks, tasks});
  const int64_t* visits = data<int64_t>(order);
  for (int64_t k = 0; k < batch * square; ++k)
    STD_TORCH_CHECK(visits[k] >= 0 && visits[k] < tasks, "order must hold task numbers below ",
                    tasks, ", got ", visits[k]);
  Tensor weights = fresh(gram, {batch, tasks}, ScalarType::Double);
  Tensor coefficients = fresh(gram, {batch, tasks, tasks}, ScalarType::Double);
  Tensor status = fresh(gram, {batch}, ScalarType::Long);
  each_problem(batch, tasks, pcgrad_work(tasks), [&](int64_t b, double* work) {
    SerialTeam team;
    pcgrad(team, data<double>(gram) + b * square, visits + b * square, tasks, work,
           data<double>(weights) + b * tasks, data<double>(coefficients) + b * square,
           data<int64_t>(status) + b);
  });
  return {weights, coefficients, status};
}

std::tuple<Tensor, Tensor, Tensor> solve_mgda(const Tensor& gram, double ridge) {
  check_batch(gram);
  const int64_t batch = gram.size(0), tasks = gram.size(1);
  Tensor weights = fresh(gram, {batch, tasks}, ScalarType::Double);
  Tensor status = fresh(gram, {batch}, ScalarType::Long);
  Tensor residual = fresh(gram, {batch}, ScalarType::Double);
  each_problem(batch, tasks, mgda_work(tasks), [&](int64_t b, double* work) {
    SerialTeam team;
    mgda(team, data<double>(gram) + b * tasks * tasks, tasks, ridge, work,
         data<double>(weights) + b * tasks, data<int64_t>(status) + b, data<double>(residual) + b);
  });
  return {weights, status, residual};
}

}  // namespace
}  // namespace flatmtl::cpu

STABLE_TORCH_LIBRARY_IMPL(flatmtl, CPU, m) {
  using namespace flatmtl::cpu;
  m.impl("draw_order_", TORCH_BOX(&draw_order_));
  m.impl("solve_pcgrad", TORCH_BOX(&solve_pcgrad));
  m.impl("solve_mgda", TORCH_BOX(&solve_mgda));
}
