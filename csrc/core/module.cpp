// flatmtl._core: what is no tensor operator. Build information, the selection of task groups, and
// the order of tasks.
#include <pybind11/pybind11.h>

#include "ordering.h"
#include "selection.h"

#ifndef FLATMTL_BUILD_TORCH
#define FLATMTL_BUILD_TORCH "unknown"
#endif
#ifndef FLATMTL_BUILD_CUDA
#define FLATMTL_BUILD_CUDA ""
#endif
#ifndef FLATMTL_BUILD_ARCHS
#define FLATMTL_BUILD_ARCHS ""
#endif

PYBIND11_MODULE(_core, m) {
  m.doc() = "flatmtl's native helpers that are no tensor operators.";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["compiler"] = __VERSION__;
        info["torch"] = FLATMTL_BUILD_TORCH;
        info["cuda"] = FLATMTL_BUILD_CUDA;
        info["cuda_archs"] = FLATMTL_BUILD_ARCHS;
        return info;
      },
      "What this build was made with: compiler, torch headers, CUDA toolkit ('' if built without) "
      "and "
      "the CUDA architectures.");
  bind_selection(m);
  bind_ordering(m);
}
