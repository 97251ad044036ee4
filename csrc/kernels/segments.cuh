// Lists of tensors and one flat row: segment k of the row is row[offset_k : offset_k + numel_k].
//
//   pack_row          row <- the gradients, 0 between them; the row's squared norm
//                                                                            read P, write P
//                     accumulate: row <- row + the gradients, itself between them; its squared norm
//                                                                            read 2 P, write P
//   perturb           params <- saved + s row (SAM), saved + s (|saved| + eta)^2 row (ASAM);
//                     s = rho_k / sqrt(sq_norm), read on the device          read 2 P, write P
//   restore           params <- saved                                        read P, write P
//   adaptive_sq_norm  sum_k ((|saved_k| + eta) row_k)^2                      read 2 P
//
// The row is of the type of the gradients (params, saved), or in half precision beside float32; P
// elements of each at their own size. Arithmetic is in the arithmetic type, with one rounding to
// nearest even at the store; the norm is of what is stored.
//
// Pointers travel in the kernel's arguments (4 KB, captured by value: safe in CUDA graphs),
// kEntries segments a launch; a block takes one chunk of one segment. Determinism: chunks are cut
// from the sizes alone; partial sums are added in order. Shapes: any number of segments, empty ones
// too, any alignment (16-byte accesses where the tensor and its place in the row are both aligned).
// s == 0 copies `saved` and never reads `row`.
#pragma once

#include <vector>

#include "gram_plan.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace flatmtl::kernels {

constexpr int kEntries = 110;
constexpr int kSegmentUnroll = 4;

struct PackEntry {
  const void* grad;
  int64_t offset, numel;
  int64_t span;  // >= numel: the rest, up to the next segment, is set to zero
};

struct PerturbEntry {
  void* param;
  int64_t offset, numel;
  double rho;  // 0: copy
};

inline int64_t entry_length(const PackEntry& entry) { return entry.span; }
inline int64_t entry_length(const PerturbEntry& entry) { return entry.numel; }

// Block x works on entry e, first_block[e] <= x < first_block[e + 1].
template <class Entry>
struct Table {
  Entry entry[kEntries];
  int first_block[kEntries + 1];
  int count;
};
static_assert(sizeof(Table<PackEntry>) + 56 <= 4096, "the table and the other arguments fit 4 KB");
static_assert(sizeof(Table<PerturbEntry>) + 56 <= 4096,
              "the table and the other arguments fit 4 KB");

template <class Entry>
__device__ inline int entry_of_block(const Table<Entry>& table) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_block[middle] <= static_cast<int>(blockIdx.x))
      low = middle;
    else
      high = middle;
  }
  return low;
}

// Elements a block takes: 16384, or more where that would make more than kMaxChunks of P elements.
inline int64_t segment_chunk(int64_t columns) {
  constexpr int64_t kChunk = 16384;
  return kChunk * at_least(ceil_div(columns, kChunk * kMaxChunks), 1);
}

// A gradient comes to an element of the row.
template <bool kAccumulate, class T, class G>
__device__ inline void put(T& element, G grad) {
  if constexpr (kAccumulate)
    element = from_acc<T>(to_acc(element) + to_acc(grad));
  else if constexpr (std::is_same_v<T, G>)
    element = grad;  // bit for bit, the payload of a NaN too
  else
    element = from_acc<T>(to_acc(grad));
}

template <class T, class G, bool kAccumulate>
__global__ void __launch_bounds__(kThreads, 2)
    pack_row_kernel(const FLATMTL_GRID_CONSTANT Table<PackEntry> table, T* row, int64_t chunk,
                    double* partials) {
  using A = Acc<T>;
  constexpr int kPack = kPackOf<T, G>;
  constexpr int64_t kStride = static_cast<int64_t>(kThreads) * kPack;
  const int e = entry_of_block(table);
  const G* grad = static_cast<const G*>(table.entry[e].grad);
  const int64_t numel = table.entry[e].numel, span = table.entry[e].span;
  T* target = row + table.entry[e].offset;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - table.first_block[e]) * chunk;
  const int64_t end = begin + chunk < span ? begin + chunk : span;
  const bool aligned = is_aligned(grad, kPack * sizeof(G)) && is_aligned(target, kPack * sizeof(T));
  const int64_t covered = numel < end ? numel : end;  // of this chunk, by the gradient

  double sum = 0;
  for (int64_t start = begin; start < end; start += kStride * kSegmentUnroll) {
    const int64_t at = start + static_cast<int64_t>(threadIdx.x) * kPack;
    Pack<T, kPack> y[kSegmentUnroll];  // the row, before and after
    if (aligned && at + (kSegmentUnroll - 1) * kStride + kPack <= covered) {
      Pack<G, kPack> x[kSegmentUnroll];
#pragma unroll
      for (int u = 0; u < kSegmentUnroll; ++u) {
        x[u] = load_pack_stream<G, kPack>(grad + at + u * kStride);
        if constexpr (kAccumulate) y[u] = load_pack<T, kPack>(target + at + u * kStride);
      }
#pragma unroll
      for (int u = 0; u < kSegmentUnroll; ++u) {
#pragma unroll
        for (int v = 0; v < kPack; ++v) put<kAccumulate>(y[u].lane[v], x[u].lane[v]);
        store_pack(target + at + u * kStride, y[u]);
      }
    } else {
#pragma unroll
      for (int u = 0; u < kSegmentUnroll; ++u) {
        const int64_t here = at + u * kStride;
        const Pack<G, kPack> x = load_guarded<G, kPack>(grad, here, numel);
        if constexpr (kAccumulate) y[u] = load_guarded<T, kPack>(target, here, end);
#pragma unroll
        for (int v = 0; v < kPack; ++v) put<kAccumulate>(y[u].lane[v], x.lane[v]);
        // what stands where no gradient comes is not written: -0 + 0 would lose its sign
        store_guarded(target, here, kAccumulate ? covered : end, y[u]);
      }
    }
    A acc = 0;
#pragma unroll
    for (int u = 0; u < kSegmentUnroll; ++u)
#pragma unroll
      for (int v = 0; v < kPack; ++v) {
        const A a = to_acc(y[u].lane[v]);
        acc += a * a;
      }
    sum += static_cast<double>(acc);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

template <class T, class U, int N>
__device__ inline Pack<U, N> perturbed(const Pack<U, N>& saved, const Pack<T, N>& row, Acc<U> scale,
                                       bool adaptive, Acc<U> eta) {
  using A = Acc<U>;
  Pack<U, N> result;
#pragma unroll
  for (int v = 0; v < N; ++v) {
    const A x = to_acc(saved.lane[v]);
    const A t = (x < A(0) ? -x : x) + eta;
    const A g = to_acc(row.lane[v]);
    result.lane[v] = from_acc<U>(x + scale * (adaptive ? t * t * g : g));
  }
  return result;
}

// T: the type of row; U: of params and saved. saved, row: [P]. sq_norm: one number; it and row are
// not read by entries with rho == 0.
template <class T, class U>
__global__ void __launch_bounds__(kThreads, 2)
    perturb_kernel(const FLATMTL_GRID_CONSTANT Table<PerturbEntry> table, const U* saved,
                   const T* row, const double* sq_norm, int64_t chunk, bool adaptive, double eta) {
  using A = Acc<U>;
  constexpr int kPack = kPackOf<T, U>, kUnroll = 2;
  constexpr int64_t kStride = static_cast<int64_t>(kThreads) * kPack;
  constexpr size_t kBytes = kPack * sizeof(U), kRowBytes = kPack * sizeof(T);
  const int e = entry_of_block(table);
  U* param = static_cast<U*>(table.entry[e].param);
  const int64_t numel = table.entry[e].numel;
  const U* source = saved + table.entry[e].offset;
  const T* direction = row + table.entry[e].offset;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - table.first_block[e]) * chunk;
  const int64_t end = begin + chunk < numel ? begin + chunk : numel;

  const double rho = table.entry[e].rho;
  const double square = rho != 0 ? *sq_norm : 0.0;
  const A scale = square > 0 && square - square == 0 ? static_cast<A>(rho / sqrt(square)) : A(0);
  const bool move = scale != A(0);
  const bool aligned = is_aligned(param, kBytes) && is_aligned(source, kBytes) &&
                       (!move || is_aligned(direction, kRowBytes));

  for (int64_t start = begin; start < end; start += kStride * kUnroll) {
    const int64_t at = start + static_cast<int64_t>(threadIdx.x) * kPack;
    const bool whole = aligned && at + (kUnroll - 1) * kStride + kPack <= end;
    Pack<U, kPack> x[kUnroll];
    Pack<T, kPack> g[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      x[u] = whole ? load_pack<U, kPack>(source + at + u * kStride)
                   : load_guarded<U, kPack>(source, at + u * kStride, end);
      g[u] = zero_pack<T, kPack>();
      if (move)
        g[u] = whole ? load_pack_stream<T, kPack>(direction + at + u * kStride)
                     : load_guarded<T, kPack>(direction, at + u * kStride, end);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      // a copy is bit for bit: saved + 0 * g would lose the sign of -0
      if (move) x[u] = perturbed(x[u], g[u], scale, adaptive, static_cast<A>(eta));
      if (whole)
        store_pack(param + at + u * kStride, x[u]);
      else
        store_guarded(param, at + u * kStride, end, x[u]);
    }
  }
}

// saved, row: [P]. partials: [chunks].
template <class T, class U>
__global__ void __launch_bounds__(kThreads)
    adaptive_squares_kernel(const U* saved, const T* row, int64_t columns, double eta,
                            StripPlan plan, double* partials) {
  using A = Acc<U>;
  constexpr int kPack = kPackOf<T, U>;
  constexpr int64_t kStride = static_cast<int64_t>(kThreads) * kPack;
  const bool aligned = is_aligned(saved, kPack * sizeof(U)) && is_aligned(row, kPack * sizeof(T));
  const int64_t span = kStride * plan.steps;
  double sum = 0;
  for (int64_t start = blockIdx.x * span; start < columns; start += plan.chunks * span) {
    A acc = 0;
    for (int step = 0; step < plan.steps; ++step) {
      const int64_t column = start + step * kStride + static_cast<int64_t>(threadIdx.x) * kPack;
      const bool whole = aligned && column + kPack <= columns;
      const Pack<U, kPack> x = whole ? load_pack_stream<U, kPack>(saved + column)
                                     : load_guarded<U, kPack>(saved, column, columns);
      const Pack<T, kPack> g = whole ? load_pack_stream<T, kPack>(row + column)
                                     : load_guarded<T, kPack>(row, column, columns);
#pragma unroll
      for (int v = 0; v < kPack; ++v) {
        const A value = to_acc(x.lane[v]);
        const A scaled =
            ((value < A(0) ? -value : value) + static_cast<A>(eta)) * to_acc(g.lane[v]);
        acc += scaled * scaled;
      }
    }
    sum += static_cast<double>(acc);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// ---- launchers ---------------------------------------------------------------------------------

// Cuts a stream of entries into tables: add() every entry, flush() at the end. run(table, first)
// must launch table.first_block[count] blocks; `first` counts the blocks of the launches before.
template <class Entry, class Run>
class TableWriter {
 public:
  TableWriter(int64_t chunk, Run run) : chunk_(chunk), run_(run) {}

  cudaError_t add(const Entry& entry) {
    const int64_t blocks = ceil_div(entry_length(entry), chunk_);
    if (blocks == 0) return cudaSuccess;
    table_.entry[table_.count++] = entry;
    table_.first_block[table_.count] =
        table_.first_block[table_.count - 1] + static_cast<int>(blocks);
    return table_.count == kEntries ? flush() : cudaSuccess;
  }

  cudaError_t flush() {
    if (table_.count == 0) return cudaSuccess;
    const cudaError_t error = run_(table_, first_);
    first_ += table_.first_block[table_.count];
    table_.count = 0;
    return error;
  }

  int64_t blocks() const { return first_; }

 private:
  Table<Entry> table_{};
  int64_t chunk_, first_ = 0;
  Run run_;
};

template <class Entry, class Run>
TableWriter<Entry, Run> table_writer(int64_t chunk, Run run) {
  return TableWriter<Entry, Run>(chunk, run);
}

// Doubles of scratch that pack_row needs: no more than a chunk a segment above the row's own.
inline int64_t pack_row_partials(int64_t count, int64_t columns) {
  return ceil_div(columns, segment_chunk(columns)) + count + 1;
}

// grads, offsets, numels: [count] on the host, offsets ascending; of type G. row: [P]. sq_norm: one
// number.
template <class T, class G>
cudaError_t pack_row(const void* const* grads, const int64_t* offsets, const int64_t* numels,
                     int64_t count, bool accumulate, T* row, int64_t columns, double* partials,
                     double* sq_norm, cudaStream_t stream) {
  const int64_t chunk = segment_chunk(columns);
  const auto kernel = accumulate ? pack_row_kernel<T, G, true> : pack_row_kernel<T, G, false>;
  auto writer = table_writer<PackEntry>(chunk, [&](const Table<PackEntry>& table, int64_t first) {
    return launch(kernel, dim3(table.first_block[table.count]), dim3(kThreads), 0, stream, table,
                  row, chunk, partials + first);
  });
  const int64_t head = count > 0 ? offsets[0] : columns;  // before the first segment: no gradient
  cudaError_t error = writer.add({nullptr, 0, 0, head});
  for (int64_t k = 0; k < count && error == cudaSuccess; ++k) {
    const int64_t next = k + 1 < count ? offsets[k + 1] : columns;
    error = writer.add({grads[k], offsets[k], numels[k], next - offsets[k]});
  }
  if (error == cudaSuccess) error = writer.flush();
  if (error != cudaSuccess) return error;
  return finish_sums<Finish::kSum>(partials, 1, writer.blocks(), sq_norm, stream);
}

// params, offsets, numels, rho: [count] on the host; params of type U. saved, row: [P].
template <class T, class U>
cudaError_t perturb(void* const* params, const int64_t* offsets, const int64_t* numels,
                    const double* rho, int64_t count, const U* saved, const T* row,
                    const double* sq_norm, int64_t columns, bool adaptive, double eta,
                    cudaStream_t stream) {
  const int64_t chunk = segment_chunk(columns);
  auto writer = table_writer<PerturbEntry>(chunk, [&](const Table<PerturbEntry>& table, int64_t) {
    return launch(perturb_kernel<T, U>, dim3(table.first_block[table.count]), dim3(kThreads), 0,
                  stream, table, saved, row, sq_norm, chunk, adaptive, eta);
  });
  for (int64_t k = 0; k < count; ++k) {
    const cudaError_t error = writer.add({params[k], offsets[k], numels[k], rho[k]});
    if (error != cudaSuccess) return error;
  }
  return writer.flush();
}

// A perturbation with every rho 0 is the exact copy, and reads nothing but `saved`.
template <class T>
cudaError_t restore(void* const* params, const int64_t* offsets, const int64_t* numels,
                    int64_t count, const T* saved, int64_t columns, cudaStream_t stream) {
  const std::vector<double> rho(static_cast<size_t>(count), 0.0);
  return perturb<T, T>(params, offsets, numels, rho.data(), count, saved, nullptr, nullptr, columns,
                       false, 0.0, stream);
}

// saved_bytes: an element's; never fewer than the row's.
inline int64_t adaptive_sq_norm_partials(int64_t columns, int saved_bytes) {
  return strip_plan(columns, 16 / saved_bytes, 1).chunks;
}

template <class T, class U>
cudaError_t adaptive_sq_norm(const U* saved, const T* row, int64_t columns, double eta,
                             double* partials, double* out, cudaStream_t stream) {
  const StripPlan plan = strip_plan(columns, kPackOf<T, U>, 1);
  if (plan.chunks > 0) {
    const cudaError_t error =
        launch(adaptive_squares_kernel<T, U>, dim3(static_cast<unsigned>(plan.chunks)),
               dim3(kThreads), 0, stream, saved, row, columns, eta, plan, partials);
    if (error != cudaSuccess) return error;
  }
  return finish_sums<Finish::kSum>(partials, 1, plan.chunks, out, stream);
}

}  // namespace flatmtl::kernels
