// Gram matrices of at most kSmallTasks rows: a thread loads a pack of every row and holds the
// triangle of T (T + 1) / 2 sums in registers. For T <= kPairTasks that of J and that of S - J at
// once.
//
// Floor, determinism and shapes: gram.cuh. The same bits on every device, up to the contraction of
// a * b + c.
#pragma once

#include "gram_entry.cuh"
#include "gram_plan.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace flatmtl::kernels {

// A constant of its own: device code may not call host constexpr functions.
template <int kTasks, bool kSam>
constexpr int kSmallUnroll = small_unroll(kTasks, kSam);

// Blocks a multiprocessor should hold. Two where 128 registers a thread are enough; the packs of
// two matrices, or sums in float64, need more.
template <class T, int kTasks, Of kOf>
constexpr int small_blocks =
    sizeof(T) == 8 || (sizeof(T) == 2 && kOf != Of::kRows && kTasks > 5) ? 1 : 2;

// acc += the upper triangle of a a^T
template <int kTasks, class A>
__device__ inline void add_triangle(const A (&a)[kTasks], A (&acc)[kTasks * (kTasks + 1) / 2]) {
  int e = 0;
#pragma unroll
  for (int i = 0; i < kTasks; ++i)
#pragma unroll
    for (int j = i; j < kTasks; ++j) acc[e++] += a[i] * a[j];
}

// partials: [T (T + 1) / 2, chunks]; of both: of the rows, then of the differences
template <class T, int kTasks, Of kOf>
__global__ void __launch_bounds__(kThreads, small_blocks<T, kTasks, kOf>)
    gram_small_kernel(Rows<const T> jac, Rows<const T> sam, int64_t columns, StripPlan plan,
                      double* partials) {
  using A = Acc<T>;
  constexpr bool kSam = kOf != Of::kRows, kBoth = kOf == Of::kBoth;
  constexpr int kPack = Pack<T>::kSize, kUnroll = kSmallUnroll<kTasks, kSam>;
  constexpr int kEntries = kTasks * (kTasks + 1) / 2;
  constexpr int kMatrices = kBoth ? 2 : 1;
  __shared__ double total[kMatrices][kEntries];
  for (int e = threadIdx.x; e < kMatrices * kEntries; e += kThreads)
    total[e / kEntries][e % kEntries] = 0;

  const bool aligned = jac.aligned && (!kSam || sam.aligned);
  const int64_t span = static_cast<int64_t>(kThreads) * plan.steps * kPack;  // columns
  for (int64_t start = blockIdx.x * span; start < columns; start += plan.chunks * span) {
    A acc[kMatrices][kEntries];
#pragma unroll
    for (int m = 0; m < kMatrices; ++m)
#pragma unroll
      for (int e = 0; e < kEntries; ++e) acc[m][e] = 0;
    for (int step = 0; step < plan.steps; step += kUnroll) {
      const int64_t column = start + (static_cast<int64_t>(step) * kThreads + threadIdx.x) * kPack;
      constexpr int64_t kStride = static_cast<int64_t>(kThreads) * kPack;
      // All loads are issued before the first product; one branch for all of them.
      const bool whole = aligned && column + (kUnroll - 1) * kStride + kPack <= columns;
      Pack<T> x[kUnroll][kTasks], s[kUnroll][kSam ? kTasks : 1];
      if (whole) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
#pragma unroll
          for (int i = 0; i < kTasks; ++i) {
            x[u][i] = load_pack_stream(jac.row(i) + column + u * kStride);
            if (kSam) s[u][kSam ? i : 0] = load_pack_stream(sam.row(i) + column + u * kStride);
          }
      } else {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
#pragma unroll
          for (int i = 0; i < kTasks; ++i) {
            x[u][i] = load_guarded(jac.row(i), column + u * kStride, columns);
            if (kSam) s[u][kSam ? i : 0] = load_guarded(sam.row(i), column + u * kStride, columns);
          }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
#pragma unroll
        for (int v = 0; v < kPack; ++v) {
          A a[kTasks];
#pragma unroll
          for (int i = 0; i < kTasks; ++i) a[i] = to_acc(x[u][i].lane[v]);
          if (!kSam || kBoth) add_triangle(a, acc[0]);
          if (kSam) {
#pragma unroll
            for (int i = 0; i < kTasks; ++i) a[i] = to_acc(s[u][kSam ? i : 0].lane[v]) - a[i];
            add_triangle(a, acc[kMatrices - 1]);
          }
        }
    }
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) add_block_sums(acc[m], total[m]);
  }
  __syncthreads();  // also where a block has no span: total is set
  for (int e = threadIdx.x; e < kMatrices * kEntries; e += kThreads)
    partials[e * plan.chunks + blockIdx.x] = total[e / kEntries][e % kEntries];
}

// ---- launchers ---------------------------------------------------------------------------------

// partials: triangle(kTasks) * small_plan(...).chunks doubles; twice as many of both.
template <class T, int kTasks, Of kOf>
cudaError_t gram_small_of(Rows<const T> jac, Rows<const T> sam, int64_t columns, double* partials,
                          cudaStream_t stream) {
  const StripPlan plan = small_plan(kTasks, columns, sizeof(T));
  if (plan.chunks == 0) return cudaSuccess;
  return launch(gram_small_kernel<T, kTasks, kOf>, dim3(static_cast<unsigned>(plan.chunks)),
                dim3(kThreads), 0, stream, jac, sam, columns, plan, partials);
}

template <class T, Of kOf>
cudaError_t gram_small(Rows<const T> jac, Rows<const T> sam, int tasks, int64_t columns,
                       double* partials, cudaStream_t stream) {
  switch (tasks) {
#define FLATMTL_GRAM_CASE(kTasks) \
  case kTasks:                    \
    return gram_small_of<T, kTasks, kOf>(jac, sam, columns, partials, stream)
    FLATMTL_GRAM_CASE(1);
    FLATMTL_GRAM_CASE(2);
    FLATMTL_GRAM_CASE(3);
    FLATMTL_GRAM_CASE(4);
#undef FLATMTL_GRAM_CASE
#define FLATMTL_GRAM_CASE(kTasks)                                                \
  case kTasks:                                                                   \
    if constexpr (kOf != Of::kBoth)                                              \
      return gram_small_of<T, kTasks, kOf>(jac, sam, columns, partials, stream); \
    break
    FLATMTL_GRAM_CASE(5);
    FLATMTL_GRAM_CASE(6);
    FLATMTL_GRAM_CASE(7);
    FLATMTL_GRAM_CASE(8);
#undef FLATMTL_GRAM_CASE
  }
  static_assert(kPairTasks == 4 && kSmallTasks == 8, "one case each");
  return cudaErrorInvalidValue;
}

}  // namespace flatmtl::kernels
