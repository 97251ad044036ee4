// Weighted sums of the rows of J [T, P].
//
//   combine        out_k = sum_i w_i J_ik                                floor: read T P, write P
//   combine_flat   out_k = sum_i a_i J_ik + sum_i b_i (S_ik - J_ik)      floor: read 2 T P, write P
//   project        out_rk = sum_i C_ri J_ik, r < R                       floor: read T P, write R P
//
// A weight of exactly 0 leaves its row out: it is not read (combine, combine_flat) or not
// multiplied (project), so that 0 * NaN poisons nothing. Where a_i = b_i in the arithmetic type,
// a_i J_i + b_i (S_i - J_i) is b_i S_i: J_i is not read. Sums run over i in order, in the
// arithmetic type, with one rounding at the store. `out` of combine and combine_flat is of the
// rows' type, or float32 where that is half precision: P elements of its own size are then written,
// and nothing is rounded to the rows' type. Determinism: no reduction between threads; every
// element's bits depend on its column alone. Shapes: any T, R >= 1, any P >= 0, any row stride and
// alignment. `out` of combine may be a row of J.
#pragma once

#include "reduce.cuh"
#include "vec.cuh"

namespace flatmtl::kernels {

constexpr int kWeightSlab = 512;          // weights held in shared memory at a time
constexpr int kProjectRows = 8;           // output rows summed in one pass over J
constexpr int64_t kCombineBlocks = 8192;  // more would only repeat the reading of the weights

// Packs of a thread in flight. A pack of a 2-byte type holds 8 elements, each an accumulator.
template <class T>
constexpr int kCombineUnroll = sizeof(T) == 2 ? 2 : 4;

// Loads the packs column, column + stride, ... of a row.
template <class T>
__device__ inline void load_packs(Pack<T> (&x)[kCombineUnroll<T>], const T* row, int64_t column,
                                  int64_t stride, int64_t columns, bool whole) {
  if (whole) {
#pragma unroll
    for (int u = 0; u < kCombineUnroll<T>; ++u) x[u] = load_pack_stream(row + column + u * stride);
  } else {
#pragma unroll
    for (int u = 0; u < kCombineUnroll<T>; ++u)
      x[u] = load_guarded(row, column + u * stride, columns);
  }
}

// kFlat: combine_flat with weights (a, b); else combine with weights a. O: the type of out.
template <class T, class O, bool kFlat>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(Rows<const T> jac, const double* a, Rows<const T> sam, const double* b,
                   int tasks, int64_t columns, O* out) {
  using A = Acc<T>;
  constexpr int kPack = Pack<T>::kSize, kOut = Pack<O>::kSize;  // one pack of out, or two
  constexpr int64_t kStride = static_cast<int64_t>(kThreads) * kPack;
  __shared__ A weight_a[kWeightSlab];
  __shared__ A weight_b[kFlat ? kWeightSlab : 1];
  const bool out_aligned = is_aligned(out);

  for (int64_t start = blockIdx.x * kStride * kCombineUnroll<T>; start < columns;
       start += gridDim.x * kStride * kCombineUnroll<T>) {
    const int64_t column = start + static_cast<int64_t>(threadIdx.x) * kPack;
    const bool inside = column + (kCombineUnroll<T> - 1) * kStride + kPack <= columns;
    A acc[kCombineUnroll<T>][kPack];
#pragma unroll
    for (int u = 0; u < kCombineUnroll<T>; ++u)
#pragma unroll
      for (int v = 0; v < kPack; ++v) acc[u][v] = 0;

    for (int slab = 0; slab < tasks; slab += kWeightSlab) {
      const int count = min(tasks - slab, kWeightSlab);
      if (tasks > kWeightSlab || start == blockIdx.x * kStride * kCombineUnroll<T>) {
        __syncthreads();
        for (int i = threadIdx.x; i < count; i += kThreads) {
          weight_a[i] = static_cast<A>(a[slab + i]);
          if (kFlat) weight_b[kFlat ? i : 0] = static_cast<A>(b[slab + i]);
        }
        __syncthreads();
      }
      // Four packs are in flight already; rows in flight on top of them would cost registers.
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        const A wa = weight_a[i];
        const A wb = kFlat ? weight_b[kFlat ? i : 0] : A(0);
        if (wa == A(0) && wb == A(0)) continue;
        Pack<T> x[kCombineUnroll<T>];
        const bool same = kFlat && wa == wb;
        load_packs(x, same ? sam.row(slab + i) : jac.row(slab + i), column, kStride, columns,
                   inside && (same ? sam.aligned : jac.aligned));
        if (kFlat && wb != A(0) && !same) {
          Pack<T> s[kCombineUnroll<T>];
          load_packs(s, sam.row(slab + i), column, kStride, columns, inside && sam.aligned);
#pragma unroll
          for (int u = 0; u < kCombineUnroll<T>; ++u)
#pragma unroll
            for (int v = 0; v < kPack; ++v)
              acc[u][v] += wb * (to_acc(s[u].lane[v]) - to_acc(x[u].lane[v]));
        }
        if (wa != A(0)) {
#pragma unroll
          for (int u = 0; u < kCombineUnroll<T>; ++u)
#pragma unroll
            for (int v = 0; v < kPack; ++v) acc[u][v] += wa * to_acc(x[u].lane[v]);
        }
      }
    }

#pragma unroll
    for (int u = 0; u < kCombineUnroll<T>; ++u)
#pragma unroll
      for (int w = 0; w < kPack; w += kOut) {
        const int64_t at = column + u * kStride + w;
        Pack<O> result;
#pragma unroll
        for (int v = 0; v < kOut; ++v) result.lane[v] = from_acc<O>(acc[u][w + v]);
        if (inside && out_aligned)
          store_pack(out + at, result);
        else
          store_guarded(out, at, columns, result);
      }
  }
}

// A thread owns one pack of columns and goes over J once for every kProjectRows rows of the output;
// the block's columns of J (T x 4 KiB) come from the caches after the first time.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    project_kernel(Rows<const T> jac, const double* coefficients, int tasks, int outputs,
                   int64_t columns, Rows<T> out) {
  using A = Acc<T>;
  constexpr int kPack = Pack<T>::kSize;
  constexpr int kSlab = 128;
  constexpr int64_t kStride = static_cast<int64_t>(kThreads) * kPack;
  __shared__ A weight[kSlab][kProjectRows];

  for (int64_t start = blockIdx.x * kStride; start < columns; start += gridDim.x * kStride) {
    const int64_t column = start + static_cast<int64_t>(threadIdx.x) * kPack;
    const bool inside = column + kPack <= columns;
    for (int first = 0; first < outputs; first += kProjectRows) {
      A acc[kProjectRows][kPack];
#pragma unroll
      for (int r = 0; r < kProjectRows; ++r)
#pragma unroll
        for (int v = 0; v < kPack; ++v) acc[r][v] = 0;

      for (int slab = 0; slab < tasks; slab += kSlab) {
        const int count = min(tasks - slab, kSlab);
        __syncthreads();
        for (int e = threadIdx.x; e < count * kProjectRows; e += kThreads) {
          const int r = e / count, i = e - r * count;
          const bool exists = first + r < outputs;
          weight[i][r] =
              exists
                  ? static_cast<A>(coefficients[static_cast<int64_t>(first + r) * tasks + slab + i])
                  : A(0);
        }
        __syncthreads();
        for (int i = 0; i < count; ++i) {
          const T* row = jac.row(slab + i);
          const Pack<T> x =
              inside && jac.aligned ? load_pack(row + column) : load_guarded(row, column, columns);
#pragma unroll
          for (int r = 0; r < kProjectRows; ++r) {
            const A w = weight[i][r];
            if (w == A(0)) continue;
#pragma unroll
            for (int v = 0; v < kPack; ++v) acc[r][v] += w * to_acc(x.lane[v]);
          }
        }
      }

#pragma unroll
      for (int r = 0; r < kProjectRows; ++r) {
        if (first + r >= outputs) continue;
        Pack<T> result;
#pragma unroll
        for (int v = 0; v < kPack; ++v) result.lane[v] = from_acc<T>(acc[r][v]);
        if (inside && out.aligned)
          store_pack(out.row(first + r) + column, result);
        else
          store_guarded(out.row(first + r), column, columns, result);
      }
    }
  }
}

// ---- launchers ---------------------------------------------------------------------------------

inline unsigned combine_blocks(int64_t columns, int64_t columns_per_block) {
  const int64_t blocks = ceil_div(columns, columns_per_block);
  return static_cast<unsigned>(blocks < kCombineBlocks ? blocks : kCombineBlocks);
}

// weights: [T]. out: [P].
template <class T, class O>
cudaError_t combine(Rows<const T> jac, const double* weights, int tasks, int64_t columns, O* out,
                    cudaStream_t stream) {
  if (columns == 0) return cudaSuccess;
  const unsigned blocks =
      combine_blocks(columns, int64_t{kThreads} * Pack<T>::kSize * kCombineUnroll<T>);
  return launch(combine_kernel<T, O, false>, dim3(blocks), dim3(kThreads), 0, stream, jac, weights,
                Rows<const T>{}, static_cast<const double*>(nullptr), tasks, columns, out);
}

// a, b: [T]. out: [P].
template <class T, class O>
cudaError_t combine_flat(Rows<const T> jac, const double* a, Rows<const T> sam, const double* b,
                         int tasks, int64_t columns, O* out, cudaStream_t stream) {
  if (columns == 0) return cudaSuccess;
  const unsigned blocks =
      combine_blocks(columns, int64_t{kThreads} * Pack<T>::kSize * kCombineUnroll<T>);
  return launch(combine_kernel<T, O, true>, dim3(blocks), dim3(kThreads), 0, stream, jac, a, sam, b,
                tasks, columns, out);
}

// coefficients: [R, T]. out: [R, P], apart from jac.
template <class T>
cudaError_t project(Rows<const T> jac, const double* coefficients, int tasks, int outputs,
                    int64_t columns, Rows<T> out, cudaStream_t stream) {
  if (columns == 0 || outputs == 0) return cudaSuccess;
  const unsigned blocks = combine_blocks(columns, int64_t{kThreads} * Pack<T>::kSize);
  return launch(project_kernel<T>, dim3(blocks), dim3(kThreads), 0, stream, jac, coefficients,
                tasks, outputs, columns, out);
}

}  // namespace flatmtl::kernels
