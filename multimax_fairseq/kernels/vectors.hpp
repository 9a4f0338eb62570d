// Vectors of fp32 numbers, by the extension that GCC and Clang share, as wide as the target processor allows;
// functions of them, and loops over arrays.

#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include <omp.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace multimax {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));

constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float LOWEST = std::numeric_limits<float>::lowest();

inline Vec all(float x) { return x - Vec{}; }

// a > b ? a : b and a < b ? a : b: where a or b is NaN, b. GCC compiles those to two instructions.
#if defined(__AVX512F__)
inline Vec max(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
inline Vec min(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
inline Vec max(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
inline Vec min(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)a, (__m256)b); }
#else
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
#endif

// A multiple of 16 numbers, 64 bytes.
inline int64_t rounded_up(int64_t count) { return (count + 15) / 16 * 16; }

using AllLanes = std::integral_constant<int, LANES>;

// The first `lanes` numbers at `from`, and `fill` in the other lanes. `lanes` is an int, or AllLanes.
template <class Count>
inline Vec load(const float* from, Count lanes, float fill) {
#if defined(__AVX512F__)
  if constexpr (!std::is_same_v<Count, AllLanes>) {
    return (Vec)_mm512_mask_loadu_ps((__m512)all(fill), (1u << lanes) - 1, from);
  }
#endif
  Vec v;
  if (lanes == LANES) {
    std::memcpy(&v, from, sizeof v);
  } else {
    v = all(fill);
    std::memcpy(&v, from, lanes * sizeof(float));
  }
  return v;
}

template <class Count>
inline void store(float* to, Count lanes, Vec v) {
#if defined(__AVX512F__)
  if constexpr (!std::is_same_v<Count, AllLanes>) return _mm512_mask_storeu_ps(to, (1u << lanes) - 1, (__m512)v);
#endif
  std::memcpy(to, &v, lanes == LANES ? sizeof v : lanes * sizeof(float));
}

template <int COUNT>
struct Lanes {
  typedef float Type __attribute__((vector_size(4 * COUNT)));
};

// Reduces all lanes: one half with the other, and so on.
template <int COUNT, class Operation>
inline float reduce(const typename Lanes<COUNT>::Type& v, Operation operation) {
  if constexpr (COUNT == 4) {  // by vectors: of plain floats, a compiler may make a branch
    const auto pairs = operation(v, Lanes<4>::Type{v[2], v[3], v[0], v[1]});
    return operation(pairs, Lanes<4>::Type{pairs[1], pairs[0], pairs[3], pairs[2]})[0];
  } else {
    typename Lanes<COUNT / 2>::Type halves[2];
    std::memcpy(halves, &v, sizeof v);
    return reduce<COUNT / 2>(operation(halves[0], halves[1]), operation);
  }
}

inline float sum(Vec v) {
  return reduce<LANES>(v, [](auto a, auto b) { return a + b; });
}

inline float max(Vec v) {
  return reduce<LANES>(v, [](auto a, auto b) { return a > b ? a : b; });
}

// Adding this to a number rounds it to an integer n; the last bits of the sum are n + 127.
constexpr float SHIFT = 3 * (1 << 22) + 127;

// 2^n from n + SHIFT; 0 for n = -127.
inline Vec power_of_2(Vec shifted) {
  IntVec bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits <<= 23;
  Vec power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

// exp(x) for x <= 0, to 2 units in the last place; 0 below -87.7, NaN for NaN.
//
// exp(x) = 2^n exp(r), r = x - n log 2 in [-log(2)/2, log(2)/2]. The polynomial is a minimax fit, to 2^-28; the two
// parts of log 2 are those of Moshier's Cephes library (expf).
inline Vec exp(Vec x) {
  x = max(all(-88.f), x);
  const Vec shifted = x * 1.44269504f + SHIFT, n = shifted - SHIFT;
  const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec y = r * 1.381459879e-3f + 8.368716575e-3f;
  y = y * r + 4.166838899e-2f;
  y = y * r + 1.666652113e-1f;
  y = y * r + 4.999999404e-1f;
  y = y * r + 1.f;
  y = y * r + 1.f;
  return y * power_of_2(shifted);
}

// Calls body(index, lanes) for all of `count` numbers, AllLanes at a time and then the rest.
template <class Body>
inline void each(int64_t count, Body body) {
  int64_t j = 0;
  for (; j + LANES <= count; j += LANES) body(j, AllLanes{});
  if (j < count) body(j, int(count - j));
}

typedef double Doubles __attribute__((vector_size(4 * LANES)));  // half as many

inline void halves(Vec v, Doubles* doubles) {
  typename Lanes<LANES / 2>::Type halves[2];
  std::memcpy(halves, &v, sizeof v);
  for (int i = 0; i < 2; ++i) doubles[i] = __builtin_convertvector(halves[i], Doubles);
}

inline double sum(Doubles v) {
  double total = 0;
  for (int lane = 0; lane < LANES / 2; ++lane) total += v[lane];
  return total;
}

inline float dot(const float* a, const float* b, int64_t count) {
  Vec even = {}, odd = {};  // two: each addition waits for the one before it
  int64_t j = 0;
  for (; j + 2 * LANES <= count; j += 2 * LANES) {
    even += load(a + j, AllLanes{}, 0) * load(b + j, AllLanes{}, 0);
    odd += load(a + j + LANES, AllLanes{}, 0) * load(b + j + LANES, AllLanes{}, 0);
  }
  each(count - j, [&](int64_t k, auto lanes) { even += load(a + j + k, lanes, 0) * load(b + j + k, lanes, 0); });
  return sum(even + odd);
}

// Splits `count` items among threads; each calls body(first, last, thread).
template <class Body>
inline void share(int64_t count, int threads, Body body) {
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    body(count * thread / team, count * (thread + 1) / team, thread);
  }
}

// A bit for each lane that is above `limit`, or NaN.
inline uint32_t lanes_above(Vec v, Vec limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, (__m512)limit, _CMP_NLE_UQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, (__m256)limit, _CMP_NLE_UQ));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < LANES; ++lane) bits |= uint32_t(!(v[lane] <= limit[lane])) << lane;
  return bits;
#endif
}

// Writes the lanes of `bits` side by side; may write up to LANES numbers.
inline void compress(float* to, Vec v, uint32_t bits) {
#if defined(__AVX512F__)
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(bits, (__m512)v));
#else
  for (; bits; bits &= bits - 1) *to++ = v[__builtin_ctz(bits)];
#endif
}

// The inverse: reads adjacent numbers into the lanes of `bits`, 0 into the others.
inline Vec expand(const float* from, uint32_t bits) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_expand_ps(bits, _mm512_loadu_ps(from));
#else
  Vec v = {};
  for (; bits; bits &= bits - 1) v[__builtin_ctz(bits)] = *from++;
  return v;
#endif
}

}  // namespace multimax
