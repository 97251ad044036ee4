"""Who shares what, and what is kept between steps: through checkpoints and changes of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from flatmtl.roles import Roles

Make = Callable[[Sequence[Tensor], list[Any]], Roles]


def save_roles(roles: Roles, params: Sequence[Tensor]) -> dict[str, Any]:
    """The tasks, which of them reach which parameter, and the flat parts that are kept.

    Args:
        roles: the roles.
        params: all parameters of the optimizer: the saved state knows them by their place.
    """
    place = {id(p): k for k, p in enumerate(params)}
    reach = zip(roles.params, roles.reach(), strict=True)
    return {
        "tasks": list(roles.tasks),
        "reach": {place[id(p)]: tasks for p, tasks in reach if id(p) in place},
        "flat": {place[i]: view.clone() for i, view in roles.flats().items() if i in place},
    }


def load_roles(state: dict[str, Any], params: Sequence[Tensor], make: Make) -> Roles:
    """The roles of a saved state.

    Args:
        state: from ``save_roles``.
        params: all parameters of the optimizer.
        make: roles of these trainable parameters and tasks.
    """
    trainable = {k: p for k, p in enumerate(params) if p.requires_grad}
    roles = make(list(trainable.values()), state["tasks"])
    roles.take_reach([state["reach"].get(k, []) for k in trainable])
    roles.put_flats({id(params[k]): flat for k, flat in state["flat"].items() if k in trainable})
    return roles
