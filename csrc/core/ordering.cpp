// flatmtl._core: order_exact, order_by_nearest and order_by_annealing. The arguments are checked in
// Python (flatmtl/curriculum); here only what would read out of bounds.
#include "ordering.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "../ordering/annealing.h"
#include "../ordering/held_karp.h"
#include "watch.h"

namespace py = pybind11;
namespace ord = flatmtl::ordering;

namespace {

using Array = py::array_t<double, py::array::c_style | py::array::forcecast>;

void require(bool right, const char* what) {
  if (!right) throw py::value_error(what);
}

ord::Problem problem_of(const Array& similarity, int start) {
  require(similarity.ndim() == 2 && similarity.shape(0) == similarity.shape(1) &&
              similarity.shape(0) >= 1 && similarity.shape(0) <= 1 << 20,
          "similarity must be [n, n]");
  const auto tasks = static_cast<int>(similarity.shape(0));
  require(start >= -1 && start < tasks, "start must be -1 or a task");
  return {tasks, similarity.data(), start};
}

ord::Path order_exact(const Array& similarity, int start, py::object progress) {
  const ord::Problem problem = problem_of(similarity, start);
  require(problem.tasks <= 24, "order_exact takes at most 24 tasks");
  PythonWatch watch(std::move(progress));
  py::gil_scoped_release free;
  return ord::HeldKarp(problem, watch).path();
}

ord::Path order_by_nearest(const Array& similarity, int start) {
  const ord::Problem problem = problem_of(similarity, start);
  PythonWatch watch(py::none{});
  py::gil_scoped_release free;
  return ord::nearest_neighbour(problem, watch);
}

ord::Path order_by_annealing(const Array& similarity, ord::Path path, int start, uint64_t seed,
                             py::object progress) {
  const ord::Problem problem = problem_of(similarity, start);
  ord::Path sorted = path;
  std::sort(sorted.begin(), sorted.end());
  bool whole = static_cast<int>(path.size()) == problem.tasks;
  for (size_t k = 0; whole && k < sorted.size(); ++k) whole = sorted[k] == static_cast<int>(k);
  require(whole && (start < 0 || path[0] == start), "path must have each task once, start first");
  PythonWatch watch(std::move(progress));
  py::gil_scoped_release free;
  return ord::Annealing(problem, std::move(path), seed, watch).run();
}

}  // namespace

void bind_ordering(py::module_& m) {
  m.def("order_exact", &order_exact, py::arg("similarity"), py::kw_only(), py::arg("start"),
        py::arg("progress") = py::none(),
        "The path through all tasks with the largest sum of similarities; start: -1 for any.");
  m.def("order_by_nearest", &order_by_nearest, py::arg("similarity"), py::kw_only(),
        py::arg("start"), "The best path of those that go on to the most similar task left.");
  m.def("order_by_annealing", &order_by_annealing, py::arg("similarity"), py::arg("path"),
        py::kw_only(), py::arg("start"), py::arg("seed"), py::arg("progress") = py::none(),
        "A path at least as good as the given one, by simulated annealing.");
}
