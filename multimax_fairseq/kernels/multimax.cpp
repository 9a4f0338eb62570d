// MultiMax over rows of fp32 scores, and its gradients: multimax_rows and multimax_rows_backward of rows.py.

#include "multimax.hpp"

namespace multimax {

template <int ORDER>
void forward(int64_t rows, int64_t width, int threads, const float* scores, float* probabilities,
             const Modulator<ORDER>& sigma) {
  share(rows, threads, [&](int64_t first, int64_t last, int64_t) {
    for (int64_t offset = first * width; offset < last * width; offset += width) {
      float* p = probabilities + offset;
      const float factor = exponentials(scores + offset, p, width, sigma).factor;
      each(width, [&](int64_t j, int lanes) { store(p + j, lanes, factor * load(p + j, lanes, 0)); });
    }
  });
}

template <int ORDER>
void backward(int64_t rows, int64_t width, int threads, const float* scores, const float* probabilities,
              const float* grad, float* grad_scores, double* grads_of_parameters, const Modulator<ORDER>& sigma) {
  const int64_t few = few_rows(width);
  share(rows, threads, [&](int64_t first, int64_t last, int64_t thread) {
    Sums<ORDER> sums;
    for (int64_t row = first; row < last; ++row) {
      const int64_t offset = row * width;
      const float *x = scores + offset, *p = probabilities + offset, *g = grad + offset;
      const float expected = dot(p, g, width);
      each(width, [&](int64_t j, int lanes) {
        const Vec upstream = load(p + j, lanes, 0) * (load(g + j, lanes, 0) - expected);
        store(grad_scores + offset + j, lanes, sums.backward(load(x + j, lanes, 0), upstream, sigma));
      });
      if ((row + 1 - first) % few == 0 || row + 1 == last) {
        sums.add_to(grads_of_parameters + thread * 4 * ORDER, sigma);
        sums = {};
      }
    }
  });
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

// grad, grad_scores: dL/dp and dL/dx, (rows, width). grads_of_parameters: (threads, 2, order, 2), added to.
void multimax_rows_backward(int64_t rows, int64_t width, int64_t order, int64_t threads, const float* scores,
                            const float* probabilities, const float* grad, float* grad_scores,
                            double* grads_of_parameters, const float* thresholds, const float* gains) {
  multimax::with_modulator(order, thresholds, gains, [&](const auto& sigma) {
    multimax::backward(rows, width, threads, scores, probabilities, grad, grad_scores, grads_of_parameters, sigma);
  });
}
}
