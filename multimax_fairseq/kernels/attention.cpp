// Attention with MultiMax in blocks, in fp32 on a CPU: what BlockwiseMultiMax in blockwise_attention.py does, without
// a stop between products and mapping. A thread takes whole heads, and a block of scores stays in its cache from the
// first product to the last.

#include "multimax.hpp"

#include <algorithm>

namespace multimax {

// BLAS: matrices column by column.
typedef void Sgemm(const char* transpose_a, const char* transpose_b, const int* m, const int* n, const int* k,
                   const float* alpha, const float* a, const int* lda, const float* b, const int* ldb,
                   const float* beta, float* c, const int* ldc);

// One matrix a head; the numbers of a row lie side by side.
struct Matrices {
  float* data;
  int64_t to_next_head, to_next_row;

  float* row(int64_t head, int64_t index) const { return data + head * to_next_head + index * to_next_row; }
};

// As in cpp_attention.py.
struct Problem {
  int64_t heads, tgt_len, src_len, head_dim, order, is_causal, block, threads, scratch_size;
  Matrices query, key, value, output, grad_output, grad_query, grad_key, grad_value;  // (heads, length, head_dim)
  const float *thresholds, *gains;                                                    // (order, 2)
  const float* hidden_keys;     // (heads, src_len), to be added to scores, or null
  const float* added_scores;    // (tgt_len, src_len), or null
  Normaliser* normalisers;      // (heads, tgt_len)
  double* grads_of_parameters;  // (heads, 2, order, 2), zeros
  float* scratch;               // (threads, scratch_size)
  Sgemm* sgemm;
};

// Some queries of one head, and the keys that these may see.
struct Block {
  int64_t head, start, rows, keys;
};

class Attention : Problem {
 public:
  explicit Attention(const Problem& problem) : Problem(problem) {}

  template <int ORDER>
  void forward(const Modulator<ORDER>& sigma) const {
    share(heads, threads, [&](int64_t first, int64_t last, int64_t thread) {
      Memory memory(scratch + thread * scratch_size);
      float *q = memory.take(tgt_len * head_dim), *k = memory.take(src_len * head_dim);
      float *v = memory.take(src_len * head_dim), *scores = memory.take(block * src_len);
      float* products = memory.take(block * head_dim);
      for (int64_t head = first; head < last; ++head) {
        gather(query, head, tgt_len, q), gather(key, head, src_len, k), gather(value, head, src_len, v);
        each_block(head, [&](const Block& at) {
          multiply('N', 'T', at.rows, at.keys, head_dim, q + at.start * head_dim, k, 0, scores, at.keys);
          Normaliser* rows = normalisers + head * tgt_len + at.start;
          for (int64_t i = 0; i < at.rows; ++i) {
            const int64_t seen = mask(at, i, scores);
            rows[i] = exponentials(scores + i * at.keys, scores + i * at.keys, seen, sigma);
            std::fill(scores + i * at.keys + seen, scores + (i + 1) * at.keys, 0.f);
          }
          multiply('N', 'N', at.rows, head_dim, at.keys, scores, v, 0, products, head_dim);
          for (int64_t i = 0; i < at.rows; ++i) {
            float* row = output.row(head, at.start + i);
            for (int64_t c = 0; c < head_dim; ++c) row[c] = rows[i].factor * products[i * head_dim + c];
          }
        });
      }
    });
  }

  template <int ORDER>
  void backward(const Modulator<ORDER>& sigma) const {
    share(heads, threads, [&](int64_t first, int64_t last, int64_t thread) {
      Memory memory(scratch + thread * scratch_size);
      float *q = memory.take(tgt_len * head_dim), *g = memory.take(tgt_len * head_dim);
      float *k = memory.take(src_len * head_dim), *grad_k = memory.take(src_len * head_dim);
      float *v = memory.take(src_len * head_dim), *grad_v = memory.take(src_len * head_dim);
      float *scores = memory.take(block * src_len), *grads = memory.take(block * src_len);
      for (int64_t head = first; head < last; ++head) {
        gather(query, head, tgt_len, q), gather(key, head, src_len, k), gather(value, head, src_len, v);
        gather(grad_output, head, tgt_len, g);
        std::fill_n(grad_k, src_len * head_dim, 0.f), std::fill_n(grad_v, src_len * head_dim, 0.f);
        each_block(head, [&](const Block& at) {
          const float *block_q = q + at.start * head_dim, *block_g = g + at.start * head_dim;
          multiply('N', 'T', at.rows, at.keys, head_dim, block_q, k, 0, scores, at.keys);
          multiply('N', 'T', at.rows, at.keys, head_dim, block_g, v, 0, grads, at.keys);
          const Normaliser* rows = normalisers + head * tgt_len + at.start;
          const int64_t few = few_rows(at.keys);
          double* parameters = grads_of_parameters + head * 4 * ORDER;
          Sums<ORDER> sums;
          for (int64_t i = 0; i < at.rows; ++i) {
            const float expected = dot(output.row(head, at.start + i), block_g + i * head_dim, head_dim);
            const Normaliser normaliser = rows[i];
            // scores become probabilities, and the gradients of these those of scores
            float *row = scores + i * at.keys, *grad_row = grads + i * at.keys;
            const int64_t seen = mask(at, i, scores);
            each(seen, [&](int64_t j, int lanes) {
              const Vec x = load(row + j, lanes, -INFINITE);
              const Vec p = exp(sigma(x) - normaliser.peak) * normaliser.factor;
              const Vec upstream = p * (load(grad_row + j, lanes, 0) - expected);
              store(row + j, lanes, p);
              store(grad_row + j, lanes, sums.backward(x, upstream, sigma));
            });
            std::fill(row + seen, row + at.keys, 0.f), std::fill(grad_row + seen, grad_row + at.keys, 0.f);
            if ((i + 1) % few == 0 || i + 1 == at.rows) {
              sums.add_to(parameters, sigma);
              sums = {};
            }
          }
          multiply('N', 'N', at.rows, head_dim, at.keys, grads, k, 0, grad_query.row(head, at.start),
                   grad_query.to_next_row);
          multiply('T', 'N', at.keys, head_dim, at.rows, grads, block_q, 1, grad_k, head_dim);
          multiply('T', 'N', at.keys, head_dim, at.rows, scores, block_g, 1, grad_v, head_dim);
        });
        scatter(grad_k, head, src_len, grad_key), scatter(grad_v, head, src_len, grad_value);
      }
    });
  }

 private:
  struct Memory {
    float* next;

    explicit Memory(float* start) : next(start) {}
    float* take(int64_t count) { return next += count, next - count; }
  };

  // Copies of a head, row after row: products of them are faster than of rows that lie apart.
  void gather(const Matrices& from, int64_t head, int64_t rows, float* to) const {
    for (int64_t i = 0; i < rows; ++i) std::memcpy(to + i * head_dim, from.row(head, i), head_dim * sizeof(float));
  }

  void scatter(const float* from, int64_t head, int64_t rows, const Matrices& to) const {
    for (int64_t i = 0; i < rows; ++i) std::memcpy(to.row(head, i), from + i * head_dim, head_dim * sizeof(float));
  }

  template <class Body>
  void each_block(int64_t head, Body body) const {
    for (int64_t start = 0; start < tgt_len; start += block) {
      const int64_t rows = std::min(block, tgt_len - start);
      body(Block{head, start, rows, is_causal ? start + rows : src_len});
    }
  }

  // c = op(a) op(b) + beta c, row by row: c is (m, n), op(a) is (m, k), and `a` and `b` have no gaps between rows.
  void multiply(char op_a, char op_b, int m, int n, int k, const float* a, const float* b, float beta, float* c,
                int to_next_row) const {
    const float one = 1;
    const int lda = op_a == 'N' ? k : m, ldb = op_b == 'N' ? n : k;
    // column by column, the memory of c holds its transpose, op(b)^T op(a)^T
    sgemm(&op_b, &op_a, &n, &m, &k, &one, b, &ldb, a, &lda, &beta, c, &to_next_row);
  }

  // Masks row i of a block of scores; returns how many of its keys the causal mask leaves.
  int64_t mask(const Block& at, int64_t i, float* scores) const {
    const int64_t query = at.start + i, seen = is_causal ? query + 1 : at.keys;
    float* row = scores + i * at.keys;
    for (const float* mask : {added_scores ? added_scores + query * src_len : nullptr,
                              hidden_keys ? hidden_keys + at.head * src_len : nullptr}) {
      if (mask) each(seen, [&](int64_t j, int n) { store(row + j, n, load(row + j, n, 0) + load(mask + j, n, 0)); });
    }
    return seen;
  }
};

}  // namespace multimax

extern "C" {

// Writes output and normalisers.
void blockwise_multimax(const multimax::Problem* problem) {
  const multimax::Attention attention(*problem);
  multimax::with_modulator(problem->order, problem->thresholds, problem->gains,
                           [&](const auto& sigma) { attention.forward(sigma); });
}

// Writes the gradients, from output, normalisers and grad_output.
void blockwise_multimax_backward(const multimax::Problem* problem) {
  const multimax::Attention attention(*problem);
  multimax::with_modulator(problem->order, problem->thresholds, problem->gains,
                           [&](const auto& sigma) { attention.backward(sigma); });
}
}
