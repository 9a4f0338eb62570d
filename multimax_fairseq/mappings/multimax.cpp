// MultiMax over rows of fp32 scores, and its gradients: multimax_rows and multimax_rows_backward of kernels.py.

#include "multimax.hpp"

#include <algorithm>

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
  const int64_t few_rows = std::max<int64_t>(FEW_SCORES / width, 1);
  share(rows, threads, [&](int64_t first, int64_t last, int64_t thread) {
    for (int64_t start = first; start < last; start += few_rows) {
      Sums<ORDER> sums;
      for (int64_t row = start; row < std::min(start + few_rows, last); ++row) {
        const int64_t offset = row * width;
        const float *x = scores + offset, *p = probabilities + offset, *g = grad + offset;
        Vec products = {};
        each(width, [&](int64_t j, int lanes) { products += load(p + j, lanes, 0) * load(g + j, lanes, 0); });
        const float expected = sum(products);
        each(width, [&](int64_t j, int lanes) {
          const Vec upstream = load(p + j, lanes, 0) * (load(g + j, lanes, 0) - expected);
          store(grad_scores + offset + j, lanes, sums.backward(load(x + j, lanes, 0), upstream, sigma));
        });
      }
      sums.add_to(grads_of_parameters + thread * 4 * ORDER, sigma);
    }
  });
}

}  // namespace multimax

using multimax::Modulator;

extern "C" {

// scores, probabilities: (rows, width). thresholds, gains: (order, 2), order 1 or 2.
void multimax_rows(int64_t rows, int64_t width, int64_t order, int64_t threads, const float* scores,
                   float* probabilities, const float* thresholds, const float* gains) {
  if (order == 1) {
    multimax::forward(rows, width, threads, scores, probabilities, Modulator<1>(thresholds, gains));
  } else {
    multimax::forward(rows, width, threads, scores, probabilities, Modulator<2>(thresholds, gains));
  }
}

// grad, grad_scores: dL/dp and dL/dx, (rows, width). grads_of_parameters: (threads, 2, order, 2), added to.
void multimax_rows_backward(int64_t rows, int64_t width, int64_t order, int64_t threads, const float* scores,
                            const float* probabilities, const float* grad, float* grad_scores,
                            double* grads_of_parameters, const float* thresholds, const float* gains) {
  if (order == 1) {
    multimax::backward(rows, width, threads, scores, probabilities, grad, grad_scores, grads_of_parameters,
                       Modulator<1>(thresholds, gains));
  } else {
    multimax::backward(rows, width, threads, scores, probabilities, grad, grad_scores, grads_of_parameters,
                       Modulator<2>(thresholds, gains));
  }
}
}
