"""Weightings: weights from Gram matrices, their names, options and saved state."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import oracles
import pytest
import torch
from methods import ALL, BOTH, CROSS, LOSS, ROWS, SIGNED, make
from problems import FAMILIES, family

import flatmtl
from flatmtl import weighting as package
from flatmtl.weighting import MGDA, Mean, PCGrad, Sum, Weighting, by_name

GOLDEN = torch.tensor([[-4.0, 1, 1], [6, 1, 1]], dtype=torch.float64)
CLASSES = {
    "mean": Mean, "sum": Sum, "constant": package.Constant, "pcgrad": PCGrad,
    "gradvac": package.GradVac, "mgda": MGDA, "cagrad": package.CAGrad,
    "nash_mtl": package.NashMTL, "fairgrad": package.FairGrad, "imtl_g": package.IMTLG,
    "aligned_mtl": package.AlignedMTL, "upgrad": package.UPGrad, "dualproj": package.DualProj,
    "config": package.ConFIG, "pivrg": package.PIVRG, "pcd": package.PCD, "krum": package.Krum,
    "sdmgrad": package.SDMGrad, "modo": package.MoDo, "cr_mogm": package.CRMOGM,
    "rlw": package.RandomLossWeighting,
}  # fmt: skip
OTHERS = {"imtl": package.IMTL, "gradnorm": package.GradNorm, "emtl_like": package.EMTLLike}
each = pytest.mark.parametrize("name", ALL)


def random_gram(rng, *shape: int) -> torch.Tensor:
    half = torch.from_numpy(rng.standard_normal((*shape, shape[-1] + 5)))
    return half @ half.mT


# ---- names and shapes ------------------------------------------------------------------------


@each
def test_by_name(name):
    assert type(make(name)) is CLASSES[name] and issubclass(CLASSES[name], Weighting)
    for spelling in (name.upper(), name.replace("_", "-"), name.replace("_", " "),
                     name.replace("_", "")):  # fmt: skip
        assert type(make_as(spelling, name)) is CLASSES[name]


def make_as(spelling: str, name: str) -> Weighting:
    options = {"constant": {"weights": [1.0]}, "krum": {"byzantine": 0},
               "cr_mogm": {"weighting": MGDA()}}  # fmt: skip
    return by_name(spelling, **options.get(name, {}))


def test_the_long_name_of_rlw():
    assert type(by_name("random_loss_weighting", seed=3)) is package.RandomLossWeighting


def test_the_list_is_complete():
    assert list(CLASSES) == ALL and list(OTHERS) == BOTH
    assert set(package.METHODS) == {*ALL, *BOTH, *LOSS, *ROWS}
    named = {m.name: m.cls for m in package.methods() if m.name not in LOSS + ROWS}
    assert named == {**CLASSES, **OTHERS}
    for kind in package.METHODS.values():
        assert kind.__name__ in package.__all__


def test_the_listing():
    """Paper, year, needs and state of every method."""
    needs = {"gram", "norms", "gram and losses", "norms and losses", "cross-gram of two batches",
             "nothing", "losses", "rows", "rows and losses"}  # fmt: skip
    for method in package.methods():
        assert method.needs in needs or method.name == "cr_mogm", method
        assert (method.needs == "cross-gram of two batches") == (method.name in CROSS)
        if method.name not in ("mean", "sum", "constant"):
            assert method.paper and 2000 < method.year < 2027, method
        assert not method.arxiv or len(method.arxiv.split(".")[0]) == 4, method
        assert bool(method.state) == bool(make(method.name).state_dict()), method


def test_the_listing_on_the_command_line(capsys):
    from flatmtl.__main__ import main

    main(["methods"])
    text = capsys.readouterr().out
    for method in package.methods():
        assert method.name in text and (method.arxiv in text)


@each
def test_documented(name):
    assert CLASSES[name].__doc__ and len(CLASSES[name].__doc__) > 80


def test_by_name_passes_options(rng):
    gram = random_gram(rng, 4)
    w = by_name("pcgrad", seed=9, reduction="mean")(gram)
    assert torch.equal(w, PCGrad(seed=9, reduction="mean")(gram))


def test_unknown_name():
    with pytest.raises(ValueError, match="pcgrad") as caught:
        by_name("pcgard")
    assert "pcgard" in str(caught.value) and "mgda" in str(caught.value)


def test_unknown_option():
    with pytest.raises(TypeError):
        by_name("mean", seed=3)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes(name, dtype, rng):
    for tasks in (1, 2, 7):
        w = make(name, tasks)(random_gram(rng, tasks).to(dtype))
        assert w.shape == (tasks,) and w.dtype == torch.float64
        v = make(name, tasks)(random_gram(rng, 3, tasks).to(dtype))
        assert v.shape == (3, tasks) and v.dtype == torch.float64


@each
def test_the_gram_is_not_written(name, rng):
    gram = random_gram(rng, 5)
    before = gram.clone()
    make(name, 5)(gram)
    assert torch.equal(gram, before)


@each
@pytest.mark.parametrize(
    "gram", [torch.ones(3), torch.ones(2, 3), torch.ones(2, 2).long(), [[1.0]]]
)
def test_wrong_gram(name, gram):
    with pytest.raises((ValueError, TypeError), match="gram|cross" if name in CROSS else "gram"):
        make(name, 2)(gram)


# ---- values ----------------------------------------------------------------------------------


def test_golden():
    gram = GOLDEN @ GOLDEN.T
    for weighting, w, d in [
        (Mean(), [0.5, 0.5], [1, 1, 1]),
        (Sum(), [1, 1], [2, 2, 2]),
        (MGDA(), [0.6, 0.4], [0, 1, 1]),
        (PCGrad(), [2.222222, 1.578947], [0.584795, 3.801170, 3.801170]),
        (PCGrad(reduction="mean"), [1.111111, 0.789474], [0.292398, 1.900585, 1.900585]),
    ]:
        np.testing.assert_allclose(weighting(gram).numpy(), w, atol=1e-6)
        np.testing.assert_allclose(flatmtl.aggregate(GOLDEN, weighting).numpy(), d, atol=2e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_fixed_order_pcgrad(name, rng):
    jac = family(rng, name, 7, 30)
    order = np.stack([rng.permutation(7) for _ in range(7)])
    weighting = PCGrad(order=torch.from_numpy(order))
    w = weighting(torch.from_numpy(oracles.gram(jac))).numpy()
    rows = oracles.pcgrad_rows(jac, order)
    scale = oracles.row_norms(jac).sum()
    assert np.linalg.norm(w @ jac - rows.sum(axis=0)) <= 1e-9 * scale
    again = weighting(torch.from_numpy(oracles.gram(jac))).numpy()
    assert np.array_equal(w, again)
    mean = PCGrad(order=torch.from_numpy(order), reduction="mean")
    np.testing.assert_allclose(mean(torch.from_numpy(oracles.gram(jac))).numpy() * 7, w, rtol=1e-14)


def test_random_order_pcgrad_is_one_of_the_orders(rng):
    """T = 3: the result is that of some combination of orders, and over steps not always the same."""
    angles = 2 * np.pi * np.arange(3) / 3 + 0.1
    jac = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array([[1.0], [2], [3]])
    possible = []
    for code in range(8):  # each task visits its two others in one of two orders
        order = np.stack(
            [
                np.array([j for j in range(3) if j != i][:: -1 if code >> i & 1 else 1])
                for i in range(3)
            ]
        )
        possible.append(oracles.pcgrad(jac, order))
    weighting, seen = PCGrad(seed=int(rng.integers(1000))), set()
    for _ in range(100):
        d = weighting(torch.from_numpy(oracles.gram(jac))).numpy() @ jac
        match = [k for k, p in enumerate(possible) if np.allclose(p, d, atol=1e-12)]
        assert match
        seen.add(match[0])
    assert len(seen) > 3


def test_fixed_order_of_a_batch(rng):
    """One order for all problems of the batch."""
    order = torch.stack([torch.randperm(4) for _ in range(4)])
    grams = random_gram(rng, 3, 4)
    w = PCGrad(order=order)(grams)
    for b in range(3):
        assert torch.equal(w[b], PCGrad(order=order)(grams[b]))


def test_linear_weights_of_a_batch(rng):
    grams = random_gram(rng, 3, 4)
    assert (Mean()(grams) == 0.25).all() and (Sum()(grams) == 1).all()


@each
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_inactive_task_gets_no_weight(name, bad, rng):
    gram = random_gram(rng, 4)
    gram[2], gram[:, 2] = bad, bad
    weighting = make(name, 4)
    w = weighting(gram)
    assert w[2] == 0 and torch.isfinite(w).all() and (w != 0).any()
    if name not in SIGNED:
        assert (w[[0, 1, 3]] >= 0).all() and w.sum() > 0
    status = weighting.last_status()
    assert status.inactive_task and not status.no_active_task and not status.not_converged
    assert not status.ok


@each
def test_status_of_zero_gradients(name):
    weighting = make(name, 3)
    assert (weighting(torch.zeros(3, 3)) == 0).all()
    assert weighting.last_status().no_active_task


@each
def test_status(name, rng):
    weighting = make(name, 3)
    with pytest.raises(RuntimeError):
        weighting.last_status()
    weighting(random_gram(rng, 3))
    status = weighting.last_status()
    assert status.ok or (name == "imtl_g" and status.fallback)
    assert not status.ridge_raised and not status.invalid_gram
    assert not (status.inactive_task or status.no_active_task or status.not_converged)
    assert status.bits.dtype == torch.int64
    weighting(torch.zeros(3, 3))
    assert not weighting.last_status().ok  # of the last call, not of any


# ---- randomness and saved state --------------------------------------------------------------


def conflicts(tasks: int = 6) -> torch.Tensor:
    """A Gram on which every order gives other weights."""
    rng = np.random.default_rng(7)
    jac = torch.from_numpy(family(rng, "stationary", tasks, tasks - 1))
    return jac @ jac.T


def run(weighting: Weighting, steps: int) -> list[torch.Tensor]:
    return [weighting(conflicts()) for _ in range(steps)]


def test_pcgrad_seed(rng):
    a, b, c = run(PCGrad(seed=3), 4), run(PCGrad(seed=3), 4), run(PCGrad(seed=4), 4)
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert not any(torch.equal(x, y) for x, y in zip(a, c))
    assert not torch.equal(a[0], a[1])  # a new order at every call


def test_pcgrad_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(PCGrad(seed=1), 3)
    assert torch.equal(torch.rand(3), expected)


def test_pcgrad_reset():
    weighting = PCGrad(seed=3)
    first = run(weighting, 3)
    weighting.reset()
    assert all(torch.equal(x, y) for x, y in zip(first, run(weighting, 3)))


@pytest.mark.parametrize("before", [0, 1, 5])
def test_state_dict_resumes_to_the_bit(before):
    weighting = PCGrad(seed=11)
    run(weighting, before)
    stream = io.BytesIO()
    torch.save(weighting.state_dict(), stream)
    expected = run(weighting, 4)
    stream.seek(0)
    resumed = PCGrad(seed=99)
    resumed.load_state_dict(torch.load(stream, weights_only=True))
    assert all(torch.equal(x, y) for x, y in zip(expected, run(resumed, 4)))


def test_state_dict_is_a_snapshot():
    weighting = PCGrad(seed=11)
    run(weighting, 2)
    state = weighting.state_dict()
    expected = run(weighting, 2)
    weighting.load_state_dict(state)
    assert all(torch.equal(x, y) for x, y in zip(expected, run(weighting, 2)))
    weighting.load_state_dict(state)  # the state was not used up either
    assert torch.equal(expected[0], weighting(conflicts()))


@each
def test_state_round_trip_of_every_method(name):
    weighting, other = make(name, 6), make(name, 6)
    run(weighting, 2)
    other.load_state_dict(weighting.state_dict())
    assert torch.equal(weighting(conflicts()), other(conflicts()))


@each
def test_wrong_state(name):
    with pytest.raises((ValueError, KeyError, TypeError)):
        make(name).load_state_dict({"nonsense": 1})


@each
def test_copies_and_pickles(name):
    weighting = make(name, 6)
    run(weighting, 3)
    twins = [copy.deepcopy(weighting), pickle.loads(pickle.dumps(weighting))]
    expected = weighting(conflicts())
    for twin in twins:
        assert torch.equal(expected, twin(conflicts()))


@pytest.mark.parametrize("order", [
    torch.tensor([[0, 1], [0, 0]]), torch.tensor([[0, 2], [0, 1]]), torch.tensor([0, 1]),
    torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[0, 1, 2], [2, 1, 0]]),
    torch.tensor([[0, -1], [1, 0]]),
])  # fmt: skip
def test_wrong_order(order):
    with pytest.raises((ValueError, TypeError), match="order"):
        PCGrad(order=order)


def test_order_of_another_size(rng):
    with pytest.raises(ValueError, match="order"):
        PCGrad(order=torch.tensor([[0, 1], [1, 0]]))(random_gram(rng, 3))


@pytest.mark.parametrize("options", [{"reduction": "max"}, {"seed": 1.5}, {"reduction": None}])
def test_wrong_options(options):
    with pytest.raises((ValueError, TypeError), match=next(iter(options))):
        PCGrad(**options)


# ---- aggregate -------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_aggregate(name, dtype, device, rng):
    jac = torch.from_numpy(rng.standard_normal((4, 515))).to(dtype).to(device)
    if name in CROSS:  # steps of a fixed length: the larger the gradients, the more they amplify
        return
    d = flatmtl.aggregate(jac, make(name, 4))
    gram = jac.double() @ jac.double().T
    if CLASSES[name].diagonal_only:
        gram = gram.diagonal().diag()
    w = make(name, 4)(gram)
    assert d.dtype == dtype and d.shape == (515,)
    expected = (w @ jac.double()).to(dtype)
    # the roundings of the terms; and those of the Gram, which reach the weights
    tolerance = 4 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-11
    size = float((w.abs() @ jac.double().abs()).max())
    torch.testing.assert_close(d, expected, rtol=tolerance, atol=tolerance * max(size, 1))
    out = torch.empty_like(d)
    assert flatmtl.aggregate(jac, make(name, 4), out=out) is out and torch.equal(out, d)


@each
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_aggregate_leaves_a_bad_task_out(name, bad, rng):
    jac = torch.from_numpy(rng.standard_normal((3, 101)))
    jac[1, 50] = bad
    assert torch.isfinite(flatmtl.aggregate(jac, make(name, 3))).all()


@pytest.mark.parametrize("weighting", ["pcgrad", None, PCGrad])
def test_aggregate_wants_a_weighting(weighting):
    with pytest.raises(TypeError, match="weighting"):
        flatmtl.aggregate(torch.ones(2, 3), weighting)


def test_aggregate_checks_the_rows():
    with pytest.raises((ValueError, TypeError), match="jac"):
        flatmtl.aggregate(torch.ones(3), Mean())
    with pytest.raises((ValueError, TypeError), match="out"):
        flatmtl.aggregate(torch.ones(2, 3), Mean(), out=torch.ones(4))


@pytest.mark.parametrize("make", [
    Mean, Sum, MGDA, lambda: PCGrad(order=torch.tensor([[1, 2, 0], [2, 0, 1], [0, 1, 2]])),
    lambda: PCGrad(seed=5),
], ids=["mean", "sum", "mgda", "pcgrad_fixed", "pcgrad"])  # fmt: skip
def test_aggregate_compiles_in_one_graph(make, rng):
    jac = torch.from_numpy(rng.standard_normal((3, 201)))
    eager, traced = make(), make()
    torch._dynamo.reset()
    compiled = torch.compile(lambda j: flatmtl.aggregate(j, traced), fullgraph=True,
                             backend="aot_eager")  # fmt: skip
    for _ in range(3):  # the random stream advances inside the graph too
        assert torch.equal(compiled(jac), flatmtl.aggregate(jac, eager))
