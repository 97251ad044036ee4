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
    if there is not None:
        values = torch.where(there, values, torch.inf)
    sorted_, order = values.sort()
    # sums before each place, [T + 1]; what does not count lies at the end, with no weight
    inside = sorted_.isfinite()
    shift = sorted_[:1]  # of numbers near each other the squares are told apart better
    apart = torch.where(inside, sorted_ - shift, 0.0)
    sums = torch.stack((inside.to(torch.float64), apart, apart.square())).cumsum(1)
    sums = torch.nn.functional.pad(sums, (1, 0))
    # [3, from, to): one group from here to there
    number, first, second = (sums[:, None, :] - sums[:, :, None]).unbind(0)
    mean = first / number.clamp(min=1.0)
    cost = second - first * mean
    places = torch.arange(tasks + 1, device=values.device)
    cost = torch.where(places[:, None] < places, cost.clamp_(min=0.0), torch.inf)
    best = cost[0]  # [to), of one group
    choices = []  # for each further group and its end, where it begins
    for _ in range(groups - 1):
        best, begin = (best[:, None] + cost).min(0)
        choices.append(begin)
    ends = [places[-1:]]
    for begin in reversed(choices):
        ends.append(begin[ends[-1]])
    end = torch.cat(ends[::-1])  # [groups]
    begin = torch.nn.functional.pad(end[:-1], (1, 0))
    group = (places[:-1, None] >= end).sum(1)
    found = (mean[begin, end] + shift)[group]
    return torch.empty_like(found).scatter_(0, order, found)
