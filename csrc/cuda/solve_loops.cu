// Coefficient loops and what needs no solving.
#define FLATMTL_COMPILE_LOOPS
#include "solve_methods.h"

namespace flatmtl {

template FLATMTL_SOLVE(Constant);
template FLATMTL_SOLVE(Softmax);
template FLATMTL_SOLVE(PcGrad);
template FLATMTL_SOLVE(GradVac);
template FLATMTL_SOLVE(Krum);
template FLATMTL_SOLVE(SdmGrad);
template FLATMTL_SOLVE(MoDo);
template FLATMTL_SOLVE(Scale);

}  // namespace flatmtl
