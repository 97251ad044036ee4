"""What the ranks tell each other where not all is known yet: at the first step, and of new tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flatmtl.distributed.ranks import NOT_MADE, RankFailedError, Ranks, hardware
from flatmtl.losses import TaskName
from flatmtl.shards import is_sharded

NOBODY = (
    "losses must hold at least one task that has a loss, and samples, on some rank, got None or no samples "
    "on all of them"
)
_ERROR = "error"
_OTHER = object()  # in place of what is not compared


def gather_or_raise(ranks: Ranks, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rank's ``facts``, by rank.

    Raises:
        RankFailedError: one has failed (``gather_failure``).
    """
    found = ranks.gather(facts)
    errors = [facts[_ERROR] for facts in found if _ERROR in facts]
    if errors:
        raise RankFailedError(f"{NOT_MADE}: {'; '.join(errors)} (seen from rank {ranks.rank})")
    return found


def agree(ranks: Ranks, facts: dict[str, Any], device: torch.device) -> list[str]:
    """Before the first step: the ranks compare ``facts``, and where they are going to leave errors.

    Returns:
        The kinds of hardware that their arithmetic runs on.

    Raises:
        ValueError: the facts differ.
        RankFailedError: a rank has failed.
    """
    own = {"place": ranks.free_place(), "hardware": hardware(device)}
    try:
        found = gather_or_raise(ranks, {**facts, **own})
    except RankFailedError:
        raise
    except RuntimeError as failure:
        raise RuntimeError(
            "ranks must all compare what they train, at the first step and after load_state_dict() or a "
            f"change of probes, which is to be made on every rank; rank {ranks.rank} waited in vain"
        ) from failure
    ranks.begin_at(max(one.pop("place") for one in found))
    kinds = {one.pop("hardware") for one in found}
    check_same(found)
    ranks.agreed = True
    return sorted(kinds)


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
    check_same([{"the losses' tasks and their order": facts["losses"]} for facts in found])
    together: set[tuple[int, int]] = set().union(*(map(tuple, facts["reached"]) for facts in found))
    return set().union(*(facts["here"] for facts in found)), sorted(together)


def present_in(counts: Tensor) -> set[int]:
    """The tasks that some rank has a loss of; ``counts``: float64 [T], what all ranks' count for.

    Raises:
        ValueError: there is none.
    """
    if counts.device.type != "cpu":
        # a task that no rank has would be known by waiting for the device only
        return set(range(len(counts)))
    present = {task for task, n in enumerate(counts.tolist()) if n > 0}
    if not present:
        raise ValueError(NOBODY)
    return present


def check_same(found: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError if the ranks' facts differ: the same text on all of them."""
    for name in dict.fromkeys(name for facts in found for name in facts):
        first, *others = (facts.get(name, "none") for facts in found)
        for rank, other in enumerate(others, 1):
            if other != first:
                raise ValueError(
                    f"{name} must be the same on every rank, got {first} on rank 0 and {other} on rank "
                    f"{rank}"
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
    for number, (label, param) in enumerate(zip(labels, params, strict=True)):
        facts[f"the optimizer's parameter number {number}"] = label
        shape = f"{list(param.shape)} {param.dtype}"
        facts[label] = shape if param.requires_grad else f"{shape}, frozen"
    facts.update(options)
    for number, group in enumerate(groups):
        plain = {name: _plain(value) for name, value in group.items() if name != "params"}
        facts[f"the number of parameters in param_groups[{number}]"] = len(group["params"])
        facts[f"param_groups[{number}]"] = {k: v for k, v in plain.items() if v is not _OTHER}
    whole = [(label, p) for label, p in zip(labels, params, strict=True) if not is_sharded(p)]
    for (label, _), total in zip(whole, _sums([p for _, p in whole]), strict=True):
        facts[f"the sum over {label}"] = total
    return facts


def _plain(value: object) -> object:
    """An option of an optimizer, as it can be sent and compared."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value if isinstance(value, (int, float, str, type(None))) else _OTHER


def _sums(params: Sequence[Tensor]) -> list[str]:
    """Of every parameter's elements, for comparison: different values rarely have the same one."""
    if not params:
        return []
    device = params[0].device
    sums = [p.detach().double().sum().to(device) for p in params]
    return [repr(value) for value in torch.stack(sums).tolist()]
