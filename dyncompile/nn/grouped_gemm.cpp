// Grouped GEMM: rows times the matrix of each of their groups, in one call.
//
// A matrix [depth, width] is packed in panels of kPanel columns, [panels, depth, kPanel]: a panel stays in the cache
// while it meets kRows rows at a time, whose products are summed up in registers.

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>

using Lane = at::vec::Vectorized<float>;

constexpr int64_t kPanel = 2 * Lane::size();
constexpr int64_t kRows = 6;
constexpr int64_t kTogether = 192;  // rows that meet all panels before the next do: they stay in the cache

// Loops over rows are unrolled, or the sums would go through memory in every step.
template <int64_t rows>
static void multiply(
    const float* const* from, const float* panel, int64_t depth, const float* bias, float* const* to, int64_t columns) {
  Lane left[rows], right[rows];
#pragma GCC unroll 6
  for (int64_t r = 0; r < rows; ++r) {
    left[r] = right[r] = Lane(0.0f);
  }
  for (int64_t k = 0; k < depth; ++k, panel += kPanel) {
    const Lane first = Lane::loadu(panel), second = Lane::loadu(panel + Lane::size());
#pragma GCC unroll 6
    for (int64_t r = 0; r < rows; ++r) {
      const Lane x(from[r][k]);
      left[r] = at::vec::fmadd(x, first, left[r]);
      right[r] = at::vec::fmadd(x, second, right[r]);
    }
  }
#pragma GCC unroll 6
  for (int64_t r = 0; r < rows; ++r) {
    const float* before = bias ? bias : to[r];
    if (columns == kPanel) {
      (left[r] + Lane::loadu(before)).store(to[r]);
      (right[r] + Lane::loadu(before + Lane::size())).store(to[r] + Lane::size());
    } else {
      float made[kPanel];
      left[r].store(made);
      right[r].store(made + Lane::size());
      for (int64_t i = 0; i < columns; ++i) {
        to[r][i] = before[i] + made[i];
      }
    }
  }
}

template <int64_t most>
static void multiply_up_to(
    int64_t rows,
    const float* const* from,
    const float* panel,
    int64_t depth,
    const float* bias,
    float* const* to,
    int64_t columns) {
  if (rows == most) {
    multiply<most>(from, panel, depth, bias, to, columns);
  } else if constexpr (most > 1) {
    multiply_up_to<most - 1>(rows, from, panel, depth, bias, to, columns);
  }
}

extern "C" int64_t panel() {
  return kPanel;
}

// Lists, for one group after the other, the rows that open it, and where the list of each group ends: of
// opened [rows, groups]. Returns how many are listed.
extern "C" int64_t list_rows(const bool* opened, int64_t rows, int64_t groups, int64_t* listed, int64_t* stops) {
  int64_t count = 0;
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t r = 0; r < rows; ++r) {
      if (opened[r * groups + g]) {
        listed[count++] = r;
      }
    }
    stops[g] = count;
  }
  return count;
}

// Rows come in blocks of `block`. Products of group g are those of the blocks before stops[g]; the i-th is of block
// from[i] of x, or of the i-th where `from` is null, and goes into block to[i] of y, likewise. It is added to the bias
// [groups, width], or else to what is there.
extern "C" void grouped_gemm(
    const float* x,
    const int64_t* from,
    const float* matrices,
    const float* bias,
    float* y,
    const int64_t* to,
    const int64_t* stops,
    int64_t groups,
    int64_t block,
    int64_t depth,
    int64_t width,
    int64_t threads) {
  const int64_t panels = (width + kPanel - 1) / kPanel;
  const auto row = [block](const int64_t* blocks, int64_t i) {
    return blocks ? blocks[i / block] * block + i % block : i;
  };
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    int64_t start = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t stop = stops[g] * block;
      for (; start < stop; start = std::min(start + kTogether, stop)) {
        const int64_t end = std::min(start + kTogether, stop);
        // Groups may add to one row, but no two panels do, and a panel is always the same thread's: nobody need wait.
#pragma omp for schedule(static) nowait
        for (int64_t p = 0; p < panels; ++p) {
          const int64_t column = p * kPanel, columns = std::min(kPanel, width - column);
          const float* panel = matrices + (g * panels + p) * depth * kPanel;
          const float* own = bias ? bias + g * width + column : nullptr;
          for (int64_t i = start; i < end; i += kRows) {
            const int64_t rows = std::min(kRows, end - i);
            const float* sources[kRows];
            float* targets[kRows];
            for (int64_t r = 0; r < rows; ++r) {
              sources[r] = x + row(from, i + r) * depth;
              targets[r] = y + row(to, i + r) * width + column;
            }
            multiply_up_to<kRows>(rows, sources, panel, depth, own, targets, columns);
          }
        }
      }
    }
  }
}
