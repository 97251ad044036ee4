// CUDA bindings: draw_order_, solve_pcgrad, solve_mgda.
#include "../kernels/solve.cuh"

#include "binding.h"

namespace flatmtl::cuda {
namespace {

Tensor draw_order_(const Tensor& rng, int64_t tasks, int64_t batch) {
  check_small("rng", rng, ScalarType::Long, rng, {2});
  STD_TORCH_CHECK(tasks >= 1 && batch >= 1, "tasks and batch must be at least 1, got ", tasks,
                  " and ", batch);
  const OnDeviceOf device(rng);
  const Tensor order = fresh(rng, {batch, tasks, tasks}, ScalarType::Long);
  STD_CUDA_CHECK(
      kernels::draw_orders(out<int64_t>(rng), batch, tasks, out<int64_t>(order), device.stream()));
  return order;
}

// The numbers in `order` are on the device and cannot be checked without waiting for it: the solver
// passes over one that is no task.
std::tuple<Tensor, Tensor, Tensor> solve_pcgrad(const Tensor& gram, const Tensor& order) {
  check_batch(gram);
  const int64_t batch = gram.size(0), tasks = gram.size(1);
  check_small("order", order, ScalarType::Long, gram, {batch, tasks, tasks});
  const OnDeviceOf device(gram);
  const Tensor work = scratch(gram, kernels::pcgrad_scratch(batch, tasks));
  const Tensor weights = fresh(gram, {batch, tasks}, ScalarType::Double);
  const Tensor coefficients = fresh(gram, {batch, tasks, tasks}, ScalarType::Double);
  const Tensor status = fresh(gram, {batch}, ScalarType::Long);
  STD_CUDA_CHECK(kernels::solve_pcgrad(
      in<double>(gram), in<int64_t>(order), batch, tasks, out<double>(work), out<double>(weights),
      out<double>(coefficients), out<int64_t>(status), device.stream()));
  return {weights, coefficients, status};
}

std::tuple<Tensor, Tensor, Tensor> solve_mgda(const Tensor& gram, double ridge) {
  check_batch(gram);
  const int64_t batch = gram.size(0), tasks = gram.size(1);
  const OnDeviceOf device(gram);
  const Tensor work = scratch(gram, kernels::mgda_scratch(batch, tasks));
  const Tensor weights = fresh(gram, {batch, tasks}, ScalarType::Double);
  const Tensor status = fresh(gram, {batch}, ScalarType::Long);
  const Tensor residual = fresh(gram, {batch}, ScalarType::Double);
  STD_CUDA_CHECK(kernels::solve_mgda(in<double>(gram), batch, tasks, ridge, out<double>(work),
                                     out<double>(weights), out<int64_t>(status),
                                     out<double>(residual), device.stream()));
  return {weights, status, residual};
}

}  // namespace
}  // namespace flatmtl::cuda

STABLE_TORCH_LIBRARY_IMPL(flatmtl, CUDA, m) {
  using namespace flatmtl::cuda;
  m.impl("draw_order_", TORCH_BOX(&draw_order_));
  m.impl("solve_pcgrad", TORCH_BOX(&solve_pcgrad));
  m.impl("solve_mgda", TORCH_BOX(&solve_mgda));
}
