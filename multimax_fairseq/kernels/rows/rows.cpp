// Mappings of rows of fp32 scores, and their gradients.

#include "mappings.hpp"

namespace multimax {

struct Problem {
  int64_t rows, width, threads;
  Numbers numbers;
  // Rows are shared and summed in groups with the same numbers, which do not depend on the threads.
  const int64_t of_group = rows_of_a_sum(width), groups_of_each = (numbers.rows_of_each + of_group - 1) / of_group;
  const int64_t groups = rows / numbers.rows_of_each * groups_of_each;

  // Calls body(mapping, first row, end, group, room) for each group.
  template <class Mapping, class Body>
  void each_group(Body body) const {
    share(groups, threads, [&](int64_t group, int64_t last, int64_t) {
      struct alignas(64) Line { char bytes[64]; };  // vectors that lie in two lines of the cache take twice the time
      std::vector<Line> room(room_for(width) / 16 + 1);
      for (; group < last; ++group) {
        const int64_t place = group / groups_of_each, start = place * numbers.rows_of_each;
        const int64_t row = start + group % groups_of_each * of_group;
        body(numbers.mapping<Mapping>(place), row, std::min(row + of_group, start + numbers.rows_of_each), group,
             reinterpret_cast<float*>(room.data()));
      }
    });
  }
};

template <class Mapping>
void forward(const Problem& problem, const float* scores, float* probabilities) {
  const int64_t width = problem.width;
  problem.each_group<Mapping>([&](const Mapping mapping, int64_t row, int64_t end, int64_t, float* room) {
    if constexpr (Mapping::ROWS_ABREAST) {
      for (int height; width <= FEW_SCORES && row < end; row += height) {
        height = std::min(int64_t(LANES), end - row);
        uint32_t alone = mapping.forward_abreast(scores + row * width, probabilities + row * width, width, height);
        for (; alone; alone &= alone - 1) {
          const int64_t at = (row + __builtin_ctz(alone)) * width;
          mapping.forward(scores + at, probabilities + at, width, room);
        }
      }
    }
    for (; row < end; ++row) mapping.forward(scores + row * width, probabilities + row * width, width, room);
  });
}

template <class Mapping>
void backward(const Problem& problem, const float* scores, const float* probabilities, const float* grad,
              float* grad_scores) {
  const int64_t width = problem.width, number = Mapping::NUMBERS;
  std::vector<double> parts(problem.groups * number);
  problem.each_group<Mapping>([&](const Mapping mapping, int64_t row, int64_t end, int64_t group, float* room) {
    typename Mapping::Sums sums;
    if constexpr (Mapping::ROWS_ABREAST) {
      for (int height; width <= FEW_SCORES && row < end; row += height) {
        const int64_t at = row * width;
        height = std::min(int64_t(LANES), end - row);
        mapping.backward_abreast(probabilities + at, grad + at, grad_scores + at, width, height, sums);
      }
    }
    for (; row < end; ++row) {
      const int64_t at = row * width;
      mapping.backward(scores + at, probabilities + at, grad + at, grad_scores + at, width, sums, room);
    }
    mapping.add(sums, parts.data() + group * number);  // all by value: what has no address stays in registers
  });
  problem.numbers.give(parts, number, problem.groups_of_each);
}

}  // namespace multimax

extern "C" {

// scores, probabilities: (rows, width).
void map_rows(int64_t kind, const multimax::Numbers* numbers, int64_t rows, int64_t width, int64_t threads,
              const float* scores, float* probabilities) {
  const multimax::Problem problem = {rows, width, threads, *numbers};
  multimax::with_mapping(kind, [&](auto mapping) {
    multimax::forward<typename decltype(mapping)::type>(problem, scores, probabilities);
  });
}

// grad, grad_scores: dL/dp and dL/dx, (rows, width).
void map_rows_backward(int64_t kind, const multimax::Numbers* numbers, int64_t rows, int64_t width, int64_t threads,
                       const float* scores, const float* probabilities, const float* grad, float* grad_scores) {
  const multimax::Problem problem = {rows, width, threads, *numbers};
  multimax::with_mapping(kind, [&](auto mapping) {
    multimax::backward<typename decltype(mapping)::type>(problem, scores, probabilities, grad, grad_scores);
  });
}
}
