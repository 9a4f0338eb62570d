// The mappings of rows. Each is a class with
//
//   Mapping(first, second)     its numbers: thresholds and gains; epsilon; c = alpha - 1
//   forward(scores, p, count, room)        writes the probabilities; returns the row's State. p may be scores
//   again(scores, state, p, count, room)   writes the same probabilities
//   backward(scores, p, grad, grad_scores, count, sums, room)   from dL/dp; grad_scores may be grad
//   add(sums, grads)           adds the gradients of its NUMBERS numbers, of the rows that `sums` has seen
//   forward_abreast(), backward_abreast()   the same of several short rows, where ROWS_ABREAST says that it has them
//
// A row has `count` numbers; a score of -inf is not there. `room` is scratch of room_for(count) numbers.

#pragma once

#include "softmax.hpp"
#include "sparse.hpp"

#include <algorithm>
#include <vector>

namespace multimax {

inline int64_t room_for(int64_t count) { return 3 * (count + LANES); }

// As in cpu.py. What belongs to row r is at place r / rows_of_each % count.
struct Numbers {
  const float *first, *second;
  float *grad_first, *grad_second;
  int64_t rows_of_each, count;

  template <class Mapping>
  Mapping mapping(int64_t place) const {
    return Mapping(first + (count > 1 ? place % count : 0), second);
  }

  // Writes the gradients of `number` numbers each, from those of groups of rows; `of_each` groups have the same ones.
  void give(const std::vector<double>& groups, int64_t number, int64_t of_each) const {
    std::vector<double> totals(count * number);
    for (size_t i = 0; i < groups.size(); ++i) {
      totals[i / number / of_each % count * number + i % number] += groups[i];
    }
    const auto middle = totals.end() - number / 2;  // the end, where there is one number
    std::copy(totals.begin(), middle, grad_first), std::copy(middle, totals.end(), grad_second);
  }
};

// How many rows (16,384 scores) are summed in fp32, before the sums are added in double precision.
inline int64_t rows_of_a_sum(int64_t width) { return width < (1 << 14) ? (1 << 14) / width : 1; }

template <class Mapping>
struct Type {
  using type = Mapping;
};

// Calls body with the Type at place `kind` of KINDS in cpu.py.
template <class Body>
inline void with_mapping(int64_t kind, Body body) {
  switch (kind) {
    case 0: return body(Type<MultiMax<0>>{});
    case 1: return body(Type<MultiMax<1>>{});
    case 2: return body(Type<MultiMax<2>>{});
    case 3: return body(Type<Sparsemax>{});
    case 4: return body(Type<Entmax<WholePower<2>>>{});
    case 5: return body(Type<Entmax<AnyPower>>{});
    case 6: return body(Type<Entmax<AnyPower, true>>{});
    default: return body(Type<EvSoftmax>{});
  }
}

}  // namespace multimax
