// The Python face of csrc/ordering.
#pragma once

#include <pybind11/pybind11.h>

void bind_ordering(pybind11::module_& m);
