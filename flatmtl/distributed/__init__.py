"""Training in several processes: rows averaged between ranks, the same step on each of them.

What users need of it: ``Checkpoint``, and ``RankFailedError``, which a step raises where another rank failed.
"""

from flatmtl.distributed.checkpoint import Checkpoint
from flatmtl.distributed.ranks import RankFailedError

__all__ = ["Checkpoint", "RankFailedError"]
