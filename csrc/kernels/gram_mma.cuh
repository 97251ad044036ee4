// Gram matrices on tensor cores (sm_80 and later): of 9 to 64 rows in half precision, and of 33 to
// 64 in float32. Rows in half precision are operands as they are; float32 rows, and all
// differences, are three bfloat16 parts, six products an element pair (mma.cuh).
//
// A lane's 16-byte pack of a row is an operand as it comes from memory: no shared memory, no
// exchange. Rows stand in blocks of 8; a warp reads 128 bytes of each row (two packs a lane, one
// after the other) and sums the 16 x 8 tiles that touch the upper triangle, in registers. Packs of
// the next step are on their way while this one's products run.
//
// Floor and shapes: gram.cuh. Exactness: within one pack (16 or 32 columns) a tensor core cuts sums
// off, then packs are added in float32, rounded to nearest, at most kLaneTerms of them a lane;
// lanes of different warps, and spans, are added in double. A product may lose one unit in the last
// place of the largest of its 16, always towards zero: below float32's own error where the products
// of neighbouring columns are alike, some 10 times above it (about 5e-7, on hardware with no spare
// bits) where few columns have most of the length. Determinism: run to run on one architecture;
// what is cut off differs between them. Rows in another order give the same up to these bits.
#pragma once

#include "gram_entry.cuh"
#include "gram_plan.h"
#include "mma.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace flatmtl::kernels {

constexpr int kMmaThreads = kMmaWarps * kWarp;

// A constant of its own: device code may not call host constexpr functions.
template <int kBlocks>
constexpr int kMmaTiles = mma_tiles(kBlocks);

// Packs of a row in flight a lane: about eight in all.
template <int kBlocks, bool kSam>
constexpr int kMmaUnroll = kBlocks == 2            ? (kSam ? 2 : 4)
                           : kBlocks == 4 && !kSam ? 2
                                                   : 1;

// Whether a step's packs are on their way while the one before is summed. Not where many rows are
// split and that leaves no registers (differences; on sm_80, which has no others for addresses, the
// rows too): there the packs of other warps are.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kSplitAhead = false;
#else
constexpr bool kSplitAhead = true;
#endif
template <class T, int kBlocks, bool kSam>
constexpr bool kMmaAhead = kBlocks <= 4 || (!kSam && (sizeof(T) == 2 || kSplitAhead));

// Blocks a multiprocessor should hold: as many as the sums' registers allow.
template <int kBlocks, Of kOf>
constexpr int kMmaResident = kBlocks == 8 || (kBlocks == 4 && kOf == Of::kBoth) ? 2
                             : kBlocks == 2 && kOf != Of::kBoth                 ? 4
                                                                                : 3;

// A pack of a row in half precision: an operand as it is.
template <class T>
struct Halves {
  Quad half[2];
};

template <class T>
__device__ inline Halves<T> operand(const Pack<T>& pack) {
  static_assert(sizeof(T) == 2, "eight columns");
  Halves<T> out;
  memcpy(&out, &pack, sizeof(pack));
  return out;
}

__device__ inline Split operand(const Pack<float>& pack) {
  const float x[4] = {pack.lane[0], pack.lane[1], pack.lane[2], pack.lane[3]};
  return split(x);
}

// Columns 4 h ... 4 h + 3 of sam - jac.
template <class T, int N>
__device__ inline Split difference(const Pack<T, N>& sam, const Pack<T, N>& jac, int h) {
  float x[4];
#pragma unroll
  for (int v = 0; v < 4; ++v) x[v] = to_acc(sam.lane[4 * h + v]) - to_acc(jac.lane[4 * h + v]);
  return split(x);
}

template <class T>
__device__ inline void mma(float (&c)[4], const Halves<T>& top, const Halves<T>& bottom,
                           const Halves<T>& right) {
  mma<T>(c, top.half[0], bottom.half[0], right.half[0]);
  mma<T>(c, top.half[1], bottom.half[1], right.half[1]);
}

// acc += the tiles of x x^T that touch the upper triangle; x[r]: the rows 8 r ... 8 r + 7.
template <int kBlocks, class Operand>
__device__ inline void add_tiles(const Operand (&x)[kBlocks], float (&acc)[kMmaTiles<kBlocks>][4]) {
  int tile = 0;
#pragma unroll
  for (int row = 0; row < kBlocks; row += 2)
#pragma unroll
    for (int col = row; col < kBlocks; ++col, ++tile) {
      float c[4] = {0, 0, 0, 0};
      mma(c, x[row], x[row + 1], x[col]);
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[tile][e] += c[e];  // rounded to nearest
    }
}

// The packs of a warp's lanes, N columns each: row g of every block of 8, four packs side by side.
template <class T, int kBlocks, int N>
struct LaneRows {
  Rows<const T> rows;
  int tasks;
  int64_t columns;

  // Rows and columns that are not there are zero.
  __device__ void load(Pack<T, N> (&x)[kBlocks], int64_t first, int lane) const {
    const int64_t column = first + lane % kMmaLanes * N, block = 8 * rows.stride;
    // moves on: eight addresses would cost registers
    const T* address = rows.row(lane / kMmaLanes);
    int left = tasks - lane / kMmaLanes;
    if (rows.aligned && first + kMmaLanes * N <= columns) {
#pragma unroll
      for (int r = 0; r < kBlocks; ++r, address += block, left -= 8)
        x[r] = left > 0 ? load_pack_stream<T, N>(address + column) : zero_pack<T, N>();
    } else {
#pragma unroll
      for (int r = 0; r < kBlocks; ++r, address += block, left -= 8)
        x[r] = left > 0 ? load_guarded<T, N>(address, column, columns) : zero_pack<T, N>();
    }
  }
};

// partials: [T (T + 1) / 2, chunks]; of both: of the rows, then of the differences
template <class T, int kBlocks, Of kOf>
__global__ void __launch_bounds__(kMmaThreads, kMmaResident<kBlocks, kOf>)
    gram_mma_kernel(Rows<const T> jac, Rows<const T> sam, int tasks, int64_t columns,
                    StripPlan plan, double* partials) {
  constexpr bool kSam = kOf != Of::kRows;
  constexpr int kPack = Pack<T>::kSize, kUnroll = kMmaUnroll<kBlocks, kSam>;
  constexpr bool kAhead = kMmaAhead<T, kBlocks, kSam>;
  constexpr int kWide = kAhead ? kPack : 4;   // columns of a pack here
  constexpr int kPerRun = 2 * kPack / kWide;  // packs of a lane in a warp's run of 128 bytes
  constexpr int kTiles = kMmaTiles<kBlocks>, kMatrices = kOf == Of::kBoth ? 2 : 1;
  // Element e of a tile is thread e's alone, here and at the end.
  __shared__ double total[kMatrices][kTiles][kMmaThreads];
  __shared__ float sums[kMmaWarps][kMmaThreads];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int m = 0; m < kMatrices; ++m)
#pragma unroll
    for (int k = 0; k < kTiles; ++k) total[m][k][threadIdx.x] = 0;

  const LaneRows<T, kBlocks, kWide> plain{jac, tasks, columns}, perturbed{sam, tasks, columns};
  const int steps = plan.steps * (kPack / kWide);
  const int64_t span = static_cast<int64_t>(plan.steps) * kMmaWarps * kMmaLanes * kPack;
  for (int64_t start = blockIdx.x * span; start < columns; start += plan.chunks * span) {
    float acc[kMatrices][kTiles][4];
#pragma unroll
    for (int m = 0; m < kMatrices; ++m)
#pragma unroll
      for (int k = 0; k < kTiles; ++k)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[m][k][e] = 0;

    Pack<T, kWide> x[kUnroll][kBlocks], s[kSam ? kUnroll : 1][kBlocks];
    const auto load = [&](int u, int step) {
      const int64_t run = static_cast<int64_t>(step / kPerRun) * kMmaWarps + warp;
      const int64_t first = start + (run * kPerRun + step % kPerRun) * kMmaLanes * kWide;
      plain.load(x[u], first, lane);
      if constexpr (kSam) perturbed.load(s[u], first, lane);
    };
    if constexpr (kAhead) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) load(u, u);
    }
#pragma unroll 1
    for (int step = 0; step < steps; step += kUnroll) {
      const bool more = kAhead && step + kUnroll < steps;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if constexpr (!kAhead) load(u, step + u);
        if constexpr (kOf != Of::kDifference) {
          decltype(operand(x[0][0])) rows[kBlocks];
#pragma unroll
          for (int r = 0; r < kBlocks; ++r) rows[r] = operand(x[u][r]);
          if (!kSam && more) load(u, step + kUnroll + u);
          add_tiles(rows, acc[0]);
        }
        if constexpr (kSam) {
#pragma unroll
          for (int h = 0; h < kWide / 4; ++h) {
            Split rows[kBlocks];
#pragma unroll
            for (int r = 0; r < kBlocks; ++r) rows[r] = difference(s[u][r], x[u][r], h);
            if (h == kWide / 4 - 1 && more) load(u, step + kUnroll + u);
            add_tiles(rows, acc[kMatrices - 1]);
          }
        }
      }
    }

    // Sums of the warps, a tile at a time.
#pragma unroll
    for (int m = 0; m < kMatrices; ++m)
#pragma unroll
      for (int k = 0; k < kTiles; ++k) {
        __syncthreads();  // the tile before has been read
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[warp][e * kWarp + lane] = acc[m][k][e];
        __syncthreads();
        double sum = total[m][k][threadIdx.x];
#pragma unroll
        for (int w = 0; w < kMmaWarps; ++w) sum += static_cast<double>(sums[w][threadIdx.x]);
        total[m][k][threadIdx.x] = sum;
      }
  }

  const int64_t entries = static_cast<int64_t>(tasks) * (tasks + 1) / 2;
  int tile = 0;
#pragma unroll
  for (int row = 0; row < kBlocks; row += 2)
#pragma unroll
    for (int col = row; col < kBlocks; ++col, ++tile) {
      const int i = 8 * row + lane / kMmaLanes + 8 * (warp / 2);
      const int j = 8 * col + 2 * (lane % kMmaLanes) + warp % 2;
      if (i > j || j >= tasks) continue;
#pragma unroll
      for (int m = 0; m < kMatrices; ++m)
        partials[(m * entries + triangle_index(i, j, tasks)) * plan.chunks + blockIdx.x] =
            total[m][tile][threadIdx.x];
    }
}

// ---- launchers ---------------------------------------------------------------------------------

// partials: triangle(T) * mma_plan(...).chunks doubles; twice as many of both.
// kFewest: rows that it is compiled for.
template <class T, Of kOf, int kFewest = (sizeof(T) == 4 ? kFloatTasks : kSmallTasks) + 1>
cudaError_t gram_mma(Rows<const T> jac, Rows<const T> sam, int tasks, int64_t columns,
                     double* partials, cudaStream_t stream) {
  const StripPlan plan = mma_plan(tasks, columns, Pack<T>::kSize);
  if (plan.chunks == 0) return cudaSuccess;
  const auto run = [&](auto kernel) {
    return launch(kernel, dim3(static_cast<unsigned>(plan.chunks)), dim3(kMmaThreads), 0, stream,
                  jac, sam, tasks, columns, plan, partials);
  };
  switch (mma_blocks(tasks)) {
    case 2:
      if constexpr (kFewest <= 16) return run(gram_mma_kernel<T, 2, kOf>);
      break;
    case 4:
      if constexpr (kFewest <= 32) return run(gram_mma_kernel<T, 4, kOf>);
      break;
    case 6:
      if constexpr (kOf != Of::kBoth) return run(gram_mma_kernel<T, 6, kOf>);
      break;
    case 8:
      if constexpr (kOf != Of::kBoth) return run(gram_mma_kernel<T, 8, kOf>);
      break;
  }
  static_assert(kMmaTasks == 64 && kMmaPairTasks == 32 && kFloatTasks == 32, "one case each");
  return cudaErrorInvalidValue;
}

}  // namespace flatmtl::kernels
