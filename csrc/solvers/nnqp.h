// Non-negative quadratic programme:  min 0.5 y'Cy - b'y,  y >= 0,  C positive definite.
//
// Active set after Lawson and Hanson ("Solving Least Squares Problems", ch. 23) on the normal
// equations: the most violated task enters the passive set, the passive equations are solved by the
// growing Cholesky factor, and a step that would leave the orthant stops at its boundary, where the
// task that got there leaves again. Finite; about 1.3 T small solves in practice.
#pragma once

#include "cholesky.h"
#include "residual.h"

namespace flatmtl {

// Doubles of scratch: factor [n, n], z, slack, state, list (int64) [n] each, four slots.
FLATMTL_HD inline int64_t nnqp_work(int64_t n) { return n * n + 4 * n + 4; }

// matrix: [n, n], b: [n], use: [n] (0: y_i stays 0), y: [n] out. *residual: the backward error of
// C y = b on the passive set and C y >= b off it. Returns true if the answer is sound: the active
// set ended, and the equations hold also in the plain sense, up to what rounding leaves of b where
// y is large (near-singular problems). warm: `work` is as a call with the same matrix and `use` has
// left it, and its passive set is where this one begins.
template <class Team>
FLATMTL_HD bool nnqp(Team& team, const double* matrix, const double* b, const double* use,
                     int64_t n, double* work, double* y, double* residual, bool warm = false) {
  double* factor = work;
  double* z = factor + n * n;
  double* slack = z + n;
  double* state = slack + n;  // 1: passive (y may be positive), -1: barred until the next full step
  int64_t* list = reinterpret_cast<int64_t*>(state + n);  // the passive set in the factor's order
  // What one member found and all read. A slot of its own each: a phase has its barrier at the end,
  // so a slot must not be written again in the phase right after the one that read it.
  double* entering = reinterpret_cast<double*>(list + n);
  double* step = entering + 1;
  double* remaining = entering + 2;
  double* first_changed = entering + 3;

  team.each(n, [&](int64_t i) {
    y[i] = 0;
    state[i] = 0;
  });
  const double ridge_floor = 1e-14;  // a pivot below this is rounding, not curvature
  const int64_t limit = 3 * n + 10;
  int64_t count = 0;
  bool converged = false;

  // A first passive set: the one before, or all that would grow alone. Those that come out negative
  // leave together; what is left is where the method proper begins.
  if (warm) {
    count = static_cast<int64_t>(*remaining);
  } else {
    team.one([&] {
      int64_t first = 0;
      for (int64_t i = 0; i < n; ++i)
        if (use[i] != 0 && b[i] > 0) list[first++] = i;
      *remaining = static_cast<double>(first);
    });
    const int64_t first = static_cast<int64_t>(*remaining);
    while (count < first && append_row(team, matrix, n, list, count, ridge_floor, factor)) ++count;
  }
  while (count > 0) {
    team.each(count, [&](int64_t k) { z[k] = b[list[k]]; });
    cholesky_solve(team, factor, n, count, z);
    team.one([&] {
      int64_t kept = 0, changed = count;
      for (int64_t k = 0; k < count; ++k) {
        if (z[k] > 0)
          list[kept++] = list[k];
        else if (k < changed)
          changed = k;
      }
      *remaining = static_cast<double>(kept);
      *first_changed = static_cast<double>(changed < kept ? changed : kept);
    });
    const int64_t kept = static_cast<int64_t>(*remaining);
    if (kept == count) {
      team.each(count, [&](int64_t k) {
        y[list[k]] = z[k];
        state[list[k]] = 1;
      });
      break;
    }
    count = static_cast<int64_t>(*first_changed);
    while (count < kept && append_row(team, matrix, n, list, count, ridge_floor, factor)) ++count;
  }

  for (int64_t round = 0; round < limit; ++round) {
    // slack: how far y_i = 0 is from optimal, 0 where that is within rounding
    team.each(n, [&](int64_t i) {
      double s = b[i], magnitude = fabs(b[i]);
      for (int64_t k = 0; k < n; ++k) {
        const double term = matrix[i * n + k] * y[k];
        s -= term;
        magnitude += fabs(term);
      }
      slack[i] = use[i] != 0 && state[i] == 0 && s > 1e-14 * magnitude ? s : 0.0;
    });
    team.one([&] {
      int64_t best = -1;
      for (int64_t i = 0; i < n; ++i)
        if (slack[i] > 0 && (best < 0 || slack[i] > slack[best])) best = i;
      *entering = static_cast<double>(best);
    });
    const int64_t enter = static_cast<int64_t>(*entering);
    if (enter < 0) {
      converged = true;
      break;
    }
    team.one([&] { list[count] = enter; });
    if (!append_row(team, matrix, n, list, count, ridge_floor, factor)) {
      team.one([&] { state[enter] = -1; });
      continue;
    }
    team.one([&] { state[enter] = 1; });
    ++count;

    bool first = true;
    while (count > 0) {
      team.each(count, [&](int64_t k) { z[k] = b[list[k]]; });
      cholesky_solve(team, factor, n, count, z);
      // The newcomer must grow; if rounding says otherwise it would be taken in for ever.
      const bool stuck = first && !(z[count - 1] > 0);
      first = false;
      if (stuck) {
        team.one([&] { state[list[count - 1]] = -1; });
        --count;
        break;
      }
      // Step length to the nearest boundary, 1 if there is none on the way.
      team.one([&] {
        double alpha = 1;
        for (int64_t k = 0; k < count; ++k) {
          const double from = y[list[k]];
          if (!(z[k] > 0)) {
            const double a = from / (from - z[k]);
            if (a < alpha) alpha = a;
          }
        }
        *step = alpha;
      });
      const double alpha = *step;
      if (!(alpha < 1)) {
        team.each(count, [&](int64_t k) { y[list[k]] = z[k]; });
        team.each(n, [&](int64_t i) {
          if (state[i] < 0) state[i] = 0;
        });
        break;
      }
      // Take the step; whoever stands at the boundary leaves, the factor is rebuilt from there on.
      team.one([&] {
        int64_t kept = 0, changed = count;
        for (int64_t k = 0; k < count; ++k) {
          const int64_t i = list[k];
          const double from = y[i];
          const bool blocks = !(z[k] > 0) && !(from / (from - z[k]) > alpha);
          y[i] = blocks ? 0.0 : from + alpha * (z[k] - from);
          if (!blocks && y[i] > 0) {
            list[kept++] = i;
          } else {
            y[i] = 0;
            state[i] = 0;
            if (k < changed) changed = k;
          }
        }
        *remaining = static_cast<double>(kept);
        *first_changed = static_cast<double>(changed < kept ? changed : kept);
      });
      const int64_t kept = static_cast<int64_t>(*remaining);
      count = static_cast<int64_t>(*first_changed);
      bool sound = true;
      while (sound && count < kept) {
        sound = append_row(team, matrix, n, list, count, ridge_floor, factor);
        if (sound) ++count;
      }
      if (!sound) {  // a row that stood before no longer does: bar its task and those behind it
        team.one([&] {
          for (int64_t k = count; k < kept; ++k) {
            y[list[k]] = 0;
            state[list[k]] = -1;
          }
        });
      }
    }
  }

  // One step of iterative refinement: it makes the error of every row small, not only of the
  // largest.
  team.each(count, [&](int64_t k) {
    double s = b[list[k]];
    for (int64_t j = 0; j < n; ++j) s -= matrix[list[k] * n + j] * y[j];
    z[k] = s;
  });
  cholesky_solve(team, factor, n, count, z);
  team.each(count, [&](int64_t k) {
    const double refined = y[list[k]] + z[k];
    if (refined > 0) y[list[k]] = refined;
  });

  team.each(n, [&](int64_t i) {
    double s = b[i], magnitude = fabs(b[i]);
    for (int64_t k = 0; k < n; ++k) {
      const double term = matrix[i * n + k] * y[k];
      s -= term;
      magnitude += fabs(term);
    }
    if (use[i] == 0 || (!(y[i] > 0) && s < 0)) s = 0;
    slack[i] = fabs(s);
    state[i] = backward_error(s, magnitude);
  });
  const double scale = team.max(n, [&](int64_t i) { return use[i] == 0 ? 0.0 : fabs(b[i]); });
  const double worst = team.max(n, [&](int64_t i) { return slack[i]; });
  const double size = team.sum(n, [&](int64_t i) { return y[i]; });
  const double error = team.max(n, [&](int64_t i) { return state[i]; });
  team.one([&] {
    *residual = error;
    *remaining = static_cast<double>(count);  // for nnqp_form
  });
  return converged && error <= kTolerance && worst <= 1e-6 * scale + 1e-13 * size;
}

// v' (C_SS)^-1 v on the passive set S that nnqp has left in `work`; row: [n] scratch.
template <class Team>
FLATMTL_HD double nnqp_form(Team& team, const double* v, int64_t n, double* work, double* row) {
  const double* factor = work;
  const double* state = factor + n * n + 2 * n;
  const int64_t* list = reinterpret_cast<const int64_t*>(state + n);
  const int64_t count = static_cast<int64_t>(*(reinterpret_cast<const double*>(list + n) + 2));
  team.each(count, [&](int64_t k) { row[k] = v[list[k]]; });
  forward_columns(team, factor, n, count, row);
  return team.sum(count, [&](int64_t k) {
    const double x = row[k] * factor[k * n + k];
    return x * x;
  });
}

}  // namespace flatmtl
