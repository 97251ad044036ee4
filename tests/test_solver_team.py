"""The solver headers under a team that runs the iterations of every phase in a random order.

What is independent within a phase gives the same bits in any order. A missing barrier, or an
iteration that reads its neighbour's output of the same phase, does not.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import oracles
import pytest
from problems import FAMILIES, family
from solver_cases import CASES, NAMES, Case, Run

HERE = Path(__file__).parent
HEADERS = HERE.parent / "csrc" / "solvers"
SIZES = [1, 2, 3, 4, 8, 16, 40, 64, 100]
F64, I64, U32 = (np.ctypeslib.ndpointer(t, flags="C") for t in (np.float64, np.int64, np.uint32))


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    if not HEADERS.is_dir():
        pytest.skip("the sources are not here: flatmtl is tested as installed")
    target = tmp_path_factory.mktemp("team") / "solver_team.so"
    # no contraction: both teams must round alike to be compared to the bit
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    command = [
        compiler,
        *flags,
        "-shared",
        "-fPIC",
        f"-I{HEADERS}",
        f"-I{HERE}",
        str(HERE / "solver_team.cpp"),
    ]
    done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lib = ctypes.CDLL(str(target))
    u64, i64, f64 = ctypes.c_uint64, ctypes.c_int64, ctypes.c_double
    lib.run_draw_normal.argtypes = [u64, u64, u64, i64, i64, F64]
    lib.run_draw_normal.restype = None
    lib.run_draw_order.argtypes = [u64, u64, u64, i64, i64, I64]
    lib.run_draw_order.restype = None
    lib.run_philox.argtypes = [u64, U32, U32]
    lib.run_philox.restype = None
    for name in ("run_neighbour", "run_neighbour2", "run_same_place"):
        getattr(lib, name).argtypes = [u64, i64, F64]
        getattr(lib, name).restype = None
    lib.run_sum_with_state.argtypes = [u64, i64, F64]
    lib.run_sum_with_state.restype = f64
    return lib


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


def solve(library, team: int, case: Case, gram: np.ndarray, order: np.ndarray) -> Run:
    """gram [T, T]"""
    run = Run(case, gram[None], order[None], seed=7)
    assert library.run_method(ctypes.c_uint64(team), *run.arguments()), "scratch overrun"
    return run


def assert_same_bits(a: Run, b: Run, what: object) -> None:
    for name, value in a.results().items():
        assert same_bits(value, b.results()[name]), f"{what}: {name}"


def orders(rng: np.random.Generator, tasks: int) -> np.ndarray:
    return np.stack([rng.permutation(tasks) for _ in range(tasks)]).astype(np.int64)


def problem(rng: np.random.Generator, name: str, tasks: int) -> np.ndarray:
    return oracles.gram(family(rng, name, tasks, tasks + 20))


@pytest.mark.parametrize("case", CASES, ids=NAMES)
@pytest.mark.parametrize("tasks", SIZES)
def test_any_order_of_iterations_gives_the_same_bits(library, case, tasks, rng):
    names = rng.permutation(FAMILIES)[: 2 if tasks > 40 else 4]
    for name in names:
        gram, order = problem(rng, str(name), tasks), orders(rng, tasks)
        serial = solve(library, 0, case, gram, order)
        for team in rng.integers(1, 2**31, 1 if tasks > 16 else 3):
            assert_same_bits(serial, solve(library, int(team), case, gram, order), (name, team))


@pytest.mark.parametrize("case", CASES, ids=NAMES)
@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_inactive_tasks_in_any_order(library, case, bad, count, rng):
    tasks = 5
    gram, order = problem(rng, "iid", tasks), orders(rng, tasks)
    off = rng.permutation(tasks)[:count]
    gram[off], gram[:, off] = bad, bad
    serial = solve(library, 0, case, gram, order)
    if case.name != "scale":  # it scales what it is given
        assert np.isfinite(serial.weights).all() and (serial.weights[0, off] == 0).all()
        assert serial.status[0] & 2 and bool(serial.status[0] & 1) == (count == tasks)
    for team in (5, 6, 7):
        assert_same_bits(serial, solve(library, team, case, gram, order), team)


def test_normal_numbers_in_any_order(library, rng):
    seed, step = int(rng.integers(0, 2**63)), int(rng.integers(0, 2**40))
    drawn = [np.full(9, np.nan) for _ in range(2)]
    for team, out in zip([0, 11], drawn):
        library.run_draw_normal(team, seed, step, 3, 9, out)
    assert np.isfinite(drawn[0]).all() and same_bits(drawn[0], drawn[1])


@pytest.mark.parametrize("tasks", SIZES)
def test_order_in_any_order(library, tasks, rng):
    seed, step = int(rng.integers(0, 2**63)), int(rng.integers(0, 2**40))
    drawn = [np.full((tasks, tasks), -1, dtype=np.int64) for _ in range(3)]
    for team, out in zip([0, 11, 12], drawn):
        library.run_draw_order(team, seed, step, 3, tasks, out)
    assert (np.sort(drawn[0], axis=1) == np.arange(tasks)).all()
    assert same_bits(drawn[0], drawn[1]) and same_bits(drawn[0], drawn[2])


def words(library, key: int, counter: list[int]) -> list[int]:
    out = np.zeros(4, dtype=np.uint32)
    library.run_philox(key, np.array(counter, dtype=np.uint32), out)
    return [int(x) for x in out]


@pytest.mark.parametrize("counter, key, expected", oracles.PHILOX_KNOWN)
def test_philox_known_answers(library, counter, key, expected):
    assert words(library, key[0] | key[1] << 32, counter) == expected


def test_philox_against_the_oracle(library, rng):
    for _ in range(50):
        numbers = [int(x) for x in rng.integers(0, 2**32, 6)]
        expected = oracles.philox4x32_10(numbers[:4], numbers[4:])
        assert words(library, numbers[4] | numbers[5] << 32, numbers[:4]) == expected


@pytest.mark.parametrize("fault", ["run_neighbour", "run_neighbour2", "run_same_place"])
def test_the_shuffled_team_catches_a_dependence(library, fault):
    """The check checked: phases that are wrong on purpose must not pass."""
    n = 16
    run = getattr(library, fault)
    serial = np.ones((n, n))
    run(0, n, serial)
    again = np.ones((n, n))
    run(0, n, again)
    assert same_bits(serial, again)
    caught = 0
    for team in (1, 2, 3, 4):
        shuffled = np.ones((n, n))
        run(team, n, shuffled)
        caught += not same_bits(serial, shuffled)
    assert caught >= 3  # one order in n may hide a write to the same place


def test_the_shuffled_team_catches_a_dependence_in_a_sum(library):
    results = {library.run_sum_with_state(team, 16, np.ones(16)) for team in (0, 1, 2)}
    assert len(results) > 1
