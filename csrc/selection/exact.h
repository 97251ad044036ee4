// The best selection of at most k groups, for every k up to a largest one.
#pragma once

#include <stdexcept>

#include "layers.h"
#include "near_ties.h"

namespace flatmtl::selection {

struct Problem {
  int max_groups;          // 1 .. n
  std::vector<int> units;  // [tiers], cost of a candidate
  int budget;              // in units; 0 with one tier of cost 0: no budget
  bool disjoint;
  int near_ties;
  double tolerance;  // sums closer than this are equal
};

struct Solution {
  Table by_count;  // [max_groups] largest sum with at most that many groups, kNone: infeasible
  std::vector<Candidate> groups;
  std::vector<NearTie> near_ties;
};

namespace detail {

// The smallest candidate that serves `served` as well as any of its tier.
inline Candidate smallest(const Scores& scores, const Layers& layers, int tier, Mask served,
                          double tolerance) {
  Candidate found{-1, 0, tier};
  scores.over(served, tier, layers.best(tier)[served] - tolerance, [&](const Candidate& c, double) {
    if (found.id < 0 || count(c.group) < count(found.group)) found = c;
  });
  return found;
}

// Finds again which groups reach layer(k, b)[set].
inline void trace(const Scores& scores, Layers& layers, int k, int b, Mask set, double tolerance,
                  std::vector<Candidate>& groups) {
  while (set) {
    double best = kNone;
    Mask served = 0;
    int tier = 0;
    const Mask top = highest_bit(set), rest = set ^ top;
    for (int c = 0; c < layers.tiers(); ++c) {
      if (layers.units(c) > b) continue;
      for (Mask part = rest;; part = (part - 1) & rest) {
        const double value =
            layers.best(c)[part | top] + layers.reach(k - 1, b - layers.units(c), rest ^ part);
        if (value > best) best = value, served = part | top, tier = c;
        if (part == 0) break;
      }
    }
    if (!served) throw std::logic_error("a split behind the table of sums is missing");
    groups.push_back(smallest(scores, layers, tier, served, tolerance));
    set ^= served;
    b -= layers.units(tier);
    --k;
  }
}

}  // namespace detail

// groups is empty where nothing is feasible.
inline Solution solve(const Scores& scores, const Problem& p, Watch& watch) {
  const int planned = std::max(Layers::half(p.max_groups), p.near_ties ? p.max_groups - 1 : 0) - 1;
  Layers layers(scores, p.units, p.budget, planned, watch);
  double ceiling = 0;  // every task in the group that suits it best
  for (int t = 0; t < scores.tasks(); ++t) ceiling += layers.layer(1, p.budget)[Mask{1} << t];

  Solution solution;
  std::vector<Layers::Split> splits;
  for (int k = 1; k <= p.max_groups; ++k) {
    const bool at_ceiling = k > 1 && !p.disjoint && splits.back().value >= ceiling - p.tolerance;
    splits.push_back(at_ceiling ? splits.back() : layers.best_split(k));
    if (k > 1 && splits[k - 1].value < splits[k - 2].value)
      splits[k - 1].value = splits[k - 2].value;
    solution.by_count.push_back(splits.back().value);
  }
  const double optimum = splits.back().value;
  if (optimum == kNone) return solution;
  int fewest = 1;
  while (splits[fewest - 1].value < optimum - p.tolerance) ++fewest;
  const Layers::Split& split = splits[fewest - 1];
  const int half = Layers::half(fewest);
  detail::trace(scores, layers, half, split.budget, split.first, p.tolerance, solution.groups);
  detail::trace(scores, layers, fewest - half, p.budget - split.budget, layers.all() ^ split.first,
                p.tolerance, solution.groups);
  if (p.near_ties > 0)
    solution.near_ties = find_near_ties(scores, layers, solution.groups, p.max_groups, p.near_ties,
                                        p.tolerance, p.disjoint, watch);
  return solution;
}

}  // namespace flatmtl::selection
