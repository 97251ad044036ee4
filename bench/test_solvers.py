"""What happens between gram and combine: T x T problems, where overhead is all there is.

Ten calls a turn: the first after another entrant's turn finds cold instruction caches and takes several
times as long.
"""

from __future__ import annotations

import pytest
import torch

import flatmtl
from bench import solvers
from bench.cases import Inputs
from bench.contests import SOLVER_COLUMNS, SOLVER_METHODS, Call, Contest, aggregate_contest
from bench.solvers import cycled, problems


@pytest.fixture
def one_core():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", solvers.METHODS)
def test_weighting(name, tasks, measure, request, one_core):
    if tasks < solvers.least_tasks(name):
        pytest.skip(f"{name} needs {solvers.least_tasks(name)} tasks")
    quick = request.config.getoption("--quick")
    limit = 0.01 if quick else 0.15
    contest, slow = solvers.contest(name, tasks)
    measure(
        contest,
        kind="solver",
        effort=0.2,
        tasks=tasks,
        slow_s={
            rival: solvers.seconds(call, limit, 1 if quick else 3) for rival, call in slow.items()
        },
        alone_s=solvers.solver_alone(name, tasks, limit / 2),
        quality=solvers.study(name, tasks, limit=0.2 if quick else 4.0, most=20 if quick else 1000),
    )


@pytest.mark.parametrize("name", solvers.SMALL_METHODS)
def test_small_gradients(name, measure, request, one_core):
    tasks = 8
    most, limit = (5, 0.1) if request.config.getoption("--quick") else (100, 1.5)
    found = solvers.study(name, tasks, limit=limit, most=most, norms=solvers.SMALL)
    weighting, grams = solvers.ours(name, tasks), cycled(problems(tasks)[: solvers.CYCLE])
    contest = Contest(name, 0, lambda: weighting(solvers.SMALL**2 * grams()), {}, calls=10)
    measure(contest, kind="small gradients", effort=0.02, tasks=tasks, quality=found)


@pytest.mark.parametrize("name", SOLVER_METHODS)
def test_aggregate(name, tasks, measure):
    inputs = Inputs(tasks, SOLVER_COLUMNS)  # few columns: what a method costs is its solver
    contest = aggregate_contest(name, inputs)
    measure(contest, kind="aggregate", tasks=tasks, columns=SOLVER_COLUMNS, effort=0.3)


def test_draw_order(tasks, measure):
    rng = torch.tensor([7, 0])
    others: dict[str, Call] = {
        "rand().argsort()": lambda: torch.rand(tasks, tasks).argsort(1),
        "T x randperm": lambda: torch.stack([torch.randperm(tasks) for _ in range(tasks)]),
    }
    contest = Contest(
        "draw_order_", 0, lambda: flatmtl.ops.draw_order_(rng, tasks), others, calls=10
    )
    measure(contest, kind="small op", tasks=tasks)


def test_affinity(tasks, measure):
    grams = cycled(problems(tasks)[: solvers.CYCLE])
    losses = torch.rand(tasks, dtype=torch.float64) + 0.1
    others: dict[str, Call] = {"torch": lambda: 0.1 * grams() / losses[:, None]}
    contest = Contest(
        "affinity", 0, lambda: flatmtl.ops.affinity(grams(), losses, 0.1), others, calls=10
    )
    measure(contest, kind="small op", tasks=tasks)
