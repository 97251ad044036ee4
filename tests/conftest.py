"""Markers, seeds and fixtures shared by every test.

Inputs are fresh and random in every run. The seed is printed in the header of the run;
FLATMTL_TEST_SEED=<n> repeats it.
"""

from __future__ import annotations

import os
import sys
import zlib
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy reads it when it is imported

import numpy as np
import pytest
import torch

# Small problems: more threads cost time here. What they change is looked at, to the bit, in
# test_ops_determinism.py.
torch.set_num_threads(1)

sys.path.insert(0, str(Path(__file__).parent))  # `import oracles` from every test

from ranks import ranks  # noqa: E402, F401  one pool of each size for all test modules

SEED = int(os.environ.get("FLATMTL_TEST_SEED") or 0) or int.from_bytes(os.urandom(4), "little")
os.environ["FLATMTL_TEST_SEED"] = str(SEED)  # pytest-xdist's workers start from this process
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BODIES = ["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "slow: minutes, a compiler or much memory; run with --slow")


def pytest_report_header(config: pytest.Config) -> str:
    return f"flatmtl inputs: FLATMTL_TEST_SEED={SEED}"


def pytest_terminal_summary(terminalreporter) -> None:
    if terminalreporter.stats.get("failed"):  # the header is lost under -q
        terminalreporter.write_line(f"repeat the inputs with FLATMTL_TEST_SEED={SEED}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_cuda = pytest.mark.skip(reason="no CUDA device")
    no_slow = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_cuda)
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(no_slow)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator of its own for each test, so that one test alone repeats with the seed."""
    name = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(SEED ^ name)
    return np.random.default_rng([SEED, name])


class Body:
    """One of the three bodies of the ops, called with the signatures of the schemas."""

    def __init__(self, name: str) -> None:
        import flatmtl.ops

        self.name = name
        self.device = "cuda" if name == "cuda" else "cpu"
        self._ops = flatmtl.ops.reference if name == "reference" else torch.ops.flatmtl
        # for what the documented functions convert before a compiled body sees it
        self.public = flatmtl.ops.reference if name == "reference" else flatmtl.ops

    def __getattr__(self, op: str):
        return getattr(self._ops, op)


@pytest.fixture(params=BODIES)
def body(request: pytest.FixtureRequest) -> Body:
    return Body(request.param)


@pytest.fixture
def threads():
    """Lets a test change the number of threads; puts it back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
