"""CoopFlat: turns, noise on the other sub-models, and what it must leave alone."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from quadratics import snapshot, untouched
from torch import Tensor, nn

import flatmtl
from flatmtl import CoopFlat, MultiTaskOptimizer
from flatmtl.weighting import Mean, PCGrad


class Coop(nn.Module):
    """A common trunk; a branch a task, each task looking at all branches."""

    def __init__(self, norm: bool = False, dropout: float = 0.0, dtype=torch.float64) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(5, 6), nn.BatchNorm1d(6) if norm else nn.Identity(), nn.Tanh(),
            nn.Dropout(dropout),
        )  # fmt: skip
        self.branches = nn.ModuleList([nn.Linear(6, 4) for _ in range(3)])
        self.heads = nn.ModuleList([nn.Linear(12, 1) for _ in range(3)])
        self.to(dtype)

    def losses(self, x: Tensor) -> list[Tensor]:
        """Sums over the batch."""
        h = self.trunk(x)
        z = torch.cat([branch(h).tanh() for branch in self.branches], 1)
        return [(head(z) - x[:, i : i + 1]).square().sum() for i, head in enumerate(self.heads)]

    def sub_models(self) -> list[list[nn.Parameter]]:
        return [
            [*branch.parameters(), *head.parameters()]
            for branch, head in zip(self.branches, self.heads)
        ]


def wrap(net: Coop, lr=0.05, base=torch.optim.SGD, scheme=None, model=True, **options):
    arguments = {k: options.pop(k) for k in ("bound", "samples", "steps", "seed") if k in options}
    sharpness = CoopFlat(net.sub_models() if scheme is None else scheme, **arguments)
    return MultiTaskOptimizer(
        base(net.parameters(), lr=lr), weighting=Mean(), sharpness=sharpness,
        model=net if model else None, **options,
    )  # fmt: skip


def make(rng, **options) -> tuple[Coop, Tensor]:
    return Coop(**options), torch.randn(12, 5, dtype=options.get("dtype", torch.float64))


def flat(params) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in params])


# ---- turns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("none", [dict(bound=0.0), dict(samples=0)], ids=["bound", "samples"])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_noise_it_is_alternating_descent(none, steps, dtype, rng):
    """Bit for bit the loop that one would write: a turn, one backward, the others without gradient."""
    net, x = make(rng, dtype=dtype)
    twin = copy.deepcopy(net)
    opt = wrap(net, base=torch.optim.Adam, steps=steps, **none)
    plain = torch.optim.Adam(twin.parameters(), lr=0.05)
    for k in range(7):
        losses = opt.step(lambda: net.losses(x))
        expected = twin.losses(x)
        plain.zero_grad()
        turn = k // steps % 3
        wanted = [*twin.trunk.parameters(), *twin.sub_models()[turn]]
        for p, g in zip(wanted, torch.autograd.grad(expected[turn], wanted)):
            p.grad = g
        plain.step()
        assert torch.equal(torch.stack(losses), torch.stack(expected).detach())
        assert torch.equal(flat(net.parameters()), flat(twin.parameters()))


@pytest.mark.parametrize("samples", [0, 2])
def test_only_the_turns_parameters_move(samples, rng):
    net, x = make(rng)
    opt = wrap(net, samples=samples, base=torch.optim.Adam)
    for k in range(6):
        before = [snapshot(params) for params in net.sub_models()]
        trunk = flat(net.trunk.parameters())
        opt.step(lambda: net.losses(x))
        for task, params in enumerate(net.sub_models()):
            assert untouched(params, before[task]) == (task != k % 3)
            assert all((p.grad is None) == (task != k % 3) for p in params)
        assert not torch.equal(flat(net.trunk.parameters()), trunk)


def test_by_name_in_any_order(rng):
    """A mapping is by the tasks' names, whatever the order; a sequence by the losses' order."""
    net, x = make(rng)
    twin = copy.deepcopy(net)

    def named(n):
        return lambda: dict(zip("abc", n.losses(x)))

    parts = dict(zip("abc", twin.sub_models()))
    first = wrap(net)
    second = wrap(twin, scheme={name: parts[name] for name in "cab"})
    for _ in range(4):
        first.step(named(net))
        second.step(named(twin))
    assert torch.equal(flat(net.parameters()), flat(twin.parameters()))


def test_everything_in_a_sub_model_and_one_task(rng):
    """No common parameters; and a single task, without others to be disturbed."""
    a, b = (nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(2))
    opt = MultiTaskOptimizer(
        torch.optim.SGD([a, b], lr=0.1), weighting=Mean(), sharpness=CoopFlat([[a], [b]], 0.1)
    )
    opt.step(lambda: [(a * b).sum(), (a - b).sum()])
    assert b.grad is None
    assert (a.grad - b).abs().max() <= 0.1
    alone = MultiTaskOptimizer(
        torch.optim.SGD([a, b], lr=0.1), weighting=Mean(), sharpness=CoopFlat([[a]], 0.1)
    )
    for _ in range(2):
        state = copy.deepcopy(alone.state_dict())
        at = torch.cat([b.detach().clone(), a.detach().clone()])
        alone.backward(lambda: [(a * b).sum()])
        assert torch.equal(torch.cat([a.grad, b.grad]), at)
        alone.step()
        alone.load_state_dict(state)


def test_a_turn_whose_task_is_missing_moves_nothing(rng):
    net, x = make(rng)
    opt = wrap(net)
    before = snapshot(list(net.parameters()))
    opt.step(lambda: [None, *net.losses(x)[1:]])
    assert untouched(list(net.parameters()), before)
    assert all(p.grad is None for p in net.parameters())
    opt.step(lambda: net.losses(x))  # it is the next one's turn
    assert net.heads[1].weight.grad is not None


def test_what_a_loss_does_not_reach(rng):
    """It has no gradient, so that the base optimizer leaves it alone (weight decay and all)."""
    a, b, unused = (nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(3))
    base = torch.optim.AdamW([a, b, unused], lr=0.1, weight_decay=0.1)
    opt = MultiTaskOptimizer(base, weighting=Mean(), sharpness=CoopFlat([[a], [b]]))
    before = unused.detach().clone()
    opt.step(lambda: [(a * b).sum(), (a - b).square().sum()])
    assert torch.equal(unused, before)
    assert unused.grad is None


# ---- the noise -----------------------------------------------------------------------------------


class Pair:
    """L_i = 0.5 ||A (x_0, x_1) - b||^2 + u(x_i) ||x_other||^2, its Hessian in the other known."""

    def __init__(self, rng) -> None:
        self.x = [nn.Parameter(torch.from_numpy(rng.standard_normal(4))) for _ in range(2)]
        self.a = torch.from_numpy(rng.standard_normal((6, 8)))
        self.b = torch.from_numpy(rng.standard_normal(6))
        self.seen: list[float] = []

    def losses(self, tasks=None):
        plain = 0.5 * (self.a @ torch.cat(self.x) - self.b).square().sum()
        both = [plain + self.x[i].sum() * self.x[1 - i].square().sum() for i in range(2)]
        if tasks is None:
            return both
        self.seen.append(float(both[tasks[0]].detach()))
        return [both[t] for t in tasks]


def test_loss_and_gradient_under_noise(rng):
    """E L = L + (b^2/6) tr(H_other), E grad = grad + (b^2/6) grad tr(H_other)."""
    problem = Pair(rng)
    bound, samples = 0.7, 120
    opt = MultiTaskOptimizer(
        torch.optim.SGD(problem.x, lr=1.0), weighting=Mean(),
        sharpness=CoopFlat([[p] for p in problem.x], bound, samples, seed=int(rng.integers(1 << 30))),
    )  # fmt: skip
    means = []
    clean = problem.losses()[0]
    grad = torch.autograd.grad(clean, problem.x[0])[0]
    hessian = (problem.a[:, 4:].square().sum() + 8 * problem.x[0].sum()).detach()
    for _ in range(30):
        opt.backward(problem.losses)
        means.append(problem.x[0].grad.clone())
        opt.zero_grad()
        # the same state, other noise: as if the steps had been made
        opt._engine.directions.begin()
        opt._engine.directions.on(torch.device("cpu")).manual_seed(int(rng.integers(1 << 30)))
        opt._engine.directions.begin()
    losses = np.array(problem.seen)
    assert len(losses) == 30 * samples

    def close(values, wanted):
        error = values.std(0, ddof=1) / np.sqrt(len(values))
        assert (np.abs(values.mean(0) - wanted) <= 6 * error).all(), (values.mean(0), wanted, error)

    close(losses, float(clean.detach() + bound**2 / 6 * hessian))
    close(torch.stack(means).numpy(), (grad + bound**2 / 6 * 8).numpy())
    # and the shift is seen at all
    shift = np.abs(torch.stack(means).numpy().mean(0) - grad.numpy())
    assert (shift / torch.stack(means).numpy().std(0)).max() > 5 / np.sqrt(30)


def test_where_the_noise_goes(rng):
    """Uniform within the bound, on the other sub-models alone, new at every draw, not kept."""
    net, x = make(rng)
    clean = [p.detach().clone() for p in net.parameters()]
    mine = {id(p) for p in [*net.trunk.parameters(), *net.sub_models()[0]]}
    draws = []

    def closure(tasks=None):
        if tasks is not None:
            assert tasks == [0]
            draws.append([(p - q).detach().clone() for p, q in zip(net.parameters(), clean)])
        return net.losses(x) if tasks is None else [net.losses(x)[t] for t in tasks]

    random = torch.get_rng_state()
    opt = wrap(net, bound=0.25, samples=40)
    before = snapshot(list(net.parameters()))
    opt.backward(closure)
    assert untouched(list(net.parameters()), before)
    assert torch.equal(torch.get_rng_state(), random)
    for k, p in enumerate(net.parameters()):
        if id(p) in mine:
            assert all((draw[k] == 0).all() for draw in draws)
    noise = torch.stack([
        torch.cat([d.reshape(-1) for d, p in zip(draw, net.parameters()) if id(p) not in mine])
        for draw in draws
    ])  # fmt: skip
    assert noise.abs().max() <= 0.25 * (1 + 1e-12)
    assert noise.abs().max() > 0.24
    count = noise.numel()
    assert abs(noise.mean()) <= 6 * 0.25 / np.sqrt(3 * count)
    assert abs(noise.square().mean() / (0.25**2 / 3) - 1) <= 6 * np.sqrt(4 / 5 / count)
    correlation = (noise[1:] * noise[:-1]).mean() / (0.25**2 / 3)
    assert abs(correlation) <= 6 / np.sqrt(count)
    blocks = [noise[0, :28], noise[0, 41:69]]  # the two other branches, as their layers lie
    assert not torch.allclose(*blocks)


def test_the_mean_over_draws(rng):
    """The gradient is the mean of those at the points that were seen."""
    net, x = make(rng)
    twin = copy.deepcopy(net)
    found = []

    def closure(tasks=None):
        if tasks is not None:
            twin.load_state_dict(net.state_dict())
            params = [*twin.trunk.parameters(), *twin.sub_models()[0]]
            found.append(torch.autograd.grad(twin.losses(x)[0], params))
        return net.losses(x)

    opt = wrap(net, bound=0.3, samples=3)
    opt.backward(closure)
    params = [*net.trunk.parameters(), *net.sub_models()[0]]
    for p, grads in zip(params, zip(*found, strict=True)):
        torch.testing.assert_close(p.grad, sum(grads) / 3, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("samples", [0, 2])
def test_micro_batches_see_the_same_noise(samples, rng):
    net, x = make(rng)
    twin = copy.deepcopy(net)
    first, second = wrap(net, samples=samples, bound=0.3), wrap(twin, samples=samples, bound=0.3)
    for _ in range(4):
        first.step([lambda: net.losses(x[:4]), lambda: net.losses(x[4:])])
        second.step(lambda: twin.losses(x))
    torch.testing.assert_close(
        flat(net.parameters()), flat(twin.parameters()), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype, rng):
    net, x = make(rng, dtype=dtype)
    opt = wrap(net, bound=0.1)
    before = snapshot(list(net.parameters()))
    opt.backward(lambda: net.losses(x))
    assert untouched(list(net.parameters()), before)
    assert net.heads[0].weight.grad.dtype == dtype
    assert net.heads[0].weight.grad.isfinite().all()


def test_sub_models_of_different_dtypes(rng):
    a = nn.Parameter(torch.randn(3, dtype=torch.float64))
    b = nn.Parameter(torch.randn(3, dtype=torch.float32))
    opt = MultiTaskOptimizer(
        torch.optim.SGD([a, b], lr=0.1), weighting=Mean(), sharpness=CoopFlat([[a], [b]], 0.1)
    )
    for _ in range(2):
        opt.step(lambda: [(a * b).square().sum(), (a - b).square().sum()])
    assert a.isfinite().all()
    assert b.isfinite().all()


# ---- states and failures -------------------------------------------------------------------------


def test_batchnorm_keeps_the_clean_statistics(rng):
    net, x = make(rng, norm=True)
    once = copy.deepcopy(net)
    once.losses(x)
    wrap(net).step(lambda: net.losses(x))
    for (name, b), c in zip(net.named_buffers(), once.buffers()):
        assert torch.equal(b, c), name
    other, _ = make(rng, norm=True)
    with pytest.warns(UserWarning, match="running statistics"):
        wrap(other, model=False).step(lambda: other.losses(x))


def test_dropout_with_replay(rng):
    """Without noise to speak of, two masks that are the same give one gradient."""
    net, x = make(rng, dropout=0.5)
    twin = copy.deepcopy(net)
    random = torch.get_rng_state()
    opt = wrap(net, bound=1e-13, replay_rng=True)
    opt.step(lambda: net.losses(x))
    after = torch.get_rng_state()
    torch.set_rng_state(random)
    wrap(twin, samples=0).step(lambda: twin.losses(x))
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(
        flat(net.parameters()), flat(twin.parameters()), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("fails", [0, 1, 2])
def test_a_failing_closure_changes_nothing(fails, rng):
    net, x = make(rng, norm=True, dropout=0.2)
    twin = copy.deepcopy(net)
    opt, other = (wrap(n, base=torch.optim.Adam) for n in (net, twin))
    random = torch.get_rng_state()
    opt.step(lambda: net.losses(x))
    after = torch.get_rng_state()
    torch.set_rng_state(random)
    other.step(lambda: twin.losses(x))
    calls = []

    def closure():
        losses = net.losses(x)
        calls.append(1)
        if len(calls) > fails:
            raise ArithmeticError("boom")
        return losses

    tensors = [*net.parameters(), *net.buffers()]
    before = snapshot(tensors)
    with pytest.raises(ArithmeticError):
        opt.step(closure)
    assert untouched(tensors, before)
    assert torch.equal(torch.get_rng_state(), after)
    for _ in range(2):  # the turn and the noise are those that were due
        torch.set_rng_state(after)
        opt.step(lambda: net.losses(x))
        torch.set_rng_state(after)
        other.step(lambda: twin.losses(x))
    assert torch.equal(flat(net.parameters()), flat(twin.parameters()))


@pytest.mark.parametrize("how", ["state", "pickle", "deepcopy"])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_run_resumes_bit_for_bit(how, at, rng):
    """Turn and noise are in the state."""
    net, x = make(rng)
    opt = wrap(net, steps=2, seed=3, base=torch.optim.Adam)
    for _ in range(at):
        opt.step(lambda: net.losses(x))
    if how == "state":
        file = io.BytesIO()
        torch.save((net.state_dict(), opt.state_dict()), file)
        file.seek(0)
        model, state = torch.load(file, weights_only=False)
        other = Coop()
        again = wrap(other, steps=2, seed=3, base=torch.optim.Adam)
        other.load_state_dict(model)
        again.load_state_dict(state)
    elif how == "pickle":
        other, again = pickle.loads(pickle.dumps((net, opt)))
    else:
        other, again = copy.deepcopy((net, opt))
    for _ in range(5):
        opt.step(lambda: net.losses(x))
        again.step(lambda: other.losses(x))
    assert torch.equal(flat(net.parameters()), flat(other.parameters()))


def test_seeds(rng):
    net, x = make(rng)
    ends = []
    for seed in (0, 0, 1):
        twin = copy.deepcopy(net)
        opt = wrap(twin, seed=seed)
        opt.step(lambda: twin.losses(x))
        ends.append(flat(twin.parameters()))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_parameters_that_come_and_go(rng):
    """Added to the optimizer later they are common; frozen ones stay, and get no noise."""
    net, x = make(rng)
    extra = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt = wrap(net)
    closure = lambda: [loss + (extra - 1).square().sum() for loss in net.losses(x)]  # noqa: E731
    opt.step(closure)
    opt.add_param_group({"params": [extra]})
    opt.step(closure)
    assert extra.grad is not None
    net.branches[0].requires_grad_(False)
    frozen = snapshot(list(net.branches[0].parameters()))

    def still():
        assert untouched(list(net.branches[0].parameters()), frozen)
        return closure()

    for _ in range(4):
        opt.step(still)
    assert (extra - 0).abs().item() > 0


@pytest.mark.parametrize("nonfinite", ["raise", "mask", "skip"])
@pytest.mark.parametrize("samples", [0, 2])
def test_what_is_not_finite(nonfinite, samples, rng):
    """Of the task whose turn it is; another's does not matter."""
    net, x = make(rng)
    opt = wrap(net, samples=samples, nonfinite=nonfinite)

    def bad(task):
        return lambda: [
            loss * (torch.nan if i == task else 1) for i, loss in enumerate(net.losses(x))
        ]

    opt.step(bad(1))
    assert opt.last_status()["finite"] == {0: True, 1: True, 2: True}
    assert opt._engine.counts  # turns are counted on the host, also with a fused optimizer on CUDA
    before = snapshot(list(net.parameters()))
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match="1"):
            opt.step(bad(1))
    else:
        opt.step(bad(1))
        assert opt.last_status()["finite"] == {0: True, 1: False, 2: True}
    assert untouched(list(net.parameters()), before)
    opt.step(lambda: net.losses(x))  # a step that was not made is no turn
    assert (net.heads[2 if nonfinite == "mask" else 1].weight.grad is not None) is True


@pytest.mark.parametrize("samples", [0, 2])
def test_with_a_grad_scaler(samples, rng):
    net, x = make(rng, norm=True)
    twin = copy.deepcopy(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    first, second = wrap(net, samples=samples), wrap(twin, samples=samples)
    for _ in range(4):
        first.backward(lambda: net.losses(x), scaler=scaler)
        scaler.step(first)
        scaler.update()
        second.step(lambda: twin.losses(x))
        assert torch.equal(flat(net.parameters()), flat(twin.parameters()))
    tensors = [*net.parameters(), *net.buffers()]
    before = snapshot(tensors)
    first.backward(lambda: [loss * torch.inf for loss in net.losses(x)], scaler=scaler)
    scaler.step(first)
    scaler.update()
    assert untouched(tensors, before)
    first.backward(lambda: net.losses(x), scaler=scaler)  # the same turn, the same noise
    scaler.step(first)
    second.step(lambda: twin.losses(x))
    assert torch.equal(flat(net.parameters()), flat(twin.parameters()))


def test_history(rng):
    """The rise of the loss of the turn's task under the noise; the others have none."""
    net, x = make(rng)
    opt = wrap(net, history=4, bound=0.5, samples=3)
    seen = []

    def closure(tasks=None):
        losses = net.losses(x)
        seen.append([float(v.detach()) for v in losses])
        return losses if tasks is None else [losses[t] for t in tasks]

    opt.step(closure)
    found = opt.history.arrays()
    np.testing.assert_allclose(found["losses"][0], seen[0])
    rise = np.mean([s[0] for s in seen[1:]]) - seen[0][0]
    np.testing.assert_allclose(found["sharpness"][0], [rise, np.nan, np.nan], rtol=1e-9, atol=1e-9)
    assert np.isnan(found["weights"]).all()


def test_passes(rng, monkeypatch):
    """1 forward and as many of both as there are draws; without noise 1 and 1."""
    net, x = make(rng)
    asked, count = [], []
    plain = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *a, **k: (count.append(1), plain(*a, **k))[1]
    )

    def closure(tasks=None):
        asked.append(tasks)
        return net.losses(x) if tasks is None else [net.losses(x)[t] for t in tasks]

    for samples, calls, backwards in ((3, [None, [0], [0], [0]], 3), (0, [None], 1)):
        asked.clear()
        count.clear()
        wrap(net, samples=samples).step(closure)
        assert (asked, len(count)) == (calls, backwards)


def test_it_trains(rng):
    net, x = make(rng)
    opt = wrap(net, lr=0.002, bound=0.05)
    first = torch.stack(opt.step(lambda: net.losses(x))).sum()
    for _ in range(150):
        last = opt.step(lambda: net.losses(x))
    assert torch.stack(last).sum() < 0.5 * first


# ---- what it does not take -----------------------------------------------------------------------


def params(*sizes) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(n)) for n in sizes]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (dict(bound=-0.1), ValueError, "bound must be finite and at least 0"),
        (dict(bound=float("inf")), ValueError, "bound must be finite"),
        (dict(bound="a"), TypeError, "bound must be a number"),
        (dict(samples=-1), ValueError, "samples must be at least 0"),
        (dict(samples=1.5), TypeError, "samples must be a whole number"),
        (dict(steps=0), ValueError, "steps must be at least 1"),
        (dict(seed=-1), ValueError, "seed must be at least 0"),
    ],
)
def test_bad_numbers(arguments, error, text):
    with pytest.raises(error, match=text):
        CoopFlat([params(2)], **arguments)


def test_bad_sub_models():
    a, b = params(2, 3)
    for given, error, text in [
        (3, TypeError, "sub_models must be a sequence, or a mapping"),
        ("ab", TypeError, "sub_models must be a sequence, or a mapping"),
        ([], ValueError, "at least one sub-model"),
        ([a, b], TypeError, r"sub_models\[0\] must be an iterable of parameters, got Parameter"),
        ([[a], 3], TypeError, r"sub_models\[1\] must be an iterable of parameters, got int"),
        ([[a], ["x"]], TypeError, r"sub_models\[1\] must hold parameters, got str"),
        ([[a], []], ValueError, r"sub_models\[1\] must hold at least one parameter"),
        ([[a], [b, a]], ValueError, r"every parameter once, got one of shape \[2\]"),
        ({"x": [a], "y": [a]}, ValueError, r"in sub_models\['x'\] and sub_models\['y'\]"),
        ([[a, a]], ValueError, "every parameter once"),
    ]:
        with pytest.raises(error, match=text):
            CoopFlat(given)
    assert "Parameter" not in repr(CoopFlat([[a]]))


def test_what_it_does_not_go_with(rng):
    net, x = make(rng)
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    scheme = CoopFlat(net.sub_models())

    def refused(text, error=ValueError, sharpness=scheme, weighting=None, **options):
        with pytest.raises(error, match=text):
            MultiTaskOptimizer(base, weighting=weighting or Mean(), sharpness=sharpness, **options)

    refused(
        r"sub_models\[1\] must hold the optimizer's",
        sharpness=CoopFlat([net.sub_models()[0], params(2)]),
    )
    refused(r"weighting must be Mean\(\) with CoopFlat, got PCGrad", weighting=PCGrad())
    refused("weights_every must be 1 with CoopFlat", weights_every=2)
    refused("jacobian must be 'sequential' with CoopFlat", jacobian="batched")
    refused("jacobian must not be Representation", jacobian=flatmtl.Representation(net.trunk))
    refused("shared must be None with CoopFlat", shared=list(net.trunk.parameters()))
    refused("row_dtype must be None with CoopFlat", row_dtype=torch.bfloat16)
    opt = MultiTaskOptimizer(base, weighting=Mean(), sharpness=scheme)
    with pytest.raises(ValueError, match="must take every task's gradient"):
        flatmtl.AffinityProbe(opt, mode="first_order")
    with pytest.raises(ValueError, match="losses must be a closure"):
        opt.backward(net.losses(x))
    with pytest.raises(ValueError, match=r"one for each of tasks \[0, 1\], got 3"):
        opt.step(lambda: net.losses(x)[:2])
    opt.backward(lambda: net.losses(x))
    with pytest.raises(RuntimeError, match="all micro-batches"):
        opt.backward(lambda: net.losses(x))
    named = wrap(net, scheme=dict(zip("abc", net.sub_models())))
    with pytest.raises(ValueError, match=r"tasks \['a', 'b', 'd'\], got \['a', 'b', 'c'\]"):
        named.step(lambda: dict(zip("abd", net.losses(x))))
