// The methods that are non-negative quadratic programmes.
#define FLATMTL_COMPILE_QUADRATIC
#include "solve_methods.h"

namespace flatmtl {

template FLATMTL_SOLVE(Mgda);
template FLATMTL_SOLVE(DualCone);
template FLATMTL_SOLVE(Cagrad);
template FLATMTL_SOLVE(Pcd);

}  // namespace flatmtl
