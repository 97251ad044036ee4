// Cholesky factor of a principal submatrix that grows and shrinks, row by row.
//
// L is the lower factor of C[list, list]. Row k depends only on rows above it, so that adding a
// member appends one row, and removing the one at position r keeps the rows above r. The diagonal
// holds 1 / L_kk. Triangular solves run column by column: one phase a column.
#pragma once

#include <cmath>

#include "team.h"

namespace flatmtl {

// x <- L^-1 x without the final division by the diagonal: afterwards x_j still has to be multiplied
// by 1 / L_jj. n: rows of the factor. x: [n].
template <class Team>
FLATMTL_HD void forward_columns(Team& team, const double* factor, int64_t stride, int64_t n,
                                double* x) {
  for (int64_t j = 0; j + 1 < n; ++j) {
    team.each(n - j - 1, [&](int64_t m) {
      const int64_t row = j + 1 + m;
      x[row] -= factor[row * stride + j] * (x[j] * factor[j * stride + j]);
    });
  }
}

// Appends the row of list[k]; rows 0..k-1 must be there. Returns false, and leaves a row that must
// not be used, if the pivot is not above `floor` (the new member depends on the others
// numerically).
template <class Team>
FLATMTL_HD bool append_row(Team& team, const double* matrix, int64_t stride, const int64_t* list,
                           int64_t k, double floor, double* factor) {
  double* row = factor + k * stride;
  team.each(k, [&](int64_t m) { row[m] = matrix[list[k] * stride + list[m]]; });
  forward_columns(team, factor, stride, k, row);
  team.each(k, [&](int64_t m) { row[m] *= factor[m * stride + m]; });
  const double pivot =
      matrix[list[k] * stride + list[k]] - team.sum(k, [&](int64_t m) { return row[m] * row[m]; });
  if (!(pivot > floor)) return false;
  team.one([&] { row[k] = 1.0 / sqrt(pivot); });
  return true;
}

// The whole factor at once: the lower triangle of matrix [n, n] becomes L with 1 / L_jj on its
// diagonal, as append_row leaves it. column: [n] scratch. False if a pivot is not above `floor`.
template <class Team>
FLATMTL_HD bool cholesky_factor(Team& team, double* matrix, int64_t n, double floor,
                                double* column) {
  for (int64_t j = 0; j < n; ++j) {
    const double pivot = matrix[j * n + j];
    if (!(pivot > floor)) return false;
    const double inverse = 1.0 / sqrt(pivot);
    team.each(n - j - 1, [&](int64_t m) {
      const int64_t i = j + 1 + m;
      column[i] = matrix[i * n + j] *= inverse;
    });
    team.each(n - j, [&](int64_t m) {
      const int64_t i = j + m;
      if (i == j) {
        matrix[j * n + j] = inverse;
        return;
      }
      for (int64_t k = j + 1; k <= i; ++k) matrix[i * n + k] -= column[i] * column[k];
    });
  }
  return true;
}

// x <- (L L')^-1 x.
template <class Team>
FLATMTL_HD void cholesky_solve(Team& team, const double* factor, int64_t stride, int64_t n,
                               double* x) {
  forward_columns(team, factor, stride, n, x);
  // y = L^-1 x and the division of L' y = . by the diagonal at once
  team.each(n, [&](int64_t m) { x[m] *= factor[m * stride + m]; });
  for (int64_t j = n - 1; j >= 0; --j) {
    team.one([&] { x[j] *= factor[j * stride + j]; });
    team.each(j, [&](int64_t m) { x[m] -= factor[j * stride + m] * x[j]; });
  }
}

}  // namespace flatmtl
