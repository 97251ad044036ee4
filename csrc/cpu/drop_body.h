// GradDrop: of every column the positive or the negative entries are kept, by one uniform number.

typedef uint64_t WideWords __attribute__((vector_size(FLATMTL_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(FLATMTL_VECTOR_BYTES)));

// Lane by lane, the low half of a times the low half of b: 64 bits.
inline WideWords multiply_low(WideWords a, WideWords b) {
#if defined(__AVX512F__)
  return reinterpret_cast<WideWords>(
      _mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<WideWords>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__x86_64__)
  return reinterpret_cast<WideWords>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Of every 128 bits of a and b the low halves side by side, or (high) the high halves.
template <bool high>
inline WideWords interleave(WideWords a, WideWords b) {
#if defined(__AVX512F__)
  const __m512i x = reinterpret_cast<__m512i>(a), y = reinterpret_cast<__m512i>(b);
  return reinterpret_cast<WideWords>(high ? _mm512_unpackhi_epi64(x, y)
                                          : _mm512_unpacklo_epi64(x, y));
#elif defined(__AVX2__)
  const __m256i x = reinterpret_cast<__m256i>(a), y = reinterpret_cast<__m256i>(b);
  return reinterpret_cast<WideWords>(high ? _mm256_unpackhi_epi64(x, y)
                                          : _mm256_unpacklo_epi64(x, y));
#else
  return WideWords{a[high], b[high]};
#endif
}

// u[k] = the uniform number of column first + k, n of them rounded up to two vectors; first is a
// multiple of 4. Column c takes word c % 4 of Philox(key; c / 4, 0, step), as csrc/solvers/philox.h
// has it: one counter a 64-bit lane, the halves above a word are not looked at.
inline void uniform_columns(uint64_t key, uint32_t step, int64_t first, int64_t n, float* u) {
  constexpr int L = FLATMTL_VECTOR_BYTES / 8, N = FLATMTL_VECTOR_BYTES / 4;
  WideWords lane;  // that of the counter in every place: interleave brings them into order
  for (int k = 0; k < L; ++k) lane[k] = static_cast<uint64_t>(k / 2 + k % 2 * (L / 2));
  const WideWords none = {}, low = none + 0xffffffffu;
  for (int64_t k = 0; k < n; k += 2 * N) {
    const WideWords counter = lane + static_cast<uint64_t>((first + k) / 4);
    WideWords c0 = counter, c1 = counter >> 32, c2 = none, c3 = none + step;
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
      const WideWords p0 = multiply_low(c0, none + 0xD2511F53u);
      const WideWords p1 = multiply_low(c2, none + 0xCD9E8D57u);
      c0 = (p1 >> 32) ^ c1 ^ (none + k0);
      c2 = (p0 >> 32) ^ c3 ^ (none + k1);
      c1 = p1;
      c3 = p0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const WideWords front = (c0 & low) | (c1 << 32), back = (c2 & low) | (c3 << 32);
    const WideWords both[2] = {interleave<false>(front, back), interleave<true>(front, back)};
    for (int half = 0; half < 2; ++half) {
      // 23 bits behind the point of a number from 1 on, less almost 1: (2 bits + 1) / 2^24
      const Words word = reinterpret_cast<Words>(both[half]) >> 9 | 0x3f800000u;
      store_vec<float>(u + k + half * N, reinterpret_cast<vec<float>>(word) - 0x1.fffffep-1f);
    }
  }
}

template <class A>
inline vec<A> uniform_vec(const float* u) {
  if constexpr (sizeof(A) == 4) {
    return load_vec<float>(u);
  } else {
    vec<A> wide;
    for (int k = 0; k < Lanes<A>::n; ++k) wide[k] = static_cast<A>(u[k]);
    return wide;
  }
}

// What a column's rows come to, a vector of columns: the sums of the positive and of the negative
// entries and, with a leak, the sums in which the one or the other side is leaked.
template <class A, bool leaky>
struct Sides {
  static constexpr int kCount = leaky ? 4 : 2;
  vec<A> sum[kCount];

  // NaN, neither above nor below 0, goes to both sides
  void add(vec<A> x, vec<A> leak) {
    const vec<A> zero = {};
    sum[0] += x < 0 ? zero : x;
    sum[1] += x > 0 ? zero : x;
    if constexpr (leaky) {
      const vec<A> part = leak * x;
      sum[2] += x < 0 ? part : x;
      sum[3] += x > 0 ? part : x;
    }
  }
  // P > U, P = 0.5 (1 + sum x / sum |x|) = positive / (positive - negative), without its 0 / 0
  vec<A> choose(vec<A> u) const {
    const vec<A> keep = sum[0] * (1 - u), drop = -sum[1] * u;
    return keep > drop ? sum[kCount - 2] : sum[kCount - 1];
  }
};

// index: the `count` rows that take part; leak: one a row of jac, or null. The sums of a block wait
// in the first-level cache between groups of rows, as in combine_of.
template <class D, class O, bool leaky>
void drop_of(Rows jac, const int64_t* index, int64_t count, const double* leak, uint64_t key,
             uint32_t step, void* out, int64_t begin, int64_t end, bool stream) {
  typedef typename D::acc A;
  typedef typename D::elem E;
  typedef Sides<A, leaky> Sum;
  constexpr int N = Lanes<A>::n, U = (FLATMTL_VECTOR_BYTES == 64 ? 8 : 4) / (leaky ? 2 : 1);
  constexpr int64_t kGroup = 16, kBlock = 1024;
  static_assert(kBlock % (U * N) == 0, "a block is whole strips");
  const E* x = static_cast<const E*>(jac.base);
  typename O::elem* to = static_cast<typename O::elem*>(out);
  stream = stream && vector_aligned<O>(to + begin);
  alignas(64) float u[kBlock];
  alignas(64) Sum waiting[kBlock / N];
  const auto leak_of = [&](int64_t i) { return splat<A>(static_cast<A>(leaky ? leak[i] : 0)); };
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t columns = end - block < kBlock ? end - block : kBlock;
    const int64_t whole = columns / (U * N) * (U * N);
    uniform_columns(key, step, block, columns, u);
    for (int64_t first = 0; first == 0 || first < count; first += kGroup) {
      const int64_t last = count - first < kGroup ? count : first + kGroup;
      for (int64_t k = 0; k < whole; k += U * N) {
        Sum sum[U];
        for (int v = 0; v < U; ++v) sum[v] = first == 0 ? Sum{} : waiting[k / N + v];
        for (int64_t r = first; r < last; ++r) {
          const E* row = x + index[r] * jac.stride + block + k;
          const vec<A> part = leak_of(index[r]);
          for (int v = 0; v < U; ++v) {
            __builtin_prefetch(row + (v + 4 * U) * N, 0, 3);
            sum[v].add(D::load(row + v * N), part);
          }
        }
        for (int v = 0; v < U; ++v) {
          const int64_t at = k + v * N;
          if (last < count)
            waiting[at / N] = sum[v];
          else if (stream)
            stream_vec<O>(to + block + at, sum[v].choose(uniform_vec<A>(u + at)));
          else
            O::store(to + block + at, sum[v].choose(uniform_vec<A>(u + at)));
        }
      }
    }
    for (int64_t k = whole; k < columns; k += N) {
      const int64_t left = columns - k < N ? columns - k : N;
      Sum sum = {};
      for (int64_t r = 0; r < count; ++r)
        sum.add(load_some<D>(x + index[r] * jac.stride + block + k, left), leak_of(index[r]));
      store_some<O>(to + block + k, sum.choose(uniform_vec<A>(u + k)), left);
    }
  }
  if (stream) stream_end();
}
