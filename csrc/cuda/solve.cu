// CUDA bindings of the solvers and the random orders: every operator of common/methods.h.
#include "../kernels/draw.cuh"
#include "binding.h"
#include "solve_methods.h"

namespace flatmtl::cuda {
namespace {

struct Backend {
  template <class Method>
  static Solved solve(const Tensor& gram, const Method& method, bool) {
    const int64_t tasks = check_square("gram", gram);
    const int64_t batch = batch_of(gram);
    const OnDeviceOf device(gram);
    const Tensor work = scratch(gram, kernels::solve_scratch(method, batch, tasks));
    const Solved s{fresh(gram, batch_shape(gram, {tasks}), ScalarType::Double),
                   fresh(gram, batch_shape(gram, {}), ScalarType::Long),
                   fresh(gram, batch_shape(gram, {}), ScalarType::Double)};
    check_launch(kernels::solve(method, in<double>(gram), batch, tasks, out<double>(work),
                                out<double>(s.weights), out<int64_t>(s.status),
                                out<double>(s.residual), device.stream()));
    return s;
  }

  static void draw_orders(const Tensor& rng, int64_t batch, int64_t tasks, const Tensor& order) {
    const OnDeviceOf device(rng);
    check_launch(kernels::draw_orders(out<int64_t>(rng), batch, tasks, out<int64_t>(order),
                                      device.stream()));
  }
  static void draw_normals(const Tensor& rng, int64_t batch, int64_t tasks, const Tensor& drawn) {
    const OnDeviceOf device(rng);
    check_launch(kernels::draw_normals(out<int64_t>(rng), batch, tasks, out<double>(drawn),
                                       device.stream()));
  }

  // The numbers are on the device and cannot be looked at without waiting for it: the solvers pass
  // over one that is no task.
  static void check_order(const Tensor&, int64_t) {}
};

}  // namespace
}  // namespace flatmtl::cuda

STABLE_TORCH_LIBRARY_IMPL(flatmtl, CUDA, m) {
  using namespace flatmtl::cuda;
  flatmtl::Methods<Backend>::register_in(m);
}
