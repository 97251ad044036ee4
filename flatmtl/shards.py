"""Parameters of which every rank holds a part (DTensor, as FSDP2's ``fully_shard`` makes them)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from flatmtl.block import Block


def is_sharded(param: Tensor) -> bool:
    """Whether it is a DTensor. Nothing is imported for the question: that takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(param, module.DTensor)


def any_sharded(params: Sequence[Tensor]) -> bool:
    """Whether any of them is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(p, module.DTensor) for p in params)


def local_of(tensor: Tensor) -> Tensor:
    """What this rank holds of it, in the tensor's own storage; a plain tensor is all here."""
    if not is_sharded(tensor):
        return tensor
    # to_local() takes twenty times as long, and has a graph outside no_grad
    part: Tensor = tensor._local_tensor  # type: ignore[attr-defined]
    return part


def as_grad(view: Tensor, param: Tensor) -> Tensor:
    """``view``, of the shape of what is here of the parameter, as a gradient of it; no copy."""
    if not is_sharded(param):
        return view
    spec: Any = param
    whole: Tensor = type(spec).from_local(
        view,
        spec.device_mesh,
        spec.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )
    return whole


def runs_of(block: Block) -> list[tuple[slice, bool]]:
    """The columns of a block's rows in runs of sharded parameters (True) and of replicated ones."""
    runs: list[tuple[slice, bool]] = []
    ends = [*block.offsets[1:], block.size]
    for param, start, end in zip(block.params, block.offsets, ends, strict=True):
        sharded = is_sharded(param)
        if runs and runs[-1][1] == sharded:
            start = runs.pop()[0].start
        runs.append((slice(start, end), sharded))
    return runs


def mesh_of(params: Sequence[Tensor]) -> Any:  # noqa: ANN401
    """The device mesh of the sharded ones of these parameters; None if there are none.

    Raises:
        ValueError: there are several, or a parameter is sharded otherwise than ``fully_shard`` does it.
    """
    meshes: list[Any] = []
    for param in params:
        if not is_sharded(param):
            continue
        spec: Any = param
        if sum(placement.is_shard() for placement in spec.placements) != 1 or any(
            placement.is_partial() for placement in spec.placements
        ):
            raise ValueError(
                "params must be sharded along one dimension of their mesh, as fully_shard does it, got "
                f"placements {spec.placements}"
            )
        if spec.device_mesh not in meshes:
            meshes.append(spec.device_mesh)
    if len(meshes) > 1:
        raise ValueError(f"params must lie on one device mesh, got {meshes}")
    return meshes[0] if meshes else None
