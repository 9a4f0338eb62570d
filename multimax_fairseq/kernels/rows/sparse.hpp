// Sparsemax, 1.5-entmax and alpha-entmax of rows of fp32 scores; mappings.hpp says what these classes have.
//
// With c = alpha - 1 and d = x - max x, they are p = max(t + c d, 0)^(1/c) for the t in (0, 1] that makes sum p = 1.
// Sources: the gradients, Peters, Niculae & Martins 2019, and that of alpha, Correia, Niculae & Martins 2019.

#pragma once

#include "softmax.hpp"

#include <algorithm>
#include <utility>

namespace multimax {

constexpr float SMALLEST = std::numeric_limits<float>::min();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
constexpr int MOST_STEPS = 50;  // twice what a row of 2^20 scores can need
constexpr int64_t SHORT_SUM = 1 << 10;  // scores in a partial sum
constexpr float EDGE = 2e-3f;  // the largest edge of a power
constexpr float SLACK = 1.5f * EDGE;  // of t, in what is kept: a row computed again has the same scores near an edge
constexpr int64_t FEW_SCORES = 64;  // rows up to this length take less time LANES at once

// The largest score of a row, or the lowest number, if there is none. `wrong`: a score is NaN or +inf.
inline float largest(const float* scores, int64_t count, bool& wrong) {
  Vec peaks = all(LOWEST);
  uint32_t above = 0;
  each(count, [&](int64_t j, auto lanes) {
    const Vec x = load(scores + j, lanes, -INFINITE);
    above |= lanes_above(x, all(-LOWEST)), peaks = max(x, peaks);
  });
  wrong = above;
  return max(peaks);
}

// Writes d = x - peak where it is above `limit` side by side, and then LANES times -inf; returns how many there are.
inline int64_t keep(const float* scores, float peak, float limit, int64_t count, float* left) {
  int64_t kept = 0;
  each(count, [&](int64_t j, auto lanes) {
    const Vec d = load(scores + j, lanes, -INFINITE) - peak;
    const uint32_t above = lanes_above(d, all(limit));
    compress(left + kept, d, above), kept += __builtin_popcount(above);
  });
  store(left + kept, AllLanes{}, all(-INFINITE));
  return kept;
}

inline Vec sqrt(Vec v) {
  for (int lane = 0; lane < LANES; ++lane) v[lane] = __builtin_sqrtf(v[lane]);
  return v;
}

// log2(x) for x >= SMALLEST, to 3 units in the last place. Where x is near 1, `less_1`, x - 1, may have more digits.
//
// x = 2^n (1 + f), 1 + f in [sqrt(1/2), sqrt(2)), with a minimax polynomial, to 2^-25. Here and below, even and odd
// terms are added apart: the chain of Horner's scheme is longer than a processor looks ahead.
template <bool HAS_LESS_1 = false>
inline Vec log2(Vec x, Vec less_1 = Vec{}) {
  IntVec bits;
  std::memcpy(&bits, &x, sizeof bits);
  const IntVec n = (bits - 0x3f3504f3) >> 23;  // the bits of sqrt(1/2)
  bits -= n << 23;
  Vec f;
  std::memcpy(&f, &bits, sizeof f);
  f -= 1.f;
  if (HAS_LESS_1) f = n == 0 ? less_1 : f;
  const Vec f2 = f * f;
  const Vec odd = ((f2 * -2.068820270e-1f - 2.389980757e-1f) * f2 - 3.607015810e-1f) * f2 - 7.213473709e-1f;
  Vec even = ((f2 * 1.259197141e-1f + 2.154901224e-1f) * f2 + 2.879509499e-1f) * f2 + 4.809090609e-1f;
  even = even * f2 + 1.442695022f;
  return (odd * f + even) * f + __builtin_convertvector(n, Vec);
}

// 2^x for x <= 0, to 2 units in the last place; 0 below -126.5. The polynomial is that of Cephes (exp2f).
inline Vec exp2(Vec x) {
  x = max(x, all(-127.f));
  const Vec shifted = x + SHIFT, r = x - (shifted - SHIFT), r2 = r * r;
  const Vec odd = (r2 * 1.339887440e-3f + 5.550332471e-2f) * r2 + 6.931472028e-1f;
  const Vec even = ((r2 * 1.535336188e-4f + 9.618437357e-3f) * r2 + 2.402264791e-1f) * r2 + 1.f;
  return (odd * r + even) * power_of_2(shifted);
}

// 1 / x to 4 digits or more.
inline Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_rcp14_ps((__m512)x);
#else
  return 1.f / x;
#endif
}

// What 1.5-entmax and alpha-entmax differ in. power(base, base - 1) gives q = base^(1/c), for base > 0; derivatives()
// gives q, q / base and q / base^2, and 0 where base is not above 0. shrink(sum) is sum^-c. bend is (1 - c) / 2c^2,
// or 0 where its factor base^(1/c-2) may be infinite. near is how near t must come to its root, relative to c t.
// slope_of(p) is p^(1-c), and 0 for p = 0; where c is large, it falls so steeply to this 0 that fp32 has too few
// digits of a small p: a row with a base nearer to 0 than edge is solved again in double precision.

struct Derivatives {
  Vec q, slope, curve;  // base^(1/c), base^(1/c-1), base^(1/c-2)
};

template <int EXPONENT>
struct WholePower {
  static constexpr bool IS_COSTLY = false;
  const Vec c = all(1.f / EXPONENT), bend = all(0.5f * (EXPONENT - 1) * EXPONENT), near = all(1e-6f);
  const Vec edge = all(EXPONENT > 1 ? -1.f : 1e-5f);
  explicit WholePower(const float* = nullptr) {}
  static Vec power(Vec base, Vec, int exponent = EXPONENT) {
    Vec q = base;
    while (--exponent > 0) q *= base;
    return q;
  }
  static Derivatives derivatives(Vec base, Vec) {
    const Vec b = max(base, Vec{}), present = base > 0.f ? all(1.f) : Vec{};
    const Vec curve = EXPONENT == 2 ? present : power(b, b, EXPONENT - 2);  // where EXPONENT is 1, bend is 0
    const Vec slope = EXPONENT == 1 ? present : curve * b;
    return {slope * b, slope, curve};
  }
  Vec shrink(Vec sum) const { return EXPONENT > 2 ? exp2(-c * log2(sum)) : 1.f / (EXPONENT == 2 ? sqrt(sum) : sum); }
  static Vec slope_of(Vec p) { return EXPONENT == 2 ? sqrt(p) : p > 0.f ? all(1.f) : p; }  // NaN stays
};

struct AnyPower {
  static constexpr bool IS_COSTLY = true;
  const Vec c, reciprocal_of_c, bend, near, edge;
  explicit AnyPower(const float* number)
      : c(all(*number)), reciprocal_of_c(1.f / c), bend(c > 0.55f ? Vec{} : 0.5f * (1.f - c) / (c * c)),
        near(c > 0.501f ? all(1e-6f) : c > 0.4f ? all(8e-3f) : all(2e-2f)),
        edge(c > 0.55f ? all(EDGE) : c > 0.33f ? all(1e-4f) : all(-1.f)) {}
  Vec power(Vec base, Vec base_less_1) const { return exp2(log2<true>(base, base_less_1) * reciprocal_of_c); }
  Derivatives derivatives(Vec base, Vec base_less_1) const {
    const Vec inverse = reciprocal(base > 0.f ? base : all(1.f));  // 1 / 0 would put NaN into the sums
    const Vec q = base > 0.f ? power(base, base_less_1) : Vec{}, slope = q * inverse;
    return {q, slope, slope * inverse};
  }
  Vec shrink(Vec sum) const { return exp2(-c * log2(sum)); }
  Vec slope_of(Vec p) const { return p >= SMALLEST ? exp2((1.f - c) * log2(p)) : p * 0.f; }
};

template <class Power>
inline Vec q_of(const Power& power, Vec base, Vec base_less_1) {
  return base > 0.f ? power.power(base, base_less_1) : Vec{};
}

// The search for t, the same in all lanes or a row in each. t is the root of N(t) - 1 with the norm N(t) = (sum max(t
// + c d, 0)^(1/c))^c. That is convex and nearly straight, so Newton's method from t = 1 falls to the root in a few
// steps and never below it: what is 0 at one step stays 0, and the next step leaves it out. With q = max(1 + (c / t)
// d, 0)^(1/c), whose largest is 1, digits are kept where c is small. Newton's method on a norm is ours.
//
//   p = q / sum q        t <- t - (t - (sum q)^-c) sum q / sum q^(1-c)
template <class Power>
struct Root {
  const Power power;
  Vec t = all(1.f), bound = all(1.f);  // `bound` is an upper bound of t
  Vec ratio = power.c;                 // c / t
  Vec sum, slopes, curves, earlier;

  explicit Root(const Power& power = Power()) : power(power) { clear(); }

  void clear() { sum = slopes = curves = earlier = Vec{}; }

  // From log2 of the largest probability.
  void start(Vec log) { t = exp2(power.c * log), ratio = power.c / t; }

  // Call it now and then: short sums round less. Slopes and curves need not be so exact.
  void carry() { earlier += sum, sum = Vec{}; }

  // Adds to the sums.
  void add(Vec d) {
    const Vec base_less_1 = ratio * d;
    const Derivatives at = power.derivatives(1.f + base_less_1, base_less_1);
    sum += at.q, slopes += at.slope, curves += at.curve;
  }

  // When all scores are added: moves t to the root; false if it was near enough in all lanes. Newton's step bounds t,
  // since N is convex; Halley's, which also uses the second derivative, comes nearer.
  bool step() {
    sum = max(sum, all(1.f)), slopes = max(slopes, all(0.5f));  // less only in a row without scores
    const Vec goal = power.shrink(sum), error = t - goal, inverse = 1.f / slopes, newton = error * sum * inverse;
    const Vec tolerance = max(power.near * power.c, all(1.2e-7f)) * goal;
    const Vec curve = power.bend * ratio * error * (curves * inverse * (sum * inverse) - 1.f);
    bound = min(bound, t - newton + 1e-4f * max(newton, -newton));
    t = min(t - newton / max(1.f - curve, all(0.5f)), bound);
    ratio = power.c / t;
    return lanes_above(max(error, -error), tolerance);
  }

  // The same, where all lanes have scores of one row.
  bool step_together() {
    sum = all(multimax::sum(sum + earlier)), slopes = all(multimax::sum(slopes)), curves = all(multimax::sum(curves));
    return step();
  }
};

// Moves t to the root. step(roots...) adds all scores to each and steps: one computes while another waits.
//
// Where powers are costly, it starts from the roots for the two whole 1/c around, whose powers are products: between
// them, the logarithm of the largest probability, t^(1/c), is about linear in log c, which is taken to second order.
template <class Power, class Step, int EXPONENT = 1>
void search(Root<Power>& root, Step step) {
  if constexpr (Power::IS_COSTLY) {
    if constexpr (EXPONENT < 4) {
      if (root.power.c[0] * (EXPONENT + 1) < 1.0001f) return search<Power, Step, EXPONENT + 1>(root, step);
    }
    Root<WholePower<EXPONENT>> below;
    Root<WholePower<EXPONENT + 1>> above;
    step(below, above), step(below, above);
    const Vec log = float(EXPONENT) * log2(below.t);
    const Vec change = float(EXPONENT + 1) * log2(above.t) - log;
    const Vec part = (1.f - root.power.c * float(EXPONENT)) * float(EXPONENT + 1);  // above 1 beyond the last pair
    root.start(log + change * (part - part * max(1.f - part, Vec{}) * (1.f / (2 * EXPONENT + 1))));
  }
  for (int steps = 0; steps < MOST_STEPS && step(root); ++steps) {}
}

// Probabilities from d, for c < 1 and a t near the root. What is 0 but for rounding is 0.
inline void solve_in_double(const float* d, int64_t count, double c, double t, float* p) {
  const auto base = [&](int64_t j) {
    const double base = t + c * d[j];
    return base > 1e-14 ? base : 0;
  };
  double change = 1;
  for (int steps = 0; steps < MOST_STEPS && std::abs(change) > 1e-12; ++steps, t -= change) {
    double sum = 0, slopes = 0;
    for (int64_t j = 0; j < count; ++j) {
      if (base(j) == 0) continue;
      const double q = std::pow(base(j), 1 / c);
      sum += q, slopes += q / base(j);
    }
    change = c * (sum - 1) / slopes;
  }
  for (int64_t j = 0; j < count; ++j) p[j] = base(j) == 0 ? 0 : float(std::pow(base(j), 1 / c));
}

// Swaps the off-diagonal blocks of HALF rows and HALF columns.
template <int HALF, int... LANE>
inline void swap_blocks(Vec& a, Vec& b, std::integer_sequence<int, LANE...>) {
#if defined(__clang__)
  const Vec first = __builtin_shufflevector(a, b, (LANE & HALF ? LANES + (LANE & ~HALF) : LANE)...);
  b = __builtin_shufflevector(a, b, (LANE & HALF ? LANES + LANE : LANE | HALF)...);
#else
  const Vec first = __builtin_shuffle(a, b, IntVec{(LANE & HALF ? LANES + (LANE & ~HALF) : LANE)...});
  b = __builtin_shuffle(a, b, IntVec{(LANE & HALF ? LANES + LANE : LANE | HALF)...});
#endif
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

// (exp(x) - 1 - x) / x^2 for x in [0, 1], to 2 units in the last place: a minimax polynomial.
inline Vec bent(Vec x) {
  const Vec x2 = x * x;
  const Vec odd = (x2 * 1.810847316e-4f + 8.329113945e-3f) * x2 + 1.666666269e-1f;
  const Vec even = ((x2 * 3.671581726e-5f + 1.400926150e-3f) * x2 + 4.166736454e-2f) * x2 + 0.5f;
  return odd * x + even;
}

// alpha-entmax, alpha = 1 + c.
template <class Power, bool IS_LEARNED = false>
class Entmax {
 public:
  static constexpr bool ROWS_ABREAST = true;
  static constexpr int NUMBERS = IS_LEARNED;
  struct Sums {
    Doubles c = {};  // dL/dc, a part in each lane
  };

  Entmax(const float* c, const float*) : power(c) {}

  // The probabilities of `height` rows, at most LANES, of up to FEW_SCORES scores, each in a lane of its own. Returns
  // a bit for each row that has to be computed alone: those with NaN, +inf or a base near 0.
  __attribute__((flatten)) uint32_t forward_abreast(const float* scores, float* p, int64_t width, int height) const {
    const Power power = this->power;
    Vec d[FEW_SCORES], q[FEW_SCORES], peaks = all(LOWEST), totals = {}, nearest = all(1.f);
    uint32_t alone = 0;
    for (int64_t start = 0; start < width; start += LANES) {
      const int lanes = std::min(int64_t(LANES), width - start);
      for (int i = 0; i < LANES; ++i) {
        d[start + i] = i < height ? load(scores + i * width + start, lanes, -INFINITE) : all(-INFINITE);
      }
      transpose(d + start);
    }
    for (int64_t j = 0; j < width; ++j) alone |= lanes_above(d[j], all(-LOWEST)), peaks = max(d[j], peaks);
    for (int64_t j = 0; j < width; ++j) d[j] -= peaks;
    Root<Power> root(power);
    search(root, [&](auto&... roots) {
      (roots.clear(), ...);
      for (int64_t j = 0; j < width; ++j) (roots.add(d[j]), ...);
      return (roots.step() | ...);
    });
    for (int64_t j = 0; j < width; ++j) {
      const Vec base_less_1 = root.ratio * d[j], base = 1.f + base_less_1;
      totals += q[j] = q_of(power, base, base_less_1);
      nearest = min(nearest, max(base, -base));
    }
    alone |= ~lanes_above(nearest, power.edge);
    const Vec factor = totals > 0.f ? 1.f / totals : Vec{};
    for (int64_t start = 0; start < width; start += LANES) {
      for (int i = 0; i < LANES; ++i) q[start + i] *= factor;
      transpose(q + start);
      for (int i = 0; i < height; ++i) {
        store(p + i * width + start, int(std::min(int64_t(LANES), width - start)), q[start + i]);
      }
    }
    return alone & ((1u << height) - 1);
  }

  __attribute__((flatten)) State forward(const float* scores, float* p, int64_t count, float* room) const {
    bool wrong;
    State state = {largest(scores, count, wrong), 0, 1};
    Root<Power> root(power);
    const float c = power.c[0];
    float limit = -(1 + SLACK) / c, *q = room + count + LANES;
    int64_t kept = keep(scores, state.peak, limit, count, room);
    search(root, [&](auto& first, auto&... others) {
      (first.clear(), ..., others.clear());
      for (int64_t j = 0; j < kept; j += LANES) {
        const Vec d = load(room + j, AllLanes{}, 0);
        (first.add(d), ..., others.add(d));
        if (j % SHORT_SUM == 0) (first.carry(), ..., others.carry());
      }
      const bool is_far = (first.step_together() | ... | others.step_together());
      if (is_far) {  // (1 - t) / c falls as c rises, and the first has the c of the row, or a larger one
        limit = std::max(limit, (1 - first.bound[0]) / first.power.c[0] - (1 + SLACK) / c);
        kept = keep(room, 0, limit, kept, room);
      }
      return is_far;
    });
    state.cut = root.ratio[0];
    const float total = probabilities(room, kept, state, q);
    state.factor = wrong ? NOT_A_NUMBER : total == 0 ? 0 : 1 / total;
    if constexpr (Power::IS_COSTLY) {
      spread(scores, state, limit, q, count, p);
    } else {
      again(scores, state, p, count, room);
    }
    return state;
  }

  void again(const float* scores, State state, float* p, int64_t count, float* room) const {
    if constexpr (Power::IS_COSTLY) {
      const float limit = -(1 + SLACK) / state.cut;
      float* q = room + count + LANES;
      probabilities(room, keep(scores, state.peak, limit, count, room), state, q);
      spread(scores, state, limit, q, count, p);
    } else {
      each(count, [&](int64_t j, auto lanes) {
        const Vec base_less_1 = state.cut * (load(scores + j, lanes, -INFINITE) - state.peak);
        store(p + j, lanes, state.factor * q_of(power, 1.f + base_less_1, base_less_1));
      });
    }
  }

  // dL/dx = s (g - m), m = sum s g / sum s, s = p^(1-c).
  //
  // dL/dc is the formula of Correia, Niculae & Martins without its differences of size c^2. With l = log p and
  // B = exp(-c l) - 1 + c l, about (c l)^2 / 2 near c = 0, it is - sum (p B - k s) (g - m) / c^2 for any k. With k =
  // sum p B / sum s, an error of m has no part in it.
  void backward(const float*, const float* p, const float* grad, float* grad_scores, int64_t count, Sums& sums,
                float* room) const {
    float *s = room, *p_left = s + count + LANES, *grad_left = p_left + count + LANES;
    if (!Power::IS_COSTLY) {
      slopes(p, count, s, nullptr);
      return finish(s, nullptr, grad, grad_scores, count, sums);
    }
    int64_t kept = 0;  // what has a probability, side by side
    each(count, [&](int64_t j, auto lanes) {
      const Vec y = load(p + j, lanes, 0);
      const uint32_t above = lanes_above(y, Vec{});
      compress(p_left + kept, y, above), compress(grad_left + kept, load(grad + j, lanes, 0), above);
      kept += __builtin_popcount(above);
    });
    slopes(p_left, kept, s, p_left);
    finish(s, p_left, grad_left, s, kept, sums);
    each(count, [&](int64_t j, auto lanes) {
      const uint32_t above = lanes_above(load(p + j, lanes, 0), Vec{});
      store(grad_scores + j, lanes, expand(s, above)), s += __builtin_popcount(above);
    });
  }

  // The same of `height` rows, at most LANES, of up to FEW_SCORES scores: the powers of all of them in one loop.
  void backward_abreast(const float* p, const float* grad, float* grad_scores, int64_t width, int height,
                        Sums& sums) const {
    float s[LANES * FEW_SCORES], bends[LANES * FEW_SCORES];
    slopes(p, height * width, s, bends);
    for (int64_t at = 0; at < height * width; at += width) {
      finish(s + at, bends + at, grad + at, grad_scores + at, width, sums);
    }
  }

  void add(Sums sums, double* grads) const {
    if constexpr (IS_LEARNED) *grads += sum(sums.c);
  }

 private:
  const Power power;

  // Writes s, and p B, if alpha is learned, both 0 where p is. p and bends may be the same.
  void slopes(const float* p, int64_t count, float* s, float* bends) const {
    const Power power = this->power;
    each(count, [&](int64_t j, auto lanes) {
      const Vec y = load(p + j, lanes, 0), slope = power.slope_of(y);
      store(s + j, lanes, slope);
      if constexpr (IS_LEARNED) {
        const Vec x = -0.693147181f * power.c * log2(y), px = y * x;  // p = 0 makes px 0, as this log2 is finite
        store(bends + j, lanes, x < 1.f ? px * (x * bent(x)) : slope - y - px);
      }
    });
  }

  // Writes dL/dx and adds dL/dc, from s, p B and dL/dp. grad_scores may be s or grad.
  void finish(const float* s, const float* bends, const float* grad, float* grad_scores, int64_t count,
              Sums& sums) const {
    Vec totals = {}, products = {}, all_bends = {}, bent_products = {};
    each(count, [&](int64_t j, auto lanes) {
      const Vec slope = load(s + j, lanes, 0);
      totals += slope, products += slope * load(grad + j, lanes, 0);
      if constexpr (IS_LEARNED) all_bends += load(bends + j, lanes, 0);
    });
    const float total = sum(totals), inverse = total == 0 ? 0 : 1 / total;
    const float mean = sum(products) * inverse, k = sum(all_bends) * inverse;
    each(count, [&](int64_t j, auto lanes) {
      const Vec slope = load(s + j, lanes, 0), g = load(grad + j, lanes, 0) - mean;
      if constexpr (IS_LEARNED) bent_products += (load(bends + j, lanes, 0) - k * slope) * g;
      store(grad_scores + j, lanes, slope * g);
    });
    if constexpr (IS_LEARNED) {
      Doubles parts[2];
      halves(bent_products, parts), sums.c -= (parts[0] + parts[1]) / (double(power.c[0]) * power.c[0]);
    }
  }

  // Writes what factor makes probabilities of, from d; returns the sum.
  float probabilities(const float* d, int64_t count, State state, float* q) const {
    const Power power = this->power;
    Vec totals = {}, earlier = {};
    uint32_t steep = 0;
    for (int64_t j = 0; j < count; j += LANES) {
      const Vec base_less_1 = state.cut * load(d + j, AllLanes{}, 0), base = 1.f + base_less_1;
      const Vec y = q_of(power, base, base_less_1);
      store(q + j, AllLanes{}, y), totals += y;
      steep |= ~lanes_above(max(base, -base), power.edge) & ((1u << LANES) - 1);
      if (j % SHORT_SUM == 0) earlier += totals, totals = Vec{};
    }
    if (steep) solve_in_double(d, count, power.c[0], power.c[0] / state.cut, q);
    return steep ? 1 : sum(totals + earlier);
  }

  // Brings numbers to the places of the d above `limit`, times factor; 0 to the others.
  static void spread(const float* scores, State state, float limit, const float* q, int64_t count, float* p) {
    each(count, [&](int64_t j, auto lanes) {
      const uint32_t above = lanes_above(load(scores + j, lanes, -INFINITE) - state.peak, all(limit));
      store(p + j, lanes, state.factor * expand(q, above)), q += __builtin_popcount(above);
    });
  }
};

// p = max(d - tau, 0), tau = (the sum of d > tau, less 1) / their number. Scores on a grid are often exactly at tau,
// and do not belong to the support: sums of d and tau are in double precision, so that each d is on its side.
class Sparsemax : public Entmax<WholePower<1>> {
 public:
  using Entmax::Entmax;

  State forward(const float* scores, float* p, int64_t count, float* room) const {
    bool wrong;
    const float peak = largest(scores, count, wrong);
    const int64_t kept = keep(scores, peak, -1, count, room);
    double tau = -1, support = 0, before = -1;
    for (int steps = 0; support != before && steps < MOST_STEPS; ++steps) {  // tau rises until none falls below
      Doubles totals = {}, counts = {};
      for (int64_t j = 0; j < kept; j += LANES) {
        Doubles d[2];
        halves(load(room + j, AllLanes{}, 0), d);
        for (const Doubles& half : d) {
          totals += half > tau ? half : Doubles{}, counts += half > tau ? Doubles{} + 1. : Doubles{};
        }
      }
      before = support, support = sum(counts), tau = (sum(totals) - 1) / support;
    }
    float cut = float(tau);
    if (cut > tau) cut = std::nextafter(cut, -INFINITE);  // so that d > cut exactly where d > tau
    const float factor = wrong ? NOT_A_NUMBER : support == 0 ? 0 : float(1 / (1 + support * (tau - cut)));
    again(scores, {peak, cut, factor}, p, count, room);
    return {peak, cut, factor};
  }

  void again(const float* scores, State state, float* p, int64_t count, float*) const {
    each(count, [&](int64_t j, auto lanes) {
      const Vec d = load(scores + j, lanes, -INFINITE) - state.peak;
      store(p + j, lanes, state.factor * max(d - state.cut, Vec{}));
    });
  }
};

}  // namespace multimax
