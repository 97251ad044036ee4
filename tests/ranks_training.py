"""One training run, the same in one process on whole batches and in several on parts of them.

`train(case, seed, whole(case, n))` is the run of one process; `train(case, seed, part(case, n, rank))`
that of one of n ranks. Every task's loss is the mean over the samples that have its label.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from methods import make
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flatmtl import MAML, SAM, MultiTaskOptimizer

TASKS, WIDTH, BATCH = 3, 6, 24
LAST_CUTS = {2: [18, 6], 4: [12, 6, 4, 2]}  # an uneven batch
IDLE_CUTS = {2: [24, 0], 4: [8, 8, 8, 0]}  # the last rank has no data


@dataclass(frozen=True)
class Case:
    """A way to train.

    Attributes:
        weighting: its name, and `arguments` for it.
        net: a kind of `Net`.
        data: which samples have which labels, and how they are cut: see `labels` and `cuts`.
        samples: what step() is told: None, "number" or "mapping".
        batches: how many micro-batches a step has.
        scaler: through a GradScaler.
        named: the closure returns a mapping.
        ddp: with a DistributedDataParallel model, or a plain one and process_group=.
        more: arguments of the optimizer.
    """

    weighting: str = "mean"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    sharpness: SAM | MAML | None = None
    base: str = "momentum"
    net: str = "heads"
    data: str = "even"
    samples: str | None = None
    batches: int = 1
    scaler: bool = False
    named: bool = False
    ddp: bool = True
    dtype: torch.dtype = torch.float64
    steps: int = 5
    lr: float = 0.05
    more: Mapping[str, Any] = field(default_factory=dict)


class Net(nn.Module):
    """Outputs [B] of every task.

    "heads": a trunk and a head each; "vector": one parameter for all and one each; "shared": nothing of
    a task's own; "apart": nothing shared; "single": one task; "unused": as "heads", and a layer that
    nothing reaches; "norm": as "heads", with BatchNorm.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        tasks = 1 if kind == "single" else TASKS
        if kind == "vector":
            self.scale = nn.Parameter(torch.randn(WIDTH))
        elif kind != "apart":
            layers = [nn.Linear(WIDTH, 10), nn.Tanh(), nn.Linear(10, 7), nn.Tanh()]
            if kind == "norm":
                layers[1:1] = [nn.BatchNorm1d(10)]
            self.trunk = nn.Sequential(*layers)
        if kind == "shared":
            self.last = nn.Linear(7, tasks)
        else:
            width = WIDTH if kind in ("vector", "apart") else 7
            self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(tasks))
        if kind == "unused":
            self.unused = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        if self.kind == "vector":
            x = (x * self.scale).sin()
        elif self.kind != "apart":
            x = self.trunk(x)
        if self.kind == "shared":
            return list((self.last(x) + x.sum(1, keepdim=True)).unbind(1))
        return [head(x)[:, 0] for head in self.heads]


def numbers(case: Case, seed: int) -> tuple[Tensor, Tensor]:
    """x [steps, B, WIDTH] and targets [steps, B, T]."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((case.steps, BATCH, WIDTH))
    y = rng.standard_normal((case.steps, BATCH, TASKS)) + [0.5, 1.0, -2.0]
    return torch.from_numpy(x).to(case.dtype), torch.from_numpy(y).to(case.dtype)


def cuts(case: Case, size: int) -> list[int]:
    """How many samples of every micro-batch each rank has."""
    batch = BATCH // case.batches
    if case.data in ("uneven", "ragged"):
        return [n // case.batches for n in LAST_CUTS[size]]
    if case.data in ("idle", "nothing"):
        return [n // case.batches for n in IDLE_CUTS[size]]
    return [batch // size] * size


def labels(case: Case, size: int, seed: int) -> Tensor:
    """bool [steps, B, T]: which samples have a label of which task."""
    there = torch.ones(case.steps, BATCH, TASKS, dtype=torch.bool)
    last, first = part(case, size, size - 1), part(case, size, 0)
    rows = torch.tensor([i for batch in last for i in batch])
    others = torch.tensor([i for i in range(BATCH) if i not in [j for b in first for j in b]])
    if case.data == "not_on_last":
        there[:, rows, 1] = False
    elif case.data == "on_first_alone":
        there[:, others, 1] = False
    elif case.data == "not_at_step_2":
        there[2, :, 1] = False
    elif case.data == "not_at_first":
        there[0, :, 1] = False
    elif case.data == "at_first_on_one":
        there[0, others, 1] = False
    elif case.data == "nothing_on_last_at_first":
        there[0, rows] = False
    elif case.data == "moving":  # another rank lacks another task at every step
        for k in range(case.steps):
            there[k, [i for batch in part(case, size, k % size) for i in batch], k % TASKS] = False
    elif case.data == "ragged":
        rng = np.random.default_rng(seed + 1)
        there = torch.from_numpy(rng.random((case.steps, BATCH, TASKS)) < 0.4)
        there[:, 0] = True  # there is one of each
    return there


def part(case: Case, size: int, rank: int) -> list[list[int]]:
    """Of every micro-batch, which samples are a rank's."""
    batch, cut = BATCH // case.batches, cuts(case, size)
    start = sum(cut[:rank])
    return [
        list(range(m * batch + start, m * batch + start + cut[rank])) for m in range(case.batches)
    ]


def whole(case: Case, size: int) -> list[list[int]]:
    """The same of one process."""
    ranks = [part(case, size, rank) for rank in range(size)]
    return [sum((mine[m] for mine in ranks), []) for m in range(case.batches)]


class Run:
    """A model in training.

    Args:
        case: how.
        seed: of the data and the first parameters.
        size: for how many ranks the batch is cut.
        rank: which of them this is; None: one process on all.
        net: a model to take in place of a new one.
    """

    def __init__(
        self,
        case: Case,
        seed: int,
        size: int,
        rank: int | None = None,
        *,
        of: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        torch.manual_seed(seed % 2**31)
        self.case, self.size, self.rank = case, size, rank
        self.net = Net(case.net).to(case.dtype)
        self.x, self.y = numbers(case, seed)
        self.there = labels(case, size, seed)
        self.parts = whole(case, size) if rank is None else part(case, size, rank)
        self.model: nn.Module = self.net
        more = dict(case.more)
        if rank is not None:
            if case.ddp:
                self.model = DistributedDataParallel(self.net) if of is None else of(self.net)
            else:
                more["process_group"] = dist.group.WORLD
        elif dist.is_initialized():
            more["process_group"] = None
        tasks = 1 if case.net == "single" else TASKS
        weighting = make(case.weighting, tasks, **case.arguments)
        if case.base == "adam":
            base: torch.optim.Optimizer = torch.optim.Adam(self.net.parameters(), lr=case.lr)
        else:
            base = torch.optim.SGD(self.net.parameters(), lr=case.lr, momentum=0.9)
        self.optimizer = MultiTaskOptimizer(
            base, weighting=weighting, sharpness=case.sharpness, model=self.model, **more
        )
        # small: some of the steps overflow float32 where that is what is trained
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if case.scaler else None
        self.k = 0

    def closure(self, number: int) -> Callable[..., Any]:
        """Of one micro-batch."""
        rows, k, case = self.parts[number], self.k, self.case

        def losses(tasks: Any = None) -> Any:
            means = bool(rows) or (case.data == "nothing" and self.rank is not None)
            out = self.model(self.x[k, rows]) if means else None  # means of nothing: NaN
            wanted = range(len(out or self.net.heads)) if tasks is None else map(int, tasks)
            found: dict[str, Tensor | None] = {}
            for t in wanted:
                there = self.there[k, rows, t]
                found[str(t)] = None
                if out is not None and (there.any() or not rows):
                    found[str(t)] = (out[t] - self.y[k, rows, t])[there].square().mean()
            return found if case.named else list(found.values())

        return losses

    def samples(self) -> Any:
        rows = [i for batch in self.parts for i in batch]
        if self.case.samples is None or self.rank is None:
            return None
        if self.case.samples == "number":
            return len(rows)
        counts = self.there[self.k, rows].sum(0).tolist()
        return {str(t): n for t, n in enumerate(counts)} if self.case.named else counts

    def step(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda c: c) -> Any:
        """One step; `wrap` changes the closure."""
        closures: Any = [wrap(self.closure(m)) for m in range(self.case.batches)]
        given = closures if self.case.batches > 1 else closures[0]
        samples = self.samples()
        if self.scaler is None:
            losses = self.optimizer.step(given, samples=samples)
        else:
            losses = self.optimizer.backward(given, scaler=self.scaler, samples=samples)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.k += 1
        return losses

    def flat(self) -> Tensor:
        """All parameters, those that the weighting learns with them."""
        groups = self.optimizer.param_groups
        return torch.cat(
            [p.detach().flatten().double() for group in groups for p in group["params"]]
        ).clone()

    def train(self) -> Tensor:
        while self.k < self.case.steps:
            self.step()
        return self.flat()


def snapshot(run: Run) -> Any:
    """Parameters, buffers, state of the optimizer; copies."""
    return copy.deepcopy(
        (
            [p.detach() for group in run.optimizer.param_groups for p in group["params"]],
            run.net.state_dict(),
            run.optimizer.state_dict(),
        )
    )


def same(one: Any, other: Any) -> bool:
    """Whether all tensors, numbers and names in two nests are the same to the bit."""
    if isinstance(one, Tensor):
        return (
            isinstance(other, Tensor)
            and one.dtype == other.dtype
            and one.shape == other.shape
            and one.detach().numpy().tobytes() == other.detach().numpy().tobytes()
        )
    if isinstance(one, Mapping):
        return set(one) == set(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
