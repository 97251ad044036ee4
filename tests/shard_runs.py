"""Trainings on parts of a batch, with rows or parameters that lie in parts on the processes.

Every process of a run and the run that it is compared with make the same net and the same batches from
one seed. The latter has the whole batch: its loss of a task is sum_r c_r l_r / sum_r c_r, l_r the mean
over the part of rank r and c_r what it counts for.
"""

from __future__ import annotations

import os
import random
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import flatmtl
from flatmtl import MultiTaskOptimizer

WIDTH = 18  # of an input
TASKS = 3
MOST = int(os.environ.get("FLATMTL_TEST_RUNS", 5))  # processes' trainings in a test


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        method: a class of flatmtl.weighting.
        sharpness: as MultiTaskOptimizer takes it.
        net: see ``Net``.
        labels: which tasks a rank has, see ``has``.
        samples: "number" or "tasks": parts are uneven and counted by their samples.
        base: the optimizer, see ``base_optimizer``.
        wrap: how the net is distributed: "ddp", "shard_rows" or one of ``sharded``.
        reshard: FSDP2's reshard_after_forward.
        half: FSDP2's parameters are gathered in bfloat16.
        clip: the largest norm of a gradient; 0: any.
        scaler: with a GradScaler.
        more: further arguments of MultiTaskOptimizer.
    """

    method: str = "PCGrad"
    sharpness: Any = None
    net: str = "plain"
    labels: str = "all"
    samples: str = ""
    base: str = "momentum"
    wrap: str = "shard_rows"
    reshard: bool | None = True
    half: bool = False
    clip: float = 0.0
    scaler: bool = False
    dtype: torch.dtype = torch.float64
    steps: int = 3
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tasks(self) -> int:
        return 1 if self.net == "single" else TASKS


class Net(nn.Module):
    """Of layers whose sizes come from the seed: "plain", or

    "conv": with a weight in channels_last; "tiny": of a few elements; "apart": nothing is shared;
    "single": of one task; "norm": with BatchNorm and LayerNorm; "branch": tasks 1 and 2 share layers that
    task 0 does not reach; "few": with fewer rows than there are ranks; "open": task 0 has no head.
    """

    def __init__(self, kind: str, tasks: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        draw = random.Random(seed)
        self.kind = kind
        a, b = draw.randint(5, 19), draw.randint(3, 9)
        if kind == "tiny":
            a = b = 1
        elif kind == "few":
            a, b = 2, 1
        layers: list[nn.Module] = []
        if kind == "conv":
            conv = nn.Conv2d(2, 5, 2).to(memory_format=torch.channels_last)
            layers += [nn.Unflatten(1, (2, 3, 3)), conv, nn.Flatten(), nn.Tanh(), nn.Linear(20, a)]
        elif kind == "tiny":
            layers += [Pooled(), nn.Linear(1, a)]
        elif kind == "norm":
            layers += [nn.Linear(WIDTH, a), nn.BatchNorm1d(a), nn.Tanh(), nn.LayerNorm(a)]
        elif kind != "apart":
            layers += [nn.Linear(WIDTH, a)]
        layers += [nn.Tanh(), *([] if kind in ("apart", "tiny") else [nn.Linear(a, b), nn.Tanh()])]
        self.trunk = nn.Sequential(*layers)
        if kind == "apart":
            b = WIDTH
        self.gain = nn.Parameter(1 + torch.rand(1)) if kind != "apart" else None
        self.branch = nn.Linear(b, b) if kind == "branch" else None
        heads = []
        for task in range(tasks):
            out = 1 if kind == "tiny" else draw.randint(1, 4)
            headless = kind == "open" and task == 0
            heads.append(nn.Identity() if headless else nn.Linear(b, out))
        self.heads = nn.ModuleList(heads)
        for param in self.parameters():  # torch's draws are the same in all dtypes only so
            param.data = param.data.double()

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.trunk(x)
        if self.gain is not None:
            z = z * self.gain
        beside = z if self.branch is None else torch.tanh(self.branch(z))
        return [head(beside if task else z) for task, head in enumerate(self.heads)]


class Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1, keepdim=True)


def has(labels: str, step: int, rank: int, size: int, task: int) -> bool:
    """Whether a rank has a task at a step."""
    if labels == "not_on_last":
        return not (task == TASKS - 1 and rank == size - 1)
    if labels == "late_on_last":
        return step < 2 or not (task == TASKS - 1 and rank == size - 1)
    if labels == "alone_on_last":
        return step < 2 or rank < size - 1 or task == 0
    if labels == "on_first_alone":
        return task != 1 or rank == 0
    if labels == "not_at_first":
        return not (task == 1 and step == 0)
    if labels == "idle":
        return not (rank == size - 1 and step % 2)
    if labels == "idle_at_first":
        return not (rank == 0 and step == 0)
    if labels == "moving":
        return (task + step) % TASKS != rank % TASKS
    assert labels in ("all", "zero_on_last")
    return True


class Run:
    """A training of one process: ``size`` 1 (and ``of`` parts) on the whole batch, or a rank of several.

    Attributes:
        net: what is trained.
        optimizer: the MultiTaskOptimizer.
    """

    def __init__(
        self, case: Case, seed: int, of: int, rank: int | None = None, seconds: float = 0.0
    ) -> None:
        """``seconds``: after which a collective of sharded parameters gives up; 0: as all others."""
        self.case, self.seed, self.of, self.rank = case, seed, of, rank
        self.net = Net(case.net, case.tasks, seed).to(case.dtype)
        self.model: nn.Module = self.net
        more = dict(case.more)
        if rank is not None:
            if case.wrap in ("ddp", "shard_rows"):
                self.model = DistributedDataParallel(self.net)
                more["shard_rows"] = case.wrap == "shard_rows"
            else:
                sharded(self.net, case, seconds)
        else:
            more["process_group"] = None
        make = getattr(flatmtl.weighting, case.method)
        needs = case.method in ("IMTL", "UncertaintyWeighting")
        weighting = make(tasks=case.tasks) if needs else make()
        self.optimizer = MultiTaskOptimizer(
            base_optimizer(case, self.net),
            weighting=weighting,
            sharpness=case.sharpness,
            model=self.model,
            **more,
        )
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if case.scaler else None
        self.made = 0

    def part(self, step: int) -> list[tuple[Tensor, list[Tensor], list[float]]]:
        """Of each rank: inputs, targets, and what the losses count for."""
        torch.manual_seed(self.seed * 1000 + step)
        draw = random.Random(self.seed * 1000 + step)
        case = self.case
        lengths = [draw.randint(2, 6) if case.samples else 4 for _ in range(self.of)]
        x = torch.randn(sum(lengths), WIDTH, dtype=torch.float64).to(case.dtype)
        targets = [
            torch.randn(sum(lengths), 1, dtype=torch.float64).to(case.dtype)
            for _ in range(case.tasks)
        ]
        found = []
        for rank, xs in enumerate(x.split(lengths)):
            ys = [y.split(lengths)[rank] for y in targets]
            counts = [float(len(xs))] * case.tasks
            if case.samples == "tasks":
                counts = [draw.choice([1.0, 2.5, 7.0]) for _ in counts]
            elif not case.samples:
                counts = [1.0] * case.tasks
            if case.labels == "zero_on_last" and rank == self.of - 1:
                counts[1] = 0.0
            for task in range(case.tasks):
                if not has(case.labels, step, rank, self.of, task):
                    counts[task] = -1.0
            found.append((xs, ys, counts))
        return found

    def _of_rank(self, x: Tensor, targets: Sequence[Tensor], model: nn.Module) -> list[Tensor]:
        return [
            ((1 + task) * (out - y).square()).mean()
            for task, (out, y) in enumerate(zip(model(x), targets, strict=True))
        ]

    def closure(self, step: int) -> tuple[Callable[[], list[Tensor | None]], Any]:
        """The losses of this process, and ``samples``."""
        parts = self.part(step)
        if self.rank is not None:
            x, targets, counts = parts[self.rank]

            def here() -> list[Tensor | None]:
                losses = self._of_rank(x, targets, self.model)
                if self.case.labels == "zero_on_last" and counts[1] == 0:
                    losses[1] = losses[1] * 0
                return [None if c < 0 else one for one, c in zip(losses, counts, strict=True)]

            said = self.case.samples or self.case.labels == "zero_on_last"
            samples: Any = [max(c, 0.0) for c in counts] if said else None
            if self.case.samples == "number":
                samples = float(len(x))
            return here, samples

        def whole() -> list[Tensor | None]:
            found = [self._of_rank(x, targets, self.net) for x, targets, _ in parts]
            losses: list[Tensor | None] = []
            for task in range(self.case.tasks):
                shares = [max(counts[task], 0.0) for _, _, counts in parts]
                total = [c * one[task] for one, c in zip(found, shares, strict=True) if c]
                losses.append(torch.stack(total).sum() / sum(shares) if total else None)
            return losses

        return whole, None

    def step(self) -> None:
        closure, samples = self.closure(self.made)
        self.made += 1
        if self.scaler is not None:
            self.optimizer.backward(closure, scaler=self.scaler, samples=samples)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
        elif self.case.clip:
            self.optimizer.backward(closure, samples=samples)
            nn.utils.clip_grad_norm_(self.clipped(), self.case.clip)
            self.optimizer.step()
        else:
            self.optimizer.step(closure, samples=samples)

    def clipped(self) -> list[Tensor]:
        return list(self.net.trunk.parameters())

    def train(self, steps: int | None = None) -> Tensor:
        for _ in range(self.case.steps if steps is None else steps):
            self.step()
        return self.values()

    def values(self) -> Tensor:
        return flat(self.net)


def flat(net: nn.Module) -> Tensor:
    """Every parameter, in one row; of sharded ones all parts."""
    return torch.cat([whole(param.detach()).reshape(-1) for param in net.parameters()])


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def base_optimizer(case: Case, net: Net) -> torch.optim.Optimizer:
    """Tensors of both kinds in a group of their own each: foreach does not mix them."""
    heads = {id(p) for p in net.heads.parameters()}
    trunk = [p for p in net.parameters() if id(p) not in heads]
    groups = [{"params": g} for g in (trunk, list(net.heads.parameters())) if g]
    if case.base == "adam":
        return torch.optim.Adam(groups, lr=0.02, eps=1e-3, foreach=True)
    if case.base == "adamw":
        return torch.optim.AdamW(groups, lr=0.02, eps=1e-3, weight_decay=0.1, foreach=True)
    assert case.base == "momentum"
    return torch.optim.SGD(groups, lr=0.02, momentum=0.9)


def mesh_with(seconds: float) -> Any:
    """All ranks, in a group of their own: one that has failed is of no more use."""
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(dist.new_group(timeout=timedelta(seconds=seconds)), "cpu")


@lru_cache
def mesh_of(copies: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    size = dist.get_world_size()
    if copies > 1:
        return init_device_mesh(
            "cpu", (copies, size // copies), mesh_dim_names=("copies", "shards")
        )
    return init_device_mesh("cpu", (size,))


@lru_cache
def mesh_of_one() -> Any:
    """This rank by itself."""
    from torch.distributed.device_mesh import DeviceMesh

    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return DeviceMesh.from_group(groups[dist.get_rank()], "cpu")


def sharded(net: Net, case: Case, seconds: float = 0.0) -> None:
    """fully_shard: each layer of the trunk, and the rest with the root.

    "heads_replicated": but the heads; "heads_sharded": the heads each; "root": with one call for all;
    "copies", "copies_heads_sharded": on a mesh of two dimensions; "one": each rank on a mesh of its own.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if case.wrap == "one":
        mesh = mesh_of_one()
    elif seconds:
        mesh = mesh_with(seconds)
    else:
        mesh = mesh_of(2 if case.wrap.startswith("copies") else 1)
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": case.reshard}
    if case.half:
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    kept: set[nn.Parameter] = set()
    if case.wrap != "root":
        for layer in [*net.trunk, *([] if net.branch is None else [net.branch])]:
            if next(layer.parameters(), None) is not None:
                fully_shard(layer, **options)
        if case.wrap.endswith("heads_sharded"):
            for head in net.heads:
                fully_shard(head, **options)
        elif case.wrap in ("heads_replicated", "copies", "one"):
            kept = set(net.heads.parameters())
    fully_shard(net, ignored_params=kept or None, **options)


def trained(rank: int, cases: Sequence[Case], size: int, seed: int) -> list[Tensor | str]:
    """The parameters of each case, or the error."""
    found: list[Tensor | str] = []
    for case in cases:
        try:
            mine = case.wrap == "one"  # a world of one: its part is the whole
            run = Run(case, seed, 1 if mine else size, 0 if mine else rank)
            found.append(run.train())
        except Exception:
            found.append(traceback.format_exc())
    return found


def chosen(cases: Sequence[Case], size: int, seed: int) -> list[Case]:
    """Some of them, others in every run: processes are slow where they share a core."""
    return random.Random(seed).sample(cases, min(len(cases), MOST // size))


def compared(pool: Any, cases: Sequence[Case], size: int, seed: int, tolerance: float) -> list[str]:
    """What is wrong with the ranks' trainings, by those of one process."""
    wrong = []
    for case, *found in zip(cases, *pool.run(trained, cases, size, seed, timeout=150), strict=True):
        texts = [one for one in found if isinstance(one, str)]
        if texts:
            wrong.append(f"{case}: {len(texts)} raise {texts[0][-1500:]}")
            continue
        with torch.random.fork_rng():
            alone = Run(case, seed, 1 if case.wrap == "one" else size).train()
        if any(not torch.equal(one, found[0]) for one in found[1:]):
            gap = max(float((one - found[0]).abs().max()) for one in found[1:])
            wrong.append(f"{case}: the ranks differ by {gap:.2g}")
        error = float((found[0] - alone).norm() / alone.norm())
        if not error <= tolerance:
            wrong.append(f"{case}: off by {error:.2g}")
    return wrong


# ---------------------------------------------------------------- failures


def failing(
    rank: int,
    cases: Sequence[tuple[Case, int | str, int]],
    who: int,
    size: int,
    seed: int,
    seconds: float = 0.0,
) -> list[tuple[str, str, bool, Tensor]]:
    """A rank fails after so many steps, in the closure's k-th call (0: the clean one).

    Returns:
        Of each case the error's type and text, whether the parameters are as before it, and how they are
        after two more steps.
    """
    found = []
    for case, where, steps in cases:
        run = Run(case, seed, size, rank, seconds)
        run.train(steps)
        before = run.values()
        closure, samples = run.closure(steps)
        calls = 0

        def bad() -> list[Tensor | None]:
            nonlocal calls
            calls += 1
            if rank == who and calls - 1 == where:
                raise KeyError("broken on purpose")
            losses = closure()
            if rank == who and where == "nan":
                losses[0] = None if losses[0] is None else losses[0] * torch.nan
            return losses

        kind = text = ""
        try:
            run.optimizer.step(bad, samples=samples)
        except Exception as error:
            kind, text = type(error).__name__, str(error)
        same = torch.equal(run.values(), before)
        found.append((kind, text, same, run.train(2)))
    return found


def check_failures(
    cases: Sequence[tuple[Case, int | str, int]],
    results: Sequence[Sequence[tuple[str, str, bool, Tensor]]],
    who: int,
    size: int,
    seed: int,
) -> None:
    """All ranks have raised what the one did, nothing has changed, and the next steps are right."""
    for (case, where, steps), *found in zip(cases, *results, strict=True):
        with torch.random.fork_rng():
            alone = Run(case, seed, size).train(steps + 2)
        for rank, (kind, text, same, values) in enumerate(found):
            here = f"{case}, call {where} after {steps} steps, rank {rank}: {kind} {text}"
            assert kind == ("KeyError" if rank == who else "RankFailedError"), here
            assert "broken on purpose" in text, here
            assert same, here
            assert float((values - alone).norm() / alone.norm()) < 1e-9, here
            assert torch.equal(values, found[0][-1]), here
