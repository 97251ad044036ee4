"""The global random number generators across the passes of a step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from flatmtl import cuda_graphs

State = list[Tensor]  # the CPU's state, then that of each CUDA device


class Generators:
    """torch's global generators: the CPU's and those of the CUDA devices that parameters live on."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cuda = sorted({d.index or 0 for d in devices if d.type == "cuda"})

    def state(self) -> State | None:
        """Their state; None while a CUDA graph is captured, whose generators cannot be read."""
        if cuda_graphs.capturing():
            return None
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(k) for k in self._cuda)]

    def set(self, state: State | None) -> None:
        """Puts a state back."""
        if state is None:
            return
        torch.set_rng_state(state[0])
        for k, one in zip(self._cuda, state[1:], strict=True):
            torch.cuda.set_rng_state(one, k)


class Replay:
    """Gives the perturbed passes of each micro-batch the random numbers of its clean pass.

    Python's and numpy's generators are not touched. A closure that runs one task alone draws as the clean
    pass did up to the first draw that it leaves out: masks of the trunk are the same, those of a head are
    if no other head draws before it.
    """

    def __init__(self, generators: Generators) -> None:
        self._generators = generators
        self._before: list[State | None] = []
        self._after: State | None = None

    def note(self) -> None:
        """Before a clean pass.

        Raises:
            RuntimeError: a CUDA graph is being captured.
        """
        cuda_graphs.refuse(  # its generators cannot be set back
            "replay_rng must be off, no exact AffinityProbe due and the weighting none that looks back"
        )
        self._before.append(self._generators.state())

    def rewind(self, number: int) -> None:
        """Before a perturbed pass of micro-batch ``number``."""
        if self._after is None:
            self._after = self._generators.state()
        self._generators.set(self._before[number])

    def end(self) -> None:
        """After the last pass."""
        if self._after is not None:
            self._generators.set(self._after)
            self._after = None
