// A *team* is the set of threads that solve one small T x T problem together.
//
// Solvers are written once, as templates over a team, in phases:
//
//   team.each(n, f)             f(i) for i in [0, n); the iterations of one phase are independent;
//                               every write is visible to all members when the phase returns
//   team.each2(rows, cols, f)   the same over (row, col)
//   team.sum(n, f)              sum of f(i), the same bits on every member, in a fixed order
//   team.max(n, f)              the largest f(i), 0 if n == 0, NaN if one is
//   team.one(f)                 one member runs f; visible to all when it returns
//
// Scalars computed outside a phase are computed by every member from the same data, so control flow
// is uniform. The CPU team below is one thread; the CUDA team is one block; a third team, in the
// tests, runs the iterations of every phase in a random order, so that a hidden dependence between
// them shows without a GPU.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(__CUDA__)
#define FLATMTL_HD __host__ __device__
#else
#define FLATMTL_HD
#endif

namespace flatmtl {

// Status bits of a solve, the same for every method.
constexpr int64_t kNoActiveTask = 1;  // every gradient is zero or not finite: all weights are 0
constexpr int64_t kInactiveTask = 2;  // at least one task was left out
constexpr int64_t kNotConverged = 4;  // the solver stopped short of its tolerance
constexpr int64_t kRidgeRaised = 8;   // the Gram matrix was too noisy for the ridge asked for
constexpr int64_t kFallback = 16;     // the weights are the method's documented fallback
constexpr int64_t kInvalidGram = 32;  // not symmetric, or clearly not positive semi-definite

struct SerialTeam {
  template <class F>
  void each(int64_t n, F f) const {
    for (int64_t i = 0; i < n; ++i) f(i);
  }
  template <class F>
  void each2(int64_t rows, int64_t cols, F f) const {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) f(i, j);
  }
  template <class F>
  double sum(int64_t n, F f) const {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += f(i);
    return total;
  }
  template <class F>
  double max(int64_t n, F f) const {
    double largest = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double value = f(i);
      if (i == 0 || value > largest || value != value) largest = value;
    }
    return largest;
  }
  template <class F>
  void one(F f) const {
    f();
  }
};

}  // namespace flatmtl
