// The Python face of csrc/selection.
#pragma once

#include <pybind11/pybind11.h>

void bind_selection(pybind11::module_& m);
