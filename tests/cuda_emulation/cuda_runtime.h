// A stand-in for CUDA's header, so that g++ compiles csrc/kernels/*.cuh and the kernels run on the
// CPU.
//
// Every thread of a block is a fiber (emulator.cpp). A fiber runs until it meets a barrier or a
// warp exchange; the order in which fibers run is the test's choice (forward, backward, random), so
// that a missing barrier gives a wrong result. Caught besides: barriers that not all threads reach,
// threads at different barriers, 16- and 8-byte accesses that are not aligned, shared memory beyond
// what was asked for, reads of dynamic shared memory before it is written (it starts as NaN).
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define FLATMTL_EMULATED 1
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

using std::max;
using std::min;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);
void* dynamic_shared();
void barrier(const char* file, int line);
// Puts `mine` up for the warp and returns lane `source`'s value, once all lanes of the warp are
// here.
double exchange(double mine, int source, const char* file, int line);
// mma.m16n8k16, for the lane that calls: c += a b^T. half: float16, else bfloat16.
void mma(float (&c)[4], const std::array<uint32_t, 4>& a, const std::array<uint32_t, 2>& b,
         bool half, const char* file, int line);
// mma.m16n8k8 of tf32 operands, whose 13 last bits are not read.
void mma_tf32(float (&c)[4], const std::array<uint32_t, 4>& a, const std::array<uint32_t, 2>& b,
              const char* file, int line);
// cp.async of the thread that calls: until it has waited for a copy there are NaNs at `to`. Of
// `from`, `count` bytes are read; the rest of `bytes` becomes zero.
void copy_async(void* to, const void* from, size_t bytes, size_t count);
void commit_copies();
void wait_copies(int left);  // until at most so many of the groups committed last are on their way
void fail(const char* what);

inline void check_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail("a wide access is not aligned");
}

}  // namespace emulated

#define __syncthreads() emulated::barrier(__FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, offset) \
  emulated::exchange(value, static_cast<int>(threadIdx.x % 32) ^ (offset), __FILE__, __LINE__)

#define __syncwarp() emulated::exchange(0, 0, __FILE__, __LINE__)

// Rounded by themselves; g++ has no fused multiply-add to contract to without -mfma.
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }

// Copies of it are the wide accesses of a kernel.
template <int kInts>
struct alignas(4 * kInts) EmulatedInts {
  int lane[kInts];
  EmulatedInts() = default;
  EmulatedInts(const EmulatedInts& from) {
    emulated::check_aligned(&from, sizeof(from));
    std::memcpy(static_cast<void*>(this), &from, sizeof(from));
  }
  EmulatedInts& operator=(const EmulatedInts& from) {
    emulated::check_aligned(this, sizeof(from));
    emulated::check_aligned(&from, sizeof(from));
    std::memcpy(static_cast<void*>(this), &from, sizeof(from));
    return *this;
  }
};
using int4 = EmulatedInts<4>;
using int2 = EmulatedInts<2>;

template <int kInts>
EmulatedInts<kInts> __ldcs(const EmulatedInts<kInts>* address) {
  return *address;
}
