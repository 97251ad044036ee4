// Ctrl-C and progress, from the calling thread; the GIL is free in between.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>

#include "../selection/watch.h"

class PythonWatch : public flatmtl::selection::Watch {
 public:
  explicit PythonWatch(pybind11::object progress) : progress_(std::move(progress)) {}

 protected:
  void pause(double fraction) override {
    pybind11::gil_scoped_acquire lock;
    if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
    if (!progress_.is_none() && (odd_ = !odd_)) progress_(fraction);  // every second pause
  }

 private:
  pybind11::object progress_;
  bool odd_ = true;
};
