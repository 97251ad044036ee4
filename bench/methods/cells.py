"""Cells: one training each. What there is, its key and fingerprint, and the training itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import flatmtl
from bench.methods.data import Data
from bench.methods.nets import Network, metrics
from bench.methods.settings import VERSION, Setting
from examples.many_networks import adam, batches
from flatmtl.weighting import Weighting, by_name

SINGLE = "single"  # a network of its own for every task: what Delta_m compares with


class Run(NamedTuple):
    """What a method may want to know of a training."""

    seed: int
    tasks: int
    epoch: int  # steps of one


#: label -> the weighting for a training. A method more is a line more.
TABLE: dict[str, Callable[[Run], Weighting]] = {
    "mean": lambda run: by_name("mean"),
    "rlw": lambda run: by_name("rlw", seed=run.seed),
    "pcgrad": lambda run: by_name("pcgrad", seed=run.seed),
    "gradvac": lambda run: by_name("gradvac", seed=run.seed),
    "mgda": lambda run: by_name("mgda"),
    "cagrad": lambda run: by_name("cagrad"),
    "nash_mtl": lambda run: by_name("nash_mtl"),
    "fairgrad": lambda run: by_name("fairgrad"),
    "imtl_g": lambda run: by_name("imtl_g"),
    "aligned_mtl": lambda run: by_name("aligned_mtl"),
    "upgrad": lambda run: by_name("upgrad"),
    "config": lambda run: by_name("config"),
    "uw": lambda run: by_name("uw", tasks=run.tasks),
    "imtl_l": lambda run: by_name("imtl_l", tasks=run.tasks),
    "dwa": lambda run: by_name("dwa", steps=run.epoch),
    "famo": lambda run: by_name("famo"),
    "slaw": lambda run: by_name("slaw"),
    "stch": lambda run: by_name("stch", warmup=run.epoch),
    "si": lambda run: by_name("si"),
    "gls": lambda run: by_name("gls"),
    "imtl": lambda run: by_name("imtl", tasks=run.tasks),
    "gradnorm": lambda run: by_name("gradnorm", tasks=run.tasks),
    "db_mtl": lambda run: by_name("db_mtl"),
    "moco": lambda run: by_name("moco"),
    "graddrop": lambda run: by_name("graddrop", seed=run.seed),
}
METHODS = list(TABLE)

PLAIN, DECOMPOSED, DIRECT = "plain", "sam", "sam_direct"
WIDE, WIDE_DIRECT = "sam_wide", "sam_wide_direct"  # both at the setting's larger radius
SHARPNESS = PLAIN, DECOMPOSED, DIRECT, WIDE, WIDE_DIRECT
#: methods that are also run with SAM aggregated directly, and those that are at the larger radius too
PLANNED = ("pcgrad", "cagrad", "imtl_g")
COMPARED_DIRECT = ("mean", *PLANNED, "nash_mtl", "fairgrad")
_ONLY = {DIRECT: COMPARED_DIRECT, WIDE: PLANNED, WIDE_DIRECT: PLANNED}


@dataclass(frozen=True)
class Cell:
    """One training: a data set, a method, a kind of sharpness, a seed."""

    dataset: str
    method: str
    sharpness: str
    seed: int

    @property
    def key(self) -> str:
        """Its name in files."""
        return f"{self.dataset}-{self.method}-{self.sharpness}-{self.seed}"


def all_cells(
    datasets: Sequence[str],
    methods: Sequence[str],
    seeds: int,
    kinds: Sequence[str] = SHARPNESS,
) -> list[Cell]:
    """Every cell, the seeds outermost: what is done after any time is a comparison."""
    return [
        Cell(dataset, method, sharpness, seed)
        for seed in range(seeds)
        for dataset in datasets
        for method in (SINGLE, *methods)
        for sharpness in kinds
        if method in _ONLY.get(sharpness, (method,))
    ]


def fingerprint(cell: Cell, setting: Setting, checksum: int, part: str) -> str:
    """Of all that a cell's result follows from, but for the code: that has ``VERSION``."""
    about: dict[str, Any] = {**asdict(cell), **asdict(setting)}
    about.update(data=checksum, part=part, version=VERSION)
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]


def make_optimizer(
    model: nn.Module, base: torch.optim.Optimizer, cell: Cell, setting: Setting, tasks: int
) -> flatmtl.MultiTaskOptimizer:
    """The optimizer of a cell, for so many tasks."""
    label = "mean" if cell.method == SINGLE else cell.method
    weighting = TABLE[label](Run(cell.seed, tasks, setting.train // setting.batch))
    sharpness = None
    if cell.sharpness != PLAIN:
        aggregate = "direct" if cell.sharpness in (DIRECT, WIDE_DIRECT) else "decomposed"
        wide = cell.sharpness in (WIDE, WIDE_DIRECT)
        sharpness = flatmtl.SAM(setting.wide if wide else setting.rho, aggregate=aggregate)
    return flatmtl.MultiTaskOptimizer(base, weighting=weighting, sharpness=sharpness, model=model)


def train(data: Data, setting: Setting, cell: Cell, part: str) -> list[float]:
    """The metrics of a cell's tasks after its last step, on "validation" or "test" samples: [T]."""
    everyone = list(range(len(data.tasks)))
    samples = {"validation": data.validation, "test": data.test}[part]
    if cell.method != SINGLE:
        return metrics(_trained(data, setting, cell, everyone), samples, data, everyone)
    found = []
    for task in everyone:
        found += metrics(_trained(data, setting, cell, [task]), samples, data, [task])
    return found


def _trained(data: Data, setting: Setting, cell: Cell, tasks: list[int]) -> Network:
    # First weights and batches depend on the seed alone: methods of a seed are compared in pairs.
    torch.manual_seed(cell.seed)
    model = Network(data, setting.width)
    base, schedule = adam(model, setting.lr, setting.steps)
    optimizer = make_optimizer(model, base, cell, setting, len(tasks))
    # anew: the optimizer may have added a group, of the numbers that a method learns
    schedule = LambdaLR(base, schedule.lr_lambdas[0])
    rows = torch.arange(len(data.train.x)).numpy()
    for epoch in batches(rows, setting.batch, setting.epochs, cell.seed):
        for batch in epoch:
            optimizer.step(partial(closure, model, data.train.x[batch], data.train.y[batch], tasks))
            schedule.step()
    return model


def closure(
    model: Network,
    x: torch.Tensor,
    y: torch.Tensor,
    everyone: list[int],
    tasks: Sequence[int] | None = None,
) -> list[torch.Tensor | None]:
    """What a step calls, its first arguments bound: ``tasks`` are positions in ``everyone``."""
    return model.losses(x, y, everyone if tasks is None else [everyone[task] for task in tasks])
