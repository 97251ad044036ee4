// Counts the step of a stream rng = (seed, step), where no block of a launch can: they read it in
// no order.
#pragma once

#include "launch.cuh"

namespace flatmtl::kernels {

template <int kStep>
__global__ void advance_kernel(int64_t* rng) {
  rng[1] = static_cast<int64_t>(static_cast<uint64_t>(rng[1]) + kStep);
}

}  // namespace flatmtl::kernels
