"""A hundred training steps of whole networks against the float64 reference of reference_fs_mtl.py.

Two statements about each case:

- in float64, flatmtl and the reference make the same hundred steps;
- in float32, a step of flatmtl is at most twice as far from the exact one as a step of the same
  reference run in float32, that is, of plain torch. All three start every step from one state, which
  float32 holds exactly, along the float64 trajectory: two float32 trajectories drift apart chaotically,
  and which one is nearer after a hundred steps of their own is luck. The errors are root mean squares
  over the hundred steps.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import reference_fs_mtl as ref
import torch
import training_nets as nets
from reference_fs_mtl import Reference, Sharpness
from torch import Tensor, nn

from flatmtl import SAM, MultiTaskOptimizer
from flatmtl.weighting import MGDA, CAGrad, Constant, FairGrad, Mean, NashMTL, PCGrad, Weighting

STEPS = 100


class Case(NamedTuple):
    net: str
    method: str
    sharpness: Sharpness | None = None
    weights_every: int = 1
    base: str = "momentum"


CASES = {
    "mlp-plain": Case("mlp", "mgda", None, base="adam"),
    "mlp-pcgrad": Case("mlp", "pcgrad", Sharpness(0.05), base="adam"),
    "mlp-fairgrad-asam": Case(
        "mlp", "fairgrad", Sharpness(0.5, 0.2, adaptive=True, eta=0.01, exempt_bias=True)
    ),
    "mlp-cagrad-each": Case("mlp", "cagrad", Sharpness(0.05, aggregate="each"), base="adam"),
    "mlp-weights-every": Case("mlp", "mgda", Sharpness(0.05, 0.1), weights_every=4),
    "mlp-plain-weights-every": Case("mlp", "fairgrad", None, weights_every=3),
    "cnn-pcgrad": Case("cnn", "pcgrad", Sharpness(0.05)),
    "cnn-mgda-asam": Case("cnn", "mgda", Sharpness(0.5, adaptive=True)),
    "cnn-nash-direct": Case("cnn", "nash", Sharpness(0.05, aggregate="direct")),
    "cnn-weights-every-direct": Case(
        "cnn", "constant", Sharpness(0.05, aggregate="direct"), weights_every=3
    ),
    "gru-pcgrad": Case("gru", "pcgrad", Sharpness(0.05), base="adam"),
    "gru-fairgrad-every": Case("gru", "fairgrad", Sharpness(0.05, every=3, warmup=20)),
    "gru-pcgrad-each": Case("gru", "pcgrad", Sharpness(0.05, aggregate="each")),
    "transformer-pcgrad": Case("transformer", "pcgrad", Sharpness(0.05)),
    "transformer-nash-joint": Case(
        "transformer", "nash", Sharpness(0.1, 0.05, joint_norm=True)
    ),
    "transformer-mean-second": Case("transformer", "mean", Sharpness(0.05, aggregate="second")),
}  # fmt: skip
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)

# The reference's CAGrad has no ridge (1e-10) on the cosines; all others solve the same problem.
TOLERANCE = {"cagrad": 1e-7}


def methods(name: str, tasks: int) -> tuple[Weighting, ref.Weights]:
    order = ref.cyclic_order(tasks)
    values = [0.7, 0.4, 1.3][:tasks]
    return {
        "mean": lambda: (Mean(), ref.mean),
        "constant": lambda: (
            Constant(weights=torch.tensor(values, dtype=torch.float64)),
            ref.constant(values),
        ),
        "pcgrad": lambda: (PCGrad(order=torch.from_numpy(order)), ref.pcgrad(order)),
        "mgda": lambda: (MGDA(), ref.mgda),
        "cagrad": lambda: (CAGrad(c=0.4), ref.cagrad),
        "nash": lambda: (NashMTL(), ref.nash),
        "fairgrad": lambda: (FairGrad(alpha=2.0), ref.fairgrad),
    }[name]()


def base_optimizer(case: Case, net: nn.Module) -> torch.optim.Optimizer:
    if case.base == "adam":
        return torch.optim.Adam(net.parameters(), lr=3e-3)
    return torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)


def reference(case: Case, seed: int, dtype: torch.dtype) -> Reference:
    net = nets.make(case.net, seed, dtype)
    weights = methods(case.method, type(net).tasks)[1]
    return Reference(net, weights, base_optimizer(case, net), case.sharpness, case.weights_every)


def flat(case: Case, seed: int, dtype: torch.dtype) -> tuple[nn.Module, MultiTaskOptimizer]:
    net = nets.make(case.net, seed, dtype)
    s, options = case.sharpness, {}
    if case.weights_every != 1:
        options["weights_every"] = case.weights_every
    if s is not None:  # what is not asked for is not passed
        given = {k: v for k, v in vars(s).items() if v != getattr(Sharpness(s.rho), k)}
        options["sharpness"] = SAM(s.rho, **given)
    weighting = methods(case.method, type(net).tasks)[0]
    return net, MultiTaskOptimizer(base_optimizer(case, net), weighting=weighting, model=net,
                                   **options)  # fmt: skip


def vector(tensors) -> Tensor:
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


def distance(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(a - b))


@cases
def test_the_same_hundred_steps_in_float64(case, rng):
    seed = int(rng.integers(1 << 30))
    truth = reference(case, seed, torch.float64)
    net, opt = flat(case, seed, torch.float64)
    tolerance = TOLERANCE.get(case.method, 1e-10)
    start = vector(net.parameters())
    for batch in nets.batches(case.net, seed + 1, STEPS):
        expected = truth.step(lambda: truth.model.losses(batch))
        losses = opt.step(lambda: net.losses(batch))
        torch.testing.assert_close(torch.stack(list(losses)), torch.stack(expected),
                                   rtol=tolerance, atol=0)  # fmt: skip
    theirs = vector(truth.model.parameters())
    assert distance(theirs, start) > 0.1 * float(start.norm())  # it went somewhere
    assert distance(vector(net.parameters()), theirs) <= tolerance * distance(theirs, start)
    assert (
        distance(vector(net.buffers()), vector(truth.model.buffers()))
        <= tolerance * (1 + float(vector(truth.model.buffers()).norm()))
        if list(net.buffers())
        else True
    )


def round_to_float32(trainer: Reference) -> None:
    """Parameters, buffers and moments to what float32 can hold."""
    states = [v for state in trainer.base.state.values() for v in state.values()]
    with torch.no_grad():
        for t in [*trainer.model.parameters(), *trainer.model.buffers(), *states]:
            if isinstance(t, Tensor) and t.dtype == torch.float64:
                t.copy_(t.float())


def put_flatmtl_at(net: nn.Module, opt: MultiTaskOptimizer, truth: Reference) -> None:
    net.load_state_dict(truth.model.state_dict())
    for p, theirs in zip(net.parameters(), truth.params):
        for key, value in truth.base.state.get(theirs, {}).items():
            same = not isinstance(value, Tensor) or value.dtype != torch.float64
            opt.base_optimizer.state[p][key] = value if same else value.float()
            if isinstance(value, Tensor) and same:
                opt.base_optimizer.state[p][key] = value.clone()


def float32_errors(case: Case, seed: int) -> dict[str, np.ndarray]:
    """what -> [plain torch's, flatmtl's] rms error of a step, each step relative to the exact one."""
    truth = reference(case, seed, torch.float64)
    plain = reference(case, seed, torch.float32)
    net, opt = flat(case, seed, torch.float32)
    squares: dict[str, np.ndarray] = {}
    for batch in nets.batches(case.net, seed + 1, STEPS):
        round_to_float32(truth)
        plain.place_at(truth)
        put_flatmtl_at(net, opt, truth)
        before = vector(truth.params)
        small = nets.cast(batch, torch.float32)
        exact = truth.step(lambda: truth.model.losses(batch))
        losses = [plain.step(lambda: plain.model.losses(small)),
                  opt.step(lambda: net.losses(small))]  # fmt: skip
        params = [plain.params, list(net.parameters())]
        own = [k for index in truth.own for k in index]

        def add(what: str, found: list[Tensor], expected: Tensor, scale: float) -> None:
            error = np.array([distance(f, expected) for f in found]) / scale
            squares[what] = squares.get(what, 0.0) + error**2 / STEPS

        for what, index in (("shared gradient", truth.shared), ("own gradient", own)):
            expected = vector([truth.params[k].grad for k in index])
            found = [vector([p[k].grad for k in index]) for p in params]
            add(what, found, expected, float(expected.norm()))
        after = vector(truth.params)
        add("parameters", [vector(p) for p in params], after, distance(after, before))
        exact = torch.stack(exact)
        add("losses", [torch.stack(list(x)).double() for x in losses], exact, float(exact.norm()))
    return {what: np.sqrt(s) for what, s in squares.items()}


@cases
def test_float32_steps_are_as_good_as_plain_torch(case, rng):
    errors = float32_errors(case, int(rng.integers(1 << 30)))
    for what, (plain, mine) in errors.items():
        assert 0 < plain < 0.1, (what, plain)  # a float32 error, not another step
        assert mine <= 2 * plain, (what, mine / plain, errors)
