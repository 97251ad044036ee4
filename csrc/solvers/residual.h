// How well a solve satisfies its equations. A residual is the largest componentwise backward error
// of the method's optimality equations: for every row, |sum of the terms| / sum of |terms|. It does
// not depend on any scale, and rounding alone keeps it near 1e-16 however small the sum is.
#pragma once

#include <cmath>

#include "team.h"

namespace flatmtl {

constexpr double kTolerance = 1e-9;  // at most: solved
constexpr double kUseless = 1e-2;    // above: the iterate is not worth using

// |sum| / magnitude; 0 / 0 = 0, and 1 for what is no number.
FLATMTL_HD inline double backward_error(double sum, double magnitude) {
  if (magnitude == 0) return 0;
  const double error = fabs(sum) / magnitude;
  return error == error ? error : 1;
}

}  // namespace flatmtl
