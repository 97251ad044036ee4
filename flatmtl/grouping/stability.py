"""How far a selection hangs on the noise of the measurement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

from flatmtl.grouping.select import select_groups
from flatmtl.losses import TaskName

if TYPE_CHECKING:
    from flatmtl.affinity import AffinityRecord

Groups = tuple[tuple[TaskName, ...], ...]


@dataclass(frozen=True)
class Stability:
    """Selections from redrawn affinities.

    Attributes:
        selections: groups and the share of the draws that chose just these, most frequent first.
        together: float64 [T, T], the share of the draws in which the task of the row is served in a group
            that holds the task of the column; 1 on the diagonal.
        draws: number of draws.
        tasks: the tasks, in the order of rows and columns.
    """

    selections: list[tuple[Groups, float]]
    together: np.ndarray
    draws: int
    tasks: list[TaskName]

    def __str__(self) -> str:
        """The most frequent selections, a line each."""
        lines = [f"selections in {self.draws} draws within the standard errors:"]
        for groups, share in self.selections[:5]:
            sets = " ".join(f"{{{', '.join(map(str, group))}}}" for group in groups)
            lines.append(f"  {100 * share:5.1f} %  {sets}")
        rest = 1.0 - sum(share for _, share in self.selections[:5])
        if len(self.selections) > 5:
            lines.append(f"  {100 * rest:5.1f} %  {len(self.selections) - 5} others")
        return "\n".join(lines)


def stability(
    record: AffinityRecord,
    max_groups: int,
    *,
    quantity: str = "affinity",
    epochs: int | slice | None = None,
    draws: int = 200,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
    **options: Any,  # noqa: ANN401
) -> Stability:
    """Selects again and again from matrices drawn around the measured one.

    Every entry is drawn by itself from a normal distribution with its mean and standard error. Errors
    of neighbouring steps and pairs are related, which this leaves out: a selection that is not stable
    here is not, one that is may still change with another training run.

    Args:
        record: with at least two measured steps of every pair.
        max_groups: most groups.
        quantity: which matrix of the record.
        epochs: of which epochs, as in ``AffinityRecord.matrix``.
        draws: how many.
        seed: of the draws.
        progress: called with a fraction up to 1 after each draw.
        **options: of ``select_groups``.

    Returns:
        How often each selection was chosen.

    Raises:
        ValueError: ``draws`` below 1, a pair without a standard error, or as ``select_groups``.
    """
    if not isinstance(draws, Integral) or isinstance(draws, bool) or draws < 1:
        raise ValueError(f"draws must be an integer of at least 1, got {draws!r}")
    mean = record.matrix(quantity, epochs=epochs)
    error = record.standard_error(quantity, epochs)
    tasks = list(record.tasks)
    single = options.get("allow_single", False) or options.get("objective") == "hoa"
    used = np.ones_like(mean, dtype=bool) if single else ~np.eye(len(tasks), dtype=bool)
    if not np.isfinite(error[used]).all():
        raise ValueError(
            "record must have at least two measured steps of every pair, got pairs without a standard "
            "error: measure more steps"
        )
    rng = np.random.default_rng(seed)
    chosen: Counter[Groups] = Counter()
    together = np.zeros(mean.shape)
    place = {task: k for k, task in enumerate(tasks)}
    for draw in range(draws):
        drawn = mean + np.nan_to_num(error) * rng.standard_normal(mean.shape)
        found = select_groups(drawn, max_groups, tasks=tasks, **options)
        chosen[tuple(sorted(found.groups, key=lambda g: [place[t] for t in g]))] += 1
        for task, group in found.served_by.items():
            for other in found.groups[group]:
                together[place[task], place[other]] += 1
        if progress is not None:
            progress((draw + 1) / draws)
    return Stability(
        [(groups, count / draws) for groups, count in chosen.most_common()],
        together / draws,
        int(draws),
        tasks,
    )
