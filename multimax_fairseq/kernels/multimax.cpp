// MultiMax over rows of fp32 scores, and its gradients: multimax_rows and multimax_rows_backward of rows.py.

#include "multimax.hpp"

#include <algorithm>
#include <vector>

namespace multimax {

// Probabilities of a row of any width.
template <int ORDER>
inline void row_by_passes(int64_t width, const float* scores, float* p, Modulator<ORDER> sigma) {
  const float factor = exponentials(scores, p, width, sigma).factor;
  each(width, [&](int64_t j, auto lanes) { store(p + j, lanes, factor * load(p + j, lanes, 0)); });
}

constexpr int TOGETHER = 4;  // short rows: what one waits for, a sum over lanes say, another computes in the meantime

// As in forward(), of TOGETHER rows whose scores are in VECTORS registers each.
template <int VECTORS, int ORDER>
inline void short_rows(int64_t width, const float* scores, float* probabilities, Modulator<ORDER> sigma) {
  constexpr int BEFORE = (VECTORS - 1) * LANES;
  const int rest = int(width) - BEFORE;
  Vec x[TOGETHER][VECTORS];
  float peak[TOGETHER], factor[TOGETHER];
  for (int i = 0; i < TOGETHER; ++i) {
    for (int k = 0; k < VECTORS; ++k) {
      const int lanes = k < VECTORS - 1 ? LANES : rest;
      x[i][k] = sigma(load(scores + i * width + k * LANES, lanes, -INFINITE));
    }
  }
  for (int i = 0; i < TOGETHER; ++i) {
    Vec peaks = x[i][0];
    for (int k = 1; k < VECTORS; ++k) peaks = max(peaks, x[i][k]);
    peak[i] = max(peaks);
  }
  for (int i = 0; i < TOGETHER; ++i) {
    Vec totals = {};
    for (int k = 0; k < VECTORS; ++k) totals += x[i][k] = exp(x[i][k] - peak[i]);
    factor[i] = 1 / sum(totals);
  }
  for (int i = 0; i < TOGETHER; ++i) {
    float* p = probabilities + i * width;
    for (int k = 0; k < VECTORS; ++k) {
      store(p + k * LANES, k < VECTORS - 1 ? LANES : rest, factor[i] * x[i][k]);
    }
    if (!(peak[i] > -INFINITE)) row_by_passes(width, scores + i * width, p, sigma);  // empty, or not a number
  }
}

template <int ORDER>
void forward(int64_t rows, int64_t width, int threads, const float* scores, float* probabilities,
             const Modulator<ORDER>& sigma) {
  share(rows, threads, [&](int64_t first, int64_t last, int64_t) {
    int64_t row = first;
    for (; width <= 3 * LANES && row + TOGETHER <= last; row += TOGETHER) {
      const float* x = scores + row * width;
      float* p = probabilities + row * width;
      if (width <= LANES) short_rows<1>(width, x, p, sigma);
      else if (width <= 2 * LANES) short_rows<2>(width, x, p, sigma);
      else short_rows<3>(width, x, p, sigma);
    }
    for (; row < last; ++row) row_by_passes(width, scores + row * width, probabilities + row * width, sigma);
  });
}

// Gradients of the scores of some rows, which fit into VECTORS registers each, or with 0 are of any width. Returns the
// sums over them; few_rows() says of how many.
template <int VECTORS, int ORDER>
Sums<ORDER> backward_rows(int64_t rows, int64_t width, const float* x, const float* p, const float* g,
                          float* grad_scores, Modulator<ORDER> sigma) {
  Sums<ORDER> sums;
  for (int64_t row = 0; row < rows; ++row, x += width, p += width, g += width, grad_scores += width) {
    const auto finish = [&](int64_t j, auto lanes, Vec probability, Vec grad, float expected) {
      const Vec upstream = probability * (grad - expected);
      store(grad_scores + j, lanes, sums.backward(load(x + j, lanes, 0), upstream, sigma));
    };
    if constexpr (VECTORS) {
      const int rest = int(width) - (VECTORS - 1) * LANES;
      Vec y[VECTORS], grad[VECTORS], products = {};
      for (int k = 0; k < VECTORS; ++k) {
        const int lanes = k < VECTORS - 1 ? LANES : rest;
        y[k] = load(p + k * LANES, lanes, 0), grad[k] = load(g + k * LANES, lanes, 0);
        products += y[k] * grad[k];
      }
      const float expected = sum(products);
      for (int k = 0; k < VECTORS; ++k) finish(k * LANES, k < VECTORS - 1 ? LANES : rest, y[k], grad[k], expected);
    } else {
      const float expected = dot(p, g, width);
      each(width, [&](int64_t j, auto lanes) { finish(j, lanes, load(p + j, lanes, 0), load(g + j, lanes, 0), expected); });
    }
  }
  return sums;
}

template <int ORDER>
void backward(int64_t rows, int64_t width, int threads, const float* scores, const float* probabilities,
              const float* grad, float* grad_scores, float* grad_thresholds, float* grad_gains,
              const Modulator<ORDER>& sigma) {
  const int64_t few = few_rows(width);
  std::vector<double> parts(threads * 4 * ORDER);
  share(rows, threads, [&](int64_t first, int64_t last, int64_t thread) {
    double part[4 * ORDER] = {};
    for (int64_t row = first; row < last; row += few) {
      const int64_t offset = row * width;
      const auto f = width <= LANES ? backward_rows<1, ORDER> : width <= 2 * LANES ? backward_rows<2, ORDER> : width <= 3 * LANES ? backward_rows<3, ORDER> : backward_rows<0, ORDER>;
      f(std::min(few, last - row), width, scores + offset, probabilities + offset, grad + offset,
                    grad_scores + offset, sigma)
          .add_to(part, sigma);
    }
    std::copy(part, part + 4 * ORDER, parts.data() + thread * 4 * ORDER);
  });
  for (int i = 0; i < 4 * ORDER; ++i) {
    double total = 0;
    for (int thread = 0; thread < threads; ++thread) total += parts[thread * 4 * ORDER + i];
    (i < 2 * ORDER ? grad_thresholds[i] : grad_gains[i - 2 * ORDER]) = float(total);
  }
}

}  // namespace multimax

extern "C" {

// scores, probabilities: (rows, width). thresholds, gains: (order, 2), order 1 or 2.
void multimax_rows(int64_t rows, int64_t width, int64_t order, int64_t threads, const float* scores,
                   float* probabilities, const float* thresholds, const float* gains) {
  multimax::with_modulator(order, thresholds, gains, [&](const auto& sigma) {
    multimax::forward(rows, width, threads, scores, probabilities, sigma);
  });
}

// grad, grad_scores: dL/dp and dL/dx, (rows, width). grad_thresholds, grad_gains: (order, 2).
void multimax_rows_backward(int64_t rows, int64_t width, int64_t order, int64_t threads, const float* scores,
                            const float* probabilities, const float* grad, float* grad_scores,
                            float* grad_thresholds, float* grad_gains, const float* thresholds, const float* gains) {
  multimax::with_modulator(order, thresholds, gains, [&](const auto& sigma) {
    multimax::backward(rows, width, threads, scores, probabilities, grad, grad_scores, grad_thresholds, grad_gains,
                       sigma);
  });
}
}
