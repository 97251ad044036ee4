// The CPU bodies of the operators: checks, chunking, torch's thread pool, fixed-order sums.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/check.h"
#include "../common/operands.h"
#include "../solvers/drop.h"
#include "kernels.h"

namespace flatmtl::cpu {
namespace {

namespace stable = torch::stable;
using torch::headeronly::ScalarType;

constexpr int64_t kMegabyte = 1 << 20;

// What is beyond the caches is written past them: its lines are then not read first, and push
// nothing out. One threshold for all processors.
bool beyond_caches(int64_t elements, Row type) {
  return elements * element_size(type) >= 8 * kMegabyte;
}

Row row_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return Row::f64;
    case ScalarType::BFloat16:
      return Row::bf16;
    case ScalarType::Half:
      return Row::f16;
    default:
      return Row::f32;
  }
}

Rows rows_of(const Tensor& t) {
  return {t.const_data_ptr(), t.size(0) > 1 ? t.stride(0) : t.size(1)};
}

struct Free {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};
using Scratch = std::unique_ptr<void, Free>;

Scratch scratch(int64_t bytes) {
  return Scratch(
      ::operator new(static_cast<size_t>(std::max<int64_t>(bytes, 64)), std::align_val_t(64)));
}

// Columns cut into chunks by shape alone. A chunk is a multiple of 1024 columns.
struct Chunks {
  int64_t size, count, total;

  int64_t begin(int64_t c) const { return c * size; }
  int64_t end(int64_t c) const { return std::min(total, (c + 1) * size); }
};

Chunks cut(int64_t columns, int64_t least, int64_t most_chunks) {
  const int64_t needed = (columns + most_chunks - 1) / most_chunks;
  const int64_t size = (std::max(least, needed) + 1023) / 1024 * 1024;
  return {size, (columns + size - 1) / size, columns};
}

// f(begin, end) over chunk indices; work: elements of one chunk. Little work stays on one thread.
template <class F>
void run(const Chunks& chunks, int64_t work, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, work));
  if (chunks.count <= grain) {
    if (chunks.count > 0) f(0, chunks.count);
    return;
  }
  stable::parallel_for(0, chunks.count, grain, f);
}

Tensor doubles(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return fresh(like, sizes, ScalarType::Double);
}

// ---------------------------------------------------------------- sums over columns

// Of the rows, of the differences if sam.base is not null; both: the one and the other.
std::vector<Tensor> gram_of(const Tensor& jac, Rows sam, bool both) {
  const int64_t tasks = jac.size(0), matrices = both ? 2 : 1, pairs = tasks * tasks;
  // at most 64 MiB of partial sums a matrix
  const Chunks chunks =
      cut(jac.size(1), 8192, std::clamp<int64_t>(64 * kMegabyte / (pairs * 8), 16, 1024));
  const Rows rows = rows_of(jac);
  const Row row = row_of(jac);
  const Kernels& k = kernels();
  std::vector<double> partial(static_cast<size_t>(chunks.count * matrices * pairs));
  run(chunks, chunks.size * tasks, [&](int64_t first, int64_t last) {
    const Scratch work = scratch(k.gram_scratch(tasks, both));
    for (int64_t c = first; c < last; ++c)
      k.gram(row, rows, sam, both, tasks, chunks.begin(c), chunks.end(c), work.get(),
             partial.data() + c * matrices * pairs);
  });
  std::vector<Tensor> result;
  for (int64_t m = 0; m < matrices; ++m) {
    const Tensor out = doubles(jac, {tasks, tasks});
    double* g = static_cast<double*>(out.mutable_data_ptr());
    for (int64_t i = 0; i < tasks; ++i)
      for (int64_t j = i; j < tasks; ++j) {
        double total = 0;
        for (int64_t c = 0; c < chunks.count; ++c)
          total += partial[(c * matrices + m) * pairs + i * tasks + j];
        g[i * tasks + j] = g[j * tasks + i] = total;
      }
    result.push_back(out);
  }
  return result;
}

Tensor gram(const Tensor& jac) {
  check_rows("jac", jac);
  return gram_of(jac, Rows{nullptr, 0}, false)[0];
}

Tensor gram_difference(const Tensor& sam, const Tensor& jac) {
  check_rows("jac", jac);
  check_same_rows("sam", sam, "jac", jac);
  return gram_of(jac, rows_of(sam), false)[0];
}

std::tuple<Tensor, Tensor> gram_pair(const Tensor& sam, const Tensor& jac) {
  check_rows("jac", jac);
  check_same_rows("sam", sam, "jac", jac);
  const std::vector<Tensor> found = gram_of(jac, rows_of(sam), true);
  return {found[0], found[1]};
}

Tensor row_norms(const Tensor& jac) {
  check_rows("jac", jac);
  const int64_t tasks = jac.size(0);
  const Chunks chunks = cut(jac.size(1), 8192, 1024);
  const Rows rows = rows_of(jac);
  const Row row = row_of(jac);
  std::vector<double> partial(static_cast<size_t>(chunks.count * tasks));
  run(chunks, chunks.size * tasks, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c)
      kernels().row_squares(row, rows, tasks, chunks.begin(c), chunks.end(c),
                            partial.data() + c * tasks);
  });
  Tensor out = doubles(jac, {tasks});
  double* norm = static_cast<double*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < tasks; ++i) {
    double total = 0;
    for (int64_t c = 0; c < chunks.count; ++c) total += partial[c * tasks + i];
    norm[i] = std::sqrt(total);
  }
  return out;
}

// Sum of one double a chunk, f(begin, end).
template <class F>
Tensor sum_chunks(const Tensor& row, const F& f) {
  const Chunks chunks = cut(row.size(0), 16384, 4096);
  std::vector<double> partial(static_cast<size_t>(chunks.count));
  run(chunks, chunks.size, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) partial[c] = f(chunks.begin(c), chunks.end(c));
  });
  double total = 0;
  for (const double p : partial) total += p;
  Tensor out = doubles(row, {});
  *static_cast<double*>(out.mutable_data_ptr()) = total;
  return out;
}

Tensor adaptive_sq_norm(const Tensor& saved, const Tensor& row, double eta) {
  check_flat("row", row);
  check_saved(saved, row);
  const Row type = row_of(row), saved_type = row_of(saved);
  const void *theta = saved.const_data_ptr(), *grad = row.const_data_ptr();
  return sum_chunks(row, [&](int64_t begin, int64_t end) {
    return kernels().adaptive_squares(type, saved_type, theta, grad, eta, begin, end);
  });
}

// ---------------------------------------------------------------- weighted sums

const double* small(const Tensor& t) { return static_cast<const double*>(t.const_data_ptr()); }

void combine_rows(const Tensor& jac, const double* a, Rows sam, const double* b,
                  const Tensor& out) {
  const Rows rows = rows_of(jac);
  const Row row = row_of(jac), sum = row_of(out);
  const int64_t tasks = jac.size(0), columns = jac.size(1);
  void* to = out.mutable_data_ptr();
  const bool stream = beyond_caches(columns, sum);
  const Chunks chunks = cut(columns, 8192, INT64_MAX / 2);
  run(chunks, chunks.size * (tasks + 1), [&](int64_t first, int64_t last) {
    kernels().combine(row, sum, rows, a, sam, b, tasks, to, chunks.begin(first),
                      chunks.end(last - 1), stream);
  });
}

void combine(const Tensor& jac, const Tensor& weights, const Tensor& out) {
  check_rows("jac", jac);
  check_small("weights", weights, ScalarType::Double, "jac", jac, {jac.size(0)});
  check_out_row(out, jac);
  combine_rows(jac, small(weights), Rows{nullptr, 0}, nullptr, out);
}

void combine_flat(const Tensor& jac, const Tensor& a, const Tensor& sam, const Tensor& b,
                  const Tensor& out) {
  check_rows("jac", jac);
  check_same_rows("sam", sam, "jac", jac);
  check_small("a", a, ScalarType::Double, "jac", jac, {jac.size(0)});
  check_small("b", b, ScalarType::Double, "jac", jac, {jac.size(0)});
  check_out_row(out, jac);
  combine_rows(jac, small(a), rows_of(sam), small(b), out);
}

void project(const Tensor& jac, const Tensor& coefficients, const Tensor& out) {
  check_rows("jac", jac);
  check_rows("out", out);
  check_like("out", out, "jac", jac);
  check_small("coefficients", coefficients, ScalarType::Double, "jac", jac,
              {out.size(0), jac.size(0)});
  STD_TORCH_CHECK(out.size(1) == jac.size(1), "out must have ", jac.size(1), " columns, got ",
                  out.size(1));
  const Rows rows = rows_of(jac);
  const Row row = row_of(jac);
  const int64_t tasks = jac.size(0), outputs = out.size(0), stride = rows_of(out).stride;
  void* to = out.mutable_data_ptr();
  const Chunks chunks = cut(jac.size(1), 8192, INT64_MAX / 2);
  run(chunks, chunks.size * (tasks + outputs), [&](int64_t first, int64_t last) {
    kernels().project(row, rows, small(coefficients), tasks, outputs, to, stride,
                      chunks.begin(first), chunks.end(last - 1));
  });
}

void graddrop_(const Tensor& jac, const std::optional<Tensor>& leak,
               const std::optional<Tensor>& there, const Tensor& rng, const Tensor& out) {
  check_drop(jac, leak, there, rng, out);
  const int64_t tasks = jac.size(0), columns = jac.size(1);
  const bool* counted = there ? static_cast<const bool*>(there->const_data_ptr()) : nullptr;
  std::vector<int64_t> index;
  for (int64_t i = 0; i < tasks; ++i)
    if (!counted || counted[i]) index.push_back(i);
  int64_t* state = data<int64_t>(rng);
  const uint64_t seed = static_cast<uint64_t>(state[0]), step = static_cast<uint64_t>(state[1]);
  const Rows rows = rows_of(jac);
  const Row row = row_of(jac), sum = row_of(out);
  void* to = out.mutable_data_ptr();
  const bool stream = beyond_caches(columns, sum);
  const Chunks chunks = cut(columns, 8192, INT64_MAX / 2);
  run(chunks, chunks.size * (tasks + 1), [&](int64_t first, int64_t last) {
    kernels().drop(row, sum, rows, index.data(), static_cast<int64_t>(index.size()),
                   leak ? small(*leak) : nullptr, drop_key(seed, step), static_cast<uint32_t>(step),
                   to, chunks.begin(first), chunks.end(last - 1), stream);
  });
  state[1] = static_cast<int64_t>(step + 1);
}

Tensor affinity(const Tensor& gram, const Tensor& losses, double lr) {
  const int64_t tasks = gram.size(0);
  check_small("gram", gram, ScalarType::Double, "gram", gram, {tasks, tasks});
  check_small("losses", losses, ScalarType::Double, "gram", gram, {tasks});
  Tensor out = doubles(gram, {tasks, tasks});
  const double *g = small(gram), *loss = small(losses);
  double* z = static_cast<double*>(out.mutable_data_ptr());
  for (int64_t j = 0; j < tasks; ++j) {
    const bool sound = loss[j] > 0 && std::isfinite(loss[j]);
    for (int64_t i = 0; i < tasks; ++i)
      z[j * tasks + i] = sound ? lr * g[j * tasks + i] / loss[j] : std::nan("");
  }
  return out;
}

// ---------------------------------------------------------------- segments of a flat row

Segments view(const SegmentTable& table) {
  return {table.data.data(), table.offset.data(), table.numel.data(), table.size()};
}

Tensor pack_row_(const Tensor& row, const std::vector<Tensor>& grads,
                 const std::vector<int64_t>& offsets, bool accumulate) {
  check_pack(row, grads, offsets);
  const SegmentTable table(grads, offsets);
  const Row type = row_of(row), grads_type = grads.empty() ? type : row_of(grads[0]);
  void* to = row.mutable_data_ptr();
  const bool stream = beyond_caches(row.size(0), type);
  return sum_chunks(row, [&](int64_t begin, int64_t end) {
    return kernels().pack(type, grads_type, view(table), to, accumulate, begin, end, stream);
  });
}

void perturb_(const std::vector<Tensor>& params, const Tensor& saved, const Tensor& row,
              const Tensor& sq_norm, const std::vector<int64_t>& offsets,
              const std::vector<double>& rho, bool adaptive, double eta) {
  check_perturb(params, saved, row, sq_norm, offsets, rho);
  const SegmentTable table(params, offsets);
  const double norm2 = *small(sq_norm);
  const double inverse = norm2 > 0 && std::isfinite(norm2) ? 1.0 / std::sqrt(norm2) : 0.0;
  std::vector<double> scale = table.select(rho);
  for (double& s : scale) s *= inverse;
  const Row type = row_of(row), params_type = row_of(saved);
  const void *theta = saved.const_data_ptr(), *grad = row.const_data_ptr();
  const bool stream = beyond_caches(row.size(0), params_type);
  const Chunks chunks = cut(row.size(0), 16384, INT64_MAX / 2);
  run(chunks, chunks.size, [&](int64_t first, int64_t last) {
    kernels().perturb(type, params_type, view(table), theta, grad, scale.data(), adaptive, eta,
                      chunks.begin(first), chunks.end(last - 1), stream);
  });
}

void restore_(const std::vector<Tensor>& params, const Tensor& saved,
              const std::vector<int64_t>& offsets) {
  check_flat("saved", saved);
  check_segments("params", params, offsets, saved, "saved", saved);
  const SegmentTable table(params, offsets);
  const Row type = row_of(saved);
  const void* theta = saved.const_data_ptr();
  const bool stream = beyond_caches(saved.size(0), type);
  const Chunks chunks = cut(saved.size(0), 16384, INT64_MAX / 2);
  run(chunks, chunks.size, [&](int64_t first, int64_t last) {
    kernels().restore(type, view(table), theta, chunks.begin(first), chunks.end(last - 1), stream);
  });
}

}  // namespace
}  // namespace flatmtl::cpu

STABLE_TORCH_LIBRARY_IMPL(flatmtl, CPU, m) {
  using namespace flatmtl::cpu;
  m.impl("row_norms", TORCH_BOX(&row_norms));
  m.impl("gram", TORCH_BOX(&gram));
  m.impl("gram_difference", TORCH_BOX(&gram_difference));
  m.impl("gram_pair", TORCH_BOX(&gram_pair));
  m.impl("combine", TORCH_BOX(&combine));
  m.impl("combine_flat", TORCH_BOX(&combine_flat));
  m.impl("project", TORCH_BOX(&project));
  m.impl("graddrop_", TORCH_BOX(&graddrop_));
  m.impl("affinity", TORCH_BOX(&affinity));
  m.impl("pack_row_", TORCH_BOX(&pack_row_));
  m.impl("adaptive_sq_norm", TORCH_BOX(&adaptive_sq_norm));
  m.impl("perturb_", TORCH_BOX(&perturb_));
  m.impl("restore_", TORCH_BOX(&restore_));
}
