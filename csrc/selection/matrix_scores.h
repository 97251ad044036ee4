// Scores from a matrix: the score of task t in group G is the mean of a[t][j] over the other
// members j, and a[t][t] if t is alone.
#pragma once

#include <algorithm>
#include <utility>

#include "scores.h"

namespace flatmtl::selection {

class MatrixScores : public Scores {
 public:
  // matrix: [n, n]. tier_of_size: [n + 1], or tier_of_group: [2^n] (the other one null); -1: no
  // candidate.
  MatrixScores(int n, const double* matrix, const int32_t* tier_of_size,
               const int16_t* tier_of_group, bool disjoint)
      : n_(n), a_(matrix), by_size_(tier_of_size), by_group_(tier_of_group), disjoint_(disjoint) {}

  int tasks() const override { return n_; }

  double score(const Candidate& candidate, int task) const override {
    return score(candidate.group, task);
  }

  void fill(std::vector<Table>& best, Watch& watch) const override {
    if (disjoint_)
      fill_disjoint(best, watch);
    else if (by_group_)
      fill_by_group(best, watch);
    else
      fill_by_size(best, watch);
  }

  void over(Mask served, int tier, double least, const Visit& visit) const override {
    const auto offer = [&](Mask group, double sum) {
      if (sum > least && tier_of(group) == tier) visit({group, group, tier}, sum);
    };
    if (disjoint_ || count(served) == 1) offer(served, sum_over(served, served));
    if (disjoint_) return;
    std::vector<Helper> helpers = helpers_of(served);
    const double inside = inside_of(served);
    for (int size = std::max(2, count(served)); size <= n_; ++size) {
      if (!by_group_ && by_size_[size] != tier) continue;
      const Choice choice{helpers, 1.0 / (size - 1), least, offer};
      choose(choice, 0, size - count(served), served, inside);
    }
  }

  void near(const Candidate& candidate, const Visit& visit) const override {
    for (int t = 0; t < n_; ++t) {
      const Mask group = candidate.group ^ (Mask{1} << t);
      const int tier = group ? tier_of(group) : -1;
      if (tier >= 0) visit({group, group, tier}, 0);
    }
  }

 private:
  using Helper = std::pair<double, int>;  // what it adds to the served tasks' row sums, task

  struct Choice {
    const std::vector<Helper>& helpers;  // best first
    double scale;
    double least;
    const std::function<void(Mask, double)>& offer;
  };

  int tier_of(Mask group) const { return by_group_ ? by_group_[group] : by_size_[count(group)]; }

  double score(Mask group, int task) const {
    const Mask others = group & ~(Mask{1} << task);
    const double* row = a_ + task * n_;
    if (!others) return row[task];
    double sum = 0;
    for (Mask m = others; m; m &= m - 1) sum += row[lowest(m)];
    return sum / count(others);
  }

  double sum_over(Mask served, Mask group) const {
    double sum = 0;
    for (Mask m = served; m; m &= m - 1) sum += score(group, lowest(m));
    return sum;
  }

  // sum of a[t][j] over t != j in the set
  double inside_of(Mask set) const {
    double sum = 0;
    for (Mask rows = set; rows; rows &= rows - 1)
      for (Mask m = set & ~(rows & -rows); m; m &= m - 1) sum += a_[lowest(rows) * n_ + lowest(m)];
    return sum;
  }

  std::vector<Helper> helpers_of(Mask served) const {
    std::vector<Helper> helpers;
    for (int j = 0; j < n_; ++j) {
      if (served >> j & 1) continue;
      double sum = 0;
      for (Mask m = served; m; m &= m - 1) sum += a_[lowest(m) * n_ + j];
      helpers.emplace_back(sum, j);
    }
    std::sort(helpers.begin(), helpers.end(), std::greater<>());
    return helpers;
  }

  // Adds `more` of the helpers from place `from` on; what the next ones add bounds all choices.
  void choose(const Choice& c, size_t from, int more, Mask group, double sum) const {
    if (more == 0) return c.offer(group, sum * c.scale);
    double top = sum;
    for (int k = 0; k < more && from + k < c.helpers.size(); ++k) top += c.helpers[from + k].first;
    for (size_t at = from; at + more <= c.helpers.size(); ++at) {
      if (!(top * c.scale > c.least)) return;
      const Helper& helper = c.helpers[at];
      choose(c, at + 1, more - 1, group | Mask{1} << helper.second, sum + helper.first);
      top -= helper.first;
      if (at + more < c.helpers.size()) top += c.helpers[at + more].first;
    }
  }

  void fill_disjoint(std::vector<Table>& best, Watch& watch) const {
    Table inside(size_t{1} << n_, 0);
    for (Mask group = 1; group < inside.size(); ++group) {
      const int t = lowest(group);
      double sum = inside[group & (group - 1)];
      for (Mask m = group & (group - 1); m; m &= m - 1)
        sum += a_[t * n_ + lowest(m)] + a_[lowest(m) * n_ + t];
      inside[group] = sum;
      const int tier = tier_of(group);
      if (tier >= 0)
        best[tier][group] = count(group) == 1 ? a_[t * n_ + t] : sum / (count(group) - 1);
      if (group % 1024 == 0) watch.look(0);
    }
  }

  void fill_by_group(std::vector<Table>& best, Watch& watch) const {
    Table sums(size_t{1} << n_);  // over the subsets of one group, counted through
    const Mask last = static_cast<Mask>(sums.size() - 1);
    for (Mask group = 1; group <= last; ++group) {
      const int tier = tier_of(group);
      if (tier < 0) continue;
      fill_subsets(group, best[tier], sums, [&](int t) { return score(group, t); });
      watch.look(0);
    }
  }

  // [n] column sums over the served tasks; every set of served tasks is visited once
  struct Walk {
    std::vector<Table>& best;
    Watch& watch;
    std::vector<Table> columns;  // by depth
    Table helpers;
  };

  void fill_by_size(std::vector<Table>& best, Watch& watch) const {
    Walk walk{best, watch, std::vector<Table>(n_ + 1, Table(n_, 0)), Table(n_)};
    descend(walk, 0, 0, 0, 0);
  }

  void descend(Walk& walk, int task, int depth, Mask served, double inside) const {
    if (task == n_) {
      if (served) visit_served(walk, walk.columns[depth].data(), served, inside);
      return;
    }
    descend(walk, task + 1, depth, served, inside);
    const double* sums = walk.columns[depth].data();
    double* grown = walk.columns[depth + 1].data();
    const double* row = a_ + task * n_;
    double more = sums[task];
    for (Mask m = served; m; m &= m - 1) more += row[lowest(m)];
    for (int j = 0; j < n_; ++j) grown[j] = sums[j] + row[j];
    descend(walk, task + 1, depth + 1, served | Mask{1} << task, inside + more);
  }

  void visit_served(Walk& walk, const double* columns, Mask served, double inside) const {
    if (served % 1024 == 0) walk.watch.look(0);
    double* helpers = walk.helpers.data();
    int outside = 0;
    for (Mask m = ~served & ((size_t{1} << n_) - 1); m; m &= m - 1) {
      const double value = columns[lowest(m)];
      int at = outside++;
      for (; at > 0 && helpers[at - 1] < value; --at) helpers[at] = helpers[at - 1];
      helpers[at] = value;
    }
    const int size = count(served);
    double sum = inside;
    for (int more = 0; more <= outside; ++more) {
      if (more) sum += helpers[more - 1];
      const int tier = by_size_[size + more];
      if (tier < 0) continue;
      const double value =
          size + more == 1 ? a_[lowest(served) * (n_ + 1)] : sum / (size + more - 1);
      double& slot = walk.best[tier][served];
      if (value > slot) slot = value;
    }
  }

 public:
  // best[U] = max(best[U], sum of score(t) over t in U) for all U in the group. sums: scratch,
  // [2^n].
  template <class Score>
  static void fill_subsets(Mask group, Table& best, Table& sums, const Score& score) {
    size_t filled = 1;
    sums[0] = 0;
    for (Mask m = group; m; m &= m - 1, filled *= 2) {
      const double s = score(lowest(m));
      for (size_t i = 0; i < filled; ++i) sums[filled + i] = sums[i] + s;
    }
    Mask served = 0;
    for (size_t i = 1; i < filled; ++i) {
      served = (served - group) & group;  // the next subset in counting order
      if (sums[i] > best[served]) best[served] = sums[i];
    }
  }

 private:
  int n_;
  const double* a_;
  const int32_t* by_size_;
  const int16_t* by_group_;
  bool disjoint_;
};

}  // namespace flatmtl::selection
