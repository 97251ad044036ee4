// What the Gram kernels share: which matrices they sum, and where an entry's partial sums lie.
#pragma once

#include <cstdint>

#include "launch.cuh"

namespace flatmtl::kernels {

// Of the rows of J, of the differences S - J, or of each.
enum class Of { kRows, kDifference, kBoth };

// Entry (i, j), i <= j, of the upper triangle, row by row.
__host__ __device__ inline int64_t triangle_index(int64_t i, int64_t j, int64_t tasks) {
  return i * tasks - i * (i - 1) / 2 + (j - i);
}

}  // namespace flatmtl::kernels
