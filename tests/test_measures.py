"""flatmtl.measures against numpy written from the formulas, known answers and invariances."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import flatmtl
from flatmtl import measures

# ---- gradients ---------------------------------------------------------------------------------


def rows(rng, tasks: int, size: int = 12, spread: float = 0.0) -> np.ndarray:
    return rng.standard_normal((tasks, size)) * 10 ** rng.uniform(-spread, spread, (tasks, 1))


def oracle_cosines(jac: np.ndarray) -> np.ndarray:
    out = np.full((len(jac), len(jac)), np.nan)
    for i, j in itertools.product(range(len(jac)), repeat=2):
        a, b = np.linalg.norm(jac[i]), np.linalg.norm(jac[j])
        if 0 < a < np.inf and 0 < b < np.inf:
            out[i, j] = (jac[i] / a) @ (jac[j] / b)
    return out


@pytest.mark.parametrize("spread", [0.0, 8.0])
@pytest.mark.parametrize("tasks", [1, 2, 5, 40])
def test_gradient_measures(tasks, spread, rng, device):
    jac = rows(rng, tasks, spread=spread)
    if tasks == 5:
        jac[2] = 0.0
    gram = torch.from_numpy(jac @ jac.T).to(device)
    norms = np.linalg.norm(jac, axis=1)
    norms[norms == 0] = np.nan
    cosines = oracle_cosines(jac)
    pairs = cosines[np.triu_indices(tasks, 1)]
    known = pairs[~np.isnan(pairs)]

    got = measures.gradient_cosines(gram)
    assert got.dtype == torch.float64
    assert got.device == gram.device
    np.testing.assert_allclose(got.cpu().numpy(), cosines, atol=1e-13)
    assert got.diagonal().nan_to_num(1.0).eq(1).all()
    ratios = measures.norm_ratios(gram).cpu().numpy()
    np.testing.assert_allclose(ratios, norms[:, None] / norms, rtol=1e-12)
    share, mean = measures.conflict_share(gram).item(), measures.mean_cosine(gram).item()
    if tasks == 1:
        assert math.isnan(share)
        assert math.isnan(mean)
    else:
        assert share == pytest.approx(np.mean(known < 0))
        assert mean == pytest.approx(known.mean(), abs=1e-12)


def test_gradient_measures_of_a_batch(rng):
    jac = rng.standard_normal((3, 4, 9))
    grams = torch.from_numpy(jac @ jac.transpose(0, 2, 1))
    for name in ("gradient_cosines", "norm_ratios", "conflict_share", "mean_cosine"):
        measure = getattr(measures, name)
        torch.testing.assert_close(measure(grams), torch.stack([measure(g) for g in grams]))


def test_gradient_measures_are_those_of_the_history(rng):
    jac = torch.from_numpy(rng.standard_normal((4, 9)))
    jac[1] = 0
    gram = flatmtl.ops.gram(jac)
    history = flatmtl.History(2, range(4))
    history.record(losses=torch.ones(4), gram=gram)
    arrays = history.arrays()
    cosines = measures.gradient_cosines(gram).numpy()
    np.testing.assert_allclose(cosines, arrays["cosines"][0], atol=1e-14)
    assert measures.conflict_share(gram).item() == arrays["conflict"][0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_leaves_the_others(bad, rng):
    jac = torch.from_numpy(rows(rng, 3))
    alone = measures.gradient_cosines(jac[:2] @ jac[:2].T)
    jac[2, 0] = bad
    got = measures.gradient_cosines(jac @ jac.T)
    torch.testing.assert_close(got[:2, :2], alone)
    assert got[2].isnan().all()
    assert got[:, 2].isnan().all()
    assert measures.norm_ratios(jac @ jac.T)[2].isnan().all()
    torch.testing.assert_close(measures.mean_cosine(jac @ jac.T), alone[0, 1])


def test_gradient_measures_do_not_write_into_the_gram_matrix(rng):
    gram = torch.from_numpy(rows(rng, 3))[:, :3]
    gram = gram @ gram.T
    before = gram.clone()
    measures.gradient_cosines(gram)
    measures.norm_ratios(gram)
    assert torch.equal(gram, before)


def test_gradient_measures_refuse():
    for name in ("gradient_cosines", "norm_ratios", "conflict_share", "mean_cosine"):
        with pytest.raises(ValueError, match=r"gram must have shape"):
            getattr(measures, name)(torch.zeros(2, 3))
        with pytest.raises(TypeError, match="gram must be a Tensor"):
            getattr(measures, name)([[1.0]])


# ---- features ----------------------------------------------------------------------------------


def oracle_overlap(s: np.ndarray) -> float:
    s = np.abs(s)
    s = s / s.sum(axis=1, keepdims=True)
    tasks, total = len(s), s.sum()
    if tasks == 1:
        return 1.0
    value = 0.0
    for column in s.T:
        if column.sum() > 0:
            p = column / column.sum()
            entropy = -sum(x * math.log(x) for x in p if x > 0)
            value += column.sum() / total * (1 - entropy / math.log(tasks))
    return value


def overlap(s: np.ndarray) -> float:
    found = measures.feature_overlap(torch.from_numpy(np.asarray(s, dtype=np.float64)))
    assert found.shape == ()
    assert found.dtype == torch.float64
    return found.item()


@pytest.mark.parametrize("tasks, features", [(1, 4), (2, 1), (2, 7), (5, 30), (20, 3)])
def test_feature_overlap(tasks, features, rng):
    s = rng.exponential(size=(tasks, features)) ** 3
    s[:, rng.random(features) < 0.3] = 0.0
    s[:, 0] += 1.0
    s[rng.random((tasks, features)) < 0.2] = 0.0
    s[:, -1] += 0.1
    assert overlap(s) == pytest.approx(oracle_overlap(s), abs=1e-12)
    signs = rng.choice([-1.0, 1.0], s.shape)
    assert overlap(signs * s) == overlap(s)


def test_feature_overlap_known_answers(rng):
    for tasks in (2, 3, 9):
        disjoint = np.kron(np.eye(tasks), rng.uniform(0.1, 1, (1, 4)))
        assert overlap(disjoint) == pytest.approx(1.0, abs=1e-14)
        same = np.outer(10 ** rng.uniform(-8, 8, tasks), rng.uniform(0.1, 1, 6))
        assert overlap(same) == pytest.approx(0.0, abs=1e-13)
    assert overlap(np.ones((1, 3))) == 1.0
    p = rng.uniform(0.01, 0.99)
    entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    shares = np.array([[p, 1 - p], [1 - p, p]])  # both columns and both rows sum to 1
    assert overlap(shares) == pytest.approx(1 - entropy / math.log(2), abs=1e-13)


@pytest.mark.parametrize("low, high", [(-8, 8), (-300, 300)])
def test_feature_overlap_does_not_see_the_scale_of_a_loss(low, high, rng):
    s = rng.exponential(size=(4, 11))
    scale = 10.0 ** rng.uniform(low, high, (4, 1))
    assert overlap(scale * s) == pytest.approx(overlap(s), abs=1e-12)
    order = rng.permutation(11)
    assert overlap(s[::-1][:, order]) == pytest.approx(overlap(s), abs=1e-13)
    wider = np.concatenate([s, np.zeros((4, 5))], axis=1)
    assert overlap(wider) == pytest.approx(overlap(s), abs=1e-13)


def test_feature_overlap_leaves_out_tasks_without_saliency(rng):
    s = rng.exponential(size=(3, 5))
    for bad in (0.0, math.nan, math.inf):
        row = np.full((1, 5), bad)
        assert overlap(np.concatenate([s, row])) == pytest.approx(overlap(s), abs=1e-14)
        assert overlap(np.concatenate([s[:1], row])) == pytest.approx(1, abs=1e-14)
        assert math.isnan(overlap(row))


def test_feature_overlap_refuses():
    for bad in (torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(0, 3), torch.zeros(3, 0)):
        with pytest.raises(ValueError, match=r"saliency must have shape \[T, F\]"):
            measures.feature_overlap(bad)
    with pytest.raises(TypeError, match="saliency must have one of the dtypes"):
        measures.feature_overlap(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="saliency must be a Tensor"):
        measures.feature_overlap([[1.0]])


def test_feature_saliency_of_linear_heads(rng):
    """L_i = sum_n sum_j a_ij u_n z_nj: the gradient at z is a_i u_n."""
    a, u = rng.standard_normal((3, 5)), rng.standard_normal(7)
    trunk = nn.Linear(4, 5).double()
    z = trunk(torch.from_numpy(rng.standard_normal((7, 4))))
    losses = {str(i): (z @ torch.from_numpy(a[i]) * torch.from_numpy(u)).sum() for i in range(3)}
    losses["missing"] = None
    losses["elsewhere"] = nn.Parameter(torch.ones(())) * 2.0
    got = measures.feature_saliency(losses, z).numpy()
    np.testing.assert_allclose(got[:3], np.abs(a) * np.abs(u).mean(), rtol=1e-12)
    assert np.isnan(got[3]).all()
    assert (got[4] == 0).all()
    # the graph stays, nothing was accumulated, and the step can follow
    assert trunk.weight.grad is None
    losses["0"].backward()
    assert trunk.weight.grad is not None


def test_feature_saliency_of_maps(rng):
    """Channels [N, C, H, W] by default; the last dimension of [N, L, D] when asked for."""
    weight = torch.from_numpy(rng.standard_normal((2, 3, 4, 5, 6)))
    z = torch.from_numpy(rng.standard_normal((3, 4, 5, 6))).requires_grad_()
    losses = torch.stack([(w * z).sum() for w in weight])
    got = measures.feature_saliency(losses, z)
    torch.testing.assert_close(got, weight.abs().mean((1, 3, 4)))
    last = measures.feature_saliency(losses, z, feature_dim=-1)
    torch.testing.assert_close(last, weight.abs().mean((1, 2, 3)))


def test_feature_saliency_leaves_the_trunk_alone():
    passed = []

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            passed.append(1)
            return gradient

    x = torch.randn(3, 4, requires_grad=True)
    z = Through.apply(x) * 2
    losses = [z.square().sum(), z.sum()]
    measures.feature_saliency(losses, z)
    assert not passed
    losses[0].backward()
    assert passed


def test_feature_saliency_in_half_precision(rng):
    weight = torch.from_numpy(rng.standard_normal((2, 8, 5))).bfloat16()
    z = torch.zeros(8, 5, dtype=torch.bfloat16, requires_grad=True)
    got = measures.feature_saliency([(w * z).sum() for w in weight], z)
    torch.testing.assert_close(got, weight.double().abs().mean(1))


def test_feature_saliency_refuses():
    z = torch.randn(3, 4, requires_grad=True)
    losses = [z.sum()]
    with pytest.raises(ValueError, match="features must be what the losses were computed from"):
        measures.feature_saliency(losses, torch.randn(3, 4, requires_grad=True))
    with pytest.raises(ValueError, match="features must have a graph"):
        measures.feature_saliency(losses, z.detach())
    with pytest.raises(TypeError, match="features must be a Tensor"):
        measures.feature_saliency(losses, [z])
    with pytest.raises(ValueError, match="feature_dim must be a dimension of features"):
        measures.feature_saliency(losses, z, feature_dim=2)
    with pytest.raises(TypeError, match="feature_dim must be an int"):
        measures.feature_saliency(losses, z, feature_dim=1.0)
    with pytest.raises(TypeError, match="losses must be"):
        measures.feature_saliency(3.0, z)


# ---- tables ------------------------------------------------------------------------------------


def oracle_delta(m, b, lower) -> float:
    total = 0.0
    for value, base, less in zip(m, b, lower):
        total += (-1.0) ** (0 if less else 1) * (value - base) / base
    return 100 * total / len(m)


def test_delta_m(rng):
    m, b = rng.uniform(0.1, 2, (3, 4, 5)), rng.uniform(0.1, 2, 5)
    lower = rng.random(5) < 0.5
    got = measures.delta_m(m, b, lower_is_better=lower)
    assert got.shape == (3, 4)
    for i, j in itertools.product(range(3), range(4)):
        assert got[i, j] == pytest.approx(oracle_delta(m[i, j], b, lower), abs=1e-10)
    one = measures.delta_m(list(m[0, 0]), list(b), lower_is_better=list(map(bool, lower)))
    assert isinstance(one, float)
    assert one == got[0, 0]
    for flag in (True, False):
        whole = measures.delta_m(m, b, lower_is_better=flag)
        np.testing.assert_array_equal(whole, measures.delta_m(m, b, lower_is_better=[flag] * 5))


def test_delta_m_known_answers(rng):
    """An accuracy up by a tenth and an error down by a fifth: 15 % better, so -15."""
    assert measures.delta_m([0.55, 8.0], [0.5, 10.0], lower_is_better=[False, True]) == (
        pytest.approx(-15.0)
    )
    b = 10 ** rng.uniform(-8, 8, 6)
    assert measures.delta_m(b, b, lower_is_better=True) == 0.0
    assert measures.delta_m(2 * b, b, lower_is_better=True) == pytest.approx(100.0)
    assert measures.delta_m(2 * b, b, lower_is_better=False) == pytest.approx(-100.0)
    missing = measures.delta_m([[1.0, math.nan], [1.0, 2.0]], [1.0, 2.0], lower_is_better=True)
    assert np.isnan(missing[0])
    assert missing[1] == 0.0
    tensor = measures.delta_m(torch.tensor([2.0]), torch.tensor([1.0]), lower_is_better=True)
    assert tensor == 100.0


def test_delta_m_refuses():
    good = {"metrics": [1.0, 2.0], "baseline": [1.0, 2.0], "lower_is_better": True}
    for changed, error, match in [
        ({"baseline": [1.0, 0.0]}, ValueError, "baseline must be finite and above 0"),
        ({"baseline": [1.0, -2.0]}, ValueError, "baseline must be finite and above 0"),
        ({"baseline": [1.0, math.nan]}, ValueError, "baseline must be finite and above 0"),
        ({"baseline": [1.0]}, ValueError, "baseline must have one entry for each of the 2 tasks"),
        ({"metrics": 1.0}, ValueError, "metrics must have shape"),
        ({"metrics": []}, ValueError, "metrics must have shape"),
        ({"lower_is_better": 1}, TypeError, "lower_is_better must be a bool"),
        ({"lower_is_better": [0, 1]}, TypeError, "lower_is_better must be a bool"),
        ({"lower_is_better": [True]}, ValueError, "lower_is_better must be one bool or 2"),
    ]:
        with pytest.raises(error, match=match):
            measures.delta_m(**{**good, **changed})


def oracle_mean_rank(m, lower) -> np.ndarray:
    m = np.where(lower, m, -m)
    ranks = np.zeros(m.shape)
    for t, i in itertools.product(range(m.shape[1]), range(len(m))):
        before = np.nan_to_num(m[:, t], nan=np.inf)
        ranks[i, t] = 1 + np.sum(before < before[i]) + (np.sum(before == before[i]) - 1) / 2
    return ranks.mean(axis=1)


def test_mean_rank(rng):
    for _ in range(20):
        m = rng.integers(0, 4, (7, 5)).astype(float)
        m[rng.random(m.shape) < 0.1] = np.nan
        lower = rng.random(5) < 0.5
        got = measures.mean_rank(m, lower_is_better=lower)
        np.testing.assert_allclose(got, oracle_mean_rank(m, lower), rtol=1e-14)
        assert got.mean() == pytest.approx(4.0)  # ranks of 7 are shared out, never lost


def test_mean_rank_known_answers():
    got = measures.mean_rank([[0.9, 3.0], [0.8, 1.0], [0.9, 2.0]], lower_is_better=[False, True])
    np.testing.assert_array_equal(got, [(1.5 + 3) / 2, (3 + 1) / 2, (1.5 + 2) / 2])
    np.testing.assert_array_equal(measures.mean_rank([[2.0, 1.0]], lower_is_better=True), [1.0])
    equal = measures.mean_rank(np.ones((4, 3)), lower_is_better=True)
    np.testing.assert_array_equal(equal, np.full(4, 2.5))
    worst = [[math.inf], [math.nan], [1.0], [math.nan]]
    got = measures.mean_rank(worst, lower_is_better=True)
    np.testing.assert_array_equal(got, [2.0, 3.5, 1.0, 3.5])


def test_mean_rank_refuses():
    for bad in ([1.0, 2.0], np.ones((2, 3, 4)), np.ones((0, 3))):
        with pytest.raises(ValueError, match=r"metrics must have shape \[methods, T\]"):
            measures.mean_rank(bad, lower_is_better=True)
    with pytest.raises(ValueError, match="lower_is_better must be one bool or 2"):
        measures.mean_rank(np.ones((3, 2)), lower_is_better=[True, False, True])


# two-sided 95 % and 99 % points of Student's t, from the printed tables
STUDENT = {
    (0.95, 1): 12.706, (0.95, 2): 4.303, (0.95, 3): 3.182, (0.95, 4): 2.776, (0.95, 9): 2.262,
    (0.95, 30): 2.042, (0.99, 2): 9.925, (0.99, 5): 4.032, (0.9, 2): 2.920, (0.9, 7): 1.895,
}  # fmt: skip


@pytest.mark.parametrize("level, freedom", STUDENT)
def test_mean_interval(level, freedom, rng):
    n = freedom + 1
    values = rng.standard_normal((3, n)) * 10 ** rng.uniform(-8, 8, (3, 1))
    mean, low, high = measures.mean_interval(values, level=level)
    deviation = np.sqrt(((values - values.mean(1, keepdims=True)) ** 2).sum(1) / freedom)
    half = STUDENT[level, freedom] * deviation / math.sqrt(n)
    np.testing.assert_allclose(mean, values.mean(1), rtol=1e-12)
    np.testing.assert_allclose((high - low) / 2, half, rtol=3e-4)
    np.testing.assert_allclose((high + low) / 2, mean, atol=1e-9 * half.max())


def test_mean_interval_by_scipy(rng):
    stats = pytest.importorskip("scipy.stats")
    for n in (2, 3, 4, 5, 8, 51, 400):
        values = rng.standard_normal(n)
        level = rng.uniform(0.01, 0.999)
        error = values.std(ddof=1) / math.sqrt(n)
        expected = stats.t.interval(level, n - 1, loc=values.mean(), scale=error)
        np.testing.assert_allclose(
            measures.mean_interval(values, level=level)[1:], expected, rtol=1e-9, atol=1e-11
        )


def test_mean_interval_corners():
    one = measures.mean_interval([2.0])
    assert one.mean == 2.0
    assert np.isnan(one.low)
    assert np.isnan(one.high)
    same = measures.mean_interval([[3.0, 3.0, 3.0]])
    assert same.low == same.high == same.mean == 3.0
    for level in (0.0, 1.0, math.nan, 95):
        with pytest.raises(ValueError, match="level must be between 0 and 1"):
            measures.mean_interval([1.0, 2.0], level=level)
    for bad in (3.0, []):
        with pytest.raises(ValueError, match="values must have shape"):
            measures.mean_interval(bad)


# ---- rankings ----------------------------------------------------------------------------------


def oracle_ranks(x: np.ndarray) -> np.ndarray:
    return np.array([1 + np.sum(x < v) + (np.sum(x == v) - 1) / 2 for v in x])


def oracle_kendall(x: np.ndarray, y: np.ndarray) -> float:
    agree = of_x = of_y = 0
    for i, j in itertools.combinations(range(len(x)), 2):
        p = int(x[i] > x[j]) - int(x[i] < x[j])
        q = int(y[i] > y[j]) - int(y[i] < y[j])
        agree += p * q
        of_x += p != 0
        of_y += q != 0
    return agree / math.sqrt(of_x * of_y)


def scores(rng, n: int, ties: bool) -> np.ndarray:
    if not ties:
        return rng.standard_normal(n) * 10 ** rng.uniform(-8, 8, n)
    values = rng.integers(0, 3, n).astype(float)
    values[:2] = 0, 1  # not all equal
    return values


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [2, 3, 8, 60])
def test_rank_correlations(n, ties, rng, monkeypatch):
    for _ in range(10):
        x, y = scores(rng, n, ties), scores(rng, n, ties)
        a, b = oracle_ranks(x), oracle_ranks(y)
        expected = np.corrcoef(a, b)[0, 1]
        assert measures.spearman(x, y) == pytest.approx(expected, abs=1e-12)
        tau = measures.kendall(x, y)
        assert tau == pytest.approx(oracle_kendall(x, y), abs=1e-12)
        monkeypatch.setattr("flatmtl.measures.rankings._CELLS", 2 * n)  # in pieces
        assert measures.kendall(x, y) == tau
        monkeypatch.undo()
        # only the order counts
        assert measures.spearman(np.cbrt(x), 3 * y - 1) == pytest.approx(expected, abs=1e-12)
        assert measures.kendall(np.cbrt(x), -y) == pytest.approx(-tau, abs=1e-12)
        assert measures.kendall(y, x) == tau


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlations_by_scipy(ties, rng):
    stats = pytest.importorskip("scipy.stats")
    for n in (5, 33, 500):
        x, y = scores(rng, n, ties), scores(rng, n, ties)
        assert measures.spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-12)
        assert measures.kendall(x, y) == pytest.approx(stats.kendalltau(x, y)[0], abs=1e-12)


@pytest.mark.parametrize("correlation", [measures.spearman, measures.kendall])
def test_rank_correlations_at_the_ends(correlation, rng):
    x = rng.permutation(9.0 * np.arange(9))
    assert correlation(x, np.exp(x / 20)) == 1.0
    assert correlation(x, -x) == -1.0
    assert math.isnan(correlation(x, np.ones(9)))
    assert math.isnan(correlation(np.ones(9), x))
    assert correlation([-math.inf, 0.0, math.inf], [1, 2, 3]) == 1.0
    for a, b, match in [
        ([1.0], [1.0], r"a must have shape \[n\]"),
        ([1.0, 2.0], [[1.0, 2.0]], r"b must have shape \[n\]"),
        ([1.0, 2.0], [1.0, 2.0, 3.0], "b must be as long as a"),
        ([1.0, math.nan], [1.0, 2.0], "a must not hold NaN"),
    ]:
        with pytest.raises(ValueError, match=match):
            correlation(a, b)


@pytest.mark.parametrize("statistic", [measures.spearman, measures.kendall])
def test_permutation_p(statistic, rng):
    """Against all orders: the share with a correlation at least as strong."""
    x, y = rng.standard_normal(6), rng.standard_normal(6)
    observed = abs(statistic(x, y))
    every = [abs(statistic(x, y[list(p)])) for p in itertools.permutations(range(6))]
    exact = np.mean(np.array(every) >= observed - 1e-12)
    got = measures.permutation_p(x, y, statistic=statistic, draws=1500, seed=7)
    # six standard deviations of the share of 1500 draws, and the one that is added
    assert abs(got - exact) <= 6 * math.sqrt(exact * (1 - exact) / 1500) + 1 / 1500
    assert got == measures.permutation_p(x, y, statistic=statistic, draws=1500, seed=7)


def test_permutation_p_corners(rng):
    x = np.arange(12.0)
    given = x.copy()
    assert measures.permutation_p(x, x, draws=99) == 0.01  # no order of 99 is as good
    np.testing.assert_array_equal(x, given)
    assert measures.permutation_p([1, 2], [5, 3], draws=9) == 1.0
    assert math.isnan(measures.permutation_p([1, 1], [5, 3], draws=9))
    with pytest.raises(ValueError, match="draws must be at least 1"):
        measures.permutation_p(x, x, draws=0)
    with pytest.raises(TypeError, match="draws must be an int"):
        measures.permutation_p(x, x, draws=10.0)
