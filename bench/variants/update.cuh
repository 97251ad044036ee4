// combine and the step of the base optimizer in one sweep:  d = sum_i w_i J_i,  then
// torch.optim.SGD with momentum, or torch.optim.AdamW, on parameters that lie as one flat row.
//
// Bytes an element (float32 rows, parameters and state; T rows):
//   combine, then the optimizer   4 T + 4 (d written) + 4 (d read) + parameters and state, read and
//   written here                          4 T + parameters and state, read and written: 8 less
// Parameters and state are 16 bytes with momentum, 24 with AdamW.
//
// d is never rounded to the rows' type and never written. A weight of 0 leaves its row out, as in
// combine. The count of steps, and the factors that follow from it, lie on the device: a captured
// step counts on. No reduction between threads; every element's bits depend on its column alone.
#pragma once

#include "../../csrc/kernels/combine.cuh"

namespace flatmtl::variants {

using kernels::Pack;
using kernels::Rows;

constexpr int kUpdateUnroll = 2;  // packs of four columns of a thread in flight, of every array
constexpr int kUpdatePack = 4;

// What follows from the number of steps, this one included.
struct StepFactors {
  double step;
  float first;   // SGD: 1 in the first step, else 0. AdamW: lr / (1 - beta1^step)
  float second;  // AdamW: 1 / sqrt(1 - beta2^step)
};

// torch.optim.SGD with a momentum buffer.
struct Sgd {
  static constexpr int kStates = 1;
  float lr, momentum, dampening, weight_decay;
  bool nesterov;
  float* state[kStates];  // the buffer

  __device__ void operator()(float gradient, float& param, float (&s)[kStates],
                             const StepFactors& at) const {
    gradient += weight_decay * param;
    s[0] = at.first != 0 ? gradient : momentum * s[0] + (1 - dampening) * gradient;
    param -= lr * (nesterov ? gradient + momentum * s[0] : s[0]);
  }
};

// torch.optim.AdamW.
struct AdamW {
  static constexpr int kStates = 2;
  float beta1, beta2, eps, decay;  // decay: 1 - lr * weight_decay
  float rest1, rest2;              // 1 - beta1, 1 - beta2, rounded once
  float* state[kStates];           // the averages of the gradient and of its square

  __device__ void operator()(float gradient, float& param, float (&s)[kStates],
                             const StepFactors& at) const {
    s[0] = beta1 * s[0] + rest1 * gradient;
    s[1] = beta2 * s[1] + rest2 * gradient * gradient;
    param = decay * param - at.first * s[0] / (sqrtf(s[1]) * at.second + eps);
  }
};

// One thread: no block of the update could count while the others read.
static __global__ void count_sgd_kernel(StepFactors* at) {
  at->step += 1;
  at->first = at->step == 1 ? 1.0f : 0.0f;
}

static __global__ void count_adamw_kernel(StepFactors* at, double lr, double beta1, double beta2) {
  at->step += 1;
  at->first = static_cast<float>(lr / (1 - pow(beta1, at->step)));
  at->second = static_cast<float>(1 / sqrt(1 - pow(beta2, at->step)));
}

template <class T>
__device__ inline Pack<T, kUpdatePack> load_four(const T* row, int64_t column, int64_t columns,
                                                 bool whole) {
  return whole ? kernels::load_pack_stream<T, kUpdatePack>(row + column)
               : kernels::load_guarded<T, kUpdatePack>(row, column, columns);
}

__device__ inline void store_four(float* row, int64_t column, int64_t columns, bool whole,
                                  const Pack<float>& pack) {
  if (whole)
    kernels::store_pack(row + column, pack);
  else
    kernels::store_guarded(row, column, columns, pack);
}

// weights: [T]. params and every state: [P], `aligned` if all of them are.
template <class T, class Update>
__global__ void __launch_bounds__(kernels::kThreads)
    combine_update_kernel(Rows<const T> jac, const double* weights, int tasks, int64_t columns,
                          float* params, bool aligned, Update update, const StepFactors* factors) {
  constexpr int kStates = Update::kStates;
  constexpr int64_t kStride = int64_t{kernels::kThreads} * kUpdatePack;
  constexpr int64_t kSpan = kStride * kUpdateUnroll;
  __shared__ float weight[kernels::kWeightSlab];
  const StepFactors at = *factors;

  for (int64_t start = blockIdx.x * kSpan; start < columns; start += gridDim.x * kSpan) {
    const int64_t column = start + static_cast<int64_t>(threadIdx.x) * kUpdatePack;
    const bool inside = column + (kUpdateUnroll - 1) * kStride + kUpdatePack <= columns;
    Pack<float> param[kUpdateUnroll], state[kStates][kUpdateUnroll];
#pragma unroll
    for (int u = 0; u < kUpdateUnroll; ++u) {
      const int64_t c = column + u * kStride;
      param[u] = load_four(params, c, columns, inside && aligned);
#pragma unroll
      for (int k = 0; k < kStates; ++k)
        state[k][u] = load_four(update.state[k], c, columns, inside && aligned);
    }

    float sum[kUpdateUnroll][kUpdatePack] = {};
    for (int slab = 0; slab < tasks; slab += kernels::kWeightSlab) {
      const int count = min(tasks - slab, kernels::kWeightSlab);
      if (tasks > kernels::kWeightSlab || start == blockIdx.x * kSpan) {
        __syncthreads();
        for (int i = threadIdx.x; i < count; i += kernels::kThreads)
          weight[i] = static_cast<float>(weights[slab + i]);
        __syncthreads();
      }
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        const float w = weight[i];
        if (w == 0) continue;
        Pack<T, kUpdatePack> x[kUpdateUnroll];
#pragma unroll
        for (int u = 0; u < kUpdateUnroll; ++u)
          x[u] = load_four(jac.row(slab + i), column + u * kStride, columns, inside && jac.aligned);
#pragma unroll
        for (int u = 0; u < kUpdateUnroll; ++u)
#pragma unroll
          for (int v = 0; v < kUpdatePack; ++v) sum[u][v] += w * kernels::to_acc(x[u].lane[v]);
      }
    }

#pragma unroll
    for (int u = 0; u < kUpdateUnroll; ++u) {
#pragma unroll
      for (int v = 0; v < kUpdatePack; ++v) {
        float s[kStates];
#pragma unroll
        for (int k = 0; k < kStates; ++k) s[k] = state[k][u].lane[v];
        update(sum[u][v], param[u].lane[v], s, at);
#pragma unroll
        for (int k = 0; k < kStates; ++k) state[k][u].lane[v] = s[k];
      }
      const int64_t c = column + u * kStride;
      store_four(params, c, columns, inside && aligned, param[u]);
#pragma unroll
      for (int k = 0; k < kStates; ++k)
        store_four(update.state[k], c, columns, inside && aligned, state[k][u]);
    }
  }
}

// ---- launchers ---------------------------------------------------------------------------------

template <class T, class Update>
cudaError_t combine_update(Rows<const T> jac, const double* weights, int tasks, int64_t columns,
                           float* params, const Update& update, const StepFactors* factors,
                           cudaStream_t stream) {
  if (columns == 0) return cudaSuccess;
  bool aligned = kernels::is_aligned(params);
  for (const float* state : update.state) aligned = aligned && kernels::is_aligned(state);
  const unsigned blocks =
      kernels::combine_blocks(columns, int64_t{kernels::kThreads} * kUpdatePack * kUpdateUnroll);
  return kernels::launch(combine_update_kernel<T, Update>, dim3(blocks), dim3(kernels::kThreads), 0,
                         stream, jac, weights, tasks, columns, params, aligned, update, factors);
}

// buffer: [P]; its values are not read in the first step.
template <class T>
cudaError_t combine_sgd(Rows<const T> jac, const double* weights, int tasks, int64_t columns,
                        float* params, float* buffer, StepFactors* factors, double lr,
                        double momentum, double dampening, double weight_decay, bool nesterov,
                        cudaStream_t stream) {
  const Sgd update{static_cast<float>(lr),
                   static_cast<float>(momentum),
                   static_cast<float>(dampening),
                   static_cast<float>(weight_decay),
                   nesterov,
                   {buffer}};
  const cudaError_t error = kernels::launch(count_sgd_kernel, dim3(1), dim3(1), 0, stream, factors);
  if (error != cudaSuccess) return error;
  return combine_update(jac, weights, tasks, columns, params, update, factors, stream);
}

// mean, square: [P], zero before the first step.
template <class T>
cudaError_t combine_adamw(Rows<const T> jac, const double* weights, int tasks, int64_t columns,
                          float* params, float* mean, float* square, StepFactors* factors,
                          double lr, double beta1, double beta2, double eps, double weight_decay,
                          cudaStream_t stream) {
  const AdamW update{static_cast<float>(beta1),
                     static_cast<float>(beta2),
                     static_cast<float>(eps),
                     static_cast<float>(1 - lr * weight_decay),
                     static_cast<float>(1 - beta1),
                     static_cast<float>(1 - beta2),
                     {mean, square}};
  const cudaError_t error =
      kernels::launch(count_adamw_kernel, dim3(1), dim3(1), 0, stream, factors, lr, beta1, beta2);
  if (error != cudaSuccess) return error;
  return combine_update(jac, weights, tasks, columns, params, update, factors, stream);
}

}  // namespace flatmtl::variants
