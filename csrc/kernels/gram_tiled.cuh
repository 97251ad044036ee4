// Gram matrices of float32 rows to T = 32, of many rows, and of float64: rows are staged in shared
// memory, and a thread holds a square tile of the triangle over a slice of the columns. T > 64: one
// block a pair of 64-row blocks, so that each row is read ceil(T / 64) times.
//
// Floor, determinism and shapes: gram.cuh. The same bits on every device, up to the contraction of
// a * b + c.
#pragma once

#include "gram_entry.cuh"
#include "gram_plan.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace flatmtl::kernels {

// The stage in shared memory: kStage columns of each row, as the arithmetic type. A vector of
// padding after every row and every tile puts the rows that neighbouring threads read on different
// banks.
template <class A>
constexpr int kStage = kStageVectors * (16 / sizeof(A));

template <class A, int kTile>
__device__ inline int stage_offset(int row) {
  constexpr int kVector = 16 / sizeof(A);
  return row * (kStage<A> + kVector) + row / kTile * kVector;
}

// Stages columns [column, column + kStage) of `count` rows, from row `first`; columns past the end
// and rows up to `padded` become zero.
template <class T, int kTile, bool kDifference>
__device__ inline void stage_rows(const Rows<const T>& jac, const Rows<const T>& sam, int64_t first,
                                  int count, int padded, int64_t column, int64_t columns,
                                  Acc<T>* buffer) {
  using A = Acc<T>;
  constexpr int kPack = Pack<T>::kSize, kPacks = kStage<A> / kPack, kVector = 16 / sizeof(A);
  constexpr int kBatch = kDifference ? 2 : 4;  // loads of a thread in flight, of each matrix
  const bool whole = jac.aligned && (!kDifference || sam.aligned) && column + kStage<A> <= columns;
  if (!whole) {  // by element: the last stage, or rows that are not aligned
#pragma unroll 1
    for (int e = threadIdx.x; e < padded * kStage<A>; e += blockDim.x) {
      const int row = e / kStage<A>, k = e % kStage<A>;
      A a = 0;
      if (row < count && column + k < columns) {
        a = to_acc(jac.row(first + row)[column + k]);
        if (kDifference) a = to_acc(sam.row(first + row)[column + k]) - a;
      }
      buffer[stage_offset<A, kTile>(row) + k] = a;
    }
    return;
  }
#pragma unroll 1  // registers: the tile's sums are live here
  for (int begin = threadIdx.x; begin < padded * kPacks; begin += kBatch * blockDim.x) {
    Pack<T> x[kBatch], s[kDifference ? kBatch : 1];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int p = begin + b * blockDim.x, row = p / kPacks;
      const int64_t at = column + p % kPacks * kPack;
      x[b] = row < count ? load_pack_stream(jac.row(first + row) + at) : zero_pack<T>();
      if (kDifference)
        s[kDifference ? b : 0] =
            row < count ? load_pack_stream(sam.row(first + row) + at) : zero_pack<T>();
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int p = begin + b * blockDim.x, row = p / kPacks;
      if (row >= padded) continue;
      A* out = buffer + stage_offset<A, kTile>(row) + p % kPacks * kPack;
#pragma unroll
      for (int v = 0; v < kPack; v += kVector) {
        Pack<A> values;
#pragma unroll
        for (int w = 0; w < kVector; ++w) {
          const A a = to_acc(x[b].lane[v + w]);
          values.lane[w] = kDifference ? to_acc(s[kDifference ? b : 0].lane[v + w]) - a : a;
        }
        store_pack(out + v, values);
      }
    }
  }
}

// Grid: (chunks, pairs of row blocks). partials: [T (T + 1) / 2, chunks].
// Tile (ti, tj) is the product of the rows ti * kTile + r of block a and tj * kTile + c of block b.
template <class T, bool kDifference>
__global__ void __launch_bounds__(tile_threads(kTileOf<Acc<T>>), 2)
    gram_tiled_kernel(Rows<const T> jac, Rows<const T> sam, int tasks, int64_t columns,
                      TilePlan plan, double* partials) {
  using A = Acc<T>;
  constexpr int kTile = kTileOf<A>, kVector = 16 / sizeof(A);
  FLATMTL_DYNAMIC_SHARED(A, buffer);

  int block_a = 0, block_b = blockIdx.y;  // pair (a, b), a <= b, row by row
  while (block_b >= plan.row_blocks - block_a) block_b -= plan.row_blocks - block_a++;
  block_b += block_a;
  const bool diagonal = block_a == block_b;
  const int first_a = block_a * kBlockRows, first_b = block_b * kBlockRows;
  const int rows_a = min(tasks - first_a, kBlockRows), rows_b = min(tasks - first_b, kBlockRows);
  const int side_a = (rows_a + kTile - 1) / kTile, side_b = (rows_b + kTile - 1) / kTile;
  const int tiles = diagonal ? side_a * (side_a + 1) / 2 : side_a * side_b;

  int slices = 1;  // as slices_of, for this pair
  while (slices * 2 * tiles <= static_cast<int>(blockDim.x) && slices * 2 <= kStageVectors)
    slices *= 2;
  const int slice = threadIdx.x / tiles, tile = threadIdx.x - slice * tiles;
  const bool working = slice < slices;
  int ti = 0, tj = tile;
  if (diagonal) {
    while (tj >= side_a - ti) tj -= side_a - ti++;
    tj += ti;
  } else {
    ti = tile / side_b;
    tj = tile - ti * side_b;
  }
  A* buffer_b = diagonal ? buffer : buffer + stage_offset<A, kTile>(side_a * kTile);
  const A* tile_a = buffer + stage_offset<A, kTile>(ti * kTile);
  const A* tile_b = buffer_b + stage_offset<A, kTile>(tj * kTile);

  const int64_t stages = (columns + kStage<A> - 1) / kStage<A>;
  const int64_t begin = blockIdx.x * plan.stages_per_chunk;
  const int64_t end = min(begin + plan.stages_per_chunk, stages);
  // A lane adds kStage / slices terms a stage; float64 lanes need no limit.
  const int lane_stages = max(1, kLaneTerms * slices / kStage<A>);
  const int64_t flush_stages = sizeof(A) == 8 ? plan.stages_per_chunk : lane_stages;

  for (int64_t from = begin; from < end; from += flush_stages) {
    A acc[kTile][kTile];
#pragma unroll
    for (int r = 0; r < kTile; ++r)
#pragma unroll
      for (int c = 0; c < kTile; ++c) acc[r][c] = 0;

    for (int64_t s = from; s < min(from + flush_stages, end); ++s) {
      __syncthreads();  // the stage before has been read
      stage_rows<T, kTile, kDifference>(jac, sam, first_a, rows_a, side_a * kTile, s * kStage<A>,
                                        columns, buffer);
      if (!diagonal)
        stage_rows<T, kTile, kDifference>(jac, sam, first_b, rows_b, side_b * kTile, s * kStage<A>,
                                          columns, buffer_b);
      __syncthreads();
#pragma unroll 1
      for (int q = working ? slice : kStageVectors; q < kStageVectors; q += slices) {
        Pack<A> a[kTile];
#pragma unroll
        for (int r = 0; r < kTile; ++r)
          a[r] = load_pack(tile_a + stage_offset<A, kTile>(r) + q * kVector);
#pragma unroll
        for (int c = 0; c < kTile; ++c) {
          const Pack<A> b = load_pack(tile_b + stage_offset<A, kTile>(c) + q * kVector);
#pragma unroll
          for (int r = 0; r < kTile; ++r)
#pragma unroll
            for (int v = 0; v < kVector; ++v) acc[r][c] += a[r].lane[v] * b.lane[v];
        }
      }
    }

    // Add the slices' lane sums in double. The stage's memory is reused: [kTile, blockDim.x].
#pragma unroll
    for (int r = 0; r < kTile; ++r) {
      __syncthreads();
#pragma unroll
      for (int c = 0; c < kTile; ++c) buffer[c * blockDim.x + threadIdx.x] = acc[r][c];
      __syncthreads();
      const int i = ti * kTile + r;  // in block a
      for (int c = working ? slice : kTile; c < kTile; c += slices) {
        const int j = tj * kTile + c;  // in block b
        if (i >= rows_a || j >= rows_b || (diagonal && i > j)) continue;
        double sum = 0;
#pragma unroll 1
        for (int g = 0; g < slices; ++g)
          sum += static_cast<double>(buffer[c * blockDim.x + g * tiles + tile]);
        double* partial =
            partials + blockIdx.x + triangle_index(first_a + i, first_b + j, tasks) * plan.chunks;
        *partial = from == begin ? sum : *partial + sum;
      }
    }
  }
}

// ---- launcher ----------------------------------------------------------------------------------

// partials: triangle(T) * tile_plan(...).chunks doubles.
template <class T, bool kDifference>
cudaError_t gram_tiled(Rows<const T> jac, Rows<const T> sam, int tasks, int64_t columns,
                       double* partials, cudaStream_t stream) {
  const TilePlan plan = tile_plan<Acc<T>>(tasks, columns);
  if (plan.chunks == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(plan.chunks),
                  static_cast<unsigned>(triangle(plan.row_blocks)));
  return launch(gram_tiled_kernel<T, kDifference>, grid, dim3(plan.threads),
                static_cast<size_t>(plan.shared_bytes), stream, jac, sam, tasks, columns, plan,
                partials);
}

}  // namespace flatmtl::kernels
