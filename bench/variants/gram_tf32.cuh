// float32 rows on tensor cores as 3xTF32: each number is hi + lo, rounded to tf32 (11 bits) and
// what is left; three products an element pair (hi lo, lo hi, hi hi), so as many instructions as
// the six products of three bfloat16 parts (mma.cuh), which have twice the rate. Not exact as those
// are: lo loses its last bit, and lo lo is left out, which makes the diagonal too small by about
// 2^-25 of it.
//
// The kernel is the shipped one (gram_mma.cuh), given rows of a type whose operand and product
// these are. The lane's pack is four columns: two of m16n8k8 each.
#pragma once

#include "../../csrc/kernels/gram_mma.cuh"

namespace flatmtl::variants {

struct Tf32Element {
  float value;
};

struct Tf32Operand {
  uint32_t hi[4], lo[4];
};

__device__ inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

// x rounded to the nearest tf32.
__device__ inline uint32_t tf32_of(float x) {
#ifdef FLATMTL_EMULATED
  return (bits_of(x) + 0x1000) & 0xFFFFE000u;
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#endif
}

__device__ inline Tf32Operand operand(const kernels::Pack<Tf32Element>& pack) {
  Tf32Operand out;
#pragma unroll
  for (int v = 0; v < 4; ++v) {
    const float x = pack.lane[v].value;
    out.hi[v] = tf32_of(x);
    out.lo[v] = bits_of(x - kernels::float_of_bits(out.hi[v]));
  }
  return out;
}

// c += a b^T over the lane's columns v and v + 1.
__device__ inline void mma_tf32(float (&c)[4], const uint32_t (&top)[4],
                                const uint32_t (&bottom)[4], const uint32_t (&right)[4], int v) {
#ifdef FLATMTL_EMULATED
  emulated::mma_tf32(c, {top[v], bottom[v], top[v + 1], bottom[v + 1]}, {right[v], right[v + 1]},
                     __FILE__, __LINE__);
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(top[v]), "r"(bottom[v]), "r"(top[v + 1]), "r"(bottom[v + 1]), "r"(right[v]),
        "r"(right[v + 1]));
#endif
}

// c += a b^T; the small products come first.
__device__ inline void mma(float (&c)[4], const Tf32Operand& top, const Tf32Operand& bottom,
                           const Tf32Operand& right) {
#pragma unroll
  for (int v = 0; v < 4; v += 2) {
    mma_tf32(c, top.lo, bottom.lo, right.hi, v);
    mma_tf32(c, top.hi, bottom.hi, right.lo, v);
  }
#pragma unroll
  for (int v = 0; v < 4; v += 2) mma_tf32(c, top.hi, bottom.hi, right.hi, v);
}

// 8 < T <= 64. partials: triangle(T) * mma_plan(T, P, 4).chunks doubles.
inline cudaError_t gram_tf32(kernels::Rows<const float> jac, int tasks, int64_t columns,
                             double* partials, cudaStream_t stream) {
  const kernels::Rows<const Tf32Element> rows{reinterpret_cast<const Tf32Element*>(jac.data),
                                              jac.stride, jac.aligned};
  return kernels::gram_mma<Tf32Element, kernels::Of::kRows, kernels::kSmallTasks + 1>(
      rows, rows, tasks, columns, partials, stream);
}

}  // namespace flatmtl::variants
