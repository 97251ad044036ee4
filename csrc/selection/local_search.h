// Groups by multi-start local search, for more tasks than the exact search can take. Blocks of
// tasks that must stay together join and leave groups; a change of one group costs O(n). No promise
// but that the constraints hold. Memory: 8 bytes * n * (n + blocks + 2 * groups).
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "scores.h"

namespace flatmtl::selection {

struct Terms {
  int tasks;
  const double* matrix;                  // [n, n], row = recipient
  std::vector<std::vector<int>> blocks;  // every task is in one of them
  const bool* apart;                     // [blocks, blocks]: may not share a group
  int max_groups;
  bool disjoint;
  bool allow_single;
};

struct Found {
  Table by_count;                        // [max_groups], kNone: none found
  std::vector<std::vector<int>> groups;  // of the best; empty: none found
};

using Members = std::vector<std::vector<char>>;  // [groups][blocks]

class LocalSearch {
 public:
  LocalSearch(const Terms& terms, uint64_t seed, Watch& watch)
      : p_(terms),
        n_(terms.tasks),
        blocks_(static_cast<int>(terms.blocks.size())),
        random_(seed),
        watch_(watch),
        block_of_(n_),
        inner_(blocks_, 0),
        apart_from_(blocks_),
        gain_(size_t(blocks_) * n_, 0),
        best_(n_),
        second_(n_),
        owner_(n_) {
    double largest = 0;
    for (int t = 0; t < n_; ++t)
      for (int j = 0; j < n_; ++j)
        if (j != t || p_.allow_single)
          largest = std::max(largest, std::fabs(p_.matrix[size_t(t) * n_ + j]));
    penalty_ = -4.0 * n_ * std::max(largest, 1e-300);  // below all that scores can make good
    for (int u = 0; u < blocks_; ++u) {
      for (int v = 0; v < blocks_; ++v)
        if (p_.apart[size_t(u) * blocks_ + v]) apart_from_[u].push_back(v);
      for (int t = 0; t < n_; ++t)
        for (const int j : p_.blocks[u])
          if (j != t) gain_[size_t(u) * n_ + t] += p_.matrix[size_t(t) * n_ + j];
      for (const int t : p_.blocks[u]) {
        block_of_[t] = u;
        inner_[u] += gain_[size_t(u) * n_ + t];
      }
    }
  }

  // Sum of scores with unserved tasks at the penalty; feasible() tells.
  double value() const { return value_; }
  bool feasible() const { return value_ > penalty_ / 2; }
  const Members& members() const { return in_; }

  void start_at(const Members& members, int groups) {
    in_ = members;
    in_.resize(groups, std::vector<char>(blocks_, 0));
    rebuild();
  }

  // Every block joins the seed that it and that like each other best.
  void start_anywhere(int groups) {
    std::vector<int> order = shuffled(blocks_);
    in_.assign(groups, std::vector<char>(blocks_, 0));
    for (int at = 0; at < blocks_; ++at) {
      const int u = order[at];
      int chosen = at < groups ? at : -1;
      double most = kNone;
      for (int g = 0; at >= groups && g < groups; ++g) {
        if (clashes(g, u)) continue;
        const double liking = affection(order[g], u);
        if (chosen < 0 || liking > most) chosen = g, most = liking;
      }
      if (chosen >= 0) in_[chosen][u] = 1;
    }
    rebuild();
  }

  // Fills an empty group with the two blocks that gain most by it, not counting what they leave.
  void open() {
    const auto empty = std::find(size_.begin(), size_.end(), 0);
    if (empty == size_.end() || blocks_ < 2) return;
    const auto g = static_cast<size_t>(empty - size_.begin());
    double most = kNone;
    int first = -1, second = -1;
    for (int u = 0; u < blocks_; ++u) {
      int v = -1;
      for (int w = 0; w < blocks_; ++w)
        if (w != u && !p_.apart[size_t(u) * blocks_ + w] &&
            (v < 0 || affection(w, u) > affection(v, u)))
          v = w;
      if (v < 0) continue;
      double change = 0;
      for (const int block : {u, v})
        for (const int t : p_.blocks[block]) {
          const double gain = pair_score(t, u, v) - best_[t];
          change += p_.disjoint ? gain : std::max(0.0, gain);
        }
      if (change > most) most = change, first = u, second = v;
    }
    if (first < 0) return;
    for (auto& group : in_)
      if (p_.disjoint) group[first] = group[second] = 0;
    in_[g][first] = in_[g][second] = 1;
    rebuild();
  }

  // Until no single change helps: moves from group to group, or joining and leaving.
  void climb(double fraction, bool moves) {
    for (bool better = true; better;) {
      better = false;
      for (const int u : shuffled(blocks_)) {
        watch_.look(fraction);
        for (int g = 0; g < groups(); ++g) better |= moves ? try_move(u, g) : try_toggle(u, g);
      }
    }
    rebuild();  // sums without the rounding of many changes
  }

  // A few changes at random.
  void shake() {
    for (int k = 0; k < 3; ++k) {
      const int u = below(blocks_), g = below(groups());
      if (p_.disjoint) {
        for (int h = 0; h < groups(); ++h) in_[h][u] = 0;
        in_[g][u] = !clashes(g, u);
      } else if (in_[g][u] || !clashes(g, u)) {
        in_[g][u] ^= 1;
      }
    }
    rebuild();
  }

 private:
  int groups() const { return static_cast<int>(in_.size()); }
  int below(int end) { return static_cast<int>(random_() % static_cast<uint64_t>(end)); }

  std::vector<int> shuffled(int size) {
    std::vector<int> order(size);
    std::iota(order.begin(), order.end(), 0);
    for (int i = size - 1; i > 0; --i) std::swap(order[i], order[below(i + 1)]);
    return order;
  }

  double affection(int v, int u) const {
    double sum = 0;
    for (int t : p_.blocks[u]) sum += gain_[size_t(v) * n_ + t];
    for (int t : p_.blocks[v]) sum += gain_[size_t(u) * n_ + t];
    return sum;
  }

  double pair_score(int task, int u, int v) const {
    const size_t size = p_.blocks[u].size() + p_.blocks[v].size();
    return (gain_[size_t(u) * n_ + task] + gain_[size_t(v) * n_ + task]) /
           static_cast<double>(size - 1);
  }

  bool clashes(int g, int u) const { return !fits(u, g, -1); }

  double score(int task, double row_sum, int size) const {
    if (size > 1) return row_sum / (size - 1);
    return p_.allow_single ? diagonal(task) : penalty_;
  }

  void rebuild() {
    rows_.assign(groups(), Table(n_, 0));
    columns_.assign(groups(), Table(n_, 0));
    tasks_.assign(groups(), {});
    size_.assign(groups(), 0);
    for (int g = 0; g < groups(); ++g)
      for (int u = 0; u < blocks_; ++u)
        if (in_[g][u]) {
          in_[g][u] = 0;
          change(g, u);
        }
    for (int t = 0; t < n_; ++t) rank(t);
    sum_up();
    sums_.resize(groups());
    for (int g = 0; g < groups(); ++g) sums_[g] = sum_inside(g);
  }

  // Block u joins group g, or leaves it.
  void change(int g, int u) {
    const double sign = in_[g][u] ? -1 : 1;
    in_[g][u] ^= 1;
    const double* gain = &gain_[size_t(u) * n_];
    for (int t = 0; t < n_; ++t) rows_[g][t] += sign * gain[t];
    for (const int j : p_.blocks[u]) {
      const double* row = p_.matrix + size_t(j) * n_;
      for (int t = 0; t < n_; ++t) columns_[g][t] += t == j ? 0 : sign * row[t];
    }
    std::vector<int>& tasks = tasks_[g];
    const std::vector<int>& block = p_.blocks[u];
    if (sign > 0)
      tasks.insert(tasks.end(), block.begin(), block.end());
    else
      tasks.erase(
          std::remove_if(tasks.begin(), tasks.end(), [&](int t) { return block_of_[t] == u; }),
          tasks.end());
    size_[g] = static_cast<int>(tasks.size());
  }

  void rank(int t) {
    best_[t] = second_[t] = penalty_;
    owner_[t] = -1;
    for (int g = 0; g < groups(); ++g) {
      if (!in_[g][block_of_[t]]) continue;
      const double s = score(t, rows_[g][t], size_[g]);
      if (s > best_[t]) {
        second_[t] = best_[t], best_[t] = s, owner_[t] = g;
      } else {
        second_[t] = std::max(second_[t], s);
      }
    }
  }

  void sum_up() { value_ = std::accumulate(best_.begin(), best_.end(), 0.0); }

  bool worth(double change) const { return change > 1e-12 * std::fabs(penalty_); }

  bool try_toggle(int u, int g) {
    const bool joins = !in_[g][u];
    if (joins && clashes(g, u)) return false;
    const std::vector<int>& block = p_.blocks[u];
    const double sign = joins ? 1 : -1;
    const int size = size_[g] + (joins ? 1 : -1) * static_cast<int>(block.size());
    const double* gain = &gain_[size_t(u) * n_];
    const double* rows = rows_[g].data();
    double total = 0;
    for (const int t : tasks_[g]) {
      const double other = owner_[t] == g ? second_[t] : best_[t];
      const bool leaves = block_of_[t] == u;
      const double mine = leaves ? penalty_ : score(t, rows[t] + sign * gain[t], size);
      total += std::max(other, mine) - best_[t];
    }
    if (joins)
      for (const int t : block)
        total += std::max(0.0, score(t, rows[t] + gain[t], size) - best_[t]);
    if (!worth(total)) return false;
    change(g, u);
    for (const int t : tasks_[g]) rank(t);
    for (const int t : block) rank(t);
    sum_up();
    return true;
  }

  // Sum of scores of group g after block `out` left and `in` joined (-1: none).
  double group_value(int g, int out, int in) const {
    double sum = sums_[g];
    int size = size_[g];
    const auto join = [&](int u, int sign) {
      for (const int t : p_.blocks[u]) sum += sign * (rows_[g][t] + columns_[g][t]);
      sum += inner_[u];
      size += sign * static_cast<int>(p_.blocks[u].size());
    };
    if (out >= 0) join(out, -1);
    if (in >= 0) join(in, 1);
    if (in >= 0 && out >= 0) sum -= affection(out, in);
    if (size > 1) return sum / (size - 1);
    if (size == 0) return 0;
    if (!p_.allow_single) return penalty_;
    if (in >= 0) return diagonal(p_.blocks[in][0]);
    for (const int t : tasks_[g])
      if (out < 0 || block_of_[t] != out) return diagonal(t);
    return 0;
  }

  double diagonal(int t) const { return p_.matrix[size_t(t) * n_ + t]; }

  int home(int u) const {
    for (int g = 0; g < groups(); ++g)
      if (in_[g][u]) return g;
    return -1;
  }

  // Moves block u to group g, or changes it for one there.
  bool try_move(int u, int g) {
    const int from = home(u);
    if (from == g) return false;
    const double unserved = penalty_ * static_cast<double>(p_.blocks[u].size());
    const double left = from < 0 ? unserved : group_value(from, -1, -1);
    const double before = left + group_value(g, -1, -1);
    if (!clashes(g, u)) {
      const double after = (from < 0 ? 0.0 : group_value(from, u, -1)) + group_value(g, -1, u);
      if (worth(after - before)) return move(u, from, g), true;
    }
    if (from < 0) return false;
    const int v = below(blocks_);  // one exchange a visit
    if (!in_[g][v] || !fits(u, g, v) || !fits(v, from, u)) return false;
    if (!worth(group_value(from, u, v) + group_value(g, v, u) - before)) return false;
    move(u, from, g);
    move(v, g, from);
    return true;
  }

  // Whether block u may join group g once block `leaving` is gone (-1: none).
  bool fits(int u, int g, int leaving) const {
    for (const int v : apart_from_[u])
      if (in_[g][v] && v != leaving) return false;
    return true;
  }

  void move(int u, int from, int to) {
    if (from >= 0) change(from, u);
    change(to, u);
    for (const int g : {from, to})
      if (g >= 0) sums_[g] = sum_inside(g);
  }

  // Sum of a[t][j] over t != j in group g.
  double sum_inside(int g) const {
    double sum = 0;
    for (const int t : tasks_[g]) sum += rows_[g][t];
    return sum;
  }

  const Terms& p_;
  int n_, blocks_;
  std::mt19937_64 random_;
  Watch& watch_;
  std::vector<int> block_of_;                 // [n]
  Table inner_;                               // [blocks] sum of the matrix inside a block
  std::vector<std::vector<int>> apart_from_;  // [blocks] those that may not share its group
  Table gain_;  // [blocks, n]: what a block adds to the row sum of a task; not the task's own entry
  double penalty_ = 0;
  Members in_;
  std::vector<Table> rows_;              // [groups][n] sum of a task's row over the other members
  std::vector<Table> columns_;           // [groups][n] the same of its column
  Table sums_;                           // [groups] of the matrix inside a group; of moves only
  std::vector<std::vector<int>> tasks_;  // [groups] members
  std::vector<int> size_;                // [groups]
  Table best_, second_;                  // [n] scores
  std::vector<int> owner_;               // [n]
  double value_ = 0;
};

// For every number of groups: the best of one less with a group opened, and `starts` fresh ones,
// each climbed and shaken.
inline Found search_locally(const Terms& terms, uint64_t seed, int starts, Watch& watch) {
  LocalSearch search(terms, seed, watch);
  Found found;
  Members best;
  double value = kNone;
  const auto keep = [&] {
    if (search.feasible() && search.value() > value)
      value = search.value(), best = search.members();
  };
  for (int groups = 1; groups <= terms.max_groups; ++groups) {
    for (int start = 0; start <= starts; ++start) {
      const double fraction =
          (groups - 1 + start / (starts + 1.0)) / static_cast<double>(terms.max_groups);
      if (start > 0) {
        search.start_anywhere(groups);
        search.climb(fraction, true);
      } else {
        if (best.empty()) continue;
        search.start_at(best, groups);
        search.open();
      }
      search.climb(fraction, terms.disjoint);
      keep();
      double here = search.value();
      Members last = search.members();
      for (int shake = 0; shake < 4; ++shake) {
        search.shake();
        search.climb(fraction, terms.disjoint);
        keep();
        if (search.value() > here) {
          here = search.value();
          last = search.members();
        } else {
          search.start_at(last, groups);
        }
      }
    }
    found.by_count.push_back(value);
  }
  for (const auto& group : best) {
    std::vector<int> tasks;
    for (size_t u = 0; u < group.size(); ++u)
      if (group[u]) tasks.insert(tasks.end(), terms.blocks[u].begin(), terms.blocks[u].end());
    std::sort(tasks.begin(), tasks.end());
    if (!tasks.empty()) found.groups.push_back(std::move(tasks));
  }
  return found;
}

}  // namespace flatmtl::selection
