"""MAML: against closed forms of quadratics, and against plain autograd with a graph of the inner step."""

from __future__ import annotations

import copy
import inspect
import io

import numpy as np
import pytest
import torch
from quadratics import Problem, snapshot, untouched
from torch import Tensor, nn
from torch.func import functional_call

import flatmtl
from flatmtl import MAML, MultiTaskOptimizer
from flatmtl.integrations._micro import divided
from flatmtl.weighting import MGDA, Mean, PCGrad, Sum

forms = pytest.mark.parametrize("first_order", [True, False], ids=["first", "full"])
LR = 0.05


class Net(nn.Module):
    """A trunk and three heads; the losses are sums, so that those of parts add up."""

    def __init__(self, norm: bool = False, dropout: float = 0.0, dtype=torch.float64) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Tanh(),
            nn.Dropout(dropout), nn.Linear(8, 6), nn.Tanh(),
        )  # fmt: skip
        self.heads = nn.ModuleList([nn.Linear(6, k) for k in (1, 2, 3)])
        self.to(dtype)

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.trunk(x)
        return [
            0.1 * ((-1) ** i * head(h) - x[:, i : i + 1]).square().sum()
            for i, head in enumerate(self.heads)
        ]


class Data:
    """A support and a query batch, and a closure that counts its calls."""

    def __init__(self, net: Net, rows: int = 12, query: bool = True) -> None:
        dtype = net.heads[0].weight.dtype
        self.net, self.support = net, torch.randn(rows, 5, dtype=dtype)
        self.query = torch.randn(rows + 3, 5, dtype=dtype) if query else self.support
        self.calls: list[tuple[list[int] | None, bool]] = []

    def both(self, tasks=None, query=False):
        self.calls.append((tasks, query))
        losses = self.net(self.query if query else self.support)
        return losses if tasks is None else [losses[t] for t in tasks]

    def alone(self):
        self.calls.append((None, False))
        return self.net(self.support)


def wrap(net, sharpness, weighting=None, lr=0.1, base=torch.optim.SGD, **options):
    params = net.parameters()
    if isinstance(net, nn.Module):
        options.setdefault("model", net)
    return MultiTaskOptimizer(
        base(params, lr=lr), weighting=weighting or Sum(), sharpness=sharpness, **options
    )


def grads(net) -> Tensor:
    return torch.cat([p.grad.reshape(-1).double() for p in net.parameters()])


def flat(net) -> Tensor:
    return torch.cat([p.detach().reshape(-1).double() for p in net.parameters()])


def near(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    assert torch.linalg.vector_norm(a - b) <= tolerance * torch.linalg.vector_norm(b), (a, b)


def oracle(net: Net, maml: MAML, support: Tensor, query: Tensor, weighting, state=None) -> Tensor:
    """The update in float64 by plain autograd: a graph of the inner step, one row a task.

    ``state``: of the generator, before every forward pass."""
    twin = copy.deepcopy(net).double()
    names = [name for name, _ in twin.named_parameters()]
    values = [p for _, p in twin.named_parameters()]
    buffers = {name: b.clone() for name, b in twin.named_buffers()}

    def loss(params, x, task):
        if state is not None:
            torch.set_rng_state(state)
        kept = {name: b.clone() for name, b in buffers.items()}
        return functional_call(twin, {**dict(zip(names, params)), **kept}, (x.double(),))[task]

    rows = []
    for task in range(3):
        inner = torch.autograd.grad(
            loss(values, support, task), values, create_graph=True, allow_unused=True
        )
        moved = [p if g is None else p - maml.lr * g for p, g in zip(values, inner)]
        if maml.first_order:
            moved = [p.detach().requires_grad_() for p in moved]
        wanted = moved if maml.first_order else values
        rows.append(torch.autograd.grad(loss(moved, query, task), wanted, allow_unused=True))
    trunk = [k for k, name in enumerate(names) if name.startswith("trunk")]
    jac = torch.stack([torch.cat([row[k].reshape(-1) for k in trunk]) for row in rows])
    shared = weighting(jac @ jac.T) @ jac
    own = [
        next(row[k] for row in rows if row[k] is not None).reshape(-1)
        for k in range(len(names))
        if k not in trunk
    ]
    return torch.cat([shared, *own]).detach()


# ---- what it computes ----------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("head", [4, 0])
def test_quadratics(first_order, dtype, head, rng):
    """(I - a A'A) A'(A theta' - b), over shared and own parameters jointly."""
    first, other = (Problem(rng, head=head, dtype=dtype) for _ in range(2))
    lr = float(10 ** rng.uniform(-4, -1.7))

    def closure(query=False):
        if not query:
            return first.losses()
        return [
            0.5 * (other.a[i] @ torch.cat([p.reshape(-1) for p in first.shared]
                                          + first.heads[i : i + 1]) - other.b[i]).square().sum()
            for i in range(3)
        ]  # fmt: skip

    opt = wrap(first, MAML(lr, first_order=first_order))
    before = snapshot(first.parameters())
    opt.backward(closure)
    assert untouched(first.parameters(), before)
    shared, own = np.zeros(7), []
    for i in range(3):
        a, b = first.tasks[i].a, first.tasks[i].b
        x = np.concatenate([first.shared_values(), first.head_values()[i]])
        moved = x - lr * a.T @ (a @ x - b)
        aq, bq = other.tasks[i].a, other.tasks[i].b
        s = aq.T @ (aq @ moved - bq)
        if not first_order:
            s = s - lr * a.T @ (a @ s)
        shared += s[:7]
        own.append(s[7:])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    found = np.concatenate([first.shared_grad(), *first.head_grads()])
    wanted = np.concatenate([shared, *own]) if head else shared
    assert np.linalg.norm(found - wanted) <= tolerance * max(
        np.linalg.norm(wanted), np.linalg.norm(np.abs(shared))
    )


@forms
@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e3, 1e8])
def test_hard_scales(first_order, scale, rng):
    problem = Problem(rng, scale=scale)
    lr = 0.01 / scale**2
    opt = wrap(problem, MAML(lr, first_order=first_order))
    opt.backward(problem.losses)
    for i in range(3):
        a, b = problem.tasks[i].a, problem.tasks[i].b
        x = np.concatenate([problem.shared_values(), problem.head_values()[i]])
        s = a.T @ (a @ (x - lr * a.T @ (a @ x - b)) - b)
        if not first_order:
            s = s - lr * a.T @ (a @ s)
        error = np.linalg.norm(problem.head_grads()[i] - s[7:])
        assert error <= 1e-11 * np.linalg.norm(s)


@forms
@pytest.mark.parametrize("query", [True, False], ids=["query", "same"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("weighting", [Sum, MGDA])
def test_networks(first_order, query, dtype, weighting, rng):
    """Own heads get their own meta gradient; the weighting sees the meta gradients' Gram matrix."""
    net = Net(dtype=dtype)
    data = Data(net, query=query)
    maml = MAML(LR, first_order=first_order)
    wanted = oracle(net, maml, data.support, data.query, weighting())
    opt = wrap(net, maml, weighting())
    losses = opt.step(data.both if query else data.alone)
    near(torch.stack(losses), torch.stack(net_losses(net, opt, data.support)), 1e-6)
    # MGDA's weights are of float32 rows, its condition enlarges their rounding
    near(grads(net), wanted, 1e-11 if dtype == torch.float64 else 2e-3)


def net_losses(net, opt, x) -> list[Tensor]:
    """The losses before the step that was just made (plain SGD)."""
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for p, q in zip(twin.parameters(), net.parameters()):
            p.add_(q.grad, alpha=opt.param_groups[0]["lr"])
        return twin(x)


@forms
def test_dropout_with_replay(first_order, rng):
    """Inner step, query and Hessian are of one mask; the generator ends where the clean pass left it."""
    net = Net(dropout=0.5)
    data = Data(net)
    data.query = data.query[:12]  # as many rows: the same masks
    maml = MAML(LR, first_order=first_order)
    state = torch.get_rng_state()
    wanted = oracle(net, maml, data.support, data.query, Sum(), state)
    torch.set_rng_state(state)
    data.net(data.support)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    opt = wrap(net, maml, replay_rng=True)
    opt.step(data.both)
    near(grads(net), wanted)
    assert torch.equal(torch.get_rng_state(), after)


@forms
def test_batchnorm_keeps_the_clean_statistics(first_order, rng):
    net = Net(norm=True)
    data = Data(net)
    maml = MAML(LR, first_order=first_order)
    wanted = oracle(net, maml, data.support, data.query, Sum())
    once = copy.deepcopy(net)
    once(data.support)
    wrap(net, maml).step(data.both)
    near(grads(net), wanted)
    for (name, b), c in zip(net.named_buffers(), once.buffers()):
        assert torch.equal(b, c), name


@forms
def test_heads_of_another_dtype(first_order, rng):
    """Every role has its own dtype; the Hessian has blocks across them."""
    net = Net()
    x = torch.randn(12, 5, dtype=torch.float64)
    maml = MAML(LR, first_order=first_order)
    net.trunk.float()
    wanted = oracle(net, maml, x, x, Sum())

    def closure():
        h = net.trunk(x.float()).double()
        return [
            0.1 * ((-1) ** i * head(h) - x[:, i : i + 1]).square().sum()
            for i, head in enumerate(net.heads)
        ]

    wrap(net, maml).step(closure)
    near(grads(net), wanted, 1e-4)


@forms
@pytest.mark.parametrize("options", [dict(jacobian="batched"), dict(row_dtype=torch.bfloat16)])
def test_other_ways_to_keep_and_take_rows(first_order, options, rng):
    net = Net(dtype=torch.float32)
    data = Data(net)
    maml = MAML(LR, first_order=first_order)
    wanted = oracle(net, maml, data.support, data.query, Sum())
    wrap(net, maml, **options).step(data.both)
    near(grads(net), wanted, 0.03 if "row_dtype" in options else 1e-4)


@forms
def test_without_an_inner_step_it_is_the_plain_step(first_order, rng):
    """Bit for bit, with a weighting that draws."""
    net = Net()
    twin = copy.deepcopy(net)
    x = torch.randn(12, 5, dtype=torch.float64)
    first = wrap(net, MAML(0.0, first_order=first_order), PCGrad(seed=3))
    second = wrap(twin, None, PCGrad(seed=3))
    for _ in range(3):
        first.step(lambda: net(x))
        second.step(lambda: twin(x))
        assert torch.equal(flat(net), flat(twin))


def test_a_linear_loss_has_no_hessian(rng):
    shared, own = (nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(2))
    opt = MultiTaskOptimizer(
        torch.optim.SGD([shared, own], lr=0.1), weighting=Sum(), sharpness=MAML(0.1, False)
    )
    opt.backward(lambda: [shared.sum() + 2 * own.sum(), 3 * shared.sum()])
    assert torch.equal(shared.grad, torch.full((3,), 4.0, dtype=torch.float64))
    assert torch.equal(own.grad, torch.full((3,), 2.0, dtype=torch.float64))


@forms
def test_micro_batches_add_up(first_order, rng):
    """The inner step is on all of them; products with their Hessians are of the summed gradient."""
    net = Net()
    twin = copy.deepcopy(net)
    data = Data(net, rows=12)
    whole = wrap(twin, MAML(LR, first_order=first_order))
    whole.step(lambda query=False: twin(data.query if query else data.support))

    def part(rows, others):
        return lambda query=False: net(data.query[others] if query else data.support[rows])

    opt = wrap(net, MAML(LR, first_order=first_order))
    opt.step([part(slice(4), slice(7)), part(slice(4, 12), slice(7, None))])
    near(grads(net), grads(twin))


def without_one(jac: Tensor) -> Tensor:
    """Weights of a sum that leaves task 1 out."""
    return torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)


def near_but_one(net: Net, wanted: Tensor) -> None:
    """The trunk's gradients and those of heads 0 and 2."""
    twin = copy.deepcopy(net)
    nn.utils.vector_to_parameters(wanted, twin.parameters())
    for part in ("trunk", "heads.0", "heads.2"):
        for p, q in zip(
            net.get_submodule(part).parameters(), twin.get_submodule(part).parameters()
        ):
            near(p.grad, q.detach())


@forms
def test_a_task_that_is_missing(first_order, rng):
    net = Net()
    data = Data(net)
    maml = MAML(LR, first_order=first_order)
    opt = wrap(net, maml, Sum())
    opt.step(data.both)  # every task is known from here on
    wanted = oracle(net, maml, data.support, data.query, without_one)
    data.calls.clear()

    def closure(tasks=None, query=False):
        losses = data.both(tasks, query)
        return losses if tasks else [losses[0], None, losses[2]]

    opt.step(closure)
    assert [1] not in [tasks for tasks, _ in data.calls]
    near_but_one(net, wanted)
    assert all(p.grad is None for p in net.heads[1].parameters())


# ---- what it asks of the closure -----------------------------------------------------------------


@forms
def test_passes_and_what_they_ask_for(first_order, rng, monkeypatch):
    """1 forward and T backwards; then T and T; in the full form T more, and T double backwards."""
    net = Net()
    data = Data(net)
    count = []
    plain = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *a, **k: (count.append(1), plain(*a, **k))[1]
    )
    opt = wrap(net, MAML(LR, first_order=first_order))
    opt.step(data.both)
    again = [
        ([t], query) for t in range(3) for query in ((True,) if first_order else (True, False))
    ]
    assert data.calls == [(None, False), *again]
    assert len(count) == (6 if first_order else 12)
    data.calls.clear()
    opt.step(data.alone)
    assert len(data.calls) == (4 if first_order else 7)


def test_query_passes_through_wrappers(rng):
    """What divides losses for accumulation passes on what the closure takes, and nothing else."""
    asked = []

    def closure(tasks=None, query=False):
        asked.append((tasks, query))
        return [torch.ones(())]

    assert list(inspect.signature(divided(closure, 2)).parameters) == ["tasks", "query"]
    net = Net()
    data, twin = Data(net), copy.deepcopy(net)
    wrap(net, MAML(LR)).step(divided(data.both, 2))
    assert [query for _, query in data.calls] == [False, True, True, True]
    other = wrap(twin, MAML(LR / 2))  # half the loss takes half the inner step
    other.step(lambda query=False: twin(data.query if query else data.support))
    near(2 * grads(net), grads(twin))


def test_tasks_by_name(rng):
    net = Net()
    twin = copy.deepcopy(net)
    data = Data(net)

    def named(tasks=None, query=False):
        losses = dict(zip("abc", net(data.query if query else data.support)))
        return losses if tasks is None else {t: losses[t] for t in tasks}

    found = wrap(net, MAML(LR)).step(named)
    assert list(found) == ["a", "b", "c"]
    wrap(twin, MAML(LR)).step(lambda query=False: twin(data.query if query else data.support))
    near(grads(net), grads(twin))


# ---- what must not happen ------------------------------------------------------------------------


@forms
def test_a_failing_closure_changes_nothing(first_order, rng):
    calls = 4 if first_order else 7
    for fails in range(calls):
        net = Net(norm=True, dropout=0.3)
        data = Data(net)
        opt = wrap(net, MAML(LR, first_order=first_order), PCGrad(), base=torch.optim.Adam)
        opt.step(data.both)
        data.calls.clear()

        def closure(tasks=None, query=False):
            losses = data.both(tasks, query)
            if len(data.calls) > fails:
                raise ArithmeticError("boom")
            return losses

        tensors = [*net.parameters(), *net.buffers()]
        before, random = snapshot(tensors), torch.get_rng_state()
        state = copy.deepcopy(opt.state_dict())
        with pytest.raises(ArithmeticError):
            opt.step(closure)
        assert untouched(tensors, before)
        assert torch.equal(torch.get_rng_state(), random)
        assert str(opt.state_dict()) == str(state)
        with pytest.raises(RuntimeError, match="closure must be given"):
            opt.step()


class Bad:
    """Losses of which that of task 1 goes wrong in one kind of pass."""

    def __init__(self, net: Net, where: str) -> None:
        self.net, self.where = net, where
        self.x = torch.randn(12, 5, dtype=torch.float64)

    def __call__(self, query=False):
        assert all(p.isfinite().all() for p in self.net.parameters())
        losses = self.net(self.x)
        bias = self.net.heads[1].bias
        if self.where == "hessian":  # the first derivative is 0, the second infinite
            losses[1] = losses[1] + ((bias - bias.detach()).abs() + 0.0).pow(1.5).sum()
        elif query == (self.where == "query"):
            losses[1] = losses[1] * torch.nan
        return losses


@pytest.mark.parametrize("where", ["support", "query", "hessian"])
@pytest.mark.parametrize("nonfinite", ["raise", "mask", "skip"])
def test_what_is_not_finite(where, nonfinite, rng):
    """No closure is run at parameters of NaN; the other tasks go on as if the one had weight 0."""
    net = Net()
    twin = copy.deepcopy(net)
    maml = MAML(LR, first_order=False)
    opt = wrap(net, maml, Sum(), nonfinite=nonfinite)
    bad = Bad(net, where)
    before = snapshot(list(net.parameters()))
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match="1"):
            opt.step(bad)
        assert untouched(list(net.parameters()), before)
        return
    opt.step(bad)
    assert opt.last_status()["finite"] == {0: True, 1: False, 2: True}
    if nonfinite == "skip":
        assert untouched(list(net.parameters()), before)
        return
    assert all((p.grad == 0).all() for p in net.heads[1].parameters())
    near_but_one(net, oracle(twin, maml, bad.x, bad.x, without_one))


@forms
@pytest.mark.parametrize("scale", [2.0**12, 3000.0])
def test_with_a_grad_scaler(first_order, scale, rng):
    net = Net(norm=True)
    twin = copy.deepcopy(net)
    data = Data(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    first, second = (wrap(n, MAML(LR, first_order=first_order), MGDA()) for n in (net, twin))
    first.backward(data.both, scaler=scaler)
    data.net = twin
    second.step(data.both)
    near(grads(net), scale * grads(twin), 1e-9)
    scaler.step(first)
    scaler.update()
    near(flat(net), flat(twin), 1e-6)  # the scaler's reciprocal is float32
    before = snapshot([*net.parameters(), *net.buffers()])
    data.net = net
    first.backward(
        lambda query=False: [a * (torch.inf if query else 1) for a in data.both(query=query)],
        scaler=scaler,
    )
    scaler.step(first)
    assert untouched([*net.parameters(), *net.buffers()], before)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (dict(lr="a"), TypeError, "lr must be a number"),
        (dict(lr=True), TypeError, "lr must be a number"),
        (dict(lr=-0.1), ValueError, "lr must be finite and at least 0"),
        (dict(lr=float("nan")), ValueError, "lr must be finite"),
        (dict(lr=0.1, first_order=1), TypeError, "first_order must be True or False"),
    ],
)
def test_bad_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        MAML(**arguments)


def test_what_it_does_not_go_with(rng):
    net = Net()
    with pytest.raises(ValueError, match="weights_every must be 1 with MAML, got 2"):
        wrap(net, MAML(LR), weights_every=2)
    with pytest.raises(ValueError, match="jacobian must not be Representation"):
        wrap(net, MAML(LR), jacobian=flatmtl.Representation(net.trunk))
    with pytest.raises(ValueError, match="must minimise"):
        base = torch.optim.SGD(net.parameters(), lr=0.1, maximize=True)
        MultiTaskOptimizer(base, weighting=Mean(), sharpness=MAML(LR))
    with pytest.raises(TypeError, match=r"flatmtl\.MAML\(\.\.\.\)"):
        wrap(net, "maml")
    opt = wrap(net, MAML(LR))
    data = Data(net)
    with pytest.raises(ValueError, match="losses must be a closure"):
        opt.backward(data.alone())
    opt.backward(data.both)
    with pytest.raises(RuntimeError, match="all micro-batches"):
        opt.backward(data.both)
    assert opt.runs_again
    assert opt.sharpness == MAML(LR)
    assert "rho" not in opt.param_groups[0]


# ---- beside the step -----------------------------------------------------------------------------


@forms
def test_history(first_order, rng):
    """Its "sharpness" is the query loss behind the inner step minus the support loss before it."""
    net = Net()
    data = Data(net)
    opt = wrap(net, MAML(LR, first_order=first_order), history=4)
    support = [float(v.detach()) for v in net(data.support)]
    after = []

    def closure(tasks=None, query=False):
        losses = data.both(tasks, query)
        if query:
            after.append(float(losses[0].detach()))
        return losses

    opt.step(closure)
    found = opt.history.arrays()
    np.testing.assert_allclose(found["losses"][0], support, rtol=1e-6)
    rise = np.array(after) - np.array(support)
    np.testing.assert_allclose(found["sharpness"][0], rise, rtol=1e-5, atol=1e-5)
    assert (found["weights"][0] == 1).all()
    assert np.isfinite(found["cosines"]).all()


@pytest.mark.filterwarnings("error")
def test_a_large_query_loss_is_no_large_radius(rng):
    """The warning of a radius that is too large is SAM's."""
    net = Net()
    data = Data(net)
    opt = wrap(net, MAML(1e-4), lr=1e-9)
    for _ in range(3):
        opt.step(lambda query=False: [a * (1000 if query else 1) for a in data.both(query=query)])


@pytest.mark.parametrize("mode", ["first_order", "exact"])
def test_affinities_are_of_the_plain_gradients(mode, rng):
    """A probe sees the gradients at the parameters, as at a plain step, and changes nothing."""
    nets = [Net(norm=True)]
    nets += [copy.deepcopy(nets[0]) for _ in range(2)]
    data = [Data(n) for n in nets]
    for d in data[1:]:
        d.support, d.query = data[0].support, data[0].query
    maml, plain, alone = (wrap(n, s) for n, s in zip(nets, (MAML(LR), None, MAML(LR))))
    probes = [flatmtl.AffinityProbe(o, mode=mode) for o in (maml, plain)]
    for o, d in zip((maml, plain, alone), data):
        o.step(d.both)
    found = [p.record().matrix() for p in probes]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-10, atol=1e-12)
    assert torch.equal(flat(nets[0]), flat(nets[2]))


def test_a_run_resumes_bit_for_bit(rng):
    net = Net(dropout=0.2)
    data = Data(net)
    opt = wrap(net, MAML(LR), PCGrad(seed=5), base=torch.optim.Adam)
    opt.step(data.both)
    file = io.BytesIO()
    torch.save((net.state_dict(), opt.state_dict(), torch.get_rng_state()), file)
    opt.step(data.both)
    wanted = flat(net)
    file.seek(0)
    model, state, random = torch.load(file, weights_only=False)
    other = Net(dropout=0.2)
    data.net = other
    again = wrap(other, MAML(LR), PCGrad(seed=5), base=torch.optim.Adam)
    other.load_state_dict(model)
    again.load_state_dict(state)
    torch.set_rng_state(random)
    again.step(data.both)
    assert torch.equal(flat(other), wanted)


def test_it_trains(rng):
    """Tasks that one inner step solves: the loss behind the step falls."""
    net = Net()
    data = Data(net)
    opt = wrap(net, MAML(LR, first_order=False), Mean(), lr=0.05, history=100)
    for _ in range(60):
        opt.step(data.both)
    found = opt.history.arrays()
    behind = (found["losses"] + found["sharpness"]).sum(1)
    assert behind[-1] < 0.7 * behind[0]
