// Everything of one instruction set. The including .cpp defines FLATMTL_ISA (a namespace name) and
// is compiled with that set's flags.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace flatmtl::cpu::FLATMTL_ISA {
namespace {

// In this order: each uses the one before.
// clang-format off
#include "simd.h"
#include "flat_body.h"
#include "drop_body.h"
#include "gram_body.h"
// clang-format on

template <class F>
inline auto by_row(Row row, F f) {
  switch (row) {
    case Row::f64:
      return f(F64{});
    case Row::bf16:
      return f(BF16{});
    case Row::f16:
      return f(F16{});
    default:
      return f(F32{});
  }
}

// The pairs that exist: twice the same type, or float32 beside rows in half precision.
template <class F>
inline auto by_rows(Row row, Row beside, F f) {
  if (row == beside) return by_row(row, [&](auto d) { return f(d, d); });
  return row == Row::bf16 ? f(BF16{}, F32{}) : f(F16{}, F32{});
}

const Kernels kTable = {
    [](Row row, Rows jac, Rows sam, bool both, int64_t tasks, int64_t begin, int64_t end,
       void* scratch, double* partial) {
      by_row(row, [&](auto d) {
        gram_of<decltype(d)>(jac, sam, both, tasks, begin, end, scratch, partial);
      });
    },
    [](int64_t tasks, bool both) {
      const int64_t a = gram_scratch_of<float>(tasks, both);
      const int64_t b = gram_scratch_of<double>(tasks, both);
      return a > b ? a : b;
    },
    [](Row row, Rows jac, int64_t tasks, int64_t begin, int64_t end, double* partial) {
      by_row(row, [&](auto d) { row_squares_of<decltype(d)>(jac, tasks, begin, end, partial); });
    },
    [](Row row, Row out_type, Rows jac, const double* a, Rows sam, const double* b, int64_t tasks,
       void* out, int64_t begin, int64_t end, bool stream) {
      by_rows(row, out_type, [&](auto d, auto o) {
        combine_of<decltype(d), decltype(o)>(jac, a, sam, b, tasks, out, begin, end, stream);
      });
    },
    [](Row row, Rows jac, const double* coefficients, int64_t tasks, int64_t outputs, void* out,
       int64_t out_stride, int64_t begin, int64_t end) {
      by_row(row, [&](auto d) {
        project_of<decltype(d)>(jac, coefficients, tasks, outputs, out, out_stride, begin, end);
      });
    },
    [](Row row, Row out_type, Rows jac, const int64_t* index, int64_t count, const double* leak,
       uint64_t key, uint32_t step, void* out, int64_t begin, int64_t end, bool stream) {
      by_rows(row, out_type, [&](auto d, auto o) {
        const auto run = leak ? drop_of<decltype(d), decltype(o), true>
                              : drop_of<decltype(d), decltype(o), false>;
        run(jac, index, count, leak, key, step, out, begin, end, stream);
      });
    },
    [](Row row, Row segments_type, Segments segments, void* to, bool accumulate, int64_t begin,
       int64_t end, bool stream) {
      return by_rows(row, segments_type, [&](auto d, auto g) {
        using D = decltype(d);
        using G = decltype(g);
        return accumulate ? pack_of<D, G, true>(segments, to, begin, end, stream)
                          : pack_of<D, G, false>(segments, to, begin, end, stream);
      });
    },
    [](Row row, Row saved_type, const void* saved, const void* grad, double eta, int64_t begin,
       int64_t end) {
      return by_rows(row, saved_type, [&](auto d, auto s) {
        return adaptive_squares_of<decltype(d), decltype(s)>(saved, grad, eta, begin, end);
      });
    },
    [](Row row, Row saved_type, Segments segments, const void* saved, const void* grad,
       const double* scale, bool adaptive, double eta, int64_t begin, int64_t end, bool stream) {
      by_rows(row, saved_type, [&](auto d, auto s) {
        perturb_of<decltype(d), decltype(s)>(segments, saved, grad, scale, adaptive, eta, begin,
                                             end, stream);
      });
    },
    [](Row row, Segments segments, const void* saved, int64_t begin, int64_t end, bool stream) {
      by_row(row, [&](auto d) { restore_of<decltype(d)>(segments, saved, begin, end, stream); });
    },
};

}  // namespace

const Kernels* table() { return &kTable; }

}  // namespace flatmtl::cpu::FLATMTL_ISA
