// CUDA binding: graddrop_.
#include "../kernels/graddrop.cuh"

#include "binding.h"

namespace flatmtl::cuda {
namespace {

void graddrop_(const Tensor& jac, const std::optional<Tensor>& leak,
               const std::optional<Tensor>& there, const Tensor& rng, const Tensor& result) {
  check_drop(jac, leak, there, rng, result);
  const int tasks = count_of("jac", jac.size(0));
  const OnDeviceOf device(jac);
  check_launch(with_row_types(jac, result, [&](auto zero, auto sum) {
    using T = decltype(zero);
    using O = decltype(sum);
    return kernels::graddrop<T, O>(rows<T>(jac), leak ? in<double>(*leak) : nullptr,
                                   there ? in<bool>(*there) : nullptr, out<int64_t>(rng), tasks,
                                   jac.size(1), out<O>(result), device.stream());
  }));
}

}  // namespace
}  // namespace flatmtl::cuda

STABLE_TORCH_LIBRARY_IMPL(flatmtl, CUDA, m) {
  m.impl("graddrop_", TORCH_BOX(&flatmtl::cuda::graddrop_));
}
