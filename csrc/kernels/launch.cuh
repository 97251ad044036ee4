// The one place where a kernel is launched, so that tests/cuda_emulation can run the same kernels
// on the CPU: there, cuda_runtime.h is a stand-in that defines FLATMTL_EMULATED and
// emulated::launch.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

// Dynamic shared memory as `type* name`, 16-byte aligned.
#ifdef FLATMTL_EMULATED
#define FLATMTL_DYNAMIC_SHARED(type, name) \
  type* name = reinterpret_cast<type*>(emulated::dynamic_shared())
#define FLATMTL_GRID_CONSTANT
#else
#define FLATMTL_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char flatmtl_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(flatmtl_dynamic_shared)
#if defined(__clang__)
#define FLATMTL_GRID_CONSTANT
#else
#define FLATMTL_GRID_CONSTANT __grid_constant__
#endif
#endif

namespace flatmtl::kernels {

// What every supported device gives a block without and with the opt-in attribute (sm_120: 99 KiB).
constexpr size_t kDefaultShared = 48 * 1024;
constexpr size_t kLargestShared = 96 * 1024;

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, const Arguments&... arguments) {
#ifdef FLATMTL_EMULATED
  (void)stream;
  return emulated::launch(grid, block, shared_bytes, [&] { kernel(arguments...); });
#else
  if (shared_bytes > kDefaultShared) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  // clang-format off
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);  // it would tear the >>> apart
  // clang-format on
  return cudaGetLastError();
#endif
}

inline __host__ __device__ int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace flatmtl::kernels
