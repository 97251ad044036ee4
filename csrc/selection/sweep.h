// One sweep over all pairs of disjoint sets:
//   out[S] = max(out[S], max of f[U] + g[S \ U] over U in S that hold S's highest task).
// 3^(n-1) sums. The five lowest tasks make blocks of 32 sets that lie together, so that the inner
// 3^5 sums stay in the cache and are unrolled.
#pragma once

#include <utility>

#include "scores.h"

namespace flatmtl::selection {

constexpr int kBlock = 5;

template <size_t Set, size_t... Part>
inline double best_split(const double* f, const double* g, double best,
                         std::index_sequence<Part...>) {
  const auto take = [&](size_t part) {
    const double sum = f[part] + g[Set ^ part];
    best = sum > best ? sum : best;
  };
  ((void)((Part & ~Set) == 0 ? take(Part) : void()), ...);
  return best;
}

template <size_t... Set>
inline void combine_blocks(const double* f, const double* g, double* out,
                           std::index_sequence<Set...> all) {
  ((out[Set] = best_split<Set>(f, g, out[Set], all)), ...);
}

// U within one block: its highest task is the set's own.
inline void combine_low(int bits, const double* f, const double* g, double* out) {
  for (Mask set = 1; set < Mask{1} << bits; ++set) {
    const Mask top = highest_bit(set);
    const Mask rest = set ^ top;
    for (Mask part = rest;; part = (part - 1) & rest) {
      const double sum = f[part | top] + g[rest ^ part];
      if (sum > out[set]) out[set] = sum;
      if (part == 0) break;
    }
  }
}

// `base` and `share`: where this sweep lies within the whole computation, as fractions.
inline void sweep(int n, const Table& f, const Table& g, Table& out, Watch& watch, double base,
                  double share) {
  if (n <= kBlock) return combine_low(n, f.data(), g.data(), out.data());
  combine_low(kBlock, f.data(), g.data(), out.data());
  const auto block = std::make_index_sequence<size_t{1} << kBlock>();
  const Mask sets = Mask{1} << (n - kBlock);
  double total = 0, done = 0;
  for (Mask set = 1; set < sets; ++set) total += Mask{1} << (count(set) - 1);
  int64_t since = 0;
  for (Mask set = 1; set < sets; ++set) {
    const Mask top = highest_bit(set);
    const Mask rest = set ^ top;
    double* to = out.data() + (size_t{set} << kBlock);
    for (Mask part = rest;; part = (part - 1) & rest) {
      combine_blocks(f.data() + (size_t{part | top} << kBlock),
                     g.data() + (size_t{rest ^ part} << kBlock), to, block);
      if (++since == 1024) {
        done += since;
        since = 0;
        watch.look(base + share * done / total);
      }
      if (part == 0) break;
    }
  }
}

}  // namespace flatmtl::selection
