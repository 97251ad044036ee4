"""A CUDA graph's stand-in on the CPU: the operators of a step, recorded with their tensors and run again.

What a replay does not repeat, it shows: a number read or counted on the host, a tensor made from Python
numbers, a state that a step puts elsewhere than it found it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What waits for a device, has a shape that depends on values, or brings numbers from the host (which
# is a copy from pageable memory on a device, and waits too).
READS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "nonzero_numpy", "equal", "allclose",
         "masked_select", "unique", "unique2", "_unique2", "unique_dim", "unique_consecutive",
         "repeat_interleave", "bincount")  # fmt: skip
COPIES = ("lift_fresh", "lift")
METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")


class Tape(TorchDispatchMode):
    """Records every operator; raises at one that a CUDA graph could not hold."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1])
        )
        if name in READS or by_mask:
            raise AssertionError(f"read on the host: {func}")
        if name in COPIES:
            raise AssertionError(f"brought from the host: {func}")
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Runs them again, in place, each on the tensors that it had."""
        with torch.no_grad():
            for func, args, kwargs, before in self._calls:
                after = func(*args, **kwargs)
                for old, new in zip(tree_leaves(before), tree_leaves(after)):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.data.copy_(new)


@contextmanager
def taped(monkeypatch) -> Iterator[Tape]:
    """Inside, a step runs as it does on a device whose stream is being captured, and is recorded."""
    tape = Tape()

    def refuse(name: str):
        def read(*args: object, **kwargs: object):
            raise AssertionError(f"read on the host: Tensor.{name}")

        return read

    with monkeypatch.context() as patch:
        # on the CPU, and there only, flags for errors and warnings are looked at at once
        patch.setattr("flatmtl.watch.Watch.post", lambda *_: None)
        for name in METHODS:
            patch.setattr(Tensor, name, refuse(name))
        with tape:
            yield tape
