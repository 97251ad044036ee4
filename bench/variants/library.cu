// The variants as C functions over raw pointers, for bench/variants/library.py. Compiled by nvcc,
// or by g++ with tests/cuda_emulation. dtype: 0 float32, 1 bfloat16. Each returns a cudaError_t.
#include "gram.cuh"
#include "update.cuh"

namespace {

using namespace flatmtl;

template <class F>
int with_rows(int dtype, const void* jac, int64_t stride, int tasks, const F& f) {
  if (dtype == 0) return f(kernels::rows_of(static_cast<const float*>(jac), stride, tasks));
  return f(kernels::rows_of(static_cast<const __nv_bfloat16*>(jac), stride, tasks));
}

cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace

extern "C" {

// Doubles of scratch that variants_gram needs.
int64_t variants_gram_partials(int variant, int tasks, int64_t columns) {
  return kernels::triangle(tasks) *
         variants::gram_chunks(static_cast<variants::GramVariant>(variant), tasks, columns);
}

int variants_gram(int variant, int dtype, const void* jac, int64_t stride, int tasks,
                  int64_t columns, double* partials, double* out, void* stream) {
  return with_rows(dtype, jac, stride, tasks, [&](auto rows) {
    return variants::gram(static_cast<variants::GramVariant>(variant), rows, tasks, columns,
                          partials, out, stream_of(stream));
  });
}

// factors: 16 bytes, zero before the first step.
int variants_combine_sgd(int dtype, const void* jac, int64_t stride, const double* weights,
                         int tasks, int64_t columns, float* params, float* buffer, void* factors,
                         double lr, double momentum, double dampening, double weight_decay,
                         int nesterov, void* stream) {
  return with_rows(dtype, jac, stride, tasks, [&](auto rows) {
    return variants::combine_sgd(rows, weights, tasks, columns, params, buffer,
                                 static_cast<variants::StepFactors*>(factors), lr, momentum,
                                 dampening, weight_decay, nesterov != 0, stream_of(stream));
  });
}

int variants_combine_adamw(int dtype, const void* jac, int64_t stride, const double* weights,
                           int tasks, int64_t columns, float* params, float* mean, float* square,
                           void* factors, double lr, double beta1, double beta2, double eps,
                           double weight_decay, void* stream) {
  return with_rows(dtype, jac, stride, tasks, [&](auto rows) {
    return variants::combine_adamw(rows, weights, tasks, columns, params, mean, square,
                                   static_cast<variants::StepFactors*>(factors), lr, beta1, beta2,
                                   eps, weight_decay, stream_of(stream));
  });
}

#ifdef FLATMTL_EMULATED
// gram_async with all columns in one chunk, so that a lane's sum reaches its limit of terms, which
// takes millions of columns otherwise. out: [T (T + 1) / 2].
int variants_async_chunk(const float* jac, int tasks, int64_t columns, double* out) {
  kernels::TilePlan plan = kernels::tile_plan<float>(tasks, columns);
  plan.stages_per_chunk *= plan.chunks;
  plan.chunks = 1;
  return variants::gram_async(kernels::rows_of(jac, columns, tasks), tasks, columns, plan, out,
                              nullptr);
}
#endif

}  // extern "C"
