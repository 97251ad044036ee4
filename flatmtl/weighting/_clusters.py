"""k-means of numbers: in one dimension it is solved exactly, without a start to choose."""

from __future__ import annotations

import torch
from torch import Tensor


def centres(values: Tensor, groups: int, there: Tensor | None) -> Tensor:
    """The mean of each number's group, in the grouping of least squared distances to these means.

    Groups are intervals of the sorted numbers; their ends are found by dynamic programming, in a number of
    operations that depends on the shape alone.

    Args:
        values: float64 [T].
        groups: from 1 to T.
        there: bool [T], the numbers that count; None: all. What the others get means nothing.

    Returns:
        float64 [T].
    """
    tasks = values.shape[0]
    before, barrier, places = _constants(tasks, values.device)
    ones = torch.ones_like(values)
    if there is not None:
        values = torch.where(there, values, torch.inf)
    sorted_, order = values.sort()
    shift = sorted_[:1]  # of numbers near each other the squares are told apart better
    apart = sorted_ - shift
    if there is not None:  # what does not count lies at the end, with no weight
        inside = sorted_.isfinite()
        apart = torch.where(inside, apart, 0.0)
        ones = inside.to(torch.float64)
    sums = torch.stack((ones, apart, apart.square())) @ before  # [3, T + 1], before each place
    # [from, to) of one group: how many, their sum and that of their squares, all [T + 1, T + 1]
    number, first, second = (sums[:, None, :] - sums[:, :, None]).unbind(0)
    mean = first / number.clamp_(min=1.0)
    cost = torch.addcmul(second, first, mean, value=-1.0).add_(barrier)
    best = cost[0]  # [to), of one group
    choices = []  # for each further group and its end, where it begins
    for _ in range(groups - 1):
        best, begin = (best[:, None] + cost).min(0)
        choices.append(begin)
    ends = [places[-1:]]
    for begin in reversed(choices):
        ends.append(begin[ends[-1]])
    ends.append(places[:1])
    edges = torch.cat(ends[::-1])  # [groups + 1]
    group = torch.bucketize(places[:-1], edges, right=True) - 1
    found = (mean[edges[:-1], edges[1:]] + shift)[group]
    return torch.empty_like(found).scatter_(0, order, found)


def _constants(tasks: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What sums the numbers before each place [T, T + 1], what forbids empty groups, the places [T + 1]."""
    places = torch.arange(tasks + 1, device=device)
    before = (places[:-1, None] < places).to(torch.float64)
    barrier = torch.where(places[:, None] < places, 0.0, torch.inf).to(torch.float64)
    return before, barrier, places
