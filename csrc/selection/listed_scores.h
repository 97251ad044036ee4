// Scores from a list of candidates; the same group may stand in it more than once.
#pragma once

#include "matrix_scores.h"
#include "scores.h"

namespace flatmtl::selection {

class ListedScores : public Scores {
 public:
  // groups, tiers: [C], tier -1: no candidate; scores: [C, n], read for members only
  ListedScores(int n, int64_t candidates, const Mask* groups, const int32_t* tiers,
               const double* scores, bool disjoint)
      : n_(n), scores_(scores), disjoint_(disjoint) {
    for (int64_t c = 0; c < candidates; ++c)
      if (tiers[c] >= 0) listed_.push_back({c, groups[c], tiers[c]});
  }

  int tasks() const override { return n_; }

  double score(const Candidate& candidate, int task) const override {
    return scores_[candidate.id * n_ + task];
  }

  void fill(std::vector<Table>& best, Watch& watch) const override {
    Table sums(size_t{1} << n_);
    for (const Candidate& c : listed_) {
      if (disjoint_) {
        double& slot = best[c.tier][c.group];
        slot = std::max(slot, sum_over(c.group, c));
      } else {
        MatrixScores::fill_subsets(c.group, best[c.tier], sums, [&](int t) { return score(c, t); });
      }
      watch.look(0);
    }
  }

  void over(Mask served, int tier, double least, const Visit& visit) const override {
    for (const Candidate& c : listed_) {
      if (c.tier != tier || (disjoint_ ? c.group != served : (served & ~c.group) != 0)) continue;
      const double sum = sum_over(served, c);
      if (sum > least) visit(c, sum);
    }
  }

  void near(const Candidate& candidate, const Visit& visit) const override {
    for (const Candidate& c : listed_)
      if (c.id != candidate.id && count(c.group ^ candidate.group) <= 1) visit(c, 0);
  }

 private:
  double sum_over(Mask served, const Candidate& c) const {
    double sum = 0;
    for (Mask m = served; m; m &= m - 1) sum += score(c, lowest(m));
    return sum;
  }

  int n_;
  const double* scores_;
  bool disjoint_;
  std::vector<Candidate> listed_;
};

}  // namespace flatmtl::selection
