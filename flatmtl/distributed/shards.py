"""Parameters of which every rank holds a part (DTensor)."""

from __future__ import annotations

import sys

from torch import Tensor


def is_sharded(param: Tensor) -> bool:
    """Whether it is a DTensor. Nothing is imported for the question: that takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(param, module.DTensor)
