// The solvers of csrc/solvers/ on the device: one block a problem, a batch of B in one launch.
//
// T x T float64 problems: latency counts, not bytes. The scratch lies in shared memory where it
// fits 96 KiB (every method: T <= 64 and more), else in global memory that the caller gives. A
// method of several problems that know nothing of each other (UPGrad: T of them) solves them in a
// block each and adds up in a second launch, while shared memory is enough.
// Determinism: run to run; sums inside a solver have an order fixed by the block's size, which
// depends on T only. Nothing is read back: iteration limits and a status word per problem.
#pragma once

#include <type_traits>

#include "../solvers/problem.h"
#include "cuda_team.cuh"

namespace flatmtl::kernels {

// Phases are over the T rows, mostly: more threads would only make their barriers dearer. One warp
// has none to wait for.
inline int solve_threads(int64_t tasks) { return tasks <= 32 ? 32 : tasks <= 64 ? 64 : kThreads; }

inline bool fits_shared(int64_t doubles) {
  return doubles * static_cast<int64_t>(sizeof(double)) <= static_cast<int64_t>(kLargestShared);
}

// Methods with part() and add_up() (solvers/dual_cone.h).
template <class Method, class = void>
constexpr bool kHasParts = false;
template <class Method>
constexpr bool kHasParts<Method, std::void_t<decltype(&Method::part_size)>> = true;

// Whether this solve is spread over blocks.
template <class Method>
bool in_parts(const Method& method, int64_t tasks) {
  if constexpr (kHasParts<Method>)
    return method.parts(tasks) > 1 && fits_shared(Method::work(tasks));
  return false;
}

// Doubles of global scratch for a batch.
template <class Method>
int64_t solve_scratch(const Method& method, int64_t batch, int64_t tasks) {
  const int64_t size = Method::work(tasks);
  if (!fits_shared(size)) return batch * size;
  if constexpr (kHasParts<Method>)
    if (in_parts(method, tasks)) return batch * method.parts(tasks) * Method::part_size(tasks);
  return 0;
}

__device__ inline Problem problem_of(int64_t b, const double* gram, int64_t tasks, double* weights,
                                     int64_t* status, double* residual) {
  return {gram + b * tasks * tasks, tasks, weights + b * tasks, status + b, residual + b, b};
}

template <class Method, bool kShared>
__global__ void __launch_bounds__(kThreads, 1)
    solve_kernel(const Method method, const double* gram, int64_t tasks, double* scratch,
                 double* weights, int64_t* status, double* residual) {
  FLATMTL_DYNAMIC_SHARED(double, memory);
  const int64_t b = blockIdx.x;
  BlockTeam team;
  method(team, problem_of(b, gram, tasks, weights, status, residual),
         kShared ? memory : scratch + b * Method::work(tasks));
}

// Grid (parts, B). outs: [B, parts, part_size]
template <class Method>
__global__ void __launch_bounds__(kThreads, 1)
    solve_part_kernel(const Method method, const double* gram, int64_t tasks, double* outs) {
  FLATMTL_DYNAMIC_SHARED(double, memory);
  const int64_t b = blockIdx.y, i = blockIdx.x;
  BlockTeam team;
  method.part(team, problem_of(b, gram, tasks, nullptr, nullptr, nullptr), memory, i,
              outs + (b * gridDim.x + i) * Method::part_size(tasks));
}

template <class Method>
__global__ void __launch_bounds__(kThreads, 1)
    add_up_kernel(const Method method, const double* gram, int64_t tasks, const double* outs,
                  double* weights, int64_t* status, double* residual) {
  FLATMTL_DYNAMIC_SHARED(double, memory);
  const int64_t b = blockIdx.x;
  BlockTeam team;
  method.add_up(team, problem_of(b, gram, tasks, weights, status, residual), memory,
                outs + b * method.parts(tasks) * Method::part_size(tasks));
}

template <class Method>
cudaError_t solve_in_parts(const Method& method, const double* gram, int64_t batch, int64_t tasks,
                           double* outs, double* weights, int64_t* status, double* residual,
                           cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(batch);
  const dim3 block(solve_threads(tasks));
  const size_t shared = Method::work(tasks) * sizeof(double);
  const cudaError_t error =
      launch(solve_part_kernel<Method>, dim3(static_cast<unsigned>(method.parts(tasks)), blocks),
             block, shared, stream, method, gram, tasks, outs);
  if (error != cudaSuccess) return error;
  return launch(add_up_kernel<Method>, dim3(blocks), block, shared, stream, method, gram, tasks,
                static_cast<const double*>(outs), weights, status, residual);
}

// gram: [B, T, T]; scratch: solve_scratch(...) doubles; weights: [B, T], status: [B], residual:
// [B].
template <class Method>
cudaError_t solve(const Method& method, const double* gram, int64_t batch, int64_t tasks,
                  double* scratch, double* weights, int64_t* status, double* residual,
                  cudaStream_t stream) {
  if (batch == 0) return cudaSuccess;
  if constexpr (kHasParts<Method>) {
    constexpr int64_t kLargestGridY = 65535;
    if (in_parts(method, tasks) && batch <= kLargestGridY)
      return solve_in_parts(method, gram, batch, tasks, scratch, weights, status, residual, stream);
  }
  const dim3 grid(static_cast<unsigned>(batch)), block(solve_threads(tasks));
  const int64_t size = Method::work(tasks);
  if (fits_shared(size))
    return launch(solve_kernel<Method, true>, grid, block, size * sizeof(double), stream, method,
                  gram, tasks, scratch, weights, status, residual);
  return launch(solve_kernel<Method, false>, grid, block, 0, stream, method, gram, tasks, scratch,
                weights, status, residual);
}

}  // namespace flatmtl::kernels
