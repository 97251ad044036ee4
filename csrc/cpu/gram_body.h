// Gram of a chunk of columns. Floor: read T P (2 T P for the difference, and for the pair).
//
// A block of columns, sized to stay in the first-level cache, is multiplied tile by tile: R x R
// rows at a time with the R^2 sums in vector registers, the upper triangle only. float sums run
// over one block (at most 64 terms a lane), then go to double. Half types and differences are
// widened into a buffer block by block; float and double rows are read where they lie.

template <class A>
constexpr int tile_rows() {
  return FLATMTL_VECTOR_BYTES == 64 ? 4 : 3;  // R^2 sums + 2R rows within 32 (16) registers
}

constexpr int64_t kBlockBytes = 32 * 1024;

// Columns of a block: a multiple of 64 in [64, 64 lanes].
template <class A>
inline int64_t block_columns(int64_t tasks) {
  int64_t columns = kBlockBytes / (tasks * static_cast<int64_t>(sizeof(A))) / 64 * 64;
  const int64_t most = 64 * Lanes<A>::n;
  if (columns > most) columns = most;
  return columns < 64 ? 64 : columns;
}

constexpr int kSumLanes = Lanes<double>::n;

// to[lane] += v, in double; a float vector is first folded in half.
inline void add_lanes(double* to, vec<double> v) {
  store_vec<double>(to, load_vec<double>(to) + v);
}
inline void add_lanes(double* to, vec<float> v) {
  typedef float half __attribute__((vector_size(kSumLanes * 4)));
  half parts[2];
  __builtin_memcpy(parts, &v, sizeof(v));
  const half folded = parts[0] + parts[1];
  store_vec<double>(to, load_vec<double>(to) + __builtin_convertvector(folded, vec<double>));
}

// sums[pair][lane] in double, row-major over (a, b). I x J rows; diagonal: only b >= a.
template <class A, int I, int J, bool diagonal>
inline void tile(const A* const* x, const A* const* y, int64_t columns, int64_t ahead,
                 double* sums) {
  vec<A> total[I][J];
#pragma GCC unroll 4
  for (int a = 0; a < I; ++a)
#pragma GCC unroll 4
    for (int b = 0; b < J; ++b) total[a][b] = vec<A>{};
  for (int64_t k = 0; k < columns; k += Lanes<A>::n) {
    vec<A> right[J];
#pragma GCC unroll 4
    for (int b = 0; b < J; ++b) right[b] = load_vec<A>(y[b] + k);
    if constexpr (diagonal) {
      // each row comes from memory here first: ask for its next block meanwhile
#pragma GCC unroll 4
      for (int b = 0; b < J; ++b) __builtin_prefetch(y[b] + k + ahead, 0, 3);
    }
#pragma GCC unroll 4
    for (int a = 0; a < I; ++a) {
      const vec<A> left = diagonal ? right[a] : load_vec<A>(x[a] + k);
#pragma GCC unroll 4
      for (int b = diagonal ? a : 0; b < J; ++b) total[a][b] += left * right[b];
    }
  }
#pragma GCC unroll 4
  for (int a = 0; a < I; ++a)
#pragma GCC unroll 4
    for (int b = diagonal ? a : 0; b < J; ++b)
      add_lanes(sums + (a * J + b) * kSumLanes, total[a][b]);
}

template <class A, int I, bool diagonal>
inline void tile_by_width(const A* const* x, const A* const* y, int64_t width, int64_t columns,
                          int64_t ahead, double* sums) {
  if constexpr (diagonal) {
    tile<A, I, I, true>(x, y, columns, ahead, sums);
  } else {
    if (width == 1) return tile<A, I, 1, false>(x, y, columns, ahead, sums);
    if (width == 2) return tile<A, I, 2, false>(x, y, columns, ahead, sums);
    if (width == 3) return tile<A, I, 3, false>(x, y, columns, ahead, sums);
    if constexpr (tile_rows<A>() == 4) tile<A, I, 4, false>(x, y, columns, ahead, sums);
  }
}

template <class A>
inline void tile_any(const A* const* rows, int64_t first, int64_t height, int64_t second,
                     int64_t width, int64_t columns, int64_t ahead, double* sums) {
  constexpr int R = tile_rows<A>();
  const A *const *x = rows + first, *const *y = rows + second;
  if (first != second) return tile_by_width<A, R, false>(x, y, width, columns, ahead, sums);
  if (height == 1) return tile_by_width<A, 1, true>(x, y, 1, columns, ahead, sums);
  if (height == 2) return tile_by_width<A, 2, true>(x, y, 2, columns, ahead, sums);
  if (height == 3) return tile_by_width<A, 3, true>(x, y, 3, columns, ahead, sums);
  if constexpr (R == 4) tile_by_width<A, 4, true>(x, y, 4, columns, ahead, sums);
}

template <class A>
inline int64_t tile_count(int64_t tasks) {
  constexpr int R = tile_rows<A>();
  const int64_t blocks = (tasks + R - 1) / R;
  return blocks * (blocks + 1) / 2;
}

// Scratch: row pointers, the sums of every tile, the widened block.
template <class A>
inline int64_t gram_scratch_of(int64_t tasks, bool both) {
  constexpr int R = tile_rows<A>();
  return (tasks * 8 + 63) / 64 * 64 +
         (both ? 2 : 1) * tile_count<A>(tasks) * R * R * kSumLanes * 8 +
         tasks * block_columns<A>(tasks) * static_cast<int64_t>(sizeof(A));
}

template <class D>
inline void widen(const typename D::elem* jac, const typename D::elem* sam, int64_t columns,
                  int64_t padded, typename D::acc* to) {
  constexpr int N = Lanes<typename D::acc>::n;
  for (int64_t k = 0; k < padded; k += N) {
    const int64_t left = columns - k;
    vec<typename D::acc> x{};
    if (left >= N)
      x = sam ? D::load(sam + k) - D::load(jac + k) : D::load(jac + k);
    else if (left > 0)
      x = sam ? load_some<D>(sam + k, left) - load_some<D>(jac + k, left)
              : load_some<D>(jac + k, left);
    store_vec<typename D::acc>(to + k, x);
  }
}

// Points rows at a block of columns: where they lie, or widened in the buffer. Returns whether they
// lie where they are.
template <class D>
inline bool block_rows(Rows jac, Rows sam, int64_t tasks, int64_t k, int64_t columns,
                       int64_t padded, int64_t block, typename D::acc* buffer,
                       const typename D::acc** rows) {
  typedef typename D::acc A;
  typedef typename D::elem E;
  // half types, differences and a ragged end go through the buffer
  const bool direct = sizeof(E) == sizeof(A) && !sam.base && padded == columns;
  for (int64_t i = 0; i < tasks; ++i) {
    const E* x = static_cast<const E*>(jac.base) + i * jac.stride + k;
    if (direct) {
      rows[i] = reinterpret_cast<const A*>(x);
    } else {
      const E* s = sam.base ? static_cast<const E*>(sam.base) + i * sam.stride + k : nullptr;
      widen<D>(x, s, columns, padded, buffer + i * block);
      rows[i] = buffer + i * block;
    }
  }
  return direct;
}

// partial[i, j] (i <= j) from the lanes of all tiles.
template <class A>
inline void add_tiles(const double* sums, int64_t tasks, double* partial) {
  constexpr int R = tile_rows<A>();
  for (int64_t i = 0; i < tasks; i += R) {
    for (int64_t j = i; j < tasks; j += R, sums += R * R * kSumLanes) {
      const int64_t height = tasks - i < R ? tasks - i : R, width = tasks - j < R ? tasks - j : R;
      for (int64_t a = 0; a < height; ++a)
        for (int64_t b = i == j ? a : 0; b < width; ++b) {
          double total = 0;
          for (int lane = 0; lane < kSumLanes; ++lane)
            total += sums[(a * width + b) * kSumLanes + lane];
          partial[(i + a) * tasks + j + b] = total;
        }
    }
  }
}

// both: of jac, then, block by block while jac is still in the first-level cache, of sam - jac; the
// sums of either are added up as they are alone.
template <class D>
void gram_of(Rows jac, Rows sam, bool both, int64_t tasks, int64_t begin, int64_t end,
             void* scratch, double* partial) {
  typedef typename D::acc A;
  constexpr int R = tile_rows<A>(), N = Lanes<A>::n;
  const Rows none = {nullptr, 0};
  const int matrices = both ? 2 : 1;
  const A** rows = static_cast<const A**>(scratch);
  double* sums =
      reinterpret_cast<double*>(static_cast<char*>(scratch) + (tasks * 8 + 63) / 64 * 64);
  const int64_t sums_size = tile_count<A>(tasks) * R * R * kSumLanes;
  A* buffer = reinterpret_cast<A*>(sums + matrices * sums_size);
  for (int64_t k = 0; k < matrices * sums_size; ++k) sums[k] = 0;

  const int64_t block = block_columns<A>(tasks);
  for (int64_t k = begin; k < end; k += block) {
    const int64_t columns = end - k < block ? end - k : block;
    const int64_t padded = (columns + N - 1) / N * N;
    for (int m = 0; m < matrices; ++m) {
      const bool direct = block_rows<D>(jac, both && m == 0 ? none : sam, tasks, k, columns, padded,
                                        block, buffer, rows);
      double* at = sums + m * sums_size;
      for (int64_t i = 0; i < tasks; i += R) {
        const int64_t height = tasks - i < R ? tasks - i : R;
        for (int64_t j = i; j < tasks; j += R, at += R * R * kSumLanes) {
          const int64_t width = tasks - j < R ? tasks - j : R;
          tile_any<A>(rows, i, height, j, width, padded, direct ? block : 0, at);
        }
      }
    }
  }
  for (int m = 0; m < matrices; ++m)
    add_tiles<A>(sums + m * sums_size, tasks, partial + m * tasks * tasks);
}

template <class D>
void row_squares_of(Rows jac, int64_t tasks, int64_t begin, int64_t end, double* partial) {
  for (int64_t i = 0; i < tasks; ++i)
    partial[i] = squares<D>(static_cast<const typename D::elem*>(jac.base) + i * jac.stride + begin,
                            end - begin, [](vec<typename D::acc> v, int64_t) { return v; });
}
