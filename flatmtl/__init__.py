"""flatmtl: multi-task learning with per-task gradients, nearly free.

``MultiTaskOptimizer`` is a drop-in around any torch optimizer; ``weighting`` holds the aggregation
methods, ``SAM`` makes it FS-MTL; ``aggregate`` and ``ops`` are the pieces on their own.
"""

from flatmtl import ops, plots, weighting
from flatmtl.aggregation import aggregate
from flatmtl.history import History
from flatmtl.optimizer import MultiTaskOptimizer
from flatmtl.sharpness import SAM

__version__ = "0.1.0"

__all__ = [
    "SAM",
    "History",
    "MultiTaskOptimizer",
    "__version__",
    "aggregate",
    "ops",
    "plots",
    "weighting",
]
