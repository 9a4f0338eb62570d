// Sparsemax, 1.5-entmax, alpha-entmax and EvSoftMax over rows of fp32 scores, and their gradients.
//
// The formulas, with c = alpha - 1, d = x - max x, t and q, are those of sparse_rows.py. Newton's method falls to the
// root t and never below it: what is 0 at one step stays 0, and the next step leaves it out. The largest q is 1.

#include "multimax.hpp"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

namespace multimax {

constexpr float SMALLEST = std::numeric_limits<float>::min();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
constexpr int MOST_STEPS = 50;  // twice what a row of 2^20 scores can need
constexpr int64_t SHORT_SUM = 1 << 10;  // scores in a partial sum
constexpr int STARTS = 3;        // steps at alpha = 1.5
constexpr int64_t FEW_SCORES = 64;  // rows up to this length take less time LANES at once

inline Vec sqrt(Vec v) {
  for (int lane = 0; lane < LANES; ++lane) v[lane] = __builtin_sqrtf(v[lane]);
  return v;
}

// log2(1 + x) for x > -1, to 3 units in the last place; `whole` is 1 + x.
//
// 1 + x = 2^n (1 + f), 1 + f in [sqrt(1/2), sqrt(2)), with the polynomial of Moshier's Cephes library (logf) times
// log2(e). Where n is 0, f is x itself, which has more digits. Here and below, the terms of a polynomial are added in
// pairs: the chain of Horner's scheme is longer than a processor looks ahead.
inline Vec log2_1p(Vec x, Vec whole) {
  IntVec bits;
  std::memcpy(&bits, &whole, sizeof bits);
  const IntVec n = (bits - 0x3f3504f3) >> 23;  // the bits of sqrt(1/2)
  bits -= n << 23;
  Vec f;
  std::memcpy(&f, &bits, sizeof f);
  f = n == 0 ? x : f - 1.f;
  const Vec f2 = f * f, f4 = f2 * f2;
  const Vec low = (f * -7.2134752044e-01f + 1.4426950409e+00f) + f2 * (f * -3.6067367356e-01f + 4.8089831581e-01f);
  const Vec middle = (f * -2.4046924135e-01f + 2.8854932006e-01f) + f2 * (f * -1.7918475606e-01f + 2.0557427321e-01f);
  const Vec high = (f * -1.6612071192e-01f + 1.6846348175e-01f) + f2 * 1.0153231271e-01f;
  const Vec y = (high * f4 + middle) * f4 + low;
  return y * f + __builtin_convertvector(n, Vec);
}

// log2(x) for x >= SMALLEST.
inline Vec log2(Vec x) { return log2_1p(x - 1.f, x); }

// 2^x for x <= 0, to 2 units in the last place; 0 below -126.5. The polynomial is that of Cephes (exp2f).
inline Vec exp2(Vec x) {
  x = max(x, all(-127.f));
  const Vec shifted = x + SHIFT, r = x - (shifted - SHIFT), r2 = r * r;
  const Vec low = (r * 6.931472028e-1f + 1.f) + r2 * (r * 5.550332471e-2f + 2.402264791e-1f);
  const Vec high = (r * 1.339887440e-3f + 9.618437357e-3f) + r2 * 1.535336188e-4f;
  return (high * (r2 * r2) + low) * power_of_2(shifted);
}

// 1 / x to 4 digits or more.
inline Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_rcp14_ps((__m512)x);
#else
  return 1.f / x;
#endif
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

// The mappings, given c: the same in all lanes, or one row per lane. power(base) gives q = base^(1/c) and its slope,
// base^(1/c-1). shrink(sum) is sum^-c. bend is (1 - c) / 2c, or 0 where its factor base^(1/c-2) may be infinite. near
// is how near t must come to its root, relative to c t. slope_of(p) is p^(1-c), and 0 for p = 0; where c is large, it
// falls so steeply to this 0 that fp32 has too few digits of a small p: a row with a base nearer to 0 than edge is
// solved again in double precision.

struct Sparsemax {
  static constexpr bool COSTLY = false, SPARSE = true;
  const Vec c = all(1.f), bend = {}, near = all(1e-6f);
  explicit Sparsemax(Vec) {}
  static Vec power(Vec base, Vec, Vec, Vec& slope) { return slope = all(1.f), base; }
  static Vec shrink(Vec sum) { return 1.f / sum; }
  static Vec slope_of(Vec p) { return p > 0.f ? all(1.f) : p; }
};

struct Entmax15 {
  static constexpr bool COSTLY = false, SPARSE = true;
  const Vec c = all(0.5f), bend = all(0.5f), near = all(1e-6f);
  explicit Entmax15(Vec) {}
  static Vec power(Vec base, Vec, Vec, Vec& slope) { return slope = base, base * base; }
  static Vec shrink(Vec sum) { return 1.f / sqrt(sum); }
  static Vec slope_of(Vec p) { return sqrt(p); }
};

struct Entmax {
  static constexpr bool COSTLY = true, SPARSE = true;
  const Vec c, reciprocal, bend, near, edge;
  explicit Entmax(Vec c)
      : c(c), reciprocal(1.f / c), bend(c > 0.55f ? Vec{} : 0.5f * (1.f - c) / c),
        near(c > 0.55f ? all(1e-6f) : all(5e-4f)),
        edge(c > 0.55f ? all(2e-3f) : c > 0.33f ? all(1e-4f) : all(-1.f)) {}
  Vec power(Vec base, Vec base_less_1, Vec inverse, Vec& slope) const {
    const Vec q = exp2(log2_1p(base_less_1, base) * reciprocal);
    slope = q * inverse;
    return q;
  }
  Vec shrink(Vec sum) const { return exp2(-c * log2(sum)); }
  Vec slope_of(Vec p) const { return p >= SMALLEST ? exp2((1.f - c) * log2(p)) : p * 0.f; }
};

// exp(d), times epsilon where a score is below the mean; the gradient is softmax's.
struct EvSoftmax {
  static constexpr bool SPARSE = false;
  explicit EvSoftmax(Vec) {}
  static Vec slope_of(Vec p) { return p; }
};

// The search for t.
template <class Mapping>
struct Root {
  const Mapping mapping;
  Vec t = all(1.f), bound = all(1.f);  // `bound` is an upper bound of t
  Vec ratio = mapping.c, change = {};  // c / t, and its change in the last step
  Vec sum, slopes, curves, earlier;

  explicit Root(Vec c) : mapping(c) { clear(); }

  void clear() { sum = slopes = curves = earlier = Vec{}; }

  // Call it now and then: short sums round less. Slopes and curves need not be so exact.
  void carry() { earlier += sum, sum = Vec{}; }

  // q from d, a score minus the maximum of its row; adds to the sums.
  Vec add(Vec d, Vec& inverse) {
    const Vec base_less_1 = ratio * d, base = 1.f + base_less_1;
    inverse = reciprocal(base > 0.f ? base : all(1.f));  // 1 / 0 would put NaN into the sums
    Vec slope, q = mapping.power(base, base_less_1, inverse, slope);
    q = base > 0.f ? q : Vec{};
    slope = base > 0.f ? slope : Vec{};
    sum += q, slopes += slope, curves += slope * inverse;
    return q;
  }

  // When all scores are added: moves t to the root, and returns the lanes where it was not yet near enough. Newton's
  // step bounds t, since N is convex; Halley's, which also uses the second derivative, comes nearer.
  IntVec step() {
    sum = max(sum, all(1.f));  // less only in a row without scores
    const Vec goal = mapping.shrink(sum), error = t - goal, newton = error * sum / slopes;
    const Vec tolerance = max(mapping.near * mapping.c, all(1.2e-7f)) * goal;
    const Vec curve = mapping.bend * newton * (curves / slopes - slopes / sum) / t;
    bound = min(bound, t - newton + 1e-4f * max(newton, -newton));
    t -= newton / max(1.f - curve, all(0.5f));
    t = min(t, bound);
    change = mapping.c / t - ratio;
    ratio += change;
    return (error > tolerance) | (error < -tolerance);
  }

  // q after the last step; where the power is costly, from q before it by two terms of its series. Adds to the sum.
  Vec settle(Vec q, Vec d, Vec inverse) {
    if (Mapping::COSTLY) {
      const Vec y = change / mapping.c * d * inverse;
      q = 1.f + ratio * d > 0.f ? q + q * y * (1.f + (0.5f - 0.5f * mapping.c) * y) : Vec{};
    }
    sum += q;
    return q;
  }
};

// Bits for the lanes where a score is near the edge of the support; d and ratio as in Root.
inline uint32_t near_edge(Vec d, Vec ratio, Vec edge) {
  const Vec base = 1.f + ratio * d;
  return ~lanes_above(max(base, -base), edge) & ((1u << LANES) - 1);
}

// Probabilities of a row, for c < 1, from a t near the root.
inline void solve_in_double(const float* scores, float* probabilities, int64_t width, double c, double t) {
  const double largest = *std::max_element(scores, scores + width);
  const auto base = [&](int64_t j) { return std::max(t + c * (scores[j] - largest), 0.); };
  double change = 1;
  for (int steps = 0; steps < MOST_STEPS && std::abs(change) > 1e-15; ++steps, t -= change) {
    double sum = 0, slopes = 0;
    for (int64_t j = 0; j < width; ++j) {
      if (base(j) == 0) continue;
      const double q = std::pow(base(j), 1 / c);
      sum += q, slopes += q / base(j);
    }
    change = c * (sum - 1) / slopes;
  }
  for (int64_t j = 0; j < width; ++j) probabilities[j] = base(j) == 0 ? 0 : float(std::pow(base(j), 1 / c));
}

// `room` is scratch of 3 (width + LANES) numbers.
template <class Mapping>
void project_row(const float* scores, float* probabilities, int64_t width, float c, float* room) {
  float *left = room, *q = left + width + LANES, *inverse = q + width + LANES;
  Vec peaks = all(LOWEST);
  uint32_t wrong = 0;  // a score is NaN or +inf
  each(width, [&](int64_t j, auto lanes) {
    const Vec x = load(scores + j, lanes, -INFINITE);
    wrong |= lanes_above(x, all(-LOWEST)), peaks = max(x, peaks);
  });
  const float largest = max(peaks);
  Root<Mapping> root(all(c));
  float limit = -1 / root.mapping.c[0];
  int64_t count = 0;
  each(width, [&](int64_t j, auto lanes) {
    const Vec d = load(scores + j, lanes, -INFINITE) - largest;
    const uint32_t above = lanes_above(d, all(limit));
    compress(left + count, d, above), count += __builtin_popcount(above);
  });
  for (int steps = 0;; ++steps) {
    store(left + count, AllLanes{}, all(-INFINITE));
    root.clear();
    for (int64_t j = 0; j < count; j += LANES) {
      Vec inverses;
      store(q + j, AllLanes{}, root.add(load(left + j, AllLanes{}, 0), inverses));
      if (Mapping::COSTLY) store(inverse + j, AllLanes{}, inverses);
      if (j % SHORT_SUM == 0) root.carry();
    }
    root.sum = all(sum(root.sum + root.earlier));
    root.slopes = all(sum(root.slopes)), root.curves = all(sum(root.curves));
    if (!root.step()[0] || steps == MOST_STEPS) break;
    limit = -root.bound[0] / root.mapping.c[0];
    const int64_t before = count;
    count = 0;
    for (int64_t j = 0; j < before; j += LANES) {
      const Vec d = load(left + j, AllLanes{}, 0);
      const uint32_t above = lanes_above(d, all(limit));
      compress(left + count, d, above), count += __builtin_popcount(above);
    }
  }
  root.clear();
  for (int64_t j = 0; j < count; j += LANES) {
    const Vec d = load(left + j, AllLanes{}, 0), inverses = load(inverse + j, AllLanes{}, 0);
    store(q + j, AllLanes{}, root.settle(load(q + j, AllLanes{}, 0), d, inverses));
    if (j % SHORT_SUM == 0) root.carry();
  }
  const float total = sum(root.sum + root.earlier), factor = wrong ? NOT_A_NUMBER : total == 0 ? 0 : 1 / total;
  uint32_t steep = 0;
  each(width, [&](int64_t j, auto lanes) {
    const Vec d = load(scores + j, lanes, -INFINITE) - largest;
    const uint32_t above = lanes_above(d, all(limit));
    store(probabilities + j, lanes, factor * expand(q, above)), q += __builtin_popcount(above);
    if constexpr (Mapping::COSTLY) steep |= near_edge(d, root.ratio, root.mapping.edge);
  });
  if (steep && !wrong) solve_in_double(scores, probabilities, width, c, root.t[0]);
}

// Swaps the off-diagonal blocks of HALF rows and HALF columns.
template <int HALF, int... LANE>
inline void swap_blocks(Vec& a, Vec& b, std::integer_sequence<int, LANE...>) {
  const Vec first = {(LANE & HALF ? b[LANE & ~HALF] : a[LANE])...};
  b = Vec{(LANE & HALF ? b[LANE] : a[LANE | HALF])...};
  a = first;
}

// Transposes LANES rows of LANES numbers.
template <int HALF = LANES / 2>
inline void transpose(Vec* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) {
    if (!(i & HALF)) swap_blocks<HALF>(rows[i], rows[i + HALF], std::make_integer_sequence<int, LANES>{});
  }
  if constexpr (HALF > 1) transpose<HALF / 2>(rows);
}

// `height` rows at once, at most LANES. Each lane of a vector belongs to one row.
template <class Mapping>
void project_rows_abreast(const float* scores, float* probabilities, int64_t width, Vec c, int height) {
  Vec d[FEW_SCORES], q[FEW_SCORES], inverse[FEW_SCORES], peaks = all(LOWEST);
  IntVec wrong = {};  // a score is NaN or +inf
  for (int64_t start = 0; start < width; start += LANES) {
    const int lanes = width - start < LANES ? int(width - start) : LANES;
    for (int i = 0; i < LANES; ++i) {
      d[start + i] = i < height ? load(scores + i * width + start, lanes, -INFINITE) : all(-INFINITE);
    }
    transpose(d + start);
  }
  for (int64_t j = 0; j < width; ++j) wrong |= ~(d[j] <= -LOWEST), peaks = max(d[j], peaks);
  for (int64_t j = 0; j < width; ++j) d[j] -= peaks;
  Root<Mapping> root(c);
  if constexpr (Mapping::COSTLY) {
    // Start near the root, by way of alpha = 1.5, whose powers are cheap: the logarithm of the largest probability
    // falls about linearly with c.
    Root<Entmax15> start(c);
    for (int steps = 0; steps < STARTS; ++steps) {
      start.clear();
      for (int64_t j = 0; j < width; ++j) start.add(d[j], inverse[j]);
      start.step();
    }
    root.t = exp2(2.f * c * (1.4f - 0.8f * c) * log2(start.t)), root.ratio = c / root.t;
  }
  for (int steps = 0;; ++steps) {
    root.clear();
    for (int64_t j = 0; j < width; ++j) q[j] = root.add(d[j], inverse[j]);
    if (!lanes_above(__builtin_convertvector(-root.step(), Vec), Vec{}) || steps == MOST_STEPS) break;
  }
  root.sum = Vec{};
  for (int64_t j = 0; j < width; ++j) q[j] = root.settle(q[j], d[j], inverse[j]);
  const Vec factor = wrong ? all(NOT_A_NUMBER) : root.sum > 0.f ? 1.f / root.sum : Vec{};
  uint32_t steep = 0;
  if constexpr (Mapping::COSTLY) {
    for (int64_t j = 0; j < width; ++j) steep |= near_edge(d[j], root.ratio, root.mapping.edge);
  }
  for (int64_t start = 0; start < width; start += LANES) {
    const int lanes = width - start < LANES ? int(width - start) : LANES;
    for (int i = 0; i < LANES; ++i) q[start + i] *= factor;
    transpose(q + start);
    for (int i = 0; i < height; ++i) store(probabilities + i * width + start, lanes, q[start + i]);
  }
  for (int i = 0; i < height; ++i) {
    if (!(steep >> i & 1) || wrong[i]) continue;
    solve_in_double(scores + i * width, probabilities + i * width, width, c[i], root.t[i]);
  }
}

void evsoftmax_row(const float* scores, float* probabilities, int64_t width, float epsilon) {
  Vec peaks = all(LOWEST), sums = {}, counts = {}, totals = {};
  each(width, [&](int64_t j, auto lanes) {
    const Vec x = load(scores + j, lanes, -INFINITE);
    peaks = max(x, peaks);
    sums += x > -INFINITE ? x : Vec{};
    counts += x > -INFINITE ? all(1.f) : Vec{};
  });
  // the largest is kept even if rounding puts the mean above it
  const float largest = max(peaks), mean = sum(sums) / sum(counts), from = mean > largest ? largest : mean;
  each(width, [&](int64_t j, auto lanes) {
    const Vec x = load(scores + j, lanes, -INFINITE);
    const Vec weighted = exp(x - largest) * (x < from ? all(epsilon) : all(1.f));
    totals += weighted;
    store(probabilities + j, lanes, weighted);
  });
  const float total = sum(totals), factor = total == 0 ? 0 : 1 / total;
  each(width, [&](int64_t j, auto lanes) {
    store(probabilities + j, lanes, factor * load(probabilities + j, lanes, 0));
  });
}

// `parameters` is c, or the epsilon of EvSoftMax: one per row, or one for all (stride 0).
template <class Mapping>
void project_rows(int64_t rows, int64_t width, int threads, const float* scores, const float* parameters,
                  int64_t stride, float* probabilities) {
  share(rows, threads, [&](int64_t first, int64_t last, int64_t) {
    std::vector<float> room(3 * (width + LANES));
    for (int64_t row = first; row < last;) {
      const float* x = scores + row * width;
      float* p = probabilities + row * width;
      const int height = width > FEW_SCORES || !Mapping::SPARSE ? 1 : last - row < LANES ? int(last - row) : LANES;
      if constexpr (!Mapping::SPARSE) {
        evsoftmax_row(x, p, width, parameters[row * stride]);
      } else if (height == 1) {
        project_row<Mapping>(x, p, width, parameters[row * stride], room.data());
      } else {
        Vec c = all(1.f);
        for (int i = 0; i < height; ++i) c[i] = parameters[(row + i) * stride];
        project_rows_abreast<Mapping>(x, p, width, c, height);
      }
      row += height;
    }
  });
}

// (exp(x) - 1 - x) / x^2 for x in [0, 1], to 1 unit in the last place: its series.
inline Vec bent(Vec x) {
  Vec y = x * 2.087675699e-9f + 2.505210839e-8f;
  y = y * x + 2.755731922e-7f;
  y = y * x + 2.755731922e-6f;
  y = y * x + 2.480158730e-5f;
  y = y * x + 1.984126984e-4f;
  y = y * x + 1.388888889e-3f;
  y = y * x + 8.333333333e-3f;
  y = y * x + 4.166666667e-2f;
  y = y * x + 1.666666667e-1f;
  return y * x + 0.5f;
}

// dL/dx = s (g - sum s g / sum s), s = p^(1-c), of `count` scores; `result` may be `p`.
//
// Where `grad_of_c` is not null also dL/dc, by the formula of entmax_rows_backward_of_c in sparse_rows.py.
template <class Mapping>
inline void backward_row(const float* p, const float* g, float* result, int64_t count, float c, float* grad_of_c) {
  const Mapping mapping(all(c));
  const float reciprocal_of_c = 1 / c;
  Vec slopes = {}, products = {}, logs = {}, linear_products = {}, bends = {}, bend_products = {};
  each(count, [&](int64_t j, auto lanes) {
    const Vec y = load(p + j, lanes, 0), grad = load(g + j, lanes, 0), slope = mapping.slope_of(y);
    slopes += slope, products += slope * grad;
    if (grad_of_c) {
      const Vec l = y >= SMALLEST ? 0.693147181f * log2(y) : Vec{}, x = -c * l, pl = y * l;
      const Vec bend = x < 1.f ? pl * l * bent(x) : ((slope - y) * reciprocal_of_c + pl) * reciprocal_of_c;
      logs += pl, linear_products += grad * (y - c * pl), bends += bend, bend_products += grad * bend;
    }
    store(result + j, lanes, slope);
  });
  const float total = sum(slopes), inverse = total == 0 ? 0 : 1 / total, mean = sum(products) * inverse;
  each(count, [&](int64_t j, auto lanes) {
    store(result + j, lanes, load(result + j, lanes, 0) * (load(g + j, lanes, 0) - mean));
  });
  if (grad_of_c) {
    *grad_of_c = (sum(bends) * sum(linear_products) - (1 - c * sum(logs)) * sum(bend_products)) * inverse;
  }
}

template <class Mapping>
void backward_rows(int64_t rows, int64_t width, int threads, const float* probabilities, const float* grad,
                   const float* parameters, int64_t stride, float* grad_scores, float* grads_of_c) {
  share(rows, threads, [&](int64_t first, int64_t last, int64_t) {
    std::vector<float> room(2 * (width + LANES));
    float *left = room.data(), *grad_left = left + width + LANES;
    for (int64_t row = first; row < last; ++row) {
      const float *p = probabilities + row * width, *g = grad + row * width, c = parameters[row * stride];
      float *result = grad_scores + row * width, *grad_of_c = grads_of_c ? grads_of_c + row : nullptr;
      if (!Mapping::SPARSE || width <= FEW_SCORES) {
        backward_row<Mapping>(p, g, result, width, c, grad_of_c);
        continue;
      }
      int64_t count = 0;
      each(width, [&](int64_t j, auto lanes) {
        const Vec y = load(p + j, lanes, 0);
        const uint32_t above = lanes_above(y, Vec{});
        compress(left + count, y, above);
        compress(grad_left + count, load(g + j, lanes, 0), above);
        count += __builtin_popcount(above);
      });
      backward_row<Mapping>(left, grad_left, left, count, c, grad_of_c);
      const float* from = left;
      each(width, [&](int64_t j, auto lanes) {
        const uint32_t above = lanes_above(load(p + j, lanes, 0), Vec{});
        store(result + j, lanes, expand(from, above));
        from += __builtin_popcount(above);
      });
    }
  });
}

// Calls body with the mapping at place `kind` of KERNELS in sparse.py; only its type matters.
template <class Body>
inline void with_mapping(int64_t kind, Body body) {
  const Vec any = all(1.f);
  if (kind == 0) return body(Sparsemax(any));
  if (kind == 1) return body(Entmax15(any));
  kind == 2 ? body(Entmax(any)) : body(EvSoftmax(any));
}

}  // namespace multimax

extern "C" {

// scores, probabilities: (rows, width). parameters: (rows,), or one number with stride 0.
void sparse_rows(int64_t kind, int64_t rows, int64_t width, int64_t threads, const float* scores,
                 const float* parameters, int64_t stride, float* probabilities) {
  multimax::with_mapping(kind, [&](auto mapping) {
    multimax::project_rows<decltype(mapping)>(rows, width, threads, scores, parameters, stride, probabilities);
  });
}

// grad, grad_scores: dL/dp and dL/dx, (rows, width). grads_of_c: dL/dc, (rows,), or null.
void sparse_rows_backward(int64_t kind, int64_t rows, int64_t width, int64_t threads, const float* probabilities,
                          const float* grad, const float* parameters, int64_t stride, float* grad_scores,
                          float* grads_of_c) {
  multimax::with_mapping(kind, [&](auto mapping) {
    multimax::backward_rows<decltype(mapping)>(rows, width, threads, probabilities, grad, parameters, stride,
                                               grad_scores, grads_of_c);
  });
}
}
