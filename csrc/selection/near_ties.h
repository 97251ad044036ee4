// The best selections beside the optimum. A selection is a set of candidates that covers all tasks
// in which each is strictly the best one for some task; its value is the sum over tasks of their
// best score. Depth-first search over "this group serves exactly these tasks", with the dynamic
// programme as the bound of what is left; exact.
#pragma once

#include <algorithm>
#include <utility>

#include "layers.h"

namespace flatmtl::selection {

struct NearTie {
  double value;
  std::vector<Candidate> groups;  // by id
};

class NearTies {
 public:
  NearTies(const Scores& scores, Layers& layers, int max_groups, size_t wanted, double tolerance,
           bool disjoint, Watch& watch)
      : scores_(scores),
        layers_(layers),
        max_groups_(max_groups),
        wanted_(wanted),
        tolerance_(tolerance),
        disjoint_(disjoint),
        watch_(watch) {}

  std::vector<NearTie> find(const std::vector<Candidate>& optimum) {
    offer(optimum);
    const std::vector<Candidate> first = found_.front().groups;
    if (!disjoint_) {  // good ones early make the search short
      offer_neighbours(first);
      const std::vector<NearTie> ring = found_;
      for (const NearTie& tie : ring) offer_neighbours(tie.groups);
    }
    search(layers_.all(), max_groups_, layers_.budget(), 0);
    found_.erase(std::remove_if(found_.begin(), found_.end(),
                                [&](const NearTie& tie) { return same(tie.groups, first); }),
                 found_.end());
    if (found_.size() > wanted_) found_.pop_back();  // the optimum fell behind its equals
    return found_;
  }

 private:
  struct Served {
    Candidate candidate;
    Mask tasks;
  };
  struct Child {
    double bound;
    double rest;  // the bound's share of the groups to come
    Mask tasks;
    int tier;
  };

  static bool same(const std::vector<Candidate>& x, const std::vector<Candidate>& y) {
    return std::equal(x.begin(), x.end(), y.begin(), y.end(),
                      [](const Candidate& a, const Candidate& b) { return a.id == b.id; });
  }

  // One more than wanted are kept: the optimum is among them.
  double threshold() const { return found_.size() <= wanted_ ? kNone : found_.back().value; }

  void offer(std::vector<Candidate> groups) {
    std::sort(groups.begin(), groups.end(),
              [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
    for (size_t i = 1; i < groups.size(); ++i)
      if (groups[i].id == groups[i - 1].id) return;
    double value = 0;
    std::vector<bool> needed(groups.size(), false);
    for (int t = 0; t < scores_.tasks(); ++t) {
      double best = kNone, second = kNone;
      size_t owner = 0;
      for (size_t g = 0; g < groups.size(); ++g) {
        if (!(groups[g].group >> t & 1)) continue;
        const double score = scores_.score(groups[g], t);
        if (score > best) {
          second = best, best = score, owner = g;
        } else {
          second = std::max(second, score);
        }
      }
      if (best == kNone) return;
      if (second == kNone || best > second + tolerance_ / scores_.tasks()) needed[owner] = true;
      value += best;
    }
    const bool is_optimum = found_.empty();
    if (!is_optimum && std::find(needed.begin(), needed.end(), false) != needed.end()) return;
    if (value <= threshold()) return;
    for (const NearTie& tie : found_)
      if (same(tie.groups, groups)) return;
    const auto at = std::find_if(found_.begin(), found_.end(),
                                 [&](const NearTie& t) { return t.value < value; });
    found_.insert(at, {value, std::move(groups)});
    if (found_.size() > wanted_ + 1) found_.pop_back();
  }

  void offer_affordable(const std::vector<Candidate>& groups) {
    int units = 0;
    for (const Candidate& c : groups) units += layers_.units(c.tier);
    if (units <= layers_.budget() && static_cast<int>(groups.size()) <= max_groups_) offer(groups);
  }

  // One group less, one changed a little, or such a one added.
  void offer_neighbours(const std::vector<Candidate>& groups) {
    for (size_t g = 0; g < groups.size(); ++g) {
      std::vector<Candidate> changed = groups;
      changed.erase(changed.begin() + static_cast<std::ptrdiff_t>(g));
      offer_affordable(changed);
      changed = groups;
      scores_.near(groups[g], [&](const Candidate& other, double) {
        changed[g] = other;
        offer_affordable(changed);
        changed.push_back(groups[g]);
        offer_affordable(changed);
        changed.pop_back();
      });
    }
  }

  // A task is served where it scores best, by the first of equals: so each selection is met once.
  bool rightly_served(const Served& next) const {
    const auto better = [&](const Candidate& other, const Served& own) {
      for (Mask m = own.tasks & other.group; m; m &= m - 1) {
        const double here = scores_.score(own.candidate, lowest(m));
        const double there = scores_.score(other, lowest(m));
        if (there > here || (there == here && other.id < own.candidate.id)) return true;
      }
      return false;
    };
    return std::none_of(chosen_.begin(), chosen_.end(), [&](const Served& before) {
      return better(before.candidate, next) || better(next.candidate, before);
    });
  }

  void search(Mask left, int groups_left, int budget_left, double sum) {
    if (left == 0) {
      std::vector<Candidate> groups;
      for (const Served& served : chosen_) groups.push_back(served.candidate);
      return offer(std::move(groups));
    }
    if (groups_left == 0) return;
    const std::vector<Child> children = children_of(left, groups_left, budget_left, sum);
    for (size_t i = 0; i < children.size(); ++i) {
      const Child& child = children[i];
      if (child.bound <= threshold() + tolerance_) break;
      if (chosen_.empty()) done_ = static_cast<double>(i) / static_cast<double>(children.size());
      const double least = threshold() + tolerance_ - sum - child.rest;
      scores_.over(child.tasks, child.tier, least, [&](const Candidate& candidate, double value) {
        watch_.look(0.9 + 0.1 * done_);
        if (sum + value + child.rest <= threshold() + tolerance_) return;
        const Served next{candidate, child.tasks};
        if (!rightly_served(next)) return;
        chosen_.push_back(next);
        search(left ^ child.tasks, groups_left - 1, budget_left - layers_.units(child.tier),
               sum + value);
        chosen_.pop_back();
      });
    }
  }

  std::vector<Child> children_of(Mask left, int groups_left, int budget_left, double sum) {
    std::vector<Child> children;
    const Mask top = highest_bit(left), others = left ^ top;
    for (int tier = 0; tier < layers_.tiers(); ++tier) {
      const int budget = budget_left - layers_.units(tier);
      if (budget < 0) continue;
      const Table& best = layers_.best(tier);
      for (Mask part = others;; part = (part - 1) & others) {
        const double rest = layers_.reach(groups_left - 1, budget, others ^ part);
        const double bound = sum + best[part | top] + rest;
        if (bound > threshold() + tolerance_ && bound > kNone)
          children.push_back({bound, rest, part | top, tier});
        if (part == 0) break;
      }
    }
    std::sort(children.begin(), children.end(),
              [](const Child& a, const Child& b) { return a.bound > b.bound; });
    return children;
  }

  const Scores& scores_;
  Layers& layers_;
  int max_groups_;
  size_t wanted_;
  double tolerance_;
  bool disjoint_;
  Watch& watch_;
  std::vector<NearTie> found_;  // best first
  std::vector<Served> chosen_;
  double done_ = 0;
};

inline std::vector<NearTie> find_near_ties(const Scores& scores, Layers& layers,
                                           const std::vector<Candidate>& optimum, int max_groups,
                                           int wanted, double tolerance, bool disjoint,
                                           Watch& watch) {
  return NearTies(scores, layers, max_groups, static_cast<size_t>(wanted), tolerance, disjoint,
                  watch)
      .find(optimum);
}

}  // namespace flatmtl::selection
