// First-order inter-task affinity of TAG: Z[j, i] = lr * G_ij / L_j, the relative fall of the loss
// of task j (row, the recipient) after a step of length lr along the gradient of task i (column).
// A loss that is not positive and finite has no relative fall: its row is NaN.
//
// Floor: reads and writes T^2 numbers, once an epoch or a step: the launch is the cost.
// Determinism: elementwise.
#pragma once

#include <cmath>

#include "reduce.cuh"

namespace flatmtl::kernels {

// gram: [T, T], losses: [T], out: [T, T]
static __global__ void __launch_bounds__(kThreads)
    affinity_kernel(const double* gram, const double* losses, int64_t tasks, double lr,
                    double* out) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= tasks * tasks) return;
  const double loss = losses[index / tasks];
  const bool sound = loss > 0 && loss - loss == 0;
  out[index] = sound ? lr * gram[index] / loss : NAN;
}

inline cudaError_t affinity(const double* gram, const double* losses, int64_t tasks, double lr,
                            double* out, cudaStream_t stream) {
  if (tasks == 0) return cudaSuccess;
  return launch(affinity_kernel, dim3(static_cast<unsigned>(ceil_div(tasks * tasks, kThreads))),
                dim3(kThreads), 0, stream, gram, losses, tasks, lr, out);
}

}  // namespace flatmtl::kernels
