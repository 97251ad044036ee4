"""What several processes tell each other at a step, by the kind of step that an engine is going to make."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flatmtl.distributed.agree import agree, facts_of
from flatmtl.distributed.counts import Samples
from flatmtl.distributed.fsdp_step import FSDPOneRowStep, FSDPStep
from flatmtl.distributed.one_row import OneRowStep
from flatmtl.distributed.ranks import Ranks
from flatmtl.distributed.row_step import RowStep
from flatmtl.distributed.samo_step import SamoStep
from flatmtl.distributed.sharded_step import Second, ShardedStep
from flatmtl.distributed.turn_step import TurnStep
from flatmtl.representation import Representation
from flatmtl.sharpness import SAM, SAMO
from flatmtl.steps.represented import message
from flatmtl.strategies import MAML, CoopFlat
from flatmtl.watch import outside
from flatmtl.weighting import Weighting

if TYPE_CHECKING:
    from flatmtl.engine import Engine

_SEVERAL = 10  # steps after which all tasks and parameters should have been seen


def agree_before_step(
    engine: Engine, ranks: Ranks, groups: Sequence[dict[str, Any]], samples: Samples
) -> None:
    """Has the ranks compare what they train, before the first step.

    Raises:
        ValueError: it differs.
    """
    if not ranks.agreed:
        told = {**_facts(engine, groups), "whether samples= is given": samples is not None}
        kinds = agree(ranks, told, engine.params()[0].device)
        if len(kinds) > 1:
            warnings.warn(
                f"ranks run on different hardware, {kinds}: their weights may differ in the last bits, and "
                "parameters drift apart with them",
                stacklevel=outside(),
            )


def warn_of_unseen(engine: Engine, ranks: Ranks) -> None:
    """Warns once of what no rank has come across, after so many steps."""
    roles = engine.roles
    if roles is not None and not roles.complete and engine.steps == _SEVERAL and not ranks.rank:
        names = [f"task {name!r}" for name in roles.unseen()]
        reach = zip(roles.params, roles.reach(), strict=True)
        names += [engine.label(param) for param, tasks in reach if not tasks]
        what = ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")
        warnings.warn(
            f"no rank has seen {what} yet: as long as that is so the ranks tell each other at every step "
            "what they found, which takes longer; freeze parameters that nothing reaches "
            "(requires_grad_(False))",
            stacklevel=outside(),
        )


def link_of(
    engine: Engine,
    ranks: Ranks,
    groups: Sequence[dict[str, Any]],
    samples: Samples,
    batches: int,
) -> RowStep | OneRowStep | SamoStep:
    """What the ranks are going to send each other at the next step."""
    options = engine.options
    apart, reuse = engine.kind(engine.radii(groups))
    known = engine.roles is not None and engine.roles.complete

    def tables(tasks: int) -> list[int]:
        return [meter.columns(tasks) for meter in engine.due()]

    one = options.strategy is None and (
        reuse or (apart and engine.solves.weightings["loss"].one_pass)
    )
    if one and ranks.copies and known:
        return FSDPOneRowStep(ranks, engine.roles, samples, batches, [1])
    if one and not ranks.copies:
        decomposed = _aggregate(engine) == "decomposed"
        rows = [1] if apart else [1 + decomposed, 1]
        measuring = None
        if engine.solves.weightings["loss"].one_pass and engine.measures:
            measuring = RowStep(
                ranks, engine.roles, samples, None, perturbed=False, local=False, tables=tables
            )
        return OneRowStep(ranks, engine.roles, samples, batches, rows, measuring)
    if isinstance(options.strategy, CoopFlat):
        turn = functools.partial(options.strategy.turn, engine.steps)
        return TurnStep(ranks, engine.roles, samples, batches, turn)
    if not apart and isinstance(options.sharpness, SAMO):
        return SamoStep(ranks, engine.roles, samples, batches)
    if options.strategy is None and isinstance(options.jacobian, Representation):
        return OneRowStep(ranks, engine.roles, samples, batches, [1], extra=message)
    perturbed = not apart or options.strategy is not None
    local = perturbed and not options.sync_perturbation
    losses = (lambda: engine.losses) if engine.looks_at_losses else None
    second: Second = "sam" if _aggregate(engine) == "direct" else "flat"
    if ranks.copies:
        return FSDPStep(ranks, engine.roles, samples, losses, perturbed=perturbed, second=second)
    if options.shard_rows:
        return ShardedStep(
            ranks,
            engine.roles,
            samples,
            losses,
            perturbed=perturbed,
            second=second,
            tables=tables,
        )
    twice = isinstance(options.strategy, MAML) and not options.strategy.first_order
    return RowStep(
        ranks,
        engine.roles,
        samples,
        losses,
        perturbed=perturbed,
        local=local,
        tables=tables,
        twice=twice,
    )


def _facts(engine: Engine, groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What must be the same on all ranks."""
    options, params = engine.options, engine.params()
    grouped = None if engine.groups is None else engine.groups()
    told = {
        "shard_rows": options.shard_rows,
        "sharpness": repr(options.strategy or options.sharpness),
        "weighting": [_plain(w) for w in engine.solves.weightings.values()],
        "shared": None if engine.named is None else sorted(map(engine.label, engine.named)),
        "weights_per": None if grouped is None else [grouped.get(id(p)) for p in params],
        "row_dtype": str(options.row_dtype),
        "weights_every": options.weights_every,
        "nonfinite": options.nonfinite,
        "sync_perturbation": options.sync_perturbation,
        "the number of steps made": engine.steps,
        "probes": [meter.facts() for meter in engine.meters],
        "losses": None if engine.roles is None else engine.roles.tasks,
        "what the tasks reach": None if engine.roles is None else engine.roles.reach(),
    }
    return facts_of(params, [engine.label(p) for p in params], groups, told)


def _plain(weighting: Weighting) -> str:
    """A weighting's name and arguments."""
    kept = {
        name: value.tolist() if isinstance(value, Tensor) else value
        for name, value in vars(weighting).items()
        if not name.startswith("_")
    }
    return f"{type(weighting).__name__} {kept}"


def _aggregate(engine: Engine) -> str | None:
    sharpness = engine.options.sharpness
    return sharpness.aggregate if isinstance(sharpness, SAM) else None
