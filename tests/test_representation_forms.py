"""MGDA-UB, IMTL-G and Aligned-MTL on features: `jacobian=Representation(trunk)`, against the formulas."""

from __future__ import annotations

import itertools

import numpy as np
import oracles_weighting as ow
import pytest
import torch
from torch import Tensor, nn

from flatmtl import MultiTaskOptimizer, Representation
from flatmtl.weighting import IMTLG, MGDA, AlignedMTL

METHODS = {"mgda": MGDA, "imtl_g": IMTLG, "aligned_mtl": AlignedMTL}
each = pytest.mark.parametrize("name", METHODS)
any_count = pytest.mark.parametrize("tasks", [2, 3, 5])
any_trunk = pytest.mark.parametrize("kind", ["linear", "mlp", "conv"])


class Net(nn.Module):
    """A trunk and one head a task."""

    def __init__(self, kind: str, tasks: int) -> None:
        super().__init__()
        if kind == "linear":
            self.trunk: nn.Module = nn.Linear(5, 4, bias=False)
        elif kind == "mlp":
            self.trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh())
        else:  # features [B, 2, 3, 3]
            self.trunk = nn.Sequential(
                nn.Unflatten(1, (1, 5)), nn.Linear(5, 25), nn.Unflatten(2, (5, 5)),
                nn.Conv2d(1, 2, 3), nn.Tanh(),
            )  # fmt: skip
        width = 18 if kind == "conv" else 4
        self.heads = nn.ModuleList([nn.Linear(width, 1 + i % 2) for i in range(tasks)])
        self.double()

    def losses(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        z = self.trunk(x)
        return z, [(h(z.flatten(1)) - 2 - x[:, :1]).square().mean() for h in self.heads]


def mgda(rows: np.ndarray) -> np.ndarray:
    """The shortest vector of the convex hull: the best stationary point of all supports."""
    gram, best = rows @ rows.T, None
    for size in range(1, len(rows) + 1):
        for support in map(list, itertools.combinations(range(len(rows)), size)):
            w = np.zeros(len(rows))
            w[support] = np.linalg.solve(gram[np.ix_(support, support)], np.ones(size))
            w /= w.sum()
            if (w >= 0).all() and (best is None or w @ gram @ w < best @ gram @ best):
                best = w
    return best


def aligned(rows: np.ndarray) -> np.ndarray:
    """The rows' singular values all made equal to the smallest: w = sigma_min U S^-1 U' 1."""
    u, sigma, _ = np.linalg.svd(rows, full_matrices=False)
    return sigma.min() * (u / sigma) @ u.T @ np.ones(len(rows))


ORACLES = {"mgda": mgda, "imtl_g": ow.imtl_g_paper, "aligned_mtl": aligned}


def drawn(rng: np.random.Generator, kind: str, tasks: int) -> tuple[Net, Tensor]:
    """A net and a batch with rows that are far from dependent, on which IMTL-G does not fall back."""
    while True:
        torch.manual_seed(int(rng.integers(1 << 30)))
        net, x = Net(kind, tasks), torch.randn(12, 5, dtype=torch.float64)
        rows = feature_rows(*net.losses(x)).flatten(1).numpy()
        n = np.linalg.norm(rows, axis=1)
        c = rows @ rows.T / np.outer(n, n)
        parts = np.linalg.solve(c, np.ones(tasks)) / n
        if np.linalg.cond(c) < 1e3 and parts.sum() > 0.2 * np.abs(parts).sum():
            return net, x


def feature_rows(z: Tensor, losses: list[Tensor]) -> Tensor:
    """dL_i/dz, [T, *z.shape]."""
    return torch.stack([torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in losses])


def made(name: str, net: Net) -> MultiTaskOptimizer:
    base = torch.optim.SGD(net.parameters(), lr=0.001)
    return MultiTaskOptimizer(
        base, weighting=METHODS[name](), model=net, jacobian=Representation(net.trunk)
    )


def expected(name: str, net: Net, x: Tensor) -> tuple[np.ndarray, list[Tensor], list[Tensor]]:
    """Weights, the trunk's gradients, each head's."""
    z, losses = net.losses(x)
    rows = feature_rows(z, losses)
    w = ORACLES[name](rows.flatten(1).numpy())
    combined = sum(float(weight) * row for weight, row in zip(w, rows))
    trunk = torch.autograd.grad(
        z, list(net.trunk.parameters()), grad_outputs=combined, retain_graph=True
    )
    heads = [
        torch.autograd.grad(loss, p, retain_graph=True)[0]
        for loss, head in zip(losses, net.heads)
        for p in head.parameters()
    ]
    return w, list(trunk), heads


def near(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert torch.linalg.vector_norm(got - want) <= tolerance * torch.linalg.vector_norm(want)


@each
@any_count
@any_trunk
def test_the_step(name, tasks, kind, rng):
    net, x = drawn(rng, kind, tasks)
    opt = made(name, net)
    for _ in range(2):
        _, trunk, heads = expected(name, net, x)
        opt.step(lambda: net.losses(x)[1])
        assert opt.weighting.last_status().ok
        # the ridge of 1e-10 on the cosines, as far as their conditioning lets it
        near(torch.cat([p.grad.flatten() for p in net.trunk.parameters()]),
             torch.cat([g.flatten() for g in trunk]), 1e-5)  # fmt: skip
        for p, g in zip(net.heads.parameters(), heads):
            near(p.grad, g, 1e-11)  # its own task's, unweighted


@each
def test_the_gradients_are_not_the_parameters(name, rng):
    """Otherwise the test above would pass for the ordinary step too."""
    most = 0.0
    for _ in range(10):  # two of MGDA's answers may be the same corner
        net, x = drawn(rng, "mlp", 3)
        w, trunk, _ = expected(name, net, x)
        _, losses = net.losses(x)
        params = list(net.trunk.parameters())
        rows = np.stack([
            torch.cat([g.flatten() for g in torch.autograd.grad(v, params, retain_graph=True)])
            for v in losses
        ])  # fmt: skip
        d = torch.cat([g.flatten() for g in trunk]).numpy()
        np.testing.assert_allclose(w @ rows, d, rtol=0, atol=1e-10 * np.abs(d).max())
        most = max(most, np.abs(ORACLES[name](rows) - w).max())
    assert most > 1e-2


@pytest.mark.parametrize("name, d", [
    ("mgda", [0, 1, 1]), ("imtl_g", [0.076697, 1, 1]), ("aligned_mtl", [0.426558, 1.934666, 1.934666]),
])  # fmt: skip
def test_golden(name, d):
    """One linear trunk, L_i = <a_i, z>: dL_i/dz = a_i, and the trunk's gradient is d x'."""
    a = torch.tensor([[-4.0, 1, 1], [6, 1, 1]], dtype=torch.float64)
    x = torch.tensor([2.0, -1.0], dtype=torch.float64)
    trunk = nn.Linear(2, 3, bias=False).double()
    base = torch.optim.SGD(trunk.parameters(), lr=0.1)
    opt = MultiTaskOptimizer(base, weighting=METHODS[name](), jacobian=Representation(trunk))

    def losses() -> list[Tensor]:
        z = trunk(x)
        return [row @ z for row in a]

    opt.step(losses)
    want = torch.outer(torch.tensor(d, dtype=torch.float64), x)
    np.testing.assert_allclose(trunk.weight.grad, want, atol=4e-6)


@each
@any_count
def test_one_backward_pass_of_the_trunk(name, tasks, rng):
    (net, x), counts = drawn(rng, "mlp", tasks), {"trunk": 0, "heads": 0}

    def watch(part: str):
        def note(grad: Tensor) -> None:
            counts[part] += 1

        return lambda module, inputs, out: out.register_hook(note) and None

    net.trunk[0].register_forward_hook(watch("trunk"))
    for head in net.heads:
        head.register_forward_hook(watch("heads"))
    opt = made(name, net)
    for step in range(1, 4):
        opt.step(lambda: net.losses(x)[1])
        assert counts == {"trunk": step, "heads": step * tasks}
