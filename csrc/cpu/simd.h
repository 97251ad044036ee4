// Vectors of one instruction set, on the compiler's vector extension: Lanes<float>/Lanes<double>
// for the accumulator, and a row type's load, store and rounding.
//
// Included by kernels_body.h inside namespace flatmtl::cpu::FLATMTL_ISA, which is different in
// every translation unit: code compiled for one instruction set must never be merged with
// another's. No standard-library templates here for the same reason.

#if defined(__AVX512F__)
#define FLATMTL_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FLATMTL_VECTOR_BYTES 32
#else
#define FLATMTL_VECTOR_BYTES 16
#endif

template <class A>
struct Lanes;
template <>
struct Lanes<float> {
  static constexpr int n = FLATMTL_VECTOR_BYTES / 4;
  typedef float type __attribute__((vector_size(FLATMTL_VECTOR_BYTES)));
  typedef float loose __attribute__((vector_size(FLATMTL_VECTOR_BYTES), aligned(4), may_alias));
};
template <>
struct Lanes<double> {
  static constexpr int n = FLATMTL_VECTOR_BYTES / 8;
  typedef double type __attribute__((vector_size(FLATMTL_VECTOR_BYTES)));
  typedef double loose __attribute__((vector_size(FLATMTL_VECTOR_BYTES), aligned(8), may_alias));
};
template <class A>
using vec = typename Lanes<A>::type;

template <class A>
inline vec<A> load_vec(const A* p) {
  return *reinterpret_cast<const typename Lanes<A>::loose*>(p);
}
template <class A>
inline void store_vec(A* p, vec<A> v) {
  *reinterpret_cast<typename Lanes<A>::loose*>(p) = v;
}
template <class A>
inline vec<A> splat(A x) {
  return x - vec<A>{};
}
template <class A>
inline double lane_sum(vec<A> v) {
  double total = 0;
  for (int k = 0; k < Lanes<A>::n; ++k) total += static_cast<double>(v[k]);
  return total;
}

inline uint32_t bits_of(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}

// Scalar conversions; round to nearest, ties to even.
inline float from_bf16(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }
inline uint16_t to_bf16(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40);  // NaN
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
inline float from_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, e = (h >> 10) & 31, m = h & 0x3ff;
  if (e == 31) return float_of(sign | 0x7f800000u | (m << 13));
  if (e != 0) return float_of(sign | ((e + 112) << 23) | (m << 13));
  const float small = static_cast<float>(m) * 0x1p-24f;  // subnormal: exact
  return sign ? -small : small;
}
inline uint16_t to_f16(float x) {
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00);   // NaN
  if (a >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00);  // 2^16 and above
  if (a >=
      0x38800000u) {  // normal: the carry of the rounding may run into the exponent, to infinity
    const uint32_t rounded = a - 0x38000000u + 0xfffu + ((a >> 13) & 1);
    return static_cast<uint16_t>(sign | (rounded >> 13));
  }
  // subnormal: adding 0.5 leaves the multiple of 2^-24 in the low bits, rounded by the adder
  const float shifted = float_of(a) + 0.5f;
  return static_cast<uint16_t>(sign | (bits_of(shifted) - 0x3f000000u));
}

struct F32 {
  typedef float elem;
  typedef float acc;
  static vec<float> load(const elem* p) { return load_vec<float>(p); }
  static void store(elem* p, vec<float> v) { store_vec<float>(p, v); }
  static vec<float> rounded(vec<float> v) { return v; }  // what a load after the store gives
};
struct F64 {
  typedef double elem;
  typedef double acc;
  static vec<double> load(const elem* p) { return load_vec<double>(p); }
  static void store(elem* p, vec<double> v) { store_vec<double>(p, v); }
  static vec<double> rounded(vec<double> v) { return v; }
};
struct BF16 {
  typedef uint16_t elem;
  typedef float acc;
  typedef uint32_t word_vec __attribute__((vector_size(FLATMTL_VECTOR_BYTES)));
#if FLATMTL_VECTOR_BYTES == 16
  static vec<float> load(const elem* p) {
    return vec<float>{from_bf16(p[0]), from_bf16(p[1]), from_bf16(p[2]), from_bf16(p[3])};
  }
  static void store(elem* p, vec<float> v) {
    for (int k = 0; k < Lanes<float>::n; ++k) p[k] = to_bf16(v[k]);
  }
#else
  typedef uint16_t half_vec
      __attribute__((vector_size(FLATMTL_VECTOR_BYTES / 2), aligned(2), may_alias));
  static vec<float> load(const elem* p) {
    const word_vec wide = __builtin_convertvector(*reinterpret_cast<const half_vec*>(p), word_vec);
    return reinterpret_cast<vec<float>>(wide << 16);
  }
  static void store(elem* p, vec<float> v) {
    const word_vec high = reinterpret_cast<word_vec>(rounded(v)) >> 16;
    *reinterpret_cast<half_vec*>(p) = __builtin_convertvector(high, half_vec);
  }
#endif
  static vec<float> rounded(vec<float> v) {  // to_bf16 and back
    const word_vec u = reinterpret_cast<word_vec>(v);
    const word_vec nearest = u + 0x7fffu + ((u >> 16) & 1), quiet = u | 0x400000u;
    return reinterpret_cast<vec<float>>((v == v ? nearest : quiet) & 0xffff0000u);
  }
};
struct F16 {
  typedef uint16_t elem;
  typedef float acc;
#if defined(__AVX512F__)
  static vec<float> load(const elem* p) {
    return reinterpret_cast<vec<float>>(
        _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
  }
  static void store(elem* p, vec<float> v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
  }
  static vec<float> rounded(vec<float> v) {
    return reinterpret_cast<vec<float>>(
        _mm512_cvtph_ps(_mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT)));
  }
#elif defined(__F16C__)
  static vec<float> load(const elem* p) {
    return reinterpret_cast<vec<float>>(
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static void store(elem* p, vec<float> v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
  }
  static vec<float> rounded(vec<float> v) {
    return reinterpret_cast<vec<float>>(
        _mm256_cvtph_ps(_mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT)));
  }
#else
  static vec<float> load(const elem* p) {
    return vec<float>{from_f16(p[0]), from_f16(p[1]), from_f16(p[2]), from_f16(p[3])};
  }
  static void store(elem* p, vec<float> v) {
    for (int k = 0; k < Lanes<float>::n; ++k) p[k] = to_f16(v[k]);
  }
  static vec<float> rounded(vec<float> v) {
    for (int k = 0; k < Lanes<float>::n; ++k) v[k] = from_f16(to_f16(v[k]));
    return v;
  }
#endif
};

// n < lanes elements, padded with zeros.
template <class D>
inline vec<typename D::acc> load_some(const typename D::elem* p, int64_t n) {
  typename D::elem buffer[Lanes<typename D::acc>::n] = {};
  for (int64_t k = 0; k < n; ++k) buffer[k] = p[k];
  return D::load(buffer);
}
template <class D>
inline void store_some(typename D::elem* p, vec<typename D::acc> v, int64_t n) {
  typename D::elem buffer[Lanes<typename D::acc>::n];
  D::store(buffer, v);
  for (int64_t k = 0; k < n; ++k) p[k] = buffer[k];
}

// Past the caches, where the address allows it: a freshly written line is then not read first.
template <class D>
inline void stream_vec(typename D::elem* p, vec<typename D::acc> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(typename D::elem) == sizeof(typename D::acc)) {
    _mm512_stream_ps(reinterpret_cast<float*>(p), reinterpret_cast<__m512>(v));
    return;
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(typename D::elem) == sizeof(typename D::acc)) {
    _mm256_stream_ps(reinterpret_cast<float*>(p), reinterpret_cast<__m256>(v));
    return;
  }
#endif
  D::store(p, v);
}
// The same for any bytes: memcpy, past the caches if asked to and `to` is aligned to a vector.
inline void copy_bytes(void* to, const void* from, int64_t bytes, bool stream) {
  int64_t done = 0;
#if defined(__AVX2__)
#if defined(__AVX512F__)
  typedef __m512i word_vec;
#else
  typedef __m256i word_vec;
#endif
  constexpr int64_t N = sizeof(word_vec);
  if (stream && reinterpret_cast<uintptr_t>(to) % N == 0) {
    const char* x = static_cast<const char*>(from);
    char* out = static_cast<char*>(to);
    for (; done + N <= bytes; done += N) {
#if defined(__AVX512F__)
      _mm512_stream_si512(reinterpret_cast<word_vec*>(out + done), _mm512_loadu_si512(x + done));
#else
      _mm256_stream_si256(reinterpret_cast<word_vec*>(out + done),
                          _mm256_loadu_si256(reinterpret_cast<const word_vec*>(x + done)));
#endif
    }
  }
#else
  (void)stream;
#endif
  __builtin_memcpy(static_cast<char*>(to) + done, static_cast<const char*>(from) + done,
                   static_cast<size_t>(bytes - done));
}
// After the last of them: other threads then see what was written.
inline void stream_end() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
