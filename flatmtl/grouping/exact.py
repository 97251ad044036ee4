"""The exact search: arguments for the compiled dynamic programme, and its answer in the user's names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from flatmtl.grouping.names import mask
from flatmtl.grouping.result import Grouping, NearTie, grouping, serve
from flatmtl.grouping.rules import Prices, Rules, sizes_of, units_of
from flatmtl.grouping.scores import MatrixScores, Scores

MOST_TASKS = 26
MOST_STEPS = 1e11  # about two minutes
MOST_BYTES = 4 * 2**30
TOLERANCE = 1e-12  # of the largest sum of scores


@dataclass(frozen=True)
class Cost:
    """What groups cost and what may be spent.

    Attributes:
        prices: of each group.
        budget: the most, or None.
    """

    prices: Prices
    budget: float | None

    def of(self, source: Scores, candidate: int) -> float:
        """The cost of one candidate."""
        if not isinstance(source, MatrixScores) and source.costs is not None:
            return source.costs[candidate]
        return self.prices.of(source.group(candidate))


@dataclass(frozen=True)
class Tiers:
    """Candidates sorted by cost; a tier's candidates cost the same, -1 is no candidate.

    Attributes:
        arguments: for the compiled search: which candidates there are, and their tiers.
        units: each tier's cost in whole steps.
        budget: in steps.
        listed: how many steps it takes to go through all candidates and all they can serve.
    """

    arguments: dict[str, Any]
    units: list[int]
    budget: int
    listed: float


def exact(
    core: ModuleType,
    source: Scores,
    max_groups: int | None,
    cost: Cost,
    rules: Rules,
    partition: bool,
    near_ties: int,
    progress: Callable[[float], None] | None,
) -> Grouping:
    """The best selection."""
    n = len(source.tasks)
    if n > MOST_TASKS:
        raise _too_many(n, f"the exact search takes at most {MOST_TASKS}")
    most = n if max_groups is None else min(max_groups, n)  # each group serves a task
    tiers = _tiers(source, most, cost, rules, partition)
    _check_size(n, most, tiers, near_ties)
    values = source.matrix if isinstance(source, MatrixScores) else source.values
    largest = float(np.nanmax(np.abs(values), initial=1e-280))  # above 0 where all entries are 0
    tolerance = TOLERANCE * n * largest
    sums, chosen, ties = core.select_exact(
        n,
        **tiers.arguments,
        units=tiers.units,
        budget=tiers.budget,
        max_groups=most,
        disjoint=partition,
        near_ties=near_ties,
        tolerance=tolerance,
        progress=progress,
    )
    if not chosen:
        raise ValueError(_why_infeasible(source, max_groups, cost, tiers))
    served = serve(source, [candidate for _, candidate in chosen])
    best = served.objective
    by_count = [_objective(s, source, best, tolerance) for s in sums]
    by_count += by_count[-1:] * ((max_groups or n) - most)
    others = [serve(source, [candidate for _, candidate in tie]) for tie in ties]
    return grouping(
        source,
        served,
        [cost.of(source, c) for c in served.candidates],
        by_count=by_count,
        near_ties=[
            NearTie(
                [source.tasks.group(source.group(c)) for c in other.candidates],
                other.objective,
                max(0.0, source.sign * (best - other.objective)),
            )
            for other in others
        ],
        exact=True,
        bound=best,
    )


def _objective(total: float, source: Scores, best: float, tolerance: float) -> float | None:
    if total == -np.inf:
        return None
    value = source.sign * total / len(source.tasks)
    return best if abs(value - best) <= tolerance else value


def _tiers(source: Scores, most: int, cost: Cost, rules: Rules, partition: bool) -> Tiers:
    n = len(source.tasks)
    if not isinstance(source, MatrixScores):
        masks = np.array([mask(group) for group in source.groups], dtype=np.int64)
        prices = [cost.of(source, c) for c in range(len(masks))]
        sizes = np.array([len(group) for group in source.groups])
        allowed = rules.allow(masks)
        tier, units, budget = _sort(np.array(prices), allowed, most, cost.budget)
        arguments = {
            "groups": masks.astype(np.uint32),
            "tiers": tier.astype(np.int32),
            "scores": source.sign * source.values,
        }
        return Tiers(arguments, units, budget, 0 if partition else float((2.0**sizes).sum()))
    arguments = {"matrix": source.sign * source.matrix}
    smallest = 1 if source.single else 2
    if not rules.any and (cost.budget is None or cost.prices.by_size is not None):
        by_size = [0.0, *(cost.prices.by_size or [1.0] * n)]
        allowed = np.arange(n + 1) >= smallest
        tier, units, budget = _sort(np.array(by_size), allowed, most, cost.budget)
        arguments["tier_of_size"] = tier.astype(np.int32)
        return Tiers(arguments, units, budget, n * 2.0**n)
    groups = np.arange(1 << n, dtype=np.int64)
    allowed = rules.allow(groups) & (sizes_of(n) >= smallest)
    prices_of_all = cost.prices.of_all() if cost.budget is not None else np.ones(1 << n)
    tier, units, budget = _sort(prices_of_all, allowed, most, cost.budget)
    arguments["tier_of_group"] = tier.astype(np.int16)
    return Tiers(arguments, units, budget, 0 if partition else 3.0**n)


def _sort(
    prices: npt.NDArray[np.float64],
    allowed: npt.NDArray[np.bool_],
    most: int,
    budget: float | None,
) -> tuple[npt.NDArray[np.int64], list[int], int]:
    """Tier of each candidate (-1: none), each tier's cost in steps, and the budget in steps."""
    if budget is None or not allowed.any():
        return np.where(allowed, 0, -1), [0], 0
    different, at = np.unique(prices, return_inverse=True)
    used = np.unique(at[allowed])
    units, steps = units_of(different[used].tolist(), budget)
    kept = [k for k in used.tolist() if units[different[k]] <= steps]
    if len(kept) > np.iinfo(np.int16).max:
        raise ValueError(f"costs must have fewer different values, got {len(kept)}")
    tier_of = np.full(len(different), -1)
    tier_of[kept] = np.arange(len(kept))
    sizes = [units[different[k]] for k in kept] or [0]
    return np.where(allowed, tier_of[at], -1), sizes, min(steps, most * max(sizes))


def _check_size(n: int, most: int, tiers: Tiers, near_ties: int) -> None:
    """Refuses what would take minutes or more memory than a small machine has."""
    layers = max((most + 1) // 2, most - 1 if near_ties else 0, 1)
    sweeps = (layers - 1) * sum(max(tiers.budget - u + 1, 0) for u in tiers.units)
    steps = sweeps * 3.0 ** (n - 1) + tiers.listed
    size = 8.0 * 2**n * (len(tiers.units) + (layers + 1) * (tiers.budget + 1))
    if steps > MOST_STEPS or size > MOST_BYTES:
        raise _too_many(
            n,
            f"with these arguments the exact search needs {steps:.1e} steps and {size / 2**30:.1f} "
            f"GiB, more than {MOST_STEPS:.0e} and {MOST_BYTES / 2**30:.0f}",
        )


def _too_many(n: int, why: str) -> ValueError:
    return ValueError(
        f"affinity has too many tasks, {n}: {why}. Take heuristic=True (no promise but a bound), "
        "cluster first (flatmtl.grouping.cluster_groups) and select within the clusters, lower "
        "max_groups, or coarsen the costs"
    )


def _why_infeasible(source: Scores, max_groups: int | None, cost: Cost, tiers: Tiers) -> str:
    limits = [] if max_groups is None else [f"{max_groups} group(s)"]
    limits += [] if cost.budget is None else [f"a budget of {cost.budget:g}"]
    text = f"no selection within {' and '.join(limits)} covers all tasks under these rules"
    names = source.tasks.names
    if isinstance(source, MatrixScores):
        by_group = tiers.arguments.get("tier_of_group")
        if by_group is not None:
            groups = np.flatnonzero(by_group >= 0)
            alone = [t for t in range(len(names)) if not (groups >> t & 1).any()]
            if alone:
                return (
                    f"{text}: no group that may hold {names[alone[0]]!r} is left; relax the rules"
                )
    else:
        kept = tiers.arguments["groups"][tiers.arguments["tiers"] >= 0]
        covered = np.bitwise_or.reduce(kept, initial=0)
        alone = [t for t in range(len(names)) if not int(covered) >> t & 1]
        if alone:
            return f"{text}: the table has no group left that holds {names[alone[0]]!r}"
    return f"{text}: raise max_groups or the budget, or relax must, must_not, partition or allow_single"
