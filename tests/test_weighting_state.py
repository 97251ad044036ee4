"""State: saved and resumed to the bit, reset, twins, copies, reuse; and one graph for a compiler."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import oracles
import pytest
import torch
from methods import ALL, CROSS, RANDOM, STATEFUL, make
from problems import family

from flatmtl.weighting import Weighting

TASKS = 4
KEEPERS = {  # every method with a state or a random stream
    "gradvac": {"beta": 0.3},
    "nash_mtl": {"update_every": 3},
    "pcd": {"beta": 0.9},
    "cr_mogm": {},
    "modo": {},
    "sdmgrad": {"lr": 0.05, "steps": 3},  # 20 steps of 10 forget where they began
    "rlw": {},
    "pcgrad": {},
}
keepers = pytest.mark.parametrize("name", KEEPERS)
each = pytest.mark.parametrize("name", ALL)


def fresh(name: str, **options) -> Weighting:
    return make(name, TASKS, **{**KEEPERS.get(name, {}), **options})


def grams(steps: int, first: int = 0, batch: int = 0) -> list[torch.Tensor]:
    """Another conflicting problem at each step, always the same ones."""
    out = []
    for step in range(first, first + steps):
        rng = np.random.default_rng(step)
        jacs = [family(rng, "stationary", TASKS, TASKS + 3) for _ in range(max(batch, 1))]
        g = np.stack([oracles.gram(j) for j in jacs])
        out.append(torch.from_numpy(g if batch else g[0]))
    return out


def run(weighting: Weighting, steps: int, first: int = 0, batch: int = 0) -> list[torch.Tensor]:
    return [weighting(g) for g in grams(steps, first, batch)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@keepers
def test_the_state_matters(name):
    """Otherwise the tests below would pass for a method that keeps nothing."""
    weighting = fresh(name)
    run(weighting, 2)
    assert not same(run(weighting, 2), run(fresh(name), 2))


@keepers
@pytest.mark.parametrize("before", [0, 1, 2, 5])
@pytest.mark.parametrize("batch", [0, 2])
def test_resumes_to_the_bit(name, before, batch):
    weighting = fresh(name)
    run(weighting, before, batch=batch)
    stream = io.BytesIO()
    torch.save(weighting.state_dict(), stream)
    expected = run(weighting, 7, before, batch)
    stream.seek(0)
    resumed = fresh(name, **({"seed": 99} if name in RANDOM else {}))
    run(resumed, 2, first=50, batch=batch)  # whatever it had is gone
    resumed.load_state_dict(torch.load(stream, weights_only=True))
    assert same(expected, run(resumed, 7, before, batch))


@keepers
def test_a_saved_state_is_a_snapshot(name):
    weighting = fresh(name)
    run(weighting, 2)
    state = weighting.state_dict()
    expected = run(weighting, 3, 2)
    for _ in range(2):  # the state is not used up
        weighting.load_state_dict(state)
        assert same(expected, run(weighting, 3, 2))


@keepers
def test_reset(name):
    weighting = fresh(name)
    first = run(weighting, 4)
    weighting.reset()
    assert same(first, run(weighting, 4))


@keepers
def test_twin(name):
    """Its own state and stream: what the one does, the other does not see."""
    weighting, control = fresh(name), fresh(name)
    run(weighting, 2), run(control, 2)
    twin = weighting.twin()
    assert type(twin) is type(weighting)
    mine, other = [], []
    for g in grams(4, 2):
        mine.append(weighting(g))
        other.append(twin(g))
    assert same(mine, run(control, 4, 2))
    if name in ("pcgrad", "rlw"):
        assert not any(torch.equal(x, y) for x, y in zip(mine, other))
    elif name != "gradvac":  # no stream: a twin starts as a fresh one
        assert same(other, run(fresh(name), 4, 2))


@each
def test_copies_and_pickles(name):
    weighting = fresh(name)
    run(weighting, 3)
    copies = [copy.deepcopy(weighting), pickle.loads(pickle.dumps(weighting))]
    expected = run(weighting, 3, 3)
    for other in copies:
        assert same(expected, run(other, 3, 3))


@pytest.mark.parametrize("name", KEEPERS)
@pytest.mark.parametrize("wrong", [
    {}, {"nonsense": torch.ones(2)}, "entries", "types", "shapes",
])  # fmt: skip
def test_a_wrong_state_is_refused_and_nothing_is_taken_up(name, wrong):
    weighting = fresh(name)
    run(weighting, 2)
    state = weighting.state_dict()
    if wrong == "entries":
        wrong = {**state, "more": torch.zeros(1)}
    elif wrong == "types":
        wrong = {k: "text" for k in state}
    elif wrong == "shapes":
        wrong = {k: torch.zeros(1, 1, 1, 1, 1) for k in state}
    with pytest.raises((ValueError, TypeError, KeyError)):
        weighting.load_state_dict(wrong)
    expected = fresh(name)
    run(expected, 2)
    assert same(run(weighting, 3, 2), run(expected, 3, 2))


@pytest.mark.parametrize("name", STATEFUL)
def test_the_state_of_another_shape(name):
    """Loaded for 4 tasks, used on 3: an error that names the way out."""
    weighting, other = fresh(name), fresh(name)
    run(weighting, 2)
    other.load_state_dict(weighting.state_dict())
    with pytest.raises(ValueError, match=r"reset\(\)"):
        other(torch.eye(3, dtype=torch.float64))
    other.reset()
    other(torch.eye(3, dtype=torch.float64))


def test_cr_mogm_keeps_the_state_of_what_it_wraps():
    """A wrapped method's own state is saved, resumed and reset with it."""

    def wrapped(seed: int = 0) -> Weighting:
        return make("cr_mogm", weighting=make("pcgrad", seed=seed))

    weighting, resumed = wrapped(), wrapped(seed=9)
    run(weighting, 3)
    stream = io.BytesIO()
    torch.save(weighting.state_dict(), stream)
    stream.seek(0)
    resumed.load_state_dict(torch.load(stream, weights_only=True))
    assert same(run(weighting, 3, 3), run(resumed, 3, 3))
    first = run(wrapped(), 3)
    weighting.reset()
    assert same(first, run(weighting, 3))
    g = grams(1)[0]
    assert not torch.equal(weighting.twin()(g), first[0])  # another stream


def test_nash_reuses_its_weights():
    weighting = fresh("nash_mtl", max_norm=None)
    every = run(fresh("nash_mtl", update_every=1, max_norm=None), 7)
    got = run(weighting, 7)
    for step, w in enumerate(got):
        assert torch.equal(w, every[step - step % 3]), step
    clipped = fresh("nash_mtl", max_norm=0.5)
    for g in grams(5):  # the norm is of the present gradients, at every call
        w = clipped(g)
        assert float(w @ g @ w) <= 0.25 * (1 + 1e-9)


def test_a_state_moves_with_the_gram(device):
    for name in KEEPERS:
        weighting, other = fresh(name), fresh(name)
        run(weighting, 1)
        other.load_state_dict(weighting.state_dict())
        g = grams(1, 1)[0]
        w, v = weighting(g), other(g.to(device))
        assert v.device.type == device
        torch.testing.assert_close(w, v.cpu(), rtol=1e-9, atol=1e-12)


def test_float32_grams_do_not_change_the_state_s_dtype():
    for name in STATEFUL:
        weighting = fresh(name)
        run(weighting, 1)
        weighting(grams(1)[0].float())
        for value in weighting.state_dict().values():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                assert value.dtype == torch.float64


# ---- torch.compile ---------------------------------------------------------------------------


def check_compiled(weighting: Weighting, eager: Weighting, given: list[torch.Tensor]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda g: weighting(g), fullgraph=True, backend="aot_eager")
    for g in given:  # the state and the stream advance inside the graph too
        torch.testing.assert_close(compiled(g), eager(g), rtol=1e-12, atol=0)


@each
def test_compiles_in_one_graph(name):
    given = grams(2)
    if name in CROSS:
        given = [g + torch.triu(g) for g in given]
    check_compiled(fresh(name), fresh(name), given)


@pytest.mark.parametrize("name", ["fairgrad", "pcd", "pcgrad"])
def test_compiles_with_a_batch_and_scaling(name):
    options = {"scaling": "sum_to_tasks", "max_norm": 0.5}
    check_compiled(fresh(name, **options), fresh(name, **options), grams(2, batch=2))


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_compiles_for_other_task_counts(tasks, rng):
    for name in ("cagrad", "rlw"):
        given = [torch.from_numpy(oracles.gram(family(rng, "iid", tasks, 30)))]
        check_compiled(make(name, tasks), make(name, tasks), given)


# ---- tasks that come and go ------------------------------------------------------------------


def test_nash_does_not_keep_a_task_out(rng):
    """A task without a gradient at a solve gets its weight as soon as it has one."""
    jac = torch.from_numpy(rng.standard_normal((3, 9)))
    gram = jac @ jac.mT
    bad = gram.clone()
    bad[1], bad[:, 1] = torch.nan, torch.nan
    for first in (bad, torch.zeros_like(gram)):
        weighting, fresh = make("nash_mtl", 3, update_every=5), make("nash_mtl", 3)
        weighting(first)
        torch.testing.assert_close(weighting(gram), fresh(gram), rtol=1e-12, atol=0)
        assert weighting.last_status().ok
        torch.testing.assert_close(weighting(gram), fresh(gram), rtol=1e-12, atol=0)  # kept


def test_cr_mogm_averages_only_tasks_that_take_part(rng):
    eye = torch.eye(3, dtype=torch.float64)
    without = torch.diag(torch.tensor([1.0, 0, 1], dtype=torch.float64))
    weighting = make("cr_mogm", 3, alpha=0.5)
    assert (weighting(torch.zeros(3, 3, dtype=torch.float64)) == 0).all()
    torch.testing.assert_close(weighting(without), 0.5 * without.diagonal())
    third = 1 / 3
    expected = torch.tensor([0.25 + third / 2, third, 0.25 + third / 2], dtype=torch.float64)
    torch.testing.assert_close(weighting(eye), expected)
    two = make("cr_mogm", 3, weighting=make("sdmgrad", 3))
    two(eye)
    assert two(without)[1] == 0


def test_twins_of_twins_have_streams_of_their_own():
    one = make("pcgrad", seed=5)
    assert len({one.seed, one.twin().seed, one.twin().twin().seed}) == 3
