"""flatmtl's weightings inside TorchJD and TorchJD's inside flatmtl, each against its own package."""

import copy
import io
import pickle
import sys

import pytest
import torch
from torch import nn

import flatmtl
from flatmtl import interchange
from flatmtl.interchange import from_torchjd, to_torchjd
from flatmtl.weighting import by_name


def rows(tasks=4, columns=30, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tasks, columns, generator=generator, dtype=dtype)


@pytest.fixture
def aggregation():
    pytest.importorskip("torchjd")
    from torchjd import aggregation

    return aggregation


class Shared(nn.Module):
    """Two tasks on one trunk."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def losses(self, x):
        out = self.trunk(x)
        return [out[:, 0].square().mean(), (out[:, 1] - out[:, 0]).mean(), out[:, 2].exp().mean()]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Shared()


@pytest.fixture
def batch():
    return torch.randn(16, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# ---------------------------------------------------------------- flatmtl in TorchJD

GRAM_METHODS = ["mean", "mgda", "cagrad", "nash_mtl", "fairgrad", "imtl_g", "aligned_mtl", "upgrad"]


@pytest.mark.parametrize("name", GRAM_METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_torchjd_gives_flatmtls_weights(aggregation, name, dtype):
    gram = (rows() @ rows().T).to(dtype)
    weights = to_torchjd(by_name(name))(gram)
    assert weights.dtype == dtype
    torch.testing.assert_close(weights, by_name(name)(gram).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("name", GRAM_METHODS)
def test_aggregator_gives_flatmtls_update(aggregation, name):
    jac = rows()
    update = aggregation.GramianWeightedAggregator(to_torchjd(by_name(name)))(jac)
    expected = flatmtl.aggregate(jac, by_name(name))
    torch.testing.assert_close(update, expected, rtol=1e-9, atol=1e-12)


def test_half_precision_gramians(aggregation):
    gram = (rows() @ rows().T).to(torch.bfloat16)
    weights = to_torchjd(by_name("mgda"))(gram)
    assert weights.dtype == torch.bfloat16
    assert float(weights.float().sum()) == pytest.approx(1, abs=0.02)


def test_weights_carry_no_gradient(aggregation):
    jac = rows().requires_grad_()
    assert not to_torchjd(by_name("upgrad"))(jac @ jac.T).requires_grad


def test_gradients_through_autojac(aggregation, model, batch):
    from torchjd.autojac import backward, jac_to_grad

    aggregator = aggregation.GramianWeightedAggregator(to_torchjd(by_name("nash_mtl")))
    backward(model.losses(batch))
    jac_to_grad(model.parameters(), aggregator)

    params = list(model.parameters())
    grads = [torch.autograd.grad(loss, params, retain_graph=True) for loss in model.losses(batch)]
    jac = torch.stack([torch.cat([g.flatten() for g in task]) for task in grads])
    expected = flatmtl.aggregate(jac, by_name("nash_mtl"))
    found = torch.cat([p.grad.flatten() for p in params])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_weighting_of_an_autogram_gramian(aggregation, model, batch):
    from torchjd.autogram import Engine

    engine = Engine(model.trunk, batch_dim=None)
    losses = torch.stack(model.losses(batch))
    gramian = engine.compute_gramian(losses)
    weights = to_torchjd(by_name("imtl_g"))(gramian)
    losses.backward(weights)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(weights, by_name("imtl_g")(gramian.detach()), rtol=0, atol=0)


def test_inside_torchjds_own_wrapper(aggregation):
    gram = rows() @ rows().T
    wrapped = aggregation.CRMOGMWeighting(to_torchjd(by_name("mgda")), alpha=0.5)
    torch.testing.assert_close(wrapped(gram), by_name("mgda")(gram))
    other = rows(seed=1) @ rows(seed=1).T
    expected = 0.5 * by_name("mgda")(gram) + 0.5 * by_name("mgda")(other)
    torch.testing.assert_close(wrapped(other), expected)


def test_state_is_the_modules_state(aggregation):
    grams = [rows(seed=s) @ rows(seed=s).T for s in range(4)]
    module = to_torchjd(by_name("gradvac", seed=3))
    for gram in grams[:2]:
        module(gram)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    expected = [module(gram) for gram in grams[2:]]
    resumed = to_torchjd(by_name("gradvac", seed=3))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(resumed(gram), e) for gram, e in zip(grams[2:], expected, strict=True))
    module.reset()
    fresh = to_torchjd(by_name("gradvac", seed=3))
    assert torch.equal(module(grams[0]), fresh(grams[0]))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_module_can_be_copied_and_pickled(aggregation, duplicate):
    gram = rows() @ rows().T
    module = to_torchjd(by_name("pcgrad", seed=5))
    module(gram)
    other = duplicate(module)
    assert torch.equal(other(gram), module(gram))


def test_to_torchjd_wants_a_flatmtl_weighting(aggregation):
    with pytest.raises(TypeError, match="weighting must be a flatmtl Weighting, got UPGradW"):
        to_torchjd(aggregation.UPGradWeighting())


# ---------------------------------------------------------------- TorchJD in flatmtl


def torchjd_weightings():
    return [
        "MGDAWeighting",
        "IMTLGWeighting",
        "AlignedMTLWeighting",
        "PCDWeighting",
        "MeanWeighting",
    ]


@pytest.mark.parametrize("name", torchjd_weightings())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_from_torchjd_gives_torchjds_weights(aggregation, name, dtype):
    gram = (rows() @ rows().T).to(dtype)
    weighting = from_torchjd(getattr(aggregation, name)())
    weights = weighting(gram)
    assert weights.dtype == torch.float64
    torch.testing.assert_close(weights, getattr(aggregation, name)()(gram).double(), rtol=0, atol=0)
    status = weighting.last_status()
    assert status.ok
    assert status.residual is None


def test_upgrad_and_its_aggregator(aggregation):
    pytest.importorskip("quadprog")
    pytest.importorskip("qpsolvers")
    jac = rows()
    expected = aggregation.UPGrad()(jac)
    for theirs in (aggregation.UPGradWeighting(), aggregation.UPGrad()):
        torch.testing.assert_close(flatmtl.aggregate(jac, from_torchjd(theirs)), expected)


def test_scaling_and_max_norm_are_flatmtls(aggregation):
    jac = rows()
    gram = jac @ jac.T
    unit = from_torchjd(aggregation.AlignedMTLWeighting(), scaling="sum_to_one")(gram)
    assert float(unit.sum()) == pytest.approx(1)
    clipped = from_torchjd(aggregation.AlignedMTLWeighting(), max_norm=0.1)
    assert float(flatmtl.aggregate(jac, clipped).norm()) == pytest.approx(0.1)


@pytest.mark.parametrize("name", torchjd_weightings())
def test_a_batch_is_solved_one_by_one(aggregation, name):
    grams = torch.stack([rows(seed=s) @ rows(seed=s).T for s in range(3)])
    expected = torch.stack([getattr(aggregation, name)()(gram) for gram in grams])
    assert torch.equal(from_torchjd(getattr(aggregation, name)())(grams), expected)


def test_a_stateful_weighting_has_a_state_for_each_problem(aggregation):
    first, second = (
        torch.stack([rows(seed=s) @ rows(seed=s).T for s in seeds]) for seeds in ((0, 1), (2, 3))
    )
    weighting = from_torchjd(aggregation.PCDWeighting())
    weighting(first)
    found = weighting(second)
    for k in range(2):
        alone = aggregation.PCDWeighting()
        alone(first[k])
        assert torch.equal(found[k], alone(second[k]))
    with pytest.raises(ValueError, match=r"gram must hold 2 problems.*reset"):
        weighting(first[0])


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_inactive_tasks_get_weight_zero(aggregation, bad):
    jac = rows()
    gram = jac @ jac.T
    gram[1] = gram[:, 1] = bad
    weighting = from_torchjd(aggregation.AlignedMTLWeighting())
    weights = weighting(gram)
    assert weights[1] == 0
    assert weights.isfinite().all()
    assert weights.ne(0).sum() == 3
    assert weighting.last_status().inactive_task
    assert weighting(torch.zeros(3, 3)).eq(0).all()
    assert weighting.last_status().no_active_task


def test_weights_that_are_not_finite_are_replaced_and_reported(aggregation):
    class Broken(aggregation.Weighting):
        def forward(self, stat):
            return torch.full((len(stat),), float("nan")) if stat[0, 0] > 2 else stat.diagonal()

    weighting = from_torchjd(Broken())
    grams = torch.stack([torch.diag(torch.tensor([4.0, 1.0])), torch.eye(2)]).double()
    weights = weighting(grams)
    expected = torch.tensor([[1 / 3, 2 / 3], [1, 1]], dtype=torch.float64)
    torch.testing.assert_close(weights, expected)
    assert weighting.last_status().bits.tolist() == [4 | 16, 0]
    assert not weighting.last_status().ok


STATEFUL = ["GradVacWeighting", "PCDWeighting", "MoDoWeighting", "SDMGradWeighting"]


@pytest.mark.parametrize("problems", [None, 2])
@pytest.mark.parametrize("name", STATEFUL)
def test_state_resumes_bit_for_bit(aggregation, name, problems):
    def gram(seed):
        if problems is None:
            return rows(seed=seed) @ rows(seed=seed).T
        return torch.stack([rows(seed=seed + k) @ rows(seed=seed + k).T for k in range(problems)])

    def go_on(weighting):
        torch.manual_seed(0)  # TorchJD's GradVac draws from torch's own generator
        return [weighting(gram(seed)) for seed in (20, 30)]

    weighting = from_torchjd(getattr(aggregation, name)())
    for seed in (0, 10):
        weighting(gram(seed))
    file = io.BytesIO()
    torch.save(weighting.state_dict(), file)
    file.seek(0)
    expected = go_on(weighting)
    resumed = from_torchjd(getattr(aggregation, name)())
    resumed.load_state_dict(torch.load(file, weights_only=True))
    found = go_on(resumed)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    resumed.reset()
    torch.manual_seed(0)
    fresh = from_torchjd(getattr(aggregation, name)())
    first = fresh(gram(0))
    torch.manual_seed(0)
    assert torch.equal(resumed(gram(0)), first)


def test_a_state_of_another_weighting_is_refused(aggregation):
    weighting = from_torchjd(aggregation.PCDWeighting())
    gram = rows() @ rows().T
    weighting(gram)
    before = weighting.state_dict()
    other = from_torchjd(aggregation.GradVacWeighting())
    other(gram)
    with pytest.raises(ValueError, match="state must be one of PCDWeighting"):
        weighting.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="must have the entries"):
        weighting.load_state_dict({})
    after = weighting.state_dict()
    assert str(before) == str(after)


def test_a_twin_has_its_own_state(aggregation):
    weighting = from_torchjd(aggregation.PCDWeighting())
    gram = rows() @ rows().T
    weighting(gram)
    twin = weighting.twin()
    assert torch.equal(twin(2 * gram), from_torchjd(aggregation.PCDWeighting())(2 * gram))
    assert float(weighting.torchjd_weighting._n_steps) == 1


def test_optimizer_step(aggregation, model, batch):
    reference = copy.deepcopy(model)
    optimizer = flatmtl.MultiTaskOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        weighting=from_torchjd(aggregation.IMTLGWeighting()),
        model=model,
    )
    losses = optimizer.step(lambda: model.losses(batch))
    assert len(losses) == 3

    from torchjd.autojac import backward, jac_to_grad

    backward(reference.losses(batch))
    jac_to_grad(reference.parameters(), aggregation.IMTLG())
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    for found, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)


def test_optimizer_with_sharpness_and_checkpoint(aggregation, model, batch):
    def optimizer(network):
        return flatmtl.MultiTaskOptimizer(
            torch.optim.SGD(network.parameters(), lr=0.1),
            weighting=from_torchjd(aggregation.PCDWeighting()),
            sharpness=flatmtl.SAM(0.05),
            model=network,
        )

    def step(opt, network):
        opt.step(
            lambda tasks=None: [
                loss for k, loss in enumerate(network.losses(batch)) if tasks is None or k in tasks
            ]
        )

    first = optimizer(model)
    step(first, model)
    other = copy.deepcopy(model)
    second = optimizer(other)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    step(first, model)
    step(second, other)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_from_torchjd_refuses_what_takes_no_gramian(aggregation):
    with pytest.raises(TypeError, match="weighting must be a TorchJD weighting.*got MGDA$"):
        from_torchjd(by_name("mgda"))
    with pytest.raises(TypeError, match="got type|got MGDAWeighting"):
        from_torchjd(aggregation.MGDAWeighting)
    with pytest.raises(TypeError, match="ExcessMTLWeighting takes the Jacobian"):
        from_torchjd(aggregation.ExcessMTLWeighting())


# ---------------------------------------------------------------- without TorchJD


def test_without_torchjd_the_error_names_the_extra(monkeypatch):
    interchange._module_class.cache_clear()
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(ImportError, match=r'pip install "flatmtl\[peers\]"'):
        to_torchjd(by_name("mean"))
    with pytest.raises(ImportError, match=r'pip install "flatmtl\[peers\]"'):
        from_torchjd(object())
