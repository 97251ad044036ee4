// What every CUDA binding needs: device guard, stream, scratch, dtype switch, what a failed launch
// says. Included by .cu only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../common/check.h"
#include "../common/launch_error.h"
#include "../common/operands.h"
#include "../kernels/vec.cuh"

#ifndef FLATMTL_BUILD_ARCHS
#define FLATMTL_BUILD_ARCHS "unknown"
#endif

namespace flatmtl::cuda {

namespace stable = torch::stable;

// The device of a tensor is current while this lives; kernels and scratch go on its current stream.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

inline Tensor scratch(const Tensor& like, int64_t doubles) {
  return fresh(like, {doubles}, ScalarType::Double);
}

template <class T>
const T* in(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* out(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// t: [T, P], checked.
template <class T>
kernels::Rows<const T> rows(const Tensor& t) {
  return kernels::rows_of<const T>(in<T>(t), t.size(0) > 1 ? t.stride(0) : t.size(1), t.size(0));
}

inline int row_bytes(const Tensor& t) { return static_cast<int>(t.element_size()); }

// Calls f(T{}) with the row type of t, which check_row_type has seen.
template <class F>
auto with_row_type(const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(__half{});
    case ScalarType::BFloat16:
      return f(__nv_bfloat16{});
    default:
      return f(float{});
  }
}

// Calls f(T{}, U{}) with the types of rows and of what lies beside them, which check_beside has
// seen: twice the same, or float32 beside half precision.
template <class F>
auto with_row_types(const Tensor& row, const Tensor& beside, const F& f) {
  if (row.scalar_type() == beside.scalar_type())
    return with_row_type(row, [&](auto zero) { return f(zero, zero); });
  if (row.scalar_type() == ScalarType::BFloat16) return f(__nv_bfloat16{}, float{});
  return f(__half{}, float{});
}

// Grid and Gram indices are int: far above any number of tasks that fits a device.
inline int count_of(const char* name, int64_t n) {
  STD_TORCH_CHECK(n <= 16384, name, " must have at most 16384 rows, got ", n);
  return static_cast<int>(n);
}

// Throws for a launch that failed. An architecture is first met here: importing the package must
// not start CUDA.
[[gnu::cold, gnu::noinline]] inline void launch_failed(cudaError_t error) {
  (void)cudaGetLastError();  // this library's own runtime would report it again at the next launch
  Mismatch found;
  found.code = error;
  found.name = cudaGetErrorName(error);
  found.toolkit = CUDART_VERSION;
  found.archs = FLATMTL_BUILD_ARCHS;
  int major = 0, minor = 0;
  if (cudaGetDevice(&found.device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, found.device) ==
          cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, found.device) ==
          cudaSuccess)
    found.capability = 10 * major + minor;
  (void)cudaDriverGetVersion(&found.driver);
  const std::string text = mismatch_text(found);
  if (!text.empty()) throw std::runtime_error(text);
  STD_CUDA_CHECK(error);
}

inline void check_launch(cudaError_t error) {
  if (error != cudaSuccess) launch_failed(error);
}

}  // namespace flatmtl::cuda
