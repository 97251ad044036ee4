// CUDA bindings: combine, combine_flat, project, affinity.
#include "../kernels/combine.cuh"

#include "../kernels/affinity.cuh"
#include "binding.h"

namespace flatmtl::cuda {
namespace {

void combine(const Tensor& jac, const Tensor& weights, const Tensor& result) {
  check_rows("jac", jac);
  check_small("weights", weights, ScalarType::Double, "jac", jac, {jac.size(0)});
  check_out_row(result, jac);
  const int tasks = count_of("jac", jac.size(0));
  const OnDeviceOf device(jac);
  check_launch(with_row_types(jac, result, [&](auto zero, auto sum) {
    using T = decltype(zero);
    using O = decltype(sum);
    return kernels::combine<T, O>(rows<T>(jac), in<double>(weights), tasks, jac.size(1),
                                  out<O>(result), device.stream());
  }));
}

void combine_flat(const Tensor& jac, const Tensor& a, const Tensor& sam, const Tensor& b,
                  const Tensor& result) {
  check_rows("jac", jac);
  check_same_rows("sam", sam, "jac", jac);
  check_small("a", a, ScalarType::Double, "jac", jac, {jac.size(0)});
  check_small("b", b, ScalarType::Double, "jac", jac, {jac.size(0)});
  check_out_row(result, jac);
  const int tasks = count_of("jac", jac.size(0));
  const OnDeviceOf device(jac);
  check_launch(with_row_types(jac, result, [&](auto zero, auto sum) {
    using T = decltype(zero);
    using O = decltype(sum);
    return kernels::combine_flat<T, O>(rows<T>(jac), in<double>(a), rows<T>(sam), in<double>(b),
                                       tasks, jac.size(1), out<O>(result), device.stream());
  }));
}

// The bytes from a matrix's first to its last element.
bool may_overlap(const Tensor& x, const Tensor& y) {
  const auto range = [](const Tensor& t) {
    const auto first = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    const int64_t elements = (t.size(0) - 1) * t.stride(0) + t.size(1);
    return std::make_tuple(first, first + static_cast<uintptr_t>(elements) * t.element_size());
  };
  const auto [x_first, x_last] = range(x);
  const auto [y_first, y_last] = range(y);
  if (x_first >= y_last || y_first >= x_last) return false;
  // Two column slices of one buffer lie between each other without touching.
  if (x.stride(0) != y.stride(0)) return true;
  const int64_t pitch = x.stride(0);
  if (pitch <= 0) return true;
  const auto size = static_cast<int64_t>(x.element_size());
  const int64_t bytes = static_cast<int64_t>(y_first) - static_cast<int64_t>(x_first);
  if (bytes % size != 0) return true;
  const int64_t shift = ((bytes / size) % pitch + pitch) % pitch;
  return shift < x.size(1) || shift + y.size(1) > pitch;
}

void project(const Tensor& jac, const Tensor& coefficients, const Tensor& result) {
  check_rows("jac", jac);
  check_rows("out", result);
  check_like("out", result, "jac", jac);
  STD_TORCH_CHECK(result.size(1) == jac.size(1), "out must have ", jac.size(1), " columns, got ",
                  result.size(1));
  check_small("coefficients", coefficients, ScalarType::Double, "jac", jac,
              {result.size(0), jac.size(0)});
  STD_TORCH_CHECK(jac.size(1) == 0 || !may_overlap(jac, result), "out must not overlap jac");
  const int tasks = count_of("jac", jac.size(0)), outputs = count_of("out", result.size(0));
  const OnDeviceOf device(jac);
  check_launch(with_row_type(jac, [&](auto zero) {
    using T = decltype(zero);
    const int64_t stride = outputs > 1 ? result.stride(0) : result.size(1);
    return kernels::project<T>(rows<T>(jac), in<double>(coefficients), tasks, outputs, jac.size(1),
                               kernels::rows_of<T>(out<T>(result), stride, outputs),
                               device.stream());
  }));
}

Tensor affinity(const Tensor& gram, const Tensor& losses, double lr) {
  STD_TORCH_CHECK(gram.dim() == 2, "gram must be a matrix [T, T], got ", gram.dim(), " dimensions");
  const int64_t tasks = gram.size(0);
  check_small("gram", gram, ScalarType::Double, "gram", gram, {tasks, tasks});
  check_small("losses", losses, ScalarType::Double, "gram", gram, {tasks});
  const OnDeviceOf device(gram);
  const Tensor result = fresh(gram, {tasks, tasks}, ScalarType::Double);
  check_launch(kernels::affinity(in<double>(gram), in<double>(losses), tasks, lr,
                                 out<double>(result), device.stream()));
  return result;
}

}  // namespace
}  // namespace flatmtl::cuda

STABLE_TORCH_LIBRARY_IMPL(flatmtl, CUDA, m) {
  using namespace flatmtl::cuda;
  m.impl("combine", TORCH_BOX(&combine));
  m.impl("combine_flat", TORCH_BOX(&combine_flat));
  m.impl("project", TORCH_BOX(&project));
  m.impl("affinity", TORCH_BOX(&affinity));
}
