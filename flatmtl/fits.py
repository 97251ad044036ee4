"""Which arguments of ``MultiTaskOptimizer`` fit together."""

from __future__ import annotations

from flatmtl.representation import Representation
from flatmtl.sharpness import SAM, SAMO, Sharpness
from flatmtl.strategies import Strategy
from flatmtl.weighting import Weighting
from flatmtl.weighting._loss import WithLosses
from flatmtl.weighting._rows import RowMethod, RowState


def check_ranks(
    sharpness: Sharpness | Strategy | None,
    how: object,
    weighting: Weighting,
    sync: bool,
) -> None:
    """Raises NotImplementedError for what several processes do not know yet."""
    what = None
    if isinstance(sharpness, SAMO) and not sync:
        what = "SAMO and sync_perturbation=False"
    elif isinstance(how, Representation) and isinstance(weighting, RowMethod):
        what = f"jacobian={how!r} and {type(weighting).__name__}"
    if what is not None:
        raise NotImplementedError(f"process_group must be None (one process) with {what}")


def check_shards(how: object, every: int) -> None:
    """Raises NotImplementedError for what parameters that FSDP2 shards do not allow yet."""
    why = None
    if how != "sequential":
        why = f"jacobian={how!r}"
    elif every > 1:
        why = f"weights_every={every}"
    if why is not None:
        raise NotImplementedError(f"params must not be sharded (FSDP2) with {why}")


def check_parts(
    what: str, weighting: Weighting, sharpness: Sharpness | Strategy | None, per: object, sync: bool
) -> None:
    """Raises ValueError where a part of each row is not enough for the other arguments."""
    why = None
    if isinstance(weighting, RowMethod):
        why = f"{type(weighting).__name__}, which looks at whole rows"
    elif not (isinstance(per, str) and per == "model"):
        why = "weights_per"
    elif not (sharpness is None or isinstance(sharpness, SAM)):
        why = f"{type(sharpness).__name__}"
    elif sharpness is not None and (
        sharpness.every > 1 or sharpness.aggregate not in ("decomposed", "direct")
    ):
        why = "SAM(every=...) above 1 and aggregate='second' or 'each'"
    elif not sync:
        why = "sync_perturbation=False, which perturbs along a rank's own rows"
    if why is not None:
        raise ValueError(f"{what} with {why}")


def check_method(
    weighting: Weighting,
    sharpness: Sharpness | Strategy | None,
    how: object,
    every: int,
    per: object,
) -> None:
    """Raises ValueError where the weighting is not one for the other arguments."""
    name = type(weighting).__name__
    gram_only = not (weighting.one_pass or isinstance(weighting, (WithLosses, RowMethod)))
    if not gram_only and isinstance(sharpness, SAM) and sharpness.aggregate in ("second", "each"):
        raise ValueError(
            f"sharpness must aggregate 'decomposed' or 'direct' with {name}, which does not work on Gram "
            f"matrices alone, got {sharpness.aggregate!r}"
        )
    grouped = not (isinstance(per, str) and per == "model")
    if not gram_only and grouped:
        raise ValueError(
            f"weights_per must be 'model' with {name}, which does not work on Gram matrices alone, got "
            f"{per!r}"
        )
    if every > 1 and (weighting.one_pass or isinstance(weighting, RowMethod)):
        raise ValueError(
            f"weights_every must be 1 with {name}, whose weights are "
            f"{'free' if weighting.one_pass else 'of no use at other steps'}, got {every}"
        )
    if grouped and isinstance(sharpness, SAM) and sharpness.aggregate in ("second", "each"):
        raise ValueError(
            "sharpness must aggregate 'decomposed' or 'direct' with weights_per, got "
            f"{sharpness.aggregate!r}"
        )
    if every > 1 and grouped:
        raise ValueError(
            "weights_every must be 1 with weights_per: one backward pass has one weight a task, got "
            f"{every}"
        )
    if isinstance(how, Representation) and (
        weighting.one_pass or grouped or isinstance(weighting, RowState)
    ):
        what = "weights_per" if grouped else name
        raise ValueError(
            f"jacobian must not be Representation with {what}: its features are no parameters, and "
            "others at every batch"
        )
    if weighting.one_pass and sharpness is None and how != "sequential":
        raise ValueError(
            f"jacobian must be 'sequential' with {name}, whose step is one backward pass, got {how!r}"
        )
