"""What stands against trusting a record, in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flatmtl.affinity._names import printable

if TYPE_CHECKING:
    from flatmtl.affinity.record import AffinityRecord

FEW_STEPS = 10
# Shares of common samples below which gradient affinities are said to be noise, and above which reliable.
NOISE, RELIABLE = 0.3, 0.4


def of(record: AffinityRecord) -> list[str]:
    measured = record.metadata.get("mode") != "given"
    found = _sign(record)
    if measured:
        found += _few_steps(record)
    found += _never(record)
    if measured:
        found += _not_positive(record)
    return found + _not_finite(record) + _overlap(record)


def _sign(record: AffinityRecord) -> list[str]:
    own = record.metadata.get("look_ahead") == "optimizer"
    if not record.metadata.get("momentum", own):
        return []
    return [
        "the look-ahead step has the optimizer's momentum: what all sources have in common may decide "
        "the sign of every entry; compare the entries of a row, and do not read a negative one as harm"
    ]


def _few_steps(record: AffinityRecord) -> list[str]:
    steps = int(record.steps.sum())
    if steps < FEW_STEPS:
        return [f"measured in {steps} steps only: the values are mostly noise below {FEW_STEPS}"]
    counts = record.counts()
    few = _others(counts > 0) & (counts < FEW_STEPS)
    return [f"{_pairs(record, few)} measured in fewer than {FEW_STEPS} steps"] if few.any() else []


def _never(record: AffinityRecord) -> list[str]:
    never = _others(record.counts() == 0)
    return [f"{_pairs(record, never)} never measured"] if never.any() else []


def _not_positive(record: AffinityRecord) -> list[str]:
    """Steps that have the gradients of a pair, and no affinity: the loss did not allow it."""
    if "cosine" not in record.quantities:
        return []
    lost = (record.counts("cosine") - record.counts()).max(axis=1, initial=0)
    rows = [f"{printable(record.tasks[i])} ({lost[i]})" for i in np.flatnonzero(lost > 0)]
    if not rows:
        return []
    return [
        f"steps left out because the recipient's loss was not positive and finite, for {len(rows)} of "
        f"{len(record.tasks)} recipients: {_few(rows)}"
    ]


def _not_finite(record: AffinityRecord) -> list[str]:
    bad = (record.counts() > 0) & ~np.isfinite(record.matrix())
    return [f"{_pairs(record, bad)} not finite"] if bad.any() else []


def _overlap(record: AffinityRecord) -> list[str]:
    if record.overlap is None:
        return []
    share = np.nan_to_num(record.overlap)  # a task without labels shares nothing
    noise, doubtful = _others(share < NOISE), _others(share < RELIABLE)
    if not doubtful.any():
        return []
    return [
        f"{_pairs(record, doubtful)} below {RELIABLE:.0%} common samples, "
        f"{np.count_nonzero(noise)} of them below {NOISE:.0%}; one study (arXiv 2604.07848) calls "
        f"gradient affinity noise below {NOISE:.0%} and reliable above {RELIABLE:.0%}"
    ]


def _others(where: np.ndarray) -> np.ndarray:
    return where & ~np.eye(len(where), dtype=bool)


def _pairs(record: AffinityRecord, where: np.ndarray) -> str:
    """How many of the pairs, and the first few as recipient <- source."""
    at = np.argwhere(where)
    size = len(record.tasks)
    called = [printable(task) for task in record.tasks]
    names = [f"{called[i]} <- {called[j]}" for i, j in at[:4]]
    verb = "is" if len(at) == 1 else "are"
    return f"{len(at)} of {size * (size - 1)} pairs ({_few(names, len(at))}) {verb}"


def _few(names: list[str], total: int | None = None) -> str:
    total = len(names) if total is None else total
    return ", ".join(names[:3]) + (", ..." if total > 3 else "")
