"""The kernels of bench/variants, run on the CPU by tests/cuda_emulation, against float64."""

import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import race
from bench.contests import Contest
from bench.variants import __main__ as command
from bench.variants import check, model
from bench.variants.library import Library, build_cuda, build_emulated, gram_variants

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the emulation")

ROOT = Path(__file__).resolve().parent.parent
DTYPES = (torch.float32, torch.bfloat16)
GUARD = 2048  # floats: more than a block takes at once
UPDATES = [("sgd", options) for options in check.SGD]
UPDATES += [("adamw", options) for options in check.ADAMW]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return Library(build_emulated(tmp_path_factory.mktemp("variants")), "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tasks", check.TASKS)
def test_gram(library, tasks, dtype):
    """Rows aligned and not, a tail of columns, fewer columns than a pack, in three orders of threads."""
    for n, columns in enumerate((1031, 1031, 2304, 5)):
        library.order(n % 3, tasks)
        jac = check.rows(tasks + n, columns, dtype, "cpu")[:tasks]
        for variant in gram_variants(tasks, dtype):
            got = library.gram(variant, jac)
            assert torch.equal(got, got.T)
            assert check.gram_error(got, jac) <= check.LIMIT, (variant, columns)
            assert torch.equal(got, library.gram(variant, jac))


def test_gram_of_no_columns_is_zero(library):
    jac = torch.empty(12, 0)
    for variant in gram_variants(12, torch.float32):
        assert torch.equal(library.gram(variant, jac), torch.zeros(12, 12, dtype=torch.float64))


@pytest.mark.parametrize("tasks", [9, 32])
def test_async_lanes_end_at_their_limit(library, tasks):
    """Beyond 128 terms a lane the sums go on in double: as exact as in many chunks."""
    columns = 128 * 70 + 3
    library.order(2, tasks)
    jac = torch.rand(tasks, columns)  # all positive: a longer float32 sum would show
    got = torch.zeros(tasks, tasks, dtype=torch.float64)
    rows, cols = torch.triu_indices(tasks, tasks)
    got[rows, cols] = library.async_chunk(jac)
    upper = (jac.double() @ jac.double().T).triu()
    assert ((got - upper).abs() <= 2.0**-23 * upper).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name, options", UPDATES)
def test_update_is_torchs(library, name, options, dtype):
    """Five steps; parameters and state aligned and not; nothing is written beside them."""
    for n, (tasks, columns, shift, state_shift) in enumerate(
        [(1, 4096, 0, 0), (2, 2053, 0, 0), (3, 2053, 0, 1), (5, 3, 0, 0), (600, 2070, 2, 0)]
    ):
        library.order(n % 3, n)
        jac = check.rows(tasks, columns, dtype, "cpu").clone()
        weights = torch.linspace(-0.5, 1, tasks, dtype=torch.float64) / tasks
        if tasks > 2:  # a row that is left out
            weights[1] = 0
            jac[1] = torch.nan
        width = -(-columns // 4) * 4 + 2 * GUARD  # every row of it is aligned
        held = torch.full((1 + check.STATES[name], width), 77.0)
        beside = torch.ones_like(held, dtype=torch.bool)
        arrays = []
        for k, values in enumerate(held):
            first = GUARD + (state_shift if k else shift)
            arrays.append(values[first : first + columns])
            beside[k, first : first + columns] = False
            arrays[k][:] = 0 if k else torch.linspace(-1, 1, columns)
        error = check.step_error(library, jac, weights, arrays[0], arrays[1:], name, options)
        assert error <= check.STEP_LIMIT, (tasks, columns)
        assert (held[beside] == 77).all()


def test_sgd_does_not_read_its_buffer_in_the_first_step(library):
    jac, weights = torch.ones(1, 9), torch.ones(1, dtype=torch.float64)
    params, buffer = torch.zeros(9), torch.full((9,), torch.nan)
    library.combine_sgd(jac, weights, params, buffer, library.factors(), lr=0.5, momentum=0.9)
    assert torch.equal(params, torch.full((9,), -0.5))
    assert torch.equal(buffer, torch.ones(9))


def test_the_page_has_the_models_tables(capsys):
    model.main()
    page = (ROOT / "bench" / "variants" / "README.md").read_text()
    tables = [part for part in capsys.readouterr().out.split("\n\n") if part.startswith("|")]
    assert len(tables) == 4
    for table in tables:
        assert table.strip() in page


def test_an_nvcc_build_is_kept_until_its_sources_change(tmp_path, monkeypatch):
    """What bench/gpu.sh compiles in one part is there in another."""
    calls = tmp_path / "calls"
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f'#!/bin/sh\necho "$@" >>{calls}\nfor out; do :; done\ntouch "$out"\n')
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    built = build_cuda("90", tmp_path)
    assert built.exists() and len(calls.read_text().splitlines()) == 2  # compiled, linked
    assert build_cuda("90", tmp_path) == built
    assert len(calls.read_text().splitlines()) == 2
    assert build_cuda("80", tmp_path) != built  # another architecture
    assert len(calls.read_text().splitlines()) == 4
    os.utime(built, (0, 0))
    build_cuda("90", tmp_path)
    assert len(calls.read_text().splitlines()) == 6


def test_contests_are_saved_one_by_one_until_the_time_is_over(monkeypatch):
    def slow(library, jac):
        time.sleep(0.2)
        return Contest("gram", jac.numel() * 4, jac.sum, {"variant": jac.sum})

    monkeypatch.setattr(command, "COPIED", 1024)
    monkeypatch.setattr(race, "DeviceClock", lambda: race.wall_clock)
    monkeypatch.setattr(command, "cases", lambda: [(t, torch.float32, slow) for t in (2, 3, 4)])
    saved = []
    end = time.monotonic() + 0.1  # over before the second begins
    records = command.measure(
        SimpleNamespace(device="cpu"),
        100,
        0.0,
        end,
        lambda done, left: saved.append((len(done), left)),
    )
    assert [r["tasks"] for r in records] == [2] and saved == [(1, 2)]
