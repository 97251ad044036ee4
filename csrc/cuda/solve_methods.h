// Where every method's kernels are compiled: they take long, so that they are spread over files.
// A file defines FLATMTL_COMPILE_<group> for the methods that it compiles.
#pragma once

#include "../common/methods.h"
#include "../kernels/solve.cuh"

#define FLATMTL_SOLVE(Method)                                                                 \
  cudaError_t kernels::solve<Method>(const Method&, const double*, int64_t, int64_t, double*, \
                                     double*, int64_t*, double*, cudaStream_t)

namespace flatmtl {

#ifndef FLATMTL_COMPILE_QUADRATIC
extern template FLATMTL_SOLVE(Mgda);
extern template FLATMTL_SOLVE(DualCone);
extern template FLATMTL_SOLVE(Cagrad);
extern template FLATMTL_SOLVE(Pcd);
#endif
#ifndef FLATMTL_COMPILE_SMOOTH
extern template FLATMTL_SOLVE(AlphaFair);
extern template FLATMTL_SOLVE(Nash);
extern template FLATMTL_SOLVE(ImtlG);
extern template FLATMTL_SOLVE(Config);
extern template FLATMTL_SOLVE(Aligned);
#endif
#ifndef FLATMTL_COMPILE_LOOPS
extern template FLATMTL_SOLVE(Constant);
extern template FLATMTL_SOLVE(Softmax);
extern template FLATMTL_SOLVE(PcGrad);
extern template FLATMTL_SOLVE(GradVac);
extern template FLATMTL_SOLVE(Krum);
extern template FLATMTL_SOLVE(SdmGrad);
extern template FLATMTL_SOLVE(MoDo);
extern template FLATMTL_SOLVE(Scale);
#endif

}  // namespace flatmtl
