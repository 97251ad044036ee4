// Deterministic two-stage sums.
//
// Stage one: a block sums one *chunk* of columns and writes a double to partials[sum * chunks +
// chunk]. Stage two: one block a sum adds its partials in a fixed order. Chunks are cut from the
// shapes alone (never from the device), and no atomics are used: the same input gives the same
// bits.
//
// Accuracy: a lane adds at most kLaneTerms products in the arithmetic type; lanes, warps and chunks
// are added in double. The error is that of a float32 sum of kLaneTerms terms, whatever P is.
#pragma once

#include "launch.cuh"

namespace flatmtl::kernels {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kLaneTerms = 128;
constexpr int64_t kMaxChunks = 4096;

// The sum over a warp's lanes, on every lane, in the order of a butterfly.
__device__ inline double warp_sum(double x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// The sum over the block, on every thread. blockDim.x is a multiple of 32, at most 1024.
__device__ inline double block_sum(double x) {
  __shared__ double warps[kWarp];
  const int warp = threadIdx.x / kWarp, count = blockDim.x / kWarp;
  x = warp_sum(x);
  if (count == 1) {
    __syncwarp();  // as the barriers below: what was read before may be written now
    return x;
  }
  __syncthreads();  // an earlier call's readers are done
  if (threadIdx.x % kWarp == 0) warps[warp] = x;
  __syncthreads();
  double total = 0;
  for (int w = 0; w < count; ++w) total += warps[w];
  return total;
}

// The largest x of the block, on every thread; NaN if there is one.
__device__ inline double block_max(double x) {
  __shared__ double warps[kWarp];
  const auto larger = [](double a, double b) { return b > a || b != b ? b : a; };
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    x = larger(x, __shfl_xor_sync(~0u, x, offset));
  if (blockDim.x == kWarp) {
    __syncwarp();
    return x;
  }
  __syncthreads();  // an earlier call's readers are done
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) x = larger(x, warps[w]);
  return x;
}

// total[k] += sum over the block of acc[k], for N sums at once; total is in shared memory, a
// barrier follows. Lane sums are exchanged through shared memory, kRound sums a round: for N sums
// that costs N / 8 warp reductions a warp where shuffling each sum in each warp would cost N, and
// the additions in double are what is dear on devices with few float64 units.
template <int N, class A>
__device__ inline void add_block_sums(const A (&acc)[N], double* total) {
  constexpr int kRound = N < 16 ? N : 16;
  constexpr int kWarps = kThreads / kWarp;
  __shared__ A lanes[kRound][kThreads];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int first = 0; first < N; first += kRound) {
    __syncthreads();  // the last round's readers are done
#pragma unroll
    for (int k = 0; k < kRound; ++k)
      if (first + k < N) lanes[k][threadIdx.x] = acc[first + k];
    __syncthreads();
    for (int k = warp; k < kRound && first + k < N; k += kWarps) {
      double sum = 0;
#pragma unroll
      for (int m = 0; m < kWarps; ++m) sum += static_cast<double>(lanes[k][m * kWarp + lane]);
      sum = warp_sum(sum);
      if (lane == 0) total[first + k] += sum;
    }
  }
  __syncthreads();
}

enum class Finish { kSum, kSquareRoot };

// out[s] = sum (or its square root) of partials[s, 0 .. chunks). One block a sum.
template <Finish kFinish>
__global__ void __launch_bounds__(kThreads)
    finish_sums_kernel(const double* partials, int64_t chunks, double* out) {
  const double* row = partials + static_cast<int64_t>(blockIdx.x) * chunks;
  double sum = 0;
  for (int64_t c = threadIdx.x; c < chunks; c += kThreads) sum += row[c];
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = kFinish == Finish::kSquareRoot ? sqrt(sum) : sum;
}

// chunks == 0 is a sum of nothing: the outputs are 0.
template <Finish kFinish>
cudaError_t finish_sums(const double* partials, int64_t sums, int64_t chunks, double* out,
                        cudaStream_t stream) {
  if (sums == 0) return cudaSuccess;
  return launch(finish_sums_kernel<kFinish>, dim3(static_cast<unsigned>(sums)), dim3(kThreads), 0,
                stream, partials, chunks, out);
}

}  // namespace flatmtl::kernels
