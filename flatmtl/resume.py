"""What a resumed run needs to go on bit for bit, beside the base optimizer's and the weightings' states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from flatmtl.roles import Roles


def save_roles(roles: Roles, params: Sequence[Tensor]) -> dict[str, Any]:
    """The tasks, which of them reach which parameter, and the flat parts that are kept.

    Args:
        roles: the roles.
        params: all parameters of the optimizer: the saved state knows them by their place.
    """
    place = {id(p): k for k, p in enumerate(params)}
    flats: dict[int, Tensor] = {}
    for block in roles.blocks:
        if block.has_flat:
            for param, view in zip(block.params, block.views(block.kept), strict=True):
                flats[place[id(param)]] = view.clone()
    reach = zip(roles.params, roles.reach(), strict=True)
    return {
        "tasks": list(roles.tasks),
        "reach": {place[id(p)]: tasks for p, tasks in reach if id(p) in place},
        "flat": flats,
    }


def load_roles(
    state: dict[str, Any],
    params: Sequence[Tensor],
    make: Callable[[Sequence[Tensor], list[Any]], Roles],
) -> Roles:
    """The roles of a saved state.

    Args:
        state: from ``save_roles``.
        params: all parameters of the optimizer.
        make: roles of these trainable parameters and tasks.
    """
    trainable = {k: p for k, p in enumerate(params) if p.requires_grad}
    roles = make(list(trainable.values()), state["tasks"])
    roles.take_reach([state["reach"].get(k, []) for k in trainable])
    place = {id(p): k for k, p in enumerate(params)}
    for block in roles.blocks:
        flats = [state["flat"].get(place[id(p)]) for p in block.params]
        if all(one is not None for one in flats):
            block.pack(block.kept, [f.to(p) for f, p in zip(flats, block.params, strict=True)])
            block.has_flat = True
    return roles
