// CUDA binding: gram_difference.
#include "gram_of.h"

namespace flatmtl::cuda {

Tensor gram_difference(const Tensor& sam, const Tensor& jac) {
  check_rows("jac", jac);
  check_same_rows("sam", sam, "jac", jac);
  return gram_of<true>(jac, sam);
}

}  // namespace flatmtl::cuda

STABLE_TORCH_LIBRARY_IMPL(flatmtl, CUDA, m) {
  using namespace flatmtl::cuda;
  m.impl("gram_difference", TORCH_BOX(&gram_difference));
}
