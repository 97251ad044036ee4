// How gram.cuh cuts a [T, P] matrix: from the shape and the element size alone, never from the
// device. Plain host code: the bindings size the scratch with it.
#pragma once

#include <cstdint>

namespace flatmtl::kernels {

constexpr int kSmallTasks = 8;     // up to here every thread holds the whole triangle in registers
constexpr int kPairTasks = 4;      // up to here the triangles of J and of S - J at once
constexpr int kMmaPairTasks = 32;  // the same, of rows in half precision on tensor cores
constexpr int kBlockRows = 64;     // rows of J in one row block of the tiled kernel
constexpr int kStageVectors = 32;  // 16-byte vectors of a row in one stage
constexpr int64_t kMaxBlocks = 1024;
constexpr int64_t kMaxPartials = int64_t{1} << 21;  // doubles of scratch: 16 MiB

constexpr int64_t at_least(int64_t x, int64_t floor) { return x < floor ? floor : x; }
constexpr int64_t at_most(int64_t x, int64_t ceiling) { return x > ceiling ? ceiling : x; }
constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t triangle(int64_t n) { return n * (n + 1) / 2; }

// Chunks of the kernels for more than kSmallTasks rows, at most.
constexpr int64_t most_chunks(int64_t tasks) {
  return at_least(at_most(kMaxPartials / triangle(tasks), kMaxBlocks), 1);
}

// Kernels where a thread walks packs: one block of 256 threads sums `steps` packs a thread at a
// time (a span), and takes the spans chunk, chunk + chunks, ...
struct StripPlan {
  int64_t chunks;
  int steps;
};

// unroll: packs loaded at once; steps is a multiple of it.
inline StripPlan strip_plan(int64_t columns, int pack, int unroll) {
  constexpr int64_t kBlock = 256, kWanted = 512, kLane = 128, kChunks = 4096;
  const int64_t packs = div_up(columns, pack);
  int64_t steps = at_least(div_up(packs, kBlock * kWanted), unroll);
  steps = at_most(div_up(steps, unroll) * unroll, kLane / pack);
  return {at_most(div_up(packs, kBlock * steps), kChunks), static_cast<int>(steps)};
}

// Tiled kernel: a stage of columns of all rows of one or two row blocks is in shared memory at a
// time.
struct TilePlan {
  int64_t chunks;
  int64_t stages_per_chunk;
  int row_blocks;  // ceil(T / 64)
  int threads;
  int64_t shared_bytes;
};

// A thread's register tile is kTileOf x kTileOf entries of G; float64 tiles of 8 x 8 would not fit.
template <class A>
constexpr int kTileOf = sizeof(A) == 8 ? 4 : 8;

// The 8 x 8 tile needs about 140 registers a thread: smaller blocks keep two or three on a
// multiprocessor.
constexpr int tile_threads(int tile) { return tile == 8 ? 192 : 256; }

// Slices of a stage's columns a thread team is split into: the largest power of two that fits.
inline int slices_of(int tiles, int threads) {
  int slices = 1;
  while (slices * 2 * tiles <= threads && slices * 2 <= kStageVectors) slices *= 2;
  return slices;
}

// A: the arithmetic type.
template <class A>
TilePlan tile_plan(int64_t tasks, int64_t columns) {
  constexpr int kTile = kTileOf<A>, kBytes = sizeof(A);
  TilePlan plan{};
  plan.row_blocks = static_cast<int>(div_up(tasks, kBlockRows));
  const int rows = static_cast<int>(at_most(tasks, kBlockRows));
  const int side = static_cast<int>(div_up(rows, kTile));
  const bool pairs = plan.row_blocks > 1;
  const int tiles = pairs ? side * side : static_cast<int>(triangle(side));
  plan.threads =
      static_cast<int>(div_up(int64_t{tiles} * slices_of(tiles, tile_threads(kTile)), 32) * 32);
  // Rows of kStageVectors + 1 vectors, one more a tile; afterwards the slices' sums are exchanged
  // there.
  const int64_t staged = (pairs ? 2 : 1) * side * (kTile * (kStageVectors + 1) + 1) * 16;
  const int64_t exchanged = int64_t{plan.threads} * kTile * kBytes;
  plan.shared_bytes = at_least(staged, exchanged);
  const int64_t stages = div_up(columns, int64_t{kStageVectors} * 16 / kBytes);
  plan.stages_per_chunk = at_least(div_up(stages, most_chunks(tasks)), 8);
  plan.chunks = div_up(stages, plan.stages_per_chunk);
  return plan;
}

// Tensor-core kernel: rows in blocks of 8, an even number of them; a warp takes kMmaLanes packs of
// every row at a time.
constexpr int kMmaTasks = 64, kMmaWarps = 4, kMmaLanes = 4;
// float32 rows up to here are summed in float32: memory is the limit there also without tensor
// cores, which are less exact (mma.cuh).
constexpr int kFloatTasks = 32;

constexpr int mma_blocks(int64_t tasks) { return static_cast<int>(div_up(tasks, 16)) * 2; }

// Tiles of 16 x 8 entries that touch the upper triangle.
constexpr int mma_tiles(int blocks) {
  int tiles = 0;
  for (int row = 0; row < blocks; row += 2) tiles += blocks - row;
  return tiles;
}

// steps: packs of a row that a lane takes in a span; a lane adds four columns at a time.
inline StripPlan mma_plan(int64_t tasks, int64_t columns, int pack) {
  constexpr int64_t kUnroll = 4, kLane = 128;                   // the unrolls divide kUnroll
  const int64_t round = int64_t{kMmaWarps} * kMmaLanes * pack;  // columns a block takes in one step
  const int64_t most = most_chunks(tasks);
  const int64_t wanted = div_up(div_up(columns, round), most);
  const int steps = static_cast<int>(
      at_most(at_least(div_up(wanted, kUnroll) * kUnroll, kUnroll), kLane * 4 / pack));
  return {at_most(div_up(columns, round * steps), most), steps};
}

// Packs in flight a thread of the small kernel: enough loads without spilling.
constexpr int small_unroll(int tasks, bool difference) {
  const int rows = difference ? 2 * tasks : tasks;
  return rows <= 1 ? 4 : rows <= 2 ? 4 : rows <= 4 ? 2 : 1;
}

// The small kernel's plan: one for the rows, for their differences and for both at once (of the two
// unrolls, that of the rows is a multiple of the other), so that each has the same bits either way.
inline StripPlan small_plan(int tasks, int64_t columns, int row_bytes) {
  return strip_plan(columns, 16 / row_bytes, small_unroll(tasks, false));
}

// Which kernel takes T rows; row_bytes: an element's.
enum class GramKernel { kSmall, kMma, kTiled };

inline GramKernel gram_kernel(int64_t tasks, int row_bytes) {
  if (tasks <= kSmallTasks) return GramKernel::kSmall;
  if (tasks > kMmaTasks || row_bytes == 8) return GramKernel::kTiled;
  return row_bytes == 4 && tasks <= kFloatTasks ? GramKernel::kTiled : GramKernel::kMma;
}

inline int64_t gram_chunks(int64_t tasks, int64_t columns, int row_bytes) {
  switch (gram_kernel(tasks, row_bytes)) {
    case GramKernel::kSmall:
      return small_plan(static_cast<int>(tasks), columns, row_bytes).chunks;
    case GramKernel::kMma:
      return mma_plan(tasks, columns, 16 / row_bytes).chunks;
    default:
      return (row_bytes == 8 ? tile_plan<double>(tasks, columns) : tile_plan<float>(tasks, columns))
          .chunks;
  }
}

// Doubles of scratch that gram and gram_difference need; gram_pair needs twice as many.
inline int64_t gram_partials(int64_t tasks, int64_t columns, int row_bytes) {
  return triangle(tasks) * gram_chunks(tasks, columns, row_bytes);
}

// One sweep gives the Gram matrix of J and that of S - J: few rows, or few enough that the sums of
// both fit the registers of the tensor-core kernel.
inline bool pairs_in_one_sweep(int64_t tasks, int row_bytes) {
  return tasks <= kPairTasks ||
         (gram_kernel(tasks, row_bytes) == GramKernel::kMma && tasks <= kMmaPairTasks);
}

}  // namespace flatmtl::kernels
