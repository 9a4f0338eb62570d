// MultiMax over rows of fp32 scores, and its gradients: multimax_rows and multimax_rows_backward of rows.py.

#include "multimax.hpp"

#include <algorithm>
#include <vector>

namespace multimax {

// Probabilities of a row of any width.
template <int ORDER>
inline void row_by_passes(int64_t width, const float* scores, float* p, const Modulator<ORDER>& sigma) {
  const float factor = exponentials(scores, p, width, sigma).factor;
  each(width, [&](int64_t j, int lanes) { store(p + j, lanes, factor * load(p + j, lanes, 0)); });
}

constexpr int TOGETHER = 4;  // short rows: what one waits for, a sum over lanes say, another computes in the meantime

// As in forward(), of TOGETHER rows whose scores are in VECTORS registers each.
template <int VECTORS, int ORDER>
inline void short_rows(int64_t width, const float* scores, float* probabilities, const Modulator<ORDER>& sigma) {
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

template <int ORDER>
void backward(int64_t rows, int64_t width, int threads, const float* scores, const float* probabilities,
              const float* grad, float* grad_scores, float* grads_of_parameters, const Modulator<ORDER>& sigma) {
  const int64_t few = few_rows(width);
  std::vector<double> parts(threads * 4 * ORDER);
  share(rows, threads, [&](int64_t first, int64_t last, int64_t thread) {
    Sums<ORDER> sums;
    double part[4 * ORDER] = {};
    for (int64_t start = first; start < last; start += TOGETHER) {
      const int64_t count = std::min<int64_t>(TOGETHER, last - start);
      float expected[TOGETHER];
      for (int64_t i = 0; i < count; ++i) {
        expected[i] = dot(probabilities + (start + i) * width, grad + (start + i) * width, width);
      }
      for (int64_t row = start; row < start + count; ++row) {
        const int64_t offset = row * width;
        const float *x = scores + offset, *p = probabilities + offset, *g = grad + offset;
        each(width, [&](int64_t j, int lanes) {
          const Vec upstream = load(p + j, lanes, 0) * (load(g + j, lanes, 0) - expected[row - start]);
          store(grad_scores + offset + j, lanes, sums.backward(load(x + j, lanes, 0), upstream, sigma));
        });
        if ((row + 1 - first) % few == 0 || row + 1 == last) {
          sums.add_to(part, sigma);
          sums = {};
        }
      }
    }
    std::copy(part, part + 4 * ORDER, parts.data() + thread * 4 * ORDER);
  });
  for (int i = 0; i < 4 * ORDER; ++i) {
    double total = 0;
    for (int thread = 0; thread < threads; ++thread) total += parts[thread * 4 * ORDER + i];
    grads_of_parameters[i] = float(total);
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

// grad, grad_scores: dL/dp and dL/dx, (rows, width). grads_of_parameters: (2, order, 2).
void multimax_rows_backward(int64_t rows, int64_t width, int64_t order, int64_t threads, const float* scores,
                            const float* probabilities, const float* grad, float* grad_scores,
                            float* grads_of_parameters, const float* thresholds, const float* gains) {
  multimax::with_modulator(order, thresholds, gains, [&](const auto& sigma) {
    multimax::backward(rows, width, threads, scores, probabilities, grad, grad_scores, grads_of_parameters, sigma);
  });
}
}
