// One tensor-core instruction, mma.m16n8k16 with float32 sums (sm_80 and later), and how a float32
// is given to it.
//
// A warp holds the operands in registers, lane = 4 g + t:
//   a  16 rows x 16 columns   rows g and g + 8, columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9
//   b  16 columns x 8 rows    row g, the same columns
//   c  16 x 8                 rows g and g + 8, columns 2 t, 2 t + 1
// A sum over columns does not mind their order, so lane 4 g + t may bring any four columns of row g
// that are its own: four that lie side by side in memory. What it loads is then an operand as it
// is, and the same registers are a's and b's.
//
// Products are exact; sums are not rounded to nearest but cut off, to about the last place of their
// largest term, differently by architecture: see gram_mma.cuh.
#pragma once

#include "vec.cuh"

namespace flatmtl::kernels {

// Four columns of a row as two words of two 16-bit numbers.
struct Quad {
  uint32_t pair[2];
};

// c += a b^T; top, bottom: rows g and g + 8 of a, right: row g of b.
template <class E>
__device__ inline void mma(float (&c)[4], const Quad& top, const Quad& bottom, const Quad& right) {
  static_assert(sizeof(E) == 2, "half precision operands");
#ifdef FLATMTL_EMULATED
  emulated::mma(c, {top.pair[0], bottom.pair[0], top.pair[1], bottom.pair[1]},
                {right.pair[0], right.pair[1]}, std::is_same_v<E, __half>, __FILE__, __LINE__);
#else
#define FLATMTL_MMA(type)                                                                      \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                          \
               ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                    \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                \
               : "r"(top.pair[0]), "r"(bottom.pair[0]), "r"(top.pair[1]), "r"(bottom.pair[1]), \
                 "r"(right.pair[0]), "r"(right.pair[1]))
  if constexpr (std::is_same_v<E, __half>)
    FLATMTL_MMA("f16");
  else
    FLATMTL_MMA("bf16");
#undef FLATMTL_MMA
#endif
}

// Two numbers rounded to bfloat16 in one word, the first in its lower half.
__device__ inline uint32_t bfloat16_pair(float first, float second) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
  uint32_t word;
  memcpy(&word, &both, 4);
  return word;
}

__device__ inline float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// x = part[0] + part[1] + part[2], each of 8 bits (a float32 has 24): exactly for 1e-33 < |x|
// < 3.39e38. Below, bits that a sum of squares could not hold are lost; above, and for an infinity,
// infinity and NaN come out, and NaN of them.
struct Split {
  Quad part[3];
};

__device__ inline Split split(const float (&x)[4]) {
  Split out;
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    float first = x[2 * p], second = x[2 * p + 1];
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const uint32_t word = bfloat16_pair(first, second);
      out.part[k].pair[p] = word;
      first -= float_of_bits(word << 16);
      second -= float_of_bits(word & 0xFFFF0000u);
    }
  }
  return out;
}

// c += a b^T of float32 rows. Left out are the products of part 2 with 1 and 2, at most 2^-24 of
// the whole (their mean is zero where the bits of x are random). The small ones come first, so that
// the sum that is cut off last is the whole.
__device__ inline void mma(float (&c)[4], const Split& top, const Split& bottom,
                           const Split& right) {
  using E = __nv_bfloat16;
  mma<E>(c, top.part[2], bottom.part[2], right.part[0]);
  mma<E>(c, top.part[0], bottom.part[0], right.part[2]);
  mma<E>(c, top.part[1], bottom.part[1], right.part[1]);
  mma<E>(c, top.part[1], bottom.part[1], right.part[0]);
  mma<E>(c, top.part[0], bottom.part[0], right.part[1]);
  mma<E>(c, top.part[0], bottom.part[0], right.part[0]);
}

}  // namespace flatmtl::kernels
