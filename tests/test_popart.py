"""flatmtl.PopArt: outputs that stay, statistics of the formula, and training at scales far apart."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import flatmtl
from flatmtl import PopArt


def head(rng, outputs: int = 3, width: int = 6, dtype=torch.float64, device="cpu", **options):
    linear = nn.Linear(width, outputs, dtype=dtype, device=device)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(rng.standard_normal((outputs, width))))
        linear.bias.copy_(torch.from_numpy(rng.standard_normal(outputs)))
    return PopArt(linear, **options)


class Oracle:
    """mu <- (1-b) mu + b m, nu <- (1-b) nu + b m2, each divided by 1 - (1-b)^t; for one output."""

    def __init__(self, beta: float) -> None:
        self.beta, self.mu, self.nu, self.t = beta, 0.0, 0.0, 0

    def update(self, y: np.ndarray) -> None:
        y = y[np.isfinite(y)]
        if len(y):
            self.mu = (1 - self.beta) * self.mu + self.beta * y.mean()
            self.nu = (1 - self.beta) * self.nu + self.beta * (y**2).mean()
            self.t += 1

    @property
    def mean(self) -> float:
        return self.mu / (1 - (1 - self.beta) ** self.t)

    @property
    def variance(self) -> float:
        return self.nu / (1 - (1 - self.beta) ** self.t) - self.mean**2


# ---- the output stays ------------------------------------------------------------------------

RESOLUTION = {torch.float64: 2.3e-16, torch.float32: 1.2e-7, torch.bfloat16: 7.9e-3}


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1.0, 1e4, 1e8])
@pytest.mark.parametrize("dtype", list(RESOLUTION), ids=str)
def test_the_output_stays(dtype, scale, rng, device):
    """sigma (W x + b) + mu before and after, computed in float64 from the parameters."""
    popart = head(rng, dtype=dtype, device=device, beta=0.3, least=1e-12, most=1e12)
    x = rng.standard_normal((20, 6))

    def parts():
        w, b = (p.detach().double().cpu().numpy() for p in popart.linear.parameters())
        s, mu = popart.scale.cpu().numpy(), popart.shift.cpu().numpy()
        return s * (x @ w.T + b) + mu, s * (np.abs(x) @ np.abs(w).T + np.abs(b)) + np.abs(mu)

    for k in range(6):
        before, size = parts()
        y = scale * 3.0**k * (rng.standard_normal((16, 3)) + rng.uniform(-2, 2, 3))
        popart.update(torch.from_numpy(y).to(device))
        after, size_after = parts()
        tolerance = (2 * RESOLUTION[dtype] + 2e-15) * np.maximum(size, size_after)  # ours too
        assert (np.abs(after - before) <= tolerance).all()
        assert not np.array_equal(popart.scale.cpu().numpy(), np.ones(3))


def test_the_output_stays_where_the_mean_is_far_away(rng):
    """Targets of 1e8 +- 1e-2: the difference of second moments has no digit left there."""
    popart = head(rng, outputs=1, beta=0.1)
    for _ in range(50):
        popart.update(torch.from_numpy(1e8 + 1e-2 * rng.standard_normal((64, 1))))
    assert popart.scale.item() == pytest.approx(1e-2, rel=0.15)
    assert popart.shift.item() == pytest.approx(1e8, abs=5e-3)
    y = torch.from_numpy(1e8 + 1e-2 * rng.standard_normal((64, 1)))
    torch.testing.assert_close(popart.denormalize(popart.normalize(y)), y, rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", list(RESOLUTION), ids=str)
def test_many_small_moves_do_not_drift(dtype, rng):
    """Each is below the resolution of bfloat16; together they double sigma."""
    popart = head(rng, outputs=1, dtype=dtype, beta=1e-3)
    popart.start(torch.tensor([[-1.0], [1.0]]))
    x = torch.from_numpy(rng.standard_normal((20, 6)))
    before = popart.linear.double().forward(x)
    popart.linear.to(dtype)
    for _ in range(1200):
        popart.update(torch.tensor([[-2.3], [2.3]]))
    assert popart.scale.item() > 1.8
    popart.linear.double()
    after = popart.denormalize(popart(x))
    # at most 1200 moves, and 16 of bfloat16; roundings are of either sign
    moves = 16 if dtype == torch.bfloat16 else 1200
    worst = (after - before).abs().max() / before.abs().max()
    assert worst <= 4 * RESOLUTION[dtype] * math.sqrt(moves)


# ---- the statistics ----------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [3e-4, 0.1, 1.0])
@pytest.mark.parametrize("missing", [False, True])
def test_statistics(beta, missing, rng):
    popart = head(rng, beta=beta)
    scale = 10 ** rng.uniform(-6, 6, 3)
    oracles = [Oracle(beta) for _ in range(3)]
    for step in range(12):
        y = scale * (rng.standard_normal((5, 3)) + 1.0)
        if missing:
            y[rng.random(y.shape) < 0.4] = np.nan
            y[:, step % 3] = np.nan
            y[0, (step + 1) % 3] = np.inf
        popart.update(torch.from_numpy(y))
        for k, oracle in enumerate(oracles):
            oracle.update(y[:, k])
            if oracle.t == 0:
                assert popart.mean[k] == 0
                assert popart.scale[k] == 1
                continue
            assert popart.mean[k].item() == pytest.approx(oracle.mean, abs=1e-10 * scale[k])
            spread = oracle.variance
            assert popart.variance[k].item() == pytest.approx(spread, abs=1e-9 * scale[k] ** 2)
            if spread > 1e-6 * scale[k] ** 2:
                sigma = math.sqrt(spread)
                assert popart.scale[k].item() == pytest.approx(sigma, rel=1e-3)
            assert popart.filled[k].item() == pytest.approx(1 - (1 - beta) ** oracle.t)


def test_the_first_update_is_the_batch(rng):
    popart = head(rng)
    y = rng.standard_normal((8, 3)) * [1e-5, 1.0, 1e5] + [1.0, 2.0, 3.0]
    popart.update(torch.from_numpy(y))
    np.testing.assert_allclose(popart.shift, y.mean(0), rtol=1e-13)
    np.testing.assert_allclose(popart.scale, y.std(0), rtol=1e-9)
    normal = popart.normalize(torch.from_numpy(y)).numpy()
    np.testing.assert_allclose(normal.mean(0), 0, atol=1e-8)
    np.testing.assert_allclose(normal.std(0), 1, rtol=1e-9)


def test_leading_dimensions_are_samples(rng):
    y = torch.from_numpy(rng.standard_normal((2, 4, 5, 3)))
    one, two = head(rng), head(rng)
    one.update(y)
    two.update(y.reshape(-1, 3))
    assert torch.equal(one.mean, two.mean)
    assert torch.equal(one.variance, two.variance)
    three = head(rng)
    three.update(y[0, 0, 0])  # one sample
    assert torch.equal(three.mean, y[0, 0, 0])


def test_start_sets_the_unit_and_leaves_the_head(rng):
    popart = head(rng, beta=0.25)
    weight, bias = (p.detach().clone() for p in popart.linear.parameters())
    y = rng.standard_normal((50, 3)) * 1e3 + 1e5
    y[:, 2] = np.nan
    popart.start(torch.from_numpy(y))
    assert torch.equal(popart.linear.weight, weight)
    assert torch.equal(popart.linear.bias, bias)
    np.testing.assert_allclose(popart.shift[:2], y[:, :2].mean(0), rtol=1e-13)
    np.testing.assert_allclose(popart.scale[:2], y[:, :2].std(0), rtol=1e-9)
    assert popart.scale[2] == 1
    assert popart.shift[2] == 0
    more = rng.standard_normal((7, 3)) * 1e3
    popart.update(torch.from_numpy(more))  # moves by beta from there; the third begins
    expected = 0.75 * y[:, :2].mean(0) + 0.25 * more[:, :2].mean(0)
    np.testing.assert_allclose(popart.mean[:2], expected, rtol=1e-12)
    assert popart.mean[2].item() == pytest.approx(more[:, 2].mean(), rel=1e-12)


def test_sigma_is_clipped(rng):
    popart = head(rng, beta=1.0, least=0.5, most=2.0)
    y = rng.standard_normal((99, 3)) * [1e-3, 1.0, 1e3]
    popart.update(torch.from_numpy(y))
    assert popart.scale[0] == 0.5
    assert popart.scale[1].item() == pytest.approx(y[:, 1].std())
    assert popart.scale[2] == 2.0
    assert popart.variance[2].item() == pytest.approx(y[:, 2].var())


def test_equal_labels_have_no_sigma(rng):
    popart = head(rng, outputs=4, beta=0.1)
    before = popart.linear.weight.detach().clone()
    same = torch.tensor([0.1, 1e8 / 3, -7e-9, math.nan], dtype=torch.float64)
    for _ in range(5):
        popart.update(same.expand(7, 4))
        assert (popart.variance == 0).all()
        assert (popart.scale == 1).all()
    assert torch.equal(popart.linear.weight, before)
    popart.update(torch.from_numpy(rng.standard_normal((7, 4))))
    assert (popart.variance > 0).all()


def test_nothing_is_nothing(rng):
    popart = head(rng)
    popart.update(torch.from_numpy(rng.standard_normal((4, 3))))
    before = copy.deepcopy(popart.state_dict())
    popart.update(torch.full((4, 3), math.nan))
    popart.update(torch.empty(0, 3))
    popart.start(torch.empty(0, 3))
    for name, value in popart.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_normalize_and_denormalize(rng, device):
    popart = head(rng, device=device)
    y = torch.from_numpy(1e4 * rng.standard_normal((9, 3))).to(device)
    y[0, 0] = math.nan
    popart.update(y)
    normal = popart.normalize(y)
    torch.testing.assert_close(normal, (y - popart.shift) / popart.scale, equal_nan=True)
    torch.testing.assert_close(popart.denormalize(normal), y, equal_nan=True)
    for dtype, back in [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ]:
        assert popart.normalize(y.to(dtype)).dtype == back
        assert popart.denormalize(y.to(dtype)).dtype == back
    out = normal.nan_to_num().requires_grad_()
    popart.denormalize(out).sum().backward()
    torch.testing.assert_close(out.grad, popart.scale.expand(9, 3))


# ---- a module ------------------------------------------------------------------------------------


def test_state_dict_resumes_bit_for_bit(rng, tmp_path):
    batches = torch.from_numpy(rng.standard_normal((6, 5, 3)) * 10 ** rng.uniform(-3, 3, 3))
    one = head(rng, dtype=torch.float32, beta=0.01)
    for y in batches[:3]:
        one.update(y)
    torch.save(one.state_dict(), tmp_path / "state")
    two = head(rng, dtype=torch.float32, beta=0.01)
    two.load_state_dict(torch.load(tmp_path / "state"))
    for y in batches[3:]:
        one.update(y)
        two.update(y)
    assert set(one.state_dict()) == {
        "linear.weight", "linear.bias", "mean", "variance", "filled", "shift", "scale",
    }  # fmt: skip
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


def test_statistics_stay_double(rng):
    popart = head(rng)
    y = torch.from_numpy(1e4 + rng.standard_normal((30, 3)))
    popart.update(y)
    mean, scale = popart.mean.clone(), popart.scale.clone()
    model = nn.Sequential(nn.Linear(6, 6), popart)
    model.bfloat16()
    assert popart.linear.weight.dtype == torch.bfloat16
    model.half()
    model.to(torch.float32)
    assert popart.linear.weight.dtype == torch.float32
    for name, value in popart.named_buffers():
        assert value.dtype == torch.float64, name
    assert torch.equal(popart.mean, mean)
    assert torch.equal(popart.scale, scale)
    assert [name for name, _ in popart.named_buffers()] == [
        "mean", "variance", "filled", "shift", "scale",
    ]  # fmt: skip
    twin = copy.deepcopy(popart)
    twin.update(y + 100)
    assert torch.equal(popart.mean, mean)
    assert not torch.equal(twin.mean, mean)


def test_update_between_forward_and_backward_is_an_error(rng):
    popart = head(rng)
    x = torch.from_numpy(rng.standard_normal((4, 6))).requires_grad_()
    loss = popart(x).square().sum()
    popart.update(torch.from_numpy(rng.standard_normal((4, 3))))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_refusals(rng):
    linear = nn.Linear(2, 3)
    for given, error, match in [
        ({"linear": nn.Conv2d(1, 1, 1)}, TypeError, "linear must be a torch.nn.Linear, got Conv2d"),
        ({"linear": nn.Linear(2, 3, bias=False)}, ValueError, "linear must have a bias"),
        ({"beta": 0.0}, ValueError, "beta must be finite, above 0 and at most 1, got 0.0"),
        ({"beta": 1.5}, ValueError, "beta must be"),
        ({"beta": "1"}, TypeError, "beta must be a number, got str"),
        ({"least": 0.0}, ValueError, "least must be finite, above 0"),
        ({"least": 2.0, "most": 1.0}, ValueError, "most must be finite, at least 2.0"),
    ]:
        with pytest.raises(error, match=match):
            PopArt(**{"linear": linear, **given})
    tied = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))
    with pytest.raises(ValueError, match="linear must have a weight that is a parameter"):
        PopArt(tied)
    popart = head(rng)
    for method in (popart.update, popart.start, popart.normalize, popart.denormalize):
        with pytest.raises(ValueError, match=r"must have shape \[..., 3\], .*, got \[4, 1\]"):
            method(torch.zeros(4, 1))
        with pytest.raises(ValueError, match=r"must have shape \[..., 3\]"):
            method(torch.tensor(1.0))
        with pytest.raises(TypeError, match="must be a Tensor, got list"):
            method([1.0, 2.0, 3.0])
        with pytest.raises(TypeError, match="must have one of the dtypes"):
            method(torch.zeros(4, 3, dtype=torch.int64))


# ---- training --------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 16), nn.Tanh())
        self.heads = nn.ModuleList([PopArt(nn.Linear(16, 1), beta=0.02) for _ in range(2)])


def test_update_before_a_sharp_step(rng):
    """The same as a step on a head that was rescaled, and targets normalised, by hand."""
    net = Net().double()
    x = torch.from_numpy(rng.standard_normal((8, 4)))
    y = torch.from_numpy(rng.standard_normal((2, 8, 1)) * [[[1.0]], [[1e4]]] + 5.0)
    by_hand = copy.deepcopy(net)

    def sharp(model):
        return flatmtl.MultiTaskOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.05),
            weighting=flatmtl.weighting.PCGrad(reduction="mean", seed=1),
            sharpness=flatmtl.SAM(rho=0.1),
            model=model,
        )

    for popart, target in zip(net.heads, y):
        popart.update(target)
    statistics = {n: b.clone() for n, b in net.named_buffers()}
    sharp(net).step(
        lambda: [(h(net.trunk(x)) - h.normalize(t)).square().mean() for h, t in zip(net.heads, y)]
    )
    for name, value in net.named_buffers():
        assert torch.equal(value, statistics[name]), name

    targets, heads = [], []
    for popart, target in zip(by_hand.heads, y):
        sigma, mu = target.std(correction=0), target.mean()
        with torch.no_grad():
            popart.linear.weight /= sigma
            popart.linear.bias.copy_((popart.linear.bias - mu) / sigma)
        targets.append((target - mu) / sigma)
        heads.append(popart.linear)
    sharp(by_hand).step(
        lambda: [(h(by_hand.trunk(x)) - t).square().mean() for h, t in zip(heads, targets)]
    )
    for a, b in zip(net.parameters(), by_hand.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("sharpness", [None, flatmtl.SAM(rho=0.02)], ids=["plain", "sharp"])
def test_scales_far_apart_train_alike(sharpness, rng):
    """Two regressions in units 1 and 1e4: the same relative error with PopArt, and not without."""
    a = torch.from_numpy(rng.standard_normal((2, 4))).float()
    a /= a.norm(dim=1, keepdim=True)
    scale = torch.tensor([1.0, 1e4])

    def batch(n):
        x = torch.randn(n, 4)
        return x, (x @ a.T + torch.tensor([0.5, -0.5])) * scale  # [n, 2]

    def trained(steps: int, normalised: bool) -> torch.Tensor:
        net = Net()
        optimizer = flatmtl.MultiTaskOptimizer(
            torch.optim.Adam(net.parameters(), lr=0.03),
            weighting=flatmtl.weighting.Mean(),
            sharpness=sharpness,
            model=net,
        )
        for _ in range(steps):
            x, y = batch(64)
            targets = list(y.split(1, dim=1))
            if normalised:
                for popart, target in zip(net.heads, targets):
                    popart.update(target)
            optimizer.step(
                lambda: [
                    (h(net.trunk(x)) - h.normalize(t)).square().mean()
                    for h, t in zip(net.heads, targets)
                ]
            )
        x, y = batch(500)
        with torch.no_grad():
            out = torch.cat([h.denormalize(h(net.trunk(x))) for h in net.heads], 1)
        return (out - y).square().mean(0).sqrt() / y.std(0)

    with_it = trained(120, True)
    assert (with_it < 0.3).all(), with_it
    assert 0.2 < with_it[0] / with_it[1] < 5.0, with_it
    assert trained(30, False)[1] > 0.9
