// Norms of the rows of J [T, P].
//
// Floor: every row is read once, T P elements. Determinism: run to run, and the same on every
// device up to the contraction of a * b + c (reduce.cuh). Shapes: any T >= 1, any P >= 0, any row
// stride and alignment.
#pragma once

#include "gram_plan.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace flatmtl::kernels {

constexpr int kRowUnroll = 4;  // packs of a thread in flight

// Sums of squares of the rows. Grid (chunks, T). partials: [T, chunks].
template <class T>
__global__ void __launch_bounds__(kThreads)
    row_squares_kernel(Rows<const T> jac, int64_t columns, StripPlan plan, double* partials) {
  using A = Acc<T>;
  constexpr int kPack = Pack<T>::kSize, kUnroll = kRowUnroll;
  constexpr int64_t kStride = static_cast<int64_t>(kThreads) * kPack;
  const T* row = jac.row(blockIdx.y);
  const int64_t span = kStride * plan.steps;
  double sum = 0;
  for (int64_t start = blockIdx.x * span; start < columns; start += plan.chunks * span) {
    A acc = 0;
    for (int step = 0; step < plan.steps; step += kUnroll) {
      const int64_t column = start + step * kStride + static_cast<int64_t>(threadIdx.x) * kPack;
      const bool whole = jac.aligned && column + (kUnroll - 1) * kStride + kPack <= columns;
      Pack<T> x[kUnroll];
      if (whole) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) x[u] = load_pack_stream(row + column + u * kStride);
      } else {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) x[u] = load_guarded(row, column + u * kStride, columns);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
#pragma unroll
        for (int v = 0; v < kPack; ++v) {
          const A a = to_acc(x[u].lane[v]);
          acc += a * a;
        }
    }
    sum += static_cast<double>(acc);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials[blockIdx.y * plan.chunks + blockIdx.x] = sum;
}

inline int64_t row_norms_partials(int64_t tasks, int64_t columns, int row_bytes) {
  return tasks * strip_plan(columns, 16 / row_bytes, kRowUnroll).chunks;
}

// partials: row_norms_partials(...) doubles. out: [T].
template <class T>
cudaError_t row_norms(Rows<const T> jac, int64_t tasks, int64_t columns, double* partials,
                      double* out, cudaStream_t stream) {
  const StripPlan plan = strip_plan(columns, Pack<T>::kSize, kRowUnroll);
  if (plan.chunks > 0) {
    const dim3 grid(static_cast<unsigned>(plan.chunks), static_cast<unsigned>(tasks));
    const cudaError_t error = launch(row_squares_kernel<T>, grid, dim3(kThreads), 0, stream, jac,
                                     columns, plan, partials);
    if (error != cudaSuccess) return error;
  }
  return finish_sums<Finish::kSquareRoot>(partials, tasks, plan.chunks, out, stream);
}

}  // namespace flatmtl::kernels
