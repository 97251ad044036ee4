// 16-byte packs of a row type, and the arithmetic type it is computed in.
//
// A row is read in packs: pack p holds the columns [p * kSize, (p + 1) * kSize). Where a row starts
// is not the kernel's choice (J may be a slice with an odd row stride), so each access has two
// forms:
//   load_pack / load_pack_stream / store_pack   one 16-byte access; the address is 16-byte aligned
//   load_guarded / store_guarded                 element accesses, each checked against the row's
//   end;
//                                                any alignment, the tail of a row, or wholly past
//                                                it
// Which lane sees which column is the same in both, so that alignment never changes a result's
// bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "launch.cuh"

namespace flatmtl::kernels {

// Acc<T>: the type of products and lane sums. float64 rows stay in float64, the others use float32.
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

__device__ inline float to_acc(float x) { return x; }
__device__ inline double to_acc(double x) { return x; }
__device__ inline float to_acc(__half x) { return __half2float(x); }
__device__ inline float to_acc(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ inline T from_acc(Acc<T> x) {
  return x;
}
template <>
__device__ inline __half from_acc<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_acc<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T lane[kSize];
};

__host__ __device__ inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

template <class T>
__device__ inline Pack<T> pack_of(int4 bits) {
  Pack<T> pack;
  memcpy(&pack, &bits, 16);
  return pack;
}

template <class T>
__device__ inline Pack<T> load_pack(const T* address) {
  return pack_of<T>(*reinterpret_cast<const int4*>(address));
}

// For data touched once: evicted first, so that it does not push out what is read again.
template <class T>
__device__ inline Pack<T> load_pack_stream(const T* address) {
  return pack_of<T>(__ldcs(reinterpret_cast<const int4*>(address)));
}

template <class T>
__device__ inline void store_pack(T* address, const Pack<T>& pack) {
  int4 bits;
  memcpy(&bits, &pack, 16);
  *reinterpret_cast<int4*>(address) = bits;
}

template <class T>
__device__ inline Pack<T> zero_pack() {
  return pack_of<T>(make_int4(0, 0, 0, 0));
}

// Columns at or past `columns` read as zero and are not written.
template <class T>
__device__ inline Pack<T> load_guarded(const T* row, int64_t column, int64_t columns) {
  Pack<T> pack = zero_pack<T>();
#pragma unroll
  for (int v = 0; v < Pack<T>::kSize; ++v)
    if (column + v < columns) pack.lane[v] = row[column + v];
  return pack;
}

template <class T>
__device__ inline void store_guarded(T* row, int64_t column, int64_t columns, const Pack<T>& pack) {
#pragma unroll
  for (int v = 0; v < Pack<T>::kSize; ++v)
    if (column + v < columns) row[column + v] = pack.lane[v];
}

// Rows of a [T, P] matrix: element (i, k) is data[i * stride + k].
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  bool aligned;  // every row starts on a 16-byte boundary

  __device__ T* row(int64_t i) const { return data + i * stride; }
};

template <class T>
Rows<T> rows_of(T* data, int64_t stride, int64_t count) {
  const bool stride_ok = count <= 1 || stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  return {data, stride, is_aligned(data) && stride_ok};
}

}  // namespace flatmtl::kernels
