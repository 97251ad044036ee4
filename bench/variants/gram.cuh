// Gram matrices of 9 to 64 rows in other ways than the shipped one (csrc/kernels/gram.cuh).
//
//   kStaged   float32, bfloat16   the shipped shared-memory kernel, where it is not chosen
//   kMma      float32             the shipped tensor-core kernel, where it is not chosen
//   kTf32     float32             gram_tf32.cuh
//   kAsync    float32, T <= 32    gram_async.cuh
//
// Floor, as the shipped ones: every row is read once, T P elements.
#pragma once

#include "../../csrc/kernels/gram.cuh"
#include "gram_async.cuh"
#include "gram_tf32.cuh"

namespace flatmtl::variants {

enum class GramVariant { kStaged, kTf32, kAsync, kMma };

inline int64_t gram_chunks(GramVariant variant, int tasks, int64_t columns) {
  const bool tensor_cores = variant == GramVariant::kTf32 || variant == GramVariant::kMma;
  return tensor_cores ? kernels::mma_plan(tasks, columns, 4).chunks
                      : kernels::tile_plan<float>(tasks, columns).chunks;
}

template <class T>
cudaError_t gram_sums(GramVariant variant, kernels::Rows<const T> jac, int tasks, int64_t columns,
                      double* partials, cudaStream_t stream) {
  if (variant == GramVariant::kStaged)
    return kernels::gram_tiled<T, false>(jac, jac, tasks, columns, partials, stream);
  if constexpr (std::is_same_v<T, float>) {
    if (variant == GramVariant::kMma)
      return kernels::gram_mma<T, kernels::Of::kRows, kernels::kSmallTasks + 1>(
          jac, jac, tasks, columns, partials, stream);
    if (variant == GramVariant::kTf32) return gram_tf32(jac, tasks, columns, partials, stream);
    if (tasks <= kAsyncTasks)
      return gram_async(jac, tasks, columns, kernels::tile_plan<float>(tasks, columns), partials,
                        stream);
  }
  return cudaErrorInvalidValue;
}

// partials: triangle(T) * gram_chunks(...) doubles. out: [T, T].
template <class T>
cudaError_t gram(GramVariant variant, kernels::Rows<const T> jac, int tasks, int64_t columns,
                 double* partials, double* out, cudaStream_t stream) {
  const cudaError_t error = gram_sums(variant, jac, tasks, columns, partials, stream);
  if (error != cudaSuccess) return error;
  return kernels::finish_gram(partials, tasks, gram_chunks(variant, tasks, columns), out, stream);
}

}  // namespace flatmtl::variants
