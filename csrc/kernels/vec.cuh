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
//
// Where rows in half precision go in step with float32 (gradients, parameters), a pack is four
// columns of both: 16 bytes of the one, 8 of the other.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

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

// Columns of a pack of T, and of packs of T and U in step.
template <class T, class U = T>
constexpr int kPackOf = 16 / (sizeof(T) > sizeof(U) ? sizeof(T) : sizeof(U));

template <class T, int N = kPackOf<T>>
struct alignas(N * sizeof(T)) Pack {
  static constexpr int kSize = N;
  using Bits = std::conditional_t<N * sizeof(T) == 16, int4, int2>;
  static_assert(sizeof(Bits) == N * sizeof(T), "a pack is 16 bytes, or 8");
  T lane[N];
};

__host__ __device__ inline bool is_aligned(const void* pointer, size_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <class T, int N>
__device__ inline Pack<T, N> pack_of(typename Pack<T, N>::Bits bits) {
  Pack<T, N> pack;
  memcpy(&pack, &bits, sizeof(pack));
  return pack;
}

template <class T, int N = kPackOf<T>>
__device__ inline Pack<T, N> load_pack(const T* address) {
  return pack_of<T, N>(*reinterpret_cast<const typename Pack<T, N>::Bits*>(address));
}

#if defined(__clang__) && defined(__CUDA__)  // clang's headers leave __ldcs out
__device__ inline int4 __ldcs(const int4* address) {
  int4 bits;
  asm volatile("ld.global.cs.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "l"(address));
  return bits;
}
__device__ inline int2 __ldcs(const int2* address) {
  int2 bits;
  asm volatile("ld.global.cs.v2.s32 {%0, %1}, [%2];" : "=r"(bits.x), "=r"(bits.y) : "l"(address));
  return bits;
}
#endif

// For data touched once: evicted first, so that it does not push out what is read again.
template <class T, int N = kPackOf<T>>
__device__ inline Pack<T, N> load_pack_stream(const T* address) {
  return pack_of<T, N>(__ldcs(reinterpret_cast<const typename Pack<T, N>::Bits*>(address)));
}

template <class T, int N>
__device__ inline void store_pack(T* address, const Pack<T, N>& pack) {
  typename Pack<T, N>::Bits bits;
  memcpy(&bits, &pack, sizeof(pack));
  *reinterpret_cast<typename Pack<T, N>::Bits*>(address) = bits;
}

template <class T, int N = kPackOf<T>>
__device__ inline Pack<T, N> zero_pack() {
  typename Pack<T, N>::Bits bits;
  memset(&bits, 0, sizeof(bits));
  return pack_of<T, N>(bits);
}

// Columns at or past `columns` read as zero and are not written.
template <class T, int N = kPackOf<T>>
__device__ inline Pack<T, N> load_guarded(const T* row, int64_t column, int64_t columns) {
  Pack<T, N> pack = zero_pack<T, N>();
#pragma unroll
  for (int v = 0; v < N; ++v)
    if (column + v < columns) pack.lane[v] = row[column + v];
  return pack;
}

template <class T, int N>
__device__ inline void store_guarded(T* row, int64_t column, int64_t columns,
                                     const Pack<T, N>& pack) {
#pragma unroll
  for (int v = 0; v < N; ++v)
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
