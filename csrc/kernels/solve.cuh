// The solvers of csrc/solvers/ on the device: one block a problem, a batch of B in one launch.
//
// T x T float64 problems: latency counts, not bytes. The scratch lies in shared memory where it
// fits 96 KiB (PCGrad and MGDA: T <= 64 and more), else in global memory that the caller gives.
// Determinism: run to run; sums inside a solver have an order fixed by the block's size, which
// depends on T only. Nothing is read back: iteration limits and a status word per problem.
#pragma once

#include "../solvers/mgda.h"
#include "../solvers/order.h"
#include "../solvers/pcgrad.h"
#include "cuda_team.cuh"

namespace flatmtl::kernels {

// More threads would only wait at more barriers.
inline int solve_threads(int64_t tasks) { return tasks <= 8 ? 64 : tasks <= 16 ? 128 : kThreads; }

inline bool fits_shared(int64_t doubles) {
  return doubles * static_cast<int64_t>(sizeof(double)) <= static_cast<int64_t>(kLargestShared);
}

// PCGrad reads the Gram matrix over and over: with shared scratch it gets a copy there.
inline int64_t pcgrad_shared_doubles(int64_t tasks) { return tasks * tasks + pcgrad_work(tasks); }

// Doubles of global scratch for a batch; 0 where shared memory is enough.
inline int64_t pcgrad_scratch(int64_t batch, int64_t tasks) {
  return fits_shared(pcgrad_shared_doubles(tasks)) ? 0 : batch * pcgrad_work(tasks);
}
inline int64_t mgda_scratch(int64_t batch, int64_t tasks) {
  return fits_shared(mgda_work(tasks)) ? 0 : batch * mgda_work(tasks);
}

template <bool kShared>
__global__ void __launch_bounds__(kThreads, 1)
    pcgrad_kernel(const double* gram, const int64_t* order, int64_t tasks, double* scratch,
                  double* weights, double* coefficients, int64_t* status) {
  FLATMTL_DYNAMIC_SHARED(double, memory);
  const int64_t b = blockIdx.x, square = tasks * tasks;
  BlockTeam team;
  const double* problem = gram + b * square;
  if constexpr (kShared) {
    team.each(square, [&](int64_t i) { memory[i] = problem[i]; });
    pcgrad(team, memory, order + b * square, tasks, memory + square, weights + b * tasks,
           coefficients + b * square, status + b);
  } else {
    pcgrad(team, problem, order + b * square, tasks, scratch + b * pcgrad_work(tasks),
           weights + b * tasks, coefficients + b * square, status + b);
  }
}

template <bool kShared>
__global__ void __launch_bounds__(kThreads, 1)
    mgda_kernel(const double* gram, int64_t tasks, double ridge, double* scratch, double* weights,
                int64_t* status, double* residual) {
  FLATMTL_DYNAMIC_SHARED(double, memory);
  const int64_t b = blockIdx.x;
  BlockTeam team;
  double* work = kShared ? memory : scratch + b * mgda_work(tasks);
  mgda(team, gram + b * tasks * tasks, tasks, ridge, work, weights + b * tasks, status + b,
       residual + b);
}

// rng: [2] = (seed, step). advance: this launch also counts the step (one block only).
template <bool kAdvance>
__global__ void __launch_bounds__(kThreads)
    draw_order_kernel(int64_t* rng, int64_t tasks, int64_t* order) {
  const uint64_t seed = static_cast<uint64_t>(rng[0]), step = static_cast<uint64_t>(rng[1]);
  BlockTeam team;
  draw_order(team, seed, step, blockIdx.x, tasks, order + blockIdx.x * tasks * tasks);
  if (kAdvance && threadIdx.x == 0) rng[1] = static_cast<int64_t>(step + 1);
}

template <int kStep>
__global__ void advance_kernel(int64_t* rng) {
  rng[1] = static_cast<int64_t>(static_cast<uint64_t>(rng[1]) + kStep);
}

// ---- launchers ---------------------------------------------------------------------------------

// gram: [B, T, T], order: [B, T, T]; weights: [B, T], coefficients: [B, T, T], status: [B].
inline cudaError_t solve_pcgrad(const double* gram, const int64_t* order, int64_t batch,
                                int64_t tasks, double* scratch, double* weights,
                                double* coefficients, int64_t* status, cudaStream_t stream) {
  if (batch == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(batch)), block(solve_threads(tasks));
  const int64_t shared = pcgrad_shared_doubles(tasks);
  if (fits_shared(shared))
    return launch(pcgrad_kernel<true>, grid, block, shared * sizeof(double), stream, gram, order,
                  tasks, scratch, weights, coefficients, status);
  return launch(pcgrad_kernel<false>, grid, block, 0, stream, gram, order, tasks, scratch, weights,
                coefficients, status);
}

// gram: [B, T, T]; weights: [B, T], status: [B], residual: [B].
inline cudaError_t solve_mgda(const double* gram, int64_t batch, int64_t tasks, double ridge,
                              double* scratch, double* weights, int64_t* status, double* residual,
                              cudaStream_t stream) {
  if (batch == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(batch)), block(solve_threads(tasks));
  const int64_t shared = mgda_work(tasks);
  if (fits_shared(shared))
    return launch(mgda_kernel<true>, grid, block, shared * sizeof(double), stream, gram, tasks,
                  ridge, scratch, weights, status, residual);
  return launch(mgda_kernel<false>, grid, block, 0, stream, gram, tasks, ridge, scratch, weights,
                status, residual);
}

// rng: [2], order: [B, T, T].
inline cudaError_t draw_orders(int64_t* rng, int64_t batch, int64_t tasks, int64_t* order,
                               cudaStream_t stream) {
  const dim3 block(solve_threads(tasks));
  if (batch == 1)
    return launch(draw_order_kernel<true>, dim3(1), block, 0, stream, rng, tasks, order);
  // Blocks of one launch read the step in no order: it is counted by a launch of its own.
  if (batch > 1) {
    const cudaError_t error = launch(draw_order_kernel<false>, dim3(static_cast<unsigned>(batch)),
                                     block, 0, stream, rng, tasks, order);
    if (error != cudaSuccess) return error;
  }
  return launch(advance_kernel<1>, dim3(1), dim3(1), 0, stream, rng);
}

}  // namespace flatmtl::kernels
