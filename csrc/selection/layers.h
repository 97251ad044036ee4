// The subset dynamic programme. layer(k, b)[S] is the largest sum of scores over the tasks of S
// that at most k groups of a total cost of at most b units can serve:
//   layer(k, b)[S] = max over tiers c, U in S of best[c][U] + layer(k - 1, b - cost(c))[S \ U].
// Memory: 8 bytes * 2^n * (tiers + layers * (budget + 1)). Choices are not stored.
#pragma once

#include <algorithm>

#include "scores.h"
#include "sweep.h"

namespace flatmtl::selection {

class Layers {
 public:
  // units: [tiers] cost of a candidate of each tier; budget: in the same units. planned: how many
  // layers the caller will ask for.
  Layers(const Scores& scores, std::vector<int> units, int budget, int planned, Watch& watch)
      : n_(scores.tasks()),
        units_(std::move(units)),
        budget_(budget),
        planned_(std::max(planned, 1)),
        watch_(watch),
        best_(units_.size(), Table(size_t{1} << n_, kNone)) {
    scores.fill(best_, watch);
    std::vector<Table> first(budget_ + 1, Table(size_t{1} << n_, kNone));
    for (int b = 0; b <= budget_; ++b) {
      for (size_t c = 0; c < units_.size(); ++c)
        if (units_[c] <= b)
          std::transform(first[b].begin(), first[b].end(), best_[c].begin(), first[b].begin(),
                         [](double x, double y) { return x < y ? y : x; });
      first[b][0] = 0;
    }
    layers_.push_back(std::move(first));
  }

  int tasks() const { return n_; }
  int tiers() const { return static_cast<int>(units_.size()); }
  int units(int tier) const { return units_[tier]; }
  int budget() const { return budget_; }
  Mask all() const { return static_cast<Mask>((size_t{1} << n_) - 1); }
  const Table& best(int tier) const { return best_[tier]; }

  // k >= 1, 0 <= b <= budget
  const Table& layer(int k, int b) {
    while (static_cast<int>(layers_.size()) < k && !settled_) grow();
    return layers_[std::min<size_t>(k, layers_.size()) - 1][b];
  }

  // What at most k groups can reach for `set`; k may be 0.
  double reach(int k, int b, Mask set) {
    if (set == 0) return 0;
    return k == 0 ? kNone : layer(k, b)[set];
  }

  struct Split {
    double value = kNone;
    Mask first = 0;
    int budget = 0;
  };

  // Where at most k groups serve all tasks: the first half(k) of the groups serve split.first at a
  // cost of at most split.budget, the others the rest. Only the layers up to half(k) are made.
  Split best_split(int k) {
    Split found;
    const int other = k - half(k);
    if (other == 0) return {layer(1, budget_)[all()], all(), budget_};
    for (int b = 0; b <= budget_; ++b) {
      const Table& first = layer(half(k), b);
      const Table& second = layer(other, budget_ - b);
      for (size_t set = 0; set <= all(); ++set) {
        const double value = first[set] + second[all() ^ set];
        if (value > found.value) found = {value, static_cast<Mask>(set), b};
      }
    }
    return found;
  }

  static int half(int k) { return (k + 1) / 2; }

 private:
  void grow() {
    const std::vector<Table>& last = layers_.back();
    std::vector<Table> next(budget_ + 1, Table(size_t{1} << n_, kNone));
    const double share = 0.9 / planned_;  // the rest is for near-ties
    double steps = 0;
    for (int b = 0; b <= budget_; ++b)
      for (int c = 0; c < tiers(); ++c) steps += units_[c] <= b;
    double base = share * static_cast<double>(layers_.size() - 1);
    for (int b = 0; b <= budget_; ++b) {
      for (int c = 0; c < tiers(); ++c) {
        if (units_[c] > b) continue;
        sweep(n_, best_[c], last[b - units_[c]], next[b], watch_, base, share / steps);
        base += share / steps;
      }
      next[b][0] = 0;
    }
    settled_ = next == last;  // then no later layer differs either
    if (!settled_) layers_.push_back(std::move(next));
  }

  int n_;
  std::vector<int> units_;
  int budget_;
  int planned_;
  Watch& watch_;
  std::vector<Table> best_;                 // [tiers]
  std::vector<std::vector<Table>> layers_;  // [k - 1][b]
  bool settled_ = false;
};

}  // namespace flatmtl::selection
