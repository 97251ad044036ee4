// The CUDA team of csrc/solvers/team.h: one block solves one small problem.
// Every member calls every phase (control flow in a solver is uniform); sums have a fixed order,
// which depends on the block's size only.
#pragma once

#include "../solvers/team.h"
#include "reduce.cuh"

namespace flatmtl::kernels {

struct BlockTeam {
  template <class F>
  __device__ void each(int64_t n, F f) const {
#pragma unroll 1  // mostly one turn: unrolling would only cost registers and code
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) f(i);
    __syncthreads();
  }

  // A power of two of threads walks a row's columns, so that no division is needed.
  template <class F>
  __device__ void each2(int64_t rows, int64_t cols, F f) const {
    int shift = 0;
    while (shift < 5 && (1 << shift) < cols) ++shift;
    const int width = 1 << shift, step = static_cast<int>(blockDim.x) >> shift;
    for (int64_t i = static_cast<int>(threadIdx.x) >> shift; i < rows; i += step)
      for (int64_t j = static_cast<int>(threadIdx.x) & (width - 1); j < cols; j += width) f(i, j);
    __syncthreads();
  }

  template <class F>
  __device__ double sum(int64_t n, F f) const {
    double total = 0;
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) total += f(i);
    return block_sum(total);
  }

  template <class F>
  __device__ double max(int64_t n, F f) const {
    if (n == 0) return 0;
    // Members without an item repeat the last one: no sentinel value is needed.
    double largest = f(threadIdx.x < n ? threadIdx.x : n - 1);
#pragma unroll 1
    for (int64_t i = threadIdx.x + blockDim.x; i < n; i += blockDim.x) {
      const double value = f(i);
      largest = value > largest || value != value ? value : largest;
    }
    return block_max(largest);
  }

  template <class F>
  __device__ void one(F f) const {
    if (threadIdx.x == 0) f();
    __syncthreads();
  }
};

}  // namespace flatmtl::kernels
