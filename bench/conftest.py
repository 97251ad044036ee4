"""The grid, the alternating measurement as a fixture, and what is written about the machine."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import flatmtl
from bench import cases, peers, race
from bench.cases import Inputs
from bench.contests import ROW_TASKS, Contest
from flatmtl.ops import _library

QUICK_SECONDS, SECONDS = 0.05, 0.7  # of measuring one benchmark; fewer rounds where they are long


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="a small grid, short: shows that all runs"
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    # torch.compile's own, on first use
    config.addinivalue_line("filterwarnings", "ignore:.torch.jit.script:DeprecationWarning")


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info.pop("node", None)  # the host's name is nobody's business
    machine_info["threads"] = torch.get_num_threads()
    machine_info["torch"] = torch.__version__
    machine_info["torchjd"] = None if peers.torchjd is None else _version("torchjd")
    machine_info["flatmtl"] = flatmtl.__version__
    machine_info["body"] = _library.body("gram", "cpu")
    machine_info["quick"] = config.getoption("--quick")


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _grid(config: pytest.Config) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if config.getoption("--quick"):
        return cases.QUICK_TASKS, cases.QUICK_COLUMNS
    return cases.TASKS, cases.COLUMNS


def _name(columns: int) -> str:
    return f"P{columns:.0e}".replace("e+0", "e")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``inputs`` over the grid, ``row_inputs`` over its P, ``tasks`` over its T.

    The first two in session scope: pytest then runs all benchmarks of one size one after the other,
    and only that size is in memory.
    """
    tasks, columns = _grid(metafunc.config)
    if "inputs" in metafunc.fixturenames:
        sizes = [(t, p) for p in columns for t in tasks]
        names = [f"T{t}-{_name(p)}" for t, p in sizes]
        metafunc.parametrize("inputs", sizes, ids=names, indirect=True, scope="session")
    if "row_inputs" in metafunc.fixturenames:
        names = [_name(p) for p in columns]
        metafunc.parametrize("row_inputs", columns, ids=names, indirect=True, scope="session")
    if "tasks" in metafunc.fixturenames:
        metafunc.parametrize("tasks", tasks, ids=[f"T{t}" for t in tasks])


@pytest.fixture(scope="session")
def inputs(request: pytest.FixtureRequest) -> Iterator[Inputs]:
    yield Inputs(*request.param)
    gc.collect()


@pytest.fixture(scope="session")
def row_inputs(request: pytest.FixtureRequest) -> Iterator[Inputs]:
    yield Inputs(ROW_TASKS, request.param)
    gc.collect()


@pytest.fixture
def compile_(request: pytest.FixtureRequest, name: str) -> Iterator[Callable[[Inputs], bool]]:
    """Whether torch.compile takes part: everywhere, but for one op at one size in a quick run."""
    quick = request.config.getoption("--quick")
    smallest = ("combine", cases.TASKS[0], cases.COLUMNS[0])
    yield lambda inputs: not quick or (name, inputs.tasks, inputs.columns) == smallest
    torch._dynamo.reset()  # the next size compiles from scratch, with no guards of the last to pass


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Runs a contest: pytest-benchmark times ours, the others run before it in every round."""

    def run(contest: Contest, *, effort: float = 1.0, least: int = 3, **about: object) -> None:
        seconds = effort * SECONDS
        if request.config.getoption("--quick"):
            seconds, least = QUICK_SECONDS, 3
        calls = race.entrants(contest)
        rounds = race.rounds_for(calls, race.wall_clock, seconds, least, most=300)
        times: race.Times = {name: [] for name in calls}

        def others() -> None:
            for name, call in calls.items():
                if name != race.OURS:
                    times[name].append(race.wall_clock(call))

        benchmark.group = str(about["kind"])
        benchmark.pedantic(calls[race.OURS], setup=others, rounds=rounds, iterations=1)
        if benchmark.stats is None:  # --benchmark-disable
            return
        times[race.OURS] = list(benchmark.stats.stats.data)
        benchmark.extra_info.update({"name": contest.name, **about, **race.summary(contest, times)})

    return run
