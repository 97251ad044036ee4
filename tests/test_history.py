"""History: what is recorded comes back, from the device's own count, without a host read."""

from __future__ import annotations

import copy
import math
import pickle
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flatmtl.history import History

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
VECTORS = ("losses", "weights", "flat_weights", "norms", "sharpness")
SCALARS = ("status", "flat_status", "residual")


def a_step(rng, tasks: int, dtype=torch.float64, device="cpu") -> dict[str, torch.Tensor]:
    """Everything that ``record`` takes, in its own dtype where it has one."""

    def tensor(values, dtype=dtype):
        return torch.as_tensor(values, dtype=dtype, device=device)

    jac = rng.standard_normal((tasks, tasks + 2)) * 10.0 ** rng.uniform(-3, 3, (tasks, 1))
    return {
        **{name: tensor(rng.standard_normal(tasks)) for name in VECTORS},
        "gram": tensor(jac @ jac.T, torch.float64),
        "status": tensor(int(rng.integers(64)), torch.int64),
        "flat_status": tensor(int(rng.integers(64)), torch.int32),
        "residual": tensor(rng.random(), torch.float64),
    }


def plain_cosines(gram: np.ndarray) -> np.ndarray:
    tasks = len(gram)
    cosines = np.full((tasks, tasks), np.nan)
    for i in range(tasks):
        for j in range(tasks):
            a, b = gram[i, i], gram[j, j]
            if 0 < a < math.inf and 0 < b < math.inf:
                cosines[i, j] = 1.0 if i == j else gram[i, j] / math.sqrt(a) / math.sqrt(b)
    return cosines


def plain_conflict(cosines: np.ndarray) -> float:
    signs = [
        cosines[i, j] < 0
        for i in range(len(cosines))
        for j in range(i + 1, len(cosines))
        if not math.isnan(cosines[i, j])
    ]
    return sum(signs) / len(signs) if signs else math.nan


def assert_steps(arrays: dict[str, np.ndarray], numbers: range, given: list[dict]) -> None:
    """``arrays`` are ``given[n]`` for n in ``numbers``; what a step lacks is NaN or -1."""
    assert arrays["step"].dtype == np.int64
    assert arrays["step"].tolist() == list(numbers)
    for row, n in enumerate(numbers):
        step = given[n]
        for name in VECTORS:
            value = step.get(name)
            expected = np.nan if value is None else value.double().cpu().numpy()
            np.testing.assert_array_equal(arrays[name][row], expected)
        for name in SCALARS:
            value = step.get(name)
            missing = np.nan if name == "residual" else -1
            assert arrays[name].dtype == (np.float64 if name == "residual" else np.int64)
            np.testing.assert_array_equal(
                arrays[name][row], missing if value is None else value.item()
            )
        tasks = arrays["losses"].shape[1]
        gram = step.get("gram")
        gram = np.full((tasks, tasks), np.nan) if gram is None else gram.double().cpu().numpy()
        cosines = plain_cosines(gram)
        np.testing.assert_allclose(arrays["cosines"][row], cosines, rtol=1e-12, atol=1e-15)
        np.testing.assert_array_equal(arrays["conflict"][row], plain_conflict(cosines))


def indices_of(args) -> list:
    return [i for arg in args if isinstance(arg, (list, tuple)) for i in arg]


class NoHostRead(TorchDispatchMode):
    """Raises at whatever makes the host wait for a value."""

    READS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        # a bool index is a nonzero below the dispatcher
        masks = any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices_of(args))
        if name in self.READS or (name.startswith("index") and masks):
            raise AssertionError(f"host read: {func}")
        self.ops.append(name)
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------- what comes back


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tasks", [1, 2, 3, 7, 40])
def test_recorded_steps_come_back(tasks, dtype, rng, device):
    history = History(8, range(tasks), device)
    given = [a_step(rng, tasks, dtype, device) for _ in range(5)]
    for step in given:
        history.record(**step)
    assert len(history) == 5
    assert_steps(history.arrays(), range(5), given)


@pytest.mark.parametrize("capacity", [1, 2, 5, 13])
def test_the_ring_keeps_the_last_steps(capacity, rng):
    history, given = History(capacity, ["a", "b"]), []
    for n in range(1, 3 * capacity + 3):
        given.append(a_step(rng, 2))
        history.record(**given[-1])
        assert len(history) == min(n, capacity)
        assert_steps(history.arrays(), range(max(0, n - capacity), n), given)


def test_since_leaves_out_the_older_steps(rng):
    history, given = History(5, ["a", "b"]), [a_step(rng, 2) for _ in range(8)]
    for step in given:
        history.record(**step)
    assert_steps(history.arrays(since=6), range(6, 8), given)
    assert_steps(history.arrays(since=1), range(3, 8), given)
    for since in (8, 99):
        assert_steps(history.arrays(since=since), range(0), given)


@pytest.mark.parametrize("left_out", [*VECTORS[1:], "gram", *SCALARS])
def test_what_is_not_given_is_missing(left_out, rng):
    """Also where the row before had it: nothing old shows through."""
    history, given = History(4, ["a", "b", "c"]), [a_step(rng, 3) for _ in range(3)]
    del given[1][left_out]
    given[2][left_out] = None
    for step in given:
        history.record(**step)
    assert_steps(history.arrays(), range(3), given)


def test_losses_alone():
    history = History(2, ["a", "b"])
    history.record(losses=torch.tensor([1.0, torch.nan]))
    assert_steps(history.arrays(), range(1), [{"losses": torch.tensor([1.0, torch.nan])}])


def test_an_empty_history_has_empty_arrays():
    history = History(3, ["a", "b"])
    arrays = history.arrays()
    assert len(history) == 0
    assert arrays["losses"].shape == (0, 2) and arrays["cosines"].shape == (0, 2, 2)
    assert all(len(values) == 0 for values in arrays.values())


@pytest.mark.parametrize("spoiled", [0.0, np.nan, np.inf])
def test_a_task_without_gradient_has_no_cosines(spoiled, rng):
    history, step = History(1, ["a", "b", "c"]), a_step(rng, 3)
    lost = int(rng.integers(3))
    step["gram"][lost, :] = step["gram"][:, lost] = spoiled
    history.record(**step)
    arrays = history.arrays()
    assert_steps(arrays, range(1), [step])
    assert np.isnan(arrays["cosines"][0, lost]).all()
    others = [i for i in range(3) if i != lost]
    assert arrays["conflict"][0] == (step["gram"][others[0], others[1]].item() < 0)


def test_conflict_without_a_pair_is_missing(rng):
    history = History(3, ["a", "b"])
    history.record(losses=torch.ones(2), gram=torch.zeros(2, 2))
    history.record(losses=torch.ones(2), gram=torch.diag(torch.tensor([1.0, 0.0])))
    history.record(losses=torch.ones(2))
    assert np.isnan(history.arrays()["conflict"]).all()


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_cosines_of_gradients_of_any_size(scale, rng):
    jac = rng.standard_normal((4, 6)) * np.array([scale, 1, scale, 1])[:, None]
    unit = jac / np.linalg.norm(jac, axis=1, keepdims=True)
    history = History(1, range(4))
    history.record(losses=torch.ones(4), gram=torch.from_numpy(jac @ jac.T))
    cosines = history.arrays()["cosines"][0]
    np.testing.assert_allclose(cosines, unit @ unit.T, rtol=1e-12, atol=1e-14)
    assert (np.diag(cosines) == 1).all() and np.abs(cosines).max() <= 1


def test_cosines_of_a_float32_gram_stay_in_range(rng):
    row = rng.standard_normal(50)
    jac = torch.from_numpy(np.stack([row * s for s in rng.uniform(0.1, 10, 20)])).float()
    history = History(1, range(20))
    history.record(losses=torch.ones(20), gram=jac @ jac.T)
    assert np.abs(history.arrays()["cosines"]).max() <= 1


def test_any_memory_layout(rng):
    step = a_step(rng, 3)
    strided = {**step, "gram": step["gram"].T, "losses": step["losses"].repeat_interleave(2)[::2]}
    strided["norms"] = step["norms"].requires_grad_()
    history = History(1, ["a", "b", "c"])
    history.record(**strided)
    step["norms"] = step["norms"].detach()
    assert_steps(history.arrays(), range(1), [step])


@pytest.mark.parametrize("mode", ["inference", "deterministic"])
def test_in_the_modes_of_torch(mode, rng):
    history, given = History(2, ["a", "b"]), [a_step(rng, 2) for _ in range(3)]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(mode == "deterministic")
    try:
        with torch.inference_mode(mode == "inference"):
            history.record(**given[0])
            history.record(**{name: value * 1 for name, value in given[1].items()})
        history.record(**given[2])
    finally:
        torch.use_deterministic_algorithms(before)
    assert_steps(history.arrays(), range(1, 3), given)


def test_nothing_given_is_kept_or_handed_out(rng):
    history, step = History(2, ["a", "b"]), a_step(rng, 2)
    history.record(**step)
    expected = {name: value.clone() for name, value in step.items()}
    for value in step.values():
        value.fill_(7)
    for values in history.arrays().values():
        values[...] = 9
    assert_steps(history.arrays(), range(1), [expected])


def test_clear_forgets_the_steps_and_goes_on_counting(rng):
    history, given = History(3, ["a", "b"]), [a_step(rng, 2) for _ in range(7)]
    for step in given[:5]:
        history.record(**step)
    history.clear()
    assert len(history) == 0
    assert_steps(history.arrays(), range(0), given)
    history.record(**given[5])
    assert len(history) == 1
    assert_steps(history.arrays(), range(5, 6), given)
    history.record(**given[6])
    assert_steps(history.arrays(), range(5, 7), given)


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_a_copy_has_the_steps_and_a_life_of_its_own(way, rng):
    history, given = History(4, ["a", "b"]), [a_step(rng, 2) for _ in range(8)]
    for step in given[:6]:
        history.record(**step)
    other = copy.deepcopy(history) if way == "deepcopy" else pickle.loads(pickle.dumps(history))
    assert other.tasks == ["a", "b"] and other.capacity == 4
    assert_steps(other.arrays(), range(2, 6), given)
    other.record(**given[6])
    assert_steps(history.arrays(), range(2, 6), given)
    assert_steps(other.arrays(), range(3, 7), given)


def test_bytes_a_step():
    """As the docstring says."""
    for tasks, expected in [(3, 192), (40, 8184), (617, 1_549_928)]:
        assert History(2, range(tasks), "meta").nbytes == 2 * expected + 16


def test_many_tasks(rng):
    history, step = History(2, range(617)), a_step(rng, 617)
    history.record(**step)
    arrays = history.arrays()
    norms = np.sqrt(np.diag(step["gram"].numpy()))
    cosines = step["gram"].numpy() / np.outer(norms, norms)
    np.testing.assert_allclose(arrays["cosines"][0], cosines, rtol=1e-11, atol=1e-14)
    assert arrays["conflict"][0] == (cosines[np.triu_indices(617, 1)] < 0).mean()


# ---------------------------------------------------------------- pandas


def test_pandas(rng):
    history, given = History(3, ["left", 1, "right"]), [a_step(rng, 3) for _ in range(5)]
    for step in given:
        history.record(**step)
    frame, arrays = history.pandas(), history.arrays()
    assert frame.index.name == "step" and frame.index.tolist() == [2, 3, 4]
    for name in VECTORS:
        assert frame[name].columns.tolist() == ["left", 1, "right"]
        np.testing.assert_array_equal(frame[name].to_numpy(), arrays[name])
    assert frame["cosines"].columns.tolist() == ["left|1", "left|right", "1|right"]
    np.testing.assert_array_equal(frame["cosines"]["left|right"], arrays["cosines"][:, 0, 2])
    for name in ("conflict", *SCALARS):
        np.testing.assert_array_equal(frame[name].to_numpy(), arrays[name])
    assert "cosines" not in history.pandas(cosines=False)


def test_pandas_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"flatmtl\[plots\]"):
        History(1, ["a"]).pandas()


# ---------------------------------------------------------------- no host read


def test_recording_reads_nothing_on_the_host(rng):
    history, given = History(2, ["a", "b", "c"]), [a_step(rng, 3) for _ in range(5)]
    del given[3]["gram"]
    with NoHostRead() as mode:
        for step in given:
            history.record(**step)
        history.clear()
    assert "index_copy_" in mode.ops  # it has looked
    assert len(mode.ops) <= 5 * 6 + 1, "a step is a handful of ops"


def test_the_watch_for_host_reads_can_fail():
    value = torch.ones(2)
    for read in (
        lambda: value[0].item(),
        lambda: bool(value[0]),
        lambda: value.nonzero(),
        lambda: value[value > 0],
        lambda: torch.equal(value, value),
    ):
        with pytest.raises(AssertionError, match="host read"), NoHostRead():
            read()


def test_recording_needs_no_values_at_all():
    """Meta tensors have none: any read, even one that the watch does not know, would raise."""
    history = History(4, ["a", "b"], "meta")
    some = torch.empty(2, device="meta")
    bits = torch.empty((), dtype=torch.int64, device="meta")
    for _ in range(3):
        history.record(
            losses=some, weights=some.double(), gram=some.outer(some), status=bits, norms=some
        )
    history.clear()
    repr(history)
    with pytest.raises((RuntimeError, NotImplementedError, ValueError)):
        len(history)


@pytest.mark.gpu
def test_recording_does_not_wait_for_the_device(rng):
    history, step = History(2, range(3), "cuda"), a_step(rng, 3, device="cuda")
    history.record(**step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            history.record(**step)
        history.clear()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("left_out", [(), ("gram", "sharpness", "flat_status")])
def test_captured_in_a_graph(left_out, rng):
    """A replay is a step: the position and the count move on the device."""
    history = History(4, range(3), "cuda")
    static = {n: v for n, v in a_step(rng, 3, device="cuda").items() if n not in left_out}
    given = []
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            history.record(**static)
            given.append({n: v.clone() for n, v in static.items()})
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        history.record(**static)
    assert len(history) == 2  # capturing records nothing
    for n in range(3, 9):
        new = a_step(rng, 3, device="cuda")
        for name, value in static.items():
            value.copy_(new[name])
        graph.replay()
        given.append({name: new[name] for name in static})
        assert_steps(history.arrays(), range(max(0, n - 4), n), given)


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("losses", torch.ones(2), ValueError, r"losses must have shape \[3\]"),
        ("losses", torch.ones(3, 1), ValueError, r"got \[3, 1\]"),
        ("losses", [1.0, 2.0, 3.0], TypeError, "losses must be a Tensor, got list"),
        ("losses", None, TypeError, "losses must be a Tensor, got None"),
        ("weights", torch.ones(4), ValueError, r"weights must have shape \[3\]"),
        ("norms", torch.ones(3, dtype=torch.int64), TypeError, "norms must be floating-point"),
        (
            "gram",
            torch.ones(6),
            ValueError,
            r"gram must have shape \[3, 3\] \(3 tasks\), got \[6\]",
        ),
        ("gram", torch.ones(2, 3, 3), ValueError, "gram must have shape"),
        ("sharpness", torch.ones(()), ValueError, "sharpness must have shape"),
        ("status", torch.ones(()), TypeError, "status must be an integer tensor"),
        ("flat_status", torch.ones(1, dtype=torch.int64), ValueError, r"must have shape \[\]"),
        ("residual", 0.5, TypeError, "residual must be a Tensor, got float"),
        ("weights", torch.ones(3, device="meta"), ValueError, "weights must be on cpu"),
    ],
)
def test_what_does_not_fit_is_an_error_and_records_nothing(name, value, error, words, rng):
    history, step = History(4, ["a", "b", "c"]), a_step(rng, 3)
    history.record(**step)
    with pytest.raises(error, match=words):
        history.record(**{**step, name: value})
    assert_steps(history.arrays(), range(1), [step])


@pytest.mark.parametrize(
    ("capacity", "tasks", "error", "words"),
    [
        (0, ["a"], ValueError, "capacity must be at least 1"),
        (-3, ["a"], ValueError, "capacity"),
        (2.0, ["a"], TypeError, "capacity must be an int, got float"),
        (True, ["a"], TypeError, "capacity"),
        (2, [], ValueError, "tasks must be one or more"),
        (2, ["a", "a"], ValueError, "different names"),
        (2, "ab", TypeError, "sequence of names"),
        (2, [1.5], TypeError, "ints or strings"),
        (2, 3, TypeError, "sequence of names"),
    ],
)
def test_a_history_that_cannot_be(capacity, tasks, error, words):
    with pytest.raises(error, match=words):
        History(capacity, tasks)
