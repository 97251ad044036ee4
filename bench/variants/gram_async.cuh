// float32 rows, 8 < T <= 32, staged as in gram_tiled.cuh but by cp.async into two buffers: one is
// summed while the other fills, and no register holds what is on its way.
//
// The same tiles, slices, chunks and bounds on a lane's sum as gram_tiled.cuh; FFMA throughout.
#pragma once

#include "../../csrc/kernels/gram_tiled.cuh"
#include "async_copy.cuh"

namespace flatmtl::variants {

constexpr int kAsyncTasks = 32, kAsyncTile = 8;
constexpr int kStageColumns = 128;

// Floats of one buffer, with the padding of gram_tiled.cuh.
inline int buffer_floats(int tasks) {
  const int side = static_cast<int>(kernels::div_up(tasks, kAsyncTile));
  return side * (kAsyncTile * (kernels::kStageVectors + 1) + 1) * 4;
}

// Where a row starts in a buffer.
__device__ inline int row_offset(int row) { return kernels::stage_offset<float, kAsyncTile>(row); }

// Starts the copies of one stage; columns past the end become zero.
__device__ inline void copy_stage(const kernels::Rows<const float>& jac, int tasks, int64_t column,
                                  int64_t columns, float* buffer) {
  if (jac.aligned && column + kStageColumns <= columns) {
    constexpr int kVectors = kStageColumns / 4;
    for (int p = threadIdx.x; p < tasks * kVectors; p += blockDim.x) {
      const int row = p / kVectors, k = p % kVectors * 4;
      copy_async_vector(buffer + row_offset(row) + k, jac.row(row) + column + k);
    }
  } else {
    for (int e = threadIdx.x; e < tasks * kStageColumns; e += blockDim.x) {
      const int row = e / kStageColumns, k = e % kStageColumns;
      const bool there = column + k < columns;
      copy_async_float(buffer + row_offset(row) + k, jac.row(row) + (there ? column + k : 0),
                       there);
    }
  }
}

// Grid: chunks. partials: [T (T + 1) / 2, chunks]. Shared memory: two buffers, then [8, blockDim.x]
// floats for the exchange of sums.
static __global__ void __launch_bounds__(kernels::tile_threads(kAsyncTile), 2)
    gram_async_kernel(kernels::Rows<const float> jac, int tasks, int64_t columns,
                      kernels::TilePlan plan, int stage_floats, double* partials) {
  using kernels::Pack;
  FLATMTL_DYNAMIC_SHARED(float, buffers);
  float* exchange = buffers + 2 * stage_floats;

  const int side = (tasks + kAsyncTile - 1) / kAsyncTile, tiles = side * (side + 1) / 2;
  int slices = 1;  // as slices_of
  while (slices * 2 * tiles <= static_cast<int>(blockDim.x) && slices * 2 <= kernels::kStageVectors)
    slices *= 2;
  const int slice = threadIdx.x / tiles, tile = threadIdx.x - slice * tiles;
  const bool working = slice < slices;
  int ti = 0, tj = tile;
  while (tj >= side - ti) tj -= side - ti++;
  tj += ti;

  // Rows that are not there stay zero; copies never touch them.
  for (int e = threadIdx.x; e < 2 * stage_floats; e += blockDim.x) buffers[e] = 0;
  __syncthreads();

  const int64_t stages = (columns + kStageColumns - 1) / kStageColumns;
  const int64_t begin = blockIdx.x * plan.stages_per_chunk;
  const int64_t end = min(begin + plan.stages_per_chunk, stages);
  const int64_t flush_stages = max(1, kernels::kLaneTerms * slices / kStageColumns);
  copy_stage(jac, tasks, begin * kStageColumns, columns, buffers);
  commit_copies();

  for (int64_t from = begin; from < end; from += flush_stages) {
    float acc[kAsyncTile][kAsyncTile];
#pragma unroll
    for (int r = 0; r < kAsyncTile; ++r)
#pragma unroll
      for (int c = 0; c < kAsyncTile; ++c) acc[r][c] = 0;

    for (int64_t s = from; s < min(from + flush_stages, end); ++s) {
      const int now = static_cast<int>((s - begin) % 2);
      if (s + 1 < end)
        copy_stage(jac, tasks, (s + 1) * kStageColumns, columns,
                   buffers + (1 - now) * stage_floats);
      commit_copies();
      wait_copies<1>();
      __syncthreads();  // everyone's copies have come
      const float* tile_a = buffers + now * stage_floats + row_offset(ti * kAsyncTile);
      const float* tile_b = buffers + now * stage_floats + row_offset(tj * kAsyncTile);
#pragma unroll 1
      for (int q = working ? slice : kernels::kStageVectors; q < kernels::kStageVectors;
           q += slices) {
        Pack<float> a[kAsyncTile];
#pragma unroll
        for (int r = 0; r < kAsyncTile; ++r)
          a[r] = kernels::load_pack(tile_a + row_offset(r) + q * 4);
#pragma unroll
        for (int c = 0; c < kAsyncTile; ++c) {
          const Pack<float> b = kernels::load_pack(tile_b + row_offset(c) + q * 4);
#pragma unroll
          for (int r = 0; r < kAsyncTile; ++r)
#pragma unroll
            for (int v = 0; v < 4; ++v) acc[r][c] += a[r].lane[v] * b.lane[v];
        }
      }
      __syncthreads();  // the buffer has been read; the next round's copies go there
    }

    // Add the slices' lane sums in double, a row of every tile at a time.
#pragma unroll
    for (int r = 0; r < kAsyncTile; ++r) {
      __syncthreads();
#pragma unroll
      for (int c = 0; c < kAsyncTile; ++c) exchange[c * blockDim.x + threadIdx.x] = acc[r][c];
      __syncthreads();
      const int i = ti * kAsyncTile + r;
      for (int c = working ? slice : kAsyncTile; c < kAsyncTile; c += slices) {
        const int j = tj * kAsyncTile + c;
        if (i > j || j >= tasks) continue;
        double sum = 0;
#pragma unroll 1
        for (int g = 0; g < slices; ++g)
          sum += static_cast<double>(exchange[c * blockDim.x + g * tiles + tile]);
        double* partial =
            partials + blockIdx.x + kernels::triangle_index(i, j, tasks) * plan.chunks;
        *partial = from == begin ? sum : *partial + sum;
      }
    }
  }
}

// 8 < T <= kAsyncTasks. plan: tile_plan<float>(T, P). partials: triangle(T) * plan.chunks doubles.
inline cudaError_t gram_async(kernels::Rows<const float> jac, int tasks, int64_t columns,
                              const kernels::TilePlan& plan, double* partials,
                              cudaStream_t stream) {
  if (plan.chunks == 0) return cudaSuccess;
  const int floats = buffer_floats(tasks);
  const size_t shared = sizeof(float) * (2 * floats + kAsyncTile * plan.threads);
  return kernels::launch(gram_async_kernel, dim3(static_cast<unsigned>(plan.chunks)),
                         dim3(plan.threads), shared, stream, jac, tasks, columns, plan, floats,
                         partials);
}

}  // namespace flatmtl::variants
