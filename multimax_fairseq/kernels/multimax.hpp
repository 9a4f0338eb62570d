// MultiMax on a row of fp32 scores, for a CPU, and the vectors that all C++ kernels use. The formulas are those of
// rows.py. Vectors use the extension that GCC and Clang share, as wide as the target processor allows.

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
// Gradients clamp scores to this range: the square stays finite, so that 0 times it is 0.
constexpr float FAR = float(1LL << 50);

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
  if constexpr (COUNT == 2) {
    return operation(Lanes<4>::Type{v[0]}, Lanes<4>::Type{v[1]})[0];  // of plain floats, a compiler may make a branch
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

// Thresholds b_n and d_n and their gains, from `thresholds` and `gains`, (ORDER, 2).
template <int ORDER>
struct Modulator {
  float below[ORDER], above[ORDER], gain_below[ORDER], gain_above[ORDER];

  Modulator(const float* thresholds, const float* gains) {
    for (int n = 0; n < ORDER; ++n) {
      below[n] = thresholds[2 * n], above[n] = thresholds[2 * n + 1];
      // max() would lose a NaN threshold
      gain_below[n] = below[n] == below[n] ? gains[2 * n] : below[n];
      gain_above[n] = above[n] == above[n] ? gains[2 * n + 1] : above[n];
    }
  }

  // sigma(x); -inf stays -inf. The order is the formula's, as it decides what overflows or becomes NaN.
  inline Vec operator()(Vec x) const {
    Vec y = x;
    for (int n = ORDER - 1; n >= 0; --n) {
      const Vec under = max(below[n] - x, Vec{}), over = max(x - above[n], Vec{});
      y += n ? gain_below[n] * under * under : gain_below[n] * under;
      y += n ? gain_above[n] * over * over : gain_above[n] * over;
    }
    return x < LOWEST ? x : y;
  }
};

// Calls body with the Modulator of `order`, 0 (softmax), 1 or 2.
template <class Body>
inline void with_modulator(int64_t order, const float* thresholds, const float* gains, Body body) {
  if (order == 0) {
    body(Modulator<0>(thresholds, gains));
  } else if (order == 1) {
    body(Modulator<1>(thresholds, gains));
  } else {
    body(Modulator<2>(thresholds, gains));
  }
}

// How many rows (16,384 scores) the sums below add up in fp32, before they are added in double precision.
inline int64_t few_rows(int64_t width) { return width < (1 << 14) ? (1 << 14) / width : 1; }

// The sums over scores from which the gradients of thresholds and gains are made.
template <int ORDER>
struct Sums {
  Vec slope_below[ORDER] = {}, slope_above[ORDER] = {}, power_below[ORDER] = {}, power_above[ORDER] = {};

  // dL/dx from x and `upstream` = dL/dsigma; adds to the sums.
  inline Vec backward(Vec x, Vec upstream, const Modulator<ORDER>& sigma) {
    Vec slope = all(1.f);
    x = min(max(x, all(-FAR)), all(FAR));
    for (int n = 0; n < ORDER; ++n) {
      const Vec under = max(sigma.below[n] - x, Vec{}), over = max(x - sigma.above[n], Vec{});
      const Vec product_under = upstream * under, product_over = upstream * over;
      if (n == 0) {
        slope_below[n] += under > 0.f ? upstream : Vec{}, slope_above[n] += over > 0.f ? upstream : Vec{};
        power_below[n] += product_under, power_above[n] += product_over;
        slope -= under > 0.f ? all(sigma.gain_below[n]) : Vec{};
        slope += over > 0.f ? all(sigma.gain_above[n]) : Vec{};
      } else {
        slope_below[n] += product_under, slope_above[n] += product_over;
        power_below[n] += product_under * under, power_above[n] += product_over * over;
        slope += 2 * sigma.gain_above[n] * over - 2 * sigma.gain_below[n] * under;
      }
    }
    return upstream * slope;
  }

  // Adds the gradients of thresholds and gains to `grads`, (2, ORDER, 2).
  void add_to(double* grads, const Modulator<ORDER>& sigma) const {
    for (int n = 0; n < ORDER; ++n) {
      grads[2 * n] += double(n + 1) * sigma.gain_below[n] * sum(slope_below[n]);
      grads[2 * n + 1] -= double(n + 1) * sigma.gain_above[n] * sum(slope_above[n]);
      grads[2 * (ORDER + n)] += sum(power_below[n]);
      grads[2 * (ORDER + n) + 1] += sum(power_above[n]);
    }
  }
};

// A probability is exp(sigma - peak) * factor. One number for both, log sum exp sigma, would lose digits where scores
// are large.
struct Normaliser {
  float peak;    // max sigma; 0 in a row without scores
  float factor;  // 1 / sum exp(sigma - peak); 0 in a row without scores
};

// exp(sigma(x) - max sigma) of a row of `count` scores; `result` may be `scores`.
template <int ORDER>
inline Normaliser exponentials(const float* scores, float* result, int64_t count, Modulator<ORDER> sigma) {
  Vec peaks = all(-INFINITE), largest = peaks, totals = {};
  each(count, [&](int64_t j, auto lanes) {
    const Vec x = load(scores + j, lanes, -INFINITE), modulated = sigma(x);
    largest = max(x, largest);  // loses NaN, as peaks may; exp(NaN) below keeps it
    peaks = max(peaks, modulated);
    store(result + j, lanes, modulated);
  });
  float peak = max(peaks);
  // 0 only in a row without scores: with scores whose sigma are all -inf or NaN, the row becomes NaN
  if (!(peak > -INFINITE) && max(largest) == -INFINITE) peak = 0;
  each(count, [&](int64_t j, auto lanes) {
    const Vec exponential = exp(load(result + j, lanes, -INFINITE) - peak);
    totals += exponential;
    store(result + j, lanes, exponential);
  });
  const float total = sum(totals);
  return {peak, total == 0 ? 0 : 1 / total};
}

}  // namespace multimax
