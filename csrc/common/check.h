// Argument checks shared by the CPU and CUDA bindings. The Python wrappers check more and raise
// ValueError or TypeError; these keep a direct call of torch.ops.flatmtl.* from touching memory it
// must not touch. Every message names the argument, what it must be, and what came.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace flatmtl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_row_type(const char* name, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double ||
                      type == ScalarType::BFloat16 || type == ScalarType::Half,
                  name, " must be float32, float64, bfloat16 or float16, got scalar type ",
                  static_cast<int>(type));
}

inline const char* type_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    default:
      return "another dtype";
  }
}

inline int32_t device_type(const Tensor& t) {
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  return type;
}

// As torch prints it: "cpu", "cuda:1".
inline std::string device_name(const Tensor& t) {
  const int32_t type = device_type(t);
  if (type == aoti_torch_device_type_cpu()) return "cpu";
  if (type == aoti_torch_device_type_meta()) return "meta";
  const std::string kind = type == aoti_torch_device_type_cuda() ? "cuda" : "another kind";
  return kind + ":" + std::to_string(t.get_device_index());
}

inline void check_device(const char* name, const Tensor& t, const char* other_name,
                         const Tensor& other) {
  STD_TORCH_CHECK(
      device_type(t) == device_type(other) && t.get_device_index() == other.get_device_index(),
      name, " must be on the device of ", other_name, " (", device_name(other), "), got ",
      device_name(t));
}

inline void check_like(const char* name, const Tensor& t, const char* other_name,
                       const Tensor& other) {
  STD_TORCH_CHECK(t.scalar_type() == other.scalar_type(), name, " must have the dtype of ",
                  other_name, " (", type_name(other.scalar_type()), "), got ",
                  type_name(t.scalar_type()));
  check_device(name, t, other_name, other);
}

// What lies beside rows (gradients, parameters, the saved copy, a weighted sum): of the rows'
// dtype, or float32 beside rows in half precision.
inline void check_beside(const char* name, const Tensor& t, const char* row_name,
                         const Tensor& row) {
  const ScalarType type = t.scalar_type(), narrow = row.scalar_type();
  const bool half = narrow == ScalarType::BFloat16 || narrow == ScalarType::Half;
  STD_TORCH_CHECK(type == narrow || (half && type == ScalarType::Float), name,
                  " must have the dtype of ", row_name, " (", type_name(narrow),
                  "), or float32 where that is bfloat16 or float16, got ", type_name(type));
  check_device(name, t, row_name, row);
}

// [T, P], rows of consecutive elements that do not overlap.
inline void check_rows(const char* name, const Tensor& t) {
  check_row_type(name, t);
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) >= 1, name,
                  " must be a matrix [T, P] with T >= 1, got ", t.dim(), " dimensions");
  STD_TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == 1, name,
                  " must have stride 1 along its rows, got ", t.stride(1));
  STD_TORCH_CHECK(t.size(0) <= 1 || t.stride(0) >= t.size(1), name,
                  " must have rows that do not overlap, got row stride ", t.stride(0));
}

inline void check_same_rows(const char* name, const Tensor& t, const char* other_name,
                            const Tensor& other) {
  check_rows(name, t);
  check_like(name, t, other_name, other);
  STD_TORCH_CHECK(t.size(0) == other.size(0) && t.size(1) == other.size(1), name,
                  " must have the shape of ", other_name, ", [", other.size(0), ", ", other.size(1),
                  "], got [", t.size(0), ", ", t.size(1), "]");
}

// A flat row [P].
inline void check_flat(const char* name, const Tensor& t) {
  check_row_type(name, t);
  STD_TORCH_CHECK(t.dim() == 1 && t.is_contiguous(), name, " must be 1-D and contiguous");
}

// The flat parameters beside a row of gradients.
inline void check_saved(const Tensor& saved, const Tensor& row) {
  check_flat("saved", saved);
  check_beside("saved", saved, "row", row);
  STD_TORCH_CHECK(saved.size(0) == row.size(0), "saved must have ", row.size(0),
                  " elements, as row, got ", saved.size(0));
}

// Small dense operands of a solve or a sum, on the device of another.
inline void check_small(const char* name, const Tensor& t, ScalarType type, const char* other_name,
                        const Tensor& other, const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(t.scalar_type() == type, name, " must have scalar type ", static_cast<int>(type),
                  ", got ", static_cast<int>(t.scalar_type()));
  check_device(name, t, other_name, other);
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  bool fits = t.dim() == static_cast<int64_t>(sizes.size());
  int64_t d = 0;
  for (const int64_t size : sizes) fits = fits && t.size(d++) == size;
  STD_TORCH_CHECK(fits, name, " does not have the shape that the other arguments ask for");
}

// Tensors of one dtype, that of `like`, laid at ascending offsets of a row, without overlap.
inline void check_segments(const char* name, const std::vector<Tensor>& tensors,
                           const std::vector<int64_t>& offsets, const Tensor& row,
                           const char* like_name, const Tensor& like) {
  STD_TORCH_CHECK(tensors.size() == offsets.size(), "offsets must have one entry for each of ",
                  name, " (", tensors.size(), "), got ", offsets.size());
  int64_t end = 0;
  for (size_t k = 0; k < tensors.size(); ++k) {
    const std::string which = std::string(name) + "[" + std::to_string(k) + "]";
    check_like(which.c_str(), tensors[k], like_name, like);
    STD_TORCH_CHECK(tensors[k].is_contiguous(), which, " must be contiguous");
    STD_TORCH_CHECK(offsets[k] >= end, "offsets[", k, "] must be at least ", end, ", got ",
                    offsets[k]);
    STD_TORCH_CHECK(offsets[k] <= row.numel() - tensors[k].numel(), which,
                    " must end within the row (", row.numel(), " elements), got offset ",
                    offsets[k], " and ", tensors[k].numel(), " elements");
    end = offsets[k] + tensors[k].numel();
  }
}

// pack_row_'s operands.
inline void check_pack(const Tensor& row, const std::vector<Tensor>& grads,
                       const std::vector<int64_t>& offsets) {
  check_flat("row", row);
  if (!grads.empty()) check_beside("grads[0]", grads[0], "row", row);
  check_segments("grads", grads, offsets, row, "grads[0]", grads.empty() ? row : grads[0]);
}

// The row [P] that a weighted sum of jac's rows goes to.
inline void check_out_row(const Tensor& out, const Tensor& jac) {
  check_flat("out", out);
  check_beside("out", out, "jac", jac);
  STD_TORCH_CHECK(out.size(0) == jac.size(1), "out must have ", jac.size(1), " elements, got ",
                  out.size(0));
}

// graddrop_'s operands.
inline void check_drop(const Tensor& jac, const std::optional<Tensor>& leak,
                       const std::optional<Tensor>& there, const Tensor& rng, const Tensor& out) {
  check_rows("jac", jac);
  if (leak) check_small("leak", *leak, ScalarType::Double, "jac", jac, {jac.size(0)});
  if (there) check_small("there", *there, ScalarType::Bool, "jac", jac, {jac.size(0)});
  check_small("rng", rng, ScalarType::Long, "jac", jac, {2});
  check_out_row(out, jac);
}

// perturb_'s operands.
inline void check_perturb(const std::vector<Tensor>& params, const Tensor& saved, const Tensor& row,
                          const Tensor& sq_norm, const std::vector<int64_t>& offsets,
                          const std::vector<double>& rho) {
  check_flat("row", row);
  check_saved(saved, row);
  check_segments("params", params, offsets, row, "saved", saved);
  check_small("sq_norm", sq_norm, ScalarType::Double, "row", row, {});
  STD_TORCH_CHECK(rho.size() == params.size(), "rho must have one entry for each of params (",
                  params.size(), "), got ", rho.size());
}

// A square matrix [T, T] or a batch of them [B, T, T], float64. Returns T.
inline int64_t check_square(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2 || t.dim() == 3, name, " must have shape [T, T] or [B, T, T], got ",
                  t.dim(), " dimensions");
  const int64_t n = t.size(t.dim() - 1);
  STD_TORCH_CHECK(n >= 1 && t.size(t.dim() - 2) == n, name,
                  " must hold square matrices of at least one task, got ", t.size(t.dim() - 2),
                  " by ", n);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double && t.is_contiguous(), name,
                  " must be contiguous float64");
  return n;
}

}  // namespace flatmtl
