"""Every variant against float64: how wrong it is, and how wrong it may be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.variants.library import Library, gram_variants

TASKS = (9, 16, 17, 32, 33, 40, 64)
STEPS = 5
STATES = {"sgd": 1, "adamw": 2}
# Options of torch.optim.SGD and AdamW; the first of each is what is measured.
SGD = (
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.01, "dampening": 0.3},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
)
ADAMW = (
    {"lr": 1e-3},
    {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1},
)
LIMIT = 4 * 2.0**-23  # of an entry of G, relative to the norms of its two rows: a few roundings
STEP_LIMIT = 8 * 2.0**-24  # of parameters after STEPS steps, relative to their norm: a few too


def gram_error(got: Tensor, jac: Tensor) -> float:
    """The largest |G_ij - J_i J_j| / (|J_i| |J_j|)."""
    reference = jac.double() @ jac.double().T
    norms = reference.diagonal().sqrt()
    return float(((got - reference).abs() / torch.outer(norms, norms)).max())


def rows(tasks: int, columns: int, dtype: torch.dtype, device: str) -> Tensor:
    """Rows of norms from 0.1 to 10; every other T has an odd row stride and shifted rows."""
    odd = tasks % 2
    generator = torch.Generator().manual_seed(tasks)
    jac = torch.randn(tasks, columns + 3 * odd, generator=generator)
    jac *= 10 ** (2 * torch.rand(tasks, 1, generator=generator) - 1)
    return jac.to(device, dtype)[:, odd : odd + columns]


def gram_errors(library: Library, columns: int) -> Iterator[tuple[str, float, float]]:
    """(what, error, limit) of every form of the Gram matrix."""
    for dtype in (torch.float32, torch.bfloat16):
        for tasks in TASKS:
            jac = rows(tasks, columns, dtype, library.device)
            for variant in gram_variants(tasks, dtype):
                error = gram_error(library.gram(variant, jac), jac)
                yield f"gram {variant} {_short(dtype)} T = {tasks}", error, LIMIT


def update_errors(library: Library, columns: int) -> Iterator[tuple[str, float, float]]:
    """(what, error of the parameters, limit) of every form of the update."""
    for dtype in (torch.float32, torch.bfloat16):
        for tasks, name, options in (
            *((2 + n, "sgd", options) for n, options in enumerate(SGD)),
            *((3 + n, "adamw", options) for n, options in enumerate(ADAMW)),
        ):
            jac = rows(tasks, columns, dtype, library.device)
            weights = torch.linspace(-0.5, 1, tasks, dtype=torch.float64, device=library.device)
            params = torch.linspace(-1, 1, columns, device=library.device)
            state = [torch.zeros_like(params) for _ in range(STATES[name])]
            error = step_error(library, jac, weights, params, state, name, options)
            yield f"combine_{name} {_short(dtype)} T = {tasks} {options}", error, STEP_LIMIT


def step_error(
    library: Library,
    jac: Tensor,
    weights: Tensor,
    params: Tensor,
    state: list[Tensor],
    name: str,
    options: dict[str, Any],
) -> float:
    """Moves params and state by STEPS steps: the difference to torch's optimizer in float64.

    A row of weight 0 is left out of the reference, whatever it holds.
    """
    reference = torch.nn.Parameter(params.double())
    rule = torch.optim.SGD if name == "sgd" else torch.optim.AdamW
    optimizer = rule([reference], **options)
    step = library.combine_sgd if name == "sgd" else library.combine_adamw
    factors, there = library.factors(), weights != 0
    for n in range(STEPS):
        scaled = weights * (-0.7) ** n  # another gradient in every step
        reference.grad = scaled[there] @ jac[there].double()
        optimizer.step()
        step(jac, scaled, params, *state, factors, **options)
    target = reference.detach()
    return float((params.double() - target).norm() / target.norm())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
