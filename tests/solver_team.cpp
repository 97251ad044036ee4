// The solvers of csrc/solvers/ under two teams, as a C library for test_solver_team.py.
//
// SerialTeam runs the iterations of a phase in order. ShuffledTeam runs them in a random order, as
// the threads of a block may: if an iteration reads what another one of the same phase writes, the
// two disagree. Scratch starts as NaN, and is checked for writes beyond its end.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "normal.h"
#include "order.h"
#include "philox.h"
#include "solver_methods.h"
#include "team.h"

namespace {

class ShuffledTeam {
 public:
  explicit ShuffledTeam(uint64_t seed) : engine_(seed) {}

  template <class F>
  void each(int64_t n, F f) {
    for (int64_t i : shuffled(n)) f(i);
  }
  template <class F>
  void each2(int64_t rows, int64_t cols, F f) {
    for (int64_t k : shuffled(rows * cols)) f(k / cols, k % cols);
  }
  // Evaluated in a random order, added up in the order of the serial team.
  template <class F>
  double sum(int64_t n, F f) {
    double total = 0;
    for (double value : values(n, f)) total += value;
    return total;
  }
  template <class F>
  double max(int64_t n, F f) {
    double largest = 0;
    const std::vector<double> all = values(n, f);
    for (int64_t i = 0; i < n; ++i)
      if (i == 0 || all[i] > largest || all[i] != all[i]) largest = all[i];
    return largest;
  }
  template <class F>
  void one(F f) {
    f();
  }

 private:
  std::vector<int64_t> shuffled(int64_t n) {
    std::vector<int64_t> list(n);
    std::iota(list.begin(), list.end(), int64_t{0});
    std::shuffle(list.begin(), list.end(), engine_);
    return list;
  }
  template <class F>
  std::vector<double> values(int64_t n, F& f) {
    std::vector<double> all(n);
    for (int64_t i : shuffled(n)) all[i] = f(i);
    return all;
  }

  std::mt19937_64 engine_;
};

// Scratch of n doubles, all NaN, with a guard behind it.
class Scratch {
 public:
  explicit Scratch(int64_t n) : n_(n), data_(n + kGuard, kFill) {
    std::fill(data_.begin() + n, data_.end(), kMark);
  }
  double* data() { return data_.data(); }
  bool intact() const {
    return std::all_of(data_.begin() + n_, data_.end(), [](double x) { return x == kMark; });
  }

 private:
  static constexpr int64_t kGuard = 256;
  static constexpr double kFill = std::numeric_limits<double>::quiet_NaN();
  static constexpr double kMark = 12345.0;
  int64_t n_;
  std::vector<double> data_;
};

// f(team) under the serial team (seed 0) or under a shuffled one.
template <class F>
void with_team(uint64_t seed, F f) {
  if (seed == 0) {
    flatmtl::SerialTeam team;
    f(team);
  } else {
    ShuffledTeam team(seed);
    f(team);
  }
}

}  // namespace

extern "C" {

// One problem after the other. Return: 1 if the scratch stayed within its size.
int run_method(uint64_t seed, int number, const double* gram, int64_t batch, int64_t tasks,
               const double* option, const int64_t* order, const double* preference, double* state,
               double* weights, int64_t* status, double* residual) {
  bool intact = true;
  with_method(number, {option, order, preference, state}, [&](const auto& method) {
    using Method = std::decay_t<decltype(method)>;
    for (int64_t b = 0; b < batch; ++b) {
      Scratch work(Method::work(tasks));
      const flatmtl::Problem p{
          gram + b * tasks * tasks, tasks, weights + b * tasks, status + b, residual + b, b};
      with_team(seed, [&](auto& team) { method(team, p, work.data()); });
      intact = intact && work.intact();
    }
  });
  return intact;
}

void run_draw_normal(uint64_t team_seed, uint64_t seed, uint64_t step, int64_t batch_index,
                     int64_t tasks, double* out) {
  with_team(team_seed,
            [&](auto& team) { flatmtl::draw_normal(team, seed, step, batch_index, tasks, out); });
}

void run_draw_order(uint64_t team_seed, uint64_t seed, uint64_t step, int64_t batch_index,
                    int64_t tasks, int64_t* order) {
  with_team(team_seed,
            [&](auto& team) { flatmtl::draw_order(team, seed, step, batch_index, tasks, order); });
}

void run_philox(uint64_t key, const uint32_t* counter, uint32_t* out) {
  const flatmtl::Philox p = flatmtl::philox(key, counter[0], counter[1], counter[2], counter[3]);
  for (uint32_t i = 0; i < 4; ++i) out[i] = p.word(i);
}

// A running sum in ONE phase: iteration i reads what i - 1 wrote. Right on one thread, wrong on a
// block; the shuffled team has to show it.
void run_neighbour(uint64_t seed, int64_t n, double* x) {
  with_team(seed,
            [&](auto& team) { team.each(n, [&](int64_t i) { x[i] += i > 0 ? x[i - 1] : 0.0; }); });
}

// The same fault with two indices, and one where several iterations write the same place.
void run_neighbour2(uint64_t seed, int64_t n, double* x) {
  with_team(seed, [&](auto& team) {
    team.each2(n, n,
               [&](int64_t i, int64_t j) { x[i * n + j] += i > 0 ? x[(i - 1) * n + j] : 0.0; });
  });
}

void run_same_place(uint64_t seed, int64_t n, double* x) {
  with_team(seed,
            [&](auto& team) { team.each(n, [&](int64_t i) { x[0] = static_cast<double>(i); }); });
}

// Inside sum: f may read the state but not change it for the others.
double run_sum_with_state(uint64_t seed, int64_t n, double* x) {
  double total = 0;
  with_team(seed, [&](auto& team) {
    total = team.sum(n, [&](int64_t i) { return x[i] += i > 0 ? x[i - 1] : 0.0; });
  });
  return total;
}

}  // extern "C"
