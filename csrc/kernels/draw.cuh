// Random task orders and normal numbers from a stream (seed, step) that lies on the device: one
// block a problem. The orders are the host's, the
// normal numbers too up to the rounding of a cosine; the step is counted on the device.
#pragma once

#include "../solvers/normal.h"
#include "../solvers/order.h"
#include "advance.cuh"
#include "solve.cuh"

namespace flatmtl::kernels {

// rng: [2] = (seed, step). advance: this launch also counts the step (one block only).
template <bool kAdvance>
__global__ void __launch_bounds__(kThreads)
    draw_order_kernel(int64_t* rng, int64_t tasks, int64_t* order) {
  const uint64_t seed = static_cast<uint64_t>(rng[0]), step = static_cast<uint64_t>(rng[1]);
  BlockTeam team;
  draw_order(team, seed, step, blockIdx.x, tasks, order + blockIdx.x * tasks * tasks);
  if (kAdvance && threadIdx.x == 0) rng[1] = static_cast<int64_t>(step + 1);
}

template <bool kAdvance>
__global__ void __launch_bounds__(kThreads)
    draw_normal_kernel(int64_t* rng, int64_t tasks, double* out) {
  const uint64_t seed = static_cast<uint64_t>(rng[0]), step = static_cast<uint64_t>(rng[1]);
  BlockTeam team;
  draw_normal(team, seed, step, blockIdx.x, tasks, out + blockIdx.x * tasks);
  if (kAdvance && threadIdx.x == 0) rng[1] = static_cast<int64_t>(step + 1);
}

// Blocks of one launch read the step in no order: with more than one it is counted by a launch of
// its own.
template <class Out>
cudaError_t draw(void (*alone)(int64_t*, int64_t, Out*), void (*many)(int64_t*, int64_t, Out*),
                 int64_t* rng, int64_t batch, int64_t tasks, Out* out, cudaStream_t stream) {
  const dim3 block(solve_threads(tasks));
  if (batch == 1) return launch(alone, dim3(1), block, 0, stream, rng, tasks, out);
  if (batch > 1) {
    const cudaError_t error =
        launch(many, dim3(static_cast<unsigned>(batch)), block, 0, stream, rng, tasks, out);
    if (error != cudaSuccess) return error;
  }
  return launch(advance_kernel<1>, dim3(1), dim3(1), 0, stream, rng);
}

// rng: [2], order: [B, T, T].
inline cudaError_t draw_orders(int64_t* rng, int64_t batch, int64_t tasks, int64_t* order,
                               cudaStream_t stream) {
  return draw<int64_t>(draw_order_kernel<true>, draw_order_kernel<false>, rng, batch, tasks, order,
                       stream);
}

// rng: [2], out: [B, T].
inline cudaError_t draw_normals(int64_t* rng, int64_t batch, int64_t tasks, double* out,
                                cudaStream_t stream) {
  return draw<double>(draw_normal_kernel<true>, draw_normal_kernel<false>, rng, batch, tasks, out,
                      stream);
}

}  // namespace flatmtl::kernels
