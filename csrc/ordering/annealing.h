// A path with a large sum of similarities, for more tasks than an exact search can take: simulated
// annealing from a given path with two moves, a stretch turned round (2-opt) and two tasks
// exchanged. Schedule and constants are this package's own.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>

#include "../selection/watch.h"
#include "path.h"

namespace flatmtl::ordering {

class Annealing {
 public:
  Annealing(const Problem& problem, Path start, uint64_t seed, selection::Watch& watch)
      : p_(problem),
        n_(problem.tasks),
        first_(problem.start < 0 ? 0 : 1),
        random_(seed),
        watch_(watch),
        path_(std::move(start)) {
    keep();
  }

  Path run() {
    if (n_ - first_ < 2) return best_;
    double temperature = warmth();
    int frozen = 0;
    for (int k = 0; k < kTemperatures && frozen < kFrozen && temperature > 0; ++k) {
      frozen = one_temperature(temperature, double(k) / kTemperatures) ? 0 : frozen + 1;
      temperature *= kCooling;
    }
    climb();
    path_ = best_;
    climb();
    return best_;
  }

 private:
  static constexpr double kCooling = 0.995;
  static constexpr int kTemperatures = 1400;  // down to a thousandth of the first one
  static constexpr int kMoves = 100;          // a temperature, times the number of tasks
  static constexpr int kSamples = 100;        // of moves, for the first temperature
  static constexpr int kFrozen = 5;           // temperatures without a change that end it

  struct Move {
    int i, j;  // places, i < j
    bool turn;
  };

  uint32_t below(uint32_t end) {  // the bias, end / 2^32, is far below what a path can show
    return static_cast<uint32_t>((random_() >> 32) * end >> 32);
  }
  double uniform() { return static_cast<double>(random_() >> 11) * 0x1p-53; }

  Move draw() {
    const auto places = static_cast<uint32_t>(n_ - first_);
    int i = static_cast<int>(below(places)), j = static_cast<int>(below(places - 1));
    j += j >= i;
    return {first_ + std::min(i, j), first_ + std::max(i, j), (random_() >> 63) != 0};
  }

  // The similarity of two places; beyond the ends there is none.
  double link(int a, int b) const { return p_.at(path_[a], path_[b]); }
  double before(int i, int task) const { return i == 0 ? 0 : p_.at(path_[i - 1], path_[task]); }
  double after(int j, int task) const { return j == n_ - 1 ? 0 : p_.at(path_[task], path_[j + 1]); }

  // What a move adds to the sum.
  double gain(const Move& m) const {
    const double outside = before(m.i, m.j) - before(m.i, m.i) + after(m.j, m.i) - after(m.j, m.j);
    if (m.turn || m.j == m.i + 1) return outside;
    return outside + link(m.j, m.i + 1) - link(m.i, m.i + 1) + link(m.j - 1, m.i) -
           link(m.j - 1, m.j);
  }

  void make(const Move& m) {
    if (m.turn)
      std::reverse(path_.begin() + m.i, path_.begin() + m.j + 1);
    else
      std::swap(path_[m.i], path_[m.j]);
  }

  double warmth() {
    double sum = 0;
    for (int k = 0; k < kSamples; ++k) sum += std::fabs(gain(draw()));
    return sum / kSamples;
  }

  void keep() {
    best_ = path_;
    most_ = p_.sum(path_);
  }

  // Whether a move changed the sum.
  bool one_temperature(double temperature, double fraction) {
    const double floor = -40 * temperature;  // exp(-40): never, as good as
    bool changed = false;
    double sum = p_.sum(path_);  // afresh: without the rounding of many changes
    for (int64_t k = 0; k < int64_t{kMoves} * n_; ++k) {
      if (k % 1024 == 0) watch_.look(fraction);
      const Move move = draw();
      const double change = gain(move);
      if (change < 0 && (change < floor || uniform() >= std::exp(change / temperature))) continue;
      make(move);
      sum += change;
      changed |= change != 0;
      if (sum > most_ && change > 0) {
        keep();
        sum = most_;
      }
    }
    return changed;
  }

  // Until no single move helps.
  void climb() {
    double scale = 0;
    for (int a = 0; a < n_; ++a)
      for (int b = 0; b < a; ++b) scale = std::max(scale, std::fabs(p_.at(a, b)));
    const double least = 1e-12 * scale;  // rounding must not send it in circles
    for (bool better = true; better;) {
      better = false;
      for (int i = first_; i < n_; ++i) {
        watch_.look(1.0);
        for (int j = i + 1; j < n_; ++j)
          for (const bool turn : {true, false}) {
            const Move move{i, j, turn};
            if (gain(move) > least) make(move), better = true;
          }
      }
    }
    if (p_.sum(path_) > most_) keep();
  }

  const Problem& p_;
  int n_, first_;  // tasks; the first place that may change
  std::mt19937_64 random_;
  selection::Watch& watch_;
  Path path_, best_;
  double most_ = 0;  // the sum of the best
};

}  // namespace flatmtl::ordering
