// flatmtl._core: select_exact and select_by_search. The arguments are checked in Python
// (flatmtl/grouping); here only what would read out of bounds.
#include "selection.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "../selection/exact.h"
#include "../selection/listed_scores.h"
#include "../selection/local_search.h"
#include "watch.h"

namespace py = pybind11;
namespace sel = flatmtl::selection;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

void require(bool right, const char* what) {
  if (!right) throw py::value_error(what);
}

template <class T>
const T* entries(const std::optional<Array<T>>& array, py::ssize_t size, const char* what) {
  if (!array) return nullptr;
  require(array->size() == size, what);
  return array->data();
}

py::list groups_of(const std::vector<sel::Candidate>& groups) {
  py::list out;
  for (const sel::Candidate& c : groups) out.append(py::make_tuple(c.group, c.id));
  return out;
}

py::tuple select_exact(int tasks, std::optional<Array<double>> matrix,
                       std::optional<Array<int32_t>> tier_of_size,
                       std::optional<Array<int16_t>> tier_of_group,
                       std::optional<Array<uint32_t>> groups, std::optional<Array<int32_t>> tiers,
                       std::optional<Array<double>> scores, std::vector<int> units, int budget,
                       int max_groups, bool disjoint, int near_ties, double tolerance,
                       py::object progress) {
  require(tasks >= 1 && tasks <= 26, "tasks must be from 1 to 26");
  require(max_groups >= 1 && max_groups <= tasks, "max_groups must be from 1 to tasks");
  require(!units.empty() && budget >= 0 && near_ties >= 0, "units, budget or near_ties are wrong");
  std::unique_ptr<sel::Scores> source;
  if (matrix) {
    require(tier_of_size.has_value() != tier_of_group.has_value(), "one kind of tiers is needed");
    source = std::make_unique<sel::MatrixScores>(
        tasks, entries(matrix, tasks * tasks, "matrix must be [n, n]"),
        entries(tier_of_size, tasks + 1, "tier_of_size must be [n + 1]"),
        entries(tier_of_group, py::ssize_t{1} << tasks, "tier_of_group must be [2^n]"), disjoint);
  } else {
    require(groups && tiers && scores, "groups, tiers and scores are needed without a matrix");
    const py::ssize_t listed = groups->size();
    source = std::make_unique<sel::ListedScores>(
        tasks, listed, groups->data(), entries(tiers, listed, "tiers must be [C]"),
        entries(scores, listed * tasks, "scores must be [C, n]"), disjoint);
  }
  PythonWatch watch(std::move(progress));
  sel::Solution solution;
  {
    py::gil_scoped_release free;
    solution = sel::solve(
        *source, {max_groups, std::move(units), budget, disjoint, near_ties, tolerance}, watch);
  }
  py::list ties;
  for (const sel::NearTie& tie : solution.near_ties) ties.append(groups_of(tie.groups));
  return py::make_tuple(solution.by_count, groups_of(solution.groups), ties);
}

py::tuple select_by_search(Array<double> matrix, std::vector<std::vector<int>> units,
                           Array<bool> conflicts, int max_groups, bool disjoint, bool allow_single,
                           uint64_t seed, int starts, py::object progress) {
  const auto tasks = static_cast<int>(matrix.shape(0));
  const auto blocks = static_cast<py::ssize_t>(units.size());
  require(matrix.ndim() == 2 && matrix.shape(1) == tasks, "matrix must be [n, n]");
  require(conflicts.size() == blocks * blocks, "conflicts must be [units, units]");
  require(max_groups >= 1 && starts >= 1, "max_groups and starts must be at least 1");
  PythonWatch watch(std::move(progress));
  sel::Found found;
  {
    const double* a = matrix.data();
    const bool* apart = conflicts.data();
    py::gil_scoped_release free;
    found =
        sel::search_locally({tasks, a, std::move(units), apart, max_groups, disjoint, allow_single},
                            seed, starts, watch);
  }
  return py::make_tuple(found.by_count, found.groups);
}

}  // namespace

void bind_selection(py::module_& m) {
  m.def(
      "select_exact", &select_exact, py::arg("tasks"), py::kw_only(),
      py::arg("matrix") = py::none(), py::arg("tier_of_size") = py::none(),
      py::arg("tier_of_group") = py::none(), py::arg("groups") = py::none(),
      py::arg("tiers") = py::none(), py::arg("scores") = py::none(), py::arg("units"),
      py::arg("budget"), py::arg("max_groups"), py::arg("disjoint"), py::arg("near_ties"),
      py::arg("tolerance"), py::arg("progress") = py::none(),
      "The selection of groups with the largest sum of scores: sums by number of groups, groups as "
      "(mask, id), near-ties as lists of such groups.");
  m.def(
      "select_by_search", &select_by_search, py::arg("matrix"), py::kw_only(), py::arg("units"),
      py::arg("conflicts"), py::arg("max_groups"), py::arg("disjoint"), py::arg("allow_single"),
      py::arg("seed"), py::arg("starts"), py::arg("progress") = py::none(),
      "The same by multi-start local search: sums by number of groups, groups as lists of tasks.");
}
