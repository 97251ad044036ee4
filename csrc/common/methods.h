// The solver operators' bindings, one text for both libraries.
//
// Backend::solve(gram, method, residual) runs a method of csrc/solvers/ on every problem of a
// batch, Backend::check_order(order, tasks) looks at the numbers where that does not wait for a
// device.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../solvers/aligned.h"
#include "../solvers/cagrad.h"
#include "../solvers/config.h"
#include "../solvers/dual_cone.h"
#include "../solvers/fixed.h"
#include "../solvers/gradvac.h"
#include "../solvers/imtl_g.h"
#include "../solvers/krum.h"
#include "../solvers/mgda.h"
#include "../solvers/nash.h"
#include "../solvers/pcd.h"
#include "../solvers/pcgrad.h"
#include "../solvers/two_batch.h"
#include "check.h"
#include "operands.h"

namespace flatmtl {

struct Solved {
  Tensor weights, status, residual;
};
using Answer = std::tuple<Tensor, Tensor>;             // weights, status
using Certified = std::tuple<Tensor, Tensor, Tensor>;  // weights, status, residual

inline Answer answer(const Solved& s) { return {s.weights, s.status}; }
inline Certified certified(const Solved& s) { return {s.weights, s.status, s.residual}; }

// gram's batch dimensions (none or B), then `last`.
inline std::vector<int64_t> batch_shape(const Tensor& gram, std::initializer_list<int64_t> last) {
  std::vector<int64_t> shape;
  if (gram.dim() == 3) shape.push_back(gram.size(0));
  shape.insert(shape.end(), last);
  return shape;
}

inline int64_t batch_of(const Tensor& gram) { return gram.dim() == 3 ? gram.size(0) : 1; }

template <class Backend>
struct Methods {
  using Optional = std::optional<Tensor>;

  static Answer solve_constant(const Tensor& gram, const Optional& preference, double value) {
    return answer(Backend::solve(gram, Constant{preferred(gram, preference), value}, false));
  }
  static Certified solve_pcgrad(const Tensor& gram, const Tensor& order) {
    const int64_t n = check_square("gram", gram);
    check_small("order", order, ScalarType::Long, "gram", gram, batch_shape(gram, {n, n}));
    Backend::check_order(order, n);
    Tensor coefficients = fresh(gram, batch_shape(gram, {n, n}), ScalarType::Double);
    const Solved s =
        Backend::solve(gram, PcGrad{data<int64_t>(order), data<double>(coefficients)}, false);
    return {s.weights, coefficients, s.status};
  }
  // The random order and the solve in one call: from Python two operators take twice as long.
  static Certified solve_pcgrad_drawn_(const Tensor& gram, const Tensor& rng) {
    return solve_pcgrad(gram, drawn_order(gram, rng));
  }
  static Answer solve_gradvac(const Tensor& gram, const Tensor& order, const Tensor& target,
                              double beta, double eps) {
    const int64_t n = check_square("gram", gram);
    check_small("order", order, ScalarType::Long, "gram", gram, batch_shape(gram, {n, n}));
    check_small("target", target, ScalarType::Double, "gram", gram, batch_shape(gram, {n, n}));
    Backend::check_order(order, n);
    return answer(Backend::solve(
        gram, GradVac{data<int64_t>(order), data<double>(target), beta, eps}, false));
  }
  static Answer solve_gradvac_drawn_(const Tensor& gram, const Tensor& rng, const Tensor& target,
                                     double beta, double eps) {
    return solve_gradvac(gram, drawn_order(gram, rng), target, beta, eps);
  }
  static Answer solve_random_(const Tensor& gram, const Tensor& rng) {
    const int64_t n = check_square("gram", gram);
    check_small("rng", rng, ScalarType::Long, "gram", gram, {2});
    const Tensor normal = fresh(gram, batch_shape(gram, {n}), ScalarType::Double);
    Backend::draw_normals(rng, batch_of(gram), n, normal);
    return answer(Backend::solve(gram, Softmax{data<double>(normal)}, false));
  }
  static Certified solve_mgda(const Tensor& gram, double ridge) {
    return certified(Backend::solve(gram, Mgda{ridge}, true));
  }
  static Certified solve_dual_cone(const Tensor& gram, const Optional& preference, bool each,
                                   double ridge) {
    return certified(
        Backend::solve(gram, DualCone{preferred(gram, preference), each, ridge}, true));
  }
  static Certified solve_cagrad(const Tensor& gram, double c, int64_t rescale, double ridge) {
    return certified(Backend::solve(gram, Cagrad{c, rescale, ridge}, true));
  }
  static Certified solve_alpha_fair(const Tensor& gram, double alpha, const Optional& preference,
                                    double ridge) {
    return certified(
        Backend::solve(gram, AlphaFair{alpha, preferred(gram, preference), ridge}, true));
  }
  static Certified solve_nash_(const Tensor& gram, const Tensor& last, int64_t every,
                               double max_norm, double ridge) {
    STD_TORCH_CHECK(every >= 1, "every must be at least 1, got ", every);
    return certified(
        Backend::solve(gram, Nash{state_of("last", last, gram, 1), every, max_norm, ridge}, true));
  }
  static Certified solve_imtl_g(const Tensor& gram, double ridge) {
    return certified(Backend::solve(gram, ImtlG{ridge}, true));
  }
  static Certified solve_config(const Tensor& gram, const Optional& preference, double ridge) {
    return certified(Backend::solve(gram, Config{preferred(gram, preference), ridge}, true));
  }
  static Certified solve_aligned(const Tensor& gram, const Optional& preference, int64_t scale_mode,
                                 double rank_tolerance) {
    return certified(Backend::solve(
        gram, Aligned{preferred(gram, preference), scale_mode, rank_tolerance}, true));
  }
  static Certified solve_pcd_(const Tensor& gram, const Tensor& state, double tau, double beta,
                              double eps, double ridge) {
    return certified(
        Backend::solve(gram, Pcd{state_of("state", state, gram, 1), tau, beta, eps, ridge}, true));
  }
  static Answer solve_krum(const Tensor& gram, int64_t byzantine, int64_t selected) {
    return answer(Backend::solve(gram, Krum{byzantine, selected}, false));
  }
  static Answer solve_sdmgrad_(const Tensor& cross, const Tensor& state, const Optional& preference,
                               double lr, double momentum, int64_t steps, double lambda_) {
    return answer(
        Backend::solve(cross,
                       SdmGrad{state_of("state", state, cross, 0, "cross"),
                               preferred(cross, preference, "cross"), lr, momentum, steps, lambda_},
                       false));
  }
  static Answer solve_modo_(const Tensor& cross, const Tensor& state, double gamma, double rho) {
    return answer(Backend::solve(
        cross, MoDo{state_of("state", state, cross, 0, "cross"), gamma, rho}, false));
  }
  static Tensor scale_weights(const Tensor& gram, const Tensor& weights, int64_t scaling,
                              double max_norm) {
    const int64_t n = check_square("gram", gram);
    check_small("weights", weights, ScalarType::Double, "gram", gram, batch_shape(gram, {n}));
    return Backend::solve(gram, Scale{data<double>(weights), scaling, max_norm}, false).weights;
  }

  static Tensor draw_order_(const Tensor& rng, int64_t tasks, int64_t batch) {
    check_small("rng", rng, ScalarType::Long, "rng", rng, {2});
    STD_TORCH_CHECK(tasks >= 1 && batch >= 1, "tasks and batch must be at least 1, got ", tasks,
                    " and ", batch);
    const Tensor order = fresh(rng, {batch, tasks, tasks}, ScalarType::Long);
    Backend::draw_orders(rng, batch, tasks, order);
    return order;
  }

  static void register_in(torch::stable::detail::StableLibrary& m) {
    m.impl("solve_constant", TORCH_BOX(&Methods::solve_constant));
    m.impl("solve_pcgrad", TORCH_BOX(&Methods::solve_pcgrad));
    m.impl("solve_pcgrad_drawn_", TORCH_BOX(&Methods::solve_pcgrad_drawn_));
    m.impl("solve_gradvac_drawn_", TORCH_BOX(&Methods::solve_gradvac_drawn_));
    m.impl("solve_random_", TORCH_BOX(&Methods::solve_random_));
    m.impl("draw_order_", TORCH_BOX(&Methods::draw_order_));
    m.impl("solve_gradvac", TORCH_BOX(&Methods::solve_gradvac));
    m.impl("solve_mgda", TORCH_BOX(&Methods::solve_mgda));
    m.impl("solve_dual_cone", TORCH_BOX(&Methods::solve_dual_cone));
    m.impl("solve_cagrad", TORCH_BOX(&Methods::solve_cagrad));
    m.impl("solve_alpha_fair", TORCH_BOX(&Methods::solve_alpha_fair));
    m.impl("solve_nash_", TORCH_BOX(&Methods::solve_nash_));
    m.impl("solve_imtl_g", TORCH_BOX(&Methods::solve_imtl_g));
    m.impl("solve_config", TORCH_BOX(&Methods::solve_config));
    m.impl("solve_aligned", TORCH_BOX(&Methods::solve_aligned));
    m.impl("solve_pcd_", TORCH_BOX(&Methods::solve_pcd_));
    m.impl("solve_krum", TORCH_BOX(&Methods::solve_krum));
    m.impl("solve_sdmgrad_", TORCH_BOX(&Methods::solve_sdmgrad_));
    m.impl("solve_modo_", TORCH_BOX(&Methods::solve_modo_));
    m.impl("scale_weights", TORCH_BOX(&Methods::scale_weights));
  }

 private:
  // A random order for every problem of gram, in gram's shape.
  static Tensor drawn_order(const Tensor& gram, const Tensor& rng) {
    const int64_t n = check_square("gram", gram);
    check_small("rng", rng, ScalarType::Long, "gram", gram, {2});
    const Tensor order = fresh(gram, batch_shape(gram, {n, n}), ScalarType::Long);
    Backend::draw_orders(rng, batch_of(gram), n, order);
    return order;
  }
  // A preference [T] on gram's device, or null.
  static const double* preferred(const Tensor& gram, const Optional& preference,
                                 const char* gram_name = "gram") {
    const int64_t n = check_square(gram_name, gram);
    if (!preference) return nullptr;
    check_small("preference", *preference, ScalarType::Double, gram_name, gram, {n});
    return data<double>(*preference);
  }
  // A method's state, T + more numbers a problem.
  static double* state_of(const char* name, const Tensor& state, const Tensor& gram, int64_t more,
                          const char* gram_name = "gram") {
    const int64_t n = check_square(gram_name, gram);
    check_small(name, state, ScalarType::Double, gram_name, gram, batch_shape(gram, {n + more}));
    return data<double>(state);
  }
};

}  // namespace flatmtl
