"""How large the flat part of decomposed aggregation is against the losses' part, method by method."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.methods import data
from bench.methods.cells import PLAIN, TABLE, Cell, Run, _trained
from bench.methods.data import Data, Part
from bench.methods.nets import Network
from bench.methods.run import Job
from bench.methods.settings import Setting
from flatmtl.aggregation import aggregate


def ratios(
    job: Job, methods: list[str], say: Callable[[str], None] = print
) -> dict[str, dict[str, float]]:
    """data set -> method -> ||A(f)|| / ||A(g)||, and under "rows" the mean of ||f_i|| / ||g_i||.

    g_i are the tasks' gradients of the shared parameters, f_i what they gain at the setting's radius; taken
    on one training batch, after half an epoch with the mean of the tasks. Seed 0.
    """
    found: dict[str, dict[str, float]] = {}
    for name, setting in job.settings.items():
        loaded = data.load(name, job.folder, setting, 0, job.out / "cache")
        model = _begun(name, loaded, setting)
        plain, flat = _rows(model, loaded, setting)
        by_row = (flat.norm(dim=1) / plain.norm(dim=1)).mean()
        found[name] = {"rows": _short(by_row)}
        for method in methods:
            run = Run(0, len(plain), setting.train // setting.batch)
            sizes = [aggregate(rows, TABLE[method](run)).norm() for rows in (flat, plain)]
            found[name][method] = _short(sizes[0] / sizes[1])
        say(f"{name}: {found[name]}")
    return found


def _begun(name: str, loaded: Data, setting: Setting) -> Network:
    half = slice(setting.train // 2)
    few = Data(
        loaded.kind, loaded.tasks, Part(loaded.train.x[half], loaded.train.y[half]),
        loaded.validation, loaded.test, loaded.scale,
    )  # fmt: skip
    short = Setting(**{**vars(setting), "train": setting.train // 2, "epochs": 1})
    return _trained(few, short, Cell(name, "mean", PLAIN, 0), list(range(len(loaded.tasks))))


def _rows(model: Network, loaded: Data, setting: Setting) -> tuple[Tensor, Tensor]:
    """The tasks' gradients [T, P] and what they gain at the radius, shared parameters alone."""
    x, y = loaded.train.x[: setting.batch], loaded.train.y[: setting.batch]
    shared = [p for name, p in model.named_parameters() if ".heads." not in name]

    def gradient(task: int) -> list[Tensor]:
        (loss,) = model.losses(x, y, [task])
        assert loss is not None  # a batch that has labels of every task
        return list(torch.autograd.grad(loss, shared))

    plain, flat = [], []
    for task in range(len(loaded.tasks)):
        at = gradient(task)
        rate = setting.rho / torch.cat([g.flatten() for g in at]).norm()
        with torch.no_grad():
            torch._foreach_add_(shared, torch._foreach_mul(at, rate))
        further = gradient(task)
        with torch.no_grad():
            torch._foreach_sub_(shared, torch._foreach_mul(at, rate))
        plain.append(torch.cat([g.flatten() for g in at]))
        flat.append(torch.cat([(b - a).flatten() for a, b in zip(at, further, strict=True)]))
    return torch.stack(plain), torch.stack(flat)


def _short(value: Tensor) -> float:
    return float(f"{float(value):.3g}")
