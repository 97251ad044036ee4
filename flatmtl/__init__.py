"""flatmtl: multi-task learning with per-task gradients, nearly free.

``MultiTaskOptimizer`` is a drop-in around any torch optimizer; ``weighting`` holds the aggregation
methods, ``SAM`` makes it FS-MTL; ``aggregate`` and ``ops`` are the pieces on their own. ``AffinityProbe``
measures which tasks help each other, ``select_groups`` chooses which to train together.
"""

from flatmtl import grouping, measures, ops, plots, weighting
from flatmtl.affinity import AffinityProbe, AffinityRecord, sample_overlap
from flatmtl.aggregation import aggregate
from flatmtl.grouping import select_groups
from flatmtl.history import History
from flatmtl.jacobian import Batched
from flatmtl.optimizer import MultiTaskOptimizer
from flatmtl.representation import Representation
from flatmtl.sharpness import SAM, SAMO

__version__ = "0.1.0"

__all__ = [
    "SAM",
    "SAMO",
    "AffinityProbe",
    "AffinityRecord",
    "Batched",
    "History",
    "MultiTaskOptimizer",
    "Representation",
    "__version__",
    "aggregate",
    "grouping",
    "measures",
    "ops",
    "plots",
    "sample_overlap",
    "select_groups",
    "weighting",
]
