// The path with the largest sum of similarities, exact: the dynamic programme of Held and Karp
// (1962) over sets of tasks. Every path through all tasks is two arms that meet at one of them, the
// anchor, so one table of paths from the anchor settles every start: the best arm over a set and
// the best one over the others. n^2 2^(n - 2) steps and 8 (n - 1) 2^(n - 1) bytes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../selection/watch.h"
#include "path.h"

namespace flatmtl::ordering {

class HeldKarp {
 public:
  HeldKarp(const Problem& problem, selection::Watch& watch)
      : p_(problem), rest_(problem.tasks - 1), anchor_(problem.start < 0 ? rest_ : problem.start) {
    for (int t = 0; t < p_.tasks; ++t)
      if (t != anchor_) task_.push_back(t);
    between_.resize(size_t(rest_) * rest_);
    for (int a = 0; a < rest_; ++a)
      for (int b = 0; b < rest_; ++b) between_[size_t(a) * rest_ + b] = p_.at(task_[a], task_[b]);
    fill(watch);
  }

  Path path() const {
    const uint32_t all = (uint32_t{1} << rest_) - 1;
    uint32_t chosen = all;
    if (p_.start < 0) {
      double most = kNone;
      for (uint32_t set = 0; set <= all / 2; ++set) {  // the other half are their complements
        const double sum = best(set) + best(all ^ set);
        if (sum > most) most = sum, chosen = set;
      }
    }
    Path path = arm(all ^ chosen);  // empty for a fixed start
    path.push_back(anchor_);
    const Path other = arm(chosen);
    path.insert(path.end(), other.rbegin(), other.rend());
    return path;
  }

 private:
  static constexpr double kNone = -std::numeric_limits<double>::infinity();

  const double* row(uint32_t set) const { return &value_[size_t(set) * rest_]; }

  // value_[set, j]: the best path from the anchor through a set, j in it being its last task.
  void fill(selection::Watch& watch) {
    const uint32_t sets = uint32_t{1} << rest_;
    value_.assign(size_t(sets) * rest_, kNone);
    for (int j = 0; j < rest_; ++j) value_[(size_t{1} << j) * rest_ + j] = p_.at(anchor_, task_[j]);
    std::vector<double> next(rest_);
    for (uint32_t set = 1; set < sets; ++set) {
      if (set % 1024 == 0) watch.look(double(set) / sets);
      std::fill(next.begin(), next.end(), kNone);
      for (int k = 0; k < rest_; ++k) {
        if (!(set >> k & 1)) continue;
        const double here = row(set)[k];
        const double* step = &between_[size_t(k) * rest_];
        double* to = next.data();
        for (int j = 0; j < rest_; ++j) to[j] = std::max(to[j], here + step[j]);
      }
      for (int j = 0; j < rest_; ++j)
        if (!(set >> j & 1)) value_[size_t(set | uint32_t{1} << j) * rest_ + j] = next[j];
    }
  }

  int last(uint32_t set) const {
    return static_cast<int>(std::max_element(row(set), row(set) + rest_) - row(set));
  }

  double best(uint32_t set) const { return set == 0 ? 0.0 : row(set)[last(set)]; }

  // The tasks of the best path from the anchor through a set, the one farthest from it first.
  Path arm(uint32_t set) const {
    Path path;
    for (int j = set == 0 ? 0 : last(set); set != 0;) {
      path.push_back(task_[j]);
      const double value = row(set)[j];
      set ^= uint32_t{1} << j;
      int before = 0;
      // the same sum as in fill(), so that one of them is equal to the bit
      for (int k = 0; k < rest_; ++k)
        if ((set >> k & 1) && row(set)[k] + between_[size_t(k) * rest_ + j] == value) {
          before = k;
          break;
        }
      j = before;
    }
    return path;
  }

  const Problem& p_;
  int rest_;                     // tasks but the anchor
  int anchor_;                   // where both arms begin
  Path task_;                    // [rest] their numbers
  std::vector<double> between_;  // [rest, rest] similarities
  std::vector<double> value_;    // [2^rest, rest]
};

}  // namespace flatmtl::ordering
