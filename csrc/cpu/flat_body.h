// Kernels over flat rows: weighted sums, packing, perturbation. All bandwidth-bound.
//
// D is the rows' type. Where a second one is named (O of a sum, G of gradients, S of parameters) it
// is D, or F32 beside BF16 and F16: the arithmetic type and the number of lanes are the same.

// Sum over n elements of f(x, k)^2, where x holds elements k.. of p (zero beyond the end): four
// vectors at a time, at most 32 terms a lane in float, then double.
template <class D, class F>
inline double squares(const typename D::elem* p, int64_t n, F f) {
  typedef typename D::acc A;
  constexpr int N = Lanes<A>::n;
  double total = 0;
  for (int64_t start = 0; start < n; start += 128 * N) {
    const int64_t end = n - start < 128 * N ? n : start + 128 * N;
    vec<A> sum[4] = {};
    int64_t k = start;
    for (; k + 4 * N <= end; k += 4 * N)
      for (int u = 0; u < 4; ++u) {
        const vec<A> x = f(D::load(p + k + u * N), k + u * N);
        sum[u] += x * x;
      }
    for (; k < end; k += N) {
      const vec<A> x = f(end - k >= N ? D::load(p + k) : load_some<D>(p + k, end - k), k);
      sum[0] += x * x;
    }
    total += lane_sum<A>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  return total;
}

// Adds rows [first, last), weighted, to a strip of columns `U` vectors wide in registers.
template <class D, int U>
inline void add_rows(const typename D::elem* jac, int64_t jac_stride, const double* a,
                     const typename D::elem* sam, int64_t sam_stride, const double* b,
                     int64_t first, int64_t last, vec<typename D::acc>* sum) {
  typedef typename D::acc A;
  constexpr int N = Lanes<A>::n;
  for (int64_t i = first; i < last; ++i) {
    const double bi = b ? b[i] : 0.0;
    if (a[i] == 0 && bi == 0) continue;
    const vec<A> wa = splat<A>(static_cast<A>(a[i])), wb = splat<A>(static_cast<A>(bi));
    // a g + a (s - g) = a s
    const bool same = bi != 0 && static_cast<A>(a[i]) == static_cast<A>(bi);
    const typename D::elem* s = sam + i * sam_stride;
    const typename D::elem* x = same ? s : jac + i * jac_stride;
    for (int u = 0; u < U; ++u) {
      __builtin_prefetch(x + (u + 4 * U) * N, 0, 3);
      const vec<A> g = D::load(x + u * N);
      if (a[i] != 0) sum[u] += wa * g;
      if (bi != 0 && !same) sum[u] += wb * (D::load(s + u * N) - g);
    }
  }
}

// The weighted sum of fewer than a vector of columns.
template <class D>
inline vec<typename D::acc> combine_end(const typename D::elem* jac, int64_t jac_stride,
                                        const double* a, const typename D::elem* sam,
                                        int64_t sam_stride, const double* b, int64_t tasks,
                                        int64_t left) {
  typedef typename D::acc A;
  vec<A> sum{};
  for (int64_t i = 0; i < tasks; ++i) {
    const double bi = b ? b[i] : 0.0;
    if (a[i] == 0 && bi == 0) continue;
    const bool same = bi != 0 && static_cast<A>(a[i]) == static_cast<A>(bi);
    const vec<A> g = load_some<D>(same ? sam + i * sam_stride : jac + i * jac_stride, left);
    if (a[i] != 0) sum += splat<A>(static_cast<A>(a[i])) * g;
    if (bi != 0 && !same)
      sum += splat<A>(static_cast<A>(bi)) * (load_some<D>(sam + i * sam_stride, left) - g);
  }
  return sum;
}

template <class D>
inline bool vector_aligned(const typename D::elem* p) {
  return reinterpret_cast<uintptr_t>(p) % FLATMTL_VECTOR_BYTES == 0;
}

// Rows are taken in groups, a block of columns at a time: more streams than a group holds would
// outrun the prefetcher. The sums wait in the first-level cache between groups.
template <class D, class O>
void combine_of(Rows jac, const double* a, Rows sam, const double* b, int64_t tasks, void* out,
                int64_t begin, int64_t end, bool stream) {
  typedef typename D::acc A;
  typedef typename D::elem E;
  constexpr int N = Lanes<A>::n, U = 8;
  constexpr int64_t kGroup = 16, kBlock = 16 * U * N;
  const E* x = static_cast<const E*>(jac.base);
  const E* s = static_cast<const E*>(sam.base);
  typename O::elem* to = static_cast<typename O::elem*>(out);
  stream = stream && vector_aligned<O>(to + begin);
  alignas(64) A waiting[kBlock];
  const int64_t whole = begin + (end - begin) / (U * N) * (U * N);
  for (int64_t block = begin; block < whole; block += kBlock) {
    const int64_t stop = whole - block < kBlock ? whole : block + kBlock;
    for (int64_t first = 0; first < tasks; first += kGroup) {
      const int64_t last = tasks - first < kGroup ? tasks : first + kGroup;
      for (int64_t k = block; k < stop; k += U * N) {
        vec<A> sum[U];
        for (int u = 0; u < U; ++u)
          sum[u] = first == 0 ? vec<A>{} : load_vec<A>(waiting + (k - block) + u * N);
        add_rows<D, U>(x + k, jac.stride, a, s ? s + k : s, sam.stride, b, first, last, sum);
        for (int u = 0; u < U; ++u) {
          if (last < tasks)
            store_vec<A>(waiting + (k - block) + u * N, sum[u]);
          else if (stream)
            stream_vec<O>(to + k + u * N, sum[u]);
          else
            O::store(to + k + u * N, sum[u]);
        }
      }
    }
  }
  for (int64_t k = whole; k < end; k += N) {
    const int64_t left = end - k < N ? end - k : N;
    store_some<O>(to + k,
                  combine_end<D>(x + k, jac.stride, a, s ? s + k : s, sam.stride, b, tasks, left),
                  left);
  }
  if (stream) stream_end();
}

// Several outputs: a tile of outputs x vectors in registers, so that a load of J serves every
// output of the tile.
template <class D, int R>
inline void project_tile(const typename D::elem* jac, int64_t stride, const double* coefficients,
                         int64_t tasks, typename D::elem* out, int64_t out_stride) {
  typedef typename D::acc A;
  constexpr int N = Lanes<A>::n, U = 4;
  vec<A> sum[R][U] = {};
  for (int64_t i = 0; i < tasks; ++i) {
    vec<A> g[U];
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) g[u] = D::load(jac + i * stride + u * N);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const double c = coefficients[r * tasks + i];
      if (c == 0) continue;
      const vec<A> w = splat<A>(static_cast<A>(c));
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) sum[r][u] += w * g[u];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) D::store(out + r * out_stride + u * N, sum[r][u]);
}

template <class D>
void project_of(Rows jac, const double* coefficients, int64_t tasks, int64_t outputs, void* out,
                int64_t out_stride, int64_t begin, int64_t end) {
  typedef typename D::elem E;
  constexpr int N = Lanes<typename D::acc>::n, U = 4;
  constexpr int R = FLATMTL_VECTOR_BYTES == 64 ? 4 : 2;  // sums, loads and a weight within 32 (16)
  const E* x = static_cast<const E*>(jac.base);
  E* to = static_cast<E*>(out);
  int64_t k = begin;
  for (; k + U * N <= end; k += U * N) {
    int64_t r = 0;
    for (; r + R <= outputs; r += R)
      project_tile<D, R>(x + k, jac.stride, coefficients + r * tasks, tasks,
                         to + r * out_stride + k, out_stride);
    for (; r < outputs; ++r)
      project_tile<D, 1>(x + k, jac.stride, coefficients + r * tasks, tasks,
                         to + r * out_stride + k, out_stride);
  }
  for (; k < end; k += N)
    for (int64_t r = 0; r < outputs; ++r) {
      const int64_t left = end - k < N ? end - k : N;
      store_some<D>(to + r * out_stride + k,
                    combine_end<D>(x + k, jac.stride, coefficients + r * tasks,
                                   static_cast<const E*>(nullptr), 0,
                                   static_cast<const double*>(nullptr), tasks, left),
                    left);
    }
}

// The first segment that ends after `position`.
inline int64_t find_segment(const Segments& segments, int64_t position) {
  int64_t low = 0, high = segments.count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (segments.offset[middle] + segments.numel[middle] > position)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// Calls f(k, from, to, position) for every piece of a segment within [begin, end): elements
// [from, to) of segment k lie at [position, ...) of the flat row.
template <class F>
inline void each_piece(const Segments& segments, int64_t begin, int64_t end, F f) {
  for (int64_t k = find_segment(segments, begin); k < segments.count; ++k) {
    const int64_t start = segments.offset[k], stop = start + segments.numel[k];
    if (start >= end) break;
    const int64_t first = start > begin ? start : begin, last = stop < end ? stop : end;
    if (first < last) f(k, first - start, last - start, first);
  }
}

// out <- source, n elements, of one type. Returns the sum of squares.
template <class D>
inline double copy_squares(typename D::elem* out, const typename D::elem* source, int64_t n,
                           bool stream) {
  constexpr int N = Lanes<typename D::acc>::n;
  double total = 0;
  // Small steps, so that what was just copied is still in the first-level cache when it is
  // squared.
  for (int64_t m = 0; m < n; m += 128 * N) {
    const int64_t step = n - m < 128 * N ? n - m : 128 * N;
    copy_bytes(out + m, source + m, step * static_cast<int64_t>(sizeof(*out)), stream);
    total += squares<D>(source + m, step, [](vec<typename D::acc> v, int64_t) { return v; });
  }
  return total;
}

// out <- source, or out + source, n elements, rounded to the row's type. Returns the sum of squares
// of what was stored.
template <class D, class G, bool accumulate>
inline double move_squares(typename D::elem* out, const typename G::elem* source, int64_t n) {
  typedef typename D::acc A;
  constexpr int N = Lanes<A>::n;
  return squares<G>(source, n, [&](vec<A> x, int64_t k) {
    const int64_t left = n - k;
    if (accumulate) x = (left >= N ? D::load(out + k) : load_some<D>(out + k, left)) + x;
    if (left >= N)
      D::store(out + k, x);
    else
      store_some<D>(out + k, x, left);
    return D::rounded(x);
  });
}

template <class D, class G, bool accumulate>
double pack_of(const Segments& segments, void* row, int64_t begin, int64_t end, bool stream) {
  typedef typename D::elem E;
  E* out = static_cast<E*>(row);
  double total = 0;
  int64_t done = begin;
  const auto between = [&](int64_t position) {  // [done, position) of the row
    if (accumulate)
      total += squares<D>(out + done, position - done,
                          [](vec<typename D::acc> v, int64_t) { return v; });
    else
      __builtin_memset(out + done, 0, static_cast<size_t>(position - done) * sizeof(E));
  };
  each_piece(segments, begin, end, [&](int64_t k, int64_t from, int64_t to, int64_t position) {
    between(position);
    const typename G::elem* source = static_cast<const typename G::elem*>(segments.data[k]) + from;
    if constexpr (accumulate || sizeof(E) != sizeof(*source))
      total += move_squares<D, G, accumulate>(out + position, source, to - from);
    else
      total += copy_squares<D>(out + position, source, to - from, stream);
    done = position + (to - from);
  });
  between(end);
  if (stream) stream_end();
  return total;
}

template <class A>
inline vec<A> magnitude(vec<A> x) {
  return x < 0 ? -x : x;
}

template <class D, class S>
double adaptive_squares_of(const void* saved, const void* row, double eta, int64_t begin,
                           int64_t end) {
  typedef typename D::acc A;
  typedef typename D::elem E;
  const typename S::elem* theta = static_cast<const typename S::elem*>(saved) + begin;
  const int64_t n = end - begin;
  const vec<A> shift = splat<A>(static_cast<A>(eta));
  return squares<D>(static_cast<const E*>(row) + begin, n, [&](vec<A> g, int64_t k) {
    const vec<A> t = n - k >= Lanes<A>::n ? S::load(theta + k) : load_some<S>(theta + k, n - k);
    return (magnitude<A>(t) + shift) * g;
  });
}

template <class D, class S>
void perturb_of(const Segments& segments, const void* saved, const void* row, const double* scale,
                bool adaptive, double eta, int64_t begin, int64_t end, bool stream) {
  typedef typename D::acc A;
  typedef typename S::elem E;
  constexpr int N = Lanes<A>::n;
  const vec<A> shift = splat<A>(static_cast<A>(eta));
  each_piece(segments, begin, end, [&](int64_t k, int64_t from, int64_t to, int64_t position) {
    const E* theta = static_cast<const E*>(saved) + position;
    const typename D::elem* g = static_cast<const typename D::elem*>(row) + position;
    E* out = static_cast<E*>(segments.data[k]) + from;
    const int64_t n = to - from;
    const A s = static_cast<A>(scale[k]);
    if (s == 0) {
      copy_bytes(out, theta, n * static_cast<int64_t>(sizeof(E)), stream);
      return;
    }
    const vec<A> factor = splat<A>(s);
    const bool past = stream && vector_aligned<S>(out);
    for (int64_t m = 0; m < n; m += N) {
      const int64_t left = n - m;
      const vec<A> t = left >= N ? S::load(theta + m) : load_some<S>(theta + m, left);
      vec<A> x = left >= N ? D::load(g + m) : load_some<D>(g + m, left);
      if (adaptive) {
        const vec<A> size = magnitude<A>(t) + shift;
        x = size * size * x;
      }
      const vec<A> moved = t + factor * x;
      if (left < N)
        store_some<S>(out + m, moved, left);
      else if (past)
        stream_vec<S>(out + m, moved);
      else
        S::store(out + m, moved);
    }
  });
  if (stream) stream_end();
}

template <class D>
void restore_of(const Segments& segments, const void* saved, int64_t begin, int64_t end,
                bool stream) {
  typedef typename D::elem E;
  each_piece(segments, begin, end, [&](int64_t k, int64_t from, int64_t to, int64_t position) {
    copy_bytes(static_cast<E*>(segments.data[k]) + from, static_cast<const E*>(saved) + position,
               (to - from) * static_cast<int64_t>(sizeof(E)), stream);
  });
  if (stream) stream_end();
}
