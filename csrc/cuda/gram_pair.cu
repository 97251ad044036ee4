// CUDA binding: gram_pair. One kernel that reads the rows once where there is one; else gram and
// gram_difference, one after the other.
#include "gram_of.h"

namespace flatmtl::cuda {
namespace {

std::tuple<Tensor, Tensor> gram_pair(const Tensor& sam, const Tensor& jac) {
  check_rows("jac", jac);
  check_same_rows("sam", sam, "jac", jac);
  const int tasks = count_of("jac", jac.size(0));
  if (!kernels::pairs_in_one_sweep(tasks, row_bytes(jac)))
    return {gram(jac), gram_difference(sam, jac)};
  const int64_t columns = jac.size(1);
  const OnDeviceOf device(jac);
  const Tensor partials = scratch(jac, 2 * kernels::gram_partials(tasks, columns, row_bytes(jac)));
  const Tensor result = fresh(jac, {tasks, tasks}, ScalarType::Double);
  const Tensor difference = fresh(jac, {tasks, tasks}, ScalarType::Double);
  check_launch(with_row_type(jac, [&](auto zero) {
    using T = decltype(zero);
    return kernels::gram_pair<T>(rows<T>(jac), rows<T>(sam), tasks, columns, out<double>(partials),
                                 out<double>(result), out<double>(difference), device.stream());
  }));
  return {result, difference};
}

}  // namespace
}  // namespace flatmtl::cuda

STABLE_TORCH_LIBRARY_IMPL(flatmtl, CUDA, m) {
  using namespace flatmtl::cuda;
  m.impl("gram_pair", TORCH_BOX(&gram_pair));
}
