// What may be chosen and what it scores. A candidate is a group of tasks that one network trains;
// it scores every member. Scores are to be maximised. Candidates of one tier cost the same.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "watch.h"

namespace flatmtl::selection {

using Mask = uint32_t;
using Table = std::vector<double>;  // [2^n], by set of tasks

constexpr double kNone = -std::numeric_limits<double>::infinity();

inline int count(Mask set) { return __builtin_popcount(set); }
inline int lowest(Mask set) { return __builtin_ctz(set); }
inline Mask highest_bit(Mask set) { return Mask{1} << (31 - __builtin_clz(set)); }

struct Candidate {
  int64_t id;  // the group's mask, or the place in the list of candidates
  Mask group;
  int tier;
};

class Scores {
 public:
  using Visit = std::function<void(const Candidate&, double sum)>;

  virtual ~Scores() = default;
  virtual int tasks() const = 0;

  // of a member of the group
  virtual double score(const Candidate& candidate, int task) const = 0;

  // best[tier][served] = the largest sum of scores over `served` of a candidate that holds it, or
  // that equals it where groups are disjoint; kNone where there is none. The tables come filled
  // with kNone.
  virtual void fill(std::vector<Table>& best, Watch& watch) const = 0;

  // Every candidate of `tier` behind best[tier][served] whose sum over `served` is above `least`.
  virtual void over(Mask served, int tier, double least, const Visit& visit) const = 0;

  // Some candidates that differ little from this one.
  virtual void near(const Candidate& candidate, const Visit& visit) const = 0;
};

}  // namespace flatmtl::selection
