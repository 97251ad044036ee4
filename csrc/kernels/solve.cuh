// The solvers of csrc/solvers/ on the device: one block a problem, a batch of B in one launch.
//
// T x T float64 problems: latency counts, not bytes. The scratch lies in shared memory where it
// fits 96 KiB (every method: T <= 64 and more), else in global memory that the caller gives.
// Determinism: run to run; sums inside a solver have an order fixed by the block's size, which
// depends on T only. Nothing is read back: iteration limits and a status word per problem.
#pragma once

#include "../solvers/problem.h"
#include "cuda_team.cuh"

namespace flatmtl::kernels {

// More threads would only wait at more barriers.
inline int solve_threads(int64_t tasks) { return tasks <= 8 ? 64 : tasks <= 16 ? 128 : kThreads; }

inline bool fits_shared(int64_t doubles) {
  return doubles * static_cast<int64_t>(sizeof(double)) <= static_cast<int64_t>(kLargestShared);
}

// Doubles of global scratch for a batch; 0 where shared memory is enough.
template <class Method>
int64_t solve_scratch(int64_t batch, int64_t tasks) {
  const int64_t size = Method::work(tasks);
  return fits_shared(size) ? 0 : batch * size;
}

template <class Method, bool kShared>
__global__ void __launch_bounds__(kThreads, 1)
    solve_kernel(const Method method, const double* gram, int64_t tasks, double* scratch,
                 double* weights, int64_t* status, double* residual) {
  FLATMTL_DYNAMIC_SHARED(double, memory);
  const int64_t b = blockIdx.x;
  BlockTeam team;
  const Problem p{
      gram + b * tasks * tasks, tasks, weights + b * tasks, status + b, residual + b, b};
  method(team, p, kShared ? memory : scratch + b * Method::work(tasks));
}

// gram: [B, T, T]; weights: [B, T], status: [B], residual: [B].
template <class Method>
cudaError_t solve(const Method& method, const double* gram, int64_t batch, int64_t tasks,
                  double* scratch, double* weights, int64_t* status, double* residual,
                  cudaStream_t stream) {
  if (batch == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(batch)), block(solve_threads(tasks));
  const int64_t size = Method::work(tasks);
  if (fits_shared(size))
    return launch(solve_kernel<Method, true>, grid, block, size * sizeof(double), stream, method,
                  gram, tasks, scratch, weights, status, residual);
  return launch(solve_kernel<Method, false>, grid, block, 0, stream, method, gram, tasks, scratch,
                weights, status, residual);
}

}  // namespace flatmtl::kernels
