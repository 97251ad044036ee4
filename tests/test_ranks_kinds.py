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
    method: str = "MGDA",
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
        if case == "nan" and step == 2:
            targets[2, -1] = torch.nan
        parts = list(zip(x.split(cuts), targets.split(cuts, 1)))
        calls = [0]

        def closure(number: int, tasks: Any = TASKS) -> list[torch.Tensor | None]:
            calls[0] += 1
            if fails == (rank, step, calls[0]):
                raise ValueError(f"call {calls[0]} of step {step}")
            found: list[torch.Tensor | None] = []
            for task in TASKS:
                if task not in tasks or (rank is not None and lacks(case, step, task, rank, size)):
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


def assert_equal(
    pool: Any, rng: Any, kind: str, fails: tuple[int, int, int] | None = None, **options: Any
) -> list[dict[str, Any]]:
    """All ranks hold the same bits, and what one process comes to."""
    seed = int(rng.integers(2**31))
    size = pool.world_size
    results = pool.run(train, seed, kind, size=size, fails=fails, **options)
    missed = None if fails is None else (None, fails[1], 1)  # the same step is not made
    expected = train(None, seed, kind, size=size, fails=missed, **options)["parameters"]
    for result in results:
        assert bool(result["errors"]) == bool(fails), result["errors"]
        assert torch.equal(result["parameters"], results[0]["parameters"])
        torch.testing.assert_close(result["parameters"], expected, rtol=1e-9, atol=1e-10)
    return results


METHODS = ("PCGrad", "IMTL", "Mean")  # IMTL looks at losses


@pytest.mark.parametrize("case", ["even", "uneven", "missing"])
@pytest.mark.parametrize("kind", KINDS)
def test_as_one_process_with_the_whole_batch(ranks, rng, kind, case):
    assert_equal(ranks(2), rng, kind, case=case)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["representation", "samo", "maml"])
def test_other_weightings(ranks, rng, kind, method):
    assert_equal(ranks(2), rng, kind, case="missing", method=method, base="Adam")


@pytest.mark.parametrize("kind", ["samo", "maml", "coop", "coop without noise"])
def test_micro_batches(ranks, rng, kind):
    assert_equal(ranks(2), rng, kind, micro=2)


@pytest.mark.parametrize("kind", ["representation", "samo", "maml", "coop"])
def test_four_processes(ranks, rng, kind):
    assert_equal(ranks(4), rng, kind, case="missing")


def test_representation_between_solves(ranks, rng):
    results = assert_equal(ranks(2), rng, "representation", weights_every=2)
    assert [len(messages) for messages in results[0]["messages"][1:]] == [2] * (STEPS - 1)


CALLS = {"representation": 1, "samo": 10, "maml": 7, "coop": 3}  # of the closure in a step


@pytest.mark.parametrize("kind", CALLS)
def test_a_rank_that_raises(ranks, rng, kind):
    """Wherever it does, the others learn why; the step is made on none, those after it are."""
    calls = range(1, CALLS[kind] + 1)
    chosen = [(1, 0), (1, 2), (calls[-1], 2), (int(rng.choice(calls)), 0)]
    if kind == "samo":  # between the sign and the row of a task, and before the next sign
        chosen += [(4, 2), (5, 2)]
    for call, step in dict.fromkeys(chosen):
        who = int(rng.integers(2))
        results = assert_equal(ranks(2), rng, kind, fails=(who, step, call))
        for rank, result in enumerate(results):
            ((where, name, message),) = result["errors"]
            assert where == step
            assert name == ("ValueError" if rank == who else "RankFailedError")
            assert f"call {call} of step {step}" in message
            assert (f"rank {who}: ValueError" in message) == (rank != who)


@pytest.mark.parametrize("kind", ["representation", "samo", "maml", "coop"])
def test_a_loss_that_is_not_finite_on_one_rank(ranks, rng, kind):
    assert_equal(ranks(2), rng, kind, case="nan", nonfinite="mask")


def one_maml_step(rank: int | None, seed: int, part: int) -> torch.Tensor:
    torch.manual_seed(seed)
    net = Net().double()
    model = net if rank is None else DistributedDataParallel(net)
    optimizer = MultiTaskOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05),
        weighting=weighting.Sum(),
        model=model,
        sharpness=MAML(0.3, first_order=False),
        sync_perturbation=False,
    )
    x, targets = data(seed, 0)
    half = slice(part * BATCH // 2, (part + 1) * BATCH // 2)

    def closure() -> list[torch.Tensor]:
        return [((y - t) ** 2).mean() for y, t in zip(model(x[half]), targets[:, half])]

    optimizer.step(closure)
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def maml_of_its_part(rank: int, seed: int) -> torch.Tensor:
    return one_maml_step(rank, seed, rank)


def test_maml_with_inner_steps_of_each_rank(ranks, rng):
    """The outer gradient is then the mean of those that the ranks would have found by themselves."""
    seed = int(rng.integers(2**31))
    first, second = ranks(2).run(maml_of_its_part, seed)
    assert torch.equal(first, second)
    expected = (one_maml_step(None, seed, 0) + one_maml_step(None, seed, 1)) / 2
    torch.testing.assert_close(first, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["representation", "samo", "maml", "coop"])
def test_what_goes_between_the_ranks(ranks, rng, kind):
    tasks = len(TASKS)

    def row(*sizes: int) -> int:
        """Bytes of parameters of these sizes, each padded to a multiple of 64."""
        return sum(-(-size * DOUBLE // 64) * 64 for size in sizes)

    shared = row(6 * 9, 9, 9 * 5, 5)
    heads = [row(5, 5 * 2, 2), row(5 * 2, 2), row(5 * 2, 2)]  # the first has the extra parameter
    tail = 64  # counts and marks beside a task's row
    sent = {
        "representation": [
            (2 * tasks + 3 + tasks**2 + tasks) * DOUBLE,
            shared + sum(heads) + DOUBLE,
        ],
        "samo": [
            (2 * tasks + 3) * DOUBLE,
            shared + sum(heads) + DOUBLE,
            *(size for own in heads for size in (3 * DOUBLE, shared + tail + own)),
        ],
        "maml": [shared + tail + own for own in heads] * 3,
        # step 3 is the turn of task 0; the extra parameter is nobody's
        "coop": [(2 * tasks + 3) * DOUBLE, shared + row(5, 5 * 2, 2) + DOUBLE],
    }
    seed = int(rng.integers(2**31))
    for result in ranks(2).run(train, seed, kind):
        assert result["messages"][3] == [("all_reduce", size) for size in sent[kind]]


def refused(rank: int, sharpness: Any, represented: bool) -> None:
    net = Net()
    MultiTaskOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.1),
        weighting=weighting.TrimmedMean(trim=1) if represented else weighting.Mean(),
        model=DistributedDataParallel(net),
        sharpness=sharpness,
        jacobian=Representation(net.trunk) if represented else "sequential",
        sync_perturbation=sharpness is None,
    )


@pytest.mark.parametrize("represented", [False, True])
def test_what_is_refused(ranks, represented):
    with pytest.raises(RankError, match="NotImplementedError: process_group must be None"):
        ranks(2).run(refused, None if represented else SAMO(), represented)
