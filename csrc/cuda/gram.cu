// CUDA bindings: gram, row_norms.
#include "../kernels/row_norms.cuh"
#include "gram_of.h"

namespace flatmtl::cuda {

Tensor gram(const Tensor& jac) {
  check_rows("jac", jac);
  return gram_of<false>(jac, jac);
}

namespace {

Tensor row_norms(const Tensor& jac) {
  check_rows("jac", jac);
  const int tasks = count_of("jac", jac.size(0));
  const int64_t columns = jac.size(1);
  const OnDeviceOf device(jac);
  const Tensor partials = scratch(jac, kernels::row_norms_partials(tasks, columns, row_bytes(jac)));
  const Tensor result = fresh(jac, {tasks}, ScalarType::Double);
  check_launch(with_row_type(jac, [&](auto zero) {
    using T = decltype(zero);
    return kernels::row_norms<T>(rows<T>(jac), tasks, columns, out<double>(partials),
                                 out<double>(result), device.stream());
  }));
  return result;
}

}  // namespace
}  // namespace flatmtl::cuda

STABLE_TORCH_LIBRARY_IMPL(flatmtl, CUDA, m) {
  using namespace flatmtl::cuda;
  m.impl("gram", TORCH_BOX(&gram));
  m.impl("row_norms", TORCH_BOX(&row_norms));
}
