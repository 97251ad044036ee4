// The launchers of csrc/kernels as C functions, for tests/test_cuda_emulated.py. dtype: 0 float32,
// 1 float64, 2 float16, 3 bfloat16; beside: the type of gradients, parameters or a sum, dtype or 0.
// Scratch starts as NaN and is watched for writes beyond its end.
#include <cstdio>
#include <limits>
#include <vector>

#include "../../csrc/kernels/affinity.cuh"
#include "../../csrc/kernels/combine.cuh"
#include "../../csrc/kernels/draw.cuh"
#include "../../csrc/kernels/graddrop.cuh"
#include "../../csrc/kernels/gram.cuh"
#include "../../csrc/kernels/row_norms.cuh"
#include "../../csrc/kernels/segments.cuh"
#include "../solver_methods.h"

namespace {

using namespace flatmtl::kernels;

class Scratch {
 public:
  explicit Scratch(int64_t doubles)
      : size_(doubles), memory_(doubles + kGuard, std::numeric_limits<double>::quiet_NaN()) {}
  ~Scratch() {
    for (int64_t i = size_; i < size_ + kGuard; ++i)
      if (memory_[i] == memory_[i]) emulated::fail("a write beyond the scratch");
  }
  double* data() { return memory_.data(); }

 private:
  static constexpr int64_t kGuard = 64;
  int64_t size_;
  std::vector<double> memory_;
};

template <class F>
int with(int dtype, const F& f) {
  switch (dtype) {
    case 0:
      return f(float{});
    case 1:
      return f(double{});
    case 2:
      return f(__half{});
    default:
      return f(__nv_bfloat16{});
  }
}

// As csrc/cuda/binding.h: twice the same, or float32 beside half precision.
template <class F>
int with(int dtype, int beside, const F& f) {
  if (dtype == beside) return with(dtype, [&](auto zero) { return f(zero, zero); });
  if (beside != 0 || dtype < 2) return cudaErrorInvalidValue;
  return dtype == 2 ? f(__half{}, float{}) : f(__nv_bfloat16{}, float{});
}

int bytes_of(int dtype) { return dtype == 0 ? 4 : dtype == 1 ? 8 : 2; }

template <class T>
Rows<const T> rows(const void* data, int64_t stride, int64_t count) {
  return rows_of(static_cast<const T*>(data), stride, count);
}

}  // namespace

extern "C" {

int emulated_gram(int dtype, const void* jac, int64_t stride, const void* sam, int64_t sam_stride,
                  int tasks, int64_t columns, double* out) {
  Scratch partials(gram_partials(tasks, columns, bytes_of(dtype)));
  return with(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Rows<const T> j = rows<T>(jac, stride, tasks);
    if (sam)
      return gram<T, true>(j, rows<T>(sam, sam_stride, tasks), tasks, columns, partials.data(), out,
                           nullptr);
    return gram<T, false>(j, j, tasks, columns, partials.data(), out, nullptr);
  });
}

int emulated_gram_pair(int dtype, const void* jac, int64_t stride, const void* sam,
                       int64_t sam_stride, int tasks, int64_t columns, double* out,
                       double* difference) {
  Scratch partials(2 * gram_partials(tasks, columns, bytes_of(dtype)));
  return with(dtype, [&](auto zero) {
    using T = decltype(zero);
    return gram_pair<T>(rows<T>(jac, stride, tasks), rows<T>(sam, sam_stride, tasks), tasks,
                        columns, partials.data(), out, difference, nullptr);
  });
}

// gram_small_kernel with a plan of the test's own: chunks that take several spans, several steps a
// span, which the shapes ask for from 16 million columns on. out: [T (T + 1) / 2, chunks]
int emulated_gram_spans(const float* jac, int64_t columns, int64_t chunks, int steps, double* out) {
  const Rows<const float> j = rows<float>(jac, columns, 3);
  return launch(gram_small_kernel<float, 3, Of::kRows>, dim3(static_cast<unsigned>(chunks)),
                dim3(kThreads), 0, nullptr, j, j, columns, StripPlan{chunks, steps}, out);
}

// The same of gram_mma_kernel (tasks 12, 24, 40 or 56: a kernel each; of: 0 rows, 1 differences, 2
// both, to 32 rows of bfloat16) and of row_squares_kernel. dtype: 0 or 3.
int emulated_mma_spans(int dtype, int of, const void* jac, const void* sam, int tasks,
                       int64_t columns, int64_t chunks, int steps, double* out) {
  const auto run = [&](auto zero, auto blocks, auto what) {
    using T = decltype(zero);
    return launch(gram_mma_kernel<T, decltype(blocks)::value, decltype(what)::value>,
                  dim3(static_cast<unsigned>(chunks)), dim3(kMmaThreads), 0, nullptr,
                  rows<T>(jac, columns, tasks), rows<T>(sam, columns, tasks), tasks, columns,
                  StripPlan{chunks, steps}, out);
  };
  const auto sized = [&](auto zero, auto what) -> int {
    if (tasks == 12) return run(zero, std::integral_constant<int, 2>{}, what);
    if (tasks == 24) return run(zero, std::integral_constant<int, 4>{}, what);
    if constexpr (decltype(what)::value != Of::kBoth) {
      if (tasks == 40) return run(zero, std::integral_constant<int, 6>{}, what);
      if (tasks == 56) return run(zero, std::integral_constant<int, 8>{}, what);
    }
    return cudaErrorInvalidValue;
  };
  const auto typed = [&](auto what) {
    return dtype == 0 ? sized(float{}, what) : sized(__nv_bfloat16{}, what);
  };
  if (of == 0) return typed(std::integral_constant<Of, Of::kRows>{});
  if (of == 1) return typed(std::integral_constant<Of, Of::kDifference>{});
  return typed(std::integral_constant<Of, Of::kBoth>{});
}

int emulated_square_spans(const float* jac, int64_t columns, int64_t chunks, int steps,
                          double* out) {
  return launch(row_squares_kernel<float>, dim3(static_cast<unsigned>(chunks), 2), dim3(kThreads),
                0, nullptr, rows<float>(jac, columns, 2), columns, StripPlan{chunks, steps}, out);
}

int emulated_row_norms(int dtype, const void* jac, int64_t stride, int tasks, int64_t columns,
                       double* out) {
  Scratch partials(row_norms_partials(tasks, columns, bytes_of(dtype)));
  return with(dtype, [&](auto zero) {
    using T = decltype(zero);
    return row_norms<T>(rows<T>(jac, stride, tasks), tasks, columns, partials.data(), out, nullptr);
  });
}

int emulated_combine(int dtype, int beside, const void* jac, int64_t stride, const double* a,
                     const void* sam, int64_t sam_stride, const double* b, int tasks,
                     int64_t columns, void* out) {
  return with(dtype, beside, [&](auto zero, auto sum) {
    using T = decltype(zero);
    using O = decltype(sum);
    const Rows<const T> j = rows<T>(jac, stride, tasks);
    if (sam)
      return combine_flat<T, O>(j, a, rows<T>(sam, sam_stride, tasks), b, tasks, columns,
                                static_cast<O*>(out), nullptr);
    return combine<T, O>(j, a, tasks, columns, static_cast<O*>(out), nullptr);
  });
}

int emulated_project(int dtype, const void* jac, int64_t stride, const double* coefficients,
                     int tasks, int outputs, int64_t columns, void* out, int64_t out_stride) {
  return with(dtype, [&](auto zero) {
    using T = decltype(zero);
    return project<T>(rows<T>(jac, stride, tasks), coefficients, tasks, outputs, columns,
                      rows_of(static_cast<T*>(out), out_stride, outputs), nullptr);
  });
}

int emulated_graddrop(int dtype, int beside, const void* jac, int64_t stride, const double* leak,
                      const bool* there, int64_t* rng, int tasks, int64_t columns, void* out) {
  return with(dtype, beside, [&](auto zero, auto sum) {
    using T = decltype(zero);
    using O = decltype(sum);
    return graddrop<T, O>(rows<T>(jac, stride, tasks), leak, there, rng, tasks, columns,
                          static_cast<O*>(out), nullptr);
  });
}

int emulated_affinity(const double* gram, const double* losses, int64_t tasks, double lr,
                      double* out) {
  return affinity(gram, losses, tasks, lr, out, nullptr);
}

int emulated_pack_row(int dtype, int beside, const void* const* grads, const int64_t* offsets,
                      const int64_t* numels, int64_t count, int accumulate, void* row,
                      int64_t columns, double* sq_norm) {
  Scratch partials(pack_row_partials(count, columns));
  return with(dtype, beside, [&](auto zero, auto grad) {
    using T = decltype(zero);
    using G = decltype(grad);
    return pack_row<T, G>(grads, offsets, numels, count, accumulate != 0, static_cast<T*>(row),
                          columns, partials.data(), sq_norm, nullptr);
  });
}

// row == nullptr: restore
int emulated_perturb(int dtype, int beside, void* const* params, const int64_t* offsets,
                     const int64_t* numels, const double* rho, int64_t count, const void* saved,
                     const void* row, const double* sq_norm, int64_t columns, int adaptive,
                     double eta) {
  return with(dtype, beside, [&](auto zero, auto param) {
    using T = decltype(zero);
    using U = decltype(param);
    const U* source = static_cast<const U*>(saved);
    if (!row) return restore<U>(params, offsets, numels, count, source, columns, nullptr);
    return perturb<T, U>(params, offsets, numels, rho, count, source, static_cast<const T*>(row),
                         sq_norm, columns, adaptive != 0, eta, nullptr);
  });
}

int emulated_adaptive_sq_norm(int dtype, int beside, const void* saved, const void* row,
                              int64_t columns, double eta, double* out) {
  Scratch partials(adaptive_sq_norm_partials(columns, bytes_of(beside)));
  return with(dtype, beside, [&](auto zero, auto param) {
    using T = decltype(zero);
    using U = decltype(param);
    return adaptive_sq_norm<T, U>(static_cast<const U*>(saved), static_cast<const T*>(row), columns,
                                  eta, partials.data(), out, nullptr);
  });
}

int emulated_solve(int number, const double* gram, int64_t batch, int64_t tasks,
                   const double* option, const int64_t* order, const double* preference,
                   double* state, double* weights, int64_t* status, double* residual) {
  int code = -1;
  with_method(number, {option, order, preference, state}, [&](const auto& method) {
    Scratch work(solve_scratch(method, batch, tasks));
    code = solve(method, gram, batch, tasks, work.data(), weights, status, residual, nullptr);
  });
  return code;
}

int emulated_draw_orders(int64_t* rng, int64_t batch, int64_t tasks, int64_t* order) {
  return draw_orders(rng, batch, tasks, order, nullptr);
}

// The same solvers with the CPU's team of one thread: what the block must agree with.
void serial_solve(int number, const double* gram, int64_t batch, int64_t tasks,
                  const double* option, const int64_t* order, const double* preference,
                  double* state, double* weights, int64_t* status, double* residual) {
  with_method(number, {option, order, preference, state}, [&](const auto& method) {
    using Method = std::decay_t<decltype(method)>;
    for (int64_t b = 0; b < batch; ++b) {
      Scratch work(Method::work(tasks));
      flatmtl::SerialTeam team;
      const flatmtl::Problem p{
          gram + b * tasks * tasks, tasks, weights + b * tasks, status + b, residual + b, b};
      method(team, p, work.data());
    }
  });
}

void serial_draw_order(uint64_t seed, uint64_t step, int64_t b, int64_t tasks, int64_t* order) {
  flatmtl::SerialTeam team;
  flatmtl::draw_order(team, seed, step, b, tasks, order);
}

int emulated_draw_normals(int64_t* rng, int64_t batch, int64_t tasks, double* out) {
  return draw_normals(rng, batch, tasks, out, nullptr);
}

void serial_draw_normal(uint64_t seed, uint64_t step, int64_t b, int64_t tasks, double* out) {
  flatmtl::SerialTeam team;
  flatmtl::draw_normal(team, seed, step, b, tasks, out);
}

// Round trips of the stand-in conversions, checked against numpy's.
void emulated_half(const float* in, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = __float2half_rn(in[i]).bits;
}
void emulated_float(const uint16_t* in, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = __half2float(__half{in[i]});
}

}  // extern "C"
