// Gram matrices of the rows of J [T, P]:  G = J J^T,  of the differences S - J,  and of both in one
// sweep.
//
// Floor: every row is read once, T P elements (2 T P for the difference and for both), ceil(T / 64)
// times for T > 64; nothing but partial sums is written (at most 16 MiB of doubles to T = 2048, or
// 4096 chunks of T <= 8). Determinism: run to run. Chunks are cut from shapes (gram_plan.h), lane
// sums have at most kLaneTerms terms, chunks are added in order. Shapes: any T >= 1, any P >= 0,
// any row stride and alignment. G is exactly symmetric.
//
//   T <= 8                  gram_small.cuh    the triangle in every thread's registers
//   T <= 64, half precision gram_mma.cuh      tensor cores, rows straight from memory
//   32 < T <= 64, float32   gram_mma.cuh      the same, in three bfloat16 parts
//   else                    gram_tiled.cuh    rows staged in shared memory
//
// Both: one sweep for T <= 4, and for 9 to 32 rows in half precision; for others the bindings run
// two sweeps (3 T P). The plan is the same, and so is every lane's sum: the bits are those of the
// two alone.
#pragma once

#include "gram_mma.cuh"
#include "gram_small.cuh"
#include "gram_tiled.cuh"

namespace flatmtl::kernels {

// out: [T, T], both halves. Grid (T, T); blocks below the diagonal have nothing to do. The block's
// size follows the number of chunks, which follows the shape: the order of the sum stays fixed.
static __global__ void __launch_bounds__(kThreads)
    finish_gram_kernel(const double* partials, int64_t chunks, double* out) {
  const int64_t i = blockIdx.y, j = blockIdx.x, tasks = gridDim.x;
  if (j < i) return;
  const double* row = partials + triangle_index(i, j, tasks) * chunks;
  double sum = 0;
  for (int64_t c = threadIdx.x; c < chunks; c += blockDim.x) sum += row[c];
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[i * tasks + j] = out[j * tasks + i] = sum;
}

// ---- launchers ---------------------------------------------------------------------------------

inline cudaError_t finish_gram(const double* partials, int tasks, int64_t chunks, double* out,
                               cudaStream_t stream) {
  return launch(finish_gram_kernel, dim3(tasks, tasks), dim3(chunks <= 64 ? kWarp : kThreads), 0,
                stream, partials, chunks, out);
}

// The partial sums of kOf. Of both: of the rows, then of the differences.
template <class T, Of kOf>
cudaError_t gram_sums(Rows<const T> jac, Rows<const T> sam, int tasks, int64_t columns,
                      double* partials, cudaStream_t stream) {
  switch (gram_kernel(tasks, sizeof(T))) {
    case GramKernel::kSmall:
      return gram_small<T, kOf>(jac, sam, tasks, columns, partials, stream);
    case GramKernel::kMma:
      if constexpr (sizeof(T) == 2 || (sizeof(T) == 4 && kOf != Of::kBoth))
        return gram_mma<T, kOf>(jac, sam, tasks, columns, partials, stream);
      return cudaErrorInvalidValue;
    default:
      if constexpr (kOf != Of::kBoth)
        return gram_tiled<T, kOf == Of::kDifference>(jac, sam, tasks, columns, partials, stream);
      return cudaErrorInvalidValue;
  }
}

// partials: gram_partials(...) doubles. out: [T, T]. kDifference: the rows are sam - jac.
template <class T, bool kDifference>
cudaError_t gram(Rows<const T> jac, Rows<const T> sam, int tasks, int64_t columns, double* partials,
                 double* out, cudaStream_t stream) {
  constexpr Of kOf = kDifference ? Of::kDifference : Of::kRows;
  const cudaError_t error = gram_sums<T, kOf>(jac, sam, tasks, columns, partials, stream);
  if (error != cudaSuccess) return error;
  return finish_gram(partials, tasks, gram_chunks(tasks, columns, sizeof(T)), out, stream);
}

// pairs_in_one_sweep(T). partials: 2 gram_partials(...) doubles. out, difference: [T, T].
template <class T>
cudaError_t gram_pair(Rows<const T> jac, Rows<const T> sam, int tasks, int64_t columns,
                      double* partials, double* out, double* difference, cudaStream_t stream) {
  const int64_t chunks = gram_chunks(tasks, columns, sizeof(T));
  cudaError_t error = gram_sums<T, Of::kBoth>(jac, sam, tasks, columns, partials, stream);
  if (error == cudaSuccess) error = finish_gram(partials, tasks, chunks, out, stream);
  if (error == cudaSuccess)
    error = finish_gram(partials + triangle(tasks) * chunks, tasks, chunks, difference, stream);
  return error;
}

}  // namespace flatmtl::kernels
