// What the CPU and CUDA bindings both make of their operands: fresh results, pointer tables.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

namespace flatmtl {

// Uninitialised, on the device of `like`. On CUDA the caching allocator ties it to the current
// stream, so that scratch may be dropped as soon as its last kernel is launched.
inline torch::stable::Tensor fresh(const torch::stable::Tensor& like,
                                   std::initializer_list<int64_t> sizes,
                                   torch::headeronly::ScalarType type) {
  const std::vector<int64_t> shape(sizes);
  return torch::stable::new_empty(like, shape, type);
}

// The pointer table of a tensor list; empty tensors are left out, so that segments are ascending.
struct SegmentTable {
  std::vector<void*> data;
  std::vector<int64_t> offset, numel;

  SegmentTable(const std::vector<torch::stable::Tensor>& tensors,
               const std::vector<int64_t>& offsets) {
    for (size_t k = 0; k < tensors.size(); ++k) {
      const int64_t n = tensors[k].numel();
      if (n == 0) continue;
      data.push_back(tensors[k].data_ptr());
      offset.push_back(offsets[k]);
      numel.push_back(n);
      index_.push_back(k);
    }
  }
  int64_t size() const { return static_cast<int64_t>(data.size()); }

  // Of one value a tensor, those of the tensors that are in the table.
  std::vector<double> select(const std::vector<double>& values) const {
    std::vector<double> kept;
    for (const size_t k : index_) kept.push_back(values[k]);
    return kept;
  }

 private:
  std::vector<size_t> index_;
};

}  // namespace flatmtl
