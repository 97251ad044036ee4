// GradDrop: of every column the positive or the negative entries are kept, by one uniform number.
//
//   graddrop   out_k = sum_i (l_i + (1 - l_i) M_ik) J_ik                 floor: read T P, write P
//              M_ik = [J_ik > 0] if P_k > U_k, else [J_ik < 0],  P_k = 0.5 (1 + sum_i J_ik /
//              sum_i |J_ik|)
//
// P = p / (p + n) with p, n the sums of the positive entries and of the negative ones' magnitudes,
// so P > U is p (1 - U) > n U: no 0 / 0 where a column is all zero (its out is 0), no eps, no
// overflow of the sum, and the side that is kept is a sum already: J is read once. A row that is
// not there is not read. Without a leak two sums a column are kept, with one four. Sums run over i
// in order, in the arithmetic type, without fused multiply-adds, with one rounding at the store.
//
// U: csrc/solvers/drop.h, by the column alone. A thread's pack of columns takes the four words of a
// counter, or of two; for float64 half of them, so that every counter is made twice. Determinism:
// no reduction between threads, no atomics; every element's bits depend on its column, the seed and
// the step alone, and are those of the CPU. Shapes: any T >= 1, any P >= 0, any row stride and
// alignment. The step is counted by a launch of its own: the blocks read it in no order.
#pragma once

#include "../solvers/drop.h"
#include "advance.cuh"
#include "combine.cuh"

namespace flatmtl::kernels {

// Packs of a thread in flight: at most 32 sums a thread.
template <class T, bool kLeaky>
constexpr int kDropUnroll = kCombineUnroll<T> / (kLeaky ? 2 : 1);

template <class A>
__device__ inline A product(A a, A b);  // rounded by itself
template <>
__device__ inline float product(float a, float b) {
  return __fmul_rn(a, b);
}
template <>
__device__ inline double product(double a, double b) {
  return __dmul_rn(a, b);
}

template <class T, class O, bool kLeaky>
__global__ void __launch_bounds__(kThreads)
    drop_kernel(Rows<const T> jac, const double* leak, const bool* there, const int64_t* rng,
                int tasks, int64_t columns, O* out) {
  using A = Acc<T>;
  constexpr int kPack = Pack<T>::kSize, kOut = Pack<O>::kSize, kUnroll = kDropUnroll<T, kLeaky>;
  constexpr int kQuad = kPack < 4 ? kPack : 4;  // columns of a pack with words of one counter
  constexpr int64_t kStride = static_cast<int64_t>(kThreads) * kPack;
  __shared__ A part[kLeaky ? kWeightSlab : 1];
  __shared__ bool counted[kWeightSlab];
  const bool out_aligned = is_aligned(out);
  const uint64_t step = static_cast<uint64_t>(rng[1]);
  const uint64_t key = drop_key(static_cast<uint64_t>(rng[0]), step);

  for (int64_t start = blockIdx.x * kStride * kUnroll; start < columns;
       start += gridDim.x * kStride * kUnroll) {
    const int64_t column = start + static_cast<int64_t>(threadIdx.x) * kPack;
    const bool inside = column + (kUnroll - 1) * kStride + kPack <= columns;
    A above[kUnroll][kPack], below[kUnroll][kPack];  // the positive entries, the negative ones
    A up[kLeaky ? kUnroll : 1][kPack], down[kLeaky ? kUnroll : 1][kPack];  // the other side leaked
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int v = 0; v < kPack; ++v) {
        above[u][v] = below[u][v] = 0;
        if (kLeaky) up[kLeaky ? u : 0][v] = down[kLeaky ? u : 0][v] = 0;
      }

    for (int slab = 0; slab < tasks; slab += kWeightSlab) {
      const int count = min(tasks - slab, kWeightSlab);
      if (tasks > kWeightSlab || start == blockIdx.x * kStride * kUnroll) {
        __syncthreads();
        for (int i = threadIdx.x; i < count; i += kThreads) {
          counted[i] = there == nullptr || there[slab + i];
          if (kLeaky) part[kLeaky ? i : 0] = static_cast<A>(leak[slab + i]);
        }
        __syncthreads();
      }
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        if (!counted[i]) continue;
        const T* row = jac.row(slab + i);
        Pack<T> x[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
          x[u] = inside && jac.aligned ? load_pack_stream(row + column + u * kStride)
                                       : load_guarded(row, column + u * kStride, columns);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
#pragma unroll
          for (int v = 0; v < kPack; ++v) {
            const A g = to_acc(x[u].lane[v]);
            // NaN, neither above nor below 0, goes to both sides
            above[u][v] += g < A(0) ? A(0) : g;
            below[u][v] += g > A(0) ? A(0) : g;
            if (kLeaky) {
              const A leaked = product(part[kLeaky ? i : 0], g);
              up[kLeaky ? u : 0][v] += g < A(0) ? leaked : g;
              down[kLeaky ? u : 0][v] += g > A(0) ? leaked : g;
            }
          }
      }
    }

#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      A chosen[kPack];
#pragma unroll
      for (int q = 0; q < kPack; q += kQuad) {
        const int64_t first = column + u * kStride + q;
        const Philox words = drop_words(key, static_cast<uint32_t>(step), first / 4);
#pragma unroll
        for (int v = 0; v < kQuad; ++v) {
          const uint32_t word = words.word(kQuad == 4 ? v : static_cast<uint32_t>((first + v) % 4));
          const A uniform = static_cast<A>(drop_uniform(word));
          const A keep = product(above[u][q + v], A(1) - uniform);
          const A drop = product(-below[u][q + v], uniform);
          const A positive = kLeaky ? up[kLeaky ? u : 0][q + v] : above[u][q + v];
          const A negative = kLeaky ? down[kLeaky ? u : 0][q + v] : below[u][q + v];
          chosen[q + v] = keep > drop ? positive : negative;
        }
      }
#pragma unroll
      for (int w = 0; w < kPack; w += kOut) {
        const int64_t at = column + u * kStride + w;
        Pack<O> result;
#pragma unroll
        for (int v = 0; v < kOut; ++v) result.lane[v] = from_acc<O>(chosen[w + v]);
        if (inside && out_aligned)
          store_pack(out + at, result);
        else
          store_guarded(out, at, columns, result);
      }
    }
  }
}

template <class T, class O, bool kLeaky>
cudaError_t launch_drop(Rows<const T> jac, const double* leak, const bool* there,
                        const int64_t* rng, int tasks, int64_t columns, O* out,
                        cudaStream_t stream) {
  const unsigned blocks =
      combine_blocks(columns, int64_t{kThreads} * Pack<T>::kSize * kDropUnroll<T, kLeaky>);
  return launch(drop_kernel<T, O, kLeaky>, dim3(blocks), dim3(kThreads), 0, stream, jac, leak,
                there, rng, tasks, columns, out);
}

// leak: [T], or null. there: [T], or null: all. rng: [2]. out: [P].
template <class T, class O>
cudaError_t graddrop(Rows<const T> jac, const double* leak, const bool* there, int64_t* rng,
                     int tasks, int64_t columns, O* out, cudaStream_t stream) {
  if (columns > 0) {
    const cudaError_t error =
        leak ? launch_drop<T, O, true>(jac, leak, there, rng, tasks, columns, out, stream)
             : launch_drop<T, O, false>(jac, leak, there, rng, tasks, columns, out, stream);
    if (error != cudaSuccess) return error;
  }
  return launch(advance_kernel<1>, dim3(1), dim3(1), 0, stream, rng);
}

}  // namespace flatmtl::kernels
