// MultiMax attention in blocks, for fp32 on a CPU: what blockwise_attention.py computes. Each thread works through
// blocks of its own, head after head, without waiting between products and mapping: a block of scores stays in its
// cache from the first product to the last.

#include "multimax.hpp"

#include <algorithm>

namespace multimax {

// BLAS; matrices are column-major.
typedef void Sgemm(const char* transpose_a, const char* transpose_b, const int* m, const int* n, const int* k,
                   const float* alpha, const float* a, const int* lda, const float* b, const int* ldb,
                   const float* beta, float* c, const int* ldc);

// One matrix per head; each row is contiguous.
struct Matrices {
  float* data;
  int64_t to_next_head, to_next_row;

  float* row(int64_t head, int64_t index) const { return data + head * to_next_head + index * to_next_row; }
};

// Dropout's mask, drawn from the seed and the position of each probability: nothing is stored, and forward and
// backward draw the same with any number of threads.
struct Dropout {
  int64_t seed, dropped;  // `dropped` of the 2^32 numbers that can be drawn mean: drop
  float scale;            // factor of a kept probability

  // How many numbers draw() writes for a row of `keys`.
  static int64_t room(int64_t keys) { return (keys + GROUP - 1) / GROUP * GROUP; }

  // Writes 0 or `scale` for each key. A group of 64 keys has 16 counters; each gives four numbers, for keys 16 apart.
  void draw(int64_t head, int64_t query, int64_t keys, float* factors) const {
    const uint32_t limit = uint32_t(dropped);
    const float kept = scale;
    for (int64_t j = 0; j < keys; j += GROUP) {
      float* group = factors + j;
#pragma omp simd
      for (int lane = 0; lane < COUNTERS; ++lane) {
        uint32_t a = uint32_t(j / 4) + lane, b = uint32_t(query), c = uint32_t(head), d = 0;
        philox<10>(a, b, c, d, uint32_t(seed), uint32_t(uint64_t(seed) >> 32));
        group[lane] = a < limit ? 0.f : kept;
        group[lane + COUNTERS] = b < limit ? 0.f : kept;
        group[lane + 2 * COUNTERS] = c < limit ? 0.f : kept;
        group[lane + 3 * COUNTERS] = d < limit ? 0.f : kept;
      }
    }
  }

 private:
  static constexpr int COUNTERS = 16, GROUP = 4 * COUNTERS;

  // Philox4x32: Salmon, Moraes, Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
  template <int ROUNDS>
  __attribute__((always_inline)) static inline void philox(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d,
                                                           uint32_t key_0, uint32_t key_1) {
    const uint64_t product_a = uint64_t(0xD2511F53) * a, product_c = uint64_t(0xCD9E8D57) * c;
    a = uint32_t(product_c >> 32) ^ b ^ key_0, b = uint32_t(product_c);
    c = uint32_t(product_a >> 32) ^ d ^ key_1, d = uint32_t(product_a);
    if constexpr (ROUNDS > 1) philox<ROUNDS - 1>(a, b, c, d, key_0 + 0x9E3779B9, key_1 + 0xBB67AE85);
  }
};

// As in cpp_attention.py.
struct Problem {
  int64_t heads, tgt_len, src_len, head_dim, order, is_causal, block, threads, scratch_size;
  Matrices query, key, value, output, grad_output, grad_query, grad_key, grad_value;  // (heads, length, head_dim)
  const float *thresholds, *gains;                                                    // (order, 2)
  const float* hidden_keys;     // (heads, src_len), to be added to scores, or null
  const float* added_scores;    // (tgt_len, src_len), or null
  Normaliser* normalisers;      // (heads, tgt_len)
  double* grads_of_parameters;  // (heads, blocks of a head, 2, order, 2), zeros
  float* scratch;               // (threads, scratch_size)
  Sgemm* sgemm;
  const Dropout* dropout;       // or null
};

// Some queries of one head, and the keys that these may see.
struct Block {
  int64_t head, start, rows, keys;
};

class Attention : Problem {
 public:
  explicit Attention(const Problem& problem) : Problem(problem), blocks((tgt_len + block - 1) / block) {}

  template <int ORDER>
  void forward(const Modulator<ORDER>& sigma) const {
    in_threads([&](int64_t thread, int64_t team) {
      Memory memory(scratch + thread * scratch_size);
      float *k = memory.take(src_len * head_dim), *v = memory.take(src_len * head_dim);
      float *q = memory.take(block * head_dim), *products = memory.take(block * head_dim);
      float *scores = memory.take(block * src_len), *kept = memory.take(Dropout::room(src_len));
      const int64_t first = first_task(thread, team), last = first_task(thread + 1, team);
      for (int64_t task = first, head = -1; task < last; ++task) {
        const Block at = block_of(task);
        if (at.head != head) {
          head = at.head;
          gather(key, head, 0, src_len, k), gather(value, head, 0, src_len, v);
        }
        gather(query, head, at.start, at.rows, q);
        multiply('N', 'T', at.rows, at.keys, head_dim, q, k, 0, scores, at.keys);
        Normaliser* rows = normalisers + head * tgt_len + at.start;
        for (int64_t i = 0; i < at.rows; ++i) {
          float* row = scores + i * at.keys;
          const int64_t seen = mask(at, i, row);
          rows[i] = exponentials(row, row, seen, sigma);
          if (dropout) {
            dropout->draw(head, at.start + i, seen, kept);
            each(seen, [&](int64_t j, auto n) { store(row + j, n, load(row + j, n, 0) * load(kept + j, n, 0)); });
          }
          std::fill(row + seen, row + at.keys, 0.f);
        }
        multiply('N', 'N', at.rows, head_dim, at.keys, scores, v, 0, products, head_dim);
        for (int64_t i = 0; i < at.rows; ++i) {
          float* row = output.row(head, at.start + i);
          for (int64_t c = 0; c < head_dim; ++c) row[c] = rows[i].factor * products[i * head_dim + c];
        }
      }
    });
  }

  template <int ORDER>
  void backward(const Modulator<ORDER>& sigma) const {
    in_threads([&](int64_t thread, int64_t team) {
      Memory memory(scratch + thread * scratch_size);
      memory.take(4 * src_len * head_dim);  // see sums_for_keys
      float *k = memory.take(src_len * head_dim), *v = memory.take(src_len * head_dim);
      float *q = memory.take(block * head_dim), *g = memory.take(block * head_dim);
      float *scores = memory.take(block * src_len), *grads = memory.take(block * src_len);
      float *probabilities = memory.take(src_len), *kept = memory.take(Dropout::room(src_len));
      const int64_t first = first_task(thread, team), last = first_task(thread + 1, team);
      for (int64_t task = first, head = -1; task < last; ++task) {
        const Block at = block_of(task);
        float *grad_k = sums_for_keys(at.head, thread, team), *grad_v = grad_k + src_len * head_dim;
        if (at.head != head) {
          head = at.head;
          gather(key, head, 0, src_len, k), gather(value, head, 0, src_len, v);
          std::fill_n(grad_k, 2 * src_len * head_dim, 0.f);
        }
        gather(query, head, at.start, at.rows, q), gather(grad_output, head, at.start, at.rows, g);
        multiply('N', 'T', at.rows, at.keys, head_dim, q, k, 0, scores, at.keys);
        multiply('N', 'T', at.rows, at.keys, head_dim, g, v, 0, grads, at.keys);
        backward_of_rows(at, scores, grads, probabilities, kept, grads_of_parameters + task * 4 * ORDER, sigma);
        multiply('N', 'N', at.rows, head_dim, at.keys, grads, k, 0, grad_query.row(head, at.start),
                 grad_query.to_next_row);
        multiply('T', 'N', at.keys, head_dim, at.rows, grads, q, 1, grad_k, head_dim);
        multiply('T', 'N', at.keys, head_dim, at.rows, scores, g, 1, grad_v, head_dim);
        if (task + 1 == (head + 1) * blocks && first <= head * blocks) {  // no other thread had part of it
          scatter(grad_k, head, 0, src_len, grad_key), scatter(grad_v, head, 0, src_len, grad_value);
        }
      }
#pragma omp barrier
      add_up_shared_heads(thread, team);
    });
  }

 private:
  const int64_t blocks;  // per head; the tasks are the blocks, head after head

  struct Memory {
    float* next;

    explicit Memory(float* start) : next(start) {}
    float* take(int64_t count) { return next += count, next - count; }
  };

  // Calls body(thread, team) in as many threads as PyTorch would use, even with work for only one: inside a team the
  // BLAS uses no threads of its own, for which small products would mostly wait.
  template <class Body>
  void in_threads(Body body) const {
#pragma omp parallel num_threads(threads)
    body(omp_get_thread_num(), omp_get_num_threads());
  }

  // The first task of a thread; all threads have about as many scores. It depends only on the problem and the size of
  // the team, and so do the threads' sums.
  int64_t first_task(int64_t thread, int64_t team) const {
    int64_t of_a_head = 0;
    for (int64_t task = 0; task < blocks; ++task) of_a_head += scores_of(block_of(task));
    const double wanted = double(of_a_head) * heads * thread / team;
    const int64_t head = std::min(int64_t(wanted / of_a_head), heads);
    double before = double(of_a_head) * head;
    int64_t task = head * blocks;
    for (; task < heads * blocks; ++task) {
      const double scores = scores_of(block_of(task));
      if (before + scores / 2 >= wanted) break;
      before += scores;
    }
    return task;
  }

  static int64_t scores_of(const Block& at) { return at.rows * at.keys; }

  Block block_of(int64_t task) const {
    const int64_t start = task % blocks * block, rows = std::min(block, tgt_len - start);
    return {task / blocks, start, rows, is_causal ? start + rows : src_len};
  }

  // Where a thread sums the gradients of a head's keys, followed by those of its values. The thread's first head has
  // a place of its own: it may be shared with other threads, and so may the last.
  float* sums_for_keys(int64_t head, int64_t thread, int64_t team) const {
    const bool is_first = head == first_task(thread, team) / blocks;
    return scratch + thread * scratch_size + (is_first ? 0 : 2 * src_len * head_dim);
  }

  // Adds up the gradients of keys and values of heads that threads share; each thread takes a part of the keys.
  void add_up_shared_heads(int64_t thread, int64_t team) const {
    const int64_t start = src_len * thread / team, rows = src_len * (thread + 1) / team - start;
    for (int64_t second = 1; second < team; ++second) {
      const int64_t head = first_task(second, team) / blocks, task = head * blocks;
      if (first_task(second, team) == task || first_task(second - 1, team) > task) continue;  // not its second thread
      float* total = sums_for_keys(head, second - 1, team) + start * head_dim;
      for (int64_t other = second; other < team && first_task(other, team) < task + blocks; ++other) {
        if (first_task(other, team) == first_task(other + 1, team)) continue;  // had no task
        const float* sums = sums_for_keys(head, other, team) + start * head_dim;
        add(sums, rows * head_dim, total);
        add(sums + src_len * head_dim, rows * head_dim, total + src_len * head_dim);
      }
      scatter(total, head, start, rows, grad_key);
      scatter(total + src_len * head_dim, head, start, rows, grad_value);
    }
  }

  static void add(const float* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] += from[i];
  }

  // Turns `scores` into the weights of the values (probabilities after dropout) and `grads`, the gradients of these
  // weights, into gradients of the scores. Adds the gradients of thresholds and gains to `parameters`.
  template <int ORDER>
  void backward_of_rows(const Block& at, float* scores, float* grads, float* probabilities, float* kept,
                        double* parameters, Modulator<ORDER> sigma) const {
    const int64_t few = few_rows(at.keys);
    Sums<ORDER> sums;
    for (int64_t i = 0; i < at.rows; ++i) {
      float *row = scores + i * at.keys, *grad_row = grads + i * at.keys;
      const int64_t seen = mask(at, i, row);
      const Normaliser normaliser = normalisers[at.head * tgt_len + at.start + i];
      if (dropout) {
        dropout->draw(at.head, at.start + i, seen, kept);
        each(seen, [&](int64_t j, auto n) { store(grad_row + j, n, load(grad_row + j, n, 0) * load(kept + j, n, 0)); });
      }
      // Summed from these very probabilities and gradients, so that the gradients of the row add up to 0. The product
      // of output and its gradient is equal, but its rounding would remain in all scores of the row.
      Vec expected_grads = {};
      each(seen, [&](int64_t j, auto lanes) {
        const Vec p = exp(sigma(load(row + j, lanes, -INFINITE)) - normaliser.peak) * normaliser.factor;
        expected_grads += p * load(grad_row + j, lanes, 0);
        store(probabilities + j, lanes, p);
      });
      const float expected_grad = sum(expected_grads);
      each(seen, [&](int64_t j, auto lanes) {
        const Vec x = load(row + j, lanes, -INFINITE), p = load(probabilities + j, lanes, 0);
        const Vec upstream = p * (load(grad_row + j, lanes, 0) - expected_grad);
        store(grad_row + j, lanes, sums.backward(x, upstream, sigma));
        store(row + j, lanes, dropout ? p * load(kept + j, lanes, 0) : p);
      });
      std::fill(row + seen, row + at.keys, 0.f), std::fill(grad_row + seen, grad_row + at.keys, 0.f);
      if ((i + 1) % few == 0 || i + 1 == at.rows) {
        sums.add_to(parameters, sigma);
        sums = {};
      }
    }
  }

  // Copies rows of a head without gaps: products are faster than on rows that lie apart.
  void gather(const Matrices& from, int64_t head, int64_t start, int64_t rows, float* to) const {
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(to + i * head_dim, from.row(head, start + i), head_dim * sizeof(float));
    }
  }

  void scatter(const float* from, int64_t head, int64_t start, int64_t rows, const Matrices& to) const {
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(to.row(head, start + i), from + i * head_dim, head_dim * sizeof(float));
    }
  }

  // c = op(a) op(b) + beta c, row-major: c is (m, n), op(a) is (m, k), and `a` and `b` have no gaps between rows.
  void multiply(char op_a, char op_b, int m, int n, int k, const float* a, const float* b, float beta, float* c,
                int to_next_row) const {
    const float one = 1;
    const int lda = op_a == 'N' ? k : m, ldb = op_b == 'N' ? n : k;
    // read column-major, c holds its transpose, op(b)^T op(a)^T
    sgemm(&op_b, &op_a, &n, &m, &k, &one, b, &ldb, a, &lda, &beta, c, &to_next_row);
  }

  // Adds the masks to the scores of row i, at `row`; returns how many of its keys the causal mask leaves.
  int64_t mask(const Block& at, int64_t i, float* row) const {
    const int64_t query = at.start + i, seen = is_causal ? query + 1 : at.keys;
    for (const float* mask : {added_scores ? added_scores + query * src_len : nullptr,
                              hidden_keys ? hidden_keys + at.head * src_len : nullptr}) {
      if (mask) each(seen, [&](int64_t j, auto n) { store(row + j, n, load(row + j, n, 0) + load(mask + j, n, 0)); });
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

// Writes the gradients, from normalisers and grad_output.
void blockwise_multimax_backward(const multimax::Problem* problem) {
  const multimax::Attention attention(*problem);
  multimax::with_modulator(problem->order, problem->thresholds, problem->gains,
                           [&](const auto& sigma) { attention.backward(sigma); });
}
}
