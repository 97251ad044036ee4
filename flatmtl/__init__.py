"""flatmtl: multi-task learning with per-task gradients, nearly free.

``MultiTaskOptimizer`` is a drop-in around any torch optimizer; ``weighting`` holds the aggregation
methods, ``SAM`` makes it FS-MTL; ``aggregate`` and ``ops`` are the pieces on their own. ``AffinityProbe``
measures which tasks help each other, ``select_groups`` chooses which to train together.
"""

from flatmtl import curriculum, grouping, measures, ops, plots, regularizers, weighting
from flatmtl.affinity import AffinityProbe, AffinityRecord, sample_overlap
from flatmtl.aggregation import aggregate
from flatmtl.grouping import select_groups
from flatmtl.history import History
from flatmtl.jacobian import Batched
from flatmtl.optimizer import MultiTaskOptimizer
from flatmtl.popart import PopArt
from flatmtl.representation import Representation
from flatmtl.sharpness import SAM, SAMO
from flatmtl.strategies import MAML, CoopFlat

__version__ = "0.1.0"

__all__ = [
    "MAML",
    "SAM",
    "SAMO",
    "AffinityProbe",
    "AffinityRecord",
    "Batched",
    "CoopFlat",
    "History",
    "MultiTaskOptimizer",
    "PopArt",
    "Representation",
    "__version__",
    "aggregate",
    "curriculum",
    "grouping",
    "measures",
    "ops",
    "plots",
    "regularizers",
    "sample_overlap",
    "select_groups",
    "weighting",
]
