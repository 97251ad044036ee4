#define FLATMTL_ISA base
#include "kernels_body.h"
