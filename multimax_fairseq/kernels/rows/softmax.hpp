// Softmax of rows of fp32 scores: plain, of modulated scores (MultiMax), and without those below the mean
// (EvSoftMax); mappings.hpp says what these classes have.

#pragma once

#include "../vectors.hpp"

#include <algorithm>
#include <cmath>

namespace multimax {

// What makes the probabilities of a row again from its scores.
struct State {
  float peak;    // the largest (modulated) score, which is subtracted; one number log sum exp would lose digits
  float cut;     // the mean, for EvSoftMax; c / t, for sparse mappings
  float factor;  // 1 / sum; 0 in a row without scores
};

struct NoSums {};

// `room` has whole vectors: a processor waits where it reads what it has just written in part.
inline void scale(const float* room, int64_t count, float factor, float* p) {
  each(count, [&](int64_t j, auto lanes) { store(p + j, lanes, factor * load(room + j, AllLanes{}, 0)); });
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

// The sums over scores from which the gradients of thresholds and gains are made.
template <int ORDER>
struct ModulatorSums {
  Vec slope_below[ORDER] = {}, slope_above[ORDER] = {}, power_below[ORDER] = {}, power_above[ORDER] = {};

  // dL/dx from x and `upstream` = dL/dsigma; adds to the sums. `upstream`, often 0, comes first in each product: a
  // square, or a slope, could be infinite. An absent score, whose `upstream` is 0, takes part as a finite number.
  inline Vec backward(Vec x, Vec upstream, const Modulator<ORDER>& sigma) {
    Vec grad = upstream;
    x = max(x, all(LOWEST));
    for (int n = 0; n < ORDER; ++n) {
      const Vec under = max(sigma.below[n] - x, Vec{}), over = max(x - sigma.above[n], Vec{});
      const Vec product_under = upstream * under, product_over = upstream * over;
      if (n == 0) {
        const Vec upstream_under = under > 0.f ? upstream : Vec{}, upstream_over = over > 0.f ? upstream : Vec{};
        slope_below[n] += upstream_under, slope_above[n] += upstream_over;
        power_below[n] += product_under, power_above[n] += product_over;
        grad += sigma.gain_above[n] * upstream_over, grad -= sigma.gain_below[n] * upstream_under;
      } else {
        slope_below[n] += product_under, slope_above[n] += product_over;
        power_below[n] += product_under * under, power_above[n] += product_over * over;
        grad += 2 * sigma.gain_above[n] * product_over, grad -= 2 * sigma.gain_below[n] * product_under;
      }
    }
    return grad;
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

// softmax(sigma(x)); of order 0, softmax(x).
template <int ORDER>
class MultiMax {
 public:
  static constexpr bool ROWS_ABREAST = false;
  static constexpr int NUMBERS = 4 * ORDER;
  using Sums = ModulatorSums<ORDER>;

  MultiMax(const float* thresholds, const float* gains) : sigma(thresholds, gains) {}

  State forward(const float* scores, float* p, int64_t count, float* room) const {
    const Modulator<ORDER> sigma = this->sigma;  // here, it stays in registers
    Vec peaks = all(-INFINITE), totals = {};
    each(count, [&](int64_t j, auto lanes) {
      const Vec modulated = sigma(load(scores + j, lanes, -INFINITE));
      peaks = max(peaks, modulated);  // may lose NaN; exp(NaN) below keeps it
      store(room + j, AllLanes{}, modulated);
    });
    float peak = max(peaks);
    // 0 only in a row without scores: with scores whose sigma are all -inf or NaN, the row becomes NaN
    if (!(peak > -INFINITE) && std::all_of(scores, scores + count, [](float x) { return x == -INFINITE; })) peak = 0;
    for (int64_t j = 0; j < count; j += LANES) {
      const Vec exponential = exp(load(room + j, AllLanes{}, 0) - peak);
      totals += exponential;
      store(room + j, AllLanes{}, exponential);
    }
    const float total = sum(totals), factor = total == 0 ? 0 : 1 / total;
    scale(room, count, factor, p);
    return {peak, 0, factor};
  }

  void again(const float* scores, State state, float* p, int64_t count, float*) const {
    const Modulator<ORDER> sigma = this->sigma;
    each(count, [&](int64_t j, auto lanes) {
      store(p + j, lanes, exp(sigma(load(scores + j, lanes, -INFINITE)) - state.peak) * state.factor);
    });
  }

  void backward(const float* scores, const float* p, const float* grad, float* grad_scores, int64_t count, Sums& sums,
                float*) const {
    const Modulator<ORDER> sigma = this->sigma;
    Sums local = sums;
    const float expected = dot(p, grad, count);
    each(count, [&](int64_t j, auto lanes) {
      const Vec upstream = load(p + j, lanes, 0) * (load(grad + j, lanes, 0) - expected);
      store(grad_scores + j, lanes, local.backward(load(scores + j, lanes, 0), upstream, sigma));
    });
    sums = local;
  }

  void add(Sums sums, double* grads) const { sums.add_to(grads, sigma); }

 private:
  const Modulator<ORDER> sigma;
};

// exp(x) / sum, times epsilon where a score is below the mean. The choice of what is kept has no gradient.
class EvSoftmax {
 public:
  static constexpr bool ROWS_ABREAST = false;
  static constexpr int NUMBERS = 0;
  using Sums = NoSums;

  EvSoftmax(const float* epsilon, const float*) : epsilon(*epsilon) {}

  State forward(const float* scores, float* p, int64_t count, float* room) const {
    Vec peaks = all(LOWEST), counts = {}, weights = {};
    Doubles sums = {};
    each(count, [&](int64_t j, auto lanes) {
      const Vec x = load(scores + j, lanes, -INFINITE);
      peaks = max(x, peaks);
      Doubles present[2];
      halves(x > -INFINITE ? x : Vec{}, present);
      sums += present[0] + present[1];
      counts += x > -INFINITE ? all(1.f) : Vec{};
    });
    // the largest is kept even if rounding puts the mean above it; x < mean exactly where x < cut
    const float peak = max(peaks);
    const double mean = sum(sums) / sum(counts);
    float cut = mean > peak ? peak : float(mean);
    if (cut < mean && cut < peak) cut = std::nextafter(cut, INFINITE);
    each(count, [&](int64_t j, auto lanes) {
      const Vec weight = weighted(load(scores + j, lanes, -INFINITE), {peak, cut, 1});
      weights += weight;
      store(room + j, AllLanes{}, weight);
    });
    const float total = sum(weights), factor = total == 0 ? 0 : 1 / total;
    scale(room, count, factor, p);
    return {peak, cut, factor};
  }

  void again(const float* scores, State state, float* p, int64_t count, float*) const {
    each(count, [&](int64_t j, auto lanes) {
      store(p + j, lanes, weighted(load(scores + j, lanes, -INFINITE), state));
    });
  }

  void backward(const float*, const float* p, const float* grad, float* grad_scores, int64_t count, Sums&,
                float*) const {
    const float expected = dot(p, grad, count);
    each(count, [&](int64_t j, auto lanes) {
      store(grad_scores + j, lanes, load(p + j, lanes, 0) * (load(grad + j, lanes, 0) - expected));
    });
  }

  void add(Sums, double*) const {}

 private:
  const float epsilon;

  Vec weighted(Vec x, State state) const {
    return exp(x - state.peak) * (x < state.cut ? all(epsilon * state.factor) : all(state.factor));
  }
};

}  // namespace multimax
