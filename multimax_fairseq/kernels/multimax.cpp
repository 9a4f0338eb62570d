// MultiMax over rows of fp32 scores, and its gradients: multimax_rows and multimax_rows_backward of rows.py.

#include "multimax.hpp"

#include <algorithm>
#include <vector>

namespace multimax {

// Calls body with the number of vectors that hold a row, as a type: 1 to 3, or 0 for a longer row.
template <class Body>
inline void with_vectors(int64_t width, Body body) {
  switch ((width + LANES - 1) / LANES) {
    case 1: return body(std::integral_constant<int, 1>{});
    case 2: return body(std::integral_constant<int, 2>{});
    case 3: return body(std::integral_constant<int, 3>{});
    default: return body(std::integral_constant<int, 0>{});
  }
}

// How many scores of a row vector k of VECTORS holds.
template <int VECTORS>
inline int lanes_of(int k, int64_t width) {
  return k < VECTORS - 1 ? LANES : int(width) - (VECTORS - 1) * LANES;
}

// Probabilities of a row of any width.
template <int ORDER>
inline void forward_row(int64_t width, const float* scores, float* p, Modulator<ORDER> sigma) {
  const float factor = exponentials(scores, p, width, sigma).factor;
  each(width, [&](int64_t j, auto lanes) { store(p + j, lanes, factor * load(p + j, lanes, 0)); });
}

constexpr int TOGETHER = 4;  // rows; while one waits, for a sum over its lanes, say, others go on

// Probabilities of TOGETHER rows, which stay in registers.
template <int VECTORS, int ORDER>
inline void forward_rows(int64_t width, const float* scores, float* probabilities, Modulator<ORDER> sigma) {
  Vec y[TOGETHER][VECTORS];
  float peak[TOGETHER], factor[TOGETHER];
  for (int i = 0; i < TOGETHER; ++i) {
    for (int k = 0; k < VECTORS; ++k) {
      y[i][k] = sigma(load(scores + i * width + k * LANES, lanes_of<VECTORS>(k, width), -INFINITE));
    }
  }
  for (int i = 0; i < TOGETHER; ++i) {
    Vec peaks = y[i][0];
    for (int k = 1; k < VECTORS; ++k) peaks = max(peaks, y[i][k]);
    peak[i] = max(peaks);
  }
  for (int i = 0; i < TOGETHER; ++i) {
    Vec totals = {};
    for (int k = 0; k < VECTORS; ++k) totals += y[i][k] = exp(y[i][k] - peak[i]);
    factor[i] = 1 / sum(totals);
  }
  for (int i = 0; i < TOGETHER; ++i) {
    float* p = probabilities + i * width;
    for (int k = 0; k < VECTORS; ++k) store(p + k * LANES, lanes_of<VECTORS>(k, width), factor[i] * y[i][k]);
    if (!(peak[i] > -INFINITE)) forward_row(width, scores + i * width, p, sigma);  // empty, or NaN
  }
}

template <int ORDER>
void forward(int64_t rows, int64_t width, int threads, const float* scores, float* probabilities,
             const Modulator<ORDER>& sigma) {
  share(rows, threads, [&](int64_t row, int64_t last, int64_t) {
    with_vectors(width, [&](auto vectors) {
      if constexpr (vectors()) {
        for (; row + TOGETHER <= last; row += TOGETHER) {
          forward_rows<vectors()>(width, scores + row * width, probabilities + row * width, sigma);
        }
      }
      for (; row < last; ++row) forward_row(width, scores + row * width, probabilities + row * width, sigma);
    });
  });
}

// Writes the gradients of the scores of at most few_rows() rows, and returns the sums over them.
template <int VECTORS, int ORDER>
Sums<ORDER> backward_rows(int64_t rows, int64_t width, const float* x, const float* p, const float* g,
                          float* grad_scores, Modulator<ORDER> sigma) {
  Sums<ORDER> sums;
  for (int64_t row = 0; row < rows; ++row, x += width, p += width, g += width, grad_scores += width) {
    if constexpr (VECTORS) {
      Vec y[VECTORS], grad[VECTORS], products = {};
      for (int k = 0; k < VECTORS; ++k) {
        const int lanes = lanes_of<VECTORS>(k, width);
        y[k] = load(p + k * LANES, lanes, 0), grad[k] = load(g + k * LANES, lanes, 0);
        products += y[k] * grad[k];
      }
      const float expected = sum(products);
      for (int k = 0; k < VECTORS; ++k) {
        const int lanes = lanes_of<VECTORS>(k, width);
        const Vec grad_x = sums.backward(load(x + k * LANES, lanes, 0), y[k] * (grad[k] - expected), sigma);
        store(grad_scores + k * LANES, lanes, grad_x);
      }
    } else {
      const float expected = dot(p, g, width);
      each(width, [&](int64_t j, auto lanes) {
        const Vec upstream = load(p + j, lanes, 0) * (load(g + j, lanes, 0) - expected);
        store(grad_scores + j, lanes, sums.backward(load(x + j, lanes, 0), upstream, sigma));
      });
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
    with_vectors(width, [&](auto vectors) {
      for (int64_t row = first; row < last; row += few) {
        const int64_t at = row * width;
        const Sums<ORDER> sums = backward_rows<vectors()>(std::min(few, last - row), width, scores + at,
                                                          probabilities + at, grad + at, grad_scores + at, sigma);
        sums.add_to(part, sigma);
      }
    });
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
