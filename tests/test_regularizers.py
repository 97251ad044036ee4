"""flatmtl.regularizers against numpy written from the formulas, known answers and invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import flatmtl
from flatmtl.regularizers import TaskFeatureLaplacian


def oracle_laplacian(w: np.ndarray) -> np.ndarray:
    tasks, features = w.shape
    a = np.zeros((tasks + features,) * 2)
    for i in range(tasks):
        for j in range(features):
            a[i, tasks + j] = a[tasks + j, i] = abs(w[i, j])
    return np.diag(a.sum(axis=1)) - a


def oracle_projection(y: np.ndarray, k: int) -> np.ndarray:
    """Nearest point of {0 <= c <= 1, sum c = k}: the multiplier is between two break points."""
    points = np.sort(np.concatenate([y, y - 1]))
    sums = np.array([np.clip(y - t, 0, 1).sum() for t in points])  # falling
    at = np.flatnonzero(sums >= k)[-1]
    low, high = points[at], points[at + 1]
    share = (sums[at] - k) / (sums[at] - sums[at + 1])
    return np.clip(y - (low + share * (high - low)), 0, 1)


def oracle_u(w: np.ndarray, k: int, pull: float | None = None) -> np.ndarray:
    """U for |W|; ``pull``: a1/a3 of the form with a3."""
    values, vectors = np.linalg.eigh(oracle_laplacian(w))
    c = (np.arange(len(values)) < k).astype(float)
    if pull is not None:
        c = oracle_projection(-pull * values, k)
    return (vectors * c) @ vectors.T


def oracle_d(w: np.ndarray, u: np.ndarray) -> np.ndarray:
    tasks, features = w.shape
    return np.array(
        [
            [u[i, i] + u[tasks + j, tasks + j] - 2 * u[i, tasks + j] for j in range(features)]
            for i in range(tasks)
        ]
    )


def blocked(rng, sizes: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Block-diagonal weights, shuffled; and the block of each task and feature."""
    tasks, features = (sum(s) for s in zip(*sizes))
    w = np.zeros((tasks, features))
    of_tasks = np.repeat(np.arange(len(sizes)), [a for a, _ in sizes])
    of_features = np.repeat(np.arange(len(sizes)), [b for _, b in sizes])
    inside = of_tasks[:, None] == of_features
    w[inside] = rng.choice([-1, 1], inside.sum()) * rng.uniform(0.5, 2, inside.sum())
    rows, columns = rng.permutation(tasks), rng.permutation(features)
    return w[rows][:, columns], of_tasks[rows], of_features[columns]


def term(k: int, strength: float = 1.0, **options) -> TaskFeatureLaplacian:
    return TaskFeatureLaplacian(k, strength=strength, **options)


SIZES = [(2, 5), (1, 3), (3, 4)]


# ---- D and the penalty -----------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("shape, k", [((1, 1), 1), ((3, 7), 2), ((8, 5), 3), ((5, 40), 5)])
def test_distance_and_penalty(shape, k, scale, rng, device):
    w = scale * rng.standard_normal(shape)
    weight = torch.from_numpy(w).to(device)
    found = term(k, 0.3, ridge=0.2)
    found.update(weight)
    expected = oracle_d(w, oracle_u(w, k))
    gap = np.diff(np.linalg.eigvalsh(oracle_laplacian(w)))[k - 1] / scale
    np.testing.assert_allclose(found.distance.cpu(), expected, atol=1e-13 / gap)
    assert (found.distance >= 0).all()
    smallest = np.linalg.eigvalsh(oracle_laplacian(w))[:k].sum()
    ridge = 0.2 / 2 * (w**2).sum()
    size = 0.3 * np.abs(w).sum() + ridge
    penalty = found.penalty(weight)
    assert penalty.dtype == torch.float64
    # Ky Fan: the sum of the k smallest eigenvalues
    assert penalty.item() == pytest.approx(0.3 * smallest + ridge, abs=1e-12 * size)


@pytest.mark.parametrize("pull", [1e-3, 1.0, 30.0, 1e6])
def test_smoothing(pull, rng):
    w = rng.standard_normal((4, 9))
    found = term(3, 2.0, smoothing=2.0 / pull)
    found.update(torch.from_numpy(w))
    expected = oracle_d(w, oracle_u(w, 3, pull))
    np.testing.assert_allclose(found.distance, expected, atol=1e-9)


def test_smoothing_minimises_its_objective(rng):
    """c of 0 <= c <= 1, sum c = k with the least a1 lambda'c + a3/2 |c|^2, beside random others."""
    from flatmtl.regularizers import _onto_capped_simplex

    for _ in range(20):
        n = int(rng.integers(2, 12))
        k = int(rng.integers(1, n))
        y = rng.standard_normal(n) * 10 ** rng.uniform(-3, 3)
        c = _onto_capped_simplex(torch.from_numpy(y), k).numpy()
        np.testing.assert_allclose(c, oracle_projection(y, k), atol=1e-11)
        assert c.sum() == pytest.approx(k, abs=1e-11)
        assert c.min() >= 0
        assert c.max() <= 1
        for _ in range(50):
            other = np.zeros(n)
            other[rng.permutation(n)[:k]] = 1
            other = c + rng.uniform() * (other - c)
            assert ((c - y) ** 2).sum() <= ((other - y) ** 2).sum() * (1 + 1e-10) + 1e-12


def test_gradient_of_the_penalty(rng):
    """strength sign(W) D + ridge W, D held constant, 0 where W is."""
    w = torch.from_numpy(rng.standard_normal((3, 6)))
    w[0, 0] = 0
    w.requires_grad_()
    found = term(2, 0.7, ridge=0.1)
    found.update(w)
    found.penalty(w).backward()
    expected = 0.7 * w.detach().sign() * found.distance + 0.1 * w.detach()
    torch.testing.assert_close(w.grad, expected)
    assert found.distance.requires_grad is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, rng):
    w = torch.from_numpy(rng.standard_normal((3, 6))).to(dtype)
    one, two = term(2, ridge=0.1), term(2, ridge=0.1)
    one.update(w)
    two.update(w.double())
    assert torch.equal(one.distance, two.distance)
    penalty = one.penalty(w)
    assert penalty.dtype == torch.float32
    assert penalty.item() == pytest.approx(two.penalty(w.double()).item(), rel=1e-5)
    shrunk = one.prox_(w.clone(), 0.3)
    assert shrunk.dtype == dtype
    assert torch.equal(shrunk, two.prox_(w.double(), 0.3).to(dtype))


# ---- known answers -----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_blocks_are_free(scale, rng):
    w, of_tasks, of_features = blocked(rng, SIZES)
    weight = torch.from_numpy(scale * w)
    spectrum = TaskFeatureLaplacian.spectrum(weight)
    np.testing.assert_allclose(
        spectrum, np.linalg.eigvalsh(oracle_laplacian(scale * w)), atol=1e-13 * scale * 20
    )
    assert (spectrum < 1e-12 * scale).sum() == 3
    assert spectrum.dtype == torch.float64
    found = term(3)
    found.update(weight)
    size = np.array([a + b for a, b in SIZES])
    across = 1 / size[of_tasks][:, None] + 1 / size[of_features]
    expected = np.where(of_tasks[:, None] == of_features, 0, across)
    np.testing.assert_allclose(found.distance, expected, atol=1e-12)
    assert found.penalty(weight).item() == pytest.approx(0, abs=1e-11 * scale)
    # what prox_ takes from links across is nothing from those inside
    noisy = weight + scale * 1e-6 * torch.from_numpy(rng.standard_normal(w.shape))
    shrunk = found.prox_(noisy.clone(), 1e-4 * scale).numpy()
    inside = of_tasks[:, None] == of_features
    assert (shrunk[~inside] == 0).all()
    np.testing.assert_allclose(shrunk[inside], noisy.numpy()[inside], rtol=1e-12)


def test_more_blocks_than_groups(rng):
    """Equal eigenvalues share U evenly: k/m of the projector on all m blocks."""
    w, of_tasks, of_features = blocked(rng, SIZES)
    size = np.array([a + b for a, b in SIZES])
    across = 1 / size[of_tasks][:, None] + 1 / size[of_features]
    for k in (1, 2):
        found = term(k)
        found.update(torch.from_numpy(w))
        expected = np.where(of_tasks[:, None] == of_features, 0, k / 3 * across)
        np.testing.assert_allclose(found.distance, expected, atol=1e-12)


def test_no_weights_at_all():
    """The Laplacian is zero, and every node a block: U = k/n I."""
    found = term(2)
    found.update(torch.zeros(3, 5))
    np.testing.assert_allclose(found.distance, np.full((3, 5), 2 * 2 / 8), rtol=1e-13)
    assert found.penalty(torch.zeros(3, 5)) == 0
    assert (TaskFeatureLaplacian.spectrum(torch.zeros(3, 5)) == 0).all()
    assert TaskFeatureLaplacian.blocks(torch.zeros(3, 5)).count == 8


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_no_groups_is_ridge(smoothing, rng):
    w = rng.standard_normal((3, 5))
    found = term(0, 9.0, ridge=0.5, smoothing=smoothing)
    found.update(torch.from_numpy(w))
    assert (found.distance == 0).all()
    penalty = found.penalty(torch.from_numpy(w)).item()
    assert penalty == pytest.approx(0.25 * (w**2).sum())
    shrunk = found.prox_(torch.from_numpy(w.copy()), 0.4)
    np.testing.assert_allclose(shrunk, w / 1.2, rtol=1e-14)
    everything = term(8, 1.0, smoothing=smoothing)  # U = I: plain l1, twice
    everything.update(torch.from_numpy(w))
    np.testing.assert_allclose(everything.distance, 2.0, rtol=1e-13)


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_the_order_of_tasks_and_features_is_nothing(smoothing, rng):
    w = rng.standard_normal((4, 9))
    rows, columns = rng.permutation(4), rng.permutation(9)
    one, two, turned = (term(2, smoothing=smoothing) for _ in range(3))
    one.update(torch.from_numpy(w))
    two.update(torch.from_numpy(w[rows][:, columns].copy()))
    turned.update(torch.from_numpy(w).T)
    np.testing.assert_allclose(two.distance, one.distance.numpy()[rows][:, columns], atol=1e-11)
    np.testing.assert_allclose(turned.distance, one.distance.T, atol=1e-11)
    signs = torch.from_numpy(rng.choice([-1.0, 1.0], w.shape) * w)
    two = term(2, smoothing=smoothing)
    two.update(signs)
    assert torch.equal(two.distance, one.distance)


# ---- prox ----------------------------------------------------------------------------------------


def test_prox(rng):
    w = rng.standard_normal((4, 7))
    found = term(2, 0.8, ridge=0.3)
    found.update(torch.from_numpy(w))
    d = oracle_d(w, oracle_u(w, 2))
    moved = w + 0.1 * rng.standard_normal(w.shape)
    weight = nn.Parameter(torch.from_numpy(moved.copy()))
    back = found.prox_(weight, 0.5)
    assert back is weight
    assert weight.requires_grad
    expected = np.sign(moved) * np.maximum(np.abs(moved) - 0.8 * d * 0.5, 0) / (1 + 0.3 * 0.5)
    np.testing.assert_allclose(weight.detach(), expected, atol=1e-12)
    # it is the minimiser of |W - moved|^2 / (2 step) + penalty(W)

    def objective(x):
        return ((x - torch.from_numpy(moved)) ** 2).sum() / (2 * 0.5) + found.penalty(x)

    best = objective(weight.detach())
    for size in (1e-3, 1e-1):
        for _ in range(20):
            other = weight.detach() + size * torch.from_numpy(rng.standard_normal(w.shape))
            assert objective(other) >= best
    untouched = torch.from_numpy(moved.copy())
    assert torch.equal(found.prox_(untouched.clone(), 0.0), untouched)


def test_prox_of_a_transposed_view(rng):
    w = rng.standard_normal((7, 4))  # features x tasks
    given = torch.from_numpy(w.copy())
    found, other = term(2), term(2)
    found.update(given.T)
    other.update(torch.from_numpy(w.T.copy()))
    found.prox_(given.T, 0.3)
    expected = other.prox_(torch.from_numpy(w.T.copy()), 0.3)
    torch.testing.assert_close(given, expected.T, atol=1e-12, rtol=0)


# ---- blocks ----------------------------------------------------------------------------------------


def test_blocks(rng):
    for _ in range(10):
        w, of_tasks, of_features = blocked(rng, SIZES)
        found = TaskFeatureLaplacian.blocks(torch.from_numpy(w))
        assert found.count == 3
        assert sorted(set(found.tasks.tolist())) == [0, 1, 2]
        assert list(dict.fromkeys(found.tasks.tolist())) == [0, 1, 2]  # in the order of the tasks
        same = found.tasks[:, None] == found.features
        assert np.array_equal(same.numpy(), of_tasks[:, None] == of_features)


def test_blocks_of_sparse_links(rng):
    """As many as scipy finds, and as there are zero eigenvalues."""
    graphs = pytest.importorskip("scipy.sparse.csgraph")
    for _ in range(20):
        tasks, features = rng.integers(1, 8), rng.integers(1, 20)
        w = rng.uniform(0.5, 1, (tasks, features)) * (rng.random((tasks, features)) < 0.15)
        count, labels = graphs.connected_components(oracle_laplacian(w) != 0, directed=False)
        found = TaskFeatureLaplacian.blocks(torch.from_numpy(w))
        ours = torch.cat([found.tasks, found.features]).numpy()
        assert found.count == count == len(set(ours))
        assert np.array_equal(ours[:, None] == ours, labels[:, None] == labels)
        spectrum = TaskFeatureLaplacian.spectrum(torch.from_numpy(w))
        assert (spectrum < 1e-10).sum() == count


def test_blocks_above_a_tolerance():
    w = torch.tensor([[1.0, 1e-4, 0.0], [-1e-3, -1.0, 0.0]])
    assert TaskFeatureLaplacian.blocks(w).count == 2
    found = TaskFeatureLaplacian.blocks(w, tolerance=2e-3)
    assert found.count == 3
    assert found.tasks.tolist() == [0, 1]
    assert found.features.tolist() == [0, 1, 2]


# ---- state and errors --------------------------------------------------------------------------------


def test_update_every(rng):
    found = term(1, update_every=3)
    kept = []
    for _ in range(7):
        found.update(torch.from_numpy(rng.standard_normal((2, 4))))
        kept.append(found.distance)
    same = [torch.equal(a, b) for a, b in zip(kept, kept[1:])]
    assert same == [True, True, False, True, True, False]


def test_state_dict_resumes_bit_for_bit(rng, tmp_path):
    weights = torch.from_numpy(rng.standard_normal((6, 3, 5)))
    one = term(2, update_every=2)
    for w in weights[:3]:
        one.update(w)
    state = one.state_dict()
    torch.save(state, tmp_path / "state")
    two = term(2, update_every=2)
    two.load_state_dict(torch.load(tmp_path / "state"))
    for w in weights[3:]:
        one.update(w)
        two.update(w)
        assert torch.equal(one.distance, two.distance)
    assert one.state_dict()["calls"] == two.state_dict()["calls"] == 6
    assert not torch.equal(state["distance"], one.distance)  # a copy
    fresh = term(2)
    fresh.load_state_dict(term(2).state_dict())
    with pytest.raises(RuntimeError, match="update must be called before"):
        fresh.penalty(weights[0])
    with pytest.raises(KeyError):
        fresh.load_state_dict({})
    with pytest.raises(ValueError, match=r"distance must have shape \[T, d\]"):
        fresh.load_state_dict({"distance": torch.zeros(3, dtype=torch.float64), "calls": 1})
    with pytest.raises(ValueError, match="calls must be at least 0"):
        fresh.load_state_dict({"distance": None, "calls": -1})


def test_refusals(rng):
    for options, error, match in [
        ({"groups": -1}, ValueError, "groups must be at least 0, got -1"),
        ({"groups": 1.0}, TypeError, "groups must be an int, got float"),
        ({"strength": -1.0}, ValueError, "strength must be finite, at least 0"),
        ({"ridge": math.nan}, ValueError, "ridge must be finite"),
        ({"smoothing": "1"}, TypeError, "smoothing must be a number, got str"),
        ({"update_every": 0}, ValueError, "update_every must be at least 1"),
    ]:
        with pytest.raises(error, match=match):
            TaskFeatureLaplacian(**{"groups": 1, "strength": 1.0, **options})
    found = term(9)
    with pytest.raises(ValueError, match="groups must be at most T . d = 8"):
        found.update(torch.ones(3, 5))
    assert found.state_dict() == {"distance": None, "calls": 0}
    found = term(2)
    for call in (found.penalty, lambda w: found.prox_(w, 0.1)):
        with pytest.raises(RuntimeError, match="update must be called before D is used"):
            call(torch.ones(3, 5))
    bad = torch.ones(3, 5)
    bad[0, 1] = math.nan
    for call in (found.update, found.spectrum, found.blocks):
        for given, error, match in [
            (bad, ValueError, "weight must be finite"),
            (math.inf * torch.ones(2, 2), ValueError, "weight must be finite"),
            (torch.ones(3), ValueError, r"weight must have shape \[T, d\], got \[3\]"),
            (torch.ones(0, 3), ValueError, r"weight must have shape \[T, d\], got \[0, 3\]"),
            ([[1.0]], TypeError, "weight must be a Tensor, got list"),
            (torch.ones(2, 2, dtype=torch.int64), TypeError, "weight must have one of the dtypes"),
        ]:
            with pytest.raises(error, match=match):
                call(given)
    found.update(torch.from_numpy(rng.standard_normal((3, 5))))
    before = found.state_dict()
    for call in (found.update, found.penalty, lambda w: found.prox_(w, 0.1)):
        with pytest.raises(ValueError, match=r"weight must have shape \[3, 5\], got \[5, 3\]"):
            call(torch.ones(5, 3))
    assert torch.equal(before["distance"], found.distance)
    assert found.state_dict()["calls"] == before["calls"]
    with pytest.raises(ValueError, match="step must be finite, at least 0"):
        found.prox_(torch.ones(3, 5), -1.0)
    with pytest.raises(ValueError, match="tolerance must be finite, at least 0"):
        found.blocks(torch.ones(3, 5), tolerance=-1.0)


# ---- training ----------------------------------------------------------------------------------------


def test_training_finds_the_blocks(rng):
    """Four linear tasks on eight features, two by two: the links across are zero after training."""
    true = np.zeros((4, 8))
    true[:2, :4] = rng.uniform(0.5, 1, (2, 4)) * rng.choice([-1, 1], (2, 4))
    true[2:, 4:] = rng.uniform(0.5, 1, (2, 4)) * rng.choice([-1, 1], (2, 4))
    head = nn.Linear(8, 4, bias=False).double()
    optimizer = flatmtl.MultiTaskOptimizer(
        torch.optim.SGD(head.parameters(), lr=0.1),
        weighting=flatmtl.weighting.Sum(),
        shared=head.parameters(),
    )
    found = TaskFeatureLaplacian(2, strength=0.5, update_every=5)
    for _ in range(100):
        x = torch.from_numpy(rng.standard_normal((64, 8)))
        y = x @ torch.from_numpy(true).T + 0.1 * torch.from_numpy(rng.standard_normal((64, 4)))
        optimizer.step(lambda: list((head(x) - y).square().mean(0).unbind()))
        found.update(head.weight)
        found.prox_(head.weight, step=0.1)
    blocks = found.blocks(head.weight)
    assert blocks.count == 2
    assert blocks.tasks.tolist() == [0, 0, 1, 1]
    assert blocks.features.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    np.testing.assert_allclose(head.weight.detach(), true, atol=0.15)
