"""What happens between gram and combine: T x T problems, where overhead is all there is.

Ten calls a turn: the first after another entrant's turn finds cold instruction caches and takes several
times as long.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import flatmtl
from bench import peers
from bench.cases import gram_with_conflict
from bench.contests import Call, Contest


def grams(tasks: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Gives one of 16 Gram matrices after the other."""
    generator = torch.Generator().manual_seed(tasks)
    cycle = itertools.cycle([gram_with_conflict(tasks, generator).to(dtype) for _ in range(16)])
    return lambda: next(cycle)


@pytest.mark.parametrize("name", ["pcgrad", "mgda"])
def test_weighting(name, tasks, measure):
    # each gets the Gram matrix that its own pipeline makes
    ours, theirs = grams(tasks, torch.float64), grams(tasks, torch.float32)
    weighting, torchjd = flatmtl.weighting.by_name(name), peers.torchjd_weighting(name)
    others: dict[str, Call] = {}
    if name == "pcgrad":
        others["plain torch"] = lambda: peers.pcgrad_weights(ours())
    if torchjd is not None:
        others["TorchJD"] = lambda: torchjd(theirs())
    measure(
        Contest(name, 0, lambda: weighting(ours()), others, calls=10), kind="solver", tasks=tasks
    )


def test_draw_order(tasks, measure):
    rng = torch.tensor([7, 0])
    others: dict[str, Call] = {
        "rand().argsort()": lambda: torch.rand(tasks, tasks).argsort(1),
        "T x randperm": lambda: torch.stack([torch.randperm(tasks) for _ in range(tasks)]),
    }
    contest = Contest(
        "draw_order_", 0, lambda: flatmtl.ops.draw_order_(rng, tasks), others, calls=10
    )
    measure(contest, kind="solver", tasks=tasks)


def test_affinity(tasks, measure):
    gram, losses = grams(tasks, torch.float64), torch.rand(tasks, dtype=torch.float64) + 0.1
    others: dict[str, Call] = {"torch": lambda: 0.1 * gram() / losses[:, None]}
    contest = Contest(
        "affinity", 0, lambda: flatmtl.ops.affinity(gram(), losses, 0.1), others, calls=10
    )
    measure(contest, kind="solver", tasks=tasks)
