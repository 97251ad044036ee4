// CUDA bindings: pack_row_, perturb_, restore_, adaptive_sq_norm.
#include "../kernels/segments.cuh"

#include "binding.h"

namespace flatmtl::cuda {
namespace {

Tensor pack_row_(const Tensor& row, const std::vector<Tensor>& grads,
                 const std::vector<int64_t>& offsets, bool accumulate) {
  check_pack(row, grads, offsets);
  const SegmentTable table(grads, offsets);
  const int64_t columns = row.size(0);
  const OnDeviceOf device(row);
  const Tensor partials = scratch(row, kernels::pack_row_partials(table.size(), columns));
  const Tensor result = fresh(row, {}, ScalarType::Double);
  check_launch(with_row_types(row, grads.empty() ? row : grads[0], [&](auto zero, auto grad) {
    using T = decltype(zero);
    using G = decltype(grad);
    return kernels::pack_row<T, G>(table.data.data(), table.offset.data(), table.numel.data(),
                                   table.size(), accumulate, out<T>(row), columns,
                                   out<double>(partials), out<double>(result), device.stream());
  }));
  return result;
}

void perturb_(const std::vector<Tensor>& params, const Tensor& saved, const Tensor& row,
              const Tensor& sq_norm, const std::vector<int64_t>& offsets,
              const std::vector<double>& rho, bool adaptive, double eta) {
  check_perturb(params, saved, row, sq_norm, offsets, rho);
  const SegmentTable table(params, offsets);
  const std::vector<double> radii = table.select(rho);
  const OnDeviceOf device(row);
  check_launch(with_row_types(row, saved, [&](auto zero, auto param) {
    using T = decltype(zero);
    using U = decltype(param);
    return kernels::perturb<T, U>(table.data.data(), table.offset.data(), table.numel.data(),
                                  radii.data(), table.size(), in<U>(saved), in<T>(row),
                                  in<double>(sq_norm), row.size(0), adaptive, eta, device.stream());
  }));
}

void restore_(const std::vector<Tensor>& params, const Tensor& saved,
              const std::vector<int64_t>& offsets) {
  check_flat("saved", saved);
  check_segments("params", params, offsets, saved, "saved", saved);
  const SegmentTable table(params, offsets);
  const OnDeviceOf device(saved);
  check_launch(with_row_type(saved, [&](auto zero) {
    using T = decltype(zero);
    return kernels::restore<T>(table.data.data(), table.offset.data(), table.numel.data(),
                               table.size(), in<T>(saved), saved.size(0), device.stream());
  }));
}

Tensor adaptive_sq_norm(const Tensor& saved, const Tensor& row, double eta) {
  check_flat("row", row);
  check_saved(saved, row);
  const int64_t columns = row.size(0);
  const OnDeviceOf device(row);
  const Tensor partials =
      scratch(row, kernels::adaptive_sq_norm_partials(columns, row_bytes(saved)));
  const Tensor result = fresh(row, {}, ScalarType::Double);
  check_launch(with_row_types(row, saved, [&](auto zero, auto param) {
    using T = decltype(zero);
    using U = decltype(param);
    return kernels::adaptive_sq_norm<T, U>(in<U>(saved), in<T>(row), columns, eta,
                                           out<double>(partials), out<double>(result),
                                           device.stream());
  }));
  return result;
}

}  // namespace
}  // namespace flatmtl::cuda

STABLE_TORCH_LIBRARY_IMPL(flatmtl, CUDA, m) {
  using namespace flatmtl::cuda;
  m.impl("pack_row_", TORCH_BOX(&pack_row_));
  m.impl("perturb_", TORCH_BOX(&perturb_));
  m.impl("restore_", TORCH_BOX(&restore_));
  m.impl("adaptive_sq_norm", TORCH_BOX(&adaptive_sq_norm));
}
