// Aligned-MTL (Senushkin et al., arXiv 2305.19000): gradients rotated to be orthogonal and of equal
// length. G = V diag(l) V' without the eigenvalues below rank_tolerance * T * max l;
// B = sqrt(s) V l^(-1/2) V',  w = B p.
//
// The method looks at G itself, not at its cosine form: tasks whose gradients are smaller than
// about sqrt(rank_tolerance * T) of the largest fall below the rank threshold, and w jumps there.
#pragma once

#include "problem.h"
#include "symmetric_eigen.h"

namespace flatmtl {

struct Aligned {
  const double* preference;  // p [T], or null: ones
  int64_t scale;             // s of the kept eigenvalues, 0: least, 1: lower median, 2: mean
  double rank_tolerance;

  FLATMTL_HD static int64_t work(int64_t tasks) {
    return Opened::work(tasks) + tasks * tasks + symmetric_eigen_work(tasks) + 4 * tasks;
  }

  template <class Team>
  FLATMTL_HD void operator()(Team& team, const Problem& p, double* scratch) const {
    const int64_t n = p.tasks;
    double* vectors = scratch + Opened::work(n);  // [T, T]
    double* values = vectors + n * n;             // [T]
    double* kept = values + n;                    // [T] 1 or 0
    double* share = kept + n;                     // [T] of every eigenvector in w
    double* row = share + n;                      // [T]
    double* inner = row + n;
    const Opened o = open(team, p, scratch, vectors);
    double* matrix = o.cosine;  // its place
    if (!solvable(o)) return give_up(team, p, o.status);
    const double top = team.max(n, [&](int64_t i) { return o.norm[i]; });
    const auto entry = [&](int64_t i, int64_t j) {
      return cosine_entry(p.gram, o.active, o.inverse_norm, n, i, j) * (o.norm[i] / top) *
             (o.norm[j] / top);
    };
    team.each2(n, n, [&](int64_t i, int64_t j) { matrix[i * n + j] = entry(i, j); });
    const bool converged = symmetric_eigen(team, matrix, n, inner, values, vectors);

    const double largest = team.max(n, [&](int64_t k) { return values[k]; });
    const double floor = largest * static_cast<double>(n) * rank_tolerance;
    team.each(n, [&](int64_t k) { kept[k] = values[k] > floor ? 1.0 : 0.0; });
    const double rank = team.sum(n, [&](int64_t k) { return kept[k]; });
    const double mean = team.sum(n, [&](int64_t k) { return kept[k] * values[k]; }) / rank;
    const int64_t wanted = scale == 1 ? (static_cast<int64_t>(rank) - 1) / 2 : 0;
    team.each(n, [&](int64_t k) {  // the value of the wanted rank, ties by index
      int64_t below = 0;
      for (int64_t m = 0; m < n; ++m)
        if (kept[m] != 0 && (values[m] < values[k] || (values[m] == values[k] && m < k))) ++below;
      row[k] = kept[k] != 0 && below == wanted ? values[k] : 0.0;
      double s = 0;
      for (int64_t i = 0; i < n; ++i)
        s += vectors[i * n + k] * (o.active[i] == 0 ? 0.0 : preference ? preference[i] : 1.0);
      share[k] = s;
    });
    const double chosen = scale == 2 ? mean : team.sum(n, [&](int64_t k) { return row[k]; });
    team.each(
        n, [&](int64_t k) { share[k] = kept[k] != 0 ? share[k] * sqrt(chosen / values[k]) : 0.0; });
    team.each(n, [&](int64_t i) {
      double s = 0;
      for (int64_t k = 0; k < n; ++k) s += vectors[i * n + k] * share[k];
      p.weights[i] = o.active[i] != 0 ? s : 0.0;
    });
    // Residual: what the eigenpairs leave of G V = V diag(l), relative to the largest eigenvalue.
    team.each(n, [&](int64_t i) {
      double worst = 0;
      for (int64_t k = 0; k < n; ++k) {
        double s = -values[k] * vectors[i * n + k];
        for (int64_t j = 0; j < n; ++j) s += entry(i, j) * vectors[j * n + k];
        worst = fabs(s) > worst ? fabs(s) : worst;
      }
      row[i] = worst;
    });
    const double error = team.max(n, [&](int64_t i) { return row[i]; }) / largest;
    conclude(team, p, o, converged ? 0 : kNotConverged, error);
  }
};

}  // namespace flatmtl
