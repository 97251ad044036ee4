"""Kinds of steps in several processes against one process on the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import RankError, counted
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flatmtl import MAML, SAMO, CoopFlat, MultiTaskOptimizer, Representation, weighting

TASKS = (0, 1, 2)
BATCH = 12
DOUBLE = 8  # bytes
STEPS = 5


class Net(nn.Module):
    """A trunk and a head a task; a parameter of the trunk that only task 0 reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))
        self.extra = nn.Parameter(torch.full((5,), 0.1))
        self.heads = nn.ModuleList(nn.Linear(5, 2) for _ in TASKS)

    def forward(self, x: torch.Tensor, tasks: Any = TASKS) -> list[torch.Tensor | None]:
        features = torch.tanh(self.trunk(x))
        inputs = {0: features * (1 + self.extra)}
        heads = enumerate(self.heads)
        return [head(inputs.get(t, features)) if t in tasks else None for t, head in heads]


def data(seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, 6] and targets [T, B, 2] of a step."""
    generator = torch.Generator().manual_seed(seed + 1000 * step)
    size = {"generator": generator, "dtype": torch.float64}
    return torch.randn(BATCH, 6, **size), torch.randn(len(TASKS), BATCH, 2, **size)


KINDS = {
    "representation": lambda net: {"jacobian": Representation(net.trunk)},
    "samo": lambda net: {"sharpness": SAMO(0.05, spsa_eps=0.05)},
    "samo adaptive": lambda net: {"sharpness": SAMO(0.5, beta=0.9, adaptive=True)},
    "maml": lambda net: {"sharpness": MAML(0.3, first_order=False)},
    "coop": lambda net: {"sharpness": CoopFlat([h.parameters() for h in net.heads], 0.1)},
    "coop without noise": lambda net: {
        "sharpness": CoopFlat([h.parameters() for h in net.heads], 0, steps=2)
    },
}

# what differs between the ranks: the first row of each rank's part for n ranks, and who has which task
CUTS = {
    "even": lambda n: [BATCH // n] * n,
    "uneven": lambda n: [BATCH - (n - 1) * 2, *[2] * (n - 1)],
}


def lacks(case: str, step: int, task: int, rank: int, size: int) -> bool:
    """Whether a rank has no data of a task: task 2 none on the last ranks, task 1 none at all at first."""
    if case != "missing":
        return False
    return (task == 2 and rank >= size // 2) or (task == 1 and step in (0, 3))


def train(
    rank: int | None,
    seed: int,
    kind: str,
    method: str = "PCGrad",
    case: str = "even",
    size: int = 2,
    micro: int = 1,
    fails: tuple[int, int, int] | None = None,
    base: str = "SGD",
    **options: Any,
) -> dict[str, Any]:
    """Some steps of a rank; of one process with the batch of all of them where ``rank`` is None.

    Args:
        fails: a rank, a step and the number of the closure's call in it that raises.
    """
    torch.manual_seed(seed)
    net = Net().double()
    model = net if rank is None else DistributedDataParallel(net)
    momentum = {"momentum": 0.9} if base == "SGD" else {}
    made = getattr(torch.optim, base)(model.parameters(), lr=0.05, **momentum)
    optimizer = MultiTaskOptimizer(
        made,
        weighting=weighting.Mean() if kind.startswith("coop") else by_name(method),
        model=model,
        **KINDS[kind](net),
        **options,
    )
    messages, errors = [], []
    cuts = CUTS["uneven" if case == "uneven" else "even"](size)
    for step in range(STEPS):
        x, targets = data(seed, step)
        parts = list(zip(x.split(cuts), targets.split(cuts, 1)))
        calls = [0]

        def closure(number: int, tasks: Any = TASKS) -> list[torch.Tensor | None]:
            calls[0] += 1
            if fails == (rank, step, calls[0]):
                raise ValueError(f"call {calls[0]} of step {step}")
            found: list[torch.Tensor | None] = []
            for task in TASKS:
                if task not in tasks or (
                    rank is not None and lacks(case, step, task, rank, size)
                ):
                    found.append(None)
                    continue
                mine = range(size) if rank is None else [rank]
                mine = [r for r in mine if not lacks(case, step, task, r, size)]
                if not mine:
                    found.append(None)
                    continue
                inputs = torch.cat([parts[r][0] for r in mine])[number::micro]
                wanted = torch.cat([parts[r][1][task] for r in mine])[number::micro]
                outputs = model(inputs, (task,))[task]
                found.append(((outputs - wanted) ** 2).mean() * (1 + task))
            return found

        def numbered(number: int):
            return lambda tasks=TASKS: closure(number, tasks)

        samples = cuts[rank] if rank is not None and case == "uneven" else None
        closures = [numbered(number) for number in range(micro)]
        try:
            with counted() as issued:
                optimizer.step(closures if micro > 1 else closures[0], samples=samples)
        except Exception as failure:
            errors.append((step, type(failure).__name__, str(failure)))
        messages.append(issued)
    return {
        "parameters": torch.cat([p.detach().reshape(-1) for p in net.parameters()]),
        "messages": messages,
        "errors": errors,
    }


def by_name(method: str) -> Any:
    if method == "IMTL":
        return weighting.IMTL(tasks=3)
    return getattr(weighting, method)()


def alone(seed: int, kind: str, **options: Any) -> torch.Tensor:
    if "fails" not in options:
        return train(None, seed, kind, **options)["parameters"]
    raise AssertionError


def assert_equal(pool, rng, kind: str, **options: Any) -> list[dict[str, Any]]:
    """All ranks hold the same bits, and what one process comes to."""
    seed = int(rng.integers(2**31))
    results = pool.run(train, seed, kind, size=pool.world_size, **options)
    expected = alone(seed, kind, size=pool.world_size, **options)
    for result in results:
        assert not result["errors"]
        assert torch.equal(result["parameters"], results[0]["parameters"])
        torch.testing.assert_close(result["parameters"], expected, rtol=1e-9, atol=1e-10)
    return results
