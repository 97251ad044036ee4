// The CPU kernels: torch-free, one thread's share of the work each. They are compiled once per
// instruction set (kernels_<isa>.cpp) and chosen at run time (dispatch.cpp). The drivers (ops.cpp)
// cut the columns into chunks, run them on torch's thread pool and add the chunks' partial sums in
// order: the chunks depend on shapes alone, so the bits do not depend on the number of threads.
#pragma once

#include <cstdint>

namespace flatmtl::cpu {

enum class Row { f32, f64, bf16, f16 };

// Rows of a T x P matrix: element (i, k) at base + (i * stride + k) elements.
struct Rows {
  const void* base;
  int64_t stride;
};

// Tensors laid out at offsets of one flat row.
struct Segments {
  void* const* data;
  const int64_t* offset;
  const int64_t* numel;
  int64_t count;
};

// stream, of what writes: past the caches, where vectors of the output are aligned.
//
// Two types: that of the rows, and that of what lies beside them (gradients, parameters, a sum):
// the same, or f32 beside bf16 and f16 rows.
struct Kernels {
  // partial[i, j] (i <= j, stride T) = sum over columns [begin, end) of x_i x_j, where x = jac, or
  // sam - jac if sam.base is not null; both: the one after the other, in one sweep. scratch:
  // gram_scratch(T, both) bytes, 64-byte aligned.
  void (*gram)(Row, Rows jac, Rows sam, bool both, int64_t tasks, int64_t begin, int64_t end,
               void* scratch, double* partial);
  int64_t (*gram_scratch)(int64_t tasks, bool both);
  // partial[i] = sum over columns of jac_i^2.
  void (*row_squares)(Row, Rows jac, int64_t tasks, int64_t begin, int64_t end, double* partial);
  // out[begin, end) = sum_i a_i jac_i + sum_i b_i (sam_i - jac_i); a row with a_i = b_i = 0 is not
  // read, nor sam_i where b_i = 0, nor jac_i where a_i = b_i as the kernel has them. a, b: [T]; b
  // may be null.
  void (*combine)(Row, Row out_type, Rows jac, const double* a, Rows sam, const double* b,
                  int64_t tasks, void* out, int64_t begin, int64_t end, bool stream);
  // out_r[begin, end) = sum_i c_ri jac_i, r < outputs; a zero coefficient is not multiplied. c: [R,
  // T].
  void (*project)(Row, Rows jac, const double* coefficients, int64_t tasks, int64_t outputs,
                  void* out, int64_t out_stride, int64_t begin, int64_t end);
  // out[begin, end) = the sum of the positive or of the negative entries of the `count` rows
  // `index` of jac: the positive ones where their share of the sum of magnitudes is above U, from
  // Philox(key; column / 4, 0, step). leak (one a row of jac, or null): the part of the others
  // that is added. begin: a multiple of 4.
  void (*drop)(Row, Row out_type, Rows jac, const int64_t* index, int64_t count, const double* leak,
               uint64_t key, uint32_t step, void* out, int64_t begin, int64_t end, bool stream);
  // row[begin, end) <- the segments' elements, 0 between them; accumulate: they are added to the
  // row, which stays as it is between them. Returns the sum of squares of what then stands there.
  // Only copies are streamed, neither sums nor what changes its type.
  double (*pack)(Row, Row segments_type, Segments, void* row, bool accumulate, int64_t begin,
                 int64_t end, bool stream);
  // sum over [begin, end) of ((|saved| + eta) row)^2
  double (*adaptive_squares)(Row, Row saved_type, const void* saved, const void* row, double eta,
                             int64_t begin, int64_t end);
  // Elements [begin, end) of the flat row, into the segments: saved + scale_k * row, adaptive:
  // saved + scale_k (|saved| + eta)^2 row; saved itself where scale_k = 0. scale: a value a
  // segment. The segments are of saved's type.
  void (*perturb)(Row, Row saved_type, Segments, const void* saved, const void* row,
                  const double* scale, bool adaptive, double eta, int64_t begin, int64_t end,
                  bool stream);
  void (*restore)(Row, Segments, const void* saved, int64_t begin, int64_t end, bool stream);
};

// The best the processor runs, chosen once. FLATMTL_CPU_ISA=base|avx2|avx512 asks for a lower one.
const Kernels& kernels();

constexpr int64_t element_size(Row row) { return row == Row::f64 ? 8 : row == Row::f32 ? 4 : 2; }

namespace base {
const Kernels* table();
}
namespace avx2 {
const Kernels* table();
}
namespace avx512 {
const Kernels* table();
}

}  // namespace flatmtl::cpu
