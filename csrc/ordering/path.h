// Paths through all of n tasks, and how well neighbours on them go together.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

#include "../selection/watch.h"

namespace flatmtl::ordering {

using Path = std::vector<int>;

struct Problem {
  int tasks;
  const double* similarity;  // [n, n], symmetric; the diagonal is not read
  int start;                 // the first task, or -1: any

  double at(int a, int b) const { return similarity[size_t(a) * tasks + b]; }

  double sum(const Path& path) const {
    double total = 0;
    for (size_t k = 1; k < path.size(); ++k) total += at(path[k - 1], path[k]);
    return total;
  }
};

// Always on to the most similar task left, the first one of equals: the best such path of every
// start. O(n^3).
inline Path nearest_neighbour(const Problem& p, selection::Watch& watch) {
  Path best, path(p.tasks);
  double most = 0;
  for (int first = 0; first < p.tasks; ++first) {
    if (p.start >= 0 && first != p.start) continue;
    for (int t = 0; t < p.tasks; ++t) path[t] = t;
    path[0] = first;
    path[first] = 0;
    for (int k = 1; k < p.tasks; ++k) {
      watch.look(0.0);
      int next = k;
      for (int j = k + 1; j < p.tasks; ++j) {
        const double gain = p.at(path[k - 1], path[j]) - p.at(path[k - 1], path[next]);
        if (gain > 0 || (gain == 0 && path[j] < path[next])) next = j;
      }
      std::swap(path[k], path[next]);
    }
    const double sum = p.sum(path);
    if (best.empty() || sum > most) best = path, most = sum;
  }
  return best;
}

}  // namespace flatmtl::ordering
