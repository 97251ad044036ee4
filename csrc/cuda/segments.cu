// CUDA bindings: pack_row_, perturb_, restore_, adaptive_sq_norm.
#include "../kernels/segments.cuh"

#include "binding.h"

namespace flatmtl::cuda {
namespace {

Tensor pack_row_(const Tensor& row, const std::vector<Tensor>& grads,
                 const std::vector<int64_t>& offsets) {
  check_flat("row", row);
  check_segments("grads", grads, offsets, row);
  const SegmentTable table(grads, offsets);
  const int64_t columns = row.size(0);
  const OnDeviceOf device(row);
  const Tensor partials = scratch(row, kernels::pack_row_partials(table.size(), columns));
  const Tensor result = fresh(row, {}, ScalarType::Double);
  STD_CUDA_CHECK(with_row_type(row, [&](auto zero) {
    using T = decltype(zero);
    return kernels::pack_row<T>(table.data.data(), table.offset.data(), table.numel.data(),
                                table.size(), out<T>(row), columns, out<double>(partials),
                                out<double>(result), device.stream());
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
  STD_CUDA_CHECK(with_row_type(row, [&](auto zero) {
    using T = decltype(zero);
    return kernels::perturb<T>(table.data.data(), table.offset.data(), table.numel.data(),
                               radii.data(), table.size(), in<T>(saved), in<T>(row),
                               in<double>(sq_norm), row.size(0), adaptive, eta, device.stream());
  }));
}

void restore_(const std::vector<Tensor>& params, const Tensor& saved,
              const std::vector<int64_t>& offsets) {
  check_flat("saved", saved);
  check_segments("params", params, offsets, saved);
  const SegmentTable table(params, offsets);
  const OnDeviceOf device(saved);
  STD_CUDA_CHECK(with_row_type(saved, [&](auto zero) {
    using T = decltype(zero);
    return kernels::restore<T>(table.data.data(), table.offset.data(), table.numel.data(),
                               table.size(), in<T>(saved), saved.size(0), device.stream());
  }));
}

Tensor adaptive_sq_norm(const Tensor& saved, const Tensor& row, double eta) {
  check_flat("row", row);
  check_same_flat("saved", saved, "row", row);
  const int64_t columns = row.size(0);
  const OnDeviceOf device(row);
  const Tensor partials = scratch(row, kernels::adaptive_sq_norm_partials(columns, row_bytes(row)));
  const Tensor result = fresh(row, {}, ScalarType::Double);
  STD_CUDA_CHECK(with_row_type(row, [&](auto zero) {
    using T = decltype(zero);
    return kernels::adaptive_sq_norm<T>(in<T>(saved), in<T>(row), columns, eta,
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
