// Gram matrices of the rows of J [T, P]:  G = J J^T,  of the differences S - J,  of both in one
// sweep, and row norms.
//
// Floor: every row is read once, T P elements (2 T P for the difference and for both), nothing but
// the partial sums is written (at most 16 MiB of doubles, or 4096 chunks of T <= 8). Determinism:
// run to run, and the same on every device up to the contraction of a * b + c: chunks are cut from
// shapes (gram_plan.h), lane sums have at most kLaneTerms terms, chunks are added in order. Shapes:
// any T
// >= 1, any P >= 0, any row stride and alignment. G is exactly symmetric.
//
//   T <= 8    gram_small_kernel: a thread loads a pack of every row and holds the triangle of T
//   (T+1)/2
//             sums in registers.
//   T >  8    gram_tiled_kernel: rows are staged in shared memory; a thread holds a 4 x 4 or 8 x 8
//   tile
//             of the triangle over a slice of the columns. T > 64: one block a pair of 64-row
//             blocks.
//
// Both: gram_small_kernel for T <= 4, where two triangles fit the registers without a spill; for
// more rows the bindings run the two kernels one after the other (3 T P). The plan is the same, and
// so is every lane's sum: the bits are those of the two alone.
#pragma once

#include "gram_plan.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace flatmtl::kernels {

// Entry (i, j), i <= j, of the upper triangle, row by row.
__host__ __device__ inline int64_t triangle_index(int64_t i, int64_t j, int64_t tasks) {
  return i * tasks - i * (i - 1) / 2 + (j - i);
}

// A constant of its own: device code may not call host constexpr functions.
template <int kTasks, bool kSam>
constexpr int kSmallUnroll = small_unroll(kTasks, kSam);

enum class Of { kRows, kDifference, kBoth };

// Blocks a multiprocessor should hold. Two where 128 registers a thread are enough; the packs of
// two matrices, or sums in float64, need more.
template <class T, int kTasks, Of kOf>
constexpr int small_blocks =
    sizeof(T) == 8 || (sizeof(T) == 2 && kOf != Of::kRows && kTasks > 5) ? 1 : 2;

// acc += the upper triangle of a a^T
template <int kTasks, class A>
__device__ inline void add_triangle(const A (&a)[kTasks], A (&acc)[kTasks * (kTasks + 1) / 2]) {
  int e = 0;
#pragma unroll
  for (int i = 0; i < kTasks; ++i)
#pragma unroll
    for (int j = i; j < kTasks; ++j) acc[e++] += a[i] * a[j];
}

// partials: [T (T + 1) / 2, chunks]; of both: of the rows, then of the differences
template <class T, int kTasks, Of kOf>
__global__ void __launch_bounds__(kThreads, small_blocks<T, kTasks, kOf>)
    gram_small_kernel(Rows<const T> jac, Rows<const T> sam, int64_t columns, StripPlan plan,
                      double* partials) {
  using A = Acc<T>;
  constexpr bool kSam = kOf != Of::kRows, kBoth = kOf == Of::kBoth;
  constexpr int kPack = Pack<T>::kSize, kUnroll = kSmallUnroll<kTasks, kSam>;
  constexpr int kEntries = kTasks * (kTasks + 1) / 2;
  constexpr int kMatrices = kBoth ? 2 : 1;
  __shared__ double total[kMatrices][kEntries];
  for (int e = threadIdx.x; e < kMatrices * kEntries; e += kThreads)
    total[e / kEntries][e % kEntries] = 0;

  const bool aligned = jac.aligned && (!kSam || sam.aligned);
  const int64_t span = static_cast<int64_t>(kThreads) * plan.steps * kPack;  // columns
  for (int64_t start = blockIdx.x * span; start < columns; start += plan.chunks * span) {
    A acc[kMatrices][kEntries];
#pragma unroll
    for (int m = 0; m < kMatrices; ++m)
#pragma unroll
      for (int e = 0; e < kEntries; ++e) acc[m][e] = 0;
    for (int step = 0; step < plan.steps; step += kUnroll) {
      const int64_t column = start + (static_cast<int64_t>(step) * kThreads + threadIdx.x) * kPack;
      constexpr int64_t kStride = static_cast<int64_t>(kThreads) * kPack;
      // All loads are issued before the first product; one branch for all of them.
      const bool whole = aligned && column + (kUnroll - 1) * kStride + kPack <= columns;
      Pack<T> x[kUnroll][kTasks], s[kUnroll][kSam ? kTasks : 1];
      if (whole) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
#pragma unroll
          for (int i = 0; i < kTasks; ++i) {
            x[u][i] = load_pack_stream(jac.row(i) + column + u * kStride);
            if (kSam) s[u][kSam ? i : 0] = load_pack_stream(sam.row(i) + column + u * kStride);
          }
      } else {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
#pragma unroll
          for (int i = 0; i < kTasks; ++i) {
            x[u][i] = load_guarded(jac.row(i), column + u * kStride, columns);
            if (kSam) s[u][kSam ? i : 0] = load_guarded(sam.row(i), column + u * kStride, columns);
          }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
#pragma unroll
        for (int v = 0; v < kPack; ++v) {
          A a[kTasks];
#pragma unroll
          for (int i = 0; i < kTasks; ++i) a[i] = to_acc(x[u][i].lane[v]);
          if (!kSam || kBoth) add_triangle(a, acc[0]);
          if (kSam) {
#pragma unroll
            for (int i = 0; i < kTasks; ++i) a[i] = to_acc(s[u][kSam ? i : 0].lane[v]) - a[i];
            add_triangle(a, acc[kMatrices - 1]);
          }
        }
    }
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) add_block_sums(acc[m], total[m]);
  }
  __syncthreads();  // also where a block has no span: total is set
  for (int e = threadIdx.x; e < kMatrices * kEntries; e += kThreads)
    partials[e * plan.chunks + blockIdx.x] = total[e / kEntries][e % kEntries];
}

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
template <class T, int kTile, bool kDifference>
__global__ void __launch_bounds__(tile_threads(kTile), 2)
    gram_tiled_kernel(Rows<const T> jac, Rows<const T> sam, int tasks, int64_t columns,
                      TilePlan plan, double* partials) {
  using A = Acc<T>;
  constexpr int kVector = 16 / sizeof(A);
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

// out: [T, T], both halves. Grid (T, T); blocks below the diagonal have nothing to do. The block's
// size follows the number of chunks, which follows the shape: the order of the sum stays fixed.
static __global__ void __launch_bounds__(kThreads)
    finish_gram_kernel(const double* partials, int64_t chunks, double* out) {
  const int64_t i = blockIdx.y, j = blockIdx.x, tasks = gridDim.x;
  if (j < i) return;
  const double* row = partials + triangle_index(i, j, tasks) * chunks;
  double sum = 0;
  for (int64_t c = threadIdx.x; c < chunks; c += blockDim.x) sum += row[c];
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[i * tasks + j] = out[j * tasks + i] = sum;
}

// Sums of squares of the rows. Grid (chunks, T). partials: [T, chunks].
template <class T>
__global__ void __launch_bounds__(kThreads)
    row_squares_kernel(Rows<const T> jac, int64_t columns, StripPlan plan, double* partials) {
  using A = Acc<T>;
  constexpr int kPack = Pack<T>::kSize, kUnroll = kSmallUnroll<1, false>;
  constexpr int64_t kStride = static_cast<int64_t>(kThreads) * kPack;
  const T* row = jac.row(blockIdx.y);
  const int64_t span = kStride * plan.steps;
  double sum = 0;
  for (int64_t start = blockIdx.x * span; start < columns; start += plan.chunks * span) {
    A acc = 0;
    for (int step = 0; step < plan.steps; step += kUnroll) {
      const int64_t column = start + step * kStride + static_cast<int64_t>(threadIdx.x) * kPack;
      const bool whole = jac.aligned && column + (kUnroll - 1) * kStride + kPack <= columns;
      Pack<T> x[kUnroll];
      if (whole) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) x[u] = load_pack_stream(row + column + u * kStride);
      } else {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) x[u] = load_guarded(row, column + u * kStride, columns);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
#pragma unroll
        for (int v = 0; v < kPack; ++v) {
          const A a = to_acc(x[u].lane[v]);
          acc += a * a;
        }
    }
    sum += static_cast<double>(acc);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials[blockIdx.y * plan.chunks + blockIdx.x] = sum;
}

// ---- launchers ---------------------------------------------------------------------------------

template <class T, int kTasks, Of kOf>
cudaError_t gram_small(Rows<const T> jac, Rows<const T> sam, int64_t columns, double* partials,
                       int64_t* chunks, cudaStream_t stream) {
  const StripPlan plan = small_plan(kTasks, columns, sizeof(T));
  *chunks = plan.chunks;
  if (plan.chunks == 0) return cudaSuccess;
  return launch(gram_small_kernel<T, kTasks, kOf>, dim3(static_cast<unsigned>(plan.chunks)),
                dim3(kThreads), 0, stream, jac, sam, columns, plan, partials);
}

template <class T, bool kDifference>
cudaError_t gram_tiled(Rows<const T> jac, Rows<const T> sam, int tasks, int64_t columns,
                       double* partials, int64_t* chunks, cudaStream_t stream) {
  const TilePlan plan = tile_plan(tasks, columns, sizeof(Acc<T>));
  *chunks = plan.chunks;
  if (plan.chunks == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(plan.chunks),
                  static_cast<unsigned>(triangle(plan.row_blocks)));
  const dim3 block(plan.threads);
  const size_t shared = static_cast<size_t>(plan.shared_bytes);
  // float64 tiles of 8 x 8 would not fit the registers
  if constexpr (sizeof(T) < 8) {
    if (plan.tile == 8)
      return launch(gram_tiled_kernel<T, 8, kDifference>, grid, block, shared, stream, jac, sam,
                    tasks, columns, plan, partials);
  }
  return launch(gram_tiled_kernel<T, 4, kDifference>, grid, block, shared, stream, jac, sam, tasks,
                columns, plan, partials);
}

inline cudaError_t finish_gram(const double* partials, int tasks, int64_t chunks, double* out,
                               cudaStream_t stream) {
  return launch(finish_gram_kernel, dim3(tasks, tasks), dim3(chunks <= 64 ? kWarp : kThreads), 0,
                stream, partials, chunks, out);
}

// partials: gram_partials(...) doubles. out: [T, T]. kDifference: the rows are sam - jac.
template <class T, bool kDifference>
cudaError_t gram(Rows<const T> jac, Rows<const T> sam, int tasks, int64_t columns, double* partials,
                 double* out, cudaStream_t stream) {
  constexpr Of kOf = kDifference ? Of::kDifference : Of::kRows;
  int64_t chunks = 0;
  cudaError_t error = cudaErrorInvalidValue;
  switch (tasks) {
#define FLATMTL_GRAM_CASE(kTasks)                                                     \
  case kTasks:                                                                        \
    error = gram_small<T, kTasks, kOf>(jac, sam, columns, partials, &chunks, stream); \
    break
    FLATMTL_GRAM_CASE(1);
    FLATMTL_GRAM_CASE(2);
    FLATMTL_GRAM_CASE(3);
    FLATMTL_GRAM_CASE(4);
    FLATMTL_GRAM_CASE(5);
    FLATMTL_GRAM_CASE(6);
    FLATMTL_GRAM_CASE(7);
    FLATMTL_GRAM_CASE(8);
#undef FLATMTL_GRAM_CASE
    default:
      if (tasks > kSmallTasks)
        error = gram_tiled<T, kDifference>(jac, sam, tasks, columns, partials, &chunks, stream);
  }
  if (error != cudaSuccess) return error;
  return finish_gram(partials, tasks, chunks, out, stream);
}

// T <= kPairTasks. partials: 2 gram_partials(...) doubles. out, difference: [T, T].
template <class T>
cudaError_t gram_pair(Rows<const T> jac, Rows<const T> sam, int tasks, int64_t columns,
                      double* partials, double* out, double* difference, cudaStream_t stream) {
  int64_t chunks = 0;
  cudaError_t error = cudaErrorInvalidValue;
  switch (tasks) {
#define FLATMTL_PAIR_CASE(kTasks)                                                           \
  case kTasks:                                                                              \
    error = gram_small<T, kTasks, Of::kBoth>(jac, sam, columns, partials, &chunks, stream); \
    break
    FLATMTL_PAIR_CASE(1);
    FLATMTL_PAIR_CASE(2);
    FLATMTL_PAIR_CASE(3);
    FLATMTL_PAIR_CASE(4);
#undef FLATMTL_PAIR_CASE
    default:
      break;
  }
  static_assert(kPairTasks == 4, "one case each");
  if (error == cudaSuccess) error = finish_gram(partials, tasks, chunks, out, stream);
  if (error == cudaSuccess)
    error = finish_gram(partials + triangle(tasks) * chunks, tasks, chunks, difference, stream);
  return error;
}

inline int64_t row_norms_partials(int64_t tasks, int64_t columns, int row_bytes) {
  return tasks * strip_plan(columns, 16 / row_bytes, small_unroll(1, false)).chunks;
}

// partials: row_norms_partials(...) doubles. out: [T].
template <class T>
cudaError_t row_norms(Rows<const T> jac, int64_t tasks, int64_t columns, double* partials,
                      double* out, cudaStream_t stream) {
  const StripPlan plan = strip_plan(columns, Pack<T>::kSize, small_unroll(1, false));
  if (plan.chunks > 0) {
    const dim3 grid(static_cast<unsigned>(plan.chunks), static_cast<unsigned>(tasks));
    const cudaError_t error = launch(row_squares_kernel<T>, grid, dim3(kThreads), 0, stream, jac,
                                     columns, plan, partials);
    if (error != cudaSuccess) return error;
  }
  return finish_sums<Finish::kSquareRoot>(partials, tasks, plan.chunks, out, stream);
}

}  // namespace flatmtl::kernels
