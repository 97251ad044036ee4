"""Which columns of a block's rows belong to which group of parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from flatmtl.block import Block
from flatmtl.roles import named_shared

Columns: TypeAlias = list[list[slice]]  # of each group, its runs of columns
Per = Literal["model", "group", "layer", "parameter"] | Sequence[Sequence[Tensor]]
_NAMES = ("model", "group", "layer", "parameter")


def columns_of(block: Block, group_of: Mapping[int, int]) -> Columns:
    """The columns of every group that has parameters in the block.

    Args:
        block: the parameters.
        group_of: id(parameter) -> its group; those without one form a group together.
    """
    found: dict[int, list[slice]] = {}
    last: int | None = None
    ends = [*block.offsets[1:], block.size]
    for param, start, end in zip(block.params, block.offsets, ends, strict=True):
        group = group_of.get(id(param), -1)
        if group == last:
            start = found[group].pop().start
        found.setdefault(group, []).append(slice(start, end))
        last = group
    return list(found.values())


def check_per(
    per: object,
    params: Sequence[Tensor],
    model: nn.Module | None,
    label: Callable[[Tensor], str],
) -> Any:  # noqa: ANN401
    """``per`` as ``weights_per`` of the optimizer may be given; lists of parameters are copied.

    Raises:
        TypeError, ValueError: it is none of these.
    """
    if isinstance(per, str):
        if per not in _NAMES:
            raise ValueError(
                f"weights_per must be one of {', '.join(_NAMES)}, or lists of parameters, got {per!r}"
            )
        if per == "layer" and model is None:
            raise ValueError("model must be given with weights_per='layer': it knows the layers")
        return per
    if not isinstance(per, Sequence) or not per:
        raise TypeError(
            f"weights_per must be one of {', '.join(_NAMES)}, or lists of parameters, got {per!r}"
        )
    groups = []
    seen: dict[int, int] = {}
    for number, group in enumerate(per):
        try:
            listed = named_shared(group, params, label)
        except (TypeError, ValueError) as failure:
            raise type(failure)(f"weights_per[{number}] must list parameters: {failure}") from None
        for param in listed or []:
            if id(param) in seen:
                raise ValueError(
                    f"weights_per must name every parameter once, got {label(param)} in groups "
                    f"{seen[id(param)]} and {number}"
                )
            seen[id(param)] = number
        groups.append(listed)
    return groups


def groups_of(
    per: Any,  # noqa: ANN401
    param_groups: Sequence[Mapping[str, Any]],
    model: nn.Module | None,
) -> dict[int, int]:
    """id(parameter) -> the number of its group, for ``per`` other than "model"."""
    if per == "group":
        return {id(p): k for k, group in enumerate(param_groups) for p in group["params"]}
    if per == "parameter":
        params = [p for group in param_groups for p in group["params"]]
        return {id(p): k for k, p in enumerate(params)}
    if per == "layer":
        assert model is not None
        layers: dict[str, int] = {}
        return {
            id(p): layers.setdefault(name.rpartition(".")[0], len(layers))
            for name, p in model.named_parameters()
        }
    return {id(p): k for k, group in enumerate(per) for p in group}
