// What the CPU and CUDA bindings both make of their operands: fresh results, pointer tables.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <vector>

namespace flatmtl {

// Uninitialised and contiguous, on the device of `like`. On CUDA the caching allocator ties it to
// the current stream, so that scratch may be dropped as soon as its last kernel is launched. By the
// direct call: through the dispatcher an allocation costs as long as a small solve.
inline torch::stable::Tensor fresh(const torch::stable::Tensor& like,
                                   const std::vector<int64_t>& sizes,
                                   torch::headeronly::ScalarType type) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= sizes[d]) strides[d] = stride;
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device_type,
      like.get_device_index(), &made));
  return torch::stable::Tensor(made);
}

template <class T>
T* data(const torch::stable::Tensor& t) {
  return static_cast<T*>(t.data_ptr());
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
