// The body that gram and gram_difference share; they, and gram_pair, are .cu files of their own so
// that they compile side by side.
#pragma once

#include "../kernels/gram.cuh"
#include "binding.h"

namespace flatmtl::cuda {

Tensor gram(const Tensor& jac);
Tensor gram_difference(const Tensor& sam, const Tensor& jac);

// jac, sam: checked. kDifference: rows are sam - jac, else sam is not read.
template <bool kDifference>
Tensor gram_of(const Tensor& jac, const Tensor& sam) {
  const int tasks = count_of("jac", jac.size(0));
  const int64_t columns = jac.size(1);
  const OnDeviceOf device(jac);
  const Tensor partials = scratch(jac, kernels::gram_partials(tasks, columns, row_bytes(jac)));
  const Tensor result = fresh(jac, {tasks, tasks}, ScalarType::Double);
  check_launch(with_row_type(jac, [&](auto zero) {
    using T = decltype(zero);
    return kernels::gram<T, kDifference>(rows<T>(jac), rows<T>(sam), tasks, columns,
                                         out<double>(partials), out<double>(result),
                                         device.stream());
  }));
  return result;
}

}  // namespace flatmtl::cuda
