"""Every weighting on a CUDA device: as on the CPU, without a wait, and inside a captured graph."""

from __future__ import annotations

import pytest
import torch
from methods import ALL, CROSS, make

pytestmark = pytest.mark.gpu
TASKS = 5


def gram_of(rng, tasks: int = TASKS, batch: tuple[int, ...] = ()) -> torch.Tensor:
    jac = torch.from_numpy(rng.standard_normal((*batch, tasks, tasks + 4)))
    return jac @ jac.mT


def assert_same(name: str, on_cuda: torch.Tensor, on_cpu: torch.Tensor) -> None:
    # sums over a block are added in another order; SDMGrad's long steps amplify that
    loose = 1e-4 if name == "sdmgrad" else 1e-9
    torch.testing.assert_close(on_cuda.cpu(), on_cpu, rtol=loose, atol=loose)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("tasks", [3, 8, 40, 80])
def test_as_on_the_cpu(name, tasks, rng):
    here, there = make(name, tasks), make(name, tasks)
    for _ in range(3):
        gram = gram_of(rng, tasks, (2,))
        on_cpu, on_cuda = here(gram), there(gram.cuda())
        assert_same(name, on_cuda, on_cpu)
        assert torch.equal(there.last_status().bits.cpu(), here.last_status().bits)


@pytest.mark.parametrize("name", ALL)
def test_captured_in_a_graph(name, rng):
    """A replay is a call: random streams, averages and call counts move on the device."""
    gram = gram_of(rng)
    here, there, static = make(name, TASKS), make(name, TASKS), gram.cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            there(static)
            here(gram)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = there(static)
    for step in range(3):
        new = gram_of(rng) if step else gram
        static.copy_(new)
        graph.replay()
        assert_same(name, captured, here(new))


@pytest.mark.parametrize("name", ALL)
def test_nothing_waits_for_the_device(name, rng):
    weighting, gram = make(name, TASKS), gram_of(rng).cuda()
    weighting(gram)  # makes its state, copies its options
    torch.cuda.set_sync_debug_mode("error")
    try:
        weighting(gram)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", [n for n in ALL if n not in CROSS])
def test_a_matrix_that_is_no_gram_is_flagged(name):
    """On the CPU it is a ValueError; here nothing is read, and the weights are 0."""
    weighting = make(name, 3)
    if weighting.diagonal_only:
        pytest.skip("looks at the diagonal alone")
    gram = torch.tensor([[1.0, 2, 0], [2, 1, 0], [0, 0, 1]], dtype=torch.float64, device="cuda")
    assert (weighting(gram) == 0).all()
    assert weighting.last_status().invalid_gram and not weighting.last_status().ok
