// cp.async: copies from global to shared memory that pass no register.
#pragma once

#include "../../csrc/kernels/launch.cuh"

namespace flatmtl::variants {

// 16 bytes; both addresses are aligned to them.
__device__ inline void copy_async_vector(float* to, const float* from) {
#ifdef FLATMTL_EMULATED
  emulated::copy_async(to, from, 16, 16);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
#endif
}

// One float, or zero; `from` is an address of the row either way.
__device__ inline void copy_async_float(float* to, const float* from, bool there) {
#ifdef FLATMTL_EMULATED
  emulated::copy_async(to, from, 4, there ? 4 : 0);
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(there ? 4 : 0)
               : "memory");
#endif
}

__device__ inline void commit_copies() {
#ifdef FLATMTL_EMULATED
  emulated::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all groups but the last kLeft have come; the other threads' are seen after a barrier.
template <int kLeft>
__device__ inline void wait_copies() {
#ifdef FLATMTL_EMULATED
  emulated::wait_copies(kLeft);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

}  // namespace flatmtl::variants
