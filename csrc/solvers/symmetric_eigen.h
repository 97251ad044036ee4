// All eigenpairs of a small symmetric matrix: Householder reduction to tridiagonal form, then QL
// with implicit shifts (Golub and Van Loan, "Matrix Computations", 8.3). Chosen over Jacobi
// rotations because it needs a tenth of their arithmetic at T = 40. Eigenvalues are good to a few
// units in the last place of the largest one.
//
// What is sequential (the chase of the bulge) one member does; it leaves the rotations in a list
// that all members then apply, each to its own rows of the eigenvector matrix.
#pragma once

#include <cmath>

#include "team.h"

namespace flatmtl {

// Doubles of scratch: off-diagonal, two columns, the rotations (cosine, sine), four slots.
FLATMTL_HD inline int64_t symmetric_eigen_work(int64_t n) { return 5 * n + 4; }

// a: [n, n] symmetric, destroyed. values: [n], unordered. vectors: [n, n], column k for values[k].
// Returns false if an eigenvalue needed more than 40 sweeps.
template <class Team>
FLATMTL_HD bool symmetric_eigen(Team& team, double* a, int64_t n, double* work, double* values,
                                double* vectors) {
  double* off = work;           // [n] off[i] couples i and i + 1
  double* v = off + n;          // [n]
  double* w = v + n;            // [n]
  double* cosines = w + n;      // [n]
  double* sines = cosines + n;  // [n]
  double* from = sines + n;     // slots: rotations from `from` down to `to`
  double* to = from + 1;
  double* tries = from + 2;
  double* at = from + 3;  // the eigenvalue being worked on

  team.each2(n, n, [&](int64_t i, int64_t j) { vectors[i * n + j] = i == j ? 1.0 : 0.0; });
  for (int64_t k = 0; k + 2 < n; ++k) {
    // H = I - beta v v' takes column k below the sub-diagonal to zero.
    const int64_t m = n - k - 1;  // rows below k
    const double tail = team.sum(m - 1, [&](int64_t i) {
      const double x = a[(k + 2 + i) * n + k];
      return x * x;
    });
    const double head = a[(k + 1) * n + k];
    if (!(tail > 0)) continue;
    const double length = sqrt(head * head + tail);
    const double first = head < 0 ? head - length : head + length;  // no cancellation
    const double beta = 2 / (first * first + tail);
    team.each(m, [&](int64_t i) { v[i] = i == 0 ? first : a[(k + 1 + i) * n + k]; });
    team.each(m, [&](int64_t i) {
      const double* row = a + (k + 1 + i) * n + k + 1;
      double s = 0;
      for (int64_t j = 0; j < m; ++j) s += row[j] * v[j];
      w[i] = beta * s;
    });
    const double half = 0.5 * beta * team.sum(m, [&](int64_t i) { return v[i] * w[i]; });
    team.each(m, [&](int64_t i) { w[i] -= half * v[i]; });
    team.each(m, [&](int64_t i) {
      double* row = a + (k + 1 + i) * n + k + 1;
      for (int64_t j = 0; j < m; ++j) row[j] -= v[i] * w[j] + w[i] * v[j];
      if (i == 0) a[(k + 1) * n + k] = head < 0 ? length : -length;
    });
    team.each(n, [&](int64_t i) {
      double* row = vectors + i * n + k + 1;
      double s = 0;
      for (int64_t j = 0; j < m; ++j) s += row[j] * v[j];
      s *= beta;
      for (int64_t j = 0; j < m; ++j) row[j] -= s * v[j];
    });
  }
  team.each(n, [&](int64_t i) {
    values[i] = a[i * n + i];
    off[i] = i + 1 < n ? a[(i + 1) * n + i] : 0.0;
  });
  team.one([&] { *at = *tries = 0; });
  // Below this an off-diagonal changes no eigenvalue by more than the reduction above has.
  const double negligible =
      1.1e-16 * team.max(n, [&](int64_t i) { return fabs(values[i]) + fabs(off[i]); });

  while (true) {
    team.one([&] {
      int64_t l = static_cast<int64_t>(*at), m = l;
      for (; l < n; ++l) {
        for (m = l; m + 1 < n; ++m)
          if (fabs(off[m]) <= negligible) break;
        if (m != l) break;
        *tries = 0;
      }
      *at = static_cast<double>(l);
      *from = *to = 0;
      if (l >= n || *tries >= 40) return;
      *tries += 1;
      // Wilkinson's shift, then the bulge is chased from m up to l.
      double g = (values[l + 1] - values[l]) / (2 * off[l]);
      double r = sqrt(g * g + 1);
      g = values[m] - values[l] + off[l] / (g + (g < 0 ? -r : r));
      double s = 1, c = 1, shift = 0;
      int64_t i = m - 1;
      for (; i >= l; --i) {
        double f = s * off[i];
        const double b = c * off[i];
        r = sqrt(f * f + g * g);
        off[i + 1] = r;
        if (r == 0) {  // split: the rest is taken up in the next round
          values[i + 1] -= shift;
          off[m] = 0;
          break;
        }
        s = f / r;
        c = g / r;
        g = values[i + 1] - shift;
        r = (values[i] - g) * s + 2 * c * b;
        shift = s * r;
        values[i + 1] = g + shift;
        g = c * r - b;
        cosines[i] = c;
        sines[i] = s;
      }
      if (i < l) {
        values[l] -= shift;
        off[l] = g;
        off[m] = 0;
      }
      *from = static_cast<double>(m);
      *to = static_cast<double>(i + 1);
    });
    const int64_t upper = static_cast<int64_t>(*from), lower = static_cast<int64_t>(*to);
    if (upper == 0) break;  // none left, or given up
    team.each(n, [&](int64_t k) {
      double* row = vectors + k * n;
      for (int64_t i = upper - 1; i >= lower; --i) {
        const double f = row[i + 1];
        row[i + 1] = sines[i] * row[i] + cosines[i] * f;
        row[i] = cosines[i] * row[i] - sines[i] * f;
      }
    });
  }
  return static_cast<int64_t>(*at) >= n;
}

}  // namespace flatmtl
