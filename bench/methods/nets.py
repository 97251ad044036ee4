"""The network of each kind of data, its losses and its metrics."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.methods.data import Data, Part
from examples.many_networks import Regressor
from flatmtl.demo.model import PairNet

LOWER_IS_BETTER = {"classes": False, "numbers": True, "flags": False}


class Network(nn.Module):
    """A trunk and a head a task for some data: the demo's ResNet for images, else two hidden layers."""

    def __init__(self, data: Data, width: int) -> None:
        super().__init__()
        self.kind = data.kind
        self.names = [str(task) for task in range(len(data.tasks))]
        self.net: nn.Module = (
            PairNet()
            if data.kind == "classes"
            else Regressor(data.train.x.shape[1], width, self.names)
        )

    def forward(self, x: Tensor, tasks: Sequence[int]) -> list[Tensor]:
        """What it says of each of ``tasks``: [N, classes] or [N]."""
        if self.kind == "classes":
            return self.net(x, tasks)
        found = self.net(x, [self.names[task] for task in tasks])
        return [found[self.names[task]] for task in tasks]

    def losses(self, x: Tensor, y: Tensor, tasks: Sequence[int]) -> list[Tensor | None]:
        """The mean loss over the labels that there are; None for a task without any."""
        said = self(x, tasks)
        return [self._loss(out, y[:, task]) for out, task in zip(said, tasks, strict=True)]

    def _loss(self, out: Tensor, y: Tensor) -> Tensor | None:
        if self.kind == "classes":
            return functional.cross_entropy(out, y)
        if self.kind == "numbers":
            return functional.mse_loss(out, y)
        known = ~y.isnan()
        if not known.any():
            return None
        return functional.binary_cross_entropy_with_logits(out[known], y[known])


@torch.no_grad()
def metrics(model: Network, part: Part, data: Data, tasks: Sequence[int]) -> list[float]:
    """Each task's metric: accuracy in %, mean absolute error in the target's unit, or ROC-AUC in %."""
    model.eval()
    chunks = [model(x, tasks) for x in part.x.split(1000)]
    outs = [torch.cat(chunk) for chunk in zip(*chunks, strict=True)]
    model.train()
    found = []
    for out, task in zip(outs, tasks, strict=True):
        y = part.y[:, task]
        if data.kind == "classes":
            found.append(100.0 * float((out.argmax(1) == y).float().mean()))
        elif data.kind == "numbers":
            found.append(data.scale[task] * float((out - y).abs().mean()))
        else:
            known = ~y.isnan()
            found.append(100.0 * auc(out[known].numpy(), y[known].numpy()))
    return found


def auc(scores: np.ndarray, flags: np.ndarray) -> float:
    """Area under the ROC curve: the share of pairs (one, zero) in order, ties counted as halves.

    Args:
        scores: [N].
        flags: [N], 0 or 1; both must occur, else the result is NaN.
    """
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # ties share their mean rank, from 1
    ones = int(flags.sum())
    zeros = len(flags) - ones
    if not ones or not zeros:
        return float("nan")
    return float((ranks[flags == 1].sum() - ones * (ones + 1) / 2) / (ones * zeros))
