"""Which tasks to train together: selection of groups, baselines, and both on the same footing."""

from flatmtl.grouping.baselines import cluster_groups, hoa_matrix, random_groups
from flatmtl.grouping.compare import Comparison, ComparisonRow, compare_groupings
from flatmtl.grouping.evaluate import evaluate_groups
from flatmtl.grouping.result import Grouping, NearTie
from flatmtl.grouping.select import select_groups
from flatmtl.grouping.stability import Stability, stability

__all__ = [
    "Comparison",
    "ComparisonRow",
    "Grouping",
    "NearTie",
    "Stability",
    "cluster_groups",
    "compare_groupings",
    "evaluate_groups",
    "hoa_matrix",
    "random_groups",
    "select_groups",
    "stability",
]
