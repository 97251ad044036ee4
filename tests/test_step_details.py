"""Lines of a step that only show themselves in a corner: under a scale, after a skip, beside a NaN."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from quadratics import Problem, snapshot, untouched, values
from torch import Tensor, nn
from torch.nn import Parameter

from flatmtl import SAM, MultiTaskOptimizer
from flatmtl.weighting import FairGrad, GradVac, Mean, NashMTL, PCGrad, Weighting

NAN = float("nan")


def wrap(problem: Problem, weighting: Weighting, lr: float = 1e-4, **options) -> MultiTaskOptimizer:
    base = torch.optim.SGD(problem.parameters(), lr=lr)
    return MultiTaskOptimizer(base, weighting=weighting, **options)


def scaler(rng: np.random.Generator) -> torch.amp.GradScaler:
    """Of a power of two, so that scaling rounds nothing."""
    return torch.amp.GradScaler("cpu", init_scale=2.0 ** int(rng.integers(6, 14)))


def times(losses: list[Tensor], task: int, factor: float) -> list[Tensor]:
    return [factor * loss if i == task else loss for i, loss in enumerate(losses)]


def kept_weights(opt: MultiTaskOptimizer) -> dict[str, Tensor]:
    return opt.state_dict()["flatmtl"]["engine"]["weights"]


@pytest.mark.parametrize("weighting", [NashMTL, FairGrad])
@pytest.mark.parametrize("aggregate", ["second", "each"])
def test_pairs_are_weighted_as_if_there_were_no_scale(weighting, aggregate, rng):
    """The pair A(g), A(f), and the pairs g_i, f_i: these weightings are not homogeneous."""
    problem = Problem(rng, 3, dtype=torch.float32)
    other = copy.deepcopy(problem)
    sharpness, amp = SAM(0.1, aggregate=aggregate), scaler(rng)
    wrap(problem, weighting(), sharpness=sharpness).backward(problem.losses, scaler=amp)
    wrap(other, weighting(), sharpness=sharpness).backward(other.losses)
    found, expected = problem.shared_grad() / amp.get_scale(), other.shared_grad()
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("weighting", [FairGrad, NashMTL, Mean])
@pytest.mark.parametrize("where", ["clean", "perturbed"])
@pytest.mark.filterwarnings("ignore:the losses at the perturbed")
def test_a_nan_stays_in_its_own_pair(where, weighting, rng):
    """aggregate="each": the update and what the solves tell are those of a task without a gradient."""
    problem = Problem(rng, 3)
    other = copy.deepcopy(problem)
    options = dict(sharpness=SAM(0.1, aggregate="each"), nonfinite="mask")
    first, second = wrap(problem, weighting(), **options), wrap(other, weighting(), **options)
    bad = int(rng.integers(3))

    def closure(tasks=None):
        if tasks is None:
            return times(problem.losses(), bad, NAN if where == "clean" else 1.0)
        return [NAN * x if tasks == [bad] else x for x in problem.losses(tasks)]

    first.backward(closure)
    second.backward(lambda: times(other.losses(), bad, 0.0))
    np.testing.assert_allclose(problem.shared_grad(), other.shared_grad(), rtol=1e-9, atol=1e-12)
    assert np.abs(problem.shared_grad()).sum() > 0
    assert not problem.heads[bad].grad.any()
    mine, theirs = first.last_status(), second.last_status()
    assert mine["finite"] == {i: i != bad for i in range(3)}
    for name in ("loss", "flat"):  # without a gradient, not with a NaN
        assert torch.equal(mine[name].bits, theirs[name].bits), name


@pytest.mark.parametrize("sharpness", [None, SAM(0.1)], ids=["plain", "sam"])
@pytest.mark.parametrize("how", ["skip", "scaler"])
def test_a_skipped_solve_leaves_the_kept_weights(how, sharpness, rng):
    problem = Problem(rng, 3, dtype=torch.float32)
    amp = scaler(rng) if how == "scaler" else None
    nonfinite = "raise" if amp else "skip"
    opt = wrap(problem, FairGrad(), sharpness=sharpness, weights_every=2, nonfinite=nonfinite)

    def step(factor: float = 1.0) -> None:
        opt.backward(lambda: times(problem.losses(), 1, factor), scaler=amp)
        if amp is None:
            opt.step()
        else:
            amp.step(opt)
            amp.update()

    step()
    step()
    before = copy.deepcopy(kept_weights(opt))
    params = snapshot(problem.parameters())
    step(NAN)  # would solve
    after = kept_weights(opt)
    assert after.keys() == before.keys() == ({"loss"} if sharpness is None else {"loss", "flat"})
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert untouched(problem.parameters(), params)
    step()
    assert not torch.equal(kept_weights(opt)["loss"], before["loss"])


@pytest.mark.parametrize("sharpness", [None, SAM(0.1)], ids=["plain", "sam"])
def test_a_nan_between_two_solves_stops_the_shared_parameters(sharpness, rng):
    """One backward pass of the weighted loss cannot leave a task out of them: they do not move."""
    problem = Problem(rng, 3)
    opt = wrap(problem, FairGrad(), sharpness=sharpness, weights_every=2, nonfinite="mask")
    opt.step(problem.losses)
    bad = int(rng.integers(3))
    shared, head = snapshot(problem.shared), snapshot([problem.heads[bad]])
    opt.step(lambda: times(problem.losses(), bad, NAN))
    assert untouched(problem.shared, shared)
    assert untouched([problem.heads[bad]], head)
    opt.step(problem.losses)
    assert not untouched(problem.shared, shared)
    assert all(p.isfinite().all() for p in problem.parameters())


@pytest.mark.parametrize("sharpness", [None, SAM(0.1)], ids=["plain", "sam"])
def test_norms_in_the_history_are_without_the_scale(sharpness, rng):
    problem = Problem(rng, 3, dtype=torch.float32)
    opt = wrap(problem, Mean(), sharpness=sharpness, history=2)
    expected = [
        float(sum(g.square().sum() for g in torch.autograd.grad(loss, problem.shared))) ** 0.5
        for loss in problem.losses()
    ]
    amp = scaler(rng)
    opt.backward(problem.losses, scaler=amp)
    amp.step(opt)
    np.testing.assert_allclose(opt.history.arrays()["norms"][0], expected, rtol=1e-4)


@pytest.mark.parametrize("sharpness", [None, SAM(0.1)], ids=["plain", "sam"])
def test_a_missing_task_has_no_weight_and_no_norm(sharpness, rng):
    problem = Problem(rng, 3)
    opt = wrap(problem, Mean(), sharpness=sharpness, history=2)
    opt.step(problem.losses)
    gone = int(rng.integers(3))
    opt.step(lambda: [None if i == gone else x for i, x in enumerate(problem.losses())])
    found = opt.history.arrays()
    names = ["losses", "weights", "norms"] + ["flat_weights", "sharpness"] * bool(sharpness)
    for name in names:
        assert np.isfinite(found[name][0]).all(), name
        assert [k for k in range(3) if np.isnan(found[name][1, k])] == [gone], name


@pytest.mark.parametrize("scaled", [False, True])
def test_a_sharp_step_that_raises_leaves_no_flat_part(scaled, rng):
    """Its place has been the parameters' while they were perturbed."""
    problem = Problem(rng, 3)
    opt = wrap(problem, Mean(), sharpness=SAM(0.1, every=2))
    for _ in range(2):
        opt.step(problem.losses)
    raising = int(rng.integers(3))

    def closure(tasks=None):
        if tasks == [raising]:
            raise KeyError("no data")
        return problem.losses(tasks)

    amp = scaler(rng) if scaled else None
    with pytest.raises(KeyError):
        opt.backward(closure, scaler=amp)
    assert opt.state_dict()["flatmtl"]["engine"]["flat"] == {}
    for group in opt.param_groups:
        group["rho"] = group["rho_task"] = 0.0
    opt.step(problem.losses)  # plain from here on: nothing to add
    other = copy.deepcopy(problem)
    opt.backward(problem.losses)
    sum(x / 3 for x in other.losses()).backward()
    np.testing.assert_allclose(problem.shared_grad(), other.shared_grad(), rtol=1e-9)
    for a, b in zip(problem.head_grads(), other.head_grads()):
        np.testing.assert_allclose(a, 3 * b, rtol=1e-9)


@pytest.mark.parametrize("largest, scale", [(64.0, 1.0), (0.0, 16.0)])
def test_float16_does_not_lose_a_task_of_weight_zero(largest, scale, rng):
    """Between two solves under autocast: its own parameters get their own gradient."""
    trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
    heads = nn.ModuleList([nn.Linear(8, 1), nn.Linear(8, 1)])
    x = torch.from_numpy(rng.standard_normal((16, 6))).float()
    base = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], lr=0.0)
    opt = MultiTaskOptimizer(base, weighting=Mean(), weights_every=9)
    amp = torch.amp.GradScaler("cpu", init_scale=1.0)

    def losses() -> list[Tensor]:
        with torch.autocast("cpu", torch.float16):
            z = trunk(x)
            return [(head(z).float() - 2.0).square().sum() for head in heads]

    opt.backward(losses(), scaler=amp)
    amp.step(opt)
    amp.update(scale)
    opt._engine.weights["loss"].copy_(torch.tensor([largest, 0.0]))
    opt.backward(losses(), scaler=amp)
    amp.unscale_(opt)
    own = list(heads[1].parameters())
    z = trunk(x)
    expected = torch.autograd.grad((heads[1](z) - 2.0).square().sum(), own)
    for param, g in zip(own, expected):
        assert (param.grad - g).norm() <= 0.05 * torch.cat([e.flatten() for e in expected]).norm()


def test_a_negative_weight_next_to_zero_keeps_its_sign(rng):
    """It is raised to the least that goes through a backward pass, and not turned round."""
    shared = Parameter(torch.from_numpy(rng.standard_normal(8)))
    heads = [Parameter(torch.from_numpy(rng.standard_normal(3))) for _ in range(2)]
    slopes = torch.from_numpy(rng.uniform(0.5, 2, (2, 8)) * rng.choice([-1.0, 1.0], (2, 8)))
    slopes[0, :4] = 0  # of these parameters only the second task's gradient is not zero

    def losses() -> list[Tensor]:
        return [s @ shared + head.square().sum() for s, head in zip(slopes, heads)]

    base = torch.optim.SGD([shared, *heads], lr=0.0)
    opt = MultiTaskOptimizer(base, weighting=Mean(), weights_every=9)
    opt.step(losses)
    opt._engine.weights["loss"].copy_(torch.tensor([1.0, -(2.0**-90)]))
    opt.step(losses)
    assert torch.equal(shared.grad[:4].sign(), -slopes[1, :4].sign())
    assert shared.grad[:4].abs().max() < 1e-15
    torch.testing.assert_close(shared.grad[4:], slopes[0, 4:])
    for head in heads:
        torch.testing.assert_close(head.grad, 2 * head.detach())


@pytest.mark.parametrize("exploding", [False, True])
def test_a_rise_is_measured_by_the_first_loss_too(exploding, rng):
    """Near the minimum every radius is many times the clean loss; that alone is no explosion."""
    slopes = rng.uniform(0.5, 2, 2)
    direction = rng.standard_normal(5)
    direction = torch.from_numpy(direction / np.linalg.norm(direction))
    param = Parameter(direction.clone())
    base = torch.optim.SGD([param], lr=0.0)
    opt = MultiTaskOptimizer(base, weighting=Mean(), sharpness=SAM(0.01))

    def losses() -> list[Tensor]:
        return [s * param.square().sum() for s in slopes]  # at distance r: s r^2

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(losses)
    r = 1000**-0.5
    with torch.no_grad():
        param.copy_(r * direction)
    # the loss rises to (r + rho)^2: by 20 times the clean one, or by 20 times the first one
    rise = 20.0 if exploding else 20 * r**2
    opt.param_groups[0]["rho"] = (rise + r**2) ** 0.5 - r
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.step(losses)
    assert ["too large" in str(w.message) for w in caught] == [True] * exploding


@pytest.mark.parametrize(
    "weighting",
    [lambda: GradVac(beta=0.5), lambda: NashMTL(update_every=2), PCGrad],
    ids=["gradvac", "nash", "pcgrad"],
)
def test_a_further_micro_batch_takes_the_weighting_back(weighting, rng):
    """The state before a step is what each of its micro-batches starts from."""
    problem = Problem(rng, 3)
    other = copy.deepcopy(problem)
    first, second = wrap(problem, weighting()), wrap(other, weighting())
    for _ in range(3):
        for share in (0.25, 0.5, 0.25):
            first.backward([share * x for x in problem.losses()])
        first.step()
        second.step(other.losses)
        mine, theirs = (o.state_dict()["flatmtl"]["weighting"] for o in (first, second))
        assert mine.keys() == theirs.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(values(problem.shared), values(other.shared), rtol=1e-9)


@pytest.mark.parametrize("name", ["weighting", "flat_weighting", "outer_weighting"])
def test_a_weighting_is_not_swapped_later(name):
    """The engine holds what it was made with: a new one would be without effect, and say nothing."""
    net = nn.Linear(3, 2)
    opt = MultiTaskOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.1),
        weighting=PCGrad(),
        sharpness=SAM(0.05),
    )
    with pytest.raises(AttributeError, match=name):
        setattr(opt, name, Mean())
    assert isinstance(copy.deepcopy(opt).weighting, PCGrad)
