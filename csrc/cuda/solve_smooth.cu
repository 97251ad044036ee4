// Equations, linear systems and eigenvalues.
#define FLATMTL_COMPILE_SMOOTH
#include "solve_methods.h"

namespace flatmtl {

template FLATMTL_SOLVE(AlphaFair);
template FLATMTL_SOLVE(Nash);
template FLATMTL_SOLVE(ImtlG);
template FLATMTL_SOLVE(Config);
template FLATMTL_SOLVE(Aligned);

}  // namespace flatmtl
