// Attention in blocks, for fp32 on a CPU, with every mapping, and its gradients. Each thread works through blocks of
// its own without waiting between products and mapping: a block of scores, which has whole rows, stays in its cache
// from the first product to the last.

#include "../rows/mappings.hpp"

#include <atomic>
#include <thread>
#include <vector>

namespace multimax {

// BLAS; matrices are column-major.
typedef void Sgemm(const char* transpose_a, const char* transpose_b, const int* m, const int* n, const int* k,
                   const float* alpha, const float* a, const int* lda, const float* b, const int* ldb,
                   const float* beta, float* c, const int* ldc);

struct Matrix {
  float* data;
  int64_t to_next_row;  // each row is contiguous

  float* row(int64_t index) const { return data + index * to_next_row; }
};

// One matrix per sentence and head.
struct Matrices {
  float* data;
  int64_t to_next_sentence, to_next_head, to_next_row;
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
        philox<7>(a, b, c, d, uint32_t(seed), uint32_t(uint64_t(seed) >> 32));
        group[lane] = a < limit ? 0.f : kept;
        group[lane + COUNTERS] = b < limit ? 0.f : kept;
        group[lane + 2 * COUNTERS] = c < limit ? 0.f : kept;
        group[lane + 3 * COUNTERS] = d < limit ? 0.f : kept;
      }
    }
  }

 private:
  static constexpr int COUNTERS = 16, GROUP = 4 * COUNTERS;

  // Philox4x32: Salmon, Moraes, Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011. 7 rounds are the
  // fewest that pass all of their tests.
  template <int ROUNDS>
  __attribute__((always_inline)) static inline void philox(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d,
                                                           uint32_t key_0, uint32_t key_1) {
    const uint64_t product_a = uint64_t(0xD2511F53) * a, product_c = uint64_t(0xCD9E8D57) * c;
    a = uint32_t(product_c >> 32) ^ b ^ key_0, b = uint32_t(product_c);
    c = uint32_t(product_a >> 32) ^ d ^ key_1, d = uint32_t(product_a);
    if constexpr (ROUNDS > 1) philox<ROUNDS - 1>(a, b, c, d, key_0 + 0x9E3779B9, key_1 + 0xBB67AE85);
  }
};

// As in cpu.py. Nothing that is computed depends on the number of threads.
struct Problem {
  int64_t bsz, num_heads, tgt_len, src_len, head_dim, value_dim, is_causal, block, parts, threads, scratch_size;
  Numbers numbers;
  Matrices query, key, value, mask, output;  // (bsz, num_heads, length, dim); mask: (…, tgt_len, src_len), or null
  Matrices grad_output, grad_query, grad_key, grad_value;
  State* states;   // (bsz, num_heads, tgt_len)
  float* scratch;  // (threads, scratch_size)
  Sgemm* sgemm;
  Dropout dropout;
};

// Some queries, and the keys that these may see.
struct Block {
  int64_t start, rows, keys;
};

template <class Mapping>
class Attention : Problem {
 public:
  explicit Attention(const Problem& problem) : Problem(problem) {}

  void forward() const {
    each_part([&](int64_t head, int64_t part, Memory memory) {
      const Mapping mapping = numbers.mapping<Mapping>(head);
      const Matrix queries = of(query, head), to = of(output, head), added = of(mask, head);
      const float *k = gathered(of(key, head), src_len, head_dim, memory);
      const float *v = gathered(of(value, head), src_len, value_dim, memory);
      float *scores = memory.take(block * src_len), *kept = memory.take(Dropout::room(src_len));
      float *room = memory.take(room_for(src_len)), *q = memory.take(block * head_dim);
      each_block(part, [&](const Block& at) {
        gather(queries, at.start, at.rows, head_dim, q);
        multiply('N', 'T', at.rows, at.keys, head_dim, q, k, 0, scores, at.keys);
        for (int64_t i = 0; i < at.rows; ++i) {
          float* row = scores + i * at.keys;
          const int64_t index = at.start + i, seen = masked(added, index, at.keys, row);
          states[head * tgt_len + index] = mapping.forward(row, row, seen, room);
          if (dropout.dropped) drop(head, index, seen, kept, row);
          std::fill(row + seen, row + at.keys, 0.f);
        }
        multiply('N', 'N', at.rows, value_dim, at.keys, scores, v, 0, to.row(at.start), to.to_next_row);
      });
    });
  }

  void backward() const {
    std::vector<double> sums_of_parts(bsz * num_heads * parts * NUMBERS);
    std::vector<std::atomic<int64_t>> added_parts(bsz * num_heads);
    each_part([&](int64_t head, int64_t part, Memory memory) {
      const Mapping mapping = numbers.mapping<Mapping>(head);
      const Matrix queries = of(query, head), upstream = of(grad_output, head), to = of(grad_query, head);
      const Matrix added = of(mask, head);
      const float *k = gathered(of(key, head), src_len, head_dim, memory);
      const float *v = gathered(of(value, head), src_len, value_dim, memory);
      float *grad_k = memory.take(src_len * head_dim), *grad_v = memory.take(src_len * value_dim);
      float *scores = memory.take(block * src_len), *grads = memory.take(block * src_len);
      float *kept = memory.take(Dropout::room(src_len)), *room = memory.take(room_for(src_len));
      float *q = memory.take(block * head_dim), *g = memory.take(block * value_dim), *p = memory.take(src_len);
      std::fill_n(grad_k, src_len * head_dim, 0.f), std::fill_n(grad_v, src_len * value_dim, 0.f);
      each_block(part, [&](const Block& at) {
        gather(queries, at.start, at.rows, head_dim, q), gather(upstream, at.start, at.rows, value_dim, g);
        multiply('N', 'T', at.rows, at.keys, head_dim, q, k, 0, scores, at.keys);
        multiply('N', 'T', at.rows, at.keys, value_dim, g, v, 0, grads, at.keys);
        const int64_t few = rows_of_a_sum(at.keys);
        typename Mapping::Sums sums;
        for (int64_t i = 0; i < at.rows; ++i) {
          float *row = scores + i * at.keys, *grad_row = grads + i * at.keys;
          const int64_t index = at.start + i, seen = masked(added, index, at.keys, row);
          mapping.again(row, states[head * tgt_len + index], p, seen, room);
          if (dropout.dropped) drop(head, index, seen, kept, grad_row);
          mapping.backward(row, p, grad_row, grad_row, seen, sums, room);
          std::copy_n(p, seen, row);
          if (dropout.dropped) times(kept, seen, row);
          std::fill(row + seen, row + at.keys, 0.f), std::fill(grad_row + seen, grad_row + at.keys, 0.f);
          if ((i + 1) % few == 0 || i + 1 == at.rows) {
            mapping.add(sums, sums_of_parts.data() + (head * parts + part) * NUMBERS);
            sums = {};
          }
        }
        multiply('N', 'N', at.rows, head_dim, at.keys, grads, k, 0, to.row(at.start), to.to_next_row);
        multiply('T', 'N', at.keys, head_dim, at.rows, grads, q, 1, grad_k, head_dim);
        multiply('T', 'N', at.keys, value_dim, at.rows, scores, g, 1, grad_v, value_dim);
      });
      // One part after the other, so that sums do not depend on who is first. Parts are begun in this order.
      while (added_parts[head].load(std::memory_order_acquire) != part) std::this_thread::yield();
      scatter(grad_k, part > 0, head_dim, of(grad_key, head));
      scatter(grad_v, part > 0, value_dim, of(grad_value, head));
      added_parts[head].store(part + 1, std::memory_order_release);
    });
    numbers.give(sums_of_parts, NUMBERS, parts);
  }

 private:
  static constexpr int64_t NUMBERS = Mapping::NUMBERS;

  struct Memory {
    float* next;

    float* take(int64_t count) {  // at addresses that are multiples of 64: products round by them
      float* taken = next;
      next += rounded_up(count);
      return taken;
    }
  };

  // Calls body(head, part, memory) for each part of each head, in as many threads as PyTorch would use, even with
  // work for only one: inside a team the BLAS uses no threads of its own, for which small products would mostly wait.
  template <class Body>
  void each_part(Body body) const {
    std::atomic<int64_t> next(0);
#pragma omp parallel num_threads(threads)
    for (int64_t task = next++; task < bsz * num_heads * parts; task = next++) {
      body(task / parts, task % parts, Memory{scratch + omp_get_thread_num() * scratch_size});
    }
  }

  // Calls body for the blocks of a part; every part has short and long ones under a causal mask.
  template <class Body>
  void each_block(int64_t part, Body body) const {
    for (int64_t start = part * block; start < tgt_len; start += parts * block) {
      const int64_t rows = std::min(block, tgt_len - start);
      body(Block{start, rows, is_causal ? std::min(start + rows, src_len) : src_len});
    }
  }

  Matrix of(const Matrices& all, int64_t head) const {
    const int64_t offset = head / num_heads * all.to_next_sentence + head % num_heads * all.to_next_head;
    return {all.data ? all.data + offset : nullptr, all.to_next_row};
  }

  // Copies rows without gaps: products are faster than on rows that lie apart.
  static void gather(const Matrix& from, int64_t start, int64_t rows, int64_t dim, float* to) {
    for (int64_t i = 0; i < rows; ++i) std::memcpy(to + i * dim, from.row(start + i), dim * sizeof(float));
  }

  static float* gathered(const Matrix& from, int64_t rows, int64_t dim, Memory& memory) {
    float* to = memory.take(rows * dim);
    gather(from, 0, rows, dim, to);
    return to;
  }

  // Copies, or adds, gradients of all keys.
  void scatter(const float* from, bool add, int64_t dim, const Matrix& to) const {
    for (int64_t i = 0; i < src_len; ++i, from += dim) {
      float* row = to.row(i);
      for (int64_t c = 0; c < dim; ++c) row[c] = add ? row[c] + from[c] : from[c];
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

  // Adds the mask to the `keys` scores of a query; returns how many of its keys the causal mask leaves.
  int64_t masked(const Matrix& mask, int64_t index, int64_t keys, float* row) const {
    const int64_t seen = is_causal ? std::min(index + 1, keys) : keys;
    if (mask.data) {
      const float* added = mask.row(index);
      each(seen, [&](int64_t j, auto n) { store(row + j, n, load(row + j, n, 0) + load(added + j, n, 0)); });
    }
    return seen;
  }

  // Draws what is kept, and multiplies the row with it.
  void drop(int64_t head, int64_t index, int64_t seen, float* kept, float* row) const {
    dropout.draw(head, index, seen, kept);
    times(kept, seen, row);
  }

  static void times(const float* factors, int64_t count, float* row) {
    each(count, [&](int64_t j, auto n) { store(row + j, n, load(row + j, n, 0) * load(factors + j, n, 0)); });
  }
};

}  // namespace multimax

extern "C" {

// Writes output and states.
void attend(int64_t kind, const multimax::Problem* problem) {
  multimax::with_mapping(kind, [&](auto mapping) {
    multimax::Attention<typename decltype(mapping)::type>(*problem).forward();
  });
}

// Writes the gradients, from states and grad_output.
void attend_backward(int64_t kind, const multimax::Problem* problem) {
  multimax::with_mapping(kind, [&](auto mapping) {
    multimax::Attention<typename decltype(mapping)::type>(*problem).backward();
  });
}
}
