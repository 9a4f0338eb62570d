// MultiMax on a row of fp32 scores, for a CPU: what multimax.cpp and attention.cpp are made of.
//
// The formulas are those of rows.py. Vectors are the extension that GCC and Clang share, as wide as the processor
// that the compiler is told of.

#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include <omp.h>

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
// Scores further away count as this far where a gradient is computed: times a gradient of 0 the square is 0.
constexpr float FAR = float(1LL << 50);

inline Vec all(float x) { return x - Vec{}; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }

// The first `lanes` numbers at `from`, and `fill` in the other lanes.
inline Vec load(const float* from, int lanes, float fill) {
  Vec v;
  if (lanes == LANES) {
    std::memcpy(&v, from, sizeof v);
  } else {
    v = all(fill);
    std::memcpy(&v, from, lanes * sizeof(float));
  }
  return v;
}

inline void store(float* to, int lanes, Vec v) {
  std::memcpy(to, &v, lanes == LANES ? sizeof v : lanes * sizeof(float));
}

template <int COUNT>
struct Lanes {
  typedef float Type __attribute__((vector_size(4 * COUNT)));
};

// Of all lanes: one half with the other, and so on.
template <int COUNT, class Operation>
inline float reduce(const typename Lanes<COUNT>::Type& v, Operation operation) {
  if constexpr (COUNT == 2) {
    return operation(Lanes<4>::Type{v[0]}, Lanes<4>::Type{v[1]})[0];  // as numbers, a compiler may take a branch
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

// exp(x) for x <= 0, to 2 units in the last place; 0 below -87.7, NaN of NaN.
//
// exp(x) = 2^n exp(r), r = x - n log 2 in [-log(2)/2, log(2)/2], with the polynomial and the two parts of log 2 of
// Moshier's Cephes library (expf).
inline Vec exp(Vec x) {
  x = x < -88.f ? all(-88.f) : x;
  const IntVec n = __builtin_convertvector(x * 1.44269504f - 0.5f, IntVec);  // towards 0
  const Vec whole = __builtin_convertvector(n, Vec);
  const Vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Vec y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.f;
  const IntVec bits = (n + 127) << 23;  // of 2^n; of 0 for n = -127
  Vec power;
  std::memcpy(&power, &bits, sizeof power);
  return y * power;
}

// Calls body(index, lanes) for all of `count` numbers, LANES at a time and then the rest.
template <class Body>
inline void each(int64_t count, Body body) {
  int64_t j = 0;
  for (; j + LANES <= count; j += LANES) body(j, LANES);
  if (j < count) body(j, int(count - j));
}

inline float dot(const float* a, const float* b, int64_t count) {
  Vec products = {};
  each(count, [&](int64_t j, int lanes) { products += load(a + j, lanes, 0) * load(b + j, lanes, 0); });
  return sum(products);
}

// Calls body(first, last, thread) for a part of `count` things in each thread.
template <class Body>
inline void share(int64_t count, int threads, Body body) {
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    body(count * thread / team, count * (thread + 1) / team, thread);
  }
}

// Thresholds b_n and d_n, and their gains: of `thresholds` and `gains`, (ORDER, 2).
template <int ORDER>
struct Modulator {
  float below[ORDER], above[ORDER], gain_below[ORDER], gain_above[ORDER];

  Modulator(const float* thresholds, const float* gains) {
    for (int n = 0; n < ORDER; ++n) {
      below[n] = thresholds[2 * n], above[n] = thresholds[2 * n + 1];
      // max() would lose a threshold that is not a number
      gain_below[n] = below[n] == below[n] ? gains[2 * n] : below[n];
      gain_above[n] = above[n] == above[n] ? gains[2 * n + 1] : above[n];
    }
  }

  // sigma(x); -inf stays -inf. In the formula's order: what is infinite, or no number, depends on it.
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

// Rows over which the sums below may go in fp32: 16,384 scores. Then they are added up in double precision.
inline int64_t few_rows(int64_t width) { return width < (1 << 14) ? (1 << 14) / width : 1; }

// Sums over scores that the gradients of thresholds and gains consist of.
template <int ORDER>
struct Sums {
  Vec slope_below[ORDER] = {}, slope_above[ORDER] = {}, power_below[ORDER] = {}, power_above[ORDER] = {};

  // dL/dx from x and `upstream` = dL/dsigma; adds to the sums.
  inline Vec backward(Vec x, Vec upstream, const Modulator<ORDER>& sigma) {
    Vec grad = upstream;
    x = min(max(x, all(-FAR)), all(FAR));
    for (int n = 0; n < ORDER; ++n) {
      const Vec under = max(sigma.below[n] - x, Vec{}), over = max(x - sigma.above[n], Vec{});
      // u n max(b_n - x, 0)^(n-1) and u max(b_n - x, 0)^n, and so for d_n
      const Vec slope_under = n ? 2 * upstream * under : under > 0.f ? upstream : Vec{};
      const Vec slope_over = n ? 2 * upstream * over : over > 0.f ? upstream : Vec{};
      grad += sigma.gain_above[n] * slope_over - sigma.gain_below[n] * slope_under;
      slope_below[n] += slope_under, slope_above[n] += slope_over;
      power_below[n] += upstream * (n ? under * under : under);
      power_above[n] += upstream * (n ? over * over : over);
    }
    return grad;
  }

  // Adds the gradients of thresholds and gains to `grads`, (2, ORDER, 2).
  void add_to(double* grads, const Modulator<ORDER>& sigma) const {
    for (int n = 0; n < ORDER; ++n) {
      grads[2 * n] += double(sigma.gain_below[n]) * sum(slope_below[n]);
      grads[2 * n + 1] -= double(sigma.gain_above[n]) * sum(slope_above[n]);
      grads[2 * (ORDER + n)] += sum(power_below[n]);
      grads[2 * (ORDER + n) + 1] += sum(power_above[n]);
    }
  }
};

// A probability is exp(sigma - peak) * factor. Of two numbers, as their one, the logarithm of the sum, would lose the
// digits that large scores have before the point.
struct Normaliser {
  float peak;    // max sigma; 0 where no score is there
  float factor;  // 1 / sum exp(sigma - max sigma); 0 there
};

// exp(sigma(x) - max sigma) of a row of `count` scores, which may be written over.
template <int ORDER>
inline Normaliser exponentials(const float* scores, float* result, int64_t count, const Modulator<ORDER>& sigma) {
  Vec peaks = all(-INFINITE), largest = peaks, totals = {};
  each(count, [&](int64_t j, int lanes) {
    const Vec x = load(scores + j, lanes, -INFINITE), modulated = sigma(x);
    largest = x > largest ? x : largest;  // loses NaN, which peaks may lose too, but not exp(NaN)
    peaks = max(peaks, modulated);
    store(result + j, lanes, modulated);
  });
  float peak = max(peaks);
  // no score is there, or all sigma are -inf, or not a number: softmax of these is not a number
  if (!(peak > -INFINITE) && max(largest) == -INFINITE) peak = 0;
  each(count, [&](int64_t j, int lanes) {
    const Vec exponential = exp(load(result + j, lanes, -INFINITE) - peak);
    totals += exponential;
    store(result + j, lanes, exponential);
  });
  const float total = sum(totals);
  return {peak, total == 0 ? 0 : 1 / total};
}

}  // namespace multimax
