"""What the ranks tell each other where not all is known yet: at the first step, and of new tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flatmtl.distributed.ranks import RankFailedError, Ranks
from flatmtl.distributed.shards import is_sharded
from flatmtl.losses import TaskName

NOBODY = (
    "losses must hold at least one task that has a loss on some rank, got only None on all of them"
)
_ERROR = "error"


def gather_or_raise(ranks: Ranks, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rank's ``facts``, by rank.

    Raises:
        RankFailedError: one has failed (``gather_failure``).
    """
    found = ranks.gather(facts)
    errors = [facts[_ERROR] for facts in found if _ERROR in facts]
    if errors:
        raise RankFailedError(
            f"the step was made on no rank, as one failed: {'; '.join(errors)} (seen from rank "
            f"{ranks.rank})"
        )
    return found


def agree(ranks: Ranks, facts: dict[str, Any]) -> None:
    """Before the first step: the ranks compare ``facts``, and where they are going to leave errors.

    Raises:
        ValueError: the facts differ.
        RankFailedError: a rank has failed.
    """
    found = gather_or_raise(ranks, {"place": ranks.free_place(), **facts})
    ranks.begin_at(max(one.pop("place") for one in found))
    check_same(found)


def gather_failure(ranks: Ranks, failure: Exception) -> None:
    """Takes part in the others' ``gather_or_raise``: this rank has failed."""
    ranks.gather({_ERROR: f"rank {ranks.rank}: {type(failure).__name__}: {failure}"})


def agree_on_reach(
    ranks: Ranks,
    tasks: Sequence[TaskName],
    here: Iterable[int],
    reached: Iterable[tuple[int, int]],
) -> tuple[set[int], list[tuple[int, int]]]:
    """The ranks tell each other which tasks they have and what these reach.

    Args:
        ranks: the ranks.
        tasks: the tasks' names.
        here: the tasks that have a loss on this rank.
        reached: tasks, and the parameters that they reach (what is known already may be left out).

    Returns:
        The same of all ranks together, in one order on each.

    Raises:
        ValueError: the tasks differ.
        RankFailedError: a rank has failed.
    """
    found = gather_or_raise(
        ranks, {"losses": list(tasks), "here": sorted(here), "reached": sorted(reached)}
    )
    check_same([{"the order of the losses' tasks": facts["losses"]} for facts in found])
    together: set[tuple[int, int]] = set().union(*(map(tuple, facts["reached"]) for facts in found))
    return set().union(*(facts["here"] for facts in found)), sorted(together)


def check_same(found: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError if the ranks' facts differ: the same text on all of them."""
    first = found[0]
    for name in first:
        for rank, facts in enumerate(found):
            if facts[name] == first[name]:
                continue
            raise ValueError(
                f"{name} must be the same on every rank, got {first[name]} on rank 0 and {facts[name]} on "
                f"rank {rank}"
            )


def facts_of(
    params: Sequence[Tensor],
    labels: Sequence[str],
    groups: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What must be the same on every rank before the first step. Reads the device.

    Args:
        params: all parameters of the optimizer.
        labels: their names.
        groups: the optimizer's.
        options: name -> anything that compares.
    """
    facts: dict[str, Any] = {"the number of parameters": len(params)}
    for label, param in zip(labels, params, strict=True):
        shape = f"{list(param.shape)} {param.dtype}"
        facts[label] = shape if param.requires_grad else f"{shape}, frozen"
    facts.update(options)
    for number, group in enumerate(groups):
        plain = {
            k: v for k, v in group.items() if isinstance(v, (int, float, str, bool, type(None)))
        }
        facts[f"param_groups[{number}]"] = plain
    whole = [(label, p) for label, p in zip(labels, params, strict=True) if not is_sharded(p)]
    for (label, _), total in zip(whole, _sums([p for _, p in whole]), strict=True):
        facts[f"the sum over {label}"] = total
    return facts


def _sums(params: Sequence[Tensor]) -> list[str]:
    """Of every parameter's elements, for comparison: different values rarely have the same one."""
    if not params:
        return []
    device = params[0].device
    sums = [p.detach().double().sum().to(device) for p in params]
    return [repr(value) for value in torch.stack(sums).tolist()]
