// The methods of csrc/solvers/ by number, for the C libraries of the tests. The numbers and the
// order of the options are those of tests/solver_cases.py.
#pragma once

#include <cstdint>

#include "aligned.h"
#include "cagrad.h"
#include "config.h"
#include "dual_cone.h"
#include "fixed.h"
#include "gradvac.h"
#include "imtl_g.h"
#include "krum.h"
#include "mgda.h"
#include "nash.h"
#include "pcd.h"
#include "pcgrad.h"
#include "two_batch.h"

struct MethodInputs {
  const double* option;
  const int64_t* order;
  const double* preference;  // [T] or null
  double* state;             // a method's state, PCGrad's coefficients
};

// f(method)
template <class F>
void with_method(int number, const MethodInputs& in, const F& f) {
  using namespace flatmtl;
  const double* o = in.option;
  const auto whole = [&](int k) { return static_cast<int64_t>(o[k]); };
  switch (number) {
    case 0:
      return f(Constant{in.preference, o[0]});
    case 1:
      return f(PcGrad{in.order, in.state});
    case 2:
      return f(GradVac{in.order, in.state, o[0], o[1]});
    case 3:
      return f(Mgda{o[0]});
    case 4:
      return f(DualCone{in.preference, o[0] != 0, o[1]});
    case 5:
      return f(Cagrad{o[0], whole(1), o[2]});
    case 6:
      return f(AlphaFair{o[0], in.preference, o[1]});
    case 7:
      return f(Nash{in.state, whole(0), o[1], o[2]});
    case 8:
      return f(ImtlG{o[0]});
    case 9:
      return f(Config{in.preference, o[0]});
    case 10:
      return f(Aligned{in.preference, whole(0), o[1]});
    case 11:
      return f(Pcd{in.state, o[0], o[1], o[2], o[3]});
    case 12:
      return f(Krum{whole(0), whole(1)});
    case 13:
      return f(SdmGrad{in.state, in.preference, o[0], o[1], whole(2), o[3]});
    case 14:
      return f(MoDo{in.state, o[0], o[1]});
    case 15:
      return f(Scale{in.state, whole(0), o[1]});
    case 16:
      return f(Softmax{in.state});
  }
}
